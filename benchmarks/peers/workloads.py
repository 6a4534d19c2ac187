"""Networks and mini-batches that candidates are compared on."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import nn

from peers.base import Batches


@dataclass(frozen=True)
class Workload:
    """A network with mini-batches of noise: how long a pass takes does not depend on values.

    ``operations`` are those that are measured beside the pass, in as many rounds as
    ``operation_rounds`` says: decompositions of large factors take minutes.
    """

    title: str
    network: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch_size: int
    batches: int
    classes: int
    operations: tuple[str, ...] = ("inverse", "product")
    rounds: int = 5
    operation_rounds: int = 1

    def make(self) -> tuple[nn.Module, Batches]:
        torch.manual_seed(0)
        model = self.network()
        sizes = (self.batches * self.batch_size,)
        x, y = torch.randn(*sizes, *self.shape), torch.randint(self.classes, sizes)
        pairs = zip(x.split(self.batch_size), y.split(self.batch_size), strict=True)
        return model, list(pairs)


def mlp(*widths: int, batchnorm: bool = True) -> nn.Module:
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths[:-1]):
        between = [nn.BatchNorm1d(fan_out)] if batchnorm else []
        layers += [nn.Linear(fan_in, fan_out), *between, nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))


def resnet18() -> nn.Module:
    """Return ResNet-18 with the stem for CIFAR."""
    from torchvision.models import resnet18 as of_imagenet

    model = of_imagenet(weights=None, num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def resnet50() -> nn.Module:
    from torchvision.models import resnet50 as of_imagenet

    return of_imagenet(weights=None)


def lite0() -> nn.Module:
    """Return EfficientNet-Lite0, padded alike on all sides.

    As published its convolutions pad in their own forward, which hooks do not see: other libraries
    would take their factors from inputs without padding.
    """
    from efficientnet_lite_pytorch import EfficientNet

    model: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Conv2d):
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, _plain(module))
    return model


def _plain(conv: nn.Conv2d) -> nn.Conv2d:
    return nn.Conv2d(
        *(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride),
        padding=conv.kernel_size[0] // 2,
        groups=conv.groups,
        bias=conv.bias is not None,
    )


def conv_net(groups: int = 1, batchnorm: bool = True) -> nn.Module:
    """Two convolutions, the second one perhaps with groups."""
    between = [nn.BatchNorm2d(8)] if batchnorm else []
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, stride=2, padding=1), *between, nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, groups=groups), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5)),
    )


WORKLOADS = {
    "mlp": Workload(
        "MLP 784-1024x3-10 with BN, 8 mini-batches of 512",
        lambda: mlp(784, 1024, 1024, 1024, 10),
        *((784,), 512, 8, 10),
        operations=("inverse", "eigh", "product"),
        rounds=9,
        operation_rounds=9,
    ),
    "resnet18": Workload(
        "ResNet-18 (CIFAR stem), 32 px, a mini-batch of 128", resnet18, (3, 32, 32), 128, 1, 10
    ),
    "resnet50": Workload("ResNet-50, 224 px, a mini-batch of 8", resnet50, (3, 224, 224), 8, 1, 10),
    "lite0": Workload(
        "EfficientNet-Lite0, 96 px, a mini-batch of 32", lite0, (3, 96, 96), 32, 1, 10
    ),
}

# As large as a GPU is used at; passes and memory alone.
ON_GPU = {
    "resnet50": replace(
        WORKLOADS["resnet50"],
        title="ResNet-50, 224 px, 2 mini-batches of 64",
        batch_size=64,
        batches=2,
        operations=(),
        rounds=3,
    ),
    "resnet18": replace(
        WORKLOADS["resnet18"],
        title="ResNet-18 (CIFAR stem), 32 px, 4 mini-batches of 128",
        batches=4,
        operations=(),
    ),
    "mlp": replace(
        WORKLOADS["mlp"],
        title="MLP 784-1024x3-10 with BN, 16 mini-batches of 512",
        batches=16,
        operations=(),
        rounds=5,
    ),
}

QUICK = {
    "mlp": replace(
        WORKLOADS["mlp"],
        title="MLP 784-256x3-10 with BN, 2 mini-batches of 128",
        network=lambda: mlp(784, 256, 256, 256, 10),
        batch_size=128,
        batches=2,
        rounds=3,
    ),
    "conv": Workload(
        "Two convolutions, a mini-batch of 32", conv_net, (3, 12, 12), 32, 1, 5, rounds=3
    ),
    "lite0": replace(
        WORKLOADS["lite0"],
        title="EfficientNet-Lite0, 32 px, a mini-batch of 4",
        shape=(3, 32, 32),
        batch_size=4,
        operations=("product",),
        rounds=1,
    ),
}

# Small enough for exact factors: whether candidates compute what they are compared for.
CHECKS = {
    "MLP": Workload("MLP", lambda: mlp(12, 10, 8, 5, batchnorm=False), (12,), 1024, 2, 5),
    "MLP with BN": Workload("MLP with BN", lambda: mlp(12, 10, 8, 5), (12,), 1024, 2, 5),
    "convolutions": Workload(
        "convolutions", lambda: conv_net(batchnorm=False), (3, 12, 12), 512, 2, 5
    ),
    "convolutions with BN": Workload("convolutions with BN", conv_net, (3, 12, 12), 512, 2, 5),
    "grouped convolution": Workload(
        "grouped convolution", lambda: conv_net(4, False), (3, 12, 12), 512, 2, 5
    ),
}
