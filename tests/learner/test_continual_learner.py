"""A stream of tasks through ContinualLearner."""

import copy
import io
import math

import pytest
import torch

import ekfac_rs as ek
from nets import mlp


def shifted_tasks(tasks=3, examples=192, inputs=8, classes=3, batch_size=32):
    """Overlapping clusters, inputs permuted for each task: a small permuted MNIST.

    They overlap because a loss that training takes to zero has no curvature left to remember.
    """
    generator = torch.Generator().manual_seed(5)
    centres = 0.8 * torch.randn(classes, inputs, generator=generator)
    loaders = []
    for _ in range(tasks):
        order = torch.randperm(inputs, generator=generator)
        y = torch.randint(classes, (examples,), generator=generator)
        x = (centres[y] + torch.randn(examples, inputs, generator=generator))[:, order]
        loaders.append(list(zip(x.split(batch_size), y.split(batch_size), strict=True)))
    return loaders


def learn(loaders, model=None, epochs=8, lr=0.05, **options):
    model = mlp(8, 24, 24, 3, dtype=torch.float32) if model is None else model
    learner = ek.ContinualLearner(model, generator=torch.Generator().manual_seed(0), **options)
    for loader in loaders:
        learner.fit(loader, epochs=epochs, lr=lr)
        learner.consolidate(loader)
    return learner


@pytest.mark.parametrize(
    "options",
    [
        {"approximation": "xkfac"},
        {"approximation": "kfac-expand", "batchnorm": "running"},
        {"approximation": "xkfac", "freeze_bn_after": 0.3},
        {"approximation": "kfac-expand", "batchnorm": "running", "freeze_bn_after": 0.0},
    ],
    ids=["xkfac", "kfac eval", "xkfac scheduled", "kfac frozen"],
)
def test_curvature_keeps_earlier_tasks_that_fine_tuning_forgets(options):
    loaders = shifted_tasks()
    plain = learn(loaders, approximation=None)
    kept = learn(loaders, damping=0.01, **options)
    accuracy_plain, accuracy_kept = plain.evaluate(loaders), kept.evaluate(loaders)
    assert accuracy_kept[0] > accuracy_plain[0] + 0.04
    assert sum(accuracy_kept[:2]) > sum(accuracy_plain[:2]) + 0.15


def test_fit_reports_epochs_and_calls_back_every_step():
    loaders = shifted_tasks(tasks=2)
    learner = learn(loaders[:1], damping=0.1)
    steps = []
    history = learner.fit(loaders[1], epochs=2, callback=lambda step, _: steps.append(step))
    assert steps == list(range(1, 2 * len(loaders[1]) + 1))
    assert [set(epoch) for epoch in history] == [{"loss", "penalty", "accuracy"}] * 2
    assert history[-1]["penalty"] > 0.0
    assert history[-1]["loss"] < history[0]["loss"]


def test_consolidation_keeps_the_function_and_sets_the_anchor():
    loaders = shifted_tasks(tasks=1)
    learner = ek.ContinualLearner(mlp(8, 12, 3, dtype=torch.float32))
    learner.fit(loaders[0], epochs=2)
    x = loaders[0][0][0]
    before = copy.deepcopy(learner.model).eval()(x)
    learner.consolidate(loaders[0])
    torch.testing.assert_close(learner.model.eval()(x), before, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dict(ek.merged_weights(learner.model)), dict(learner.anchor))
    assert learner.task == 1
    assert learner.curvatures[0].examples == 192


def test_frozen_batchnorm_stays_a_shift():
    loaders = shifted_tasks(tasks=2)
    learner = learn(loaders, freeze_bn_after=0.0, batchnorm="running")
    batchnorm = learner.model[1]
    torch.testing.assert_close(batchnorm.weight, torch.ones(24))
    torch.testing.assert_close(batchnorm.running_mean, torch.zeros(24))


def test_fit_leaves_no_hooks_gradients_or_changed_flags():
    loaders = shifted_tasks(tasks=2)
    learner = learn(loaders[:1])
    learner.model.eval()
    learner.fit(loaders[1])
    assert not learner.model.training
    for module in learner.model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert all(p.grad is None for p in learner.model.parameters())


@pytest.mark.parametrize("options", [{}, {"approximation": None}, {"coordinates": "raw"}])
def test_a_saved_state_goes_on_as_the_original_would(options):
    loaders = shifted_tasks(tasks=3)
    learner = learn(loaders[:2], damping=0.01, **options)
    file = io.BytesIO()
    torch.save(learner.state_dict(), file)
    file.seek(0)
    other = ek.ContinualLearner(mlp(8, 24, 24, 3, dtype=torch.float32), damping=0.01, **options)
    other.load_state_dict(torch.load(file))
    learner.fit(loaders[2])
    other.fit(loaders[2])
    torch.testing.assert_close(other.model.state_dict(), learner.model.state_dict())


def test_a_state_of_another_approximation_is_refused():
    loaders = shifted_tasks(tasks=1)
    state = learn(loaders, epochs=1).state_dict()
    other = ek.ContinualLearner(mlp(8, 24, 24, 3, dtype=torch.float32), approximation="kfac-expand")
    with pytest.raises(ek.errors.IncompatibleError, match="kfac-expand"):
        other.load_state_dict(state)
    with pytest.raises(ek.errors.IncompatibleError, match="anchor"):
        other.load_state_dict({"model": {}})
    assert other.task == 0


def test_evaluation_of_a_regression_is_minus_the_loss():
    x = torch.randn(12, 8)
    model = mlp(8, 6, 2, dtype=torch.float32).eval()
    target = model(x).detach() + 2.0
    learner = ek.ContinualLearner(model, loss="mse")
    assert learner.evaluate([[(x, target)]])[0] == pytest.approx(-4.0, rel=1e-5)


def test_a_diverging_run_is_a_named_error():
    loaders = shifted_tasks(tasks=1)
    learner = ek.ContinualLearner(mlp(8, 12, 3, dtype=torch.float32))
    with torch.no_grad():
        learner.model[0].weight.fill_(math.inf)
    with pytest.raises(ek.errors.NumericalError, match="finite loss"):
        learner.fit(loaders[0])


def test_an_unstable_learning_rate_warns():
    loaders = shifted_tasks(tasks=2)
    learner = learn(loaders[:1], scale=1e6)
    with pytest.warns(ek.StabilityWarning):
        learner.fit(loaders[1], lr=1e-4, epochs=1)
