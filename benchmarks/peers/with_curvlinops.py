"""curvlinops: its linear operator of K-FAC."""

import torch
from curvlinops import KFACInverseLinearOperator, KFACLinearOperator
from torch import nn

from peers.base import DAMPING, Batches, Factors, Peer, layers_of


class WithCurvlinops(Peer):
    distribution = "curvlinops-for-pytorch"

    def __init__(self, model: nn.Module, batches: Batches) -> None:
        super().__init__(model, batches)
        self.parameters = [p for _, layer in layers_of(model) for p in layer.parameters()]

    def factors(self) -> Factors:
        self.operator = KFACLinearOperator(
            self.model,
            nn.CrossEntropyLoss(),
            self.parameters,
            self.batches,
            check_deterministic=False,
            separate_weight_and_bias=False,
            # Both would be found by a pass of their own through the mini-batches.
            num_data=sum(len(x) for x, _ in self.batches),
            num_per_example_loss_terms=1,
        )
        self.operator.compute_kronecker_factors()
        gradients = self.operator._gradient_covariances
        return {name: (A, gradients[name]) for name, A in self.operator._input_covariances.items()}

    def inverse(self) -> object:
        inverse = KFACInverseLinearOperator(
            self.operator, damping=DAMPING, use_heuristic_damping=True
        )
        # It inverts when it is first asked for a product.
        for name in self.operator._input_covariances:
            inverse._compute_or_get_cached_inverse(name)
        return inverse

    def product(self) -> object:
        return self.operator @ [torch.ones_like(p) for p in self.parameters]
