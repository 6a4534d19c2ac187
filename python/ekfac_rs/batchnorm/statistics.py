"""The statistics of BatchNorms: taken, used and protected during passes."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from ekfac_rs.errors import BatchNormError


def device_of(model: nn.Module) -> torch.device:
    """Device of the model's first parameter, where batches are taken to."""
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


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
