"""The checks of arguments that every entry point shares."""

import math
import sys

import torch
from torch import Tensor

from ekfac_rs.errors import DeviceError, DtypeError, NonFiniteError, OptionError, ShapeError


def require_choice(argument: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise `OptionError` unless ``value`` is one of ``choices``."""
    if value not in choices:
        expected = ", ".join(repr(choice) for choice in choices)
        raise OptionError(f"{argument}: expected one of {expected}, got {value!r}")


def require_count(argument: str, value: object) -> None:
    """Raise `OptionError` unless ``value`` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise OptionError(f"{argument}: expected an integer of at least 1, got {value!r}")


def require_nonnegative(argument: str, value: float) -> None:
    """Raise `OptionError` unless ``value`` is a finite number of at least 0."""
    if not (isinstance(value, int | float) and 0.0 <= value <= sys.float_info.max):
        raise OptionError(f"{argument}: expected a finite number >= 0, got {value!r}")


def require_share(argument: str, value: float) -> None:
    """Raise `OptionError` unless ``value`` is a number above 0 and below 1."""
    if not (isinstance(value, int | float) and 0.0 < value < 1.0):
        raise OptionError(f"{argument}: expected a share above 0 and below 1, got {value!r}")


def require_like(argument: str, tensor: Tensor, shape: tuple[int, ...], reference: Tensor) -> None:
    """Raise unless ``tensor`` has this shape and the dtype and device of ``reference``."""
    if not isinstance(tensor, Tensor):
        raise DtypeError(f"{argument}: expected a tensor, got {type(tensor).__name__}")
    if tuple(tensor.shape) != shape:
        raise ShapeError(f"{argument}: expected shape {shape}, got {tuple(tensor.shape)}")
    if tensor.dtype != reference.dtype:
        raise DtypeError(f"{argument}: expected dtype {reference.dtype}, got {tensor.dtype}")
    if tensor.device != reference.device:
        raise DeviceError(f"{argument}: expected device {reference.device}, got {tensor.device}")


def is_finite(tensor: Tensor) -> bool:
    """Whether ``tensor`` is free of NaN and infinity."""
    # One pass without a temporary; only a sum that overflows needs the second look.
    return math.isfinite(float(tensor.detach().sum())) or bool(torch.isfinite(tensor).all())


def require_finite(argument: str, tensor: Tensor) -> None:
    """Raise `NonFiniteError` if ``tensor`` holds NaN or infinity."""
    if not is_finite(tensor):
        bad = int((~torch.isfinite(tensor)).sum())
        raise NonFiniteError(
            f"{argument}: expected finite values, got {bad} NaN or infinite of {tensor.numel()}"
        )
