"""Finished runs are kept, found again and made only once; workers change nothing but the time."""

import dataclasses
import json
import os
import warnings
from functools import partial

import numpy as np
import pytest
import torch

import ekfac_rs as ek
from ekfac_rs.errors import FileFormatError, OptionError
from ekfac_rs.experiments import permuted_mnist
from ekfac_rs.experiments.data import Mnist, load_mnist_subset
from ekfac_rs.experiments.permuted_mnist import METHODS, PRESETS, RunConfig, study
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

CONFIG = RunConfig(
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
TINY = dataclasses.replace(
    PRESETS["quick"],
    tasks=2,
    epochs=1,
    seeds=(0,),
    grid_tasks=2,
    grid_epochs=1,
    finalists=1,
    hidden=(8,),
    batch_size=50,
    examples=200,
    factor_examples=100,
)


@pytest.fixture(scope="module")
def small_mnist():
    """A few of the embedded images."""
    subset = load_mnist_subset()
    return Mnist(
        "few",
        subset.train_images[:200],
        subset.train_labels[:200],
        subset.test_images[:100],
        subset.test_labels[:100],
    )


# Keeping runs


def test_a_saved_run_is_found_with_all_it_holds(tmp_path):
    store = RunStore(tmp_path / "runs")
    assert store.find(RUN) is None
    store.save(RUN, RECORD)
    assert store.find(RUN) == RECORD
    assert [path.suffix for path in store.folder.iterdir()] == [".json"]


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(RunConfig)])
def test_a_change_of_any_setting_is_another_run(tmp_path, field):
    value = getattr(CONFIG, field)
    other = (*value, 3) if isinstance(value, tuple) else f"{value}x"
    if isinstance(value, int | float):
        other = value + 1
    changed = dataclasses.replace(CONFIG, **{field: other})
    store = RunStore(tmp_path)
    store.save(RUN, RECORD)
    assert store.find(PlannedRun(RUN.name, changed.as_dict())) is None


def test_a_config_comes_back_from_its_dictionary():
    assert RunConfig.from_dict(json.loads(json.dumps(CONFIG.as_dict()))) == CONFIG


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


@pytest.mark.parametrize("count", [1, 2])
def test_only_missing_runs_are_made_and_all_are_returned_in_order(tmp_path, count):
    store = RunStore(tmp_path)
    with Workers(count, echo, None) as workers:
        complete(seeds(2), store, workers, "", progress=False)
        made_before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
        records = complete(seeds(3, 2, 1), store, workers, "", progress=False)
    assert [record.accuracy[0][0] for record in records["method"]] == [0.3, 0.2, 0.1]
    for path, time in made_before.items():
        assert path.stat().st_mtime_ns == time
    for record in records["method"]:
        assert record.seconds["torch"] == 1
        assert (record.seconds["process"] == os.getpid()) == (count == 1)


@pytest.mark.parametrize("count", [1, 2])
def test_an_error_in_a_run_comes_through_and_finished_runs_are_kept(tmp_path, count):
    store = RunStore(tmp_path)
    with Workers(count, echo, 5) as workers:
        complete(seeds(1), store, workers, "", progress=False)
        with pytest.raises(OptionError, match="not this one"):
            complete(seeds(5), store, workers, "", progress=False)
    assert store.find(seeds(1)["method"][0]) is not None


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


# The study


def study_files(output):
    return {path.name: path.stat().st_mtime_ns for path in (output / "runs").iterdir()}


def test_a_second_study_makes_no_run_again(tmp_path, small_mnist, monkeypatch):
    run = partial(study, TINY, small_mnist, tmp_path, ["fine-tuning", "xkfac"], progress=False)
    table = run()
    files = study_files(tmp_path)
    settings = len(METHODS["xkfac"].grids["quick"])
    assert len(files) == 2 * (settings + 1 + 1)
    monkeypatch.setattr(permuted_mnist, "learn_stream", None)
    assert run() == table
    assert study_files(tmp_path) == files


def test_a_lost_run_alone_is_made_again_and_gives_the_same(tmp_path, small_mnist):
    run = partial(study, TINY, small_mnist, tmp_path, ["xkfac"], progress=False)
    run()
    files = study_files(tmp_path)
    lost = next((tmp_path / "runs").glob("final-*.json"))
    before = json.loads(lost.read_text())
    lost.unlink()
    run()
    after = json.loads(lost.read_text())
    assert after["accuracy"] == before["accuracy"]
    assert after["history"] == before["history"]
    changed = {name for name, time in study_files(tmp_path).items() if files[name] != time}
    assert changed == {lost.name}


def test_every_method_gets_the_same_number_of_settings():
    for preset in PRESETS.values():
        sizes = {key: len(method.grids[preset.grid]) for key, method in METHODS.items()}
        assert len(set(sizes.values())) == 1, sizes
        for method in METHODS.values():
            settings = [tuple(sorted(point.items())) for point in method.grids[preset.grid]]
            assert len(set(settings)) == len(settings)


def test_a_diverged_run_scores_chance_from_there_on_and_says_so(small_mnist):
    features = permuted_mnist._Features.of(small_mnist, None)
    wild = dataclasses.replace(CONFIG, lr=1e6, scale=1e6, tasks=3, epochs=2)
    with np.errstate(all="ignore"):
        record = permuted_mnist.learn_stream(wild, features)
    assert record.diverged is not None
    diverging = int(record.diverged.split(":")[0].removeprefix("task "))
    assert record.accuracy[diverging - 1 :] == [[0.1] * i for i in range(diverging, 4)]


def test_warnings_about_stability_are_counted_in_the_record(small_mnist):
    features = permuted_mnist._Features.of(small_mnist, None)
    record = permuted_mnist.learn_stream(dataclasses.replace(CONFIG, scale=1e3), features)
    assert any("unstable" in message for message in record.warnings)


def test_validation_images_are_held_out_of_training(small_mnist):
    features = permuted_mnist._Features.of(small_mnist, None)
    stream = permuted_mnist._Stream(dataclasses.replace(CONFIG, split="validation"), features)
    train, held_out = stream.training(0).x, stream.evaluation(0).x
    assert (len(train), len(held_out)) == (180, 20)
    assert len(torch.cat([train, held_out]).unique(dim=0)) == 200
    whole = permuted_mnist._Stream(CONFIG, features)
    assert len(whole.training(1).x) == 200
    assert torch.equal(whole.evaluation(0).x, features.test_x)


def test_a_last_batch_of_one_is_left_out_of_training(small_mnist):
    features = permuted_mnist._Features.of(small_mnist, 200)
    for batch_size, smallest in [(199, 199), (66, 2), (50, 50)]:
        config = dataclasses.replace(CONFIG, batch_size=batch_size)
        loader = permuted_mnist._Stream(config, features).training(0)
        assert min(len(x) for x, _ in loader) == smallest


@pytest.mark.parametrize(
    ("changes", "methods", "named"),
    [
        ({}, ["xkfac", "unknown"], "methods: unknown"),
        ({"seeds": (0, 1000)}, ["xkfac"], "seeds: 1000"),
    ],
    ids=["method", "seed"],
)
def test_a_study_that_cannot_be_is_refused(tmp_path, small_mnist, changes, methods, named):
    with pytest.raises(OptionError, match=named):
        study(dataclasses.replace(TINY, **changes), small_mnist, tmp_path, methods)
