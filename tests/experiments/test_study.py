"""The study: its parts, its one report, and that it goes on where it was."""

import dataclasses
import re
from functools import partial

import pytest

from ekfac_rs.errors import EkfacError, OptionError
from ekfac_rs.experiments.__main__ import main
from ekfac_rs.experiments.comparison import Comparison, Experiment
from ekfac_rs.experiments.methods import METHODS
from ekfac_rs.experiments.permuted_mnist import PermutedMnist
from ekfac_rs.experiments.report import TRANSFER, read_results
from ekfac_rs.experiments.runs import RunRecord
from ekfac_rs.experiments.settings import Preset
from ekfac_rs.experiments.study import PARTS, Part, Study

MADE: list[dict] = []


class Transferred(Experiment):
    """Runs that keep the more of a source of 0.9 and learn the less, the stronger the penalty."""

    name = "transferred"
    methods = {key: METHODS[key] for key in ("fine-tuning", "kfac-train", "xkfac")}  # noqa: RUF012
    layout = TRANSFER
    every_setting = True

    def __init__(self, preset):
        self.preset = preset

    @classmethod
    def read(cls, preset, data_dir):
        if data_dir is not None:
            raise EkfacError(f"data_dir: nothing in {data_dir.name}")
        return cls(preset)

    def config(self, stage, seed, options):
        return {"seed": seed, **options}

    def runner(self, output, progress):
        return partial(lambda: transferred)

    def score(self, record):
        return record.accuracy[-1][1]

    def seconds(self, config):
        return 360.0

    def title(self):
        return "A source to a target"

    def notes(self, settings):
        return [f"{settings} settings."]

    def about(self):
        return {}


def transferred(config):
    MADE.append(config)
    scale = config.get("scale", 0.0)
    better = 0.1 if config["curvature"] == "xkfac" else 0.0
    target = 0.85 - 0.01 * scale + 0.001 * config["seed"]
    source = 0.5 + 0.03 * scale + better + 0.002 * config["seed"]
    return RunRecord(config, [[0.9], [source, target]], [[], []], None, {}, {"total": 1.0})


PRESET = Preset(
    epochs=1,
    batch_size=8,
    seeds=(0, 1, 2),
    lrs=(0.1,),
    plain_lrs=(0.1, 0.2),
    scales=(1.0, 4.0, 8.0),
    l2=(1.0,),
    damping=0.0,
)
TINY = dataclasses.replace(
    PARTS["permuted-mnist"].quick,
    methods=("fine-tuning", "xkfac"),
    examples=200,
    hidden=(8,),
    tasks=2,
    seeds=(0, 1),
    scales=(1.0,),
    plain_lrs=(0.1,),
)
SMALL = {
    "stream": Part(PermutedMnist, TINY, TINY, "How does it go?"),
    "transfer": Part(Transferred, PRESET, dataclasses.replace(PRESET, seeds=(0,)), "And this?"),
}


@pytest.fixture
def made():
    MADE.clear()
    return MADE


def section(report, title):
    return report.split(f"## {title}\n")[1].split("\n## ")[0]


def test_the_report_has_every_parts_tables_and_pictures(tmp_path, made):
    report = Study(SMALL, tmp_path, command="a command", progress=False).run()
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == report
    assert "Made by `a command`" in report
    summary = section(report, "Average accuracy")
    assert "| method | stream | transfer |" in summary
    assert re.search(
        r"\| XK-FAC \| \*{0,2}[\d.]+ ± [\d.]+\*{0,2} \| \*\*[\d.]+ ± [\d.]+\*\* \|", summary
    )
    assert re.search(r"\| K-FAC, train factors \| - \| [\d.]+ ± ", summary)
    for part, title in (
        ("stream", "Permuted MNIST subset, 1 hidden layer, 2 tasks"),
        ("transfer", "A source to a target"),
    ):
        text = section(report, title)
        assert SMALL[part].question in text
        table = (tmp_path / part / "table.md").read_text(encoding="utf-8").splitlines()
        assert set(table[1:]) - {line for line in table if line.startswith("#")} <= set(
            report.splitlines()
        )
        pictures = re.findall(r"!\[[\w ]+\]\(([\w/.]+)\)", text)
        assert len(pictures) == 2
        assert all((tmp_path / picture).stat().st_size > 0 for picture in pictures)
        assert len(read_results(tmp_path / part / "results.json")) >= 2
    headings = [line for line in report.splitlines() if line.startswith("#")]
    assert headings[0] == "# The study"
    assert "### Source accuracy at equal target accuracy" in headings
    assert all(line.startswith("## ") for line in headings[1:] if "Source acc" not in line)


