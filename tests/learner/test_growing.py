"""Classes that come later: an output layer that grows, and old curvatures embedded in it."""

import copy

import pytest
import torch
from torch import nn

import ekfac_rs as ek
from ekfac_rs.errors import (
    IncompatibleError,
    LabelError,
    OptionError,
    UnknownLayerError,
    UnsupportedLayerError,
)
from nets import classification_loader, mlp

OLD, NEW = (
    classification_loader(6, classes, examples=48, batch_size=12, seed=classes)
    for classes in (3, 5)
)


def learner_of(model=None, **options):
    generator = torch.Generator().manual_seed(0)
    model = mlp(6, 8, 5, 3) if model is None else model
    return ek.ContinualLearner(model, **({"generator": generator} | options))


def learn(learner, *loaders):
    for loader in loaders:
        learner.fit(loader, epochs=2, lr=0.02)
        learner.consolidate(loader)
    return learner


def state_of(learner):
    state = learner.state_dict()
    return copy.deepcopy(state | {"curvatures": [tensors for tensors, _ in state["curvatures"]]})


def require_unchanged(learner, before):
    after = state_of(learner)
    for key in ("model", "curvatures", "norms"):
        torch.testing.assert_close(after[key], before[key], rtol=0, atol=0)
    assert after["heads"] == before["heads"]
    if before["anchor"] is not None:
        weights = (state["anchor"]["weights"] for state in (after, before))
        torch.testing.assert_close(*weights, rtol=0, atol=0)


# --- blocks --------------------------------------------------------------------------------------


def spd(n, generator):
    root = torch.randn(n, n, generator=generator, dtype=torch.float64)
    return root @ root.T


def blocks():
    generator = torch.Generator().manual_seed(0)
    pairs = [(spd(4, generator), spd(3, generator)) for _ in range(2)]
    kronecker = ek.KroneckerSum(pairs)
    return {
        "kronecker": kronecker,
        "diagonal": ek.DiagonalBlock(torch.rand(3, 4, generator=generator).double()),
        "columnwise": ek.ColumnwiseSum([(A.diagonal().clone(), G) for A, G in pairs]),
        "eigenbasis": ek.EigenbasisSum.near(kronecker) + ek.EigenbasisSum.near(kronecker),
        "eigenbasis by column": ek.EigenbasisSum.near(
            ek.ColumnwiseSum([(A.diagonal().clone(), G) for A, G in pairs])
        ),
    }


@pytest.mark.parametrize("name", blocks())
def test_an_embedded_block_is_the_block_on_its_rows_and_zero_on_others(name):
    block = blocks()[name]
    wide = block.embedded(5)
    assert type(wide) is type(block)
    assert wide.shape == (5, 4)
    expected = torch.zeros(20, 20, dtype=torch.float64)
    expected[:12, :12] = block.dense()
    torch.testing.assert_close(wide.dense(), expected, rtol=1e-12, atol=1e-12)
    assert wide.trace() == pytest.approx(block.trace(), rel=1e-12)
    assert wide.norm() == pytest.approx(block.norm(), rel=1e-12)
    assert wide.top_eigenvalue() == pytest.approx(block.top_eigenvalue(), rel=1e-3)
    V = torch.randn(5, 4, dtype=torch.float64)
    assert wide.quadratic(V) == pytest.approx(block.quadratic(V[:3].contiguous()), rel=1e-12)
    torch.testing.assert_close(block.embedded(3).dense(), block.dense(), rtol=0, atol=0)
    assert (wide + wide).trace() == pytest.approx(2.0 * block.trace(), rel=1e-12)
    solved = wide.solve(V, damping=0.5) if hasattr(wide, "solve") else V / (wide.values + 0.5)
    torch.testing.assert_close(wide.product(solved) + 0.5 * solved, V, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(solved[3:], 2.0 * V[3:])
    with pytest.raises(OptionError, match="outputs: expected at least the 3 .*got 2"):
        block.embedded(2)


@pytest.mark.parametrize("kind", ["kronecker", "eigenbasis"])
def test_rows_in_groups_are_not_embedded(kind):
    generator = torch.Generator().manual_seed(0)
    terms = [tuple(torch.stack([spd(n, generator) for _ in range(2)]) for n in (4, 3))]
    block = ek.KroneckerSum(terms)
    block = block if kind == "kronecker" else ek.EigenbasisSum.near(block)
    with pytest.raises(OptionError, match="in as many groups, got 8"):
        block.embedded(8)


def test_a_curvature_is_embedded_in_the_layer_that_is_named():
    curvature = ek.estimate_curvature(mlp(6, 8, 3), OLD)
    wide = curvature.embedded("3", 5)
    assert {name: block.shape for name, block in wide.items()} == {"0": (8, 7), "3": (5, 9)}
    assert wide["0"] is curvature["0"]
    assert curvature["3"].shape == (3, 9)
    with pytest.raises(UnknownLayerError, match="'4'"):
        curvature.embedded("4", 5)


# --- the learner ---------------------------------------------------------------------------------

KINDS = {
    "xkfac-nested": {},
    "kfac-expand": {"approximation": "kfac-expand", "statistics": "running"},
    "diagonal": {"approximation": "diagonal"},
    "eigenvalues": {"correction": "eigenvalues"},
    "raw": {"coordinates": "raw"},
}


@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_old_rows_are_held_as_before_and_new_ones_by_damping_alone(options, damping):
    learner = learn(learner_of(damping=damping, **options), OLD, OLD)
    generator = torch.Generator().manual_seed(1)

    def values():
        model = learner.model.eval()
        with learner.penalty() as penalty:
            penalty().backward()
        value = penalty().item()
        gradient = model[6].weight.grad.clone()
        model.zero_grad()
        return value, gradient

    with torch.no_grad():
        for parameter in learner.model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).double())
    before, gradient = values()
    learner.grow(5)
    after, wider = values()
    assert after == pytest.approx(before, rel=1e-12)
    torch.testing.assert_close(wider[:3], gradient, rtol=1e-10, atol=1e-12)
    assert not wider[3:].any()

    with torch.no_grad():
        learner.model[6].weight[3:] = 2.0
        learner.model[6].bias[3:] = 1.0
    moved, wider = values()
    assert moved == pytest.approx(before + 0.5 * damping * (2 * 5 * 4.0 + 2 * 1.0), rel=1e-10)
    torch.testing.assert_close(wider[:3], gradient, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(wider[3:], torch.full_like(wider[3:], 2.0 * damping))


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_new_classes_are_learnt_beside_old_ones(options):
    learner = learn(learner_of(damping=0.01, **options), OLD)
    with pytest.raises(LabelError, match="labels in 0..2"):
        learner.fit(NEW)
    learner.grow(5)
    learn(learner, NEW, OLD)
    assert learner.anchor["6"].shape == (5, 6)
    assert [c["6"].shape for c in learner.curvatures] == [(5, 6)] * 3


@pytest.mark.parametrize("bias", [True, False])
def test_the_function_of_old_outputs_stays_and_new_ones_are_zero(bias):
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3, bias=bias)).double()
    layer, x = model[2], OLD[0][0]
    before = model(x).detach()
    ek.ContinualLearner(model).grow(4)
    assert model[2] is layer
    assert repr(layer) == repr(nn.Linear(5, 4, bias=bias))
    torch.testing.assert_close(model(x)[:, :3], before, rtol=1e-12, atol=1e-12)
    assert not model(x)[:, 3:].any()
    assert all(p.requires_grad and p.is_leaf for p in layer.parameters())
    assert layer.weight.dtype == torch.float64


