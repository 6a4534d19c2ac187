"""BatchNorm merged into the weights before it: as a view, and as an export for deployment."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ekfac_rs._checks import require_finite
from ekfac_rs._modes import bare_model, own_modes
from ekfac_rs._tensors import accumulation_dtype, write_all
from ekfac_rs.batchnorm.statistics import as_found, hook_inputs, input_of
from ekfac_rs.errors import BatchNormError, UnsupportedLayerError
from ekfac_rs.layers import AffineLayer, find_layers


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


@own_modes()
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
        Names of the wanted layers. Default: all with a trainable parameter.
    example : optional
        An input batch, needed where the model's data flow cannot be traced symbolically, and
        where a BatchNorm follows a Linear on ``[N, T, K]`` with T the Linear's width: without
        one, a Linear before a BatchNorm is taken to be fed matrices ``[N, K]``.

    Returns
    -------
    Anchor
        Layer name to a new tensor of shape ``(D, K)``; K counts the bias column, which every
        layer with a bias or a BatchNorm has. Of a layer of half precision it is float32.

    Raises
    ------
    UnsupportedLayerError
        See `ekfac_rs.layers.find_layers`.
    BatchNormError
        A BatchNorm has no running statistics.
    NonFiniteError
        A merged weight is NaN or infinite.
    """
    return view_of(_find(model, layers, example))


@own_modes()
def raw_weights(
    model: nn.Module, *, layers: Collection[str] | None = None, example: Any = None
) -> Anchor:
    """``[W b]`` of every layer alone, BatchNorms left out of it: the anchor in raw coordinates.

    Arguments, what is returned and errors are as in `merged_weights`.
    """
    found = _find(model, layers, example, "raw")
    weights = {}
    for layer in found:
        dtype = accumulation_dtype(layer.like.dtype)
        weights[layer.name] = layer.raw_weight().detach().to(dtype, copy=True)
    return Anchor(weights, dict.fromkeys(weights))


@own_modes()
def merge_batchnorm(
    model: nn.Module, *, layers: Collection[str] | None = None, example: Any = None
) -> None:
    """Export a trained model for deployment: every BatchNorm moves into the layer before it.

    In place, frozen layers too, and the eval-mode function stays: the layer holds ``Wm`` (and a
    zero bias, if it has one), and the BatchNorm is a shift by ``bm``: running mean 0, running
    variance ``1 - eps``, gamma 1, beta ``bm``. One without a beta shifts through its running mean
    instead; one that no layer feeds keeps its scale. The architecture and the keys of
    ``state_dict`` stay as they were.

    Training does not go on from here: the BatchNorms would normalise without giving the scale
    back. A pass with one of them in train mode raises `BatchNormError`, until other weights are
    loaded or `reparameterize` has put them back. Penalties and anchors need no export: see
    `merged_weights`.

    Without an example, a pass also raises `UnsupportedLayerError` where a BatchNorm merged into a
    Linear gets anything but a matrix: it was merged wrongly, and the weights must be restored.

    Arguments and errors are as in `merged_weights`. A failed call leaves the model as it was.
    """
    found = [
        layer
        for layer in _find(model, layers, example, trainable=False)
        if layer.batchnorm is not None
    ]
    merged = view_of(found)
    write_all([write for layer in found for write in _exported(layer, merged[layer.name])])
    for layer in found:
        _guard(layer, check_input=example is None)


def is_exported(layer: AffineLayer) -> bool:
    """Whether the layer's BatchNorm looks as `merge_batchnorm` leaves it: it normalises nothing."""
    batchnorm = layer.batchnorm
    if batchnorm is None or batchnorm.running_var is None:
        return False
    unit = torch.full_like(batchnorm.running_var, 1.0 - batchnorm.eps)
    if not torch.equal(batchnorm.running_var, unit):
        return False
    if not layer.absorbs_scale:
        return batchnorm.bias is None or not bool(batchnorm.running_mean.any())
    return batchnorm.weight is None or bool((batchnorm.weight == 1.0).all())


@torch.no_grad()
def view_of(layers: Iterable[AffineLayer]) -> Anchor:
    """Return the merged weights of these layers under their running statistics."""
    weights, batchnorms = {}, {}
    for layer in layers:
        weight = merged_weight_of(layer)
        require_finite(f"layer {layer.name!r}: merged weight", weight)
        weights[layer.name], batchnorms[layer.name] = weight, layer.batchnorm_name
    return Anchor(weights, batchnorms)


