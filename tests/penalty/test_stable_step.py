"""The linearly implicit step: stable at any learning rate, with the explicit one's fixed points."""

import copy
import math
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ekfac_rs as ek
from ekfac_rs.errors import ModelChangedError, NumericalError, OptionError
from ekfac_rs.stability import step as step_module
from ekfac_rs.stability.operators import ByEntry, Rotated, Spectrum, WithRows
from nets import classification_loader, mlp
from single_layers import ONE_LAYER, move, one_layer, other_curvatures


def with_curvatures(name, gain, approximation, tasks, correction=None):
    """A layer at its anchor with the curvatures of so many tasks, the last taken there."""
    model, x, own, anchor = one_layer(name, gain, approximation, correction)
    others = other_curvatures(name, gain, approximation, tasks - 1, correction)
    return model, x, [*others, own], anchor


def values_of_descent(model, x, penalty, lr, momentum, steps, stable, still=()):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    values = []
    for _ in range(steps):
        model(x)
        value = penalty()
        values.append(float(value.detach()))
        optimizer.zero_grad()
        value.backward()
        for parameter in still:
            parameter.grad = None
        if stable:
            penalty.precondition(lr)
        optimizer.step()
    return values


@pytest.mark.parametrize(
    ("approximation", "tasks", "momentum", "training"),
    [
        ("xkfac", 1, 0.0, True),
        ("xkfac", 30, 0.95, False),
        ("kfac-expand", 30, 0.0, False),
        ("diagonal", 3, 0.95, True),
    ],
)
@pytest.mark.parametrize("name", ONE_LAYER)
def test_it_converges_at_a_hundred_times_the_explicit_limit(
    name, approximation, tasks, momentum, training
):
    gain, steps = 20.0 if tasks == 1 else 0.2, 80 if momentum else 50
    model, x, curvatures, anchor = with_curvatures(name, gain, approximation, tasks)
    model = copy.deepcopy(model).train(training)
    with ek.QuadraticPenalty(model, curvatures, anchor) as penalty:
        lr = 100.0 * penalty.max_stable_lr(momentum)
        if not math.isfinite(lr):
            pytest.skip("the penalty is zero in the parameters")
        move(model, size=1e-2)
        values = values_of_descent(model, x, penalty, lr, momentum, steps, stable=True)
    assert max(values) < 3.0 * values[0]
    assert values[-1] < 0.1 * values[0]


@pytest.mark.parametrize(
    ("approximation", "training"), [("xkfac", True), ("xkfac", False), ("diagonal", True)]
)
@pytest.mark.parametrize("frozen", ["0.weight", "0.bias", "1.weight", "1.bias", "all but 0.bias"])
@pytest.mark.parametrize("lacking", ["requires_grad", "a gradient"])
def test_parameters_that_do_not_move_are_left_out(lacking, frozen, training, approximation):
    model, x, curvatures, anchor = with_curvatures("grouped", 5.0, approximation, 2)
    model = copy.deepcopy(model).train(training)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name != frozen
        if frozen == "all but 0.bias":
            # In train mode the statistics take it out: something else has to be there to train.
            parameter.requires_grad = name == "0.bias" or (training and name == "1.bias")
    before = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    still = [model.get_parameter(name) for name in before]
    with torch.no_grad():
        move(model, size=1e-2)
        for name, value in before.items():
            model.get_parameter(name).copy_(value)
    with ek.QuadraticPenalty(model, curvatures, anchor) as penalty:
        lr = 100.0 * penalty.max_stable_lr()
        if lacking == "a gradient":
            for parameter in still:
                parameter.requires_grad_(True)
        values = values_of_descent(model, x, penalty, lr, 0.0, 150, stable=True, still=still)
    assert max(values) < 3.0 * values[0]
    assert values[-1] < 0.5 * values[0]
    for name, value in before.items():
        assert torch.equal(model.get_parameter(name), value)


