"""Curvature: its blocks, the passes that accumulate them, and the files that keep them."""

from ekfac_rs.curvature.block import Block
from ekfac_rs.curvature.columnwise import ColumnwiseSum
from ekfac_rs.curvature.curvature import Curvature, Signature, compress_curvatures
from ekfac_rs.curvature.diagonal import DiagonalBlock
from ekfac_rs.curvature.eigenbasis import EigenbasisSum
from ekfac_rs.curvature.kronecker import KroneckerSum
from ekfac_rs.curvature.passes import estimate_curvature
from ekfac_rs.curvature.settings import (
    APPROXIMATIONS,
    CORRECTIONS,
    DIAGONAL,
    STATISTICS,
    PassSettings,
)
from ekfac_rs.curvature.spectra import Spectrum, spectrum
from ekfac_rs.curvature.thin import ThinKroneckerSum
from ekfac_rs.curvature.truncated import TruncatedSum

__all__ = [
    "APPROXIMATIONS",
    "CORRECTIONS",
    "DIAGONAL",
    "STATISTICS",
    "Block",
    "ColumnwiseSum",
    "Curvature",
    "DiagonalBlock",
    "EigenbasisSum",
    "KroneckerSum",
    "PassSettings",
    "Signature",
    "Spectrum",
    "ThinKroneckerSum",
    "TruncatedSum",
    "compress_curvatures",
    "estimate_curvature",
    "spectrum",
]
