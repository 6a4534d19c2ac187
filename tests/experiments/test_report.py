"""The report: table, JSON, pictures; and the command line from end to end."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from ekfac_rs.experiments.__main__ import main
from ekfac_rs.experiments.permuted_mnist import METHODS
from ekfac_rs.experiments.report import GridPoint, MethodResult, markdown_table, write_report
from ekfac_rs.experiments.runs import RunRecord

FILES = ("results.json", "table.md", "average_accuracy.png", "first_task.png")
TINY = [
    *("--tasks", "2", "--epochs", "1", "--hidden", "8"),
    *("--examples", "200", "--batch-size", "50", "--workers", "1"),
]


def result(label, *last_rows, setting=None, diverged=None, warnings=None):
    """A method whose final runs end with the given rows, after perfect beginnings."""
    setting = {"lr": 0.1, "scale": 3.0} if setting is None else setting
    runs = []
    for seed, row in enumerate(last_rows):
        accuracy = [[1.0] * (i + 1) for i in range(len(row) - 1)] + [list(row)]
        runs.append(
            RunRecord({"seed": seed}, accuracy, [], diverged, warnings or {}, {"total": 2.0})
        )
    grid = [
        GridPoint({"lr": lr, "scale": scale}, 0.5, None, None, 1.0)
        for lr in (0.01, 0.1, 0.3)
        for scale in (0.0, 3.0)
    ]
    return MethodResult(label.lower(), label, setting, grid, runs)


def cells(table, label):
    row = next(line for line in table.splitlines() if line.startswith(f"| {label} |"))
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_the_table_states_mean_and_sample_deviation_by_hand():
    table = markdown_table([result("A", (0.8, 0.9), (0.6, 0.9)), result("B", (0.5, 0.5))])
    # Averages 0.85 and 0.75; forgetting 0.2 and 0.4.
    assert cells(table, "A")[2:8] == [
        "**80.00 ± 7.07**", "70.00", "90.00", "30.00", "-30.00", "2.0",
    ]  # fmt: skip
    assert cells(table, "B")[2] == "50.00"


def test_a_single_task_has_no_forgetting_in_the_table():
    assert cells(markdown_table([result("A", (0.5,))]), "A")[5:7] == ["n/a", "n/a"]


def test_remarks_tell_divergence_warnings_and_edges_of_the_grid():
    wild = result(
        "A", (0.1, 0.1), setting={"lr": 0.3, "scale": 3.0}, diverged="task 1", warnings={"w": 1}
    )
    assert cells(markdown_table([wild]), "A")[-1] == (
        "diverged in 1 of 1 runs; stability warning in 1 of 1 runs; "
        "lr and scale at the edge of the grid"
    )


def test_zero_is_a_natural_end_and_no_edge():
    assert result("A", (0.5,), setting={"lr": 0.1, "scale": 0.0}).edges() == []
    assert result("A", (0.5,), setting={"lr": 0.01, "scale": 0.0}).edges() == ["lr"]


@pytest.mark.parametrize("seeds", [1, 2])
@pytest.mark.parametrize("methods", [1, 3])
@pytest.mark.parametrize("tasks", [1, 3])
def test_the_report_of_any_size_is_complete(tmp_path, seeds, methods, tasks):
    results = [
        result(f"M{i}", *[(0.9 - 0.3 * i, *[0.8] * (tasks - 1))] * seeds) for i in range(methods)
    ]
    table = write_report(tmp_path / "out", "A title", results, {"command": "c"}, ["A note."])
    for name in FILES:
        assert (tmp_path / "out" / name).stat().st_size > 0
    assert (tmp_path / "out" / "table.md").read_text(encoding="utf-8") == table
    assert table.startswith("# A title\n")
    assert "- A note." in table
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert content["command"] == "c"
    assert set(content["environment"]) >= {"ekfac_rs", "torch", "numpy", "python", "cpus"}
    entry = content["methods"]["m0"]
    assert len(entry["grid"]) == 6
    assert entry["runs"][0]["accuracy"] == results[0].runs[0].accuracy
    assert (entry["summary"]["forgetting"]["mean"] is None) == (tasks == 1)


def test_pictures_are_of_a_sensible_size(tmp_path):
    write_report(tmp_path, "T", [result("A", (0.9, 0.9)), result("B", (0.1, 0.5))], {})
    for name in FILES[2:]:
        content = (tmp_path / name).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) < 300_000


# The command line


def test_the_command_line_makes_the_whole_study(tmp_path, capsys):
    methods = ["l2", "scheduled"]
    arguments = ["permuted-mnist", *TINY, "--seeds", "3", "--output", str(tmp_path)]
    arguments += ["--finalists", "1"]
    assert main([*arguments, "--methods", *methods]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"runs to make, 1 at a time: grid 18 \(.* final 2 \(", printed)
    assert (tmp_path / "table.md").read_text(encoding="utf-8") in printed
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["command"].startswith("python -m ekfac_rs.experiments permuted-mnist --tasks 2")
    assert content["preset"]["hidden"] == [8]
    assert content["seeds"] == [3]
    assert list(content["methods"]) == methods
    for entry in content["methods"].values():
        assert len(entry["grid"]) == 9
        assert sum(point["full_length_score"] is not None for point in entry["grid"]) == 1
        assert [len(row) for row in entry["runs"][0]["accuracy"]] == [1, 2]
    for name in FILES:
        assert (tmp_path / name).is_file()


def processes_left(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.skipif(sys.platform == "win32", reason="no interrupts to other processes on Windows")
def test_an_interrupt_ends_all_processes_and_keeps_the_finished_runs(tmp_path):
    options = ["--methods", "xkfac", "--examples", "2000", "--workers", "2", "--tasks", "5"]
    arguments = [sys.executable, "-m", "ekfac_rs.experiments", "permuted-mnist", *options]
    process = subprocess.Popen(
        [*arguments, "--output", str(tmp_path)],
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


def test_help_names_every_method_and_option():
    arguments = [sys.executable, "-m", "ekfac_rs.experiments", "permuted-mnist", "--help"]
    text = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
    for word in (*METHODS, "--preset", "--data-dir", "--output", "--tasks", "--epochs", "--seeds"):
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
