"""Where a test puts its tensors, and how the core is told of them."""

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ekfac_rs import _core, _tensors

# Set by the plugin that runs the CUDA backend over emulated libraries.
EMULATED = "EKFAC_EMULATED_DEVICE"


@dataclass(frozen=True)
class On:
    """A device: how tensors get there and how they are described to the core."""

    name: str
    put: Callable[[Tensor], Tensor]
    borrow: Callable[[Tensor], _core.Tensor]


def _described_as_cuda(tensor: Tensor) -> _core.Tensor:
    """Describe host memory as that of the first emulated device."""
    address, shape, strides, dtype, _, _, owner = _borrow_as_is(tensor)
    return address, shape, strides, dtype, "cuda:0", 1, owner


_borrow_as_is = _tensors.borrow

CPU = On("cpu", torch.Tensor.clone, _borrow_as_is)
EMULATED_CUDA = On("cuda", torch.Tensor.clone, _described_as_cuda)
CUDA = On("cuda", lambda tensor: tensor.cuda(), _borrow_as_is)


def cuda_or_reason() -> On | str:
    """The CUDA device of this process, or why there is none."""
    if os.environ.get(EMULATED):
        return EMULATED_CUDA
    return CUDA if torch.cuda.is_available() else "torch finds no CUDA device"
