"""Fast products with a sum of Kronecker products, by truncated roots of its factors."""

import math
from collections.abc import MutableMapping, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ekfac_rs import _core
from ekfac_rs._checks import require_share
from ekfac_rs._tensors import borrow
from ekfac_rs.curvature.kronecker import KroneckerSum, eigh, leading_eigh
from ekfac_rs.curvature.thin import ThinKroneckerSum

# Inside, where columns are cheap, so much of the share is dropped.
_INSIDE = 0.1
# What is dropped takes so many columns of its own, as a share of all the others.
_REMAINDERS = 0.125
_LEAST_REMAINDERS = 8


class Factor(NamedTuple):
    """A symmetric positive semi-definite matrix ``root root^T + shift I``."""

    root: Tensor
    shift: float

    @classmethod
    def of(cls, matrix: Tensor, dropped: float, most: int | None = None) -> "Factor":
        """Keep the fewest eigenvectors that have all of the trace but a share at most.

        What is dropped is replaced by its mean on the diagonal: the trace stays what it was.

        Parameters
        ----------
        matrix : Tensor of shape (n, n)
        dropped : float
        most : int, optional
            No more eigenvectors than these, whatever is dropped then.
        """
        most = len(matrix) if most is None else most
        trace = float(matrix.diagonal().sum(dtype=torch.float64))
        least = (1.0 - dropped) * trace

        def is_enough(values: Tensor) -> bool:
            return len(values) >= most or float(values.sum(dtype=torch.float64)) >= least

        values, vectors = leading_eigh(matrix, is_enough) or eigh(matrix)
        values, vectors = values[-most:].clamp_min(0.0), vectors[:, -most:]
        left = trace - float(values.sum(dtype=torch.float64))
        whole = cls(vectors * values.sqrt(), max(left, 0.0) / len(matrix))
        return whole.truncated(dropped)

    def truncated(self, dropped: float) -> "Factor":
        """Keep fewer of the eigenvectors: those that have all of the trace but a share at most."""
        values = self.root.square().sum(0, dtype=torch.float64).flip(0)
        so_far = values.cumsum(0)
        trace = float(so_far[-1]) + self.shift * len(self.root)
        count = min(int((so_far < (1.0 - dropped) * trace).sum()) + 1, len(values))
        left = max(trace - float(so_far[count - 1]), 0.0)
        return Factor(self.root[:, -count:], left / len(self.root))

    @property
    def columns(self) -> int:
        """Number of eigenvectors."""
        return self.root.shape[1]

    def matrix(self) -> Tensor:
        """Return the matrix itself."""
        square = self.root @ self.root.mT
        square.diagonal().add_(self.shift)
        return square

    def borrowed(self) -> _core.Factor:
        """Describe it to the core."""
        return borrow(self.root), self.shift


class TruncatedSum:
    """An operator near a sum of Kronecker products, and much cheaper to apply.

    Each factor of a term keeps the eigenvectors of its largest eigenvalues, and on the diagonal
    the mean of what is dropped: ``A = R R^T + a I`` and ``G = Q Q^T + g I``, positive
    semi-definite and of the same traces. With the fewer columns in Q, say,

    ``G V A = Q (Q^T V) A + g V A``

    of which the first takes about ``4 D K`` floating-point operations for each column of Q. The
    second is a share of the term, and of all terms it is ``V B`` with ``B = sum g A``: of B the
    largest directions and the mean on the diagonal are kept, too. Where R has the fewer columns
    it is the other way round. A term that is no cheaper like this stays as it is.

    Parameters
    ----------
    blocks : sequence of KroneckerSum or ThinKroneckerSum
        Without groups, of one shape; at least one. Thin terms keep their roots.
    dropped : float
        The largest share of each factor's trace that may be dropped, above 0 and below 1.
    precision : str
        Of its products: "ieee", or, on a GPU, "tf32".

    Attributes
    ----------
    packed
        All but what is on the diagonal, for many products.
    shift : float
        What is on the diagonal.

    Raises
    ------
    OptionError
        ``dropped`` is no such number.
    """

    def __init__(
        self,
        blocks: Sequence[KroneckerSum | ThinKroneckerSum],
        dropped: float,
        precision: str = "ieee",
    ) -> None:
        require_share("dropped", dropped)
        self._blocks = tuple(blocks)
        D, K = self.shape = blocks[0].shape
        exact: list[tuple[Tensor, Tensor]] = []
        through_G, through_A = _Through(K), _Through(D)
        for block in blocks:
            dense = block.rest.terms if isinstance(block, ThinKroneckerSum) else block.terms
            for A, G in dense:
                near_A, near_G = (_truncated(x, _INSIDE * dropped) for x in (A, G))
                few_A, few_G = (x.truncated(dropped) for x in (near_A, near_G))
                by_G, by_A = through_G.cost(few_G, near_A), through_A.cost(few_A, near_G)
                if min(by_G, by_A) >= 2 * D * K * (D + K):
                    exact.append((A, G))
                elif by_G <= by_A:
                    through_G.add(few_G, near_A, A)
                else:
                    through_A.add(few_A, near_G, G)
            for R, Q in block.terms if isinstance(block, ThinKroneckerSum) else ():
                near_A, near_G = Factor(R, 0.0), Factor(Q, 0.0)
                if through_G.cost(near_G, near_A) <= through_A.cost(near_A, near_G):
                    through_G.add(near_G, near_A, None)
                else:
                    through_A.add(near_A, near_G, None)
        # What is dropped on one side is multiplied on the other alone.
        remainders = through_A.remainder(dropped), through_G.remainder(dropped)
        through_G.add_remainder(remainders[0])
        through_A.add_remainder(remainders[1])
        self.shift = sum((each.shift for each in remainders if each is not None), 0.0)
        self._through = through_G, through_A
        self._exact = exact
        terms: list[tuple[_core.Factor | None, _core.Factor | None]]
        terms = [((borrow(A), None), (borrow(G), None)) for A, G in exact]
        terms += [(other, one) for one, other in through_G.borrowed()]
        terms += through_A.borrowed()
        self.packed = _core.KroneckerOperator.from_factors(self.shape, terms, precision)

    def __repr__(self) -> str:
        exact = len(self._exact)
        return f"TruncatedSum(shape={self.shape}, columns={self.columns}, exact={exact})"

    @property
    def columns(self) -> int:
        """How many columns the product goes through."""
        return sum(through.columns for through in self._through)

    @property
    def flops(self) -> int:
        """Floating-point operations of one product."""
        return self.packed.flops

    def product(self, V: Tensor) -> Tensor:
        """Apply the operator to a matrix of shape (D, K)."""
        V = V.contiguous()
        out = torch.empty_like(V)
        self.packed.apply(borrow(V), borrow(out))
        return out.add_(V, alpha=self.shift)

    def dense_terms(self) -> KroneckerSum:
        """Return the operator as a sum of as many dense terms, which takes their memory."""
        D, K = self.shape
        through_G, through_A = self._through
        terms = [*self._exact]
        terms += [(other, one) for one, other in through_G.products()]
        terms += through_A.products()
        like = self._blocks[0].diagonal()
        eye_D, eye_K = (torch.eye(n).to(like) for n in (D, K))
        terms.append((self.shift * eye_K, eye_D))
        return KroneckerSum(terms)

    def error(self) -> float:
        """Frobenius norm of the difference from the blocks' sum, relative to that of the sum."""
        near = self.dense_terms()
        parts = (b.products() if isinstance(b, ThinKroneckerSum) else b.terms for b in self._blocks)
        whole = KroneckerSum([*chain.from_iterable(parts)])
        square = whole.inner(whole)
        change = square - 2.0 * whole.inner(near) + near.inner(near)
        return math.sqrt(max(change, 0.0) / square) if square > 0.0 else 0.0


