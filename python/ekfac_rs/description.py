"""Tells what curvature each parameter of a model gets, and what the factors weigh."""

import os
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from ekfac_rs import _core
from ekfac_rs._checks import require_choice
from ekfac_rs._modes import bare_model, own_modes, plain_name
from ekfac_rs._pictures import DrawnSpectrum, figure_of_spectra
from ekfac_rs._tensors import accumulation_dtype
from ekfac_rs.batchnorm import as_found
from ekfac_rs.curvature import (
    APPROXIMATIONS,
    DIAGONAL,
    Block,
    Curvature,
    DiagonalBlock,
    Spectrum,
    spectrum,
)
from ekfac_rs.errors import IncompatibleError, OptionError
from ekfac_rs.layers import COORDINATES, AffineLayer, survey_layers

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class DescribedParameter(NamedTuple):
    """One parameter and its curvature.

    Attributes
    ----------
    name : str
    shape : tuple of int
    trainable : bool
    layer : str or None
        Name of the layer whose block covers it: the key in a `Curvature`.
    block : str
        The block in words, or "none" and why.
    """

    name: str
    shape: tuple[int, ...]
    trainable: bool
    layer: str | None
    block: str


@dataclass(frozen=True)
class Description:
    """What curvature a model gets; print it for a table.

    Attributes
    ----------
    parameters : tuple of DescribedParameter
        In the model's order.
    factor_bytes : dict of str to int
        For each layer, the memory of all its factors: what a pass holds while it accumulates;
        a `Curvature` has at most that.
    approximation : str
    curvature : Curvature or None
        The one given, whose spectra `plot` draws.
    """

    parameters: tuple[DescribedParameter, ...]
    factor_bytes: dict[str, int]
    approximation: str
    curvature: Curvature | None = field(default=None, repr=False)

    def spectra(self) -> dict[str, Spectrum]:
        """Eigenvalues of each layer's block (`ekfac_rs.curvature.spectrum`).

        Raises
        ------
        OptionError
            There is no curvature: give it to `describe`.
        """
        if self.curvature is None:
            raise OptionError(
                "curvature: expected the one whose spectra are wanted, as describe(model, "
                "curvature), got none"
            )
        return {name: spectrum(block) for name, block in self.curvature.items()}

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the spectrum of each layer's block, eigenvalues over their ranks.

        Dashed where they are not exact (see `ekfac_rs.curvature.Spectrum`); from a dotted line on
        there is nothing but rounding.

        Parameters
        ----------
        path : str or os.PathLike
            Of the picture; its suffix tells the format.

        Raises
        ------
        MissingPackageError
            matplotlib is not there: ``pip install 'ekfac-rs[experiments]'``.
        OptionError
            There is no curvature: give it to `describe`.
        """
        self.figure().savefig(path)

    def figure(self) -> "Figure":
        """Return the picture of `plot`, to draw on or to write elsewhere.

        Returns
        -------
        matplotlib.figure.Figure

        Raises
        ------
        MissingPackageError, OptionError
            As `plot`.
        """
        spectra = self.spectra()
        assert self.curvature is not None
        settings, dashed = self.curvature.settings, not all(x.exact for x in spectra.values())
        note = "; dashed: the diagonal in the summed factors' eigenbasis" if dashed else ""
        plural = "s" if len(spectra) > 1 else ""
        return figure_of_spectra(
            [
                DrawnSpectrum(name, *found, _rounding_of(self.curvature[name]))
                for name, found in spectra.items()
            ],
            f"Spectra of {len(spectra)} block{plural}, {settings.kind}{note}",
        )

    @property
    def total_bytes(self) -> int:
        """Memory of all factors."""
        return sum(self.factor_bytes.values())

    def __str__(self) -> str:
        header = ("parameter", "shape", "layer", "block")
        rows = [
            (p.name, "x".join(map(str, p.shape)), p.layer or "-", p.block) for p in self.parameters
        ]
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (header, *rows)
        ]
        total = f"{len(self.factor_bytes)} blocks, {self.total_bytes / 1e6:.1f} MB of factors"
        return "\n".join([*lines, f"{total} ({self.approximation})"])


@own_modes()
def describe(
    model: nn.Module,
    curvature: Curvature | None = None,
    *,
    approximation: str | None = None,
    coordinates: str | None = None,
    example: Any = None,
) -> Description:
    """Tell what curvature each parameter gets: a block, a channel-wise one, or none and why.

    Nothing is refused and nothing is changed; `estimate_curvature` refuses a model with a
    trainable parameter that gets none, unless ``layers`` names the wanted ones.

    Parameters
    ----------
    model : torch.nn.Module
    curvature : Curvature, optional
        Of the model: `Description.plot` then draws the spectra of its blocks.
    approximation, coordinates : str, optional
        As in `estimate_curvature`. Default: the curvature's, or those that `estimate_curvature`
        has.
    example : optional
        An input batch, needed where the model's data flow cannot be traced symbolically, and
        where a BatchNorm follows a Linear on ``[N, T, K]`` with T the Linear's width: without
        one, a Linear before a BatchNorm is taken to be fed matrices ``[N, K]``.

    Returns
    -------
    Description
        With a readable ``str()``.

    Raises
    ------
    OptionError
        Unknown approximation or coordinates, or others than the curvature's.
    IncompatibleError
        The curvature has a layer that the model has not, or one of another shape.
    UnsupportedLayerError
        The data flow cannot be traced, and there is no example.

    Examples
    --------
    >>> from torch import nn
    >>> import ekfac_rs as ek
    >>> print(ek.describe(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.PReLU())))
    parameter  shape    layer  block
    0.weight   8x3x3x3  0      Kronecker 8 x 28, merged with 1
    0.bias     8        0      Kronecker 8 x 28, merged with 1
    1.weight   8        0      Kronecker 8 x 28, merged with 1
    1.bias     8        0      Kronecker 8 x 28, merged with 1
    2.weight   1        -      none: a PReLU has no curvature block
    1 blocks, 0.0 MB of factors (xkfac-nested)
    """
    approximation = _chosen("approximation", approximation, curvature, "xkfac-nested")
    coordinates = _chosen("coordinates", coordinates, curvature, "merged")
    require_choice("approximation", approximation, APPROXIMATIONS)
    require_choice("coordinates", coordinates, COORDINATES)
    model = bare_model(model)
    with as_found(model):
        model.eval()
        layers, reasons = survey_layers(model, coordinates=coordinates, example=example)
    if curvature is not None:
        _require_blocks_of(layers, curvature)
    owners = {id(p): layer for layer in layers for p in layer.parameters(coordinates)}
    parameters = []
    for full_name, parameter in model.named_parameters():
        name = plain_name(full_name)
        layer = owners.get(id(parameter))
        words = (
            f"none: {reasons[name]}"
            if layer is None
            else _in_words(layer, approximation, coordinates)
        )
        if not parameter.requires_grad:
            words += " (frozen)"
        parameters.append(
            DescribedParameter(
                name,
                tuple(parameter.shape),
                parameter.requires_grad,
                None if layer is None else layer.name,
                words,
            )
        )
    return Description(
        tuple(parameters),
        {layer.name: _factor_bytes(layer, approximation, coordinates) for layer in layers},
        approximation,
        curvature,
    )


def _rounding_of(block: Block) -> float:
    """Share of the largest eigenvalue below which others are rounding, but for a diagonal's."""
    return 0.0 if isinstance(block, DiagonalBlock) else torch.finfo(block.dtype).eps


