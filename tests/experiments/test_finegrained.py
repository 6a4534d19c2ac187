"""Transfer from a pretrained network: choice, runs, the whole comparison, and its command line."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import ekfac_rs as ek
from ekfac_rs.errors import InternalError, NonFiniteError, OptionError
from ekfac_rs.experiments.__main__ import main
from ekfac_rs.experiments.comparison import Comparison
from ekfac_rs.experiments.data import ImageSet
from ekfac_rs.experiments.finegrained import (
    FOLDERS,
    METHODS,
    PRESETS,
    FineGrained,
    TransferPreset,
    choose,
)
from ekfac_rs.experiments.networks import ARCHITECTURES, Architecture
from ekfac_rs.experiments.report import GridPoint
from ekfac_rs.experiments.transfer import SourceConfig, TargetConfig, Transfer, TransferData

FILES = ("results.json", "table.md", "trade_off.png", "accuracies.png")
SIZE = 8
TINY = TransferPreset(
    model="tiny",
    image_size=SIZE,
    batch_size=16,
    epochs=2,
    lrs=(0.01, 0.05),
    frozen_lrs=(0.01, 0.02),
    scales=(1.0, 10.0),
    l2=(0.1, 1.0),
    damping=0.001,
    seeds=(0, 1),
    crossed=True,
)


class TinyNetwork(nn.Module):
    """A convolution and a Linear, each with BatchNorm, and a head."""

    def __init__(self, classes):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.linear = nn.Linear(4, 6)
        self.bn2 = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, classes)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv(x))).mean(dim=(2, 3))
        return self.head(torch.relu(self.bn2(self.linear(x))))


TINY_ARCHITECTURE = Architecture("Tiny", lambda classes, size: TinyNetwork(classes), "head")


@pytest.fixture(autouse=True)
def tiny_architecture(monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "tiny", TINY_ARCHITECTURE)


def shades(count, classes, seed):
    """Images whose class is their shade, roughly."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % len(classes)
    means = 255 * (labels + 1) / (len(classes) + 1)
    images = generator.normal(means[:, None, None, None], 30, (count, 3, SIZE, SIZE))
    return ImageSet(np.clip(images, 0, 255).astype(np.uint8), labels, tuple(classes))


