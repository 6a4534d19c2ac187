"""Curvature blocks that treat every column for itself, as Embeddings have them."""

import math
from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from ekfac_rs._checks import require_count, require_finite, require_like, require_nonnegative
from ekfac_rs.curvature.block import Block, Terms, mixed_terms, more_outputs
from ekfac_rs.curvature.kronecker import KroneckerSum, eigh
from ekfac_rs.errors import (
    DtypeError,
    NumericalError,
    OptionError,
    ShapeError,
)

# Of dense column operators held at a time: 128 MB.
_ELEMENTS = 1 << 24


class ColumnwiseSum(Block):
    """The operator ``H V = sum_k G_k V diag(a_k)``: column v of ``V`` meets ``sum_k a_kv G_k``.

    A `KroneckerSum` of which only the diagonals of the input factors are kept. An Embedding has
    such a block: its inputs are one-hot, a column is a token, and there are too many of them for a
    matrix. Every stratum is that of a Linear on one-hot inputs, between equal tokens alone:
    products between the gradients of different tokens are neglected. "kfac-expand" has none of
    these; in the other approximations they are not zero (the covariance of a one-hot unit is
    ``diag(p) - p p^T``).

    Parameters
    ----------
    terms : sequence of (a, G)
        Vectors ``a`` of shape ``(K,)``, none negative, and symmetric positive semi-definite
        matrices ``G`` of shape ``(D, D)``. Float32 or float64, all on one device. Borrowed, not
        copied: do not modify them.

    Raises
    ------
    ShapeError, DtypeError, DeviceError, NonFiniteError
        A factor does not fit the first term's.

    Examples
    --------
    >>> import torch
    >>> from ekfac_rs import ColumnwiseSum
    >>> block = ColumnwiseSum([(torch.tensor([1.0, 0.0, 3.0]), 2.0 * torch.eye(2))])
    >>> block.shape, block.trace()
    ((2, 3), 16.0)
    >>> block.product(torch.ones(2, 3))[0]
    tensor([2., 0., 6.])
    """

    def __init__(self, terms: Terms) -> None:
        self.terms = tuple((a, G) for a, G in terms)
        if not self.terms:
            raise OptionError("terms: expected at least one pair (a, G), got none")
        reference, first_G = self.terms[0]
        if reference.dtype not in (torch.float32, torch.float64):
            raise DtypeError(f"terms: expected dtype float32 or float64, got {reference.dtype}")
        if reference.dim() != 1 or first_G.dim() != 2 or not reference.numel():
            raise ShapeError(
                "terms: expected factors (K,) and (D, D), none empty, got "
                f"{tuple(reference.shape)} and {tuple(first_G.shape)}"
            )
        K, D = len(reference), len(first_G)
        for k, (a, G) in enumerate(self.terms):
            require_like(f"terms[{k}] factor a", a, (K,), reference)
            require_like(f"terms[{k}] factor G", G, (D, D), reference)
            require_finite(f"terms[{k}] factor a", a)
            require_finite(f"terms[{k}] factor G", G)

    def __repr__(self) -> str:
        return f"ColumnwiseSum(shape={self.shape}, terms={len(self.terms)}, dtype={self.dtype})"

    @property
    def shape(self) -> tuple[int, int]:
        """Shape ``(D, K)`` of the matrices the block acts on."""
        a, G = self.terms[0]
        return len(G), len(a)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the factors."""
        return self.terms[0][0].dtype

    @property
    def device(self) -> torch.device:
        """Device of the factors."""
        return self.terms[0][0].device

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "ColumnwiseSum":
        """Return the block on another device or in another dtype."""
        return ColumnwiseSum(
            [
                (a.to(device=device, dtype=dtype), G.to(device=device, dtype=dtype))
                for a, G in self.terms
            ]
        )

    def embedded(self, outputs: int) -> "ColumnwiseSum":
        rows = more_outputs(self, outputs)
        return ColumnwiseSum([(a, F.pad(G, (0, rows, 0, rows))) for a, G in self.terms])

    def tensors(self) -> dict[str, Tensor]:
        named: dict[str, Tensor] = {}
        for k, (a, G) in enumerate(self.terms):
            named |= {f"{k}.A.diagonal": a, f"{k}.G": G}
        return named

    # --- products and sums ---

    def product(self, V: Tensor) -> Tensor:
        """Apply the block: ``H V``, for ``V`` of shape (D, K) or (S, D, K).

        Raises
        ------
        ShapeError, DtypeError, DeviceError
            ``V`` does not fit the block.
        """
        V = self._checked(V)
        columns = self._columns_seen
        if columns is None:
            return _product(self.terms, V)
        out = torch.zeros_like(V, memory_format=torch.contiguous_format)
        out[..., columns] = _product([(a[columns], G) for a, G in self.terms], V[..., columns])
        return out

    def quadratic(self, V: Tensor) -> float:
        """Quadratic form ``<V, H V>`` (no factor 1/2), summed over a batch if there is one."""
        return float((self._checked(V) * self.product(V)).sum(dtype=torch.float64))

    def trace(self) -> float:
        """Trace of the block."""
        return sum(float(a.double().sum() * G.double().trace()) for a, G in self.terms)

    def inner(self, other: "ColumnwiseSum") -> float:
        """Frobenius inner product ``tr(H^T H')`` with another block of the same shape."""
        self._require_fitting(other)
        return sum(
            float((a.double() @ b.double()) * (G.double() * H.double()).sum())
            for a, G in self.terms
            for b, H in other.terms
        )

    def norm(self) -> float:
        """Frobenius norm of the block."""
        return math.sqrt(max(self.inner(self), 0.0))

    def diagonal(self) -> Tensor:
        """Diagonal of the block as a matrix of shape (D, K)."""
        return torch.stack([torch.outer(G.diagonal(), a) for a, G in self.terms]).sum(0)

    def dense(self) -> Tensor:
        """Return the block as a matrix of shape (D * K, D * K): for small sizes and tests."""
        return torch.stack([torch.kron(G, torch.diag(a)) for a, G in self.terms]).sum(0)

    def __add__(self, other: "ColumnwiseSum") -> "ColumnwiseSum":
        """Sum of two blocks: the terms of both, exactly."""
        if not isinstance(other, ColumnwiseSum):
            return NotImplemented
        self._require_fitting(other)
        return ColumnwiseSum([*self.terms, *other.terms])

    def __mul__(self, factor: float) -> "ColumnwiseSum":
        """Multiply the block by a number."""
        if not isinstance(factor, int | float):
            return NotImplemented
        return ColumnwiseSum([(a, G * factor) for a, G in self.terms])

    __rmul__ = __mul__

    def mixed(
        self,
        other: "ColumnwiseSum",
        share: float,
        examples: Sequence[int],
        others: Sequence[int],
    ) -> "ColumnwiseSum":
        return ColumnwiseSum(mixed_terms(self.terms, other.terms, share, examples, others))

    def compress(self, terms: int) -> "ColumnwiseSum":
        """Nearest sum of ``terms`` such products in Frobenius norm.

        The first of them is positive semi-definite; further ones, and hence the sum, need not be.

        Parameters
        ----------
        terms : int
            At least 1; with as many as the block has, the block itself is returned.
        """
        require_count("terms", terms)
        if terms >= len(self.terms):
            return self
        D, _ = self.shape
        basis_a, inside_a = torch.linalg.qr(self._weights)
        basis_G, inside_G = torch.linalg.qr(self._matrices.flatten(1).T)
        left, sizes, right = torch.linalg.svd(inside_a @ inside_G.T)
        nearest = []
        for i in range(min(terms, len(sizes))):
            a, G = basis_a @ left[:, i], (basis_G @ right[i]).reshape(D, D) * sizes[i]
            # Both signs make the same product; the first has no negative entry then.
            sign = -1.0 if a.sum() < 0.0 else 1.0
            nearest.append(((sign * a).to(self.dtype), (sign * (G + G.T) / 2).to(self.dtype)))
        return ColumnwiseSum(nearest)

    # --- spectrum ---

    def eigh(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Eigendecomposition of every term's factors.

        Returns
        -------
        list of (a, values_G, vectors_G)
            The factor ``a`` itself, whose entries are the eigenvalues on the input side, in the
            order of the columns; ascending eigenvalues ``(D,)`` and eigenvectors in columns.
        """
        return [(a, *eigh(G)) for a, G in self.terms]

    def top_eigenvalue(self, damping: float = 0.0) -> float:
        """Largest eigenvalue of ``H + damping I``, to a relative 1e-4.

        Columns are looked at in the order of an upper bound, until none can exceed the largest.
        """
        require_nonnegative("damping", damping)
        columns, _, _ = self._distinct_columns
        spectra = torch.linalg.eigvalsh(self._matrices)
        bounds = torch.maximum(columns * spectra[:, -1], columns * spectra[:, 0]).sum(1)
        bounds, order = bounds.sort(descending=True)
        top = -math.inf
        for start in range(0, len(order), _CANDIDATES):
            if float(bounds[start]) <= top + 1e-4 * abs(top):
                break
            candidates = self._operators(columns[order[start : start + _CANDIDATES]], 0.0)
            top = max(top, float(torch.linalg.eigvalsh(candidates)[:, -1].max()))
        return top + damping

    # --- inverses ---

    def damped(self, damping: float) -> "ColumnwiseSum":
        """Add factored damping to the first term.

        Its factors become ``a + pi sqrt(damping)`` and ``G + sqrt(damping) / pi I`` with
        ``pi**2 = mean(a) / (tr G / D)`` (Martens & Grosse 2015, section 6.3).
        """
        require_nonnegative("damping", damping)
        a, G = self.terms[0]
        mean_a, mean_G = float(a.double().mean()), float(G.double().diagonal().mean())
        pi = math.sqrt(mean_a / mean_G) if mean_a > 0.0 and mean_G > 0.0 else 1.0
        eye = torch.eye(len(G), dtype=G.dtype, device=G.device)
        first = a + pi * damping**0.5, G + damping**0.5 / pi * eye
        return ColumnwiseSum([first, *self.terms[1:]])

    def solve(self, V: Tensor, damping: float = 0.0) -> Tensor:
        """Solve ``(H + damping I) X = V``, exactly.

        By the eigendecomposition of ``G`` for one term; otherwise by a factorisation of a matrix
        (D, D) for each distinct column of input factors (tokens seen equally often share one).

        Parameters
        ----------
        V : Tensor of shape (D, K) or (S, D, K)
        damping : float

        Returns
        -------
        Tensor of the shape of ``V``

        Raises
        ------
        NumericalError
            The damped block is singular, as without damping where a column was never seen.
        """
        require_nonnegative("damping", damping)
        double = self._checked(V).double()
        if len(self.terms) == 1:
            values, vectors = self._spectrum(damping)
            return (vectors @ ((vectors.mT @ double) / values)).to(self.dtype)
        out = torch.empty_like(double)
        for columns, root in self._roots(damping):
            out[..., columns] = torch.cholesky_solve(double[..., columns], root)
        return out.to(self.dtype)

    def logdet(self, damping: float = 0.0) -> float:
        """Log-determinant of ``H + damping I``; computed as `solve` does.

        Raises
        ------
        NumericalError
            The damped block is singular.
        """
        require_nonnegative("damping", damping)
        if len(self.terms) == 1:
            return float(self._spectrum(damping)[0].log().sum())
        return sum(
            2.0 * len(columns) * float(root.diagonal().log().sum())
            for columns, root in self._roots(damping)
        )

    def sample(
        self, n: int, damping: float = 0.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw from the Gaussian with precision ``H + damping I`` (a Laplace approximation).

        Parameters
        ----------
        n : int
        damping : float
        generator : torch.Generator, optional
            Default: torch's global one.

        Returns
        -------
        Tensor of shape (n, D, K)

        Raises
        ------
        NumericalError
            The damped block is singular.
        """
        require_count("n", n)
        require_nonnegative("damping", damping)
        noise = torch.randn(
            (n, *self.shape), dtype=self.dtype, device=self.device, generator=generator
        ).double()
        if len(self.terms) == 1:
            values, vectors = self._spectrum(damping)
            return (vectors @ (noise / values.sqrt())).to(self.dtype)
        for columns, root in self._roots(damping):
            noise[..., columns] = torch.linalg.solve_triangular(
                root.mT, noise[..., columns], upper=True
            )
        return noise.to(self.dtype)

    @cached_property
    def _columns_seen(self) -> Tensor | None:
        """Columns that some term weighs; None where these are more than half of all."""
        seen = torch.stack([a != 0.0 for a, _ in self.terms]).any(0).nonzero().flatten()
        return seen if 2 * len(seen) <= self.shape[1] else None

    @property
    def _weights(self) -> Tensor:
        """All factors ``a`` in float64, ``[K, terms]``."""
        return torch.stack([a for a, _ in self.terms], 1).double()

    @property
    def _matrices(self) -> Tensor:
        """All factors ``G`` in float64, ``[terms, D, D]``."""
        return torch.stack([G for _, G in self.terms]).double()

    @property
    def _distinct_columns(self) -> tuple[Tensor, Tensor, Tensor]:
        """Columns of input factors that differ, which each one is, and how often it occurs."""
        distinct, which, counts = torch.unique(
            self._weights, dim=0, return_inverse=True, return_counts=True
        )
        return distinct, which, counts

    def _operators(self, columns: Tensor, damping: float) -> Tensor:
        """Operators ``sum_k a_kv G_k + damping I`` of columns ``[n, terms]``, ``[n, D, D]``."""
        operators = torch.einsum("nk,kde->nde", columns, self._matrices)
        operators.diagonal(dim1=-2, dim2=-1).add_(damping)
        return operators

    def _spectrum(self, damping: float) -> tuple[Tensor, Tensor]:
        """Eigenvalues ``[D, K]`` of one damped term, and eigenvectors of its ``G``."""
        a, G = self.terms[0]
        values_G, vectors = torch.linalg.eigh(G.double())
        values = torch.outer(values_G, a.double()) + damping
        rounding = len(G) * torch.finfo(torch.float64).eps
        if bool((values.amin(0) <= rounding * values.amax(0)).any()):
            raise NumericalError(
                f"expected a positive definite block, got a singular one with damping {damping}"
            )
        return values, vectors

    def _roots(self, damping: float) -> Iterator[tuple[Tensor, Tensor]]:
        """Columns with one operator, and its Cholesky factor, one after another."""
        distinct, which, counts = self._distinct_columns
        members = torch.split(which.argsort(), counts.tolist())
        share = max(1, _ELEMENTS // self.shape[0] ** 2)
        for start in range(0, len(distinct), share):
            operators = self._operators(distinct[start : start + share], damping)
            roots, failed = torch.linalg.cholesky_ex(operators)
            if bool(failed.any()):
                raise NumericalError(
                    "expected a positive definite block, got a singular column with damping "
                    f"{damping}"
                )
            yield from zip(members[start : start + share], roots, strict=True)


# Columns whose top eigenvalues are computed at a time.
_CANDIDATES = 4


def _product(terms: Terms, V: Tensor) -> Tensor:
    (a, G), *others = terms
    out = G @ (V * a)
    for a, G in others:
        out += G @ (V * a)
    return out


def sum_of_terms(terms: Terms) -> KroneckerSum | ColumnwiseSum:
    """Return the block of these terms: an input factor of one axis is a diagonal one."""
    A, _ = terms[0]
    return ColumnwiseSum(terms) if A.dim() == 1 else KroneckerSum(terms)
