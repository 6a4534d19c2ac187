"""Tells what curvature each parameter of a model gets, and what the factors weigh."""

from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

from torch import nn

from ekfac_rs import _core
from ekfac_rs._checks import require_choice
from ekfac_rs._modes import bare_model, own_modes, plain_name
from ekfac_rs._tensors import accumulation_dtype
from ekfac_rs.batchnorm import as_found
from ekfac_rs.curvature import APPROXIMATIONS, DIAGONAL
from ekfac_rs.layers import AffineLayer, survey_layers


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
    """

    parameters: tuple[DescribedParameter, ...]
    factor_bytes: dict[str, int]
    approximation: str

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
    *,
    approximation: str = "xkfac-nested",
    coordinates: str = "merged",
    example: Any = None,
) -> Description:
    """Tell what curvature each parameter gets: a block, a channel-wise one, or none and why.

    Nothing is refused and nothing is changed; `estimate_curvature` refuses a model with a
    trainable parameter that gets none, unless ``layers`` names the wanted ones.

    Parameters
    ----------
    model : torch.nn.Module
    approximation, coordinates : str
        As in `estimate_curvature`.
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
        Unknown approximation or coordinates.
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
    require_choice("approximation", approximation, APPROXIMATIONS)
    model = bare_model(model)
    with as_found(model):
        model.eval()
        layers, reasons = survey_layers(model, coordinates=coordinates, example=example)
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
