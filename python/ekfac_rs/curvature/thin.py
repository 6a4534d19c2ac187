"""Sums of many Kronecker products of low rank, and a few full ones beside them."""

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ekfac_rs import _core
from ekfac_rs._checks import require_count, require_finite, require_like, require_nonnegative
from ekfac_rs._tensors import borrow
from ekfac_rs.curvature.block import Block, dense_logdet, more_outputs, top_eigenvalue_by_products
from ekfac_rs.curvature.conjugate import conjugate_gradients
from ekfac_rs.curvature.eigenbasis import EigenbasisSum
from ekfac_rs.curvature.kronecker import KroneckerSum, eigh
from ekfac_rs.errors import IncompatibleError, OptionError, ShapeError


class ThinKroneckerSum(Block):
    """The operator ``H V = sum_t Q_t Q_t^T V R_t R_t^T + sum_k G_k V A_k``.

    A sum of Kronecker products of which most are given by thin roots: ``A_t = R_t R_t^T`` and
    ``G_t = Q_t Q_t^T``, in columns. With M columns in all roots ``R`` the product takes about
    ``4 D K M`` floating-point operations, three large matrix products however many terms there
    are; a dense term alone takes ``2 (D K^2 + D^2 K)``. It is what `compress_curvatures` makes of
    the terms of many tasks: the directions that matter, and one dense product for the rest.

    Parameters
    ----------
    terms : sequence of (R, Q)
        Roots of shapes ``(K, r_t)`` and ``(D, q_t)``, copied; any number of columns but none
        empty. May be empty.
    rest : KroneckerSum
        The dense terms, without groups. It has the dtype and device of all roots.
    remainders : int, optional
        How many of these, from the first, stand for what terms have lost: when the block is
        compressed again, more is added to them, and they are not taken apart. Default: all.

    Raises
    ------
    ShapeError, DtypeError, DeviceError, NonFiniteError, OptionError
        A root does not fit the rest; the rest has groups, or fewer terms than remainders.

    Examples
    --------
    >>> import torch
    >>> from ekfac_rs import KroneckerSum, ThinKroneckerSum
    >>> rest = KroneckerSum([(torch.eye(3), torch.eye(2))])
    >>> block = ThinKroneckerSum([(torch.tensor([[0.0], [2.0], [0.0]]), torch.eye(2))], rest)
    >>> block.shape, block.trace()
    ((2, 3), 14.0)
    >>> block.product(torch.ones(2, 3))[0]
    tensor([1., 5., 1.])
    """

    def __init__(
        self,
        terms: Sequence[tuple[Tensor, Tensor]],
        rest: KroneckerSum,
        remainders: int | None = None,
    ) -> None:
        if rest.groups > 1:
            raise OptionError(f"rest: expected a block without groups, got {rest!r}")
        rest = rest.group(0)
        self.remainders = len(rest.terms) if remainders is None else remainders
        if not 0 <= self.remainders <= len(rest.terms):
            raise OptionError(
                f"remainders: expected at most the {len(rest.terms)} terms of the rest, "
                f"got {remainders}"
            )
        D, K = rest.shape
        like = rest.terms[0][0]
        for t, (R, Q) in enumerate(terms):
            for name, root, rows in (("R", R, K), ("Q", Q, D)):
                place = f"terms[{t}] root {name}"
                if not isinstance(root, Tensor) or root.dim() != 2 or not root.numel():
                    got = tuple(root.shape) if isinstance(root, Tensor) else type(root).__name__
                    raise ShapeError(f"{place}: expected shape ({rows}, columns), got {got}")
                require_like(place, root, (rows, root.shape[1]), like)
                require_finite(place, root)
        self.rest = rest
        # Side by side: products are of all of them at once.
        self._R, self._columns_R = _side_by_side([R for R, _ in terms], like.new_empty(K, 0))
        self._Q, self._columns_Q = _side_by_side([Q for _, Q in terms], like.new_empty(D, 0))

    def __repr__(self) -> str:
        return (
            f"ThinKroneckerSum(shape={self.shape}, terms={len(self.terms)}, "
            f"columns={(self._R.shape[1], self._Q.shape[1])}, rest={len(self.rest.terms)}, "
            f"dtype={self.dtype})"
        )

    @property
    def terms(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """The roots ``(R, Q)`` of every thin term."""
        roots_R = torch.split(self._R, self._columns_R, 1)
        roots_Q = torch.split(self._Q, self._columns_Q, 1)
        return tuple(zip(roots_R, roots_Q, strict=True))

    def products(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the factors ``(A, G)`` of every term, those of the thin ones made one by one."""
        yield from self.rest.terms
        for R, Q in self.terms:
            yield R @ R.mT, Q @ Q.mT

    @property
    def shape(self) -> tuple[int, int]:
        """Shape ``(D, K)`` of the matrices the block acts on."""
        return self.rest.shape

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of roots and factors."""
        return self.rest.dtype

    @property
    def device(self) -> torch.device:
        """Device of roots and factors."""
        return self.rest.device

    @property
    def numel(self) -> int:
        """How many numbers the block holds."""
        factors = sum(factor.numel() for term in self.rest.terms for factor in term)
        return self._R.numel() + self._Q.numel() + factors

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "ThinKroneckerSum":
        """Return the block on another device or in another dtype."""
        terms = [
            (R.to(device=device, dtype=dtype), Q.to(device=device, dtype=dtype))
            for R, Q in self.terms
        ]
        return ThinKroneckerSum(terms, self.rest.to(device, dtype), self.remainders)

    def tensors(self) -> dict[str, Tensor]:
        named: dict[str, Tensor] = {}
        for k, (A, G) in enumerate(self.rest.terms):
            prefix = f"remainder.{k}" if k < self.remainders else f"rest.{k - self.remainders}"
            named |= {f"{prefix}.A": A, f"{prefix}.G": G}
        for t, (R, Q) in enumerate(self.terms):
            named |= {f"thin.{t}.R": R, f"thin.{t}.Q": Q}
        return named

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "ThinKroneckerSum":
        """Rebuild a block from what `tensors` gave."""

        def pairs(kind: str, first: str, second: str) -> list[tuple[Tensor, Tensor]]:
            keys = [key.split(".") for key in tensors]
            count = len({index for prefix, index, _ in keys if prefix == kind})
            return [
                (tensors[f"{kind}.{i}.{first}"], tensors[f"{kind}.{i}.{second}"])
                for i in range(count)
            ]

        remainders = pairs("remainder", "A", "G")
        rest = KroneckerSum([*remainders, *pairs("rest", "A", "G")])
        return cls(pairs("thin", "R", "Q"), rest, len(remainders))

    # --- products and sums ---

    def product(self, V: Tensor) -> Tensor:
        """Apply the block: ``H V``, for ``V`` of shape (D, K) or (S, D, K).

        Raises
        ------
        ShapeError, DtypeError, DeviceError
            ``V`` does not fit the block.
        """
        V = self._checked(V)
        out = self.rest.product(V)
        if not self.terms:
            return out
        D, K = self.shape
        if D > K:
            return out + self._thin(V.mT, self._Q, self._columns_Q, [R for R, _ in self.terms]).mT
        return out + self._thin(V, self._R, self._columns_R, [Q for _, Q in self.terms])

    @staticmethod
    def _thin(V: Tensor, roots: Tensor, columns: Sequence[int], others: Sequence[Tensor]) -> Tensor:
        """``sum_t P_t P_t^T V R_t R_t^T``, the longer roots ``R`` side by side."""
        inside = torch.split(V @ roots, list(columns), -1)
        moved = [root @ (root.mT @ part) for root, part in zip(others, inside, strict=True)]
        return torch.cat(moved, -1) @ roots.mT

    def quadratic(self, V: Tensor) -> float:
        """Quadratic form ``<V, H V>`` (no factor 1/2), summed over a batch if there is one."""
        V = self._checked(V)
        thin = sum(float((Q.mT @ V @ R).square().sum(dtype=torch.float64)) for R, Q in self.terms)
        return self.rest.quadratic(V) + thin

    def trace(self) -> float:
        """Trace of the block."""
        return self.rest.trace() + sum(_square(R) * _square(Q) for R, Q in self.terms)

    def inner(self, other: "ThinKroneckerSum") -> float:
        """Frobenius inner product ``tr(H^T H')`` with another block of the same shape."""
        self._require_fitting(other)
        thin = sum(
            _square(R.mT @ S) * _square(Q.mT @ P) for R, Q in self.terms for S, P in other.terms
        )
        mixed = sum(
            _seen_by(A, R) * _seen_by(G, Q)
            for mine, theirs in ((self, other), (other, self))
            for R, Q in mine.terms
            for A, G in theirs.rest.terms
        )
        return thin + mixed + self.rest.inner(other.rest)

    def norm(self) -> float:
        """Frobenius norm of the block."""
        return math.sqrt(max(self.inner(self), 0.0))

    def diagonal(self) -> Tensor:
        """Diagonal of the block as a matrix of shape (D, K)."""
        out = self.rest.diagonal()
        for R, Q in self.terms:
            out += torch.outer(Q.square().sum(1), R.square().sum(1))
        return out

    def dense(self) -> Tensor:
        """Return the block as a matrix of shape (D * K, D * K): for small sizes and tests."""
        out = self.rest.dense()
        for R, Q in self.terms:
            root = torch.kron(Q, R)
            out += root @ root.mT
        return out

    def __add__(self, other: "ThinKroneckerSum | KroneckerSum") -> "ThinKroneckerSum":
        """Sum of two blocks, exactly; dense terms go to the end of the rest."""
        if isinstance(other, KroneckerSum):
            return ThinKroneckerSum(self.terms, self.rest + other, self.remainders)
        if not isinstance(other, ThinKroneckerSum):
            return NotImplemented
        self._require_fitting(other)
        terms = [*self.terms, *other.terms]
        return ThinKroneckerSum(terms, self.rest + other.rest, self.remainders)

    __radd__ = __add__

    def __mul__(self, factor: float) -> "ThinKroneckerSum":
        """Multiply the block by a number that is not negative."""
        if not isinstance(factor, int | float):
            return NotImplemented
        require_nonnegative("factor", factor)
        terms = [(R, Q * factor**0.5) for R, Q in self.terms]
        return ThinKroneckerSum(terms, self.rest * factor, self.remainders)

    __rmul__ = __mul__

    def mixed(
        self,
        other: "ThinKroneckerSum",
        share: float,
        examples: Sequence[int],
        others: Sequence[int],
    ) -> "ThinKroneckerSum":
        raise IncompatibleError(
            f"expected blocks of one pass, whose strata can be told apart, got {self!r}"
        )

    def embedded(self, outputs: int) -> "ThinKroneckerSum":
        rows = more_outputs(self, outputs)
        terms = [(R, F.pad(Q, (0, 0, 0, rows))) for R, Q in self.terms]
        return ThinKroneckerSum(terms, self.rest.embedded(outputs), self.remainders)

    # --- spectrum ---

    def top_eigenvalue(self, damping: float = 0.0) -> float:
        """Largest eigenvalue of ``H + damping I``, to a relative 1e-4."""
        require_nonnegative("damping", damping)
        generator = torch.Generator("cpu").manual_seed(0)
        start = torch.randn(self.shape, generator=generator, dtype=torch.float64, device="cpu")
        # Once multiplied, most of it is along the largest eigenvectors.
        start = self.product(start.to(self.device, self.dtype))
        return top_eigenvalue_by_products(self, start) + damping

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

        By conjugate gradients, preconditioned in the eigenbasis of the summed factors.

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
        near = self.near()
        return conjugate_gradients(
            self.product,
            lambda residual: near.solve(residual, damping),
            V,
            damping,
            tolerance,
            max_iterations,
        )

    def logdet(self, damping: float = 0.0) -> float:
        """Log-determinant of ``H + damping I``, by a dense Cholesky factorisation.

        Raises
        ------
        NumericalError
            The damped block is singular.
        OptionError
            More than 4,096 rows.
        """
        require_nonnegative("damping", damping)
        return dense_logdet(self, damping, "a dense block")

    def sample(
        self, n: int, damping: float = 0.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw from the Gaussian with precision ``H + damping I`` (a Laplace approximation).

        ``y ~ N(0, H + damping I)`` is drawn and the system solved for it, which has the same
        distribution.

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

        def noise(*shape: int) -> Tensor:
            return torch.randn(
                (n, *shape), dtype=self.dtype, device=self.device, generator=generator
            )

        drawn = torch.empty((n, *self.shape), dtype=self.dtype, device=self.device)
        rest = [(borrow(A), borrow(G)) for A, G in self.rest.terms]
        of_rest = noise(len(rest), *self.shape)
        _core.KroneckerRoot(rest).apply(borrow(of_rest), borrow(drawn))
        drawn.add_(noise(*self.shape), alpha=damping**0.5)
        for R, Q in self.terms:
            drawn += Q @ noise(Q.shape[1], R.shape[1]) @ R.mT
        return self.solve(drawn, damping)

    def near(self) -> EigenbasisSum:
        """Nearest operator that is diagonal in the eigenbasis of the summed factors."""
        D, K = self.shape
        A, G = self._R.new_zeros(K, K), self._Q.new_zeros(D, D)
        for one, other in self.products():
            A += other.trace() * one
            G += one.trace() * other
        (_, U), (_, P) = eigh(A), eigh(G)
        values = A.new_zeros(D, K)
        for one, other in self.rest.terms:
            seen_A, seen_G = ((X * (factor @ X)).sum(0) for X, factor in ((U, one), (P, other)))
            values += torch.outer(seen_G, seen_A)
        for R, Q in self.terms:
            values += torch.outer((P.mT @ Q).square().sum(1), (U.mT @ R).square().sum(1))
        return EigenbasisSum([(U, P, values.clamp_min(0.0))])


def _side_by_side(roots: Sequence[Tensor], empty: Tensor) -> tuple[Tensor, list[int]]:
    return torch.cat([empty, *roots], 1), [root.shape[1] for root in roots]


def _square(X: Tensor) -> float:
    return float(X.square().sum(dtype=torch.float64))


def _seen_by(factor: Tensor, root: Tensor) -> float:
    """``tr(root^T factor root)``."""
    return float((root * (factor @ root)).sum(dtype=torch.float64))
