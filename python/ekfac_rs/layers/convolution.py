"""Convolutions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ekfac_rs import _core
from ekfac_rs._modes import torch_precision
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


@dataclass(frozen=True)
class Patches(Units):
    """Units that are patches of ``values``, ``[N, C, ...]``: never unfolded."""

    geometry: Geometry

    def accumulate(
        self,
        out: Sequence[Tensor],
        approximation: str,
        append_one: bool,
        precision: str,
        note: _core.Note | None,
    ) -> list[int]:
        factors = [borrow(A) for A in out]
        options = (approximation, *self.geometry, append_one, 1.0, precision, note)
        return _core.accumulate_patch_gram(borrow(self.values), factors, *options)


class _PatchLayer(AffineLayer):
    """An affine map of the patch at each output location."""

    @classmethod
    def why_refused(cls, call: AffineCall) -> str | None:
        groups, own = call.arguments.get("groups", 1), call.module.groups
        if groups != own:
            return f"expected a call with its {own} groups, got {groups}"
        return super().why_refused(call)

    @property
    def groups(self) -> int:
        return int(self.module.groups)

    def torch_precision(self) -> str:
        return torch_precision(of_convolutions=True)

    def channel_axis(self, dimensions: int) -> int | None:
        return 1 if dimensions == self.module.weight.dim() else None

    def gradient(self, units: Units, g: Tensor) -> Tensor:
        if not isinstance(units, Patches):
            return super().gradient(units, g)
        return _patch_gradient(units.values, g, units.geometry, self.groups)

    def example_gradients(self, units: Units, g: Tensor) -> Tensor:
        if not isinstance(units, Patches):
            return super().example_gradients(units, g)
        # Each example is a group of its own.
        N, D = len(g), g.shape[-1]
        x, g = (z.reshape(1, -1, *z.shape[2:]) for z in (units.values, g.transpose(1, 2)))
        gradient = _patch_gradient(x, g.transpose(1, 2), units.geometry, N * self.groups)
        return gradient.reshape(N, D, -1)


class ConvLayer(_PatchLayer):
    """A convolution."""

    noun = "a convolution"
    modules = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    functions: ClassVar[Mapping[Function, tuple[str, ...]]] = dict.fromkeys(
        (F.conv1d, F.conv2d, F.conv3d),
        ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    )

    def units(self, call: AffineCall) -> Units:
        geometry = conv_geometry(call.arguments)
        require_batch(call.input, geometry)
        return units_of_patches(call.input, geometry)


class ConvTransposeLayer(_PatchLayer):
    """A transposed convolution, as the convolution with stride 1 that it equals.

    That one sees the input with ``stride - 1`` zeros put between its locations, and the kernel
    backwards. So a unit is an output location, its inputs are the input locations that reach it,
    and the columns of ``W``, of shape (out_channels, K), are ordered as those of the equal
    convolution: by input channel of the group, then by kernel position from the last to the first.
    """

    noun = "a transposed convolution"
    modules = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    functions: ClassVar[Mapping[Function, tuple[str, ...]]] = dict.fromkeys(
        (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
        (
            *("input", "weight", "bias", "stride", "padding", "output_padding"),
            *("groups", "dilation"),
        ),
    )

    def as_matrix(self, stored: Tensor) -> Tensor:
        # Stored as [C, D / groups, ...], with the rows of all groups side by side.
        by_group = stored.reshape(self.groups, -1, *stored.shape[1:]).transpose(1, 2)
        return by_group.flatten(0, 1).flip(self._kernel_axes).flatten(1)

    def as_stored(self, weight: Tensor) -> Tensor:
        stored = self.module.weight
        by_group = weight.reshape(self.groups, stored.shape[1], -1, *stored.shape[2:])
        return by_group.transpose(1, 2).flatten(0, 1).flip(self._kernel_axes)

    @property
    def _kernel_axes(self) -> list[int]:
        return list(range(2, self.module.weight.dim()))

    def units(self, call: AffineCall) -> Units:
        kernel = list(call.arguments["weight"].shape[2:])
        stride, padding, output_padding, dilation = (
            per_dimension(call.arguments.get(name, default), len(kernel))
            for name, default in (
                *(("stride", 1), ("padding", 0), ("output_padding", 0)),
                ("dilation", 1),
            )
        )
        before = [d * (k - 1) - p for k, d, p in zip(kernel, dilation, padding, strict=True)]
        sides = [(b, b + extra) for b, extra in zip(before, output_padding, strict=True)]
        geometry = Geometry(kernel, [1] * len(kernel), dilation, sides)
        require_batch(call.input, geometry)
        x = _spread(call.input, stride)
        if min(before) < 0:
            # More padding than the kernel reaches over takes locations away.
            x = F.pad(x, [side for pair in reversed(sides) for side in pair])
            geometry = geometry._replace(padding=[(0, 0)] * len(kernel))
        return units_of_patches(x, geometry)


def _spread(x: Tensor, stride: list[int]) -> Tensor:
    """Put ``stride - 1`` zeros between the locations of ``[N, C, ...]``."""
    if all(s == 1 for s in stride):
        return x
    sizes = [(length - 1) * s + 1 for length, s in zip(x.shape[2:], stride, strict=True)]
    spread = x.new_zeros(*x.shape[:2], *sizes)
    spread[:, :, *(slice(None, None, s) for s in stride)] = x
    return spread


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


def _patch_gradient(x: Tensor, g: Tensor, geometry: Geometry, groups: int) -> Tensor:
    """Gradient of a convolution's weights over all examples, shape (D, K)."""
    C, D = x.shape[1], g.shape[-1]
    x = F.pad(x, [side for sides in reversed(geometry.padding) for side in sides])
    sizes = [
        (length - d * (k - 1) - 1) // s + 1
        for length, k, s, d in zip(x.shape[2:], *geometry[:3], strict=True)
    ]
    _, gradient, _ = torch.ops.aten.convolution_backward(
        g.transpose(1, 2).reshape(-1, D, *sizes),
        x,
        x.new_zeros(()).expand(D, C // groups, *geometry.kernel),
        None,
        geometry.stride,
        [0] * len(sizes),
        geometry.dilation,
        False,
        [0] * len(sizes),
        groups,
        [False, True, False],
    )
    of_weights: Tensor = gradient.reshape(D, -1)
    return of_weights
