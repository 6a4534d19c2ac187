"""Which BatchNorm a layer feeds."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ekfac_rs.layers.convolution import ConvLayer
from ekfac_rs.layers.dataflow import DataFlow
from ekfac_rs.layers.kinds import kind_of
from ekfac_rs.layers.linear import LinearLayer


def pair_batchnorms(watched: Mapping[nn.Module, str], flow: DataFlow) -> dict[str, str]:
    """Map each layer to the BatchNorm that is called once and alone consumes its output."""
    producer = {
        value: (name, module)
        for module, name in watched.items()
        if kind_of(module) in (LinearLayer, ConvLayer)
        for value in flow.outputs[name]
    }
    pairs: dict[str, str] = {}
    for module, name in watched.items():
        if not isinstance(module, _BatchNorm) or flow.calls(name) != 1:
            continue
        [value] = flow.inputs[name]
        layer, source = producer.get(value, (None, None))
        if layer is None or flow.consumers[value] != [name]:
            continue
        if _on_features(module, source, flow.dimensions.get(layer)):
            pairs[layer] = name
    return pairs


def _on_features(batchnorm: _BatchNorm, source: Any, dimensions: int | None) -> bool:
    """Whether the BatchNorm's axis 1 holds the source's outputs, whatever can be known of that.

    Axis 1 does so in ``[N, D]`` of a Linear and ``[N, D, ...]`` of a convolution, which have as
    many dimensions as the weight. Those of a traced value are not known: all that the BatchNorm
    accepts are possible.
    """
    possible = _accepted_dimensions(batchnorm) if dimensions is None else (dimensions,)
    return batchnorm.num_features == len(source.weight) and source.weight.dim() in possible


def _accepted_dimensions(batchnorm: _BatchNorm) -> Collection[int]:
    if isinstance(batchnorm, nn.BatchNorm2d):
        return (4,)
    if isinstance(batchnorm, nn.BatchNorm3d):
        return (5,)
    return (2, 3) if isinstance(batchnorm, nn.BatchNorm1d) else range(2, 6)
