"""What the command line may change, declared beside the fields of a preset that it changes."""

import argparse
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch

from ekfac_rs.scales import SCALES

__all__ = [
    "batch_size",
    "device",
    "fraction",
    "natural",
    "number",
    "option",
    "positive",
    "scale",
]


def option(
    kind: Callable[[str], float | str], text: str, choices: Collection[str] | None = None
) -> Mapping[str, Any]:
    """Return the metadata of a dataclass field that gets an option of its name.

    Parameters
    ----------
    kind
        Makes a value of what is given; a field with a tuple takes several.
    text
        Of ``--help``.
    choices
        The values allowed, if they are few.
    """
    return {"kind": kind, "text": text, "choices": choices}


def natural(text: str) -> int:
    """Read a whole number from 0 on."""
    return _at_least(text, 0)


def positive(text: str) -> int:
    """Read a whole number from 1 on."""
    return _at_least(text, 1)


def batch_size(text: str) -> int:
    """Read a number of examples that BatchNorm has statistics of."""
    return _at_least(text, 2)


def number(text: str) -> float:
    """Read a finite number from 0 on."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number from 0 on, got {text!r}")
    return value


def scale(text: str) -> float | str:
    """Read a finite number from 0 on, or the name of a rule (`ekfac_rs.scales`)."""
    return text if text in SCALES else number(text)


def device(text: str) -> str:
    """Read where to compute: ``cpu``, or an NVIDIA GPU that torch finds."""
    try:
        named = torch.device(text)
    except RuntimeError:
        named = None
    if named is None or named.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:1, got {text!r}")
    there = torch.cuda.device_count()
    if named.type == "cuda" and (named.index or 0) >= there:
        raise argparse.ArgumentTypeError(
            f"expected a device that torch finds, got {text!r}: it finds {there} CUDA "
            f"{'device' if there == 1 else 'devices'}"
        )
    return text


def fraction(text: str) -> float:
    """Read a number above 0 and up to 1."""
    value = number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0 and up to 1, got {text!r}")
    return value


def _at_least(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"expected a whole number from {least} on, got {text!r}")
    return value
