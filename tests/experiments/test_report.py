"""The report: table, JSON, pictures."""

import dataclasses
import json
from pathlib import Path

import pytest
from PIL import Image

from ekfac_rs.errors import FileFormatError
from ekfac_rs.experiments import pictures
from ekfac_rs.experiments.__main__ import EXPERIMENTS
from ekfac_rs.experiments.intervals import Outcome
from ekfac_rs.experiments.report import (
    STREAM,
    TRANSFER,
    GridPoint,
    MethodResult,
    equal_target_levels,
    equal_target_table,
    markdown_table,
    read_results,
    summary_table,
    trade_off,
    write_report,
)
from ekfac_rs.experiments.runs import RunRecord

PUBLISHED = sorted((Path(__file__).resolve().parents[2] / "docs/results").rglob("results.json"))
FILES = ("results.json", "table.md", "average_accuracy.png", "first_task.png")


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


def test_the_table_states_mean_and_interval_by_hand():
    table = markdown_table([result("A", (0.8, 0.9), (0.6, 0.9)), result("B", (0.5, 0.5))])
    # Averages 0.85 and 0.75: 12.706 times the standard error, 0.05; forgetting 0.2 and 0.4.
    assert cells(table, "A")[2:8] == [
        "**80.00 ± 63.53**", "70.00", "90.00", "30.00", "-30.00", "2.0",
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


@pytest.mark.parametrize(
    ("tasks", "methods", "seeds"), [(1, 1, 1), (1, 3, 2), (3, 1, 2), (3, 3, 1)]
)
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


def test_many_methods_are_told_apart_and_their_names_have_room(tmp_path):
    styles = [tuple(style.values()) for style in pictures._styles(40)]
    assert len(set(styles)) == 40
    sizes = []
    for count in (3, 30):
        results = [result(f"M{i}", (0.9 - 0.001 * i, 0.8)) for i in range(count)]
        for name, draw in STREAM.pictures.items():
            draw(tmp_path / name, "T", results)
        with Image.open(tmp_path / "average_accuracy.png") as picture:
            sizes.append(picture.size[1])
    assert sizes[1] > 1.5 * sizes[0]


def test_a_trade_off_has_a_point_for_each_strength_at_its_best_rate():
    def point(lr, scale, score, source, target, diverged=None):
        measures = {"source": source, "target": target}
        setting = {"lr": lr, "scale": scale, "damping": 0.5}
        return GridPoint(setting, score, None, diverged, 1.0, measures)

    grid = [
        point(0.1, 10.0, 0.7, 0.9, 0.6),
        point(0.1, 1.0, 0.8, 0.5, 0.8),
        point(0.2, 1.0, 0.7, 0.9, 0.9),
        point(0.1, 100.0, 0.1, 0.1, 0.1, "diverged"),
    ]
    runs = [RunRecord({"seed": 0}, [[1.0], [0.6, 0.7]], [], None, {}, {"total": 1.0})]
    both = trade_off(MethodResult("x", "X", {"lr": 0.1, "scale": 1.0}, grid, runs))
    assert both.curve == [(0.8, 0.5), (0.6, 0.9)]
    assert both.finals == [(0.7, 0.6)]
    assert trade_off(MethodResult("x", "X", {"lr": 0.1}, [], runs)).curve == []


# Results that were kept


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.parent.name)
def test_published_results_give_their_table_and_pictures_again(tmp_path, path):
    results = read_results(path)
    content = json.loads(path.read_text())
    layout = next(each.layout for each in EXPERIMENTS if each.name == content["experiment"])
    table = path.with_name("table.md").read_text(encoding="utf-8")
    assert markdown_table(results, layout) in table
    for name, draw in layout.pictures.items():
        draw(tmp_path / name, content["title"], results)
        assert path.with_name(name).is_file()


def test_results_come_back_as_they_were_written(tmp_path):
    results = [result("A", (0.9, 0.8), (0.7, 0.6)), result("B", (0.5, 0.5))]
    write_report(tmp_path, "T", results, {})
    assert read_results(tmp_path / "results.json") == results


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"methods": {"a": {"label": 1}}}'])
def test_what_are_no_results_is_refused_by_name(tmp_path, content):
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(FileFormatError, match=r"results\.json: not the results of a comparison"):
        read_results(path)


