"""The algebra of blocks that treat every column for itself, held against dense matrices."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ekfac_rs import ColumnwiseSum, KroneckerSum
from ekfac_rs.errors import (
    DtypeError,
    IncompatibleError,
    NonFiniteError,
    NumericalError,
    OptionError,
    ShapeError,
)
from oracle import relative_error

D, K = 3, 6
EXACT = 1e-12


def block(terms: int, *, seed: int = 0, unseen: int = 0, D: int = D, K: int = K) -> ColumnwiseSum:
    """A block whose last columns are not seen, and of whose others two are alike."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(terms):
        a = torch.rand(K, generator=generator, dtype=torch.float64)
        root = torch.randn(D, D + 1, generator=generator, dtype=torch.float64)
        a[K - unseen :] = 0.0
        a[1 % K] = a[0]
        made.append((a, root @ root.T))
    return ColumnwiseSum(made)


def dense(of: ColumnwiseSum) -> torch.Tensor:
    """The block as a matrix, built here entry by entry."""
    D, K = of.shape
    matrix = torch.zeros(D, K, D, K, dtype=torch.float64)
    for a, G in of.terms:
        for v in range(K):
            matrix[:, v, :, v] += a[v] * G
    return matrix.reshape(D * K, D * K)


def noise(*shape: int, seed: int = 9) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


CASES = [(terms, unseen) for terms in (1, 2, 3) for unseen in (0, 1, 4)]


@pytest.mark.parametrize(("terms", "unseen"), CASES)
def test_products_and_numbers_are_those_of_the_matrix(terms, unseen):
    H = block(terms, unseen=unseen)
    matrix = dense(H)
    assert relative_error(H.dense(), matrix) < EXACT
    assert relative_error(H.diagonal().flatten(), matrix.diagonal()) < EXACT
    V = noise(D, K)
    assert relative_error(H.product(V).flatten(), matrix @ V.flatten()) < EXACT
    batch = noise(4, D, K)
    assert relative_error(H.product(batch).flatten(1), batch.flatten(1) @ matrix) < EXACT
    assert math.isclose(H.quadratic(V), V.flatten() @ matrix @ V.flatten(), rel_tol=EXACT)
    assert math.isclose(H.trace(), matrix.trace(), rel_tol=EXACT)
    assert math.isclose(H.norm(), matrix.norm(), rel_tol=EXACT)
    other = block(2, seed=3)
    assert math.isclose(H.inner(other), (matrix * dense(other)).sum(), rel_tol=EXACT)
    assert relative_error((H + other).dense(), matrix + dense(other)) < EXACT
    assert relative_error((2.5 * H).dense(), 2.5 * matrix) < EXACT
    strided = noise(K, D).T
    assert relative_error(H.product(strided), H.product(strided.contiguous())) < EXACT


@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize(("terms", "unseen"), CASES)
def test_top_eigenvalue_to_a_relative_1e_4(terms, unseen, damping):
    H = block(terms, unseen=unseen)
    expected = torch.linalg.eigvalsh(dense(H))[-1] + damping
    assert math.isclose(H.top_eigenvalue(damping), expected, rel_tol=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 4), st.integers(1, 60))
def test_top_eigenvalue_of_any_block(seed, terms, rows, columns):
    H = block(terms, seed=seed, D=rows, K=columns)
    expected = max(
        float(torch.linalg.eigvalsh(sum(a[v] * G for a, G in H.terms))[-1]) for v in range(columns)
    )
    assert math.isclose(H.top_eigenvalue(), expected, rel_tol=1e-4)


@pytest.mark.parametrize("damping", [0.05, 2.0])
@pytest.mark.parametrize(("terms", "unseen"), CASES)
def test_inverses_are_those_of_the_matrix(terms, unseen, damping):
    H = block(terms, unseen=unseen)
    matrix = dense(H) + damping * torch.eye(D * K, dtype=torch.float64)
    V = noise(D, K)
    solved = torch.linalg.solve(matrix, V.flatten())
    assert relative_error(H.solve(V, damping).flatten(), solved) < 1e-11
    batch = noise(4, D, K)
    solved = torch.linalg.solve(matrix, batch.flatten(1).T).T
    assert relative_error(H.solve(batch, damping).flatten(1), solved) < 1e-11
    assert math.isclose(H.logdet(damping), torch.logdet(matrix), rel_tol=1e-11)


@pytest.mark.parametrize("terms", [1, 2])
def test_without_damping_what_was_seen_can_be_solved(terms):
    H = block(terms)
    V = noise(D, K)
    assert relative_error(H.product(H.solve(V)), V) < 1e-10
    unseen = block(terms, unseen=1)
    for call in (lambda: unseen.solve(V), unseen.logdet, lambda: unseen.sample(2)):
        with pytest.raises(NumericalError, match="positive definite"):
            call()


