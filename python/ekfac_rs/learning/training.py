"""One task's training: optimiser steps on loss and penalty, and what is told of them."""

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import count, islice

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from ekfac_rs.batchnorm import device_of, frozen_batchnorms
from ekfac_rs.curvature import Curvature
from ekfac_rs.errors import NonFiniteError, NumericalError
from ekfac_rs.learning.optimization import Optimization
from ekfac_rs.learning.own import OwnCurvature
from ekfac_rs.likelihood import Likelihood
from ekfac_rs.loading import Batch, Inputs, Loader
from ekfac_rs.penalty import QuadraticPenalty
from ekfac_rs.scales import Control, Selection

# Steps between two predictions of what earlier tasks lose: another product with the curvatures
# while BatchNorms use the statistics of mini-batches.
_PREDICTION_INTERVAL = 4

# Outputs and targets of a mini-batch, as the loss takes them.
Outputs = Callable[[Batch], tuple[Tensor, Tensor]]


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


@dataclass(frozen=True)
class Plan:
    """How long a task is trained.

    Attributes
    ----------
    passes : int or None
        Through the loader; None for as many as the steps take.
    steps : int
        In all.
    freeze_at : int
        Steps before BatchNorms are frozen; as many as there are for never.
    """

    passes: int | None
    steps: int
    freeze_at: int


class Training:
    """The steps of one task.

    Parameters
    ----------
    model : torch.nn.Module
        In the modes that it is trained in.
    likelihood : Likelihood
    outputs : callable
        Calls the model.
    optimization : Optimization
    penalty : ScaledPenalty or None
    stable : bool
        Whether gradients are preconditioned for the penalty.
    own : OwnCurvature or None
        Of the task, where they are preconditioned for its loss, too.
    doubled : callable
        Tells, given two examples, the parameters that stay as they are once BatchNorms are frozen.
    plan : Plan
    so_far : SoFar
        Filled in.
    begun : callable
        Called when the first step is made.

    Attributes
    ----------
    steps_done : int
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        outputs: Outputs,
        optimization: Optimization,
        penalty: "ScaledPenalty | None",
        *,
        stable: bool,
        own: OwnCurvature | None,
        doubled: Callable[[Inputs], list[nn.Parameter]],
        plan: Plan,
        so_far: SoFar,
        begun: Callable[[], object],
    ) -> None:
        self.steps_done = 0
        self._model = model
        self._likelihood = likelihood
        self._outputs = outputs
        self._optimization = optimization
        self._penalty = penalty
        self._stable = stable
        self._own = own
        self._doubled = doubled
        self._plan = plan
        self._so_far = so_far
        self._begun = begun
        self._finite = FiniteCheck(deferred=device_of(model).type == "cuda")
        self._still: list[nn.Parameter] = []

    def run(
        self, loader: Loader, callback: Callable[[int], None] | None, progress: bool
    ) -> list[dict[str, float]]:
        """Go through the loader until all steps are made, and report each pass.

        Parameters
        ----------
        loader : Loader
        callback : callable, optional
            Called after every step with its number, counted from 1.
        progress : bool
            Show a tqdm bar.
        """
        history, plan = [], self._plan
        with tqdm(total=plan.steps, desc="fit", disable=not progress, leave=False) as bar:
            for _ in count() if plan.passes is None else range(plan.passes):
                means = Means(device_of(self._model))
                left = plan.steps - self.steps_done if plan.passes is None else None
                for batch in islice(loader.batches(), left):
                    loss, penalty, correct, counted = self.step(batch)
                    means.add(loss, penalty, batch.examples, correct, counted)
                    bar.update()
                    if callback is not None:
                        callback(self.steps_done)
                self._finite.finish()
                if self._penalty is not None:
                    self._penalty.finish()
                history.append(means.result())
                if plan.passes is None and self.steps_done == plan.steps:
                    break
        return history

    def step(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One optimiser step; returns loss, penalty and hits (`Likelihood.correct`), not waiting.

        On a GPU only the first step looks at its targets.
        """
        first = self.steps_done == 0
        if first:
            self._so_far.example = batch.inputs.first(2).clone()
        if self.steps_done == self._plan.freeze_at < self._plan.steps:
            self._freeze(batch.inputs.first(2))
        frozen = self.steps_done >= self._plan.freeze_at
        own = None if self._own is None else self._own.at(batch, frozen)
        outputs, targets = self._outputs(batch)
        if first or not outputs.is_cuda:
            self._likelihood.validate(outputs, targets)
        if first:
            with suppress(NonFiniteError):  # the loss is not finite either, and says so below
                self._likelihood.check_outputs(outputs, targets)
        loss = self._likelihood.loss(outputs, targets)
        total, penalty = loss, torch.zeros_like(loss)
        if self._penalty is not None:
            try:
                penalty = self._penalty()
            except NonFiniteError as error:
                raise NumericalError(
                    f"fit: diverged at step {self.steps_done + 1}: {error}"
                ) from error
            total = loss + penalty
        self._finite.add(self.steps_done + 1, total.detach())
        if self._penalty is not None:
            self._penalty.note(loss)
        # An optimiser may hold less than the model, and more.
        self._model.zero_grad(set_to_none=True)
        self._optimization.optimizer.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        if self._penalty is not None and self._stable:
            self._penalty.precondition(self._optimization.highest_lr, own)
        self._optimization.step(self._still)
        self.steps_done += 1
        self._begun()
        return loss.detach(), penalty.detach(), *self._likelihood.correct(outputs, targets)

    def _freeze(self, example: Inputs) -> None:
        """From here on BatchNorms use their running statistics; nothing is folded."""
        self._still = self._doubled(example) if self._penalty is not None else []
        for module in self._model.modules():
            if isinstance(module, _BatchNorm) and module.training:
                module.eval()
                self._so_far.froze_batchnorm = True


