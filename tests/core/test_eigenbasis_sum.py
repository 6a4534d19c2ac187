"""Sums of operators that are diagonal in an eigenbasis: against the dense matrix, where known."""

import math

import pytest
import torch

from ekfac_rs import ColumnwiseSum, EigenbasisSum, KroneckerSum
from ekfac_rs.errors import (
    DtypeError,
    IncompatibleError,
    NonFiniteError,
    NumericalError,
    OptionError,
    ShapeError,
)
from oracle import dense, relative_error, within_groups

D, K = 4, 3
EXACT = 1e-12
KINDS = {"plain": (), "groups": (2,), "one row a group": (4,), "by column": None}


def noise(*shape, seed=9):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def terms(kind, count, seed=0):
    """Random orthonormal bases and eigenvalues from 0.1 to 1.1."""
    stack = KINDS[kind] or ()
    rows = D // math.prod(stack)
    made = []
    for index in range(count):
        U = torch.linalg.qr(noise(*stack, K, K, seed=seed + 10 * index)).Q
        Q = torch.linalg.qr(noise(*stack, rows, rows, seed=seed + 10 * index + 1)).Q
        values = noise(D, K, seed=seed + 10 * index + 2).sigmoid() + 0.1
        made.append((None if KINDS[kind] is None else U, Q, values))
    return made


def matrix(made):
    """The same, entry by entry: each eigenvalue times the outer square of its eigenvector."""
    H = torch.zeros(D * K, D * K, dtype=torch.float64)
    for U, Q, values in made:
        U = torch.eye(K, dtype=torch.float64) if U is None else U
        groups = Q.shape[0] if Q.dim() == 3 else 1
        rows = D // groups
        for i in range(D):
            for j in range(K):
                group, row = divmod(i, rows)
                left = torch.zeros(D, dtype=torch.float64)
                left[group * rows : (group + 1) * rows] = (Q[group] if Q.dim() == 3 else Q)[:, row]
                right = (U[group] if U.dim() == 3 else U)[:, j]
                vector = torch.outer(left, right).flatten()
                H += values[i, j] * torch.outer(vector, vector)
    return H


@pytest.fixture(params=[(kind, count) for kind in KINDS for count in (1, 2, 3)], ids=str)
def case(request):
    made = terms(*request.param)
    return EigenbasisSum(made), matrix(made)


def test_products_and_numbers_are_those_of_the_matrix(case):
    block, H = case
    V = noise(5, D, K)
    assert relative_error(block.dense(), H) < EXACT
    assert relative_error(block.product(V), (V.flatten(1) @ H).reshape(V.shape)) < EXACT
    assert relative_error(block.product(V[0]), (H @ V[0].flatten()).reshape(D, K)) < EXACT
    assert block.quadratic(V) == pytest.approx(float((V.flatten(1) @ H * V.flatten(1)).sum()))
    assert block.trace() == pytest.approx(float(H.trace()))
    assert block.norm() == pytest.approx(float(H.norm()))
    assert relative_error(block.diagonal(), H.diagonal().reshape(D, K)) < EXACT
    assert block.top_eigenvalue(0.3) == pytest.approx(
        float(torch.linalg.eigvalsh(H)[-1]) + 0.3, rel=1e-4
    )


@pytest.mark.parametrize("kind", KINDS)
def test_sums_and_inner_products(kind):
    first, second = (EigenbasisSum(terms(kind, n, seed)) for n, seed in ((1, 0), (2, 50)))
    H, other = matrix(terms(kind, 1, 0)), matrix(terms(kind, 2, 50))
    assert first.inner(second) == pytest.approx(float((H * other).sum()))
    assert relative_error((first + 0.5 * second).dense(), H + 0.5 * other) < EXACT
    assert relative_error((2.0 * first).dense(), 2.0 * H) < EXACT
    mixed = first.mixed(second, 0.25, [], [])
    assert relative_error(mixed.dense(), 0.25 * H + 0.75 * other) < EXACT


def test_solving_and_determinants(case):
    block, H = case
    for damping in (0.0, 0.1):
        damped = H + damping * torch.eye(D * K, dtype=torch.float64)
        V = noise(2, D, K)
        solved = torch.linalg.solve(damped, V.flatten(1).T).T.reshape(V.shape)
        assert relative_error(block.solve(V, damping), solved) < 1e-9
        assert block.logdet(damping) == pytest.approx(float(torch.logdet(damped)), rel=1e-9)


def test_samples_have_the_inverse_as_covariance(case, generator):
    block, H = case
    damped = H + 0.2 * torch.eye(D * K, dtype=torch.float64)
    drawn = block.sample(20000, 0.2, generator).flatten(1)
    covariance = drawn.T @ drawn / len(drawn)
    assert relative_error(covariance, torch.linalg.inv(damped)) < 0.05