def _find(
    model: nn.Module,
    layers: Collection[str] | None,
    example: Any,
    coordinates: str = "merged",
    trainable: bool = True,
) -> list[AffineLayer]:
    model = bare_model(model)
    with as_found(model):
        model.eval()
        return find_layers(
            model, coordinates=coordinates, layers=layers, example=example, trainable=trainable
        )


@torch.no_grad()
def merged_weight_of(layer: AffineLayer) -> Tensor:
    """``[Wm bm]`` under running statistics; float32 where the layer is of half precision."""
    dtype = accumulation_dtype(layer.like.dtype)
    if layer.batchnorm is None:
        return layer.raw_weight().to(dtype, copy=True)
    # A detour through float64 costs nothing here and saves a rounding in each layer.
    mean, variance = layer.running_statistics()
    return layer.merged_weight(mean.double(), variance.double()).to(dtype)


Writes = list[tuple[Tensor, Tensor]]


def _exported(layer: AffineLayer, merged: Tensor) -> Writes:
    """Tensors of the layer and its BatchNorm, and what an export holds in them."""
    batchnorm, scale, shift = layer.batchnorm, merged[:, 0], merged[:, -1]
    running_mean, running_var = layer.running_statistics()
    unit = torch.full_like(running_var, 1.0 - batchnorm.eps)
    writes: Writes = []
    if layer.absorbs_scale:
        writes = [*moved_into_weights(layer, merged), (running_var, unit)]
        if batchnorm.weight is not None:
            writes.append((batchnorm.weight, torch.ones_like(shift)))
        if batchnorm.bias is None:
            return [*writes, (running_mean, -shift)]
    elif batchnorm.weight is not None:
        writes = [(running_var, unit), (batchnorm.weight, scale)]
    if batchnorm.bias is not None:
        writes += [(running_mean, torch.zeros_like(shift)), (batchnorm.bias, shift)]
    return writes


def moved_into_weights(layer: AffineLayer, merged: Tensor) -> Writes:
    """Give the layer its merged weights; its bias moves into the BatchNorm."""
    weight, bias = layer.module.weight, layer.bias()
    writes = [(weight, layer.as_stored(merged[:, :-1]))]
    return writes if bias is None else [*writes, (bias, torch.zeros_like(bias))]


def _guard(layer: AffineLayer, check_input: bool) -> None:
    """Let the exported BatchNorm refuse to be trained, in place of an earlier export's guard."""
    hooks = layer.batchnorm._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if isinstance(hook, _ExportGuard)]:
        del hooks[key]
    hook_inputs(layer.batchnorm, _ExportGuard(layer, check_input))


class _ExportGuard:
    """A hook on an exported BatchNorm that refuses to train it.

    A class of its own, so that a model can be copied and pickled with it.

    Parameters
    ----------
    layer : AffineLayer
    check_input : bool
        Also hold its input against what was assumed of it without an example.
    """

    def __init__(self, layer: AffineLayer, check_input: bool) -> None:
        self._layer = layer
        self._check_input = check_input
        mean, variance = layer.running_statistics()
        self._statistics = mean.clone(), variance.clone()

    observes_only = True

    def __call__(
        self, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]
    ) -> None:
        if not self._is_still_exported(module):
            return
        if self._check_input:
            self._require_assumed_input(input_of(args, kwargs))
        if module.training:
            raise BatchNormError(
                f"layer {self._layer.batchnorm_name!r}: expected eval mode after merge_batchnorm, "
                "got a pass in train mode: the export is for deployment; load the weights from "
                "before it, or call reparameterize, to train on"
            )

    def _is_still_exported(self, module: nn.Module) -> bool:
        """Whether no other weights were loaded and no statistics taken since."""
        now = module.running_mean, module.running_var
        return all(
            isinstance(new, Tensor) and torch.equal(new, old.to(new.device, new.dtype))
            for new, old in zip(now, self._statistics, strict=True)
        )

    def _require_assumed_input(self, x: Tensor) -> None:
        try:
            self._layer.check_batchnorm_input(x)
        except UnsupportedLayerError as error:
            raise UnsupportedLayerError(
                f"{error}: it was merged wrongly; restore the weights and give "
                "merge_batchnorm an example="
            ) from None
