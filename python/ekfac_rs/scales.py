"""How strong a task's penalty is: rules that choose its scale without data of earlier tasks.

A rule knows what a learner knows while it trains: the new task's loss, and how much the curvatures
predict the earlier tasks' losses to have grown. `ContinualLearner` takes a rule, or the name of one
of these with its defaults, as ``scale=``, and tells what a rule did in ``learner.selection``.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ekfac_rs._checks import require_choice, require_count, require_nonnegative
from ekfac_rs._pictures import in_lines, new_figure
from ekfac_rs.errors import OptionError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Adaptive", "Budget", "Control", "Fixed", "Halving", "ScaleRule", "Selection", "rule_of"]


class Control:
    """A scale over the steps of one task; this one stays as it is.

    Parameters
    ----------
    scale : float

    Attributes
    ----------
    scale : float
        For the next step.
    budget : float or None
        What the predicted increase is steered to, per earlier task.
    """

    budget: float | None = None

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def update(self, loss: float, increase: float) -> None:
        """Take note of a step.

        Parameters
        ----------
        loss : float
            Of the new task's mini-batch: as the likelihood reduces it, a mean by default.
        increase : float
            Predicted for the **sum** of the earlier tasks' mean losses
            (`QuadraticPenalty.predicted_increase`).
        """

    def state_dict(self) -> dict[str, Any]:
        """Return its attributes but for the rule, for a checkpoint: numbers, lists, tensors."""
        return {k: value for k, value in vars(self).items() if not isinstance(value, ScaleRule)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        vars(self).update(state)


class _BoundedControl(Control):
    """A scale whose logarithm moves, as far from 0 as that of a bound."""

    def __init__(self, scale: float, bound: float) -> None:
        super().__init__(scale)
        self._log_scale, self._log_bound = math.log(scale), math.log(bound)

    def move(self, by: float) -> None:
        self._log_scale = min(max(self._log_scale + by, -self._log_bound), self._log_bound)
        self.scale = math.exp(self._log_scale)


class ScaleRule(ABC):
    """Chooses the scale of every task's penalty."""

    @abstractmethod
    def first_scale(self) -> float:
        """Return the scale that it begins with."""

    def control(
        self, losses: Sequence[float | None], steps: int, before: "Selection | None" = None
    ) -> Control:
        """Begin a task; by default with a scale that stays.

        Parameters
        ----------
        losses : sequence of float or None
            Of each earlier task, at least one: its mean loss when it was consolidated; None where
            it has no curvature.
        steps : int
            That the task takes.
        before : Selection, optional
            What the rule did in the task before, where it was this rule.

        Returns
        -------
        Control

        Raises
        ------
        OptionError
            The rule needs to know losses that are not there, or can do nothing with them.
        """
        return Control(self.first_scale())


@dataclass(frozen=True)
class Fixed(ScaleRule):
    """One scale throughout: a number as ``scale=``, or ``"counting"`` for 1.

    With scale 1 the tasks' losses are equally important: the sum of the earlier tasks' quadratic
    forms beside the new task's loss. The paper's rule by counting, importance T/(T+1) for the mean
    over T tasks and 1/(T+1) for the new one, is the same up to a factor at the learning rate.

    Attributes
    ----------
    scale : float

    Raises
    ------
    OptionError
        It is negative or not finite.
    """

    scale: float

    def __post_init__(self) -> None:
        require_nonnegative("scale", self.scale)

    def first_scale(self) -> float:
        """Return this scale."""
        return float(self.scale)


@dataclass(frozen=True)
class Adaptive(ScaleRule):
    """The paper's idea: weighted losses of old and new tasks "converge to similar values".

    The formula is not in the paper's text; this is a dual ascent. ``log scale`` moves by
    ``rate / steps * (L_s - L_t) / (|L_s| + |L_t|)`` after each step, with ``L_s = scale *
    predicted increase`` and ``L_t`` the new task's loss: the larger one gets more weight. Where
    ``L_t`` stays large, as in short runs, that weakens the penalty.

    Attributes
    ----------
    bound : float
        The scale stays between 1 / bound and bound.
    rate : float
        How far ``log scale`` can move in a task, times ``log bound``.

    Raises
    ------
    OptionError
        ``bound`` is below 1, or ``rate`` negative, or one not finite.

    References
    ----------
    Lee, Hong, Joo, Kim, CVPR 2020 (the aim).
    """

    bound: float = 30.0
    rate: float = 4.0

    def __post_init__(self) -> None:
        _require_bound(self.bound)
        require_nonnegative("rate", self.rate)

    def control(
        self, losses: Sequence[float | None], steps: int, before: "Selection | None" = None
    ) -> Control:
        """Begin a task with scale 1."""
        return _AdaptiveControl(self, steps)

    def first_scale(self) -> float:
        """Return 1."""
        return 1.0


