"""A candidate in a process of its own: it may patch what it likes, and its memory is its own."""

import copy
import gc
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from timing import torch_precision
from torch import Tensor, nn

from peers.base import Batches, Factors, Peer, layers_of
from peers.candidates import candidate
from peers.workloads import CHECKS, ON_GPU, QUICK, WORKLOADS, Workload

_SETS = {"full": WORKLOADS, "gpu": ON_GPU, "quick": QUICK, "checks": CHECKS}


class CandidateError(Exception):
    """What a candidate cannot do, in the words of its own error."""


class Worker:
    """A candidate's process, which does one thing at a time when asked to.

    Parameters
    ----------
    name, workloads, workload
        Which candidate, on which workload of which set.
    device
        Where the model and the mini-batches are.
    precision
        Of torch's float32 products and convolutions on a GPU, "ieee" or "tf32".

    Raises
    ------
    CandidateError
        From every call: the candidate refuses the workload, or its process died.
    """

    def __init__(
        self,
        name: str,
        workloads: str,
        workload: str,
        device: str = "cpu",
        precision: str = "ieee",
    ) -> None:
        # Forked off a process that has imported torch, which takes seconds, and no more.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch"])
        self._connection, there = context.Pipe()
        self._process = context.Process(
            target=_serve,
            args=(there, name, workloads, workload, device, precision),
            daemon=True,
        )
        self._process.start()
        there.close()

    def ask(self, what: str) -> Any:
        """Have something done, and wait for it: the name of one of `_Answers`."""
        try:
            self._connection.send(what)
            done, answer = self._connection.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join()
            raise CandidateError(f"its process died ({self._process.exitcode})") from None
        if not done:
            raise CandidateError(answer)
        return answer

    def close(self) -> None:
        self._connection.close()
        self._process.join()


def _serve(
    connection: Connection, name: str, workloads: str, workload: str, device: str, precision: str
) -> None:
    warnings.simplefilter("ignore")
    with torch_precision(precision):
        _answer(connection, _Answers(name, _SETS[workloads][workload], torch.device(device)))


def _answer(connection: Connection, answers: "_Answers") -> None:
    while True:
        try:
            what = connection.recv()
        except EOFError:
            return
        try:
            connection.send((True, getattr(answers, what)()))
        except Exception as error:  # whatever a library raises is its answer
            connection.send((False, _in_words(error)))


def _in_words(error: Exception) -> str:
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:200]}"


class _Answers:
    """What a worker can be asked for."""

    def __init__(self, name: str, workload: Workload, device: torch.device) -> None:
        self._name, self._workload, self._device = name, workload, device
        self._made: Peer | None = None

    @property
    def _peer(self) -> Peer:
        if self._made is None:
            kind = candidate(self._name)
            model, batches = self._workload.make()
            there = [(x.to(self._device), y.to(self._device)) for x, y in batches]
            self._made = kind(model.to(self._device), there)
        return self._made

    def version(self) -> str:
        return candidate(self._name).version()

    def mode(self) -> str:
        return candidate(self._name).mode

    def first_pass(self) -> dict[str, Any]:
        """Return what memory a pass takes, and in what its factors are not those of every layer.

        Only the first: later ones find memory that is left from it.
        """
        peer = self._peer
        made: list[Factors] = []
        peak = self._peak_above(lambda: made.append(peer.factors()))
        expected = dict(layers_of(self._workload.make()[0]))
        return {"peak_bytes": peak, "differences": _differences(expected, made[0])}

    def factors(self) -> float:
        return self._milliseconds(self._peer.factors)

    def inverse(self) -> float:
        return self._milliseconds(self._peer.inverse)

    def eigh(self) -> float:
        return self._milliseconds(self._peer.eigh)

    def product(self) -> float:
        return self._milliseconds(self._peer.product)

    def check(self) -> dict[str, tuple[float, float, float]]:
        """Compare with our exact factors: for each layer the cosines of A and G, and the scale."""
        model, batches = self._workload.make()
        reference = _reference(copy.deepcopy(model), batches, candidate(self._name).mode)
        found = candidate(self._name)(model, batches).factors()
        return {
            name: _compared(found[name], pair) for name, pair in reference.items() if name in found
        }

    def _milliseconds(self, work: Callable[[], object]) -> float:
        on_gpu = self._device.type == "cuda"
        if on_gpu:
            # All workers share its memory: none keeps what only its last call needed, and fetching
            # that again is not what is measured.
            work()
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if on_gpu:
            torch.cuda.synchronize()
        taken = 1e3 * (time.perf_counter() - start)
        if on_gpu:
            torch.cuda.empty_cache()
        return taken

    def _peak_above(self, work: Callable[[], object]) -> int:
        if self._device.type != "cuda":
            return _peak_on_cpu(work)
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        peak = torch.cuda.max_memory_allocated() - before
        torch.cuda.empty_cache()
        return peak


def _reference(model: nn.Module, batches: Batches, mode: str) -> Factors:
    import ekfac_rs as ek

    found = ek.estimate_curvature(
        model,
        batches,
        approximation="kfac-expand",
        coordinates="raw",
        labels="type2",
        statistics="batch" if mode == "train" else "running",
    )
    names = [name for name, _ in layers_of(model)]
    return {name: found[name].terms[0] for name in names}


def _compared(
    found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]
) -> tuple[float, float, float]:
    """Cosines of both factors without the bias's coordinate, and the scale of their product."""
    (A, G), (expected_A, expected_G) = found, expected
    if A.dim() != expected_A.dim() or G.dim() != expected_G.dim():
        return float("nan"), float("nan"), float("nan")
    K = min(A.shape[-1], expected_A.shape[-1])
    A, expected_A = A[..., :K, :K], expected_A[..., :K, :K]
    scale = (A.norm() * G.norm()) / (expected_A.norm() * expected_G.norm())
    return _cosine(A, expected_A), _cosine(G, expected_G), float(scale)


def _cosine(x: Tensor, y: Tensor) -> float:
    return float((x * y).sum() / (x.norm() * y.norm()))


def _differences(expected: dict[str, Any], factors: Factors) -> list[str]:
    if not factors:
        return []
    missing = [name for name in expected if name not in factors]
    shapes = []
    for name, module in expected.items():
        if name not in factors:
            continue
        groups = module.groups if isinstance(module, nn.Conv2d) else 1
        stack = (groups,) if groups > 1 else ()
        rows = module.weight.shape[0] // groups
        A, G = factors[name]
        if A.shape[:-2] != stack or G.shape != (*stack, rows, rows):
            shapes.append(name)
    told = []
    if missing:
        told.append(f"no factors for {len(missing)} of {len(expected)} layers")
    if shapes:
        told.append(f"one pair of factors for all groups in {len(shapes)} layers")
    return told


def _peak_on_cpu(work: Callable[[], object]) -> int:
    gc.collect()
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    work()
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in status if line.startswith("VmHWM")).split()[1]) - before
