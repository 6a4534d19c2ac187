"""Without the other library each integration says what to install."""

import pytest

import ekfac_rs as ek
from ekfac_rs._packages import missing
from processes import in_fresh_process

MODULES = [("avalanche", "avalanche-lib"), ("lightning", "lightning")]


WITHOUT = """
import importlib, sys
sys.modules[{library!r}] = None     # as if it were not there
from ekfac_rs.errors import MissingPackageError
try:
    importlib.import_module("ekfac_rs.integrations.{library}")
except MissingPackageError as error:
    print(error.name, error)
"""


@pytest.mark.parametrize(("library", "package"), MODULES)
def test_a_missing_library_is_named_with_what_installs_it(library, package):
    # A process of its own: in this one the library may have been imported.
    printed = in_fresh_process(WITHOUT.format(library=library))
    assert printed.startswith(library)
    assert f"expected the package {package}, " in printed
    assert f"pip install 'ekfac-rs[{library}]'" in printed


def test_the_error_is_an_import_error_too():
    assert issubclass(ek.errors.MissingPackageError, ImportError)


@pytest.mark.parametrize("name", ["quadprog", "lightningrod", None])
def test_a_library_that_is_there_and_fails_says_so_itself(name):
    error = ImportError("broken", name=name)
    assert missing(error, "lightning", "lightning", "lightning") is error


def test_a_submodule_that_an_old_version_lacks_is_a_missing_package():
    error = ImportError("no pytorch in it", name="lightning.pytorch")
    assert isinstance(
        missing(error, "lightning", "lightning", "lightning"), ek.errors.MissingPackageError
    )


def test_the_package_imports_neither():
    in_fresh_process(
        "import sys, ekfac_rs.integrations; "
        "assert not {'avalanche', 'lightning'} & set(sys.modules)"
    )
