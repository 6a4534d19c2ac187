"""Learning tasks one after another under a penalty."""

from ekfac_rs.learning.learner import ContinualLearner

__all__ = ["ContinualLearner"]
