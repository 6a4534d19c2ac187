"""What a kind of layer answers: its weights, units, gradients, shapes and merged view."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ekfac_rs.errors import BatchNormError
from ekfac_rs.layers.dataflow import AffineCall

COORDINATES = ("merged", "raw")


class Geometry(NamedTuple):
    """How a convolution's patches lie in its input; one entry for each spatial dimension.

    ``padding`` holds the zeros before and after: other padding modes reach a convolution padded.
    """

    kernel: list[int]
    stride: list[int]
    dilation: list[int]
    padding: list[tuple[int, int]]


class Units(NamedTuple):
    """A layer's inputs in one mini-batch, without the appended one.

    ``values`` are the units themselves, ``[N, K]`` or ``[N, T, K]``, or with a geometry the
    ``[N, C, ...]`` whose patches they are.
    """

    values: Tensor
    geometry: Geometry | None = None


@dataclass(frozen=True)
class AffineLayer:
    """An affine map ``h = W a + b`` inside a model, and the BatchNorm that consumes its output.

    ``W`` is a matrix of shape (D, K). With groups it is block diagonal: consecutive blocks of
    D / groups rows, each with inputs of its own, and K counts the inputs of one block.

    Attributes
    ----------
    name : str
        Name in ``model.named_modules()``.
    module : torch.nn.Module
    batchnorm_name : str or None
        Name of the BatchNorm the layer feeds directly and exclusively; its own for a BatchNorm
        that no other layer feeds.
    batchnorm : torch.nn.Module or None
    """

    name: str
    module: Any
    batchnorm_name: str | None = None
    batchnorm: Any = None

    # --- what each kind of layer tells ---

    @property
    def groups(self) -> int:
        """Number of diagonal blocks."""
        return 1

    @property
    def absorbs_scale(self) -> bool:
        """Whether the layer has weights that take up a BatchNorm's scale."""
        return True

    @property
    def like(self) -> Tensor:
        """A parameter of the layer, which tells its dtype and device."""
        parameter: Tensor = next(self.module.parameters(recurse=False))
        return parameter

    def weight(self) -> Tensor:
        """``W`` of shape (D, K), without bias column, differentiable."""
        weight: Tensor = self.module.weight
        return weight.flatten(1)

    def bias(self) -> Tensor | None:
        """``b`` of shape (D,), or None."""
        bias: Tensor | None = getattr(self.module, "bias", None)
        return bias

    def units(self, call: AffineCall) -> Units:
        """Return the inputs of the affine map, from the call of its function."""
        raise NotImplementedError

    def gradients(self, g: Tensor) -> Tensor:
        """Gradients at the output as units, ``[N, D]`` or ``[N, T, D]``."""
        return channels_last(g)

    # --- weights in coordinates ---

    def shape(self, coordinates: str) -> tuple[int, int]:
        """Shape ``(D, K)`` of the layer's weight matrix; K counts the bias column."""
        D, K = self.weight().shape
        return D, K + self.has_shift(coordinates)

    def factor_shapes(self, coordinates: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of a term's factors A and G; with groups, one matrix for each on axis 0."""
        D, K = self.shape(coordinates)
        rows = D // self.groups
        groups = () if self.groups == 1 else (self.groups,)
        return (*groups, K, K), (*groups, rows, rows)

    def has_shift(self, coordinates: str) -> bool:
        """Whether the map has a bias column: merged with a BatchNorm, it always has."""
        merged = coordinates == "merged" and self.batchnorm is not None
        return merged or self.bias() is not None

    def raw_weight(self) -> Tensor:
        """``[W b]`` of the layer alone, shape ``(D, K)``, differentiable."""
        weight, bias = self.weight(), self.bias()
        return weight if bias is None else torch.cat([weight, bias[:, None]], dim=1)

    def merged_weight(self, mean: Tensor | None = None, variance: Tensor | None = None) -> Tensor:
        """``[Wm bm]`` under the given statistics of the BatchNorm's input, differentiable.

        ``Wm = diag(gamma / sigma) W`` and ``bm = beta + gamma (b - mean) / sigma`` with
        ``sigma**2 = variance + eps`` (method: merged weights; Lee et al. 2020, section 3).

        Parameters
        ----------
        mean, variance : Tensor of shape (D,), optional
            Population (biased) statistics. Default: the running statistics.

        Returns
        -------
        Tensor of shape (D, K)
        """
        if self.batchnorm is None:
            return self.raw_weight()
        if mean is None or variance is None:
            mean, variance = self.running_statistics()
        gain, bias = self.gain(variance), self.bias()
        shift = -gain * mean if bias is None else gain * (bias - mean)
        if self.batchnorm.bias is not None:
            shift = shift + self.batchnorm.bias
        return torch.cat([gain[:, None] * self.weight(), shift[:, None]], dim=1)

    def gain(self, variance: Tensor) -> Tensor:
        """Factor ``gamma / sigma`` of shape (D,) by which the BatchNorm scales each output."""
        inverse = torch.rsqrt(variance + self.batchnorm.eps)
        return inverse if self.batchnorm.weight is None else self.batchnorm.weight * inverse

    def running_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and variance, each of shape (D,), that the BatchNorm uses in eval mode."""
        mean, variance = self.batchnorm.running_mean, self.batchnorm.running_var
        if mean is None or variance is None:
            raise BatchNormError(
                f"layer {self.batchnorm_name!r}: expected a BatchNorm with running statistics, "
                "got track_running_stats=False: merged weights are not defined without them"
            )
        return mean, variance

    def weight_matrix(self, coordinates: str) -> Tensor:
        """Return the weights in these coordinates, shape (D, K), under running statistics."""
        return self.merged_weight() if coordinates == "merged" else self.raw_weight()

    def check_batchnorm_input(self, x: Tensor) -> None:
        """Raise unless the BatchNorm's axis 1 holds the layer's outputs."""

    def parameters(self, coordinates: str) -> Iterator[nn.Parameter]:
        """Parameters that the block in these coordinates covers."""
        yield from self.module.parameters(recurse=False)
        if coordinates == "merged" and self.absorbs_scale and self.batchnorm is not None:
            yield from self.batchnorm.parameters(recurse=False)


def channels_last(x: Tensor) -> Tensor:
    """View ``[N, C, ...]`` as units ``[N, T, C]``; ``[N, C]`` is units already."""
    return x if x.dim() <= 2 else x.flatten(2).transpose(1, 2)


def flat_units(x: Tensor) -> Tensor:
    """View ``[N, ..., K]`` as ``[N, K]`` or ``[N, T, K]``."""
    return x if x.dim() <= 3 else x.flatten(1, -2)
