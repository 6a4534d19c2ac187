"""Ctrl-C gets through to Python while the Rust core is at work."""

import os
import signal
import threading
import time

import pytest
import torch

import ekfac_rs as ek


@pytest.mark.skipif(os.name == "nt", reason="signals work otherwise on Windows")
def test_ctrl_c_ends_a_long_computation_early():
    size = 512
    noise = torch.randn(size, size, dtype=torch.float64)
    factor = noise @ noise.T
    # Ill-conditioned on purpose: without an interrupt this goes on for minutes.
    block = ek.KroneckerSum(
        [(factor, factor), (factor.flip(0, 1), factor), (factor, noise.diag().abs().diag())]
    )
    V = torch.randn(size, size, dtype=torch.float64)
    pressed: list[float] = []

    def press() -> None:
        pressed.append(time.perf_counter())
        os.kill(os.getpid(), signal.SIGINT)

    # A test runner's worker may have been told to ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(1.0, press)
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            block.solve(V, damping=1e-9, tolerance=1e-15, max_iterations=10**7)
    finally:
        timer.cancel()
        signal.signal(signal.SIGINT, before)
    assert time.perf_counter() - pressed[0] < 10.0
    # The pool is still good for work.
    assert block.product(V).isfinite().all()
