"""The penalty's value and gradient, on merged weights under the current batch statistics."""

import copy
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ekfac_rs as ek
from ekfac_rs.errors import (
    IncompatibleError,
    ModelChangedError,
    NonFiniteError,
    NumericalError,
    OptionError,
)
from nets import classification_loader, mlp
from single_layers import ONE_LAYER, merged_under_batch, move, one_layer


def consolidated(
    approximation="xkfac", coordinates="merged", bias=True, affine=True, tasks=2, seed=0
):
    """A model at its anchor, with the curvatures of several tasks."""
    model = mlp(5, 6, 6, 3, bias=bias, affine=affine, seed=seed)
    curvatures = [
        ek.estimate_curvature(
            model,
            classification_loader(5, 3, seed=task),
            approximation=approximation,
            coordinates=coordinates,
            labels="type2",
            generator=torch.Generator().manual_seed(task),
        )
        for task in range(tasks)
    ]
    anchor = ek.merged_weights(model) if coordinates == "merged" else ek.raw_weights(model)
    return model, curvatures, anchor


def value_of(penalty):
    return float(penalty().detach())


def penalty_by_definition(model, curvatures, anchor, x, damping, scale):
    """``scale/2 sum <D, H D> + damping/2 |D|**2`` in plain torch with dense blocks."""
    first = merged_under_batch(model[0], model[1], x)
    second_input = model[2](model[1](model[0](x)))
    second = merged_under_batch(model[3], model[4], second_input)
    head = torch.cat([model[6].weight, model[6].bias[:, None]], 1)
    total = 0.0
    for name, weight in {"0": first, "3": second, "6": head}.items():
        deviation = (weight - anchor[name]).reshape(-1)
        hessian = sum(c[name].dense() for c in curvatures)
        total = total + 0.5 * scale * deviation @ hessian @ deviation
        total = total + 0.5 * damping * deviation @ deviation
    return total


@pytest.mark.parametrize("approximation", ["xkfac", "kfac-expand", "diagonal"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_value_and_gradients_are_those_of_the_definition(approximation, bias, affine):
    model, curvatures, anchor = consolidated(approximation, bias=bias, affine=affine)
    move(model)
    x = classification_loader(5, 3, seed=7)[0][0]
    model.train()
    parameters = list(model.parameters())
    with ek.QuadraticPenalty(model, curvatures, anchor, damping=0.3, scale=1.7) as penalty:
        model(x)
        value = penalty()
        gradients = torch.autograd.grad(value, parameters)
    expected = penalty_by_definition(model, curvatures, anchor, x, damping=0.3, scale=1.7)
    expected_gradients = torch.autograd.grad(expected, parameters)
    torch.testing.assert_close(value, expected, rtol=1e-11, atol=0)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("training", [True, False])
def test_gradcheck_through_weights_gamma_beta_and_bias(training):
    model, curvatures, anchor = consolidated()
    move(model)
    x = classification_loader(5, 3, seed=3)[0][0]
    model.train(training)
    names = [name for name, _ in model.named_parameters()]

    with ek.QuadraticPenalty(model, curvatures, anchor, damping=0.1) as penalty:

        def value_at(*values):
            # In place, so that the penalty meets the very modules it was made for; the identity
            # with the leaf is restored through functional_call's swap.
            with torch.nn.utils.stateless._reparametrize_module(
                model, dict(zip(names, values, strict=True))
            ):
                model(x)
                return penalty()

        leaves = [p.detach().clone().requires_grad_() for p in model.parameters()]
        assert torch.autograd.gradcheck(value_at, leaves, atol=1e-6)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10_000), damping=st.sampled_from([0.0, 0.5]))
def test_zero_with_zero_gradient_at_the_anchor(seed, damping):
    model, curvatures, anchor = consolidated(seed=seed)
    ek.reparameterize(model, classification_loader(5, 3, seed=seed))
    model.eval()
    with ek.QuadraticPenalty(model, curvatures, anchor, damping=damping) as penalty:
        value = penalty()
        gradients = torch.autograd.grad(value, list(model.parameters()))
    assert float(value.detach()) < 1e-20
    assert max(float(g.abs().max()) for g in gradients) < 1e-10


def test_zero_in_train_mode_on_the_whole_data_of_the_reparameterization():
    model, curvatures, anchor = consolidated()
    loader = classification_loader(5, 3, batch_size=32)
    ek.reparameterize(model, loader)
    model.train()
    with ek.QuadraticPenalty(model, curvatures, anchor) as penalty:
        model(loader[0][0])
        assert value_of(penalty) < 1e-20
        model(loader[0][0][:16])
        assert value_of(penalty) > 1e-6  # other statistics, other weights


@pytest.mark.parametrize("approximation", ["xkfac", "diagonal"])
def test_raw_coordinates_penalise_the_linear_alone(approximation):
    model, curvatures, anchor = consolidated(approximation, coordinates="raw")
    with torch.no_grad():
        model[1].weight.mul_(3.0)
    with ek.QuadraticPenalty(model, curvatures, anchor) as penalty:
        assert value_of(penalty) == 0.0
        move(model)
        expected = sum(
            0.5 * c[name].quadratic(d)
            for c in curvatures
            for name, d in penalty.deviations().items()
        )
        torch.testing.assert_close(value_of(penalty), float(expected))


