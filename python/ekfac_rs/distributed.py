"""Several processes with one model: what they need besides ``process_group=``.

`ekfac_rs.estimate_curvature`, `ekfac_rs.reparameterize`, `ekfac_rs.QuadraticPenalty` and
`ekfac_rs.ContinualLearner` take a group of `torch.distributed`, or find that of a
DistributedDataParallel around the model. What is made of a curvature afterwards they share out.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ekfac_rs._modes import bare_model
from ekfac_rs._ranks import Ranks, on_all_ranks
from ekfac_rs.curvature import Block, Curvature
from ekfac_rs.curvature.block import share_of
from ekfac_rs.errors import OptionError

__all__ = ["broadcast_buffers", "map_blocks"]


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


def map_blocks(
    curvature: Curvature,
    function: Callable[[str, Block], Any],
    process_group: "dist.ProcessGroup | None" = None,
) -> dict[str, Any]:
    """Call a function with every block, each on one process, and give all results to all.

    For inverses and eigendecompositions, of which every process would make all by itself. The
    layers are shared out by the cubes of their factors' sizes, always in the same way: what a block
    keeps for the next call, as `KroneckerSum.solve` does with a damping's inverse, is where it is
    wanted then, and only results are exchanged. Where there is one process it makes all.

    Parameters
    ----------
    curvature : Curvature
        The same on all processes.
    function : callable
        Given a layer's name and its block it returns a tensor, or a list or tuple of tensors, or of
        such again; on any device. It is called in the order of the layers, and must not exchange
        anything itself.
    process_group : torch.distributed.ProcessGroup, optional
        Default: all processes, or this one alone where `torch.distributed` is not in use.

    Returns
    -------
    dict of str to Tensor or list
        What the function returned for each layer, on its block's device; lists for tuples.

    Raises
    ------
    DistributedError
        Another process failed, is gone, or has another curvature. One whose function fails raises
        that error itself.
    OptionError
        The function returned something else.

    Examples
    --------
    >>> import torch, ekfac_rs as ek
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))
    >>> curvature = ek.estimate_curvature(model, [(torch.randn(8, 4), torch.randint(2, (8,)))])
    >>> V = {name: torch.ones(block.shape) for name, block in curvature.items()}
    >>> natural = ek.distributed.map_blocks(curvature, lambda n, b: b.solve(V[n], damping=0.1))
    >>> {name: tuple(x.shape) for name, x in natural.items()}
    {'0': (3, 5), '2': (2, 4)}
    """
    if process_group is None and dist.is_available() and dist.is_initialized():
        process_group = dist.group.WORLD
    ranks = Ranks(process_group)
    ranks.require_same("curvature", ", ".join(f"{n} {b!r}" for n, b in curvature.items()))
    made = ranks.shared_out(
        {name: share_of(block) for name, block in curvature.items()},
        lambda name: dict(_flat(function(name, curvature[name]), name)),
        "results",
    )
    return {name: _nested(tensors) for name, tensors in made.items()}


def _flat(value: object, name: str, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of nested sequences, with paths to them."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Sequence) and len(value) and not isinstance(value, str):
        for index, part in enumerate(value):
            yield from _flat(part, name, f"{path}.{index}" if path else str(index))
    else:
        raise OptionError(
            f"layer {name!r}: expected a function that returns a tensor, or lists or tuples of "
            f"tensors, got {value!r}"
        )


def _nested(tensors: dict[str, Tensor]) -> Any:
    """Return what `_flat` took apart."""
    if "" in tensors:
        return tensors[""]
    parts: dict[str, dict[str, Tensor]] = {}
    for path, tensor in tensors.items():
        index, _, rest = path.partition(".")
        parts.setdefault(index, {})[rest] = tensor
    return [_nested(part) for part in parts.values()]
