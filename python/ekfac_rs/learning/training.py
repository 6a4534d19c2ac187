"""One task's training: optimiser steps on loss and penalty, checkpoints between them."""

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ekfac_rs._checkpoints import (
    pass_over,
    random_states,
    rewound_on_failure,
    set_random_states,
)
from ekfac_rs._ranks import Ranks
from ekfac_rs.batchnorm import device_of, frozen_batchnorms
from ekfac_rs.errors import NonFiniteError
from ekfac_rs.learning.optimization import Optimization
from ekfac_rs.learning.protection import Protection, SoFar
from ekfac_rs.learning.watching import FiniteCheck, Means, Scalars
from ekfac_rs.likelihood import Likelihood
from ekfac_rs.loading import Batch, Loader

# Outputs and targets of a mini-batch, as the loss takes them.
Outputs = Callable[[Batch], tuple[Tensor, Tensor]]


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
    protection : Protection
    plan : Plan
    so_far : SoFar
        Filled in.
    scalars : Scalars or None
    begun : callable
        Called when the first step is made.
    ranks : Ranks
        That make the steps together, each of mini-batches of its own: of the mean gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        outputs: Outputs,
        optimization: Optimization,
        protection: Protection,
        *,
        plan: Plan,
        so_far: SoFar,
        scalars: Scalars | None,
        begun: Callable[[], object],
        ranks: Ranks,
    ) -> None:
        self._model = model
        self._likelihood = likelihood
        self._outputs = outputs
        self._optimization = optimization
        self._protection = protection
        self._plan = plan
        self._so_far = so_far
        self._scalars = scalars
        self._begun = begun
        self._ranks = ranks
        self._finite = FiniteCheck(deferred=device_of(model).type == "cuda")
        self._history: list[dict[str, float]] = []
        # Of the present pass through the loader.
        self._means = Means(device_of(model))
        self._batches_done = 0
        self._last_targets: Tensor | None = None
        self._random_before: Mapping[str, Any] = {}
        # Random states to go on with, once the mini-batches before are passed over.
        self._random_then: dict[str, Any] | None = None

    @property
    def steps_done(self) -> int:
        """How many there are so far."""
        return self._protection.steps_done

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
        self._protection.begin_anew()
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
        self._protection.finish()
        if self._scalars is not None:
            self._scalars.finish()
        self._history.append(self._means.over(self._ranks).result())
        self._ranks.broadcast_(self._model.buffers(), "buffers")
        self._means, self._batches_done = Means(device_of(self._model)), 0
        self._last_targets = None

    def state_dict(self, generators: Sequence[torch.Generator]) -> dict[str, Any]:
        """Return all that the steps to come depend on, but for weights and what begins anew."""
        return {
            **self._protection.state_dict(),
            "history": self._history,
            "means": (self._means.examples, self._means.sums),
            "batches_done": self._batches_done,
            "last_targets": self._last_targets,
            "random_before": self._random_before,
            "random": random_states(generators),
            "optimization": self._optimization.state_dict(),
            "modes": {name: m.training for name, m in self._model.named_modules()},
            # Those outside of the model's own state, too.
            "buffers": dict(self._model.named_buffers()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned; the model's weights are there already."""
        self._protection.load_state_dict(state)
        self._history = list(state["history"])
        self._means.examples, sums = state["means"]
        self._means.sums.copy_(sums)
        self._batches_done, self._last_targets = state["batches_done"], state["last_targets"]
        self._random_then = state["random"]
        # Between two passes there is nothing to pass over.
        self._random_before = state["random_before" if self._batches_done else "random"]
        self._optimization.load_state_dict(state["optimization"])
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
        self._protection.before_forward(lambda: batch)
        # BatchNorms may exchange statistics in what follows: nobody is left waiting there.
        self._ranks.meet("step")
        outputs, targets = self._outputs(batch)
        if first or not outputs.is_cuda:
            self._likelihood.validate(outputs, targets)
        if first:
            with suppress(NonFiniteError):  # the loss is not finite either, and says so below
                self._likelihood.check_outputs(outputs, targets)
        loss = self._likelihood.loss(outputs, targets)
        penalty = self._protection.penalty()
        total = loss if penalty is None else loss + penalty
        over_all, loss_over_all = self._ranks.mean(torch.stack([total.detach(), loss.detach()]))
        self._finite.add(self.steps_done + 1, over_all)
        self._protection.note(loss_over_all)
        # An optimiser may hold less than the model, and more.
        self._model.zero_grad(set_to_none=True)
        self._optimization.optimizer.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        self._ranks.average_gradients(p for p in self._model.parameters() if p.requires_grad)
        self._protection.before_step(lambda: self._optimization.rates)
        self._optimization.step()
        self._protection.steps_done += 1
        self._begun()
        told = torch.zeros_like(loss) if penalty is None else penalty
        return loss.detach(), told.detach(), *self._likelihood.correct(outputs, targets)


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