def test_kronecker_products_above_it(case):
    block, H = case
    above = block.above()
    assert isinstance(above, ColumnwiseSum if block.terms[0].U is None else KroneckerSum)
    least = torch.linalg.eigvalsh(above.dense() - H)[0]
    assert least > -1e-12
    # With one term it touches: it is no multiple of what is enough.
    if len(block.terms) == 1:
        assert least < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_a_kronecker_product_stays_what_it_is(kind):
    stack = KINDS[kind] or ()
    A, G = noise(*stack, K, K), noise(*stack, D // math.prod(stack), D // math.prod(stack))
    A, G = A @ A.mT, G @ G.mT
    if KINDS[kind] is None:
        A = A.diagonal()
        single = ColumnwiseSum([(A, G)])
    else:
        single = KroneckerSum([(A, G)])
    near = EigenbasisSum.near(single)
    assert relative_error(near.dense(), single.dense()) < EXACT
    # There is nothing above that is nearer than the product itself.
    assert relative_error(near.above().dense(), single.dense()) < 1e-10


def test_of_a_sum_it_is_the_nearest_in_its_basis():
    factors = [noise(3, n, n, seed=n) for n in (K, D)]
    pairs = list(zip(*((X @ X.mT).unbind() for X in factors), strict=True))
    block = EigenbasisSum.near(KroneckerSum(pairs))
    ((U, Q, values),) = block.terms
    basis = torch.kron(Q, U)
    assert relative_error(values.flatten(), (basis.T @ dense(pairs) @ basis).diagonal()) < EXACT
    assert block.trace() == pytest.approx(float(dense(pairs).trace()))


def test_groups_have_bases_of_their_own():
    block = EigenbasisSum(terms("groups", 2))
    assert relative_error(within_groups(block.dense(), 2), block.dense()) < EXACT
    assert block.groups == 2


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_make_the_block_again(kind):
    block = EigenbasisSum(terms(kind, 2))
    again = EigenbasisSum.from_tensors(block.tensors(), 2)
    assert torch.equal(again.dense(), block.dense())
    single = block.to(dtype=torch.float32)
    assert single.dtype == torch.float32
    assert relative_error(single.dense(), block.dense()) < 1e-6
    assert repr(block).startswith("EigenbasisSum(shape=(4, 3), terms=2")


def test_singular_blocks_are_refused():
    U, Q, values = terms("plain", 1)[0]
    values[1, 1] = 0.0
    for block in (EigenbasisSum([(U, Q, values)]), EigenbasisSum([(U, Q, 0.0 * values)] * 2)):
        with pytest.raises(NumericalError, match="singular|positive definite"):
            block.logdet()
    with pytest.raises(NumericalError, match="singular"):
        EigenbasisSum([(U, Q, values)]).solve(noise(D, K))
    with pytest.raises(NumericalError, match="singular"):
        EigenbasisSum([(U, Q, values)]).sample(1)
    with pytest.raises(NumericalError, match="after 1 iterations"):
        EigenbasisSum(terms("plain", 3)).solve(noise(D, K), max_iterations=1)
    assert EigenbasisSum([(U, Q, 0.0 * values)] * 2).top_eigenvalue(0.5) == 0.5


def test_a_determinant_of_several_terms_is_refused_where_it_is_large():
    U, Q = torch.eye(80), torch.eye(60)
    values = torch.ones(60, 80)
    block = EigenbasisSum([(U, Q, values)])
    assert block.logdet() == pytest.approx(0.0)
    with pytest.raises(OptionError, match="expected one term, or at most 4096 rows"):
        (block + block).logdet()


def broken(kind, change):
    made = [list(term) for term in terms(kind, 2)]
    change(made[1])
    return [tuple(term) for term in made]


@pytest.mark.parametrize(
    ("made", "error", "message"),
    [
        ([], OptionError, "at least one"),
        (broken("plain", lambda t: t.__setitem__(0, None)), ShapeError, r"terms\[1\] U"),
        (broken("plain", lambda t: t.__setitem__(0, torch.eye(2).double())), ShapeError, "U: expe"),
        (broken("plain", lambda t: t.__setitem__(1, torch.eye(3).double())), ShapeError, "Q: expe"),
        (broken("plain", lambda t: t[2].fill_(torch.nan)), NonFiniteError, r"terms\[1\] values"),
        (broken("plain", lambda t: t.__setitem__(2, t[2].float())), DtypeError, "values"),
        ([(None, torch.eye(2), torch.ones(3))], ShapeError, "values"),
        ([(None, torch.eye(2).long(), torch.ones(2, 3).long())], DtypeError, "float32"),
    ],
)
def test_parts_that_do_not_fit_are_refused(made, error, message):
    with pytest.raises(error, match=message):
        EigenbasisSum(made)


def test_blocks_that_do_not_fit_are_refused():
    block = EigenbasisSum(terms("plain", 1))
    for other in ("groups", "by column"):
        with pytest.raises(IncompatibleError, match="expected a block like"):
            block + EigenbasisSum(terms(other, 1))
    with pytest.raises(TypeError):
        block + KroneckerSum([(torch.eye(K).double(), torch.eye(D).double())])
    with pytest.raises(ShapeError, match="V"):
        block.product(noise(K, D))