@pytest.mark.parametrize(
    ("correction", "training"),
    [("scale", True), ("eigenvalues", True), ("eigenvalues", False), ("nearest", False)],
)
@pytest.mark.parametrize("name", ["Linear", "grouped", "depthwise", "BatchNorm alone", "LayerNorm"])
def test_it_converges_there_on_corrected_curvatures(name, correction, training):
    model, x, curvatures, anchor = with_curvatures(name, 2.0, "xkfac", 3, correction)
    model = copy.deepcopy(model).train(training)
    with ek.QuadraticPenalty(model, curvatures, anchor) as penalty:
        lr = 100.0 * penalty.max_stable_lr(0.9)
        move(model, size=1e-2)
        values = values_of_descent(model, x, penalty, lr, 0.9, 80, stable=True)
    assert max(values) < 3.0 * values[0]
    assert values[-1] < 0.1 * values[0]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ["Linear", "convolution", "depthwise", "BatchNorm alone"])
def test_the_explicit_step_diverges_there(name, training):
    model, x, curvatures, anchor = with_curvatures(name, 20.0, "xkfac", 1)
    model = copy.deepcopy(model).train(training)
    with ek.QuadraticPenalty(model, curvatures, anchor) as penalty:
        lr = 100.0 * penalty.max_stable_lr()
        move(model, size=1e-5)
        values = values_of_descent(model, x, penalty, lr, 0.0, 4, stable=False)
    assert max(values) > 30.0 * values[0]


def matrix_of_the_step(model, x, penalty, lr):
    """What the step multiplies the model's gradients by, column by column."""
    model(x)
    penalty()
    parameters = list(model.parameters())
    sizes = [p.numel() for p in parameters]
    columns = []
    for column in torch.eye(sum(sizes), dtype=torch.float64):
        for parameter, part in zip(parameters, column.split(sizes), strict=True):
            parameter.grad = part.view_as(parameter).clone()
        penalty.precondition(lr)
        columns.append(torch.cat([p.grad.reshape(-1) for p in parameters]))
    for parameter in parameters:
        parameter.grad = None
    return torch.stack(columns, 1)


def jacobian_of_merged_weights(model, x):
    """Derivative of a layer's merged weights in all parameters, batch statistics included."""
    names, parameters = zip(*model.named_parameters(), strict=True)

    def merged(*values):
        weights = dict(zip(names, values, strict=True))
        layer, batchnorm = model[0], model[1]
        h = torch.func.functional_call(
            layer, {k[2:]: v for k, v in weights.items() if k[0] == "0"}, x
        )
        rows = h.transpose(0, 1).flatten(1)
        if batchnorm.training:
            mean, variance = rows.mean(1), rows.var(1, correction=0)
        else:
            mean, variance = batchnorm.running_mean, batchnorm.running_var
        gain = weights["1.weight"] / torch.sqrt(variance + batchnorm.eps)
        weight = weights["0.weight"].flatten(1)
        shift = weights["1.bias"] + gain * (weights["0.bias"] - mean)
        return torch.cat([gain[:, None] * weight, shift[:, None]], 1)

    jacobians = torch.autograd.functional.jacobian(merged, parameters)
    outputs = merged(*parameters).numel()
    return torch.cat([j.reshape(outputs, -1) for j in jacobians], 1)


