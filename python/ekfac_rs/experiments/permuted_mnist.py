"""Permuted MNIST with BatchNorm: what each curvature keeps of the earlier tasks.

Every task is MNIST with its pixels in another fixed order. One network with one output layer
learns the tasks in turn and is evaluated, merged, on all tasks seen. Each method is compared at
its own best setting, chosen from a grid of equal size for all methods; the choice looks at
validation images of all tasks, which a learner without access to old data could not do.
"""

import dataclasses
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ekfac_rs as ek
from ekfac_rs.errors import NonFiniteError, NumericalError, OptionError
from ekfac_rs.experiments.data import Mnist, TensorLoader, image_features, task_permutation
from ekfac_rs.experiments.report import GridPoint, MethodResult, counted, write_report
from ekfac_rs.experiments.runs import (
    Clock,
    PlannedRun,
    RunRecord,
    RunStore,
    Workers,
    complete,
    finite_or_none,
    recorded,
    threads,
)
from ekfac_rs.experiments.settings import CURVATURES, Setting, grid, setting_words

__all__ = ["METHODS", "PRESETS", "Method", "Preset", "RunConfig", "learn_stream", "study"]

CLASSES = 10
VALIDATION_SHARE = 0.1
_VALIDATION_SEED = 1998
_EVALUATION_BATCH = 2000


@dataclass(frozen=True)
class RunConfig:
    """Everything that determines one run.

    Attributes
    ----------
    version
        Of ekfac_rs: another version runs anew.
    dataset
        Fingerprint of the images and labels.
    examples
        Training images used, counted from the start; None for all.
    split
        ``"validation"``: a tenth of the training images is held out and evaluated on;
        ``"test"``: all are learnt, evaluation is on the test images.
    seed
        Of permutations, initial weights, order of the examples and sampled labels.
    factor_examples
        Images per task that the curvature is estimated from.
    curvature
        A key of `CURVATURES`.
    freeze_bn_after, lr, scale, damping, momentum
        As in `ekfac_rs.ContinualLearner`.
    """

    version: str
    dataset: str
    examples: int | None
    split: str
    tasks: int
    epochs: int
    hidden: tuple[int, ...]
    batch_size: int
    seed: int
    factor_examples: int
    momentum: float
    lr: float
    curvature: str = "none"
    freeze_bn_after: float = 1.0
    scale: float = 1.0
    damping: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return the config in JSON's own types."""
        return {**dataclasses.asdict(self), "hidden": list(self.hidden)}

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "RunConfig":
        """Undo `as_dict`."""
        return cls(**{**config, "hidden": tuple(config["hidden"])})


@dataclass(frozen=True)
class Method:
    """A method of the comparison.

    Attributes
    ----------
    label
        Name in tables and pictures.
    fixed
        What defines it: fields of `RunConfig`.
    grids
        For each preset's name the settings to try: fields of `RunConfig`, too.
    """

    label: str
    fixed: Setting
    grids: Mapping[str, Sequence[Setting]]


_RATES = (0.01, 0.03, 0.1)
_LOW_RATES = (0.003, 0.01, 0.03)

_KRONECKER = {
    "quick": grid(lr=_RATES, scale=(1.0, 3.0, 10.0), damping=(0.01,)),
    "full": grid(lr=(0.01, 0.03), scale=(1.0, 3.0, 10.0), damping=(0.0, 0.01)),
}

METHODS: dict[str, Method] = {
    "fine-tuning": Method(
        "fine-tuning",
        {"curvature": "none"},
        {
            "quick": grid(lr=(0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)),
            "full": grid(
                lr=(0.0003, 0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.15)
            ),
        },
    ),
    "l2": Method(
        "L2 to anchor",
        {"curvature": "none"},
        {
            "quick": grid(lr=_LOW_RATES, damping=(0.1, 0.3, 1.0)),
            "full": grid(lr=_LOW_RATES, damping=(0.03, 0.1, 0.3, 1.0)),
        },
    ),
    "ewc": Method(
        "diagonal Fisher (EWC)",
        {"curvature": "diagonal"},
        {
            "quick": grid(lr=_LOW_RATES, scale=(10.0, 30.0, 100.0), damping=(0.01,)),
            "full": grid(lr=(0.01, 0.03), scale=(10.0, 30.0, 100.0), damping=(0.0, 0.01)),
        },
    ),
    "kfac-frozen": Method(
        "K-FAC, BN frozen after task 1",
        {"curvature": "kfac-eval", "freeze_bn_after": 0.0},
        _KRONECKER,
    ),
    "kfac-eval": Method("K-FAC, eval factors", {"curvature": "kfac-eval"}, _KRONECKER),
    "kfac-train": Method("K-FAC, train factors", {"curvature": "kfac-train"}, _KRONECKER),
    "xkfac": Method("XK-FAC", {"curvature": "xkfac"}, _KRONECKER),
    "xkfac-raw": Method("XK-FAC, raw coordinates", {"curvature": "xkfac-raw"}, _KRONECKER),
    # Which curvature suits the schedule is one more thing to choose.
    "scheduled": Method(
        "BN 20 %, then frozen",
        {"freeze_bn_after": 0.2},
        {
            "quick": grid(
                curvature=("kfac-eval", "kfac-train", "xkfac"),
                lr=(0.03,),
                scale=(1.0, 3.0, 10.0),
                damping=(0.01,),
            ),
            "full": grid(
                curvature=("kfac-eval", "kfac-train", "xkfac"),
                lr=(0.01, 0.03),
                scale=(3.0, 10.0),
                damping=(0.01,),
            ),
        },
    ),
}


