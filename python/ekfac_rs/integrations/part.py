"""A learner's part in training whose loop another library runs."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ekfac_rs._modes import own_modes
from ekfac_rs.batchnorm import device_of
from ekfac_rs.batchnorm.statistics import restored_on_failure
from ekfac_rs.errors import IncompatibleError, ModelChangedError, OptionError
from ekfac_rs.learning import ContinualLearner
from ekfac_rs.learning.optimization import Rates, require_plain_step
from ekfac_rs.learning.protection import Protection
from ekfac_rs.learning.watching import FiniteCheck
from ekfac_rs.loading import Batch, Source
from ekfac_rs.scales import Fixed, Halving, ScaleRule, rule_of

# Options of a learner that say how it trains by itself, as they are when nobody chose.
_OF_ITS_OWN_LOOP: dict[str, object] = {
    "head": None,
    "optimizer": None,
    "scheduler": "cosine",
    "momentum": 0.9,
}

# What a state holds of a task amid its training.
_OF_TRAINING = {"protection", "highest_lr"}


class LearnersPart:
    """What a learner does for tasks that another library's loop trains.

    For each task: `begin`; in every step `before_forward`, `penalty` after the forward pass, to be
    added to the loss, and `before_step` when gradients are there; then `consolidate`.

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
        # Of a task in training.
        self._protection: Protection | None = None
        self._finite = FiniteCheck(deferred=False)
        self._highest_lr = 0.0
        # Of a task that a state found amid its training.
        self._unfinished: Mapping[str, Any] | None = None

    def require_within(self, model: nn.Module) -> None:
        """Raise `ModelChangedError` unless the learner's model is this one or a part of it."""
        if not any(module is self.learner.model for module in model.modules()):
            raise ModelChangedError(
                f"model: expected the one that the learner was made with, or one that holds it, "
                f"got another {type(model).__name__}"
            )

    @own_modes()
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
            Nobody knows how many steps there will be, and the rule for the scale or
            ``freeze_bn_after`` asks for it; an optimiser's ``step`` needs an argument.
        EkfacError
            As `reparameterize`. A failed call changes nothing.
        """
        self.end()
        for optimizer in optimizers:
            require_plain_step("optimizer", optimizer)
        learner, unfinished, rule = self.learner, self._unfinished, self._rule()
        if steps is None:
            self._require_no_number(rule)
        with restored_on_failure(learner.model), ExitStack() as undo:
            protection = learner._protection(
                learner._loader(loader), rule, steps or 1, undo, going_on=unfinished is not None
            )
            undo.callback(protection.close)
            if unfinished is not None:
                protection.load_state_dict(unfinished["protection"])
            undo.pop_all()
        self._protection = protection
        self._finite = FiniteCheck(deferred=device_of(learner.model).type == "cuda")
        self._highest_lr = 0.0 if unfinished is None else unfinished["highest_lr"]
        self._unfinished = None
        for optimizer in optimizers:
            if isinstance(optimizer, torch.optim.SGD):
                protection.check_lr(Rates.of(optimizer, 0.0))

    def before_forward(self, mini_batch: Any) -> None:
        """See to a mini-batch before the model is called with it.

        Parameters
        ----------
        mini_batch
            As the loader yields it.
        """
        if self._protection is not None:
            self._protection.before_forward(lambda: self._read(mini_batch))

    def penalty(self) -> Tensor | None:
        """Value of the penalty after a forward pass, with its scale for this step, if any."""
        return None if self._protection is None else self._protection.penalty()

    def before_step(self, optimizer: Optimizer, loss: Tensor) -> None:
        """See to a step whose gradients are there, and count it.

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
        protection = self._protection
        if protection is None:
            return
        protection.steps_done += 1
        if protection.selection is None:
            return  # Without a penalty, the step is the library's alone.
        self._finite.add(protection.steps_done, loss)
        protection.note(loss)
        protection.before_step(lambda: self._noted_rates(optimizer))

    def consolidate(self, loader: Source) -> None:
        """Close the task, as `ContinualLearner.consolidate`."""
        self.end()
        self._unfinished = None
        self.learner.consolidate(loader)

    def end(self) -> None:
        """Take the penalty's hooks from the model; a task that was begun is left as it is."""
        if self._protection is None:
            return
        try:
            self._protection.finish()
        finally:
            self._protection.close()
            self._protection = None

    def begin_anew(self) -> None:
        """Go on as from the state: with a penalty that remembers nothing of earlier steps."""
        if self._protection is not None:
            self._protection.begin_anew()

    def state_dict(self) -> dict[str, Any]:
        """Return all but the model: tensors, numbers, words, and lists and mappings of them."""
        training = None
        if self._protection is not None:
            self._protection.finish()
            training = {
                "protection": self._protection.state_dict(),
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

    def _require_no_number(self, rule: ScaleRule) -> None:
        """Raise unless the learner can do without the number of steps in this task."""
        learner, asking = self.learner, []
        if learner._is_penalised and not isinstance(rule, Fixed):
            asking.append(f"scale={rule!r}")
        if learner.task > 0 and 0.0 < learner.freeze_bn_after < 1.0:
            asking.append(f"freeze_bn_after={learner.freeze_bn_after}")
        if asking:
            raise OptionError(
                f"learner: expected other options where nobody knows how many steps "
                f"{self._library} will make, got {' and '.join(asking)}"
            )

    def _read(self, mini_batch: Any) -> Batch:
        return next(self.learner._loader([mini_batch]).batches())

    def _noted_rates(self, optimizer: Optimizer) -> Rates:
        """Those of the next step, with the highest of the task's steps so far."""
        rates = Rates.of(optimizer, self._highest_lr)
        self._highest_lr = rates.highest
        return rates
