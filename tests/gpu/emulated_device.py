"""A pytest plugin: tensors on the CPU go through the CUDA backend, over emulated libraries.

Loaded with ``-p gpu.emulated_device`` in a process that finds the emulator's libraries. Device
memory is host memory there, so a tensor on the CPU may be described to the core as one on
``cuda:0``. What the allocator hands out is filled with NaN: reading it unwritten is seen.
"""

import importlib
import os
import pkgutil

import torch
from torch import Tensor

import ekfac_rs
from ekfac_rs import _core
from gpu.devices import CPU, EMULATED, EMULATED_CUDA

_ALIGNMENT = 256
_taken: dict[int, Tensor] = {}


def _allocate(size: int, device: int, stream: int) -> int:
    memory = torch.full((size + _ALIGNMENT,), 0xFF, dtype=torch.uint8)
    address = -(-memory.data_ptr() // _ALIGNMENT) * _ALIGNMENT
    _taken[address] = memory
    return address


def _release(address: int) -> None:
    del _taken[address]


def allocated() -> int:
    """Number of pieces of device memory that were not given back."""
    return len(_taken)


def use() -> None:
    """Send every tensor of this process through the CUDA backend."""
    os.environ[EMULATED] = "1"
    _core.set_cuda_allocator(_allocate, _release)
    sent_there = set()
    for found in pkgutil.walk_packages(ekfac_rs.__path__, "ekfac_rs."):
        if found.name.endswith("_core") or "experiments" in found.name:
            continue
        module = importlib.import_module(found.name)
        if getattr(module, "borrow", None) is CPU.borrow:
            module.borrow = EMULATED_CUDA.borrow
        if getattr(module, "borrow", None) is EMULATED_CUDA.borrow:
            sent_there.add(found.name.removeprefix("ekfac_rs."))
    # Or all that follows would pass on the CPU, and show nothing.
    assert {"curvature.kronecker", "layers.base", "penalty"} <= sent_there


def pytest_configure() -> None:
    """Pytest's call to a plugin."""
    use()
