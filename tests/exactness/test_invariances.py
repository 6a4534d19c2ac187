"""What must not change the curvature."""

import pytest
import torch
from torch import Tensor, nn

from cases import APPROXIMATIONS, COORDINATES, NETWORKS, Network, dense_block, estimate
from ekfac_rs.curvature import passes
from ekfac_rs.curvature.accumulators import accumulator
from ekfac_rs.curvature.block import kept_strata
from oracle import relative_error

EXACT = 1e-10


def close(first, second, tolerance: float = EXACT) -> bool:
    """Whether two curvatures have the same layers and the same blocks."""
    return tuple(first) == tuple(second) and all(
        relative_error(dense_block(first[layer]), dense_block(second[layer])) < tolerance
        for layer in first
    )


@pytest.mark.parametrize("statistics", ["batch", "running"])
@pytest.mark.parametrize("approximation", APPROXIMATIONS)
@pytest.mark.parametrize("name", ["mlp-bn", "locations-bn"])
def test_order_of_examples(name, approximation, statistics):
    network = NETWORKS[name]
    model, ((x, y),) = network.make(), network.batches("cross_entropy", (6,))
    order = torch.tensor([4, 2, 5, 0, 3, 1])
    options = {"approximation": approximation, "statistics": statistics}
    plain = estimate(model, [(x, y)], "cross_entropy", **options)
    assert close(estimate(model, [(x[order], y[order])], "cross_entropy", **options), plain)


@pytest.mark.parametrize("approximation", APPROXIMATIONS)
def test_order_of_locations(approximation):
    network = NETWORKS["locations-bn"]
    model, ((x, y),) = network.make(), network.batches("cross_entropy", (6,))
    plain = estimate(model, [(x, y)], "cross_entropy", approximation=approximation)
    moved = estimate(model, [(x.flip(1), y)], "cross_entropy", approximation=approximation)
    assert close(moved, plain)


@pytest.mark.parametrize("approximation", APPROXIMATIONS)
def test_order_of_batches(approximation):
    network = NETWORKS["mlp-bn"]
    model, batches = network.make(), network.batches("bce", (6, 3, 4))
    plain = estimate(model, batches, "bce", approximation=approximation)
    assert close(estimate(model, batches[::-1], "bce", approximation=approximation), plain)


@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("approximation", ["kfac-expand", "kfac-reduce"])
def test_splitting_a_batch_whose_examples_do_not_interact(approximation, coordinates):
    network = NETWORKS["mlp-bn"]
    model, ((x, y),) = network.make(), network.batches("cross_entropy", (9,))
    pieces = list(zip(x.split([5, 3, 1]), y.split([5, 3, 1]), strict=True))
    options = {"approximation": approximation, "coordinates": coordinates}
    whole = estimate(model, [(x, y)], "cross_entropy", statistics="running", **options)
    assert close(estimate(model, pieces, "cross_entropy", statistics="running", **options), whole)


def test_splitting_a_batch_that_interacts_does_change_it():
    network = NETWORKS["mlp-bn"]
    model, ((x, y),) = network.make(), network.batches("cross_entropy", (8,))
    pieces = list(zip(x.split(4), y.split(4), strict=True))
    options = {"approximation": "kfac-expand", "statistics": "batch"}
    whole = estimate(model, [(x, y)], "cross_entropy", **options)
    split = estimate(model, pieces, "cross_entropy", **options)
    assert relative_error(dense_block(split["0"]), dense_block(whole["0"])) > 1e-2


@pytest.mark.parametrize("approximation", APPROXIMATIONS)
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("mlp-bn", (6, 3, 4)),
        ("locations-bn", (6, 3, 4)),
        ("mlp", (1, 4, 8)),
        ("mlp", (8, 1, 4)),
        ("locations-linear", (1, 4, 8)),
    ],
)
def test_merging_disjoint_passes_is_one_pass_over_both(name, sizes, approximation):
    network = NETWORKS[name]
    model, batches = network.make(), network.batches("mse", sizes)
    both = estimate(model, batches, "mse", approximation=approximation)
    first = estimate(model, batches[:1], "mse", approximation=approximation)
    rest = estimate(model, batches[1:], "mse", approximation=approximation)
    for merged in (first.merge(rest), rest.merge(first)):
        assert close(merged, both, 1e-13)
        assert merged.examples == both.examples == 13
        assert merged.batches == both.batches == 3
        assert merged.loss == pytest.approx(both.loss, rel=1e-13)
    assert relative_error(dense_block(first["0"]), dense_block(both["0"])) > 1e-3


