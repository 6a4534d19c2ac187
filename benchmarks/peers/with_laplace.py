"""laplace-torch: the factors of its Kronecker-factored Laplace approximation, by curvlinops."""

from typing import Any

from laplace.curvature import CurvlinopsGGN
from torch import nn

from peers.base import Batches, Factors, Peer, layers_of, without_others


class WithLaplace(Peer):
    distribution = "laplace-torch"
    # Its fit puts the model there.
    mode = "eval"

    def __init__(self, model: nn.Module, batches: Batches) -> None:
        super().__init__(model, batches)
        without_others(model)
        self.backend = CurvlinopsGGN(model, "classification", stochastic=True)
        self.sum: Any = None

    def factors(self) -> Factors:
        examples = sum(len(x) for x, _ in self.batches)
        self.sum = None
        for x, y in self.batches:
            _, of_batch = self.backend.kron(x, y, N=examples)
            self.sum = of_batch if self.sum is None else self.sum + of_batch
        # One entry for each parameter, of which a bias has G alone.
        pairs = (factors for factors in self.sum.kfacs if len(factors) == 2)
        return {
            name: (A, G) for (name, _), (G, A) in zip(layers_of(self.model), pairs, strict=True)
        }

    def eigh(self) -> object:
        return self.sum.decompose()
