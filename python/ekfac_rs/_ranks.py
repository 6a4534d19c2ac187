"""Processes that work on one thing together: what they sum, and how none of them fails alone."""

import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ekfac_rs._modes import distributed_wrapper
from ekfac_rs.errors import DistributedError, OptionError

# Of the message of a rank that failed: every rank makes room for so many bytes.
_MESSAGE = 1024

# Numbers of gradients that are sent together: 32 MB in single precision.
_TOGETHER = 1 << 23

_TOLD = "_ekfac_rs_told"

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


class Share(NamedTuple):
    """One of several things that ranks make for each other.

    Attributes
    ----------
    cost : float
        What it takes, in any unit.
    device : torch.device
        Where all ranks have it.
    """

    cost: float
    device: torch.device


class Ranks:
    """The processes of a group of `torch.distributed`, of which this is one; or this one alone.

    Before anything is exchanged the ranks tell each other that all is well and that they are at
    the same place, in one small message. So one that fails does not leave the others waiting, and
    one that has less to do than the others is found out.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup or None
        None is this process alone: nothing is exchanged.

    Attributes
    ----------
    count : int
    number : int
        This one's, within the group.

    Raises
    ------
    OptionError
        No group, or one that this process does not belong to.
    """

    def __init__(self, group: "dist.ProcessGroup | None") -> None:
        if group is not None and not _is_group(group):
            raise OptionError(
                "process_group: expected a torch.distributed.ProcessGroup that this process "
                f"belongs to, got {group!r}"
            )
        self.group = group
        self.count = 1 if group is None else dist.get_world_size(group)
        self.number = 0 if group is None else dist.get_rank(group)
        on_gpu = group is not None and dist.get_backend(group) == "nccl"
        self._device = torch.device("cuda" if on_gpu else "cpu")

    @classmethod
    def of(cls, model: object, group: "dist.ProcessGroup | None") -> "Ranks":
        """Ranks of a group, or else of a model's DistributedDataParallel, or this process alone."""
        if group is None and isinstance(model, nn.Module):
            wrapper = distributed_wrapper(model)
            group = None if wrapper is None else wrapper.process_group
        return cls(group)

    @property
    def alone(self) -> bool:
        """Whether there is nobody else."""
        return self.count == 1

    def is_over(self, group: "dist.ProcessGroup | None") -> bool:
        """Whether a group, or else that of all processes, has these very ranks."""
        if self.group is None:
            return False
        theirs = dist.get_process_group_ranks(group or dist.group.WORLD)
        return theirs == dist.get_process_group_ranks(self.group)

    # --- what is exchanged ---

    def sum_(self, tensor: Tensor, what: str) -> Tensor:
        """Put the sum over all ranks in a tensor's place.

        Parameters
        ----------
        tensor : Tensor
            Of one shape on all ranks.
        what : str
            Names the place, for messages and to tell it from others.

        Raises
        ------
        DistributedError
            Another rank failed, is elsewhere, or is gone.
        """
        if not self.alone:
            self._meet(what, tensor)
            self._exchange(what, lambda: dist.all_reduce(tensor, group=self.group))
        return tensor

    def summed(self, tensor: Tensor, what: str) -> Tensor:
        """Return the sum over all ranks, differentiable once: gradients add up over ranks, too."""
        total: Tensor = _Summed.apply(tensor, self, what)
        return total

    def mean(self, tensor: Tensor, what: str = "mean") -> Tensor:
        """Return the mean over all ranks."""
        if self.alone:
            return tensor
        own = tensor.detach().clone(memory_format=torch.contiguous_format)
        return self.sum_(own, what).div_(self.count)

    def gathered(self, tensor: Tensor, what: str) -> list[Tensor]:
        """Return the tensors of all ranks, in their order."""
        if self.alone:
            return [tensor]
        self._meet(what, tensor)
        parts = [torch.empty_like(tensor) for _ in range(self.count)]
        self._exchange(what, lambda: dist.all_gather(parts, tensor, group=self.group))
        return parts

    @torch.no_grad()
    def broadcast_(self, tensors: Iterable[Tensor], what: str) -> None:
        """Put the first rank's values in the place of each tensor's."""
        if self.alone:
            return
        for tensor in tensors:
            self._meet(what, tensor)
            sent = tensor.detach().clone(memory_format=torch.contiguous_format)
            self._send(sent, what, 0)
            # A buffer may have been expanded over memory that it cannot be written to.
            if not torch.equal(sent, tensor):
                tensor.copy_(sent)

    @torch.no_grad()
    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Put the means over all ranks in the place of gradients, a few parameters at a time.

        A rank without a gradient of a parameter counts as zero, where another has one.
        """
        if self.alone:
            return
        parameters = list(parameters)
        there = self.totals([float(p.grad is not None) for p in parameters], "gradients there")
        waiting: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
        for parameter, count in zip(parameters, there, strict=True):
            if not count:
                continue
            alike = waiting.setdefault((parameter.dtype, parameter.device), [])
            alike.append(parameter)
            if sum(p.numel() for p in alike) >= _TOGETHER:
                self._average(alike)
                alike.clear()
        for alike in waiting.values():
            self._average(alike)

    def _average(self, parameters: Sequence[nn.Parameter]) -> None:
        if not parameters:
            return
        own = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        means = self.sum_(torch.cat([g.flatten() for g in own]), "gradients").div_(self.count)
        parts = torch.split(means, [p.numel() for p in parameters])
        for parameter, gradient, part in zip(parameters, own, parts, strict=True):
            gradient.copy_(part.view(gradient.shape))
            parameter.grad = gradient

    def totals(self, numbers: Sequence[float], what: str) -> list[float]:
        """Return the sums of numbers over all ranks."""
        if self.alone:
            return list(numbers)
        return self.sum_(self.tensor(numbers), what).tolist()

    def tensor(self, numbers: Sequence[float]) -> Tensor:
        """Return numbers as a tensor in float64, where the group can exchange it."""
        return torch.tensor(list(numbers), dtype=torch.float64, device=self._device)

    def shared_out(
        self,
        shares: Mapping[str, Share],
        make: Callable[[str], Mapping[str, Tensor]],
        what: str,
    ) -> dict[str, dict[str, Tensor]]:
        """Let each rank make some of several things, and give all of them to all.

        Parameters
        ----------
        shares : mapping of str to Share
            The same on all ranks, and so is who makes what.
        make : callable
            Makes one, given its name: tensors with names of their own, of any shapes and dtypes.
        what : str
            Names them.

        Returns
        -------
        dict of str to dict of str to Tensor
            In the order of the shares, detached, with the same bits on all ranks.

        Raises
        ------
        DistributedError
            Another rank failed, is elsewhere, or is gone.
        """
        makers = assigned({name: share.cost for name, share in shares.items()}, self.count)
        with self.agreed(what):
            made = {
                name: {key: t.detach().to(shares[name].device) for key, t in make(name).items()}
                for name, maker in makers.items()
                if maker == self.number
            }
        if self.alone:
            return made
        return {
            name: self._from(maker, made.get(name), f"{what} of {name!r}", shares[name].device)
            for name, maker in makers.items()
        }

    def _from(
        self, rank: int, own: dict[str, Tensor] | None, what: str, device: torch.device
    ) -> dict[str, Tensor]:
        """Return the tensors of a rank, which alone has them, on every rank."""
        self._meet(what)
        of_own = {
            key: (str(t.dtype).removeprefix("torch."), t.shape) for key, t in (own or {}).items()
        }
        forms = json.loads(self._text_from(rank, json.dumps(of_own), what))
        tensors = {}
        for key, (dtype, shape) in forms.items():
            if own is None:
                tensors[key] = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
            else:
                tensors[key] = own.pop(key).contiguous()
            self._send(tensors[key], what, rank)
        return tensors

    def _text_from(self, rank: int, text: str, what: str) -> str:
        """Return a rank's text on every rank."""
        length = torch.tensor([len(text.encode())], device=self._device)
        self._send(length, what, rank)
        encoded = text.encode()[: int(length)].ljust(int(length))
        message = torch.tensor(list(encoded), dtype=torch.uint8, device=self._device)
        self._send(message, what, rank)
        return bytes(message.tolist()).decode()

    # --- how they fail ---

    def require_same(self, what: str, value: str) -> None:
        """Raise on every rank unless all have the same.

        Parameters
        ----------
        what, value : str
            The value's name, and what it is.

        Raises
        ------
        DistributedError
        """
        self._agree(value, None, f"{what}: expected the same on all ranks, got {value}")

    @contextmanager
    def agreed(self, what: str) -> Iterator[None]:
        """Let all ranks get through what is done inside, or none.

        A rank that fails tells the others, and raises its own error; they raise a
        `DistributedError` that names it, here or at the next exchange.
        """
        if self.alone:
            yield
            return
        try:
            yield
        except DistributedError:
            raise  # all know, or there is nobody to tell
        except BaseException as error:
            if not _was_told(error):
                setattr(error, _TOLD, True)
                self._agree(what, error, "")
            raise
        self._meet(f"end of {what}")

    def meet(self, what: str) -> None:
        """Go on when all ranks are well and at this place."""
        self._meet(what)

    def _meet(self, what: str, tensor: Tensor | None = None) -> None:
        """Go on when all ranks are at this place, with tensors of one shape."""
        here = what if tensor is None else f"{what}, {tuple(tensor.shape)} in {tensor.dtype}"
        self._agree(
            here,
            None,
            f"expected all ranks at the same place, got this one at: {here} (ranks whose "
            "mini-batches belong together need equally many of them, of the same shapes)",
        )

    def _agree(self, place: str, error: BaseException | None, otherwise: str) -> None:
        """Tell the others whether all is well here, and where this is; hear it of them."""
        if self.alone:
            return
        code = zlib.crc32(place.encode())
        failed = 0 if error is None else self.count - self.number
        word = torch.tensor([failed, code, -code], device=self._device)
        self._exchange(place, lambda: dist.all_reduce(word, op=dist.ReduceOp.MAX, group=self.group))
        failed, most, minus_least = word.tolist()
        if failed:
            self._tell_of(self.count - failed, error)
        elif most != -minus_least:
            raise DistributedError(f"rank {self.number}: {otherwise}")

    def _tell_of(self, rank: int, error: BaseException | None) -> None:
        """Tell what a rank failed of; who failed oneself raises that instead."""
        said = "" if error is None else f"{type(error).__name__}: {error}"
        text = said.encode()[:_MESSAGE].ljust(_MESSAGE)
        message = torch.tensor(list(text), dtype=torch.uint8, device=self._device)
        self._send(message, "message", rank)
        if error is None:
            text = bytes(message.tolist()).rstrip()
            raise DistributedError(f"rank {rank} failed: {text.decode(errors='replace')}")

    def _send(self, tensor: Tensor, what: str, rank: int) -> None:
        assert self.group is not None
        source = dist.get_global_rank(self.group, rank)
        self._exchange(what, lambda: dist.broadcast(tensor, source, group=self.group))

    def _exchange(self, what: str, exchange: Callable[[], Any]) -> None:
        try:
            exchange()
        except RuntimeError as error:
            raise DistributedError(
                f"rank {self.number}: expected to hear of all {self.count} ranks at: {what}, got "
                f"{type(error).__name__}: {error}"
            ) from error


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, ranks: Ranks, what: str) -> Tensor:
        ctx.ranks, ctx.what = ranks, what
        return ranks.sum_(tensor.clone(), what)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        summed = ctx.ranks.sum_(grad.clone(), f"gradient of {ctx.what}")
        return summed, None, None


