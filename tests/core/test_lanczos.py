"""Top eigenvalues by products, where rounding is most of what is left of one."""

import pytest
import torch

from ekfac_rs import EigenbasisSum, KroneckerSum, ThinKroneckerSum
from ekfac_rs._lanczos import top_eigenpair, top_eigenvalue


def low_rank(size, rank, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, rank, generator=generator, dtype=torch.float64)
    return (root @ root.mT).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, 2, 5])
@pytest.mark.parametrize("size", [1e-24, 1.0, 1e24])
def test_an_operator_of_low_rank_is_not_made_larger_by_rounding(dtype, rank, size):
    H = size * low_rank(40, rank, dtype)
    start = torch.randn(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = float(torch.linalg.eigvalsh(H.double())[-1])
    for tolerance in (0.0, 1e-6):
        found = top_eigenvalue(lambda v: H @ v, start.to(dtype), 100, tolerance)
        assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_blocks_of_low_rank_tell_their_top_eigenvalue(dtype, size):
    terms = [
        (size * low_rank(8, 1, dtype, seed), size * low_rank(5, 1, dtype, seed + 10))
        for seed in range(4)
    ]
    roots = [(torch.linalg.eigh(A)[1][:, -1:], torch.linalg.eigh(G)[1][:, -1:]) for A, G in terms]
    bases = [
        (torch.linalg.eigh(A)[1], torch.linalg.eigh(G)[1], size * torch.ones(5, 8, dtype=dtype))
        for A, G in terms
    ]
    blocks = [
        KroneckerSum(terms),
        ThinKroneckerSum([(R * size, Q) for R, Q in roots], KroneckerSum(terms[:1])),
        EigenbasisSum(bases),
    ]
    for block in blocks:
        dense = block.to(dtype=torch.float64).dense()
        expected = float(torch.linalg.eigvalsh(dense)[-1])
        assert block.top_eigenvalue() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("limit", [None, 0.1, 1e9], ids=["none", "far below", "far above"])
@pytest.mark.parametrize("rank", [1, 5, 40])
def test_the_vector_has_the_eigenvalue_as_its_rayleigh_quotient(rank, limit):
    """Also where the search stops early, because only a side of a limit matters."""
    H = low_rank(40, rank, torch.float64)
    values, vectors = torch.linalg.eigh(H)
    start = torch.randn(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    value, vector = top_eigenpair(lambda v: H @ v, start, 40, 1e-12, limit)
    assert float(vector.norm()) == pytest.approx(1.0)
    assert float(vector @ H @ vector) == pytest.approx(value)
    if limit is None:
        assert abs(float(vector @ vectors[:, -1])) == pytest.approx(1.0, abs=1e-6)
        assert value == pytest.approx(float(values[-1]))


def test_the_vector_found_is_where_to_begin_the_next_time():
    H = low_rank(300, 300, torch.float64)
    start = torch.randn(300, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    products = []

    def product(v):
        products.append(v)
        return H @ v

    value, vector = top_eigenpair(product, start, 100, 1e-6)
    first = len(products)
    again, _ = top_eigenpair(product, vector + 0.1 * start / start.norm(), 100, 1e-3)
    assert again == pytest.approx(value, rel=1e-3)
    assert len(products) - first <= 5 < first
