"""BatchNorm merged into the weights before it: as a view, and as an export."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ekfac_rs._checks import require_finite
from ekfac_rs.batchnorm.statistics import as_found
from ekfac_rs.errors import UnsupportedLayerError
from ekfac_rs.layers import AffineLayer, LinearLayer, find_layers


class Anchor(dict[str, Tensor]):
    """Weights a penalty is centred on: layer name to a matrix of shape (D, K).

    Attributes
    ----------
    batchnorms : dict of str to str or None
        For each layer the name of the BatchNorm merged into it.
    """

    def __init__(
        self, weights: Mapping[str, Tensor] = {}, batchnorms: Mapping[str, str | None] = {}
    ) -> None:
        super().__init__(weights)
        self.batchnorms = dict(batchnorms)


def merged_weights(
    model: nn.Module, *, layers: Collection[str] | None = None, example: Any = None
) -> Anchor:
    """Weights with every BatchNorm merged into the layer before it, the model left as it is.

    ``Wm = diag(gamma / sigma) W`` and ``bm = beta + gamma (b - mu) / sigma`` with the running
    statistics (Lee et al. 2020, section 3; method: merged weights).

    Parameters
    ----------
    model : torch.nn.Module
    layers : collection of str, optional
        Names of the wanted layers. Default: all.
    example : optional
        An input batch, needed where the model's data flow cannot be traced symbolically, and
        where a BatchNorm follows a Linear on ``[N, T, K]`` with T the Linear's width: without
        one, a Linear before a BatchNorm is taken to be fed matrices ``[N, K]``.

    Returns
    -------
    Anchor
        Layer name to a new tensor of shape ``(D, K)``; K counts the bias column, which every
        layer with a bias or a BatchNorm has.

    Raises
    ------
    UnsupportedLayerError
        See `ekfac_rs.layers.find_layers`.
    BatchNormError
        A BatchNorm has no running statistics.
    NonFiniteError
        A merged weight is NaN or infinite.
    """
    return _merged(_find(model, layers, example))


def raw_weights(
    model: nn.Module, *, layers: Collection[str] | None = None, example: Any = None
) -> Anchor:
    """``[W b]`` of every layer alone, BatchNorms left out of it: the anchor in raw coordinates.

    Parameters, Returns, Raises
        As `merged_weights`.
    """
    found = _find(model, layers, example, "raw")
    weights = {layer.name: layer.raw_weight().detach().clone() for layer in found}
    return Anchor(weights, dict.fromkeys(weights))


def merge_batchnorm(
    model: nn.Module, *, layers: Collection[str] | None = None, example: Any = None
) -> Anchor:
    """Merge every BatchNorm into the layer before it, in place; the eval-mode function stays.

    Afterwards the layer holds ``Wm`` (and a zero bias, if it has one), and the BatchNorm is a
    shift by ``bm``: running mean 0, running variance ``1 - eps``, gamma 1, beta ``bm``. One
    without affine parameters shifts through its running mean instead; one that no layer feeds
    keeps its scale in gamma. The architecture and the keys of ``state_dict`` stay as they were.
    Use `reparameterize` before training goes on.

    Without an example, the model's next forward pass raises `UnsupportedLayerError` if a
    BatchNorm merged into a Linear gets anything but a matrix: it was merged wrongly, and the
    weights must be restored. The hook that checks this goes with that pass.

    Parameters, Returns, Raises
        As `merged_weights`. A failed call leaves the model as it was.
    """
    found = _find(model, layers, example)
    anchor = _merged(found)
    with torch.no_grad():
        for layer in found:
            if layer.batchnorm is not None:
                _install(layer, anchor[layer.name])
    if example is None:
        for layer in found:
            if isinstance(layer, LinearLayer) and layer.batchnorm is not None:
                _FirstInputCheck(layer)
    return anchor


def is_merged(layer: AffineLayer) -> bool:
    """Whether `merge_batchnorm` has left the layer's BatchNorm without anything to normalise."""
    batchnorm = layer.batchnorm
    if batchnorm is None or batchnorm.running_var is None:
        return False
    unit = torch.full_like(batchnorm.running_var, 1.0 - batchnorm.eps)
    if not torch.equal(batchnorm.running_var, unit):
        return False
    if not layer.absorbs_scale:
        return not bool(batchnorm.running_mean.any())
    return batchnorm.weight is None or bool((batchnorm.weight == 1.0).all())


def _find(
    model: nn.Module, layers: Collection[str] | None, example: Any, coordinates: str = "merged"
) -> list[AffineLayer]:
    with as_found(model):
        model.eval()
        return find_layers(model, coordinates=coordinates, layers=layers, example=example)


@torch.no_grad()
def _merged(layers: Iterable[AffineLayer]) -> Anchor:
    weights, batchnorms = {}, {}
    for layer in layers:
        # A detour through float64 costs nothing here and saves a rounding in each layer.
        weight = _in_double(layer).to(layer.module.weight.dtype)
        require_finite(f"layer {layer.name!r}: merged weight", weight)
        weights[layer.name], batchnorms[layer.name] = weight, layer.batchnorm_name
    return Anchor(weights, batchnorms)


def _in_double(layer: AffineLayer) -> Tensor:
    if layer.batchnorm is None:
        return layer.raw_weight().detach().double()
    mean, variance = layer.running_statistics()
    return layer.merged_weight(mean.double(), variance.double()).detach()


def _install(layer: AffineLayer, merged: Tensor) -> None:
    batchnorm, shift = layer.batchnorm, merged[:, -1]
    running_mean, running_var = layer.running_statistics()
    if layer.absorbs_scale:
        _set_weights(layer, merged)
    running_var.fill_(1.0 - batchnorm.eps)
    if batchnorm.affine:
        running_mean.zero_()
        batchnorm.weight.copy_(1.0 if layer.absorbs_scale else merged[:, 0])
        batchnorm.bias.copy_(shift)
    else:
        running_mean.copy_(-shift)


class _FirstInputCheck:
    """A hook that holds the first input of a merged BatchNorm against what was assumed of it.

    A class of its own, so that a model can be copied and pickled before its first pass.
    """

    def __init__(self, layer: AffineLayer) -> None:
        self._layer = layer
        self._handle = layer.batchnorm.register_forward_pre_hook(self)

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        # Other weights may have been loaded since, and then nothing is merged.
        if is_merged(self._layer):
            try:
                self._layer.check_batchnorm_input(args[0])
            except UnsupportedLayerError as error:
                raise UnsupportedLayerError(
                    f"{error}: it was merged wrongly; restore the weights and give "
                    "merge_batchnorm an example="
                ) from None
        self._handle.remove()


def _set_weights(layer: AffineLayer, merged: Tensor) -> None:
    """Write merged weights into the layer; its bias has moved into the BatchNorm."""
    layer.module.weight.copy_(merged[:, :-1].reshape(layer.module.weight.shape))
    bias = layer.bias()
    if bias is not None:
        bias.zero_()