def _is_group(group: object) -> bool:
    # Some builds of torch have none.
    return dist.is_available() and isinstance(group, dist.ProcessGroup)


def _was_told(error: BaseException | None) -> bool:
    """Whether an error, or the one that it came of, is known to the other ranks."""
    while error is not None:
        if hasattr(error, _TOLD):
            return True
        error = error.__cause__ or error.__context__
    return False


def on_all_ranks(function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """Let a function of a model, with a keyword ``process_group``, fail on all ranks or none."""

    @wraps(function)
    def call(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
        model, group = args[0] if args else kwargs.get("model"), kwargs.get("process_group")
        with Ranks.of(model, group).agreed(function.__name__):  # type: ignore[arg-type]
            return function(*args, **kwargs)

    return call


# --- shares of work ------------------------------------------------------------------------------


def assigned(costs: Mapping[str, float], count: int) -> dict[str, int]:
    """Tell of each thing which of several ranks makes it: the most costly first, who has least.

    Costs are in any unit, ranks are counted from 0. The rank with most has at most 4/3 of what the
    best assignment leaves one with (Graham, "Bounds on Multiprocessing Timing Anomalies", 1969).
    """
    loads = [0.0] * count
    makers = {}
    for name, cost in sorted(costs.items(), key=lambda item: (-item[1], item[0])):
        maker = loads.index(min(loads))
        loads[maker] += cost
        makers[name] = maker
    return {name: makers[name] for name in costs}


# --- packed triangles ----------------------------------------------------------------------------


def sum_lower_(factor: Tensor, ranks: Ranks, what: str) -> None:
    """Put the sum over ranks in the place of a factor's lower triangle, or of a diagonal.

    Parameters
    ----------
    factor : Tensor of shape (n, n), (groups, n, n) or (n,)
        The upper triangle is neither read nor written.
    ranks : Ranks
    what : str
        Names it.
    """
    if ranks.alone:
        return
    if factor.dim() == 1:
        ranks.sum_(factor, what)
        return
    rows = [factor[..., i, : i + 1] for i in range(factor.shape[-1])]
    packed = ranks.sum_(torch.cat(rows, dim=-1), what)
    parts = torch.split(packed, [row.shape[-1] for row in rows], dim=-1)
    for row, values in zip(rows, parts, strict=True):
        row.copy_(values)
