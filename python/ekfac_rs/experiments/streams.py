"""Streams of tasks: learnt in turn by one network, evaluated on all tasks seen.

An experiment says what the tasks are and which network learns them; how a run goes, what it
leaves and how long it takes is here.
"""

import dataclasses
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sized
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn

import ekfac_rs as ek
from ekfac_rs.errors import NonFiniteError
from ekfac_rs.experiments.comparison import Experiment
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
from ekfac_rs.experiments.settings import Preset, RunConfig, Setting

__all__ = [
    "VALIDATION_SHARE",
    "Stream",
    "StreamConfig",
    "StreamPreset",
    "StreamRuns",
    "Tasks",
    "learn_stream",
]

# Of the training images: held out where settings are chosen.
VALIDATION_SHARE = 0.1


class Loader(Sized, Iterable[tuple[Tensor, Tensor]], Protocol):
    """Mini-batches, as many as it is long."""


class Tasks(Protocol):
    """The tasks of one run as loaders; tasks are counted from 0."""

    def training(self, task: int) -> Loader:
        """Return what a task is learnt from, in a new order for each epoch."""

    def evaluation(self, task: int) -> Loader:
        """Return what a task is evaluated on."""


@dataclass(frozen=True, kw_only=True)
class StreamPreset(Preset):
    """Size of an experiment with a stream of tasks.

    Attributes
    ----------
    tasks
        Of the final runs.
    grid_tasks, grid_epochs
        Of the grid: the penalties add up over the tasks, so a setting that is best, or stable,
        for few need not be for many. That is what finalists are for.
    examples
        Training images used, of all classes; None for all.
    grid_examples
        Of them, those that the runs use which settings are chosen by, finalists included; None
        for all.
    factor_examples
        Images per task that the curvature is estimated from.
    """

    tasks: int = field(metadata=option(positive, "tasks in a stream"))
    grid_tasks: int
    grid_epochs: int
    factor_examples: int = 10_000
    examples: int | None = field(
        default=None, metadata=option(batch_size, "training images used; else all")
    )
    grid_examples: int | None = None


@dataclass(frozen=True, kw_only=True)
class StreamConfig(RunConfig):
    """What determines a run, as far as all streams have it.

    Attributes
    ----------
    dataset
        Fingerprint of the images and labels.
    examples, tasks, factor_examples
        As in `StreamPreset`.
    split
        ``"validation"``: a tenth of the training images is held out and evaluated on;
        ``"test"``: all are learnt, evaluation is on the test images.
    """

    dataset: str
    examples: int | None
    split: str
    tasks: int
    factor_examples: int


class StreamRuns(ABC):
    """Makes the runs of a stream from their configs.

    Made once in each process, of the data that an experiment has, as its only argument.

    Attributes
    ----------
    config_type
        Of the configs.
    classes
        Outputs of the network: a run that diverged scores chance.
    """

    config_type: ClassVar[type[StreamConfig]]
    classes: ClassVar[int]

    @abstractmethod
    def __init__(self, data: Any) -> None: ...

    @abstractmethod
    def tasks(self, config: Any) -> Tasks:
        """Return the tasks of a run."""

    @abstractmethod
    def network(self, config: Any) -> nn.Module:
        """Return the network of a run, untrained."""

    def learner_options(self) -> Mapping[str, Any]:
        """Return options of `ekfac_rs.ContinualLearner` beside those that the config gives."""
        return {}

    def __call__(self, config: Config) -> RunRecord:
        """Make the run of a config."""
        return learn_stream(self, self.config_type(**config))


