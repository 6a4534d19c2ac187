"""A penalty on the layers that its user names."""

import copy

import pytest
import torch
from torch import nn

import ekfac_rs as ek
from ekfac_rs.errors import IncompatibleError, OptionError, UnknownLayerError, UnsupportedLayerError
from nets import classification_loader, random_batchnorms

LOADERS = [
    classification_loader(6, 3, examples=48, batch_size=12, seed=seed, dtype=torch.float32)
    for seed in (1, 2)
]


def net():
    """Layers "0" (with BatchNorm "1"), "3" (with "4") and "6"; "2" can have no block."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.PReLU()),
        *(nn.Linear(8, 5), nn.BatchNorm1d(5), nn.ReLU()),
        nn.Linear(5, 3),
    )
    return random_batchnorms(model, torch.Generator().manual_seed(0))


def learner_on(layers, model=None, **options):
    options = {"damping": 0.01, "generator": torch.Generator().manual_seed(0)} | options
    return ek.ContinualLearner(net() if model is None else model, layers=layers, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"freeze_bn_after": 0.5},
        {"approximation": None},
        {"coordinates": "raw"},
        {"weights": "first"},
    ],
    ids=str,
)
def test_curvature_anchor_and_penalty_are_on_the_named_layers_alone(options):
    learner = learner_on(["3", "0"], **options)
    for loader in LOADERS:
        learner.fit(loader, epochs=2)
        learner.consolidate(loader)
    assert set(learner.anchor) == {"0", "3"}
    assert all(set(curvature) == {"0", "3"} for curvature in learner.curvatures)
    with learner.penalty() as penalty:
        learner.model.eval()
        assert penalty().item() == pytest.approx(0.0, abs=1e-6)
        with torch.no_grad():
            learner.model[6].weight.add_(1.0)
            learner.model[2].weight.add_(1.0)
        assert penalty().item() == pytest.approx(0.0, abs=1e-6)
        with torch.no_grad():
            learner.model[3].weight.add_(1.0)
        assert penalty().item() > 0.01


def test_other_layers_train_as_if_there_were_no_penalty():
    """Where what is held is held by eval mode and a damping that lets nothing move."""
    learner = learner_on(["0"], approximation=None, damping=1e12, scheduler=None)
    learner.model[1].eval()
    learner.consolidate(LOADERS[0])
    expected = copy.deepcopy(learner.model)
    for module in expected[:2]:
        module.requires_grad_(False)
    free = ek.ContinualLearner(expected, approximation=None, scheduler=None)
    learner.fit(LOADERS[1], lr=0.01)
    free.fit(LOADERS[1], lr=0.01)
    torch.testing.assert_close(
        learner.model.state_dict(), expected.state_dict(), rtol=1e-4, atol=1e-5
    )
    assert not torch.equal(expected[6].weight, net()[6].weight)


def test_batchnorms_of_other_layers_keep_their_statistics_when_a_task_begins():
    learner = learner_on(["0"])
    learner.fit(LOADERS[0])
    learner.consolidate(LOADERS[0])
    before = copy.deepcopy(learner.model)
    learner.fit(LOADERS[1], steps=1, lr=0.0)
    expected = copy.deepcopy(before)
    ek.reparameterize(expected, LOADERS[1], layers=["0"])
    expected.train()(LOADERS[1][0][0])
    torch.testing.assert_close(learner.model.state_dict(), expected.state_dict())
    assert not torch.allclose(expected[1].weight, before[1].weight)
    assert torch.equal(expected[4].weight, before[4].weight)


def test_names_of_no_layers_are_refused_at_once():
    for layers in (["0", "missing"], ["2"], ["7"]):
        with pytest.raises(UnknownLayerError, match=f"got {layers[-1]}"):
            learner_on(layers)
    for layers in ("0", [], [0]):
        with pytest.raises(OptionError, match="layers: expected"):
            learner_on(layers)


def test_a_batchnorm_that_is_another_layers_is_refused_at_consolidation():
    learner = learner_on(["0", "4"])
    learner.fit(LOADERS[0])
    with pytest.raises(OptionError, match="'4', which is merged into '3'"):
        learner.consolidate(LOADERS[0])
    assert (learner.task, learner.anchor, learner.curvatures) == (0, None, [])


def test_without_names_every_parameter_must_have_a_block():
    learner = learner_on(None)
    learner.fit(LOADERS[0])
    with pytest.raises(UnsupportedLayerError, match="'2.weight'"):
        learner.consolidate(LOADERS[0])


def test_a_curvature_of_other_layers_is_neither_adopted_nor_loaded():
    other = learner_on(["0", "3"])
    other.fit(LOADERS[0])
    other.consolidate(LOADERS[0])
    learner = learner_on(["0"], copy.deepcopy(other.model))
    with pytest.raises(IncompatibleError, match="the layers 0, got 0, 3"):
        learner.adopt(other.curvatures[0], other.anchor)
    with pytest.raises(IncompatibleError, match="the layers 0, got 0, 3"):
        learner.load_state_dict(other.state_dict())
    assert (learner.task, learner.anchor, learner.curvatures) == (0, None, [])
    again = learner_on(["3", "0"])
    again.load_state_dict(other.state_dict())
    for each in (again, other):
        each.fit(LOADERS[1])
    torch.testing.assert_close(again.model.state_dict(), other.model.state_dict(), rtol=0, atol=0)
