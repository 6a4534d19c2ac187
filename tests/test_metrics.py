"""Accuracy matrix: values by hand, and what holds for every matrix."""

import math

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra.numpy import arrays

from ekfac_rs.errors import EkfacError, NonFiniteError, OptionError, ShapeError
from ekfac_rs.metrics import AccuracyMatrix, average_accuracy, backward_transfer, forgetting

ROWS = [[0.9], [0.7, 0.8], [0.8, 0.5, 1.0]]


def square_matrices(least=2):
    return st.integers(least, 6).flatmap(
        lambda tasks: arrays(np.float64, (tasks, tasks), elements=st.floats(0, 1))
    )


def test_measures_of_a_three_task_stream_by_hand():
    matrix = AccuracyMatrix.from_rows(ROWS)
    assert matrix.average() == pytest.approx((0.8 + 0.5 + 1.0) / 3)
    np.testing.assert_allclose(matrix.average_curve(), [0.9, 0.75, 2.3 / 3])
    # Task 1 was best (0.9) at first, task 2 only ever measured at 0.8 before the last task.
    assert matrix.forgetting() == pytest.approx(((0.9 - 0.8) + (0.8 - 0.5)) / 2)
    assert matrix.backward_transfer() == pytest.approx(((0.8 - 0.9) + (0.5 - 0.8)) / 2)
    np.testing.assert_array_equal(matrix.task_curve(0), [0.9, 0.7, 0.8])
    np.testing.assert_array_equal(matrix.task_curve(2), [1.0])


def test_forgetting_counts_from_the_best_and_backward_transfer_from_the_first():
    rows = [[0.5], [0.9, 0.6], [0.7, 0.6, 0.6]]
    assert forgetting(AccuracyMatrix.from_rows(rows).values) == pytest.approx((0.2 + 0.0) / 2)
    assert backward_transfer(AccuracyMatrix.from_rows(rows).values) == pytest.approx(0.2 / 2)


def test_a_single_task_has_an_average_and_no_forgetting():
    matrix = AccuracyMatrix.from_rows([[0.4]])
    assert matrix.average() == 0.4
    assert math.isnan(matrix.forgetting())
    assert math.isnan(matrix.backward_transfer())


def test_tasks_not_yet_learnt_count_for_nothing():
    evaluated_ahead = [[0.9, 0.1, 0.1, 0.3], [0.7, 0.8, 0.2, 0.3], [0.8, 0.5, 1.0, 0.3]]
    ahead, plain = AccuracyMatrix.from_rows(evaluated_ahead), AccuracyMatrix.from_rows(ROWS)
    assert ahead.average() == plain.average()
    assert ahead.forgetting() == plain.forgetting()
    assert ahead.backward_transfer() == plain.backward_transfer()
    np.testing.assert_array_equal(ahead.average_curve(), plain.average_curve())


@given(square_matrices())
def test_measures_stay_within_their_ranges(values):
    matrix = AccuracyMatrix(values)
    assert -1e-12 <= matrix.average() <= 1 + 1e-12
    assert -1 - 1e-12 <= matrix.backward_transfer() <= 1 + 1e-12
    assert -1 - 1e-12 <= matrix.forgetting() <= 1 + 1e-12


@given(square_matrices())
def test_forgetting_is_at_least_the_negated_backward_transfer(values):
    assert forgetting(values) >= -backward_transfer(values) - 1e-12


@given(square_matrices(), st.floats(0.1, 1))
def test_measures_are_linear_in_the_accuracies(values, factor):
    for measure in (average_accuracy, forgetting, backward_transfer):
        assert measure(factor * values) == pytest.approx(factor * measure(values), abs=1e-12)


@given(square_matrices(least=1))
def test_entries_above_the_diagonal_are_never_read(values):
    blanked = np.where(np.tri(len(values), dtype=bool), values, np.nan)
    for measure in (average_accuracy, forgetting, backward_transfer):
        np.testing.assert_equal(measure(blanked), measure(values))


def test_the_matrix_cannot_be_changed_through_its_source_or_its_curves():
    source = np.array([[0.5, 0.0], [0.4, 0.6]])
    matrix = AccuracyMatrix(source)
    source[:] = 0.0
    matrix.task_curve(0)[:] = 0.0
    assert matrix.average() == 0.5
    with pytest.raises(ValueError, match="read-only"):
        matrix.values[0, 0] = 1.0


@pytest.mark.parametrize(
    ("rows", "error", "named"),
    [
        ([], ShapeError, r"\[0, 0\]"),
        ([[0.5], [0.5]], ShapeError, r"\[2, 1\]"),
        ([[1.5]], OptionError, "between 0 and 1"),
        ([[-0.1]], OptionError, "between 0 and 1"),
        ([[0.5], [math.nan, 0.5]], NonFiniteError, "task 0 .* after task 1"),
        ([[0.5], [0.5], [0.5, 0.5, 0.5]], NonFiniteError, "task 1 .* after task 1"),
    ],
    ids=["empty", "too narrow", "above 1", "below 0", "nan", "short row"],
)
def test_what_is_no_accuracy_matrix_is_refused(rows, error, named):
    with pytest.raises(error, match=named) as caught:
        AccuracyMatrix.from_rows(rows)
    assert isinstance(caught.value, EkfacError)


@pytest.mark.parametrize("task", [-1, 3])
def test_the_curve_of_an_unknown_task_is_refused(task):
    with pytest.raises(OptionError, match=f"task: .* got {task}"):
        AccuracyMatrix.from_rows(ROWS).task_curve(task)
