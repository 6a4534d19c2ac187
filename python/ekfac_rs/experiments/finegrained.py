"""Transfer to a fine-grained set: what each curvature keeps of the source a network comes from.

The protocol of Lee et al. (CVPR 2020): a network trained to classify a source (ImageNet, CIFAR-10)
learns a target of similar images. Both share the backbone; each has a head of its own. Measured
are the source's accuracy before and after, the target's, and the mean of source after and target.

A method with BatchNorm on takes the curvature of the source's loss at the source's weights, whose
merged view is the anchor, takes the target's statistics into the BatchNorms, trains on the target
under the penalty, and is evaluated with running statistics. Fine-tuning just trains. Each method is
compared at a setting chosen on the target's validation images alone (see `choose`); the source is
not looked at. The trade-off over the strength of the penalty is reported beside it, and needs no
choice.
"""

import dataclasses
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

from ekfac_rs.errors import OptionError
from ekfac_rs.experiments.comparison import Experiment
from ekfac_rs.experiments.data import find_data
from ekfac_rs.experiments.methods import methods_named, with_rules
from ekfac_rs.experiments.networks import ARCHITECTURES, Weights
from ekfac_rs.experiments.options import batch_size, fraction, number, option, positive
from ekfac_rs.experiments.report import TRANSFER, GridPoint, counted
from ekfac_rs.experiments.runs import Config, Execute, PlannedRun, RunRecord, threads
from ekfac_rs.experiments.settings import Preset, Setting, strength_of
from ekfac_rs.experiments.transfer import TargetConfig, Transfer, TransferData

__all__ = [
    "FOLDERS",
    "METHODS",
    "PRESETS",
    "FineGrained",
    "TransferPreset",
    "choose",
]

METHODS = {
    **methods_named(
        *("fine-tuning", "fine-tuning-frozen", "fine-tuning-put-back", "l2", "ewc"),
        *("kfac-frozen", "kfac-eval"),
        *("kfac-train", "kfac-train-explicit", "xkfac", "xkfac-nested", "xkfac-nested-first"),
        *("xkfac-nested-explicit", "xkfac-nested-merged"),
        *("scheduled-kfac", "scheduled-xkfac-nested", "kfac-frozen-own"),
        *("xkfac-nested-own", "scheduled-xkfac-nested-own", "scheduled-kfac-first-own"),
    ),
    **with_rules("xkfac-nested"),
    **with_rules("scheduled-kfac-first-own"),
}

# Mini-batches of the runs by which the time of others is estimated.
_PROBE_BATCHES = 2

# What is compared unless methods are named.
_USUAL = (
    *("fine-tuning", "l2", "ewc", "kfac-frozen", "kfac-train", "xkfac", "xkfac-nested"),
    *("xkfac-nested-explicit", "xkfac-nested-merged"),
)


@dataclass(frozen=True, kw_only=True)
class TransferPreset(Preset):
    """Size of the experiment.

    Attributes
    ----------
    model
        A key of `ARCHITECTURES`.
    source, target, pretrained
        Names among the data, of images and weights; None where they have to be given.
    image_size
        Height and width of all images.
    crop
        As in `ekfac_rs.experiments.data.ImageTree.read`.
    source_images, target_images
        Read at most so many of each of the source's, or the target's, splits; None for all.
    every_setting
        Make final runs of every setting, see `Experiment`.
    tolerance
        Of the choice, see `choose`.
    remarks
        What the report has to say about the data.
    """

    model: str = field(metadata=option(str, "network", ARCHITECTURES))
    source: str | None = None
    target: str | None = None
    pretrained: str | None = None
    image_size: int = field(metadata=option(positive, "height and width of all images"))
    crop: float = field(
        default=0.875,
        metadata=option(fraction, "share of an image's shorter side that is kept"),
    )
    source_images: int = field(
        default=10_000,
        metadata=option(
            batch_size,
            "read at most so many of each of the source's splits, all classes in proportion; "
            "images are kept in memory",
        ),
    )
    target_images: int | None = None
    every_setting: bool = False
    tolerance: float = field(
        default=0.01,
        metadata=option(
            number,
            "validation accuracy, as a fraction, that a stronger penalty may cost: the strongest "
            "within it is chosen",
        ),
    )
    remarks: tuple[str, ...] = ()


