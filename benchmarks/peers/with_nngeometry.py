"""NNGeometry: its Monte-Carlo Fisher matrix as K-FAC."""

from typing import Any

import torch
from nngeometry.layercollection import LayerCollection
from nngeometry.metrics import FIM_MonteCarlo
from nngeometry.object import PMatKFAC, PVector
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from peers.base import DAMPING, Batches, Factors, Peer, layers_of


class _Examples(TensorDataset):
    """Hands out mini-batches whole: one by one it takes longer than a pass on a GPU does."""

    def __getitems__(self, rows: list[int]) -> tuple[Tensor, ...]:
        return tuple(tensor[rows[0] : rows[-1] + 1] for tensor in self.tensors)


def _as_it_is(batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return batch


class WithNNGeometry(Peer):
    distribution = "nngeometry"

    def __init__(self, model: nn.Module, batches: Batches) -> None:
        super().__init__(model, batches)
        self.layers = LayerCollection()
        for _, layer in layers_of(model):
            self.layers.add_layer_from_model(model, layer)
        x, y = (torch.cat(side) for side in zip(*batches, strict=True))
        size = len(batches[0][0])
        self.loader = DataLoader(_Examples(x, y), batch_size=size, collate_fn=_as_it_is)
        self.matrix: Any = None

    def factors(self) -> Factors:
        self.matrix = FIM_MonteCarlo(
            *(self.model, self.loader, PMatKFAC),
            device=self.device,
            layer_collection=self.layers,
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
