"""Other libraries that some tests need, and only `just test-integrations` has."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import pytest


@contextmanager
def importing(*modules: str) -> Iterator[None]:
    """Skip the test, or the module that is being collected, unless these can be imported.

    Their own warnings, at import, are none of ours.
    """
    for module in modules:
        if find_spec(module) is None:
            pytest.skip(
                f"{module} is not installed: just test-integrations", allow_module_level=True
            )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
