"""What holds on to earlier tasks in a new one's steps, whoever makes them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ekfac_rs._modes import own_modes
from ekfac_rs._ranks import Ranks
from ekfac_rs.curvature import Curvature
from ekfac_rs.errors import NonFiniteError, NumericalError
from ekfac_rs.learning.optimization import Rates
from ekfac_rs.learning.own import OwnCurvature
from ekfac_rs.learning.watching import Copied
from ekfac_rs.loading import Batch, Inputs
from ekfac_rs.penalty import QuadraticPenalty
from ekfac_rs.scales import Control, ScaleRule, Selection

# Steps between two predictions of what earlier tasks lose: another product with the curvatures
# while BatchNorms use the statistics of mini-batches.
_PREDICTION_INTERVAL = 4


@dataclass
class SoFar:
    """What training has shown of the present task, for its consolidation.

    Attributes
    ----------
    example : Inputs, optional
        Two examples. Without any, nothing tells whether a BatchNorm after a Linear is over its
        outputs.
    froze_batchnorm : bool
        Whether weights have moved on under frozen statistics.
    """

    example: Inputs | None = None
    froze_batchnorm: bool = False


class Protection:
    """Holds on to earlier tasks in the steps of a new one, which somebody else makes.

    In every step: `before_forward`; `penalty` after the forward pass, to be added to the loss;
    `note` of the loss; `before_step` when gradients are there; and the step is counted.

    Parameters
    ----------
    model : torch.nn.Module
    scaled : ScaledPenalty or None
        The penalty, if there is any.
    stable : bool
        Whether gradients are preconditioned for it.
    own : OwnCurvature or None
        Of the task, where they are preconditioned for its loss, too.
    freeze_at : int or None
        Steps before BatchNorms are frozen; None for never.
    doubled : callable
        Tells, given two examples, the parameters that stay as they are once BatchNorms are frozen.
    so_far : SoFar
        Filled in.
    ranks : Ranks
        That make the steps together.

    Attributes
    ----------
    steps_done : int
        Counted up by who makes them.
    selection : Selection or None
        What the scale's rule finds, if there is one.
    """

    def __init__(
        self,
        model: nn.Module,
        scaled: "ScaledPenalty | None",
        *,
        stable: bool,
        own: OwnCurvature | None,
        freeze_at: int | None,
        doubled: Callable[[Inputs], list[nn.Parameter]],
        so_far: SoFar,
        ranks: Ranks,
    ) -> None:
        self.steps_done = 0
        self.selection = None if scaled is None else scaled.selection
        self._model = model
        self._scaled = scaled
        self._stable = stable
        self._own = own
        self._freeze_at = freeze_at
        self._doubled = doubled
        self._so_far = so_far
        self._ranks = ranks
        # Of the present step.
        self._own_curvature: Curvature | None = None
        # What was frozen, and what stays since; None before.
        self._frozen: list[nn.Module] | None = None
        self._still: list[nn.Parameter] = []

    def check_lr(self, rates: Rates) -> None:
        """Warn where explicit steps of SGD are too long for the penalty."""
        if self._scaled is not None and not self._stable:
            self._scaled.penalty.check_lr(rates.highest, rates.momentum, nesterov=rates.nesterov)

    def before_forward(self, read: Callable[[], Batch]) -> None:
        """Freeze BatchNorms where it is time, and see to the task's own curvature.

        Parameters
        ----------
        read : callable
            Returns the mini-batch; called where it is looked at.
        """
        if self._freeze_at is not None and self.steps_done >= self._freeze_at:
            self._freeze(read)
        if self._own is not None:
            self._own_curvature = self._own.at(read(), self._frozen is not None)

    def penalty(self) -> Tensor | None:
        """Value of the penalty after a forward pass, with its scale for this step, if any.

        Raises
        ------
        NumericalError
            It is not finite.
        """
        if self._scaled is None:
            return None
        try:
            return self._scaled()
        except NonFiniteError as error:
            raise NumericalError(f"fit: diverged at step {self.steps_done + 1}: {error}") from error

    def note(self, loss: Tensor) -> None:
        """Let the scale's rule see a step's mean loss, a scalar without penalty."""
        if self._scaled is not None:
            self._scaled.note(loss)

    def before_step(self, rates: Callable[[], Rates]) -> None:
        """Make the gradients those of a stable step; what stays as it is gets none.

        Optimisers pass over what has no gradient: their groups and states stay their own.

        Parameters
        ----------
        rates : callable
            Returns the learning rates of the step; called for stable steps.
        """
        for parameter in self._still:
            parameter.grad = None
        if self._scaled is not None and self._stable:
            loss = None if self._own is None else self._own.loss
            self._scaled.precondition(rates(), self._own_curvature, loss)

    def finish(self) -> None:
        """See to what has not been seen yet."""
        if self._scaled is not None:
            self._scaled.finish()

    def close(self) -> None:
        """Take hooks from the model, and put frozen BatchNorms back in train mode."""
        if self._scaled is not None:
            self._scaled.close()
        for module in self._frozen or ():
            module.train()
        self._frozen, self._still = None, []

    def begin_anew(self) -> None:
        """Go on as from the state: what makes steps faster or is looked at anew begins anew."""
        if self._scaled is not None:
            self._scaled.begin_anew()
        if self._own is not None:
            self._own.begin_anew()

    def state_dict(self) -> dict[str, Any]:
        """Return what `begin_anew` leaves, but for model and selection."""
        still, frozen = set(self._still), set(self._frozen or ())
        return {
            "steps_done": self.steps_done,
            "penalty": None if self._scaled is None else self._scaled.state_dict(),
            "own": None if self._own is None else self._own.state_dict(),
            "still": [name for name, p in self._model.named_parameters() if p in still],
            "frozen": [name for name, m in self._model.named_modules() if m in frozen],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.steps_done = state["steps_done"]
        if self._scaled is not None:
            self._scaled.load_state_dict(state["penalty"])
        if self._own is not None:
            self._own.load_state_dict(state["own"])
        # Frozen in the step that was the next one then.
        if self._freeze_at is not None and self.steps_done > self._freeze_at:
            self._frozen = [self._model.get_submodule(name) for name in state.get("frozen", ())]
            self._still = [self._model.get_parameter(name) for name in state["still"]]
            self._so_far.froze_batchnorm |= bool(self._frozen)

    def _freeze(self, read: Callable[[], Batch]) -> None:
        """From here on BatchNorms use their running statistics; nothing is folded."""
        if self._frozen is None:
            self._ranks.broadcast_(self._model.buffers(), "buffers")
            if self._scaled is not None:
                with own_modes():
                    self._still = self._doubled(read().inputs.first(2))
            batchnorms = (m for m in self._model.modules() if isinstance(m, _BatchNorm))
            self._frozen = [module for module in batchnorms if module.training]
            self._so_far.froze_batchnorm |= bool(self._frozen)
        # Again and again: whoever makes the steps may put all of the model in train mode.
        for module in self._frozen:
            module.eval()


def control_of(
    rule: ScaleRule,
    losses: Sequence[float | None],
    steps: int,
    earlier: Sequence[Selection],
) -> Control:
    """Begin a task with a rule, going on from what it did last among earlier selections."""
    its_own = [selection for selection in earlier if selection.rule == repr(rule)]
    return rule.control(losses, steps, its_own[-1] if its_own else None)


class ScaledPenalty:
    """A penalty over the steps of a task, its scale chosen by a rule and written down.

    On a GPU the rule sees a step during the next one, so that nothing waits.

    Parameters
    ----------
    control : Control
    make : callable
        Makes the penalty.
    selection : Selection
        Filled in.
    ranks : Ranks, optional
        Whose mean prediction counts. Default: this process alone.

    Attributes
    ----------
    penalty : QuadraticPenalty
    selection : Selection
    """

    def __init__(
        self,
        control: Control,
        make: Callable[[], QuadraticPenalty],
        selection: Selection,
        ranks: Ranks | None = None,
    ) -> None:
        self.penalty, self._ranks = make(), ranks or Ranks(None)
        self.selection = selection
        self._control, self._make = control, make
        self._pending: Copied | None = None
        self._increase: Tensor | None = None
        selection.budget = control.budget

    def close(self) -> None:
        """Take the penalty's hooks with it."""
        self.penalty.close()

    def begin_anew(self) -> None:
        """See to what has not been seen yet, and go on with a penalty that remembers nothing."""
        self.finish()
        self.close()
        self.penalty = self._make()

    def state_dict(self) -> dict[str, Any]:
        """Return what `begin_anew` leaves, but for the selection."""
        return {"control": self._control.state_dict(), "increase": self._increase}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._control.load_state_dict(state["control"])
        self._increase = state["increase"]

    def __call__(self) -> Tensor:
        """Value of the penalty, with its scale for this step."""
        self.penalty.scale = self._control.scale
        return self.penalty()

    def precondition(
        self, rates: Rates, own: Curvature | None, loss: Callable[[], Tensor] | None
    ) -> None:
        """As `QuadraticPenalty.precondition`, for the learning rates of a step."""
        self.penalty.precondition(
            rates.highest,
            own,
            loss=loss,
            momentum=rates.momentum,
            nesterov=rates.nesterov,
            step_lr=rates.now,
        )

    def note(self, loss: Tensor) -> None:
        """Take a step's loss, and what its penalty predicted."""
        self.finish()
        self.selection.scale.append(self.penalty.scale)
        if self._increase is None or len(self.selection.scale) % _PREDICTION_INTERVAL == 1:
            own = torch.as_tensor(
                self.penalty.predicted_increase(), dtype=torch.float64, device=loss.device
            )
            self._increase = self._ranks.mean(own)
        self._pending = Copied(torch.stack([loss.detach().double(), self._increase]))
        if not loss.is_cuda:
            self.finish()

    def finish(self) -> None:
        """See to what has not been seen yet."""
        if self._pending is None:
            return
        (loss, increase), self._pending = self._pending.read().tolist(), None
        self._control.update(loss, increase)
        self.selection.loss.append(loss)
        self.selection.increase.append(increase / self.selection.tasks)
