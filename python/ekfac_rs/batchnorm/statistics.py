"""The statistics of BatchNorms: taken over a loader, used and protected during passes."""

import random
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from ekfac_rs._modes import plain_name
from ekfac_rs._ranks import Ranks
from ekfac_rs._tensors import Kept, accumulation_dtype, kept, put_back
from ekfac_rs.batchnorm.moments import moments_of
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
    """Restore train/eval flags, buffers and random states, whatever happens inside.

    Buffers are those of other modules than BatchNorms, whose statistics are protected (see
    `use_batch_statistics`), or are what passes are made for.
    """
    outer = _passing.set(True)
    modes = {module: module.training for module in model.modules()}
    tracking = {m: m.track_running_stats for m in modes if isinstance(m, _BatchNorm)}
    others = [
        buffer
        for module in modes
        if module not in tracking
        for buffer in module.buffers(recurse=False)
        if not is_lazy(buffer)
    ]
    before = [(_version(b), b, values) for b, values in kept(others)]
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
            put_back([(b, values) for version, b, values in before if _is_written(b, version)])
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002
            _passing.reset(outer)


def _version(tensor: Tensor) -> int | None:
    """Return a number that every write in place changes; None where nobody counts."""
    return None if tensor.is_inference() else tensor._version


def _is_written(tensor: Tensor, since: int | None) -> bool:
    version = _version(tensor)
    return version is None or version != since


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


def synchronised_batchnorms(
    model: nn.Module, frozen: Collection[str], ranks: Ranks
) -> dict[str, nn.SyncBatchNorm]:
    """Return the BatchNorms, by name, whose mini-batch is that of all ranks, be it this one alone.

    Parameters
    ----------
    model : torch.nn.Module
    frozen : collection of str
        Names of those that use running statistics.
    ranks : Ranks

    Returns
    -------
    dict of str to torch.nn.SyncBatchNorm
        None where processes know nothing of each other.

    Raises
    ------
    BatchNormError
        Some are synchronised and others not; they are synchronised over other processes than
        these; or one computes in a way of its own.
    """
    of_batch = {
        plain_name(name): module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and plain_name(name) not in frozen
    }
    found = {
        name: module for name, module in of_batch.items() if isinstance(module, nn.SyncBatchNorm)
    }
    if not _is_distributed():
        return {}
    for name, module in found.items():
        require_over(name, module, ranks)
        if "forward" in vars(module) or type(module).forward is not nn.SyncBatchNorm.forward:
            raise BatchNormError(
                f"layer {name!r}: expected a SyncBatchNorm with torch's own forward, got a "
                f"{type(module).__name__} with another"
            )
    for name in of_batch:
        if found and name not in found and not ranks.alone:
            raise BatchNormError(
                f"layer {name!r}: expected every BatchNorm or none to be a SyncBatchNorm, got a "
                f"{type(of_batch[name]).__name__} beside {next(iter(found))!r}: convert it, or "
                "freeze it (in eval mode, within a model in train mode)"
            )
    return found


def require_over(name: str, batchnorm: nn.SyncBatchNorm, ranks: Ranks) -> None:
    """Raise `BatchNormError` if a BatchNorm takes its statistics over other ranks than these."""
    group = batchnorm.process_group
    if _is_distributed() and not ranks.is_over(group) and dist.get_world_size(group) > 1:
        raise BatchNormError(
            f"layer {name!r}: expected process_group= to be the group that a SyncBatchNorm takes "
            f"its statistics over, got {'none' if ranks.group is None else 'another'}"
        )


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


@contextmanager
def synchronised(batchnorms: Mapping[str, nn.SyncBatchNorm], ranks: Ranks) -> Iterator[None]:
    """Let these, by name, take their statistics over the mini-batches of all ranks, on any device.

    Torch's own do so on GPUs alone, and in a function of their own. Here it is the one that every
    other BatchNorm calls, so that calls are watched in the same way.
    """
    if not batchnorms:
        # Even a mode that changes nothing is asked about every operation on a tensor.
        yield
        return
    with _OverRanks(ranks) as mode:
        try:
            for name, batchnorm in batchnorms.items():
                batchnorm.forward = mode.forward_of(name, batchnorm)  # type: ignore[method-assign]
            yield
        finally:
            for batchnorm in batchnorms.values():
                vars(batchnorm).pop("forward", None)