def learn_stream(runs: StreamRuns, config: StreamConfig) -> RunRecord:
    """Learn the tasks of one run in turn, evaluating on all tasks seen after each.

    A run diverges when a loss, a weight or a factor stops being finite; from that task on it
    scores chance.
    """
    started = time.perf_counter()
    tasks = runs.tasks(config)
    learner = config.learner(
        runs.network(config).to(config.device),
        max_examples=config.factor_examples,
        generator=torch.Generator(config.device).manual_seed(config.seed),
        **runs.learner_options(),
    )
    rows: list[list[float]] = []
    history: list[list[dict[str, float | None]]] = []
    diverged = None
    clock = Clock()
    with recorded(ek.StabilityWarning) as counts:
        for task in range(config.tasks):
            try:
                with clock.part("fit"):
                    epochs = learner.fit(tasks.training(task), epochs=config.epochs, lr=config.lr)
                history.append([finite_or_none(epoch) for epoch in epochs])
                if any(None in epoch.values() for epoch in history[-1]):
                    raise NonFiniteError("the loss is not finite")
                with clock.part("consolidate"):
                    learner.consolidate(tasks.training(task))
                with clock.part("evaluate"):
                    row = learner.evaluate([tasks.evaluation(j) for j in range(task + 1)])
            except DIVERGENCE as error:
                diverged = f"task {task + 1}: {error}"
                break
            rows.append(row)
    rows += [[1 / runs.classes] * (task + 1) for task in range(len(rows), config.tasks)]
    seconds = {**clock.seconds, "total": time.perf_counter() - started}
    return RunRecord(
        config.as_dict(),
        rows,
        history,
        diverged,
        dict(counts),
        seconds,
        config.measures(learner),
    )


class Stream(Experiment):
    """An experiment whose runs are streams of tasks.

    Parameters
    ----------
    preset
        Its size.
    data
        What `runs_type` makes runs of.

    Attributes
    ----------
    runs_type
        Makes the runs.
    probe_batches
        Mini-batches of a task when the time of a run is estimated.
    """

    layout = STREAM
    preset: StreamPreset
    runs_type: ClassVar[type[StreamRuns]]
    probe_batches: ClassVar[int]

    def __init__(self, preset: StreamPreset, data: Any) -> None:
        self.preset = preset
        self.data = data
        self._speeds: dict[tuple[str, bool], _Speed] = {}

    @property
    @abstractmethod
    def digest(self) -> str:
        """Fingerprint of images and labels."""

    @property
    @abstractmethod
    def images(self) -> tuple[int, int]:
        """Numbers of training and of test images that there are."""

    @property
    @abstractmethod
    def task_share(self) -> float:
        """Share of all images that one task has."""

    def own_settings(self) -> Mapping[str, Any]:
        """Return what the config of a run has beside what all streams have."""
        return {}

    def config(self, stage: str, seed: int, options: Setting) -> Config:
        """Few tasks for the grid, validation images but for the final runs."""
        preset, short, final = self.preset, stage == "grid", stage == "final"
        values: dict[str, Any] = {
            "seed": seed,
            "batch_size": preset.batch_size,
            "momentum": preset.momentum,
            "dataset": self.digest,
            "examples": preset.examples if final else self._grid_examples,
            "split": "test" if final else "validation",
            "tasks": min(preset.grid_tasks, preset.tasks) if short else preset.tasks,
            "epochs": min(preset.grid_epochs, preset.epochs) if short else preset.epochs,
            "factor_examples": preset.factor_examples,
            "device": preset.device,
            **self.own_settings(),
        }
        return self.runs_type.config_type(**{**values, **options}).as_dict()

    def runner(self, output: Path, progress: bool) -> Callable[[], Execute]:
        """Hand over the data."""
        return partial(self.runs_type, self.data)

    def score(self, record: RunRecord) -> float:
        """Average over the tasks: an oracle's view."""
        return record.matrix.average()

    def seconds(self, config: Config) -> float:
        """Time a few mini-batches for each curvature."""
        run = self.runs_type.config_type(**config)
        kind = run.curvature, run.is_fine_tuning
        if kind not in self._speeds:
            self._speeds[kind] = self._measured(run)
        return self._speeds[kind].seconds(run, *self.counts(run.examples, run.split))

    def counts(self, examples: int | None, split: str) -> tuple[int, int]:
        """Return the numbers of images that a task is learnt from and evaluated on.

        Parameters
        ----------
        examples, split
            As in `StreamConfig`.
        """
        train, test = self.images
        train = train if examples is None else min(examples, train)
        if split == "validation":
            test = round(VALIDATION_SHARE * train)
            train -= test
        return round(self.task_share * train), round(self.task_share * test)

    def note_on_figures(self) -> str:
        """Tell what the table's figures are."""
        return (
            f"Figures in per cent on test images; ± the half width of the mean's 95 % interval "
            f"(Student's t) over the seeds, {', '.join(map(str, self.preset.seeds))}; forgetting "
            "and backward transfer in points, as defined in `ekfac_rs.metrics`."
        )

    def note_on_the_choice(self, settings: int) -> str:
        """Tell how settings were chosen, of so many for each method."""
        preset = self.preset
        if settings == 1:
            return "Each method at one setting: nothing was chosen."
        text = (
            f"Each method at the best of {settings} settings, tried on "
            f"{counted(min(preset.grid_tasks, preset.tasks), 'task')} with "
            f"{counted(min(preset.grid_epochs, preset.epochs), 'epoch')}"
        )
        if self._grid_examples != preset.examples:
            text += f" of {self._grid_examples:,} training images"
        if preset.finalists:
            text += f", the best {preset.finalists} of them again on all {preset.tasks}"
        if preset.extensions:
            text += (
                f", and further ones where the best lay at an end of what was tried (up to "
                f"{preset.extensions} times)"
            )
        return (
            f"{text}: seed {preset.grid_seed}, judged on held-out training images of all tasks, "
            "the old ones included, an oracle's choice. Fine-tuning, which has no penalty, at the "
            "best of learning rates and numbers of epochs of its own."
        )

    @property
    def _grid_examples(self) -> int | None:
        preset = self.preset
        return preset.examples if preset.grid_examples is None else preset.grid_examples

    def _measured(self, like: StreamConfig) -> "_Speed":
        """Time streams of a few tasks of a few mini-batches each."""
        few = self.probe_batches * like.batch_size / self.task_share / (1 - VALIDATION_SHARE)
        examples = min(math.ceil(few), self.images[0])
        learnt, evaluated = self.counts(examples, "validation")
        probe = dataclasses.replace(
            like,
            split="validation",
            examples=examples,
            factor_examples=learnt,
            epochs=1,
            lr=0.01,
            scale=1.0,
        )
        runs = self.runs_type(self.data)
        with threads(1):
            learn_stream(runs, dataclasses.replace(probe, tasks=1))  # The first takes longer.
            seconds = {
                tasks: learn_stream(runs, dataclasses.replace(probe, tasks=tasks)).seconds
                for tasks in (1, 2, 4)
                if tasks <= self.preset.tasks
            }
        return _Speed.of(seconds, math.ceil(learnt / like.batch_size), evaluated)