def test_source_at_equal_target_is_the_best_setting_that_reaches_it(tmp_path, made):
    report = Study(SMALL, tmp_path, progress=False).run(["transfer"])
    table = section(report, "A source to a target").split("equal target accuracy\n")[1]
    rows = {
        cells[0]: cells[1:]
        for line in table.splitlines()
        if line.startswith("|")
        for cells in [[cell.strip() for cell in line.strip("|").split("|")]]
    }
    assert rows["source at target of"] == ["84", "82", "80", "78", "76", "74"]
    # Scale 1 reaches 84.1 per cent, 4 reaches 81.1, 8 reaches 77.1; fine-tuning 85.1.
    # Seeds add 0, 0.2 and 0.4: the half width is 4.3027 * 0.2 / sqrt(3).
    assert rows["K-FAC, train factors"] == [
        *("53.20 ± 0.50", "53.20 ± 0.50", "62.20 ± 0.50", "62.20 ± 0.50", "74.20 ± 0.50"),
        "74.20 ± 0.50",
    ]
    assert rows["XK-FAC"][0] == "**63.20 ± 0.50**"
    assert rows["fine-tuning"] == ["50.20 ± 0.50"] * 6


def test_no_run_is_made_twice_and_a_lost_one_again(tmp_path, made):
    study = Study(SMALL, tmp_path, progress=False)
    report = study.run()
    runs = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    assert len(made) == (2 + 3 + 3) * 3
    assert study.run() == report
    lost = next((tmp_path / "runs").glob("final-kfac-train-*.json"))
    lost.unlink()
    assert study.run() == report
    assert len(made) == 25
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    assert {name for name, time in after.items() if runs[name] != time} == {lost.name}


def test_parts_can_be_made_one_by_one_and_the_report_grows(tmp_path, made):
    study = Study(SMALL, tmp_path, progress=False)
    alone = study.run(["transfer"])
    assert "Permuted" not in alone
    both = study.run(["stream"])
    assert both.index("Permuted") < both.index("A source to a target")
    assert len(made) == 24


