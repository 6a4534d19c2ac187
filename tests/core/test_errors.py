"""Errors of the core and the classes of `ekfac_rs.errors` are one list."""

import re
from pathlib import Path

import pytest

import ekfac_rs as ek
from ekfac_rs import _core, errors

# Python's own: what Ctrl-C raises.
OF_PYTHON = {"KeyboardInterrupt"}


def test_every_kind_of_error_of_the_core_has_a_class_of_its_own():
    classes = _core.error_classes()
    assert len(set(classes)) == len(classes)
    assert set(classes) >= OF_PYTHON
    for name in set(classes) - OF_PYTHON:
        assert name in errors.__all__
        assert issubclass(getattr(errors, name), ek.EkfacError)


def test_every_class_is_raised_by_the_core_or_by_the_package():
    package = Path(errors.__file__).parent
    sources = [path for path in package.rglob("*.py") if path.name != "errors.py"]
    text = "\n".join(path.read_text() for path in sources)
    of_core = set(_core.error_classes())
    for name in set(errors.__all__) - of_core - {"EkfacError"}:
        assert re.search(rf"\b{name}\(", text), f"nothing raises {name}"


def test_a_fault_of_the_core_is_never_taken_for_divergence():
    assert "InternalError" in _core.error_classes()
    assert issubclass(errors.InternalError, RuntimeError)
    assert not issubclass(errors.InternalError, ArithmeticError)
    others = [getattr(errors, name) for name in errors.__all__]
    assert not any(
        issubclass(errors.InternalError, other)
        for other in others
        if other not in (errors.InternalError, errors.EkfacError)
    )


@pytest.mark.parametrize("name", errors.__all__)
def test_classes_are_exported_and_explained(name):
    found = getattr(errors, name)
    assert issubclass(found, ek.EkfacError)
    assert found.__doc__
