"""The operator ``K`` near a penalty's Hessian, part by part of a layer's parameters."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from operator import add

import torch
from torch import Tensor, nn

from ekfac_rs._tensors import accumulation_dtype
from ekfac_rs.curvature import (
    Block,
    ColumnwiseSum,
    DiagonalBlock,
    EigenbasisSum,
    KroneckerSum,
    ThinKroneckerSum,
)
from ekfac_rs.layers import AffineLayer
from ekfac_rs.stability.operators import ByEntry, Operator, Rotated, Spectrum, WithRows
from ekfac_rs.stability.view import Moves, View

# Of larger matrices no whole spectrum is made even once, to be kept.
_LARGE = 1024


class Part:
    """Parameters of a layer that are columns of one matrix, and the operator on it."""

    def __init__(
        self, layer: AffineLayer, parameters: Sequence[nn.Parameter], operator: Operator
    ) -> None:
        self._layer, self._parameters, self.operator = layer, parameters, operator

    def narrowed(self, c: float) -> "Part":
        """Return the part with what is enough of its operator where no larger ``c`` is wanted."""
        return Part(self._layer, self._parameters, self.operator.narrowed(c))

    def gathered(self, gradients: Moves) -> Tensor | None:
        """Return the matrix, ``[groups, rows, columns]``; None where there is nothing of it."""
        if not any(p in gradients for p in self._parameters):
            return None
        columns = [
            self._as_columns(p, gradients[p] if p in gradients else p.new_zeros(p.shape))
            for p in self._parameters
        ]
        X = columns[0] if len(columns) == 1 else torch.cat(columns, 1)
        return self._layer.by_group(X.to(accumulation_dtype(X.dtype)))

    def scattered(self, X: Tensor, gradients: Moves) -> dict[nn.Parameter, Tensor]:
        """Return the columns of the parameters that there are, as these store them."""
        rows, first, scattered = X.flatten(0, 1), 0, {}
        for p in self._parameters:
            is_weight = p is self._layer.module.weight
            width = self._layer.as_matrix(p).shape[1] if is_weight else 1
            if p in gradients:
                own = rows[:, first : first + width]
                scattered[p] = self._layer.as_stored(own) if is_weight else own.reshape(p.shape)
            first += width
        return scattered

    def _as_columns(self, parameter: nn.Parameter, values: Tensor) -> Tensor:
        is_weight = parameter is self._layer.module.weight
        return self._layer.as_matrix(values) if is_weight else values.reshape(-1, 1)


class Bound(ABC):
    """What ``K`` is made of: an operator above a layer's block and damping, in merged weights.

    Attributes
    ----------
    terms : int
        Of how many it is put together: up to so many times too large.
    is_zero : bool
    """

    terms = 1
    is_zero = False

    @abstractmethod
    def parts(self, view: View, c: float) -> Iterator[Part]:
        """Yield the parts of ``K`` seen from the parameters, good for ``(I + c K)^-1``."""


def bound_of(blocks: Sequence[tuple[float, Block]], damping: float, like: Tensor) -> Bound:
    """Return the bound of blocks times their scales, and damping.

    Parameters
    ----------
    blocks : sequence of (float, Block)
        All diagonal or none.
    damping : float
    like : Tensor of shape (D, K)
        Of the weights' shape.
    """
    diagonal = [scale * b.values for scale, b in blocks if isinstance(b, DiagonalBlock)]
    if len(diagonal) == len(blocks):
        return _DiagonalBound(reduce(add, diagonal, torch.zeros_like(like)) + damping)
    return _KroneckerBound((term for scaled in blocks for term in _terms_of(*scaled)), damping)


class _KroneckerBound(Bound):
    """``G (x) A`` above a sum of such terms.

    With ``w_k = sqrt(tr G_k / tr A_k)``, ``A = sum w_k A_k`` and ``G = sum G_k / w_k`` the cross
    terms are positive semi-definite (method: stable step). Groups of a single row add up exactly.
    """

    def __init__(self, terms: Iterable[tuple[Tensor, Tensor]], damping: float) -> None:
        A, G, self.terms = _above(terms)
        self._A, self._G = _damped(A, G, damping)
        self.is_zero = not bool(self._A.any() and self._G.any())
        # By the columns that it is of.
        self._constant: dict[tuple[int, int], Spectrum] = {}

    def parts(self, view: View, c: float) -> Iterator[Part]:
        A, G, layer = self._A, self._G, view.layer
        columns = _columns_of(view)
        if columns:
            yield Part(layer, columns, self._of_columns(view, c))
        if view.beta is not None:
            yield self._of_vector(view, view.beta, G * A[..., -1:, -1:])
        if view.gamma is not None:
            rows = layer.by_group(view.by_gamma.to(A))
            yield self._of_vector(view, view.gamma, G * (rows @ A @ rows.mT))

    def _of_columns(self, view: View, c: float) -> Operator:
        A, G, layer = self._A, self._G, view.layer
        if view.gain is not None:
            gain = layer.by_group(view.gain.to(G))
            G = gain[..., :, None] * G * gain[..., None, :]
        spectrum = Spectrum.of(G)
        rotated = Rotated(self._input_spectrum(view, c * spectrum.top), spectrum)
        if view.variance_slope is None:
            return rotated
        rows, slopes = (layer.by_group(x.to(A)) for x in (view.by_variance, view.variance_slope))
        return WithRows.of(rotated, slopes, self._G * (rows @ A @ rows.mT))

    def _input_spectrum(self, view: View, stiffness: Tensor) -> Spectrum:
        """Spectrum of the input factor as the columns see it; kept where it stays the same."""
        A = self._A
        if view.input_mean is not None:
            m = view.input_mean.to(A)
            B, c, alpha = A[..., :-1, :-1], A[..., :-1, -1], A[..., -1:, -1:]
            outer = c[..., :, None] * m[..., None, :]
            seen = B - outer - outer.mT + alpha * m[..., :, None] * m[..., None, :]
            return Spectrum.of(seen, stiffness)
        kept = _kept_columns(view, A.shape[-1])
        A = A[..., kept] if A.dim() == 2 else A[..., kept, kept]
        if A.shape[-1] > _LARGE:
            return Spectrum.of(A, stiffness)
        columns = kept.start, kept.stop
        if columns not in self._constant:
            self._constant[columns] = Spectrum.of(A)
        return self._constant[columns]

    @staticmethod
    def _of_vector(view: View, parameter: nn.Parameter, K: Tensor) -> Part:
        one = Spectrum.of(K.new_ones(len(K), 1))
        return Part(view.layer, [parameter], Rotated(one, Spectrum.of(K)))


class _DiagonalBound(Bound):
    """The diagonal itself."""

    def __init__(self, values: Tensor) -> None:
        self._values = values
        self.is_zero = not bool(values.any())

    def parts(self, view: View, c: float) -> Iterator[Part]:
        F = self._values
        columns = _columns_of(view)
        if columns:
            yield Part(view.layer, columns, self._of_columns(view))
        if view.beta is not None:
            yield self._of_vector(view, view.beta, F[:, -1])
        if view.gamma is not None:
            yield self._of_vector(view, view.gamma, (F * view.by_gamma.to(F).square()).sum(1))

    def _of_columns(self, view: View) -> Operator:
        F, layer = self._values, view.layer
        if view.gain is not None:
            F = F * view.gain.to(F).square()[:, None]
        if view.input_mean is None:
            return ByEntry(layer.by_group(F[:, _kept_columns(view, F.shape[1])]), None)
        # The shift's entry spreads over a row, along the mean.
        seen = layer.by_group(F)
        m = view.input_mean.to(F)[:, None]
        by_entry = ByEntry(seen[..., :-1], seen[..., -1:].sqrt() * m)
        if view.variance_slope is None:
            return by_entry
        M = (self._values * view.by_variance.to(F).square()).sum(1)
        return WithRows.of(by_entry, layer.by_group(view.variance_slope.to(F)), layer.by_group(M))

    @staticmethod
    def _of_vector(view: View, parameter: nn.Parameter, values: Tensor) -> Part:
        diagonal = view.layer.by_group(values)[..., None]
        return Part(view.layer, [parameter], ByEntry(diagonal, None))


def _columns_of(view: View) -> list[nn.Parameter]:
    return [parameter for parameter in (view.weight, view.bias) if parameter is not None]


def _kept_columns(view: View, K: int) -> slice:
    """Columns of the merged weights that belong to the trained ones of weights and bias."""
    inputs = view.layer.weight().shape[1]
    return slice(0 if view.weight is not None else inputs, K if view.bias is not None else inputs)


def _terms_of(scale: float, block: Block) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield terms above a block, each with an axis of groups.

    Matrices are ``[groups, n, n]``, diagonals ``[1, n]``.
    """
    if isinstance(block, EigenbasisSum):
        block = block.above()
    assert isinstance(block, KroneckerSum | ColumnwiseSum | ThinKroneckerSum)
    terms = block.products() if isinstance(block, ThinKroneckerSum) else block.terms
    for A, G in terms:
        yield (A, scale * G) if G.dim() == 3 else (A[None], scale * G[None])


