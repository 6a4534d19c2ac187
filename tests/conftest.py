"""Fixtures shared by all tests."""

from collections.abc import Iterator

import pytest
import torch

import ekfac_rs as ek

# The networks here are tiny: more threads would only wait for each other.
torch.set_num_threads(1)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every device the package computes on."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("torch finds no CUDA device")
        info = ek.cuda_info()
        if not info["usable"]:
            pytest.skip(f"ekfac_rs cannot use CUDA: {info['problem']}")
    # Torch would round what goes into convolutions on a GPU to ten bits.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield request.param


# Files that take longest: begun first, they do not run alone at the end.
LONG = (
    *("gpu/test_emulated.py", "experiments/test_finegrained.py", "exactness/test_convolutions.py"),
    *("penalty/test_stable_step.py", "exactness/test_corrections.py", "test_memory.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put long files first; the order within a file stays."""
    items.sort(key=lambda item: not item.path.as_posix().endswith(LONG))


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded source of random numbers on the CPU."""
    return torch.Generator().manual_seed(0)
