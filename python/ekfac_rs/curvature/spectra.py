"""The eigenvalues of a block, as far as they are to be had in closed form."""

from typing import NamedTuple

import torch
from torch import Tensor

from ekfac_rs.curvature.block import Block
from ekfac_rs.curvature.columnwise import ColumnwiseSum
from ekfac_rs.curvature.diagonal import DiagonalBlock
from ekfac_rs.curvature.eigenbasis import EigenbasisSum
from ekfac_rs.curvature.kronecker import KroneckerSum
from ekfac_rs.curvature.thin import ThinKroneckerSum
from ekfac_rs.errors import OptionError


class Spectrum(NamedTuple):
    """Eigenvalues of a block.

    Attributes
    ----------
    values : Tensor of shape (D * K,)
        Descending, in float64.
    exact : bool
        Whether they are the block's. Otherwise they are its diagonal in an orthonormal basis: they
        add up to its trace, and the n largest to no more than its n largest eigenvalues do
        (Schur 1923).
    """

    values: Tensor
    exact: bool


def spectrum(block: Block) -> Spectrum:
    """Eigenvalues of a block of any kind.

    Exact for a diagonal, and for one term of Kronecker form or with corrected eigenvalues. Sums of
    several terms have none in closed form: they are seen in the eigenbasis of their summed
    factors, with corrected eigenvalues in that of the largest term.

    Parameters
    ----------
    block : Block

    Returns
    -------
    Spectrum

    Raises
    ------
    OptionError
        A block of a kind of one's own.
    """
    match block:
        case DiagonalBlock():
            values, exact = block.values, True
        case KroneckerSum() | ColumnwiseSum():
            values, exact = EigenbasisSum.near(block).terms[0].values, len(block.terms) == 1
        case EigenbasisSum():
            values, exact = block.in_one_basis().terms[0].values, len(block.terms) == 1
        case ThinKroneckerSum():
            values, exact = block.near().terms[0].values, False
        case _:
            raise OptionError(f"block: expected one of ekfac_rs, got a {type(block).__name__}")
    return Spectrum(torch.sort(values.detach().double().flatten(), descending=True).values, exact)
