"""Convolutions."""

from typing import Any

from ekfac_rs.errors import ShapeError
from ekfac_rs.layers.base import AffineLayer, Geometry, Units, channels_last
from ekfac_rs.layers.dataflow import AffineCall, Arguments


class ConvLayer(AffineLayer):
    """A convolution: an affine map of the patch at each output location."""

    @property
    def groups(self) -> int:
        return int(self.module.groups)

    def units(self, call: AffineCall) -> Units:
        geometry = conv_geometry(call.arguments)
        if call.input.dim() != 2 + len(geometry.kernel):
            axes = ("L", "H, W", "D, H, W")[len(geometry.kernel) - 1]
            raise ShapeError(f"expected shape [N, C, {axes}], got {tuple(call.input.shape)}")
        pointwise = (1, 1, 0, 0)
        sides = zip(geometry.kernel, geometry.stride, geometry.padding, strict=True)
        if all((k, s, *p) == pointwise for k, s, p in sides):
            return Units(channels_last(call.input))
        return Units(call.input, geometry)


def conv_geometry(arguments: Arguments) -> Geometry:
    """Geometry of a call of ``F.conv1d``, ``F.conv2d`` or ``F.conv3d``."""
    kernel = list(arguments["weight"].shape[2:])
    stride = _per_dimension(arguments.get("stride", 1), len(kernel))
    dilation = _per_dimension(arguments.get("dilation", 1), len(kernel))
    padding = arguments.get("padding", 0)
    if padding == "valid":
        padding = 0
    if padding == "same":
        # The odd zero goes behind, as torch has it.
        total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        sides = [(t // 2, t - t // 2) for t in total]
    else:
        sides = [(p, p) for p in _per_dimension(padding, len(kernel))]
    return Geometry(kernel, stride, dilation, sides)


def _per_dimension(value: Any, dimensions: int) -> list[int]:
    values = list(value) if isinstance(value, tuple | list) else [value]
    return [int(v) for v in (values * dimensions if len(values) == 1 else values)]
