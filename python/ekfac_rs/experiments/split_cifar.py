"""Split CIFAR-10: ten classes in tasks of a few, learnt from scratch by a small ResNet.

All tasks share the network but for its output layer, of which each has one of its own; which task
an image is from is told (task-incremental). The network starts untrained. Images are what
`find_data` finds under the preset's name, in folders by split and class.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from ekfac_rs.errors import OptionError
from ekfac_rs.experiments.data import ImageLoader, ImageSet, ImageTree, find_data
from ekfac_rs.experiments.methods import methods_named, with_rules
from ekfac_rs.experiments.networks import CifarResNet
from ekfac_rs.experiments.options import option, positive
from ekfac_rs.experiments.report import counted
from ekfac_rs.experiments.streams import (
    VALIDATION_SHARE,
    Stream,
    StreamConfig,
    StreamPreset,
    StreamRuns,
)

__all__ = [
    "METHODS",
    "PRESETS",
    "SplitCifar",
    "SplitConfig",
    "SplitImages",
    "SplitPreset",
    "SplitRuns",
]

CLASSES_PER_TASK = 2
IMAGE_SIZE = 32
# Of CIFAR-10's training pixels, on the scale 0 to 1.
_MEAN = (0.4914, 0.4822, 0.4465)
_STD = (0.2470, 0.2435, 0.2616)
_VALIDATION_SEED = 1998
_EVALUATION_BATCH = 250

METHODS = {
    **methods_named(
        *("fine-tuning", "l2", "ewc", "kfac-frozen", "kfac-eval", "kfac-train", "xkfac"),
        *("xkfac-nested", "xkfac-nested-first", "xkfac-nested-explicit", "xkfac-nested-merged"),
        *("scheduled-kfac", "scheduled-kfac-first", "scheduled-xkfac-nested", "kfac-frozen-own"),
        *("xkfac-nested-own", "scheduled-xkfac-nested-own", "scheduled-kfac-first-own"),
    ),
    **with_rules("xkfac-nested"),
    **with_rules("scheduled-kfac-first-own"),
}


@dataclass(frozen=True, kw_only=True)
class SplitPreset(StreamPreset):
    """Size of the experiment.

    Attributes
    ----------
    source
        Name among the data.
    blocks
        Of each of the network's three stages: it is ``6 * blocks + 2`` layers deep.
    augment
        Mirror and shift training images at random.
    """

    source: str = "cifar10_jpeg.tar"
    blocks: int = field(
        default=3, metadata=option(positive, "blocks per stage: a ResNet-20 has 3, a ResNet-8 1")
    )
    augment: bool = False


PRESETS: dict[str, SplitPreset] = {
    preset.name: preset
    for preset in (
        SplitPreset(
            name="quick",
            methods=("fine-tuning", "kfac-frozen", "xkfac-nested"),
            examples=1500,
            blocks=1,
            tasks=3,
            epochs=3,
            seeds=(0, 1),
            grid_tasks=3,
            grid_epochs=3,
            batch_size=25,
            lrs=(0.1,),
            frozen_lrs=(0.03,),
            plain_lrs=(0.01, 0.1),
            scales=(1.0, 10.0),
            l2=(0.01, 0.1),
            damping=0.001,
        ),
        SplitPreset(
            name="full",
            methods=(
                *("fine-tuning", "l2", "ewc", "kfac-frozen", "kfac-train", "xkfac"),
                *("xkfac-nested", "scheduled-xkfac-nested"),
            ),
            tasks=5,
            epochs=10,
            seeds=(0, 1, 2),
            grid_tasks=3,
            grid_epochs=5,
            batch_size=32,
            crossed=True,
            lrs=(0.03, 0.1, 0.3),
            frozen_lrs=(0.01, 0.03, 0.1),
            scheduled_lrs=(0.01, 0.03, 0.1),
            plain_lrs=(0.003, 0.01, 0.03, 0.1, 0.3),
            scales=(1.0, 3.0, 10.0),
            l2=(0.01, 0.1, 1.0),
            damping=0.001,
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class SplitConfig(StreamConfig):
    """Everything that determines one run.

    Attributes
    ----------
    blocks, augment
        As in `SplitPreset`.
    """

    blocks: int
    augment: bool


@dataclass(frozen=True)
class SplitImages:
    """The images of all classes.

    Attributes
    ----------
    train, test
        Of the same classes.
    """

    train: ImageSet
    test: ImageSet

    @classmethod
    def read(cls, path: Path, progress: bool = True) -> Self:
        """Read the splits ``train`` and ``test`` of a directory or archive.

        Raises
        ------
        OptionError
            If it lacks one of them, or they have other classes.
        FileFormatError
            If an image is damaged.
        """
        tree = ImageTree(path)
        train, test = (
            tree.read(split, IMAGE_SIZE, progress=progress) for split in ("train", "test")
        )
        if train.classes != test.classes:
            raise OptionError(f"{path}: expected the same classes in all splits")
        return cls(train, test)


class SplitRuns(StreamRuns):
    """Makes runs of images split into tasks by class.

    Parameters
    ----------
    data
        The images.
    """

    config_type = SplitConfig
    classes = CLASSES_PER_TASK

    def __init__(self, data: SplitImages) -> None:
        self._data = data

    def tasks(self, config: SplitConfig) -> "_Split":
        """Return the tasks, each of the next few classes."""
        return _Split(config, self._data)

    def learner_options(self) -> Mapping[str, Any]:
        """Give each task an output layer of its own."""
        return {"head": "new", "output_layer": "linear"}

    def network(self, config: SplitConfig) -> nn.Module:
        """Return a ResNet whose output layer is the first task's."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = CifarResNet(config.blocks, CLASSES_PER_TASK)
        return model.to(memory_format=torch.channels_last)


