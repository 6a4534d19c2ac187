"""Continual learning: train on a task, consolidate it, go on to the next."""

import math
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from itertools import count, islice
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from ekfac_rs._checks import require_choice, require_count, require_nonnegative
from ekfac_rs._modes import bare_model, own_modes
from ekfac_rs._tensors import write_all
from ekfac_rs.batchnorm import (
    WEIGHTS,
    Anchor,
    as_found,
    device_of,
    frozen_batchnorms,
    merged_weights,
    raw_weights,
    reparameterize,
    weight_norms,
)
from ekfac_rs.batchnorm.statistics import kept_batchnorms, restored_on_failure
from ekfac_rs.curvature import (
    APPROXIMATIONS,
    CORRECTIONS,
    STATISTICS,
    Curvature,
    estimate_curvature,
)
from ekfac_rs.errors import (
    EkfacError,
    EmptyLoaderError,
    IncompatibleError,
    NonFiniteError,
    NumericalError,
    OptionError,
    UnsupportedLayerError,
)
from ekfac_rs.heads import MakesModel, heads_of, require_same_tensors
from ekfac_rs.layers import COORDINATES, AffineLayer, find_layers, require_names
from ekfac_rs.likelihood import LABELS, Likelihood, resolve
from ekfac_rs.loading import Batch, Inputs, Loader, Source, outputs_of
from ekfac_rs.optimization import (
    MakesOptimizer,
    MakesScheduler,
    Optimization,
    require_optimizer,
    require_scheduler,
)
from ekfac_rs.penalty import QuadraticPenalty

STEPS = ("stable", "explicit")


