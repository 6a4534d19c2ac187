"""Files of factors.

Symmetric factors are stored as they are, as triangles, or as half-precision correlations.
"""

import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ekfac_rs import _files
from ekfac_rs._checks import require_choice
from ekfac_rs.errors import FileFormatError

_FORMAT = 2
_WHAT = "a curvature written by save()"

STORAGES = ("full", "triangle", "half")

_TRIANGLE, _CORRELATIONS, _DIAGONAL = "/triangle", "/correlations", "/diagonal"


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    storage: str,
) -> None:
    """Write tensors and metadata; see `Curvature.save`."""
    require_choice("storage", storage, STORAGES)
    packed: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        symmetric = key.endswith((".A", ".G"))
        packed |= pack(key, tensor, storage if symmetric else "full")
    _files.write(path, packed, metadata, _FORMAT)


def read(
    path: str | os.PathLike[str], device: torch.device | str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the metadata that `write` wrote.

    Raises
    ------
    FileFormatError
        The file is truncated, corrupted, of another format or not one of ours.
    FileNotFoundError
        There is no such file.
    """
    tensors, metadata = _files.read(path, device, range(_FORMAT, _FORMAT + 1), _WHAT)
    try:
        return unpack(tensors), metadata
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise FileFormatError(f"{path}: expected {_WHAT}, got: {error}") from error


def pack(key: str, factor: Tensor, storage: str) -> dict[str, Tensor]:
    """Tensors to store for a symmetric positive semi-definite factor.

    Parameters
    ----------
    key : str
    factor : Tensor of shape (n, n) or (groups, n, n)
    storage : {"full", "triangle", "half"}
        "triangle" keeps the lower triangle: half the bytes, no loss. "half" keeps the diagonal as
        it is and the correlations ``F_ij / sqrt(F_ii F_jj)`` below it in float16: a quarter of
        the bytes of float32, every entry right to ``2**-11 sqrt(F_ii F_jj)``.

    Returns
    -------
    dict of str to Tensor
        Keys start with ``key``.
    """
    if storage == "full":
        return {key: factor.contiguous()}
    n = factor.shape[-1]
    if storage == "triangle":
        return {key + _TRIANGLE: factor[..., _mask(n, 0, factor.device)]}
    diagonal = factor.diagonal(dim1=-2, dim2=-1)
    scale = _inverse_root(diagonal)
    correlations = factor * scale[..., :, None] * scale[..., None, :]
    return {
        key + _DIAGONAL: diagonal.contiguous(),
        key + _CORRELATIONS: correlations[..., _mask(n, -1, factor.device)].half(),
    }


def unpack(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under their plain keys, whatever storage they were packed for.

    Raises
    ------
    KeyError, ValueError
        Something is missing or of another size.
    """
    plain = {}
    for key, tensor in tensors.items():
        name, slash, _ = key.partition("/")
        if key.endswith(_TRIANGLE):
            plain[name] = _mirrored(tensor, _order(tensor.shape[-1]), 0)
        elif key.endswith(_CORRELATIONS):
            diagonal = tensors[name + _DIAGONAL]
            root = diagonal.clamp_min(0.0).sqrt()
            factor = _mirrored(tensor.to(diagonal.dtype), diagonal.shape[-1], -1)
            factor *= root[..., :, None] * root[..., None, :]
            plain[name] = factor + torch.diag_embed(diagonal)
        elif not slash:
            plain[name] = tensor
    return plain


def _mask(n: int, offset: int, device: torch.device) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool, device=device).tril_(offset)


def _inverse_root(diagonal: Tensor) -> Tensor:
    # A coordinate that is never seen has a zero row, which stays zero.
    return torch.where(diagonal > 0.0, diagonal, torch.ones_like(diagonal)).rsqrt()


def _order(entries: int) -> int:
    """Order of the matrix whose lower triangle has this many entries."""
    n = (math.isqrt(8 * entries + 1) - 1) // 2
    if n * (n + 1) // 2 != entries:
        raise ValueError(f"expected a triangle, got {entries} entries")
    return n


def _mirrored(lower: Tensor, n: int, offset: int) -> Tensor:
    factor = lower.new_zeros(*lower.shape[:-1], n, n)
    factor[..., _mask(n, offset, lower.device)] = lower
    return factor + factor.tril(-1).mT
