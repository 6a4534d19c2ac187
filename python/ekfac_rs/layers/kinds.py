"""The table of kinds: which class of layer a module's parameters make up."""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from ekfac_rs.layers.base import AffineLayer
from ekfac_rs.layers.convolution import ConvLayer
from ekfac_rs.layers.linear import LinearLayer
from ekfac_rs.layers.normalisation import BatchNormLayer, ChannelLayer

_KINDS: tuple[tuple[type[nn.Module] | tuple[type[nn.Module], ...], type[AffineLayer]], ...] = (
    (nn.Linear, LinearLayer),
    ((nn.Conv1d, nn.Conv2d, nn.Conv3d), ConvLayer),
    ((nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _InstanceNorm), ChannelLayer),
    (_BatchNorm, BatchNormLayer),
)


def kind_of(module: nn.Module) -> type[AffineLayer] | None:
    """Class of layer that a module's parameters make up, or None."""
    return next((layer for types, layer in _KINDS if isinstance(module, types)), None)
