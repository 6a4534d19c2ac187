"""One run of transfer: a pretrained network learns a target while its source is protected.

Both tasks share the backbone; each has an output layer (head) of its own. The source's head stays
as it is. The target's is new: it starts at zero, so that it teaches the backbone nothing before
it has learnt something itself, and the penalty leaves it free.
"""

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

import ekfac_rs as ek
from ekfac_rs.errors import OptionError
from ekfac_rs.experiments.data import ImageLoader, ImageSet, ImageTree
from ekfac_rs.experiments.networks import ARCHITECTURES, Weights, backbone_layers
from ekfac_rs.experiments.report import counted
from ekfac_rs.experiments.runs import (
    DIVERGENCE,
    Clock,
    RunRecord,
    config_digest,
    finite_or_none,
    recorded,
)
from ekfac_rs.experiments.settings import CURVATURES, RunConfig, config_of

__all__ = ["SourceConfig", "TargetConfig", "Transfer", "TransferData"]

_EVALUATION_BATCH = 250
_HELD_OUT_SHARE = 0.1
_HELD_OUT_SEED = 1998


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Everything that determines the source's part of a run: accuracy before, and curvature.

    Attributes
    ----------
    model
        A key of `ARCHITECTURES`.
    pretrained
        Fingerprint of the file of weights.
    source
        Fingerprint of the source's images.
    version, batch_size, seed, curvature, device
        As in `RunConfig`.
    """

    version: str = ek.__version__
    model: str
    pretrained: str
    source: str
    batch_size: int
    seed: int
    curvature: str
    device: str = "cpu"

    def as_dict(self) -> dict[str, Any]:
        """Return the config in JSON's own types."""
        return config_of(self)


@dataclass(frozen=True, kw_only=True)
class TargetConfig(RunConfig, SourceConfig):
    """Everything that determines a run.

    Attributes
    ----------
    target
        Fingerprint of the target's images.
    """

    target: str

    @property
    def at_source(self) -> SourceConfig:
        """The source's part."""
        names = [field.name for field in dataclasses.fields(SourceConfig)]
        return SourceConfig(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True)
class TransferData:
    """The images of both tasks.

    Attributes
    ----------
    source_train
        The curvature is taken from them.
    source_test
        The source's accuracy is measured on them.
    target_train, target_validation, target_test
        Learnt; chosen by; measured on.
    """

    source_train: ImageSet
    source_test: ImageSet
    target_train: ImageSet
    target_validation: ImageSet
    target_test: ImageSet

    @classmethod
    def read(
        cls,
        source: Path,
        target: Path,
        image_size: int,
        crop: float,
        source_images: int,
        target_images: int | None = None,
        progress: bool = True,
    ) -> tuple[Self, list[str]]:
        """Read the images of both tasks.

        The source is evaluated on its split ``validation``, else on ``test``, else on the images
        that give the curvature. The target needs ``train`` and ``test``, or ``validation`` in its
        place; where there are not both of them, a tenth of the training images is held out as
        validation.

        Parameters
        ----------
        source, target
            Directories or archives.
        image_size, crop
            As in `ImageTree.read`.
        source_images, target_images
            Read at most so many of each of the source's, or the target's, splits; None for all.
        progress
            Show tqdm bars.

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
        read = partial(ImageTree.read, image_size=image_size, crop=crop, progress=progress)
        source_tree, target_tree = ImageTree(source), ImageTree(target)
        read_source = partial(read, source_tree, max_images=source_images)
        source_train = read_source(_first_of(source_tree, "train"))
        test_split = _first_of(source_tree, "validation", "test", "train")
        source_test = source_train if test_split in (None, "train") else read_source(test_split)
        if source_test.classes != source_train.classes:
            raise OptionError(f"source_data: expected the same classes in all splits of {source}")

        read_target = partial(read, target_tree, max_images=target_images)
        target_train = read_target("train")
        target_test = read_target(_first_of(target_tree, "test", "validation"))
        if {"validation", "test"} <= set(target_tree.splits):
            target_validation = read_target("validation")
            validation_note = ""
        else:
            target_train, target_validation = target_train.split(_HELD_OUT_SHARE, _HELD_OUT_SEED)
            validation_note = ", held out from its training images"
        if not target_train.classes == target_validation.classes == target_test.classes:
            raise OptionError(f"target_data: expected the same classes in all splits of {target}")

        if source_test is source_train:
            measured = "the same images: it has not been measured on new ones"
        else:
            measured = f"{counted(len(source_test), 'image')} of its split {test_split}"
        notes = [
            f"Source {source.name}: {counted(len(source_train.classes), 'class', 'classes')}, "
            f"curvature from {counted(len(source_train), 'image')}, accuracy on {measured}. "
            f"Target {target.name}: {counted(len(target_train.classes), 'class', 'classes')}, "
            f"{counted(len(target_train), 'training image')}, {len(target_validation):,} for "
            f"validation{validation_note}, {len(target_test):,} for the test. All at "
            f"{image_size} x {image_size} pixels."
        ]
        return cls(source_train, source_test, target_train, target_validation, target_test), notes

    def part(self, images: int) -> Self:
        """Take at most so many images of each set, every class in proportion."""
        sets = [getattr(self, field.name) for field in dataclasses.fields(self)]
        return type(self)(*(each.part(images) for each in sets))

    @cached_property
    def source_digest(self) -> str:
        """Fingerprint of the source's images."""
        return "-".join((self.source_train.digest(), self.source_test.digest()))

    @cached_property
    def target_digest(self) -> str:
        """Fingerprint of the target's images."""
        parts = (self.target_train, self.target_validation, self.target_test)
        return "-".join(part.digest() for part in parts)


