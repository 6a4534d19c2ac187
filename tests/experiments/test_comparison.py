"""Any comparison: what is tried, chosen, kept and refused. Nothing is trained here."""

import dataclasses
import json
from argparse import ArgumentTypeError
from functools import partial

import pytest

from ekfac_rs.errors import OptionError
from ekfac_rs.experiments.comparison import Comparison, Experiment
from ekfac_rs.experiments.methods import METHODS, rule_names, with_rules
from ekfac_rs.experiments.options import scale
from ekfac_rs.experiments.report import STREAM
from ekfac_rs.experiments.runs import PlannedRun, RunRecord
from ekfac_rs.experiments.settings import (
    Method,
    Preset,
    beyond,
    grid,
    setting_words,
    strength_of,
)
from ekfac_rs.scales import SCALES

PRESET = Preset(
    epochs=1, batch_size=8, seeds=(0, 1), lrs=(0.1, 0.2), scales=(1.0, 3.0), l2=(5.0,), damping=0.0
)
CURVED = {"lr": "lrs", "scale": "scales"}


class Told(Experiment):
    """Runs whose accuracy their config tells: the learning rate short, a table of it at length."""

    name = "told"
    methods = {  # noqa: RUF012
        "plain": Method("plain", {"curvature": "none"}, {"lr": "plain_lrs"}),
        "a": Method("A", {"curvature": "a"}, CURVED),
        "b": Method("B", {"curvature": "b"}, CURVED),
        "c": Method("C", {"curvature": "c"}, {"lr": "lrs", "scale": "diagonal_scales"}),
    }
    layout = dataclasses.replace(STREAM, pictures={})
    made: list = []  # noqa: RUF012

    every_setting = False

    def __init__(self, preset=PRESET, at_length=None):
        self.preset = preset
        self.at_length = at_length or {}

    @classmethod
    def read(cls, preset, data_dir):
        return cls(preset)

    def config(self, stage, seed, options):
        return {"stage": stage, "seed": seed, **options}

    def source(self, config):
        if config["curvature"] == "none":
            return None
        config = {"stage": "source", "curvature": config["curvature"], "seed": config["seed"]}
        return PlannedRun(f"source-{config['curvature']}-seed{config['seed']}", config)

    def runner(self, output, progress):
        return partial(told, self.at_length)

    def score(self, record):
        return record.accuracy[-1][-1]

    def measures(self, record):
        return {"twice": 2 * record.accuracy[-1][-1]}

    def title(self):
        return "Told"

    def notes(self, settings):
        return [f"{settings} settings."]

    def about(self):
        return {"data": "none"}


def told(at_length):
    def execute(config):
        Told.made.append(config["stage"])
        score = config.get("lr", 0.0)
        if config["stage"] == "finalist":
            score = at_length[config["lr"]]
        return RunRecord(config, [[score]], [[]], None, {}, {"total": 1.0})

    return execute


@pytest.fixture
def compare(tmp_path):
    """Make a comparison and return what it made, and its results."""

    def make(preset=PRESET, methods=("plain", "a", "b"), **options):
        Told.made.clear()
        experiment = Told(preset, options.pop("at_length", None))
        table = Comparison(experiment, tmp_path, methods, progress=False, **options).run()
        content = json.loads((tmp_path / "results.json").read_text())
        return list(Told.made), content, table

    return make


def files(folder):
    return {path.name: path.stat().st_mtime_ns for path in (folder / "runs").iterdir()}


def test_every_setting_is_tried_and_the_best_is_run_for_every_seed(compare):
    made, content, table = compare(command="a command", workers=1)
    # Of each of two curvatures one source per seed; twelve settings; three methods, two seeds.
    assert {stage: made.count(stage) for stage in made} == {"source": 6, "grid": 12, "final": 6}
    assert content["methods"]["plain"]["setting"] == {"lr": 0.6}
    for key in "ab":
        entry = content["methods"][key]
        assert entry["setting"] == {"lr": 0.2, "scale": 1.0}
        assert [point["setting"] for point in entry["grid"]] == grid(lr=(0.1, 0.2), scale=(1, 3))
        assert entry["grid"][0]["measures"] == {"twice": 0.2}
        assert [run["config"]["seed"] for run in entry["runs"]] == [0, 1]
        assert {run["config"]["curvature"] for run in entry["runs"]} == {key}
    assert len(content["source_runs"]) == 6
    assert content["seconds"]["all_runs"] == 24.0
    assert (content["command"], content["data"], content["seeds"]) == ("a command", "none", [0, 1])
    assert "- 4 settings." in table


def test_what_a_run_rests_on_is_made_before_it(compare):
    made, _, _ = compare(methods=["a"])
    assert made.index("source") < made.index("grid")