@dataclass(frozen=True)
class Preset:
    """Size of the experiment.

    Attributes
    ----------
    grid
        Which grid of each method: a key of `Method.grids`.
    dataset
        ``"subset"`` (embedded) or ``"mnist"`` (all of it).
    examples
        Training images used; None for all.
    tasks, epochs, seeds
        Of the final runs; `epochs` per task.
    grid_tasks, grid_epochs, grid_seed
        Of the grid; its seed is none of `seeds`.
    finalists
        Best settings of each method's grid that are tried again on a stream as long as the final
        ones (same seed, validation images) before one of them is chosen: the penalties add up
        over the tasks, so a setting that is best, or stable, for few need not be for many.
        0 to choose from the grid itself.
    hidden
        Widths of the hidden layers.
    """

    grid: str
    dataset: str
    tasks: int
    epochs: int
    seeds: tuple[int, ...]
    grid_tasks: int
    grid_epochs: int
    finalists: int = 0
    hidden: tuple[int, ...] = (100, 100)
    batch_size: int = 256
    factor_examples: int = 10_000
    examples: int | None = None
    momentum: float = 0.9
    grid_seed: int = 1000


PRESETS: dict[str, Preset] = {
    "quick": Preset(
        "quick", "subset", tasks=5, epochs=2, seeds=(0, 1), grid_tasks=3, grid_epochs=1,
        finalists=4, batch_size=128, factor_examples=2000,
    ),
    "full": Preset(
        "full", "mnist", tasks=10, epochs=2, seeds=(0, 1, 2), grid_tasks=4, grid_epochs=1,
        finalists=4,
    ),
}  # fmt: skip


def study(
    preset: Preset,
    mnist: Mnist,
    output: Path,
    methods: Sequence[str] = tuple(METHODS),
    command: str = "",
    workers: int = 1,
    progress: bool = True,
) -> str:
    """Make the whole comparison: grid, choice, final runs, report.

    Finished runs are kept in ``output/runs`` and found again.

    Parameters
    ----------
    preset
        Size of the experiment.
    mnist
        The images.
    output
        Folder of the report.
    methods
        Keys of `METHODS`.
    command
        The command line, for the report.
    workers
        Runs made at the same time.
    progress
        Print the plan and show progress bars.

    Returns
    -------
    str
        The table, in Markdown.

    Raises
    ------
    OptionError
        If a method is unknown or the grid's seed is also one of a final run.
    """
    unknown = sorted(set(methods) - set(METHODS))
    if unknown:
        raise OptionError(f"methods: unknown {unknown}; expected some of {list(METHODS)}")
    if preset.grid_seed in preset.seeds:
        raise OptionError(f"seeds: {preset.grid_seed} is the seed of the grid")
    started = time.perf_counter()
    store = RunStore(output / "runs")
    plan = _Plan(preset, mnist.digest())
    grid_runs = {key: plan.grid_runs(key) for key in methods}
    if progress:
        print(_announcement(plan, grid_runs, store, mnist, workers), flush=True)
    with Workers(workers, _executor, mnist, preset.examples) as pool:
        grid_records = complete(grid_runs, store, pool, "grid", progress)
        finalists = {key: plan.finalists(grid_records[key]) for key in methods}
        finalist_runs = {key: plan.finalist_runs(key, finalists[key]) for key in methods}
        finalist_records = complete(finalist_runs, store, pool, "finalists", progress)
        grids = {
            key: plan.grid_points(
                key,
                grid_records[key],
                dict(zip(finalists[key], finalist_records[key], strict=True)),
            )
            for key in methods
        }
        chosen = {key: max(grid, key=_choice).setting for key, grid in grids.items()}
        final_runs = {key: plan.final_runs(key, chosen[key]) for key in methods}
        final_records = complete(final_runs, store, pool, "final", progress)
    results = [
        MethodResult(key, METHODS[key].label, chosen[key], grids[key], final_records[key])
        for key in methods
    ]
    all_records = [*grid_records.values(), *finalist_records.values(), *final_records.values()]
    about = {
        "experiment": "permuted-mnist",
        "command": command,
        "preset": dataclasses.asdict(preset),
        "dataset": {"name": mnist.name, "digest": plan.dataset},
        "seeds": list(preset.seeds),
        "workers": workers,
        "seconds": {
            "all_runs": sum(run.seconds["total"] for runs in all_records for run in runs),
            "this_call": time.perf_counter() - started,
        },
    }
    return write_report(output, _title(preset), results, about, _notes(preset, mnist))


