"""Images sorted into folders by class, in a directory or a tar archive, and loaders of them."""

import hashlib
import os
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from os import PathLike
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from ekfac_rs.errors import FileFormatError, OptionError
from ekfac_rs.experiments.data.tensors import TensorLoader

__all__ = ["ImageLoader", "ImageSet", "ImageTree", "stratified_rows"]

# Name of a split -> names its folder may have.
_SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val"),
    "test": ("test", "testing"),
}
_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images of one size, with their classes.

    Attributes
    ----------
    images
        ``uint8 [n, 3, size, size]``, red, green and blue.
    labels
        ``int64 [n]``, indices into `classes`.
    classes
        Names, sorted: the order of torchvision's ``ImageFolder``.
    """

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def digest(self) -> str:
        """Return a short fingerprint (hexadecimal) of all images, labels and classes."""
        fingerprint = hashlib.sha256("\0".join(self.classes).encode())
        for array in (self.images, self.labels):
            fingerprint.update(np.ascontiguousarray(array).data)
        return fingerprint.hexdigest()[:16]

    def split(self, share: float, seed: int) -> tuple["ImageSet", "ImageSet"]:
        """Hold out a share of every class.

        Returns
        -------
        tuple of ImageSet
            The rest, and what is held out: always the same for the same `seed`.
        """
        chosen = np.zeros(len(self), dtype=bool)
        chosen[stratified_rows(self.labels, round(share * len(self)), seed)] = True
        return self._rows(~chosen), self._rows(chosen)

    def part(self, count: int, seed: int = 0) -> "ImageSet":
        """Take so many images, or all if there are fewer, every class in proportion."""
        return self._rows(np.sort(stratified_rows(self.labels, count, seed)))

    def of_classes(self, chosen: Sequence[int]) -> "ImageSet":
        """Take the images of some classes, given by their indices: these count from 0 then."""
        rows = np.isin(self.labels, chosen)
        labels = np.zeros(len(self.classes), np.int64)
        labels[list(chosen)] = np.arange(len(chosen))
        classes = tuple(self.classes[number] for number in chosen)
        return ImageSet(self.images[rows], labels[self.labels[rows]], classes)

    def _rows(self, rows: npt.NDArray[np.bool_] | npt.NDArray[np.int64]) -> "ImageSet":
        return ImageSet(self.images[rows], self.labels[rows], self.classes)


class ImageTree:
    """A directory or a tar archive with a folder of images for each class.

    Folders of classes lie in folders of splits (``train``, ``validation`` or ``val``, ``test``),
    or directly at the top. In an archive, one folder around all of that is ignored. Other files
    and hidden ones are not looked at.

    Parameters
    ----------
    path
        The directory or archive.

    Raises
    ------
    OptionError
        If `path` does not exist or holds no images in folders.
    FileFormatError
        If it is a file, but no tar archive.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise OptionError(f"{self.path}: expected a directory or a tar archive of images")
        files = _files_of_directory(self.path) if self.path.is_dir() else self._files_of_archive()
        self._splits = _sorted_into_splits(file for file in files if _is_image(file))
        if not self._splits:
            raise OptionError(f"{self.path}: no images in folders by class")

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits, of ``train``, ``validation``, ``test``; none if there are none."""
        return tuple(name for name in _SPLIT_FOLDERS if name in self._splits)

    def read(
        self,
        split: str | None,
        image_size: int,
        *,
        crop: float = 1.0,
        max_images: int | None = None,
        seed: int = 0,
        progress: bool = False,
    ) -> ImageSet:
        """Decode and resize the images of one split.

        Parameters
        ----------
        split
            One of `splits`; None where classes lie at the top.
        image_size
            Height and width of the result.
        crop
            The shorter side is resized (bilinear, antialiased) to ``image_size / crop`` and the
            central square kept: 1 keeps all of it, 0.875 is torchvision's usual evaluation.
        max_images
            Read no more than this, every class in proportion.
        seed
            Decides which.
        progress
            Show a tqdm bar.

        Raises
        ------
        OptionError
            If there is no such split.
        FileFormatError
            If an image is damaged; the message names it.
        """
        if split not in self._splits:
            raise OptionError(
                f"{self.path}: expected a split {split!r}, got {', '.join(self.splits) or 'none'}"
            )
        files = self._splits[split]
        # The class is the first folder, as in ImageFolder, however deep the image lies in it.
        names = [_parts_within(file, split)[0] for file in files]
        classes = sorted(set(names))
        labels = np.searchsorted(classes, names).astype(np.int64)
        if max_images is not None and max_images < len(files):
            rows = np.sort(stratified_rows(labels, max_images, seed))
            files, labels = [files[row] for row in rows], labels[rows]
        images = np.empty((len(files), 3, image_size, image_size), np.uint8)
        contents = zip(images, files, self._contents(files), strict=True)
        bar = tqdm(contents, f"{self.path.name} {split or ''}", len(files), disable=not progress)
        for image, file, content in bar:
            try:
                image[:] = _decoded(content, image_size, crop)
            except (OSError, SyntaxError, ValueError) as error:
                raise FileFormatError(f"{self.path}: {file}: damaged image ({error})") from error
        return ImageSet(images, labels, tuple(classes))

    def _files_of_archive(self) -> list[PurePosixPath]:
        try:
            with tarfile.open(self.path) as archive:
                members = {PurePosixPath(m.name): m for m in archive if m.isfile()}
        except tarfile.TarError as error:
            raise FileFormatError(f"{self.path}: not a tar archive ({error})") from error
        tops = {file.parts[0] for file in members}
        # A single folder of images is a class, and one named like a split is a split.
        wrapped = len(tops) == 1 and any(len(file.parts) > 2 for file in members)
        wrapped = wrapped and not tops & _ALL_SPLIT_FOLDERS
        around = PurePosixPath(*tops) if wrapped else PurePosixPath()
        self._members = {file.relative_to(around): m for file, m in members.items()}
        return sorted(self._members)

    def _contents(self, files: Sequence[PurePosixPath]) -> Iterator[bytes]:
        if self.path.is_dir():
            yield from ((self.path / file).read_bytes() for file in files)
            return
        try:
            with tarfile.open(self.path) as archive:
                for file in files:
                    content = archive.extractfile(self._members[file])
                    assert content is not None  # regular files alone are listed
                    yield content.read()
        except (tarfile.TarError, EOFError) as error:
            raise FileFormatError(f"{self.path}: damaged tar archive ({error})") from error


class ImageLoader:
    """Mini-batches of standardised images, shifted and mirrored at random if wanted.

    Re-iterable: every iteration is one epoch.

    Parameters
    ----------
    images
        The images.
    mean, std
        Of each colour, on the scale 0 to 1: inputs are ``(pixel / 255 - mean) / std``.
    batch_size
        Examples per mini-batch; the last one may be smaller, but is left out if it is a single
        example, of which BatchNorm has no statistics.
    shuffle
        Draw a new order for each epoch.
    augment
        Mirror each image with probability one half, and shift it by up to an eighth of its size
        in both directions, its border repeated.
    generator
        Source of orders and augmentation; torch's global one by default.
    """

    def __init__(
        self,
        images: ImageSet,
        mean: Sequence[float],
        std: Sequence[float],
        batch_size: int,
        *,
        shuffle: bool = False,
        augment: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        x, y = torch.from_numpy(images.images), torch.from_numpy(images.labels)
        single = len(images) > 1 and len(images) % batch_size == 1
        self._batches = TensorLoader(x, y, batch_size, shuffle, generator, drop_last=single)
        self._mean = 255.0 * torch.tensor(mean).view(3, 1, 1)
        self._std = 255.0 * torch.tensor(std).view(3, 1, 1)
        self._augment = augment
        self._generator = generator

    def __len__(self) -> int:
        """Return the number of mini-batches in an epoch."""
        return len(self._batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the mini-batches ``(x, y)`` of one epoch: ``float32 [n, 3, size, size]``, int64."""
        for pixels, y in self._batches:
            x = pixels.float()
            if self._augment:
                x = _augmented(x, self._generator)
            yield x.sub_(self._mean).div_(self._std), y