def test_finalists_are_the_best_of_the_grid_and_are_compared_at_length(compare):
    preset = dataclasses.replace(PRESET, scales=(1.0,), lrs=(0.1, 0.2, 0.3), finalists=2)
    made, content, _ = compare(preset, ["a"], at_length={0.3: 0.4, 0.2: 0.5})
    assert made.count("finalist") == 2
    entry = content["methods"]["a"]
    assert entry["setting"] == {"lr": 0.2, "scale": 1.0}
    assert [point["full_length_score"] for point in entry["grid"]] == [None, 0.5, 0.4]
    assert [point["seconds"] for point in entry["grid"]] == [1.0, 2.0, 2.0]


def test_a_single_setting_needs_no_grid(compare):
    # Not even a seed of its own, so the grid's may be a final one.
    preset = dataclasses.replace(PRESET, lrs=(0.2,), scales=(3.0,), seeds=(0, 1000), finalists=3)
    made, content, _ = compare(preset)
    assert {stage: made.count(stage) for stage in made} == {"source": 4, "final": 6}
    assert content["methods"]["a"]["setting"] == {"lr": 0.2, "scale": 3.0}
    assert content["methods"]["plain"]["setting"] == {"lr": 0.2}
    assert content["methods"]["a"]["grid"] == []


def test_a_comparison_makes_no_run_again_and_a_lost_one_alone(compare, tmp_path):
    _, content, table = compare()
    before = files(tmp_path)
    made, again, same = compare()
    assert (made, same) == ([], table)
    assert again["methods"] == content["methods"]
    assert files(tmp_path) == before
    lost = next((tmp_path / "runs").glob("final-a-*.json"))
    lost.unlink()
    made, *_ = compare()
    assert made == ["final"]
    assert {name for name, time in files(tmp_path).items() if before[name] != time} == {lost.name}


def test_the_plan_says_what_is_to_be_made(tmp_path, capsys):
    preset = dataclasses.replace(PRESET, finalists=1)
    Comparison(Told(preset, {0.2: 0.1, 0.6: 0.2}), tmp_path, ["plain", "a", "b"]).run()
    assert capsys.readouterr().out == (
        "runs to make, 1 at a time: source 6 of 6, grid 12 of 12, finalist 3, final 6\n"
    )
    single = dataclasses.replace(PRESET, lrs=(0.2,), scales=(1.0,), seeds=(0, 1, 2))
    Comparison(Told(single), tmp_path, ["a"], workers=1).run()
    assert capsys.readouterr().out == ("runs to make, 1 at a time: source 1 of 3, final 1 of 3\n")


def test_where_durations_are_known_the_plan_says_them(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Told, "seconds", lambda self, config: 30.0)
    compare = partial(Comparison, Told(), tmp_path, ["a"])
    compare().run()
    assert "grid 4 of 4 (2.0 minutes), final 2 (1.0 minutes)" in capsys.readouterr().out
    # Where nothing is left to do there is nothing to estimate.
    compare().run()
    assert "grid 0 of 4, final 0 of 2\n" in capsys.readouterr().out


def test_the_plan_knows_what_has_been_chosen(tmp_path):
    preset = dataclasses.replace(PRESET, finalists=1)
    comparison = Comparison(Told(preset, {0.2: 0.1}), tmp_path, ["a"], progress=False)
    assert len(comparison.to_make()) == 3 + 4 + 1 + 2
    comparison.run()
    assert comparison.to_make() == []
    next((tmp_path / "runs").glob("final-*.json")).unlink()
    assert [run.name.split("-")[0] for run in comparison.to_make()] == ["final"]
    next((tmp_path / "runs").glob("finalist-*.json")).unlink()
    assert [run.name.split("-")[0] for run in comparison.to_make()] == ["finalist", *["final"] * 2]


@pytest.mark.parametrize(
    ("changes", "methods", "named"),
    [
        ({}, ["a", "unknown"], r"methods: unknown \['unknown'\]"),
        ({}, [], "methods: expected at least one"),
        ({"seeds": (0, 1000)}, ["a"], "seeds: 1000 is the seed of the grid"),
        ({"diagonal_scales": (1.0, 2.0, 3.0)}, ["a", "c"], "methods: .* equally many .* a 4, c 6"),
    ],
    ids=["method", "none", "seed", "unequal"],
)
def test_a_comparison_that_cannot_be_is_refused(tmp_path, changes, methods, named):
    with pytest.raises(OptionError, match=named):
        Comparison(Told(dataclasses.replace(PRESET, **changes)), tmp_path, methods)