class ContinualLearner:
    """Learns tasks one after another under a curvature penalty on merged weights.

    For each task call `fit`, then `consolidate`. `fit` trains with SGD and momentum, the learning
    rate falling to zero along a cosine, or as ``optimizer`` and ``scheduler`` say. From the second
    task on it first takes the new task's statistics into the BatchNorms (`reparameterize`) and adds
    the penalty ``scale * sum of the earlier tasks' quadratic forms`` and ``damping`` (see
    `QuadraticPenalty`); counting tasks as equally important is scale 1. `consolidate` accumulates
    the task's curvature; the merged view of the weights is the next anchor. The model stays an
    ordinary, trainable one all along, and is evaluated with its running statistics: one network
    for all tasks.

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
    labels, draws, correction, max_examples, generator
        As in `estimate_curvature`.
    head : "new", callable or None
        What a task has of its own, where all else is shared. None: nothing, one output layer
        serves all tasks; `grow` makes room for more classes in it. "new": an output layer. The
        first task's is the model's own; for each later task `fit` puts a new one, of zeros, in its
        place. A callable gives the whole model of a task, as ``head(task)``, called once for each
        task after the first (tasks are counted from 0, the first task's model is ``model``). It
        needs ``layers``: the names of modules that all models share, each under the same name,
        with the BatchNorms that belong to them.
        What a task has of its own is learnt unpenalised and put aside when the task is over; later
        tasks do not change it, and so its curvature is not kept: there is nothing to hold. What
        else is shared, but in no shared layer, trains on.
    output_layer : str, optional
        Name of the output layer, a `torch.nn.Linear`. Default: the Linear whose output is the
        model's, where there is one, found when the first task is consolidated.
    layers : collection of str, optional
        Names of the layers that curvature, anchor and penalty are on, as in `estimate_curvature`;
        a layer's BatchNorm is its own. All others train freely, as in ordinary training: their
        BatchNorms keep their running statistics when a task begins. Default: all but an output
        layer that a task has of its own, and every trainable parameter must have a block.
    weights : {"kept", "first", "merged"}
        What `reparameterize` does with the weights when a task begins; "first" brings rows back to
        the norms that they had when the learner was made.
    scale, damping : float
        Of the penalty.
    step : {"stable", "explicit"}
        "stable" multiplies gradients as `QuadraticPenalty.precondition` does, so that training
        does not diverge on the penalty. "explicit" leaves them alone and warns where the learning
        rate is too high for that (`QuadraticPenalty.check_lr`; of SGD alone). Where groups of
        parameters have learning rates of their own, both look at the highest that there was so
        far in the task. Optimisers whose steps do not grow with the gradient, such as Adam, do not
        diverge in either case; for them "stable" turns steps away from what is held on to.
    optimizer : callable, optional
        Called as ``optimizer(parameters, lr=lr)`` when a task's training begins, with the list of
        the model's trainable parameters and the learning rate given to `fit`; returns a
        `torch.optim.Optimizer`. Torch's own classes are such callables, and so is
        ``functools.partial(torch.optim.AdamW, weight_decay=0.01)``. Default: SGD with
        ``momentum``.
    scheduler : "cosine", callable or None
        Called as ``scheduler(optimizer, steps)`` with the number of steps that training will take;
        returns a `torch.optim.lr_scheduler.LRScheduler`, which is stepped after every step of the
        optimiser. "cosine" lets each group's learning rate fall to 0 along half a cosine; None
        leaves them alone.
    momentum : float
        Of the default optimiser; no other is given it.
    input_fn, target_fn, output_fn : callable, optional
        As in `estimate_curvature`, for every loader that the learner is given.
    freeze_bn_after : float
        Fraction of a task's steps, from the second task on, after which BatchNorms are in eval
        mode until the task's end: 1 trains with batch statistics throughout, 0 freezes them after
        the first task (method: merged weights). What doubles the weights then stays as it is:
        gamma, and a bias before the BatchNorm.
    progress : bool
        Show tqdm bars.

    Attributes
    ----------
    model : torch.nn.Module
        The one in use: the present task's, unless `use_task` has chosen another.
    task : int
        Number of consolidated tasks: the present one's, counted from 0.
    curvatures : list of Curvature
        One for each of them (none where ``approximation`` is None).
    anchor : Anchor or None

    Raises
    ------
    OptionError, UnsupportedLossError
        An unknown option or loss; an optimizer or scheduler that cannot be called; an output layer
        among shared ones, or a callable as head without the names of these.
    UnknownLayerError, UnsupportedLayerError
        ``layers`` or ``output_layer`` names what is no layer of the model; the output layer is no
        plain Linear.

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
        correction: str | None = None,
        head: str | MakesModel | None = None,
        output_layer: str | None = None,
        layers: Collection[str] | None = None,
        weights: str = "kept",
        scale: float = 1.0,
        damping: float = 0.0,
        step: str = "stable",
        optimizer: MakesOptimizer | None = None,
        scheduler: str | MakesScheduler | None = "cosine",
        momentum: float = 0.9,
        freeze_bn_after: float = 1.0,
        max_examples: int | None = None,
        input_fn: Callable[[Any], Any] | None = None,
        target_fn: Callable[[Any], Tensor] | None = None,
        output_fn: Callable[[Any], Tensor] | None = None,
        generator: torch.Generator | None = None,
        progress: bool = False,
    ) -> None:
        if approximation is not None:
            require_choice("approximation", approximation, APPROXIMATIONS)
        require_choice("coordinates", coordinates, COORDINATES)
        require_choice("statistics", statistics, STATISTICS)
        require_choice("labels", labels, LABELS)
        if correction is not None:
            require_choice("correction", correction, CORRECTIONS)
        require_choice("weights", weights, WEIGHTS)
        require_choice("step", step, STEPS)
        require_optimizer(optimizer)
        require_scheduler(scheduler)
        require_count("draws", draws)
        require_nonnegative("scale", scale)
        require_nonnegative("damping", damping)
        require_nonnegative("freeze_bn_after", freeze_bn_after)
        require_nonnegative("momentum", momentum)
        model = bare_model(model)
        if layers is not None:
            require_names(layers, model)
        self._heads = heads_of(model, head, output_layer, layers)
        self.likelihood = resolve(loss)
        self.approximation = approximation
        self.coordinates = coordinates
        self.statistics = statistics
        self.labels = labels
        self.draws = draws
        self.correction = correction
        self.layers = layers if layers is None else tuple(layers)
        self.weights = weights
        self.scale = scale
        self.damping = damping
        self.step = step
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.momentum = momentum
        self.freeze_bn_after = freeze_bn_after
        self.max_examples = max_examples
        self.input_fn = input_fn
        self.target_fn = target_fn
        self.output_fn = output_fn
        self.generator = generator
        self.progress = progress
        self.task = 0
        self.curvatures: list[Curvature] = []
        self.anchor: Anchor | None = None
        # For weights="first": those that the learner was given.
        self._norms = weight_norms(self.model)
        # Of the task since the last consolidation, once seen: without one nothing tells whether
        # a BatchNorm after a Linear is over its outputs.
        self._example: Inputs | None = None
        # Whether the weights have moved on under frozen statistics since.
        self._froze_batchnorm = False

    @own_modes()
    def fit(
        self,
        loader: Source,
        *,
        epochs: int | None = None,
        steps: int | None = None,
        lr: float = 0.05,
        classes: int | None = None,
        callback: Callable[[int, "ContinualLearner"], None] | None = None,
    ) -> list[dict[str, float]]:
        """Train on one task.

        A model in train mode is trained in the modes that its modules are in: a BatchNorm in eval
        mode keeps its statistics and is penalised under them. A model in eval mode as a whole is
        put in train mode first (see `frozen_batchnorms` for what stays frozen), and back after.

        Parameters
        ----------
        loader : iterable of (x, y), or a function that returns one
            As in `estimate_curvature`. Gone through once an epoch, and once more before where
            BatchNorms take new statistics.
        epochs : int, optional
            Default: 1, where there are no ``steps``. The schedule needs the number of steps: a
            loader without a length is gone through once more, before, to count them.
        steps : int, optional
            Train for so many steps instead, through the loader as often as it takes.
        lr : float
            Learning rate that the optimiser is made with; by default the highest: it falls to 0
            along half a cosine over the task.
        classes : int, optional
            Number of outputs of a new output layer (``head="new"``, from the second task on).
            Default: as many as the targets need, whose classes count from 0; the loader is gone
            through once more to see.
        callback : callable, optional
            Called as ``callback(step, learner)`` after every step, counted from 1.

        Returns
        -------
        list of dict
            For each epoch, or pass through the loader, the means over examples of "loss" (without
            penalty), "penalty" and "accuracy" (nan for losses without classes) during training.

        Raises
        ------
        OptionError
            Both epochs and steps; a number below 1; an iterator that ends before training does;
            classes where there is no new output layer, or none where targets do not tell;
            the learner's optimizer or scheduler returned something else, or one whose ``step``
            needs an argument.
        EmptyLoaderError, LabelError, ShapeError, DtypeError, UnsupportedLossError
            The loader has no examples, or a mini-batch does not fit.
        BatchNormError
            A mini-batch of one under batch statistics.
        ModelChangedError
            The output layer is not the one that the learner put there; the model of a new task does
            not share what it should.
        NumericalError
            The loss became NaN or infinite: raised before the step is made, on a GPU after it,
            where a step's loss is read during the next one.
        """
        require_nonnegative("lr", lr)
        if classes is not None:
            require_count("classes", classes)
        source = self._loader(loader)
        with ExitStack() as undo:
            self._heads.begin(self.task, undo, classes, lambda: self._classes_in(source))
            passes, total = self._schedule(source, epochs, steps)
            with _Phase(self, source, lr, total, undo) as phase:
                return self._trained(phase, passes, callback)

    def _trained(
        self,
        phase: "_Phase",
        passes: int | None,
        callback: Callable[[int, "ContinualLearner"], None] | None,
    ) -> list[dict[str, float]]:
        """Go through the loader so often, or until all steps are made, and report each time."""
        history, total = [], phase.steps
        with tqdm(total=total, desc="fit", disable=not self.progress, leave=False) as bar:
            for _ in count() if passes is None else range(passes):
                means = _Means(device_of(self.model))
                left = total - phase.steps_done if passes is None else None
                for batch in islice(phase.loader.batches(), left):
                    loss, penalty, correct, counted = phase.step(batch)
                    means.add(loss, penalty, batch.examples, correct, counted)
                    bar.update()
                    if callback is not None:
                        callback(phase.steps_done, self)
                phase.finite.finish()
                history.append(means.result())
                if passes is None and phase.steps_done == total:
                    break
        return history

    @own_modes()
    def consolidate(self, loader: Source) -> None:
        """Close a task: accumulate its curvature and take the anchor.

        The model stays as it is, but for one case: where its BatchNorms were frozen during `fit`
        and the curvature is taken under batch statistics, `reparameterize` brings them up to the
        weights first. The eval-mode function stays.

        Parameters
        ----------
        loader : iterable of (x, y), or a function that returns one
            The task's training data, as in `estimate_curvature`.

        Raises
        ------
        OptionError, UnknownLayerError
            The output layer cannot be found; a new task was not fitted; nothing is shared.
        Whatever `estimate_curvature`, `reparameterize` and `merged_weights` raise.
        """
        source = self._loader(loader)
        with ExitStack() as undo:
            self._heads.begin(self.task, undo, None, None)
            self._heads.bind(lambda: self._example_of(source), undo)
            self._require_own_layer_apart()
            if self._protects:
                with restored_on_failure(self.model):
                    curvature, anchor = self._consolidated(source)
                self._share(anchor, undo)
                self.curvatures += [] if curvature is None else [curvature]
                self.anchor = anchor
            undo.pop_all()
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
            Another approximation, correction, coordinates or layers than the learner's.
        ModelChangedError, UnknownLayerError, ShapeError, DtypeError, DeviceError
            The model is not theirs, as for `QuadraticPenalty`. A failed call changes nothing.
        OptionError, UnsupportedLayerError
            ``head="new"``, and the output layer can only be found in a forward pass: name it.
        """
        if curvature is not None:
            self._require_of_this_kind(curvature)
        elif self.approximation is not None:
            raise IncompatibleError(
                f"curvature: expected one of kind {self.approximation!r}, got none"
            )
        adopted = [*self.curvatures, *([] if curvature is None else [curvature])]
        with ExitStack() as undo:
            self._heads.bind(lambda: None, undo)
            self._require_own_layer_apart(*anchor, *(curvature or ()))
            self._penalty_of(adopted, anchor).close()
            self._share(anchor, undo)
            undo.pop_all()
        self.curvatures, self.anchor = adopted, anchor
        self._begin_task(self.task + 1)

    def grow(self, classes: int) -> None:
        """Make room for classes that were not there before, in one output layer for all tasks.

        The output layer's weight and bias become new parameters with more rows, the new ones zero;
        the module stays the same. Where it is penalised, earlier tasks hold on to their own rows
        exactly as before, and to nothing of the new ones: their blocks are zero there. ``damping``
        draws new rows to zero, where they begin, as it does all else to the anchor.

        Parameters
        ----------
        classes : int
            Number of outputs from now on.

        Raises
        ------
        OptionError
            Not more than before; tasks have heads of their own; the output layer cannot be told
            from the others: name it.
        UnsupportedLayerError
            It is no plain Linear, feeds a BatchNorm, or can only be found in a forward pass. A
            failed call changes nothing.
        """
        require_count("classes", classes)
        example = None if self._example is None else self._example.to(device_of(self.model))
        with ExitStack() as undo:
            name = self._heads.grow(classes, example, undo)
            if self.anchor is not None and self.anchor.batchnorms.get(name) is not None:
                raise UnsupportedLayerError(
                    f"layer {name!r}: expected an output layer that feeds no BatchNorm, got one "
                    "that does, which more outputs would not fit"
                )
            curvatures = [
                curvature.embedded(name, classes) if name in curvature else curvature
                for curvature in self.curvatures
            ]
            undo.pop_all()
        self.curvatures = curvatures
        if self.anchor is not None and name in self.anchor:
            weight = _with_rows(self.anchor[name], classes)
            self.anchor = Anchor({**self.anchor, name: weight}, self.anchor.batchnorms)

    def use_task(self, task: int) -> nn.Module:
        """Bring the model of a task that has learnt into use, and return it.

        With ``head="new"`` its output layer is put into the model. `fit` and `consolidate` go back
        to the present task's by themselves; `evaluate` needs none of this.

        Parameters
        ----------
        task : int
            Counted from 0.

        Returns
        -------
        torch.nn.Module

        Raises
        ------
        OptionError
            There is no such task, or it has no model yet.
        ModelChangedError
            The output layer is not the one that the learner put there.
        """
        self._require_tasks([task])
        with ExitStack() as undo:
            self._heads.use(task, undo)
            undo.pop_all()
        return self.model

    @own_modes()
    @torch.no_grad()
    def evaluate(
        self, loaders: Sequence[Source], tasks: Sequence[int] | None = None
    ) -> list[float]:
        """Accuracy of each loader in eval mode (minus the mean loss for losses without classes).

        Targets that count for nothing (``ignore_index``, probabilities of 0) are left out.

        Parameters
        ----------
        loaders : sequence of iterables of (x, y)
            As in `estimate_curvature`.
        tasks : sequence of int, optional
            For each loader the task whose model is evaluated, where tasks have heads of their own.
            Default: the first loader is the first task's, the second the second's, and so on.

        Returns
        -------
        list of float

        Raises
        ------
        OptionError
            Not as many tasks as loaders; a task that has no model.
        ModelChangedError
            The output layer is not the one that the learner put there.
        EmptyLoaderError, LabelError, ShapeError, DtypeError, UnsupportedLossError, NonFiniteError
            A loader has no examples; a mini-batch does not fit; outputs are NaN or infinite.
        """
        if tasks is None and self._heads.tasks is None:
            return [self._evaluated(loader) for loader in loaders]
        tasks = range(len(loaders)) if tasks is None else tasks
        if len(tasks) != len(loaders):
            raise OptionError(f"tasks: expected one for each of {len(loaders)}, got {len(tasks)}")
        self._require_tasks(tasks)
        results = []
        for loader, task in zip(loaders, tasks, strict=True):
            with self._heads.used(task):
                results.append(self._evaluated(loader))
        return results

    def _evaluated(self, loader: Source) -> float:
        """Evaluate the model in use."""
        result = _Means(device_of(self.model))
        with as_found(self.model):
            self.model.eval()
            for batch in self._loader(loader).batches():
                outputs, targets = self._outputs(batch)
                self.likelihood.validate(outputs, targets)
                self.likelihood.check_outputs(outputs, targets)
                loss = self.likelihood.loss(outputs, targets)
                correct, counted = self.likelihood.correct(outputs, targets)
                result.add(loss, torch.zeros_like(loss), batch.examples, correct, counted)
        means = result.result()
        return means["accuracy"] if self.likelihood.has_classes else -means["loss"]

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
            "norms": dict(self._norms),
            "heads": self._heads.state_dict(),
            "curvatures": [(c.tensors(), c.metadata()) for c in self.curvatures],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises
        ------
        IncompatibleError
            The state is not a learner's, or of another kind of model, head or curvature. A failed
            call changes nothing.
        """
        missing = {"model", "task", "anchor", "norms", "curvatures"} - set(state)
        if missing:
            raise IncompatibleError(f"state: expected a learner's state, got one without {missing}")
        try:
            curvatures = [
                Curvature.from_tensors(tensors, meta) for tensors, meta in state["curvatures"]
            ]
            anchor = None if state["anchor"] is None else Anchor(**state["anchor"])
        except (KeyError, TypeError, ValueError) as error:
            raise IncompatibleError(f"state: expected a learner's state, got {error!r}") from error
        for curvature in curvatures:
            self._require_of_this_kind(curvature)
        with ExitStack() as undo:
            self._reshape(state.get("heads", {"kind": "one"}), undo)
            require_same_tensors(self.model, state["model"])
            if anchor is not None:
                self._share(anchor, undo)
            undo.pop_all()
        self._heads.load_tensors(state.get("heads", {}))
        self.model.load_state_dict(state["model"])
        self.curvatures, self.anchor = curvatures, anchor
        self._norms = dict(state["norms"])
        self._begin_task(state["task"])

    def _reshape(self, heads: dict[str, Any], undo: ExitStack) -> None:
        """Give models and heads the shapes that a state's have."""
        if heads.get("kind") != self._heads.kind:
            raise IncompatibleError(
                f"state: expected one of {self._heads.words}, got one of another kind of head"
            )
        try:
            self._heads.reshape(heads, undo)
        except EkfacError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise IncompatibleError(f"state: expected a learner's state, got {error!r}") from error

    @property
    def model(self) -> nn.Module:
        """The model in use."""
        return self._heads.model

    @property
    def _protects(self) -> bool:
        """Whether anything is ever held on to; otherwise this is ordinary fine-tuning."""
        return self.approximation is not None or self.damping > 0.0

    def _begin_task(self, task: int) -> None:
        self.task, self._example, self._froze_batchnorm = task, None, False

    def _require_of_this_kind(self, curvature: Curvature) -> None:
        settings = curvature.settings
        theirs = settings.approximation, settings.coordinates, settings.correction
        if theirs != (self.approximation, self.coordinates, self.correction):
            corrected = "" if self.correction is None else f" with {self.correction!r} corrected"
            raise IncompatibleError(
                f"curvature: expected {self.approximation!r}{corrected} in {self.coordinates} "
                f"coordinates, got {curvature!r}"
            )
        if self.layers is not None and set(self.layers) != set(curvature.layers):
            raise IncompatibleError(
                f"curvature: expected one of the layers {', '.join(self.layers)}, got "
                f"{', '.join(curvature.layers)}"
            )

    def _require_tasks(self, tasks: Sequence[int]) -> None:
        known = range(self.task + 1) if self._heads.tasks is None else self._heads.tasks
        for task in tasks:
            if task not in known:
                raise OptionError(
                    f"task: expected one of {', '.join(map(str, known))}, got {task!r}"
                )

    def _require_own_layer_apart(self, *shared: str) -> None:
        """Refuse a layer that is to be every task's own among those that are shared."""
        own = self._heads.own_layer
        if own is not None and own in (*shared, *(self.layers or ())):
            raise OptionError(
                f"layers: expected shared layers, got {own!r}, the output layer, of which every "
                "task has one of its own"
            )

    def _share(self, anchor: Anchor, undo: ExitStack) -> None:
        """Let the models of all tasks share the BatchNorms that are merged into shared layers."""
        names = [anchor.batchnorms.get(layer) for layer in anchor]
        self._heads.share([name for name in names if name is not None], undo)

    def _shared_layers(self, example: Inputs) -> tuple[str, ...] | None:
        """Names of the layers that are penalised; None for all."""
        own = self._heads.own_layer
        if self.layers is not None or own is None:
            return self.layers
        with as_found(self.model):
            self.model.eval()
            found = find_layers(self.model, coordinates=self.coordinates, example=example)
        if any(x.name == own and x.batchnorm is not None for x in found):
            raise UnsupportedLayerError(
                f"layer {own!r}: expected an output layer that feeds no BatchNorm, got one that "
                "does, which a new output layer would not fit"
            )
        names = tuple(x.name for x in found if x.name != own)
        if not names:
            raise OptionError(
                f"model: expected a trainable layer besides the output layer {own!r}, got none: "
                "approximation=None and damping=0 hold on to nothing"
            )
        return names

    def _example_of(self, source: Loader) -> Inputs:
        """Two examples of the task: those seen in training, or the loader's first."""
        if self._example is None:
            # The loader may draw its order from torch's random state, which is to stay.
            with as_found(self.model):
                self._example = source.example()
        return self._example.to(device_of(self.model))

    def _classes_in(self, source: Loader) -> int:
        """Count the classes of a task, in one pass."""
        source.require_passes(2, "fit, which counts the classes of a new output layer (classes=)")
        # The loader may draw its order from torch's random state, which is to stay.
        with as_found(self.model):
            most = max(self.likelihood.classes_in(batch.targets) for batch in source.batches())
        if most == 0:
            raise OptionError(
                f"classes: expected the number of a new layer's outputs, which targets of "
                f"{self.likelihood!r} do not tell, got none"
            )
        return most

    def _consolidated(self, source: Loader) -> tuple[Curvature | None, Anchor]:
        if self._froze_batchnorm and self.statistics == "batch" and self.approximation is not None:
            source.require_passes(2, "consolidate after a BatchNorm was frozen")
        example = self._example_of(source)
        layers, curvature = self._shared_layers(example), None
        if self.approximation is not None:
            if self._froze_batchnorm and self.statistics == "batch":
                reparameterize(
                    self.model,
                    source,
                    layers=self.layers,
                    max_examples=self.max_examples,
                    input_fn=self.input_fn,
                )
            curvature = estimate_curvature(
                self.model,
                source,
                loss=self.likelihood,
                approximation=self.approximation,
                coordinates=self.coordinates,
                statistics=self.statistics,
                labels=self.labels,
                draws=self.draws,
                correction=self.correction,
                generator=self.generator,
                max_examples=self.max_examples,
                layers=layers,
                input_fn=self.input_fn,
                target_fn=self.target_fn,
                output_fn=self.output_fn,
                progress=self.progress,
            )
        take_anchor = merged_weights if self.coordinates == "merged" else raw_weights
        return curvature, take_anchor(self.model, layers=layers, example=example)

    def _layers_with_batchnorm(self, example: Inputs) -> list[AffineLayer]:
        with as_found(self.model):
            self.model.eval()
            found = find_layers(self.model, layers=self.layers, example=example)
        return [layer for layer in found if layer.batchnorm is not None]

    def _loader(self, source: Source) -> Loader:
        device = device_of(self.model)
        return Loader(source, device, input_fn=self.input_fn, target_fn=self.target_fn)

    def _schedule(
        self, source: Loader, epochs: int | None, steps: int | None
    ) -> tuple[int | None, int]:
        """Return passes through the loader (None for as many as it takes) and steps in all."""
        if epochs is not None and steps is not None:
            raise OptionError(f"fit: expected epochs or steps, got {epochs} and {steps}")
        if steps is not None:
            require_count("steps", steps)
            return None, steps
        passes = 1 if epochs is None else epochs
        require_count("epochs", passes)
        source.require_passes(passes + (not source.has_length), "fit without steps=")
        # Counting may draw from torch's random state, which is to stay.
        with as_found(self.model):
            mini_batches = source.mini_batches()
        if mini_batches == 0:
            raise EmptyLoaderError("loader: expected at least one batch of examples, got none")
        return passes, passes * mini_batches

    def _outputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Call the model; returns outputs and targets as the loss takes them."""
        outputs = outputs_of(self.model, batch.inputs, self.output_fn)
        return self.likelihood.arranged(outputs, batch.targets, batch.examples)


class _Phase:
    """The optimiser, penalty and BatchNorm mode of one task's training.

    Left as a context, it takes its hooks and gradients with it and puts modes back, also where
    entering it fails. What else was changed before the first step, ``undo`` takes back until then.
    """

    def __init__(
        self,
        learner: ContinualLearner,
        loader: Loader,
        lr: float,
        steps: int,
        undo: ExitStack,
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
        self.still: list[nn.Parameter] = []
        self._undo = undo

    def __enter__(self) -> Self:
        # What `reparameterize` may write before the first step is made.
        self._undo.callback(write_all, kept_batchnorms(self.learner.model))
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
        self.optimization = Optimization(
            [p for p in learner.model.parameters() if p.requires_grad],
            self.lr,
            self.steps,
            learner.optimizer or partial(torch.optim.SGD, momentum=learner.momentum),
            learner.scheduler,
        )
        cleanup.callback(learner.model.zero_grad, set_to_none=True)
        sgd = self.optimization.sgd()
        if self.penalty is not None and learner.step == "explicit" and sgd is not None:
            self.penalty.check_lr(*sgd)

    def step(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One optimiser step; returns loss, penalty and hits (`Likelihood.correct`), not waiting.

        On a GPU only the first step looks at its targets.
        """
        learner = self.learner
        if self.steps_done == 0:
            learner._example = batch.inputs.first(2).clone()
        if self.steps_done == self.freeze_at and self.freeze_at < self.steps:
            self._freeze(batch.inputs.first(2))
        outputs, targets = learner._outputs(batch)
        if self.steps_done == 0 or not outputs.is_cuda:
            learner.likelihood.validate(outputs, targets)
        if self.steps_done == 0:
            with suppress(NonFiniteError):  # the loss is not finite either, and says so below
                learner.likelihood.check_outputs(outputs, targets)
        loss = learner.likelihood.loss(outputs, targets)
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
        # An optimiser may hold less than the model, and more.
        learner.model.zero_grad(set_to_none=True)
        self.optimization.optimizer.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        if self.penalty is not None and learner.step == "stable":
            self.penalty.precondition(self.optimization.highest_lr)
        self.optimization.step(self.still)
        self.steps_done += 1
        self._undo.pop_all()
        return loss.detach(), penalty.detach(), *learner.likelihood.correct(outputs, targets)

    def _freeze(self, example: Inputs) -> None:
        """From here on BatchNorms use their running statistics; nothing is folded."""
        self.still = self._doubled(example) if self.penalty is not None else []
        for module in self.learner.model.modules():
            if isinstance(module, _BatchNorm) and module.training:
                module.eval()
                self.learner._froze_batchnorm = True

    def _doubled(self, example: Inputs) -> list[nn.Parameter]:
        """Return what a frozen BatchNorm doubles: its gamma, and the bias before its own.

        Of one that its user froze, what is trained of it is theirs to say.
        """
        doubled: list[nn.Parameter | None] = []
        for layer in self.learner._layers_with_batchnorm(example):
            gamma, beta = layer.batchnorm.weight, layer.batchnorm.bias
            if not layer.batchnorm.training or not layer.absorbs_scale:
                continue
            if layer.like.requires_grad:
                doubled.append(gamma)
            if beta is not None and beta.requires_grad:
                doubled.append(layer.module.bias)
        return [parameter for parameter in doubled if parameter is not None]