# --- modes ---------------------------------------------------------------------------------------


def modes_of(model: nn.Module) -> dict[nn.Module, bool]:
    """Return which modules are in train mode."""
    return {module: module.training for module in model.modules()}


def set_modes(modes: dict[nn.Module, bool]) -> None:
    """Put modules back in the modes that they were in."""
    for module, training in modes.items():
        module.training = training


def put_in_train_mode(model: nn.Module) -> None:
    """Put a model that is in eval mode as a whole in train mode, frozen BatchNorms apart."""
    if model.training:
        return
    frozen = frozen_batchnorms(model)
    model.train()
    for name in frozen:
        model.get_submodule(name).eval()


# --- what is told --------------------------------------------------------------------------------


class _Copied:
    """A tensor's values, on their way to the host: reading them waits for their copy alone."""

    def __init__(self, values: Tensor) -> None:
        self._values, self._copied = values, None
        if values.is_cuda:
            # Reading the tensor later would wait for all that is queued by then; the event is
            # over as soon as the copy is.
            stream = torch.cuda.current_stream(values.device)
            self._values = values.to("cpu", non_blocking=True)
            self._copied = stream.record_event()

    def read(self) -> Tensor:
        if self._copied is not None:
            self._copied.synchronize()
        return self._values


class ScaledPenalty:
    """A penalty over the steps of a task, its scale chosen by a rule and written down.

    On a GPU the rule sees a step during the next one, so that nothing waits.

    Parameters
    ----------
    control : Control
    penalty : QuadraticPenalty
    selection : Selection
        Filled in.
    """

    def __init__(self, control: Control, penalty: QuadraticPenalty, selection: Selection) -> None:
        self._control, self._penalty, self._selection = control, penalty, selection
        self._pending: _Copied | None = None
        self._increase: Tensor
        selection.budget = control.budget

    def __call__(self) -> Tensor:
        """Value of the penalty, with its scale for this step."""
        self._penalty.scale = self._control.scale
        return self._penalty()

    def precondition(self, lr: float, own: Curvature | None) -> None:
        """As `QuadraticPenalty.precondition`."""
        self._penalty.precondition(lr, own)

    def note(self, loss: Tensor) -> None:
        """Take a step's loss, and what its penalty predicted."""
        self.finish()
        self._selection.scale.append(self._penalty.scale)
        if len(self._selection.scale) % _PREDICTION_INTERVAL == 1:
            self._increase = torch.as_tensor(
                self._penalty.predicted_increase(), dtype=torch.float64, device=loss.device
            )
        self._pending = _Copied(torch.stack([loss.detach().double(), self._increase]))
        if not loss.is_cuda:
            self.finish()

    def finish(self) -> None:
        """See to what has not been seen yet."""
        if self._pending is None:
            return
        (loss, increase), self._pending = self._pending.read().tolist(), None
        self._control.update(loss, increase)
        self._selection.loss.append(loss)
        self._selection.increase.append(increase / self._selection.tasks)


class FiniteCheck:
    """Refuses a step's total that is not finite: at once or, deferred, during the next step.

    A GPU's host would otherwise wait in every step for the device to get there. Deferred, it has
    one step queued in the meantime and never more.
    """

    def __init__(self, deferred: bool) -> None:
        self.deferred = deferred
        self._pending: tuple[int, _Copied] | None = None

    def add(self, step: int, total: Tensor) -> None:
        """Take a step's total and check it or, deferred, the one before."""
        if self.deferred:
            self.finish()
        self._pending = step, _Copied(total)
        if not self.deferred:
            self.finish()

    def finish(self) -> None:
        """Check what has not been checked yet."""
        if self._pending is None:
            return
        (step, copied), self._pending = self._pending, None
        total = float(copied.read())
        if not math.isfinite(total):
            since = "; the weights have moved on by one step" if self.deferred else ""
            raise NumericalError(f"fit: expected a finite loss, got {total} at step {step}{since}")


class Means:
    """Running means, summed where the values are: only the result is waited for.

    Of loss and penalty over examples, of hits over the targets that count.
    """

    def __init__(self, device: torch.device) -> None:
        self.examples = 0
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)

    def add(
        self, loss: Tensor, penalty: Tensor, examples: int, correct: Tensor, counted: Tensor
    ) -> None:
        """Take a mini-batch's: loss and penalty are means."""
        self.examples += examples
        loss, penalty, correct, counted = (
            value.to(self.sums) for value in (loss, penalty, correct, counted)
        )
        self.sums += torch.stack([examples * loss, examples * penalty, correct, counted])

    def result(self) -> dict[str, float]:
        """Return the means of what was added."""
        loss, penalty, correct, counted = self.sums.tolist()
        return {
            "loss": loss / self.examples,
            "penalty": penalty / self.examples,
            "accuracy": correct / counted if counted else math.nan,
        }
