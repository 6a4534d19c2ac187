"""Several processes with one model: what they need besides ``process_group=``.

`ekfac_rs.estimate_curvature`, `ekfac_rs.reparameterize`, `ekfac_rs.QuadraticPenalty` and
`ekfac_rs.ContinualLearner` take a group of `torch.distributed`, or find that of a
DistributedDataParallel around the model.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ekfac_rs._modes import bare_model
from ekfac_rs._ranks import Ranks, on_all_ranks

__all__ = ["broadcast_buffers"]


@on_all_ranks
@torch.no_grad()
def broadcast_buffers(model: nn.Module, process_group: "dist.ProcessGroup | None" = None) -> None:
    """Give all processes the first one's buffers: BatchNorms' running statistics among them.

    A BatchNorm that is not synchronised takes its running statistics of its own process's
    mini-batches. A DistributedDataParallel makes them the same at each forward pass, and so they
    differ after the last one; for a curvature, an anchor or an evaluation they have to be the same.

    Parameters
    ----------
    model : torch.nn.Module
    process_group : torch.distributed.ProcessGroup, optional
        Default: that of the model's DistributedDataParallel, or else this process alone, with
        which nothing happens.

    Raises
    ------
    DistributedError
        Another process failed, is gone, or has other buffers.
    """
    ranks = Ranks.of(model, process_group)
    buffers = dict(bare_model(model).named_buffers())
    ranks.require_same("buffers", _in_words(buffers))
    ranks.broadcast_(buffers.values(), "buffers")


def _in_words(buffers: dict[str, Tensor]) -> str:
    return ", ".join(f"{name} {tuple(x.shape)} in {x.dtype}" for name, x in buffers.items())
