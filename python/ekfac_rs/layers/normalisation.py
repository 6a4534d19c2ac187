"""Normalisations: maps of each channel for itself."""

from collections.abc import Iterable, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from ekfac_rs.layers.base import AffineCall, AffineLayer, Function, Units, channels_last, flat_units

_STATISTICS = ("running_mean", "running_var")


class ChannelLayer(AffineLayer):
    """A normalisation's scale and shift: a map of each channel for itself, ``gamma x + beta``."""

    noun = "a normalisation"

    @property
    def groups(self) -> int:
        return self.weight().shape[0]

    def in_words(self, coordinates: str) -> str:
        D, K = self.shape(coordinates)
        return f"channel affine, {D} of 1 x {K}"

    def as_matrix(self, stored: Tensor) -> Tensor:
        return stored.reshape(-1, 1)

    def bias(self) -> Tensor | None:
        bias = super().bias()
        return None if bias is None else bias.reshape(-1)

    def units(self, call: AffineCall) -> Units:
        plain = call.arguments | {"weight": None}
        if "bias" in plain:
            plain["bias"] = None
        with torch.no_grad():
            return Units(self.gradients(call.function(**plain)))


class ChannelNormLayer(ChannelLayer):
    """A GroupNorm or an InstanceNorm: its channels are on axis 1."""

    modules = (nn.GroupNorm, _InstanceNorm)
    functions: ClassVar[Mapping[Function, tuple[str, ...]]] = {
        F.group_norm: ("input", "num_groups", "weight", "bias", "eps"),
        F.instance_norm: (
            *("input", *_STATISTICS, "weight", "bias"),
            *("use_input_stats", "momentum", "eps"),
        ),
    }
    stored = (*AffineLayer.stored, *_STATISTICS)


class FeatureNormLayer(ChannelLayer):
    """A LayerNorm or an RMSNorm: its channels are all places of the last axes."""

    modules = (nn.LayerNorm, nn.RMSNorm)
    functions: ClassVar[Mapping[Function, tuple[str, ...]]] = {
        F.layer_norm: ("input", "normalized_shape", "weight", "bias", "eps"),
        F.rms_norm: ("input", "normalized_shape", "weight", "eps"),
    }

    def gradients(self, g: Tensor) -> Tensor:
        return flat_units(g.flatten(-self.module.weight.dim()))


class BatchNormLayer(ChannelLayer):
    """A BatchNorm that no affine layer feeds: merged, a scale and a shift of each channel.

    Its map is ``gamma / sigma x + beta - gamma mu / sigma`` (method: merged weights): a layer whose
    own weights are ones, merged with the BatchNorm that it is.
    """

    modules = (_BatchNorm, nn.SyncBatchNorm)
    functions: ClassVar[Mapping[Function, tuple[str, ...]]] = {
        F.batch_norm: (
            *("input", *_STATISTICS, "weight", "bias"),
            *("training", "momentum", "eps"),
        )
    }
    stored = (*AffineLayer.stored, *_STATISTICS)
    absorbs_scale = False

    @classmethod
    def why_refused(cls, call: AffineCall) -> str | None:
        module, arguments = call.module, call.arguments
        own = tuple(call.kept.get(name) for name in _STATISTICS)
        given = tuple(arguments.get(name) for name in _STATISTICS)
        of_batch = arguments.get("training", False)
        if of_batch != (module.training or _all_none(own)):
            expected, got = ("running", "batch") if of_batch else ("batch", "running")
            return f"expected a call with {expected} statistics in its mode, got {got} statistics"
        # Statistics of the mini-batch need no place to be kept at.
        unkept = of_batch and _all_none(given)
        if not unkept and any(g is not o for g, o in zip(given, own, strict=True)):
            return "expected a call with its own running statistics, got others"
        eps = arguments.get("eps", 1e-5)
        if eps != module.eps:
            return f"expected a call with its own eps {module.eps}, got {eps}"
        return super().why_refused(call)

    def weight(self) -> Tensor:
        return self.like.new_ones(self.module.num_features, 1)

    def bias(self) -> Tensor | None:
        return None

    def units(self, call: AffineCall) -> Units:
        return Units(channels_last(call.input))


def _all_none(values: Iterable[object]) -> bool:
    return all(value is None for value in values)
