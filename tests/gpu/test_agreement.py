"""The CUDA backend against the CPU backend on the same numbers.

Runs where torch finds a GPU, and over emulated libraries (see test_emulated.py).
"""

import itertools
import math

import pytest
import torch
from torch import Tensor

import ekfac_rs as ek
from ekfac_rs import _core
from ekfac_rs._tensors import accumulation_dtype
from gpu.devices import On

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
REALS = tuple(TOLERANCE)
STRATA = _core.strata()

# [N, T, K] and how its memory lies: the order of dimensions from outermost to innermost.
DENSE = {
    "matrix": ((7, 1, 5), (0, 1, 2)),
    "one example": ((1, 6, 3), (0, 1, 2)),
    "row by row": ((5, 4, 9), (0, 1, 2)),
    "channels first": ((5, 4, 9), (0, 2, 1)),
    "reversed": ((4, 3, 8), (2, 1, 0)),
    "more columns than threads of a block": ((3, 5, 300), (0, 1, 2)),
    "wide enough for one triangle": ((3, 2, 1030), (0, 1, 2)),
    "more units than one run": ((130, 7, 4), (0, 2, 1)),
}

# Shape, then kernel, stride, dilation, padding.
PATCHES = {
    "3x3": ((3, 4, 6, 7), (3, 3), (1, 1), (1, 1), ((1, 1), (1, 1))),
    "strided, dilated, asymmetric": ((2, 4, 9, 8), (2, 3), (2, 1), (1, 2), ((0, 3), (2, 1))),
    "pointwise with a stride": ((3, 4, 5, 5), (1, 1), (2, 2), (1, 1), ((0, 0), (0, 0))),
    "one dimension": ((3, 4, 11), (4,), (3,), (1,), ((2, 0),)),
    "three dimensions": (
        (2, 4, 3, 4, 5),
        (2, 1, 3),
        (1, 2, 1),
        (1, 1, 1),
        ((1, 0), (0, 0), (1, 1)),
    ),
    "only padding is seen": ((2, 4, 2), (1,), (9,), (1,), ((1, 0),)),
}

# Those that go by the offsets of kernel positions: stride 1, many channels.
BY_OFFSETS = {
    "3x3": ((3, 16, 9, 10), (3, 3), (1, 1), (1, 1), ((1, 1), (1, 1))),
    "not padded everywhere": ((2, 18, 14, 13), (3, 3), (1, 1), (1, 1), ((1, 0), (1, 1))),
    "dilated": ((2, 16, 16, 16), (3, 3), (1, 1), (2, 2), ((2, 2), (2, 2))),
    "dilated, asymmetric": ((2, 16, 14, 13), (2, 3), (1, 1), (2, 1), ((0, 3), (2, 1))),
    "one dimension": ((3, 20, 40), (5,), (1,), (2,), ((4, 3),)),
    "three dimensions": (
        (2, 16, 8, 7, 9),
        (2, 2, 2),
        (1, 1, 1),
        (1, 1, 1),
        ((1, 0), (0, 0), (1, 1)),
    ),
    "more images than one copy": ((3, 16, 96, 95), (2, 1), (1, 1), (1, 1), ((1, 0), (0, 0))),
}


def numbers(shape: tuple[int, ...], order: tuple[int, ...] | None = None, seed: int = 0) -> Tensor:
    """Normal numbers off zero, with dimensions in this order in memory."""
    generator = torch.Generator().manual_seed(seed)
    order = order or tuple(range(len(shape)))
    x = torch.randn([shape[d] for d in order], generator=generator, dtype=torch.float64) + 0.5
    return x.permute([order.index(d) for d in range(len(shape))])


