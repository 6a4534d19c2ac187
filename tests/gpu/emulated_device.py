"""A pytest plugin: tensors on the CPU go through the CUDA backend, over emulated libraries.

Loaded with ``-p gpu.emulated_device`` in a process that finds the emulator's libraries. Device
memory is host memory there, so a tensor on the CPU may be described to the core as one on
``cuda:0``. What the allocator hands out is filled with NaN: reading it unwritten is seen.
"""

import ctypes
import importlib
import os
import pkgutil
import zlib
from collections import Counter

import pytest
import torch
from torch import Tensor

import ekfac_rs
from ekfac_rs import _core
from gpu.devices import CPU, EMULATED, EMULATED_CUDA

_ALIGNMENT = 256
# Of a test of computations that has more cases than this, a quarter is made: they are told apart by
# what is computed, and the tests of this folder by how.
_MANY_CASES = 16
_taken: dict[int, Tensor] = {}
_bytes = {"now": 0, "most": 0}


def _allocate(size: int, device: int, stream: int) -> int:
    memory = torch.full((size + _ALIGNMENT,), 0xFF, dtype=torch.uint8)
    address = -(-memory.data_ptr() // _ALIGNMENT) * _ALIGNMENT
    _taken[address] = memory
    _bytes["now"] += size
    _bytes["most"] = max(_bytes["most"], _bytes["now"])
    return address


def _release(address: int) -> None:
    _bytes["now"] -= len(_taken.pop(address)) - _ALIGNMENT


def allocated() -> int:
    """Number of pieces of device memory that were not given back."""
    return len(_taken)


def calls(library: str, function: str) -> int:
    """How often this process has called a function of an emulated library."""
    counter = ctypes.CDLL(f"lib{library}.so").emulator_calls
    counter.argtypes, counter.restype = [ctypes.c_char_p], ctypes.c_long
    return counter(function.encode())


def flops(rounded_to: str) -> float:
    """Operations of this process's products whose operands are rounded to this type."""
    return _asked(rounded_to)


def bytes_of_products() -> float:
    """Bytes of operands and results of this process's products, once where a stack shares them."""
    return _asked("bytes")


def _asked(what: str) -> float:
    counter = ctypes.CDLL("libcublas.so").emulator_asked
    counter.argtypes, counter.restype = [ctypes.c_char_p], ctypes.c_double
    return counter(what.encode())


def most_allocated() -> int:
    """The most bytes of device memory that were taken at a time, since `forget_the_most`."""
    return _bytes["most"]


def forget_the_most() -> None:
    """Begin anew with `most_allocated`."""
    _bytes["most"] = _bytes["now"]


def use() -> None:
    """Send every tensor of this process through the CUDA backend."""
    os.environ[EMULATED] = "1"
    _core.set_cuda_allocator(_allocate, _release)
    sent_there = set()
    for found in pkgutil.walk_packages(ekfac_rs.__path__, "ekfac_rs."):
        # Experiments and guests compute nothing themselves, and a guest's library may be missing.
        if {"_core", "experiments", "integrations"} & set(found.name.split(".")):
            continue
        module = importlib.import_module(found.name)
        if getattr(module, "borrow", None) is CPU.borrow:
            module.borrow = EMULATED_CUDA.borrow
        if getattr(module, "borrow", None) is EMULATED_CUDA.borrow:
            sent_there.add(found.name.removeprefix("ekfac_rs."))
    # Or all that follows would pass on the CPU, and show nothing.
    assert {"curvature.kronecker", "layers.base", "_operators"} <= sent_there


def pytest_configure() -> None:
    """Pytest's call to a plugin."""
    use()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Pytest's call to a plugin."""
    cases = Counter(_test_of(item) for item in items)
    spared = [
        item
        for item in items
        if cases[_test_of(item)] > _MANY_CASES
        and item.path.parent.name != "gpu"
        # By name, as if drawn: every fourth in a row might always be of the same kind.
        and zlib.crc32(item.name.encode()) % 4
    ]
    config.hook.pytest_deselected(items=spared)
    left_out = set(spared)
    items[:] = [item for item in items if item not in left_out]


def _test_of(item: pytest.Item) -> str:
    return item.nodeid.partition("[")[0]
