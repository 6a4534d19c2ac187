"""Linear layers."""

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from ekfac_rs.errors import UnsupportedLayerError
from ekfac_rs.layers.base import AffineCall, AffineLayer, Function, Units, flat_units


class LinearLayer(AffineLayer):
    """A Linear, applied along the last axis."""

    noun = "a Linear"
    modules = (nn.Linear,)
    functions: ClassVar[Mapping[Function, tuple[str, ...]]] = {
        F.linear: ("input", "weight", "bias")
    }

    def channel_axis(self, dimensions: int) -> int | None:
        return dimensions - 1

    def units(self, call: AffineCall) -> Units:
        return Units(flat_units(call.input))

    def gradients(self, g: Tensor) -> Tensor:
        return flat_units(g)

    def squared_gradients(self, units: Units, g: Tensor) -> Tensor:
        if g.dim() > 2:
            return super().squared_gradients(units, g)
        return g.square().T @ units.values.square()

    def check_batchnorm_input(self, x: Tensor) -> None:
        if x.dim() != 2:
            raise UnsupportedLayerError(
                f"layer {self.batchnorm_name!r}: expected the BatchNorm after {self.name!r} to see "
                f"a matrix [N, D], got shape {tuple(x.shape)}, whose axis 1 is not the features"
            )
