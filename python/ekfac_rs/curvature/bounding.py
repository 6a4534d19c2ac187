"""Blocks of many tasks within the memory and cost of a few terms.

What is given up goes into what is kept: every block stays positive semi-definite, and its trace
stays what it was.
"""

from collections.abc import Sequence
from typing import NamedTuple, Self

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

    - A `KroneckerSum` without groups becomes whichever of two changes less, in Frobenius norm.
      Either it keeps ``max_terms`` terms: pairs of terms whose join changes least become one. That
      is near where tasks have much in common, as in later layers. Or it becomes a
      `ThinKroneckerSum`, and stays one: of every term the largest directions are kept, compared by
      eigenvalue times the trace of the other factor. What is lost goes into one dense Kronecker
      product with the same partial traces (and so the same trace), or two: one for what is lost on
      the longer side of the matrices, another for the shorter side, once that loses more than a
      hundredth. The thin terms have the memory, and as many columns, as the dense terms that are
      left would cost. (With two terms there is no room for the two products: terms are joined
      then, instead.)
    - One with groups, and a `ColumnwiseSum`, have terms joined. Groups of a single row add up
      exactly.
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
        return block if len(block.terms) <= max_terms else _nearer(block, max_terms)
    if isinstance(block, ThinKroneckerSum):
        return _thinned(block, max_terms)
    if isinstance(block, KroneckerSum):
        return KroneckerSum(joined(_added_up(block), max_terms))
    if isinstance(block, ColumnwiseSum):
        return ColumnwiseSum(joined(block.terms, max_terms))
    if isinstance(block, EigenbasisSum):
        return _in_fewer_bases(block, max_terms)
    raise OptionError(f"max_terms: expected a block that can be bounded, got {block!r}")


# --- thin roots ----------------------------------------------------------------------------------


# Share of the trace that may be lost on the short side before that has a product of its own.
_NEGLIGIBLE = 0.01


class _Whole(NamedTuple):
    """A Kronecker product by the roots of its factors, that of the longer side first."""

    long: Tensor
    short: Tensor

    @property
    def weights(self) -> tuple[Tensor, Tensor]:
        """How much of the term's trace each column of either root has a part in."""
        of_long, of_short = (root.double().square().sum(0) for root in self)
        return of_long * of_short.sum(), of_short * of_long.sum()


class _Lost:
    """What terms have lost, as the one Kronecker product that has its partial traces.

    These are ``sum_k tr(S_k) L_k`` and ``sum_k tr(L_k) S_k`` for terms with factors L and S: they
    add up in any order, so that it does not matter how often a block was made smaller.
    """

    def __init__(self, long: Tensor, short: Tensor) -> None:
        self.long = long.double() * short.double().trace()
        self.short = short.double() * long.double().trace()

    def add(self, long: Tensor, by_long: Tensor, short: Tensor, by_short: Tensor) -> None:
        """Add a term by roots, of which each column counts so many times."""
        long, short = long.double(), short.double()
        by_long, by_short = by_long.double(), by_short.double()
        trace_long, trace_short = (
            (root.square().sum(0) * by).sum() for root, by in ((long, by_long), (short, by_short))
        )
        self.long += (long * (by_long * trace_short)) @ long.mT
        self.short += (short * (by_short * trace_long)) @ short.mT

    def __iadd__(self, other: Self) -> Self:
        self.long += other.long
        self.short += other.short
        return self

    def product(self, like: Tensor) -> tuple[Tensor, Tensor]:
        trace = self.long.trace()
        short = self.short / trace if bool(trace > 0.0) else self.short
        return self.long.to(like), short.to(like)


def _nearer(block: KroneckerSum, max_terms: int) -> KroneckerSum | ThinKroneckerSum:
    """Return joined terms or thin ones, whichever are nearer to the block."""
    whole = ThinKroneckerSum([], block)

    def change(other: KroneckerSum | ThinKroneckerSum) -> float:
        other = ThinKroneckerSum([], other) if isinstance(other, KroneckerSum) else other
        return other.inner(other) - 2.0 * whole.inner(other)

    joint = KroneckerSum(joined(block.terms, max_terms))
    return min(_thinned(block, max_terms), joint, key=change)


