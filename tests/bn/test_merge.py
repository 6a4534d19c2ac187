"""Merging BatchNorm into weights and putting it back leaves the function as it was."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ekfac_rs as ek
from nets import classification_loader, mlp


def eval_outputs(model, x):
    with torch.no_grad():
        return copy.deepcopy(model).eval()(x)


def relative_change(after, before):
    return float((after - before).norm() / before.norm())


@settings(deadline=None, max_examples=25)
@given(
    widths=st.lists(st.integers(2, 9), min_size=3, max_size=6),
    bias=st.booleans(),
    affine=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_merging_keeps_the_eval_mode_function(widths, bias, affine, seed):
    model = mlp(*widths, bias=bias, affine=affine, seed=seed)
    x = classification_loader(widths[0], 2, seed=seed)[0][0]
    before = eval_outputs(model, x)
    ek.merge_batchnorm(model)
    assert relative_change(eval_outputs(model, x), before) < 1e-12


@pytest.mark.parametrize("depth", [2, 10, 30])
def test_float32_round_trip_changes_a_deep_net_by_less_than_1e_5(depth):
    model = mlp(*[20] * depth, 4, dtype=torch.float32)
    loader = classification_loader(20, 4, examples=64, dtype=torch.float32)
    # Statistics of the data itself, as after training: otherwise a deep random net saturates.
    model.train()
    for _ in range(50):
        for x, _ in loader:
            model(x)
    x = loader[0][0]
    before = eval_outputs(model, x)
    ek.merge_batchnorm(model)
    assert relative_change(eval_outputs(model, x), before) < 1e-5
    ek.reparameterize(model, loader)
    assert relative_change(eval_outputs(model, x), before) < 1e-5


def test_merged_weights_are_the_affine_map_of_the_pair_in_eval_mode():
    model = mlp(5, 7, 3)
    anchor = ek.merged_weights(model)
    a = torch.randn(4, 5, dtype=torch.float64)
    ones = torch.ones(4, 1, dtype=torch.float64)
    expected = eval_outputs(model[:2], a)
    torch.testing.assert_close(torch.cat([a, ones], 1) @ anchor["0"].T, expected)
    assert anchor["0"].shape == (7, 6)
    assert anchor["3"].shape == (3, 8)


def test_merged_weights_leave_the_model_alone_and_agree_with_merging_it():
    model = mlp(5, 7, 6, 3)
    before = copy.deepcopy(model.state_dict())
    looked_at = ek.merged_weights(model)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    merged = ek.merge_batchnorm(model)
    torch.testing.assert_close(dict(looked_at), dict(merged), rtol=0, atol=0)
    # Merging is idempotent up to the rounding of 1 - eps.
    torch.testing.assert_close(dict(ek.merge_batchnorm(model)), dict(merged))


def test_merging_keeps_the_keys_of_the_state_dict():
    model = mlp(5, 7, 3)
    keys = list(model.state_dict())
    ek.merge_batchnorm(model)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("merge_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_reparameterizing_keeps_the_function_and_normalises_the_inputs_it_saw(merge_first, bias):
    model = mlp(6, 8, 7, 3, bias=bias)
    loader = classification_loader(6, 3, examples=48, batch_size=20)
    x = torch.cat([x for x, _ in loader])
    before = eval_outputs(model, x)
    if merge_first:
        ek.merge_batchnorm(model)
    ek.reparameterize(model, loader)
    assert relative_change(eval_outputs(model, x), before) < 1e-12
    # On the whole data as one batch, train mode now computes the same function ...
    with torch.no_grad():
        together = copy.deepcopy(model).train()(x)
    assert relative_change(together, before) < 1e-12
    # ... and after an update of the weights it does not: BatchNorm is back.
    with torch.no_grad():
        model[0].weight.mul_(1.5)
        scaled = copy.deepcopy(model).train()(x)
    assert relative_change(scaled, before) < 1e-4
    assert relative_change(eval_outputs(model, x), before) > 1e-2


def test_reparameterizing_gives_the_statistics_of_the_pass():
    model = mlp(6, 8, 3)
    loader = classification_loader(6, 3, examples=40, batch_size=16)
    ek.merge_batchnorm(model)
    x = torch.cat([x for x, _ in loader])
    rows = x @ model[0].weight.T
    ek.reparameterize(model, loader)
    torch.testing.assert_close(model[1].running_mean, rows.mean(0))
    torch.testing.assert_close(model[1].running_var, rows.var(0, correction=0))


def test_max_examples_limits_the_pass():
    model, other = mlp(6, 8, 3), mlp(6, 8, 3)
    loader = classification_loader(6, 3, examples=40, batch_size=16)
    ek.reparameterize(model, loader, max_examples=16)
    ek.reparameterize(other, loader[:1])
    torch.testing.assert_close(model.state_dict(), other.state_dict())


def test_momentum_none_is_handled():
    model = mlp(6, 8, 3)
    model[1].momentum = None
    loader = classification_loader(6, 3)
    before = eval_outputs(model, loader[0][0])
    ek.merge_batchnorm(model)
    ek.reparameterize(model, loader)
    assert relative_change(eval_outputs(model, loader[0][0]), before) < 1e-12
    assert int(model[1].num_batches_tracked) == len(loader)


def test_reparameterizing_without_affine_parameters_is_refused_by_name():
    model = mlp(6, 8, 3, affine=False)
    with pytest.raises(ek.errors.BatchNormError, match="'1'.*affine"):
        ek.reparameterize(model, classification_loader(6, 3))


def test_merging_without_running_statistics_is_refused_by_name():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, track_running_stats=False))
    with pytest.raises(ek.errors.BatchNormError, match="'1'.*running statistics"):
        ek.merge_batchnorm(model)


class Interrupted(Exception):
    pass


def broken_loader(loader):
    yield loader[0]
    raise Interrupted


def test_a_failed_reparameterization_leaves_the_model_as_it_was():
    model = mlp(6, 8, 3).train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(Interrupted):
        ek.reparameterize(model, broken_loader(classification_loader(6, 3)))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_raw_weights_leave_batchnorm_out():
    model = mlp(5, 7, 3)
    torch.testing.assert_close(
        ek.raw_weights(model)["0"], torch.cat([model[0].weight, model[0].bias[:, None]], 1)
    )


# --- a BatchNorm after a Linear: over its outputs in [N, D], over positions in [N, T, D] ----------


def linear_and_batchnorm(positions):
    """A BatchNorm as wide as its Linear and as there are positions, and inputs of either kind."""
    generator = torch.Generator().manual_seed(0)
    model = mlp(4, 3, 3)[:3]
    shape = (24, 3, 4) if positions else (24, 4)
    return model, torch.randn(shape, generator=generator, dtype=torch.float64)


def hooks(model):
    return [hook for m in model.modules() for hook in m._forward_pre_hooks.values()]


@pytest.mark.parametrize("positions", [False, True])
def test_with_an_example_the_function_stays_over_features_and_over_positions(positions):
    model, x = linear_and_batchnorm(positions)
    before = eval_outputs(model, x)
    curvature = ek.estimate_curvature(model, [(x, torch.zeros_like(before))], loss="mse")
    anchor = ek.merge_batchnorm(model, example=x)
    assert relative_change(eval_outputs(model, x), before) < 1e-12
    assert anchor.batchnorms == curvature.batchnorms
    assert anchor.batchnorms == ({"0": None, "1": "1"} if positions else {"0": "1"})
    assert not hooks(model)
    ek.reparameterize(model, [x])
    assert relative_change(eval_outputs(model, x), before) < 1e-12


def test_without_an_example_merging_a_batchnorm_over_positions_is_refused_at_first_use():
    model, x = linear_and_batchnorm(positions=True)
    state, before = copy.deepcopy(model.state_dict()), eval_outputs(model, x)
    ek.merge_batchnorm(model)
    message = "'1'.*matrix.*merged wrongly.*example="
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        for _ in range(2):
            with pytest.raises(ek.errors.UnsupportedLayerError, match=message):
                copied(x)
    with pytest.raises(ek.errors.UnsupportedLayerError, match=message):
        ek.reparameterize(model, [x])
    # With its weights restored the model is as good as before.
    model.load_state_dict(state)
    assert relative_change(eval_outputs(model, x), before) == 0.0
    ek.merge_batchnorm(model, example=x)
    assert relative_change(eval_outputs(model, x), before) < 1e-12
    assert not hooks(model)


def test_the_check_of_the_first_input_goes_with_it():
    model, x = linear_and_batchnorm(positions=False)
    before = eval_outputs(model, x)
    ek.merge_batchnorm(model)
    for merged in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        assert len(hooks(merged)) == 1
        with torch.no_grad():
            assert relative_change(merged.eval()(x), before) < 1e-12
        assert not hooks(merged)