# For images in folders given by path.
FOLDERS = TransferPreset(
    methods=_USUAL,
    model="resnet50",
    image_size=224,
    epochs=10,
    batch_size=32,
    seeds=(0, 1, 2),
    lrs=(0.01, 0.03),
    frozen_lrs=(0.001, 0.003),
    scales=(1.0, 3.0, 10.0),
    l2=(0.01, 0.1, 1.0),
    damping=0.001,
)

PRESETS: dict[str, TransferPreset] = {
    preset.name: preset
    for preset in (
        TransferPreset(
            name="lite0-clothing",
            methods=_USUAL,
            model="efficientnet-lite0",
            image_size=96,
            source="imagenet_sample160.tar",
            target="clothing160.tar",
            crop=1.0,
            epochs=1,
            batch_size=32,
            seeds=(0, 1, 2),
            crossed=True,
            lrs=(0.001, 0.003, 0.01),
            frozen_lrs=(0.0001, 0.0003, 0.001),
            scales=(0.3, 1.0, 3.0),
            l2=(1e-6, 1e-5, 1e-4),
            # Some channels of its depthwise layers are all but dead: merged weights are large
            # there, and so is the noise of batch statistics in them. Damping would be a penalty
            # on nothing else.
            damping=0.0,
            remarks=(
                "The source's 1,000 images, one per class, are likely among those that the "
                "network was trained on, and the same images gave the curvature: its accuracy on "
                "them is no estimate for new images, the drop is what counts.",
                "Not ResNet-50 on ImageNet: a smaller network, its ImageNet weights evaluated at "
                "a fraction of their image size, a thousand source images instead of 1.3 million, "
                "and a target of 10 classes of garments, which is hardly fine-grained.",
            ),
        ),
        TransferPreset(
            name="cifar-clothing",
            methods=_USUAL,
            model="resnet56-cifar",
            image_size=32,
            source="cifar10_jpeg.tar",
            target="clothing160.tar",
            pretrained="resnet56-4bfd9763.th",
            crop=1.0,
            source_images=3000,
            epochs=2,
            batch_size=32,
            seeds=(0, 1, 2),
            crossed=True,
            lrs=(0.01, 0.03),
            frozen_lrs=(0.001, 0.003),
            scales=(1.0, 3.0, 10.0),
            l2=(0.01, 0.1, 1.0),
            damping=0.001,
            remarks=(
                "The source's images are JPEG copies of CIFAR-10: the network, trained on the "
                "originals, is 10 points worse on them. Its curvature comes from copies of images "
                "that it was trained on; its accuracy from copies of test images.",
                "Not ResNet-50 on ImageNet: a network of 0.85 million weights at 32 x 32 pixels, "
                "ten source classes, and a target of 10 classes of garments, which is hardly "
                "fine-grained.",
            ),
        ),
    )
}