# Every setting with final runs


def every_setting(label, *outcomes, diverged=()):
    """A method with a point for each (targets, sources), the runs of the last one final."""
    points = []
    for number, (targets, sources) in enumerate(outcomes):
        runs = tuple(
            RunRecord({"seed": seed}, [[0.9], [source, target]], [], None, {}, {"total": 1.0})
            for seed, (target, source) in enumerate(zip(targets, sources, strict=True))
        )
        went = "step 3" if number in diverged else None
        points.append(GridPoint({"scale": float(number)}, 0.5, None, went, 1.0, {}, runs))
    return MethodResult(label.lower(), label, points[-1].setting, points, list(points[-1].runs))


def test_levels_are_round_and_begin_at_the_highest_that_is_reached():
    assert equal_target_levels([Outcome([0.795], [0.1]), Outcome([0.3], [0.9])]) == [
        0.78, 0.76, 0.74, 0.72, 0.7, 0.68,
    ]  # fmt: skip
    assert equal_target_levels([Outcome([0.78], [0.1])], count=1) == [0.78]
    assert equal_target_levels([Outcome([0.05], [0.1])]) == [0.04, 0.02]


def test_the_table_at_equal_target_says_what_is_not_reached():
    table = equal_target_table(
        [
            every_setting("A", ([0.8], [0.5]), ([0.7], [0.75])),
            every_setting("B", ([0.75], [0.6]), ([0.1], [0.1]), diverged=[1]),
        ]
    )
    assert cells(table, "source at target of") == [
        "source at target of", "80", "78", "76", "74", "72", "70",
    ]  # fmt: skip
    assert cells(table, "A")[1:] == ["**50.00**"] * 3 + ["50.00"] * 2 + ["**75.00**"]
    assert cells(table, "B")[1:] == ["-"] * 3 + ["**60.00**"] * 2 + ["60.00"]


def test_without_final_runs_of_every_setting_there_is_no_such_table():
    assert equal_target_table([result("A", (0.5, 0.6))]) == ""
    assert equal_target_table([every_setting("A", ([0.8], [0.5])), result("B", (0.5, 0.6))]) == ""


def test_settings_that_diverged_are_left_out_of_the_picture_not_of_the_results(tmp_path):
    results = [
        every_setting("A", ([0.8, 0.7], [0.5, 0.6]), ([0.7, 0.8], [0.75, 0.8])),
        every_setting("B", ([0.1, 0.1], [0.1, 0.1]), diverged=[0]),
    ]
    write_report(tmp_path, "T", results, {}, layout=TRANSFER)
    assert (tmp_path / "trade_off.png").stat().st_size > 0
    again = read_results(tmp_path / "results.json")
    assert again == results
    assert [len(each.stable_grid()) for each in again] == [2, 0]
    assert "## Source accuracy at equal target accuracy" in (tmp_path / "table.md").read_text()


def test_the_summary_has_a_column_for_each_comparison_and_a_row_for_each_method():
    table = summary_table(
        {
            "one": [result("A", (0.8, 0.8)), result("B", (0.5, 0.5))],
            "two": [result("B", (0.9, 0.7)), result("C", (0.6, 0.6))],
        }
    )
    assert cells(table, "method") == ["method", "one", "two"]
    assert cells(table, "A") == ["A", "**80.00**", "-"]
    assert cells(table, "B") == ["B", "50.00", "**80.00**"]
    assert cells(table, "C") == ["C", "-", "60.00"]


def test_a_rules_scale_is_told():
    ruled = result("A", (0.5, 0.5), setting={"lr": 0.1})
    runs = [dataclasses.replace(run, measures={"scale": 4.24}) for run in ruled.runs]
    ruled = dataclasses.replace(ruled, grid=[], runs=runs)
    assert cells(markdown_table([ruled]), "A")[-1] == "scale 4.2 at the end of a task"
    plain = dataclasses.replace(result("A", (0.5, 0.5), setting={"lr": 0.1}), grid=[])
    assert cells(markdown_table([plain]), "A")[-1] == "nothing chosen"
