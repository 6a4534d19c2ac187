"""Continual learning: train on a task, consolidate it, go on to the next."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import chain
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from ekfac_rs._checks import require_choice, require_count, require_nonnegative
from ekfac_rs._tensors import moved
from ekfac_rs.batchnorm import (
    WEIGHTS,
    Anchor,
    as_found,
    device_of,
    first_input,
    frozen_batchnorms,
    merged_weights,
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
    rate falling to zero along a cosine. From the second task on it first takes the new task's
    statistics into the BatchNorms (`reparameterize`) and adds the penalty ``scale * sum of the
    earlier tasks' quadratic forms`` and ``damping`` (see `QuadraticPenalty`); counting tasks as
    equally important is scale 1. `consolidate` accumulates the task's curvature; the merged view
    of the weights is the next anchor. The model stays an ordinary, trainable one all along, and
    is evaluated with its running statistics: one network for all tasks.

    Without curvature and damping there is nothing to protect, and this is ordinary fine-tuning:
    the model is trained as it is.

    Parameters
    ----------
    model : torch.nn.Module
        Trained in place.
    loss : {"cross_entropy", "mse", "bce"} or Likelihood
    approximation : str or None
        As in `estimate_curvature`. None takes no curvature: ordinary fine-tuning, or L2 to the
        anchor when there is damping.
    coordinates : {"merged", "raw"}
        "raw" leaves BatchNorm out: its parameters and statistics are carried from task to task
        unpenalised.
    statistics : {"batch", "running"}
        Those under which factors are taken.
    labels, draws, max_examples, generator
        As in `estimate_curvature`.
    weights : {"kept", "merged"}
        What `reparameterize` does with the weights when a task begins.
    scale, damping : float
        Of the penalty.
    momentum : float
        Of SGD.
    freeze_bn_after : float
        Fraction of a task's steps, from the second task on, after which BatchNorms are in eval
        mode until the task's end: 1 trains with batch statistics throughout, 0 freezes them after
        the first task (method: BN schedule). What doubles the weights then stays as it is: gamma,
        and a bias before the BatchNorm.
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
        weights: str = "kept",
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
        require_choice("weights", weights, WEIGHTS)
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
        self.weights = weights
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
        # Whether the weights have moved on under frozen statistics since.
        self._froze_batchnorm = False

    def fit(
        self,
        loader: Iterable[Any],
        *,
        epochs: int = 1,
        lr: float = 0.05,
        callback: Callable[[int, "ContinualLearner"], None] | None = None,
    ) -> list[dict[str, float]]:
        """Train on one task.

        A model in train mode is trained in the modes that its modules are in: a BatchNorm in eval
        mode keeps its statistics and is penalised under them. A model in eval mode as a whole is
        put in train mode first (see `frozen_batchnorms` for what stays frozen), and back after.

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
        history = []
        bar = tqdm(total=steps, desc="fit", disable=not self.progress, leave=False)
        with bar, _Phase(self, loader, lr, steps) as phase:
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
        return history

    def consolidate(self, loader: Iterable[Any]) -> None:
        """Close a task: accumulate its curvature and take the anchor.

        The model stays as it is, but for one case: where its BatchNorms were frozen during `fit`
        and the curvature is taken under batch statistics, `reparameterize` brings them up to the
        weights first. The eval-mode function stays.

        Parameters
        ----------
        loader : iterable of (x, y)
            The task's training data.

        Raises
        ------
        Whatever `estimate_curvature`, `reparameterize` and `merged_weights` raise.
        """
        if self._protects:
            curvature, anchor = self._consolidated(loader)
            self.curvatures += [] if curvature is None else [curvature]
            self.anchor = anchor
        self._begin_task(self.task + 1)

    def adopt(self, curvature: Curvature | None, anchor: Anchor) -> None:
        """Take over a task that was consolidated elsewhere.

        Parameters
        ----------
        curvature : Curvature or None
            Of the task's loss at the model's present weights; None where the learner takes none.
        anchor : Anchor
            The present weights, from `merged_weights` or `raw_weights`.

        Raises
        ------
        IncompatibleError
            Another approximation or coordinates than the learner's.
        ModelChangedError, UnknownLayerError, ShapeError, DtypeError, DeviceError
            The model is not theirs, as for `QuadraticPenalty`. A failed call changes nothing.
        """
        if curvature is not None:
            self._require_of_this_kind(curvature)
        elif self.approximation is not None:
            raise IncompatibleError(
                f"curvature: expected one of kind {self.approximation!r}, got none"
            )
        adopted = [*self.curvatures, *([] if curvature is None else [curvature])]
        self._penalty_of(adopted, anchor).close()
        self.curvatures, self.anchor = adopted, anchor
        self._begin_task(self.task + 1)

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
        return self._penalty_of(self.curvatures, self.anchor)

    def _penalty_of(self, curvatures: list[Curvature], anchor: Anchor) -> QuadraticPenalty:
        return QuadraticPenalty(
            self.model,
            curvatures,
            anchor,
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
            self._require_of_this_kind(curvature)
        self.model.load_state_dict(state["model"])
        self.curvatures = curvatures
        self.anchor = None if state["anchor"] is None else Anchor(**state["anchor"])
        self._begin_task(state["task"])

    @property
    def _protects(self) -> bool:
        """Whether anything is ever held on to; otherwise this is ordinary fine-tuning."""
        return self.approximation is not None or self.damping > 0.0

    def _begin_task(self, task: int) -> None:
        self.task, self._example, self._froze_batchnorm = task, None, False

    def _require_of_this_kind(self, curvature: Curvature) -> None:
        settings = curvature.settings
        if (settings.approximation, settings.coordinates) != (self.approximation, self.coordinates):
            raise IncompatibleError(
                f"curvature: expected {self.approximation!r} in {self.coordinates} coordinates, "
                f"got {curvature!r}"
            )

    def _consolidated(self, loader: Iterable[Any]) -> tuple[Curvature | None, Anchor]:
        if self._example is None:
            # The loader may draw its order from torch's random state, which is to stay.
            with as_found(self.model):
                self._example, batches = _peeked(loader, device_of(self.model))
            if isinstance(loader, Iterator):
                loader = batches  # or the mini-batch looked at would be lost
        example = self._example.to(device_of(self.model))
        curvature = None
        if self.approximation is not None:
            if self._froze_batchnorm and self.statistics == "batch":
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
        take_anchor = merged_weights if self.coordinates == "merged" else raw_weights
        return curvature, take_anchor(self.model, example=example)

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
    """The optimiser, penalty and BatchNorm mode of one task's training.

    Left as a context, it takes its hooks and gradients with it and puts modes back, also where
    entering it fails.
    """

    def __init__(
        self, learner: ContinualLearner, loader: Iterable[Any], lr: float, steps: int
    ) -> None:
        self.learner = learner
        self.loader = loader
        self.lr = lr
        self.steps = steps
        self.steps_done = 0
        later = learner.task > 0
        self.freeze_at = round(learner.freeze_bn_after * steps) if later else steps
        self.finite = _FiniteCheck(deferred=device_of(learner.model).type == "cuda")
        self.penalty: QuadraticPenalty | None = None

    def __enter__(self) -> Self:
        with ExitStack() as cleanup:
            cleanup.callback(_set_modes, _modes(self.learner.model))
            self._begin(cleanup)
            self._cleanup = cleanup.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._cleanup.close()

    def _begin(self, cleanup: ExitStack) -> None:
        learner = self.learner
        protected = learner.anchor is not None and learner.coordinates == "merged"
        if protected and self.freeze_at > 0:
            _reparameterize_if_any(learner, self.loader)
        _put_in_train_mode(learner.model)
        self.penalty = learner.penalty()
        if self.penalty is not None:
            cleanup.callback(self.penalty.close)
            self.penalty.check_lr(self.lr, learner.momentum)
        parameters = [p for p in learner.model.parameters() if p.requires_grad]
        if not parameters:
            raise OptionError("model: expected trainable parameters, got none")
        self.optimizer = torch.optim.SGD(parameters, lr=self.lr, momentum=learner.momentum)
        cleanup.callback(learner.model.zero_grad, set_to_none=True)

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

    def _freeze(self, example: Tensor) -> None:
        """From here on BatchNorms use their running statistics; nothing is folded."""
        redundant: set[int] = set()
        for layer in self.learner._layers_with_batchnorm(example):
            if not layer.batchnorm.training:
                continue  # its user froze it, and what is trained of it is theirs to say
            layer.batchnorm.eval()
            self.learner._froze_batchnorm = True
            if layer.absorbs_scale:
                # A frozen gamma and the bias before it only double the weights and the shift.
                redundant.update(id(p) for p in (layer.batchnorm.weight, layer.bias()))
        for group in self.optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in redundant]


def _modes(model: nn.Module) -> dict[nn.Module, bool]:
    return {module: module.training for module in model.modules()}


def _set_modes(modes: dict[nn.Module, bool]) -> None:
    for module, training in modes.items():
        module.training = training


def _put_in_train_mode(model: nn.Module) -> None:
    """Put a model that is in eval mode as a whole in train mode, frozen BatchNorms apart."""
    if model.training:
        return
    frozen = frozen_batchnorms(model)
    model.train()
    for name in frozen:
        model.get_submodule(name).eval()


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
            reparameterize(
                model, batches, weights=learner.weights, max_examples=learner.max_examples
            )


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
