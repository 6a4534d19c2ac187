"""Permuted MNIST: its streams and runs, and its command line from end to end."""

import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import ekfac_rs as ek
from ekfac_rs.errors import InternalError, NumericalError
from ekfac_rs.experiments.__main__ import main
from ekfac_rs.experiments.data import Mnist, load_mnist_subset
from ekfac_rs.experiments.permuted_mnist import (
    METHODS,
    PRESETS,
    PermutedConfig,
    PermutedMnist,
    PermutedRuns,
)
from ekfac_rs.experiments.streams import learn_stream
from ekfac_rs.scales import SCALES

FILES = ("results.json", "table.md", "average_accuracy.png", "first_task.png")
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
    damping=0.01,
)
TINY = [
    *("--tasks", "2", "--epochs", "1", "--hidden", "8"),
    *("--examples", "200", "--batch-size", "50"),
]


@pytest.fixture(scope="module")
def runs():
    """Of a few of the embedded images."""
    subset = load_mnist_subset()
    arrays = (
        subset.train_images[:200],
        subset.train_labels[:200],
        subset.test_images[:100],
        subset.test_labels[:100],
    )
    return PermutedRuns(Mnist("few", *arrays))


# Runs


def test_a_diverged_run_scores_chance_from_there_on_and_says_so(runs):
    wild = dataclasses.replace(CONFIG, lr=1e6, scale=1e6, tasks=3, epochs=2)
    with np.errstate(all="ignore"):
        record = learn_stream(runs, wild)
    assert record.diverged is not None
    diverging = int(record.diverged.split(":")[0].removeprefix("task "))
    assert record.accuracy[diverging - 1 :] == [[0.1] * i for i in range(diverging, 4)]


def test_only_numbers_count_as_divergence_faults_come_through(runs, monkeypatch):
    def consolidate(error):
        def fail(learner, loader):
            raise error

        return fail

    monkeypatch.setattr(ek.ContinualLearner, "consolidate", consolidate(NumericalError("hard")))
    assert learn_stream(runs, CONFIG).diverged == "task 1: hard"
    for error in (InternalError("a fault"), RuntimeError("a fault")):
        monkeypatch.setattr(ek.ContinualLearner, "consolidate", consolidate(error))
        with pytest.raises(type(error), match="a fault"):
            learn_stream(runs, CONFIG)


def test_warnings_about_stability_are_counted_in_the_record(runs):
    record = learn_stream(runs, dataclasses.replace(CONFIG, scale=1e3, step="explicit"))
    assert any("unstable" in message for message in record.warnings)


def test_fine_tuning_is_a_plain_loop_of_sgd_over_the_tasks(runs):
    config = dataclasses.replace(CONFIG, curvature="none", damping=0.0, epochs=2, tasks=3)
    record = learn_stream(runs, config)

    stream = runs.tasks(config)
    model = runs.network(config).train()
    rows = []
    for task in range(config.tasks):
        loader = stream.training(task)
        optimizer = torch.optim.SGD(model.parameters(), lr=config.lr, momentum=0.9)
        steps, done = config.epochs * len(loader), 0
        for _ in range(config.epochs):
            for x, y in loader:
                cosine = 0.5 * (1 + math.cos(math.pi * done / steps))
                optimizer.param_groups[0]["lr"] = config.lr * cosine
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
                done += 1
        model.eval()
        with torch.no_grad():
            tests = [stream.evaluation(j) for j in range(task + 1)]
            rows.append([(model(t.x).argmax(1) == t.y).double().mean().item() for t in tests])
        model.train()
    assert record.accuracy == [pytest.approx(row, abs=1e-12) for row in rows]
    assert all(epoch["penalty"] == 0 for task in record.history for epoch in task)


@pytest.mark.parametrize("rule", SCALES)
def test_a_rule_may_choose_the_scale_and_a_run_tells_which(runs, rule):
    record = learn_stream(runs, dataclasses.replace(CONFIG, scale=rule))
    assert record.diverged is None
    assert record.measures["scale"] > 0
    assert (record.measures["scale"] == 1.0) == (rule == "counting")
    assert learn_stream(runs, CONFIG).measures == {}


def test_what_happens_to_the_weights_is_part_of_the_run(runs):
    kept, merged = (
        learn_stream(runs, dataclasses.replace(CONFIG, weights=weights))
        for weights in ("kept", "merged")
    )
    # The first task is the same; what follows is another optimisation of the same function.
    assert kept.history[0] == merged.history[0]
    assert kept.history[1] != merged.history[1]


# Streams


def test_validation_images_are_held_out_of_training(runs):
    stream = runs.tasks(dataclasses.replace(CONFIG, split="validation"))
    train, held_out = stream.training(0).x, stream.evaluation(0).x
    assert (len(train), len(held_out)) == (180, 20)
    assert len(torch.cat([train, held_out]).unique(dim=0)) == 200
    whole = runs.tasks(CONFIG)
    assert len(whole.training(1).x) == 200
    assert len(whole.evaluation(0).x) == 100


