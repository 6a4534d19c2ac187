"""How well a stream of tasks was learnt: average accuracy, forgetting, backward transfer.

All of it is computed from the accuracy matrix ``R``: ``R[i, j]`` is the accuracy on task ``j``'s
test set after learning tasks ``0 .. i`` (D. Lopez-Paz, M. Ranzato, "Gradient Episodic Memory for
Continual Learning", NeurIPS 2017, section 3; A. Chaudhry et al., "Riemannian Walk for
Incremental Learning", ECCV 2018, section 5).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ekfac_rs.errors import NonFiniteError, OptionError, ShapeError

__all__ = [
    "AccuracyMatrix",
    "average_accuracy",
    "backward_transfer",
    "forgetting",
]


@dataclass(frozen=True, eq=False)
class AccuracyMatrix:
    """Accuracies on every task after every task.

    Attributes
    ----------
    values
        ``float64 [tasks learnt, tasks]``: row ``i`` after task ``i``, column ``j`` on task ``j``,
        fractions from 0 to 1, NaN where not evaluated. At least as many columns as rows.

    Raises
    ------
    ShapeError
        If `values` is empty, not two-dimensional or has more rows than columns.
    OptionError
        If an entry lies outside 0 to 1.
    NonFiniteError
        If a task was not evaluated (NaN) after a task from its own one on.
    """

    values: npt.NDArray[np.float64]

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", _checked(self.values))

    @classmethod
    def from_rows(cls, rows: Sequence[Sequence[float]]) -> "AccuracyMatrix":
        """Build the matrix from one list per learnt task.

        Shorter rows are filled up with NaN: row ``i`` may stop after task ``i``.

        Raises
        ------
        ShapeError
            If there are no rows.
        """
        width = max((len(row) for row in rows), default=0)
        values = np.full((len(rows), width), np.nan)
        for row, filled in zip(rows, values, strict=True):
            filled[: len(row)] = row
        return cls(values)

    @property
    def tasks(self) -> int:
        """Number of tasks learnt (rows)."""
        return len(self.values)

    def average(self) -> float:
        """Return the mean accuracy over the learnt tasks after the last one."""
        return average_accuracy(self.values)

    def average_curve(self) -> npt.NDArray[np.float64]:
        """Return the mean accuracy over the tasks seen so far, after each task, ``[tasks]``."""
        return np.array([average_accuracy(self.values[: i + 1]) for i in range(self.tasks)])

    def forgetting(self) -> float:
        """Return the mean drop from the best earlier accuracy, see :func:`forgetting`."""
        return forgetting(self.values)

    def backward_transfer(self) -> float:
        """Return the mean change since each task was learnt, see :func:`backward_transfer`."""
        return backward_transfer(self.values)

    def task_curve(self, task: int) -> npt.NDArray[np.float64]:
        """Return the accuracy on `task` after each task from `task` on, ``[tasks - task]``.

        Raises
        ------
        OptionError
            If `task` is not among the learnt ones.
        """
        if not 0 <= task < self.tasks:
            raise OptionError(f"task: expected 0 to {self.tasks - 1}, got {task}")
        return self.values[task:, task].copy()


def average_accuracy(matrix: npt.ArrayLike) -> float:
    """Return the mean accuracy over the learnt tasks after the last one.

    ``1/T sum_{j < T} R[T-1, j]`` with ``T`` rows; Lopez-Paz & Ranzato 2017, equation 2.

    Parameters
    ----------
    matrix
        ``[T, at least T]``, see :class:`AccuracyMatrix`.

    Raises
    ------
    ShapeError, OptionError, NonFiniteError
        If `matrix` is no accuracy matrix, see :class:`AccuracyMatrix`.
    """
    values = _checked(matrix)
    return float(values[-1, : len(values)].mean())


def forgetting(matrix: npt.ArrayLike) -> float:
    """Return how far the earlier tasks fell below the best they had been, on average.

    ``1/(T-1) sum_{j < T-1} (max_{j <= i < T-1} R[i, j] - R[T-1, j])``; Chaudhry et al. 2018,
    section 5, where the maximum starts at the task's own row because earlier rows need not be
    evaluated. Negative if the last task improved the earlier ones.

    Parameters
    ----------
    matrix
        ``[T, at least T]``, see :class:`AccuracyMatrix`.

    Returns
    -------
    float
        A difference of fractions, -1 to 1; NaN for a single task.

    Raises
    ------
    ShapeError, OptionError, NonFiniteError
        If `matrix` is no accuracy matrix, see :class:`AccuracyMatrix`.
    """
    values, last = _with_earlier_tasks(matrix)
    return _mean([values[j:last, j].max() - values[last, j] for j in range(last)])


def backward_transfer(matrix: npt.ArrayLike) -> float:
    """Return how the accuracy on earlier tasks changed since each was learnt, on average.

    ``1/(T-1) sum_{j < T-1} (R[T-1, j] - R[j, j])``; Lopez-Paz & Ranzato 2017, equation 3.
    Negative where tasks were forgotten.

    Parameters
    ----------
    matrix
        ``[T, at least T]``, see :class:`AccuracyMatrix`.

    Returns
    -------
    float
        A difference of fractions, -1 to 1; NaN for a single task.

    Raises
    ------
    ShapeError, OptionError, NonFiniteError
        If `matrix` is no accuracy matrix, see :class:`AccuracyMatrix`.
    """
    values, last = _with_earlier_tasks(matrix)
    return _mean(values[last, :last] - values.diagonal()[:last])


def _with_earlier_tasks(matrix: npt.ArrayLike) -> tuple[npt.NDArray[np.float64], int]:
    """Return the checked matrix and the number of tasks before the last."""
    values = _checked(matrix)
    return values, len(values) - 1


def _mean(changes: Sequence[float] | npt.NDArray[np.float64]) -> float:
    """Return the mean, or NaN where there was no earlier task."""
    return float(np.mean(changes)) if len(changes) else float("nan")


def _checked(matrix: npt.ArrayLike) -> npt.NDArray[np.float64]:
    values = np.array(matrix, dtype=np.float64)
    if values.ndim != 2 or len(values) == 0 or values.shape[1] < len(values):
        raise ShapeError(
            "accuracy matrix: expected [tasks learnt, tasks] with at least one row and at least "
            f"as many columns, got {list(values.shape)}"
        )
    evaluated = values[~np.isnan(values)]
    if np.any((evaluated < 0) | (evaluated > 1)):
        raise OptionError("accuracy matrix: accuracies must lie between 0 and 1")
    rows, columns = np.tril_indices(len(values))
    missing = np.isnan(values[rows, columns])
    if missing.any():
        row, column = rows[missing][0], columns[missing][0]
        raise NonFiniteError(
            f"accuracy matrix: task {column} was not evaluated (NaN) after task {row}"
        )
    values.setflags(write=False)
    return values