class FineGrained(Experiment):
    """The experiment: one pretrained network, a source that it knows, a target that it learns.

    Parameters
    ----------
    preset
        Its size.
    data
        The images.
    weights
        File with the source's weights.
    about
        Names of what is read.
    notes
        Sentences of the report about the data.
    """

    name = "finegrained"
    summary = "from a pretrained network to a fine-grained set"
    description = (
        "Transfer a pretrained network to a target set and compare what methods keep of its "
        "source: accuracy on the source before and after, on the target, and their mean. With "
        "--preset everything has a default; otherwise give --model, --source-weights, "
        "--source-data and --target-data. Each method's setting is chosen from a grid on the "
        "target's validation images alone; with a single one (--lrs 0.003 --scales 1) there is "
        "nothing to choose, and no grid. Finished runs and curvatures are kept: the same command "
        "goes on where it was interrupted."
    )
    epilog = (
        "Data are directories or tar archives with folders train, validation (or val) and test, "
        "in each of them a folder of images per class. The source's classes, in alphabetical "
        "order, are the outputs of the weights; without splits the same images give the curvature "
        "and the accuracy. Where the target lacks validation or test, a tenth of its training "
        "images is held out for validation."
    )
    preset_help = (
        "lite0-clothing: EfficientNet-Lite0 with ImageNet weights, source the 1,000 images of "
        "imagenet_sample160.tar; cifar-clothing: CIFAR-10 ResNet-56, source cifar10_jpeg.tar; the "
        "target of both is clothing160.tar. An hour or so on two processors each"
    )
    data_help = (
        "folder with a preset's archives and weights (default: the folder in EKFAC_DATA, "
        "otherwise ../shared/data)"
    )
    presets = PRESETS
    default = FOLDERS
    methods = METHODS
    layout = TRANSFER
    preset: TransferPreset

    def __init__(
        self,
        preset: TransferPreset,
        data: TransferData,
        weights: Path,
        about: Mapping[str, Any] = {},
        notes: Sequence[str] = (),
    ) -> None:
        self.preset = preset
        self.data = data
        self.weights = weights
        self._about = about
        self._notes = notes
        self._speeds: dict[tuple[str, bool], _Speed] = {}

    @classmethod
    def add_arguments(cls, parser: ArgumentParser) -> None:
        """Add the paths of weights and images."""
        parser.add_argument(
            "--source-weights",
            type=Path,
            metavar="FILE",
            help="state dict of the network, as torchvision's (default for efficientnet-lite0: "
            "those of its package)",
        )
        parser.add_argument(
            "--source-data", type=Path, metavar="DIR", help="images the network was trained on"
        )
        parser.add_argument("--target-data", type=Path, metavar="DIR", help="images to learn")

    @classmethod
    def from_options(cls, preset: TransferPreset, options: Namespace) -> Self:
        """Find and read the images, those given by path first."""
        return cls.read(
            preset,
            options.data_dir,
            weights=options.source_weights,
            source=options.source_data,
            target=options.target_data,
        )

    @classmethod
    def read(
        cls,
        preset: TransferPreset,
        data_dir: Path | None,
        *,
        weights: Path | None = None,
        source: Path | None = None,
        target: Path | None = None,
    ) -> Self:
        """Find and read the images: those given, else those that the preset names."""
        weights = weights or _weights(preset, data_dir)
        source = source or _data("source-data", preset.source, data_dir)
        target = target or _data("target-data", preset.target, data_dir)
        data, notes = TransferData.read(
            *(source, target, preset.image_size, preset.crop),
            source_images=preset.source_images,
            target_images=preset.target_images,
        )
        about = {
            "source": {"data": source.name, "weights": weights.name},
            "target": {"data": target.name},
        }
        return cls(preset, data, weights, about, notes)

    def config(self, stage: str, seed: int, options: Setting) -> Config:
        """Plan the same for all stages: one run measures validation and test images."""
        preset = self.preset
        values: dict[str, Any] = {
            "model": preset.model,
            **self._digests,
            "batch_size": preset.batch_size,
            "seed": seed,
            "epochs": preset.epochs,
            "momentum": preset.momentum,
            "device": preset.device,
        }
        return TargetConfig(**{**values, **options}).as_dict()

    def source(self, config: Config) -> PlannedRun | None:
        """Take the curvature, where there is one."""
        at_source = TargetConfig(**config).at_source
        if at_source.curvature == "none":
            return None
        name = f"source-{at_source.curvature}-seed{at_source.seed}"
        return PlannedRun(name, at_source.as_dict())

    def runner(self, output: Path, progress: bool) -> Callable[[], Execute]:
        """Hand over weights and images, and a folder for curvatures."""
        folder = output / "curvature"
        return partial(Transfer, self.preset.model, self.weights, self.data, folder, progress)

    @property
    def every_setting(self) -> bool:
        """As the preset says: one run measures validation and test images."""
        return self.preset.every_setting

    def score(self, record: RunRecord) -> float:
        """Accuracy on the target alone."""
        return record.measures["target_validation"]

    def measures(self, record: RunRecord) -> Mapping[str, float]:
        """Test accuracy on both tasks."""
        return dict(zip(("source", "target"), record.accuracy[-1], strict=True))

    def choose(self, points: Sequence[GridPoint]) -> Setting:
        """Choose the strongest penalty that the target can bear."""
        return choose(points, self.preset.tolerance)

    def seconds(self, config: Config) -> float | None:
        """Time a few mini-batches for each curvature; not of networks given by path."""
        if not self.preset.name:
            return None
        # A penalty without a curvature takes time, too.
        options = {"curvature": config["curvature"], "damping": config.get("damping", 0.0)}
        like = TargetConfig(**self.config("final", 0, {**options, "lr": 1e-4}))
        kind = like.curvature, like.is_fine_tuning
        if kind not in self._speeds:
            self._speeds[kind] = self._measured(like)
        return self._speeds[kind].seconds(config, self.data)

    def workers(self, processors: int) -> int:
        """Networks given by path may be large: one run at a time then, on all processors."""
        return super().workers(processors) if self.preset.name else 1

    def threads_each(self, processors: int, workers: int) -> int:
        """Share the processors."""
        return max(1, processors // workers)

    @property
    def folder(self) -> str:
        """Named after the preset, or after the network without one."""
        return f"{self.name}-{self.preset.name or self.preset.model}"

    def title(self) -> str:
        """Name the network and, with a preset, both tasks."""
        preset = self.preset
        names = [Path(name).stem for name in (preset.source, preset.target) if name is not None]
        label = ARCHITECTURES[preset.model].label
        return f"{label}, {' to '.join(names)}" if names else f"{label}, transfer"

    def notes(self, settings: int) -> list[str]:
        """Tell the protocol."""
        preset = self.preset
        return [
            *self._notes,
            *preset.remarks,
            f"{counted(preset.epochs, 'epoch')} on the target, batches of {preset.batch_size}, "
            "mirrored and shifted at random; SGD with momentum, the learning rate falling to 0 "
            "along a cosine. One backbone, two heads; the source's is kept, the target's starts "
            "at zero. Fine-tuning trains the network as it is; the others first take the target's "
            "statistics into the BatchNorms (or freeze them, where it says so), and the distance "
            "of L2 is that of merged weights.",
            "Figures in per cent, ± the half width of the mean's 95 % interval (Student's t) over "
            f"the final runs, seeds {', '.join(map(str, preset.seeds))}; average: of source after "
            "and target.",
            *self._notes_on_the_choice(settings),
        ]

    def about(self) -> Mapping[str, Any]:
        """Names and fingerprints of all that is read."""
        return {**self._about, "digests": self._digests}

    @cached_property
    def _digests(self) -> dict[str, str]:
        return {
            "pretrained": Weights.read(self.weights).digest,
            "source": self.data.source_digest,
            "target": self.data.target_digest,
        }

    def _measured(self, like: TargetConfig) -> "_Speed":
        """Make the source's run and two of the target's with a few images."""
        few = self.data.part(_PROBE_BATCHES * self.preset.batch_size)
        one, two = (dataclasses.replace(like, epochs=epochs) for epochs in (1, 2))
        with TemporaryDirectory() as folder, threads(1):
            runs = Transfer(self.preset.model, self.weights, few, Path(folder))
            source = runs(one.at_source.as_dict()).seconds
            return _Speed.of(source, runs(one.as_dict()).seconds, runs(two.as_dict()).seconds, few)

    def _notes_on_the_choice(self, settings: int) -> list[str]:
        preset, points = self.preset, 100 * self.preset.tolerance
        if settings == 1:
            return ["Each method at one setting: nothing was chosen."]
        tried = (
            "all run with every seed"
            if preset.every_setting
            else f"tried with seed {preset.grid_seed}"
        )
        notes = [
            f"Each method at one of {settings} settings, {tried} and chosen on the target's "
            "validation images alone: among those within "
            f"{points:g} percentage {'point' if points == 1 else 'points'} of the method's best "
            "accuracy the strongest penalty (largest scale, or damping for L2), of equally "
            "strong ones the lower learning rate.",
        ]
        if preset.every_setting:
            notes.append(
                "Source accuracy at equal target accuracy: the best mean over the seeds among a "
                "method's settings whose mean target accuracy reaches the level, both on test "
                "images, with that setting's interval. It says what a method can do, whoever "
                "chooses; the table above it, what comes of a choice without the source. "
                "trade_off.png shows it as staircases, with a point for each setting in which no "
                "run diverged."
            )
        else:
            notes.append(
                "trade_off.png shows the grid's runs over the strength of the penalty, larger "
                "markers for stronger ones, each at the learning rate that is best for the "
                "target's validation images; outlined markers are the final runs."
            )
        if preset.plain_epochs:
            epochs = " or ".join(map(str, preset.plain_epochs))
            notes.insert(1, f"Fine-tuning has learning rates of its own, with {epochs} epochs.")
        if preset.axis("frozen_lrs") != preset.lrs:
            rates = ", ".join(f"{lr:g}" for lr in preset.axis("frozen_lrs"))
            notes.insert(1, f"Learning rates with BatchNorm frozen: {rates}.")
        return notes


def choose(points: Sequence[GridPoint], tolerance: float) -> Setting:
    """Choose the strongest penalty that the target can bear.

    Among the settings whose validation accuracy on the target is within `tolerance` of the
    method's best, the one with the strongest penalty; of equally strong ones the one with the
    lower learning rate. The accuracy alone would always vote for the weakest penalty, as the
    target is better off without any.

    Parameters
    ----------
    points
        Settings with validation accuracies on the target as scores.
    tolerance
        A difference of fractions: 0.01 is one percentage point.
    """
    best = max(point.best_known_score for point in points)
    # Differences of accuracies are multiples of one image's share: rounding must not decide.
    near = [point.setting for point in points if point.best_known_score >= best - tolerance - 1e-9]
    chosen = min(near, key=lambda s: (-strength_of(s), float(s["lr"])))
    return dict(chosen)


@dataclass(frozen=True)
class _Speed:
    """What things cost on this machine with one curvature, in seconds."""

    factor_image: float
    evaluated_image: float
    trained_image: float
    beginning: float

    @classmethod
    def of(
        cls,
        source: Mapping[str, float],
        one: Mapping[str, float],
        two: Mapping[str, float],
        data: TransferData,
    ) -> "_Speed":
        """Take apart the seconds of the source's run and the target's of one and two epochs."""
        epoch = max(two["fit"] - one["fit"], 0.0)
        return cls(
            factor_image=source["curvature"] / len(data.source_train),
            evaluated_image=two["evaluate"] / _evaluated(data),
            trained_image=epoch / len(data.target_train),
            beginning=max(two["fit"] - 2 * epoch, 0.0),
        )

    def seconds(self, config: Config, data: TransferData) -> float:
        """Estimate what a run takes: the target's if it has a learning rate."""
        if "lr" not in config:
            return (
                len(data.source_train) * self.factor_image
                + len(data.source_test) * self.evaluated_image
            )
        run = TargetConfig(**config)
        trained = run.fits * run.epochs * len(data.target_train)
        return (
            self.beginning + trained * self.trained_image + _evaluated(data) * self.evaluated_image
        )


def _evaluated(data: TransferData) -> int:
    """Return how many images the target's run is evaluated on."""
    return len(data.source_test) + len(data.target_validation) + len(data.target_test)


def _weights(preset: TransferPreset, data_dir: Path | None) -> Path:
    packaged = ARCHITECTURES[preset.model].packaged_weights
    if preset.pretrained is None and packaged is not None:
        return packaged()
    return _data("source-weights", preset.pretrained, data_dir)


def _data(option: str, name: str | None, data_dir: Path | None) -> Path:
    if name is None:
        raise OptionError(f"--{option}: needed without a --preset")
    return find_data(name, data_dir)
