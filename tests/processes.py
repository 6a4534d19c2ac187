"""Threads, forked children and fresh processes, for tests of them."""

import multiprocessing
import textwrap
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from multiprocessing.connection import Connection

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


def in_fresh_process(script: str) -> str:
    """Run a script where torch has been imported and nothing computed; return what it printed.

    Forked off a process that has done no more than that, which takes seconds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    connection, there = context.Pipe()
    process = context.Process(target=_print_back, args=(textwrap.dedent(script), there))
    process.start()
    there.close()
    if not connection.poll(SECONDS):
        process.kill()
        pytest.fail(f"the script did not come back within {SECONDS} s")
    try:
        error, printed = connection.recv()
    except EOFError:
        process.join()
        pytest.fail(f"the script's process died ({process.exitcode})")
    process.join()
    assert error is None, error
    return printed.strip()


def _print_back(script: str, connection: Connection) -> None:
    warnings.simplefilter("ignore", DeprecationWarning)
    error = None
    with redirect_stdout(StringIO()) as printed:
        try:
            exec(script, {"__name__": "__main__"})
        except BaseException:
            error = traceback.format_exc()
    connection.send((error, printed.getvalue()))
