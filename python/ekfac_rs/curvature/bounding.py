"""Blocks of many tasks within the memory and cost of a few terms.

What is given up goes into what is kept: every block stays positive semi-definite, and its trace
stays what it was.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ekfac_rs._checks import require_count
from ekfac_rs.curvature.block import Block, Terms
from ekfac_rs.curvature.columnwise import ColumnwiseSum
from ekfac_rs.curvature.diagonal import DiagonalBlock
from ekfac_rs.curvature.eigenbasis import EigenbasisSum, EigenbasisTerm
from ekfac_rs.curvature.kronecker import KroneckerSum, eigh
from ekfac_rs.curvature.thin import ThinKroneckerSum
from ekfac_rs.errors import OptionError


def bounded(block: Block, max_terms: int) -> Block:
    """Return a block that takes no more memory, and no longer to multiply, than so many terms.

    A block that has no more terms is returned as it is. What it becomes otherwise:

    - A `KroneckerSum` without groups becomes a `ThinKroneckerSum`: one dense Kronecker product,
      and of every term the largest directions, as many in all as ``max_terms - 1`` dense terms
      would cost. Directions are compared by eigenvalue times the trace of the other factor. The
      dense product is that of all the others, with the same partial traces (and so the same
      trace); see `of_equal_partial_traces`.
    - One with groups, and a `ColumnwiseSum`, keep ``max_terms`` terms: pairs of terms whose join
      changes least become one. Groups of a single row add up exactly.
    - An `EigenbasisSum` keeps ``max_terms`` terms: a term goes into the eigenbasis of another, the
      one where its diagonal loses least.
    - A `DiagonalBlock` never has more than one.

    Parameters
    ----------
    block : Block
    max_terms : int
        At least 1. A dense term is ``K^2 + D^2`` numbers and takes ``2 (D K^2 + D^2 K)``
        floating-point operations.

    Raises
    ------
    OptionError
        ``max_terms`` is no such number; another kind of block.
    """
    require_count("max_terms", max_terms)
    if isinstance(block, DiagonalBlock):
        return block
    if isinstance(block, KroneckerSum) and block.groups == 1:
        return _thinned([], block.group(0), max_terms) if _is_over(block, max_terms) else block
    if isinstance(block, ThinKroneckerSum):
        return _thinned(block.terms, block.rest, max_terms)
    if isinstance(block, KroneckerSum):
        return KroneckerSum(joined(_added_up(block), max_terms))
    if isinstance(block, ColumnwiseSum):
        return ColumnwiseSum(joined(block.terms, max_terms))
    if isinstance(block, EigenbasisSum):
        return _in_fewer_bases(block, max_terms)
    raise OptionError(f"max_terms: expected a block that can be bounded, got {block!r}")


def _is_over(block: KroneckerSum, max_terms: int) -> bool:
    return len(block.terms) > max_terms


# --- thin roots ----------------------------------------------------------------------------------


class _Roots(NamedTuple):
    """A Kronecker product by the roots of its factors."""

    R: Tensor
    Q: Tensor

    @property
    def weights(self) -> tuple[Tensor, Tensor]:
        """How much of the block's trace each column of R, and each of Q, has a part in."""
        of_R, of_Q = (root.double().square().sum(0) for root in self)
        return of_R * of_Q.sum(), of_Q * of_R.sum()

    def kept(self, of_R: Tensor, of_Q: Tensor) -> "_Roots":
        return _Roots(self.R[:, of_R], self.Q[:, of_Q])

    def trace(self) -> float:
        return float(torch.linalg.vector_norm(self.R.double()).square()) * float(
            torch.linalg.vector_norm(self.Q.double()).square()
        )