class _Through:
    """Terms whose products go through a few columns on one side, ``P P^T`` times another factor."""

    def __init__(self, other_size: int) -> None:
        self._other_size = other_size
        self._roots: list[Tensor] = []
        # None for the identity.
        self._others: list[Factor | Tensor | None] = []
        self._dropped: Tensor | None = None

    @property
    def columns(self) -> int:
        """Number of columns."""
        return sum(root.shape[1] for root in self._roots)

    def cost(self, one: Factor, other: Factor) -> int:
        """Floating-point operations of a term that goes through ``one``."""
        inside = min(2 * other.columns, self._other_size)
        return 2 * one.columns * self._other_size * (2 * len(one.root) + inside)

    def add(self, one: Factor, other: Factor, exact: Tensor | None) -> None:
        """Add a term; ``exact`` is the other factor as it was."""
        self._roots.append(one.root)
        is_dense = exact is not None and 2 * other.columns >= self._other_size
        self._others.append(exact if is_dense else other)
        if exact is not None and one.shift > 0.0:
            dropped = one.shift * exact
            self._dropped = dropped if self._dropped is None else self._dropped.add_(dropped)

    def remainder(self, dropped: float) -> Factor | None:
        """Return what was dropped as a factor on the other side: on this one is the identity."""
        if self._dropped is None:
            return None
        most = max(_LEAST_REMAINDERS, math.ceil(_REMAINDERS * self.columns))
        matrix, self._dropped = self._dropped, None
        return Factor.of(matrix, dropped, min(most, len(matrix)))

    def add_remainder(self, remainder: Factor | None) -> None:
        """Take what was dropped on the other side, but for what of it is on the diagonal."""
        if remainder is not None:
            self._roots.append(remainder.root)
            self._others.append(None)

    def borrowed(self) -> list[tuple[_core.Factor, _core.Factor | None]]:
        """Describe the factors of every term to the core: on this side, and the other."""
        return [
            ((borrow(root), 0.0), _borrowed(other))
            for root, other in zip(self._roots, self._others, strict=True)
        ]

    def products(self) -> list[tuple[Tensor, Tensor]]:
        """Return the factors of every term: on this side, and the other."""
        return [
            (root @ root.mT, _matrix(other, root, self._other_size))
            for root, other in zip(self._roots, self._others, strict=True)
        ]


def _borrowed(factor: Factor | Tensor | None) -> _core.Factor | None:
    if isinstance(factor, Tensor):
        return borrow(factor), None
    return None if factor is None else factor.borrowed()


def _matrix(factor: Factor | Tensor | None, like: Tensor, size: int) -> Tensor:
    if factor is None:
        return torch.eye(size).to(like)
    return factor.matrix() if isinstance(factor, Factor) else factor


# Penalties of one task after another are on the same factors of the earlier ones. By what they
# were decomposed at: the version of a tensor, too, which changes with its values.
_FACTORS: MutableMapping[Tensor, dict[tuple[float, int], Factor]]
_FACTORS = WeakTensorKeyDictionary()


def _truncated(matrix: Tensor, dropped: float) -> Factor:
    known, key = _FACTORS.setdefault(matrix, {}), (dropped, matrix._version)
    if key not in known:
        known[key] = Factor.of(matrix, dropped)
    return known[key]