def test_without_curvatures_it_is_l2_to_the_anchor():
    model, _, anchor = consolidated(tasks=1)
    move(model)
    model.eval()
    with ek.QuadraticPenalty(model, [], anchor, damping=0.4) as penalty:
        expected = sum(
            0.2 * float(d.detach().square().sum()) for d in penalty.deviations().values()
        )
        assert value_of(penalty) == pytest.approx(expected, rel=1e-12)
        assert penalty.top_eigenvalue() == 0.4


def test_top_eigenvalue_against_the_dense_hessian():
    model, curvatures, anchor = consolidated()
    with ek.QuadraticPenalty(model, curvatures, anchor, damping=0.2, scale=3.0) as penalty:
        dense = [sum(c[name].dense() for c in curvatures) for name in curvatures[0]]
        top = 3.0 * max(float(torch.linalg.eigvalsh(d)[-1]) for d in dense) + 0.2
        assert penalty.top_eigenvalue() == pytest.approx(top, rel=1e-3)


# --- the largest stable learning rate, in the model's own parameters ------------------------------


def diverges(model, x, penalty, lr, momentum, nesterov=False):
    """Whether gradient descent from near the anchor takes the penalty up.

    Only at first: a layer before a BatchNorm grows when it is thrown about, which slows its steps
    down until they are stable again.
    """
    move(model, size=1e-5)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, nesterov=nesterov)
    values = []
    for _ in range(120):
        model(x)
        value = penalty()
        values.append(float(value.detach()))
        if values[-1] > 30.0 * values[0]:
            return True
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return values[-1] > values[0]


@pytest.mark.parametrize(
    ("gain", "training", "momentum"),
    # Every pair of two of them.
    [(0.2, True, 0.0), (0.2, False, 0.9), (20.0, True, 0.9), (20.0, False, 0.0)],
)
@pytest.mark.parametrize("name", ONE_LAYER)
def test_sgd_diverges_just_above_max_stable_lr_and_not_below(name, gain, training, momentum):
    model, x, curvature, anchor = one_layer(name, gain)
    for factor, expected in ((0.9, False), (1.1, True)):
        other = copy.deepcopy(model).train(training)
        with ek.QuadraticPenalty(other, curvature, anchor) as penalty:
            lr = factor * penalty.max_stable_lr(momentum)
            assert diverges(other, x, penalty, lr, momentum) == expected, factor


@pytest.mark.parametrize("name", ["Linear", "Linear without bias"])
def test_nesterovs_momentum_is_stable_less_far(name):
    model, x, curvature, anchor = one_layer(name, 1.0)
    for factor, expected in ((0.9, False), (1.1, True)):
        other = copy.deepcopy(model).eval()
        with ek.QuadraticPenalty(other, curvature, anchor) as penalty:
            lr = factor * penalty.max_stable_lr(0.9, nesterov=True)
            assert diverges(other, x, penalty, lr, 0.9, nesterov=True) == expected, factor


@pytest.mark.parametrize("gain", [0.05, 30.0])
def test_the_stable_learning_rate_counts_the_gains(gain):
    """In merged weights the bound would be off by the gain squared."""
    model, _, curvature, anchor = one_layer("Linear", gain)
    model = copy.deepcopy(model).train()
    with ek.QuadraticPenalty(model, curvature, anchor) as penalty:
        in_merged_weights = 2.0 / penalty.top_eigenvalue()
        ratio = in_merged_weights / penalty.max_stable_lr()
    assert ratio > 10.0 if gain > 1.0 else ratio < 1.0


@pytest.mark.parametrize("huge", [1e200, 1e300])
def test_a_bound_that_overflows_is_a_numerical_error(huge):
    model, curvatures, anchor = consolidated()
    model = copy.deepcopy(model).train()
    with torch.no_grad():
        model[1].weight.fill_(huge)
    penalty = ek.QuadraticPenalty(model, curvatures, anchor)
    with pytest.raises(NumericalError, match="top eigenvalue: .* overflows"):
        penalty.max_stable_lr()
    penalty.close()


def test_second_derivatives_are_refused_rather_than_half_there():
    model, curvatures, anchor = consolidated()
    model = copy.deepcopy(model).eval()
    with ek.QuadraticPenalty(model, curvatures, anchor) as penalty:
        (model(torch.randn(8, model[0].in_features).double()).sum() + penalty()).backward()
        with pytest.raises(OptionError, match="penalty: .* without create_graph=True"):
            penalty().backward(create_graph=True)


def test_check_lr_warns_only_above_the_bound():
    model, curvatures, anchor = consolidated()
    with ek.QuadraticPenalty(model, curvatures, anchor) as penalty:
        bound = penalty.max_stable_lr(0.5)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert penalty.check_lr(0.99 * bound, 0.5)
        with pytest.warns(ek.StabilityWarning, match="exceeds"):
            assert not penalty.check_lr(1.01 * bound, 0.5)


