"""Convolutions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ekfac_rs import _core
from ekfac_rs._tensors import borrow
from ekfac_rs.errors import ShapeError
from ekfac_rs.layers.base import (
    AffineCall,
    AffineLayer,
    Arguments,
    Function,
    Geometry,
    Units,
    channels_last,
)

_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


@dataclass(frozen=True)
class Patches(Units):
    """Units that are patches of ``values``, ``[N, C, ...]``: never unfolded."""

    geometry: Geometry

    def accumulate(
        self, out: Sequence[Tensor], approximation: str, append_one: bool, precision: str
    ) -> list[int]:
        factors = [borrow(A) for A in out]
        return _core.accumulate_patch_gram(
            borrow(self.values), factors, approximation, *self.geometry, append_one, 1.0, precision
        )


class ConvLayer(AffineLayer):
    """A convolution: an affine map of the patch at each output location."""

    noun = "a convolution"
    modules = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    functions: ClassVar[Mapping[Function, tuple[str, ...]]] = {
        F.conv1d: _ARGUMENTS,
        F.conv2d: _ARGUMENTS,
        F.conv3d: _ARGUMENTS,
    }

    @classmethod
    def why_refused(cls, call: AffineCall) -> str | None:
        groups, own = call.arguments.get("groups", 1), call.module.groups
        if groups != own:
            return f"expected a call with its {own} groups, got {groups}"
        return super().why_refused(call)

    @property
    def groups(self) -> int:
        return int(self.module.groups)

    def channel_axis(self, dimensions: int) -> int | None:
        return 1 if dimensions == self.module.weight.dim() else None

    def units(self, call: AffineCall) -> Units:
        geometry = conv_geometry(call.arguments)
        require_batch(call.input, geometry)
        return units_of_patches(call.input, geometry)

    def example_gradients(self, units: Units, g: Tensor) -> Tensor:
        if not isinstance(units, Patches):
            return super().example_gradients(units, g)
        return _patch_gradients(units.values, g, units.geometry, self.groups)


def conv_geometry(arguments: Arguments) -> Geometry:
    """Geometry of a call of ``F.conv1d``, ``F.conv2d`` or ``F.conv3d``."""
    kernel = list(arguments["weight"].shape[2:])
    stride = per_dimension(arguments.get("stride", 1), len(kernel))
    dilation = per_dimension(arguments.get("dilation", 1), len(kernel))
    padding = arguments.get("padding", 0)
    if padding == "valid":
        padding = 0
    if padding == "same":
        # The odd zero goes behind, as torch has it.
        total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        sides = [(t // 2, t - t // 2) for t in total]
    else:
        sides = [(p, p) for p in per_dimension(padding, len(kernel))]
    return Geometry(kernel, stride, dilation, sides)


def per_dimension(value: Any, dimensions: int) -> list[int]:
    """Return an argument of a convolution as one number for each spatial dimension."""
    values = list(value) if isinstance(value, tuple | list) else [value]
    return [int(v) for v in (values * dimensions if len(values) == 1 else values)]


def require_batch(x: Tensor, geometry: Geometry) -> None:
    """Raise unless a convolution's input has examples on axis 0."""
    if x.dim() != 2 + len(geometry.kernel):
        axes = ("L", "H, W", "D, H, W")[len(geometry.kernel) - 1]
        raise ShapeError(f"expected shape [N, C, {axes}], got {tuple(x.shape)}")


def units_of_patches(x: Tensor, geometry: Geometry) -> Units:
    """Patches of ``[N, C, ...]``; where each is one location, these locations themselves."""
    pointwise = (1, 1, 0, 0)
    sides = zip(geometry.kernel, geometry.stride, geometry.padding, strict=True)
    if all((k, s, *p) == pointwise for k, s, p in sides):
        return Units(channels_last(x))
    return Patches(x, geometry)


def _patch_gradients(x: Tensor, g: Tensor, geometry: Geometry, groups: int) -> Tensor:
    """Gradient of a convolution's weights for each example, shape (N, D, K).

    One convolution of all examples at once: each is a group of its own.
    """
    N, C, D = len(x), x.shape[1], g.shape[-1]
    x = F.pad(x, [side for sides in reversed(geometry.padding) for side in sides])
    sizes = [
        (length - d * (k - 1) - 1) // s + 1
        for length, k, s, d in zip(x.shape[2:], *geometry[:3], strict=True)
    ]
    weight = x.new_zeros(()).expand(N * D, C // groups, *geometry.kernel)
    _, gradient, _ = torch.ops.aten.convolution_backward(
        g.transpose(1, 2).reshape(1, N * D, *sizes),
        x.reshape(1, N * C, *x.shape[2:]),
        weight,
        None,
        geometry.stride,
        [0] * len(sizes),
        geometry.dilation,
        False,
        [0] * len(sizes),
        N * groups,
        [False, True, False],
    )
    per_example: Tensor = gradient.reshape(N, D, -1)
    return per_example
