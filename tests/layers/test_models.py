"""Models people use: every layer and BatchNorm is found, merged and put back."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import nn

import ekfac_rs as ek
from ekfac_rs.layers import survey_layers

torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")
lite = pytest.importorskip("efficientnet_lite_pytorch")


class Row(NamedTuple):
    make: Callable[[], nn.Module]
    # Layers with a BatchNorm merged into them, without one, and BatchNorms on their own.
    merged: int
    plain: int
    alone: int


def from_torchvision(name):
    return lambda: getattr(torchvision.models, name)(weights=None)


def from_timm(name):
    return lambda: timm.create_model(name, pretrained=False)


MODELS = {
    "resnet18": Row(from_torchvision("resnet18"), 20, 1, 0),
    "resnet50": Row(from_torchvision("resnet50"), 53, 1, 0),
    "mobilenet_v2": Row(from_torchvision("mobilenet_v2"), 52, 1, 0),
    "mobilenet_v3_large": Row(from_torchvision("mobilenet_v3_large"), 46, 18, 0),
    "efficientnet_b0": Row(from_torchvision("efficientnet_b0"), 49, 33, 0),
    "densenet121": Row(from_torchvision("densenet121"), 59, 62, 62),
    "regnet_x_400mf": Row(from_torchvision("regnet_x_400mf"), 71, 1, 0),
    "timm resnet50": Row(from_timm("resnet50"), 53, 1, 0),
    "timm mobilenetv2_100": Row(from_timm("mobilenetv2_100"), 52, 1, 0),
    "timm mobilenetv3_small_100": Row(from_timm("mobilenetv3_small_100"), 34, 20, 0),
    "timm efficientnet_b0": Row(from_timm("efficientnet_b0"), 49, 33, 0),
    "timm tf_efficientnet_lite0": Row(from_timm("tf_efficientnet_lite0"), 49, 1, 0),
    "timm densenet121": Row(from_timm("densenet121"), 59, 62, 62),
    "timm regnety_004": Row(from_timm("regnety_004"), 53, 33, 0),
    "timm pre-activation resnetv2_50": Row(from_timm("resnetv2_50"), 32, 22, 17),
    "efficientnet-lite0": Row(lambda: lite.EfficientNet.from_name("efficientnet-lite0"), 49, 1, 0),
}


def randomized(make, x):
    """The model with BatchNorms that do something, and activations of moderate size."""
    torch.manual_seed(0)
    model = make()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # one pass sets the running statistics to the batch's
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    with torch.no_grad():
        model.train()(x)
    return model.eval()


# Of the same architecture in two libraries, one is enough every time.
TWINS = {name for name in MODELS if f"timm {name}" in MODELS} | {"timm mobilenetv2_100"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=pytest.mark.thorough) if x in TWINS else x for x in MODELS],
)
def test_layers_are_found_merged_and_put_back(name):
    row = MODELS[name]
    x = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    model = randomized(row.make, x)
    layers, reasons = survey_layers(model, example=x[:2])
    alone = sum(layer.batchnorm_name == layer.name for layer in layers)
    plain = sum(layer.batchnorm is None for layer in layers)
    assert (len(layers) - plain - alone, plain, alone) == (row.merged, row.plain, row.alone)
    assert reasons == {}

    with torch.no_grad():
        before = model(x)
        anchor = ek.merged_weights(model, example=x[:2])
        ek.reparameterize(model, [x])
        put_back = model(x)
        again = ek.merged_weights(model, example=x[:2])
        ek.merge_batchnorm(model, example=x[:2])
        exported = model(x)
        ek.reparameterize(model, [x], weights="merged")
        put_back_merged = model(x)
    assert len(anchor) == len(layers)
    scale = before.abs().max()
    for after in (put_back, exported, put_back_merged):
        assert (after - before).abs().max() <= 1e-4 * scale
    for name, weight in anchor.items():
        assert (again[name] - weight).norm() <= 1e-4 * weight.norm()
    batchnorm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert batchnorm.running_var.std() > 0.0  # it normalises again


@pytest.mark.parametrize("name", ["resnet50", "densenet121", "efficientnet-lite0"])
def test_traced_and_observed_data_flow_agree(name):
    model = MODELS[name].make().eval()
    traced = {layer.name: layer.batchnorm_name for layer in survey_layers(model)[0]}
    observed = survey_layers(model, example=torch.randn(2, 3, 64, 64))[0]
    assert traced == {layer.name: layer.batchnorm_name for layer in observed}


def test_describe_tells_what_every_parameter_gets():
    model = torchvision.models.mobilenet_v2(weights=None)
    model.classifier.append(nn.PReLU())
    model.features[0][0].weight.requires_grad_(False)
    description = ek.describe(model)
    by_name = {p.name: p for p in description.parameters}
    assert list(by_name) == [name for name, _ in model.named_parameters()]
    assert by_name["features.1.conv.0.0.weight"].block == (
        "Kronecker, 32 groups of 1 x 10, merged with features.1.conv.0.1"
    )
    assert by_name["classifier.2.weight"].block == "none: a PReLU has no curvature block"
    assert by_name["features.0.0.weight"].block.endswith("(frozen)")
    assert "features.1.conv.0.0.weight" in str(description)


def test_the_memory_of_resnet50_is_what_its_factors_take():
    description = ek.describe(torchvision.models.resnet50(weights=None), approximation="xkfac")
    # 2 terms of sum K^2 + D^2 numbers over 54 layers, 4 bytes each.
    assert description.total_bytes == 2 * 4 * sum(
        a * a + d * d
        for d, a in (layer_shape for layer_shape in _shapes(torchvision.models.resnet50()))
    )
    assert 0.55e9 < description.total_bytes / 2 < 0.65e9


def _shapes(model):
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            # Every convolution is merged with a BatchNorm, which gives it a bias column.
            yield module.weight.shape[0], module.weight[0].numel() + 1
