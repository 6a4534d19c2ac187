"""Linear layers."""

from torch import Tensor

from ekfac_rs.errors import UnsupportedLayerError
from ekfac_rs.layers.base import AffineLayer, Units, flat_units
from ekfac_rs.layers.dataflow import AffineCall


class LinearLayer(AffineLayer):
    """A Linear, applied along the last axis."""

    def units(self, call: AffineCall) -> Units:
        return Units(flat_units(call.input))

    def gradients(self, g: Tensor) -> Tensor:
        return flat_units(g)

    def check_batchnorm_input(self, x: Tensor) -> None:
        if x.dim() != 2:
            raise UnsupportedLayerError(
                f"layer {self.batchnorm_name!r}: expected the BatchNorm after {self.name!r} to see "
                f"a matrix [N, D], got shape {tuple(x.shape)}, whose axis 1 is not the features"
            )
