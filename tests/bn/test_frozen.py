"""A BatchNorm that its user keeps in eval mode stays there, under its own statistics."""

import copy

import pytest
import torch
from torch import nn

import ekfac_rs as ek
from cases import APPROXIMATIONS, LOSSES, NETWORKS, dense_block, estimate
from ekfac_rs.batchnorm import frozen_batchnorms
from nets import classification_loader, mlp
from oracle import dense, relative_error, strata_terms, units_of


def states_equal(first, second):
    return all(torch.equal(first[key], second[key]) for key in first)


def in_eval_mode(model, *names):
    for name in names:
        model.get_submodule(name).eval()
    return model


def frozen_parameters(model, *names):
    for name in names:
        model.get_submodule(name).requires_grad_(False)
    return model


WAYS = {
    "all train": (lambda model: model.train(), ()),
    "one in eval mode": (lambda model: in_eval_mode(model.train(), "1"), ("1",)),
    "all evaluated": (lambda model: model.eval(), ()),
    "evaluated, one without gradients": (
        lambda model: frozen_parameters(model.eval(), "4"),
        ("4",),
    ),
    # Its user trains its statistics alone.
    "without gradients in train mode": (lambda model: frozen_parameters(model.train(), "1"), ()),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_counts_as_frozen(way):
    change, expected = WAYS[way]
    assert frozen_batchnorms(change(mlp(4, 5, 5, 3))) == expected


# --- curvature ------------------------------------------------------------------------------------


@pytest.mark.parametrize("coordinates", ["raw", "merged"])
@pytest.mark.parametrize("approximation", APPROXIMATIONS)
@pytest.mark.parametrize("frozen", ["1", "4"])
def test_a_pass_uses_the_running_statistics_of_a_frozen_batchnorm_and_the_batchs_of_others(
    frozen, approximation, coordinates
):
    network = NETWORKS["mlp-bn"]
    model, batches = network.make(), network.batches("cross_entropy", (7,))
    in_eval_mode(model.train(), frozen)
    options = {"approximation": approximation, "coordinates": coordinates}
    curvature = estimate(model, batches, "cross_entropy", **options)
    assert curvature.settings.frozen == (frozen,)
    for layer in ("0", "3", "6"):
        blocks = {
            kept: dense(
                strata_terms(
                    approximation,
                    [
                        units_of(
                            *(model, layer, batches[0], LOSSES["cross_entropy"].of_example),
                            coordinates=coordinates,
                            frozen=kept,
                        )
                    ],
                )
            )
            for kept in ((frozen,), (), ("1", "4"))
        }
        expected = blocks.pop((frozen,))
        found = dense_block(curvature[layer])
        assert relative_error(found, expected) < 1e-12
        # The head sees what the later BatchNorm makes, whatever the earlier one does to it.
        assert max(relative_error(found, other) for other in blocks.values()) > 1e-3


def test_running_statistics_everywhere_leave_nothing_to_freeze():
    network = NETWORKS["mlp-bn"]
    model = in_eval_mode(network.make().train(), "1")
    curvature = estimate(
        model, network.batches("cross_entropy", (7,)), "cross_entropy", statistics="running"
    )
    assert curvature.settings.frozen == ()


def test_passes_with_different_batchnorms_frozen_are_not_parts_of_one():
    network = NETWORKS["mlp-bn"]
    batches = network.batches("cross_entropy", (7,))
    first, second = (
        estimate(in_eval_mode(network.make().train(), name), batches, "cross_entropy")
        for name in ("1", "4")
    )
    with pytest.raises(ek.errors.IncompatibleError, match=r"frozen: expected \('1',\)"):
        first.merge(second)


def test_a_single_example_passes_where_every_batchnorm_is_frozen():
    model, ((x, y), *_) = mlp(4, 5, 5, 3), classification_loader(4, 3)
    in_eval_mode(model.train(), "1", "4")
    curvature = ek.estimate_curvature(
        model, [(x[:1], y[:1])], approximation="kfac-expand", labels="exact"
    )
    model.eval()
    running = ek.estimate_curvature(
        model,
        [(x[:1], y[:1])],
        approximation="kfac-expand",
        labels="exact",
        statistics="running",
    )
    for name in curvature:
        assert relative_error(dense_block(curvature[name]), dense_block(running[name])) < 1e-14


def test_settings_come_back_from_a_file(tmp_path):
    network = NETWORKS["mlp-bn"]
    model = in_eval_mode(network.make().train(), "1")
    curvature = estimate(model, network.batches("cross_entropy", (7,)), "cross_entropy")
    curvature.save(tmp_path / "c.safetensors")
    assert ek.Curvature.load(tmp_path / "c.safetensors").settings == curvature.settings


# --- training -------------------------------------------------------------------------------------


def backbone_and_head(how):
    """A pretrained backbone that is not to be trained, and a head that is."""
    model = nn.Sequential(mlp(8, 12, 12, 6), nn.ReLU(), mlp(6, 5, 3)).float()
    if how == "backbone frozen":
        model.train()
        model[0].requires_grad_(False).eval()
    elif how == "as the whole was evaluated":
        model[0].requires_grad_(False)
        model.eval()
    return model


@pytest.mark.parametrize("how", ["backbone frozen", "as the whole was evaluated"])
@pytest.mark.parametrize("freeze_bn_after", [1.0, 0.5])
@pytest.mark.parametrize("approximation", ["xkfac", "kfac-expand", None])
def test_a_frozen_backbone_under_a_trained_head_never_moves(approximation, freeze_bn_after, how):
    model = backbone_and_head(how)
    before = copy.deepcopy(model.state_dict())
    modes = {name: module.training for name, module in model.named_modules()}
    learner = ek.ContinualLearner(
        model, approximation=approximation, damping=0.01, freeze_bn_after=freeze_bn_after
    )
    seen = []

    def look(step, learner):
        seen.append([m.training for m in model[0] if isinstance(m, nn.BatchNorm1d)])

    for seed in range(2):
        loader = classification_loader(8, 3, seed=seed, examples=64, dtype=torch.float32)
        learner.fit(loader, epochs=2, callback=look)
        learner.consolidate(loader)
    after = model.state_dict()
    own = [key for key in after if key.startswith("0.")]
    assert states_equal({key: before[key] for key in own}, after)
    assert not torch.equal(after["2.1.running_mean"], before["2.1.running_mean"])
    assert not any(training for step in seen for training in step)
    assert modes == {name: module.training for name, module in model.named_modules()}
    for curvature in learner.curvatures:
        assert curvature.settings.frozen == ("0.1", "0.4")


def test_fit_leaves_other_modes_of_a_model_in_train_mode_alone():
    model = nn.Sequential(nn.Linear(8, 6), nn.Dropout(0.5), nn.Linear(6, 3)).train()
    model[1].eval()
    seen = []
    ek.ContinualLearner(model, approximation=None).fit(
        classification_loader(8, 3, dtype=torch.float32),
        callback=lambda step, _: seen.append(model[1].training),
    )
    assert seen
    assert not any(seen)


def test_the_penalty_of_a_frozen_layer_is_under_its_running_statistics():
    model = mlp(5, 6, 6, 3)
    (x, y), (z, _) = classification_loader(5, 3)
    in_eval_mode(model.train(), "1")
    curvature = ek.estimate_curvature(model, [(x, y)], labels="type2")
    anchor = ek.merged_weights(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    with ek.QuadraticPenalty(model, curvature, anchor) as penalty:
        deviations = []
        for batch in (x, z):
            model(batch)
            deviations.append({k: d.detach() for k, d in penalty.deviations().items()})
    own = ek.merged_weights(model)
    torch.testing.assert_close(deviations[0]["0"], own["0"] - anchor["0"])
    torch.testing.assert_close(deviations[1]["0"], deviations[0]["0"], rtol=0, atol=0)
    assert not torch.allclose(deviations[1]["3"], deviations[0]["3"])


def test_a_warning_turned_into_an_error_leaves_nothing_of_fit_behind():
    first, second = (classification_loader(8, 3, seed=seed, dtype=torch.float32) for seed in (0, 1))
    model = mlp(8, 6, 3, dtype=torch.float32).eval()
    learner = ek.ContinualLearner(model, scale=1e6, step="explicit")
    learner.fit(first)
    learner.consolidate(first)
    with pytest.raises(ek.StabilityWarning):  # warnings are errors in these tests
        learner.fit(second, lr=1.0)
    assert not any(m.training for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
