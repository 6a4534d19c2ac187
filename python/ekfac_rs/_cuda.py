"""What the Rust core needs of torch on a GPU, and what it found of CUDA.

Nothing here touches the driver at import.
"""

from typing import Any

import torch

from ekfac_rs import _core


def cuda_info() -> dict[str, Any]:
    """Tell what is found of CUDA on this machine; a missing part is told, not raised.

    Returns
    -------
    dict
        "usable": whether tensors on a GPU can be computed on. "problem": why not, or None.
        "driver_version": the CUDA version that the driver supports, or None. "devices": name and
        compute capability of each. "libraries": for libcuda, libcublas, libcusolver and libnvrtc
        whether it was "found", the "file" it was loaded from (a CUDA toolkit on the loader's path
        comes before torch's own copy) and the functions it is "missing".

    Examples
    --------
    >>> import ekfac_rs as ek
    >>> sorted(ek.cuda_info()["libraries"])
    ['libcublas', 'libcuda', 'libcusolver', 'libnvrtc']
    """
    return _core.cuda_info()


def _allocate(size: int, device: int, stream: int) -> int:
    """Address of ``size`` bytes from torch's allocator, for use on this stream."""
    address: int = torch.cuda.caching_allocator_alloc(size, device, stream)
    return address


# What `torch.cuda.caching_allocator_delete` calls. A function in C runs no bytecode, so that Ctrl-C
# cannot strike in the middle of giving memory back; a torch without CUDA does not have it.
_release = getattr(
    torch._C, "_cuda_cudaCachingAllocator_raw_delete", torch.cuda.caching_allocator_delete
)

_core.set_cuda_allocator(_allocate, _release)