class _AdaptiveControl(_BoundedControl):
    def __init__(self, rule: Adaptive, steps: int) -> None:
        super().__init__(rule.first_scale(), rule.bound)
        self._step = rule.rate / steps * math.log(rule.bound)

    def update(self, loss: float, increase: float) -> None:
        old, new = self.scale * increase, loss
        # A log-likelihood of densities may be negative; no step is ever larger than the rate's.
        apart = abs(old) + abs(new)
        if apart > 0.0:
            self.move(self._step * (old - new) / apart)


@dataclass(frozen=True)
class Budget(ScaleRule):
    """Ours: as weak as a budget for the earlier tasks allows.

    The new task may add ``share`` to the sum of the earlier tasks' losses, each as it was when the
    task was consolidated. (Where that sum is 0 there is no budget, and the scale stays.) What is
    predicted (`QuadraticPenalty.predicted_increase`) is steered to that by dual ascent within the
    run, no restarts: ``log scale`` moves by ``rate / steps`` times the logarithm of what is
    predicted over what is allowed, held between -1 and 1.

    A task begins by moving far and comes back while its learning rate falls. So the first
    ``settle`` of the steps count for nothing, and what is allowed falls to the budget from three
    times that, as ``1 + 2 (1 - x)**2`` where x is the share of the steps that is done. The first
    task under a penalty begins with ``start``, every other with the scale that the one before
    ended with.

    Attributes
    ----------
    share : float
        The budget, of the earlier tasks' losses.
    start : float
    bound : float
        The scale stays between 1 / bound and bound.
    rate : float
        How far ``log scale`` can move in a task.
    settle : float
        From 0 to 1.

    Raises
    ------
    OptionError
        ``share`` or ``start`` is not above 0, ``rate`` or ``settle`` negative, ``settle`` above 1,
        ``bound`` below 1, or one not finite.
    """

    share: float = 0.04
    start: float = 3.0
    bound: float = 1000.0
    rate: float = 3.0
    settle: float = 0.3

    def __post_init__(self) -> None:
        for name in ("share", "start"):
            _require_positive(name, getattr(self, name))
        require_nonnegative("rate", self.rate)
        require_nonnegative("settle", self.settle)
        if self.settle > 1.0:
            raise OptionError(f"settle: expected a share of the steps, up to 1, got {self.settle}")
        _require_bound(self.bound)

    def control(
        self, losses: Sequence[float | None], steps: int, before: "Selection | None" = None
    ) -> Control:
        """Begin a task with the scale that the one before ended with."""
        scale = before.scale[-1] if before is not None and before.scale else self.first_scale()
        known = [loss for loss in losses if loss is not None]
        if len(known) < len(losses):
            raise OptionError(
                f"scale: expected the losses of all earlier tasks for {self!r}, got those of "
                f"{len(known)} of {len(losses)}: a state of an older version kept none (fill in "
                "learner.losses), and a task without a curvature has none"
            )
        if sum(known) < 0.0:
            raise OptionError(
                f"scale: expected losses that add up to at least 0 for {self!r}, whose budget is a "
                f"share of them, got {sum(known):g}"
            )
        return _BudgetControl(self, self.share * sum(known), len(losses), steps, scale)

    def first_scale(self) -> float:
        """Return ``start``."""
        return float(self.start)


class _BudgetControl(_BoundedControl):
    def __init__(self, rule: Budget, allowed: float, tasks: int, steps: int, scale: float) -> None:
        super().__init__(scale, rule.bound)
        self.budget = allowed / tasks
        self._rule, self._allowed, self._steps, self._done = rule, allowed, steps, 0

    def update(self, loss: float, increase: float) -> None:
        self._done += 1
        rule, share = self._rule, self._done / self._steps
        allowed = self._allowed * (1.0 + 2.0 * max(1.0 - share, 0.0) ** 2)
        if share < rule.settle or increase <= 0.0 or allowed <= 0.0:
            return
        over = min(max(math.log(increase / allowed), -1.0), 1.0)
        self.move(rule.rate / self._steps * over)


