"""A learner's part in training whose loop another library runs."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ekfac_rs.batchnorm import device_of
from ekfac_rs.errors import IncompatibleError, ModelChangedError, OptionError
from ekfac_rs.learning import ContinualLearner
from ekfac_rs.learning.optimization import highest_rate, require_plain_step
from ekfac_rs.learning.training import FiniteCheck, ScaledPenalty, control_of
from ekfac_rs.loading import Source
from ekfac_rs.penalty import QuadraticPenalty
from ekfac_rs.scales import Fixed, Halving, ScaleRule, Selection, rule_of

# Options of a learner that say how it trains by itself, as they are when nobody chose.
_OF_ITS_OWN_LOOP: dict[str, object] = {
    "head": None,
    "own": False,
    "optimizer": None,
    "scheduler": "cosine",
    "momentum": 0.9,
    "freeze_bn_after": 1.0,
}

# What a state holds of a task amid its training.
_OF_TRAINING = {"penalty", "steps_done", "highest_lr"}


class LearnersPart:
    """What a learner does for tasks that another library's loop trains.

    For each task: `begin`; in every step `penalty` after the forward pass, to be added to the
    loss, and `before_step` when gradients are there; then `consolidate`.

    Parameters
    ----------
    learner : ContinualLearner
    library : str
        Whose loop it is, in words.

    Attributes
    ----------
    learner : ContinualLearner

    Raises
    ------
    OptionError
        It is no learner, or has options of training, which is the library's.
    """

    def __init__(self, learner: ContinualLearner, library: str) -> None:
        if not isinstance(learner, ContinualLearner):
            raise OptionError(
                f"learner: expected a ContinualLearner, got a {type(learner).__name__}"
            )
        for name, untouched in _OF_ITS_OWN_LOOP.items():
            value = getattr(learner, name)
            if value != untouched:
                raise OptionError(
                    f"learner: expected its {name} left at {untouched!r} where {library} trains, "
                    f"got {value!r}"
                )
        self.learner = learner
        self._library = library
        self._rule()
        self._scaled: ScaledPenalty | None = None
        self._finite = FiniteCheck(deferred=False)
        self._steps_done, self._highest_lr = 0, 0.0
        # Of a task that a state found amid its training.
        self._unfinished: Mapping[str, Any] | None = None

    def require_within(self, model: nn.Module) -> None:
        """Raise `ModelChangedError` unless the learner's model is this one or a part of it."""
        if not any(module is self.learner.model for module in model.modules()):
            raise ModelChangedError(
                f"model: expected the one that the learner was made with, or one that holds it, "
                f"got another {type(model).__name__}"
            )

    def begin(self, loader: Source, steps: int | None, optimizers: Sequence[Optimizer]) -> None:
        """Begin a task: take its statistics, and make the penalty where there is one.

        After `load_state_dict` with a state from amid a task's training, that task goes on: its
        statistics were taken before.

        Parameters
        ----------
        loader : iterable of (x, y), or a function that returns one
            Of the task.
        steps : int or None
            That the optimiser will make; None where nobody knows.
        optimizers : sequence of Optimizer

        Raises
        ------
        OptionError
            The rule for the scale needs to know something that is not there; an optimiser's
            ``step`` needs an argument.
        EkfacError
            As `reparameterize`.
        """
        self.end()
        for optimizer in optimizers:
            require_plain_step("optimizer", optimizer)
        learner, unfinished, rule = self.learner, self._unfinished, self._rule()
        self._steps_done, self._highest_lr = 0, 0.0
        if learner.anchor is None or not (learner.curvatures or learner.damping):
            return
        if steps is None and not isinstance(rule, Fixed):
            raise OptionError(
                f"scale: expected a number where nobody knows how many steps {self._library} will "
                f"make, got {rule!r}, which has to"
            )
        earlier = learner.selection if unfinished is None else learner.selection[:-1]
        control = control_of(rule, learner.losses, steps or 1, earlier)
        if unfinished is None:
            learner.reparameterize(loader)
            learner.selection.append(Selection(repr(rule), learner.task))
        self._finite = FiniteCheck(deferred=device_of(learner.model).type == "cuda")
        self._scaled = ScaledPenalty(control, self._made, learner.selection[-1])
        if unfinished is not None:
            self._scaled.load_state_dict(unfinished["penalty"])
            self._steps_done = unfinished["steps_done"]
            self._highest_lr = unfinished["highest_lr"]
            self._unfinished = None
        if learner.step == "explicit":
            self._check_rates(self._scaled, optimizers)

    def penalty(self) -> Tensor | None:
        """Value of the penalty after a forward pass, with its scale for this step, if any."""
        return None if self._scaled is None else self._scaled()

    def before_step(self, optimizer: Optimizer, loss: Tensor) -> None:
        """See to a step under the penalty, whose gradients are there.

        Parameters
        ----------
        optimizer : Optimizer
            About to make it.
        loss : Tensor
            Of the mini-batch, a scalar, without penalty.

        Raises
        ------
        NumericalError
            The loss is not finite.
        OptionError
            A stable step of an optimiser that has no learning rate.
        """
        if self._scaled is None:
            return
        self._steps_done += 1
        self._finite.add(self._steps_done, loss)
        self._scaled.note(loss)
        if self.learner.step == "stable":
            self._highest_lr = max(self._highest_lr, highest_rate(optimizer))
            self._scaled.precondition(self._highest_lr, None)

    def consolidate(self, loader: Source) -> None:
        """Close the task, as `ContinualLearner.consolidate`."""
        self.end()
        self._unfinished = None
        self.learner.consolidate(loader)

    def end(self) -> None:
        """Take the penalty's hooks from the model; a task that was begun is left as it is."""
        if self._scaled is None:
            return
        try:
            self._scaled.finish()
        finally:
            self._scaled.close()
            self._scaled = None

    def begin_anew(self) -> None:
        """Go on as from the state: with a penalty that remembers nothing of earlier steps."""
        if self._scaled is not None:
            self._scaled.begin_anew()

    def state_dict(self) -> dict[str, Any]:
        """Return all but the model: tensors, numbers, words, and lists and mappings of them."""
        training = None
        if self._scaled is not None:
            self._scaled.finish()
            training = {
                "penalty": self._scaled.state_dict(),
                "steps_done": self._steps_done,
                "highest_lr": self._highest_lr,
            }
        learner = {k: value for k, value in self.learner.state_dict().items() if k != "model"}
        return {"learner": learner, "training": training}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; the model's weights are there already.

        Raises
        ------
        IncompatibleError
            The state is another one, or of another kind of learner or model. A failed call changes
            nothing.
        """
        training = state.get("training")
        if {"learner", "training"} - set(state) or (
            training is not None and set(training) != _OF_TRAINING
        ):
            raise IncompatibleError(
                f"state: expected a state of learner and training, got one of {list(state)}"
            )
        model = self.learner.model.state_dict()
        self.learner.load_state_dict({**state["learner"], "model": model})
        self.end()
        self._unfinished = training

    def _rule(self) -> ScaleRule:
        rule = rule_of(self.learner.scale)
        if isinstance(rule, Halving):
            raise OptionError(
                f'learner: expected another scale than "halving" where {self._library} trains: it '
                "begins training anew in every try"
            )
        return rule

    def _made(self) -> QuadraticPenalty:
        penalty = self.learner.penalty()
        assert penalty is not None
        return penalty

    @staticmethod
    def _check_rates(scaled: ScaledPenalty, optimizers: Sequence[Optimizer]) -> None:
        """Warn where explicit steps of SGD are too long for the penalty."""
        for optimizer in optimizers:
            if isinstance(optimizer, torch.optim.SGD):
                for group in optimizer.param_groups:
                    scaled.penalty.check_lr(float(group["lr"]), float(group["momentum"]))
