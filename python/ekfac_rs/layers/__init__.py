"""The layers of a model: one class for each kind, which owns everything about its kind."""

from ekfac_rs.layers.base import COORDINATES, AffineLayer, Geometry, Units
from ekfac_rs.layers.convolution import ConvLayer
from ekfac_rs.layers.finding import (
    bind_layers,
    find_layers,
    survey_layers,
    uncovered_parameters,
    why_unsupported,
)
from ekfac_rs.layers.kinds import kind_of
from ekfac_rs.layers.linear import LinearLayer
from ekfac_rs.layers.normalisation import BatchNormLayer, ChannelLayer

__all__ = [
    "COORDINATES",
    "AffineLayer",
    "BatchNormLayer",
    "ChannelLayer",
    "ConvLayer",
    "Geometry",
    "LinearLayer",
    "Units",
    "bind_layers",
    "find_layers",
    "kind_of",
    "survey_layers",
    "uncovered_parameters",
    "why_unsupported",
]