def stratified_rows(labels: npt.NDArray[np.int64], count: int, seed: int) -> npt.NDArray[np.int64]:
    """Choose `count` rows at random, from every class in proportion to its size.

    Returns
    -------
    numpy.ndarray
        ``int64 [count]``; the rows for a smaller `count` are the first of those for a larger one.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    sizes = np.bincount(labels)
    starts = np.cumsum(sizes) - sizes
    of_class = labels[by_class]
    # How far into its class each row comes, from 0 to 1.
    position = np.empty(len(labels))
    position[by_class] = (np.arange(len(labels)) - starts[of_class] + 0.5) / sizes[of_class]
    return order[np.argsort(position[order], kind="stable")][:count]


def _augmented(x: Tensor, generator: torch.Generator | None) -> Tensor:
    count, size = len(x), x.shape[-1]
    reach = size // 8
    mirrored = torch.rand(count, generator=generator) < 0.5
    x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
    shifts = torch.randint(0, 2 * reach + 1, (2, count, 1), generator=generator)
    rows, columns = shifts + torch.arange(size)
    padded = F.pad(x, (reach,) * 4, mode="replicate")
    channels = torch.arange(x.shape[1])[None, :, None, None]
    images = torch.arange(count)[:, None, None, None]
    return padded[images, channels, rows[:, None, :, None], columns[:, None, None, :]]


def _decoded(content: bytes, image_size: int, crop: float) -> npt.NDArray[np.uint8]:
    """Return ``uint8 [3, image_size, image_size]``."""
    with Image.open(BytesIO(content)) as opened:
        image = opened.convert("RGB")
    shorter = round(image_size / crop)
    scale = shorter / min(image.size)
    width, height = (round(scale * side) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - image_size) // 2, (height - image_size) // 2
    square = image.crop((left, top, left + image_size, top + image_size))
    return np.asarray(square).transpose(2, 0, 1)


_ALL_SPLIT_FOLDERS = {folder for folders in _SPLIT_FOLDERS.values() for folder in folders}


def _files_of_directory(path: Path) -> list[PurePosixPath]:
    return sorted(
        PurePosixPath(Path(folder, name).relative_to(path).as_posix())
        for folder, _, names in os.walk(path, followlinks=True)
        for name in names
    )


def _is_image(file: PurePosixPath) -> bool:
    return file.suffix.lower() in _SUFFIXES and not file.name.startswith(".")


def _sorted_into_splits(
    files: Iterator[PurePosixPath],
) -> dict[str | None, list[PurePosixPath]]:
    """Return the images of each split; those of no split only where there are no splits."""
    split_of = {folder: split for split, folders in _SPLIT_FOLDERS.items() for folder in folders}
    found: dict[str | None, list[PurePosixPath]] = defaultdict(list)
    for file in files:
        split = split_of.get(file.parts[0])
        if len(_parts_within(file, split)) > 1:
            found[split].append(file)
    if len(found) > 1:
        found.pop(None, None)
    return dict(found)


def _parts_within(file: PurePosixPath, split: str | None) -> tuple[str, ...]:
    return file.parts if split is None else file.parts[1:]
