"""Pretrained networks: definitions against the weights given, and weights that do not fit."""

import pytest
import torch
from torch import nn

import ekfac_rs as ek
from ekfac_rs.errors import FileFormatError, OptionError
from ekfac_rs.experiments.data import ImageLoader, ImageTree
from ekfac_rs.experiments.networks import (
    ARCHITECTURES,
    CifarResNet,
    Weights,
    backbone_layers,
    lite0_weights,
)

RESNET56 = ARCHITECTURES["resnet56-cifar"]
LITE0 = ARCHITECTURES["efficientnet-lite0"]


def accuracy(architecture, weights, images):
    model = architecture.load(Weights.read(weights), images.images.shape[-1])
    loader = ImageLoader(images, architecture.mean, architecture.std, 250)
    return ek.ContinualLearner(model).evaluate([loader])[0]


# Against the weights given


def test_resnet56_has_the_accuracy_its_weights_are_known_for(data_file):
    images = ImageTree(data_file("cifar10_jpeg.tar")).read("test", 32, max_images=500)
    # 81 to 83 % on all 5,000 JPEG copies; a wrong padding or shortcut costs tens of points.
    assert 0.79 < accuracy(RESNET56, data_file("resnet56-4bfd9763.th"), images) < 0.86


@pytest.mark.thorough
def test_lite0_knows_imagenet(data_file):
    images = ImageTree(data_file("imagenet_sample160.tar")).read(None, 128, max_images=100)
    assert accuracy(LITE0, lite0_weights(), images) > 0.5


# Definitions


def test_resnet56_is_as_deep_and_as_large_as_published():
    model = CifarResNet(9)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 55
    assert sum(parameter.numel() for parameter in model.parameters()) == 853_018


def test_shortcuts_take_every_second_pixel_and_pad_channels_with_zeros():
    block = CifarResNet(1).layer2[0].eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.rand(2, 16, 8, 8)
    y = block(x)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any()
    assert not y[:, 24:].any()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_backbone_is_every_layer_but_the_head(name):
    architecture = ARCHITECTURES[name]
    model = architecture.build(7, 64)
    layers = backbone_layers(model, architecture.head)
    assert len(layers) == {"resnet50": 53, "resnet56-cifar": 55, "efficientnet-lite0": 49}[name]
    assert architecture.head not in layers
    assert model.get_submodule(architecture.head).out_features == 7


# Weights


def saved(tmp_path, content):
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    return path


def test_weights_are_read_with_and_without_wrapping(tmp_path):
    state = CifarResNet(9, classes=3).state_dict()
    wrapped = {"state_dict": {f"module.{name}": value for name, value in state.items()}}
    digests = set()
    for content in (state, wrapped):
        weights = Weights.read(saved(tmp_path, content))
        model = RESNET56.load(weights, 32)
        assert not model.training
        for name, value in model.state_dict().items():
            assert torch.equal(value, state[name])
        digests.add(weights.digest)
    assert len(digests) == 2


def test_weights_of_another_network_are_refused_by_name(tmp_path):
    path = saved(tmp_path, CifarResNet(9).state_dict())
    with pytest.raises(FileFormatError, match=r"weights\.pth: .*ResNet-50, got none .*'fc\.weight"):
        ARCHITECTURES["resnet50"].load(Weights.read(path), 32)
    path = saved(tmp_path, CifarResNet(3).state_dict())
    with pytest.raises(FileFormatError, match=r"weights\.pth: expected weights of CIFAR ResNet-56"):
        RESNET56.load(Weights.read(path), 32)


def test_what_is_no_file_of_weights_is_refused_by_name(tmp_path):
    with pytest.raises(OptionError, match="source_weights: expected a file"):
        Weights.read(tmp_path / "missing")
    (tmp_path / "text").write_text("no weights")
    with pytest.raises(FileFormatError, match="text: not a file of weights"):
        Weights.read(tmp_path / "text")
    for content in ([torch.zeros(1)], {"a": 1}, {}):
        with pytest.raises(FileFormatError, match="expected a dictionary of tensors"):
            Weights.read(saved(tmp_path, content))
