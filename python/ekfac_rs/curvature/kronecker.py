"""Curvature blocks as sums of Kronecker products.

A block is a symmetric positive semi-definite operator on matrices ``V`` of shape ``(D, K)``.
``vec`` is row-major: entry ``(d, k)`` of ``V`` is entry ``d * K + k`` of ``vec V``.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ekfac_rs import _core
from ekfac_rs._checks import require_count, require_finite, require_like, require_nonnegative
from ekfac_rs._tensors import borrow
from ekfac_rs.curvature.block import Block, dense_logdet, mixed_terms, more_outputs
from ekfac_rs.curvature.conjugate import default_tolerance
from ekfac_rs.errors import (
    DtypeError,
    OptionError,
    ShapeError,
)


class KroneckerSum(Block):
    """The operator ``H V = sum_k G_k V A_k``.

    With groups, as grouped and depthwise convolutions have them, it is block diagonal: the rows of
    ``V`` fall into ``groups`` consecutive blocks of ``D / groups`` rows, and each block ``V_g`` has
    factors of its own, ``(H V)_g = sum_k G_kg V_g A_kg``. Everything below holds for both.

    Parameters
    ----------
    terms : sequence of (A, G)
        Symmetric matrices ``A`` of shape ``(K, K)`` and ``G`` of shape ``(D, D)``; with groups,
        stacks of shapes ``(groups, K, K)`` and ``(groups, D / groups, D / groups)``. Float32 or
        float64, all on one device. Borrowed, not copied: do not modify them.

    Raises
    ------
    ShapeError, DtypeError, DeviceError, NonFiniteError
        A factor does not fit the first term's.

    References
    ----------
    Lee, Hong, Joo, Kim, "Continual Learning with Extended Kronecker-factored Approximate
    Curvature", CVPR 2020: the sum of a same-example and a different-example term.

    Examples
    --------
    >>> import torch
    >>> from ekfac_rs import KroneckerSum
    >>> ks = KroneckerSum([(torch.eye(3), 2.0 * torch.eye(2))])
    >>> ks.shape, ks.trace()
    ((2, 3), 12.0)
    >>> ks.solve(torch.ones(2, 3), damping=2.0)[0]
    tensor([0.2500, 0.2500, 0.2500])
    """

    def __init__(self, terms: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.terms = tuple((A, G) for A, G in terms)
        if not self.terms:
            raise OptionError("terms: expected at least one pair (A, G), got none")
        reference, first_G = self.terms[0]
        if reference.dtype not in (torch.float32, torch.float64):
            raise DtypeError(f"terms: expected dtype float32 or float64, got {reference.dtype}")
        stack = _stack_of(reference)
        K, D = reference.shape[-1], first_G.shape[-1]
        for k, (A, G) in enumerate(self.terms):
            require_like(f"terms[{k}] factor A", A, (*stack, K, K), reference)
            require_like(f"terms[{k}] factor G", G, (*stack, D, D), reference)
            require_finite(f"terms[{k}] factor A", A)
            require_finite(f"terms[{k}] factor G", G)

    def __repr__(self) -> str:
        groups = f", groups={self.groups}" if self.groups > 1 else ""
        return (
            f"KroneckerSum(shape={self.shape}, terms={len(self.terms)}{groups}, dtype={self.dtype})"
        )

    @property
    def _borrowed(self) -> list[_core.Term]:
        """The terms for one call: on a GPU, on the stream that is current then."""
        return [(borrow(A), borrow(G)) for A, G in self.terms]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape ``(D, K)`` of the matrices the block acts on."""
        A, G = self.terms[0]
        return self.groups * G.shape[-1], A.shape[-1]

    @property
    def groups(self) -> int:
        """Number of blocks of rows with factors of their own; 1 without groups."""
        return math.prod(_stack_of(self.terms[0][0]))

    def group(self, index: int) -> "KroneckerSum":
        """Return the block of one group, which acts on its ``D / groups`` rows alone.

        Raises
        ------
        OptionError
            There is no such group.
        """
        if not 0 <= index < self.groups:
            raise OptionError(f"index: expected a group below {self.groups}, got {index}")
        if not _stack_of(self.terms[0][0]):
            return self
        return KroneckerSum([(A[index], G[index]) for A, G in self.terms])

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
    ) -> "KroneckerSum":
        """Return the block on another device or in another dtype."""
        return KroneckerSum(
            [
                (A.to(device=device, dtype=dtype), G.to(device=device, dtype=dtype))
                for A, G in self.terms
            ]
        )

    # --- products and sums ---

    def product(self, V: Tensor) -> Tensor:
        """Apply the block: ``H V``.

        Parameters
        ----------
        V : Tensor of shape (D, K) or (S, D, K)

        Returns
        -------
        Tensor of the same shape

        Raises
        ------
        ShapeError, DtypeError, DeviceError
            ``V`` does not fit the block.
        """
        V = self._checked(V)
        out = torch.empty_like(V, memory_format=torch.contiguous_format)
        _core.kronecker_product(self._borrowed, borrow(V), borrow(out), 0.0)
        return out

    def quadratic(self, V: Tensor) -> float:
        """Quadratic form ``<V, H V>`` (no factor 1/2), summed over a batch if there is one."""
        return _core.kronecker_quadratic(self._borrowed, borrow(self._checked(V)))

    def trace(self) -> float:
        """Trace of the block."""
        return _core.kronecker_trace(self._borrowed)

    def inner(self, other: "KroneckerSum") -> float:
        """Frobenius inner product ``tr(H^T H')`` with another block of the same shape."""
        self._require_fitting(other)
        return _core.kronecker_inner(self._borrowed, other._borrowed)

    def norm(self) -> float:
        """Frobenius norm of the block."""
        return math.sqrt(max(self.inner(self), 0.0))

    def diagonal(self) -> Tensor:
        """Diagonal of the block as a matrix of shape (D, K)."""
        out = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        _core.kronecker_diagonal(self._borrowed, borrow(out))
        return out

    def dense(self) -> Tensor:
        """Return the block as a matrix of shape (D * K, D * K): for small sizes and tests.

        It is zero between rows of different groups.
        """
        D, K = self.shape
        out = torch.empty((D * K, D * K), dtype=self.dtype, device=self.device)
        _core.kronecker_dense(self._borrowed, borrow(out))
        return out

    def __add__(self, other: "KroneckerSum") -> "KroneckerSum":
        """Sum of two blocks: the terms of both, exactly."""
        if not isinstance(other, KroneckerSum):
            return NotImplemented
        self._require_fitting(other)
        return KroneckerSum([*self.terms, *other.terms])

    def __mul__(self, factor: float) -> "KroneckerSum":
        """Multiply the block by a number."""
        if not isinstance(factor, int | float):
            return NotImplemented
        return KroneckerSum([(A, G * factor) for A, G in self.terms])

    __rmul__ = __mul__

    def mixed(
        self, other: "KroneckerSum", share: float, examples: Sequence[int], others: Sequence[int]
    ) -> "KroneckerSum":
        return KroneckerSum(mixed_terms(self.terms, other.terms, share, examples, others))

    def embedded(self, outputs: int) -> "KroneckerSum":
        rows = more_outputs(self, outputs, self.groups)
        return KroneckerSum([(A, F.pad(G, (0, rows, 0, rows))) for A, G in self.terms])

    def tensors(self) -> dict[str, Tensor]:
        return {
            f"{k}.{letter}": factor
            for k, term in enumerate(self.terms)
            for letter, factor in zip("AG", term, strict=True)
        }

    def compress(self, terms: int) -> "KroneckerSum":
        """Nearest sum of ``terms`` Kronecker products in Frobenius norm.

        The first of them is positive semi-definite; further ones, and hence the sum, need not be.
        Groups are compressed one by one.

        Parameters
        ----------
        terms : int
            At least 1; with as many as the block has, the block itself is returned.
        """
        require_count("terms", terms)
        if terms >= len(self.terms):
            return self
        out = [(torch.empty_like(A), torch.empty_like(G)) for A, G in self.terms[:terms]]
        _core.kronecker_compress(self._borrowed, [(borrow(A), borrow(G)) for A, G in out])
        return KroneckerSum(out)

    # --- spectrum ---

    def eigh(self) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Eigendecomposition of every term's factors.

        Returns
        -------
        list of (values_A, vectors_A, values_G, vectors_G)
            Ascending eigenvalues of shapes ``(K,)`` and ``(D,)``; eigenvectors in columns; stacks
            of both with groups. The eigenvalues of a term alone are all products of the two.
        """
        return [(*eigh(A), *eigh(G)) for A, G in self.terms]

    def top_eigenvalue(self, damping: float = 0.0) -> float:
        """Largest eigenvalue of ``H + damping I``, to a relative 1e-4."""
        require_nonnegative("damping", damping)
        return _core.kronecker_top_eigenvalue(self._borrowed, damping)

    # --- inverses ---

    def damped(self, damping: float) -> "KroneckerSum":
        """Add factored damping to the first term.

        Its factors become ``A + pi sqrt(damping) I`` and ``G + sqrt(damping) / pi I`` with
        ``pi**2 = (tr A / K) / (tr G / D)`` (Martens & Grosse 2015, section 6.3): about
        ``H + damping I``, and within reach of the closed forms for two terms. Each group has a
        ``pi`` of its own.
        """
        require_nonnegative("damping", damping)
        A, G = self.terms[0]
        mean_A, mean_G = (x.diagonal(dim1=-2, dim2=-1).double().mean(-1) for x in (A, G))
        balanced = (mean_A > 0.0) & (mean_G > 0.0)
        pi = torch.where(balanced, mean_A / mean_G, 1.0).sqrt()
        first = _shifted(A, pi * damping**0.5), _shifted(G, damping**0.5 / pi)
        return KroneckerSum([first, *self.terms[1:]])

    def solve(
        self,
        V: Tensor,
        damping: float = 0.0,
        *,
        tolerance: float | None = None,
        max_iterations: int = 1000,
    ) -> Tensor:
        """Solve ``(H + damping I) X = V``.

        Closed form for one term, for two without damping (see `damped`), and for groups of a
        single row; preconditioned conjugate gradients otherwise.

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
        out = torch.empty_like(V, memory_format=torch.contiguous_format)
        if inverse := self._inverse(damping):
            inverse.solve(borrow(V), borrow(out))
            return out
        if tolerance is None:
            tolerance = default_tolerance(self.dtype)
        _core.conjugate_gradients(
            self._borrowed, damping, borrow(V), borrow(out), tolerance, max_iterations
        )
        return out

    def logdet(self, damping: float = 0.0) -> float:
        """Log-determinant of ``H + damping I``.

        Closed form for one term, for two without damping, and for groups of a single row; by a
        dense Cholesky factorisation for other blocks, whose groups then have at most 4,096 rows
        of the dense matrix each.

        Raises
        ------
        NumericalError
            The damped block is singular.
        OptionError
            No closed form, and too large for the dense one: use ``damped(damping).logdet()``,
            after ``compress(2)`` if there are more than two terms.
        """
        require_nonnegative("damping", damping)
        if inverse := self._inverse(damping):
            return inverse.logdet()
        if self.groups > 1:
            return sum(self.group(index).logdet(damping) for index in range(self.groups))
        return dense_logdet(
            self,
            damping,
            "one term, two without damping",
            "; use damped(damping).logdet(), after compress(2) where there are more terms",
        )

    def sample(
        self, n: int, damping: float = 0.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw from the Gaussian with precision ``H + damping I`` (a Laplace approximation).

        Without a closed form, ``y ~ N(0, H + damping I)`` is drawn and the system solved for it,
        which has the same distribution.

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
        out = torch.empty((n, *self.shape), dtype=self.dtype, device=self.device)
        if inverse := self._inverse(damping):
            inverse.sample(borrow(self._noise((n,), generator)), borrow(out))
            return out
        noise = self._noise((n, len(self.terms)), generator)
        _core.KroneckerRoot(self._borrowed).apply(borrow(noise), borrow(out))
        out.add_(self._noise((n,), generator), alpha=damping**0.5)
        return self.solve(out, damping)

    def added_up(self) -> Tensor | None:
        """Return the one input factor that the terms add up to, in float64, ``[groups, K, K]``.

        Where every group is a single row G is a number for each. None where there are no groups, or
        larger ones.
        """
        if self.groups == 1 or self.groups < self.shape[0]:
            return None
        return torch.stack([A.double() * G.double() for A, G in self.terms]).sum(0)

    def _inverse(self, damping: float) -> _core.KroneckerInverse | None:
        """Return the inverse of the damped block where it has a closed form."""
        if (whole := self.added_up()) is not None:
            one = whole.new_ones(self.groups, 1, 1)
            return _core.KroneckerInverse([(borrow(whole), borrow(one))], damping)
        if len(self.terms) == 1 or (len(self.terms) == 2 and damping == 0.0):
            return _core.KroneckerInverse(self._borrowed, damping)
        return None

    def _noise(self, batch: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
        return torch.randn(
            (*batch, *self.shape), dtype=self.dtype, device=self.device, generator=generator
        )

    def _fit(self) -> tuple[object, ...]:
        return *super()._fit(), self.groups


def _stack_of(factor: Tensor) -> tuple[int, ...]:
    """Return ``(groups,)`` for a stack of matrices and ``()`` for a matrix."""
    if factor.dim() not in (2, 3) or not factor.numel():
        raise ShapeError(
            "terms: expected factors (K, K) and (D, D), or (groups, K, K) and (groups, D / groups, "
            f"D / groups), none empty, got shape {tuple(factor.shape)}"
        )
    return tuple(factor.shape[:-2])


def _shifted(factor: Tensor, shift: Tensor) -> Tensor:
    """Add a multiple of the identity, one for each group."""
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    return factor + shift.to(factor.dtype)[..., None, None] * eye


def eigh(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Ascending eigenvalues and eigenvectors, in columns, of a factor or a stack of them."""
    values = torch.empty(factor.shape[:-1], dtype=factor.dtype, device=factor.device)
    vectors = torch.empty_like(factor, memory_format=torch.contiguous_format)
    _core.eigh(borrow(factor), borrow(values), borrow(vectors))
    return values, vectors


# Of smaller matrices all pairs are as cheap.
_LARGE = 512
_FIRST_WIDTH = 64
_SUBSPACE_ITERATIONS = 3


def leading_eigh(
    factor: Tensor, is_enough: Callable[[Tensor], bool]
) -> tuple[Tensor, Tensor] | None:
    """Largest eigenvalues, ascending, and eigenvectors of a large matrix, as many as are enough.

    By subspace iteration from random directions (Halko, Martinsson, Tropp 2011, algorithm 4.4).
    None where the matrix is small, or all would be hardly dearer.

    Parameters
    ----------
    factor : Tensor of shape (n, n)
    is_enough : callable
        Tells by the values found, ascending; twice as many are tried otherwise.

    Returns
    -------
    tuple of Tensor, or None
        Of shapes (m,) and (n, m), vectors as columns.
    """
    n, width = len(factor), _FIRST_WIDTH
    if n <= _LARGE:
        return None
    generator = torch.Generator("cpu").manual_seed(0)
    while width < n // 4:
        block = torch.randn(n, width, generator=generator, dtype=factor.dtype, device="cpu")
        block = block.to(factor.device)
        for _ in range(_SUBSPACE_ITERATIONS):
            block = torch.linalg.qr(factor @ block).Q
        values, inside = eigh(block.mT @ factor @ block)
        if is_enough(values):
            return values, block @ inside
        width *= 2
    return None
