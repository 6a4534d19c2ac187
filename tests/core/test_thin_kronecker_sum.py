"""`ThinKroneckerSum` against the dense matrix, entry by entry."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ekfac_rs as ek
from ekfac_rs.errors import (
    DtypeError,
    IncompatibleError,
    NonFiniteError,
    NumericalError,
    OptionError,
    ShapeError,
)
from oracle import dense, relative_error

EXACT = 1e-12
# More columns than rows, as many, fewer; a root of either side may have more columns than rows.
SHAPES = {"wide": (3, 5), "square": (4, 4), "tall": (5, 3)}


def noise(*shape, seed=9):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factors(size, count, seed):
    return [(x := noise(size, size, seed=seed + i)) @ x.T / size for i in range(count)]


def make(shape=(3, 5), ranks=((2, 1), (1, 3)), dense_terms=1, seed=0):
    D, K = shape
    rest = list(zip(factors(K, dense_terms, seed), factors(D, dense_terms, seed + 50), strict=True))
    roots = [
        (noise(K, r, seed=seed + 100 + t), noise(D, q, seed=seed + 200 + t))
        for t, (r, q) in enumerate(ranks)
    ]
    return ek.ThinKroneckerSum(roots, ek.KroneckerSum(rest))


def matrix(block):
    terms = [*block.rest.terms, *((R @ R.T, Q @ Q.T) for R, Q in block.terms)]
    return dense((A.double(), G.double()) for A, G in terms)


CASES = {
    f"{shape}, {len(ranks)} thin, {full} dense": (SHAPES[shape], ranks, full)
    for shape in SHAPES
    for ranks in ((), ((2, 1),), ((1, 3), (4, 2), (2, 2)))
    for full in (1, 2)
}


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request):
    block = make(*request.param)
    return block, matrix(block)


def test_products_and_numbers_are_those_of_the_matrix(case):
    block, H = case
    D, K = block.shape
    V = noise(4, D, K)
    assert relative_error(block.dense(), H) < EXACT
    assert relative_error(block.product(V), (V.flatten(1) @ H).reshape(V.shape)) < EXACT
    assert relative_error(block.product(V[0]), (H @ V[0].flatten()).reshape(D, K)) < EXACT
    strided = V.mT.contiguous().mT
    assert relative_error(block.product(strided), block.product(V)) < EXACT
    expected = float((V.flatten(1) @ H * V.flatten(1)).sum())
    assert block.quadratic(V) == pytest.approx(expected, rel=EXACT)
    assert block.trace() == pytest.approx(float(H.trace()), rel=EXACT)
    assert block.norm() == pytest.approx(float(H.norm()), rel=EXACT)
    assert relative_error(block.diagonal(), H.diagonal().reshape(D, K)) < EXACT
    top = float(torch.linalg.eigvalsh(H)[-1])
    assert block.top_eigenvalue(0.3) == pytest.approx(top + 0.3, rel=1e-4)
    products = list(block.products())
    assert relative_error(dense(products), H) < EXACT
    assert len(products) == len(block.terms) + len(block.rest.terms)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_sums_and_inner_products(shape):
    first, second = make(shape), make(shape, ((2, 2),), 2, seed=7)
    H, other = matrix(first), matrix(second)
    assert first.inner(second) == pytest.approx(float((H * other).sum()), rel=EXACT)
    assert relative_error((first + second).dense(), H + other) < EXACT
    full = second.rest
    assert relative_error((first + full).dense(), H + full.dense()) < EXACT
    assert relative_error((full + first).dense(), H + full.dense()) < EXACT
    # What comes later is behind: the first dense term stays the first.
    assert torch.equal((full + first).rest.terms[0][0], first.rest.terms[0][0])
    assert relative_error((0.5 * first).dense(), 0.5 * H) < EXACT
    assert (first * 0.0).trace() == 0.0


def test_solving_and_determinants(case):
    block, H = case
    damped = H + 0.1 * torch.eye(len(H), dtype=torch.float64)
    V = noise(2, *block.shape)
    solved = torch.linalg.solve(damped, V.flatten(1).T).T.reshape(V.shape)
    assert relative_error(block.solve(V, 0.1), solved) < 1e-9
    assert block.logdet(0.1) == pytest.approx(float(torch.logdet(damped)), rel=1e-9)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_samples_have_the_inverse_as_covariance(shape, generator):
    block = make(shape, dense_terms=2)
    damped = matrix(block) + 0.2 * torch.eye(shape[0] * shape[1], dtype=torch.float64)
    drawn = block.sample(20000, 0.2, generator).flatten(1)
    covariance = drawn.T @ drawn / len(drawn)
    assert relative_error(covariance, torch.linalg.inv(damped)) < 0.05


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 3), st.integers(0, 10**6))
@settings(deadline=None, max_examples=25, derandomize=True)
def test_it_is_positive_semi_definite(D, K, thin, seed):
    block = make((D, K), ((1, 2),) * thin, seed=seed)
    values = torch.linalg.eigvalsh(block.dense())
    assert values[0] >= -1e-12 * values[-1]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_rows_of_zeros_below(shape):
    D, K = shape
    block = make(shape)
    wide = block.embedded(D + 2)
    expected = torch.zeros((D + 2) * K, (D + 2) * K, dtype=torch.float64)
    expected[: D * K, : D * K] = matrix(block)
    assert relative_error(wide.dense(), expected) < EXACT
    with pytest.raises(OptionError, match=f"outputs: expected at least the {D} "):
        block.embedded(D - 1)


def test_tensors_make_the_block_again():
    block = make(ranks=((2, 1), (1, 3)) * 6, dense_terms=12)
    again = ek.ThinKroneckerSum.from_tensors(block.tensors())
    assert torch.equal(again.dense(), block.dense())
    single = block.to(dtype=torch.float32)
    assert single.dtype == torch.float32
    assert relative_error(single.dense(), block.dense()) < 1e-6
    assert repr(make()) == (
        "ThinKroneckerSum(shape=(3, 5), terms=2, columns=(3, 4), rest=1, dtype=torch.float64)"
    )
    assert make().numel == 5 * 3 + 3 * 4 + 5 * 5 + 3 * 3


def test_singular_blocks_are_refused():
    block = make() * 0.0
    with pytest.raises(NumericalError, match="positive definite"):
        block.logdet()
    with pytest.raises(NumericalError, match="singular"):
        block.solve(noise(3, 5))
    with pytest.raises(NumericalError, match="after 1 iterations"):
        make(dense_terms=2).solve(noise(3, 5), 1e-3, max_iterations=1)
    assert block.top_eigenvalue(0.5) == 0.5


def test_a_determinant_of_a_large_block_is_refused():
    rest = ek.KroneckerSum([(torch.eye(80), torch.eye(60))])
    with pytest.raises(OptionError, match="at most 4096 rows"):
        ek.ThinKroneckerSum([], rest).logdet()


REST = ek.KroneckerSum([(torch.eye(3).double(), torch.eye(2).double())])
GROUPS = ek.KroneckerSum([(torch.ones(2, 3, 3).double(), torch.ones(2, 1, 1).double())])


@pytest.mark.parametrize(
    ("terms", "rest", "error", "message"),
    [
        ([(noise(3, 1), noise(3, 1))], REST, ShapeError, r"terms\[0\] root Q: expected shape \(2,"),
        ([(noise(2, 1), noise(2, 1))], REST, ShapeError, r"terms\[0\] root R: expected shape \(3,"),
        ([(noise(3, 0), noise(2, 1))], REST, ShapeError, "root R"),
        ([(noise(3), noise(2, 1))], REST, ShapeError, "root R"),
        ([(None, noise(2, 1))], REST, ShapeError, "got NoneType"),
        ([(noise(3, 1).float(), noise(2, 1))], REST, DtypeError, "root R"),
        ([(noise(3, 1), noise(2, 1) * torch.nan)], REST, NonFiniteError, "root Q"),
        ([], GROUPS, OptionError, "without groups"),
        ([(noise(3, 1).tolist(), noise(2, 1))], REST, ShapeError, "got list"),
    ],
)
def test_roots_that_do_not_fit_are_refused(terms, rest, error, message):
    with pytest.raises(error, match=message):
        ek.ThinKroneckerSum(terms, rest)


@pytest.mark.parametrize("remainders", [-1, 2])
def test_more_remainders_than_dense_terms_are_refused(remainders):
    with pytest.raises(OptionError, match="remainders: expected at most the 1 terms of the rest"):
        ek.ThinKroneckerSum([], REST, remainders)


def test_blocks_that_do_not_fit_are_refused():
    block = make()
    for other in (make((5, 3)), make().to(dtype=torch.float32)):
        with pytest.raises(IncompatibleError, match="expected a block like"):
            block + other
        with pytest.raises(IncompatibleError, match="expected a block like"):
            block.inner(other)
    with pytest.raises(IncompatibleError, match="expected a block like"):
        block + make((5, 3)).rest
    with pytest.raises(TypeError):
        block + ek.DiagonalBlock(torch.ones(3, 5).double())
    with pytest.raises(ShapeError, match="V"):
        block.product(noise(5, 3))
    with pytest.raises(OptionError, match="factor"):
        block * -1.0
    with pytest.raises(IncompatibleError, match="of one pass"):
        block.mixed(block, 0.5, [1], [1])
