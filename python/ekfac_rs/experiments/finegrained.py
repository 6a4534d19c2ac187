"""Transfer to a fine-grained set: what each curvature keeps of the source a network comes from.

The protocol of Lee et al. (CVPR 2020): a network trained to classify a source (ImageNet, CIFAR-10)
learns a target of similar images. Both share the backbone; each has a head of its own. Measured
are the source's accuracy before and after, the target's, and the mean of source after and target.

A method with BatchNorm on takes the curvature of the source's loss at the source's weights, merges
BatchNorm into them (the anchor), puts it back with the target's inputs, trains on the target under
the penalty, and is evaluated with running statistics. Each method is compared at a setting chosen
on the target's validation images alone (see `choose`); the source is not looked at. The trade-off
over the strength of the penalty is reported beside it, and needs no choice.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import ekfac_rs as ek
from ekfac_rs.errors import OptionError
from ekfac_rs.experiments.data import ImageTree
from ekfac_rs.experiments.networks import ARCHITECTURES, Weights
from ekfac_rs.experiments.pictures import TradeOff, draw_bars, draw_trade_offs
from ekfac_rs.experiments.report import (
    Column,
    GridPoint,
    Layout,
    MethodResult,
    counted,
    write_report,
)
from ekfac_rs.experiments.runs import PlannedRun, RunRecord, RunStore, Workers, complete
from ekfac_rs.experiments.settings import Setting, grid, setting_words
from ekfac_rs.experiments.transfer import SourceConfig, TargetConfig, Transfer, TransferData

__all__ = ["FOLDERS", "LAYOUT", "METHODS", "PRESETS", "Preset", "choose", "read_images", "study"]

_HELD_OUT_SHARE = 0.1
_HELD_OUT_SEED = 1998


@dataclass(frozen=True)
class Preset:
    """Size of the experiment.

    Attributes
    ----------
    model
        A key of `ARCHITECTURES`.
    source, target, weights
        Names among the data; None where they have to be given.
    image_size
        Height and width of all images.
    crop
        As in `ekfac_rs.experiments.data.ImageTree.read`.
    source_images
        Read at most so many of each of the source's splits.
    epochs
        Of training on the target.
    lrs, scales, l2
        The grid: learning rates; scales of the curvature's penalty; strengths of L2-SP.
    frozen_lrs
        Learning rates where BatchNorm is frozen, as many: a deep network bears only smaller ones
        then.
    damping
        Of the penalties with a curvature.
    tolerance
        Of the choice, see `choose`.
    seeds, grid_seed
        Of the final runs; of the grid, none of them.
    remarks
        What the report has to say about the data.
    """

    model: str
    image_size: int
    source: str | None = None
    target: str | None = None
    weights: str | None = None
    crop: float = 0.875
    source_images: int = 10_000
    batch_size: int = 32
    epochs: int = 10
    lrs: tuple[float, ...] = (0.003, 0.01)
    frozen_lrs: tuple[float, ...] = (0.001, 0.003)
    scales: tuple[float, ...] = (1.0, 10.0, 100.0)
    l2: tuple[float, ...] = (0.01, 0.1, 1.0)
    damping: float = 0.001
    momentum: float = 0.9
    tolerance: float = 0.01
    seeds: tuple[int, ...] = (0, 1, 2)
    grid_seed: int = 1000
    remarks: tuple[str, ...] = ()


# For images in folders given by path.
FOLDERS = Preset("resnet50", image_size=224)

PRESETS: dict[str, Preset] = {
    "lite0-clothing": Preset(
        "efficientnet-lite0",
        image_size=96,
        source="imagenet_sample160.tar",
        target="clothing160.tar",
        crop=1.0,
        epochs=1,
        lrs=(0.001,),
        frozen_lrs=(0.001,),
        scales=(0.3, 1.0, 3.0),
        l2=(1e-6, 1e-5, 1e-4),
        # Some channels of its depthwise layers are all but dead: merged weights are large there,
        # and so is the noise of batch statistics in them. Damping would be a penalty on nothing
        # else.
        damping=0.0,
        remarks=(
            "The source's 1,000 images, one per class, are likely among those that the network "
            "was trained on, and the same images gave the curvature: its accuracy on them is no "
            "estimate for new images, the drop is what counts.",
            "Not ResNet-50 on ImageNet: a smaller network, its ImageNet weights evaluated at a "
            "fraction of their image size, a thousand source images instead of 1.3 million, and "
            "a target of 10 classes of garments, which is hardly fine-grained.",
        ),
    ),
    "cifar-clothing": Preset(
        "resnet56-cifar",
        image_size=32,
        source="cifar10_jpeg.tar",
        target="clothing160.tar",
        weights="resnet56-4bfd9763.th",
        crop=1.0,
        source_images=3000,
        epochs=2,
        lrs=(0.01,),
        frozen_lrs=(0.001,),
        scales=(1.0, 3.0, 10.0),
        remarks=(
            "The source's images are JPEG copies of CIFAR-10: the network, trained on the "
            "originals, is 10 points worse on them. Its curvature comes from copies of images "
            "that it was trained on; its accuracy from copies of test images.",
            "Not ResNet-50 on ImageNet: a network of 0.85 million weights at 32 x 32 pixels, ten "
            "source classes, and a target of 10 classes of garments, which is hardly fine-grained.",
        ),
    ),
}


@dataclass(frozen=True)
class Method:
    """A method of the comparison.

    Attributes
    ----------
    label
        Name in tables and pictures.
    fixed
        What defines it: fields of `TargetConfig`.
    strength
        The field that its penalty grows with: ``"scale"`` of the curvature, ``"damping"``, or
        None without a penalty.
    """

    label: str
    fixed: Setting
    strength: str | None = "scale"

    def settings(self, preset: Preset) -> list[Setting]:
        """Return the settings to try, equally many for every method: fields of `TargetConfig`."""
        frozen = self.fixed.get("freeze_bn_after") == 0.0
        lrs = preset.frozen_lrs if frozen else preset.lrs
        if self.strength == "scale":
            return grid(lr=lrs, scale=preset.scales, damping=(preset.damping,))
        if self.strength == "damping":
            return grid(lr=lrs, damping=preset.l2)
        return grid(lr=_rates_around(lrs, len(lrs) * len(preset.scales)))

    def strength_of(self, setting: Mapping[str, float | str]) -> float:
        """Return how strong the penalty is in one of its settings."""
        return 0.0 if self.strength is None else float(setting[self.strength])


METHODS: dict[str, Method] = {
    "fine-tuning": Method("fine-tuning", {"curvature": "none"}, strength=None),
    "l2-sp": Method("L2-SP", {"curvature": "none"}, strength="damping"),
    "diagonal": Method("diagonal Fisher", {"curvature": "diagonal"}),
    "kfac-frozen": Method("K-FAC, BN frozen", {"curvature": "kfac-eval", "freeze_bn_after": 0.0}),
    "kfac-train": Method("K-FAC, train factors", {"curvature": "kfac-train"}),
    "xkfac": Method("XK-FAC", {"curvature": "xkfac"}),
    "xkfac-nested": Method("XK-FAC, nested", {"curvature": "xkfac-nested"}),
}


def _rates_around(lrs: Sequence[float], count: int) -> list[float]:
    """Return `count` learning rates, from a third of the lowest to three times the highest."""
    if count == 1:
        return [lrs[0]]
    rates = np.geomspace(min(lrs) / 3, max(lrs) * 3, count)
    return [float(f"{rate:.2g}") for rate in rates]


def read_images(
    preset: Preset, source: Path, target: Path, progress: bool = True
) -> tuple[TransferData, list[str]]:
    """Read the images of both tasks.

    The source is evaluated on its split ``validation``, else on ``test``, else on the images that
    give the curvature. The target needs ``train`` and ``test``, or ``validation`` in its place;
    where there are not both of them, a tenth of the training images is held out as validation.

    Returns
    -------
    tuple of TransferData and list of str
        The images, and what the report has to say about where they come from.

    Raises
    ------
    OptionError
        If a directory or archive does not exist or lacks splits.
    FileFormatError
        If an image is damaged.
    """
    read = partial(
        ImageTree.read, image_size=preset.image_size, crop=preset.crop, progress=progress
    )
    source_tree, target_tree = ImageTree(source), ImageTree(target)
    read_source = partial(read, source_tree, max_images=preset.source_images)
    source_train = read_source(_first_of(source_tree, "train"))
    test_split = _first_of(source_tree, "validation", "test", "train")
    source_test = source_train if test_split in (None, "train") else read_source(test_split)
    if source_test.classes != source_train.classes:
        raise OptionError(f"source_data: expected the same classes in all splits of {source}")

    target_train = read(target_tree, "train")
    target_test = read(target_tree, _first_of(target_tree, "test", "validation"))
    if {"validation", "test"} <= set(target_tree.splits):
        target_validation = read(target_tree, "validation")
        validation_note = ""
    else:
        target_train, target_validation = target_train.split(_HELD_OUT_SHARE, _HELD_OUT_SEED)
        validation_note = ", held out from its training images"
    if not target_train.classes == target_validation.classes == target_test.classes:
        raise OptionError(f"target_data: expected the same classes in all splits of {target}")

    size = f"{preset.image_size} x {preset.image_size} pixels"
    if source_test is source_train:
        measured = "the same images: it has not been measured on new ones"
    else:
        measured = f"{counted(len(source_test), 'image')} of its split {test_split}"
    notes = [
        f"Source {source.name}: {counted(len(source_train.classes), 'class', 'classes')}, "
        f"curvature from {counted(len(source_train), 'image')}, accuracy on {measured}. "
        f"Target {target.name}: {counted(len(target_train.classes), 'class', 'classes')}, "
        f"{counted(len(target_train), 'training image')}, {len(target_validation):,} for "
        f"validation{validation_note}, {len(target_test):,} for the test. All at {size}."
    ]
    return TransferData(
        source_train, source_test, target_train, target_validation, target_test
    ), notes


def _first_of(tree: ImageTree, *splits: str) -> str | None:
    """Return the first of the splits that there is, None where there are no splits at all."""
    if not tree.splits:
        return None
    found = next((split for split in splits if split in tree.splits), None)
    if found is None:
        raise OptionError(
            f"{tree.path}: expected a split {' or '.join(splits)}, got {', '.join(tree.splits)}"
        )
    return found


def choose(method: Method, points: Sequence[GridPoint], tolerance: float) -> Setting:
    """Choose the strongest penalty that the target can bear.

    Among the settings whose validation accuracy on the target is within `tolerance` of the
    method's best, the one with the strongest penalty; of equally strong ones the one with the
    lower learning rate. The accuracy alone would always vote for the weakest penalty, as the
    target is better off without any.

    Parameters
    ----------
    method
        Says what makes a penalty strong.
    points
        Settings with validation accuracies on the target as scores.
    tolerance
        A difference of fractions: 0.01 is one percentage point.
    """
    best = max(point.score for point in points)
    # Differences of accuracies are multiples of one image's share: rounding must not decide.
    near = [point.setting for point in points if point.score >= best - tolerance - 1e-9]
    chosen = min(near, key=lambda s: (-method.strength_of(s), float(s["lr"])))
    return dict(chosen)


def study(
    preset: Preset,
    data: TransferData,
    weights: Path,
    output: Path,
    methods: Sequence[str] = tuple(METHODS),
    about: Mapping[str, Any] = {},
    notes: Sequence[str] = (),
    workers: int = 1,
    threads_each: int = 1,
    progress: bool = True,
) -> str:
    """Make the whole comparison: curvatures, grid, choice, final runs, report.

    Finished runs are kept in ``output/runs``, curvatures in ``output/curvature``, and found again.

    Parameters
    ----------
    preset
        Size of the experiment.
    data
        The images.
    weights
        File with the source's weights.
    output
        Folder of the report.
    methods
        Keys of `METHODS`.
    about
        Entries of ``results.json``: the command, for example.
    notes
        Sentences of the report about the data.
    workers, threads_each
        Runs made at the same time, and threads that each computes on.
    progress
        Print the plan and show progress bars.

    Returns
    -------
    str
        The table, in Markdown.

    Raises
    ------
    OptionError
        If a method is unknown, the grid's seed is also one of a final run, there are fewer or more
        learning rates for frozen BatchNorm than others, or the source's classes are not those of
        the weights.
    """
    unknown = sorted(set(methods) - set(METHODS))
    if unknown:
        raise OptionError(f"methods: unknown {unknown}; expected some of {list(METHODS)}")
    if preset.grid_seed in preset.seeds:
        raise OptionError(f"seeds: {preset.grid_seed} is the seed of the grid")
    if len(preset.frozen_lrs) != len(preset.lrs):
        raise OptionError(
            f"frozen_lrs: expected {counted(len(preset.lrs), 'learning rate')}, as in lrs, "
            f"got {len(preset.frozen_lrs)}"
        )
    started = time.perf_counter()
    store = RunStore(output / "runs")
    plan = _Plan(preset, Weights.read(weights).digest, data.source_digest, data.target_digest)
    source_runs = {key: plan.source_runs(key) for key in methods}
    grid_runs = {key: plan.grid_runs(key) for key in methods}
    if progress:
        print(_announcement(preset, source_runs, grid_runs, store, workers), flush=True)
    transfer = (preset.model, weights, data, output / "curvature", progress and workers == 1)
    with Workers(workers, Transfer, *transfer, threads_each=threads_each) as pool:
        # Several methods may share a source's run.
        distinct = {run.name: run for runs in source_runs.values() for run in runs}
        source_records = complete({"": list(distinct.values())}, store, pool, "source", progress)
        grid_records = complete(grid_runs, store, pool, "grid", progress)
        grids = {key: plan.grid_points(key, grid_records[key]) for key in methods}
        chosen = {key: choose(METHODS[key], grids[key], preset.tolerance) for key in methods}
        final_runs = {key: plan.final_runs(key, chosen[key]) for key in methods}
        final_records = complete(final_runs, store, pool, "final", progress)
    results = [
        MethodResult(key, METHODS[key].label, chosen[key], grids[key], final_records[key])
        for key in methods
    ]
    all_records = [*source_records.values(), *grid_records.values(), *final_records.values()]
    content = {
        "experiment": "finegrained",
        **about,
        "preset": dataclasses.asdict(preset),
        "digests": plan.digests(),
        "seeds": list(preset.seeds),
        "workers": workers,
        "seconds": {
            "all_runs": sum(run.seconds["total"] for runs in all_records for run in runs),
            "this_call": time.perf_counter() - started,
        },
        "source_runs": [dataclasses.asdict(run) for run in source_records[""]],
    }
    all_notes = [*notes, *_notes(preset)]
    return write_report(output, _title(preset), results, content, all_notes, LAYOUT)


@dataclass(frozen=True)
class _Plan:
    """The runs that a preset consists of."""

    preset: Preset
    weights: str
    source: str
    target: str

    def source_runs(self, key: str) -> list[PlannedRun]:
        """Curvature and accuracy before, for the grid's seed and every final one."""
        curvature = str(METHODS[key].fixed["curvature"])
        return [
            PlannedRun(
                f"source-{curvature}-seed{seed}",
                SourceConfig(**self._source(seed), curvature=curvature).as_dict(),
            )
            for seed in (self.preset.grid_seed, *self.preset.seeds)
        ]

    def grid_runs(self, key: str) -> list[PlannedRun]:
        """All settings."""
        seed = self.preset.grid_seed
        settings = METHODS[key].settings(self.preset)
        return [self._target("grid", key, setting, seed) for setting in settings]

    def grid_points(self, key: str, records: Sequence[RunRecord]) -> list[GridPoint]:
        """Put together what is known about each setting."""
        settings = METHODS[key].settings(self.preset)
        return [
            GridPoint(
                setting,
                score=record.measures["target_validation"],
                full_length_score=None,
                diverged=record.diverged,
                seconds=record.seconds["total"],
                measures=dict(zip(("source", "target"), record.accuracy[-1], strict=True)),
            )
            for setting, record in zip(settings, records, strict=True)
        ]

    def final_runs(self, key: str, setting: Setting) -> list[PlannedRun]:
        """Every seed."""
        return [self._target("final", key, setting, seed) for seed in self.preset.seeds]

    def digests(self) -> dict[str, str]:
        """Return the fingerprints of all that is read."""
        return {"weights": self.weights, "source": self.source, "target": self.target}

    def _source(self, seed: int) -> dict[str, Any]:
        return {
            "version": ek.__version__,
            "model": self.preset.model,
            "weights": self.weights,
            "source": self.source,
            "batch_size": self.preset.batch_size,
            "seed": seed,
        }

    def _target(self, part: str, key: str, setting: Setting, seed: int) -> PlannedRun:
        options: dict[str, Any] = {**METHODS[key].fixed, **setting}
        config = TargetConfig(
            **self._source(seed),
            target=self.target,
            epochs=self.preset.epochs,
            momentum=self.preset.momentum,
            **options,
        )
        name = "-".join((part, key, *setting_words(setting), f"seed{seed}"))
        return PlannedRun(name, config.as_dict())