def test_the_report_is_there_although_a_later_part_is_interrupted(tmp_path, made, monkeypatch):
    run = Comparison.run

    def interrupted(comparison):
        if comparison.experiment.name == "transferred":
            raise KeyboardInterrupt
        return run(comparison)

    monkeypatch.setattr(Comparison, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Study(SMALL, tmp_path, progress=False).run()
    assert "Permuted" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_the_announcement_says_how_many_runs_and_how_long(tmp_path, capsys, made):
    Study(SMALL, tmp_path).run(["transfer"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "transfer: 24 runs, about 2.4 core-hours"
    assert lines[1] == "in all: 24 runs, about 2.4 core-hours, 2.4 hours here"
    assert "runs to make, 1 at a time: final 24 of 24 (144.0 minutes)" in lines
    Study(SMALL, tmp_path, processors=2).run(["transfer"])
    assert "transfer: 0 runs, about 0.0 core-hours" in capsys.readouterr().out


def test_the_quick_form_takes_the_small_presets_and_no_time_to_estimate(
    tmp_path, capsys, made, monkeypatch
):
    monkeypatch.setattr(Transferred, "seconds", None)
    Study(SMALL, tmp_path, quick=True).run(["transfer"])
    assert capsys.readouterr().out.startswith("8 runs to make, in 1 part\n")
    assert {config["seed"] for config in made} == {0}


def test_runs_that_parts_share_are_counted_once(tmp_path, capsys, made):
    parts = {"one": SMALL["transfer"], "two": SMALL["transfer"]}
    Study(parts, tmp_path).run()
    printed = capsys.readouterr().out
    assert printed.startswith("one: 24 runs, about 2.4 core-hours\ntwo: 0 runs, ")
    assert len(made) == 24
    assert (tmp_path / "two" / "results.json").is_file()


@pytest.mark.parametrize("names", [["elsewhere"], []])
def test_parts_that_are_not_there_are_refused(tmp_path, names):
    with pytest.raises(OptionError, match="part: expected some of stream, transfer"):
        Study(SMALL, tmp_path).run(names)


def test_missing_data_end_it_before_any_run(tmp_path, made):
    with pytest.raises(EkfacError, match="data_dir: nothing in"):
        Study(SMALL, tmp_path, data_dir=tmp_path, progress=False).run()
    assert not (tmp_path / "runs").exists()


# The parts


COMPARING = [name for name, part in PARTS.items() if len(part.preset.methods) > 1]


@pytest.mark.parametrize("name", COMPARING)
def test_every_part_is_a_fair_comparison_over_three_seeds(tmp_path, name):
    part = PARTS[name]
    for preset in (part.preset, part.quick):
        assert set(preset.methods) <= set(part.experiment.methods)
        compared = [part.experiment.methods[key] for key in preset.methods]
        counts = {len(each.settings(preset)) for each in compared if each.is_penalised} - {1}
        assert len(counts) == 1
        fine_tuning = len(METHODS["fine-tuning"].settings(preset))
        assert fine_tuning >= counts.pop()
        assert preset.grid_seed not in preset.seeds
        assert preset.name.startswith("study")
    assert len(part.preset.seeds) >= 3
    assert "fine-tuning" in part.preset.methods


@pytest.mark.parametrize("name", sorted(set(PARTS) - set(COMPARING)))
def test_a_part_of_one_method_repeats_that_of_another_part_over_many_seeds(mnist_folder, name):
    part, repeated = PARTS[name], PARTS[name.removesuffix("-seeds")]
    [method] = part.preset.methods
    compared = part.experiment.methods[method]
    # Nothing of it is chosen: what chooses settings elsewhere has nothing to do with its runs.
    runs = [
        part.experiment.read(preset, mnist_folder).config(
            "final", 0, {**compared.fixed, **compared.settings(preset)[0]}
        )
        for preset in (part.preset, repeated.preset)
    ]
    assert runs[0] == runs[1]
    assert len(part.preset.seeds) >= 30
    assert method in repeated.preset.methods
    assert len(compared.settings(part.preset)) == 1


def test_streams_of_the_same_images_find_each_others_grids(mnist_folder):
    first, whole, long = (
        PermutedMnist.read(PARTS[f"permuted-mnist{name}"].preset, mnist_folder)
        for name in ("", "-whole", "-long")
    )
    options = {"curvature": "xkfac", "lr": 0.1, "scale": 3.0, "damping": 0.01}
    grid = first.config("grid", 1000, options)
    assert whole.config("grid", 1000, options) == long.config("grid", 1000, options) == grid
    assert whole.config("final", 0, options)["examples"] is None
    deep, deep_whole = (
        PermutedMnist.read(PARTS[f"permuted-mnist{name}"].preset, mnist_folder)
        for name in ("-deep", "-whole-deep")
    )
    for stage in ("grid", "finalist"):
        assert deep.config(stage, 1000, options) == deep_whole.config(stage, 1000, options)
    titles = [each.title() for each in (first, whole, long, deep, deep_whole)]
    assert len(set(titles)) == 5
    assert long.config("final", 0, options)["tasks"] == 30


# The command line


def test_the_command_line_makes_some_parts(tmp_path, capsys, monkeypatch, made):
    monkeypatch.setattr("ekfac_rs.experiments.__main__.PARTS", SMALL)
    assert (
        main(
            ["study", "--quick", "--part", "transfer", "--output", str(tmp_path), "--workers", "1"]
        )
        == 0
    )
    report = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert report in capsys.readouterr().out
    assert "Made by `python -m ekfac_rs.experiments study --quick --part transfer" in report
    arguments = ["study", "--part", "transfer", "--output", str(tmp_path), "--data-dir", "nowhere"]
    assert main(arguments) == 2
    assert capsys.readouterr().err == "error: data_dir: nothing in nowhere\n"


def test_help_names_every_part(capsys):
    with pytest.raises(SystemExit):
        main(["study", "--help"])
    text = capsys.readouterr().out
    for word in (*PARTS, "--quick", "--part", "--data-dir", "--output", "--workers"):
        assert word in text
