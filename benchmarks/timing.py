"""Times of several candidates in one run, taken in turns, at a precision that is asked for."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

import torch

Work = Callable[[], object]

# What one measurement on a GPU should last, and of how many calls at most, for the latency of a
# launch not to be what is measured.
_MILLISECONDS_AT_LEAST = 20.0
_CALLS_AT_MOST = 50


def medians(
    candidates: dict[str, Work], rounds: int, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """Median milliseconds of a call of each candidate, taken in turns after a warm-up of each.

    On a GPU by pairs of events on the current stream, around several calls where one is short.
    """
    measure = _on_gpu if torch.device(device).type == "cuda" else _on_cpu
    calls: dict[str, int] = {}
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for name, work in candidates.items():
        work()
        calls[name] = _calls(measure(work, 1)) if measure is _on_gpu else 1
    for _ in range(rounds):
        for name, work in candidates.items():
            times[name].append(measure(work, calls[name]))
    return {name: median(values) for name, values in times.items()}


def _calls(milliseconds: float) -> int:
    return min(_CALLS_AT_MOST, math.ceil(_MILLISECONDS_AT_LEAST / max(milliseconds, 1e-3)))


def _on_cpu(work: Work, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        work()
    return 1e3 * (time.perf_counter() - start) / calls


def _on_gpu(work: Work, calls: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls


def captured(step: Work) -> Work:
    """Replay of a step as a CUDA graph, of the current stream: not the default one.

    Autograd goes on adding gradients on the stream where the first step ran, so the step must not
    have run on another one before.
    """
    for _ in range(3):
        step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        step()
    return graph.replay


@contextmanager
def torch_precision(precision: str) -> Iterator[None]:
    """Have torch multiply and convolve float32 in "ieee" or "tf32" on a GPU; then as before.

    Convolutions are named by themselves: they are in TF32 unless told otherwise, and what is said
    to all of cuDNN (``torch.backends.cudnn.fp32_precision``) does not reach them in torch 2.11.
    None of the older flags (``allow_tf32``, ``set_float32_matmul_precision``) is read or written:
    torch refuses to answer for a mixture of both kinds.
    """
    kinds = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [kind.fp32_precision for kind in kinds]
    for kind in kinds:
        kind.fp32_precision = precision
    try:
        yield
    finally:
        for kind, old in zip(kinds, before, strict=True):
            kind.fp32_precision = old
