"""How far the merged weights of many layers are from an anchor, all at once and differentiable."""

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ekfac_rs import _core
from ekfac_rs._tensors import accumulation_dtype, borrow
from ekfac_rs.layers import AffineLayer


class Merging(NamedTuple):
    """A layer merged with its BatchNorm under some statistics, and the anchor of its weights.

    Attributes
    ----------
    layer : AffineLayer
        One that `merges_in_the_core`.
    mean, variance : Tensor of shape (D,)
    anchor : Tensor of shape (D, K)
        K counts the bias column.
    """

    layer: AffineLayer
    mean: Tensor
    variance: Tensor
    anchor: Tensor


def merges_in_the_core(layer: AffineLayer) -> bool:
    """Whether a layer's merged weights are its weights times gains, in the dtype of sums."""
    if layer.batchnorm is None or not layer.absorbs_scale:
        return False
    parts = (layer.module.weight, *_vectors(layer))
    dtype = accumulation_dtype(layer.like.dtype)
    return all(
        part is None or (part.dtype, part.device) == (dtype, layer.like.device) for part in parts
    )


def deviations(layers: Sequence[Merging]) -> tuple[Tensor, ...]:
    """Return ``[Wm bm]`` less the anchor for each layer, of shape (D, K).

    Differentiable once in the layers' and BatchNorms' parameters and in the statistics (method:
    merged weights). A call of the core for each device and dtype, forward and backward, where
    autograd would go through some thirty operations a layer.

    Parameters
    ----------
    layers : sequence of Merging
        Statistics and anchors of a layer's own dtype and device.

    Raises
    ------
    ShapeError, DtypeError, DeviceError
        Statistics or an anchor do not fit their layer.
    """
    if not layers:
        return ()
    parts = [
        (merging.layer.module.weight, *_vectors(merging.layer), merging.mean, merging.variance)
        for merging in layers
    ]
    result: tuple[Tensor, ...] = _Deviations.apply(layers, *chain.from_iterable(parts))
    return result


def _vectors(layer: AffineLayer) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Bias, gamma and beta."""
    return layer.bias(), layer.batchnorm.weight, layer.batchnorm.bias


# Weight, bias, gamma, beta, mean and variance.
_PARTS, _BETA = 6, 3


class _Deviations(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layers: Sequence[Merging], *parts: Tensor | None) -> tuple[Tensor, ...]:
        ctx.layers = [merging.layer for merging in layers]
        # Nothing of the way back depends on the shift.
        ctx.save_for_backward(*(None if n % _PARTS == _BETA else x for n, x in enumerate(parts)))
        ctx.set_materialize_grads(False)
        out = [torch.empty_like(merging.anchor) for merging in layers]
        by_kind: dict[object, list[Any]] = {}
        for (layer, *_, anchor), target, own in zip(layers, out, _of_each(parts), strict=True):
            task = _borrowed(layer, own), _optional(own[_BETA]), borrow(anchor), borrow(target)
            by_kind.setdefault((target.device, target.dtype), []).append(task)
        for tasks in by_kind.values():
            _core.merge(tasks)
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        written: list[list[Tensor | None]] = []
        wanted = _of_each(ctx.needs_input_grad[1:])
        by_kind: dict[object, list[Any]] = {}
        for layer, gradient, own, needs in zip(
            ctx.layers, gradients, _of_each(ctx.saved_tensors), wanted, strict=True
        ):
            written.append([None] * _PARTS)
            if gradient is None or not any(needs):
                continue
            gradient = gradient.contiguous()
            D, K = gradient.shape
            written[-1] = [
                gradient.new_empty(shape) if need else None
                for shape, need in zip([(D, K - 1), *[(D,)] * (_PARTS - 1)], needs, strict=True)
            ]
            task = _borrowed(layer, own), borrow(gradient), list(map(_optional, written[-1]))
            by_kind.setdefault((gradient.device, gradient.dtype), []).append(task)
        for tasks in by_kind.values():
            _core.merge_backward(tasks)
        for layer, gradients_of in zip(ctx.layers, written, strict=True):
            if gradients_of[0] is not None:
                gradients_of[0] = layer.as_stored(gradients_of[0])
        return (None, *chain.from_iterable(written))


def _of_each(parts: Sequence[Any]) -> list[Sequence[Any]]:
    return [parts[start : start + _PARTS] for start in range(0, len(parts), _PARTS)]


def _borrowed(layer: AffineLayer, parts: Sequence[Any]) -> _core.Layer:
    weight, bias, gamma, _, mean, variance = parts
    return (
        borrow(layer.as_matrix(weight).contiguous()),
        _optional(bias),
        _optional(gamma),
        borrow(mean.contiguous()),
        borrow(variance.contiguous()),
        layer.batchnorm.eps,
    )


def _optional(x: Tensor | None) -> _core.Tensor | None:
    return None if x is None else borrow(x.contiguous())