@dataclass(frozen=True)
class Halving(ScaleRule):
    """Begin strong, and halve until the new task is learnt nearly as well as without a penalty.

    A baseline: `ContinualLearner.fit` learns the task once without penalty, for reference, and then
    anew from where it began with ``start``, half of it and so on, until the accuracy comes within
    ``tolerance`` of the reference's. That takes several times as long as one run.

    Attributes
    ----------
    start : float
    tolerance : float
        Share of the reference's accuracy that may be missing (of minus the loss, where there are no
        classes).
    tries : int
        At most so many; the last one counts in any case.

    Raises
    ------
    OptionError
        ``start`` is not above 0, ``tolerance`` negative, ``tries`` below 1, or one not finite.

    References
    ----------
    De Lange et al., "A continual learning survey", TPAMI 2021 (stability decay).
    Masana et al., "Class-incremental learning: survey", TPAMI 2022 (FACIL).
    """

    start: float = 100.0
    tolerance: float = 0.02
    tries: int = 10

    def __post_init__(self) -> None:
        _require_positive("start", self.start)
        require_nonnegative("tolerance", self.tolerance)
        require_count("tries", self.tries)

    def first_scale(self) -> float:
        """Return ``start``."""
        return float(self.start)

    def is_enough(self, reached: float, reference: float) -> bool:
        """Whether an accuracy, or minus a loss, is within tolerance of the reference's."""
        return reached >= reference - self.tolerance * abs(reference)


@dataclass
class Selection:
    """What a rule did in one task, step by step.

    Attributes
    ----------
    rule : str
        In words.
    tasks : int
        Earlier ones.
    scale, loss, increase : list of float
        At each step: the penalty's scale, the new task's loss on the mini-batch, and the predicted
        increase of the earlier tasks' mean losses, a mean over these tasks.
    budget : float or None
        What ``increase`` was steered to.
    tries : list of (float, float or None)
        Of `Halving`: scales and what they reached, None where training diverged; the first is the
        reference, without penalty.
    """

    rule: str
    tasks: int
    budget: float | None = None
    scale: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    increase: list[float] = field(default_factory=list)
    tries: list[tuple[float, float | None]] = field(default_factory=list)

    def clear_steps(self) -> None:
        """Forget the steps, to begin again."""
        self.scale, self.loss, self.increase = [], [], []

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers, in JSON's own types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Return what `as_dict` was called on."""
        return cls(**{**values, "tries": [tuple(pair) for pair in values["tries"]]})

    def plot(self, path: str | Path) -> None:
        """Draw budget, predicted increase, loss and scale over the steps.

        Parameters
        ----------
        path : str or Path
            Of the picture; its suffix tells the format.

        Raises
        ------
        MissingPackageError
            matplotlib is not there: ``pip install 'ekfac-rs[experiments]'``.
        """
        self.figure().savefig(path)

    def figure(self) -> "Figure":
        """Return the picture of `plot`, to draw on or to write elsewhere.

        Returns
        -------
        matplotlib.figure.Figure

        Raises
        ------
        MissingPackageError
            matplotlib is not there: ``pip install 'ekfac-rs[experiments]'``.
        """
        figure = new_figure(7.0, 5.0)
        losses, scales = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
        steps = range(1, len(self.scale) + 1)
        losses.set_title(in_lines(f"{self.rule}; earlier tasks: {self.tasks}", 64), fontsize=10)
        losses.plot(steps, self.loss, color="0.8", label="new task's loss")
        losses.plot(steps, self.increase, label="predicted increase per earlier task")
        if self.budget is not None:
            losses.axhline(self.budget, linestyle="--", color="black", label="budget")
        losses.set_yscale("log")
        losses.legend()
        scales.plot(steps, self.scale)
        scales.set_yscale("log")
        scales.set(xlabel="step", ylabel="scale")
        return figure


def _require_positive(name: str, value: float) -> None:
    require_nonnegative(name, value)
    if value == 0.0:
        raise OptionError(f"{name}: expected more than 0, got 0")


def _require_bound(bound: float) -> None:
    if not (math.isfinite(bound) and bound >= 1.0):
        raise OptionError(f"bound: expected a finite number >= 1, got {bound!r}")


_BY_NAME: dict[str, Callable[[], ScaleRule]] = {
    "counting": lambda: Fixed(1.0),
    "adaptive": Adaptive,
    "auto": Budget,
    "halving": Halving,
}
SCALES = tuple(_BY_NAME)


def rule_of(scale: object) -> ScaleRule:
    """Return the rule that a learner was asked for by ``scale``.

    Raises
    ------
    OptionError
        A negative number, an unknown name, or something else.
    """
    if isinstance(scale, ScaleRule):
        return scale
    if isinstance(scale, str):
        require_choice("scale", scale, SCALES)
        return _BY_NAME[scale]()
    if not isinstance(scale, int | float):
        names = ", ".join(map(repr, SCALES))
        raise OptionError(
            f"scale: expected a number, one of {names} or a ScaleRule (an instance), got {scale!r}"
        )
    return Fixed(scale)
