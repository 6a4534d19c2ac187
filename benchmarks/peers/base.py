"""What every candidate of the comparison answers."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Batches = Sequence[tuple[Tensor, Tensor]]

# By the layer's name: A, of the inputs, and G, of the gradients; with groups, stacks of them.
Factors = dict[str, tuple[Tensor, Tensor]]

DAMPING = 1e-3


class NotOfferedError(Exception):
    """A library has no such operation, or not for such a network."""


class Peer(ABC):
    """A way to the factors of K-FAC (expand) under one label drawn for each example.

    Parameters
    ----------
    model : torch.nn.Module
        The candidate's own: it may be changed, as some libraries do.
    batches : sequence of (x, y)
        On the model's device.
    """

    distribution: ClassVar[str]
    """Of which the version is told."""

    mode: ClassVar[str] = "train"
    """Mode of the model during the pass: "train", as in bare training, or "eval" """

    def __init__(self, model: nn.Module, batches: Batches) -> None:
        self.model = model.train(self.mode == "train")
        self.batches = batches
        self.device = batches[0][0].device

    @classmethod
    def version(cls) -> str:
        return version(cls.distribution)

    @abstractmethod
    def factors(self) -> Factors:
        """Make the factors of all layers in one pass over the mini-batches, and keep them."""

    def inverse(self) -> object:
        """Invert the factors made last, each damped."""
        raise NotOfferedError("no inverse")

    def eigh(self) -> object:
        """Decompose the factors made last, as those do for an inverse who damp exactly."""
        raise NotOfferedError("no eigendecomposition")

    def product(self) -> object:
        """Apply the block of every layer to a matrix of the shape of its weights."""
        raise NotOfferedError("no product")


class Bare(Peer):
    """Forward and backward, as training does them: what all others are measured by."""

    distribution = "torch"

    def factors(self) -> Factors:
        for x, y in self.batches:
            F.cross_entropy(self.model(x), y).backward()
            self.model.zero_grad()
        return {}


class Floor(Peer):
    """What no candidate goes without: the forward pass, and gradients of the layers' outputs."""

    distribution = "torch"

    def __init__(self, model: nn.Module, batches: Batches) -> None:
        super().__init__(model, batches)
        model.requires_grad_(False)

    def factors(self) -> Factors:
        for x, y in self.batches:
            x = x.detach().requires_grad_()
            torch.autograd.grad(F.cross_entropy(self.model(x), y), x)
        return {}


def layers_of(model: nn.Module) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    """Linear layers and convolutions, by name."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            yield name, module


def without_others(model: nn.Module) -> None:
    """Freeze what has no factors of K-FAC, as BatchNorms."""
    for module in model.modules():
        if not isinstance(module, nn.Linear | nn.Conv2d):
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
