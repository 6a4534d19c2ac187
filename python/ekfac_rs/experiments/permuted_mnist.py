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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ekfac_rs as ek
from ekfac_rs.data import Mnist, TensorLoader, image_features, task_permutation
from ekfac_rs.errors import NonFiniteError, NumericalError, OptionError
from ekfac_rs.experiments.report import GridPoint, MethodResult, write_report
from ekfac_rs.experiments.runs import PlannedRun, RunRecord, RunStore, complete, recorded

__all__ = ["METHODS", "PRESETS", "Method", "Preset", "RunConfig", "learn_stream", "study"]

Setting = dict[str, float | str]

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


# The curvatures compared, as arguments of the learner.
CURVATURES: dict[str, dict[str, Any]] = {
    "none": {"approximation": None},
    "diagonal": {"approximation": "diagonal", "batchnorm": "running"},
    "kfac-eval": {"approximation": "kfac-expand", "batchnorm": "running"},
    "kfac-train": {"approximation": "kfac-expand", "batchnorm": "batch"},
    "xkfac": {"approximation": "xkfac", "batchnorm": "batch"},
    "xkfac-raw": {"approximation": "xkfac", "batchnorm": "batch", "coordinates": "raw"},
}


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


def _grid(**axes: Sequence[float | str]) -> list[Setting]:
    return [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]


_KRONECKER = {
    "quick": _grid(lr=(0.02, 0.05), scale=(1.0, 3.0, 10.0), damping=(0.01,)),
    "full": _grid(lr=(0.01, 0.03, 0.1), scale=(1.0, 3.0, 10.0, 30.0), damping=(0.0, 0.01)),
}

