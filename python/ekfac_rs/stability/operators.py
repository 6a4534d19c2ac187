"""Operators ``(I + c K)^-1`` on the rows of a layer's weights, for a ``K`` of a simple form."""

from abc import ABC, abstractmethod
from typing import NamedTuple, Self

import torch
from torch import Tensor

from ekfac_rs.curvature.kronecker import eigh, leading_eigh

# Directions whose step shrinks by less than this share are left alone.
_NEGLIGIBLE = 0.3


class Operator(ABC):
    """``(I + c K)^-1 = L L^T`` on matrices ``[groups, rows, columns]``, for any ``c``."""

    @abstractmethod
    def inverse(self, X: Tensor, c: float) -> Tensor:
        """Multiply by ``(I + c K)^-1``."""

    @abstractmethod
    def root(self, X: Tensor, c: float) -> Tensor:
        """Multiply by ``L``."""

    @abstractmethod
    def root_transposed(self, X: Tensor, c: float) -> Tensor:
        """Multiply by ``L^T``."""

    def narrowed(self, c: float) -> "Operator":
        """Return what is enough of the operator where no larger ``c`` is wanted."""
        return self


class Spectrum(NamedTuple):
    """Eigenvalues of symmetric positive semi-definite matrices, and eigenvectors.

    Attributes
    ----------
    values : Tensor of shape (groups, n)
        Ascending, but for diagonal matrices.
    vectors : Tensor of shape (groups, rows, n), optional
        None for diagonal matrices.
    """

    values: Tensor
    vectors: Tensor | None

    @classmethod
    def of(cls, factor: Tensor, stiffness: Tensor | None = None) -> "Spectrum":
        """Decompose matrices ``[groups, n, n]``, or diagonal ones given as ``[groups, n]``.

        Of a large matrix alone only the pairs whose eigenvalue times ``stiffness`` matters, where
        that is given.
        """
        if factor.dim() == 2:
            return cls(factor.clamp_min(0.0), None)
        if factor.shape[-1] == 1:
            return cls(factor[..., 0].clamp_min(0.0), None)
        factor = 0.5 * (factor + factor.mT)
        if stiffness is not None and len(factor) == 1:
            stiff = float(stiffness)
            leading = leading_eigh(factor[0], lambda x: stiff * float(x[0]) < _NEGLIGIBLE)
            if leading is not None:
                values, vectors = leading
                return cls(values.clamp_min(0.0)[None], vectors[None])
        values, vectors = eigh(factor)
        return cls(values.clamp_min(0.0), vectors)

    @property
    def top(self) -> Tensor:
        """Largest eigenvalue of each matrix."""
        return self.values.amax(-1)

    def leading(self, stiffness: Tensor) -> "Spectrum":
        """Return the pairs whose eigenvalue times ``stiffness`` matters in any group."""
        if self.vectors is None:
            return self
        count = int((stiffness[..., None] * self.values > _NEGLIGIBLE).sum(-1).max())
        first = self.values.shape[-1] - count
        return Spectrum(
            self.values[..., first:].contiguous(), self.vectors[..., first:].contiguous()
        )


class Rotated(Operator):
    """``K = G (x) A`` for each group, along the eigenvectors of both."""

    def __init__(self, A: Spectrum, G: Spectrum) -> None:
        self._A, self._G = A, G

    def narrowed(self, c: float) -> "Rotated":
        """Leave directions alone where ``c`` times the eigenvalue is negligible.

        They would cost rotations, and steps are stable there without.
        """
        return Rotated(self._A.leading(c * self._G.top), self._G.leading(c * self._A.top))

    def inverse(self, X: Tensor, c: float) -> Tensor:
        return self._power(X, c, -1.0)

    def root(self, X: Tensor, c: float) -> Tensor:
        return self._power(X, c, -0.5)

    root_transposed = root

    def _power(self, X: Tensor, c: float, power: float) -> Tensor:
        Q, U = self._G.vectors, self._A.vectors
        if not self._A.values.numel() or not self._G.values.numel():
            return X
        inside = X if Q is None else Q.mT @ X
        inside = inside if U is None else inside @ U
        stiff = c * self._G.values[..., :, None] * self._A.values[..., None, :]
        inside = inside * ((1.0 + stiff) ** power - 1.0)
        inside = inside if U is None else inside @ U.mT
        return X + (inside if Q is None else Q @ inside)


