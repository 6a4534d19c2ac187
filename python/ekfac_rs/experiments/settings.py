"""What experiments vary: curvatures, methods with their grids, and the config of a run."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from torch import nn

import ekfac_rs as ek
from ekfac_rs.experiments.options import (
    batch_size,
    device,
    natural,
    number,
    option,
    positive,
    scale,
)

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = [
    "CURVATURES",
    "Method",
    "Preset",
    "RunConfig",
    "Setting",
    "config_of",
    "grid",
    "setting_text",
    "setting_words",
    "strength_of",
]

Setting = Mapping[str, float | str]

# The curvatures compared, as arguments of the learner.
CURVATURES: dict[str, dict[str, Any]] = {
    "none": {"approximation": None},
    "diagonal": {"approximation": "diagonal", "statistics": "running"},
    "kfac-eval": {"approximation": "kfac-expand", "statistics": "running"},
    "kfac-train": {"approximation": "kfac-expand", "statistics": "batch"},
    "xkfac": {"approximation": "xkfac", "statistics": "batch"},
    "xkfac-nested": {"approximation": "xkfac-nested", "statistics": "batch"},
    "xkfac-raw": {"approximation": "xkfac", "statistics": "batch", "coordinates": "raw"},
}


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What determines a run, as far as all experiments have it.

    Attributes
    ----------
    version
        Of ekfac_rs: another version runs anew.
    seed
        Of all that is drawn at random.
    batch_size
        Of training and curvature.
    epochs, lr
        Of training on one task.
    curvature
        A key of `CURVATURES`.
    momentum, weights, step, own, scale, damping, freeze_bn_after
        As in `ekfac_rs.ContinualLearner`.
    device
        That computes.
    """

    version: str = ek.__version__
    seed: int
    batch_size: int
    epochs: int
    momentum: float
    lr: float
    curvature: str = "none"
    weights: str = "kept"
    step: str = "stable"
    own: bool = False
    scale: float | str = 1.0
    damping: float = 0.0
    freeze_bn_after: float = 1.0
    device: str = "cpu"

    @property
    def is_fine_tuning(self) -> bool:
        """Whether nothing is protected: no curvature, no anchor, plain training."""
        return self.curvature == "none" and not self.damping

    @property
    def fits(self) -> int:
        """About how often a task is learnt: halving begins anew until a scale is weak enough."""
        return 6 if self.scale == "halving" else 1

    def measures(self, learner: ek.ContinualLearner) -> dict[str, float]:
        """Return what is known of a learner beside its accuracies: the scale that a rule chose.

        Its mean over the tasks, each at its last step.
        """
        last = [selection.scale[-1] for selection in learner.selection if selection.scale]
        return {"scale": float(np.mean(last))} if isinstance(self.scale, str) and last else {}

    def learner(self, model: nn.Module, **options: Any) -> ek.ContinualLearner:
        """Return a learner that has learnt nothing yet."""
        return ek.ContinualLearner(
            model,
            loss="cross_entropy",
            weights=self.weights,
            step=self.step,
            own=self.own,
            scale=self.scale,
            damping=self.damping,
            momentum=self.momentum,
            freeze_bn_after=self.freeze_bn_after,
            **CURVATURES[self.curvature],
            **options,
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the config in JSON's own types."""
        return config_of(self)


def config_of(run: "DataclassInstance") -> dict[str, Any]:
    """Return what determines a run in JSON's own types."""
    fields = dataclasses.asdict(run)
    # Nothing is said of the usual place: runs made before there was another one are found.
    if fields["device"] == "cpu":
        del fields["device"]
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()
    }


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Size and grid of a comparison; an experiment adds what it has beside.

    Attributes
    ----------
    name
        On the command line; empty for what holds without one.
    methods
        Compared where none are named; empty for all that the experiment has.
    seeds, grid_seed
        Of the final runs; of the grid, none of them.
    frozen_lrs
        Where BatchNorm is frozen, as many: a deep network bears only smaller ones then. Empty for
        those of `lrs`.
    scheduled_lrs
        Where BatchNorm is frozen in the course of a task, as many. Empty for those of `lrs`.
    plain_lrs
        Of fine-tuning. Empty to spread them, from a third of the lowest of `lrs` to three times
        the highest, as many as the others have settings.
    plain_epochs
        Of fine-tuning, which has no penalty to trade one task for another by: the length of
        training and its rate are what it has. Empty for `epochs`.
    rule_lrs
        Where a rule chooses the scale. Empty for the middle one of `lrs`.
    diagonal_scales
        Of the diagonal curvature's penalty, as many. Empty for `scales`.
    l2
        Strengths of the penalty without a curvature.
    damping
        Of the penalties with a curvature.
    crossed
        Leave out settings that differ in more than one axis from the middle of the grid.
    extensions
        How often a method's grid goes on beyond an end of a learning rate or strength where its
        best setting lies there.
    finalists
        Best settings of each method's grid that are tried again on runs as long as the final ones
        before one of them is chosen. 0 to choose from the grid itself.
    device
        That makes the runs; on a GPU one at a time.
    """

    name: str = ""
    methods: tuple[str, ...] = ()
    epochs: int = field(metadata=option(positive, "epochs per task"))
    batch_size: int = field(metadata=option(batch_size, "at least 2, for BN"))
    seeds: tuple[int, ...] = field(metadata=option(natural, "one final run each"))
    lrs: tuple[float, ...] = field(metadata=option(number, "learning rates of the grid"))
    frozen_lrs: tuple[float, ...] = field(
        default=(),
        metadata=option(number, "those with BatchNorm frozen, as many; else as --lrs"),
    )
    scheduled_lrs: tuple[float, ...] = field(
        default=(),
        metadata=option(
            number, "those with BatchNorm frozen in the course of a task, as many; else as --lrs"
        ),
    )
    plain_lrs: tuple[float, ...] = field(
        default=(),
        metadata=option(
            number,
            "those of fine-tuning; else spread, from a third of the lowest to three times the "
            "highest of --lrs",
        ),
    )
    plain_epochs: tuple[int, ...] = field(
        default=(), metadata=option(positive, "numbers of epochs of fine-tuning; else as --epochs")
    )
    rule_lrs: tuple[float, ...] = field(
        default=(),
        metadata=option(
            number, "those where a rule chooses the scale; else the middle one of --lrs"
        ),
    )
    scales: tuple[float | str, ...] = field(
        metadata=option(scale, "scales of the curvature's penalty in the grid")
    )
    diagonal_scales: tuple[float, ...] = field(
        default=(),
        metadata=option(number, "those of the diagonal curvature, as many; else as --scales"),
    )
    l2: tuple[float, ...] = field(
        metadata=option(number, "strengths of the penalty without a curvature in the grid")
    )
    damping: float = field(metadata=option(number, "of the penalties with a curvature"))
    crossed: bool = False
    extensions: int = 0
    finalists: int = field(
        default=0,
        metadata=option(
            natural, "best settings of each method's grid that are tried again at full length"
        ),
    )
    device: str = field(
        default="cpu", metadata=option(device, "cpu, or cuda for an NVIDIA GPU, one run at a time")
    )
    momentum: float = 0.9
    grid_seed: int = 1000

    def changed(self, changes: Mapping[str, Any]) -> Self:
        """Return the preset with other values.

        Where an axis is changed, those that follow it do so, unless they are changed as well.
        """
        freed = {name: () for name, axis in _FOLLOWED.items() if axis in changes}
        return dataclasses.replace(self, **{**freed, **changes})

    def axis(self, name: str) -> Sequence[float | str]:
        """Return the values of one of the fields, as an axis of the grid."""
        values = getattr(self, name)
        if not isinstance(values, tuple):
            return (values,)
        if values:
            return values
        if name == "plain_lrs":
            return self._spread_lrs()
        if name == "rule_lrs":
            return [self.lrs[len(self.lrs) // 2]]
        return self.axis(_FOLLOWED[name])

    def _spread_lrs(self) -> list[float]:
        count = len(grid(lr=self.lrs, scale=self.scales, crossed=self.crossed))
        if count == 1:
            return [self.lrs[0]]
        rates = np.geomspace(min(self.lrs) / 3, max(self.lrs) * 3, count)
        return [float(f"{rate:.2g}") for rate in rates]


# Axis -> the one that it follows where it is empty.
_FOLLOWED = {
    "frozen_lrs": "lrs",
    "scheduled_lrs": "lrs",
    "plain_lrs": "lrs",
    "plain_epochs": "epochs",
    "rule_lrs": "lrs",
    "diagonal_scales": "scales",
}


@dataclass(frozen=True)
class Method:
    """A method of the comparison.

    Attributes
    ----------
    label
        Name in tables and pictures.
    fixed
        What defines it: fields of the run's config.
    axes
        What is tried: fields of the run's config, each with the preset's field that lists its
        values.
    """

    label: str
    fixed: Setting
    axes: Mapping[str, str]

    @property
    def is_penalised(self) -> bool:
        """Whether it holds on to anything: fine-tuning alone does not."""
        return self.fixed.get("curvature", "none") != "none" or "damping" in self.axes

    def settings(self, preset: Preset) -> list[Setting]:
        """Return the settings to try."""
        axes = {name: preset.axis(values) for name, values in self.axes.items()}
        return grid(crossed=preset.crossed, **axes)


def grid(*, crossed: bool = False, **axes: Sequence[float | str]) -> list[Setting]:
    """Return every combination of the values, in the order of the axes.

    `crossed` leaves those out that differ in more than one axis from the middle.
    """
    points = [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]
    if not crossed:
        return list(points)
    middle = {name: values[len(values) // 2] for name, values in axes.items()}
    return [point for point in points if sum(point[name] != middle[name] for name in axes) <= 1]


def edges(setting: Setting, tried: Sequence[Setting]) -> list[str]:
    """Return the axes where a setting lies at an end of what was tried: the best may lie beyond it.

    Zero is a natural end and does not count.
    """
    axes = {name: _numbers_of(name, tried) for name in setting}
    return [
        name
        for name, values in axes.items()
        if len(values) > 1 and setting[name] != 0 and setting[name] in (values[0], values[-1])
    ]


def beyond(setting: Setting, tried: Sequence[Setting]) -> list[Setting]:
    """Return the next settings beyond each end at which a setting lies, as far as it is open."""
    settings = []
    for name in edges(setting, tried):
        values = _numbers_of(name, tried)
        if not all(isinstance(value, float) and value > 0.0 for value in values):
            continue
        if setting[name] == values[0]:
            values.reverse()
        # Grids of 1, 3, 10 go on with 30: steps take turns.
        before = values[-3:-1] if len(values) > 2 else values[-2:]
        value = float(f"{values[-1] * before[1] / before[0]:.1g}")
        settings.append({**setting, name: value})
    return [setting for setting in settings if setting not in tried]


def _numbers_of(axis: str, settings: Sequence[Setting]) -> list[float]:
    """Return the numbers that an axis has in some settings, in order."""
    return sorted({v for setting in settings if not isinstance(v := setting[axis], str)})


def strength_of(setting: Setting) -> float:
    """Return how strong a setting's penalty is: its scale, else its damping; 0 without either.

    What a rule makes of the scale is not known beforehand: that counts as 0, too.
    """
    strength = setting.get("scale", setting.get("damping", 0.0))
    return 0.0 if isinstance(strength, str) else float(strength)


def setting_text(setting: Setting) -> str:
    """Return the setting in words fit for a table."""
    return ", ".join(
        f"{name} {value if isinstance(value, str) else f'{value:g}'}"
        for name, value in setting.items()
    )


def setting_words(setting: Setting) -> list[str]:
    """Return the setting in words fit for a file's name."""
    return [
        value if isinstance(value, str) else f"{axis}{value:g}" for axis, value in setting.items()
    ]
