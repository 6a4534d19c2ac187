"""BackPACK: its extension for K-FAC."""

from backpack import backpack, extend
from backpack.extensions import KFAC
from torch import Tensor, nn

from peers.base import Batches, Factors, Peer, layers_of


class WithBackPACK(Peer):
    distribution = "backpack-for-pytorch"
    # It refuses a BatchNorm in train mode.
    mode = "eval"

    def __init__(self, model: nn.Module, batches: Batches) -> None:
        super().__init__(model, batches)
        branching = not isinstance(model, nn.Sequential)
        self.model = extend(self.model, use_converter=branching)
        self.loss = extend(nn.CrossEntropyLoss())

    def factors(self) -> Factors:
        sums: dict[str, list[Tensor]] = {}
        for x, y in self.batches:
            with backpack(KFAC(mc_samples=1)):
                self.loss(self.model(x), y).backward()
            self.model.zero_grad()
            for name, layer in layers_of(self.model):
                G, A = layer.weight.kfac
                del layer.weight.kfac
                if layer.bias is not None:
                    del layer.bias.kfac
                # Each is of a mean over the mini-batch's examples.
                if name in sums:
                    sums[name][0].add_(A)
                    sums[name][1].add_(G)
                else:
                    sums[name] = [A, G]
        count = len(self.batches)
        return {name: (A / count, G / count) for name, (A, G) in sums.items()}
