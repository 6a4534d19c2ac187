"""Without the other library each integration says what to install."""

import subprocess
import sys

import pytest

import ekfac_rs as ek
from ekfac_rs._packages import missing

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
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(library=library)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(library)
    assert f"expected the package {package}, " in done.stdout
    assert f"pip install 'ekfac-rs[{library}]'" in done.stdout


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
    code = (
        "import sys, ekfac_rs.integrations; "
        "assert not {'avalanche', 'lightning'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
