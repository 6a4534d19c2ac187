"""BatchNorm: merged into the weights before it, put back, and protected during passes."""

import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle
from tqdm import tqdm

from ekfac_rs._tensors import moved, require_count, require_finite
from ekfac_rs.dataflow import removed_afterwards
from ekfac_rs.errors import (
    BatchNormError,
    EmptyLoaderError,
    OptionError,
    UnsupportedLayerError,
)
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


def reparameterize(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    layers: Collection[str] | None = None,
    max_examples: int | None = None,
    progress: bool = False,
) -> None:
    """Put BatchNorm back so that train mode normalises again; the eval-mode function stays.

    One pass of the loader's inputs through the model in eval mode gives the mean ``m`` and
    variance ``v`` of each layer's ``Wm a``. Then ``W <- Wm``, the bias is 0, the running
    statistics are ``(m, v)``, ``gamma <- sqrt(v + eps)`` and ``beta <- m + bm`` (method: section
    4). A BatchNorm that no layer feeds normalises its own input: there gamma also takes up its
    merged scale. The model may be merged already or not.

    Parameters
    ----------
    model : torch.nn.Module
    loader : iterable
        Yields ``(x, ...)`` or ``x``: the next task's inputs. Labels are not looked at.
    layers : collection of str, optional
        Names of the wanted layers. Default: all.
    max_examples : int, optional
        Stop after this many.
    progress : bool
        Show a tqdm bar.

    Raises
    ------
    BatchNormError
        A BatchNorm has no affine parameters or no running statistics.
    EmptyLoaderError
        The loader yields nothing.
    UnsupportedLayerError
        See `ekfac_rs.layers.find_layers`. A failed call leaves the model as it was.
    """
    if max_examples is not None:
        require_count("max_examples", max_examples)
    with as_found(model), torch.no_grad():
        model.eval()
        batches = _inputs(loader, max_examples, device_of(model))
        first = next(batches, None)
        if first is None:
            raise EmptyLoaderError("loader: expected at least one batch, got none")
        found = [
            layer
            for layer in find_layers(model, layers=layers, example=first)
            if layer.batchnorm is not None
        ]
        for layer in found:
            _require_affine(layer)
        merged = _merged(found)
        moments = {layer.name: _Moments() for layer in found}
        handles = [
            layer.batchnorm.register_forward_pre_hook(_recorder(moments[layer.name]))
            for layer in found
        ]
        with removed_afterwards(handles):
            for x in tqdm(
                chain([first], batches), desc="reparameterize", disable=not progress, leave=False
            ):
                model(x)
        for layer in found:
            _put_back(layer, merged[layer.name], moments[layer.name])


def device_of(model: nn.Module) -> torch.device:
    """Device of the model's first parameter, where batches are taken to."""
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


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


@contextmanager
def as_found(model: nn.Module) -> Iterator[None]:
    """Restore train/eval flags, BatchNorm tracking and random states, whatever happens inside."""
    modes = {module: module.training for module in model.modules()}
    tracking = {m: m.track_running_stats for m in modes if isinstance(m, _BatchNorm)}
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    cuda_devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=cuda_devices):
        try:
            yield
        finally:
            for module, training in modes.items():
                module.training = training
            for batchnorm, tracks in tracking.items():
                batchnorm.track_running_stats = tracks
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002


def use_batch_statistics(model: nn.Module) -> list[RemovableHandle]:
    """Put BatchNorms in train mode with their running statistics protected (see `as_found`).

    Returns
    -------
    list of handles
        Of hooks that refuse a mini-batch of one, whose statistics mean nothing; to be removed.
    """
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            module.training = True
            module.track_running_stats = False
            handles.append(module.register_forward_pre_hook(_refuse_one_value(name)))
    return handles


def first_input(batch: Any) -> Any:
    """Return the model's input of a loader's batch: its first item, or the batch itself."""
    return batch[0] if isinstance(batch, tuple | list) and batch else batch


def _refuse_one_value(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def check(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        if x.numel() <= x.shape[1]:
            raise BatchNormError(
                f"layer {name!r}: expected at least 2 values a channel under batch statistics, "
                f"got shape {tuple(x.shape)} (drop_last=True leaves out a short last mini-batch)"
            )

    return check


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


def _put_back(layer: AffineLayer, merged: Tensor, moments: "_Moments") -> None:
    batchnorm = layer.batchnorm
    running_mean, running_var = layer.running_statistics()
    if layer.absorbs_scale:
        # The hooks saw h = W a + b under the weights as they were; those of Wm a follow from it.
        gain = layer.gain(running_var.double())
        bias = layer.bias()
        mean = gain * (moments.mean if bias is None else moments.mean - bias.double())
        variance = gain.square() * moments.variance
        scale: Tensor | float = 1.0
        _set_weights(layer, merged)
    else:
        mean, variance, scale = moments.mean, moments.variance, merged[:, 0].double()
    running_mean.copy_(mean)
    running_var.copy_(variance)
    batchnorm.weight.copy_(scale * (variance + batchnorm.eps).sqrt())
    batchnorm.bias.copy_(scale * mean + merged[:, -1])
    if batchnorm.num_batches_tracked is not None:
        batchnorm.num_batches_tracked.fill_(moments.batches)


def _set_weights(layer: AffineLayer, merged: Tensor) -> None:
    """Write merged weights into the layer; its bias has moved into the BatchNorm."""
    layer.module.weight.copy_(merged[:, :-1].reshape(layer.module.weight.shape))
    bias = layer.bias()
    if bias is not None:
        bias.zero_()


def _require_affine(layer: AffineLayer) -> None:
    layer.running_statistics()
    if not layer.batchnorm.affine:
        raise BatchNormError(
            f"layer {layer.batchnorm_name!r}: expected a BatchNorm with affine parameters, got "
            "affine=False: it cannot normalise and leave the function unchanged"
        )


class _Moments:
    """Mean and population variance of rows over batches, in float64 (Chan et al. 1983)."""

    def __init__(self) -> None:
        self.count = 0
        self.batches = 0
        self.mean = torch.zeros(())
        self.sum_of_squares = torch.zeros(())

    def add(self, rows: Tensor) -> None:
        rows = rows.double()
        count, mean = rows.shape[0], rows.mean(dim=0)
        total = self.count + count
        shift = mean - self.mean if self.count else torch.zeros_like(mean)
        scatter = (rows - mean).square().sum(dim=0)
        if self.count:
            scatter = scatter + self.sum_of_squares
            scatter = scatter + shift.square() * (self.count * count / total)
            mean = self.mean + shift * (count / total)
        self.count, self.mean, self.sum_of_squares = total, mean, scatter
        self.batches += 1

    @property
    def variance(self) -> Tensor:
        return self.sum_of_squares / self.count


def _recorder(moments: _Moments) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
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
