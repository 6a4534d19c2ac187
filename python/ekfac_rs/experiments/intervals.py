"""What a few runs say about all: means with 95 % intervals, and trade-offs at equal terms."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Interval", "Outcome", "best_at", "interval", "t_quantile"]

CONFIDENCE = 0.95
# Accuracies are multiples of one image's share: rounding must not decide.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Interval:
    """A mean over runs, and what it may be off by.

    Attributes
    ----------
    mean
        Of the runs.
    half_width
        The 95 % confidence interval of the mean is ``mean - half_width`` to ``mean + half_width``,
        by Student's t distribution; NaN for a single run.
    """

    mean: float
    half_width: float


def interval(values: Sequence[float]) -> Interval:
    """Return the mean of independent runs, at least one, with its 95 % interval."""
    count, mean = len(values), float(np.mean(values))
    if count == 1:
        return Interval(mean, math.nan)
    error = float(np.std(values, ddof=1)) / math.sqrt(count)
    return Interval(mean, t_quantile(count - 1) * error)


def t_quantile(degrees: int, confidence: float = CONFIDENCE) -> float:
    """Return what Student's t stays below in absolute value with this probability.

    Parameters
    ----------
    degrees
        Of freedom, from 1 on.
    confidence
        Above 0 and below 1.

    References
    ----------
    M. Abramowitz, I. Stegun, "Handbook of Mathematical Functions", 26.7.3 and 26.7.4.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):  # To the last bit.
        middle = (low + high) / 2
        if _within_angle(middle, degrees) < confidence:
            low = middle
        else:
            high = middle
    return math.sqrt(degrees) * math.tan(low)


def _within_angle(theta: float, degrees: int) -> float:
    """Return the probability that ``|t| < sqrt(degrees) tan(theta)``."""
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = degrees % 2 == 1
    term = cosine if odd else 1.0
    total = 0.0
    # Powers of the cosine from 1 (odd) or 0 (even) up to degrees - 2.
    for power in range(odd, degrees - 1, 2):
        total += term
        term *= cosine**2 * (power + 1) / (power + 2)
    return 2 / math.pi * (theta + sine * total) if odd else sine * total


@dataclass(frozen=True)
class Outcome:
    """What a setting made of two aims: one value of each for each run."""

    target: Sequence[float]
    source: Sequence[float]


def best_at(level: float, outcomes: Sequence[Outcome]) -> Interval | None:
    """Return the best source accuracy among settings that reach a target accuracy.

    Over all levels this is the upper right boundary of the settings' means, a staircase that
    falls to the right: what a method keeps of the source at equal target accuracy.

    Parameters
    ----------
    level
        That the mean target accuracy of a setting has to reach.
    outcomes
        One for each setting.

    Returns
    -------
    Interval or None
        Of the best setting's runs; None where no setting reaches the level.
    """
    reaching = [
        interval(outcome.source)
        for outcome in outcomes
        if float(np.mean(outcome.target)) >= level - _ROUNDING
    ]
    return max(reaching, key=lambda reached: reached.mean, default=None)
