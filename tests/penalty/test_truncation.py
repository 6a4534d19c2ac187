"""A penalty by truncated roots: what it is of, how far from the curvatures, and stable steps."""

import copy

import pytest
import torch

import ekfac_rs as ek
from ekfac_rs.curvature import TruncatedSum
from ekfac_rs.errors import OptionError
from nets import classification_loader, mlp
from oracle import relative_error
from single_layers import move, one_layer, other_curvatures

WIDTHS = (9, 14, 14, 3)


def consolidated(approximation="xkfac", tasks=3):
    model = mlp(*WIDTHS)
    curvatures = [
        ek.estimate_curvature(
            model,
            classification_loader(9, 3, seed=task),
            approximation=approximation,
            generator=torch.Generator().manual_seed(task),
        )
        for task in range(tasks)
    ]
    return model, curvatures, ek.merged_weights(model)


@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("approximation", ["xkfac", "kfac-expand"])
def test_value_and_gradient_are_of_the_truncated_sum(approximation, damping):
    model, curvatures, anchor = consolidated(approximation)
    move(model, 0.1)
    model.eval()
    layer = model[6]
    with ek.QuadraticPenalty(model, curvatures, anchor, damping, 3.0, dropped=0.1) as penalty:
        model.zero_grad()
        value = penalty()
        value.backward()
        deviations = {name: D.detach() for name, D in penalty.deviations().items()}
        increase = penalty.predicted_increase()
    expected = curved = 0.0
    for name, D in deviations.items():
        near = TruncatedSum([c[name] for c in curvatures], 0.1).dense_terms()
        moved = near.product(D)
        curved += 0.5 * float((D * moved).sum())
        expected += 1.5 * float((D * moved).sum()) + 0.5 * damping * float(D.square().sum())
        if name == "6":
            gradient = 3.0 * moved + damping * D
    assert value.item() == pytest.approx(expected)
    assert float(increase) == pytest.approx(curved)
    torch.testing.assert_close(layer.weight.grad, gradient[:, :-1])
    torch.testing.assert_close(layer.bias.grad, gradient[:, -1])
    # Twice the value has twice the gradient.
    model.zero_grad()
    with ek.QuadraticPenalty(model, curvatures, anchor, damping, 3.0, dropped=0.1) as penalty:
        (2.0 * penalty()).backward()
    torch.testing.assert_close(layer.weight.grad, 2.0 * gradient[:, :-1])


def test_it_tells_what_products_take_and_how_far_they_are_from_the_curvatures():
    model, curvatures, anchor = consolidated()
    described = {}
    for dropped in (0.0, 0.01, 0.2):
        with ek.QuadraticPenalty(model, curvatures, anchor, dropped=dropped) as penalty:
            described[dropped] = penalty.describe()
            assert penalty.top_eigenvalue() > 0.0
    for name in curvatures[0]:
        exact, near, far = (described[d][name] for d in described)
        assert exact.error == 0.0
        assert exact.columns is None
        whole = sum(c[name].dense() for c in curvatures)
        dense = TruncatedSum([c[name] for c in curvatures], 0.2).dense_terms().dense()
        assert far.error == pytest.approx(relative_error(dense, whole), rel=1e-6)
        assert near.error < 0.05
        assert near.error <= far.error < 0.5
        assert far.flops <= near.flops
    assert any(described[0.2][name].error > 0.01 for name in curvatures[0])


@pytest.mark.parametrize("name", ["depthwise", "grouped", "BatchNorm alone"])
def test_layers_with_groups_stay_exact(name):
    model, _, own, anchor = one_layer(name, 2.0, "xkfac")
    curvatures = [*other_curvatures(name, 2.0, "xkfac", 2), own]
    model = copy.deepcopy(model).eval()
    move(model)
    values = []
    for dropped in (0.0, 0.3):
        with ek.QuadraticPenalty(model, curvatures, anchor, dropped=dropped) as penalty:
            values.append(penalty().item())
            assert penalty.describe()["0"].error == 0.0
    assert values[0] == values[1] > 0.0


@pytest.mark.parametrize("approximation", ["diagonal", "kfac-expand"])
def test_diagonals_and_compressed_curvatures_are_taken_too(approximation):
    model, curvatures, anchor = consolidated(approximation, tasks=6)
    compressed = ek.compress_curvatures(curvatures, 3)
    move(model, 0.1)
    model.eval()
    values = []
    for dropped in (0.0, 0.02):
        with ek.QuadraticPenalty(model, compressed, anchor, dropped=dropped) as penalty:
            values.append(penalty().item())
    assert values[1] == pytest.approx(values[0], rel=0.05)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("tasks", [1, 30])
@pytest.mark.parametrize("name", ["Linear alone", "Linear", "convolution", "transposed"])
def test_steps_are_stable_at_a_hundred_times_the_explicit_limit(name, tasks, training):
    model, x, own, anchor = one_layer(name, 2.0, "xkfac")
    curvatures = [*other_curvatures(name, 2.0, "xkfac", tasks - 1), own]
    model = copy.deepcopy(model).train(training)
    with ek.QuadraticPenalty(model, curvatures, anchor, dropped=0.2) as penalty:
        lr = 100.0 * penalty.max_stable_lr(0.9)
        move(model, size=1e-2)
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
        values = []
        for _ in range(80):
            model(x)
            value = penalty()
            values.append(value.item())
            optimizer.zero_grad()
            value.backward()
            penalty.precondition(lr)
            optimizer.step()
    assert max(values) < 3.0 * values[0]
    assert values[-1] < 0.1 * values[0]


def test_a_learner_hands_its_share_on_and_keeps_its_curvatures():
    tasks = [classification_loader(9, 3, seed=t) for t in range(3)]
    generator = torch.Generator().manual_seed(0)
    learner = ek.ContinualLearner(mlp(*WIDTHS), dropped=0.05, generator=generator)
    for loader in tasks:
        learner.fit(loader, lr=0.05)
        learner.consolidate(loader)
    assert all(isinstance(b, ek.KroneckerSum) for c in learner.curvatures for b in c.values())
    with learner.penalty() as penalty:
        assert penalty.dropped == 0.05
        assert max(layer.error for layer in penalty.describe().values()) > 0.0


@pytest.mark.parametrize("dropped", [-0.1, 1.0, "some"])
def test_what_is_no_share_is_refused(dropped):
    model, curvatures, anchor = consolidated(tasks=1)
    with pytest.raises(OptionError, match="dropped: expected a share above 0 and below 1"):
        ek.QuadraticPenalty(model, curvatures, anchor, dropped=dropped)
    with pytest.raises(OptionError, match="dropped: expected a share above 0 and below 1"):
        ek.ContinualLearner(model, dropped=dropped)
