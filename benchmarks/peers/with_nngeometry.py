"""NNGeometry: its Monte-Carlo Fisher matrix as K-FAC."""

from typing import Any

import torch
from nngeometry.layercollection import LayerCollection
from nngeometry.metrics import FIM_MonteCarlo
from nngeometry.object import PMatKFAC, PVector
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from peers.base import DAMPING, Batches, Factors, Peer, layers_of


class WithNNGeometry(Peer):
    distribution = "nngeometry"

    def __init__(self, model: nn.Module, batches: Batches) -> None:
        super().__init__(model, batches)
        self.layers = LayerCollection()
        for _, layer in layers_of(model):
            self.layers.add_layer_from_model(model, layer)
        x, y = (torch.cat(side) for side in zip(*batches, strict=True))
        self.loader = DataLoader(TensorDataset(x, y), batch_size=len(batches[0][0]))
        self.matrix: Any = None

    def factors(self) -> Factors:
        self.matrix = FIM_MonteCarlo(
            self.model, self.loader, PMatKFAC, layer_collection=self.layers
        )
        return dict(self.matrix.data)

    def inverse(self) -> object:
        return self.matrix.inverse(regul=DAMPING)

    def eigh(self) -> object:
        return self.matrix.compute_eigendecomposition()

    def product(self) -> object:
        ones: dict[str, tuple[Tensor, ...]] = {
            name: tuple(torch.ones_like(p) for p in layer.parameters())
            for name, layer in layers_of(self.model)
        }
        return self.matrix.mv(PVector(self.layers, dict_repr=ones))