def learn_stream(config: RunConfig, features: "_Features") -> RunRecord:
    """Learn the tasks of one run in turn, evaluating on all tasks seen after each.

    A run diverges when a loss, a weight or a factor stops being finite; from that task on it
    scores chance.
    """
    started = time.perf_counter()
    stream = _Stream(config, features)
    learner = _learner(config)
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
            except (NonFiniteError, NumericalError) as error:
                diverged = f"task {task + 1}: {error}"
                break
            with clock.part("evaluate"):
                rows.append(learner.evaluate([stream.evaluation(j) for j in range(task + 1)]))
    rows += [[1 / CLASSES] * (task + 1) for task in range(len(rows), config.tasks)]
    seconds = {**clock.seconds, "total": time.perf_counter() - started}
    return RunRecord(config.as_dict(), rows, history, diverged, dict(counts), seconds)


def _executor(mnist: Mnist, examples: int | None) -> Callable[[Mapping[str, Any]], RunRecord]:
    """Prepare a process for making runs."""
    features = _Features.of(mnist, examples)
    return lambda config: learn_stream(RunConfig.from_dict(config), features)


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

    def __init__(self, config: RunConfig, features: _Features) -> None:
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


def _learner(config: RunConfig) -> ek.ContinualLearner:
    return ek.ContinualLearner(
        _network(config),
        loss="cross_entropy",
        scale=config.scale,
        damping=config.damping,
        freeze_bn_after=config.freeze_bn_after,
        max_examples=config.factor_examples,
        momentum=config.momentum,
        generator=torch.Generator().manual_seed(config.seed),
        **CURVATURES[config.curvature],
    )


def _network(config: RunConfig) -> nn.Sequential:
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
class _Plan:
    """The runs that a preset consists of."""

    preset: Preset
    dataset: str

    def grid_runs(self, key: str) -> list[PlannedRun]:
        """Few tasks, validation images, all settings."""
        tasks = min(self.preset.grid_tasks, self.preset.tasks)
        epochs = min(self.preset.grid_epochs, self.preset.epochs)
        seed = self.preset.grid_seed
        return [
            self._run("grid", key, setting, "validation", tasks, epochs, seed)
            for setting in self._settings(key)
        ]

    def finalists(self, grid_records: Sequence[RunRecord]) -> list[int]:
        """Return which settings scored best in the grid, best first."""
        scores = [record.matrix.average() for record in grid_records]
        ranked = sorted(range(len(scores)), key=lambda point: -scores[point])
        return ranked[: self.preset.finalists]

    def finalist_runs(self, key: str, finalists: Sequence[int]) -> list[PlannedRun]:
        """All tasks, validation images, the settings numbered `finalists`."""
        preset = self.preset
        settings = self._settings(key)
        return [
            self._run(
                *("finalist", key, settings[point], "validation"),
                *(preset.tasks, preset.epochs, preset.grid_seed),
            )
            for point in finalists
        ]

    def grid_points(
        self, key: str, grid_records: Sequence[RunRecord], finalists: Mapping[int, RunRecord]
    ) -> list[GridPoint]:
        """Put together what is known about each setting."""
        points = []
        for number, (setting, record) in enumerate(
            zip(self._settings(key), grid_records, strict=True)
        ):
            longer = finalists.get(number)
            runs = [record] if longer is None else [record, longer]
            points.append(
                GridPoint(
                    setting,
                    score=record.matrix.average(),
                    full_length_score=None if longer is None else longer.matrix.average(),
                    diverged=next((run.diverged for run in runs if run.diverged), None),
                    seconds=sum(run.seconds["total"] for run in runs),
                )
            )
        return points

    def final_runs(self, key: str, setting: Mapping[str, float | str]) -> list[PlannedRun]:
        """All tasks, test images, every seed."""
        tasks, epochs = self.preset.tasks, self.preset.epochs
        return [
            self._run("final", key, setting, "test", tasks, epochs, seed)
            for seed in self.preset.seeds
        ]

    def _settings(self, key: str) -> Sequence[Setting]:
        return METHODS[key].grids[self.preset.grid]

    def _run(
        self,
        part: str,
        key: str,
        setting: Mapping[str, float | str],
        split: str,
        tasks: int,
        epochs: int,
        seed: int,
    ) -> PlannedRun:
        options: dict[str, Any] = {**METHODS[key].fixed, **setting}
        config = RunConfig(
            version=ek.__version__,
            dataset=self.dataset,
            examples=self.preset.examples,
            split=split,
            tasks=tasks,
            epochs=epochs,
            hidden=self.preset.hidden,
            batch_size=self.preset.batch_size,
            seed=seed,
            factor_examples=self.preset.factor_examples,
            momentum=self.preset.momentum,
            **options,
        )
        words = setting_words(setting)
        return PlannedRun("-".join((part, key, *words, f"seed{seed}")), config.as_dict())