class SplitCifar(Stream):
    """The experiment: a stream of tasks of two classes, learnt by one ResNet with task heads."""

    name = "split-cifar"
    summary = "CIFAR-10's classes in tasks of two, a ResNet from scratch"
    description = (
        "Compare methods on split CIFAR-10: tasks of two classes, learnt from scratch by a ResNet "
        "that has an output layer for each task. Finished runs are kept: the same command goes on "
        "where it was interrupted."
    )
    preset_help = (
        "quick (default): a ResNet-8, three tasks of a few images, minutes; full: a ResNet-20 on "
        "all of them, hours"
    )
    data_help = (
        "folder with cifar10_jpeg.tar (default: the folder in EKFAC_DATA, otherwise ../shared/data)"
    )
    presets = PRESETS
    default = PRESETS["quick"]
    methods = METHODS
    runs_type = SplitRuns
    probe_batches = 2
    preset: SplitPreset
    data: SplitImages

    def __init__(self, preset: SplitPreset, data: SplitImages) -> None:
        super().__init__(preset, data)
        most = len(data.train.classes) // CLASSES_PER_TASK
        if preset.tasks > most:
            raise OptionError(
                f"tasks: expected at most {most}, of {CLASSES_PER_TASK} classes each, got "
                f"{preset.tasks}"
            )

    @classmethod
    def read(cls, preset: SplitPreset, data_dir: Path | None) -> Self:
        """Find and read the images."""
        return cls(preset, SplitImages.read(find_data(preset.source, data_dir)))

    @cached_property
    def digest(self) -> str:
        """Fingerprint of the images."""
        return "-".join((self.data.train.digest(), self.data.test.digest()))

    @property
    def images(self) -> tuple[int, int]:
        """Of both splits."""
        return len(self.data.train), len(self.data.test)

    @property
    def task_share(self) -> float:
        """Two of the classes, all of one size."""
        return CLASSES_PER_TASK / len(self.data.train.classes)

    def own_settings(self) -> Mapping[str, Any]:
        """Return the network's depth, and whether images are augmented."""
        return {"blocks": self.preset.blocks, "augment": self.preset.augment}

    def title(self) -> str:
        """Name the network and the number of tasks."""
        return (
            f"Split CIFAR-10, ResNet-{6 * self.preset.blocks + 2} from scratch, "
            f"{self.preset.tasks} tasks"
        )

    def notes(self, settings: int) -> list[str]:
        """Tell the protocol."""
        preset = self.preset
        learnt, evaluated = self.counts(preset.examples, "test")
        return [
            f"{preset.source}: JPEG copies of CIFAR-10. Tasks of {CLASSES_PER_TASK} classes, in "
            f"CIFAR-10's own order: {learnt:,} training and {evaluated:,} test images each, "
            f"{counted(preset.epochs, 'epoch')}, batches of {preset.batch_size}, images "
            f"{'mirrored and shifted at random' if preset.augment else 'as they are'}. One "
            "network, untrained at the start, with an output layer for each task; which task an "
            "image is from is told.",
            self.note_on_figures(),
            self.note_on_the_choice(settings),
        ]

    def about(self) -> Mapping[str, Any]:
        """Name and fingerprint of the images."""
        return {"dataset": {"name": self.preset.source, "digest": self.digest}}


class _Split:
    """The tasks of one run as loaders."""

    def __init__(self, config: SplitConfig, data: SplitImages) -> None:
        self._config = config
        train = data.train if config.examples is None else data.train.part(config.examples)
        if config.split == "test":
            self._train, self._evaluation = train, data.test
        else:
            self._train, self._evaluation = train.split(VALIDATION_SHARE, _VALIDATION_SEED)

    def training(self, task: int) -> ImageLoader:
        config = self._config
        return ImageLoader(
            *(self._of_task(self._train, task), _MEAN, _STD, config.batch_size),
            shuffle=True,
            augment=config.augment,
            generator=torch.Generator().manual_seed(1_000_003 * config.seed + task),
        )

    def evaluation(self, task: int) -> ImageLoader:
        return ImageLoader(self._of_task(self._evaluation, task), _MEAN, _STD, _EVALUATION_BATCH)

    def _of_task(self, images: ImageSet, task: int) -> ImageSet:
        first = CLASSES_PER_TASK * task
        return images.of_classes(range(first, first + CLASSES_PER_TASK))