def test_calling_before_a_forward_pass_in_train_mode_is_an_error():
    model, curvatures, anchor = consolidated()
    model.train()
    penalty = ek.QuadraticPenalty(model, curvatures, anchor)
    with pytest.raises(ModelChangedError, match=r"'1'.*forward pass"):
        penalty()


def test_calling_after_a_step_without_a_new_forward_pass_is_an_error():
    model, curvatures, anchor = consolidated()
    model.train()
    with ek.QuadraticPenalty(model, curvatures, anchor) as penalty:
        model(classification_loader(5, 3)[0][0])
        move(model)
        with pytest.raises(ModelChangedError, match=r"'0'.*last forward pass"):
            penalty()


def test_a_replaced_layer_is_an_error():
    model, curvatures, anchor = consolidated()
    model.eval()
    with ek.QuadraticPenalty(model, curvatures, anchor) as penalty:
        model[3] = nn.Linear(6, 6).double()
        with pytest.raises(ModelChangedError, match="'3'"):
            penalty()


def test_a_value_beyond_the_range_of_its_dtype_is_a_named_overflow():
    model = nn.Sequential(nn.Linear(4, 3))
    curvature = ek.estimate_curvature(model, classification_loader(4, 3, dtype=torch.float32))
    anchor = ek.merged_weights(model)
    with ek.QuadraticPenalty(model, curvature, anchor, scale=1e30) as penalty:
        move(model, size=1e8)
        with pytest.raises(NonFiniteError, match="overflow"):
            penalty()


def test_closing_removes_every_hook_and_the_anchor_is_a_copy():
    model, curvatures, anchor = consolidated()
    penalty = ek.QuadraticPenalty(model, curvatures, anchor)
    anchor["0"].add_(1.0)
    model.eval()
    assert value_of(penalty) < 1e-20
    penalty.close()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_last_curvature_must_be_taken_at_the_anchor():
    model, curvatures, _ = consolidated()
    move(model)
    with pytest.raises(ModelChangedError, match="'0'.*anchor"):
        ek.QuadraticPenalty(model, curvatures, ek.merged_weights(model))


# --- the anchor's BatchNorms are the penalty's ---------------------------------------------------


def over_locations(affine):
    """A BatchNorm over as many locations as its Linear has outputs, inputs and a curvature."""
    model = mlp(4, 3, 3, affine=affine)[:3]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 3, 4, generator=generator, dtype=torch.float64)
    return model, x, ek.estimate_curvature(model, [(x, torch.zeros_like(x[..., :3]))], loss="mse")


@pytest.mark.parametrize("affine", [True, False])
def test_an_anchor_merged_with_a_batchnorm_the_curvature_does_not_merge_is_refused(affine):
    model, x, curvature = over_locations(affine)
    message = "'0': expected .* no BatchNorm merged .* got .* BatchNorm '1'.*example="
    with pytest.raises(IncompatibleError, match=message):
        ek.QuadraticPenalty(model, curvature, ek.merged_weights(model))
    anchor = ek.merged_weights(model, example=x)
    model.eval()
    with ek.QuadraticPenalty(model, curvature, anchor) as penalty:
        assert value_of(penalty) == 0.0


def test_an_anchor_merged_with_no_batchnorm_where_the_curvature_merges_one_is_refused():
    model, curvatures, _ = consolidated()
    message = "'0': expected .* BatchNorm '1' merged .* got .* no BatchNorm"
    with pytest.raises(IncompatibleError, match=message):
        ek.QuadraticPenalty(model, curvatures, ek.raw_weights(model))


def test_a_merged_anchor_is_refused_in_raw_coordinates_also_without_curvatures():
    model, curvatures, _ = consolidated(coordinates="raw")
    anchor = ek.merged_weights(model)
    for tasks in (curvatures, []):
        with pytest.raises(IncompatibleError, match="'0': expected .* no BatchNorm .* '1'"):
            ek.QuadraticPenalty(model, tasks, anchor, coordinates="raw", damping=0.1)


@pytest.mark.parametrize("kind", [dict, ek.Anchor])
def test_weights_without_a_record_of_batchnorms_are_accepted(kind):
    model, curvatures, anchor = consolidated()
    model.eval()
    with ek.QuadraticPenalty(model, curvatures, kind(anchor)) as penalty:
        assert value_of(penalty) < 1e-20


def test_forward_and_statistics_are_untouched_by_the_penalty():
    model, curvatures, anchor = consolidated()
    plain = copy.deepcopy(model).train()
    model.train()
    x = classification_loader(5, 3)[0][0]
    with ek.QuadraticPenalty(model, curvatures, anchor) as penalty:
        outputs = model(x)
        penalty().backward()
    torch.testing.assert_close(outputs, plain(x), rtol=0, atol=0)
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=0, atol=0)
