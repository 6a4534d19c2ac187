"""Finished runs are kept and found again; workers change nothing but the time."""

import dataclasses
import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

import ekfac_rs as ek
from ekfac_rs.errors import FileFormatError, OptionError
from ekfac_rs.experiments.permuted_mnist import PermutedConfig
from ekfac_rs.experiments.runs import (
    PlannedRun,
    RunRecord,
    RunStore,
    Workers,
    complete,
    recorded,
    threads,
    write_json,
)

CONFIG = PermutedConfig(
    version="1",
    dataset="abc",
    examples=200,
    split="test",
    tasks=2,
    epochs=1,
    hidden=(8, 8),
    batch_size=50,
    seed=0,
    factor_examples=100,
    momentum=0.9,
    lr=0.05,
    curvature="xkfac",
    freeze_bn_after=1.0,
    scale=1.0,
    damping=0.01,
    weights="kept",
)
RUN = PlannedRun("a-run", CONFIG.as_dict())
RECORD = RunRecord(
    CONFIG.as_dict(),
    accuracy=[[0.5], [0.4, 0.6]],
    history=[[{"loss": 1.0, "penalty": None}], []],
    diverged=None,
    warnings={"too large": 2},
    seconds={"total": 0.5},
)


# Keeping runs


def test_a_saved_run_is_found_with_all_it_holds(tmp_path):
    store = RunStore(tmp_path / "runs")
    assert store.find(RUN) is None
    store.save(RUN, RECORD)
    assert store.find(RUN) == RECORD
    assert [path.suffix for path in store.folder.iterdir()] == [".json"]


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(PermutedConfig)])
def test_a_change_of_any_setting_is_another_run(tmp_path, field):
    value = getattr(CONFIG, field)
    other = (*value, 3) if isinstance(value, tuple) else f"{value}x"
    if isinstance(value, int | float):
        other = value + 1
    changed = dataclasses.replace(CONFIG, **{field: other})
    store = RunStore(tmp_path)
    store.save(RUN, RECORD)
    assert store.find(PlannedRun(RUN.name, changed.as_dict())) is None


def test_the_order_of_settings_does_not_matter(tmp_path):
    store = RunStore(tmp_path)
    reordered = dict(reversed(CONFIG.as_dict().items()))
    assert store.path(PlannedRun(RUN.name, reordered)) == store.path(RUN)


@pytest.mark.parametrize(
    "content", ["", "{}", "[1]", '{"config": 1}', "truncated"], ids=lambda text: text or "empty"
)
def test_a_damaged_run_file_is_refused_by_name(tmp_path, content):
    store = RunStore(tmp_path)
    store.path(RUN).write_text(content)
    with pytest.raises(FileFormatError, match=r"a-run-.*\.json: damaged .* delete it"):
        store.find(RUN)


def test_a_run_file_of_another_config_is_refused(tmp_path):
    store = RunStore(tmp_path)
    store.save(RUN, dataclasses.replace(RECORD, config={**RECORD.config, "seed": 7}))
    with pytest.raises(FileFormatError, match="holds another config"):
        store.find(RUN)


def test_a_failed_write_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("step", ["write_text", "replace"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_write_leaves_nothing_behind(tmp_path, monkeypatch, step, error):
    path = tmp_path / "file.json"
    write_json(path, {"a": 1})
    whole = getattr(Path, step)

    def interrupted(self, *arguments, **options):
        if step == "write_text":
            whole(self, *arguments, **options)
        raise error

    monkeypatch.setattr(Path, step, interrupted)
    with pytest.raises(error):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


# Making runs


def echo(marker):
    """Make runs whose first accuracy is their seed, in tenths."""

    def execute(config):
        if config["seed"] == marker:
            raise OptionError("seed: not this one")
        accuracy = [[config["seed"] / 10]]
        threads = {"torch": torch.get_num_threads(), "process": os.getpid()}
        return RunRecord(config, accuracy, [[]], None, {}, {"total": 0.0, **threads})

    return execute


def seeds(*values):
    return {"method": [PlannedRun(f"seed{value}", {"seed": value}) for value in values]}


# One pool for all of it: processes take seconds to start.
@pytest.mark.parametrize("count", [1, 2])
def test_only_missing_runs_are_made_and_an_error_leaves_the_finished_ones(tmp_path, count):
    store = RunStore(tmp_path)
    with Workers(count, echo, 5) as workers:
        complete(seeds(2), store, workers, "", progress=False)
        made_before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
        records = complete(seeds(3, 2, 1), store, workers, "", progress=False)
        with pytest.raises(OptionError, match="not this one"):
            complete(seeds(5), store, workers, "", progress=False)
    assert [record.accuracy[0][0] for record in records["method"]] == [0.3, 0.2, 0.1]
    for path, changed in made_before.items():
        assert path.stat().st_mtime_ns == changed
    for record in records["method"]:
        assert record.seconds["torch"] == 1
        assert (record.seconds["process"] == os.getpid()) == (count == 1)
    assert [store.find(run) is not None for run in seeds(1, 5)["method"]] == [True, False]


KILLED = """
import os, sys, time
from pathlib import Path
from ekfac_rs.experiments.runs import PlannedRun, Workers

def prepare():
    def execute(config):
        Path(sys.argv[1], str(os.getpid())).touch()
        time.sleep(300)
    return execute

if __name__ == "__main__":
    with Workers(2, prepare) as workers:
        list(workers.make([PlannedRun(str(i), {"seed": i}) for i in range(2)]))
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")
def test_no_worker_outlives_a_parent_that_is_killed(tmp_path):
    script, pids = tmp_path / "script.py", tmp_path / "pids"
    script.write_text(KILLED, encoding="utf-8")
    pids.mkdir()
    parent = subprocess.Popen([sys.executable, script, pids])
    try:
        assert _within(120, lambda: len(list(pids.iterdir())) == 2), "no workers"
    finally:
        parent.kill()
        parent.wait()
    workers = [int(path.name) for path in pids.iterdir()]
    assert _within(20, lambda: not any(_runs(pid) for pid in workers))


def _within(seconds, condition):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.1)
    return False


def _runs(pid):
    """Whether a process is there and not just waiting to be reaped."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_threads_are_as_before_after_single_threaded_work():
    before = torch.get_num_threads(), ek.num_threads()
    with threads(1):
        assert torch.get_num_threads() == 1
    assert (torch.get_num_threads(), ek.num_threads()) == before


def test_only_the_given_warnings_are_counted_the_others_come_through():
    with warnings.catch_warnings(record=True) as others:
        warnings.simplefilter("always")
        with recorded(UserWarning) as counts:
            for message, category in [("a", UserWarning), ("b", ImportWarning), ("a", UserWarning)]:
                warnings.warn(message, category, stacklevel=1)
    assert counts == {"a": 2}
    assert [str(warning.message) for warning in others] == ["b"]
