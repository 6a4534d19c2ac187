import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ekfac_rs.experiments.data import find_mnist

ROOT = Path(__file__).resolve().parents[2]


def data_folders() -> Iterator[Path]:
    """Folders that may hold the data which are not in the repository."""
    for folder in filter(None, (os.environ.get("EKFAC_DATA"), ROOT.parent / "shared" / "data")):
        yield Path(folder)


@pytest.fixture(scope="session")
def mnist_folder():
    """A folder with the whole of MNIST, where there is one."""
    for folder in data_folders():
        if find_mnist(folder) is not None:
            return folder
    pytest.skip("needs the whole of MNIST: set EKFAC_DATA to a folder with its IDX files")


@pytest.fixture(scope="session")
def data_file():
    """Find a file among the data that are not in the repository, or skip."""

    def find(name):
        for folder in data_folders():
            if (folder / name).exists():
                return folder / name
        return pytest.skip(f"needs {name}: set EKFAC_DATA to the folder that holds it")

    return find


@pytest.fixture(scope="session")
def write_images():
    """Write folders of generated images: of each class a shade of its own, with noise."""

    def write(folder, counts, size=(16, 16), suffix=".png"):
        """`counts` maps a folder such as "train/a" to a number of images."""
        generator = np.random.default_rng(0)
        classes = sorted({Path(name).name for name in counts})
        for name, count in counts.items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            shade = 255 * (classes.index(Path(name).name) + 1) / (len(classes) + 1)
            shape = (count, size[1], size[0], 3)
            pixels = np.clip(generator.normal(shade, 30, shape), 0, 255).astype(np.uint8)
            for i, image in enumerate(pixels):
                Image.fromarray(image).save(folder / name / f"{i:03}{suffix}")
        return folder

    return write
