"""Convolutional networks as people write them: layouts, in-place steps, mixed precision."""

from copy import deepcopy

import pytest
import torch
from torch import nn

import ekfac_rs as ek

X = torch.randn(6, 3, 6, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(6) % 4


class Block(nn.Module):
    """A residual block; the activation may work in place, right after the BatchNorm."""

    def __init__(self, channels, inplace):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, groups=2)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace)

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.relu.inplace:
            out += x
        else:
            out = out + x
        return self.relu(out)


def network(inplace=False):
    torch.manual_seed(1)
    stem = nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))
    return nn.Sequential(stem, nn.BatchNorm2d(4), nn.ReLU(inplace), Block(4, inplace), head)


def estimate(model, x=X, **options):
    generator = torch.Generator().manual_seed(2)
    return ek.estimate_curvature(model, [(x, Y)], generator=generator, **options)


def assert_close(found, expected, tolerance):
    assert list(found) == list(expected)
    for name in expected:
        pairs = zip(found[name].terms, expected[name].terms, strict=True)
        for factors in pairs:
            for one, other in zip(*factors, strict=True):
                assert torch.linalg.vector_norm(one - other) <= (
                    tolerance * torch.linalg.vector_norm(other)
                )


@pytest.mark.parametrize("coordinates", ["merged", "raw"])
def test_in_place_activations_and_additions_change_nothing(coordinates):
    plain = estimate(network(), coordinates=coordinates)
    assert_close(estimate(network(inplace=True), coordinates=coordinates), plain, 1e-6)


def test_the_channels_last_layout_changes_nothing():
    model = network().to(memory_format=torch.channels_last)
    found = estimate(model, X.to(memory_format=torch.channels_last))
    assert_close(found, estimate(network()), 1e-5)


def test_synchronised_batchnorm_in_one_process_is_batchnorm():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(network())
    assert_close(estimate(model), estimate(network()), 1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.01)])
def test_autocast_gives_the_factors_of_its_own_precision(dtype, tolerance):
    exact = estimate(network())
    with torch.autocast("cpu", dtype):
        found = estimate(network())
    assert all(block.dtype == torch.float32 for block in found.values())
    assert_close(found, exact, tolerance)
    with pytest.raises(AssertionError):
        assert_close(found, exact, 1e-5)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_gradient_descent_on_the_penalty_goes_back_towards_the_anchor(autocast):
    torch.manual_seed(0)
    model = network()
    curvature = estimate(model)
    anchor = ek.merged_weights(model)
    ek.reparameterize(model, [X])
    penalty = ek.QuadraticPenalty(model, curvature, anchor, damping=1.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.005)
    values = []
    for _ in range(40):
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            model.train()(X)
            loss = penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(float(loss.detach()))
    assert values[-1] < 0.2 * values[0]


def test_a_pass_leaves_a_convolutional_network_as_it_was():
    model = network().train()
    before = deepcopy(model.state_dict())
    estimate(model)
    ek.describe(model)
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_diagonal_is_that_of_per_example_gradients():
    model = network().double().eval()
    x, found = X.double(), {}
    curvature = ek.estimate_curvature(
        model, [(x, Y)], approximation="diagonal", statistics="running", labels="empirical"
    )
    for row, label in zip(x, Y, strict=True):
        merged = {
            name: weight.clone().requires_grad_()
            for name, weight in ek.merged_weights(model).items()
        }
        loss = nn.functional.cross_entropy(_with_merged(model, merged, row[None]), label[None])
        gradients = torch.autograd.grad(loss, list(merged.values()))
        for name, gradient in zip(merged, gradients, strict=True):
            found[name] = found.get(name, 0.0) + gradient.square() / len(x)
    for name, block in curvature.items():
        torch.testing.assert_close(block.values, found[name], rtol=1e-10, atol=1e-14)


def _with_merged(model, merged, x):
    """Forward pass in which every layer computes with the given merged weights."""

    def replaced(name, conv):
        def run(module, args, output):
            weight = merged[name]
            shaped = weight[:, :-1].reshape(conv.weight.shape)
            if isinstance(conv, nn.Linear):
                return nn.functional.linear(args[0], shaped, weight[:, -1])
            return nn.functional.conv2d(
                args[0], shaped, weight[:, -1], conv.stride, conv.padding, 1, conv.groups
            )

        return run

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            handles.append(module.register_forward_hook(replaced(name, module)))
        elif isinstance(module, nn.BatchNorm2d):
            handles.append(module.register_forward_hook(lambda module, args, output: args[0]))
    try:
        return model(x)
    finally:
        for handle in handles:
            handle.remove()
