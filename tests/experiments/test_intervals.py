"""Intervals against known values; what is best at equal terms, by its properties."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ekfac_rs.experiments.intervals import Interval, Outcome, best_at, interval, t_quantile

# Of a table of Student's t, two-sided 95 %.
KNOWN = {
    1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 9: 2.2622, 10: 2.2281, 29: 2.0452,
    30: 2.0423, 120: 1.9799, 1000: 1.9623,
}  # fmt: skip


@pytest.mark.parametrize("degrees", KNOWN)
def test_quantiles_of_students_t_are_those_of_the_tables(degrees):
    assert t_quantile(degrees) == pytest.approx(KNOWN[degrees], abs=5.1e-5)


@pytest.mark.parametrize(
    ("degrees", "confidence", "known"),
    [(1, 0.5, 1.0), (2, 0.5, math.sqrt(2 / 3)), (3, 0.99, 5.8409), (10, 0.9, 1.8125)],
)
def test_other_confidences_are_known_too(degrees, confidence, known):
    assert t_quantile(degrees, confidence) == pytest.approx(known, abs=5e-5)


def test_an_interval_by_hand():
    # Mean 2, standard deviation 1, standard error 1 / sqrt(3).
    found = interval([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.half_width == pytest.approx(4.3027 / math.sqrt(3), abs=1e-4)


def test_a_single_run_has_no_interval_and_equal_ones_none_of_any_width():
    assert interval([0.7]).mean == 0.7
    assert math.isnan(interval([0.7]).half_width)
    assert interval([0.5, 0.5, 0.5]) == Interval(0.5, 0.0)


def test_nineteen_intervals_in_twenty_hold_the_true_mean():
    values = np.random.default_rng(0).normal(3.0, 2.0, (4000, 3))
    found = [interval(row) for row in values]
    share = np.mean([abs(each.mean - 3.0) <= each.half_width for each in found])
    assert share == pytest.approx(0.95, abs=0.01)


# What is best at equal terms

accuracies = st.floats(0.0, 1.0)
runs = st.integers(1, 3).flatmap(
    lambda count: st.tuples(*[st.lists(accuracies, min_size=count, max_size=count)] * 2)
)
settings_of_a_method = st.lists(runs.map(lambda pair: Outcome(*pair)), min_size=1, max_size=6)


def mean_at(level, outcomes):
    found = best_at(level, outcomes)
    return -math.inf if found is None else found.mean


@given(settings_of_a_method, accuracies, accuracies)
def test_asking_for_more_of_the_target_never_leaves_more_of_the_source(outcomes, one, other):
    low, high = sorted((one, other))
    assert mean_at(low, outcomes) >= mean_at(high, outcomes)


@given(settings_of_a_method, accuracies, runs)
def test_another_setting_never_makes_it_worse_and_their_order_does_not_matter(
    outcomes, level, more
):
    assert mean_at(level, [*outcomes, Outcome(*more)]) >= mean_at(level, outcomes)
    assert mean_at(level, outcomes[::-1]) == mean_at(level, outcomes)


@given(settings_of_a_method, accuracies)
def test_it_is_the_interval_of_a_setting_that_reaches_the_level(outcomes, level):
    found = best_at(level, outcomes)
    means = [float(np.mean(outcome.target)) for outcome in outcomes]
    if found is None:
        assert max(means) < level
    else:
        reaching = [o for o, mean in zip(outcomes, means, strict=True) if mean >= level - 1e-9]
        assert found.mean in [interval(outcome.source).mean for outcome in reaching]
        assert all(interval(outcome.source).mean <= found.mean for outcome in reaching)


@given(settings_of_a_method)
def test_every_setting_is_on_or_below_its_methods_staircase(outcomes):
    for outcome in outcomes:
        level = float(np.mean(outcome.target))
        assert mean_at(level, outcomes) >= interval(outcome.source).mean


def test_a_setting_reaches_its_own_level_whatever_the_rounding():
    target = [0.1, 0.2, 0.3]
    assert best_at(0.2, [Outcome(target, [0.5] * 3)]) == Interval(0.5, 0.0)
    assert best_at(0.201, [Outcome(target, [0.5] * 3)]) is None
    assert best_at(0.2, []) is None
