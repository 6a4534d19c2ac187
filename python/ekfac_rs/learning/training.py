"""One task's training: optimiser steps on loss and penalty, and what is told of them."""

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from ekfac_rs._checkpoints import (
    pass_over,
    random_states,
    rewound_on_failure,
    set_random_states,
)
from ekfac_rs._ranks import Ranks
from ekfac_rs.batchnorm import device_of, frozen_batchnorms
from ekfac_rs.curvature import Curvature
from ekfac_rs.errors import NonFiniteError, NumericalError
from ekfac_rs.learning.optimization import Optimization
from ekfac_rs.learning.own import OwnCurvature
from ekfac_rs.likelihood import Likelihood
from ekfac_rs.loading import Batch, Inputs, Loader
from ekfac_rs.penalty import QuadraticPenalty
from ekfac_rs.scales import Control, ScaleRule, Selection

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


@dataclass(frozen=True)
class Checkpoints:
    """Where training is written down.

    Attributes
    ----------
    write : callable
        Called with the state of `Training`.
    every : int
        So many steps, and when all are made.
    """

    write: Callable[[dict[str, Any]], None]
    every: int

    def also(self, more: Mapping[str, Any]) -> "Checkpoints":
        """Return checkpoints that hold something more."""
        return replace(self, write=lambda state: self.write({**state, **more}))

    def is_due(self, steps_done: int) -> bool:
        """Whether one is to be written after so many steps."""
        return steps_done % self.every == 0


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
    scalars : Scalars or None
    begun : callable
        Called when the first step is made.
    ranks : Ranks
        That make the steps together, each of mini-batches of its own: of the mean gradient.

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
        scalars: "Scalars | None",
        begun: Callable[[], object],
        ranks: Ranks,
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
        self._scalars = scalars
        self._begun = begun
        self._ranks = ranks
        self._finite = FiniteCheck(deferred=device_of(model).type == "cuda")
        self._still: list[nn.Parameter] = []
        self._history: list[dict[str, float]] = []
        # Of the present pass through the loader.
        self._means = Means(device_of(model))
        self._batches_done = 0
        self._last_targets: Tensor | None = None
        self._random_before: Mapping[str, Any] = {}
        # Random states to go on with, once the mini-batches before are passed over.
        self._random_then: dict[str, Any] | None = None

    def run(
        self,
        loader: Loader,
        generators: Sequence[torch.Generator],
        callback: Callable[[int], None] | None,
        progress: bool,
        checkpoints: Checkpoints | None,
    ) -> list[dict[str, float]]:
        """Go through the loader until all steps are made, and report each pass.

        Parameters
        ----------
        loader : Loader
        generators : sequence of torch.Generator
            Drawn from, beside those of the process.
        callback : callable, optional
            Called after every step with its number, counted from 1.
        progress : bool
            Show a tqdm bar.
        checkpoints : Checkpoints, optional
        """
        bar = tqdm(
            total=self._plan.steps,
            initial=self.steps_done,
            desc="fit",
            disable=not progress,
            leave=False,
        )
        with bar:
            if self._is_over and self._random_then is not None:
                set_random_states(self._random_then, generators)
            while not self._is_over:
                for batch in self._pass_over(loader, generators, checkpoints is not None):
                    loss, penalty, correct, counted = self.step(batch)
                    self._means.add(loss, penalty, batch.examples, correct, counted)
                    self._batches_done, self._last_targets = self._batches_done + 1, batch.targets
                    if self._scalars is not None:
                        self._scalars.add(self.steps_done, loss, penalty)
                    bar.update()
                    if callback is not None:
                        callback(self.steps_done)
                    last = self.steps_done == self._plan.steps
                    if checkpoints is not None and checkpoints.is_due(self.steps_done) and not last:
                        self._write(checkpoints, generators)
                self._end_pass()
            if checkpoints is not None:
                self._write(checkpoints, generators)
        return self._history

    def _write(self, checkpoints: Checkpoints, generators: Sequence[torch.Generator]) -> None:
        """Write a checkpoint, and go on as from it.

        What only makes steps faster or is looked at anew from time to time begins anew, here as
        where the file is read.
        """
        self._finite.finish()
        if self._penalty is not None:
            self._penalty.begin_anew()
        if self._own is not None:
            self._own.begin_anew()
        checkpoints.write(self.state_dict(generators))

    @property
    def _is_over(self) -> bool:
        if self._plan.passes is None:
            return self.steps_done >= self._plan.steps
        return len(self._history) == self._plan.passes

    def _pass_over(
        self, loader: Loader, generators: Sequence[torch.Generator], recorded: bool
    ) -> Iterator[Batch]:
        """Yield what is left of a pass: of one that was interrupted, the mini-batches not seen."""
        if self._random_then is not None:
            batches = self._interrupted_pass(loader, generators, self._random_then)
            self._random_then = None
        else:
            # A pass may draw its order as soon as it begins.
            if recorded:
                self._random_before = random_states(generators)
            batches = loader.batches()
        left = self._plan.steps - self.steps_done if self._plan.passes is None else None
        yield from islice(batches, left)

    def _interrupted_pass(
        self,
        loader: Loader,
        generators: Sequence[torch.Generator],
        random_then: Mapping[str, Any],
    ) -> Iterator[Batch]:
        """Begin the pass that was interrupted, and go through what was seen of it before.

        Raises
        ------
        IncompatibleError
            The last one is not there, or has other targets; there are other generators.
        """
        with rewound_on_failure(generators):
            set_random_states(self._random_before, generators)
            batches = loader.batches()
            last = _fingerprint(self._last_targets)
            pass_over(
                islice(batches, self._batches_done),
                self._batches_done,
                lambda batch: _fingerprint(batch.targets) == last,
                "fit",
            )
            set_random_states(random_then, generators)
            return batches

    def _end_pass(self) -> None:
        self._finite.finish()
        if self._penalty is not None:
            self._penalty.finish()
        if self._scalars is not None:
            self._scalars.finish()
        self._history.append(self._means.over(self._ranks).result())
        self._ranks.broadcast_(self._model.buffers(), "buffers")
        self._means, self._batches_done = Means(device_of(self._model)), 0
        self._last_targets = None

    def state_dict(self, generators: Sequence[torch.Generator]) -> dict[str, Any]:
        """Return all that the steps to come depend on, but for weights and what begins anew."""
        still = set(self._still)
        return {
            "steps_done": self.steps_done,
            "history": self._history,
            "means": (self._means.examples, self._means.sums),
            "batches_done": self._batches_done,
            "last_targets": self._last_targets,
            "random_before": self._random_before,
            "random": random_states(generators),
            "optimization": self._optimization.state_dict(),
            "penalty": None if self._penalty is None else self._penalty.state_dict(),
            "own": None if self._own is None else self._own.state_dict(),
            "still": [name for name, p in self._model.named_parameters() if p in still],
            "modes": {name: m.training for name, m in self._model.named_modules()},
            # Those outside of the model's own state, too.
            "buffers": dict(self._model.named_buffers()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned; the model's weights are there already."""
        self.steps_done, self._history = state["steps_done"], list(state["history"])
        self._means.examples, sums = state["means"]
        self._means.sums.copy_(sums)
        self._batches_done, self._last_targets = state["batches_done"], state["last_targets"]
        self._random_then = state["random"]
        # Between two passes there is nothing to pass over.
        self._random_before = state["random_before" if self._batches_done else "random"]
        self._optimization.load_state_dict(state["optimization"])
        if self._penalty is not None:
            self._penalty.load_state_dict(state["penalty"])
        if self._own is not None:
            self._own.load_state_dict(state["own"])
        self._still = [self._model.get_parameter(name) for name in state["still"]]
        for name, training in state["modes"].items():
            self._model.get_submodule(name).training = training
        for name, buffer in self._model.named_buffers():
            buffer.copy_(state["buffers"][name])
        self._begun()

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
        # BatchNorms may exchange statistics in what follows: nobody is left waiting there.
        self._ranks.meet("step")
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
        over_all, loss_over_all = self._ranks.mean(torch.stack([total.detach(), loss.detach()]))
        self._finite.add(self.steps_done + 1, over_all)
        if self._penalty is not None:
            self._penalty.note(loss_over_all)
        # An optimiser may hold less than the model, and more.
        self._model.zero_grad(set_to_none=True)
        self._optimization.optimizer.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        self._ranks.average_gradients(p for p in self._model.parameters() if p.requires_grad)
        if self._penalty is not None and self._stable:
            self._penalty.precondition(self._optimization.highest_lr, own)
        self._optimization.step(self._still)
        self.steps_done += 1
        self._begun()
        return loss.detach(), penalty.detach(), *self._likelihood.correct(outputs, targets)

    def _freeze(self, example: Inputs) -> None:
        """From here on BatchNorms use their running statistics; nothing is folded."""
        self._ranks.broadcast_(self._model.buffers(), "buffers")
        self._still = self._doubled(example) if self._penalty is not None else []
        for module in self._model.modules():
            if isinstance(module, _BatchNorm) and module.training:
                module.eval()
                self._so_far.froze_batchnorm = True


def _fingerprint(targets: Tensor | None) -> int | None:
    """Return a number that tells a mini-batch's integer targets; None of others.

    Inputs may be changed at random each time that they are read, and so may other targets.
    """
    if targets is None or targets.is_floating_point() or targets.is_complex():
        return None
    return zlib.crc32(targets.detach().cpu().contiguous().numpy().tobytes())


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
    """

    def __init__(
        self,
        control: Control,
        make: Callable[[], QuadraticPenalty],
        selection: Selection,
        ranks: Ranks | None = None,
    ) -> None:
        self.penalty, self._ranks = make(), ranks or Ranks(None)
        self._control, self._make, self._selection = control, make, selection
        self._pending: _Copied | None = None
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

    def precondition(self, lr: float, own: Curvature | None) -> None:
        """As `QuadraticPenalty.precondition`."""
        self.penalty.precondition(lr, own)

    def note(self, loss: Tensor) -> None:
        """Take a step's loss, and what its penalty predicted."""
        self.finish()
        self._selection.scale.append(self.penalty.scale)
        if self._increase is None or len(self._selection.scale) % _PREDICTION_INTERVAL == 1:
            own = torch.as_tensor(
                self.penalty.predicted_increase(), dtype=torch.float64, device=loss.device
            )
            self._increase = self._ranks.mean(own)
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


class Scalars:
    """Tells a writer each step's numbers; on a GPU one step later, so that nothing waits.

    Parameters
    ----------
    writer
        Called as ``writer.add_scalar(tag, value, step)``.
    task : int
        In the tags: ``task0/loss``.
    selection : Selection or None
        Whose scale and predicted increase are told, too.
    """

    def __init__(self, writer: Any, task: int, selection: Selection | None) -> None:
        self._writer, self._task, self._selection = writer, task, selection
        self._pending: tuple[int, _Copied] | None = None

    def add(self, step: int, loss: Tensor, penalty: Tensor) -> None:
        """Take a step's loss and penalty."""
        self.finish()
        self._pending = step, _Copied(torch.stack([loss.double(), penalty.double()]))
        if not loss.is_cuda:
            self.finish()

    def finish(self) -> None:
        """Tell what has not been told yet."""
        if self._pending is None:
            return
        (step, copied), self._pending = self._pending, None
        loss, penalty = copied.read().tolist()
        self._tell("loss", loss, step)
        if self._selection is not None:
            self._tell("penalty", penalty, step)
            self._tell("scale", self._selection.scale[step - 1], step)
            self._tell("predicted increase", self._selection.increase[step - 1], step)

    def _tell(self, name: str, value: float, step: int) -> None:
        self._writer.add_scalar(f"task{self._task}/{name}", value, step)


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

    def over(self, ranks: Ranks) -> "Means":
        """Return those of what all ranks added."""
        if ranks.alone:
            return self
        total = Means(self.sums.device)
        total.sums.copy_(ranks.sum_(self.sums.clone(), "means"))
        [examples] = ranks.totals([self.examples], "examples")
        total.examples = round(examples)
        return total

    def result(self) -> dict[str, float]:
        """Return the means of what was added."""
        loss, penalty, correct, counted = self.sums.tolist()
        return {
            "loss": loss / self.examples,
            "penalty": penalty / self.examples,
            "accuracy": correct / counted if counted else math.nan,
        }
