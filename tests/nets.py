"""Small nets with BatchNorm and loaders over random data, shared by the tests."""

import itertools

import torch
from torch import Tensor, nn


def random_batchnorms(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """Give every BatchNorm statistics and parameters no formula would leave by accident."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            if module.running_mean is not None:
                module.running_mean.normal_(generator=generator)
                module.running_var.uniform_(0.3, 3.0, generator=generator)
            if module.affine:
                # Both signs of gamma: merging must not take its absolute value.
                module.weight.data.normal_(generator=generator)
                module.bias.data.normal_(generator=generator)
    return model


def mlp(
    *widths: int,
    bias: bool = True,
    affine: bool = True,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> nn.Sequential:
    """Linear-BN-ReLU blocks with a Linear head, in a random state."""
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths[:-1]):
        layers += [
            nn.Linear(fan_in, fan_out, bias=bias),
            nn.BatchNorm1d(fan_out, affine=affine),
            nn.ReLU(),
        ]
    layers.append(nn.Linear(widths[-2], widths[-1]))
    model = nn.Sequential(*layers)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.5, generator=generator)
    return random_batchnorms(model, generator).to(dtype)


def classification_loader(
    inputs: int,
    classes: int,
    *,
    examples: int = 32,
    batch_size: int = 16,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> list[tuple[Tensor, Tensor]]:
    """Mini-batches of random inputs with random labels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, inputs, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.randint(classes, (examples,), generator=generator)
    return list(zip(x.split(batch_size), y.split(batch_size), strict=True))


class Averaging(nn.Module):
    """Keeps a running mean of what it sees, in a buffer that no BatchNorm has."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.average.lerp_(x.detach().mean().to(self.average), 0.1)
        return x
