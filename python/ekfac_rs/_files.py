"""Safetensors files with JSON metadata and a checksum, replaced only when complete.

Nothing in them is ever executed: tensors, numbers and words.
"""

import errno
import glob
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ekfac_rs.errors import FileFormatError

_KEY, _CHECKSUM = "ekfac_rs", "sha256"


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    format_version: int,
) -> None:
    """Write tensors and metadata beside the file, and put that in its place when it is whole.

    Parameters
    ----------
    path : str or os.PathLike
    tensors : mapping of str to Tensor
    metadata : mapping
        In JSON's own types.
    format_version : int

    Raises
    ------
    FileNotFoundError
        The directory does not exist.
    OSError
        There is no room, or it cannot be written; the file that was there stays.
    """
    target = Path(path)
    require_folder(target)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    apart = _apart(tensors)
    # That there is a checksum is said where it counts, for it not to be lost unnoticed.
    text = json.dumps({"format": format_version, "checksum": _CHECKSUM, **metadata})
    header = {_KEY: text, _CHECKSUM: fingerprint(apart, text)}
    try:
        save_file(apart, partial, metadata=header)
        _reach_the_disk(partial)
        os.replace(partial, target)
    except SafetensorError as error:
        raise OSError(f"{path}: expected to write {len(apart)} tensors, got: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def require_folder(path: str | os.PathLike[str]) -> None:
    """Raise `FileNotFoundError` unless there is a directory for the file."""
    folder = Path(path).parent
    if not folder.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such directory", str(folder))


def remove_partial(path: str | os.PathLike[str]) -> None:
    """Remove what writers of a file left that were killed; none may be at work."""
    target = Path(path)
    for partial in target.parent.glob(f".{glob.escape(target.name)}.*.partial"):
        partial.unlink(missing_ok=True)


def read(
    path: str | os.PathLike[str], device: torch.device | str, formats: range, what: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write` wrote.

    Parameters
    ----------
    path : str or os.PathLike
    device : torch.device or str
    formats : range of int
        Versions that are known here.
    what : str
        The file is expected to be, for errors.

    Raises
    ------
    FileFormatError
        The file is truncated, corrupted, of a newer format or not one of ours.
    FileNotFoundError
        There is no such file.
    """
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            header = file.metadata() or {}
            metadata = json.loads(header[_KEY])
            found, checked = metadata.pop("format"), metadata.pop("checksum", None)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError, OSError) as error:
        raise FileFormatError(f"{path}: expected {what}, got: {error}") from error
    if found not in formats:
        newer = isinstance(found, int) and found >= formats.stop
        raise FileFormatError(
            f"{path}: expected {what}, of format {formats.stop - 1}, got format {found!r}"
            f"{', which is for a newer ekfac_rs' if newer else ''}"
        )
    # Files from before there were checksums have none.
    has_checksum = checked is not None or _CHECKSUM in header
    if has_checksum and header.get(_CHECKSUM) != fingerprint(tensors, header[_KEY]):
        raise FileFormatError(f"{path}: expected {what}, got values that are not those written")
    return tensors, metadata


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors that share memory with one before, and those with gaps."""
    apart: dict[str, Tensor] = {}
    seen = set()
    for key, tensor in tensors.items():
        shared = tensor.untyped_storage().data_ptr() in seen
        seen.add(tensor.untyped_storage().data_ptr())
        apart[key] = tensor.detach().clone() if shared else tensor.detach()
        apart[key] = apart[key].contiguous()
    return apart


def fingerprint(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """Return the SHA-256 of tensors under their names, and of a text."""
    digest = hashlib.sha256(text.encode())
    for key in sorted(tensors):
        tensor = tensors[key].detach()
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _reach_the_disk(path: Path) -> None:
    """Wait for a file's contents: a name must not be there before them after a crash."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
