"""What every curvature block is: a symmetric positive semi-definite operator on matrices."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from ekfac_rs._checks import require_like
from ekfac_rs._lanczos import top_eigenvalue
from ekfac_rs._ranks import Share
from ekfac_rs.errors import IncompatibleError, NumericalError, OptionError

Terms = Sequence[tuple[Tensor, Tensor]]

# Above this many rows a dense matrix is no longer a fallback anyone wants.
_DENSE_LIMIT = 4096
# Products that a top eigenvalue may take, and the change at which it takes no more.
_PRODUCTS = 100
_TOLERANCE = 1e-6


class Block(ABC):
    """A layer's curvature, an operator ``H`` on matrices ``V`` of shape (D, K)."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """Shape ``(D, K)`` of the matrices the block acts on."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Dtype of the block."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Device of the block."""

    @abstractmethod
    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """Return the block on another device or in another dtype."""

    @abstractmethod
    def product(self, V: Tensor) -> Tensor:
        """Apply the block to ``V`` of shape (D, K) or (S, D, K)."""

    @abstractmethod
    def quadratic(self, V: Tensor) -> float:
        """Quadratic form ``<V, H V>``."""

    @abstractmethod
    def trace(self) -> float:
        """Trace of the block."""

    @abstractmethod
    def norm(self) -> float:
        """Frobenius norm of the block."""

    @abstractmethod
    def diagonal(self) -> Tensor:
        """Diagonal of the block, shape (D, K)."""

    @abstractmethod
    def dense(self) -> Tensor:
        """Return the block as a matrix of shape (D * K, D * K)."""

    @abstractmethod
    def top_eigenvalue(self, damping: float = 0.0) -> float:
        """Largest eigenvalue of ``H + damping I``."""

    @abstractmethod
    def __add__(self, other: Self) -> Self:
        """Sum of two blocks of one kind."""

    @abstractmethod
    def __mul__(self, factor: float) -> Self:
        """Multiply the block by a number."""

    @abstractmethod
    def mixed(
        self, other: Self, share: float, examples: Sequence[int], others: Sequence[int]
    ) -> Self:
        """Block of the union of two passes, of which this one saw ``share`` of the examples.

        Parameters
        ----------
        other : block of the same kind and shape
        share : float
        examples, others : sequence of int
            Of both passes, the examples that count for the gradients of each stratum.
        """

    @abstractmethod
    def embedded(self, outputs: int) -> Self:
        """Return the block of ``outputs`` rows whose first ones are this block's, zero on others.

        Raises
        ------
        OptionError
            Fewer rows than the block has, or rows that fall into groups.
        """

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return what the block is made of under keys for a file."""

    def _checked(self, V: Tensor) -> Tensor:
        """Return ``V`` without its graph; refuse one that is no (D, K) or (S, D, K) of the block's.

        Raises
        ------
        ShapeError, DtypeError, DeviceError
        """
        like = torch.empty((), dtype=self.dtype, device=self.device)
        stacked = isinstance(V, Tensor) and V.dim() == 3
        require_like("V", V, (V.shape[0], *self.shape) if stacked else self.shape, like)
        return V.detach()

    def _require_fitting(self, other: Self) -> None:
        """Raise `IncompatibleError` unless a block adds up with this one."""
        if self._fit() != other._fit():
            raise IncompatibleError(f"expected a block like {self!r}, got {other!r}")

    def _fit(self) -> tuple[object, ...]:
        """Return what two blocks that add up have in common."""
        return self.shape, self.dtype, self.device


def kept_strata(gradient_examples: Sequence[int]) -> list[int]:
    """Return the strata that had a degree of freedom: the others are no terms."""
    return [k for k, examples in enumerate(gradient_examples) if examples]


def share_of(block: Block) -> Share:
    """Return what to decompose a block takes, for ranks that do it for each other."""
    # The cube of a matrix's size.
    factors = block.tensors().values()
    return Share(
        sum(t.numel() * (t.shape[-1] if t.dim() > 1 else 1) for t in factors), block.device
    )


def mixed_terms(
    mine: Terms, theirs: Terms, share: float, examples: Sequence[int], others: Sequence[int]
) -> list[tuple[Tensor, Tensor]]:
    """Terms of the union of two passes; see `Block.mixed`."""
    A, G = mine[0]
    absent = torch.zeros_like(A), torch.zeros_like(G)
    my_terms = dict(zip(kept_strata(examples), mine, strict=True))
    their_terms = dict(zip(kept_strata(others), theirs, strict=True))
    terms = []
    for k in sorted(my_terms.keys() | their_terms.keys()):
        (A, G), (B, H) = my_terms.get(k, absent), their_terms.get(k, absent)
        gradient_share = examples[k] / (examples[k] + others[k])
        terms.append((torch.lerp(B, A, share), torch.lerp(H, G, gradient_share)))
    return terms


def dense_logdet(block: Block, damping: float, closed: str, instead: str = "") -> float:
    """Log-determinant of ``block + damping I`` by a dense Cholesky factorisation.

    Parameters
    ----------
    block : Block
    damping : float
    closed, instead : str
        What has a closed form, and what else to do, for messages.

    Raises
    ------
    NumericalError
        The damped block is singular.
    OptionError
        It is too large.
    """
    D, K = block.shape
    if D * K > _DENSE_LIMIT:
        raise OptionError(
            f"logdet: expected {closed}, or at most {_DENSE_LIMIT} rows, got {block!r} with "
            f"{D * K} rows and damping {damping}{instead}"
        )
    dense = block.dense().double()
    dense.diagonal().add_(damping)
    factor, failed = torch.linalg.cholesky_ex(dense)
    if int(failed):
        raise NumericalError(
            f"logdet: expected a positive definite block, got a pivot <= 0 at row {int(failed)}"
            f" with damping {damping}"
        )
    return 2.0 * float(factor.diagonal().log().sum())


def top_eigenvalue_by_products(block: Block, start: Tensor) -> float:
    """Largest eigenvalue of a block, to a relative 1e-4; 0 where ``start`` is zero.

    Parameters
    ----------
    block : Block
    start : Tensor of shape (D, K)
        To begin with; not orthogonal to the top eigenvector.
    """
    if not bool(start.any()):
        return 0.0

    def product(v: Tensor) -> Tensor:
        return block.product(v.reshape(block.shape)).flatten()

    return top_eigenvalue(product, start.flatten(), _PRODUCTS, _TOLERANCE)


def more_outputs(block: Block, outputs: int, groups: int = 1) -> int:
    """Return how many rows `Block.embedded` puts below a block's."""
    D, _ = block.shape
    if outputs < D or (groups > 1 and outputs != D):
        raise OptionError(
            f"outputs: expected at least the {D} of {block!r}, "
            f"{'in as many groups, ' if groups > 1 else ''}got {outputs}"
        )
    return outputs - D


def require_same_kind(mine: Block, theirs: object) -> None:
    """Raise `IncompatibleError` unless both blocks are of one class."""
    if type(theirs) is not type(mine):
        raise IncompatibleError(f"expected two blocks of one kind, got {mine!r} and {theirs!r}")
