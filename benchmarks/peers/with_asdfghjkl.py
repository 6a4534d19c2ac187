"""ASDL, distributed as asdfghjkl: its maker of the Monte-Carlo Fisher matrix."""

import torch
from asdl.fisher import FisherConfig, get_fisher_maker
from asdl.grad_maker import LOSS_CROSS_ENTROPY
from asdl.matrices import FISHER_MC, SHAPE_KRON
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from peers.base import DAMPING, Batches, Factors, Peer, layers_of


class WithAsdfghjkl(Peer):
    distribution = "asdfghjkl"

    def __init__(self, model: nn.Module, batches: Batches) -> None:
        super().__init__(model, batches)
        config = FisherConfig(
            fisher_type=FISHER_MC,
            fisher_shapes=[SHAPE_KRON],
            loss_type=LOSS_CROSS_ENTROPY,
            data_size=sum(len(x) for x, _ in batches),
            ignore_modules=[module for module in model.modules() if isinstance(module, _BatchNorm)],
        )
        self.maker = get_fisher_maker(model, config)

    def factors(self) -> Factors:
        for index, (x, _) in enumerate(self.batches):
            self.maker.setup_model_call(self.model, x)
            self.maker.forward_and_backward(accumulate=index > 0)
        self.blocks = {name: layer.fisher.kron for name, layer in layers_of(self.model)}
        return {name: (block.A, block.B) for name, block in self.blocks.items()}

    def inverse(self) -> object:
        for block in self.blocks.values():
            block.update_inv(DAMPING)
        return self.blocks

    def product(self) -> object:
        return [
            self.blocks[name].mvp(*(torch.ones_like(p) for p in layer.parameters()))
            for name, layer in layers_of(self.model)
        ]
