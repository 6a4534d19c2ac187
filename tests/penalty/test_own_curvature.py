"""Stable steps that count with the curvature of the task that is being learnt."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

import ekfac_rs as ek
from ekfac_rs.errors import (
    IncompatibleError,
    NumericalError,
    OptionError,
    ShapeError,
    UnknownLayerError,
)
from nets import classification_loader, mlp

X = torch.randn(64, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = X @ torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def linear():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 3).double())


def held(model, scale=1.0, **options):
    """A penalty on a model where it is, and the curvature of its loss there."""
    curvature = ek.estimate_curvature(
        model, [(X, Y)], loss="mse", generator=torch.Generator().manual_seed(0), **options
    )
    return ek.QuadraticPenalty(model, curvature, ek.merged_weights(model), scale=scale), curvature


def preconditioner(model, penalty, lr, own):
    """The matrix that gradients of the one layer are multiplied by."""
    layer = model[0]
    columns = []
    for unit in torch.eye(18, dtype=torch.float64):
        model(X)
        penalty()
        V = unit.view(3, 6)
        layer.weight.grad, layer.bias.grad = V[:, :5].clone(), V[:, 5].clone()
        penalty.precondition(lr, own)
        moved = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1)
        columns.append(moved.flatten())
    return torch.stack(columns, 1)


@pytest.mark.parametrize("approximation", ["kfac-expand", "xkfac", "diagonal"])
def test_steps_are_safe_on_the_sum_of_old_and_own_curvature_and_on_no_less(approximation):
    model, lr = linear(), 1e3
    penalty, old = held(model, scale=0.01, approximation=approximation)
    with torch.no_grad():
        model[0].weight += 1.0
    with penalty:
        own = ek.estimate_curvature(
            model,
            [(3.0 * X + 1.0, Y)],
            loss="mse",
            approximation=approximation,
            generator=torch.Generator().manual_seed(1),
        )
        H = 0.01 * old["0"].dense() + own["0"].dense()
        with_own = torch.linalg.eigvals(lr * preconditioner(model, penalty, lr, own) @ H)
        without = torch.linalg.eigvals(lr * preconditioner(model, penalty, lr, None) @ H)
    assert float(with_own.real.max()) <= 1.55
    assert float(without.real.max()) > 20.0


@pytest.mark.parametrize("norm", [False, True])
def test_steps_are_safe_where_a_bias_has_no_gradient_to_make_up_for_a_mean(norm):
    x = X + 10.0
    model = nn.Sequential(*linear(), *([nn.BatchNorm1d(3).double()] if norm else [])).eval()
    curvature = ek.estimate_curvature(
        model, [(x, Y)], loss="mse", approximation="kfac-expand", generator=torch.Generator()
    )
    lr, layer, columns = 1e3, model[0], []
    with ek.QuadraticPenalty(model, curvature, ek.merged_weights(model)) as penalty:
        for moving in (True, False):
            # All parameters first: what was prepared for them is no good for the weights alone.
            for unit in torch.eye(15, dtype=torch.float64):
                model.zero_grad()
                (model(x).sum() + penalty()).backward()
                layer.weight.grad = unit.view(3, 5).clone()
                if not moving:
                    for p in (layer.bias, *model[1:].parameters()):
                        p.grad = None
                penalty.precondition(lr)
                if not moving:
                    assert layer.bias.grad is None
                    columns.append(layer.weight.grad.flatten())
    P = torch.stack(columns, 1)
    H = curvature["0"].dense().view(3, 6, 3, 6)[:, :5, :, :5].reshape(15, 15)
    if norm:
        gain = (model[1].weight / (model[1].running_var + model[1].eps).sqrt()).detach()
        gain = gain.repeat_interleave(5)
        H = gain[:, None] * H * gain
    top = float(torch.linalg.eigvals(lr * P @ H).real.max())
    assert 0.3 < top < 1.55


def test_training_converges_far_above_the_learning_rate_that_the_loss_bears():
    def learner_with(own):
        learner = ek.ContinualLearner(
            linear(),
            loss="mse",
            approximation="kfac-expand",
            scale=1e-6,
            momentum=0.0,
            scheduler=None,
            own=own,
            generator=torch.Generator().manual_seed(0),
        )
        learner.fit([(X, Y)], steps=1, lr=0.0)
        learner.consolidate([(X, Y)])
        return learner

    # The Hessian of the mean over examples and three outputs is 2/3 times the second moment.
    inputs = torch.cat([X, torch.ones(64, 1, dtype=torch.float64)], 1)
    top = float(torch.linalg.eigvalsh(inputs.T @ inputs / 64)[-1]) * 2.0 / 3.0
    lr = 100.0 * 2.0 / top
    with_own, without = learner_with(True), learner_with(False)
    history = with_own.fit([(X, Y)], steps=60, lr=lr)
    assert history[-1]["loss"] < 1e-2 * history[0]["loss"]
    try:
        worse = without.fit([(X, Y)], steps=60, lr=lr)
    except NumericalError:
        return
    assert worse[-1]["loss"] > 1e3 * worse[0]["loss"]


def test_nothing_of_the_users_is_touched_by_taking_it():
    loaders = [classification_loader(8, 3, seed=seed, dtype=torch.float32) for seed in (0, 1)]

    def state_after(own):
        torch.manual_seed(5)
        generator = torch.Generator().manual_seed(0)
        model = mlp(8, 12, 3, dtype=torch.float32)
        learner = ek.ContinualLearner(model, own=own, damping=0.1, generator=generator)
        learner.fit(loaders[0], lr=0.1)
        learner.consolidate(loaders[0])
        learner.fit(loaders[1], epochs=3, lr=0.0)
        return learner.model.state_dict(), torch.get_rng_state(), generator.get_state()

    (with_own, *states), (without, *others) = state_after(True), state_after(False)
    assert all(torch.equal(with_own[name], without[name]) for name in without)
    assert all(map(torch.equal, states, others))


def test_explicit_steps_have_no_use_for_it():
    with pytest.raises(OptionError, match="own: expected it with step=.stable."):
        ek.ContinualLearner(mlp(8, 12, 3), own=True, step="explicit")


def test_one_that_has_other_batchnorms_merged_into_it_is_refused():
    model = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3))
    loader = classification_loader(5, 3, dtype=torch.float32)
    curvature = ek.estimate_curvature(model, loader)
    other = dataclasses.replace(curvature, batchnorms={**curvature.batchnorms, "2": None})
    with ek.QuadraticPenalty(model, curvature, ek.merged_weights(model)) as penalty:
        (model(loader[0][0]).square().sum() + penalty()).backward()
        before = model[2].weight.grad.clone()
        with pytest.raises(IncompatibleError, match="layer '2': expected an own .* BatchNorm '3'"):
            penalty.precondition(1.0, other)
        assert torch.equal(model[2].weight.grad, before)


def test_another_kind_of_curvature_is_refused_and_changes_nothing():
    model = linear()
    penalty, curvature = held(model, approximation="kfac-expand")
    wide = nn.Sequential(nn.Linear(7, 3).double())
    other = nn.Sequential(nn.Identity(), copy.deepcopy(model[0]))
    options = {"loss": "mse", "approximation": "kfac-expand"}
    wrong = {
        "diagonal": (
            ek.estimate_curvature(model, [(X, Y)], loss="mse", approximation="diagonal"),
            IncompatibleError,
            "layer '0': expected an own curvature with a KroneckerSum, got a DiagonalBlock",
        ),
        "raw": (
            ek.estimate_curvature(model, [(X, Y)], coordinates="raw", **options),
            IncompatibleError,
            "own: expected a curvature in merged coordinates, got one in raw",
        ),
        "shape": (
            ek.estimate_curvature(wide, [(X[:, [0, 1, 2, 3, 4, 0, 1]], Y)], **options),
            ShapeError,
            r"layer '0': expected an own curvature of shape \(3, 6\), got \(3, 8\)",
        ),
        "layer": (
            ek.estimate_curvature(other, [(X, Y)], **options),
            UnknownLayerError,
            r"own: expected a block of layer '0', got those of \['1'\]",
        ),
        "type": (dict(curvature), OptionError, "own: expected a Curvature, got dict"),
    }
    with penalty:
        model(X)
        (model(X).square().mean() + penalty()).backward()
        before = model[0].weight.grad.clone()
        for own, error, words in wrong.values():
            with pytest.raises(error, match=words):
                penalty.precondition(1.0, own)
            assert torch.equal(model[0].weight.grad, before)
        penalty.precondition(1.0, curvature)