def _with_rows(values: Tensor, rows: int) -> Tensor:
    """Return values with rows of zeros below, so many in all."""
    more = values.new_zeros(rows - len(values), *values.shape[1:])
    return torch.cat([values, more])


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
    """Running means, summed where the values are: only the result is waited for.

    Of loss and penalty over examples, of hits over the targets that count.
    """

    def __init__(self, device: torch.device) -> None:
        self.examples = 0
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)

    def add(
        self, loss: Tensor, penalty: Tensor, examples: int, correct: Tensor, counted: Tensor
    ) -> None:
        self.examples += examples
        loss, penalty, correct, counted = (
            value.to(self.sums) for value in (loss, penalty, correct, counted)
        )
        self.sums += torch.stack([examples * loss, examples * penalty, correct, counted])

    def result(self) -> dict[str, float]:
        loss, penalty, correct, counted = self.sums.tolist()
        return {
            "loss": loss / self.examples,
            "penalty": penalty / self.examples,
            "accuracy": correct / counted if counted else math.nan,
        }


def _reparameterize_if_any(learner: ContinualLearner, loader: Loader) -> None:
    """Put BatchNorm back in one pass, unless the first mini-batch shows none that a layer has."""
    model = learner.model
    if not any(isinstance(module, _BatchNorm) for module in model.modules()):
        return
    with as_found(model):
        if learner._layers_with_batchnorm(loader.example()):
            loader.require_passes(2, "fit, whose BatchNorms take new statistics first")
            reparameterize(
                model,
                loader,
                weights=learner.weights,
                norms=learner._norms if learner.weights == "first" else None,
                layers=learner.layers,
                max_examples=learner.max_examples,
                input_fn=learner.input_fn,
            )
