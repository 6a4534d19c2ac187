"""Merging BatchNorm into weights and putting it back leaves the function as it was."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ekfac_rs as ek
from nets import classification_loader, mlp, random_batchnorms


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
    for weights in ("kept", "merged"):
        put_back = copy.deepcopy(model)
        ek.reparameterize(put_back, loader, weights=weights)
        assert relative_change(eval_outputs(put_back, x), before) < 1e-5
    ek.merge_batchnorm(model)
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


def test_merged_weights_leave_the_model_alone_and_agree_with_an_export():
    model = mlp(5, 7, 6, 3)
    before = copy.deepcopy(model.state_dict())
    anchor = ek.merged_weights(model)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    ek.merge_batchnorm(model)
    torch.testing.assert_close(model[0].weight, anchor["0"][:, :-1], rtol=0, atol=0)
    torch.testing.assert_close(model[1].bias, anchor["0"][:, -1], rtol=0, atol=0)
    # Merging is idempotent up to the rounding of 1 - eps.
    torch.testing.assert_close(dict(ek.merged_weights(model)), dict(anchor))


def test_merging_keeps_the_keys_of_the_state_dict():
    model = mlp(5, 7, 3)
    keys = list(model.state_dict())
    ek.merge_batchnorm(model)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("weights", ["kept", "merged"])
@pytest.mark.parametrize("export_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_reparameterizing_keeps_the_function_and_normalises_the_inputs_it_saw(
    weights, export_first, bias
):
    model = mlp(6, 8, 7, 3, bias=bias)
    loader = classification_loader(6, 3, examples=48, batch_size=20)
    x = torch.cat([x for x, _ in loader])
    before = eval_outputs(model, x)
    if export_first:
        ek.merge_batchnorm(model)
    ek.reparameterize(model, loader, weights=weights)
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


def test_reparameterizing_gives_the_statistics_of_the_pass_and_keeps_weights_and_gains():
    model = mlp(6, 8, 3)
    loader = classification_loader(6, 3, examples=40, batch_size=16)
    x = torch.cat([x for x, _ in loader])
    before = copy.deepcopy(model)
    rows = before[0](x)
    ek.reparameterize(model, loader)
    torch.testing.assert_close(model[1].running_mean, rows.mean(0))
    torch.testing.assert_close(model[1].running_var, rows.var(0, correction=0))
    for name, parameter in model.named_parameters():
        if name not in ("1.weight", "1.bias"):
            assert torch.equal(parameter, before.get_parameter(name)), name
    gains = [m[1].weight / torch.sqrt(m[1].running_var + m[1].eps) for m in (model, before)]
    torch.testing.assert_close(*gains)


def test_the_papers_form_moves_the_gains_into_the_weights():
    model = mlp(6, 8, 3)
    loader = classification_loader(6, 3, examples=40, batch_size=16)
    anchor = ek.merged_weights(model)
    ek.reparameterize(model, loader, weights="merged")
    torch.testing.assert_close(model[0].weight, anchor["0"][:, :-1])
    assert not model[0].bias.any()
    torch.testing.assert_close(model[1].weight, torch.sqrt(model[1].running_var + model[1].eps))
    torch.testing.assert_close(dict(ek.merged_weights(model)), dict(anchor))


@settings(deadline=None, max_examples=25)
@given(
    widths=st.lists(st.integers(2, 9), min_size=3, max_size=5),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_rows_go_back_to_their_first_norms_under_the_same_function(widths, bias, seed):
    model = mlp(*widths, bias=bias, seed=seed)
    norms = ek.weight_norms(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model:
            if isinstance(module, nn.Linear):
                scale = torch.rand(len(module.weight), 1, generator=generator).double() + 0.1
                module.weight.mul_(10.0 * scale)
    loader = classification_loader(widths[0], 2, seed=seed)
    x = torch.cat([x for x, _ in loader])
    before, head = eval_outputs(model, x), model[-1].weight.clone()
    ek.reparameterize(model, loader, weights="first", norms=norms)
    assert relative_change(eval_outputs(model, x), before) < 1e-11
    for name, norm in ek.weight_norms(model).items():
        if int(name) < len(model) - 1:
            torch.testing.assert_close(norm, norms[name])
    # No BatchNorm takes up what the head's rows would lose.
    assert torch.equal(model[-1].weight, head)
    # Statistics are those of the loader: train mode computes the same function on all of it.
    torch.testing.assert_close(copy.deepcopy(model).train()(x), before)


def test_first_norms_are_asked_for_and_must_fit():
    model, loader = mlp(4, 3, 2), classification_loader(4, 2)
    norms = ek.weight_norms(model)
    for options in ({"weights": "first"}, {"norms": norms}, {"weights": "merged", "norms": norms}):
        with pytest.raises(
            ek.errors.OptionError, match="norms: expected them with weights='first'"
        ):
            ek.reparameterize(model, loader, **options)
    with pytest.raises(ek.errors.UnknownLayerError, match="expected those of layer '0'"):
        ek.reparameterize(model, loader, weights="first", norms={})
    with pytest.raises(ek.errors.ShapeError, match="layer '0': expected norms of shape"):
        ek.reparameterize(model, loader, weights="first", norms={"0": torch.ones(2)})


def test_a_row_that_is_zero_stays_zero():
    model, loader = mlp(4, 3, 2), classification_loader(4, 2)
    norms = ek.weight_norms(model)
    with torch.no_grad():
        model[0].weight[1] = 0.0
        norms["0"][2] = 0.0
        other = model[0].weight[2].clone()
    before = eval_outputs(model, loader[0][0])
    ek.reparameterize(model, loader, weights="first", norms=norms)
    assert not model[0].weight[1].any()
    assert torch.equal(model[0].weight[2], other)
    torch.testing.assert_close(eval_outputs(model, loader[0][0]), before)


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
    ek.reparameterize(model, loader)
    assert relative_change(eval_outputs(model, loader[0][0]), before) < 1e-12
    assert int(model[1].num_batches_tracked) == len(loader)


def test_reparameterizing_without_affine_parameters_is_refused_by_name():
    model = mlp(6, 8, 3, affine=False)
    with pytest.raises(ek.errors.BatchNormError, match="'1'.*affine.*without scale and shift"):
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


# --- a BatchNorm after a Linear: over its outputs in [N, D], over locations in [N, T, D] ----------


def linear_and_batchnorm(locations):
    """A BatchNorm as wide as its Linear and as there are locations, and inputs of either kind."""
    generator = torch.Generator().manual_seed(0)
    model = mlp(4, 3, 3)[:3]
    shape = (24, 3, 4) if locations else (24, 4)
    return model, torch.randn(shape, generator=generator, dtype=torch.float64)


def hooks(model):
    return [hook for m in model.modules() for hook in m._forward_pre_hooks.values()]


@pytest.mark.parametrize("locations", [False, True])
def test_with_an_example_the_function_stays_over_features_and_over_locations(locations):
    model, x = linear_and_batchnorm(locations)
    before = eval_outputs(model, x)
    curvature = ek.estimate_curvature(model, [(x, torch.zeros_like(before))], loss="mse")
    anchor = ek.merged_weights(model, example=x)
    assert anchor.batchnorms == curvature.batchnorms
    assert anchor.batchnorms == ({"0": None, "1": "1"} if locations else {"0": "1"})
    ek.merge_batchnorm(model, example=x)
    assert relative_change(eval_outputs(model, x), before) < 1e-12
    ek.reparameterize(model, [x])
    assert relative_change(eval_outputs(model, x), before) < 1e-12


def test_without_an_example_merging_a_batchnorm_over_locations_is_refused_at_first_use():
    model, x = linear_and_batchnorm(locations=True)
    state, before = copy.deepcopy(model.state_dict()), eval_outputs(model, x)
    ek.merge_batchnorm(model)
    message = "'1'.*matrix.*merged wrongly.*example="
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        for training in (True, False):
            with pytest.raises(ek.errors.UnsupportedLayerError, match=message):
                copied.train(training)(x)
    with pytest.raises(ek.errors.UnsupportedLayerError, match=message):
        ek.reparameterize(model, [x])
    # With its weights restored the model is as good as before.
    model.load_state_dict(state)
    assert relative_change(eval_outputs(model, x), before) == 0.0
    ek.merge_batchnorm(model, example=x)
    assert relative_change(eval_outputs(model, x), before) < 1e-12


# --- an export is for deployment ------------------------------------------------------------------


def test_an_exported_model_refuses_to_train_until_it_is_put_back():
    model, loader = mlp(6, 8, 3), classification_loader(6, 3)
    x, state = loader[0][0], copy.deepcopy(model.state_dict())
    before = eval_outputs(model, x)
    ek.merge_batchnorm(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        with pytest.raises(ek.errors.BatchNormError, match="'1'.*eval mode.*train mode"):
            copied.train()(x)
        with torch.no_grad():
            assert relative_change(copied.eval()(x), before) < 1e-12
    restored = copy.deepcopy(model)
    restored.load_state_dict(state)
    restored.train()(x)
    ek.reparameterize(model, loader)
    model.train()(x)


def test_an_export_with_all_its_batchnorms_alone_refuses_to_train_too():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    ek.merge_batchnorm(model)
    with pytest.raises(ek.errors.BatchNormError, match="'0'"):
        model.train()(torch.randn(8, 4))


def partly_affine(scale, shift, alone):
    """A BatchNorm with or without a scale and a shift, after a Linear or by itself."""
    generator = torch.Generator().manual_seed(0)
    model = mlp(4, 5, 3)
    if alone:
        model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3)).double()
        random_batchnorms(model, generator)
    if not scale:
        model[1].weight = None
    if not shift:
        model[1].bias = None
    return model, torch.randn(9, 4, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("alone", [False, True], ids=["after a Linear", "alone"])
@pytest.mark.parametrize(("scale", "shift"), [(True, False), (False, True)])
def test_a_scale_alone_and_a_shift_alone_are_merged_estimated_and_penalised(scale, shift, alone):
    model, x = partly_affine(scale, shift, alone)
    before = eval_outputs(model, x)
    curvature = ek.estimate_curvature(model, [(x, torch.zeros_like(before))], loss="mse")
    anchor = ek.merged_weights(model)
    name = "1" if alone else "0"
    assert curvature[name].shape == tuple(anchor[name].shape)
    with ek.QuadraticPenalty(model, curvature, anchor, damping=0.1) as penalty:
        model.eval()
        assert float(penalty().detach()) < 1e-20
    ek.merge_batchnorm(model)
    assert relative_change(eval_outputs(model, x), before) < 1e-12


@pytest.mark.parametrize("alone", [False, True], ids=["after a Linear", "alone"])
@pytest.mark.parametrize(
    ("scale", "shift", "missing"), [(True, False, "shift"), (False, True, "scale")]
)
def test_new_statistics_without_a_scale_or_a_shift_are_refused(scale, shift, missing, alone):
    model, x = partly_affine(scale, shift, alone)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ek.errors.BatchNormError, match=f"'1'.*without {missing}"):
        ek.reparameterize(model, [x])
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


# --- all or nothing -------------------------------------------------------------------------------


def failing_at(number):
    """A stand-in for ``Tensor.copy_`` that is interrupted at its n-th call."""
    calls, copy_ = [], torch.Tensor.copy_

    def interrupted(self, *args, **kwargs):
        calls.append(None)
        if len(calls) == number:
            raise Interrupted
        return copy_(self, *args, **kwargs)

    return interrupted


WRITERS = {
    "merge_batchnorm": lambda model, loader: ek.merge_batchnorm(model),
    "reparameterize": lambda model, loader: ek.reparameterize(model, loader),
    "the paper's form": lambda model, loader: ek.reparameterize(model, loader, weights="merged"),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("number", [1, 2, 5, 9])
def test_a_write_that_fails_midway_leaves_every_tensor_bit_for_bit(writer, number, monkeypatch):
    model, loader = mlp(6, 8, 7, 3), classification_loader(6, 3)
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setattr(torch.Tensor, "copy_", failing_at(number))
    with pytest.raises(Interrupted):
        WRITERS[writer](model, loader)
    monkeypatch.undo()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert not hooks(model)


def test_a_layer_that_cannot_be_merged_leaves_those_before_it_unmerged():
    model = mlp(6, 8, 7, 3)
    model[4].register_buffer("running_var", None)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ek.errors.BatchNormError, match="'4'"):
        ek.merge_batchnorm(model)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


# --- a BatchNorm that its user froze --------------------------------------------------------------


def test_a_batchnorm_in_eval_mode_within_a_model_in_train_mode_takes_no_new_statistics():
    model, loader = mlp(6, 8, 7, 3).train(), classification_loader(6, 3)
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    x = loader[0][0]
    outputs = eval_outputs(model, x)
    ek.reparameterize(model, loader)
    after = model.state_dict()
    assert {key for key in after if not torch.equal(after[key], before[key])} == {
        f"4.{part}"
        for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    }
    assert relative_change(eval_outputs(model, x), outputs) < 1e-12
    assert not model[1].training
