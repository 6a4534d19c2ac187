import os
from pathlib import Path

import pytest

from ekfac_rs.data import find_mnist

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def mnist_folder():
    """A folder with the whole of MNIST, where there is one."""
    for folder in filter(None, (os.environ.get("EKFAC_DATA"), ROOT.parent / "shared" / "data")):
        if find_mnist(folder) is not None:
            return Path(folder)
    pytest.skip("needs the whole of MNIST: set EKFAC_DATA to a folder with its IDX files")
