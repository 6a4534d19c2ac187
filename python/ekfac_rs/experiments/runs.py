"""Runs of an experiment that are kept: one JSON file each, found again by their full config."""

import hashlib
import json
import math
import os
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.context import BaseContext
from pathlib import Path
from threading import RLock, Thread
from typing import Any, Self

import torch
from tqdm import tqdm

import ekfac_rs as ek
from ekfac_rs.errors import EkfacError, FileFormatError, NonFiniteError, NumericalError
from ekfac_rs.metrics import AccuracyMatrix

__all__ = [
    "DIVERGENCE",
    "Clock",
    "Config",
    "Execute",
    "PlannedRun",
    "RunRecord",
    "RunStore",
    "Workers",
    "complete",
    "config_digest",
    "finite_or_none",
    "recorded",
    "threads",
    "write_json",
]

Config = Mapping[str, Any]
Execute = Callable[[Config], "RunRecord"]

# What a setting may do to a run. Any other error is a fault, and ends the comparison.
DIVERGENCE = (NonFiniteError, NumericalError)


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
    measures
        Other results, by name.
    """

    config: Config
    accuracy: list[list[float]]
    history: list[list[dict[str, float | None]]]
    diverged: str | None
    warnings: dict[str, int]
    seconds: dict[str, float]
    measures: dict[str, float] = field(default_factory=dict)

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
        return self.folder / f"{run.name}-{config_digest(run.config)}.json"

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


class Workers:
    """Processes that make runs.

    Small networks gain little from a second thread, so runs side by side on one thread each use
    the processors better, and results do not depend on the number of processes. With one worker
    everything stays in this process. The others start with the first run.

    Parameters
    ----------
    count
        Number of processes.
    threads_each
        Threads that each of them computes on.
    prepare
        Called once in each process with `arguments`; returns what makes a run from its config.
        Has to be importable, and its arguments picklable.
    """

    def __init__(
        self,
        count: int,
        prepare: Callable[..., Execute],
        *arguments: Any,
        threads_each: int = 1,
    ) -> None:
        self.count = count
        self.threads_each = threads_each
        self._prepare = prepare
        self._arguments = arguments
        self._others = set(active_children())
        self._pool: ProcessPoolExecutor | None = None
        self._execute: Execute | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if self._pool is None:
            return
        if error is not None:  # Do not wait for the runs under way.
            for process in set(active_children()) - self._others:
                process.terminate()
        self._pool.shutdown(cancel_futures=True)

    def make(self, runs: Sequence[PlannedRun]) -> Iterator[tuple[PlannedRun, RunRecord]]:
        """Make the runs; each is yielded when it is finished, in any order.

        Raises
        ------
        EkfacError
            If a worker was killed.
        """
        if not runs:
            return
        if self.count == 1:
            execute = self._execute = self._execute or self._prepare(*self._arguments)
            for run in runs:
                with threads(self.threads_each):
                    record = execute(run.config)
                yield run, record
            return
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                self.count,
                _context(),
                _start_worker,
                (self.threads_each, self._prepare, self._arguments),
            )
        with _interrupts_held_back():  # Workers start here.
            futures = {self._pool.submit(_make_in_worker, run.config): run for run in runs}
        for future in as_completed(futures):
            try:
                record = future.result()
            except BrokenProcessPool as error:
                raise EkfacError(
                    "a worker process was killed, for want of memory perhaps (then use fewer "
                    "workers); finished runs are kept"
                ) from error
            yield futures[future], record


def _context() -> BaseContext:
    """Have workers forked off a process that has imported what takes seconds."""
    if sys.platform != "linux":
        return get_context("spawn")
    context = get_context("forkserver")
    # Torch, with what its first optimiser imports. Not this package: it knows forked processes, and
    # has them keep away from torch's threads.
    context.set_forkserver_preload(["torch._dynamo"])
    return context


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute on `count` threads within the block."""
    before = torch.get_num_threads(), ek.num_threads()
    torch.set_num_threads(count)
    ek.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        ek.set_num_threads(before[1])


class Clock:
    """Wall-clock by part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time that the block takes to part `name`."""
        since = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - since


def complete(
    planned: Mapping[str, Sequence[PlannedRun]],
    store: RunStore,
    workers: Workers,
    title: str,
    progress: bool = True,
) -> dict[str, list[RunRecord]]:
    """Return the records of all planned runs, making those that are not in `store` yet.

    Parameters
    ----------
    planned
        Runs by method.
    store
        Finished runs; each new one is saved at once.
    workers
        Make the missing ones.
    title
        What the progress bar counts.
    progress
        Show a progress bar, with the name of the run finished last.
    """
    missing = [run for runs in planned.values() for run in runs if store.find(run) is None]
    with tqdm(
        total=len(missing), desc=title, unit="run", disable=not progress or not missing
    ) as bar:
        for run, record in workers.make(missing):
            store.save(run, record)
            bar.set_postfix_str(run.name)
            bar.update()
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


def finite_or_none(values: Mapping[str, float]) -> dict[str, float | None]:
    """Replace NaN and infinity, which JSON lacks, by None."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def write_json(path: Path, content: Any) -> None:
    """Write `content` so that `path` never holds a part of it.

    Raises
    ------
    ValueError
        If `content` holds NaN or infinity, which JSON lacks.
    """
    text = json.dumps(content, indent=1, allow_nan=False)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(text + "\n", encoding="utf-8")
        unfinished.replace(path)
    except BaseException:  # Ctrl-C, too.
        unfinished.unlink(missing_ok=True)
        raise


def config_digest(config: Config) -> str:
    """Return a short fingerprint (hexadecimal) of a config, whatever the order of its settings."""
    return hashlib.sha256(_canonical(config).encode()).hexdigest()[:12]


def _canonical(config: Config) -> str:
    return json.dumps(config, sort_keys=True, allow_nan=False)


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Answer Ctrl-C after the block; processes started there never do.

    Ctrl-C reaches all processes of a terminal; the parent alone answers, and ends its workers.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Not on Windows.
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# What makes runs in this process, if it is a worker.
_execute_in_worker: Execute | None = None


def _start_worker(
    threads_each: int, prepare: Callable[..., Execute], arguments: Sequence[Any]
) -> None:
    global _execute_in_worker
    Thread(target=_end_with_parent, daemon=True).start()
    # The default lock, shared between processes, would be reported as leaked when workers end.
    tqdm.set_lock(RLock())
    torch.set_num_threads(threads_each)
    ek.set_num_threads(threads_each)
    _execute_in_worker = prepare(*arguments)


def _end_with_parent() -> None:
    """Leave no worker behind that goes on for nobody, where the parent is killed."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _make_in_worker(config: Config) -> RunRecord:
    assert _execute_in_worker is not None
    return _execute_in_worker(config)