def trade_off(result: MethodResult) -> TradeOff:
    """Return source against target accuracy over the strength of a method's penalty.

    For every strength the learning rate that is best for the target's validation images; settings
    that diverged are left out.
    """
    method = METHODS[result.key]
    best: dict[float, GridPoint] = {}
    for point in result.grid:
        strength = method.strength_of(point.setting)
        if point.diverged is None and (strength not in best or point.score > best[strength].score):
            best[strength] = point
    return TradeOff(
        result.label,
        [(p.measures["target"], p.measures["source"]) for _, p in sorted(best.items())],
        [(run.accuracy[-1][1], run.accuracy[-1][0]) for run in result.runs],
    )


def _draw_trade_offs(path: Path, title: str, results: Sequence[MethodResult]) -> None:
    draw_trade_offs(
        path,
        f"{title}: source against target",
        "target accuracy",
        "source accuracy",
        [trade_off(result) for result in results],
        reference=float(np.mean(results[0].summary()["first_task_before"])),
    )


def _draw_bars(path: Path, title: str, results: Sequence[MethodResult]) -> None:
    names = {"source after": "first_task", "target": "last_task", "average": "average_accuracy"}
    draw_bars(
        path,
        f"{title}: both tasks",
        "accuracy",
        {
            result.label: {name: result.summary()[measure] for name, measure in names.items()}
            for result in results
        },
    )