@pytest.mark.parametrize("approximation", ["xkfac", "diagonal"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ["Linear", "convolution", "depthwise", "grouped"])
def test_no_eigenvalue_is_beyond_what_is_safe(name, training, approximation):
    """Against the dense Hessian by autograd, which knows nothing of views and bounds."""
    model, x, curvatures, anchor = with_curvatures(name, 5.0, approximation, 3)
    model = copy.deepcopy(model).train(training)
    hessian = sum(c["0"].dense() for c in curvatures)
    with ek.QuadraticPenalty(model, curvatures, anchor, scale=2.0, damping=0.01) as penalty:
        J = jacobian_of_merged_weights(model, x)
        H = J.T @ (2.0 * hessian + 0.01 * torch.eye(len(hessian), dtype=J.dtype)) @ J
        lr = 100.0 * penalty.max_stable_lr()
        P = matrix_of_the_step(model, x, penalty, lr)
        [step] = penalty._stable.steps.values()
    torch.testing.assert_close(P, P.T, rtol=1e-9, atol=1e-9 * float(P.abs().max()))
    eigenvalues = torch.linalg.eigvals(lr * P @ H).real
    assert 0.3 < float(eigenvalues.max()) < 2.0
    assert float(torch.linalg.eigvalsh(P).min()) > 0.0
    # What the step itself found, with its own derivative of the batch statistics.
    assert step.top == pytest.approx(float(eigenvalues.max()), rel=0.1)


def test_of_one_term_without_a_batchnorm_it_is_the_inverse_itself():
    model, x, [curvature], anchor = with_curvatures("Linear alone", 1.0, "kfac-expand", 1)
    model = copy.deepcopy(model)
    with ek.QuadraticPenalty(model, curvature, anchor, scale=3.0) as penalty:
        # So large that no direction is negligible.
        lr = 1e9
        P = matrix_of_the_step(model, x, penalty, lr)
        [step] = penalty._stable.steps.values()
    D, K = curvature["0"].shape
    dense = 3.0 * curvature["0"].dense()
    # The parameters are W, then b; the block's rows are [W b].
    order = [d * K + k for d in range(D) for k in range(K - 1)] + [d * K + K - 1 for d in range(D)]
    expected = torch.linalg.inv(
        torch.eye(D * K, dtype=dense.dtype) + lr * step.strength * dense[order][:, order]
    )
    torch.testing.assert_close(P, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


def test_the_fixed_point_is_that_of_explicit_steps():
    """A loss pulls one way, the penalty another: both steps settle where their sum has no slope."""
    model, x, curvatures, anchor = with_curvatures("Linear alone", 1.0, "xkfac", 2)
    target = torch.randn(len(x), 3, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
    settled = {}
    for factor, stable in ((0.5, False), (10.0, True)):
        other = copy.deepcopy(model)
        with ek.QuadraticPenalty(other, curvatures, anchor, scale=30.0) as penalty:
            lr = factor * penalty.max_stable_lr()
            optimizer = torch.optim.SGD(other.parameters(), lr=min(lr, 0.2))
            for _ in range(20_000):
                optimizer.zero_grad()
                (nn.functional.mse_loss(other(x), target) + penalty()).backward()
                if max(float(p.grad.abs().max()) for p in other.parameters()) < 1e-10:
                    break
                if stable:
                    penalty.precondition(lr)
                optimizer.step()
        settled[stable] = torch.cat([p.detach().reshape(-1) for p in other.parameters()])
    moved = settled[False] - torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    assert float(moved.norm()) > 1e-3
    torch.testing.assert_close(settled[True], settled[False], rtol=1e-6, atol=1e-9)


# --- operators ------------------------------------------------------------------------------------


def positive(generator, *shape):
    root = torch.randn(*shape, shape[-1] + 1, generator=generator, dtype=torch.float64)
    return root @ root.mT


def rotated(generator, groups, rows, columns):
    A, G = positive(generator, groups, columns), positive(generator, groups, rows)
    dense = torch.stack([torch.kron(g, a) for g, a in zip(G, A, strict=True)])
    return Rotated(Spectrum.of(A), Spectrum.of(G)), dense


def by_entry(generator, groups, rows, columns):
    diagonal = torch.rand(groups, rows, columns, generator=generator, dtype=torch.float64)
    vectors = torch.randn(groups, rows, columns, generator=generator, dtype=torch.float64)
    dense = torch.diag_embed(diagonal.flatten(1))
    for row in range(rows):
        part = slice(row * columns, (row + 1) * columns)
        dense[:, part, part] += vectors[:, row, :, None] * vectors[:, row, None, :]
    return ByEntry(diagonal, vectors), dense


EXACT = {"rotated": rotated, "by entry": by_entry}


@settings(deadline=None, max_examples=25)
@given(
    kind=st.sampled_from(sorted(EXACT)),
    groups=st.integers(1, 3),
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    c=st.floats(0.0, 100.0),
    seed=st.integers(0, 1000),
)
def test_operators_are_the_dense_inverse(kind, groups, rows, columns, c, seed):
    generator = torch.Generator().manual_seed(seed)
    operator, dense = EXACT[kind](generator, groups, rows, columns)
    X = torch.randn(groups, rows, columns, generator=generator, dtype=torch.float64)
    identity = torch.eye(rows * columns, dtype=torch.float64)
    expected = torch.linalg.solve(identity + c * dense, X.flatten(1)[..., None])
    torch.testing.assert_close(operator.inverse(X, c), expected.view_as(X))


@settings(deadline=None, max_examples=25)
@given(
    kind=st.sampled_from([*sorted(EXACT), "rotated, rows", "by entry, rows"]),
    groups=st.integers(1, 3),
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    c=st.floats(0.0, 100.0),
    seed=st.integers(0, 1000),
)
def test_every_operator_is_its_root_times_its_roots_adjoint(kind, groups, rows, columns, c, seed):
    generator = torch.Generator().manual_seed(seed)
    operator, _ = EXACT[kind.removesuffix(", rows")](generator, groups, rows, columns)
    if kind.endswith(", rows"):
        q = torch.randn(groups, rows, columns, generator=generator, dtype=torch.float64)
        operator = WithRows.of(operator, q, positive(generator, groups, rows))
    X, Y = torch.randn(2, groups, rows, columns, generator=generator, dtype=torch.float64)
    both = operator.root(operator.root_transposed(X, c), c)
    torch.testing.assert_close(operator.inverse(X, c), both)
    torch.testing.assert_close(
        (Y * operator.root(X, c)).sum(), (operator.root_transposed(Y, c) * X).sum()
    )
    assert float((X * operator.inverse(X, c)).sum()) <= float(X.square().sum()) * (1.0 + 1e-12)


def test_rows_alone_are_the_dense_inverse():
    """Around nothing, the second operator is exact."""
    generator = torch.Generator().manual_seed(0)
    q, M = torch.randn(1, 3, 4, generator=generator).double(), positive(generator, 1, 3)
    operator = WithRows.of(ByEntry(torch.zeros(1, 3, 4).double(), None), q, M)
    Q = torch.zeros(3, 12, dtype=torch.float64)
    for row in range(3):
        Q[row, 4 * row : 4 * row + 4] = q[0, row]
    X = torch.randn(1, 3, 4, generator=generator).double()
    dense = torch.eye(12, dtype=torch.float64) + 0.7 * Q.T @ M[0] @ Q
    torch.testing.assert_close(
        operator.inverse(X, 0.7).flatten(), torch.linalg.solve(dense, X.flatten())
    )


# --- use ------------------------------------------------------------------------------------------


def consolidated():
    model = mlp(5, 6, 6, 3)
    loader = classification_loader(5, 3)
    curvature = ek.estimate_curvature(model, loader, generator=torch.Generator().manual_seed(0))
    return model.train(), loader[0][0], curvature, ek.merged_weights(model)


def test_it_needs_a_penalty_first_and_a_learning_rate():
    model, x, curvature, anchor = consolidated()
    with ek.QuadraticPenalty(model, curvature, anchor) as penalty:
        with pytest.raises(ModelChangedError, match="precondition: expected a call of penalty"):
            penalty.precondition(0.1)
        model(x)
        penalty().backward()
        for lr in (-1.0, math.nan, "fast"):
            with pytest.raises(OptionError, match="lr: expected a finite number"):
                penalty.precondition(lr)


def test_what_has_no_gradient_and_what_the_penalty_is_not_on_stays():
    model, x, curvature, anchor = consolidated()
    extra = nn.Linear(3, 2).double()
    with ek.QuadraticPenalty(model, curvature, anchor, scale=1e3) as penalty:
        (extra(model(x)).sum() + penalty()).backward()
        model[3].weight.grad = None
        before = {p: p.grad.clone() for p in model.parameters() if p.grad is not None}
        of_extra = [p.grad.clone() for p in extra.parameters()]
        state = torch.get_rng_state()
        penalty.precondition(1.0)
        assert torch.equal(torch.get_rng_state(), state)
    assert model[3].weight.grad is None
    assert all(torch.equal(p.grad, g) for p, g in zip(extra.parameters(), of_extra, strict=True))
    assert not torch.equal(model[0].weight.grad, before[model[0].weight])


def test_a_callers_autocast_rounds_nothing_of_it():
    model, x, curvature, anchor = consolidated()
    model, x = model.float(), x.float()
    curvature, anchor = curvature.to(dtype=torch.float32), {k: v.float() for k, v in anchor.items()}
    gradients = []
    for enabled in (False, True):
        with ek.QuadraticPenalty(model, curvature, anchor, scale=1e4) as penalty:
            model.zero_grad()
            (model(x).square().sum() + penalty()).backward()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                penalty.precondition(1.0)
        gradients.append([p.grad.clone() for p in model.parameters()])
    for rounded, exact in zip(*gradients, strict=True):
        torch.testing.assert_close(rounded, exact)


def test_a_learning_rate_that_rises_is_prepared_for():
    model, x, curvature, anchor = consolidated()
    with ek.QuadraticPenalty(model, curvature, anchor) as penalty:
        low = penalty.max_stable_lr()
        move(model, size=1e-2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        values = []
        for k in range(60):
            lr = optimizer.param_groups[0]["lr"] = low * 1.2**k
            model(x)
            value = penalty()
            values.append(float(value.detach()))
            optimizer.zero_grad()
            value.backward()
            penalty.precondition(lr)
            optimizer.step()
    assert max(values) < 3.0 * values[0]


@pytest.mark.parametrize("rising", ["lr", pytest.param("scale", marks=pytest.mark.thorough)])
def test_what_rises_puts_no_look_at_the_model_off(monkeypatch, rising):
    model, x, curvature, anchor = consolidated()
    looks = []
    with ek.QuadraticPenalty(model, curvature, anchor) as penalty:
        taken = penalty._stable.look
        monkeypatch.setattr(
            penalty._stable, "look", lambda *at: (looks.append(penalty._stable._count), taken(*at))
        )
        lr = 0.1 * penalty.max_stable_lr()
        for step in range(200):
            model(x)
            penalty().backward()
            factor = 1.05**step
            penalty.scale = factor if rising == "scale" else 1.0
            penalty.precondition(lr * factor if rising == "lr" else lr)
            model.zero_grad()
    assert looks == [0, 10, 20, 40, 80, 160]


@contextmanager
def after_a_look(name):
    """A penalty's one step after its first look at the model, and how to have it look again."""
    model, x, curvatures, anchor = with_curvatures(name, 5.0, "xkfac", 3)
    model = copy.deepcopy(model).train()
    with ek.QuadraticPenalty(model, curvatures, anchor, scale=2.0) as penalty:
        lr = 100.0 * penalty.max_stable_lr()
        model(x)
        penalty().backward()
        penalty.precondition(lr)
        [step] = penalty._stable.steps.values()
        yield step, lambda: step.prepare(penalty._stable._situations["0"], lr, 2.0, None)


@pytest.mark.parametrize("name", ["Linear", "convolution", "depthwise", "grouped"])
def test_where_nothing_moved_another_look_takes_few_products(monkeypatch, name):
    """It begins with the strength and the direction that were found last, and stays with them."""
    products = []
    seen = step_module.seen_from_parameters
    monkeypatch.setattr(
        step_module, "seen_from_parameters", lambda *at: (products.append(at), seen(*at))[1]
    )
    with after_a_look(name) as (step, look_again):
        strength, top = step.strength, step.top
        counts = []
        for forgets in (False, True):
            if forgets:
                step._found.clear()
            products.clear()
            look_again()
            counts.append(len(products))
            assert step.strength == strength
            assert step.top == pytest.approx(top, rel=0.02)
    assert counts[0] <= 12
    assert counts[0] < counts[1]


def test_a_strength_far_from_safe_is_found_in_few_products(monkeypatch):
    with after_a_look("Linear") as (step, look_again):
        strength = step.strength
        tries = []
        looked = step._top
        monkeypatch.setattr(step, "_top", lambda *at: (tries.append(at), looked(*at))[1])
        step.strength = strength / 1.5**15
        look_again()
    assert step.strength == pytest.approx(strength)
    assert len(tries) <= 6


def test_a_network_that_has_diverged_is_told_of_and_gradients_stay(monkeypatch):
    [(x, y)] = classification_loader(8, 3, examples=64, batch_size=64)
    model = mlp(8, 12, 12, 3)
    curvature = ek.estimate_curvature(model, [(x, y)])
    with ek.QuadraticPenalty(model, [curvature], ek.merged_weights(model)) as penalty:
        (nn.functional.cross_entropy(model(x), y) + penalty()).backward()
        before = {name: p.grad.clone() for name, p in model.named_parameters()}
        # As where weights have grown until rounding is all that is left of an eigenvalue.
        looked = step_module.StableStep._top
        monkeypatch.setattr(
            step_module.StableStep,
            "_top",
            lambda step, *at: 1e9 if step._layer.name == "3" else looked(step, *at),
        )
        with pytest.raises(NumericalError, match="layer '3': .*may have diverged on its own loss"):
            penalty.precondition(0.1)
        assert all(torch.equal(p.grad, before[name]) for name, p in model.named_parameters())


def test_after_a_look_that_failed_the_next_step_looks_again(monkeypatch):
    model = mlp(8, 12, 3)
    [(x, y)] = classification_loader(8, 3, examples=64, batch_size=64)
    curvature = ek.estimate_curvature(model, [(x, y)])
    with ek.QuadraticPenalty(model, [curvature], ek.merged_weights(model), scale=1e4) as penalty:

        def stepped(lr):
            model.zero_grad()
            (nn.functional.cross_entropy(model(x), y) + penalty()).backward()
            penalty.precondition(lr)
            return [p.grad.clone() for p in model.parameters()]

        model.train()
        expected = stepped(0.1)
        with monkeypatch.context() as broken:
            broken.setattr(step_module.StableStep, "_at_safe_strength", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                stepped(1.0)
        for found, gradient in zip(stepped(0.1), expected, strict=True):
            torch.testing.assert_close(found, gradient)


def test_a_learner_stays_finite_at_strengths_that_explicit_steps_do_not_bear():
    # One mini-batch each: with several, the noise of batch statistics is as strong as the penalty.
    first, second = (
        classification_loader(8, 3, examples=64, batch_size=64, seed=seed, dtype=torch.float32)
        for seed in (0, 1)
    )

    def last_epoch(step):
        learner = ek.ContinualLearner(
            mlp(8, 12, 12, 3, dtype=torch.float32),
            scale=1e4,
            step=step,
            generator=torch.Generator().manual_seed(0),
        )
        learner.fit(first, epochs=4, lr=0.05)
        learner.consolidate(first)
        return learner.fit(second, epochs=40, lr=0.1)[-1]

    assert last_epoch("stable")["penalty"] < 1.0
    with (
        pytest.warns(ek.StabilityWarning),
        pytest.raises(ek.errors.NumericalError, match="diverged|finite loss"),
    ):
        last_epoch("explicit")
