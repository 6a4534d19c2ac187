"""What experiments vary: curvatures by name, and grids of settings."""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

__all__ = ["CURVATURES", "Setting", "grid", "setting_words"]

Setting = dict[str, float | str]

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


def grid(**axes: Sequence[float | str]) -> list[Setting]:
    """Return every combination of the values, in the order of the axes."""
    return [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]


def setting_words(setting: Mapping[str, float | str]) -> list[str]:
    """Return the setting in words fit for a file's name."""
    return [
        value if isinstance(value, str) else f"{axis}{value:g}" for axis, value in setting.items()
    ]
