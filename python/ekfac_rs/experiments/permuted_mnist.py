"""Permuted MNIST with BatchNorm: what each curvature keeps of the earlier tasks.

Every task is MNIST with its pixels in another fixed order. One network with one output layer
learns the tasks in turn and is evaluated on all tasks seen. Each method is compared at its own
best setting; the choice looks at validation images of all tasks, which a learner without access
to old data could not do.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from ekfac_rs.experiments.data import (
    Mnist,
    TensorLoader,
    image_features,
    load_mnist,
    load_mnist_subset,
    task_permutation,
)
from ekfac_rs.experiments.methods import methods_named, with_rules
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
    "PermutedConfig",
    "PermutedMnist",
    "PermutedPreset",
    "PermutedRuns",
]

CLASSES = 10
_VALIDATION_SEED = 1998
_EVALUATION_BATCH = 2000

METHODS = {
    **methods_named(
        *("fine-tuning", "l2", "ewc", "kfac-frozen", "kfac-frozen-explicit", "kfac-eval"),
        *("kfac-train", "kfac-train-first", "kfac-train-explicit", "xkfac", "xkfac-first"),
        *("xkfac-explicit", "xkfac-merged", "xkfac-raw", "scheduled-kfac", "scheduled-kfac-first"),
        *("kfac-frozen-own", "scheduled-kfac-first-own"),
        *("scheduled-xkfac", "scheduled-xkfac-first"),
    ),
    **with_rules("kfac-train"),
    **with_rules("scheduled-kfac-first-own"),
}


@dataclass(frozen=True, kw_only=True)
class PermutedPreset(StreamPreset):
    """Size of the experiment.

    Attributes
    ----------
    dataset
        ``"subset"`` (embedded) or ``"mnist"`` (all of it).
    hidden
        Widths of the hidden layers.
    """

    dataset: str
    hidden: tuple[int, ...] = field(
        default=(100, 100), metadata=option(positive, "widths of the hidden layers")
    )


# What is compared unless methods are named.
_USUAL = (
    *("fine-tuning", "l2", "ewc", "kfac-frozen", "kfac-frozen-own", "kfac-eval", "kfac-train"),
    *("xkfac", "xkfac-explicit", "xkfac-merged", "xkfac-raw", "scheduled-kfac"),
    *("scheduled-kfac-first", "scheduled-kfac-first-own", "scheduled-xkfac"),
)
# The same in five minutes: what a user would choose between, and the paper's form.
_USUAL_QUICK = (
    *("fine-tuning", "l2", "ewc", "kfac-frozen", "kfac-train", "xkfac", "xkfac-merged"),
    "scheduled-kfac-first-own",
)

PRESETS: dict[str, PermutedPreset] = {
    preset.name: preset
    for preset in (
        PermutedPreset(
            name="quick",
            methods=_USUAL_QUICK,
            dataset="subset",
            tasks=5,
            epochs=2,
            seeds=(0, 1, 2),
            grid_tasks=3,
            grid_epochs=1,
            finalists=2,
            batch_size=128,
            factor_examples=2000,
            crossed=True,
            lrs=(0.03, 0.1, 0.3),
            frozen_lrs=(0.01, 0.03, 0.1),
            plain_lrs=(0.001, 0.003, 0.01, 0.03, 0.1),
            scales=(1.0, 3.0, 10.0),
            diagonal_scales=(10.0, 30.0, 100.0),
            l2=(0.1, 0.3, 1.0),
            damping=0.01,
        ),
        PermutedPreset(
            name="full",
            methods=_USUAL,
            dataset="mnist",
            tasks=10,
            epochs=2,
            seeds=(0, 1, 2),
            grid_tasks=4,
            grid_epochs=1,
            finalists=4,
            batch_size=256,
            lrs=(0.03, 0.1, 0.3),
            frozen_lrs=(0.01, 0.03, 0.1),
            plain_lrs=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
            scales=(1.0, 3.0, 10.0),
            diagonal_scales=(10.0, 30.0, 100.0),
            l2=(0.1, 0.3, 1.0),
            damping=0.01,
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class PermutedConfig(StreamConfig):
    """Everything that determines one run.

    Attributes
    ----------
    hidden
        Widths of the hidden layers.
    """

    hidden: Sequence[int]


class PermutedRuns(StreamRuns):
    """Makes runs of images with their pixels in other orders.

    Parameters
    ----------
    data
        The images.
    """

    config_type = PermutedConfig
    classes = CLASSES

    def __init__(self, data: Mnist) -> None:
        self._features = _Features.of(data)

    def tasks(self, config: PermutedConfig) -> "_Permuted":
        """Return the permuted tasks."""
        return _Permuted(config, self._features)

    def network(self, config: PermutedConfig) -> nn.Module:
        """Return Linear-BN-ReLU for each hidden layer, then one output layer for all tasks."""
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        widths = (28 * 28, *config.hidden)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            for i, (inputs, outputs) in enumerate(pairwise(widths), start=1):
                layers[f"fc{i}"] = nn.Linear(inputs, outputs)
                layers[f"bn{i}"] = nn.BatchNorm1d(outputs)
                layers[f"relu{i}"] = nn.ReLU()
            layers["output"] = nn.Linear(widths[-1], CLASSES)
        return nn.Sequential(layers)


class PermutedMnist(Stream):
    """The experiment: a stream of permuted tasks, learnt by one small network."""

    name = "permuted-mnist"
    summary = "permuted MNIST with BatchNorm"
    description = (
        "Compare methods on permuted MNIST with BatchNorm, each at its best setting. Finished "
        "runs are kept: the same command goes on where it was interrupted. A run computes on one "
        "thread and takes about 1 GB with --preset full."
    )
    preset_help = (
        "quick (default): the embedded subset, minutes; full: the whole of MNIST, an hour or two"
    )
    data_help = (
        "MNIST's IDX files, for --preset full; otherwise the folder in EKFAC_DATA, otherwise a "
        "download"
    )
    presets = PRESETS
    default = PRESETS["quick"]
    methods = METHODS
    runs_type = PermutedRuns
    probe_batches = 20
    preset: PermutedPreset
    data: Mnist

    @classmethod
    def read(cls, preset: PermutedPreset, data_dir: Path | None) -> Self:
        """Read the images that the preset names."""
        whole = preset.dataset == "mnist"
        return cls(preset, load_mnist(data_dir) if whole else load_mnist_subset())

    @cached_property
    def digest(self) -> str:
        """Fingerprint of the images."""
        return self.data.digest()

    @property
    def images(self) -> tuple[int, int]:
        """Of both splits."""
        return len(self.data.train_labels), len(self.data.test_labels)

    @property
    def task_share(self) -> float:
        """Every task has all images."""
        return 1.0

    def own_settings(self) -> Mapping[str, Any]:
        """Return the network's widths."""
        return {"hidden": self.preset.hidden}

    def title(self) -> str:
        """Name the images, the network and the number of tasks."""
        preset = self.preset
        images = "MNIST" if preset.dataset == "mnist" else "MNIST subset"
        layers = counted(len(preset.hidden), "hidden layer")
        whole = ", all images" if preset.dataset == "mnist" and preset.examples is None else ""
        return f"Permuted {images}, {layers}, {preset.tasks} tasks{whole}"

    def notes(self, settings: int) -> list[str]:
        """Tell the protocol."""
        preset = self.preset
        widths = "-".join(str(width) for width in (28 * 28, *preset.hidden, CLASSES))
        learnt, evaluated = self.counts(preset.examples, "test")
        return [
            f"{learnt:,} training and {evaluated:,} test images per task, "
            f"{counted(preset.epochs, 'epoch')} per task, batches of {preset.batch_size}, network "
            f"{widths} with BatchNorm, one output layer.",
            self.note_on_figures(),
            self.note_on_the_choice(settings),
        ]

    def about(self) -> Mapping[str, Any]:
        """Name and fingerprint of the images."""
        return {"dataset": {"name": self.data.name, "digest": self.digest}}


