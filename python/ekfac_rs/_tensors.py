"""Torch tensors as the Rust core sees them, and the checks every entry point shares."""

import math

import torch
from torch import Tensor

from ekfac_rs import _core
from ekfac_rs.errors import DeviceError, DtypeError, NonFiniteError, OptionError, ShapeError

_DTYPE_NAMES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}


def borrow(tensor: Tensor) -> _core.Tensor:
    """Describe a tensor to the Rust core, which borrows its memory for the length of one call.

    The descriptor holds the tensor, so that even a temporary lives until the call returns.
    """
    dtype = _DTYPE_NAMES.get(tensor.dtype)
    if dtype is None:
        expected = ", ".join(_DTYPE_NAMES.values())
        raise DtypeError(f"expected a tensor of dtype {expected}, got {tensor.dtype}")
    if tensor.is_cuda:
        device = f"cuda:{tensor.get_device()}"
        stream = torch.cuda.current_stream(tensor.device).cuda_stream
    else:
        device, stream = str(tensor.device), 0
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), dtype, device, stream, tensor


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on a device; a GPU's host does not wait for a copy from pinned memory."""
    # The other way round, nothing would hold back whoever reads the copy.
    return tensor.to(device, non_blocking=device.type == "cuda")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which sums over a tensor of ``dtype`` are kept (half ones in float32)."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


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
    if not (isinstance(value, int | float) and 0.0 <= value < float("inf")):
        raise OptionError(f"{argument}: expected a finite number >= 0, got {value!r}")


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
