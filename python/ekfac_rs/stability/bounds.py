"""The operator ``K`` near a penalty's Hessian, part by part of a layer's parameters."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from operator import add

import torch
from torch import Tensor, nn

from ekfac_rs._tensors import accumulation_dtype
from ekfac_rs.curvature import Block, ColumnwiseSum, DiagonalBlock, EigenbasisSum, KroneckerSum
from ekfac_rs.stability.operators import ByEntry, Operator, Rotated, Spectrum, WithRows
from ekfac_rs.stability.view import Column, View, as_column

Gradients = Mapping[nn.Parameter, Tensor]


class Part:
    """Some of a layer's parameters as columns of one matrix, and the operator on it."""

    def __init__(self, columns: Sequence[Column], groups: int, operator: Operator) -> None:
        self._columns, self._groups, self.operator = columns, groups, operator

    def gathered(self, gradients: Gradients) -> Tensor | None:
        """Return the matrix, ``[groups, rows, columns]``; None where there is nothing of it."""
        if not any(column.parameter in gradients for column in self._columns):
            return None
        matrices = [
            column.as_matrix(
                gradients[p] if (p := column.parameter) in gradients else p.new_zeros(p.shape)
            )
            for column in self._columns
        ]
        X = matrices[0] if len(matrices) == 1 else torch.cat(matrices, 1)
        return X.to(accumulation_dtype(X.dtype)).reshape(self._groups, -1, X.shape[1])

    def scattered(self, X: Tensor, gradients: Gradients) -> dict[nn.Parameter, Tensor]:
        """Return the columns of the parameters that there are, as these store them."""
        rows, first, scattered = X.flatten(0, 1), 0, {}
        for column in self._columns:
            width = column.as_matrix(column.parameter).shape[1]
            if column.parameter in gradients:
                scattered[column.parameter] = column.as_stored(rows[:, first : first + width])
            first += width
        return scattered


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
    def parts(self, view: View) -> Iterator[Part]:
        """Yield the parts of ``K`` seen from the parameters."""


def bound_of(block: Block | None, scale: float, damping: float, like: Tensor) -> Bound:
    """Return the bound of ``scale * block + damping``; ``like`` has the shape of weights."""
    if isinstance(block, EigenbasisSum):
        block = block.above()
    if isinstance(block, KroneckerSum | ColumnwiseSum):
        return _KroneckerBound(block, scale, damping)
    values = block.values if isinstance(block, DiagonalBlock) else torch.zeros_like(like)
    return _DiagonalBound(scale * values + damping)


class _KroneckerBound(Bound):
    """``G (x) A`` above a sum of such terms.

    With ``w_k = sqrt(tr G_k / tr A_k)``, ``A = sum w_k A_k`` and ``G = sum G_k / w_k`` the cross
    terms are positive semi-definite (method: stable step). Groups of a single row add up exactly.
    """

    def __init__(self, block: KroneckerSum | ColumnwiseSum, scale: float, damping: float) -> None:
        stacks = [tuple(_by_group(factor, block) for factor in term) for term in block.terms]
        A, G, self.terms = _above(stacks)
        self._A, self._G = _damped(A, scale * G, damping)
        self.is_zero = not bool(self._A.any() and self._G.any())
        self._constant: Spectrum | None = None

    def parts(self, view: View) -> Iterator[Part]:
        A, G, groups = self._A, self._G, view.layer.groups
        if view.columns:
            yield Part(view.columns, groups, self._of_columns(view))
        if view.beta is not None:
            yield self._of_vector(view.beta, groups, G * A[..., -1:, -1:])
        if view.gamma is not None:
            rows = view.layer.by_group(view.by_gamma().to(A))
            yield self._of_vector(view.gamma, groups, G * (rows @ A @ rows.mT))

    def _of_columns(self, view: View) -> Operator:
        A, G = self._A, self._G
        if view.gain is not None:
            gain = view.layer.by_group(view.gain)
            G = gain[..., :, None] * G * gain[..., None, :]
        rotated = Rotated(self._spectrum(view), Spectrum.of(G))
        if view.situation is None or view.situation.variance_slope is None:
            return rotated
        moved = view.layer.by_group(view.by_variance().to(A))
        slopes = view.layer.by_group(view.situation.variance_slope.to(A))
        return WithRows.of(rotated, slopes, self._G * (moved @ A @ moved.mT))

    def _spectrum(self, view: View) -> Spectrum:
        """Spectrum of the input factor, seen from the columns; kept where it stays the same."""
        A, T = self._A, view.to_merged
        if T is None:
            self._constant = self._constant or Spectrum.of(A)
            return self._constant
        return Spectrum.of(T @ A @ T.mT)

    @staticmethod
    def _of_vector(parameter: nn.Parameter, groups: int, K: Tensor) -> Part:
        one = Spectrum.of(K.new_ones(groups, 1))
        return Part([as_column(parameter)], groups, Rotated(one, Spectrum.of(K)))


