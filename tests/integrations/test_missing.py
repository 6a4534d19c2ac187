"""Without the other library each integration says what to install."""

import importlib
import subprocess
import sys

import pytest

import ekfac_rs as ek
from ekfac_rs.integrations.packages import missing

MODULES = [("avalanche", "avalanche-lib"), ("lightning", "lightning")]


@pytest.mark.parametrize(("library", "package"), MODULES)
def test_a_missing_library_is_named_with_what_installs_it(monkeypatch, library, package):
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, f"ekfac_rs.integrations.{library}", raising=False)
    with pytest.raises(ek.errors.MissingPackageError) as caught:
        importlib.import_module(f"ekfac_rs.integrations.{library}")
    assert isinstance(caught.value, ImportError)
    assert caught.value.name.partition(".")[0] == library
    assert f"expected the package {package}" in str(caught.value)
    assert f"pip install 'ekfac-rs[{library}]'" in str(caught.value)


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