class _PartialTraces:
    """Partial traces of what is given up, summed.

    ``A = sum_k tr(G_k) A_k`` and ``G = sum_k tr(A_k) G_k``: they add up in any order, so a rest
    does not depend on how often it was made.
    """

    def __init__(self, A: Tensor, G: Tensor) -> None:
        self.A, self.G = A.double() * G.double().trace(), G.double() * A.double().trace()

    def add(self, whole: _Roots, of_R: Tensor, of_Q: Tensor) -> None:
        """Add what a term loses that keeps only these columns."""
        R, Q = whole.R.double(), whole.Q.double()
        values_R, values_Q = R.square().sum(0), Q.square().sum(0)
        # G (x) A less G' (x) A' is G' (x) (A - A') and (G - G') (x) A.
        lost_Q = values_Q[~of_Q].sum()
        self.A += (R * torch.where(of_R, lost_Q, values_Q.sum())) @ R.mT
        lost_R = values_R[~of_R].sum()
        self.G += (Q * torch.where(of_Q, lost_R, values_R.sum())) @ Q.mT

    def product(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the Kronecker product that has these partial traces."""
        trace = self.A.trace()
        G = self.G / trace if bool(trace > 0.0) else self.G
        return self.A.to(like), G.to(like)


def _thinned(terms: Terms, rest: KroneckerSum, max_terms: int) -> KroneckerSum | ThinKroneckerSum:
    """Keep the largest directions of all terms but the rest's first, and add what is lost to it."""
    (A, G), *dense = rest.terms
    if not terms:
        # The first time there is no rest yet: every term is one like the others.
        dense, A, G = list(rest.terms), torch.zeros_like(A), torch.zeros_like(G)
    wholes = [*(_Roots(R, Q) for R, Q in terms), *(_Roots(*map(_root, term)) for term in dense)]
    lost, kept = _PartialTraces(A, G), []
    for whole, of_R, of_Q in zip(
        wholes, *_kept_columns(wholes, rest.shape, max_terms), strict=True
    ):
        lost.add(whole, of_R, of_Q)
        if bool(of_R.any()):
            kept.append(whole.kept(of_R, of_Q))
    other = KroneckerSum([lost.product(A)])
    return ThinKroneckerSum(kept, other) if kept else other


def _root(factor: Tensor) -> Tensor:
    """Root of a factor: eigenvectors times the roots of their eigenvalues."""
    values, vectors = eigh(factor)
    return vectors * values.clamp_min(0.0).sqrt()


def _kept_columns(
    wholes: Sequence[_Roots], shape: tuple[int, int], max_terms: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the columns of each term's roots that are kept.

    With ``L >= S`` the sides of the matrices, columns on the long side are ``L / 2`` for each
    dense term that there might be: so many cost what it does. What memory is left then is for
    columns on the short side.
    """
    D, K = shape
    long, short = max(D, K), min(D, K)
    many = (max_terms - 1) * long // 2
    few = ((max_terms - 1) * (long**2 + short**2) - many * long) // short
    of_R, of_Q = zip(*(whole.weights for whole in wholes), strict=True)
    if K >= D:
        kept_R = _largest(of_R, many)
        kept_Q = _largest(_where_any(of_Q, kept_R), few)
        kept_R = _and_any(kept_R, kept_Q)
    else:
        kept_Q = _largest(of_Q, many)
        kept_R = _largest(_where_any(of_R, kept_Q), few)
        kept_Q = _and_any(kept_Q, kept_R)
    return kept_R, _and_any(kept_Q, kept_R)


def _largest(weights: Sequence[Tensor], count: int) -> list[Tensor]:
    """Mark the largest of all weights, none that is rounding."""
    together = torch.cat(list(weights))
    chosen = torch.zeros_like(together, dtype=torch.bool)
    chosen[together.argsort(descending=True, stable=True)[:count]] = True
    return list(torch.split(chosen & (together > 0.0), [len(w) for w in weights]))


def _where_any(weights: Sequence[Tensor], kept: Sequence[Tensor]) -> list[Tensor]:
    return [w * bool(k.any()) for w, k in zip(weights, kept, strict=True)]


def _and_any(kept: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
    """Unmark the columns of terms of which the other root has none left."""
    return [k & other.any() for k, other in zip(kept, others, strict=True)]


# --- dense terms joined --------------------------------------------------------------------------


def joined(terms: Terms, count: int) -> list[tuple[Tensor, Tensor]]:
    """Join terms until there are ``count``, the pair first whose join changes least.

    Two become the Kronecker product with the same partial traces. With traces ``x, y`` and factors
    of trace 1 the change is ``x y / (x + y) (G_1 - G_2) (x) (A_1 - A_2)``: nothing where they
    agree in one of both.

    Parameters
    ----------
    terms : sequence of (A, G)
        Matrices, stacks of them for groups, or diagonals as input factors.
    count : int
    """
    left = [_Joint.of(A, G) for A, G in terms]
    while len(left) > count:
        pairs = [(i, j) for j in range(len(left)) for i in range(j)]
        i, j = min(pairs, key=lambda pair: left[pair[0]].change(left[pair[1]]))
        left[i] = left[i].join(left.pop(j))
    A, G = terms[0]
    return [joint.term(A, G) for joint in left]


class _Joint(NamedTuple):
    """A term, or several joined: its traces ``[groups]``, and factors of trace 1 by group."""

    traces: Tensor
    A: Tensor
    G: Tensor

    @classmethod
    def of(cls, A: Tensor, G: Tensor) -> "_Joint":
        stack = A.shape[0] if A.dim() == 3 else 1
        one, other = (x.double().reshape(stack, -1) for x in (A, G))
        trace_A = _traces(A.double()).reshape(stack, 1)
        trace_G = _traces(G.double()).reshape(stack, 1)
        traces = trace_A * trace_G
        there = traces > 0.0
        one, other = (
            torch.where(there, x / torch.where(there, t, 1.0), 0.0)
            for x, t in ((one, trace_A), (other, trace_G))
        )
        return cls(traces, one, other)

    def change(self, other: "_Joint") -> float:
        """Frobenius norm, squared, of what joining the two changes."""
        whole = (self.traces + other.traces).clamp_min(torch.finfo(torch.float64).tiny)
        between = (self.traces * other.traces / whole)[:, 0]
        apart = [(x - y).square().sum(1) for x, y in ((self.A, other.A), (self.G, other.G))]
        return float((between.square() * apart[0] * apart[1]).sum())

    def join(self, other: "_Joint") -> "_Joint":
        traces = self.traces + other.traces
        share = torch.where(traces > 0.0, self.traces / torch.where(traces > 0.0, traces, 1.0), 0.0)
        return _Joint(
            traces, torch.lerp(other.A, self.A, share), torch.lerp(other.G, self.G, share)
        )

    def term(self, A: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
        return (self.traces * self.A).reshape(A.shape).to(A), self.G.reshape(G.shape).to(G)


def _traces(factor: Tensor) -> Tensor:
    return factor.sum(-1) if factor.dim() == 1 else factor.diagonal(dim1=-2, dim2=-1).sum(-1)


def _added_up(block: KroneckerSum) -> Terms:
    """Return the terms; of groups of a single row their sum, which is one."""
    if block.groups < block.shape[0] or len(block.terms) == 1:
        return block.terms
    whole = torch.stack([A.double() * G.double() for A, G in block.terms]).sum(0)
    return [(whole.to(block.dtype), torch.ones_like(block.terms[0][1]))]


# --- eigenbases ----------------------------------------------------------------------------------


def _in_fewer_bases(block: EigenbasisSum, max_terms: int) -> EigenbasisSum:
    terms = list(block.terms)
    while len(terms) > max_terms:
        pairs = [(i, j) for i in range(len(terms)) for j in range(len(terms)) if i != j]
        i, j = min(pairs, key=lambda pair: _lost_in_basis(terms[pair[0]], terms[pair[1]]))
        into = terms[j]
        values = into.values + terms[i].seen_from(into).to(into.values)
        terms[j] = EigenbasisTerm(into.U, into.Q, values)
        del terms[i]
    return EigenbasisSum(terms)


def _lost_in_basis(term: EigenbasisTerm, basis: EigenbasisTerm) -> float:
    """Frobenius norm, squared, of what of a term is off the diagonal in another's eigenbasis."""
    seen = term.seen_from(basis)
    return float(term.values.double().square().sum() - seen.square().sum())