def test_a_last_batch_of_one_is_left_out_of_training(runs):
    for batch_size, smallest in [(199, 199), (66, 2), (50, 50)]:
        config = dataclasses.replace(CONFIG, batch_size=batch_size)
        loader = runs.tasks(config).training(0)
        assert min(len(x) for x, _ in loader) == smallest


# The comparison


def test_every_method_gets_the_same_number_of_different_settings():
    for preset in PRESETS.values():
        sizes = set()
        for method in METHODS.values():
            settings = [tuple(sorted(setting.items())) for setting in method.settings(preset)]
            assert len(set(settings)) == len(settings)
            # With a rule for the scale there is nothing to try.
            assert len(settings) == 1 or "scale" not in method.fixed
            sizes.add(len(settings))
        assert len(sizes - {1}) == 1


def test_the_grid_is_short_and_only_final_runs_see_the_test_images():
    preset = dataclasses.replace(PRESETS["quick"], tasks=5, epochs=2, grid_tasks=3, grid_epochs=1)
    experiment = PermutedMnist(preset, load_mnist_subset())
    options = {**METHODS["xkfac-merged"].fixed, "lr": 0.1, "scale": 3.0}
    sizes = {}
    for stage in ("grid", "finalist", "final"):
        config = experiment.config(stage, 7, options)
        sizes[stage] = (config["split"], config["tasks"], config["epochs"])
        assert (config["seed"], config["weights"], config["scale"]) == (7, "merged", 3.0)
    assert sizes == {
        "grid": ("validation", 3, 1),
        "finalist": ("validation", 5, 2),
        "final": ("test", 5, 2),
    }


def test_the_command_line_makes_the_whole_comparison(tmp_path, capsys):
    methods = ["l2", "scheduled-kfac"]
    arguments = ["permuted-mnist", *TINY, "--seeds", "3", "--output", str(tmp_path)]
    arguments += ["--finalists", "1", "--workers", "1", "--methods", *methods]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert re.search(r"1 at a time: grid 10 of 10 \(.* finalist 2 \(.* final 2 \(", printed)
    assert (tmp_path / "table.md").read_text(encoding="utf-8") in printed
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["command"].startswith("python -m ekfac_rs.experiments permuted-mnist --tasks 2")
    assert content["preset"]["hidden"] == [8]
    assert content["seeds"] == [3]
    assert list(content["methods"]) == methods
    for entry in content["methods"].values():
        assert len(entry["grid"]) == 5
        assert sum(point["full_length_score"] is not None for point in entry["grid"]) == 1
        assert [len(row) for row in entry["runs"][0]["accuracy"]] == [1, 2]
    for name in FILES:
        assert (tmp_path / name).is_file()

    lost = next((tmp_path / "runs").glob("final-l2-*.json"))
    before = json.loads(lost.read_text())
    lost.unlink()
    assert main(arguments) == 0
    after = json.loads(lost.read_text())
    assert (after["accuracy"], after["history"]) == (before["accuracy"], before["history"])


def processes_left(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.skipif(sys.platform == "win32", reason="no interrupts to other processes on Windows")
def test_an_interrupt_ends_all_processes_and_keeps_the_finished_runs(tmp_path):
    # Many short runs: the first is there soon, the last is far away.
    options = ["--methods", "fine-tuning", "--lrs", "0.1", "--scales", "1", "--workers", "2"]
    arguments = [sys.executable, "-m", "ekfac_rs.experiments", "permuted-mnist", *TINY, *options]
    process = subprocess.Popen(
        [*arguments, "--seeds", *map(str, range(1000)), "--output", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell may have left it ignored for background jobs.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("runs/*.json")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "goes on after the runs finished" in errors
    assert "Traceback" not in errors
    assert "leaked" not in errors
    assert {path.suffix for path in (tmp_path / "runs").iterdir()} == {".json"}
    deadline = time.monotonic() + 10
    while processes_left(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not processes_left(process.pid)


def test_help_names_every_method_and_option(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["permuted-mnist", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    options = "preset data-dir output workers tasks epochs seeds hidden finalists examples lrs"
    for word in (*METHODS, *(f"--{name}" for name in options.split())):
        assert word in text


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--tasks", "0"], "--tasks: expected a whole number from 1"),
        (["--seeds", "-1"], "--seeds: expected a whole number from 0"),
        (["--batch-size", "1"], "--batch-size: expected a whole number from 2"),
        (["--hidden", "x"], "--hidden: expected a whole number from 1"),
        (["--methods", "unknown"], "--methods: invalid choice"),
        (["--preset", "huge"], "--preset: invalid choice"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_bad_option_is_refused_by_name(capsys, arguments, named):
    with pytest.raises(SystemExit) as caught:
        main(["permuted-mnist", *arguments])
    assert caught.value.code == 2
    assert named in capsys.readouterr().err


def test_missing_data_is_one_clear_line(tmp_path, capsys):
    arguments = ["permuted-mnist", "--preset", "full", "--data-dir", str(tmp_path)]
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith("error: data_dir: no MNIST in")
