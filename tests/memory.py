"""The size of this process."""

import gc
import os
from collections.abc import Callable
from pathlib import Path

import pytest

_SIZES = Path("/proc/self/statm")

needs_proc = pytest.mark.skipif(
    not _SIZES.exists(), reason="the size of a process is read in /proc"
)


def resident() -> int:
    """Bytes of this process that are in memory, after collecting garbage."""
    gc.collect()
    return int(_SIZES.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_above(work: Callable[[], object]) -> int:
    """Bytes by which this process grows at most during some work."""
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    work()
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(line for line in status if line.startswith("VmHWM"))
    return 1024 * int(peak.split()[1]) - before