def _choice(point: GridPoint) -> tuple[bool, float]:
    """Finalists come before the others, and are compared by their longer runs."""
    longer = point.full_length_score
    return (True, longer) if longer is not None else (False, point.score)


def _title(preset: Preset) -> str:
    images = "MNIST" if preset.dataset == "mnist" else "MNIST subset"
    return f"Permuted {images}, {preset.tasks} tasks"


def _notes(preset: Preset, mnist: Mnist) -> list[str]:
    widths = "-".join(str(width) for width in (28 * 28, *preset.hidden, CLASSES))
    examples = min(preset.examples or len(mnist.train_labels), len(mnist.train_labels))
    choice = (
        f"Each method at the best of {len(METHODS['xkfac'].grids[preset.grid])} settings, tried "
        f"on {counted(min(preset.grid_tasks, preset.tasks), 'task')} with "
        f"{counted(min(preset.grid_epochs, preset.epochs), 'epoch')}"
    )
    if preset.finalists:
        choice += f", the best {preset.finalists} of them again on all {preset.tasks}"
    return [
        f"{examples:,} training and {len(mnist.test_labels):,} test images per task, "
        f"{counted(preset.epochs, 'epoch')} per task, batches of {preset.batch_size}, network "
        f"{widths} with BatchNorm, one output layer, evaluated with merged weights; seeds "
        f"{', '.join(map(str, preset.seeds))}.",
        "Figures in per cent on test images, ± the sample standard deviation over the seeds; "
        "forgetting and backward transfer in points, as defined in `ekfac_rs.metrics`.",
        f"{choice}: seed {preset.grid_seed}, judged on held-out training images of all tasks, the "
        "old ones included, an oracle's choice.",
    ]


def _announcement(
    plan: _Plan,
    grid_runs: Mapping[str, Sequence[PlannedRun]],
    store: RunStore,
    mnist: Mnist,
    workers: int,
) -> str:
    """Say what there is to do and about how long it takes."""
    planned = [run for runs in grid_runs.values() for run in runs]
    missing = [RunConfig.from_dict(run.config) for run in planned if store.find(run) is None]
    if not missing:
        return f"grid: all {len(planned)} runs are there"
    preset = plan.preset
    # Which settings the later runs get is open; their size is not.
    longer = [
        dataclasses.replace(
            RunConfig.from_dict(runs[-1].config), tasks=preset.tasks, epochs=preset.epochs
        )
        for runs in grid_runs.values()
    ]
    parts = {
        "grid": missing,
        "finalists": longer * preset.finalists,
        "final": longer * len(preset.seeds),
    }
    features = _Features.of(mnist, preset.examples)
    speed = {
        curvature: _Speed.measured(dataclasses.replace(missing[0], curvature=curvature), features)
        for curvature in sorted({run.curvature for run in (*missing, *longer)})
    }
    texts = []
    for part, runs in parts.items():
        seconds = sum(speed[run.curvature].seconds(run, features) for run in runs)
        texts.append(f"{part} {len(runs)} ({seconds / 60 / workers:.1f} minutes)")
    return f"runs to make, {workers} at a time: {', '.join(texts)}"


@dataclass(frozen=True)
class _Speed:
    """What a mini-batch costs on this machine with one curvature, in seconds."""

    training_step: float
    penalty_of_a_task: float
    factor_batch: float

    @classmethod
    def measured(cls, like: RunConfig, features: _Features) -> "_Speed":
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

    def seconds(self, run: RunConfig, features: _Features) -> float:
        """Estimate what `run` takes."""
        count = len(features.train_x)
        steps = run.epochs * count / run.batch_size
        factor_batches = min(run.factor_examples, count) / run.batch_size
        return run.tasks * (
            steps * (self.training_step + (run.tasks - 1) / 2 * self.penalty_of_a_task)
            + factor_batches * self.factor_batch
        )