class Transfer:
    """Makes runs from their configs: those of a `SourceConfig`, and those of a `TargetConfig`.

    Parameters
    ----------
    weights
        File with the source's weights.
    data
        The images.
    folder
        Where curvatures are kept; made if need be.
    progress
        Show tqdm bars within runs.

    Raises
    ------
    OptionError
        If the source's classes are not as many as the weights' outputs.
    """

    def __init__(
        self, model: str, weights: Path, data: TransferData, folder: Path, progress: bool = False
    ) -> None:
        self._architecture = ARCHITECTURES[model]
        self._weights = Weights.read(weights)
        self._data = data
        self._folder = folder
        self._progress = progress
        self._source_before: float | None = None
        self._kept: tuple[Path, ek.Curvature] | None = None
        outputs, classes = self._source_head().out_features, len(data.source_train.classes)
        if outputs != classes:
            raise OptionError(
                f"source_data: expected {outputs} classes, as the weights have outputs, "
                f"got {classes}"
            )

    def __call__(self, config: Mapping[str, Any]) -> RunRecord:
        """Make the run of a config: the target's if it has a learning rate."""
        if "lr" in config:
            return self.learn_target(TargetConfig(**config))
        return self.visit_source(SourceConfig(**config))

    def visit_source(self, config: SourceConfig) -> RunRecord:
        """Measure the source's accuracy before anything is learnt, and keep its curvature."""
        started = time.perf_counter()
        clock = Clock()
        with clock.part("evaluate"):
            before = self._accuracy_before(config.device)
        with clock.part("curvature"):
            self._curvature(config)
        seconds = {**clock.seconds, "total": time.perf_counter() - started}
        return RunRecord(config.as_dict(), [[before]], [[]], None, {}, seconds)

    def learn_target(self, config: TargetConfig) -> RunRecord:
        """Learn the target, and measure both tasks.

        A run diverges when a loss or a weight stops being finite; it then scores chance.
        """
        started = time.perf_counter()
        clock = Clock()
        data, model = self._data, self._network(config.device)
        with clock.part("evaluate"):
            before = self._accuracy_before(config.device)
        with clock.part("curvature"):
            learner = self._learner(config, model)
        new_head = _new_head(model, self._head, data.target_train).to(config.device)
        source_head = self._exchange_head(model, new_head)
        diverged, history = None, []
        with recorded(ek.StabilityWarning) as counts:
            try:
                with clock.part("fit"):
                    epochs = learner.fit(
                        self._training_images(config), epochs=config.epochs, lr=config.lr
                    )
                history = [finite_or_none(epoch) for epoch in epochs]
                with clock.part("evaluate"):
                    validation, target = learner.evaluate(
                        [self._in_order(data.target_validation), self._in_order(data.target_test)]
                    )
                    self._exchange_head(model, source_head)
                    (source,) = learner.evaluate([self._in_order(data.source_test)])
            except DIVERGENCE as error:
                diverged = str(error)
                validation = target = 1 / len(data.target_train.classes)
                source = 1 / len(data.source_train.classes)
        return RunRecord(
            config.as_dict(),
            [[before], [source, target]],
            [[], history],
            diverged,
            dict(counts),
            {**clock.seconds, "total": time.perf_counter() - started},
            {"target_validation": validation, **config.measures(learner)},
        )

    @property
    def _head(self) -> str:
        return self._architecture.head

    def _network(self, device: str) -> nn.Module:
        image_size = self._data.source_train.images.shape[-1]
        model = self._architecture.load(self._weights, image_size)
        return model.to(device).to(memory_format=torch.channels_last)

    def _source_head(self) -> nn.Linear:
        return _linear(self._network("cpu"), self._head)

    def _accuracy_before(self, device: str) -> float:
        """Return the source's accuracy before anything is learnt; measured once per process."""
        if self._source_before is None:
            learner = ek.ContinualLearner(self._network(device))
            (self._source_before,) = learner.evaluate([self._in_order(self._data.source_test)])
        return self._source_before

    def _learner(self, config: TargetConfig, model: nn.Module) -> ek.ContinualLearner:
        """Return a learner that holds on to the source, or to nothing for fine-tuning."""
        learner = config.learner(model, progress=self._progress)
        # BatchNorms can be frozen in all tasks but the first, which the source is then.
        if not config.is_fine_tuning or config.freeze_bn_after < 1.0:
            example, _ = next(iter(self._in_order(self._data.source_train)))
            layers = backbone_layers(model, self._head)
            # Two images show the data flow as well as a whole mini-batch does.
            anchor = ek.merged_weights(model, layers=layers, example=example[:2].to(config.device))
            learner.adopt(self._curvature(config.at_source), anchor)
        return learner

    def _curvature(self, config: SourceConfig) -> ek.Curvature | None:
        """Return the source's curvature, from the file kept if it has been taken before."""
        options = dict(CURVATURES[config.curvature])
        approximation = options.pop("approximation")
        if approximation is None:
            return None
        path = self._folder / f"{config.curvature}-{config_digest(config.as_dict())}.safetensors"
        # Runs with the same curvature follow each other.
        if self._kept is not None and self._kept[0] == path:
            return self._kept[1]
        self._kept = None
        if path.exists():
            curvature = ek.Curvature.load(path, config.device)
        else:
            curvature = self._estimated(config, approximation, options)
            path.parent.mkdir(parents=True, exist_ok=True)
            curvature.save(path)
        self._kept = path, curvature
        return curvature

    def _estimated(
        self, config: SourceConfig, approximation: str, options: Mapping[str, Any]
    ) -> ek.Curvature:
        """Return the curvature of the source's loss, under its own head, in the backbone."""
        model = self._network(config.device)
        return ek.estimate_curvature(
            model,
            self._loader(self._data.source_train, config, augment=False),
            approximation=approximation,
            generator=torch.Generator(config.device).manual_seed(config.seed),
            layers=backbone_layers(model, self._head),
            progress=self._progress,
            **options,
        )

    def _training_images(self, config: TargetConfig) -> ImageLoader:
        return self._loader(self._data.target_train, config, augment=True)

    def _loader(self, images: ImageSet, config: SourceConfig, augment: bool) -> ImageLoader:
        architecture = self._architecture
        return ImageLoader(
            *(images, architecture.mean, architecture.std, config.batch_size),
            shuffle=True,
            augment=augment,
            generator=torch.Generator().manual_seed(config.seed),
        )

    def _in_order(self, images: ImageSet) -> ImageLoader:
        architecture = self._architecture
        return ImageLoader(images, architecture.mean, architecture.std, _EVALUATION_BATCH)

    def _exchange_head(self, model: nn.Module, head: nn.Module) -> nn.Module:
        before = model.get_submodule(self._head)
        model.set_submodule(self._head, head)
        return before


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


def _new_head(model: nn.Module, name: str, images: ImageSet) -> nn.Linear:
    head = nn.Linear(_linear(model, name).in_features, len(images.classes))
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def _linear(model: nn.Module, name: str) -> nn.Linear:
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module