def _above(terms: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, int]:
    """Factors of one Kronecker product above a sum of such, and how many it is made of."""
    # One after another: of many thin terms no two are ever there as matrices.
    balanced = (_balanced(A, G) for A, G in terms)
    A, G = next(balanced)
    count = 1
    for more_A, more_G in balanced:
        A, G, count = A + more_A, G + more_G, count + 1
    return (A, torch.ones_like(G), 1) if G.shape[-1] == 1 else (A, G, count)


def _balanced(A: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    """Share a term's size out between its factors, so that sums of both are above sums of terms.

    Where G is a number, all of it goes to A.
    """
    if G.shape[-1] == 1:
        return A * G.reshape(-1, *(1,) * (A.dim() - 1)), torch.ones_like(G)
    trace_A, trace_G = (_mean_diagonal(x) * x.shape[-1] for x in (A, G))
    there = (trace_A > 0.0) & (trace_G > 0.0)
    w = torch.where(there, trace_G / trace_A, 1.0).sqrt()
    share = there.to(w)
    return (share * w).view(-1, *(1,) * (A.dim() - 1)) * A, (share / w).view(-1, 1, 1) * G


def _damped(A: Tensor, G: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Factors above ``G (x) A + damping I``, as in Martens & Grosse 2015, section 6.3."""
    if damping == 0.0:
        return A, G
    mean_A, mean_G = _mean_diagonal(A), _mean_diagonal(G)
    balanced = (mean_A > 0.0) & (mean_G > 0.0)
    share = (damping * torch.where(balanced, mean_G / mean_A, 1.0)).sqrt()
    return _plus_identity(A, damping / share), _plus_identity(G, share)


def _mean_diagonal(x: Tensor) -> Tensor:
    """Mean of the diagonal of each matrix, or of each diagonal."""
    return (x if x.dim() == 2 else x.diagonal(dim1=-2, dim2=-1)).mean(-1)


def _plus_identity(x: Tensor, shift: Tensor) -> Tensor:
    if x.dim() == 2:
        return x + shift[:, None]
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    return x + shift[:, None, None] * eye
