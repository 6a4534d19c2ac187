"""Torch tensors as the Rust core sees them."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ekfac_rs import _core
from ekfac_rs.errors import DtypeError, NonFiniteError

_DTYPE_NAMES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}


def is_supported(dtype: torch.dtype) -> bool:
    """Whether the Rust core computes with tensors of this dtype."""
    return dtype in _DTYPE_NAMES


def borrow(tensor: Tensor) -> _core.Tensor:
    """Describe a tensor to the Rust core, which borrows its memory for the length of one call.

    The descriptor holds the tensor, so that even a temporary lives until the call returns.
    """
    if tensor.is_neg():
        tensor = tensor.resolve_neg()  # its memory holds the numbers with the other sign
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
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        # Autograd refuses to keep one for a backward pass.
        tensor = tensor.clone()
    # The other way round, nothing would hold back whoever reads the copy.
    return tensor.to(device, non_blocking=device.type == "cuda")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which sums over a tensor of ``dtype`` are kept (half ones in float32)."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


@torch.no_grad()
def write_all(writes: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copy each value into its tensor: all of them, or none where one fails.

    Parameters
    ----------
    writes : sequence of (target, value)
        Values are rounded to the dtype of their targets.

    Raises
    ------
    NonFiniteError
        A value is NaN or infinite, or becomes so in the dtype of its target.
    """
    rounded = [(target, value.to(target.dtype)) for target, value in writes]
    for target, value in rounded:
        if not bool(torch.isfinite(value).all()):
            raise NonFiniteError(
                f"expected values that {target.dtype} can hold, got NaN or infinity of shape "
                f"{tuple(value.shape)}: nothing was written"
            )
    before = [(target, target.clone()) for target, _ in writes]
    try:
        for target, value in rounded:
            target.copy_(value)
    except BaseException:
        for target, value in before:
            target.copy_(value)
        raise


Kept = Sequence[tuple[Tensor, Tensor]]


def kept(tensors: Iterable[Tensor]) -> Kept:
    """Return tensors, each with a copy of its values, for `put_back`."""
    return [(tensor, tensor.detach().clone()) for tensor in tensors]


@torch.no_grad()
def put_back(before: Kept) -> None:
    """Give tensors the values that they were `kept` with, whatever these are.

    A mask may hold minus infinity, and one that diverged NaN. What has not changed is not written:
    a buffer may have been expanded over memory that it cannot be written to.
    """
    for tensor, values in before:
        if not torch.equal(tensor, values):
            tensor.copy_(values)