@dataclass(frozen=True)
class _Speed:
    """What things cost on this machine with one curvature, in seconds.

    Attributes
    ----------
    training_step
        Without penalty.
    penalty, penalty_of_a_task
        Of a step with one: whatever it holds, and for each task that it holds.
    factor_batch
        Of a curvature.
    evaluated_image
        One.
    """

    training_step: float
    penalty: float
    penalty_of_a_task: float
    factor_batch: float
    evaluated_image: float

    @classmethod
    def of(cls, seconds: Mapping[int, Mapping[str, float]], batches: int, evaluated: int) -> Self:
        """Take the seconds of streams of one, two and four tasks apart.

        Parameters
        ----------
        seconds
            By number of tasks and part; the longer ones may be missing.
        batches
            That a task has.
        evaluated
            Images that a task is evaluated on.
        """
        step = seconds[1]["fit"] / batches
        later = {n: max(of["fit"] / batches - n * step, 0.0) for n, of in seconds.items()}
        # The second task holds one, the third and fourth another two and three.
        second = later.get(2, 0.0)
        of_a_task = min(max((later.get(4, 0.0) - 3 * second) / 3, 0.0), second)
        longest = max(seconds)
        return cls(
            training_step=step,
            penalty=second - of_a_task,
            penalty_of_a_task=of_a_task,
            factor_batch=seconds[longest]["consolidate"] / (longest * batches),
            evaluated_image=seconds[longest]["evaluate"] / (_triangular(longest) * evaluated),
        )

    def seconds(self, run: StreamConfig, learnt: int, evaluated: int) -> float:
        """Estimate what `run` takes with so many images in a task."""
        steps = run.fits * run.epochs * learnt / run.batch_size
        factor_batches = min(run.factor_examples, learnt) / run.batch_size
        return (
            steps * run.tasks * self.training_step
            + steps * (run.tasks - 1) * self.penalty
            + steps * _triangular(run.tasks - 1) * self.penalty_of_a_task
            + factor_batches * run.tasks * self.factor_batch
            + _triangular(run.tasks) * evaluated * self.evaluated_image
        )


def _triangular(number: int) -> int:
    """Return the sum of the numbers up to this one."""
    return number * (number + 1) // 2
