"""The layers of a model: one class for each kind, which owns everything about its kind."""

from ekfac_rs.layers.base import COORDINATES, AffineLayer, Units
from ekfac_rs.layers.finding import (
    bind_layers,
    find_layers,
    find_output_layer,
    require_finite_parameters,
    require_names,
    survey_layers,
    uncovered_parameters,
    why_unsupported,
)
from ekfac_rs.layers.kinds import kind_of

__all__ = [
    "COORDINATES",
    "AffineLayer",
    "Units",
    "bind_layers",
    "find_layers",
    "find_output_layer",
    "kind_of",
    "require_finite_parameters",
    "require_names",
    "survey_layers",
    "uncovered_parameters",
    "why_unsupported",
]
