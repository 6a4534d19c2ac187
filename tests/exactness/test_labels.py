"""Where the expectation over labels comes from: exact sums, square roots, draws, true labels."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cases import LOSSES, NETWORKS, dense_block, estimate
from oracle import Units, dense, relative_error, strata_terms, units_of

LAYER = "0"
REPEATS = 100


def sample_mean(draw: Callable[[], Tensor], repeats: int = REPEATS) -> tuple[Tensor, float]:
    """Mean of repeated draws, and the norm of its standard error."""
    samples = torch.stack([draw() for _ in range(repeats)])
    return samples.mean(0), (samples.std(0) / repeats**0.5).norm().item()


def unbiased(actual: Tensor, expected: Tensor, noise: float) -> bool:
    """Whether the distance is what sampling explains: it is ``noise`` on average."""
    return (actual - expected).norm().item() < 2 * noise


def columns_without_signs(units: Units) -> Units:
    """One backward pass per output column over the whole batch: examples share a pass."""
    passes = units.g.unflatten(0, (units.examples, -1)).sum(0)
    return Units(units.a, passes)


@pytest.mark.parametrize(
    ("name", "loss", "approximation", "statistics"),
    [
        ("mlp-bn", "cross_entropy", "kfac-expand", "batch"),
        ("mlp-bn", "mse", "xkfac", "batch"),
        ("mlp-bn", "cross_entropy", "xkfac", "running"),
        ("locations-bn", "mse", "kfac-expand", "batch"),
        ("locations-bn", "cross_entropy", "xkfac-nested", "batch"),
    ],
)
def test_type2_is_unbiased_by_its_random_signs(name, loss, approximation, statistics, generator):
    network = NETWORKS[name]
    model, batches = network.make(), network.batches(loss, (6,))
    modes = {"statistics": statistics}
    options = {"approximation": approximation, "layers": [LAYER], **modes}
    units = units_of(model, LAYER, batches[0], LOSSES[loss].of_example, **modes)
    expected = dense(strata_terms(approximation, [units]))
    mean, noise = sample_mean(
        lambda: dense_block(
            estimate(model, batches, loss, labels="type2", generator=generator, **options)[LAYER]
        )
    )
    assert unbiased(mean, expected, noise)
    naive = dense(strata_terms(approximation, [columns_without_signs(units)]))
    assert (naive - expected).norm().item() > 5 * noise


@pytest.mark.parametrize("name", ["mlp", "mlp-bn", "locations-linear"])
@pytest.mark.parametrize("loss", LOSSES)
def test_without_interaction_type2_is_exact_for_one_stratum(name, loss, generator):
    network = NETWORKS[name]
    model, batches = network.make(), network.batches(loss, (4, 3))
    options = {"approximation": "kfac-reduce", "statistics": "running"}
    exact = estimate(model, batches, loss, **options)
    roots = estimate(model, batches, loss, labels="type2", generator=generator, **options)
    for layer in exact:
        assert relative_error(dense_block(roots[layer]), dense_block(exact[layer])) < 1e-12


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        *itertools.product(["mlp-bn"], LOSSES),
        *itertools.product(["locations-linear"], ["cross_entropy", "mse"]),
    ],
)
@pytest.mark.parametrize("draws", [1, 3])
def test_sampled_labels_are_unbiased(name, loss, draws, generator, device):
    network = NETWORKS[name]
    model, batches = network.make(), network.batches(loss, (5,))
    if device != "cpu":
        generator = torch.Generator(device).manual_seed(0)
    options = {"approximation": "xkfac", "layers": [LAYER]}
    expected = dense_block(estimate(model, batches, loss, device, **options)[LAYER])
    options |= {"labels": "mc", "draws": draws, "generator": generator}
    mean, noise = sample_mean(
        lambda: dense_block(estimate(model, batches, loss, device, **options)[LAYER]),
        REPEATS // draws,
    )
    assert unbiased(mean, expected, noise)
    assert noise < 0.3 * expected.norm().item()


def test_more_draws_are_less_noisy(generator):
    network = NETWORKS["mlp-bn"]
    model, batches = network.make(), network.batches("cross_entropy", (8,))
    expected = dense_block(estimate(model, batches, "cross_entropy")[LAYER])
    found = [
        relative_error(
            dense_block(
                estimate(
                    model,
                    batches,
                    "cross_entropy",
                    labels="mc",
                    draws=draws,
                    generator=generator,
                )[LAYER]
            ),
            expected,
        )
        for draws in (4, 1600)
    ]
    assert found[1] < found[0] / 4
    assert found[1] < 0.1


@pytest.mark.parametrize("loss", ["cross_entropy", "mse", "bce"])
@pytest.mark.parametrize("approximation", ["kfac-expand", "xkfac"])
def test_empirical_uses_the_gradients_at_the_true_labels(loss, approximation):
    network = NETWORKS["mlp-bn"]
    model, (batch,) = network.make(), network.batches(loss, (6,))
    of_example = LOSSES[loss].of_example
    options = {"approximation": approximation, "layers": [LAYER]}
    block = estimate(model, [batch], loss, labels="empirical", **options)[LAYER]
    units = units_of(model, LAYER, batch, of_example)
    expected = dense(strata_terms(approximation, [Units(units.a, true_scores(model, batch, loss))]))
    assert relative_error(dense_block(block), expected) < 1e-10
    assert relative_error(dense(strata_terms(approximation, [units])), expected) > 1e-2


def true_scores(model: torch.nn.Module, batch: tuple[Tensor, Tensor], loss: str) -> Tensor:
    """Gradient of the summed loss at the first layer's output, in train mode: ``[1, N, 1, D]``."""
    x, y = batch
    model = model.train()
    h = model[0](x).detach().requires_grad_()
    outputs = model[1:](h)
    total = sum(LOSSES[loss].of_example(z, t) for z, t in zip(outputs, y, strict=True))
    return torch.autograd.grad(total, h)[0][None, :, None]


@pytest.mark.parametrize("labels", ["mc", "type2"])
def test_the_generator_decides_the_result(labels):
    network = NETWORKS["mlp-bn"]
    model, batches = network.make(), network.batches("mse", (6, 4))

    def block(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return dense_block(
            estimate(model, batches, "mse", labels=labels, generator=generator)[LAYER]
        )

    assert torch.equal(block(1), block(1))
    assert relative_error(block(2), block(1)) > 1e-3


def test_without_a_generator_the_global_seed_decides():
    network = NETWORKS["mlp-bn"]
    model, batches = network.make(), network.batches("mse", (6, 4))

    def block(seed: int) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return dense_block(estimate(model, batches, "mse", labels="mc")[LAYER])

    assert torch.equal(block(1), block(1))
    assert relative_error(block(2), block(1)) > 1e-3


def test_repeated_batches_get_fresh_labels(generator):
    network = NETWORKS["mlp-bn"]
    model, batches = network.make(), network.batches("mse", (6,))
    once = estimate(model, batches, "mse", labels="mc", generator=generator.manual_seed(3))
    twice = estimate(model, batches * 2, "mse", labels="mc", generator=generator.manual_seed(3))
    assert relative_error(dense_block(twice[LAYER]), dense_block(once[LAYER])) > 1e-3
