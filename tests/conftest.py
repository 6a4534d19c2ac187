"""Fixtures shared by all tests."""

import pytest
import torch

import ekfac_rs as ek

# The networks here are tiny: more threads would only wait for each other.
torch.set_num_threads(1)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    """Every device the package computes on."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("torch finds no CUDA device")
        info = ek.cuda_info()
        if not info["usable"]:
            pytest.skip(f"ekfac_rs cannot use CUDA: {info['problem']}")
    return request.param


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded source of random numbers on the CPU."""
    return torch.Generator().manual_seed(0)