LAYOUT = Layout(
    columns={
        "source before": Column("first_task_before"),
        "source after": Column("first_task", deviation=True),
        "target": Column("last_task", deviation=True),
        "average": Column("average_accuracy", deviation=True),
    },
    pictures={"trade_off.png": _draw_trade_offs, "accuracies.png": _draw_bars},
)


def _title(preset: Preset) -> str:
    names = [Path(name).stem for name in (preset.source, preset.target) if name is not None]
    label = ARCHITECTURES[preset.model].label
    return f"{label}, {' to '.join(names)}" if names else f"{label}, transfer"


def _notes(preset: Preset) -> list[str]:
    points = 100 * preset.tolerance
    return [
        *preset.remarks,
        f"{counted(preset.epochs, 'epoch')} on the target, batches of {preset.batch_size}, "
        "mirrored and shifted at random; SGD with momentum, the learning rate falling to 0 along "
        "a cosine. One backbone, two heads; the source's is kept, the target's starts at zero. "
        "All methods start from the same merged weights with BatchNorm put back for the target's "
        "inputs (or frozen, where it says so), and L2-SP's distance is that of merged weights.",
        "Figures in per cent, ± the sample standard deviation over the final runs, seeds "
        f"{', '.join(map(str, preset.seeds))}; average: of source after and target.",
        f"Each method at one of {len(METHODS['xkfac'].settings(preset))} settings, tried with seed "
        f"{preset.grid_seed} and chosen on the target's validation images alone: among those "
        f"within {points:g} percentage {'point' if points == 1 else 'points'} of the method's best "
        "accuracy the strongest penalty (largest scale, or damping for L2-SP), of equally strong "
        "ones the lower learning rate.",
        *_note_on_frozen(preset),
        "trade_off.png shows the grid's runs over the strength of the penalty, larger markers for "
        "stronger ones, each at the learning rate that is best for the target's validation images; "
        "outlined markers are the final runs.",
    ]


def _note_on_frozen(preset: Preset) -> list[str]:
    if preset.frozen_lrs == preset.lrs:
        return []
    rates = ", ".join(f"{lr:g}" for lr in preset.frozen_lrs)
    return [f"Learning rates with BatchNorm frozen: {rates}."]


def _announcement(
    preset: Preset,
    source_runs: Mapping[str, Sequence[PlannedRun]],
    grid_runs: Mapping[str, Sequence[PlannedRun]],
    store: RunStore,
    workers: int,
) -> str:
    """Say what there is to do."""
    parts = {
        "source": {run.name: run for runs in source_runs.values() for run in runs}.values(),
        "grid": [run for runs in grid_runs.values() for run in runs],
    }
    texts = [
        f"{part} {sum(store.find(run) is None for run in runs)} of {len(runs)}"
        for part, runs in parts.items()
    ]
    texts.append(f"final {len(grid_runs) * len(preset.seeds)}")
    return f"runs to make, {workers} at a time: {', '.join(texts)}"