def _thinned(
    block: KroneckerSum | ThinKroneckerSum, max_terms: int
) -> KroneckerSum | ThinKroneckerSum:
    thin, dense, remainders = _parts(block)
    if not thin and not dense:
        return KroneckerSum(joined(remainders, max_terms))
    like, like_G = (*dense, *remainders)[0]
    is_tall = len(like_G) > len(like)

    def by_side(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        return (other, one) if is_tall else (one, other)

    wholes = [_Whole(*by_side(*roots)) for roots in thin]
    wholes += [_Whole(*by_side(_root(A), _root(G))) for A, G in dense]
    of_long, of_short = _kept_columns(wholes, max_terms, 1)
    by_sides = len(remainders) == 2 or _share_lost(wholes, of_short) > _NEGLIGIBLE
    if by_sides and max_terms == 2 and not thin:
        return KroneckerSum(joined(dense, 2))
    by_sides = by_sides and max_terms > 2
    if by_sides:
        of_long, of_short = _kept_columns(wholes, max_terms, 2)
    lost = [_Lost(*by_side(*term)) for term in remainders]
    while len(lost) < 2:
        lost.append(_Lost(*by_side(torch.zeros_like(like), torch.zeros_like(like_G))))
    # L (x) S less what is kept, L' (x) S', is (L - L') (x) S' and L (x) (S - S').
    for whole, long, short in zip(wholes, of_long, of_short, strict=True):
        lost[0].add(whole.long, ~long, whole.short, short)
        lost[1].add(whole.long, torch.ones_like(long), whole.short, ~short)
    if not by_sides:
        lost[0] += lost.pop()
    kept = [
        by_side(whole.long[:, long], whole.short[:, short])
        for whole, long, short in zip(wholes, of_long, of_short, strict=True)
        if bool(long.any() and short.any())
    ]
    rest = KroneckerSum([by_side(*each.product(like)) for each in lost])
    return ThinKroneckerSum(kept, rest) if kept else rest


def _parts(block: KroneckerSum | ThinKroneckerSum) -> tuple[Terms, Terms, Terms]:
    """Thin terms, dense ones, and what has been lost so far."""
    if isinstance(block, KroneckerSum):
        return (), block.terms, ()
    dense = block.rest.terms
    # Of more than two none is better than the others.
    remainders = block.remainders if block.remainders <= 2 else 0
    return block.terms, dense[remainders:], dense[:remainders]


def _root(factor: Tensor) -> Tensor:
    """Root of a factor: eigenvectors times the roots of their eigenvalues."""
    values, vectors = eigh(factor)
    root = vectors * values.clamp_min(0.0).sqrt()
    # Rounding makes some eigenvalues negative: without them the trace would be too large.
    trace = factor.diagonal().sum(dtype=torch.float64)
    found = root.square().sum(dtype=torch.float64)
    return root * (trace / found.clamp_min(torch.finfo(torch.float64).tiny)).sqrt().to(root)


def _kept_columns(
    wholes: Sequence[_Whole], max_terms: int, remainders: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Return which columns of each term's roots are kept beside so many dense remainders.

    A column on the long side, of size ``L``, costs as much as ``2 / L`` of a dense term; there are
    so many of them. The memory that is left then is for columns on the short side.
    """
    long, short = (len(root) for root in wholes[0])
    terms = max(max_terms - remainders, 0)
    most_long = terms * long // 2
    most_short = (terms * (long**2 + short**2) - most_long * long) // short
    of_long, of_short = zip(*(whole.weights for whole in wholes), strict=True)
    kept_long = _largest(of_long, most_long)
    # A term that has no column left on one side takes no room on the other.
    there = [w * kept.any() for w, kept in zip(of_short, kept_long, strict=True)]
    kept_short = _largest(there, most_short)
    return kept_long, [
        kept_short[t] if bool(kept.any()) else torch.ones_like(kept_short[t])
        for t, kept in enumerate(kept_long)
    ]


def _largest(weights: Sequence[Tensor], count: int) -> list[Tensor]:
    """Mark the largest of all weights that are not zero."""
    together = torch.cat(list(weights))
    chosen = torch.zeros_like(together, dtype=torch.bool)
    chosen[together.argsort(descending=True, stable=True)[:count]] = True
    return list(torch.split(chosen & (together > 0.0), [len(w) for w in weights]))


def _share_lost(wholes: Sequence[_Whole], of_short: Sequence[Tensor]) -> float:
    """Share of the terms' trace that is lost with columns on the short side alone."""
    weights = [whole.weights[1] for whole in wholes]
    lost = sum(float(w[~kept].sum()) for w, kept in zip(weights, of_short, strict=True))
    return lost / max(sum(float(w.sum()) for w in weights), torch.finfo(torch.float64).tiny)


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
    whole = block.added_up()
    if whole is None or len(block.terms) == 1:
        return block.terms
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
