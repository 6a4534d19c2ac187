"""A thousand passes and steps later the process is no larger, and holds no more objects."""

import gc
from collections.abc import Callable

import pytest
import torch
from torch import nn

import ekfac_rs as ek
from memory import needs_proc, resident
from nets import classification_loader

PASSES = 1000

pytestmark = needs_proc


def growth(work: Callable[[], None]) -> tuple[int, int]:
    """Bytes and Python objects that many repetitions leave behind."""
    for _ in range(PASSES // 10):
        work()
    before = resident(), len(gc.get_objects())
    for _ in range(PASSES):
        work()
    return resident() - before[0], len(gc.get_objects()) - before[1]


def small() -> tuple[nn.Module, list]:
    model = nn.Sequential(nn.Linear(48, 32), nn.BatchNorm1d(32))
    return model, classification_loader(48, 32, examples=4, batch_size=4, dtype=torch.float32)


def curvature_pass() -> Callable[[], None]:
    model, loader = small()
    return lambda: ek.estimate_curvature(model, loader) and None


def training_step() -> Callable[[], None]:
    model, loader = small()
    curvature = ek.estimate_curvature(model, loader)
    penalty = ek.QuadraticPenalty(model, curvature, ek.merged_weights(model), damping=0.1)

    def step() -> None:
        model(loader[0][0])
        penalty().backward()
        model.zero_grad()

    return step


WORK = {"curvature pass": curvature_pass, "training step": training_step}


@pytest.mark.parametrize("name", WORK)
def test_memory_stays_flat(name):
    # One matrix left each time would be 6 megabytes, a graph or descriptor 1,000 objects. What the
    # allocator takes once, for whatever came before, is not there the next time; what leaks is.
    work, found = WORK[name](), []
    while len(found) < 3:
        leaked, objects = growth(work)
        if leaked < 3e6 and objects < 500:
            return
        found.append((leaked, objects))
    pytest.fail(f"bytes and objects left in each of three rounds: {found}")