def test_fine_tuning_may_have_more_settings_and_any_method_a_single_one(compare):
    preset = dataclasses.replace(
        PRESET, plain_lrs=(0.1, 0.2, 0.3, 0.4, 0.5), diagonal_scales=(7.0,), lrs=(0.1,)
    )
    made, content, table = compare(preset, ["plain", "a", "c"])
    assert made.count("grid") == 5 + 2
    assert content["methods"]["c"]["grid"] == []
    assert "nothing chosen |" in table
    assert "- 2 settings." in table


def test_a_preset_names_what_is_compared_unless_methods_are_named(tmp_path):
    preset = dataclasses.replace(PRESET, methods=("b", "a"))
    assert list(Comparison(Told(preset), tmp_path).methods) == ["a", "b"]
    assert list(Comparison(Told(preset), tmp_path, ["plain"]).methods) == ["plain"]
    assert len(Comparison(Told(), tmp_path).methods) == 4


def test_every_setting_may_be_run_for_every_seed_and_chosen_by_that(compare, monkeypatch):
    monkeypatch.setattr(Told, "every_setting", True)
    made, content, _ = compare(dataclasses.replace(PRESET, seeds=(0, 1, 1000)), ["plain", "a"])
    assert {stage: made.count(stage) for stage in made} == {"source": 3, "final": 8 * 3}
    entry = content["methods"]["a"]
    assert entry["setting"] == {"lr": 0.2, "scale": 1.0}
    for point in entry["grid"]:
        assert [run["config"]["seed"] for run in point["runs"]] == [0, 1, 1000]
        assert {run["config"]["lr"] for run in point["runs"]} == {point["setting"]["lr"]}
        assert point["score"] == pytest.approx(point["setting"]["lr"])
        assert point["measures"]["twice"] == pytest.approx(2 * point["setting"]["lr"])
        assert point["seconds"] == 3.0
    assert entry["runs"] == entry["grid"][2]["runs"]
    assert compare(dataclasses.replace(PRESET, seeds=(0, 1, 1000)), ["plain", "a"])[0] == []


def test_comparisons_with_one_store_share_the_runs_that_are_the_same(tmp_path):
    Told.made.clear()
    for name, methods in (("one", ["a"]), ("two", ["a", "b"])):
        Comparison(Told(), tmp_path / name, methods, store=tmp_path / "kept", progress=False).run()
    assert Told.made.count("grid") == 8
    assert not (tmp_path / "two" / "runs").exists()
    assert (tmp_path / "two" / "results.json").is_file()


# Presets and grids


def test_a_grid_is_every_combination_in_the_order_of_the_axes():
    assert grid(lr=(1.0, 2.0), scale=(3.0, 4.0)) == [
        {"lr": 1.0, "scale": 3.0},
        {"lr": 1.0, "scale": 4.0},
        {"lr": 2.0, "scale": 3.0},
        {"lr": 2.0, "scale": 4.0},
    ]


def test_a_crossed_grid_leaves_the_middle_along_one_axis_at_a_time():
    points = grid(crossed=True, lr=(1.0, 2.0, 3.0), scale=(4.0, 5.0, 6.0), damping=(0.0,))
    assert [(point["lr"], point["scale"]) for point in points] == [
        (1.0, 5.0), (2.0, 4.0), (2.0, 5.0), (2.0, 6.0), (3.0, 5.0),
    ]  # fmt: skip
    assert grid(crossed=True, lr=(1.0,), scale=(2.0,)) == [{"lr": 1.0, "scale": 2.0}]


@pytest.mark.parametrize("crossed", [False, True])
def test_rates_of_fine_tuning_are_spread_over_as_many_settings_as_the_others_have(crossed):
    preset = dataclasses.replace(PRESET, crossed=crossed)
    rates = preset.axis("plain_lrs")
    assert len(rates) == len(Told.methods["a"].settings(preset)) == (3 if crossed else 4)
    assert (rates[0], rates[-1]) == (0.033, 0.6)
    assert list(rates) == sorted(set(rates))


def test_axes_that_are_empty_follow_another():
    assert PRESET.axis("frozen_lrs") == (0.1, 0.2)
    assert PRESET.axis("scheduled_lrs") == (0.1, 0.2)
    assert list(PRESET.axis("plain_epochs")) == [1]
    assert list(PRESET.axis("rule_lrs")) == [0.2]
    assert dataclasses.replace(PRESET, rule_lrs=(0.7,)).axis("rule_lrs") == (0.7,)
    assert PRESET.axis("diagonal_scales") == (1.0, 3.0)
    assert dataclasses.replace(PRESET, frozen_lrs=(9.0,)).axis("frozen_lrs") == (9.0,)
    assert PRESET.axis("damping") == (0.0,)


