"""Optimisers and schedules as a user gives them, for one task's training."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from ekfac_rs._checks import require_choice
from ekfac_rs.errors import IncompatibleError, OptionError
from ekfac_rs.stability import reach_of

# Called as ``optimizer(parameters, lr=lr)``, as torch's own classes can be.
MakesOptimizer = Callable[..., Optimizer]
# Called as ``scheduler(optimizer, steps)``.
MakesScheduler = Callable[[Optimizer, int], LRScheduler]

SCHEDULES = ("cosine",)


def require_optimizer(optimizer: object) -> None:
    """Raise `OptionError` unless this is None or makes optimisers, as far as can be told."""
    if optimizer is not None and not callable(optimizer):
        raise OptionError(
            "optimizer: expected a callable of (parameters, lr=...) like torch.optim.Adam, got "
            f"{type(optimizer).__name__}"
        )


def require_scheduler(scheduler: object) -> None:
    """Raise `OptionError` unless this is None, a schedule's name or makes schedulers."""
    if scheduler is not None and not callable(scheduler):
        require_choice("scheduler", scheduler, SCHEDULES)


class Rates(NamedTuple):
    """Learning rates of an optimiser's next step.

    Attributes
    ----------
    highest : float
        Of any group in any step of the task so far.
    now : float
        Of the fastest group.
    momentum, nesterov : float, bool
        Of SGD's group whose steps go farthest, measured by how far they would be stable; 0 and
        False of other optimisers.
    """

    highest: float
    now: float
    momentum: float
    nesterov: bool

    @classmethod
    def of(cls, optimizer: Optimizer, before: float) -> Self:
        """Read them off an optimiser; ``before`` is the highest of earlier steps.

        Raises
        ------
        OptionError
            A group has no learning rate.
        """
        for number, group in enumerate(optimizer.param_groups):
            if not _has_lr(group):
                raise OptionError(
                    f"optimizer: expected a number as 'lr' of every group, got {group.get('lr')!r} "
                    f"in group {number} of {type(optimizer).__name__}; step='explicit' does without"
                )
        groups = optimizer.param_groups
        now = max(float(group["lr"]) for group in groups)
        if not isinstance(optimizer, torch.optim.SGD):
            return cls(max(before, now), now, 0.0, False)
        kinds = [(float(x["lr"]), float(x["momentum"]), bool(x["nesterov"])) for x in groups]
        _, momentum, nesterov = max(kinds, key=lambda kind: kind[0] / reach_of(*kind[1:]))
        return cls(max(before, now), now, momentum, nesterov)


class Optimization:
    """An optimiser and its learning rates over the steps of one task.

    Parameters
    ----------
    parameters : sequence of Parameter
        To be trained.
    lr : float
    steps : int
        How many there will be; a loader may yield more than its length promised.
    optimizer : callable
    scheduler : "cosine", callable or None
        None leaves learning rates alone.

    Attributes
    ----------
    optimizer : torch.optim.Optimizer

    Raises
    ------
    OptionError
        What a callable returns is no optimiser, one of other parameters, or no scheduler; its
        ``step`` needs an argument.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        lr: float,
        steps: int,
        optimizer: MakesOptimizer,
        scheduler: str | MakesScheduler | None,
    ) -> None:
        if not parameters:
            raise OptionError("model: expected trainable parameters, got none")
        # A list of its own: torch may keep the one it is given.
        self.optimizer = _checked_optimizer(optimizer(list(parameters), lr=lr), parameters)
        self._steps, self._steps_done, self._highest_lr = steps, 0, 0.0
        # A scheduler may begin with a warm-up: the rate that was asked for counts, too.
        self._note_lr()
        self._scheduler: LRScheduler | None = None
        if callable(scheduler):
            self._scheduler = _checked_scheduler(scheduler(self.optimizer, steps))
        elif scheduler is not None:
            self._scheduler = LambdaLR(self.optimizer, lambda step: half_cosine(step / steps))
        self._note_lr()

    @property
    def rates(self) -> Rates:
        """Those of the next step, with the highest that any group has had so far.

        Raises
        ------
        OptionError
            A group has none.
        """
        return Rates.of(self.optimizer, self._highest_lr)

    @property
    def is_sgd(self) -> bool:
        """Whether steps grow with the gradient."""
        return isinstance(self.optimizer, torch.optim.SGD)

    def state_dict(self) -> dict[str, Any]:
        """Return what goes on from step to step."""
        return {
            "kinds": self._kinds(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self._scheduler is None else self._scheduler.state_dict(),
            "steps_done": self._steps_done,
            "highest_lr": self._highest_lr,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises
        ------
        IncompatibleError
            It is that of another kind of optimiser or scheduler.
        """
        if state["kinds"] != self._kinds():
            raise IncompatibleError(
                f"optimizer, scheduler: expected those of the training that was interrupted, "
                f"{' and '.join(state['kinds'])}, got {' and '.join(self._kinds())}"
            )
        self.optimizer.load_state_dict(state["optimizer"])
        if self._scheduler is not None:
            self._scheduler.load_state_dict(state["scheduler"])
        self._steps_done, self._highest_lr = state["steps_done"], state["highest_lr"]

    def step(self) -> None:
        """Make a step, and go on to the next learning rate."""
        self.optimizer.step()
        self._steps_done += 1
        if self._scheduler is not None and self._steps_done <= self._steps:
            self._scheduler.step()
            self._note_lr()

    def _kinds(self) -> list[str]:
        return [type(self.optimizer).__name__, type(self._scheduler).__name__]

    def _note_lr(self) -> None:
        rates = [float(group["lr"]) for group in self.optimizer.param_groups if _has_lr(group)]
        self._highest_lr = max([self._highest_lr, *rates])


def half_cosine(share: float) -> float:
    """Part of the highest learning rate when this share of the steps is made, from 1 to 0."""
    return 0.5 * (1.0 + math.cos(math.pi * share))


def _has_lr(group: dict[str, Any]) -> bool:
    return isinstance(group.get("lr"), int | float | torch.Tensor)


def _checked_optimizer(made: object, parameters: Sequence[nn.Parameter]) -> Optimizer:
    if not isinstance(made, Optimizer):
        raise OptionError(
            f"optimizer: expected one that returns a torch.optim.Optimizer, got {_named(made)}"
        )
    require_plain_step("optimizer", made)
    theirs = {id(p) for group in made.param_groups for p in group["params"]}
    if theirs.isdisjoint(map(id, parameters)):
        raise OptionError(
            f"optimizer: expected a {type(made).__name__} of the model's parameters, got one of "
            "others"
        )
    return made


def _checked_scheduler(made: object) -> LRScheduler:
    if not isinstance(made, LRScheduler):
        raise OptionError(
            "scheduler: expected one that returns a torch.optim.lr_scheduler.LRScheduler "
            f"(scheduler=None leaves the learning rate alone), got {_named(made)}"
        )
    require_plain_step("scheduler", made)
    return made


def require_plain_step(argument: str, made: Optimizer | LRScheduler) -> None:
    """Refuse what wants a closure, as LBFGS does, or a metric, as ReduceLROnPlateau.

    Raises
    ------
    OptionError
        Its ``step`` needs an argument.
    """
    for name, parameter in inspect.signature(made.step).parameters.items():
        variable = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if parameter.default is parameter.empty and not variable:
            raise OptionError(
                f"{argument}: expected one whose step() needs nothing, got a "
                f"{type(made).__name__}, which needs {name!r}"
            )


def _named(made: object) -> str:
    return "None" if made is None else f"a {type(made).__name__}"
