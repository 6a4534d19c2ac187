"""Threads and forked children, for tests of both."""

import multiprocessing
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

import ekfac_rs as ek

# After which a process that has not come back is taken to hang.
SECONDS = 60


@contextmanager
def with_threads(count: int) -> Iterator[None]:
    """Have the core use so many threads for a while."""
    before = ek.num_threads()
    ek.set_num_threads(count)
    try:
        yield
    finally:
        ek.set_num_threads(before)


@contextmanager
def forks_allowed() -> Iterator[None]:
    """Take no notice of Python's own warning of forks where there are threads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def in_child(work: Callable[[], None]) -> None:
    """Run in a forked child; fail if it raises, crashes or does not come back."""
    with forks_allowed():
        child = multiprocessing.get_context("fork").Process(target=work)
        child.start()
    child.join(SECONDS)
    if child.is_alive():
        child.kill()
        child.join()
        pytest.fail(f"the child did not come back within {SECONDS} s")
    assert child.exitcode == 0