def _chosen(name: str, value: str | None, curvature: Curvature | None, default: str) -> str:
    """Return an option as it was given, or as the curvature has it."""
    if curvature is None:
        return default if value is None else value
    theirs: str = getattr(curvature.settings, name)
    if value not in (None, theirs):
        raise OptionError(f"{name}: expected {theirs!r}, the curvature's, got {value!r}")
    return theirs


def _require_blocks_of(layers: list[AffineLayer], curvature: Curvature) -> None:
    shapes = {layer.name: layer.shape(curvature.settings.coordinates) for layer in layers}
    for name, block in curvature.items():
        if tuple(block.shape) != shapes.get(name):
            there = f"one of shape {shapes[name]}" if name in shapes else "none"
            raise IncompatibleError(
                f"layer {name!r}: expected the model's layer of shape {tuple(block.shape)}, of "
                f"which the curvature has a block, got {there}"
            )


def _in_words(layer: AffineLayer, approximation: str, coordinates: str) -> str:
    words = layer.in_words(coordinates)
    if approximation == DIAGONAL:
        words = "diagonal {} x {}".format(*layer.shape(coordinates))
    if coordinates == "merged" and layer.batchnorm_name not in (None, layer.name):
        words += f", merged with {layer.batchnorm_name}"
    return words


def _factor_bytes(layer: AffineLayer, approximation: str, coordinates: str) -> int:
    itemsize = accumulation_dtype(layer.like.dtype).itemsize
    if approximation == DIAGONAL:
        return prod(layer.shape(coordinates)) * itemsize
    terms = len(_core.strata()[approximation])
    return terms * itemsize * sum(map(prod, layer.factor_shapes(coordinates)))
