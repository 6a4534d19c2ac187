"""A study of any experiment: what is tried, chosen, kept and refused. Nothing is trained here."""

import dataclasses
import json
from functools import partial

import pytest

from ekfac_rs.errors import OptionError
from ekfac_rs.experiments.report import STREAM
from ekfac_rs.experiments.runs import PlannedRun, RunRecord
from ekfac_rs.experiments.settings import Method, Preset, grid
from ekfac_rs.experiments.study import Experiment, Study

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
    }
    layout = dataclasses.replace(STREAM, pictures={})
    made: list = []  # noqa: RUF012

    def __init__(self, preset=PRESET, at_length=None):
        self.preset = preset
        self.at_length = at_length or {}

    @classmethod
    def from_options(cls, preset, options):
        raise NotImplementedError

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
def study(tmp_path):
    """Make a study and return what it made, and its results."""

    def make(preset=PRESET, methods=("plain", "a", "b"), **options):
        Told.made.clear()
        experiment = Told(preset, options.pop("at_length", None))
        table = Study(experiment, tmp_path, methods, progress=False, **options).run()
        content = json.loads((tmp_path / "results.json").read_text())
        return list(Told.made), content, table

    return make


def files(folder):
    return {path.name: path.stat().st_mtime_ns for path in (folder / "runs").iterdir()}


def test_every_setting_is_tried_and_the_best_is_run_for_every_seed(study):
    made, content, table = study(command="a command", workers=1)
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


def test_what_a_run_rests_on_is_made_before_it(study):
    made, _, _ = study(methods=["a"])
    assert made.index("source") < made.index("grid")


def test_finalists_are_the_best_of_the_grid_and_are_compared_at_length(study):
    preset = dataclasses.replace(PRESET, scales=(1.0,), lrs=(0.1, 0.2, 0.3), finalists=2)
    made, content, _ = study(preset, ["a"], at_length={0.3: 0.4, 0.2: 0.5})
    assert made.count("finalist") == 2
    entry = content["methods"]["a"]
    assert entry["setting"] == {"lr": 0.2, "scale": 1.0}
    assert [point["full_length_score"] for point in entry["grid"]] == [None, 0.5, 0.4]
    assert [point["seconds"] for point in entry["grid"]] == [1.0, 2.0, 2.0]


def test_a_single_setting_needs_no_grid(study):
    # Not even a seed of its own, so the grid's may be a final one.
    preset = dataclasses.replace(PRESET, lrs=(0.2,), scales=(3.0,), seeds=(0, 1000), finalists=3)
    made, content, _ = study(preset)
    assert {stage: made.count(stage) for stage in made} == {"source": 4, "final": 6}
    assert content["methods"]["a"]["setting"] == {"lr": 0.2, "scale": 3.0}
    assert content["methods"]["plain"]["setting"] == {"lr": 0.2}
    assert content["methods"]["a"]["grid"] == []


def test_a_study_makes_no_run_again_and_a_lost_one_alone(study, tmp_path):
    _, content, table = study()
    before = files(tmp_path)
    made, again, same = study()
    assert (made, same) == ([], table)
    assert again["methods"] == content["methods"]
    assert files(tmp_path) == before
    lost = next((tmp_path / "runs").glob("final-a-*.json"))
    lost.unlink()
    made, *_ = study()
    assert made == ["final"]
    assert {name for name, time in files(tmp_path).items() if before[name] != time} == {lost.name}


def test_the_plan_says_what_is_to_be_made(tmp_path, capsys):
    preset = dataclasses.replace(PRESET, finalists=1)
    Study(Told(preset, {0.2: 0.1, 0.6: 0.2}), tmp_path).run()
    assert capsys.readouterr().out == (
        "runs to make, 1 at a time: source 6 of 6, grid 12 of 12, finalist 3, final 6\n"
    )
    single = dataclasses.replace(PRESET, lrs=(0.2,), scales=(1.0,), seeds=(0, 1, 2))
    Study(Told(single), tmp_path, ["a"], workers=1).run()
    assert capsys.readouterr().out == ("runs to make, 1 at a time: source 1 of 3, final 1 of 3\n")


def test_where_durations_are_known_the_plan_says_them(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Told, "seconds", lambda self, config: 30.0)
    study = partial(Study, Told(), tmp_path, ["a"])
    study().run()
    assert "grid 4 of 4 (2.0 minutes), final 2 (1.0 minutes)" in capsys.readouterr().out
    # Where nothing is left to do there is nothing to estimate.
    study().run()
    assert "grid 0 of 4, final 2\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "methods", "named"),
    [
        ({}, ["a", "unknown"], r"methods: unknown \['unknown'\]"),
        ({}, [], "methods: expected at least one"),
        ({"seeds": (0, 1000)}, ["a"], "seeds: 1000 is the seed of the grid"),
        ({"plain_lrs": (0.1,)}, ["a", "plain"], "methods: .* equally many .* got a 4, plain 1"),
    ],
    ids=["method", "none", "seed", "unequal"],
)
def test_a_study_that_cannot_be_is_refused(tmp_path, changes, methods, named):
    with pytest.raises(OptionError, match=named):
        Study(Told(dataclasses.replace(PRESET, **changes)), tmp_path, methods)


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
