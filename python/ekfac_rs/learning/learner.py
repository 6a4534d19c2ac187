"""Continual learning: train on a task, consolidate it, go on to the next."""

import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial, wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ekfac_rs._checkpoints import (
    random_states,
    read_checkpoint,
    require_generators,
    rewound_on_failure,
    set_random_states,
    write_checkpoint,
)
from ekfac_rs._checks import require_choice, require_count, require_nonnegative, require_share
from ekfac_rs._files import require_folder
from ekfac_rs._modes import bare_model, own_modes
from ekfac_rs._ranks import Ranks
from ekfac_rs._tensors import Kept, kept, put_back
from ekfac_rs.batchnorm import (
    WEIGHTS,
    Anchor,
    as_found,
    device_of,
    merged_weights,
    raw_weights,
    reparameterize,
    weight_norms,
)
from ekfac_rs.batchnorm.statistics import restored_on_failure
from ekfac_rs.curvature import (
    APPROXIMATIONS,
    CORRECTIONS,
    STATISTICS,
    Curvature,
    compress_curvatures,
    estimate_curvature,
)
from ekfac_rs.curvature.settings import kind_in_words
from ekfac_rs.errors import (
    DtypeError,
    EkfacError,
    EmptyLoaderError,
    FileFormatError,
    IncompatibleError,
    NonFiniteError,
    NumericalError,
    OptionError,
    UnsupportedLayerError,
)
from ekfac_rs.layers import COORDINATES, AffineLayer, find_layers, require_names
from ekfac_rs.learning.heads import MakesModel, heads_of, require_same_tensors
from ekfac_rs.learning.optimization import (
    MakesOptimizer,
    MakesScheduler,
    Optimization,
    require_optimizer,
    require_scheduler,
)
from ekfac_rs.learning.own import OwnCurvature
from ekfac_rs.learning.protection import Protection, ScaledPenalty, SoFar, control_of
from ekfac_rs.learning.report import page
from ekfac_rs.learning.training import (
    Checkpoints,
    Plan,
    Training,
    modes_of,
    put_in_train_mode,
    set_modes,
)
from ekfac_rs.learning.watching import Means, Scalars
from ekfac_rs.likelihood import LABELS, Likelihood, resolve
from ekfac_rs.loading import Batch, Inputs, Loader, Source, outputs_of
from ekfac_rs.metrics import AccuracyMatrix
from ekfac_rs.penalty import QuadraticPenalty
from ekfac_rs.scales import Fixed, Halving, ScaleRule, Selection, rule_of

STEPS = ("stable", "explicit")

# What may not change while a task is learnt.
_OPTIONS_OF_TRAINING = (
    *("approximation", "coordinates", "layers", "weights", "scale", "damping", "dropped"),
    *("step", "own", "momentum", "freeze_bn_after", "labels"),
)

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