@pytest.mark.parametrize("terms", [1, 2])
def test_samples_have_the_inverse_as_covariance(terms):
    H, n, damping = block(terms, unseen=1), 40_000, 0.5
    generator = torch.Generator().manual_seed(1)
    samples = H.sample(n, damping, generator).flatten(1)
    expected = torch.linalg.inv(dense(H) + damping * torch.eye(D * K, dtype=torch.float64))
    assert samples.shape == (n, D * K)
    assert relative_error(samples.T @ samples / n, expected) < 0.05
    again = H.sample(n, damping, torch.Generator().manual_seed(1)).flatten(1)
    assert torch.equal(samples, again)


@pytest.mark.parametrize("terms", [1, 2, 3])
def test_damping_of_the_first_term_is_that_of_a_kronecker_sum(terms):
    H, damping = block(terms), 0.2
    full = KroneckerSum([(torch.diag(a), G) for a, G in H.terms]).damped(damping)
    assert relative_error(H.damped(damping).dense(), full.dense()) < EXACT


@pytest.mark.parametrize(("terms", "fewer"), [(2, 1), (3, 1), (3, 2)])
def test_compression_is_the_nearest_as_of_a_kronecker_sum(terms, fewer):
    H = block(terms)
    full = KroneckerSum([(torch.diag(a), G) for a, G in H.terms]).compress(fewer)
    found = H.compress(fewer)
    assert len(found.terms) == fewer
    assert relative_error(found.dense(), full.dense()) < 1e-8
    # Rows of (a, vec G): the nearest sum is the truncated singular value decomposition.
    sizes = torch.linalg.svdvals(sum(torch.outer(a, G.flatten()) for a, G in H.terms))
    error = float(sizes[fewer:].norm() / sizes.norm())
    assert math.isclose(relative_error(found.dense(), H.dense()), error, rel_tol=1e-8)
    assert H.compress(terms) is H
    first = found.terms[0]
    assert (first[0] >= -1e-12).all()
    assert torch.linalg.eigvalsh(first[1])[0] > -1e-12


def test_compression_of_more_terms_than_columns():
    H = block(3, K=1)
    assert relative_error(H.compress(2).dense(), H.dense()) < EXACT


def test_eigendecompositions_of_the_factors():
    H = block(2)
    for (a, G), (values_a, values, vectors) in zip(H.terms, H.eigh(), strict=True):
        assert torch.equal(values_a, a)
        assert all(low <= high for low, high in pairwise(values))
        assert relative_error(vectors @ torch.diag(values) @ vectors.T, G) < EXACT


def test_single_precision_and_back():
    H = block(2, unseen=4)
    single = H.to(dtype=torch.float32)
    assert (single.dtype, single.shape, single.device) == (torch.float32, (D, K), H.device)
    V = noise(D, K)
    for name, arguments in (("product", ()), ("solve", (0.5,))):
        found = getattr(single, name)(V.float(), *arguments)
        assert found.dtype == torch.float32
        assert relative_error(found, getattr(H, name)(V, *arguments)) < 1e-5
    assert single.sample(2, 0.5).dtype == torch.float32
    assert single.compress(1).dtype == torch.float32
    assert relative_error(single.to(dtype=torch.float64).dense(), H.dense()) < 1e-6
    assert repr(single) == "ColumnwiseSum(shape=(3, 6), terms=2, dtype=torch.float32)"


a, G = torch.ones(K), torch.eye(D)
REFUSED = {
    "none": ([], OptionError, "at least one"),
    "half": ([(a.half(), G.half())], DtypeError, "float16"),
    "mixed": ([(a, G.double())], DtypeError, "factor G"),
    "matrix": ([(torch.eye(K), G)], ShapeError, r"\(K,\) and \(D, D\)"),
    "empty": ([(a[:0], G)], ShapeError, "none empty"),
    "not square": ([(a, G[:2])], ShapeError, "factor G"),
    "another length": ([(a, G), (a[1:], G)], ShapeError, r"terms\[1\] factor a"),
    "not finite": ([(a / 0.0, G)], NonFiniteError, "factor a"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_factors_that_do_not_fit_are_refused(case):
    terms, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        ColumnwiseSum(terms)


def test_what_does_not_fit_the_block_is_refused():
    H = block(2)
    with pytest.raises(ShapeError):
        H.product(noise(K, D))
    with pytest.raises(DtypeError):
        H.solve(noise(D, K).float(), 1.0)
    with pytest.raises(OptionError):
        H.solve(noise(D, K), -1.0)
    with pytest.raises(OptionError):
        H.sample(0)
    with pytest.raises(OptionError):
        H.compress(0)
    with pytest.raises(IncompatibleError):
        H + block(2, K=K + 1)
    with pytest.raises(IncompatibleError):
        H.inner(H.to(dtype=torch.float32))
    with pytest.raises(TypeError):
        H + KroneckerSum([(torch.eye(K).double(), torch.eye(D).double())])
    with pytest.raises(TypeError):
        H * "2"
