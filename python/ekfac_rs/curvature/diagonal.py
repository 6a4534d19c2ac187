"""The diagonal block, a baseline."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ekfac_rs._checks import require_finite
from ekfac_rs.curvature.block import Block, more_outputs
from ekfac_rs.errors import IncompatibleError, ShapeError


class DiagonalBlock(Block):
    """A diagonal operator: the elementwise product with a matrix of shape (D, K).

    The baseline of elastic weight consolidation (Kirkpatrick et al. 2017), in the coordinates of
    the other blocks.

    Parameters
    ----------
    values : Tensor of shape (D, K)
        The diagonal.
    """

    def __init__(self, values: Tensor) -> None:
        if values.dim() != 2:
            raise ShapeError(f"values: expected shape (D, K), got {tuple(values.shape)}")
        require_finite("values", values)
        self.values = values

    def __repr__(self) -> str:
        return f"DiagonalBlock(shape={self.shape}, dtype={self.dtype})"

    @property
    def shape(self) -> tuple[int, int]:
        """Shape ``(D, K)`` of the matrices the block acts on."""
        return self.values.shape[0], self.values.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the diagonal."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        """Device of the diagonal."""
        return self.values.device

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "DiagonalBlock":
        """Return the block on another device or in another dtype."""
        return DiagonalBlock(self.values.to(device=device, dtype=dtype))

    def product(self, V: Tensor) -> Tensor:
        """Apply the block to ``V`` of shape (D, K) or (S, D, K)."""
        return self.values * V

    def quadratic(self, V: Tensor) -> float:
        """Quadratic form ``<V, H V>``."""
        return float((self.values * V.detach().square()).sum())

    def trace(self) -> float:
        """Trace of the block."""
        return float(self.values.double().sum())

    def norm(self) -> float:
        """Frobenius norm of the block."""
        return float(torch.linalg.vector_norm(self.values.double()))

    def diagonal(self) -> Tensor:
        """Diagonal of the block, shape (D, K)."""
        return self.values

    def dense(self) -> Tensor:
        """Return the block as a matrix of shape (D * K, D * K)."""
        return torch.diag(self.values.reshape(-1))

    def top_eigenvalue(self, damping: float = 0.0) -> float:
        """Largest eigenvalue of ``H + damping I``."""
        return float(self.values.max()) + damping

    def __add__(self, other: "DiagonalBlock") -> "DiagonalBlock":
        """Sum of two diagonal blocks."""
        if not isinstance(other, DiagonalBlock):
            return NotImplemented
        if self.shape != other.shape:
            raise IncompatibleError(f"expected a block like {self!r}, got {other!r}")
        return DiagonalBlock(self.values + other.values)

    def __mul__(self, factor: float) -> "DiagonalBlock":
        """Multiply the block by a number."""
        if not isinstance(factor, int | float):
            return NotImplemented
        return DiagonalBlock(self.values * factor)

    __rmul__ = __mul__

    def mixed(
        self, other: "DiagonalBlock", share: float, examples: Sequence[int], others: Sequence[int]
    ) -> "DiagonalBlock":
        return DiagonalBlock(torch.lerp(other.values, self.values, share))

    def embedded(self, outputs: int) -> "DiagonalBlock":
        rows = more_outputs(self, outputs)
        return DiagonalBlock(F.pad(self.values, (0, 0, 0, rows)))

    def tensors(self) -> dict[str, Tensor]:
        return {"diagonal": self.values}
