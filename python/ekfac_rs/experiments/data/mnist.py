"""MNIST: the whole of it from IDX files, or the small stratified subset shipped in the package."""

import hashlib
import os
import zipfile
from dataclasses import dataclass
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ekfac_rs.errors import FileFormatError, OptionError
from ekfac_rs.experiments.data.idx import read_idx
from ekfac_rs.experiments.data.locate import DATA_VARIABLE

__all__ = ["Mnist", "find_mnist", "load_mnist", "load_mnist_subset"]

SUBSET_FILE = "mnist_subset.npz"

_FILES = {
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}
# The folder itself, a collection of datasets, and the layout of torchvision's download.
_SUBFOLDERS = (".", "mnist", "MNIST/raw")


@dataclass(frozen=True)
class Mnist:
    """Images and labels of MNIST or of a part of it.

    Attributes
    ----------
    name
        ``"mnist"`` or ``"mnist-subset"``.
    train_images, test_images
        ``uint8 [n, 28, 28]``, 0 (background) to 255.
    train_labels, test_labels
        ``uint8 [n]``, 0 to 9.

    Raises
    ------
    FileFormatError
        If shapes, element types or labels are not those of MNIST.
    """

    name: str
    train_images: npt.NDArray[np.uint8]
    train_labels: npt.NDArray[np.uint8]
    test_images: npt.NDArray[np.uint8]
    test_labels: npt.NDArray[np.uint8]

    def __post_init__(self) -> None:
        for split in ("train", "test"):
            images = getattr(self, f"{split}_images")
            labels = getattr(self, f"{split}_labels")
            _check_split(f"{self.name}, {split}", images, labels)

    def digest(self) -> str:
        """Return a short fingerprint (hexadecimal) of all images and labels."""
        fingerprint = hashlib.sha256()
        for field in _FILES:
            fingerprint.update(np.ascontiguousarray(getattr(self, field)).data)
        return fingerprint.hexdigest()[:16]


def load_mnist_subset() -> Mnist:
    """Load the embedded subset: 10,000 training and 2,000 test images, stratified by class.

    Returns
    -------
    Mnist
        Named ``"mnist-subset"``; images drawn from MNIST's own training and test sets.

    Raises
    ------
    FileFormatError
        If the embedded file is damaged.
    """
    with resources.as_file(resources.files("ekfac_rs.experiments.data") / SUBSET_FILE) as path:
        try:
            with np.load(path) as arrays:
                return Mnist("mnist-subset", **{field: arrays[field] for field in _FILES})
        except (KeyError, ValueError, zipfile.BadZipFile) as error:
            raise FileFormatError(f"{path}: damaged ({error})") from error


def load_mnist(data_dir: str | PathLike[str] | None = None) -> Mnist:
    """Load the whole of MNIST.

    Looked up in this order: `data_dir`; the folder named by the environment variable
    ``EKFAC_DATA``; an earlier download; a new download by torchvision. A folder holds the four
    IDX files, ``.gz`` or not, itself or in its subfolder ``mnist``.

    Parameters
    ----------
    data_dir
        Folder to look in, and then only there.

    Returns
    -------
    Mnist
        60,000 training and 10,000 test images.

    Raises
    ------
    OptionError
        If the named folder has no MNIST, or nothing was named and the download is impossible.
    FileFormatError
        If a file is damaged.
    """
    named = data_dir if data_dir is not None else os.environ.get(DATA_VARIABLE) or None
    if named is not None:
        files = find_mnist(named)
        if files is None:
            origin = "data_dir" if data_dir is not None else DATA_VARIABLE
            raise OptionError(
                f"{origin}: no MNIST in {os.fspath(named)!r}; "
                f"expected {', '.join(_FILES.values())} (.gz or not) "
                f"there or in a subfolder {' or '.join(_SUBFOLDERS[1:])}"
            )
    else:
        files = find_mnist(_download_folder()) or _download()
    return Mnist("mnist", **{field: read_idx(path) for field, path in files.items()})


def find_mnist(folder: str | PathLike[str]) -> dict[str, Path] | None:
    """Find the four IDX files of MNIST in `folder` or in the usual subfolders of it.

    Returns
    -------
    dict of str to Path, or None
        Path by name (``train_images``, ``train_labels``, ``test_images``, ``test_labels``);
        None unless all four are in one folder.
    """
    for subfolder in _SUBFOLDERS:
        files = {
            field: path
            for field, name in _FILES.items()
            for path in (Path(folder, subfolder, name + ".gz"), Path(folder, subfolder, name))
            if path.is_file()
        }
        if len(files) == len(_FILES):
            return files
    return None


def _check_split(where: str, images: npt.NDArray[Any], labels: npt.NDArray[Any]) -> None:
    if images.dtype != np.uint8 or images.ndim != 3 or images.shape[1:] != (28, 28):
        raise FileFormatError(
            f"{where}: images must be uint8 [n, 28, 28], got {images.dtype} {list(images.shape)}"
        )
    if labels.dtype != np.uint8 or labels.shape != images.shape[:1]:
        raise FileFormatError(
            f"{where}: labels must be uint8 [{len(images)}], "
            f"got {labels.dtype} {list(labels.shape)}"
        )
    if labels.size == 0 or labels.max() > 9:
        raise FileFormatError(f"{where}: labels must be digits 0 to 9, at least one of them")


def _download_folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "ekfac_rs"


def _download() -> dict[str, Path]:
    advice = f"give a folder with the IDX files by --data-dir or {DATA_VARIABLE}"
    try:
        from torchvision.datasets import MNIST
    except ImportError as error:
        raise OptionError(
            f"data_dir: no MNIST given, and torchvision, which would download it, "
            f"is not installed; {advice}"
        ) from error
    folder = _download_folder()
    try:
        MNIST(str(folder), download=True)
    except (OSError, RuntimeError) as error:
        raise OptionError(
            f"data_dir: no MNIST given, and its download failed ({error}); {advice}"
        ) from error
    files = find_mnist(folder)
    if files is None:
        raise FileFormatError(f"{folder}: torchvision's download left no IDX files; {advice}")
    return files