class ByEntry(Operator):
    """A diagonal ``K``, plus the outer square of a vector in each row where there is one."""

    def __init__(self, diagonal: Tensor, vectors: Tensor | None) -> None:
        self._diagonal, self._vectors = diagonal, vectors

    def inverse(self, X: Tensor, c: float) -> Tensor:
        return self.root(self.root_transposed(X, c), c)

    def root(self, X: Tensor, c: float) -> Tensor:
        return self._outside(c) * self._along_vectors(X, c)

    def root_transposed(self, X: Tensor, c: float) -> Tensor:
        return self._along_vectors(self._outside(c) * X, c)

    def _outside(self, c: float) -> Tensor:
        return (1.0 + c * self._diagonal).rsqrt()

    def _along_vectors(self, X: Tensor, c: float) -> Tensor:
        """Multiply by ``(I + c u u^T)^-1/2`` in each row, ``u`` the vector seen from inside."""
        if self._vectors is None:
            return X
        u = self._outside(c) * self._vectors
        square = u.square().sum(-1, keepdim=True)
        # (1 + s)^-1/2 - 1 over s, also where s is 0.
        root = (1.0 + c * square).sqrt()
        return X - c / (root * (1.0 + root)) * u * (u * X).sum(-1, keepdim=True)


class WithRows(Operator):
    """A ``K`` and ``Q^T M Q`` beside it, where ``Q`` takes one number from each row.

    Approximately: the inverse is that of the second around that of the first.

    Parameters
    ----------
    inner : Operator
    rows : Tensor of shape (groups, rows, columns)
        Those of ``Q``, of length 1.
    spectrum : Spectrum
        Of ``M``.
    """

    def __init__(self, inner: Operator, rows: Tensor, spectrum: Spectrum) -> None:
        self._inner, self._rows, self._spectrum = inner, rows, spectrum

    @classmethod
    def of(cls, inner: Operator, rows: Tensor, M: Tensor) -> Self:
        """Make one of any rows.

        Parameters
        ----------
        inner : Operator
        rows : Tensor of shape (groups, rows, columns)
            Those of ``Q``.
        M : Tensor of shape (groups, rows, rows), or (groups, rows) for a diagonal one
        """
        sizes = torch.linalg.vector_norm(rows, dim=-1)
        outer = sizes.square() if M.dim() == 2 else sizes[..., :, None] * sizes[..., None, :]
        unit = rows / sizes.clamp_min(torch.finfo(rows.dtype).tiny)[..., None]
        return cls(inner, unit, Spectrum.of(M * outer))

    def narrowed(self, c: float) -> Self:
        return type(self)(self._inner.narrowed(c), self._rows, self._spectrum)

    def inverse(self, X: Tensor, c: float) -> Tensor:
        return self._outside(self._inner.inverse(self._outside(X, c), c), c)

    def root(self, X: Tensor, c: float) -> Tensor:
        return self._outside(self._inner.root(X, c), c)

    def root_transposed(self, X: Tensor, c: float) -> Tensor:
        return self._inner.root_transposed(self._outside(X, c), c)

    def _outside(self, X: Tensor, c: float) -> Tensor:
        """Multiply by ``(I + c Q^T M Q)^-1/2``."""
        along = (self._rows * X).sum(-1, keepdim=True)
        V = self._spectrum.vectors
        inside = along if V is None else V.mT @ along
        inside = inside * ((1.0 + c * self._spectrum.values[..., None]).rsqrt() - 1.0)
        return X + self._rows * (inside if V is None else V @ inside)
