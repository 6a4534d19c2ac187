"""Curvature blocks that are diagonal in an eigenbasis of Kronecker form."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ekfac_rs._checks import require_count, require_finite, require_like, require_nonnegative
from ekfac_rs.curvature.block import (
    Block,
    dense_logdet,
    more_outputs,
    top_eigenvalue_by_products,
)
from ekfac_rs.curvature.columnwise import ColumnwiseSum
from ekfac_rs.curvature.conjugate import conjugate_gradients
from ekfac_rs.curvature.kronecker import KroneckerSum, eigh
from ekfac_rs.errors import (
    DtypeError,
    NumericalError,
    OptionError,
    ShapeError,
)


class EigenbasisTerm(NamedTuple):
    """One operator ``V -> Q (L * (Q^T V U)) U^T``, ``*`` entrywise.

    Attributes
    ----------
    U : Tensor of shape (K, K) or (groups, K, K), optional
        Orthonormal columns. None for the identity, as Embeddings have it.
    Q : Tensor of shape (D, D) or (groups, D / groups, D / groups)
        Orthonormal columns.
    values : Tensor of shape (D, K)
        The eigenvalues ``L``.
    """

    U: Tensor | None
    Q: Tensor
    values: Tensor

    @property
    def groups(self) -> int:
        return math.prod(self.Q.shape[:-2])

    def by_group(self, V: Tensor) -> Tensor:
        """View ``[..., D, K]`` as ``[..., groups, D / groups, K]``."""
        return V.reshape(*V.shape[:-2], self.groups, -1, V.shape[-1])

    def inside(self, V: Tensor) -> Tensor:
        """``Q^T V U``."""
        inside = self.Q.mT @ self.by_group(V)
        inside = inside if self.U is None else inside @ self.U
        return inside.reshape(V.shape)

    def outside(self, V: Tensor) -> Tensor:
        """``Q V U^T``."""
        outside = self.Q @ self.by_group(V)
        outside = outside if self.U is None else outside @ self.U.mT
        return outside.reshape(V.shape)

    def product(self, V: Tensor) -> Tensor:
        return self.outside(self.values * self.inside(V))

    def seen_from(self, other: "EigenbasisTerm") -> Tensor:
        """Diagonal, shape (D, K), of this operator in the eigenbasis of another, in float64."""
        values = (self.Q.mT @ other.Q).double().square().mT @ self.by_group(self.values.double())
        if self.U is not None and other.U is not None:
            values = values @ (self.U.mT @ other.U).double().square()
        return values.reshape(self.values.shape)


class EigenbasisSum(Block):
    """The operator ``H V = sum_t Q_t (L_t * (Q_t^T V U_t)) U_t^T``.

    Each term is diagonal in a basis of products of one vector for each side, as a Kronecker
    product is; its ``D K`` eigenvalues need not be products. What `estimate_curvature` makes with
    ``correction="eigenvalues"`` has one term; sums over tasks have one for each.

    Parameters
    ----------
    terms : sequence of (U, Q, values)
        See `EigenbasisTerm`; float32 or float64, all on one device. Borrowed, not copied: do not
        modify them. That ``U`` and ``Q`` are orthonormal is not checked.

    Raises
    ------
    ShapeError, DtypeError, DeviceError, NonFiniteError, OptionError
        A part does not fit the first term's; there is no term.

    References
    ----------
    George, Laurent, Bouthillier, Ballas, Vincent, "Fast approximate natural gradient descent in a
    Kronecker-factored eigenbasis", NeurIPS 2018.

    Examples
    --------
    >>> import torch
    >>> from ekfac_rs import EigenbasisSum
    >>> values = torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0]])
    >>> block = EigenbasisSum([(torch.eye(3), torch.eye(2), values)])
    >>> block.shape, block.trace(), block.top_eigenvalue()
    ((2, 3), 7.0, 3.0)
    >>> block.solve(torch.ones(2, 3), damping=1.0)[0]
    tensor([0.5000, 0.3333, 0.2500])
    """

    def __init__(self, terms: Sequence[tuple[Tensor | None, Tensor, Tensor]]) -> None:
        self.terms = tuple(EigenbasisTerm(*term) for term in terms)
        if not self.terms:
            raise OptionError("terms: expected at least one (U, Q, values), got none")
        first = self.terms[0]
        if first.values.dtype not in (torch.float32, torch.float64):
            raise DtypeError(f"terms: expected dtype float32 or float64, got {first.values.dtype}")
        if first.values.dim() != 2 or first.Q.dim() not in (2, 3) or not first.values.numel():
            raise ShapeError(
                "terms: expected Q (D, D) or (groups, D / groups, D / groups) and values (D, K), "
                f"none empty, got {tuple(first.Q.shape)} and {tuple(first.values.shape)}"
            )
        D, K = first.values.shape
        stack = tuple(first.Q.shape[:-2])
        rows = D // first.groups
        for t, (U, Q, values) in enumerate(self.terms):
            require_like(f"terms[{t}] values", values, (D, K), first.values)
            require_like(f"terms[{t}] Q", Q, (*stack, rows, rows), first.values)
            require_finite(f"terms[{t}] values", values)
            require_finite(f"terms[{t}] Q", Q)
            if (U is None) != (first.U is None):
                raise ShapeError(f"terms[{t}] U: expected one in every term or in none")
            if U is not None:
                require_like(f"terms[{t}] U", U, (*stack, K, K), first.values)
                require_finite(f"terms[{t}] U", U)

    @classmethod
    def near(cls, block: KroneckerSum | ColumnwiseSum) -> "EigenbasisSum":
        """Nearest operator in Frobenius norm that is diagonal in the summed factors' eigenbasis.

        Factors are summed with the trace of the other one as weight: as they are in the block's
        partial traces. A single Kronecker product stays what it is.
        """
        if isinstance(block, ColumnwiseSum):
            U, Q = None, _eigenvectors([A.sum() * G for A, G in block.terms])
        else:
            U = _eigenvectors([_trace(G) * A for A, G in block.terms])
            Q = _eigenvectors([_trace(A) * G for A, G in block.terms])
        products = [
            _diagonal_in(Q, G)[..., :, None] * _diagonal_in(U, A)[..., None, :]
            for A, G in block.terms
        ]
        values = torch.stack(products).sum(0).reshape(block.shape)
        return cls([(U, Q, values.clamp_min(0.0))])

    def with_values(self, values: Tensor) -> "EigenbasisSum":
        """Return the operator of one term with other eigenvalues."""
        ((U, Q, _),) = self.terms
        return EigenbasisSum([(U, Q, values)])

    def __repr__(self) -> str:
        groups = f", groups={self.groups}" if self.groups > 1 else ""
        return (
            f"EigenbasisSum(shape={self.shape}, terms={len(self.terms)}{groups}, "
            f"dtype={self.dtype})"
        )

    @property
    def shape(self) -> tuple[int, int]:
        """Shape ``(D, K)`` of the matrices the block acts on."""
        D, K = self.terms[0].values.shape
        return D, K

    @property
    def groups(self) -> int:
        """Number of blocks of rows with bases of their own; 1 without groups."""
        return self.terms[0].groups

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of bases and eigenvalues."""
        return self.terms[0].values.dtype

    @property
    def device(self) -> torch.device:
        """Device of bases and eigenvalues."""
        return self.terms[0].values.device

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "EigenbasisSum":
        """Return the block on another device or in another dtype."""
        return EigenbasisSum(
            [
                (
                    None if U is None else U.to(device=device, dtype=dtype),
                    Q.to(device=device, dtype=dtype),
                    values.to(device=device, dtype=dtype),
                )
                for U, Q, values in self.terms
            ]
        )

    def tensors(self) -> dict[str, Tensor]:
        named: dict[str, Tensor] = {}
        for t, (U, Q, values) in enumerate(self.terms):
            named[f"{t}.Q"] = Q
            if U is None:
                named[f"{t}.values.by_column"] = values
            else:
                named |= {f"{t}.U": U, f"{t}.values": values}
        return named

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], terms: int) -> "EigenbasisSum":
        """Rebuild a block of so many terms from what `tensors` gave."""
        if "0.values.by_column" in tensors:
            return cls(
                [(None, tensors[f"{t}.Q"], tensors[f"{t}.values.by_column"]) for t in range(terms)]
            )
        return cls(
            [(tensors[f"{t}.U"], tensors[f"{t}.Q"], tensors[f"{t}.values"]) for t in range(terms)]
        )

    # --- products and sums ---

    def product(self, V: Tensor) -> Tensor:
        """Apply the block: ``H V``, for ``V`` of shape (D, K) or (S, D, K).

        Raises
        ------
        ShapeError, DtypeError, DeviceError
            ``V`` does not fit the block.
        """
        V = self._checked(V)
        first, *others = self.terms
        out = first.product(V)
        for term in others:
            out += term.product(V)
        return out

    def quadratic(self, V: Tensor) -> float:
        """Quadratic form ``<V, H V>`` (no factor 1/2), summed over a batch if there is one."""
        V = self._checked(V)
        return sum(
            float((term.values * term.inside(V).square()).sum(dtype=torch.float64))
            for term in self.terms
        )

    def trace(self) -> float:
        """Trace of the block."""
        return sum(float(term.values.sum(dtype=torch.float64)) for term in self.terms)

    def inner(self, other: "EigenbasisSum") -> float:
        """Frobenius inner product ``tr(H^T H')`` with another block of the same shape."""
        self._require_fitting(other)
        return sum(
            float((theirs.values.double() * mine.seen_from(theirs)).sum())
            for mine in self.terms
            for theirs in other.terms
        )

    def norm(self) -> float:
        """Frobenius norm of the block."""
        return math.sqrt(max(self.inner(self), 0.0))

    def diagonal(self) -> Tensor:
        """Diagonal of the block as a matrix of shape (D, K)."""
        parts = []
        for term in self.terms:
            part = term.Q.square() @ term.by_group(term.values)
            part = part if term.U is None else part @ term.U.square().mT
            parts.append(part.reshape(self.shape))
        return torch.stack(parts).sum(0)

    def dense(self) -> Tensor:
        """Return the block as a matrix of shape (D * K, D * K): for small sizes and tests."""
        D, K = self.shape
        units = torch.eye(D * K, dtype=self.dtype, device=self.device).reshape(-1, D, K)
        return self.product(units).flatten(1)

    def __add__(self, other: "EigenbasisSum") -> "EigenbasisSum":
        """Sum of two blocks: the terms of both, exactly."""
        if not isinstance(other, EigenbasisSum):
            return NotImplemented
        self._require_fitting(other)
        return EigenbasisSum([*self.terms, *other.terms])

    def __mul__(self, factor: float) -> "EigenbasisSum":
        """Multiply the block by a number."""
        if not isinstance(factor, int | float):
            return NotImplemented
        return EigenbasisSum([(U, Q, values * factor) for U, Q, values in self.terms])

    __rmul__ = __mul__

    def mixed(
        self,
        other: "EigenbasisSum",
        share: float,
        examples: Sequence[int],
        others: Sequence[int],
    ) -> "EigenbasisSum":
        return self * share + other * (1.0 - share)

    def embedded(self, outputs: int) -> "EigenbasisSum":
        rows = more_outputs(self, outputs, self.groups)
        terms = []
        for U, Q, values in self.terms:
            # Orthonormal columns below, too; their eigenvalues are zero.
            wider = F.pad(Q, (0, rows, 0, rows))
            wider.diagonal(dim1=-2, dim2=-1)[..., Q.shape[-1] :] = 1.0
            terms.append((U, wider, F.pad(values, (0, 0, 0, rows))))
        return EigenbasisSum(terms)

    # --- spectrum ---

    def top_eigenvalue(self, damping: float = 0.0) -> float:
        """Largest eigenvalue of ``H + damping I``; of several terms to a relative 1e-4."""
        require_nonnegative("damping", damping)
        if len(self.terms) == 1:
            return float(self.terms[0].values.max()) + damping
        # Largest where the diagonal in one basis is: not orthogonal to the top eigenvector.
        basis = self._largest()
        values = self._in_basis_of(basis).terms[0].values
        return top_eigenvalue_by_products(self, basis.outside(values.sqrt())) + damping

    def above(self) -> KroneckerSum | ColumnwiseSum:
        """Return Kronecker products above the terms: ``G (x) A - term`` is positive semi-definite.

        In its eigenbasis a term's are ``r_i c_j >= L_ij``, none of which could be less while the
        others stay.
        """
        factors = []
        for U, Q, values in self.terms:
            L = self.terms[0].by_group(values.clamp_min(0.0))
            rows = _ratio(L, L.sum(-2, keepdim=True)).amax(-1)
            columns = _ratio(L, rows[..., None]).amax(-2)
            G = (Q * rows.reshape(*Q.shape[:-2], 1, -1)) @ Q.mT
            if U is None:
                factors.append((columns.reshape(-1), G))
            else:
                factors.append(((U * columns.reshape(*U.shape[:-2], 1, -1)) @ U.mT, G))
        return ColumnwiseSum(factors) if self.terms[0].U is None else KroneckerSum(factors)

    # --- inverses ---

    def solve(
        self,
        V: Tensor,
        damping: float = 0.0,
        *,
        tolerance: float | None = None,
        max_iterations: int = 1000,
    ) -> Tensor:
        """Solve ``(H + damping I) X = V``.

        In closed form for one term; by conjugate gradients, preconditioned in the eigenbasis of
        the largest term, for several.

        Parameters
        ----------
        V : Tensor of shape (D, K) or (S, D, K)
        damping : float
        tolerance : float, optional
            Relative residual at which conjugate gradients stop. Default 1e-6 in float32, 1e-12
            in float64.
        max_iterations : int
            Of conjugate gradients.

        Returns
        -------
        Tensor of the shape of ``V``

        Raises
        ------
        NumericalError
            The damped block is singular, or conjugate gradients did not reach the tolerance.
        """
        require_nonnegative("damping", damping)
        require_count("max_iterations", max_iterations)
        V = self._checked(V)
        if len(self.terms) == 1:
            term = self.terms[0]
            return term.outside(term.inside(V) / self._damped_values(damping))
        preconditioner = self.in_one_basis()
        return conjugate_gradients(
            self.product,
            lambda residual: preconditioner.solve(residual, damping),
            V,
            damping,
            tolerance,
            max_iterations,
        )

    def logdet(self, damping: float = 0.0) -> float:
        """Log-determinant of ``H + damping I``.

        In closed form for one term; for several by a dense Cholesky factorisation, of at most
        4,096 rows.

        Raises
        ------
        NumericalError
            The damped block is singular.
        OptionError
            Several terms, and too large for the dense factorisation.
        """
        require_nonnegative("damping", damping)
        if len(self.terms) == 1:
            return float(self._damped_values(damping).double().log().sum())
        return dense_logdet(self, damping, "one term")

    def sample(
        self, n: int, damping: float = 0.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw from the Gaussian with precision ``H + damping I`` (a Laplace approximation).

        For several terms ``y ~ N(0, H + damping I)`` is drawn and the system solved for it, which
        has the same distribution.

        Parameters
        ----------
        n : int
        damping : float
        generator : torch.Generator, optional
            Default: torch's global one.

        Returns
        -------
        Tensor of shape (n, D, K)
        """
        require_count("n", n)
        require_nonnegative("damping", damping)

        def noise() -> Tensor:
            return torch.randn(
                (n, *self.shape), dtype=self.dtype, device=self.device, generator=generator
            )

        if len(self.terms) == 1:
            return self.terms[0].outside(noise() / self._damped_values(damping).sqrt())
        drawn = damping**0.5 * noise()
        for term in self.terms:
            drawn += term.outside(term.values.clamp_min(0.0).sqrt() * noise())
        return self.solve(drawn, damping)

    def _damped_values(self, damping: float) -> Tensor:
        values = self.terms[0].values + damping
        rounding = max(self.shape) * torch.finfo(self.dtype).eps
        if float(values.min()) <= rounding * float(values.max()):
            raise NumericalError(
                f"expected a positive definite block, got a singular one with damping {damping}"
            )
        return values

    def in_one_basis(self) -> "EigenbasisSum":
        """Nearest operator that is diagonal in the eigenbasis of the largest term; one term."""
        return self if len(self.terms) == 1 else self._in_basis_of(self._largest())

    def _largest(self) -> EigenbasisTerm:
        return max(self.terms, key=lambda term: float(term.values.sum()))

    def _in_basis_of(self, basis: EigenbasisTerm) -> "EigenbasisSum":
        """Return what is diagonal in the eigenbasis of a term, as a block of one term."""
        values = torch.stack([term.seen_from(basis) for term in self.terms]).sum(0)
        return EigenbasisSum([(basis.U, basis.Q, values.to(self.dtype))])

    def _fit(self) -> tuple[object, ...]:
        first = self.terms[0]
        return *super()._fit(), first.Q.shape, first.U is None


def _trace(factor: Tensor) -> Tensor:
    """Trace of a matrix, or of each of a stack, with axes to multiply others with."""
    return factor.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]


def _eigenvectors(factors: Sequence[Tensor]) -> Tensor:
    """Eigenvectors, in columns, of a sum of factors."""
    _, vectors = eigh(torch.stack(list(factors)).sum(0))
    return vectors


def _diagonal_in(vectors: Tensor | None, factor: Tensor) -> Tensor:
    """Diagonal of ``vectors^T factor vectors``; without vectors the factor is a diagonal."""
    return factor if vectors is None else (vectors * (factor @ vectors)).sum(-2)


def _ratio(values: Tensor, by: Tensor) -> Tensor:
    """``values / by``, zero where ``by`` is: there all values are zero, too."""
    return torch.where(by > 0.0, values / torch.where(by > 0.0, by, 1.0), 0.0)
