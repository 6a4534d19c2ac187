"""Continual learning: train on a task, consolidate it, go on to the next."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from ekfac_rs._checks import require_choice, require_count, require_nonnegative
from ekfac_rs._tensors import moved
from ekfac_rs.batchnorm import (
    Anchor,
    as_found,
    device_of,
    first_input,
    is_merged,
    merge_batchnorm,
    raw_weights,
    reparameterize,
)
from ekfac_rs.curvature import (
    APPROXIMATIONS,
    STATISTICS,
    Curvature,
    estimate_curvature,
)
from ekfac_rs.errors import (
    EmptyLoaderError,
    IncompatibleError,
    LabelError,
    NonFiniteError,
    NumericalError,
    OptionError,
)
from ekfac_rs.layers import COORDINATES, AffineLayer, find_layers
from ekfac_rs.likelihood import LABELS, CrossEntropy, Likelihood, resolve
from ekfac_rs.penalty import QuadraticPenalty


class ContinualLearner:
    """Learns tasks one after another under a curvature penalty on merged weights.

    For each task call `fit`, then `consolidate`. `fit` trains with SGD and momentum, the learning
    rate falling to zero along a cosine. From the second task on it first puts BatchNorm back
    (`reparameterize`) and adds the penalty ``scale * sum of the earlier tasks' quadratic forms``
    and ``damping`` (see `QuadraticPenalty`); counting tasks as equally important is scale 1.
    `consolidate` accumulates the task's curvature and merges BatchNorm into the weights: the
    result is the next anchor. Evaluation uses the merged weights: one network for all tasks.

    Parameters
    ----------
    model : torch.nn.Module
        Trained in place.
    loss : {"cross_entropy", "mse", "bce"} or Likelihood
    approximation : str or None
        As in `estimate_curvature`. None takes no curvature: fine-tuning, or L2 to the anchor when
        there is damping.
    coordinates : {"merged", "raw"}
        "raw" leaves BatchNorm out: nothing is merged, and its parameters and statistics are
        carried from task to task unpenalised.
    statistics : {"batch", "running"}
        Those under which factors are taken.
    labels, draws, max_examples, generator
        As in `estimate_curvature`.
    scale, damping : float
        Of the penalty.
    momentum : float
        Of SGD.
    freeze_bn_after : float
        Fraction of a task's steps, from the second task on, after which BatchNorm is folded into
        the weights and stays so until the task's end: 1 trains with BatchNorm throughout, 0
        freezes it after the first task (method: BN schedule).
    progress : bool
        Show tqdm bars.

    Attributes
    ----------
    task : int
        Number of consolidated tasks.
    curvatures : list of Curvature
        One for each of them (none where ``approximation`` is None).
    anchor : Anchor or None

    Raises
    ------
    OptionError, UnsupportedLossError
        An unknown option or loss.

    References
    ----------
    Lee, Hong, Joo, Kim, CVPR 2020. Ritter, Botev, Barber, "Online structured Laplace
    approximations for overcoming catastrophic forgetting", NeurIPS 2018 (sum of the tasks'
    curvatures around the latest anchor).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: str | Likelihood = "cross_entropy",
        approximation: str | None = "xkfac-nested",
        coordinates: str = "merged",
        statistics: str = "batch",
        labels: str = "mc",
        draws: int = 1,
        scale: float = 1.0,
        damping: float = 0.0,
        momentum: float = 0.9,
        freeze_bn_after: float = 1.0,
        max_examples: int | None = None,
        generator: torch.Generator | None = None,
        progress: bool = False,
    ) -> None:
        if approximation is not None:
            require_choice("approximation", approximation, APPROXIMATIONS)
        require_choice("coordinates", coordinates, COORDINATES)
        require_choice("statistics", statistics, STATISTICS)
        require_choice("labels", labels, LABELS)
        require_count("draws", draws)
        require_nonnegative("scale", scale)
        require_nonnegative("damping", damping)
        require_nonnegative("freeze_bn_after", freeze_bn_after)
        require_nonnegative("momentum", momentum)
        self.model = model
        self.likelihood = resolve(loss)
        self.approximation = approximation
        self.coordinates = coordinates
        self.statistics = statistics
        self.labels = labels
        self.draws = draws
        self.scale = scale
        self.damping = damping
        self.momentum = momentum
        self.freeze_bn_after = freeze_bn_after
        self.max_examples = max_examples
        self.generator = generator
        self.progress = progress
        self.task = 0
        self.curvatures: list[Curvature] = []
        self.anchor: Anchor | None = None
        # Of the task since the last consolidation, once seen: see `_example_of`.
        self._example: Tensor | None = None

    def fit(
        self,
        loader: Iterable[Any],
        *,
        epochs: int = 1,
        lr: float = 0.05,
        callback: Callable[[int, "ContinualLearner"], None] | None = None,
    ) -> list[dict[str, float]]:
        """Train on one task.

        Parameters
        ----------
        loader : iterable of (x, y) with a length
            Iterated once an epoch, and once more before where BatchNorm is put back.
        epochs : int
        lr : float
            Highest learning rate; it falls to 0 along half a cosine over the task.
        callback : callable, optional
            Called as ``callback(step, learner)`` after every step, counted from 1.

        Returns
        -------
        list of dict
            For each epoch the means over examples of "loss" (without penalty), "penalty" and
            "accuracy" (nan for losses without classes) during training.

        Raises
        ------
        EmptyLoaderError
            The loader has no batches.
        NumericalError
            The loss became NaN or infinite: raised before the step is made, on a GPU after it,
            where a step's loss is read during the next one.
        """
        require_count("epochs", epochs)
        require_nonnegative("lr", lr)
        batches = len(loader)  # type: ignore[arg-type]
        if batches == 0:
            raise EmptyLoaderError("loader: expected at least one batch, got none")
        steps = epochs * batches
        phase = _Phase(self, loader, lr, steps)
        history = []
        try:
            bar = tqdm(total=steps, desc="fit", disable=not self.progress, leave=False)
            with bar:
                for _ in range(epochs):
                    means = _Means(device_of(self.model))
                    for x, y in _on_device(loader, device_of(self.model)):
                        loss, penalty, outputs = phase.step(x, y)
                        means.add(loss, penalty, self._accuracy(outputs, y), len(x))
                        bar.update()
                        if callback is not None:
                            callback(phase.steps_done, self)
                    phase.finite.finish()
                    if not means.examples:
                        raise EmptyLoaderError("loader: expected examples, got none")
                    history.append(means.result())
        finally:
            phase.close()
        return history

    def consolidate(self, loader: Iterable[Any]) -> None:
        """Close a task: accumulate its curvature, then merge BatchNorm into the anchor.

        Parameters
        ----------
        loader : iterable of (x, y)
            The task's training data.

        Raises
        ------
        Whatever `estimate_curvature` and `merge_batchnorm` raise.
        """
        if self._example is None:
            # The loader may draw its order from torch's random state, which is to stay.
            with as_found(self.model):
                self._example, batches = _peeked(loader, device_of(self.model))
            if isinstance(loader, Iterator):
                loader = batches  # or the mini-batch looked at would be lost
        example = self._example.to(device_of(self.model))
        if self.approximation is not None:
            if self.statistics == "batch" and self._is_merged(example):
                # Train-mode curvature needs a BatchNorm that normalises; the function stays.
                reparameterize(self.model, loader, max_examples=self.max_examples)
            curvature = estimate_curvature(
                self.model,
                loader,
                loss=self.likelihood,
                approximation=self.approximation,
                coordinates=self.coordinates,
                statistics=self.statistics,
                labels=self.labels,
                draws=self.draws,
                generator=self.generator,
                max_examples=self.max_examples,
                progress=self.progress,
            )
            self.anchor = self._take_anchor(example)
            self.curvatures.append(curvature)
        else:
            self.anchor = self._take_anchor(example)
        self._example = None
        self.task += 1

    @torch.no_grad()
    def evaluate(self, loaders: Sequence[Iterable[Any]]) -> list[float]:
        """Accuracy of each loader in eval mode (minus the mean loss for losses without classes).

        Parameters
        ----------
        loaders : sequence of iterables of (x, y)

        Returns
        -------
        list of float
        """
        results = []
        with as_found(self.model):
            self.model.eval()
            for loader in loaders:
                total, examples = 0.0, 0
                for x, y in _on_device(loader, device_of(self.model)):
                    outputs = self.model(x)
                    total += len(x) * float(self._score(outputs, y))
                    examples += len(x)
                if not examples:
                    raise EmptyLoaderError("loader: expected at least one example, got none")
                results.append(total / examples)
        return results

    def penalty(self) -> QuadraticPenalty | None:
        """Penalty that holds the consolidated tasks, or None before the first or without any."""
        if self.anchor is None or (not self.curvatures and not self.damping):
            return None
        return QuadraticPenalty(
            self.model,
            self.curvatures,
            self.anchor,
            damping=self.damping,
            scale=self.scale,
            coordinates=self.coordinates,
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on after the last consolidation, the model included."""
        anchor = None
        if self.anchor is not None:
            anchor = {"weights": dict(self.anchor), "batchnorms": self.anchor.batchnorms}
        return {
            "model": self.model.state_dict(),
            "task": self.task,
            "anchor": anchor,
            "curvatures": [(c.tensors(), c.metadata()) for c in self.curvatures],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises
        ------
        IncompatibleError
            The state is not a learner's, or of another kind of model or curvature.
        """
        missing = {"model", "task", "anchor", "curvatures"} - set(state)
        if missing:
            raise IncompatibleError(f"state: expected a learner's state, got one without {missing}")
        curvatures = [
            Curvature.from_tensors(tensors, meta) for tensors, meta in state["curvatures"]
        ]
        for curvature in curvatures:
            settings = curvature.settings
            if (settings.approximation, settings.coordinates) != (
                self.approximation,
                self.coordinates,
            ):
                raise IncompatibleError(
                    f"state: expected {self.approximation!r} curvature in {self.coordinates} "
                    f"coordinates, got {curvature!r}"
                )
        self.model.load_state_dict(state["model"])
        self.task, self.curvatures = state["task"], curvatures
        self.anchor = None if state["anchor"] is None else Anchor(**state["anchor"])
        self._example = None

    def _take_anchor(self, example: Tensor) -> Anchor:
        take = merge_batchnorm if self.coordinates == "merged" else raw_weights
        return take(self.model, example=example)

    def _is_merged(self, example: Tensor) -> bool:
        return any(is_merged(layer) for layer in self._layers_with_batchnorm(example))

    def _layers_with_batchnorm(self, example: Tensor) -> list[AffineLayer]:
        with as_found(self.model):
            self.model.eval()
            found = find_layers(self.model, example=example)
        return [layer for layer in found if layer.batchnorm is not None]

    def _has_classes(self) -> bool:
        return isinstance(self.likelihood, CrossEntropy)

    def _accuracy(self, outputs: Tensor, y: Tensor) -> Tensor:
        if not self._has_classes():
            return outputs.new_full((), math.nan)
        classes = y.argmax(dim=1) if y.is_floating_point() else y
        return (outputs.argmax(dim=1) == classes).double().mean()

    def _score(self, outputs: Tensor, y: Tensor) -> Tensor:
        if self._has_classes():
            return self._accuracy(outputs, y)
        return -self.likelihood.loss(outputs, y)


class _Phase:
    """The optimiser, penalty and BatchNorm mode of one task's training."""

    def __init__(
        self, learner: ContinualLearner, loader: Iterable[Any], lr: float, steps: int
    ) -> None:
        self.learner = learner
        self.lr = lr
        self.steps = steps
        self.steps_done = 0
        self.modes = {module: module.training for module in learner.model.modules()}
        later = learner.task > 0
        self.freeze_at = round(learner.freeze_bn_after * steps) if later else steps
        self.frozen: list[AffineLayer] = []
        self.finite = _FiniteCheck(deferred=device_of(learner.model).type == "cuda")
        if later and learner.coordinates == "merged" and self.freeze_at > 0:
            _reparameterize_if_any(learner, loader)
        self.penalty = learner.penalty()
        learner.model.train()
        if self.penalty is not None:
            self.penalty.check_lr(lr, learner.momentum)
        self._new_optimizer()

    def step(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One optimiser step; returns loss, penalty and the outputs, without waiting for them."""
        learner = self.learner
        if self.steps_done == 0:
            learner._example = _example_of(x)
        if self.steps_done == self.freeze_at and self.freeze_at < self.steps:
            self._freeze(_example_of(x))
        for group in self.optimizer.param_groups:
            group["lr"] = 0.5 * self.lr * (1.0 + math.cos(math.pi * self.steps_done / self.steps))
        outputs = learner.model(x)
        if self.steps_done == 0:
            learner.likelihood.validate(outputs, y)
        loss = learner.likelihood.loss(outputs, y)
        total, penalty = loss, torch.zeros_like(loss)
        if self.penalty is not None:
            try:
                penalty = self.penalty()
            except NonFiniteError as error:
                raise NumericalError(
                    f"fit: diverged at step {self.steps_done + 1}: {error}"
                ) from error
            total = loss + penalty
        self.finite.add(self.steps_done + 1, total.detach())
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.steps_done += 1
        return loss.detach(), penalty.detach(), outputs.detach()

    def close(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        if self.penalty is not None:
            self.penalty.close()
        for module, training in self.modes.items():
            module.training = training

    def _freeze(self, example: Tensor) -> None:
        """Fold BatchNorm into the weights; from here on the merged weights are the parameters."""
        learner = self.learner
        if learner.coordinates == "merged":
            merge_batchnorm(learner.model, example=example)
        self.frozen = learner._layers_with_batchnorm(example)
        for layer in self.frozen:
            layer.batchnorm.eval()
        self._new_optimizer()  # momentum of the old parameters means nothing to the new

    def _new_optimizer(self) -> None:
        # A folded BatchNorm is a shift: its gamma and the bias before it would only double the
        # weights and the shift.
        redundant: set[int] = set()
        for layer in self.frozen:
            if layer.absorbs_scale:
                redundant.update(id(p) for p in (layer.batchnorm.weight, layer.bias()))
        parameters = [
            p for p in self.learner.model.parameters() if p.requires_grad and id(p) not in redundant
        ]
        if not parameters:
            raise OptionError("model: expected trainable parameters, got none")
        self.optimizer = torch.optim.SGD(parameters, lr=self.lr, momentum=self.learner.momentum)


class _FiniteCheck:
    """Refuses a step's total that is not finite: at once or, deferred, during the next step.

    A GPU's host would otherwise wait in every step for the device to get there. Deferred, it has
    one step queued in the meantime and never more.
    """

    def __init__(self, deferred: bool) -> None:
        self.deferred = deferred
        self._pending: tuple[int, Tensor, torch.cuda.Event | None] | None = None

    def add(self, step: int, total: Tensor) -> None:
        """Take a step's total and check it or, deferred, the one before."""
        if self.deferred:
            self.finish()
        copied = None
        if total.is_cuda:
            # Reading the tensor later would wait for all that is queued by then; the event is
            # over as soon as the copy is.
            stream = torch.cuda.current_stream(total.device)
            total = total.to("cpu", non_blocking=True)
            copied = stream.record_event()
        self._pending = step, total, copied
        if not self.deferred:
            self.finish()

    def finish(self) -> None:
        """Check what has not been checked yet."""
        if self._pending is None:
            return
        (step, total, copied), self._pending = self._pending, None
        if copied is not None:
            copied.synchronize()
        if not math.isfinite(float(total)):
            since = "; the weights have moved on by one step" if self.deferred else ""
            raise NumericalError(
                f"fit: expected a finite loss, got {float(total)} at step {step}{since}"
            )


class _Means:
    """Running means over examples, summed where the values are: only the result is waited for."""

    def __init__(self, device: torch.device) -> None:
        self.examples = 0
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)

    def add(self, loss: Tensor, penalty: Tensor, accuracy: Tensor, examples: int) -> None:
        self.examples += examples
        values = [value.to(self.sums) for value in (loss, penalty, accuracy)]
        self.sums += examples * torch.stack(values)

    def result(self) -> dict[str, float]:
        loss, penalty, accuracy = (self.sums / self.examples).tolist()
        return {"loss": loss, "penalty": penalty, "accuracy": accuracy}


def _reparameterize_if_any(learner: ContinualLearner, loader: Iterable[Any]) -> None:
    """Put BatchNorm back in one pass, unless the first mini-batch shows none that a layer has."""
    model = learner.model
    if not any(isinstance(module, _BatchNorm) for module in model.modules()):
        return
    with as_found(model):
        example, batches = _peeked(loader, device_of(model))
        if learner._layers_with_batchnorm(example):
            reparameterize(model, batches, max_examples=learner.max_examples)


def _example_of(x: Tensor) -> Tensor:
    """Two inputs: they show the data flow as well as a whole mini-batch does.

    Without them nothing tells whether a BatchNorm after a Linear is over its outputs.
    """
    return x[:2].clone()


def _peeked(loader: Iterable[Any], device: torch.device) -> tuple[Tensor, Iterator[Any]]:
    """Two inputs of a loader's first mini-batch, and all of its mini-batches."""
    batches = iter(loader)
    first = next(batches, None)
    if first is None:
        raise EmptyLoaderError("loader: expected at least one batch of examples, got none")
    x = first_input(first)
    if not isinstance(x, Tensor):
        raise LabelError(f"loader: expected pairs (x, y) of tensors, got {type(x).__name__} for x")
    return _example_of(x).to(device), chain([first], batches)


def _on_device(loader: Iterable[Any], device: torch.device) -> Iterable[tuple[Tensor, Tensor]]:
    for batch in loader:
        yield moved(batch[0], device), moved(batch[1], device)
