"""kronfluence: its covariance matrices, and their eigendecomposition."""

from typing import Any

import torch
from kronfluence import FactorArguments, Task, prepare_model
from kronfluence.factor.covariance import fit_covariance_matrices_with_loader
from kronfluence.factor.eigen import perform_eigendecomposition
from kronfluence.utils.constants import (
    ACTIVATION_COVARIANCE_MATRIX_NAME,
    GRADIENT_COVARIANCE_MATRIX_NAME,
    NUM_ACTIVATION_COVARIANCE_PROCESSED,
)
from kronfluence.utils.state import State
from torch import Tensor, nn
from torch.nn import functional as F

from peers.base import Batches, Factors, Peer


class Classification(Task):  # type: ignore[misc]
    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        x, y = batch
        logits = model(x)
        if sample:
            with torch.no_grad():
                y = torch.multinomial(logits.softmax(1), 1)[:, 0]
        return F.cross_entropy(logits, y, reduction="sum")

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        return self.compute_train_loss(batch, model)


class WithKronfluence(Peer):
    distribution = "kronfluence"
    # It puts the model there, and freezes all its parameters.
    mode = "eval"

    def __init__(self, model: nn.Module, batches: Batches) -> None:
        self.task = Classification()
        super().__init__(prepare_model(model, self.task), batches)
        self.state = State(cpu=self.device.type == "cpu")
        self.arguments = FactorArguments(strategy="ekfac")
        self.made: Any = None

    def factors(self) -> Factors:
        examples, made = fit_covariance_matrices_with_loader(
            self.model,
            self.state,
            self.task,
            self.batches,
            self.arguments,
            disable_tqdm=True,
        )
        self.made = made
        units = made[NUM_ACTIVATION_COVARIANCE_PROCESSED]
        gradients = made[GRADIENT_COVARIANCE_MATRIX_NAME]
        # It leaves sums.
        return {
            name: (A / units[name], gradients[name] / examples)
            for name, A in made[ACTIVATION_COVARIANCE_MATRIX_NAME].items()
        }

    def eigh(self) -> object:
        return perform_eigendecomposition(
            self.made, self.model, self.state, self.arguments, disable_tqdm=True
        )
