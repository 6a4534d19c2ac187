"""Blocks of many terms within the cost of a few: what is kept exactly, and what it costs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ekfac_rs as ek
from ekfac_rs.curvature.bounding import bounded, joined
from ekfac_rs.errors import OptionError
from oracle import dense, relative_error

property_test = settings(deadline=None, max_examples=40, derandomize=True)


def spd(generator, *stack, size, decay=1.0):
    """A random matrix whose eigenvalues fall like powers of ``decay``."""
    x = torch.randn(*stack, size, size, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(x).Q
    return (basis * decay ** torch.arange(size)) @ basis.mT


def tasks(D, K, count, seed=0, stack=(), decay=0.5):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            spd(generator, *stack, size=K, decay=decay),
            spd(generator, *stack, size=D, decay=decay) * float(t + 1),
        )
        for t in range(count)
    ]


def one_after_another(terms, max_terms):
    """As a learner does it: the sum so far and the next task's."""
    first, *others = (ek.KroneckerSum([term]) for term in terms)
    block = bounded(first, max_terms)
    for other in others:
        block = bounded(block + other, max_terms)
    return block


def all_at_once(terms, max_terms):
    return bounded(ek.KroneckerSum(terms), max_terms)


WAYS = {"one after another": one_after_another, "all at once": all_at_once}
sizes, counts, budgets = st.integers(1, 6), st.integers(1, 6), st.integers(1, 4)
seeds, ways = st.integers(0, 10**6), st.sampled_from(list(WAYS.values()))


def partial_traces(H, D, K):
    H = H.reshape(D, K, D, K)
    return H.diagonal(dim1=0, dim2=2).sum(-1), H.diagonal(dim1=1, dim2=3).sum(-1)


def cost(block):
    """Floating-point operations of a product, and numbers held."""
    D, K = block.shape
    term = 2 * (D * K**2 + D**2 * K)
    if isinstance(block, ek.KroneckerSum):
        return len(block.terms) * term, len(block.terms) * (D**2 + K**2)
    operations = len(block.rest.terms) * term
    for R, Q in block.terms:
        r, q = R.shape[1], Q.shape[1]
        long, short, of_long, of_short = (K, D, r, q) if K >= D else (D, K, q, r)
        operations += 4 * long * short * of_long + 4 * short * of_long * of_short
    return operations, block.numel


@property_test
@given(sizes, sizes, counts, budgets, seeds, ways)
def test_it_is_positive_semi_definite_with_the_same_partial_traces(D, K, count, n, seed, way):
    terms = tasks(D, K, count, seed)
    found, expected = way(terms, n).dense(), dense(terms)
    values = torch.linalg.eigvalsh(found)
    assert values[0] >= -1e-12 * values[-1]
    for mine, theirs in zip(
        partial_traces(found, D, K), partial_traces(expected, D, K), strict=True
    ):
        assert relative_error(mine, theirs) < 1e-12


@property_test
@given(sizes, sizes, st.integers(1, 12), budgets, seeds, ways)
def test_it_costs_no_more_than_so_many_terms(D, K, count, n, seed, way):
    operations, numbers = cost(way(tasks(D, K, count, seed), n))
    assert operations <= n * 2 * (D * K**2 + D**2 * K)
    assert numbers <= n * (D**2 + K**2)


@property_test
@given(sizes, sizes, counts, seeds, ways)
def test_no_more_terms_than_allowed_are_kept_as_they_are(D, K, count, seed, way):
    terms = tasks(D, K, count, seed)
    block = way(terms, count)
    assert isinstance(block, ek.KroneckerSum)
    assert torch.equal(block.dense(), ek.KroneckerSum(terms).dense())


@pytest.mark.parametrize(("D", "K"), [(4, 8), (8, 4), (6, 6)])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_terms_of_low_rank_are_kept_exactly_where_there_is_room(way, D, K):
    generator = torch.Generator().manual_seed(0)
    roots = [
        [torch.randn(size, 1, generator=generator, dtype=torch.float64) for size in (K, D)]
        for _ in range(5)
    ]
    terms = [(R @ R.T, Q @ Q.T) for R, Q in roots]
    block = way(terms, 3)
    assert isinstance(block, ek.ThinKroneckerSum)
    assert relative_error(block.dense(), dense(terms)) < 1e-12
    assert block.rest.trace() < 1e-12 * block.trace()


