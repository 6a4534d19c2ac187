"""Permuted MNIST with BatchNorm: what each curvature keeps of the earlier tasks.

Every task is MNIST with its pixels in another fixed order. One network with one output layer
learns the tasks in turn and is evaluated on all tasks seen. Each method is compared at its own
best setting; the choice looks at validation images of all tasks, which a learner without access
to old data could not do.
"""

import dataclasses
import math
import time
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

import ekfac_rs as ek
from ekfac_rs.errors import NonFiniteError
from ekfac_rs.experiments.data import (
    Mnist,
    TensorLoader,
    image_features,
    load_mnist,
    load_mnist_subset,
    task_permutation,
)
from ekfac_rs.experiments.options import batch_size, option, positive
from ekfac_rs.experiments.report import STREAM, counted
from ekfac_rs.experiments.runs import (
    DIVERGENCE,
    Clock,
    Config,
    Execute,
    RunRecord,
    finite_or_none,
    recorded,
    threads,
)
from ekfac_rs.experiments.settings import Method, Preset, RunConfig, Setting
from ekfac_rs.experiments.study import Experiment

__all__ = ["METHODS", "PRESETS", "PermutedMnist", "StreamConfig", "StreamPreset", "learn_stream"]

CLASSES = 10
VALIDATION_SHARE = 0.1
_VALIDATION_SEED = 1998
_EVALUATION_BATCH = 2000

_CURVED = {"lr": "lrs", "scale": "scales", "damping": "damping"}

METHODS: dict[str, Method] = {
    "fine-tuning": Method("fine-tuning", {"curvature": "none"}, {"lr": "plain_lrs"}),
    "l2": Method("L2 to anchor", {"curvature": "none"}, {"lr": "lrs", "damping": "l2"}),
    "ewc": Method(
        "diagonal Fisher (EWC)",
        {"curvature": "diagonal"},
        {"lr": "lrs", "scale": "diagonal_scales", "damping": "damping"},
    ),
    "kfac-frozen": Method(
        "K-FAC, BN frozen after task 1",
        {"curvature": "kfac-eval", "freeze_bn_after": 0.0},
        {"lr": "frozen_lrs", "scale": "scales", "damping": "damping"},
    ),
    "kfac-eval": Method("K-FAC, eval factors", {"curvature": "kfac-eval"}, _CURVED),
    "kfac-train": Method("K-FAC, train factors", {"curvature": "kfac-train"}, _CURVED),
    "xkfac": Method("XK-FAC", {"curvature": "xkfac"}, _CURVED),
    "xkfac-explicit": Method(
        "XK-FAC, explicit steps", {"curvature": "xkfac", "step": "explicit"}, _CURVED
    ),
    "xkfac-merged": Method(
        "XK-FAC, W <- Wm, explicit steps",
        {"curvature": "xkfac", "weights": "merged", "step": "explicit"},
        _CURVED,
    ),
    "xkfac-raw": Method("XK-FAC, raw coordinates", {"curvature": "xkfac-raw"}, _CURVED),
    "scheduled-kfac": Method(
        "BN 20 %, then frozen; K-FAC eval",
        {"curvature": "kfac-eval", "freeze_bn_after": 0.2},
        _CURVED,
    ),
    "scheduled-kfac-first": Method(
        "BN 20 %, then frozen; K-FAC eval; first norms",
        {"curvature": "kfac-eval", "freeze_bn_after": 0.2, "weights": "first"},
        _CURVED,
    ),
    "scheduled-xkfac": Method(
        "BN 20 %, then frozen; XK-FAC",
        {"curvature": "xkfac", "freeze_bn_after": 0.2},
        _CURVED,
    ),
}


@dataclass(frozen=True, kw_only=True)
class StreamPreset(Preset):
    """Size of the experiment.

    Attributes
    ----------
    dataset
        ``"subset"`` (embedded) or ``"mnist"`` (all of it).
    examples
        Training images used, counted from the start; None for all.
    tasks
        Of the final runs.
    grid_tasks, grid_epochs
        Of the grid: the penalties add up over the tasks, so a setting that is best, or stable,
        for few need not be for many. That is what finalists are for.
    hidden
        Widths of the hidden layers.
    factor_examples
        Images per task that the curvature is estimated from.
    """

    dataset: str
    tasks: int = field(metadata=option(positive, "tasks in a stream"))
    grid_tasks: int
    grid_epochs: int
    hidden: tuple[int, ...] = field(
        default=(100, 100), metadata=option(positive, "widths of the hidden layers")
    )
    factor_examples: int = 10_000
    examples: int | None = field(
        default=None, metadata=option(batch_size, "training images used; else all")
    )


