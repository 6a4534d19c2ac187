"""A curvature pass leaves everything it does not own as it found it."""

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

import ekfac_rs as ek
from cases import APPROXIMATIONS, NETWORKS
from nets import Averaging, classification_loader
from oracle import Batch


def snapshot(model: nn.Module) -> dict[str, object]:
    """Everything of the model and of the process that a pass could touch."""
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    return {
        "state": {key: value.clone() for key, value in model.state_dict().items()},
        "storage": {key: value.data_ptr() for key, value in model.state_dict().items()},
        "gradients": {
            key: None if p.grad is None else p.grad.clone() for key, p in parameters.items()
        },
        "requires_grad": {key: p.requires_grad for key, p in parameters.items()},
        "training": {key: module.training for key, module in modules.items()},
        "momentum": {key: getattr(module, "momentum", None) for key, module in modules.items()},
        "tracking": {
            key: getattr(module, "track_running_stats", None) for key, module in modules.items()
        },
        "forward": {key: "forward" in vars(module) for key, module in modules.items()},
        "hooks": {
            key: [
                len(hooks)
                for name, hooks in sorted(vars(module).items())
                if name.endswith("_hooks")
            ]
            for key, module in modules.items()
        },
        "parameter hooks": {key: len(p._backward_hooks or ()) for key, p in parameters.items()},
        "grad mode": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state(),  # noqa: NPY002
        "python": random.getstate(),
    }


def same(first: object, second: object) -> bool:
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and torch.equal(first, second)
    if isinstance(first, np.ndarray):
        return np.array_equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def changes(before: dict[str, object], after: dict[str, object]) -> list[str]:
    return [key for key in before if not same(before[key], after[key])]


def uneven_model() -> nn.Sequential:
    """Flags, gradients, hooks and statistics that a careless pass would even out."""
    model = NETWORKS["mlp-bn"].make().train()
    model[1].eval()
    model[1].momentum = None
    model[3].requires_grad_(False)
    model[4].track_running_stats = True
    model[0].register_forward_hook(lambda module, inputs, output: None)
    model[6].weight.register_hook(lambda gradient: gradient)
    model[0].weight.grad = torch.full_like(model[0].weight, 3.0)
    return model


class Interrupted:
    """A loader that raises after its first batch."""

    def __init__(self, batches: list[Batch], error: BaseException) -> None:
        self.batches = batches
        self.error = error

    def __iter__(self) -> Iterator[Batch]:
        yield self.batches[0]
        raise self.error

    def __len__(self) -> int:
        return len(self.batches)


OPTIONS = {
    **{
        f"{approximation} {coordinates} {statistics}": {
            "approximation": approximation,
            "coordinates": coordinates,
            "statistics": statistics,
        }
        for approximation in (*APPROXIMATIONS, "diagonal")
        for coordinates in ("raw", "merged")
        for statistics in ("batch", "running")
    },
    **{f"labels {labels}": {"labels": labels} for labels in ("type2", "empirical", "exact")},
    "own generator": {"generator": torch.Generator().manual_seed(0)},
    "chosen layers": {"layers": ["0"]},
    "max_examples": {"max_examples": 4},
}


@pytest.fixture
def batches() -> list[Batch]:
    return NETWORKS["mlp-bn"].batches("cross_entropy", (4, 4))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_pass_changes_nothing(options, batches):
    model = uneven_model()
    before = snapshot(model)
    ek.estimate_curvature(model, batches, **{"layers": ["0", "6"], **options})
    assert changes(before, snapshot(model)) == []


@pytest.mark.parametrize("error", [RuntimeError("broken loader"), KeyboardInterrupt()])
@pytest.mark.parametrize("statistics", ["batch", "running"])
@pytest.mark.parametrize("coordinates", ["raw", "merged"])
def test_an_interrupted_pass_changes_nothing(error, statistics, coordinates, batches):
    model = uneven_model()
    before = snapshot(model)
    with pytest.raises(type(error)) as caught:
        ek.estimate_curvature(
            model,
            Interrupted(batches, error),
            statistics=statistics,
            coordinates=coordinates,
            layers=["0", "6"],
        )
    assert caught.value is error
    assert changes(before, snapshot(model)) == []


class BreaksInForward(nn.Module):
    """Passes its input on until told to fail."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls > 1:
            raise RuntimeError("broken layer")
        return x


def test_a_pass_that_fails_inside_the_model_changes_nothing(batches):
    model = uneven_model()
    model.append(BreaksInForward())
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="broken layer"):
        ek.estimate_curvature(model, batches, layers=["0", "6"])
    assert changes(before, snapshot(model)) == []


@pytest.mark.parametrize("statistics", ["batch", "running"])
def test_a_pass_whose_first_forward_fails_changes_nothing(statistics, batches):
    model = uneven_model()
    broken = BreaksInForward()
    broken.calls = 1
    model.append(broken)
    before = snapshot(model)
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    with pytest.raises(RuntimeError, match="broken layer"):
        ek.estimate_curvature(
            model, batches, layers=["0", "6"], statistics=statistics, generator=generator
        )
    assert changes(before, snapshot(model)) == []
    assert torch.equal(generator.get_state(), state)


def test_a_pass_that_finds_bad_labels_changes_nothing(batches):
    model = uneven_model()
    before = snapshot(model)
    (x, y), second = batches
    with pytest.raises(ek.errors.LabelError):
        ek.estimate_curvature(model, [second, (x, y + 3)], layers=["0", "6"])
    assert changes(before, snapshot(model)) == []


def test_a_pass_works_and_leaves_grad_mode_off_inside_no_grad(batches):
    model = uneven_model()
    expected = ek.estimate_curvature(model, batches, labels="exact", layers=["0"])["0"]
    with torch.no_grad():
        before = snapshot(model)
        found = ek.estimate_curvature(model, batches, labels="exact", layers=["0"])["0"]
        assert changes(before, snapshot(model)) == []
    assert torch.equal(found.dense(), expected.dense())


def test_the_batches_stay_as_they_were(batches):
    copies = [(x.clone(), y.clone()) for x, y in batches]
    for x, _ in batches:
        x.requires_grad_()
    ek.estimate_curvature(uneven_model(), batches, layers=["0", "6"])
    for (x, y), (x_before, y_before) in zip(batches, copies, strict=True):
        assert torch.equal(x, x_before)
        assert torch.equal(y, y_before)
        assert x.grad is None


def test_the_snapshot_notices_a_training_step(batches):
    model = uneven_model()
    before = snapshot(model)
    x, y = batches[0]
    nn.functional.cross_entropy(model(x), y).backward()
    assert changes(before, snapshot(model)) == ["state", "gradients"]


def test_what_other_modules_count_in_buffers_stays():
    model = nn.Sequential(nn.Linear(4, 5), Averaging(), nn.BatchNorm1d(5), nn.Linear(5, 3))
    loader = classification_loader(4, 3, dtype=torch.float32)
    model(loader[0][0])
    before = snapshot(model)
    ek.estimate_curvature(model, loader)
    ek.reparameterize(model, loader)
    ek.describe(model, example=loader[0][0])
    assert torch.equal(model[1].average, before["state"]["1.average"])
    assert not torch.equal(model[2].running_mean, before["state"]["2.running_mean"])
