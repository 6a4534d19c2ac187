"""Ours: blocks of the layers merged with their BatchNorms."""

from typing import ClassVar

import torch
from torch import nn

import ekfac_rs as ek
from ekfac_rs import KroneckerSum, _core
from ekfac_rs._tensors import borrow
from peers.base import DAMPING, Batches, Factors, Peer


class WithEkfacRs(Peer):
    distribution = "ekfac-rs"
    approximation: ClassVar[str] = "kfac-expand"

    def __init__(self, model: nn.Module, batches: Batches) -> None:
        super().__init__(model, batches)
        self.blocks: dict[str, KroneckerSum] = {}

    @classmethod
    def version(cls) -> str:
        return ek.__version__

    def factors(self) -> Factors:
        found = ek.estimate_curvature(self.model, self.batches, approximation=self.approximation)
        self.blocks = {
            name: block for name, block in found.items() if isinstance(block, KroneckerSum)
        }
        return {name: block.terms[0] for name, block in self.blocks.items()}

    def inverse(self) -> object:
        damped = (block.damped(DAMPING) for block in self.blocks.values())
        return [
            _core.KroneckerInverse([(borrow(A), borrow(G)) for A, G in block.terms], 0.0)
            for block in damped
        ]

    def eigh(self) -> object:
        return [block.eigh() for block in self.blocks.values()]

    def product(self) -> object:
        return [
            block.product(torch.ones(block.shape, device=self.device))
            for block in self.blocks.values()
        ]


class WithStrata(WithEkfacRs):
    approximation = "xkfac"


class WithNestedStrata(WithEkfacRs):
    approximation = "xkfac-nested"