PRESETS: dict[str, StreamPreset] = {
    preset.name: preset
    for preset in (
        StreamPreset(
            name="quick",
            dataset="subset",
            tasks=5,
            epochs=2,
            seeds=(0, 1),
            grid_tasks=3,
            grid_epochs=1,
            finalists=2,
            batch_size=128,
            factor_examples=2000,
            crossed=True,
            lrs=(0.03, 0.1, 0.3),
            frozen_lrs=(0.01, 0.03, 0.1),
            plain_lrs=(0.001, 0.003, 0.01, 0.03, 0.1),
            scales=(1.0, 3.0, 10.0),
            diagonal_scales=(10.0, 30.0, 100.0),
            l2=(0.1, 0.3, 1.0),
            damping=0.01,
        ),
        StreamPreset(
            name="full",
            dataset="mnist",
            tasks=10,
            epochs=2,
            seeds=(0, 1, 2),
            grid_tasks=4,
            grid_epochs=1,
            finalists=4,
            batch_size=256,
            lrs=(0.03, 0.1, 0.3),
            frozen_lrs=(0.01, 0.03, 0.1),
            plain_lrs=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
            scales=(1.0, 3.0, 10.0),
            diagonal_scales=(10.0, 30.0, 100.0),
            l2=(0.1, 0.3, 1.0),
            damping=0.01,
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class StreamConfig(RunConfig):
    """Everything that determines one run.

    Attributes
    ----------
    dataset
        Fingerprint of the images and labels.
    examples, tasks, hidden, factor_examples
        As in `StreamPreset`.
    split
        ``"validation"``: a tenth of the training images is held out and evaluated on;
        ``"test"``: all are learnt, evaluation is on the test images.
    """

    dataset: str
    examples: int | None
    split: str
    tasks: int
    hidden: Sequence[int]
    factor_examples: int


class PermutedMnist(Experiment):
    """The experiment: a stream of permuted tasks, learnt by one small network.

    Parameters
    ----------
    preset
        Its size.
    mnist
        The images.
    """

    name = "permuted-mnist"
    summary = "permuted MNIST with BatchNorm"
    description = (
        "Compare methods on permuted MNIST with BatchNorm, each at its best setting. Finished "
        "runs are kept: the same command goes on where it was interrupted. A run computes on one "
        "thread and takes about 1 GB with --preset full."
    )
    preset_help = (
        "quick (default): the embedded subset, minutes; full: the whole of MNIST, an hour or two"
    )
    data_help = (
        "MNIST's IDX files, for --preset full; otherwise the folder in EKFAC_DATA, otherwise a "
        "download"
    )
    presets = PRESETS
    default = PRESETS["quick"]
    methods = METHODS
    layout = STREAM
    preset: StreamPreset

    def __init__(self, preset: StreamPreset, mnist: Mnist) -> None:
        self.preset = preset
        self.mnist = mnist
        self._speeds: dict[str, _Speed] = {}

    @classmethod
    def from_options(cls, preset: StreamPreset, options: Namespace) -> Self:
        """Read the images that the preset names."""
        whole = preset.dataset == "mnist"
        return cls(preset, load_mnist(options.data_dir) if whole else load_mnist_subset())

    def config(self, stage: str, seed: int, options: Setting) -> Config:
        """Few tasks for the grid, validation images but for the final runs."""
        preset, short = self.preset, stage == "grid"
        chosen: Mapping[str, Any] = options
        return StreamConfig(
            seed=seed,
            batch_size=preset.batch_size,
            momentum=preset.momentum,
            dataset=self._digest,
            examples=preset.examples,
            split="test" if stage == "final" else "validation",
            tasks=min(preset.grid_tasks, preset.tasks) if short else preset.tasks,
            epochs=min(preset.grid_epochs, preset.epochs) if short else preset.epochs,
            hidden=preset.hidden,
            factor_examples=preset.factor_examples,
            **chosen,
        ).as_dict()

    def runner(self, output: Path, progress: bool) -> Callable[[], Execute]:
        """Hand over the images."""
        return partial(_executor, self.mnist, self.preset.examples)

    def score(self, record: RunRecord) -> float:
        """Average over the tasks: an oracle's view."""
        return record.matrix.average()

    def seconds(self, config: Config) -> float:
        """Time a few mini-batches for each curvature."""
        run = StreamConfig(**config)
        if run.curvature not in self._speeds:
            self._speeds[run.curvature] = _Speed.measured(run, self._features)
        return self._speeds[run.curvature].seconds(run, self._features)

    def title(self) -> str:
        """Name the images and the number of tasks."""
        images = "MNIST" if self.preset.dataset == "mnist" else "MNIST subset"
        return f"Permuted {images}, {self.preset.tasks} tasks"

    def notes(self, settings: int) -> list[str]:
        """Tell the protocol."""
        preset = self.preset
        widths = "-".join(str(width) for width in (28 * 28, *preset.hidden, CLASSES))
        return [
            f"{len(self._features.train_y):,} training and {len(self._features.test_y):,} test "
            f"images per task, {counted(preset.epochs, 'epoch')} per task, batches of "
            f"{preset.batch_size}, network {widths} with BatchNorm, one output layer; seeds "
            f"{', '.join(map(str, preset.seeds))}.",
            "Figures in per cent on test images, ± the sample standard deviation over the seeds; "
            "forgetting and backward transfer in points, as defined in `ekfac_rs.metrics`.",
            self._note_on_the_choice(settings),
        ]

    def about(self) -> Mapping[str, Any]:
        """Name and fingerprint of the images."""
        return {"dataset": {"name": self.mnist.name, "digest": self._digest}}

    @cached_property
    def _digest(self) -> str:
        return self.mnist.digest()

    @cached_property
    def _features(self) -> "_Features":
        return _Features.of(self.mnist, self.preset.examples)

    def _note_on_the_choice(self, settings: int) -> str:
        preset = self.preset
        if settings == 1:
            return "Each method at one setting: nothing was chosen."
        text = (
            f"Each method at the best of {settings} settings, tried on "
            f"{counted(min(preset.grid_tasks, preset.tasks), 'task')} with "
            f"{counted(min(preset.grid_epochs, preset.epochs), 'epoch')}"
        )
        if preset.finalists:
            text += f", the best {preset.finalists} of them again on all {preset.tasks}"
        return (
            f"{text}: seed {preset.grid_seed}, judged on held-out training images of all tasks, "
            "the old ones included, an oracle's choice."
        )


def learn_stream(config: StreamConfig, features: "_Features") -> RunRecord:
    """Learn the tasks of one run in turn, evaluating on all tasks seen after each.

    A run diverges when a loss, a weight or a factor stops being finite; from that task on it
    scores chance.
    """
    started = time.perf_counter()
    stream = _Stream(config, features)
    learner = config.learner(
        _network(config),
        max_examples=config.factor_examples,
        generator=torch.Generator().manual_seed(config.seed),
    )
    rows: list[list[float]] = []
    history: list[list[dict[str, float | None]]] = []
    diverged = None
    clock = Clock()
    with recorded(ek.StabilityWarning) as counts:
        for task in range(config.tasks):
            try:
                with clock.part("fit"):
                    epochs = learner.fit(stream.training(task), epochs=config.epochs, lr=config.lr)
                history.append([finite_or_none(epoch) for epoch in epochs])
                if any(None in epoch.values() for epoch in history[-1]):
                    raise NonFiniteError("the loss is not finite")
                with clock.part("consolidate"):
                    learner.consolidate(stream.training(task))
            except DIVERGENCE as error:
                diverged = f"task {task + 1}: {error}"
                break
            with clock.part("evaluate"):
                rows.append(learner.evaluate([stream.evaluation(j) for j in range(task + 1)]))
    rows += [[1 / CLASSES] * (task + 1) for task in range(len(rows), config.tasks)]
    seconds = {**clock.seconds, "total": time.perf_counter() - started}
    return RunRecord(config.as_dict(), rows, history, diverged, dict(counts), seconds)


def _executor(mnist: Mnist, examples: int | None) -> Execute:
    """Prepare a process for making runs."""
    features = _Features.of(mnist, examples)
    return lambda config: learn_stream(StreamConfig(**config), features)


@dataclass(frozen=True)
class _Features:
    """Both splits as tensors, the pixels in their original order."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @classmethod
    def of(cls, mnist: Mnist, count: int | None) -> "_Features":
        """Take the first `count` training images, or all."""
        return cls(
            image_features(mnist.train_images[:count]),
            torch.from_numpy(mnist.train_labels[:count]).long(),
            image_features(mnist.test_images),
            torch.from_numpy(mnist.test_labels).long(),
        )


class _Stream:
    """The tasks of one run as loaders."""

    def __init__(self, config: StreamConfig, features: _Features) -> None:
        self._config = config
        if config.split == "test":
            self._train = features.train_x, features.train_y
            self._evaluation = features.test_x, features.test_y
        else:
            train, held_out = _validation_rows(len(features.train_x))
            self._train = features.train_x[train], features.train_y[train]
            self._evaluation = features.train_x[held_out], features.train_y[held_out]
        # Kept for all tasks, as they are evaluated again after each; training sets are not.
        self._permuted_evaluation: dict[int, Tensor] = {}
        self._permuted_train: tuple[int, Tensor] | None = None

    def training(self, task: int) -> TensorLoader:
        if self._permuted_train is None or self._permuted_train[0] != task:
            self._permuted_train = None
            self._permuted_train = task, self._permute(self._train[0], task)
        x, y = self._permuted_train[1], self._train[1]
        generator = torch.Generator().manual_seed(1_000_003 * self._config.seed + task)
        batch_size = self._config.batch_size
        # BatchNorm has no statistics of a single example.
        return TensorLoader(
            x, y, batch_size, shuffle=True, generator=generator, drop_last=len(x) % batch_size == 1
        )

    def evaluation(self, task: int) -> TensorLoader:
        x, y = self._evaluation
        if task not in self._permuted_evaluation:
            self._permuted_evaluation[task] = self._permute(x, task)
        return TensorLoader(self._permuted_evaluation[task], y, _EVALUATION_BATCH)

    def _permute(self, x: Tensor, task: int) -> Tensor:
        return x[:, task_permutation(x.shape[1], task, self._config.seed)]


def _validation_rows(count: int) -> tuple[Tensor, Tensor]:
    """Rows to train on and rows held out: the same ones in every run."""
    generator = torch.Generator().manual_seed(_VALIDATION_SEED)
    order = torch.randperm(count, generator=generator)
    held_out = round(VALIDATION_SHARE * count)
    return order[held_out:], order[:held_out]


def _network(config: StreamConfig) -> nn.Sequential:
    """Linear-BN-ReLU for each hidden layer, then one output layer for all tasks."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    widths = (28 * 28, *config.hidden)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        for i, (inputs, outputs) in enumerate(pairwise(widths), start=1):
            layers[f"fc{i}"] = nn.Linear(inputs, outputs)
            layers[f"bn{i}"] = nn.BatchNorm1d(outputs)
            layers[f"relu{i}"] = nn.ReLU()
        layers["output"] = nn.Linear(widths[-1], CLASSES)
    return nn.Sequential(layers)


@dataclass(frozen=True)
class _Speed:
    """What a mini-batch costs on this machine with one curvature, in seconds."""

    training_step: float
    penalty_of_a_task: float
    factor_batch: float

    @classmethod
    def measured(cls, like: StreamConfig, features: _Features) -> "_Speed":
        """Time two tasks of a few mini-batches, the second one with the penalty of the first."""
        count = min(40 * like.batch_size, len(features.train_x))
        batches = math.ceil(count / like.batch_size)
        few = dataclasses.replace(
            features,
            train_x=features.train_x[:count],
            train_y=features.train_y[:count],
            test_x=features.test_x[:1],
            test_y=features.test_y[:1],
        )
        probe = dataclasses.replace(
            like, split="test", epochs=1, lr=0.01, scale=1.0, factor_examples=count
        )
        with threads(1):
            learn_stream(dataclasses.replace(probe, tasks=1), few)  # The first time takes longer.
            one = learn_stream(dataclasses.replace(probe, tasks=1), few).seconds
            two = learn_stream(dataclasses.replace(probe, tasks=2), few).seconds
        return cls(
            training_step=one["fit"] / batches,
            penalty_of_a_task=max(two["fit"] - 2 * one["fit"], 0.0) / batches,
            factor_batch=two["consolidate"] / (2 * batches),
        )

    def seconds(self, run: StreamConfig, features: _Features) -> float:
        """Estimate what `run` takes."""
        count = len(features.train_x)
        steps = run.epochs * count / run.batch_size
        factor_batches = min(run.factor_examples, count) / run.batch_size
        return run.tasks * (
            steps * (self.training_step + (run.tasks - 1) / 2 * self.penalty_of_a_task)
            + factor_batches * self.factor_batch
        )