METHODS: dict[str, Method] = {
    "fine-tuning": Method(
        "fine-tuning",
        {"curvature": "none"},
        {
            "quick": _grid(lr=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1)),
            "full": _grid(
                lr=(
                    *(0.0003, 0.0005, 0.0007, 0.001, 0.0015, 0.002, 0.0025, 0.003),
                    *(0.004, 0.005, 0.006, 0.008, 0.01, 0.0125, 0.015, 0.02),
                    *(0.025, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.15),
                )
            ),
        },
    ),
    "l2": Method(
        "L2 to anchor",
        {"curvature": "none"},
        {
            "quick": _grid(lr=(0.02, 0.05), damping=(0.01, 0.1, 1.0)),
            "full": _grid(
                lr=(0.01, 0.03, 0.1), damping=(0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
            ),
        },
    ),
    "ewc": Method(
        "diagonal Fisher (EWC)",
        {"curvature": "diagonal"},
        {
            "quick": _grid(lr=(0.02, 0.05), scale=(1.0, 10.0, 100.0), damping=(0.01,)),
            "full": _grid(
                lr=(0.01, 0.03, 0.1), scale=(1.0, 10.0, 100.0, 1000.0), damping=(0.0, 0.01)
            ),
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
    "scheduled": Method(
        "BN 20 %, then frozen",
        {"freeze_bn_after": 0.2},
        {
            "quick": _grid(
                curvature=("kfac-eval", "kfac-train", "xkfac"),
                lr=(0.02,),
                scale=(1.0, 3.0),
                damping=(0.01,),
            ),
            "full": _grid(
                curvature=("kfac-eval", "kfac-train", "xkfac"),
                lr=(0.01, 0.03),
                scale=(1.0, 3.0, 10.0, 30.0),
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
    hidden: tuple[int, ...] = (100, 100)
    batch_size: int = 256
    factor_examples: int = 10_000
    examples: int | None = None
    momentum: float = 0.9
    grid_seed: int = 1000


PRESETS: dict[str, Preset] = {
    "quick": Preset(
        "quick", "subset", tasks=5, epochs=2, seeds=(0, 1), grid_tasks=3, grid_epochs=1,
        batch_size=128, factor_examples=2000,
    ),
    "full": Preset(
        "full", "mnist", tasks=10, epochs=2, seeds=(0, 1, 2), grid_tasks=5, grid_epochs=1,
    ),
}  # fmt: skip


def study(
    preset: Preset,
    mnist: Mnist,
    output: Path,
    methods: Sequence[str] = tuple(METHODS),
    command: str = "",
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
    features = _Features.of(mnist, preset)

    def execute(config: Mapping[str, Any]) -> RunRecord:
        return learn_stream(RunConfig.from_dict(config), features)

    grid_runs = {key: _grid_runs(key, preset, features) for key in methods}
    if progress:
        print(_plan(preset, grid_runs, store, features), flush=True)
    grid_records = complete(grid_runs, store, execute, "grid", progress)
    grids = {key: _grid_points(key, preset, grid_records[key]) for key in methods}
    chosen = {key: max(grid, key=_score).setting for key, grid in grids.items()}
    final_runs = {key: _final_runs(key, chosen[key], preset, features) for key in methods}
    final_records = complete(final_runs, store, execute, "final", progress)
    results = [
        MethodResult(key, METHODS[key].label, chosen[key], grids[key], final_records[key])
        for key in methods
    ]
    all_records = [*grid_records.values(), *final_records.values()]
    about = {
        "experiment": "permuted-mnist",
        "command": command,
        "preset": dataclasses.asdict(preset),
        "dataset": {"name": mnist.name, "digest": features.digest},
        "seeds": list(preset.seeds),
        "seconds": {
            "all_runs": sum(run.seconds["total"] for runs in all_records for run in runs),
            "this_call": time.perf_counter() - started,
        },
    }
    return write_report(output, _title(preset), results, about, _notes(preset, features))


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
    clock = _Clock()
    with recorded(ek.StabilityWarning) as counts:
        for task in range(config.tasks):
            try:
                with clock.part("fit"):
                    epochs = learner.fit(stream.training(task), epochs=config.epochs, lr=config.lr)
                history.append([_finite_or_none(epoch) for epoch in epochs])
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


class _Clock:
    """Wall-clock by part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        since = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - since


@dataclass(frozen=True)
class _Features:
    """Both splits as tensors, the pixels in their original order."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    digest: str

    @classmethod
    def of(cls, mnist: Mnist, preset: Preset) -> "_Features":
        count = preset.examples
        return cls(
            image_features(mnist.train_images[:count]),
            torch.from_numpy(mnist.train_labels[:count]).long(),
            image_features(mnist.test_images),
            torch.from_numpy(mnist.test_labels).long(),
            mnist.digest(),
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


def _finite_or_none(epoch: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in epoch.items()}


def _grid_runs(key: str, preset: Preset, features: _Features) -> list[PlannedRun]:
    tasks = min(preset.grid_tasks, preset.tasks)
    epochs = min(preset.grid_epochs, preset.epochs)
    seed = preset.grid_seed
    runs = []
    for setting in METHODS[key].grids[preset.grid]:
        config = _config(key, setting, preset, features, "validation", tasks, epochs, seed)
        name = "-".join(
            value if isinstance(value, str) else f"{axis}{value:g}"
            for axis, value in setting.items()
        )
        runs.append(PlannedRun(f"grid-{key}-{name}", config.as_dict()))
    return runs


def _grid_points(key: str, preset: Preset, records: Sequence[RunRecord]) -> list[GridPoint]:
    settings = METHODS[key].grids[preset.grid]
    return [
        GridPoint(setting, record.matrix.average(), record.diverged, record.seconds["total"])
        for setting, record in zip(settings, records, strict=True)
    ]


def _final_runs(
    key: str, setting: Mapping[str, float | str], preset: Preset, features: _Features
) -> list[PlannedRun]:
    runs = []
    for seed in preset.seeds:
        config = _config(key, setting, preset, features, "test", preset.tasks, preset.epochs, seed)
        runs.append(PlannedRun(f"final-{key}-seed{seed}", config.as_dict()))
    return runs


def _config(
    key: str,
    setting: Mapping[str, float | str],
    preset: Preset,
    features: _Features,
    split: str,
    tasks: int,
    epochs: int,
    seed: int,
) -> RunConfig:
    options: dict[str, Any] = {**METHODS[key].fixed, **setting}
    return RunConfig(
        version=ek.__version__,
        dataset=features.digest,
        examples=preset.examples,
        split=split,
        tasks=tasks,
        epochs=epochs,
        hidden=preset.hidden,
        batch_size=preset.batch_size,
        seed=seed,
        factor_examples=preset.factor_examples,
        momentum=preset.momentum,
        **options,
    )


def _score(point: GridPoint) -> float:
    return point.score


def _title(preset: Preset) -> str:
    images = "MNIST" if preset.dataset == "mnist" else "MNIST subset"
    return f"Permuted {images}, {preset.tasks} tasks"


def _notes(preset: Preset, features: _Features) -> list[str]:
    widths = "-".join(str(width) for width in (28 * 28, *preset.hidden, CLASSES))
    return [
        f"{len(features.train_x):,} training and {len(features.test_x):,} test images per task, "
        f"{preset.epochs} epochs per task, batches of {preset.batch_size}, network {widths} with "
        f"BatchNorm, one output layer, evaluated with merged weights; seeds "
        f"{', '.join(map(str, preset.seeds))}.",
        "All figures in per cent unless said otherwise, on test images; ± is the sample standard "
        "deviation over the seeds. Forgetting and backward transfer: points, see "
        "`ekfac_rs.metrics`.",
        f"Each method at the best of {len(METHODS['xkfac'].grids[preset.grid])} settings, chosen "
        f"on validation images of all of {min(preset.grid_tasks, preset.tasks)} tasks (seed "
        f"{preset.grid_seed}, {min(preset.grid_epochs, preset.epochs)} epochs): an oracle's "
        "choice, as it looks at old tasks.",
    ]


def _plan(
    preset: Preset,
    grid_runs: Mapping[str, Sequence[PlannedRun]],
    store: RunStore,
    features: _Features,
) -> str:
    """Say what there is to do and about how long it takes."""
    planned = [run for runs in grid_runs.values() for run in runs]
    missing = [RunConfig.from_dict(run.config) for run in planned if store.find(run) is None]
    if not missing:
        return f"grid: all {len(planned)} runs are there"
    # Which settings the final runs get is open; their size is not.
    final = dataclasses.replace(missing[0], split="test", tasks=preset.tasks, epochs=preset.epochs)
    finals = [final] * (len(grid_runs) * len(preset.seeds))
    speed = _Speed.measured(final, features)
    grid_minutes, final_minutes = (
        math.ceil(sum(speed.seconds(run, features) for run in runs) / 60)
        for runs in (missing, finals)
    )
    return (
        f"grid: {len(planned)} runs, {len(missing)} to make, about {grid_minutes} minutes; "
        f"final: {len(finals)} runs, about {final_minutes} minutes"
    )


@dataclass(frozen=True)
class _Speed:
    """What a mini-batch costs on this machine, in seconds."""

    training_step: float
    factor_batch: float

    @classmethod
    def measured(cls, like: RunConfig, features: _Features) -> "_Speed":
        """Time two tasks of a few mini-batches with XK-FAC."""
        batches = 16
        count = batches * like.batch_size
        probe = dataclasses.replace(
            like, tasks=2, epochs=1, curvature="xkfac", lr=0.01, factor_examples=count
        )
        few = dataclasses.replace(
            features, train_x=features.train_x[:count], train_y=features.train_y[:count]
        )
        learn_stream(dataclasses.replace(probe, factor_examples=like.batch_size), few)  # warms up
        seconds = learn_stream(probe, few).seconds
        done = probe.tasks * math.ceil(len(few.train_x) / like.batch_size)
        return cls(seconds["fit"] / done, seconds["consolidate"] / done)

    def seconds(self, run: RunConfig, features: _Features) -> float:
        """Estimate what `run` takes."""
        count = len(features.train_x)
        per_task = (
            run.epochs * count * self.training_step
            + min(run.factor_examples, count) * self.factor_batch
        )
        return run.tasks * per_task / run.batch_size
