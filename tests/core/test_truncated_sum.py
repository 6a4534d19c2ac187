"""Sums of Kronecker products by truncated roots, against the dense operator."""

import pytest
import torch

import ekfac_rs as ek
from ekfac_rs import _core
from ekfac_rs._tensors import borrow
from ekfac_rs.curvature.truncated import Factor, TruncatedSum
from ekfac_rs.errors import OptionError
from oracle import relative_error

SIZES = {"wide": (12, 30), "tall": (30, 12), "square": (20, 20)}


def positive(size, generator, decay=0.6, rank=None):
    """A matrix whose eigenvalues fall by a factor each."""
    rank = size if rank is None else rank
    U = torch.linalg.qr(torch.randn(size, rank, generator=generator, dtype=torch.float64)).Q
    values = decay ** torch.arange(rank, dtype=torch.float64)
    return 3.0 * (U * values) @ U.mT


def terms_of(sizes, count, decay=0.6, seed=0):
    D, K = SIZES[sizes]
    generator = torch.Generator().manual_seed(seed)
    terms = [(positive(K, generator, decay), positive(D, generator, decay)) for _ in range(count)]
    # As the mean stratum has them.
    terms.append((positive(K, generator, rank=1), positive(D, generator, rank=4)))
    return terms


def thin_block(sizes, seed=1):
    D, K = SIZES[sizes]
    generator = torch.Generator().manual_seed(seed)
    roots = [
        (
            torch.randn(K, 3, generator=generator, dtype=torch.float64),
            torch.randn(D, columns, generator=generator, dtype=torch.float64),
        )
        for columns in (2, 5)
    ]
    return ek.ThinKroneckerSum(roots, ek.KroneckerSum(terms_of(sizes, 1, seed=seed)))


BLOCKS = {
    "one task": lambda sizes: [ek.KroneckerSum(terms_of(sizes, 1))],
    "tasks": lambda sizes: [ek.KroneckerSum(terms_of(sizes, 2, seed=t)) for t in range(3)],
    "thin": lambda sizes: [thin_block(sizes)],
    "thin and dense": lambda sizes: [thin_block(sizes), ek.KroneckerSum(terms_of(sizes, 1))],
    "flat": lambda sizes: [ek.KroneckerSum(terms_of(sizes, 2, decay=0.999))],
}


def dense_of(operator):
    """The matrix of its products, column by column."""
    D, K = operator.shape
    columns = [operator.product(V.view(D, K)).flatten() for V in torch.eye(D * K).double()]
    return torch.stack(columns, 1)


@pytest.mark.parametrize("dropped", [1e-9, 0.01, 0.3])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("kind", BLOCKS)
def test_it_is_positive_has_the_trace_and_is_as_near_as_it_says(kind, sizes, dropped):
    blocks = BLOCKS[kind](sizes)
    whole = sum((block.dense() for block in blocks), torch.zeros(()).double())
    near = TruncatedSum(blocks, dropped)
    dense = dense_of(near)
    torch.testing.assert_close(dense, dense.mT)
    assert float(torch.linalg.eigvalsh(dense).min()) > -1e-12 * float(dense.trace())
    assert float(dense.trace()) == pytest.approx(float(whole.trace()))
    torch.testing.assert_close(near.dense_terms().dense(), dense)
    error = relative_error(dense, whole)
    assert near.error() == pytest.approx(error, rel=1e-6, abs=1e-7)
    assert error < {1e-9: 1e-7, 0.01: 0.02, 0.3: 0.4}[dropped]
    D, K = near.shape
    terms = [len(b.rest.terms if hasattr(b, "rest") else b.terms) for b in blocks]
    assert near.flops <= 2 * D * K * (D + K) * (sum(terms) + 5)


