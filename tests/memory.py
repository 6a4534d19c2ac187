"""The size of this process."""

import gc
import os
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