def _on_all_ranks(
    method: "Callable[Concatenate[ContinualLearner, _Parameters], _Result]",
) -> "Callable[Concatenate[ContinualLearner, _Parameters], _Result]":
    """Let a method fail on all ranks or none."""

    @wraps(method)
    def call(
        self: "ContinualLearner", /, *args: _Parameters.args, **kwargs: _Parameters.kwargs
    ) -> _Result:
        with self._ranks.agreed(method.__name__):
            return method(self, *args, **kwargs)

    return call


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
    loss : Likelihood or {"cross_entropy", "mse", "bce"}
    approximation : str or None
        As in `estimate_curvature`. None takes no curvature: ordinary fine-tuning, or L2 to the
        anchor when there is damping.
    coordinates : {"merged", "raw"}
        "raw" leaves BatchNorm out: its parameters and statistics are carried from task to task
        unpenalised.
    statistics : {"batch", "running"}
        Those under which factors are taken.
    labels, draws, correction, correction_batches, max_examples, generator
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
    scale : float, {"counting", "adaptive", "auto", "halving"} or ScaleRule, optional
        Of the penalty: a number, or the rule that chooses it (`ekfac_rs.scales`). It multiplies
        the curvatures alone; where ``approximation`` is None it has to be a number. Default:
        "auto", or 1 without curvatures.
    damping : float
        Of the penalty.
    max_terms : int, optional
        Keep one curvature for all tasks, whose blocks take no more memory and no longer to multiply
        than so many terms of a task (`compress_curvatures`; a task has one term a layer with
        K-FAC, two with XK-FAC, three with nested XK-FAC): both are then the same after any number
        of tasks. Default: the terms of all tasks are kept.
    dropped : float
        Of the penalty: the share of each factor's trace that products may leave out. The
        curvatures that are kept stay exact.
    step : {"stable", "explicit"}
        "stable" multiplies gradients as `QuadraticPenalty.precondition` does, so that training
        does not diverge on the penalty. "explicit" leaves them alone and warns where the learning
        rate is too high for that (`QuadraticPenalty.check_lr`; of SGD alone). Where groups of
        parameters have learning rates of their own, both look at the highest that there was so
        far in the task. Optimisers whose steps do not grow with the gradient, such as Adam, do not
        diverge in either case; for them "stable" turns steps away from what is held on to.
    own : bool
        Whether stable steps also count with the curvature of the task that is being learnt, taken
        of the last four mini-batches from time to time, and are shortened where layers that are
        stable one by one are not so together (`QuadraticPenalty.precondition`): a learning rate
        that its own loss would not bear, as with frozen BatchNorms, seldom diverges then. Under a
        penalty alone, from the second task on, and with stable steps alone. Torch has to be able to
        differentiate the loss twice, or a `StabilityWarning` says that nobody looks at the whole.
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
    process_group : torch.distributed.ProcessGroup, optional
        Processes that learn together, each with a learner over its own share of every loader's
        data: all call the same methods, with as many steps of `fit`, and have the same model in the
        end. Default: that of the model's DistributedDataParallel, or else this process alone. The
        learner begins with the first process's weights, and so does `fit`. Gradients are averaged
        over all, as DistributedDataParallel does (whose hooks are passed by), and buffers are the
        first one's in the end. Losses, accuracies, curvatures, statistics, and what a rule for the
        scale sees, are those of all data. A checkpoint is each process's own file.

    Attributes
    ----------
    model : torch.nn.Module
        The one in use: the present task's, unless `use_task` has chosen another.
    task : int
        Number of consolidated tasks: the present one's, counted from 0.
    curvatures : list of Curvature
        One for each of them (none where ``approximation`` is None), or with ``max_terms`` one for
        all.
    anchor : Anchor or None
    losses : list of float or None
        Mean loss of each of them on its own data, as its curvature found it (`Curvature.loss`);
        None where there is no curvature.
    selection : list of Selection
        What the rule for the scale did, one for each call of `fit` under a penalty.

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
        correction_batches: int = 64,
        head: str | MakesModel | None = None,
        output_layer: str | None = None,
        layers: Collection[str] | None = None,
        weights: str = "kept",
        scale: float | str | ScaleRule | None = None,
        damping: float = 0.0,
        max_terms: int | None = None,
        dropped: float = 0.0,
        step: str = "stable",
        own: bool = False,
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
        process_group: "dist.ProcessGroup | None" = None,
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
        require_count("correction_batches", correction_batches)
        if max_terms is not None:
            require_count("max_terms", max_terms)
        if dropped != 0.0:
            require_share("dropped", dropped)
        if own and step != "stable":
            raise OptionError(
                f'own: expected it with step="stable", whose steps it is for, got step={step!r}'
            )
        require_nonnegative("damping", damping)
        require_nonnegative("freeze_bn_after", freeze_bn_after)
        require_nonnegative("momentum", momentum)
        self._ranks = Ranks.of(model, process_group)
        model = bare_model(model)
        if layers is not None:
            require_names(layers, model)
        self._heads = heads_of(model, head, output_layer, layers)
        self.head = head
        self.likelihood = resolve(loss)
        self.approximation = approximation
        self.coordinates = coordinates
        self.statistics = statistics
        self.labels = labels
        self.draws = draws
        self.correction = correction
        self.correction_batches = correction_batches
        self.layers = layers if layers is None else tuple(layers)
        self.weights = weights
        self.scale = scale if scale is not None else 1.0 if approximation is None else "auto"
        self.damping = damping
        self._rule()
        self.max_terms = max_terms
        self.dropped = dropped
        self.step = step
        self.own = own
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
        self.losses: list[float | None] = []
        self.selection: list[Selection] = []
        self._ranks.broadcast_(_tensors_of(self.model), "model")
        # For weights="first": those that the learner was given.
        self._norms = weight_norms(self.model)
        self._so_far = SoFar()
        # Training that `resume` found interrupted.
        self._unfinished: Mapping[str, Any] | None = None

    @own_modes()
    @_on_all_ranks
    def fit(
        self,
        loader: Source,
        *,
        epochs: int | None = None,
        steps: int | None = None,
        lr: float = 0.05,
        classes: int | None = None,
        validation: Source | None = None,
        callback: Callable[[int, "ContinualLearner"], None] | None = None,
        log: Any = None,
        checkpoint: str | os.PathLike[str] | None = None,
        every: int = 1000,
    ) -> list[dict[str, float]]:
        """Train on one task.

        A model in train mode is trained in the modes that its modules are in: a BatchNorm in eval
        mode keeps its statistics and is penalised under them. A model in eval mode as a whole is
        put in train mode first (see `frozen_batchnorms` for what stays frozen), and back after.

        A call that fails before its first step changes nothing, with ``scale="halving"`` one that
        fails or is interrupted in any try; otherwise the model stays as the steps have made it. (Of
        tries that `resume` goes on with, those made before are taken back, too, once a step is
        made.)

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
        validation : iterable of (x, y), or a function that returns one, optional
            Of the task, for ``scale="halving"`` alone, gone through after every try. Default:
            ``loader`` itself.
        callback : callable, optional
            Called as ``callback(step, learner)`` after every step, counted from 1; with
            ``scale="halving"``, in every try anew.
        log : optional
            Told every step's numbers as ``log.add_scalar("task0/loss", value, step)``, which a
            `torch.utils.tensorboard.SummaryWriter` takes: "loss", and under a penalty "penalty",
            "scale" and "predicted increase" (of the earlier tasks' mean losses).
        checkpoint : str or os.PathLike, optional
            File to write the learner and its training to, from which `resume` goes on: it takes
            the place of the one before when it is whole. A run with the same checkpoints ends in
            the same weights, bit for bit, interrupted or not: with each the stable steps begin to
            look anew. With ``scale="halving"`` it goes on within the try. A file holds all earlier
            tasks' curvatures: mind the time that takes.
        every : int
            Steps between two checkpoints; another is written when training, or a try of it, is
            over.

        Returns
        -------
        list of dict
            For each epoch, or pass through the loader, the means over examples of "loss" (without
            penalty), "penalty" and "accuracy" (nan for losses without classes) during training; of
            the last try with ``scale="halving"``.

        Raises
        ------
        OptionError
            Both epochs and steps; a number below 1; an iterator that ends before training does;
            classes where there is no new output layer, or none where targets do not tell;
            validation where nothing is tried, or an iterator of it; the learner's optimizer or
            scheduler returned something else, or one whose ``step`` needs an argument; a checkpoint
            of a state that a file cannot hold; other arguments than those of the training that
            `resume` goes on with.
        IncompatibleError
            After `resume`: the loader does not yield the mini-batches that it did; another kind of
            optimizer or scheduler.
        OSError
            The checkpoint cannot be written; the one before stays. Where there is no directory for
            it, before training.
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
        if log is not None and not callable(getattr(log, "add_scalar", None)):
            raise OptionError(
                f"log: expected an object with add_scalar(tag, value, step), got a "
                f"{type(log).__name__}"
            )
        if classes is not None:
            require_count("classes", classes)
        source = self._loader(loader)
        rule = self._rule()
        if validation is not None and not isinstance(rule, Halving):
            raise OptionError('validation: expected none but with scale="halving"')
        judges = source if validation is None else self._loader(validation)
        generators = self._generators(source, judges)
        with ExitStack() as undo:
            self._heads.begin(self.task, undo, classes, lambda: self._classes_in(source))
            plan = self._plan(source, epochs, steps)
            self._ranks.require_same(
                "fit",
                f"{_arguments(lr, plan)}, task {self.task}, after {self._steps_before()} steps",
            )
            by_halving = isinstance(rule, Halving) and self._is_penalised
            self._require_as_interrupted(lr, plan, by_halving)
            recorder = self._checkpoints(checkpoint, every, lr, plan)
            once = partial(self._fitted, source, lr, plan, callback, log, generators)
            if isinstance(rule, Halving) and by_halving:
                source.require_passes((plan.passes or 2) * 2, 'fit with scale="halving"')
                history = self._fitted_by_halving(rule, once, judges, recorder, undo)
                undo.pop_all()
                return history
            return once(recorder, undo, rule)

    def _fitted(
        self,
        source: Loader,
        lr: float,
        plan: Plan,
        callback: Callable[[int, "ContinualLearner"], None] | None,
        log: Any,
        generators: Sequence[torch.Generator],
        checkpoints: Checkpoints | None,
        undo: ExitStack,
        rule: ScaleRule | None,
        selection: Selection | None = None,
    ) -> list[dict[str, float]]:
        """Train once, under a penalty where there is a rule for its scale.

        What is changed before the first step, ``undo`` takes back until then.
        """
        with ExitStack() as cleanup:
            training = self._training(source, lr, plan, undo, cleanup, rule, selection, log)
            told = None if callback is None else lambda step: callback(step, self)
            begun_at = training.steps_done
            try:
                history = training.run(source, generators, told, self.progress, checkpoints)
            except BaseException:
                if training.steps_done > begun_at:
                    self._unfinished = None
                raise
            self._unfinished = None
            return history

    def _fitted_by_halving(
        self,
        rule: Halving,
        once: Callable[..., list[dict[str, float]]],
        validation: Loader,
        checkpoints: Checkpoints | None,
        undo: ExitStack,
    ) -> list[dict[str, float]]:
        """Train without a penalty, and then under ever weaker ones until that is enough.

        No try before the last is training to go on with: ``undo`` takes back all of them. One that
        diverges was not enough. How many tries there were, ``selection.tries`` tells: the one
        after these is what a checkpoint is of.
        """
        validation.require_passes(rule.tries + 1, 'fit with scale="halving"')
        model, so_far = self.model, self._so_far
        if self._unfinished is None:
            begun = kept(_tensors_of(model))
            selection = Selection(repr(rule), self.task)
            self.selection.append(selection)
        else:
            before = self._unfinished["state"]["before"]
            begun, so_far = _kept_before(model, before), SoFar(**before["so_far"])
            selection = self.selection[-1]

        def take_back() -> None:
            # A try that was to go on and has not is still to.
            if self._unfinished is None:
                put_back(begun)
                self.selection.pop()
                self._so_far = so_far

        undo.callback(take_back)
        before = {
            "tensors": [values for _, values in begun],
            "so_far": {"example": so_far.example, "froze_batchnorm": so_far.froze_batchnorm},
        }
        recorded = None if checkpoints is None else checkpoints.also({"before": before})

        def tried(rule: ScaleRule | None) -> list[dict[str, float]]:
            if self._unfinished is None:
                put_back(begun)
                self._so_far = SoFar()
                selection.clear_steps()
            with ExitStack() as own_undo:
                return once(recorded, own_undo, rule, selection)

        if not selection.tries:
            tried(None)
            selection.tries.append((0.0, self._evaluated(validation)))
        _, reference = selection.tries[0]
        assert reference is not None
        for number in range(len(selection.tries) - 1, rule.tries):
            scale = rule.start / 2.0**number
            try:
                history = tried(Fixed(scale))
                reached = self._evaluated(validation)
            # The last step may diverge, too, which nothing in training looks at.
            except (NumericalError, NonFiniteError) as error:
                if number == rule.tries - 1:
                    raise NumericalError(f"fit: the last try diverged: {error}") from error
                selection.tries.append((scale, None))
                # It may have been the first step after `resume`.
                self._unfinished = None
                continue
            selection.tries.append((scale, reached))
            if rule.is_enough(reached, reference):
                break
        return history

    def _training(
        self,
        source: Loader,
        lr: float,
        plan: Plan,
        undo: ExitStack,
        cleanup: ExitStack,
        rule: ScaleRule | None,
        selection: Selection | None,
        log: Any,
    ) -> Training:
        """Prepare a task's training.

        ``cleanup`` takes its hooks and gradients with it and puts modes back; what else is changed
        before the first step, ``undo`` takes back until then.
        """
        model = self.model
        undo.callback(put_back, kept(_tensors_of(model)))
        self._ranks.broadcast_(_tensors_of(model), "model")
        cleanup.callback(set_modes, modes_of(model))
        put_in_train_mode(model)
        unfinished = self._unfinished
        protection = self._protection(
            source, rule, plan.steps, undo, selection=selection, going_on=unfinished is not None
        )
        cleanup.callback(protection.close)
        optimization = Optimization(
            [p for p in model.parameters() if p.requires_grad],
            lr,
            plan.steps,
            self.optimizer or partial(torch.optim.SGD, momentum=self.momentum),
            self.scheduler,
        )
        cleanup.callback(model.zero_grad, set_to_none=True)
        if optimization.is_sgd:
            protection.check_lr(optimization.rates)
        training = Training(
            model,
            self.likelihood,
            self._outputs,
            optimization,
            protection,
            plan=plan,
            so_far=self._so_far,
            scalars=None if log is None else Scalars(log, self.task, protection.selection),
            begun=undo.pop_all,
            ranks=self._ranks,
        )
        if unfinished is not None:
            training.load_state_dict(unfinished["state"])
        return training

    def _protection(
        self,
        source: Loader,
        rule: ScaleRule | None,
        steps: int,
        undo: ExitStack,
        *,
        selection: Selection | None = None,
        going_on: bool = False,
    ) -> Protection:
        """Take a new task's statistics, and hold on to the tasks before: in any training loop.

        Parameters
        ----------
        source : Loader
        rule : ScaleRule or None
            Of the penalty's scale; None for training without a penalty.
        steps : int
        undo : ExitStack
            Takes a new selection back. Tensors of the model are the caller's to put back.
        selection : Selection, optional
            The learner's last one, to be filled in. Default: a new one.
        going_on : bool
            Training was interrupted after its first step.
        """
        freeze_at = self._freeze_at(steps)
        if going_on:
            selection = self.selection[-1] if self.selection else None
        elif freeze_at > 0:
            self._reparameterize_if_any(source)
        scaled = None
        if rule is not None and self._is_penalised:
            earlier = [x for x in self.selection if x is not selection]
            control = control_of(rule, self.losses, steps, earlier)
            if selection is None:
                selection = Selection(repr(rule), self.task)
                self.selection.append(selection)
                undo.callback(self.selection.pop)
            scaled = ScaledPenalty(control, self._penalty, selection, self._ranks)
        return Protection(
            self.model,
            scaled,
            stable=self.step == "stable",
            own=self._own_curvature() if self.own and scaled is not None else None,
            freeze_at=freeze_at if freeze_at < steps else None,
            doubled=self._doubled,
            so_far=self._so_far,
            ranks=self._ranks,
        )

    def _own_curvature(self) -> OwnCurvature:
        assert self.anchor is not None
        names = tuple(self.anchor)

        def estimate(
            batches: Sequence[tuple[Inputs, Tensor]], generator: torch.Generator
        ) -> Curvature:
            # Between two passes each rank's BatchNorms have statistics of their own.
            self._ranks.broadcast_(self.model.buffers(), "buffers")
            return estimate_curvature(
                self.model,
                batches,
                loss=self.likelihood,
                approximation=self.approximation or "kfac-expand",
                coordinates=self.coordinates,
                labels=self.labels,
                generator=generator,
                layers=names,
                output_fn=self.output_fn,
                process_group=self._ranks.group,
            )

        def loss(batch: Batch) -> Tensor:
            return self.likelihood.loss(*self._outputs(batch))

        return OwnCurvature(estimate, loss, seed=self._ranks.number)

    @own_modes()
    @_on_all_ranks
    def consolidate(
        self,
        loader: Source,
        *,
        checkpoint: str | os.PathLike[str] | None = None,
        every: int = 1000,
    ) -> None:
        """Close a task: accumulate its curvature and take the anchor.

        The model stays as it is, but for one case: where its BatchNorms were frozen during `fit`
        and the curvature is taken under batch statistics, `reparameterize` brings them up to the
        weights first. The eval-mode function stays.

        Parameters
        ----------
        loader : iterable of (x, y), or a function that returns one
            The task's training data, as in `estimate_curvature`.
        checkpoint : str or os.PathLike, optional
            File to write the curvature's passes to, as in `estimate_curvature`: another one than
            `fit` and `save` write. Where they were interrupted, `resume` brings the learner back
            to the end of the training, and this call goes on with them. One file serves all tasks
            in turn.
        every : int
            Mini-batches between two checkpoints.

        Raises
        ------
        OptionError, UnknownLayerError
            The output layer cannot be found; a new task was not fitted; nothing is shared.
        EkfacError, OSError
            As `estimate_curvature`, `reparameterize` and `merged_weights`.
        """
        source = self._loader(loader)
        self._rule()  # It may have been changed since, and is refused before a pass.
        # Called again, a pass before the curvature's has to go the same way, too.
        again = (
            nullcontext() if checkpoint is None else rewound_on_failure(self._generators(source))
        )
        with again, ExitStack() as undo:
            self._heads.begin(self.task, undo, None, None)
            self._heads.bind(lambda: self._example_of(source), undo)
            self._require_own_layer_apart()
            loss = None
            if self._protects:
                with restored_on_failure(self.model):
                    curvature, anchor = self._consolidated(source, checkpoint, every)
                    new = [] if curvature is None else [curvature]
                    curvatures = self._kept([*self.curvatures, *new])
                    loss = None if curvature is None else curvature.loss
                    self._share(anchor, undo)
                self.curvatures, self.anchor = curvatures, anchor
            undo.pop_all()
        self.losses.append(loss)
        self._begin_task(self.task + 1)

    def adopt(self, curvature: Curvature | None, anchor: Anchor, loss: float | None = None) -> None:
        """Take over a task that was consolidated elsewhere.

        Parameters
        ----------
        curvature : Curvature or None
            Of the task's loss at the model's present weights; None where the learner takes none.
        anchor : Anchor
            The present weights, from `merged_weights` or `raw_weights`.
        loss : float, optional
            The task's mean loss there. Default: the curvature's.

        Raises
        ------
        IncompatibleError
            Another approximation, correction, coordinates or layers than the learner's.
        ModelChangedError, UnknownLayerError, ShapeError, DtypeError, DeviceError
            The model is not theirs, as for `QuadraticPenalty`. A failed call changes nothing.
        NonFiniteError, DtypeError
            The loss is not finite, or no number.
        OptionError, UnsupportedLayerError
            ``head="new"``, and the output layer can only be found in a forward pass: name it.
        """
        if loss is not None:
            _require_finite_loss("loss", loss)
        if curvature is not None:
            self._require_of_this_kind(curvature)
            loss = curvature.loss if loss is None else loss
        elif self.approximation is not None:
            raise IncompatibleError(
                f"curvature: expected one of kind {self.approximation!r}, got none"
            )
        adopted = [*self.curvatures, *([] if curvature is None else [curvature])]
        with ExitStack() as undo:
            self._heads.bind(lambda: None, undo)
            self._require_own_layer_apart(*anchor, *(curvature or ()))
            self._penalty_of(adopted, anchor).close()
            curvatures = self._kept(adopted)
            self._share(anchor, undo)
            undo.pop_all()
        self.curvatures, self.anchor = curvatures, anchor
        self.losses.append(loss)
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
        example = self._so_far.example
        example = None if example is None else example.to(device_of(self.model))
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
    @_on_all_ranks
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

    @torch.no_grad()
    def _evaluated(self, loader: Source) -> float:
        """Evaluate the model in use."""
        result = Means(device_of(self.model))
        with as_found(self.model):
            self.model.eval()
            for batch in self._loader(loader).batches():
                outputs, targets = self._outputs(batch)
                self.likelihood.validate(outputs, targets)
                self.likelihood.check_outputs(outputs, targets)
                loss = self.likelihood.loss(outputs, targets)
                correct, counted = self.likelihood.correct(outputs, targets)
                result.add(loss, torch.zeros_like(loss), batch.examples, correct, counted)
        means = result.over(self._ranks).result()
        return means["accuracy"] if self.likelihood.has_classes else -means["loss"]

    @own_modes()
    @_on_all_ranks
    def reparameterize(self, loader: Source) -> None:
        """Take a new task's statistics into the BatchNorms that earlier tasks hold on to.

        `fit` does so by itself. A training loop of one's own does it before its first step under
        `penalty`. The eval-mode function stays (see `reparameterize` of the package); where
        nothing is held on to in merged coordinates, and in a network without BatchNorm, nothing
        happens.

        Parameters
        ----------
        loader : iterable of (x, y), or a function that returns one
            The new task's training data, as in `estimate_curvature`.

        Raises
        ------
        EkfacError
            As `reparameterize`. A failed call changes nothing.
        """
        self._reparameterize_if_any(self._loader(loader))

    def penalty(self) -> QuadraticPenalty | None:
        """Penalty that holds the consolidated tasks, or None before the first or without any."""
        return self._penalty() if self._is_penalised else None

    def _penalty(self) -> QuadraticPenalty:
        assert self.anchor is not None
        return self._penalty_of(self.curvatures, self.anchor)

    @property
    def _is_penalised(self) -> bool:
        return self.anchor is not None and bool(self.curvatures or self.damping)

    def _penalty_of(self, curvatures: list[Curvature], anchor: Anchor) -> QuadraticPenalty:
        return QuadraticPenalty(
            self.model,
            curvatures,
            anchor,
            damping=self.damping,
            scale=rule_of(self.scale).first_scale(),
            coordinates=self.coordinates,
            dropped=self.dropped,
            process_group=self._ranks.group,
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
            "losses": list(self.losses),
            "selection": [selection.as_dict() for selection in self.selection],
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
            selection = [Selection.from_dict(values) for values in state.get("selection", [])]
            task, norms = state["task"], dict(state["norms"])
            heads = dict(state.get("heads", {"kind": "one"}))
            model = dict(state["model"])
            # A learner that held on to nothing kept none, once.
            losses = list(state.get("losses") or [None] * task)
            _require_tasks_of_a_state(task, losses, norms, curvatures, anchor)
        except (KeyError, TypeError, ValueError, AttributeError, EkfacError) as error:
            raise IncompatibleError(f"state: expected a learner's state, got {error!r}") from error
        for curvature in curvatures:
            self._require_of_this_kind(curvature)
        with ExitStack() as undo:
            self._reshape(heads, undo)
            require_same_tensors(self.model, model)
            if anchor is not None:
                try:
                    self._penalty_of(curvatures, anchor).close()
                except EkfacError as error:
                    raise IncompatibleError(
                        f"state: expected an anchor and curvatures of this model, got {error}"
                    ) from error
                self._share(anchor, undo)
            undo.pop_all()
        self._heads.load_tensors(heads)
        self.model.load_state_dict(state["model"])
        self.curvatures, self.anchor, self.selection = curvatures, anchor, selection
        self.losses, self._norms = losses, norms
        self._begin_task(task)

    def report(self, path: str | os.PathLike[str], accuracy: AccuracyMatrix | None = None) -> None:
        """Write a page that tells what was learnt: one HTML file that needs nothing else.

        Of accuracies where they are given, what the tasks' curvatures weigh, the scales with what
        they were chosen by, step by step, and the options.

        Parameters
        ----------
        path : str or os.PathLike
        accuracy : AccuracyMatrix, optional
            Of the results of `evaluate` after each task.

        Raises
        ------
        MissingPackageError
            matplotlib is not there: ``pip install 'ekfac-rs[experiments]'``.
        """
        text = page(self._options(), self.curvatures, self.losses, self.selection, accuracy)
        Path(path).write_text(text, encoding="utf-8")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `state_dict` to a file, for `resume`; replaced only when complete.

        Safetensors and JSON: reading it runs no code. One process at a time may write a file.

        Parameters
        ----------
        path : str or os.PathLike

        Raises
        ------
        FileNotFoundError
            The directory does not exist.
        OSError
            The file cannot be written; the one that was there stays.
        """
        self._write(path, None)

    @classmethod
    def resume(cls, path: str | os.PathLike[str], model: nn.Module, **options: Any) -> Self:
        """Return a learner that goes on from a file: after a task, or amid the training of one.

        The random states of Python, NumPy, torch and of ``generator`` become those that there were.

        Where the file was written by `fit`, the next call of `fit` has to be the one that was
        interrupted, with the same arguments, and goes on with the step after: also of
        optimiser, schedule, random states and the place in the loader. The loader has to yield the
        mini-batches that it did, which torch's do where their order is drawn from torch's random
        state or from their generator.

        Parameters
        ----------
        path : str or os.PathLike
            Of what `save` or ``fit(checkpoint=)`` wrote.
        model : torch.nn.Module
            As the learner was made with. Its weights and statistics are overwritten.
        **options
            Those that the learner was made with.

        Returns
        -------
        ContinualLearner

        Raises
        ------
        FileFormatError
            The file is truncated, corrupted, of a newer format or no checkpoint.
        FileNotFoundError
            There is no such file.
        IncompatibleError
            It is of another kind of model or head, or its training began with other options.
        """
        learner = cls(model, **options)
        content = read_checkpoint(path, device_of(learner.model), "a learner's checkpoint")
        try:
            state, training, theirs, random = (
                content[key] for key in ("learner", "training", "options", "random")
            )
            so_far = None if training is None else SoFar(**training["so_far"])
        except (KeyError, TypeError) as error:
            raise FileFormatError(
                f"{path}: expected a learner's checkpoint, got {error!r}"
            ) from error
        if training is not None:
            ours = learner._options()
            other = [
                f"{name}={theirs.get(name)}" for name in ours if ours[name] != theirs.get(name)
            ]
            if other:
                raise IncompatibleError(
                    f"{path}: expected options of the training that was interrupted, which had "
                    f"{', '.join(other)}"
                )
        require_generators(random, learner._own_generators)
        learner.load_state_dict(state)
        set_random_states(random, learner._own_generators)
        if so_far is not None:
            learner._so_far, learner._unfinished = so_far, training
        return learner

    def _write(self, path: str | os.PathLike[str], training: Mapping[str, Any] | None) -> None:
        content = {
            "learner": self.state_dict(),
            "options": self._options(),
            "random": random_states(self._own_generators),
            "training": training,
        }
        write_checkpoint(path, content)

    def _options(self) -> dict[str, str]:
        """Return what training depends on, as far as words tell it, by name."""
        return {"loss": repr(self.likelihood)} | {
            name: repr(getattr(self, name)) for name in _OPTIONS_OF_TRAINING
        }

    def _checkpoints(
        self,
        path: str | os.PathLike[str] | None,
        every: int,
        lr: float,
        plan: Plan,
    ) -> Checkpoints | None:
        """Return where training is written down, if it is."""
        if path is None:
            return None
        require_count("every", every)
        require_folder(path)

        def write(state: dict[str, Any]) -> None:
            so_far = {
                "example": self._so_far.example,
                "froze_batchnorm": self._so_far.froze_batchnorm,
            }
            self._write(path, {**_arguments(lr, plan), "so_far": so_far, "state": state})

        return Checkpoints(write, every)

    def _generators(self, *sources: Loader) -> list[torch.Generator]:
        """Return those that training draws from, beside those of the process."""
        theirs = {id(g): g for source in sources for g in source.generators()}
        return [*self._own_generators, *theirs.values()]

    @property
    def _own_generators(self) -> list[torch.Generator]:
        return [] if self.generator is None else [self.generator]

    def _steps_before(self) -> int:
        """Return how many steps the training that is to go on has made."""
        return 0 if self._unfinished is None else int(self._unfinished["state"]["steps_done"])

    def _require_as_interrupted(self, lr: float, plan: Plan, by_halving: bool) -> None:
        """Refuse other arguments than those of the training that was interrupted."""
        if self._unfinished is None:
            return
        arguments = _arguments(lr, plan)
        theirs = {name: self._unfinished.get(name) for name in arguments}
        if theirs != arguments:
            raise OptionError(
                f"fit: expected to go on with the training that was interrupted, of {theirs}, got "
                f"{arguments}"
            )
        if ("before" in self._unfinished["state"]) != by_halving:
            raise OptionError(
                f"scale: expected the rule of the training that was interrupted, got {self.scale!r}"
            )

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

    def _rule(self) -> ScaleRule:
        """Return the rule for the scale, which may have been changed between two tasks."""
        rule = rule_of(self.scale)
        if self.approximation is None and self.damping > 0.0 and not isinstance(rule, Fixed):
            raise OptionError(
                f"scale: expected a number with approximation=None, which leaves no curvature that "
                f"the scale would multiply, got {rule!r}: L2 has damping alone"
            )
        return rule

    def _begin_task(self, task: int) -> None:
        self.task, self._so_far, self._unfinished = task, SoFar(), None

    def _require_of_this_kind(self, curvature: Curvature) -> None:
        settings = curvature.settings
        theirs = settings.approximation, settings.coordinates, settings.correction
        if theirs != (self.approximation, self.coordinates, self.correction):
            kind = kind_in_words(self.approximation, self.correction)
            raise IncompatibleError(
                f"curvature: expected {kind} in {self.coordinates} coordinates, got {curvature!r}"
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
        if self._so_far.example is None:
            # The loader may draw its order from torch's random state, which is to stay.
            with as_found(self.model):
                self._so_far.example = source.example()
        return self._so_far.example.to(device_of(self.model))

    def _classes_in(self, source: Loader) -> int:
        """Count the classes of a task, in one pass."""
        source.require_passes(2, "fit, which counts the classes of a new output layer (classes=)")
        # The loader may draw its order from torch's random state, which is to stay.
        with as_found(self.model):
            own = max(self.likelihood.classes_in(batch.targets) for batch in source.batches())
        every = self._ranks.gathered(self._ranks.tensor([own]), "classes")
        most = max(round(float(theirs)) for theirs in every)
        if most == 0:
            raise OptionError(
                f"classes: expected the number of a new layer's outputs, which targets of "
                f"{self.likelihood!r} do not tell, got none"
            )
        return most

    def _kept(self, curvatures: list[Curvature]) -> list[Curvature]:
        """Return what is kept of the tasks' curvatures."""
        if self.max_terms is None or not curvatures:
            return curvatures
        return [compress_curvatures(curvatures, self.max_terms)]

    def _consolidated(
        self, source: Loader, checkpoint: str | os.PathLike[str] | None, every: int
    ) -> tuple[Curvature | None, Anchor]:
        behind = self._so_far.froze_batchnorm and self.statistics == "batch"
        if behind and self.approximation is not None:
            source.require_passes(2, "consolidate after a BatchNorm was frozen")
        example = self._example_of(source)
        layers, curvature = self._shared_layers(example), None
        if self.approximation is not None:
            if behind:
                reparameterize(
                    self.model,
                    source,
                    layers=self.layers,
                    max_examples=self.max_examples,
                    input_fn=self.input_fn,
                    process_group=self._ranks.group,
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
                correction_batches=self.correction_batches,
                generator=self.generator,
                max_examples=self.max_examples,
                layers=layers,
                input_fn=self.input_fn,
                target_fn=self.target_fn,
                output_fn=self.output_fn,
                checkpoint=checkpoint,
                every=every,
                progress=self.progress,
                process_group=self._ranks.group,
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

    def _plan(self, source: Loader, epochs: int | None, steps: int | None) -> Plan:
        """Count passes and steps."""
        if epochs is not None and steps is not None:
            raise OptionError(f"fit: expected epochs or steps, got {epochs} and {steps}")
        if steps is not None:
            require_count("steps", steps)
            return self._plan_of(None, steps)
        passes = 1 if epochs is None else epochs
        require_count("epochs", passes)
        source.require_passes(passes + (not source.has_length), "fit without steps=")
        # Counting may draw from torch's random state, which is to stay.
        with as_found(self.model):
            mini_batches = source.mini_batches()
        if mini_batches == 0:
            raise EmptyLoaderError("loader: expected at least one batch of examples, got none")
        return self._plan_of(passes, passes * mini_batches)

    def _plan_of(self, passes: int | None, steps: int) -> Plan:
        return Plan(passes, steps, self._freeze_at(steps))

    def _freeze_at(self, steps: int) -> int:
        """Count the steps of a task before BatchNorms are frozen; all of them for never."""
        return round(self.freeze_bn_after * steps) if self.task > 0 else steps

    def _outputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Call the model; returns outputs and targets as the loss takes them."""
        outputs = outputs_of(self.model, batch.inputs, self.output_fn)
        return self.likelihood.arranged(outputs, batch.targets, batch.examples)

    def _doubled(self, example: Inputs) -> list[nn.Parameter]:
        """Return what a frozen BatchNorm doubles: its gamma, and the bias before its own.

        Of one that its user froze, what is trained of it is theirs to say.
        """
        doubled: list[nn.Parameter | None] = []
        for layer in self._layers_with_batchnorm(example):
            gamma, beta = layer.batchnorm.weight, layer.batchnorm.bias
            if not layer.batchnorm.training or not layer.absorbs_scale:
                continue
            if layer.like.requires_grad:
                doubled.append(gamma)
            if beta is not None and beta.requires_grad:
                doubled.append(layer.module.bias)
        return [parameter for parameter in doubled if parameter is not None]

    def _reparameterize_if_any(self, loader: Loader) -> None:
        """Put BatchNorm back in one pass, where the first mini-batch shows one that a layer has."""
        held = self.anchor is not None and self.coordinates == "merged"
        if not held or not any(isinstance(m, _BatchNorm) for m in self.model.modules()):
            return
        with as_found(self.model):
            if self._layers_with_batchnorm(loader.example()):
                loader.require_passes(2, "fit, whose BatchNorms take new statistics first")
                reparameterize(
                    self.model,
                    loader,
                    weights=self.weights,
                    norms=self._norms if self.weights == "first" else None,
                    layers=self.layers,
                    max_examples=self.max_examples,
                    input_fn=self.input_fn,
                    process_group=self._ranks.group,
                )


def _kept_before(model: nn.Module, before: Mapping[str, Any]) -> Kept:
    """Return a model's tensors with the values that a checkpoint says they began a task with."""
    return [
        (tensor, values.to(tensor.device))
        for tensor, values in zip(_tensors_of(model), before["tensors"], strict=True)
    ]


def _arguments(lr: float, plan: Plan) -> dict[str, Any]:
    """Return what a checkpoint tells of a call of `fit`."""
    return {"lr": lr, "passes": plan.passes, "steps": plan.steps, "freeze_at": plan.freeze_at}


def _require_tasks_of_a_state(
    task: object,
    losses: Sequence[object],
    norms: Mapping[str, object],
    curvatures: Sequence[Curvature],
    anchor: Anchor | None,
) -> None:
    """Raise unless what a state says of its tasks goes together."""
    if isinstance(task, bool) or not isinstance(task, int) or task < 0:
        raise TypeError(f"task: expected a number of tasks, got {task!r}")
    held = sum(curvature.tasks for curvature in curvatures)
    if held > task or len(losses) != task or (anchor is None and held):
        raise ValueError(
            f"task: {task}, with curvatures of {held} tasks, losses of {len(losses)} and "
            f"{'no' if anchor is None else 'an'} anchor"
        )
    for loss in losses:
        if loss is not None:
            _require_finite_loss("losses", loss)
    for name, norm in norms.items():
        if not isinstance(norm, Tensor):
            raise TypeError(f"norms: expected a tensor for layer {name!r}, got {norm!r}")


def _require_finite_loss(place: str, loss: object) -> None:
    if isinstance(loss, bool) or not isinstance(loss, int | float):
        raise DtypeError(f"{place}: expected a task's mean loss as a number, got {loss!r}")
    if not math.isfinite(loss):
        raise NonFiniteError(f"{place}: expected a task's mean loss to be finite, got {loss}")


def _tensors_of(model: nn.Module) -> Iterator[Tensor]:
    """All that training may change, also buffers that are in no state."""
    yield from model.parameters()
    yield from model.buffers()


def _with_rows(values: Tensor, rows: int) -> Tensor:
    """Return values with rows of zeros below, so many in all."""
    more = values.new_zeros(rows - len(values), *values.shape[1:])
    return torch.cat([values, more])
