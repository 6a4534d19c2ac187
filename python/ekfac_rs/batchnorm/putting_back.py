"""BatchNorm put back under the next task's statistics."""

from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ekfac_rs._checks import require_count
from ekfac_rs._tensors import moved
from ekfac_rs.batchnorm.merging import _merged, _set_weights
from ekfac_rs.batchnorm.statistics import as_found, device_of, first_input
from ekfac_rs.errors import BatchNormError, EmptyLoaderError, OptionError
from ekfac_rs.layers import AffineLayer, find_layers
from ekfac_rs.layers.dataflow import removed_afterwards


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