def errors(got: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, relative to the largest entry of all that is expected."""
    scale = max(float(e.abs().max()) for e in expected) or 1.0
    return max(float((g - e).abs().max()) for g, e in zip(got, expected, strict=True)) / scale


DIVISOR = 3.0


def factors(on: On, x: Tensor, groups: int, real: torch.dtype, approximation: str, **options):
    """Factors of every stratum, from zero, divided and mirrored."""
    geometry = options.get("geometry")
    role, append_one = options["role"], options["append_one"]
    features = x.shape[-1] if geometry is None else x.shape[1] * math.prod(geometry[0])
    size = features // groups + append_one
    shape = (size, size) if groups == 1 else (groups, size, size)
    out = [on.put(torch.zeros(shape, dtype=real)) for _ in STRATA[approximation]]
    x = on.put(x)
    borrowed = [on.borrow(o) for o in out]
    if geometry is None:
        dof = _core.accumulate_gram(
            on.borrow(x), borrowed, approximation, role, append_one, 0.7, "ieee"
        )
    else:
        dof = _core.accumulate_patch_gram(
            on.borrow(x), borrowed, approximation, *geometry, append_one, 0.7, "ieee"
        )
    for o in out:
        _core.symmetrize(on.borrow(o), DIVISOR)
    return [o.cpu().double() for o in out], dof


ELEMENTS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("approximation", ["xkfac", "xkfac-nested"])
@pytest.mark.parametrize("real", [torch.float32, torch.float64])
def test_roots_of_the_mean_agree(both, approximation, groups, real):
    x = numbers((5, 4, 9)).to(real)
    for role, append_one in [("input", True), ("gradient", False)]:
        options = {"role": role, "append_one": append_one}
        squares, _ = factors(both[0], x, groups, real, approximation, **options)
        stack = () if groups == 1 else (groups,)
        size = 9 // groups + append_one
        roots = []
        for on in both:
            others = [on.put(torch.zeros(*stack, size, size, dtype=real)) for _ in squares[1:]]
            root = on.put(torch.zeros(*stack, size, dtype=real))
            out = [on.borrow(o) for o in (*others, root)]
            _core.accumulate_gram(
                on.borrow(on.put(x)), out, approximation, role, append_one, 0.7, "ieee"
            )
            roots.append(root.cpu().double())
        assert errors(roots[:1], roots[1:]) < TOLERANCE[real]
        root = roots[0].reshape(*stack, size, 1)
        assert errors([root @ root.mT / DIVISOR], squares[-1:]) < TOLERANCE[real]


@pytest.mark.parametrize("approximation", STRATA)
@pytest.mark.parametrize("shape", DENSE)
@pytest.mark.parametrize("element", ELEMENTS)
def test_factors_of_units_agree(both, shape, element, approximation):
    real = accumulation_dtype(element)
    size, order = DENSE[shape]
    x = numbers(size, order).to(element)
    for role, append_one in [("input", True), ("input", False), ("gradient", False)]:
        for groups in {g for g in (1, 2, 3, size[2]) if size[2] % g == 0}:
            options = {"role": role, "append_one": append_one}
            (got, dof), (expected, expected_dof) = (
                factors(on, x, groups, real, approximation, **options) for on in both
            )
            assert dof == expected_dof
            assert errors(got, expected) < TOLERANCE[real]


@pytest.mark.parametrize("approximation", STRATA)
@pytest.mark.parametrize("case", PATCHES)
@pytest.mark.parametrize("element", ELEMENTS)
def test_factors_of_patches_agree(both, case, element, approximation):
    real = accumulation_dtype(element)
    shape, *geometry = PATCHES[case]
    channels_last = (0, *range(2, len(shape)), 1)
    for order, groups, append_one in itertools.product(
        (None, channels_last), (1, 2, 4), (True, False)
    ):
        x = numbers(shape, order).to(element)
        options = {"role": "input", "append_one": append_one, "geometry": geometry}
        (got, dof), (expected, expected_dof) = (
            factors(on, x, groups, real, approximation, **options) for on in both
        )
        assert dof == expected_dof
        assert errors(got, expected) < TOLERANCE[real]


@pytest.mark.parametrize("approximation", STRATA)
@pytest.mark.parametrize("case", BY_OFFSETS)
@pytest.mark.parametrize("element", ELEMENTS)
def test_factors_of_patches_by_offsets_agree(both, case, element, approximation):
    real = accumulation_dtype(element)
    shape, *geometry = BY_OFFSETS[case]
    # Channels and examples with means of their own, far from zero.
    away = 20.0 * torch.arange(shape[1]) + 30.0 * torch.arange(shape[0])[:, None]
    away = away.reshape(*shape[:2], *[1] * (len(shape) - 2))
    for order, append_one in ((None, True), ((0, *range(2, len(shape)), 1), False)):
        options = {"role": "input", "append_one": append_one, "geometry": geometry}
        for x in (numbers(shape, order), numbers(shape, order) + away):
            x = x.to(element)
            cuda, cpu = both
            got, _ = factors(cuda, x, 1, real, approximation, **options)
            # In double precision: centred on the way, single keeps more digits than there.
            expected, _ = factors(cpu, x.double(), 1, torch.float64, approximation, **options)
            for stratum in zip(got, expected, strict=True):
                assert errors(*([factor] for factor in stratum)) < TOLERANCE[real]
        if approximation != "kfac-expand":
            continue
        # Another factor is as it was, and a transposed one as good.
        out = [on.put(torch.ones(got[0].shape, dtype=real)).T for on in both]
        for on, target in zip(both, out, strict=True):
            borrowed = on.borrow(on.put(x)), [on.borrow(target)], "kfac-expand"
            _core.accumulate_patch_gram(*borrowed, *geometry, append_one, 0.7, "ieee")
        first, second = (target.cpu().double().tril() for target in out)
        assert errors([first], [second]) < TOLERANCE[real]


def test_half_precision_is_read_exactly(both):
    # Every finite number of half precision, subnormal ones among them, once; and those of bfloat16
    # whose squares single precision holds. Each is a group of its own, of one unit.
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    sizes = {torch.float16: (0.0, 2.0**16), torch.bfloat16: (2.0**-60, 2.0**60)}
    for dtype, (least, most) in sizes.items():
        every = bits.view(dtype)
        every = every[(every.float().abs() >= least) & (every.float().abs() < most)]
        options = {"role": "input", "append_one": True}
        expected = every.double() * 0.7 / DIVISOR
        for on in both:
            (got,), _ = factors(
                on, every[None], len(every), torch.float32, "kfac-expand", **options
            )
            assert torch.allclose(got[:, 1, 0], expected, rtol=1e-6, atol=0.0)
            assert torch.allclose(got[:, 0, 0], expected * every.double(), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("of_patches", [False, True])
def test_non_finite_input_is_named_alike_and_nothing_is_written(both, of_patches, element, value):
    x = numbers((3, 4, 5, 2) if of_patches else (3, 4, 5)).to(element)
    x[1, 2, 3] = value
    errors = []
    for on in both:
        placed = on.put(x)
        size = (16, 16) if of_patches else (5, 5)
        out = on.put(torch.full(size, 2.0, dtype=accumulation_dtype(element)))
        ends = (False, 1.0, "ieee")
        start = on.borrow(placed), [on.borrow(out)], "kfac-expand"
        if of_patches:
            middle, accumulate = (
                ((2, 2), (1, 1), (1, 1), ((0, 0), (0, 0))),
                _core.accumulate_patch_gram,
            )
        else:
            middle, accumulate = ("input",), _core.accumulate_gram
        with pytest.raises(ek.errors.NonFiniteError, match="contains") as caught:
            accumulate(*start, *middle, *ends)
        assert bool((out == 2.0).all())
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


def test_single_precision_keeps_what_a_large_mean_leaves(both):
    x = (numbers((64, 1, 6)) * 1e-2 + 1e3).float()
    options = {"role": "input", "append_one": True}
    (got, _), (expected, _) = (factors(on, x, 1, torch.float32, "xkfac", **options) for on in both)
    assert errors(got[:1], expected[:1]) < 1e-5


@pytest.mark.parametrize(("precision", "bound"), [("tf32", 1e-3), ("bf16", 8e-3)])
@pytest.mark.parametrize("approximation", STRATA)
def test_tensor_cores_are_for_a_gpu_and_round_no_more_than_is_said(
    both, approximation, precision, bound
):
    cuda, cpu = both
    # Of one unit rounding is not averaged out.
    for x in (numbers((50, 4, 24)).float(), numbers((2, 1, 24)).float()):
        options = ("input", True, 1.0)
        out = {}
        for rounded in ("ieee", precision):
            factors = [cuda.put(torch.zeros(25, 25)) for _ in STRATA[approximation]]
            placed = cuda.put(x)
            _core.accumulate_gram(
                cuda.borrow(placed),
                list(map(cuda.borrow, factors)),
                approximation,
                *options,
                rounded,
            )
            out[rounded] = [A.cpu().tril() for A in factors]
        pairs = [(got, A) for got, A in zip(out[precision], out["ieee"], strict=True) if A.any()]
        assert all(float((got - A).norm() / A.norm()) < bound for got, A in pairs)
    with pytest.raises(ValueError, match=f'expected "ieee" on the CPU, got "{precision}"'):
        _core.accumulate_gram(
            cpu.borrow(x), list(map(cpu.borrow, factors)), approximation, *options, precision
        )


def psd(groups: int, size: int, rank: int, seed: int) -> Tensor:
    root = numbers((groups, size, rank), seed=seed)
    matrix = root @ root.mT / rank
    return matrix[0] if groups == 1 else matrix


def terms(on: On, groups: int, D: int, K: int, count: int, real: torch.dtype):
    made = [
        (psd(groups, K, K + 2, 2 * k), psd(groups, D // groups, D + 2, 2 * k + 1))
        for k in range(count)
    ]
    return [(on.put(A.to(real)), on.put(G.to(real))) for A, G in made]


SIZES = [(1, 4, 7, 1), (1, 6, 3, 2), (1, 130, 5, 3), (3, 6, 4, 2), (5, 5, 9, 3), (4, 8, 1, 1)]


INPUTS = {
    "rows": ((6, 5, 1), (0, 1, 2)),
    "a place after the other": ((4, 3, 7), (0, 1, 2)),
    "a channel after the other": ((4, 3, 7), (0, 2, 1)),
    "examples innermost": ((4, 3, 7), (1, 2, 0)),
    "many": ((3, 130, 70), (0, 1, 2)),
}


@pytest.mark.parametrize("shape", INPUTS)
@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("gradients", ["both", "of the mean", "of the variance"])
def test_gradients_of_moments_agree(both, shape, element, gradients):
    real = accumulation_dtype(element)
    size, order = INPUTS[shape]
    x, known = (numbers(size, order, seed).to(element) for seed in (0, 1))
    mean, of_mean, of_variance = numbers((3, size[1]), seed=2).to(real)
    rows = {
        "both": (of_mean, of_variance),
        "of the mean": (of_mean, None),
        "of the variance": (None, of_variance),
    }[gradients]
    for keep in (False, True):
        found = []
        for on in both:
            # In another order than what is read, too.
            for out in (on.put(known), on.put(known.contiguous())):
                given = mean, *rows
                borrowed = [None if part is None else on.borrow(on.put(part)) for part in given]
                _core.moments_backward(on.borrow(on.put(x)), *borrowed, on.borrow(out), keep)
                found.append(out.cpu().double())
        count = size[0] * size[2]
        exact = keep * known.double()
        for part, row in zip((1.0, 2.0 * (x.double() - mean[:, None])), rows, strict=True):
            exact = exact + (0.0 if row is None else row[:, None].double() / count * part)
        # Half precision is rounded once, at the end.
        bound = max(TOLERANCE[real], torch.finfo(element).eps)
        assert all(errors([out], [exact]) < bound for out in found)


@pytest.mark.parametrize("real", REALS)
@pytest.mark.parametrize(("groups", "D", "K", "count"), SIZES)
def test_algebra_agrees(both, groups, D, K, count, real):
    results = []
    for on in both:
        ts = terms(on, groups, D, K, count, real)
        borrowed = [(on.borrow(A), on.borrow(G)) for A, G in ts]
        V = on.put(numbers((3, D, K), seed=9).to(real))
        out = on.put(torch.zeros(3, D, K, dtype=real))
        diagonal = on.put(torch.zeros(D, K, dtype=real))
        dense = on.put(torch.zeros(D * K, D * K, dtype=real))
        applied = on.put(torch.zeros(D, K, dtype=real))
        _core.kronecker_product(borrowed, on.borrow(V), on.borrow(out), 0.3)
        _core.kronecker_diagonal(borrowed, on.borrow(diagonal))
        _core.kronecker_dense(borrowed, on.borrow(dense))
        first = V[0]
        _core.KroneckerOperator(borrowed).apply(on.borrow(first), on.borrow(applied))
        solved = on.put(torch.zeros(3, D, K, dtype=real))
        _core.conjugate_gradients(borrowed, 0.5, on.borrow(V), on.borrow(solved), 1e-6, 500)
        numbers_of = [
            _core.kronecker_trace(borrowed),
            _core.kronecker_quadratic(borrowed, on.borrow(V)),
            _core.kronecker_inner(borrowed, borrowed),
            _core.kronecker_top_eigenvalue(borrowed, 0.1),
        ]
        tensors = [t.cpu().double() for t in (out, diagonal, dense, applied)]
        results.append((tensors, numbers_of, solved.cpu().double()))
    (got, got_numbers, got_solved), (expected, expected_numbers, expected_solved) = results
    for g, e in zip(got, expected, strict=True):
        assert errors([g], [e]) < TOLERANCE[real]
    *rest, top = got_numbers
    *expected_rest, expected_top = expected_numbers
    assert rest == pytest.approx(expected_rest, rel=10 * TOLERANCE[real])
    assert top == pytest.approx(expected_top, rel=2e-4)
    assert errors([got_solved], [expected_solved]) < 1e-5


@pytest.mark.parametrize("real", REALS)
@pytest.mark.parametrize(("D", "K"), [(6, 9), (9, 4), (130, 70)])
def test_products_through_roots_agree(both, D, K, real):
    def factors(size: int, seed: int) -> dict[str, tuple[Tensor, float | None] | None]:
        matrix, root = psd(1, size, size + 2, seed), numbers((size, 3), seed=seed + 1)
        return {
            "whole": (matrix, None),
            "thin": (root, 0.0),
            "shifted": (root, 0.5),
            "identity": None,
        }

    of_A, of_G = factors(K, 1), factors(D, 5)
    kinds = [("whole", "whole"), *((kind, "thin") for kind in of_A)]
    sums = [kinds, [("thin", kind) for kind in of_G], [("identity", "thin"), ("thin", "shifted")]]
    V = numbers((len(sums), D, K), seed=9)
    results = []
    for on in both:
        products, kept = [], []
        out = on.put(torch.zeros(len(sums), D, K, dtype=real))
        inner = on.put(torch.zeros(len(sums), 1, 2, dtype=torch.float64))
        placed = on.put(V.to(real))
        for index, terms in enumerate(sums):
            borrowed = []
            for kind_A, kind_G in terms:
                sides = []
                for factor in (of_A[kind_A], of_G[kind_G]):
                    tensor = None if factor is None else on.put(factor[0].to(real))
                    kept.append(tensor)
                    shift = None if factor is None else factor[1]
                    sides.append(None if tensor is None else (on.borrow(tensor), shift))
                borrowed.append(tuple(sides))
            operator = _core.KroneckerOperator.from_factors((D, K), borrowed)
            tensors = on.borrow(placed[index]), on.borrow(out[index]), 0.25, on.borrow(inner[index])
            products.append((operator, *tensors))
        _core.apply_operators(products, 2.0)
        results.append([out.cpu().double(), inner.cpu()])
    (got, got_inner), (expected, expected_inner) = results
    assert errors([got], [expected]) < TOLERANCE[real]
    torch.testing.assert_close(got_inner, expected_inner, rtol=10 * TOLERANCE[real], atol=1e-6)
    assert expected.any()


@pytest.mark.parametrize("real", REALS)
def test_what_is_wanted_of_products_agrees(both, real):
    """Of more layers than go into a launch, among them one with more elements than threads take."""
    sizes = [(3, 2)] * 33 + [(1, 1), (400, 1400), (700, 3)]
    results = []
    for on in both:
        products, out, inner = [], [], []
        for index, (D, K) in enumerate(sizes):
            operator = _core.KroneckerOperator(
                [(on.borrow(A), on.borrow(G)) for A, G in terms(on, 1, D, K, 1, real)]
            )
            V = on.put(numbers((D, K), (1, 0) if index % 2 else None, seed=index).to(real))
            out.append(on.put(torch.zeros(D, K, dtype=real)))
            inner.append(on.put(torch.zeros(1, 2, dtype=torch.float64)))
            tensors = on.borrow(V), on.borrow(out[-1]), 0.1 * index, on.borrow(inner[-1])
            products.append((operator, *tensors))
        _core.apply_operators(products, 2.0)
        results.append([[x.cpu().double() for x in found] for found in (out, inner)])
    (got, got_inner), (expected, expected_inner) = results
    for one, other in zip(got, expected, strict=True):
        assert errors([one], [other]) < TOLERANCE[real]
    for one, other in zip(got_inner, expected_inner, strict=True):
        torch.testing.assert_close(one, other, rtol=10 * TOLERANCE[real], atol=1e-6)


@pytest.mark.parametrize("real", REALS)
@pytest.mark.parametrize(("groups", "D", "K", "count"), [s for s in SIZES if s[3] < 3])
def test_inverses_and_roots_agree(both, groups, D, K, count, real):
    results = []
    for on in both:
        borrowed = [(on.borrow(A), on.borrow(G)) for A, G in terms(on, groups, D, K, count, real)]
        V = on.put(numbers((2, D, K), seed=8).to(real))
        out = [on.put(torch.zeros(2, D, K, dtype=real)) for _ in range(2)]
        inverse = _core.KroneckerInverse(borrowed, 0.0 if count == 2 else 0.2)
        inverse.solve(on.borrow(V), on.borrow(out[0]))
        noise = on.put(numbers((2, count, D, K), seed=7).to(real))
        _core.KroneckerRoot(borrowed).apply(on.borrow(noise), on.borrow(out[1]))
        results.append(([o.cpu().double() for o in out], inverse.logdet()))
    (got, got_logdet), (expected, expected_logdet) = results
    # Inverses are computed in double precision everywhere; roots are rounded to the dtype.
    for g, e in zip(got, expected, strict=True):
        assert errors([g], [e]) < (1e-5 if real == torch.float32 else 1e-10)
    assert got_logdet == pytest.approx(expected_logdet, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("real", REALS)
@pytest.mark.parametrize(
    "shape", [(1, 1), (5, 5), (40, 40), (7, 3, 3), (600, 2, 2), (4, 32, 32), (3, 33, 33)]
)
def test_eigendecompositions_reproduce_the_matrix(both, shape, real):
    cuda, cpu = both
    x = numbers(shape, seed=3).to(real)
    x = x + x.mT
    spectra = []
    for on in (cuda, cpu):
        placed = on.put(x)
        values = on.put(torch.zeros(shape[:-1], dtype=real))
        vectors = on.put(torch.zeros(shape, dtype=real))
        _core.eigh(on.borrow(placed), on.borrow(values), on.borrow(vectors))
        w, Q = values.cpu().double(), vectors.cpu().double()
        tolerance = 20 * shape[-1] * torch.finfo(real).eps
        assert errors([(Q * w[..., None, :]) @ Q.mT], [x.double()]) < tolerance
        identity = torch.eye(shape[-1], dtype=torch.float64).expand(shape)
        assert errors([Q.mT @ Q], [identity]) < tolerance
        spectra.append(w)
    assert errors(spectra[:1], spectra[1:]) < 20 * TOLERANCE[real]


def test_compression_agrees(both):
    results = []
    for on in both:
        ts = terms(on, 2, 6, 5, 3, torch.float64)
        out = [
            (on.put(torch.zeros_like(A.cpu())), on.put(torch.zeros_like(G.cpu())))
            for A, G in ts[:2]
        ]
        error = _core.kronecker_compress(
            [(on.borrow(A), on.borrow(G)) for A, G in ts],
            [(on.borrow(A), on.borrow(G)) for A, G in out],
        )
        results.append(([t.cpu() for pair in out for t in pair], error))
    (got, got_error), (expected, expected_error) = results
    assert errors(got, expected) < 1e-8
    assert got_error == pytest.approx(expected_error, rel=1e-8)


def test_tensors_of_two_devices_are_refused(both):
    cuda, cpu = both
    A, G, V = torch.eye(3), torch.eye(2), torch.ones(2, 3)
    placed = [cuda.put(t) for t in (A, G, V)]
    term = cuda.borrow(placed[0]), cuda.borrow(placed[1])
    out = torch.zeros(2, 3)
    for v, o in (
        (cpu.borrow(V), cuda.borrow(placed[2])),
        (cuda.borrow(placed[2]), cpu.borrow(out)),
    ):
        with pytest.raises(ValueError, match="one device"):
            _core.kronecker_product([term], v, o, 0.0)
    with pytest.raises(ValueError, match="one device"):
        _core.kronecker_trace([(cuda.borrow(placed[0]), cpu.borrow(G))])
    operator = _core.KroneckerOperator([term])
    with pytest.raises(ValueError, match="one device"):
        operator.apply(cpu.borrow(V), cpu.borrow(out))
