"""A comparison: the methods of an experiment, each at settings of its own, over several seeds.

Every method tries equally many settings on validation data; the best few, if the preset has
finalists, are tried again at full length; one is chosen, by the experiment's rule, and run once
for each seed on test data. A method with a single setting has nothing to choose and goes to the
final runs at once. Where a run measures validation and test data alike, an experiment may ask for
final runs of every setting instead, and have no others. Finished runs are kept: a comparison goes
on where it was.
"""

import dataclasses
import time
from abc import ABC, abstractmethod
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from ekfac_rs.errors import OptionError
from ekfac_rs.experiments.report import GridPoint, Layout, MethodResult, write_report
from ekfac_rs.experiments.runs import (
    Config,
    Execute,
    PlannedRun,
    RunRecord,
    RunStore,
    Workers,
    complete,
)
from ekfac_rs.experiments.settings import Method, Preset, Setting, beyond, setting_words

__all__ = ["Comparison", "Experiment"]


class Experiment(ABC):
    """What an experiment has of its own: presets, methods, how a run is made, what is chosen by.

    Attributes
    ----------
    name, summary, description, epilog, preset_help, data_help
        On the command line and in ``--help``.
    presets
        By name.
    default
        What holds without ``--preset``.
    methods
        By name, in the order of the table.
    layout
        Columns of the table, and the pictures.
    preset
        Of this one.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    description: ClassVar[str]
    epilog: ClassVar[str] = ""
    preset_help: ClassVar[str]
    data_help: ClassVar[str]
    presets: ClassVar[Mapping[str, Preset]]
    default: ClassVar[Preset]
    methods: ClassVar[Mapping[str, Method]]
    layout: ClassVar[Layout]
    preset: Preset

    @classmethod  # noqa: B027  most experiments have none
    def add_arguments(cls, parser: ArgumentParser) -> None:
        """Add options that are no changes to the preset."""

    @classmethod
    @abstractmethod
    def read(cls, preset: Any, data_dir: Path | None) -> Self:
        """Read the data that a preset names.

        Parameters
        ----------
        preset
            Of the experiment.
        data_dir
            Folder to look in; None for where data usually are.

        Raises
        ------
        EkfacError
            If data are missing or damaged.
        """

    @classmethod
    def from_options(cls, preset: Any, options: Namespace) -> Self:
        """Return the experiment that the command line asks for; raises as `read` does."""
        return cls.read(preset, options.data_dir)

    @abstractmethod
    def config(self, stage: str, seed: int, options: Setting) -> Config:
        """Return what determines a run.

        Parameters
        ----------
        stage
            ``"grid"`` and ``"finalist"`` are judged on validation data, ``"final"`` on test data;
            a grid's runs may be shorter.
        seed
            Of the run.
        options
            What defines the method, with one of its settings.
        """

    def source(self, config: Config) -> PlannedRun | None:
        """Return the run that one rests on, made before it and shared with others, if any."""
        return None

    @abstractmethod
    def runner(self, output: Path, progress: bool) -> Callable[[], Execute]:
        """Return what prepares a process for making runs; it has to be picklable."""

    @property
    def every_setting(self) -> bool:
        """Whether final runs are made of every setting, and are what one is chosen by."""
        return False

    @abstractmethod
    def score(self, record: RunRecord) -> float:
        """Return the validation accuracy that settings are compared by."""

    def measures(self, record: RunRecord) -> Mapping[str, float]:
        """Return what is reported of a setting beside its score; the choice does not see it."""
        return {}

    def choose(self, points: Sequence[GridPoint]) -> Setting:
        """Choose a setting: by default the one with the best score."""
        return max(points, key=lambda point: point.best_known_score).setting

    def seconds(self, config: Config) -> float | None:
        """Estimate what a run takes on one worker, if that is known."""
        return None

    def workers(self, processors: int) -> int:
        """Return how many runs to make at the same time: a GPU has one."""
        return processors if self.preset.device == "cpu" else 1

    def threads_each(self, processors: int, workers: int) -> int:
        """Return how many threads each of them computes on: small networks on one."""
        return 1

    @property
    def folder(self) -> str:
        """Name of the folder with the results."""
        return f"{self.name}-{self.preset.name}"

    @abstractmethod
    def title(self) -> str:
        """Return the heading of the report."""

    @abstractmethod
    def notes(self, settings: int) -> list[str]:
        """Return the sentences below the table; `settings` were tried for each method."""

    @abstractmethod
    def about(self) -> Mapping[str, Any]:
        """Return what ``results.json`` says about the data."""


# Makes or finds the records of settings by method; None where some are not there.
_RecordsOf = Callable[[Mapping[str, Sequence[Setting]]], dict[str, list[RunRecord]] | None]


class Comparison:
    """The whole comparison: grid, choice, final runs, report.

    Parameters
    ----------
    experiment
        What is compared, and how.
    output
        Folder of the report.
    methods
        Names of the experiment's methods; by default those of the preset.
    command
        The command line, for the report.
    workers, threads_each
        Runs made at the same time, and threads that each computes on.
    store
        Folder where finished runs are kept, and found again; ``runs`` below `output` by default.
        Several comparisons may share one.
    progress
        Print the plan and show progress bars.
    estimate
        Say how long runs take, too, where that can be estimated, which takes some time.

    Raises
    ------
    OptionError
        If a method is unknown, those with a penalty have unequal numbers of settings (one alone,
        with nothing to choose, is always allowed), or the grid's seed is also one of a final run.
    """

    def __init__(
        self,
        experiment: Experiment,
        output: Path,
        methods: Sequence[str] | None = None,
        *,
        command: str = "",
        workers: int = 1,
        threads_each: int = 1,
        store: Path | None = None,
        progress: bool = True,
        estimate: bool = True,
    ) -> None:
        self.experiment = experiment
        self.output = output
        self.command = command
        self.workers = workers
        self.threads_each = threads_each
        self.progress = progress
        self.estimate = estimate
        self.methods = _methods_of(experiment, methods)
        self.settings = {
            key: method.settings(experiment.preset) for key, method in self.methods.items()
        }
        # With a single setting there is nothing to choose.
        self.tried = {
            key: s if len(s) > 1 and not experiment.every_setting else []
            for key, s in self.settings.items()
        }
        self._refuse_what_cannot_be()
        self._store = RunStore(output / "runs" if store is None else store)
        self._records: dict[str, RunRecord] = {}
        self._sources: dict[str, RunRecord] = {}

    def run(self) -> str:
        """Make the runs that are not there yet, and write the report.

        Returns
        -------
        str
            The table, in Markdown.
        """
        started = time.perf_counter()
        if self.progress:
            print(self.announcement(), flush=True)
        prepare = self.experiment.runner(self.output, self.progress and self.workers == 1)
        with Workers(self.workers, prepare, threads_each=self.threads_each) as pool:
            make = self._every_setting if self.experiment.every_setting else self._chosen_settings
            results = make(pool)
        return self._report(results, time.perf_counter() - started)

    def _chosen_settings(self, pool: Workers) -> list[MethodResult]:
        """Try all settings, choose one for each method, and make its final runs."""
        screened = self._screened(lambda tried: self._complete("grid", tried, pool))
        assert screened is not None
        finalists = {key: self._finalists(key, records) for key, records in screened.items()}
        again = self._complete("finalist", finalists, pool)
        grids = self._grids(screened, finalists, again)
        chosen = {key: self._chosen(key, grids[key]) for key in self.methods}
        final = self._complete("final", {key: [chosen[key]] for key in self.methods}, pool)
        return [
            MethodResult(key, method.label, chosen[key], grids[key], final[key])
            for key, method in self.methods.items()
        ]

    def _every_setting(self, pool: Workers) -> list[MethodResult]:
        """Make the final runs of all settings, and choose one for each method by them."""
        final = self._complete("final", self.settings, pool)
        results = []
        for key, method in self.methods.items():
            points = self._final_points(key, final[key])
            chosen = self.experiment.choose(points)
            runs = next(point.runs for point in points if point.setting == chosen)
            results.append(MethodResult(key, method.label, chosen, points, runs))
        return results

    def _screened(self, records_of: _RecordsOf) -> dict[str, list[RunRecord]] | None:
        """Return the grid's records by method; grids go on where their best is at an end."""
        records = records_of(self.tried)
        for _ in range(self.experiment.preset.extensions):
            if records is None:
                break
            more = {key: self._beyond(key, made) for key, made in records.items()}
            if not any(more.values()):
                break
            self.tried = {key: [*tried, *more[key]] for key, tried in self.tried.items()}
            records = records_of(self.tried)
        return records

    def _beyond(self, key: str, records: Sequence[RunRecord]) -> list[Setting]:
        """Return settings to try beyond those at an end of which the best lies."""
        tried = self.tried[key]
        points = self._grid_points(key, records, [], [])
        return beyond(self.experiment.choose(points), tried) if points else []

    def _refuse_what_cannot_be(self) -> None:
        preset = self.experiment.preset
        counts = {
            key: len(settings)
            for key, settings in self.settings.items()
            if self.methods[key].is_penalised and len(settings) > 1
        }
        if len(set(counts.values())) > 1:
            listed = ", ".join(f"{key} {count}" for key, count in counts.items())
            raise OptionError(f"methods: expected equally many settings for each, got {listed}")
        if any(self.tried.values()) and preset.grid_seed in preset.seeds:
            raise OptionError(f"seeds: {preset.grid_seed} is the seed of the grid")

    def _planned(
        self, stage: str, settings: Mapping[str, Sequence[Setting]]
    ) -> dict[str, list[PlannedRun]]:
        """Return the runs of a stage by method: every setting, every seed."""
        preset = self.experiment.preset
        seeds = preset.seeds if stage == "final" else (preset.grid_seed,)
        return {
            key: [
                PlannedRun(
                    "-".join((stage, key, *setting_words(setting), f"seed{seed}")),
                    self.experiment.config(stage, seed, {**self.methods[key].fixed, **setting}),
                )
                for setting in settings[key]
                for seed in seeds
            ]
            for key in self.methods
        }

    def _sources_of(self, runs: Mapping[str, Sequence[PlannedRun]]) -> list[PlannedRun]:
        """Return what the runs rest on; several may share one."""
        sources = [self.experiment.source(run.config) for runs in runs.values() for run in runs]
        return list({run.name: run for run in sources if run is not None}.values())

    def _complete(
        self, stage: str, settings: Mapping[str, Sequence[Setting]], pool: Workers
    ) -> dict[str, list[RunRecord]]:
        """Return the records of a stage's runs by method."""
        planned = self._planned(stage, settings)
        sources = self._sources_of(planned)
        made = complete({"": sources}, self._store, pool, "source", self.progress)[""]
        self._sources |= {run.name: record for run, record in zip(sources, made, strict=True)}
        records = complete(planned, self._store, pool, stage, self.progress)
        for key, runs in planned.items():
            self._records |= {run.name: r for run, r in zip(runs, records[key], strict=True)}
        return records

    def _finalists(self, key: str, records: Sequence[RunRecord]) -> list[Setting]:
        """Return the settings that scored best in the grid, best first."""
        scores = [self.experiment.score(record) for record in records]
        ranked = sorted(range(len(scores)), key=lambda number: -scores[number])
        return [self.tried[key][number] for number in ranked[: self.experiment.preset.finalists]]

    def _grids(
        self,
        screened: Mapping[str, Sequence[RunRecord]],
        finalists: Mapping[str, Sequence[Setting]],
        again: Mapping[str, Sequence[RunRecord]],
    ) -> dict[str, list[GridPoint]]:
        return {
            key: self._grid_points(key, screened[key], finalists[key], again[key])
            for key in self.methods
        }

    def _grid_points(
        self,
        key: str,
        screened: Sequence[RunRecord],
        finalists: Sequence[Setting],
        again: Sequence[RunRecord],
    ) -> list[GridPoint]:
        """Put together what is known about each setting."""
        points = []
        for setting, record in zip(self.tried[key], screened, strict=True):
            longer = again[finalists.index(setting)] if setting in finalists else None
            runs = [record] if longer is None else [record, longer]
            points.append(
                GridPoint(
                    setting,
                    score=self.experiment.score(record),
                    full_length_score=None if longer is None else self.experiment.score(longer),
                    diverged=next((run.diverged for run in runs if run.diverged), None),
                    seconds=sum(run.seconds["total"] for run in runs),
                    measures=self.experiment.measures(record),
                )
            )
        return points

    def _final_points(self, key: str, records: Sequence[RunRecord]) -> list[GridPoint]:
        """Put each setting's final runs together."""
        count = len(self.experiment.preset.seeds)
        points = []
        for number, setting in enumerate(self.settings[key]):
            runs = records[number * count : (number + 1) * count]
            measures = [self.experiment.measures(run) for run in runs]
            points.append(
                GridPoint(
                    setting,
                    score=_mean([self.experiment.score(run) for run in runs]),
                    full_length_score=None,
                    diverged=next((run.diverged for run in runs if run.diverged), None),
                    seconds=sum(run.seconds["total"] for run in runs),
                    measures={name: _mean([m[name] for m in measures]) for name in measures[0]},
                    runs=runs,
                )
            )
        return points

    def _chosen(self, key: str, points: Sequence[GridPoint]) -> Setting:
        if not points:
            return self.settings[key][0]
        # What was tried again is compared by that alone.
        finalists = [point for point in points if point.full_length_score is not None]
        return self.experiment.choose(finalists or points)

    def announcement(self) -> str:
        """Say what there is to do and, where that is asked for and known, how long it takes."""
        stages = self._stages()
        idle = not any(stage.missing for stage in stages.values())
        texts = [
            f"{name} {len(stage.missing)}"
            + (f" of {stage.total}" if stage.settled else "")
            + ("" if idle else self._duration(stage.missing))
            for name, stage in stages.items()
            if stage.total
        ]
        return f"runs to make, {self.workers} at a time: {', '.join(texts)}"

    def to_make(self) -> list[PlannedRun]:
        """Return the runs that are not there yet, others like them where a choice is open."""
        return [run for stage in self._stages().values() for run in stage.missing]

    def _stages(self) -> dict[str, "_Stage"]:
        """Return what each stage has to make, as far as choices before it have been made."""
        preset = self.experiment.preset
        # What stands for settings that are open: their runs are as long.
        likely = {key: settings[-1:] for key, settings in self.settings.items()}
        finalists = {
            key: likely[key] * min(preset.finalists, len(tried))
            for key, tried in self.tried.items()
        }
        final = self.settings if self.experiment.every_setting else likely
        grid_is_made = finalists_are_made = False
        if (screened := self._screened(lambda tried: self._made("grid", tried))) is not None:
            grid_is_made = True
            finalists = {key: self._finalists(key, records) for key, records in screened.items()}
            if (again := self._made("finalist", finalists)) is not None:
                finalists_are_made = True
                if not self.experiment.every_setting:
                    grids = self._grids(screened, finalists, again)
                    final = {key: [self._chosen(key, points)] for key, points in grids.items()}
        planned = {
            "grid": self._planned("grid", self.tried),
            "finalist": self._planned("finalist", finalists),
            "final": self._planned("final", final),
        }
        runs = {
            "source": self._sources_of({**planned["grid"], "": _flat(planned["final"])}),
            **{stage: _flat(by_method) for stage, by_method in planned.items()},
        }
        settled = {
            "source": True,
            "grid": True,
            "finalist": grid_is_made,
            "final": finalists_are_made,
        }
        return {
            stage: _Stage(
                self._missing(runs[stage]) if settled[stage] else runs[stage],
                len(runs[stage]),
                settled[stage],
            )
            for stage in runs
        }

    def _made(
        self, stage: str, settings: Mapping[str, Sequence[Setting]]
    ) -> dict[str, list[RunRecord]] | None:
        """Return the records of a stage's runs by method if all of them are there."""
        planned = self._planned(stage, settings)
        if self._missing(_flat(planned)):
            return None
        return {key: [self._store.load(run) for run in runs] for key, runs in planned.items()}

    def _settings_each(self) -> int:
        """Return how many settings each method has, fine-tuning apart where there are others."""
        counts = {key: len(settings) for key, settings in self.settings.items()}
        penalised = [n for key, n in counts.items() if self.methods[key].is_penalised]
        return max(penalised or counts.values())

    def _missing(self, runs: Sequence[PlannedRun]) -> list[PlannedRun]:
        return [run for run in runs if self._store.find(run) is None]

    def _duration(self, runs: Sequence[PlannedRun]) -> str:
        if not self.estimate:
            return ""
        seconds = [self.experiment.seconds(run.config) for run in runs]
        known = [value for value in seconds if value is not None]
        return f" ({sum(known) / 60 / self.workers:.1f} minutes)" if known else ""

    def _report(self, results: Sequence[MethodResult], seconds: float) -> str:
        experiment, preset = self.experiment, self.experiment.preset
        records = [*self._sources.values(), *self._records.values()]
        about = {
            "experiment": experiment.name,
            "command": self.command,
            **experiment.about(),
            "preset": dataclasses.asdict(preset),
            "seeds": list(preset.seeds),
            "workers": self.workers,
            "seconds": {
                "all_runs": sum(record.seconds["total"] for record in records),
                "this_call": seconds,
            },
            "source_runs": [dataclasses.asdict(record) for record in self._sources.values()],
        }
        notes = experiment.notes(self._settings_each())
        return write_report(
            *(self.output, experiment.title(), results, about, notes, experiment.layout),
            device=preset.device,
        )


@dataclass(frozen=True)
class _Stage:
    """Runs of a stage that are not there yet, the number of all, and whether these are settled."""

    missing: Sequence[PlannedRun]
    total: int
    settled: bool


def _flat(by_method: Mapping[str, Sequence[PlannedRun]]) -> list[PlannedRun]:
    return [run for runs in by_method.values() for run in runs]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _methods_of(experiment: Experiment, names: Sequence[str] | None) -> dict[str, Method]:
    if names is None:
        names = experiment.preset.methods or list(experiment.methods)
    unknown = sorted(set(names) - set(experiment.methods))
    if unknown:
        raise OptionError(
            f"methods: unknown {unknown}; expected some of {list(experiment.methods)}"
        )
    if not names:
        raise OptionError("methods: expected at least one")
    return {name: method for name, method in experiment.methods.items() if name in names}
