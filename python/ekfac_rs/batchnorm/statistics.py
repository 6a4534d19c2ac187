"""The statistics of BatchNorms: taken over a loader, used and protected during passes."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from ekfac_rs._modes import plain_name
from ekfac_rs._tensors import Kept, kept, put_back
from ekfac_rs.errors import BatchNormError


def device_of(model: nn.Module) -> torch.device:
    """Device of the model's first parameter, where batches are taken to."""
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


_passing: ContextVar[bool] = ContextVar("passing", default=False)


def in_own_pass() -> bool:
    """Whether a forward pass going on is the library's, as for a curvature, and not its user's."""
    return _passing.get()


@contextmanager
def as_found(model: nn.Module) -> Iterator[None]:
    """Restore train/eval flags, BatchNorm tracking and random states, whatever happens inside."""
    outer = _passing.set(True)
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
            _passing.reset(outer)


def frozen_batchnorms(model: nn.Module) -> tuple[str, ...]:
    """Names of the BatchNorms that their user keeps in eval mode.

    In a model in train mode those are all that are in eval mode themselves. A model in eval mode
    as a whole says nothing about them (it may just have been evaluated): there it is those whose
    parameters are all frozen, too.
    """

    def is_frozen(batchnorm: _BatchNorm) -> bool:
        if batchnorm.training:
            return False
        trainable = [p.requires_grad for p in batchnorm.parameters(recurse=False)]
        return model.training or (bool(trainable) and not any(trainable))

    return tuple(
        plain_name(name)
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and is_frozen(module)
    )


def use_batch_statistics(model: nn.Module, frozen: tuple[str, ...]) -> list[RemovableHandle]:
    """Put BatchNorms in train mode with their running statistics protected (see `as_found`).

    Parameters
    ----------
    model : torch.nn.Module
    frozen : tuple of str
        Names of those that stay as they are, from `frozen_batchnorms`.

    Returns
    -------
    list of handles
        Of hooks that refuse a mini-batch of one, whose statistics mean nothing; to be removed.
    """
    handles = []
    for name, module in model.named_modules():
        plain = plain_name(name)
        if isinstance(module, _BatchNorm) and plain not in frozen:
            module.training = True
            module.track_running_stats = False
            handles.append(hook_inputs(module, _refuse_one_value(plain)))
    return handles


Hook = Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor]], None]


def hook_inputs(batchnorm: nn.Module, hook: Hook) -> RemovableHandle:
    """Let a hook see what a BatchNorm is called with, by position or by keyword."""
    return batchnorm.register_forward_pre_hook(hook, with_kwargs=True)


def input_of(args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> Tensor:
    """Return the input that a BatchNorm is called with."""
    return args[0] if args else kwargs["input"]


@contextmanager
def restored_on_failure(model: nn.Module) -> Iterator[None]:
    """Put every BatchNorm's parameters and statistics back if anything inside fails."""
    before = kept_batchnorms(model)
    try:
        yield
    except BaseException:
        put_back(before)
        raise


def kept_batchnorms(model: nn.Module) -> Kept:
    """Parameters and statistics of every BatchNorm, each with a copy, for `put_back`."""
    return kept(
        tensor
        for module in model.modules()
        if isinstance(module, _BatchNorm)
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    )


def _refuse_one_value(name: str) -> Hook:
    def check(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        x = input_of(args, kwargs)
        if x.numel() <= x.shape[1]:
            raise BatchNormError(
                f"layer {name!r}: expected at least 2 values a channel under batch statistics, "
                f"got shape {tuple(x.shape)} (drop_last=True leaves out a short last mini-batch)"
            )

    return check


class Moments:
    """Mean and population variance of rows over batches, in float64 (Chan et al. 1983)."""

    def __init__(self) -> None:
        self.count = 0
        self.batches = 0
        self.mean = torch.zeros(())
        self.sum_of_squares = torch.zeros(())

    def add(self, rows: Tensor) -> None:
        """Take the rows ``[n, C]`` of one more batch."""
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
        """Population variance of all rows, ``[C]``."""
        return self.sum_of_squares / self.count


def moments_of(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance, each ``[C]``, of a BatchNorm's input ``[N, C, ...]``.

    Differentiable once.
    """
    mean, variance = _MomentsOf.apply(values)
    return mean, variance


class _MomentsOf(torch.autograd.Function):
    """On a CPU `torch.var_mean` takes ten times as long, more than the rest of a penalty."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> tuple[Tensor, Tensor]:
        others = [axis for axis in range(values.dim()) if axis != 1]
        mean = values.mean(others, keepdim=True)
        ctx.save_for_backward(values, mean)
        return mean.flatten(), (values - mean).square_().mean(others)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_mean: Tensor, grad_variance: Tensor) -> Tensor:
        values, mean = ctx.saved_tensors
        count = values.numel() // mean.numel()
        slope = (2.0 / count) * grad_variance.view_as(mean)
        # ``slope * (values - mean)`` in one pass; what cancels is no more than the rounding of
        # the values themselves.
        constant = grad_mean.view_as(mean) / count - slope * mean
        return torch.addcmul(constant, values, slope)