@dataclass(frozen=True)
class _Features:
    """Both splits as tensors, the pixels in their original order."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @classmethod
    def of(cls, mnist: Mnist) -> "_Features":
        return cls(
            image_features(mnist.train_images),
            torch.from_numpy(mnist.train_labels).long(),
            image_features(mnist.test_images),
            torch.from_numpy(mnist.test_labels).long(),
        )


class _Permuted:
    """The tasks of one run as loaders."""

    def __init__(self, config: PermutedConfig, features: _Features) -> None:
        self._config = config
        # The first so many, or all.
        train_x, train_y = features.train_x[: config.examples], features.train_y[: config.examples]
        if config.split == "test":
            self._train = train_x, train_y
            self._evaluation = features.test_x, features.test_y
        else:
            train, held_out = _validation_rows(len(train_x))
            self._train = train_x[train], train_y[train]
            self._evaluation = train_x[held_out], train_y[held_out]
        # Kept for all tasks, as they are evaluated again after each; training sets are not.
        self._permuted_evaluation: dict[int, Tensor] = {}
        self._permuted_train: tuple[int, Tensor] | None = None

    def training(self, task: int) -> TensorLoader:
        if self._permuted_train is None or self._permuted_train[0] != task:
            self._permuted_train = None
            self._permuted_train = task, self._permute(self._train[0], task)
        x, y = self._permuted_train[1], self._train[1]
        generator = torch.Generator().manual_seed(1_000_003 * self._config.seed + task)
        batch_size = self._config.batch_size
        # BatchNorm has no statistics of a single example.
        return TensorLoader(
            x, y, batch_size, shuffle=True, generator=generator, drop_last=len(x) % batch_size == 1
        )

    def evaluation(self, task: int) -> TensorLoader:
        x, y = self._evaluation
        if task not in self._permuted_evaluation:
            self._permuted_evaluation[task] = self._permute(x, task)
        return TensorLoader(self._permuted_evaluation[task], y, _EVALUATION_BATCH)

    def _permute(self, x: Tensor, task: int) -> Tensor:
        return x[:, task_permutation(x.shape[1], task, self._config.seed)]


def _validation_rows(count: int) -> tuple[Tensor, Tensor]:
    """Rows to train on and rows held out: the same ones in every run."""
    generator = torch.Generator().manual_seed(_VALIDATION_SEED)
    order = torch.randperm(count, generator=generator)
    held_out = round(VALIDATION_SHARE * count)
    return order[held_out:], order[:held_out]
