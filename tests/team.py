"""Forked processes in one group of `torch.distributed`, for tests of several ranks."""

import multiprocessing
import os
import pickle
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist

import ekfac_rs as ek
from nets import classification_loader, mlp
from processes import SECONDS, forks_allowed


class Failure:
    """What a rank raised."""

    def __init__(self, error: BaseException) -> None:
        self.kind = type(error).__name__
        self.message = str(error)

    def __repr__(self) -> str:
        return f"{self.kind}: {self.message}"


class Team:
    """Processes that do the same work side by side, over and over."""

    def __init__(self, count: int, folder: str, patience: timedelta) -> None:
        self._pipes, self.processes = [], []
        context = multiprocessing.get_context("fork")
        for rank in range(count):
            ours, theirs = context.Pipe()
            work = (theirs, rank, count, os.path.join(folder, "store"), patience)
            process = context.Process(target=_serve, args=work, daemon=True)
            with forks_allowed():
                process.start()
            self._pipes.append(ours)
            self.processes.append(process)

    def run(self, work: Callable[..., Any], *arguments: Any, absent: int = -1) -> list[Any]:
        """Call ``work(rank, *arguments)`` on every rank; return results, or `Failure`s.

        ``work`` is known by its name. Of an absent rank, which does not come back, it is None.
        """
        for pipe in self._pipes:
            pipe.send_bytes(pickle.dumps((work, arguments)))
        results = []
        for rank, pipe in enumerate(self._pipes):
            if rank == absent:
                results.append(None)
                continue
            assert pipe.poll(SECONDS), f"rank {rank} did not come back within {SECONDS} s"
            results.append(pickle.loads(pipe.recv_bytes()))
        return results

    def results(self, work: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Return the ranks' results, none of which may be a failure."""
        results = self.run(work, *arguments)
        assert not any(isinstance(result, Failure) for result in results), results
        return results

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.kill()
            process.join()


@contextmanager
def team_of(count: int, patience: float = 30.0) -> Iterator[Team]:
    """Have a team for a while, whose ranks give up on one that is silent for so many seconds."""
    # What a first pass loads, and a first optimiser, every process would load by itself.
    import_module("torch._dynamo")
    ek.estimate_curvature(mlp(2, 3, 2), classification_loader(2, 2))
    with tempfile.TemporaryDirectory() as folder:
        team = Team(count, folder, timedelta(seconds=patience))
        try:
            yield team
        finally:
            team.close()


def _serve(pipe: Any, rank: int, count: int, store: str, patience: timedelta) -> None:
    torch.set_num_threads(1)
    # Names of hosts need not be known where this runs.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", rank=rank, world_size=count, store=dist.FileStore(store, count), timeout=patience
    )
    while True:
        work, arguments = pickle.loads(pipe.recv_bytes())
        try:
            result = work(rank, *arguments)
        except Exception as error:
            result = Failure(error)
        pipe.send_bytes(pickle.dumps(result))
