"""New statistics for BatchNorms under the same function."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from ekfac_rs._checks import require_choice, require_count
from ekfac_rs._modes import bare_model, own_modes, plain_name
from ekfac_rs._ranks import Ranks, on_all_ranks
from ekfac_rs._tensors import write_all
from ekfac_rs.batchnorm.merging import Writes, moved_into_weights, view_of
from ekfac_rs.batchnorm.statistics import (
    Hook,
    Moments,
    as_found,
    device_of,
    frozen_batchnorms,
    hook_inputs,
    input_of,
)
from ekfac_rs.errors import (
    BatchNormError,
    OptionError,
    ShapeError,
    UnknownLayerError,
    UnsupportedLayerError,
)
from ekfac_rs.layers import AffineLayer, find_layers
from ekfac_rs.layers.base import kind_of
from ekfac_rs.layers.dataflow import removed_afterwards
from ekfac_rs.loading import Loader, Source

WEIGHTS = ("kept", "merged", "first")


@own_modes()
@on_all_ranks
def reparameterize(
    model: nn.Module,
    loader: Source,
    *,
    weights: str = "kept",
    norms: Mapping[str, Tensor] | None = None,
    layers: Collection[str] | None = None,
    max_examples: int | None = None,
    input_fn: Callable[[Any], Any] | None = None,
    progress: bool = False,
    process_group: "dist.ProcessGroup | None" = None,
) -> None:
    """Take new statistics into every BatchNorm; the eval-mode function stays.

    One pass of the loader's inputs in eval mode gives the mean ``m`` and population variance ``v``
    of what each BatchNorm sees. They become its running statistics, and its parameters make up
    for it: ``gamma <- gain sqrt(v + eps)`` and ``beta <- beta + gain (m - mu)``, with the gain
    ``gamma / sigma`` and the mean ``mu`` from before (method: merged weights). On inputs like the
    loader's, train mode then computes the same function as eval mode.

    A BatchNorm that its user keeps in eval mode (see `frozen_batchnorms`) stays as it is, and so
    does one that belongs to no layer with a trainable parameter. Of the others gamma and beta are
    written also where they are not trained, or the function would change.

    Parameters
    ----------
    model : torch.nn.Module
    loader : iterable
        As in `estimate_curvature`, or of inputs alone: those of the next task. Targets are not
        looked at.
    weights : {"kept", "first", "merged"}
        "kept" leaves the weights alone. "first" brings each row of them (and the bias, if there
        is one) back to the norm in ``norms``, and the gain takes the difference: rows before a
        BatchNorm only ever grow in training, and the longer they are, the less a step turns them.
        "merged" moves the whole gain into the layer before, as Lee et al. (2020) do:
        ``W <- Wm``, the bias is 0, ``gamma = sqrt(v + eps)`` and ``beta`` holds the rest. The
        function is the same, training is not: the step of a channel is no longer multiplied by
        ``gain**2``, which was measured to ruin it.
    norms : mapping of str to Tensor, optional
        From `weight_norms`, when the weights were first seen: for "first" alone. Rows of norm 0
        stay.
    layers : collection of str, optional
        Names of the wanted layers. Default: all.
    max_examples : int, optional
        Stop after this many.
    input_fn : callable, optional
        As in `estimate_curvature`.
    progress : bool
        Show a tqdm bar.
    process_group : torch.distributed.ProcessGroup, optional
        Processes with the same model, each with a loader over its own share of the data: all take
        the statistics of the whole. Default: as in `estimate_curvature`.

    Raises
    ------
    DistributedError
        Another process failed, is gone, or has another model.
    BatchNormError
        A BatchNorm lacks its scale, its shift or its running statistics.
    EmptyLoaderError, LabelError, DtypeError
        The loader yields nothing, or something else than expected.
    OptionError
        An unknown option; ``norms`` without "first", or the other way round.
    UnknownLayerError, ShapeError
        ``norms`` lacks a layer, or has others' rows.
    UnsupportedLayerError
        See `ekfac_rs.layers.find_layers`. A failed call leaves the model as it was.
    """
    require_choice("weights", weights, WEIGHTS)
    if (norms is None) == (weights == "first"):
        raise OptionError(
            f"norms: expected them with weights='first' and only then, got weights={weights!r} "
            f"and {'none' if norms is None else 'norms'}"
        )
    if max_examples is not None:
        require_count("max_examples", max_examples)
    ranks = Ranks.of(model, process_group)
    model = bare_model(model)
    frozen = frozen_batchnorms(model)
    with as_found(model), torch.no_grad():
        model.eval()
        source = Loader(loader, device_of(model), input_fn=input_fn)
        found = [
            layer
            for layer in find_layers(
                model, layers=layers, example=source.example(with_targets=False)
            )
            if layer.batchnorm is not None and layer.batchnorm_name not in frozen
        ]
        for layer in found:
            _require_affine(layer)
        moments = {layer.name: Moments() for layer in found}
        handles = [hook_inputs(layer.batchnorm, _recorder(moments[layer.name])) for layer in found]
        with removed_afterwards(handles):
            for inputs in tqdm(
                source.inputs(max_examples),
                desc="reparameterize",
                disable=not progress,
                leave=False,
            ):
                inputs.call(model)
        ranks.require_same("layers", f"{[layer.name for layer in found]}")
        writes: Writes = []
        for layer in found:
            if not moments[layer.name].count:
                raise UnsupportedLayerError(
                    f"layer {layer.batchnorm_name!r}: expected the BatchNorm to be called as a "
                    "module, got its function called on its behalf, whose input nothing sees"
                )
            moments[layer.name] = moments[layer.name].over(ranks)
            if weights == "merged" and layer.absorbs_scale:
                writes += _put_back_merged(layer, moments[layer.name])
            elif norms is not None and layer.absorbs_scale:
                writes += _put_back_rescaled(layer, moments[layer.name], _to_norms(layer, norms))
            else:
                writes += _put_back(layer, moments[layer.name])
        write_all(writes)


@torch.no_grad()
def weight_norms(model: nn.Module) -> dict[str, Tensor]:
    """Norm of each row of every layer's weights, for `reparameterize`.

    Parameters
    ----------
    model : torch.nn.Module

    Returns
    -------
    dict of str to Tensor
        Layer name to a new float64 tensor of shape ``(D,)``; the bias does not count.

    Examples
    --------
    >>> import torch
    >>> from ekfac_rs import weight_norms
    >>> layer = torch.nn.Linear(2, 1)
    >>> layer.weight.data[:] = torch.tensor([[3.0, 4.0]])
    >>> weight_norms(torch.nn.Sequential(layer))
    {'0': tensor([5.], dtype=torch.float64)}
    """
    norms = {}
    for name, module in bare_model(model).named_modules():
        kind = kind_of(module)
        if kind is not None and kind.absorbs_scale and kind.why_unsupported(module) is None:
            norms[plain_name(name)] = _row_norms(kind(plain_name(name), module))
    return norms


def _row_norms(layer: AffineLayer) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(layer.weight().double(), dim=1)
    return norms


def _to_norms(layer: AffineLayer, norms: Mapping[str, Tensor]) -> Tensor:
    """Return the factor that brings each row to its norm, 1 for rows that are zero."""
    if layer.name not in norms:
        raise UnknownLayerError(
            f"norms: expected those of layer {layer.name!r}, got those of {list(norms)}"
        )
    now, wanted = _row_norms(layer), norms[layer.name]
    if wanted.shape != now.shape:
        raise ShapeError(
            f"layer {layer.name!r}: expected norms of shape {tuple(now.shape)}, got "
            f"{tuple(wanted.shape)}"
        )
    wanted = wanted.to(now)
    there = (now > 0.0) & (wanted > 0.0)
    return torch.where(there, wanted / torch.where(there, now, 1.0), 1.0)


def _put_back(layer: AffineLayer, moments: Moments) -> Writes:
    """Statistics and parameters under the same weights."""
    batchnorm = layer.batchnorm
    mean, variance = layer.running_statistics()
    gain = layer.gain(variance.double())
    beta = batchnorm.bias + gain * (moments.mean - mean.double())
    return _batchnorm_of(layer, moments.mean, moments.variance, gain, beta, moments.batches)


def _put_back_rescaled(layer: AffineLayer, moments: Moments, factor: Tensor) -> Writes:
    """Statistics and parameters under weights and bias times a factor for each row."""
    batchnorm, bias = layer.batchnorm, layer.bias()
    mean, variance = layer.running_statistics()
    gain = layer.gain(variance.double())
    beta = batchnorm.bias + gain * (moments.mean - mean.double())
    weight = layer.as_stored(factor[:, None] * layer.weight())
    writes: Writes = [(layer.module.weight, weight)]
    if bias is not None:
        writes.append((bias, factor * bias))
    return writes + _batchnorm_of(
        layer,
        factor * moments.mean,
        factor.square() * moments.variance,
        gain / factor,
        beta,
        moments.batches,
    )


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


def _recorder(moments: Moments) -> Hook:
    def record(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        moments.add(input_of(args, kwargs).transpose(0, 1).flatten(1).T)

    return record
