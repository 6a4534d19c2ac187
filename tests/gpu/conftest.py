"""Fixtures for tests of the CUDA backend."""

import pytest

from gpu.devices import CPU, On, cuda_or_reason


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.cuda)])
def both() -> tuple[On, On]:
    """The CUDA device and the CPU."""
    cuda = cuda_or_reason()
    if isinstance(cuda, str):
        pytest.skip(cuda)
    return cuda, CPU