def test_growing_amid_a_task_and_more_than_once():
    learner = learn(learner_of(damping=0.01, weights="first"), OLD)
    learner.fit(OLD)
    learner.grow(4)
    learner.fit(OLD)
    learner.grow(5)
    learn(learner, NEW)
    assert learner.model[6].out_features == 5


def test_without_a_penalty_on_the_output_layer_it_alone_grows():
    learner = learn(learner_of(layers=["0", "3"], damping=0.01), OLD)
    before = state_of(learner)
    learner.grow(5)
    after = state_of(learner)
    assert learner.model[6].out_features == 5
    torch.testing.assert_close(after["curvatures"], before["curvatures"], rtol=0, atol=0)
    learn(learner, NEW)


@pytest.mark.parametrize("grown", [0, 1, 2])
def test_a_saved_state_goes_on_as_the_original_would(grown):
    learner = learn(learner_of(damping=0.01), OLD)
    for classes in range(4, 4 + grown):
        learner.grow(classes)
    other = learner_of(damping=0.01)
    layer = other.model[6]
    other.load_state_dict(learner.state_dict())
    assert other.model[6] is layer
    assert layer.out_features == 3 + grown
    for each in (learner, other):
        each.generator.manual_seed(1)
        if grown < 2:
            each.grow(5)
        learn(each, NEW)
    require_unchanged(other, state_of(learner))


def test_a_learner_goes_back_to_a_state_from_before_it_grew():
    learner = learn(learner_of(damping=0.01), OLD)
    state = copy.deepcopy(learner.state_dict())
    before = state_of(learner)
    learner.grow(5)
    learn(learner, NEW)
    learner.load_state_dict(state)
    after = state_of(learner)
    torch.testing.assert_close(after["model"], before["model"], rtol=0, atol=0)
    learner.grow(4)


def test_a_copy_grows_alone():
    learner = learn(learner_of(damping=0.01), OLD)
    before = state_of(learner)
    copy.deepcopy(learner).grow(5)
    require_unchanged(learner, before)


def test_a_state_that_does_not_fit_leaves_the_output_layer():
    learner = learn(learner_of(damping=0.01), OLD)
    wide = learn(learner_of(damping=0.01), OLD)
    wide.grow(5)
    before, weight = state_of(learner), learner.model[6].weight
    for change in ({"0.weight": torch.zeros(2, 2)}, {"6.weight": torch.zeros(4, 5)}):
        state = wide.state_dict()
        state["model"] = dict(state["model"]) | change
        with pytest.raises(IncompatibleError, match="state: expected"):
            learner.load_state_dict(state)
        require_unchanged(learner, before)
        assert learner.model[6].weight is weight


class TwoOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.one, self.two = nn.Linear(6, 5), nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x):
        return self.one(self.body(x)), self.two(self.body(x))


def test_what_cannot_grow_is_refused_and_left_alone():
    before_batchnorm = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3), nn.BatchNorm1d(3)).double()
    fed = learn(learner_of(before_batchnorm, output_layer="1"), OLD)
    head = learner_of(head="new")
    for learner, classes, error, message in (
        (learner_of(), 3, OptionError, "more than the 3 outputs of layer '6', got 3"),
        (learner_of(), 2, OptionError, "more than the 3"),
        (learner_of(), "5", OptionError, "integer"),
        (head, 5, OptionError, "one output layer for all tasks, got an output layer for each"),
        (learner_of(TwoOutputs()), 5, OptionError, "got 'one', 'two': name the one"),
        (fed, 5, UnsupportedLayerError, "'1'.*feeds no BatchNorm"),
    ):
        learner.model.train()
        before = state_of(learner)
        with pytest.raises(error, match=message):
            learner.grow(classes)
        require_unchanged(learner, before)
    named = learner_of(TwoOutputs(), output_layer="two")
    named.grow(5)
    assert (named.model.one.out_features, named.model.two.out_features) == (3, 5)
