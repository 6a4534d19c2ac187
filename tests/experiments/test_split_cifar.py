"""Split CIFAR: which images a task has, runs with a head for each, the command line."""

import dataclasses
import json

import numpy as np
import pytest
import torch

import ekfac_rs as ek
from ekfac_rs.errors import OptionError
from ekfac_rs.experiments.__main__ import main
from ekfac_rs.experiments.comparison import Comparison
from ekfac_rs.experiments.data import ImageSet
from ekfac_rs.experiments.split_cifar import (
    METHODS,
    PRESETS,
    SplitCifar,
    SplitConfig,
    SplitImages,
    SplitRuns,
)
from ekfac_rs.experiments.streams import learn_stream

CONFIG = SplitConfig(
    version="1",
    dataset="abc",
    examples=None,
    split="test",
    tasks=3,
    epochs=2,
    batch_size=16,
    seed=0,
    factor_examples=32,
    momentum=0.9,
    lr=0.05,
    blocks=1,
    augment=False,
)
TINY = dataclasses.replace(
    PRESETS["quick"], examples=None, tasks=2, epochs=1, grid_tasks=2, grid_epochs=1, batch_size=16
)


def shades(count, seed):
    """Images of six classes, each a shade in one of the colours."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % 6
    images = generator.normal(100, 20, (count, 3, 32, 32))
    for label in range(6):
        images[labels == label, label % 3] += 100 if label < 3 else -60
    return ImageSet(np.clip(images, 0, 255).astype(np.uint8), labels, tuple("abcdef"))


@pytest.fixture(scope="module")
def images():
    return SplitImages(shades(180, 0), shades(60, 1))


@pytest.fixture(scope="module")
def runs(images):
    return SplitRuns(images)


def pixels(loader):
    return torch.cat([x for x, _ in loader])


# Tasks


def test_tasks_share_no_image_and_have_all_of_them_labelled_from_0(runs, images):
    tasks = runs.tasks(CONFIG)
    for loaders, count in ((tasks.training, 180), (tasks.evaluation, 60)):
        parts = [pixels(loaders(task)) for task in range(3)]
        assert {len(part) for part in parts} == {count // 3}
        assert len(torch.cat(parts).unique(dim=0)) == count
        for task in range(3):
            labels = torch.cat([y for _, y in loaders(task)])
            assert labels.bincount().tolist() == [count // 6] * 2


def test_labels_are_those_of_the_images(runs, images):
    x, y = next(iter(runs.tasks(CONFIG).evaluation(1)))
    test = images.test
    for image, label in zip(x, y, strict=True):
        raw = (image * torch.tensor([0.2470, 0.2435, 0.2616]).view(3, 1, 1)) * 255
        raw += 255 * torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)
        row = np.flatnonzero((test.images == raw.round().byte().numpy()).all(axis=(1, 2, 3)))
        assert test.labels[row].tolist() == [2 + label]


def test_a_seed_has_its_own_order_of_the_same_images(runs):
    first, again, other = (
        pixels(runs.tasks(dataclasses.replace(CONFIG, seed=seed)).training(0)) for seed in (0, 0, 3)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(first.unique(dim=0), other.unique(dim=0))


def test_a_tenth_is_held_out_where_settings_are_chosen(runs):
    tasks = runs.tasks(dataclasses.replace(CONFIG, split="validation"))
    train, held_out = pixels(tasks.training(0)), pixels(tasks.evaluation(0))
    assert (len(train), len(held_out)) == (54, 6)
    assert len(torch.cat([train, held_out]).unique(dim=0)) == 60


def test_fewer_examples_are_of_all_classes(runs):
    tasks = runs.tasks(dataclasses.replace(CONFIG, examples=60))
    assert [len(pixels(tasks.training(task))) for task in range(3)] == [20] * 3


def test_augmentation_is_off_unless_asked_for(runs):
    plain, mirrored = (
        runs.tasks(dataclasses.replace(CONFIG, augment=augment)).training(0)
        for augment in (False, True)
    )
    assert len(torch.cat([pixels(plain), pixels(plain)]).unique(dim=0)) == 60
    assert len(torch.cat([pixels(plain), pixels(mirrored)]).unique(dim=0)) > 100
    assert not any(preset.augment for preset in PRESETS.values())


# Runs


@pytest.mark.parametrize("curvature", ["none", "xkfac-nested"])
def test_a_run_learns_every_task_with_a_head_of_its_own(runs, monkeypatch, curvature):
    penalised = []
    consolidate = ek.ContinualLearner.consolidate

    def watched(learner, loader):
        consolidate(learner, loader)
        penalised.append(None if learner.anchor is None else set(learner.anchor))

    monkeypatch.setattr(ek.ContinualLearner, "consolidate", watched)
    record = learn_stream(runs, dataclasses.replace(CONFIG, curvature=curvature, epochs=3))
    assert record.diverged is None
    assert [len(row) for row in record.accuracy] == [1, 2, 3]
    assert record.accuracy[2][2] > 0.7
    names = {
        name
        for name, module in runs.network(CONFIG).named_modules()
        if isinstance(module, torch.nn.Conv2d)
    }
    assert penalised == [None if curvature == "none" else names] * 3


def test_a_run_is_the_same_again(runs):
    config = dataclasses.replace(CONFIG, tasks=2, epochs=1, curvature="kfac-eval")
    one, two = learn_stream(runs, config), learn_stream(runs, config)
    assert (one.accuracy, one.history) == (two.accuracy, two.history)


def test_a_diverged_run_scores_chance_among_two(runs):
    with np.errstate(all="ignore"):
        record = learn_stream(runs, dataclasses.replace(CONFIG, lr=1e36))
    assert record.diverged is not None
    assert record.accuracy[-1] == [0.5] * 3


# The comparison


def test_penalised_methods_have_equally_many_settings():
    for preset in PRESETS.values():
        sizes = {len(METHODS[key].settings(preset)) for key in preset.methods} - {1}
        assert len(sizes - {len(METHODS["fine-tuning"].settings(preset))}) <= 1


def test_more_tasks_than_classes_allow_are_refused(images):
    with pytest.raises(OptionError, match="tasks: expected at most 3, of 2 classes each, got 4"):
        SplitCifar(dataclasses.replace(TINY, tasks=4), images)


def test_numbers_of_images_are_those_of_the_loaders(images, runs):
    experiment = SplitCifar(TINY, images)
    for split in ("test", "validation"):
        for examples in (None, 60):
            config = dataclasses.replace(CONFIG, split=split, examples=examples)
            tasks = runs.tasks(config)
            counts = tuple(len(pixels(loader(1))) for loader in (tasks.training, tasks.evaluation))
            assert experiment.counts(examples, split) == counts


def test_the_duration_of_a_run_is_estimated_in_proportion(images):
    experiment = SplitCifar(TINY, images)
    short = experiment.config("final", 0, {"curvature": "none", "lr": 0.1})
    seconds = experiment.seconds(short)
    assert seconds > 0
    assert experiment.seconds({**short, "epochs": 10}) > 3 * seconds


def test_a_comparison_is_complete(tmp_path, images):
    methods = ["fine-tuning", "xkfac-nested"]
    preset = dataclasses.replace(TINY, seeds=(0,), scales=(1.0,), lrs=(0.1,), plain_lrs=(0.1,))
    table = Comparison(SplitCifar(preset, images), tmp_path, methods, progress=False).run()
    assert table.startswith("# Split CIFAR-10, ResNet-8 from scratch, 2 tasks\n")
    assert "60 training and 20 test images each" in table
    content = json.loads((tmp_path / "results.json").read_text())
    assert list(content["methods"]) == methods
    for entry in content["methods"].values():
        assert [len(row) for row in entry["runs"][0]["accuracy"]] == [1, 2]


def test_the_command_line_reads_folders_of_images(tmp_path, write_images, capsys):
    counts = {"train": 16, "test": 4}
    names = {f"{split}/{name}": n for split, n in counts.items() for name in "abcd"}
    write_images(tmp_path / "cifar10_jpeg.tar", names, size=(32, 32))
    arguments = [
        *("split-cifar", "--data-dir", str(tmp_path), "--output", str(tmp_path / "out")),
        *("--methods", "fine-tuning", "--tasks", "2", "--epochs", "1", "--seeds", "0"),
        *("--plain-lrs", "0.1", "--workers", "1"),
    ]
    assert main(arguments) == 0
    assert "| fine-tuning |" in capsys.readouterr().out
    assert (tmp_path / "out" / "average_accuracy.png").is_file()
    assert main([*arguments[:2], str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.startswith("error: data_dir: no cifar10_jpeg.tar in")


def test_splits_of_other_classes_are_refused(tmp_path, write_images):
    write_images(tmp_path, {"train/a": 2, "train/b": 2, "test/a": 2}, size=(32, 32))
    with pytest.raises(OptionError, match="expected the same classes in all splits"):
        SplitImages.read(tmp_path, progress=False)
