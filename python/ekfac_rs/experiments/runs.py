"""Runs of an experiment that are kept: one JSON file each, found again by their full config."""

import hashlib
import json
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ekfac_rs.errors import FileFormatError
from ekfac_rs.metrics import AccuracyMatrix

__all__ = ["PlannedRun", "RunRecord", "RunStore", "complete", "recorded", "write_json"]

Config = Mapping[str, Any]


@dataclass(frozen=True)
class PlannedRun:
    """A run to be made: a readable `name` and the `config` that determines its outcome."""

    name: str
    config: Config


@dataclass(frozen=True)
class RunRecord:
    """What one run, a stream of tasks learnt once, left behind.

    Attributes
    ----------
    config
        Every setting that determines the outcome.
    accuracy
        Row ``i`` holds the accuracies on tasks ``0 .. i`` after task ``i``. From the task in
        which a run diverged on, all of them are chance.
    history
        For each task, the learner's report of each epoch.
    diverged
        What happened, if the run diverged; else None.
    warnings
        Message to number of times of the warnings the run gave.
    seconds
        Wall-clock by part (``fit``, ``consolidate``, ``evaluate``) and ``total``.
    """

    config: Config
    accuracy: list[list[float]]
    history: list[list[dict[str, float | None]]]
    diverged: str | None
    warnings: dict[str, int]
    seconds: dict[str, float]

    @property
    def matrix(self) -> AccuracyMatrix:
        """The accuracies as a matrix."""
        return AccuracyMatrix.from_rows(self.accuracy)


class RunStore:
    """A folder of finished runs.

    A run's file is named after its name and a digest of its config, written under another name
    and then renamed: a file that exists is complete.

    Parameters
    ----------
    folder
        Made when the first run is saved.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, run: PlannedRun) -> Path:
        """Return where `run` is kept."""
        return self.folder / f"{run.name}-{_digest(run.config)}.json"

    def find(self, run: PlannedRun) -> RunRecord | None:
        """Return the record of `run` if it has been finished.

        Raises
        ------
        FileFormatError
            If its file is damaged or holds another config.
        """
        return self.load(run) if self.path(run).exists() else None

    def load(self, run: PlannedRun) -> RunRecord:
        """Return the record of `run`, which has been finished.

        Raises
        ------
        FileFormatError
            If its file is damaged or holds another config.
        """
        path = self.path(run)
        try:
            record = RunRecord(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise FileFormatError(f"{path}: damaged ({error}); delete it to run again") from error
        if _canonical(record.config) != _canonical(run.config):
            raise FileFormatError(f"{path}: holds another config; delete it to run again")
        return record

    def save(self, run: PlannedRun, record: RunRecord) -> None:
        """Keep the record of `run`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.path(run), asdict(record))


def complete(
    planned: Mapping[str, Sequence[PlannedRun]],
    store: RunStore,
    execute: Callable[[Config], RunRecord],
    title: str,
    progress: bool = True,
) -> dict[str, list[RunRecord]]:
    """Return the records of all planned runs, making those that are not in `store` yet.

    Parameters
    ----------
    planned
        Runs by method; made in this order.
    store
        Finished runs; each new one is saved at once.
    execute
        Makes a run from its config.
    title
        What the progress bar counts.
    progress
        Show a progress bar.
    """
    missing = [run for runs in planned.values() for run in runs if store.find(run) is None]
    with tqdm(missing, desc=title, unit="run", disable=not progress or not missing) as bar:
        for run in bar:
            bar.set_postfix_str(run.name)
            store.save(run, execute(run.config))
    return {method: [store.load(run) for run in runs] for method, runs in planned.items()}


@contextmanager
def recorded(category: type[Warning]) -> Iterator[Counter[str]]:
    """Count the warnings of one category by message instead of showing them.

    The counts are there once the block is left; all other warnings are given again then.
    """
    counts: Counter[str] = Counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", category)
        yield counts
    for warning in caught:
        if issubclass(warning.category, category):
            counts[str(warning.message)] += 1
        else:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )


def write_json(path: Path, content: Any) -> None:
    """Write `content` so that `path` never holds a part of it.

    Raises
    ------
    ValueError
        If `content` holds NaN or infinity, which JSON lacks.
    """
    text = json.dumps(content, indent=1, allow_nan=False)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(text + "\n", encoding="utf-8")
    unfinished.replace(path)


def _canonical(config: Config) -> str:
    return json.dumps(config, sort_keys=True, allow_nan=False)


def _digest(config: Config) -> str:
    return hashlib.sha256(_canonical(config).encode()).hexdigest()[:12]