@pytest.mark.parametrize("sizes", SIZES)
def test_what_falls_fast_takes_few_columns_and_what_does_not_stays_exact(sizes):
    D, K = SIZES[sizes]
    fast = TruncatedSum([ek.KroneckerSum(terms_of(sizes, 3, decay=0.2))], 0.05)
    assert fast.columns < 20
    assert fast.flops < 0.5 * 4 * 2 * D * K * (D + K)
    [block] = BLOCKS["flat"](sizes)
    flat = TruncatedSum([ek.KroneckerSum(block.terms[:2])], 0.01)
    assert flat.columns == 0
    # And perhaps the inner product with V.
    assert 2 * 2 * D * K * (D + K) <= flat.flops <= 2 * D * K * (2 * (D + K) + 1)
    assert "exact=2" in repr(flat)


@pytest.mark.parametrize("sizes", SIZES)
def test_a_product_may_be_scaled_and_damped_and_tells_its_inner_product(sizes):
    D, K = SIZES[sizes]
    V = torch.randn(D, K, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for kind in ("tasks", "flat", "thin and dense"):
        near = TruncatedSum(BLOCKS[kind](sizes), 0.1)
        expected = near.dense_terms().product(V)
        out = torch.full_like(V, torch.nan)
        inner = torch.full((1, 2), torch.nan, dtype=torch.float64)
        damping = 3.0 * near.shift + 0.5
        product = (near.packed, borrow(V), borrow(out), damping, borrow(inner))
        _core.apply_operators([product], 3.0)
        torch.testing.assert_close(out, 3.0 * expected + 0.5 * V)
        curved, flat = inner[0].tolist()
        assert flat == pytest.approx(float((V * V).sum()))
        assert curved + near.shift * flat == pytest.approx(float((V * expected).sum()))


@pytest.mark.parametrize("size", [40, 700], ids=["all pairs", "leading pairs"])
@pytest.mark.parametrize("dropped", [0.01, 0.2])
def test_a_factor_keeps_the_fewest_eigenvectors_that_are_enough(size, dropped):
    matrix = positive(size, torch.Generator().manual_seed(3), decay=0.8)
    factor = Factor.of(matrix, dropped)
    values = torch.linalg.eigvalsh(matrix).flip(0)
    share = values.cumsum(0) / values.sum()
    assert factor.columns == int((share < 1.0 - dropped).sum()) + 1
    near = factor.matrix()
    assert float(near.trace()) == pytest.approx(float(matrix.trace()))
    kept = torch.linalg.eigvalsh(near).flip(0)[: factor.columns] - factor.shift
    torch.testing.assert_close(kept, values[: factor.columns], rtol=1e-6, atol=0.0)
    fewer = factor.truncated(0.5)
    assert fewer.columns == int((share < 0.5).sum()) + 1
    assert float(fewer.matrix().trace()) == pytest.approx(float(matrix.trace()))
    assert Factor.of(matrix, dropped, 2).columns == 2


def test_nothing_is_left_of_nothing():
    zero = ek.KroneckerSum([(torch.zeros(30, 30), torch.zeros(12, 12))])
    near = TruncatedSum([zero], 0.01)
    assert float(near.product(torch.ones(12, 30)).abs().max()) == 0.0
    assert near.error() == 0.0


@pytest.mark.parametrize("dropped", [0.0, 1.0, -0.1, float("nan"), "most"])
def test_a_share_is_between_nothing_and_all(dropped):
    with pytest.raises(OptionError, match="dropped: expected a share above 0 and below 1"):
        TruncatedSum(BLOCKS["one task"]("wide"), dropped)


def test_factors_that_were_changed_in_place_are_decomposed_anew():
    block = ek.KroneckerSum(terms_of("wide", 1))
    V = torch.randn(block.shape, dtype=torch.float64)
    before = TruncatedSum([block], 0.2).product(V)
    for A, _ in block.terms:
        A.mul_(2.0)
    torch.testing.assert_close(TruncatedSum([block], 0.2).product(V), 2.0 * before)
