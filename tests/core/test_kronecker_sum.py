"""`KroneckerSum` against dense linear algebra."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ekfac_rs as ek
from oracle import dense, relative_error

settings.register_profile("core", deadline=None, max_examples=30, derandomize=True)
settings.load_profile("core")

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-4}


def factor(size: int, rank: int, generator: torch.Generator) -> Tensor:
    """A random positive semi-definite matrix of the given rank."""
    root = torch.randn(size, max(rank, 1), generator=generator, dtype=torch.float64)
    return root @ root.mT / size if rank else torch.zeros(size, size, dtype=torch.float64)


def make(
    D: int, K: int, count: int, seed: int = 0, *, singular: bool = False, dtype=torch.float64
) -> ek.KroneckerSum:
    """A sum of well-conditioned terms, or of rank-deficient ones."""
    generator = torch.Generator().manual_seed(seed)
    terms = []
    for _ in range(count):
        A = factor(K, max(K - 2, 0) if singular else K, generator)
        G = factor(D, max(D - 1, 0) if singular else D, generator)
        if not singular:
            A += 0.3 * torch.eye(K, dtype=torch.float64)
            G += 0.3 * torch.eye(D, dtype=torch.float64)
        terms.append((A.to(dtype), G.to(dtype)))
    return ek.KroneckerSum(terms)


def matrix_of(block: ek.KroneckerSum, damping: float = 0.0) -> Tensor:
    H = dense((A.double(), G.double()) for A, G in block.terms)
    return H + damping * torch.eye(len(H), dtype=torch.float64)


def vectors(block: ek.KroneckerSum, *batch: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*batch, *block.shape, generator=generator, dtype=torch.float64)
    return values.to(block.dtype)


sizes = st.integers(1, 6)
counts = st.integers(1, 3)
seeds = st.integers(0, 10**6)
flags = st.booleans()
dtypes = st.sampled_from([torch.float64, torch.float32])
blocks = st.builds(make, sizes, sizes, counts, seeds, singular=flags, dtype=dtypes)
regular = st.builds(make, sizes, sizes, counts, seeds)
dampings = st.sampled_from([1e-3, 0.1, 2.0])


def close(actual: float, expected: float, block: ek.KroneckerSum, scale: float = 0.0) -> bool:
    bound = TOLERANCE[block.dtype] * max(abs(expected), scale)
    return abs(actual - expected) <= bound + 1e-30


@given(blocks)
def test_shape_and_dtype_are_those_of_the_factors(block):
    A, G = block.terms[0]
    assert block.shape == (len(G), len(A))
    assert block.dtype == A.dtype
    assert block.device == A.device


@given(blocks, st.sampled_from([(), (1,), (4,)]))
def test_product(block, batch):
    V = vectors(block, *batch)
    expected = (V.double().flatten(-2) @ matrix_of(block)).reshape(V.shape)
    found = block.product(V)
    assert found.shape == V.shape
    assert found.dtype == V.dtype
    error = (found.double() - expected).norm()
    assert error <= TOLERANCE[block.dtype] * matrix_of(block).norm() * V.double().norm()


@given(blocks)
def test_product_of_a_batch_is_the_products_of_its_matrices(block):
    V = vectors(block, 3)
    assert torch.allclose(
        block.product(V), torch.stack([block.product(v) for v in V]), rtol=1e-4, atol=1e-5
    )


@given(regular)
def test_product_reads_any_memory_layout(block):
    V = vectors(block, 3)
    expected = block.product(V)
    D, K = block.shape
    layouts = [
        V.mT.contiguous().mT,
        V.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        torch.cat([V, torch.full_like(V, math.nan)], -1)[..., :K],
        V.repeat_interleave(2, 1)[:, ::2],
        V.flip(0).flip(0),
    ]
    for layout in layouts:
        assert torch.equal(layout, V)
        assert relative_error(block.product(layout), expected) < 1e-13
    broadcast = V[:1].expand(3, D, K)
    assert relative_error(block.product(broadcast)[2], expected[0]) < 1e-13


@given(regular)
def test_factors_of_any_memory_layout(block):
    def strided(x: Tensor) -> Tensor:
        return torch.stack([x, torch.full_like(x, math.nan)], -1)[..., 0]

    other = ek.KroneckerSum([(strided(A), strided(G)) for A, G in block.terms])
    V = vectors(block)
    assert relative_error(other.product(V), block.product(V)) < 1e-13
    assert relative_error(other.dense(), block.dense()) < 1e-13
    assert other.norm() == pytest.approx(block.norm(), rel=1e-13)
    assert relative_error(other.solve(V, 0.1), block.solve(V, 0.1)) < 1e-9


def test_product_of_an_empty_batch_is_empty():
    assert make(2, 3, 2).product(torch.empty(0, 2, 3, dtype=torch.float64)).shape == (0, 2, 3)


@given(blocks)
def test_quadratic_form(block):
    V = vectors(block, 2)
    flat = V.double().flatten(-2)
    expected = torch.einsum("sp,pq,sq->", flat, matrix_of(block), flat).item()
    scale = matrix_of(block).norm().item() * flat.square().sum().item()
    assert close(block.quadratic(V), expected, block, scale)
    assert isinstance(block.quadratic(V[0]), float)


@given(blocks)
def test_trace_norm_and_diagonal(block):
    H = matrix_of(block)
    assert close(block.trace(), H.trace().item(), block, H.norm().item())
    assert close(block.norm(), H.norm().item(), block)
    assert block.diagonal().shape == block.shape
    error = (block.diagonal().double().flatten() - H.diagonal()).norm()
    assert error <= TOLERANCE[block.dtype] * H.norm()


@given(sizes, sizes, counts, counts, seeds)
def test_inner_product(D, K, first, second, seed):
    one, two = make(D, K, first, seed), make(D, K, second, seed + 1)
    expected = (matrix_of(one) * matrix_of(two)).sum().item()
    assert one.inner(two) == pytest.approx(expected, rel=1e-11)
    assert one.inner(one) == pytest.approx(one.norm() ** 2, rel=1e-11)


@given(blocks)
def test_dense_is_row_by_row(block):
    error = (block.dense().double() - matrix_of(block)).norm()
    assert error <= TOLERANCE[block.dtype] * matrix_of(block).norm()


@given(sizes, sizes, counts, counts, seeds, st.floats(0, 10))
def test_sums_and_multiples(D, K, first, second, seed, factor):
    one, two = make(D, K, first, seed), make(D, K, second, seed + 1)
    assert relative_error((one + two).dense(), matrix_of(one) + matrix_of(two)) < 1e-12
    for scaled in (factor * one, one * factor):
        assert torch.allclose(
            scaled.dense(), factor * matrix_of(one), rtol=1e-12, atol=1e-12 * one.norm()
        )
    assert (one.dense() - matrix_of(one)).norm() < 1e-12 * one.norm()


@given(regular)
def test_scaling_and_adding_leave_the_operands_alone(block):
    before = [(A.clone(), G.clone()) for A, G in block.terms]
    _ = block * 3.0, block + block, block.damped(0.5), block.compress(1)
    _ = block.solve(vectors(block), 0.1), block.sample(1, 0.1), block.eigh()
    for (A, G), (A_before, G_before) in zip(block.terms, before, strict=True):
        assert torch.equal(A, A_before)
        assert torch.equal(G, G_before)


@given(blocks)
def test_eigendecomposition_of_every_term(block):
    tolerance = TOLERANCE[block.dtype]
    decompositions = block.eigh()
    assert len(decompositions) == len(block.terms)
    for (A, G), (values_A, U_A, values_G, U_G) in zip(block.terms, decompositions, strict=True):
        for matrix, values, U in ((A, values_A, U_A), (G, values_G, U_G)):
            scale = matrix.norm().item() + 1e-30
            eye = torch.eye(len(matrix), dtype=matrix.dtype)
            assert (U * values @ U.mT - matrix).norm().item() <= tolerance * scale
            assert (U.mT @ U - eye).norm().item() <= tolerance * len(matrix)
            assert (values.diff() >= 0).all()


@given(blocks, st.sampled_from([0.0, 0.5]))
def test_top_eigenvalue(block, damping):
    expected = torch.linalg.eigvalsh(matrix_of(block, damping))[-1].item()
    assert block.top_eigenvalue(damping) == pytest.approx(expected, rel=2e-4, abs=1e-12)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_top_eigenvalue_of_larger_blocks(count):
    block = make(20, 25, count, seed=count)
    expected = torch.linalg.eigvalsh(matrix_of(block))[-1].item()
    assert block.top_eigenvalue() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("singular", [False, True])
@pytest.mark.parametrize(("sign_a", "sign_g"), [(1, 1), (1, -1), (-1, -1)])
def test_top_eigenvalue_of_one_term_with_a_large_factor(sign_a, sign_g, singular):
    """Whatever the signs: a product of two smallest eigenvalues may be the largest of all."""
    ((A, G),) = make(5, 600, 1, singular=singular).terms
    block = ek.KroneckerSum([(sign_a * A, sign_g * G)])
    values = (torch.linalg.eigvalsh(sign * F) for sign, F in ((sign_a, A), (sign_g, G)))
    products = torch.outer(*values)
    expected, size = products.max().item(), products.abs().max().item()
    assert block.top_eigenvalue() == pytest.approx(expected, rel=1e-4, abs=1e-4 * size)


# --- inverses -----------------------------------------------------------------------------


@given(regular, st.sampled_from([0.0, 1e-3, 0.1, 2.0]), st.sampled_from([(), (3,)]))
def test_solve(block, damping, batch):
    V = vectors(block, *batch)
    H = matrix_of(block, damping)
    expected = torch.linalg.solve(H, V.flatten(-2)[..., None])[..., 0].reshape(V.shape)
    found = block.solve(V, damping)
    assert found.shape == V.shape
    assert relative_error(found, expected) < 1e-9


@given(st.builds(make, sizes, sizes, counts, seeds, singular=st.just(True)), dampings)
def test_solve_with_singular_factors_and_damping(block, damping):
    V = vectors(block)
    found = block.solve(V, damping)
    expected = torch.linalg.solve(matrix_of(block, damping), V.flatten()).reshape(V.shape)
    assert relative_error(found, expected) < 1e-9


@given(st.builds(make, sizes, sizes, counts, seeds, dtype=st.just(torch.float32)), dampings)
def test_solve_in_single_precision(block, damping):
    V = vectors(block)
    expected = torch.linalg.solve(matrix_of(block, damping), V.double().flatten())
    assert relative_error(block.solve(V, damping), expected.reshape(V.shape)) < 1e-3


def xkfac_like(seed: int = 0) -> ek.KroneckerSum:
    """Terms as a pass makes them: within of nearly full rank, mean of rank one, bias centred."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(40, 5, generator=generator, dtype=torch.float64) + 1
    a[:, -1] = 1
    g = torch.randn(40, 4, generator=generator, dtype=torch.float64)
    centred = a - a.mean(0)
    within = centred.mT @ centred / 39, torch.cov(g.mT)
    mean = 40 * torch.outer(a.mean(0), a.mean(0)), torch.outer(g.mean(0), g.mean(0))
    return ek.KroneckerSum([within, mean])