@pytest.fixture(scope="module")
def data():
    """Two source classes, three target classes."""
    source, target = "ab", "cde"
    return TransferData(
        shades(48, source, 0),
        shades(40, source, 1),
        shades(48, target, 2),
        shades(30, target, 3),
        shades(60, target, 4),
    )


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Of a tiny network that tells the source's classes apart."""
    torch.manual_seed(0)
    model = TinyNetwork(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    images = shades(400, "ab", 5)
    x = (torch.from_numpy(images.images) / 255 - 0.45) / 0.225
    for rows in torch.arange(400).split(20) * 3:
        loss = nn.functional.cross_entropy(model(x[rows]), torch.from_numpy(images.labels)[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    path = tmp_path_factory.mktemp("weights") / "tiny.pth"
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture
def transfer(data, weights, tmp_path):
    return Transfer("tiny", weights, data, tmp_path / "curvature")


def source_config(**changes):
    values = {"version": "1", "model": "tiny", "pretrained": "w", "source": "s", "batch_size": 16}
    return SourceConfig(**{**values, "seed": 0, "curvature": "xkfac", **changes})


def target_config(**changes):
    source = dataclasses.asdict(source_config())
    values = {"target": "t", "epochs": 2, "momentum": 0.9, "lr": 0.02}
    return TargetConfig(**{**source, **values, **changes})


# The choice


def points(*rows):
    """Grid points of (learning rate, strength, validation accuracy)."""
    return [
        GridPoint({"lr": lr, "scale": scale}, score, None, None, 1.0) for lr, scale, score in rows
    ]


@pytest.mark.parametrize(
    ("rows", "chosen"),
    [
        ([(0.1, 1, 0.80), (0.1, 10, 0.795), (0.1, 100, 0.75)], (0.1, 10)),
        ([(0.1, 1, 0.80), (0.1, 10, 0.789), (0.1, 100, 0.75)], (0.1, 1)),
        ([(0.1, 1, 0.80), (0.1, 10, 0.79), (0.1, 100, 0.75)], (0.1, 10)),
        ([(0.1, 1, 0.80), (0.01, 10, 0.80), (0.1, 10, 0.805)], (0.01, 10)),
        ([(0.1, 1, 0.5), (0.01, 100, 0.1), (0.1, 100, 0.9)], (0.1, 100)),
    ],
    ids=["strongest within", "none within", "on the edge", "lower rate", "best is strongest"],
)
def test_the_strongest_penalty_within_the_tolerance_is_chosen(rows, chosen):
    for order in (rows, rows[::-1]):
        setting = choose(points(*order), tolerance=0.01)
        assert (setting["lr"], setting["scale"]) == chosen


def test_strength_is_damping_for_l2_and_none_for_fine_tuning():
    def grid(*settings):
        return [GridPoint(setting, score, None, None, 1.0) for setting, score in settings]

    l2 = grid(({"lr": 0.1, "damping": 1.0}, 0.8), ({"lr": 0.1, "damping": 0.1}, 0.8))
    assert choose(l2, 0.01) == {"lr": 0.1, "damping": 1.0}
    free = grid(({"lr": 0.1}, 0.81), ({"lr": 0.01}, 0.805), ({"lr": 0.001}, 0.5))
    assert choose(free, 0.01) == {"lr": 0.01}


@pytest.mark.parametrize("preset", [*PRESETS.values(), FOLDERS, TINY])
def test_every_method_gets_the_same_number_of_different_settings(preset):
    sizes = set()
    for method in METHODS.values():
        settings = [tuple(sorted(setting.items())) for setting in method.settings(preset)]
        assert len(set(settings)) == len(settings)
        # With a rule for the scale there is nothing to try.
        assert len(settings) == 1 or "scale" not in method.fixed
        sizes.add(len(settings))
    assert len(sizes - {1}) == 1


def test_a_single_setting_is_the_same_learning_rate_for_all():
    preset = dataclasses.replace(TINY, lrs=(0.02,), frozen_lrs=(0.02,), scales=(5.0,), l2=(0.5,))
    for method in METHODS.values():
        assert [setting["lr"] for setting in method.settings(preset)] == [0.02]


# Runs


def test_the_source_is_measured_and_its_curvature_kept(transfer, tmp_path):
    record = transfer(source_config().as_dict())
    assert record.accuracy[0][0] > 0.9
    (path,) = (tmp_path / "curvature").iterdir()
    curvature = ek.Curvature.load(path)
    assert curvature.layers == ("conv", "linear")
    assert curvature.examples == 48
    transfer(source_config(curvature="none").as_dict())
    assert len(list((tmp_path / "curvature").iterdir())) == 1


@pytest.mark.parametrize("method", METHODS)
def test_a_run_learns_the_target_and_measures_both(transfer, method):
    record = transfer(target_config(epochs=8, **METHODS[method].fixed).as_dict())
    (before,), (source, target) = record.accuracy
    assert record.diverged is None
    assert before > 0.9
    assert source >= 0.5
    assert target > 0.6
    assert record.measures["target_validation"] > 0.5
    assert len(record.history[1]) == 8


def test_a_run_is_the_same_with_the_curvature_from_the_file_and_in_any_order(
    data, weights, tmp_path
):
    config = target_config().as_dict()
    first = Transfer("tiny", weights, data, tmp_path)(config)
    other = Transfer("tiny", weights, data, tmp_path)
    other(target_config(seed=3, curvature="diagonal").as_dict())
    again = other(config)
    assert again.accuracy == first.accuracy
    assert again.history == first.history


def test_a_stronger_penalty_ends_nearer_to_the_anchor(transfer):
    def distance(damping):
        fixed = {"curvature": "none", "freeze_bn_after": 0.0}
        record = transfer(target_config(epochs=8, damping=damping, **fixed).as_dict())
        return 2 * record.history[1][-1]["penalty"] / damping

    assert distance(3.0) < distance(0.3) < distance(1e-6)


def test_the_heads_and_only_they_are_free_of_the_penalty(transfer, monkeypatch):
    penalties = []
    original = ek.ContinualLearner.fit

    def fit(learner, *args, **options):
        head = learner.model.head
        assert head.out_features == 3
        assert not head.weight.any()
        penalties.append(set(learner.penalty().deviations()))
        return original(learner, *args, **options)

    monkeypatch.setattr(ek.ContinualLearner, "fit", fit)
    transfer(target_config(freeze_bn_after=0.0).as_dict())
    assert penalties == [{"conv", "linear"}]


def test_a_diverged_run_scores_chance_and_says_so(transfer):
    with np.errstate(all="ignore"):
        record = transfer(target_config(lr=1e8, scale=1e8).as_dict())
    assert record.diverged is not None
    assert record.accuracy[1] == [0.5, pytest.approx(1 / 3)]
    assert record.measures["target_validation"] == pytest.approx(1 / 3)


def test_weights_of_other_classes_are_refused(data, weights, tmp_path):
    swapped = dataclasses.replace(data, source_train=data.target_train)
    with pytest.raises(OptionError, match="source_data: expected 2 classes, .* got 3"):
        Transfer("tiny", weights, swapped, tmp_path)


def test_only_numbers_count_as_divergence_faults_come_through(transfer, monkeypatch):
    def evaluate(error):
        def fail(learner, loaders):
            if len(loaders) == 2:  # after training, not of the source before it
                raise error
            return [0.9]

        return fail

    monkeypatch.setattr(ek.ContinualLearner, "evaluate", evaluate(NonFiniteError("weights")))
    assert transfer(target_config().as_dict()).diverged == "weights"
    for error in (InternalError("a fault"), RuntimeError("a fault")):
        monkeypatch.setattr(ek.ContinualLearner, "evaluate", evaluate(error))
        with pytest.raises(type(error), match="a fault"):
            transfer(target_config().as_dict())


def test_fine_tuning_is_a_plain_loop_of_sgd_from_the_network_as_it_is(transfer, data):
    config = target_config(curvature="none", epochs=3)
    record = transfer(config.as_dict())

    model = transfer._network("cpu")
    source_head, model.head = model.head, nn.Linear(6, 3)
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    loader = transfer._training_images(config)
    optimizer = torch.optim.SGD(model.parameters(), lr=config.lr, momentum=config.momentum)
    steps, done = config.epochs * len(loader), 0
    model.train()
    for _ in range(config.epochs):
        for x, y in loader:
            cosine = 0.5 * (1 + math.cos(math.pi * done / steps))
            optimizer.param_groups[0]["lr"] = config.lr * cosine
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            done += 1
    model.eval()

    @torch.no_grad()
    def accuracy(images):
        ((x, y),) = transfer._in_order(images)
        return (model(x).argmax(1) == y).double().mean().item()

    target = accuracy(data.target_test)
    model.head = source_head
    assert record.accuracy[1] == pytest.approx([accuracy(data.source_test), target], abs=1e-12)
    assert all(epoch["penalty"] == 0 for epoch in record.history[1])


def test_what_happens_to_the_weights_is_part_of_the_run(transfer):
    kept, merged = (
        transfer(target_config(weights=weights).as_dict()) for weights in ("kept", "merged")
    )
    assert kept.accuracy[0] == merged.accuracy[0]
    assert kept.history != merged.history


# The comparison

COMPARED = ("fine-tuning", "l2", "xkfac")


def run_files(output):
    return {path.name: path.stat().st_mtime_ns for path in (output / "runs").iterdir()}


def compare(data, weights, output, methods=COMPARED):
    experiment = FineGrained(TINY, data, weights, {"source": "shades"}, ["A note."])
    return Comparison(experiment, output, methods, progress=False).run()


@pytest.fixture(scope="module")
def compared(tmp_path_factory, data, weights):
    """Folder and table of a comparison of three methods."""
    output = tmp_path_factory.mktemp("comparison")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHITECTURES, "tiny", TINY_ARCHITECTURE)
        return output, compare(data, weights, output)


def test_a_comparison_is_complete_and_goes_on_where_it_was(compared, data, weights):
    output, table = compared
    for name in FILES:
        assert (output / name).stat().st_size > 0
    assert "- A note." in table
    for method in COMPARED:
        assert f"| {METHODS[method].label} |" in table
    content = json.loads((output / "results.json").read_text())
    assert content["source"] == "shades"
    assert set(content["digests"]) == {"pretrained", "source", "target"}
    for entry in content["methods"].values():
        assert len(entry["grid"]) == 3
        assert set(entry["grid"][0]["measures"]) == {"source", "target"}
        assert [len(row) for row in entry["runs"][0]["accuracy"]] == [1, 2]

    # A curvature for each seed, the grid's and two; three settings and two seeds for each method.
    files = run_files(output)
    assert len(content["source_runs"]) == len(list((output / "curvature").iterdir())) == 3
    assert len(files) == 3 + 3 * 3 + 3 * 2

    lost = next((output / "runs").glob("final-xkfac-*.json"))
    before = json.loads(lost.read_text())
    lost.unlink()
    for path in (output / "curvature").iterdir():
        path.unlink()
    compare(data, weights, output)
    after = json.loads(lost.read_text())
    assert after["accuracy"] == before["accuracy"]
    assert {name for name, time in run_files(output).items() if files[name] != time} == {lost.name}


def test_the_choice_does_not_look_at_the_source_or_the_test_images(
    compared, tmp_path, data, weights
):
    methods = ["l2", "xkfac"]
    images = data.target_test
    wrong = dataclasses.replace(
        data, target_test=ImageSet(images.images, (images.labels + 1) % 3, images.classes)
    )
    compare(wrong, weights, tmp_path, methods)
    chosen = [
        {key: json.loads((folder / "results.json").read_text())["methods"][key]["setting"]}
        for folder in (tmp_path, compared[0])
        for key in methods
    ]
    assert chosen[:2] == chosen[2:]


def test_the_time_of_runs_is_estimated_from_a_few_images(data, weights):
    experiment = FineGrained(dataclasses.replace(TINY, name="tiny"), data, weights)
    run = experiment.config("final", 0, {"curvature": "xkfac", "lr": 0.1, "scale": 1.0})
    seconds = experiment.seconds(run)
    assert 0 < seconds < 60
    assert experiment.seconds({**run, "epochs": 20, "scale": "halving"}) >= seconds
    assert experiment.seconds(experiment.source(run).config) > 0
    l2 = experiment.config("final", 0, {"curvature": "none", "lr": 0.1, "damping": 1.0})
    assert experiment.seconds(l2) > 0
    # Of networks given by path nothing is known.
    assert FineGrained(TINY, data, weights).seconds(run) is None


def test_every_setting_of_a_transfer_may_be_run_for_its_curve(data, weights, tmp_path):
    preset = dataclasses.replace(TINY, every_setting=True, epochs=1, plain_epochs=(1, 2))
    experiment = FineGrained(preset, data, weights)
    table = Comparison(experiment, tmp_path, ["fine-tuning", "xkfac"], progress=False).run()
    assert "## Source accuracy at equal target accuracy" in table
    assert "all run with every seed" in table
    assert "with 1 or 2 epochs" in table
    content = json.loads((tmp_path / "results.json").read_text())
    for key, count in (("fine-tuning", 4), ("xkfac", 3)):
        entry = content["methods"][key]
        assert [len(point["runs"]) for point in entry["grid"]] == [2] * count
        chosen = next(p for p in entry["grid"] if p["setting"] == entry["setting"])
        assert entry["runs"] == chosen["runs"]
        validation = [run["measures"]["target_validation"] for run in chosen["runs"]]
        assert chosen["score"] == pytest.approx(sum(validation) / 2)


# Reading the images of both tasks


TINY_SOURCE = {"train/a": 3, "train/b": 3, "val/a": 1, "val/b": 1, "test/b": 1}


@pytest.fixture
def read(tmp_path, write_images):
    def read_both(source, target):
        folders = write_images(tmp_path / "s", source), write_images(tmp_path / "t", target)
        return TransferData.read(*folders, SIZE, 1.0, 10_000, progress=False)

    return read_both


def test_all_splits_are_taken_where_they_are(read):
    target = {"train/c": 4, "train/d": 4, "val/c": 1, "val/d": 1, "test/c": 2, "test/d": 1}
    data, notes = read({**TINY_SOURCE, "test/a": 1}, target)
    sizes = [len(getattr(data, field.name)) for field in dataclasses.fields(data)]
    assert sizes == [6, 2, 8, 2, 3]
    assert "2 images of its split validation" in notes[0]
    assert "held out" not in notes[0]


@pytest.mark.parametrize("test", ["val", "test"])
def test_a_missing_validation_split_is_held_out_of_training(read, test):
    target = {"train/c": 10, "train/d": 10, f"{test}/c": 2, f"{test}/d": 1}
    data, notes = read({"train/a": 3, "train/b": 3, "test/a": 1, "test/b": 1}, target)
    sizes = [len(getattr(data, field.name)) for field in dataclasses.fields(data)]
    assert sizes == [6, 2, 18, 2, 3]
    assert "2 for validation, held out from its training images" in notes[0]


@pytest.mark.parametrize("split", ["", "train/"])
def test_a_source_without_splits_is_measured_on_the_same_images_and_says_so(read, split):
    target = {"train/c": 10, "train/d": 10, "test/c": 2, "test/d": 1}
    data, notes = read({f"{split}a": 3, f"{split}b": 3}, target)
    assert data.source_test is data.source_train
    assert "accuracy on the same images" in notes[0]


@pytest.mark.parametrize(
    ("source", "target", "named"),
    [
        (TINY_SOURCE, {"c": 2, "d": 2}, "t: expected a split 'train'"),
        (TINY_SOURCE, {"train/c": 2, "train/d": 2}, "t: expected a split test or validation"),
        ({"val/a": 1}, {"train/c": 2, "test/c": 2}, "s: expected a split train"),
        (
            {"train/a": 1, "train/b": 1, "val/a": 1},
            {"train/c": 2, "test/c": 2},
            "source_data: expected the same classes",
        ),
        (TINY_SOURCE, {"train/c": 20, "test/d": 2}, "target_data: expected the same classes"),
    ],
)
def test_missing_splits_and_unequal_classes_are_refused_by_name(read, source, target, named):
    with pytest.raises(OptionError, match=named):
        read(source, target)


# The command line


@pytest.fixture(scope="module")
def resnet50(tmp_path_factory):
    """A file with random weights of a ResNet-50 for two classes."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("resnet50") / "weights.pth"
    torch.save(ARCHITECTURES["resnet50"].build(2, 64).state_dict(), path)
    return path


def test_resnet50_goes_through_the_whole_command(
    tmp_path, write_images, resnet50, capsys, monkeypatch
):
    # A second thread would wait for other tests more than it helps.
    monkeypatch.setattr("ekfac_rs.experiments.__main__._processors", lambda: 1)
    source = {"train/a": 4, "train/b": 4, "val/a": 2, "val/b": 2}
    target = {f"{split}/{name}": 4 for split in ("train", "val", "test") for name in "cde"}
    write_images(tmp_path / "source", source, size=(70, 64))
    write_images(tmp_path / "target", target, size=(64, 80))
    output = tmp_path / "out"
    arguments = [
        *("finegrained", "--model", "resnet50", "--source-weights", str(resnet50)),
        *("--source-data", str(tmp_path / "source"), "--target-data", str(tmp_path / "target")),
        *("--image-size", "64", "--batch-size", "4", "--epochs", "1", "--seeds", "0"),
        *("--lrs", "1e-3", "--scales", "1", "--output", str(output)),
        # Cheap in a network of this size; the factors are the other methods' and other tests'.
        *("--methods", "ewc"),
    ]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "runs to make, 1 at a time: source 1 of 1, final 1 of 1\n" in printed
    assert (output / "table.md").read_text(encoding="utf-8") in printed
    for name in FILES:
        assert (output / name).is_file()
    content = json.loads((output / "results.json").read_text())
    assert content["source"] == {"data": "source", "weights": resnet50.name}
    assert content["preset"]["image_size"] == 64
    for entry in content["methods"].values():
        assert entry["runs"][0]["diverged"] is None
        assert entry["runs"][0]["history"][1][0]["penalty"] is not None
    curvatures = [ek.Curvature.load(path) for path in (output / "curvature").iterdir()]
    assert {len(curvature) for curvature in curvatures} == {53}


def test_help_names_every_method_preset_and_option(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["finegrained", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    options = "source-weights source-data target-data data-dir image-size batch-size epochs seeds"
    options += " lrs frozen-lrs plain-lrs scales l2 damping tolerance crop source-images workers"
    for word in (*METHODS, *PRESETS, *ARCHITECTURES, *(f"--{name}" for name in options.split())):
        assert word in text


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--lrs", "x"], "--lrs: expected a number from 0"),
        (["--crop", "2"], "--crop: expected a number above 0 and up to 1"),
        (["--scales", "-1"], "--scales: expected"),
        (["--batch-size", "1"], "--batch-size: expected a whole number from 2"),
        (["--model", "vgg"], "--model: invalid choice"),
        (["--methods", "unknown"], "--methods: invalid choice"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_bad_option_is_refused_by_name(capsys, arguments, named):
    with pytest.raises(SystemExit) as caught:
        main(["finegrained", *arguments])
    assert caught.value.code == 2
    assert named in capsys.readouterr().err


def test_what_is_missing_is_one_clear_line(tmp_path, capsys):
    assert main(["finegrained"]) == 2
    assert capsys.readouterr().err == "error: --source-weights: needed without a --preset\n"
    weights = str(Path(__file__))
    assert main(["finegrained", "--source-weights", weights]) == 2
    assert capsys.readouterr().err == "error: --source-data: needed without a --preset\n"
    assert main(["finegrained", "--preset", "cifar-clothing", "--data-dir", str(tmp_path)]) == 2
    assert "error: data_dir: no resnet56-4bfd9763.th in" in capsys.readouterr().err