def test_a_changed_axis_takes_those_that_follow_it_along_unless_they_are_changed_too():
    preset = dataclasses.replace(PRESET, frozen_lrs=(0.01, 0.02), diagonal_scales=(7.0, 8.0))
    changed = preset.changed({"lrs": (0.5,), "epochs": 3})
    assert changed.axis("frozen_lrs") == (0.5,)
    assert changed.axis("diagonal_scales") == (7.0, 8.0)
    assert changed.epochs == 3
    assert preset.changed({"lrs": (0.5,), "frozen_lrs": (0.3,)}).axis("frozen_lrs") == (0.3,)
    assert preset.changed({"scales": (2.0,)}).axis("diagonal_scales") == (2.0,)
    assert preset.changed({}) == preset


# Methods


def test_a_method_has_a_row_for_each_rule_with_nothing_to_choose():
    rows = with_rules("scheduled-kfac")
    assert list(rows) == rule_names("scheduled-kfac")
    assert [row.fixed["scale"] for row in rows.values()] == list(SCALES)
    for rule, (key, row) in zip(SCALES, rows.items(), strict=True):
        assert key == f"scheduled-kfac-{rule}"
        assert row.label.endswith(f"scale by {rule}")
        assert row.settings(PRESET) == [{"lr": 0.2, "damping": 0.0}]
        assert row.fixed["freeze_bn_after"] == METHODS["scheduled-kfac"].fixed["freeze_bn_after"]


def test_scales_may_be_named_among_numbers():
    preset = dataclasses.replace(PRESET, scales=(1.0, "auto"), lrs=(0.1,))
    settings = METHODS["xkfac"].settings(preset)
    assert [setting["scale"] for setting in settings] == [1.0, "auto"]
    assert [strength_of(setting) for setting in settings] == [1.0, 0.0]
    assert setting_words(settings[1]) == ["lr0.1", "auto", "damping0"]
    assert [scale(text) for text in ("3", "auto")] == [3.0, "auto"]
    for text in ("-1", "nan", "inf", "autos", ""):
        with pytest.raises(ArgumentTypeError, match="expected a number from 0 on"):
            scale(text)


def test_fine_tuning_alone_holds_on_to_nothing():
    free = [key for key, method in METHODS.items() if not method.is_penalised]
    assert free == ["fine-tuning", "fine-tuning-frozen", "fine-tuning-put-back"]


# --- beyond the ends of a grid -------------------------------------------------------------------

GRID = [{"lr": lr, "scale": s} for lr, s in ((0.03, 3.0), (0.1, 1.0), (0.1, 3.0), (0.1, 10.0))]


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ({"lr": 0.1, "scale": 3.0}, [{"lr": 0.3, "scale": 3.0}]),
        ({"lr": 0.1, "scale": 10.0}, [{"lr": 0.3, "scale": 10.0}, {"lr": 0.1, "scale": 30.0}]),
        ({"lr": 0.1, "scale": 1.0}, [{"lr": 0.3, "scale": 1.0}, {"lr": 0.1, "scale": 0.3}]),
        ({"lr": 0.03, "scale": 3.0}, [{"lr": 0.009, "scale": 3.0}]),
    ],
)
def test_beyond_an_end_come_settings_as_far_apart_as_those_before(setting, expected):
    assert beyond(setting, GRID) == expected
    assert beyond(setting, [*GRID, *expected[1:]]) == expected[:1]


def test_nothing_is_beyond_what_counts_or_has_one_value_or_is_zero_or_a_word():
    tried = [{"epochs": e, "scale": "auto", "damping": d} for e, d in ((1, 0.0), (2, 1.0))]
    assert beyond(tried[0], tried) == []
    assert beyond({"lr": 0.1}, [{"lr": 0.1}]) == []


def test_a_grid_goes_on_while_its_best_is_at_an_end(compare, tmp_path):
    preset = dataclasses.replace(PRESET, lrs=(0.01, 0.02), scales=(1.0,), extensions=3)
    made, content, _ = compare(preset, ["a"])
    # A run's accuracy is its learning rate: the best is always at the end.
    tried = [point["setting"]["lr"] for point in content["methods"]["a"]["grid"]]
    assert tried == [0.01, 0.02, 0.04, 0.08, 0.2]
    assert content["methods"]["a"]["setting"]["lr"] == tried[-1]
    assert made.count("grid") == 5
    # What was made is found again, and planned as it was.
    assert Comparison(Told(preset), tmp_path, ["a"], progress=False).to_make() == []
    assert compare(preset, ["a"])[0] == []
    assert len(Comparison(Told(preset), tmp_path / "other", ["a"]).to_make()) == 3 + 2 + 2