@pytest.mark.parametrize("approximation", APPROXIMATIONS)
def test_factors_become_means_where_their_sums_were(approximation):
    network = NETWORKS["mlp-bn"]
    model, (first, second) = network.make(), network.batches("mse", (6, 4))
    made = []

    def keep(*arguments):
        made.append(accumulator(*arguments))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "accumulator", keep)
        found = estimate(model, [first, second], "mse", approximation=approximation)
    for own, block in zip(made, found.values(), strict=True):
        for k, (A, G) in zip(kept_strata(own.gradient_examples), block.terms, strict=True):
            assert A.data_ptr() == own.A.factors[k].data_ptr()
            assert G.data_ptr() == own.G.factors[k].data_ptr()


@pytest.mark.parametrize("kind", ["mse", "bce"])
def test_sum_over_outputs_is_a_multiple_of_their_mean(kind):
    network = NETWORKS["mlp-bn"]
    model, batches = network.make(), network.batches(kind, (6,))
    mean = estimate(model, batches, kind)
    total = estimate(model, batches, f"{kind}-sum")
    for layer in mean:
        expected = 3 * dense_block(mean[layer])
        assert relative_error(dense_block(total[layer]), expected) < 1e-12


@pytest.mark.parametrize("kind", ["mse", "bce"])
@pytest.mark.parametrize("approximation", ["kfac-expand", "xkfac"])
def test_extra_output_dimensions(kind, approximation):
    flat = Network(lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6)), (4,), (6,))
    model, ((x, y),) = flat.make(), flat.batches(kind, (5,))
    reshaped = nn.Sequential(*model, nn.Unflatten(1, (2, 3)))
    expected = estimate(model, [(x, y)], kind, approximation=approximation)
    found = estimate(reshaped, [(x, y.unflatten(1, (2, 3)))], kind, approximation=approximation)
    assert close(found, expected)


def test_extra_output_dimensions_of_cross_entropy():
    flat = Network(lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), (4,), (3,))
    model, ((x, y),) = flat.make(), flat.batches("cross_entropy", (5,))
    reshaped = nn.Sequential(*model, nn.Unflatten(1, (3, 1, 1)))
    expected = estimate(model, [(x, y)], "cross_entropy")
    assert close(estimate(reshaped, [(x, y[:, None, None])], "cross_entropy"), expected)


@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("chosen", [("0",), ("3", "6"), ("6",)])
def test_leaving_other_layers_out(chosen, coordinates):
    network = NETWORKS["mlp-bn"]
    model, batches = network.make(), network.batches("cross_entropy", (6, 4))
    everything = estimate(model, batches, "cross_entropy", coordinates=coordinates)
    part = estimate(model, batches, "cross_entropy", coordinates=coordinates, layers=chosen)
    assert tuple(part) == chosen
    assert close(part, {layer: everything[layer] for layer in chosen}, 1e-13)


def test_frozen_parameters():
    network = NETWORKS["mlp-bn"]
    model, batches = network.make(), network.batches("cross_entropy", (6, 4))
    everything = estimate(model, batches, "cross_entropy")
    model.get_submodule("3").requires_grad_(False)
    part = estimate(model, batches, "cross_entropy", layers=["0", "6"])
    assert close(part, {layer: everything[layer] for layer in ("0", "6")}, 1e-13)


@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("approximation", APPROXIMATIONS)
def test_train_and_eval_flags_of_the_model(approximation, coordinates):
    network = NETWORKS["mlp-bn"]
    model, batches = network.make(), network.batches("cross_entropy", (6,))
    options = {"approximation": approximation, "coordinates": coordinates}
    assert close(
        estimate(model.train(), batches, "cross_entropy", **options),
        estimate(model.eval(), batches, "cross_entropy", **options),
        1e-13,
    )


