"""Reader of IDX files, the format MNIST and its relatives are distributed in."""

import gzip
import math
import struct
import zlib
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ekfac_rs.errors import FileFormatError

__all__ = ["read_idx"]

# Third byte of the magic number -> element type; everything is big-endian on disk.
_ELEMENT_TYPES: dict[int, np.dtype[Any]] = {
    0x08: np.dtype(">u1"),
    0x09: np.dtype(">i1"),
    0x0B: np.dtype(">i2"),
    0x0C: np.dtype(">i4"),
    0x0D: np.dtype(">f4"),
    0x0E: np.dtype(">f8"),
}
_GZIP_MAGIC = b"\x1f\x8b"


def read_idx(path: str | PathLike[str]) -> npt.NDArray[Any]:
    """Read one IDX file, gzip-compressed or not.

    Compression is recognised by content, not by name. The file has to hold exactly the
    announced number of elements.

    Parameters
    ----------
    path
        The file.

    Returns
    -------
    numpy.ndarray
        The array in native byte order, shape and element type as the header says
        (``uint8 [n, 28, 28]`` for MNIST's images, ``uint8 [n]`` for its labels).

    Raises
    ------
    FileFormatError
        If the file is truncated, longer than announced, not IDX or not intact gzip.
    FileNotFoundError
        If there is no such file.

    References
    ----------
    Y. LeCun, C. Cortes, C. Burges, "The MNIST database of handwritten digits", section
    "The IDX file format".
    """
    path = Path(path)
    content = _decompressed(path)
    if len(content) < 4:
        raise FileFormatError(f"{path}: truncated, {len(content)} bytes are no IDX header")
    zeros, type_code, dimensions = struct.unpack_from(">HBB", content)
    if zeros != 0 or type_code not in _ELEMENT_TYPES or dimensions == 0:
        raise FileFormatError(
            f"{path}: not an IDX file, the magic number is 0x{content[:4].hex()} "
            "(expected 0x0000, an element type 0x08 to 0x0e and at least one dimension)"
        )
    start = 4 + 4 * dimensions
    if len(content) < start:
        raise FileFormatError(f"{path}: truncated within the {dimensions} sizes of its header")
    shape = struct.unpack_from(f">{dimensions}I", content, 4)
    element_type = _ELEMENT_TYPES[type_code]
    expected = start + math.prod(shape) * element_type.itemsize
    if len(content) != expected:
        problem = "truncated" if len(content) < expected else "too long"
        raise FileFormatError(
            f"{path}: {problem}, shape {shape} needs {expected} bytes, the file has {len(content)}"
        )
    elements: npt.NDArray[Any] = np.frombuffer(content, element_type, offset=start)
    return elements.reshape(shape).astype(element_type.newbyteorder("="))


def _decompressed(path: Path) -> bytes:
    content = path.read_bytes()
    if not content.startswith(_GZIP_MAGIC):
        return content
    try:
        return gzip.decompress(content)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise FileFormatError(f"{path}: damaged gzip file ({error})") from error
