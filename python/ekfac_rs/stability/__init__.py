"""Stability of training steps on a penalty: where explicit ones diverge, and one that does not."""

from ekfac_rs.stability.eigenvalue import Hessian, top_eigenvalue_of_parameters
from ekfac_rs.stability.step import StableStep, StableSteps, next_look
from ekfac_rs.stability.together import StabilityWarning, Together, reach_of
from ekfac_rs.stability.view import Situation, View

__all__ = [
    "Hessian",
    "Situation",
    "StabilityWarning",
    "StableStep",
    "StableSteps",
    "Together",
    "View",
    "next_look",
    "reach_of",
    "top_eigenvalue_of_parameters",
]