class _OverRanks(TorchFunctionMode):
    """Normalises by the statistics of all ranks in calls that `forward_of` makes."""

    def __init__(self, ranks: Ranks) -> None:
        super().__init__()
        self._ranks = ranks
        # The name of the one that is called and normalises.
        self._called: str | None = None

    def forward_of(self, name: str, batchnorm: nn.SyncBatchNorm) -> Callable[[Tensor], Tensor]:
        def forward(input: Tensor) -> Tensor:  # noqa: A002  (torch's own name)
            self._called = name if batchnorm.training else None
            try:
                return _BatchNorm.forward(batchnorm, input)
            finally:
                self._called = None

        return forward

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Collection[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is F.batch_norm and self._called is not None:
            return self._batch_norm(self._called, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _batch_norm(
        self,
        name: str,
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        values = x.to(accumulation_dtype(x.dtype))
        mean, variance = moments_of(values, name, self._ranks)
        gain = torch.rsqrt(variance + eps)
        if weight is not None:
            gain = weight * gain
        shape = (-1, *(1,) * (x.dim() - 2))
        output = (values - mean.view(shape)) * gain.view(shape)
        if bias is not None:
            output = output + bias.view(shape)
        return output.to(x.dtype)


Hook = Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor]], None]


def hook_inputs(batchnorm: nn.Module, hook: Hook) -> RemovableHandle:
    """Let a hook see what a BatchNorm is called with, by position or by keyword."""
    return batchnorm.register_forward_pre_hook(hook, with_kwargs=True)


CallHook = Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor], Tensor], None]


def hook_calls(batchnorm: nn.Module, hook: CallHook) -> RemovableHandle:
    """Let a hook see what a BatchNorm was called with, and what it returned."""
    return batchnorm.register_forward_hook(hook, with_kwargs=True)


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
    parameters = (module.parameters(recurse=False) for module in _batchnorms_of(model))
    return [*kept(chain.from_iterable(parameters)), *kept_statistics(model)]


def kept_statistics(model: nn.Module) -> Kept:
    """Statistics of every BatchNorm, each with a copy, for `put_back`."""
    buffers = (module.buffers(recurse=False) for module in _batchnorms_of(model))
    return kept(chain.from_iterable(buffers))


def _batchnorms_of(model: nn.Module) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


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
        batch = Moments()
        batch.count, batch.batches, batch.mean = rows.shape[0], 1, rows.mean(dim=0)
        batch.sum_of_squares = (rows - batch.mean).square().sum(dim=0)
        total = self + batch
        vars(self).update(vars(total))

    def __add__(self, other: "Moments") -> "Moments":
        """Return those of the rows of both."""
        if not (self.count and other.count):
            return self if self.count else other
        total = Moments()
        total.count, total.batches = self.count + other.count, self.batches + other.batches
        share, shift = other.count / total.count, other.mean - self.mean
        total.mean = self.mean + shift * share
        between = shift.square() * (self.count * share)
        total.sum_of_squares = self.sum_of_squares + other.sum_of_squares + between
        return total

    def over(self, ranks: Ranks) -> "Moments":
        """Return those of the rows of all ranks, each of which has some."""
        if ranks.alone:
            return self
        own = torch.stack([self.mean, self.sum_of_squares])
        counts = ranks.gathered(ranks.tensor([self.count, self.batches]), "counts of rows")
        total = Moments()
        for part, theirs in zip(counts, ranks.gathered(own, "moments"), strict=True):
            moments = Moments()
            moments.count, moments.batches = (round(number) for number in part.tolist())
            moments.mean, moments.sum_of_squares = theirs
            total = total + moments
        return total

    @property
    def variance(self) -> Tensor:
        """Population variance of all rows, ``[C]``."""
        return self.sum_of_squares / self.count
