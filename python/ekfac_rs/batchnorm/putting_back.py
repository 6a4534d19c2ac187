"""BatchNorm put back under the next task's statistics."""

from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ekfac_rs._checks import require_choice, require_count
from ekfac_rs._tensors import moved, write_all
from ekfac_rs.batchnorm.merging import Writes, moved_into_weights, view_of
from ekfac_rs.batchnorm.statistics import (
    Moments,
    as_found,
    device_of,
    first_input,
    frozen_batchnorms,
)
from ekfac_rs.errors import BatchNormError, EmptyLoaderError, OptionError
from ekfac_rs.layers import AffineLayer, find_layers
from ekfac_rs.layers.dataflow import removed_afterwards

WEIGHTS = ("kept", "merged")


def reparameterize(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    weights: str = "kept",
    layers: Collection[str] | None = None,
    max_examples: int | None = None,
    progress: bool = False,
) -> None:
    """Take new statistics into every BatchNorm; the eval-mode function stays.

    One pass of the loader's inputs in eval mode gives the mean ``m`` and variance ``v`` of what
    each BatchNorm sees. They become its running statistics, and its parameters make up for it:
    ``gamma <- gain sqrt(v + eps)`` and ``beta <- beta + gain (m - mu)``, with the gain
    ``gamma / sigma`` and the mean ``mu`` from before (method: section 4). On inputs like the
    loader's, train mode then computes the same function as eval mode.

    A BatchNorm that its user keeps in eval mode (see `frozen_batchnorms`) stays as it is.

    Parameters
    ----------
    model : torch.nn.Module
    loader : iterable
        Yields ``(x, ...)`` or ``x``: the next task's inputs. Labels are not looked at.
    weights : {"kept", "merged"}
        "kept" leaves the weights alone. "merged" also moves the gain into the layer before, as
        Lee et al. (2020) do: ``W <- Wm``, the bias is 0, ``gamma = sqrt(v + eps)`` and ``beta``
        holds the rest. The function is the same, training is not: the step of a channel is no
        longer multiplied by ``gain**2``, which was measured to ruin it.
    layers : collection of str, optional
        Names of the wanted layers. Default: all.
    max_examples : int, optional
        Stop after this many.
    progress : bool
        Show a tqdm bar.

    Raises
    ------
    BatchNormError
        A BatchNorm lacks its scale, its shift or its running statistics.
    EmptyLoaderError
        The loader yields nothing.
    OptionError
        An unknown option.
    UnsupportedLayerError
        See `ekfac_rs.layers.find_layers`. A failed call leaves the model as it was.
    """
    require_choice("weights", weights, WEIGHTS)
    if max_examples is not None:
        require_count("max_examples", max_examples)
    frozen = frozen_batchnorms(model)
    with as_found(model), torch.no_grad():
        model.eval()
        batches = _inputs(loader, max_examples, device_of(model))
        first = next(batches, None)
        if first is None:
            raise EmptyLoaderError("loader: expected at least one batch, got none")
        found = [
            layer
            for layer in find_layers(model, layers=layers, example=first)
            if layer.batchnorm is not None and layer.batchnorm_name not in frozen
        ]
        for layer in found:
            _require_affine(layer)
        moments = {layer.name: Moments() for layer in found}
        handles = [
            layer.batchnorm.register_forward_pre_hook(_recorder(moments[layer.name]))
            for layer in found
        ]
        with removed_afterwards(handles):
            for x in tqdm(
                chain([first], batches), desc="reparameterize", disable=not progress, leave=False
            ):
                model(x)
        writes: Writes = []
        for layer in found:
            if weights == "merged" and layer.absorbs_scale:
                writes += _put_back_merged(layer, moments[layer.name])
            else:
                writes += _put_back(layer, moments[layer.name])
        write_all(writes)


def _put_back(layer: AffineLayer, moments: Moments) -> Writes:
    """Statistics and parameters under the same weights."""
    batchnorm = layer.batchnorm
    mean, variance = layer.running_statistics()
    gain = layer.gain(variance.double())
    beta = batchnorm.bias + gain * (moments.mean - mean.double())
    return _batchnorm_of(layer, moments.mean, moments.variance, gain, beta, moments.batches)


def _put_back_merged(layer: AffineLayer, moments: Moments) -> Writes:
    """Statistics and parameters under merged weights, whose gain is one."""
    [merged] = view_of([layer]).values()
    _, variance = layer.running_statistics()
    # The pass saw h = W a + b under the weights as they were; the moments of Wm a follow.
    gain, bias = layer.gain(variance.double()), layer.bias()
    mean = gain * (moments.mean if bias is None else moments.mean - bias.double())
    beta = mean + merged[:, -1].double()
    return moved_into_weights(layer, merged) + _batchnorm_of(
        layer, mean, gain.square() * moments.variance, torch.ones_like(gain), beta, moments.batches
    )


def _batchnorm_of(
    layer: AffineLayer, mean: Tensor, variance: Tensor, gain: Tensor, beta: Tensor, batches: int
) -> Writes:
    """Give a BatchNorm these statistics, this gain and this shift."""
    batchnorm = layer.batchnorm
    running_mean, running_var = layer.running_statistics()
    writes = [
        (running_mean, mean),
        (running_var, variance),
        (batchnorm.weight, gain * (variance + batchnorm.eps).sqrt()),
        (batchnorm.bias, beta),
    ]
    count = batchnorm.num_batches_tracked
    return writes if count is None else [*writes, (count, torch.full_like(count, batches))]


def _require_affine(layer: AffineLayer) -> None:
    layer.running_statistics()
    missing = [
        words
        for words, parameter in (("scale", layer.batchnorm.weight), ("shift", layer.batchnorm.bias))
        if parameter is None
    ]
    if missing:
        raise BatchNormError(
            f"layer {layer.batchnorm_name!r}: expected a BatchNorm with affine parameters, got one "
            f"without {' and '.join(missing)}: it cannot take new statistics and leave the "
            "function unchanged (in eval mode, within a model in train mode, it keeps its own)"
        )


def _recorder(moments: Moments) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        moments.add(args[0].transpose(0, 1).flatten(1).T)

    return record


def _inputs(
    loader: Iterable[Any], max_examples: int | None, device: torch.device
) -> Iterator[Tensor]:
    seen = 0
    for batch in loader:
        x = first_input(batch)
        if not isinstance(x, Tensor):
            raise OptionError(f"loader: expected tensors or (x, y) pairs, got {type(x).__name__}")
        if max_examples is not None:
            x = x[: max_examples - seen]
        seen += len(x)
        yield moved(x, device)
        if seen == max_examples:
            return
