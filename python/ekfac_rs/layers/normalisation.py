"""Normalisations: maps of each channel for itself."""

import torch
from torch import Tensor

from ekfac_rs.layers.base import AffineLayer, Units, channels_last, flat_units
from ekfac_rs.layers.dataflow import AffineCall


class ChannelLayer(AffineLayer):
    """A normalisation's scale and shift: a map of each channel for itself, ``gamma x + beta``."""

    @property
    def groups(self) -> int:
        return self.weight().shape[0]

    def weight(self) -> Tensor:
        weight: Tensor = self.module.weight
        return weight.reshape(-1, 1)

    def bias(self) -> Tensor | None:
        bias = super().bias()
        return None if bias is None else bias.reshape(-1)

    def units(self, call: AffineCall) -> Units:
        plain = call.arguments | {"weight": None}
        if "bias" in plain:
            plain["bias"] = None
        with torch.no_grad():
            return Units(self.gradients(call.function(**plain)))

    def gradients(self, g: Tensor) -> Tensor:
        shape = getattr(self.module, "normalized_shape", None)
        if shape is None:
            return channels_last(g)
        return flat_units(g.flatten(-len(shape)))


class BatchNormLayer(ChannelLayer):
    """A BatchNorm that no affine layer feeds: merged, a scale and a shift of each channel.

    Its map is ``gamma / sigma x + beta - gamma mu / sigma`` (method: section 3): a layer whose
    own weights are ones, merged with the BatchNorm that it is.
    """

    @property
    def absorbs_scale(self) -> bool:
        return False

    def weight(self) -> Tensor:
        return self.like.new_ones(self.module.num_features, 1)

    def bias(self) -> Tensor | None:
        return None

    def units(self, call: AffineCall) -> Units:
        return Units(channels_last(call.input))