def test_running_statistics_do_not_matter_in_train_mode():
    network = NETWORKS["mlp-bn"]
    model, batches = network.make(), network.batches("cross_entropy", (6,))
    found = {}
    for statistics in ("batch", "running"):
        before = dense_block(estimate(model, batches, "cross_entropy", statistics=statistics)["0"])
        other = network.make()
        other[1].running_var.mul_(3)
        after = dense_block(estimate(other, batches, "cross_entropy", statistics=statistics)["0"])
        found[statistics] = relative_error(after, before)
    assert found["batch"] < 1e-13
    assert found["running"] > 0.1


def test_dropout_is_off():
    plain = Network(lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), (4,), (3,))
    model, batches = plain.make(), plain.batches("cross_entropy", (6,))
    first, activation, last = model
    dropping = nn.Sequential(first, activation, last)
    dropping.insert(2, nn.Dropout(0.5))
    expected = estimate(model, batches, "cross_entropy")
    found = estimate(dropping.train(), batches, "cross_entropy")
    for layer, same in (("0", "0"), ("3", "2")):
        assert relative_error(dense_block(found[layer]), dense_block(expected[same])) < 1e-13


def test_activations_that_overwrite_their_input():
    network = NETWORKS["mlp-bn"]
    model, batches = network.make(), network.batches("cross_entropy", (6,))
    overwriting = network.make()
    for module in overwriting.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = True
    for coordinates in COORDINATES:
        assert close(
            estimate(overwriting, batches, "cross_entropy", coordinates=coordinates),
            estimate(model, batches, "cross_entropy", coordinates=coordinates),
            1e-13,
        )


def test_first_examples_are_those_of_max_examples():
    network = NETWORKS["mlp-bn"]
    model, batches = network.make(), network.batches("mse", (4, 4, 4))
    limited = estimate(model, batches, "mse", max_examples=8)
    assert limited.examples == 8
    assert close(limited, estimate(model, batches[:2], "mse"), 1e-13)


def _strided(x: Tensor) -> Tensor:
    """The same values with a gap after every element."""
    return torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]


@pytest.mark.parametrize("name", ["mlp-bn", "locations-bn"])
def test_memory_layout_of_the_inputs(name):
    network = NETWORKS[name]
    model, ((x, y),) = network.make(), network.batches("mse", (6,))
    expected = estimate(model, [(x, y)], "mse")
    reversed_axes = x.permute(*reversed(range(x.ndim))).contiguous()
    for other in (_strided(x), reversed_axes.permute(*reversed(range(x.ndim)))):
        assert not other.is_contiguous()
        assert close(estimate(model, [(other, y)], "mse"), expected, 1e-13)


@pytest.mark.parametrize("approximation", APPROXIMATIONS)
def test_single_precision_is_close_to_double(approximation, device):
    network = NETWORKS["mlp-bn"]
    model, batches = network.make(), network.batches("cross_entropy", (6, 4))
    expected = estimate(model, batches, "cross_entropy", approximation=approximation)
    single = [(x.float(), y) for x, y in batches]
    found = estimate(model.float(), single, "cross_entropy", device, approximation=approximation)
    assert found["0"].dtype == torch.float32
    assert close(found, expected, 1e-5)


def test_single_precision_survives_a_mean_far_above_the_spread():
    network = Network(lambda: nn.Sequential(nn.Linear(4, 3)), (4,), (3,))
    model, ((x, y),) = network.make(), network.batches("mse", (64,))
    x = (x - x.mean(0)).float() + 1000
    double = estimate(model, [(x.double(), y)], "mse", approximation="xkfac")["0"]
    single = estimate(model.float(), [(x, y.float())], "mse", approximation="xkfac")["0"]
    for (a, _), (expected, _) in zip(single.terms, double.terms, strict=True):
        assert relative_error(a, expected) < 1e-5