@pytest.mark.parametrize("damping", [1e-6, 1e-2, 1.0])
def test_solve_with_the_two_terms_of_a_pass(damping):
    block = xkfac_like()
    V = vectors(block)
    expected = torch.linalg.solve(matrix_of(block, damping), V.flatten()).reshape(V.shape)
    assert relative_error(block.solve(V, damping), expected) < 1e-6
    assert block.logdet(damping) == pytest.approx(
        torch.logdet(matrix_of(block, damping)).item(), rel=1e-9
    )


def test_solve_of_an_undamped_singular_block_is_refused():
    for count in (1, 2):
        block = make(3, 4, 1, singular=True)
        block = ek.KroneckerSum(block.terms * count)
        with pytest.raises(ek.errors.NumericalError):
            block.solve(vectors(block))
        with pytest.raises(ek.errors.NumericalError):
            block.logdet()


@given(regular, st.sampled_from([0.0, 1e-3, 0.1, 2.0]))
def test_logdet(block, damping):
    H = matrix_of(block, damping)
    expected = torch.logdet(H).item()
    assert block.logdet(damping) == pytest.approx(expected, rel=1e-9, abs=1e-9 * len(H))


@pytest.mark.parametrize("size", [127, 128, 129, 300, 513])
def test_one_term_without_damping_is_factored_panel_by_panel(size):
    block = make(3, size, 1)
    H, v = block.terms[0][0], vectors(block)
    G = block.terms[0][1]
    expected = torch.linalg.solve(G, torch.linalg.solve(H, v.mT).mT)
    assert relative_error(block.solve(v), expected) < 1e-12
    volume = 3 * torch.logdet(H) + size * torch.logdet(G)
    assert block.logdet() == pytest.approx(volume.item(), rel=1e-12)
    noise = torch.randn(3, size, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    (sample,) = block.sample(1, generator=torch.Generator().manual_seed(5))
    assert block.quadratic(sample) == pytest.approx(float(noise.square().sum()))


@pytest.mark.parametrize("value", [-1.0, 0.0, 1e-17])
@pytest.mark.parametrize("at", [0, 127, 128, 255, 299])
def test_one_pivot_that_is_not_positive_is_found_wherever_it_is(at, value):
    A = make(1, 300, 1).terms[0][0].clone()
    A[at, :] = A[:, at] = 0.0
    A[at, at] = value
    with pytest.raises(ek.errors.NumericalError, match="A is singular or indefinite"):
        ek.KroneckerSum([(A, torch.eye(2, dtype=torch.float64))]).solve(torch.ones(2, 300).double())


def test_logdet_without_closed_form_is_refused_for_large_blocks():
    block = make(65, 64, 2)
    with pytest.raises(ek.errors.OptionError, match="damped"):
        block.logdet(0.1)
    assert math.isfinite(block.logdet())
    assert math.isfinite(block.damped(0.1).logdet())


@given(regular, dampings)
def test_damped_adds_factored_damping_to_the_first_term(block, damping):
    (A, G), *others = block.terms
    K, D = len(A), len(G)
    pi = math.sqrt((A.trace().item() / K) / (G.trace().item() / D))
    A = A + pi * math.sqrt(damping) * torch.eye(K, dtype=torch.float64)
    G = G + math.sqrt(damping) / pi * torch.eye(D, dtype=torch.float64)
    expected = dense([(A, G), *others])
    found = block.damped(damping)
    assert relative_error(found.dense(), expected) < 1e-12
    assert len(found.terms) == len(block.terms)
    if len(block.terms) <= 2:
        V = vectors(block)
        solution = torch.linalg.solve(expected, V.flatten()).reshape(V.shape)
        assert relative_error(found.solve(V), solution) < 1e-8
        assert found.logdet() == pytest.approx(
            torch.logdet(expected).item(), rel=1e-9, abs=1e-9 * D * K
        )


def test_damping_makes_a_singular_first_term_invertible():
    block = xkfac_like()
    with pytest.raises(ek.errors.NumericalError):
        block.solve(vectors(block))
    damped = block.damped(0.01)
    V = vectors(block)
    expected = torch.linalg.solve(matrix_of(damped), V.flatten()).reshape(V.shape)
    assert relative_error(damped.solve(V), expected) < 1e-9


def test_damping_of_a_zero_first_term_stays_finite():
    zero = ek.KroneckerSum([(torch.zeros(3, 3), torch.zeros(2, 2))])
    damped = zero.damped(0.04)
    assert relative_error(damped.dense(), 0.04 * torch.eye(6)) < 1e-6


# --- compression --------------------------------------------------------------------------


def rearranged(block: ek.KroneckerSum) -> Tensor:
    """Kronecker products become rank-one matrices of vec G and vec A (Van Loan & Pitsianis)."""
    return sum(torch.outer(G.flatten(), A.flatten()) for A, G in block.terms)


@given(st.builds(make, st.integers(2, 5), st.integers(2, 5), st.integers(2, 3), seeds))
def test_compression_is_the_nearest_sum_of_fewer_products(block):
    singular_values = torch.linalg.svdvals(rearranged(block))
    for terms in (1, 2):
        compressed = block.compress(terms)
        assert len(compressed.terms) == min(terms, len(block.terms))
        best = singular_values[terms:].norm().item()
        distance = (compressed.dense() - block.dense()).norm().item()
        assert distance <= best * (1 + 1e-8) + 1e-10 * block.norm()
        for A, G in compressed.terms:
            assert torch.allclose(A, A.mT)
            assert torch.allclose(G, G.mT)
    for factor in block.compress(1).terms[0]:
        assert torch.linalg.eigvalsh(factor)[0] >= -1e-9 * factor.norm()


@given(st.builds(make, sizes, sizes, counts, seeds))
def test_compression_to_as_many_terms_changes_nothing(block):
    assert relative_error(block.compress(len(block.terms)).dense(), block.dense()) < 1e-10
    assert relative_error((block + block).compress(3).dense(), 2 * block.dense()) < 1e-7


# --- sampling -----------------------------------------------------------------------------

COVARIANCE_CASES = {
    "one term, no damping": (1, 0.0),
    "one term": (1, 0.3),
    "two terms, no damping": (2, 0.0),
    "two terms": (2, 0.3),
    "three terms, no damping": (3, 0.0),
    "three terms": (3, 0.3),
}


def covariance_error(samples: Tensor, precision: Tensor) -> float:
    """Distance of the whitened sample covariance from the identity."""
    white = samples @ torch.linalg.cholesky(precision)
    return (white.mT @ white / len(white) - torch.eye(white.shape[1]).double()).norm().item()


@pytest.mark.parametrize(("count", "damping"), COVARIANCE_CASES.values(), ids=COVARIANCE_CASES)
def test_samples_have_the_inverse_as_covariance(count, damping, generator):
    block = make(2, 3, count, seed=count)
    draws = 20_000
    samples = block.sample(draws, damping, generator=generator).flatten(1)
    assert samples.shape == (draws, 6)
    bound = 2 * math.sqrt(6 * 7 / draws)  # twice the root mean square error of a correct sampler
    assert covariance_error(samples, matrix_of(block, damping)) < bound
    assert covariance_error(samples, matrix_of(block, damping + 1)) > 5 * bound
    white = samples @ torch.linalg.cholesky(matrix_of(block, damping))
    assert white.mean(0).norm().item() < 2 * math.sqrt(6 / draws)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_samples_are_decided_by_the_generator_alone(count, damping):
    block = make(2, 3, count)
    before = torch.get_rng_state()

    def sample(seed: int) -> Tensor:
        return block.sample(4, damping, generator=torch.Generator().manual_seed(seed))

    first = sample(1)
    assert all(torch.equal(sample(1), first) for _ in range(100))
    assert not torch.equal(sample(2), first)
    assert torch.equal(torch.get_rng_state(), before)


def test_samples_without_a_generator_follow_the_global_seed():
    block = make(2, 3, 2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        first = block.sample(4, 0.1)
        second = block.sample(4, 0.1)
        torch.manual_seed(3)
        again = block.sample(4, 0.1)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_samples_in_single_precision():
    block = make(2, 3, 2, dtype=torch.float32)
    samples = block.sample(5, 0.1)
    assert samples.dtype == torch.float32
    assert samples.shape == (5, 2, 3)


# --- groups -------------------------------------------------------------------------------


def make_grouped(
    groups: int, D: int, K: int, count: int, seed: int = 0, *, dtype=torch.float64
) -> ek.KroneckerSum:
    """A sum whose every group of ``D`` rows has well-conditioned terms of its own."""
    parts = [make(D, K, count, seed + 1000 * g, dtype=dtype).terms for g in range(groups)]
    return ek.KroneckerSum(
        [
            (torch.stack([A for A, _ in term]), torch.stack([G for _, G in term]))
            for term in zip(*parts, strict=True)
        ]
    )


few = st.integers(1, 4)
grouped = st.builds(make_grouped, few, few, few, counts, seeds)
grouped_anyhow = st.builds(make_grouped, few, few, few, counts, seeds, dtype=dtypes)


@given(grouped_anyhow, st.sampled_from([(), (3,)]))
def test_groups_multiply_their_own_rows(block, batch):
    V = vectors(block, *batch)
    H = matrix_of(block)
    tolerance = TOLERANCE[block.dtype]
    expected = (V.double().flatten(-2) @ H).reshape(V.shape)
    assert relative_error(block.product(V).double(), expected) < tolerance
    quadratic = (expected * V.double()).sum().item()
    assert close(block.quadratic(V), quadratic, block)
    assert relative_error(block.dense().double(), H) < tolerance
    assert relative_error(block.diagonal().double().flatten(), H.diagonal()) < tolerance
    assert close(block.trace(), H.trace().item(), block)
    assert close(block.norm(), H.norm().item(), block)


@given(few, few, few, counts, seeds)
def test_inner_product_and_sum_of_groups(groups, D, K, count, seed):
    one, two = make_grouped(groups, D, K, count, seed), make_grouped(groups, D, K, 2, seed + 1)
    expected = (matrix_of(one) * matrix_of(two)).sum().item()
    assert one.inner(two) == pytest.approx(expected, rel=1e-11)
    assert relative_error((one + 2 * two).dense(), one.dense() + 2 * two.dense()) < 1e-12


@given(grouped_anyhow)
def test_shape_of_groups(block):
    A, G = block.terms[0]
    assert block.groups == len(A) == len(G)
    assert block.shape == (len(G) * G.shape[-1], A.shape[-1])
    single = block.group(block.groups - 1)
    assert single.groups == 1
    assert single.group(0) is single
    assert single.shape == (G.shape[-1], A.shape[-1])
    assert f"groups={block.groups}" in repr(block) or block.groups == 1
    for index in (-1, block.groups):
        with pytest.raises(ek.errors.OptionError, match="group"):
            block.group(index)


@given(st.builds(make, sizes, sizes, counts, seeds))
def test_one_group_is_the_sum_without_groups(block):
    one = ek.KroneckerSum([(A[None], G[None]) for A, G in block.terms])
    V = vectors(block)
    assert (one.groups, one.shape) == (1, block.shape)
    assert torch.equal(one.product(V), block.product(V))
    assert torch.equal(one.dense(), block.dense())
    assert torch.equal(one.solve(V, 0.1), block.solve(V, 0.1))
    assert one.logdet(0.1) == block.logdet(0.1)
    assert one.top_eigenvalue() == block.top_eigenvalue()
    assert torch.equal(one.damped(0.1).dense(), block.damped(0.1).dense())


@given(grouped, st.sampled_from([0.0, 0.5]))
def test_top_eigenvalue_is_the_largest_of_all_groups(block, damping):
    expected = torch.linalg.eigvalsh(matrix_of(block, damping))[-1].item()
    assert block.top_eigenvalue(damping) == pytest.approx(expected, rel=1e-4)


@given(grouped, st.sampled_from([0.0, 1e-3, 0.1, 2.0]), st.sampled_from([(), (2,)]))
def test_groups_are_solved_one_by_one(block, damping, batch):
    V = vectors(block, *batch)
    H = matrix_of(block, damping)
    expected = torch.linalg.solve(H, V.flatten(-2)[..., None])[..., 0].reshape(V.shape)
    assert relative_error(block.solve(V, damping), expected) < 1e-9
    expected = torch.logdet(H).item()
    assert block.logdet(damping) == pytest.approx(expected, rel=1e-9, abs=1e-9 * len(H))


@given(grouped, dampings)
def test_every_group_is_damped_with_its_own_balance(block, damping):
    found = block.damped(damping)
    for index in range(block.groups):
        alone = block.group(index).damped(damping)
        assert relative_error(found.group(index).dense(), alone.dense()) < 1e-12


@given(grouped_anyhow)
def test_groups_are_decomposed_one_by_one(block):
    for (A, G), (values_A, U_A, values_G, U_G) in zip(block.terms, block.eigh(), strict=True):
        for stack, values, U in ((A, values_A, U_A), (G, values_G, U_G)):
            found = U * values[:, None, :] @ U.mT
            assert relative_error(found, stack) < TOLERANCE[block.dtype]


@given(grouped)
def test_groups_are_compressed_one_by_one(block):
    compressed = block.compress(1)
    for index in range(block.groups):
        alone = block.group(index).compress(1)
        assert relative_error(compressed.group(index).dense(), alone.dense()) < 1e-9


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(("count", "damping"), COVARIANCE_CASES.values(), ids=COVARIANCE_CASES)
def test_samples_of_groups_have_the_inverse_as_covariance(rows, count, damping, generator):
    block = make_grouped(2, rows, 2, count, seed=count)
    draws, size = 20_000, 4 * rows
    samples = block.sample(draws, damping, generator=generator).flatten(1)
    bound = 2 * math.sqrt(size * (size + 1) / draws)
    assert covariance_error(samples, matrix_of(block, damping)) < bound
    assert covariance_error(samples, matrix_of(block, damping + 1)) > 5 * bound


# --- the same on every device -------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_device_computes_the_same(count, dtype, device):
    block = make(5, 4, count, dtype=dtype)
    there = block.to(device=device)
    V = vectors(block, 3)
    tolerance = TOLERANCE[dtype]
    assert relative_error(there.product(V.to(device)).cpu(), block.product(V)) < tolerance
    assert relative_error(there.solve(V.to(device), 0.1).cpu(), block.solve(V, 0.1)) < tolerance
    assert relative_error(there.dense().cpu(), block.dense()) < tolerance
    assert relative_error(there.diagonal().cpu(), block.diagonal()) < tolerance
    for name in ("trace", "norm", "top_eigenvalue"):
        assert getattr(there, name)() == pytest.approx(getattr(block, name)(), rel=5e-4)
    assert there.quadratic(V.to(device)) == pytest.approx(block.quadratic(V), rel=tolerance)
    assert there.logdet(0.1) == pytest.approx(block.logdet(0.1), rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_conversion_of_dtype(count):
    block = make(3, 4, count)
    single = block.to(dtype=torch.float32)
    assert single.dtype == torch.float32
    assert relative_error(single.dense(), block.dense()) < 1e-6
    assert block.dtype == torch.float64


# --- refusals -----------------------------------------------------------------------------

eye = torch.eye
BAD_TERMS = {
    "no terms": ([], ek.errors.EkfacError),
    "not square": ([(torch.ones(3, 4), eye(2))], ek.errors.ShapeError),
    "no dimensions": ([(torch.tensor(1.0), eye(2))], ek.errors.ShapeError),
    "no groups": ([(torch.ones(0, 3, 3), torch.ones(0, 2, 2))], ek.errors.ShapeError),
    "groups of one factor": ([(torch.ones(4, 3, 3), eye(2))], ek.errors.ShapeError),
    "different groups": ([(torch.ones(4, 3, 3), torch.ones(2, 2, 2))], ek.errors.ShapeError),
    "not a matrix": ([(torch.ones(3), eye(2))], ek.errors.ShapeError),
    "terms of different shapes": ([(eye(3), eye(2)), (eye(2), eye(2))], ek.errors.ShapeError),
    "different dtypes": ([(eye(3), eye(2).double())], ek.errors.DtypeError),
    "integers": ([(eye(3).int(), eye(2).int())], ek.errors.DtypeError),
    "not a number": ([(eye(3) * math.nan, eye(2))], ek.errors.NonFiniteError),
    "infinite": ([(eye(3), torch.full((2, 2), math.inf))], ek.errors.NonFiniteError),
}


@pytest.mark.parametrize(("terms", "error"), BAD_TERMS.values(), ids=BAD_TERMS)
def test_factors_that_do_not_fit_are_refused(terms, error):
    with pytest.raises(error):
        ek.KroneckerSum(terms)


BLOCK = make(2, 3, 2)
BAD_CALLS = {
    "product of a wrong shape": (lambda: BLOCK.product(torch.ones(3, 2).double()), "ShapeError"),
    "product of a vector": (lambda: BLOCK.product(torch.ones(6).double()), "ShapeError"),
    "product of another dtype": (lambda: BLOCK.product(torch.ones(2, 3)), "DtypeError"),
    "quadratic of a wrong shape": (lambda: BLOCK.quadratic(torch.ones(2).double()), "ShapeError"),
    "solve of a wrong shape": (lambda: BLOCK.solve(torch.ones(3, 2).double()), "ShapeError"),
    "inner of another shape": (lambda: BLOCK.inner(make(3, 2, 1)), "EkfacError"),
    "sum with another shape": (lambda: BLOCK + make(3, 2, 1), "EkfacError"),
    "sum with other groups": (lambda: BLOCK + make_grouped(2, 1, 3, 1), "EkfacError"),
    "sum with another dtype": (lambda: BLOCK + make(2, 3, 1, dtype=torch.float32), "EkfacError"),
    "negative damping in solve": (lambda: BLOCK.solve(vectors(BLOCK), -0.1), "OptionError"),
    "negative damping in logdet": (lambda: BLOCK.logdet(-0.1), "OptionError"),
    "negative damping in damped": (lambda: BLOCK.damped(-0.1), "OptionError"),
    "damping that is not a number": (lambda: BLOCK.damped(math.nan), "OptionError"),
    "compression to nothing": (lambda: BLOCK.compress(0), "OptionError"),
    "negative number of samples": (lambda: BLOCK.sample(-1, 0.1), "EkfacError"),
}


@pytest.mark.parametrize(("call", "error"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_arguments_that_do_not_fit_are_refused(call, error):
    with pytest.raises(getattr(ek.errors, error)):
        call()
