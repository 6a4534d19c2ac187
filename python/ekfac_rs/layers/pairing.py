"""Which BatchNorm a layer feeds."""

from collections.abc import Collection, Mapping

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ekfac_rs.layers.base import AffineLayer, kind_of
from ekfac_rs.layers.dataflow import DataFlow


def pair_batchnorms(watched: Mapping[nn.Module, str], flow: DataFlow) -> dict[str, str]:
    """Map each layer to the BatchNorm that is called once and alone consumes its output."""
    layers = [kind(name, m) for m, name in watched.items() if (kind := kind_of(m)) is not None]
    producer = {value: layer for layer in layers for value in flow.outputs[layer.name]}
    pairs: dict[str, str] = {}
    for module, name in watched.items():
        if not isinstance(module, _BatchNorm) or flow.calls(name) != 1:
            continue
        [value] = flow.inputs[name]
        layer = producer.get(value)
        if layer is None or flow.consumers[value] != [name]:
            continue
        if _on_channels(module, layer, flow.dimensions.get(layer.name)):
            pairs[layer.name] = name
    return pairs


def _on_channels(batchnorm: _BatchNorm, layer: AffineLayer, dimensions: int | None) -> bool:
    """Whether the BatchNorm's axis 1 holds the layer's outputs, whatever can be known of that.

    The dimensions of a traced value are not known: all that the BatchNorm accepts are possible.
    """
    possible = _accepted_dimensions(batchnorm) if dimensions is None else (dimensions,)
    on_axis = any(layer.channel_axis(number) == 1 for number in possible)
    return on_axis and batchnorm.num_features == layer.weight().shape[0]


def _accepted_dimensions(batchnorm: _BatchNorm) -> Collection[int]:
    if isinstance(batchnorm, nn.BatchNorm2d):
        return (4,)
    if isinstance(batchnorm, nn.BatchNorm3d):
        return (5,)
    return (2, 3) if isinstance(batchnorm, nn.BatchNorm1d) else range(2, 6)