class _DiagonalBound(Bound):
    """The diagonal itself."""

    def __init__(self, values: Tensor) -> None:
        self._values = values
        self.is_zero = not bool(values.any())

    def parts(self, view: View) -> Iterator[Part]:
        F, groups = self._values, view.layer.groups
        if view.columns:
            yield Part(view.columns, groups, self._of_columns(view))
        if view.beta is not None:
            yield self._of_vector(view, view.beta, F[:, -1])
        if view.gamma is not None:
            yield self._of_vector(view, view.gamma, (F * view.by_gamma().to(F).square()).sum(1))

    def _of_columns(self, view: View) -> Operator:
        F, T = self._values, view.to_merged
        if view.gain is not None:
            F = F * view.gain.to(F).square()[:, None]
        seen = view.layer.by_group(F)
        if T is None:
            return ByEntry(seen, None)
        if not view.layer.absorbs_scale:
            small = T @ torch.diag_embed(seen[:, 0]) @ T.mT
            return Rotated(Spectrum.of(small), Spectrum.of(small.new_ones(len(small), 1)))
        # T is [I, -m], or part of I: the shift's entry spreads over a row, along m.
        K = T.shape[-1] - 1
        diagonal = torch.einsum("gdk,gck->gdc", seen[..., :K], T[..., :K].square())
        by_entry = ByEntry(diagonal, seen[..., K:].sqrt() * T[:, None, :, K])
        if view.situation is None or view.situation.variance_slope is None:
            return by_entry
        M = (self._values * view.by_variance().to(F).square()).sum(1)
        slopes = view.layer.by_group(view.situation.variance_slope.to(F))
        return WithRows.of(by_entry, slopes, view.layer.by_group(M))

    @staticmethod
    def _of_vector(view: View, parameter: nn.Parameter, values: Tensor) -> Part:
        return Part(
            [as_column(parameter)],
            view.layer.groups,
            ByEntry(view.layer.by_group(values)[..., None], None),
        )


def _by_group(factor: Tensor, block: KroneckerSum | ColumnwiseSum) -> Tensor:
    """View a factor with an axis of groups: matrices ``[groups, n, n]``, diagonals ``[1, n]``."""
    return factor if isinstance(block, KroneckerSum) and factor.dim() == 3 else factor[None]


def _above(terms: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, Tensor, int]:
    """Factors of one Kronecker product above a sum of such, and how many it is made of."""
    if terms[0][1].shape[-1] == 1:
        whole = reduce(add, (A * G.reshape(-1, *(1,) * (A.dim() - 1)) for A, G in terms))
        return whole, torch.ones_like(terms[0][1]), 1
    weighted = []
    for A, G in terms:
        trace_A, trace_G = (_mean_diagonal(x) * x.shape[-1] for x in (A, G))
        there = (trace_A > 0.0) & (trace_G > 0.0)
        w = torch.where(there, trace_G / trace_A, 1.0).sqrt()
        share = there.to(w)
        weighted.append(
            ((share * w).view(-1, *(1,) * (A.dim() - 1)) * A, (share / w).view(-1, 1, 1) * G)
        )
    A, G = (reduce(add, factors) for factors in zip(*weighted, strict=True))
    return A, G, len(terms)


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