@pytest.mark.parametrize(("D", "K"), [(4, 8), (8, 4), (6, 6)])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_the_error_falls_with_the_budget(way, D, K):
    terms = tasks(D, K, 6)
    errors = [relative_error(way(terms, n).dense(), dense(terms)) for n in range(1, 7)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.1
    assert errors[3] < 0.5 * errors[0]
    assert errors[5] == 0.0


def test_the_largest_directions_of_all_tasks_are_kept():
    """By eigenvalue times the trace of the other factor: not the latest task's, nor equal shares.

    Room is for two columns on the long side; both of the largest are the second task's.
    """
    first = torch.diag(torch.tensor([3.0, 1.0, 0.5, 0.1]).double())
    second = torch.diag(torch.tensor([0.2, 2.5, 2.0, 0.1]).double())
    third = torch.diag(torch.tensor([1.0, 0.0, 0.0, 0.0]).double())
    G = torch.eye(2).double()
    dense_terms = ek.KroneckerSum([(first, G), (second, 2.0 * G), (third, G)])
    block = bounded(ek.ThinKroneckerSum([], dense_terms, 0), 2)
    ((R, Q),) = block.terms
    kept = torch.diag(torch.tensor([0.0, 2.5, 2.0, 0.0]).double())
    torch.testing.assert_close(R @ R.T, kept, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(Q @ Q.T, 2.0 * G, rtol=1e-12, atol=1e-12)
    lost = ek.KroneckerSum([(first + third, G), (second - kept, 2.0 * G)]).dense()
    for mine, theirs in zip(
        partial_traces(block.rest.dense(), 2, 4), partial_traces(lost, 2, 4), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def alike(size, count, seed=0, decay=0.7):
    """Terms with eigenvectors in common."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(2, size, size, generator=generator, dtype=torch.float64)
    bases = torch.linalg.qr(start).Q
    terms = []
    for _ in range(count):
        values = decay ** torch.arange(size) * (0.5 + torch.rand(2, size, generator=generator))
        terms.append(tuple((bases * values[:, None, :]) @ bases.mT))
    return terms


@pytest.mark.parametrize("seed", range(3))
def test_losses_on_the_two_sides_are_kept_apart(seed):
    """Where both sides lose, one product for both is far off."""
    terms = alike(12, 4, seed)
    block = bounded(ek.ThinKroneckerSum([], ek.KroneckerSum(terms), 0), 3)
    assert block.remainders == len(block.rest.terms) == 2
    thin = block.dense() - block.rest.dense()
    together = thin + ek.KroneckerSum(joined(block.rest.terms, 1)).dense()
    error, error_together = (relative_error(H, dense(terms)) for H in (block.dense(), together))
    assert error < 0.7 * error_together
    again = bounded(block, 3)
    assert repr(again) == repr(block)
    assert relative_error(again.dense(), block.dense()) < 1e-12


def test_terms_that_have_much_in_common_are_joined_and_others_become_thin():
    for terms, kind in ((alike(6, 4), ek.KroneckerSum), (tasks(3, 12, 4), ek.ThinKroneckerSum)):
        block = all_at_once(terms, 3)
        assert type(block) is kind
        other = ek.KroneckerSum(joined(terms, 3))
        if kind is ek.KroneckerSum:
            assert torch.equal(block.dense(), other.dense())
            other = bounded(ek.ThinKroneckerSum([], ek.KroneckerSum(terms), 0), 3)
        errors = [relative_error(x.dense(), dense(terms)) for x in (block, other)]
        assert errors[0] < 0.8 * errors[1]


def test_remainders_are_not_taken_apart_and_later_terms_are():
    terms = tasks(3, 8, 6)
    block = one_after_another(terms[:5], 2)
    assert (block.remainders, len(block.rest.terms)) == (1, 1)
    more = block + ek.KroneckerSum(terms[5:])
    assert (more.remainders, len(more.rest.terms)) == (1, 2)
    for same in (
        more.to(dtype=torch.float64),
        more * 1.0,
        ek.ThinKroneckerSum.from_tensors(more.tensors()),
    ):
        assert same.remainders == 1
        assert torch.equal(bounded(same, 2).dense(), bounded(more, 2).dense())
    # Taken apart as if it were a term, the remainder would push out what is left of some.
    apart = ek.ThinKroneckerSum(more.terms, more.rest, 0)
    assert not torch.equal(bounded(apart, 2).dense(), bounded(more, 2).dense())
    assert bounded(apart, 2).trace() == pytest.approx(more.trace(), rel=1e-12)


@pytest.mark.parametrize("max_terms", [1, 2])
def test_remainders_alone(max_terms):
    rest = ek.KroneckerSum(tasks(3, 4, 2))
    block = bounded(ek.ThinKroneckerSum([], rest), max_terms)
    assert len(block.terms) == max_terms
    assert block.trace() == pytest.approx(rest.trace(), rel=1e-12)


@pytest.mark.parametrize("max_terms", [1, 2, 3])
def test_traces_stay_in_single_precision(max_terms):
    terms = tasks(6, 8, 20, decay=0.3)
    single = [(A.float(), G.float()) for A, G in terms]
    block = one_after_another(single, max_terms)
    assert block.dtype == torch.float32
    assert block.trace() == pytest.approx(ek.KroneckerSum(terms).trace(), rel=3e-6)


# --- terms joined --------------------------------------------------------------------------------


def test_two_terms_that_agree_in_a_factor_are_joined_without_loss():
    (A, G), (B, H) = tasks(3, 4, 2)
    for terms in ([(A, G), (0.3 * A, H)], [(A, G), (B, 2.0 * G)]):
        ((one, other),) = joined(terms, 1)
        assert relative_error(torch.kron(other, one), dense(terms)) < 1e-12
    # Of three the two that agree are joined, wherever they are.
    for terms in ([(A, G), (B, H), (2.0 * A, H)], [(B, H), (A, G), (2.0 * A, H)]):
        assert relative_error(dense(joined(terms, 2)), dense(terms)) < 1e-12


GROUPED = {"two rows a group": ((2,), 2), "one row a group": ((4,), 1), "by column": (None, 4)}


def grouped(kind, count):
    stack, rows = GROUPED[kind]
    terms = tasks(rows, 5, count, stack=stack or ())
    if stack is None:
        return ek.ColumnwiseSum([(A.diagonal().clone(), G) for A, G in terms])
    return ek.KroneckerSum(terms)


@pytest.mark.parametrize("max_terms", [1, 2, 4])
@pytest.mark.parametrize("kind", GROUPED)
def test_groups_and_columns_keep_so_many_terms(kind, max_terms):
    whole = grouped(kind, 5)
    block = bounded(whole, max_terms)
    assert type(block) is type(whole)
    assert len(block.terms) <= max_terms
    assert block.trace() == pytest.approx(whole.trace(), rel=1e-12)
    values = torch.linalg.eigvalsh(block.dense())
    assert values[0] >= -1e-12 * values[-1]
    exact = kind == "one row a group"
    error = relative_error(block.dense(), whole.dense())
    assert error < (1e-12 if exact else 0.5)
    assert exact or error > 1e-3


@pytest.mark.parametrize("kind", ["two rows a group", "by column"])
def test_fewer_terms_than_allowed_stay(kind):
    whole = grouped(kind, 3)
    assert relative_error(bounded(whole, 3).dense(), whole.dense()) < 1e-12


def test_groups_that_are_zero_stay_zero():
    whole = grouped("two rows a group", 3)
    terms = [(A * torch.tensor([0.0, 1.0]).view(2, 1, 1), G) for A, G in whole.terms]
    block = bounded(ek.KroneckerSum(terms), 1)
    assert torch.equal(block.dense()[:10, :10], torch.zeros(10, 10).double())
    assert block.trace() == pytest.approx(ek.KroneckerSum(terms).trace(), rel=1e-12)


# --- other blocks --------------------------------------------------------------------------------


@pytest.mark.parametrize("max_terms", [1, 2, 3])
def test_eigenbases_keep_so_many_terms(max_terms):
    one, *others = (ek.EigenbasisSum.near(ek.KroneckerSum([term])) for term in tasks(3, 4, 4))
    whole = sum(others, one)
    block = bounded(whole, max_terms)
    assert len(block.terms) == max_terms
    assert block.trace() == pytest.approx(whole.trace(), rel=1e-12)
    assert torch.linalg.eigvalsh(block.dense())[0] > -1e-12
    assert relative_error(block.dense(), whole.dense()) < 0.7
    assert bounded(whole, 4) is whole or len(bounded(whole, 4).terms) == 4


def test_terms_in_one_eigenbasis_become_one_without_loss():
    block = ek.EigenbasisSum.near(ek.KroneckerSum(tasks(3, 4, 1)))
    other = block.with_values(block.terms[0].values.flip(0).contiguous())
    far = ek.EigenbasisSum.near(ek.KroneckerSum(tasks(3, 4, 1, seed=5)))
    whole = block + far + other
    assert relative_error(bounded(whole, 2).dense(), whole.dense()) < 1e-12


def test_a_diagonal_stays_as_it_is():
    block = ek.DiagonalBlock(torch.rand(2, 3))
    assert bounded(block, 1) is block


@pytest.mark.parametrize("max_terms", [0, -1, 1.5, True])
def test_numbers_of_terms_that_are_none_are_refused(max_terms):
    with pytest.raises(OptionError, match="max_terms: expected an integer of at least 1"):
        bounded(ek.DiagonalBlock(torch.ones(2, 3)), max_terms)


def test_a_single_curvature_is_compressed_as_the_only_one():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    batch = (torch.randn(8, 4), torch.randint(3, (8,)))
    curvature = ek.estimate_curvature(model, [batch], approximation="xkfac-nested")
    one, among = (ek.compress_curvatures(c, 1) for c in (curvature, [curvature]))
    assert one.tasks == among.tasks == 1
    assert torch.equal(one["0"].dense(), among["0"].dense())
