"""The same factors in plain torch: what a user would write who wants no library."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peers.base import DAMPING, Batches, Factors, Peer, layers_of


class WithTorch(Peer):
    distribution = "torch"

    def __init__(self, model: nn.Module, batches: Batches) -> None:
        super().__init__(model, batches)
        # Backward to the layers' outputs alone.
        model.requires_grad_(False)
        self.sums: dict[str, list[Tensor]] = {}
        for name, module in layers_of(model):
            module.register_forward_hook(
                lambda module, inputs, output, name=name: self._take(name, module, *inputs, output)
            )

    def factors(self) -> Factors:
        self.sums.clear()
        for x, _ in self.batches:
            x = x.detach().requires_grad_()
            logits = self.model(x)
            drawn = torch.multinomial(logits.detach().softmax(1), 1)[:, 0]
            torch.autograd.grad(F.cross_entropy(logits, drawn, reduction="sum"), x)
        examples = sum(len(x) for x, _ in self.batches)
        self.made = {
            name: (A.div_(examples), G.div_(examples)) for name, (A, G) in self.sums.items()
        }
        return self.made

    def _take(self, name: str, module: nn.Module, x: Tensor, output: Tensor) -> None:
        groups = module.groups if isinstance(module, nn.Conv2d) else 1
        with torch.no_grad():
            a = _units(module, x)
            if module.bias is not None:
                a = torch.cat([a, a.new_ones(*a.shape[:2], 1)], 2)
            # A mean over locations.
            self._add(name, 0, a, len(x) / a.shape[1])

        def take_gradient(g: Tensor) -> None:
            g = g if g.dim() == 2 else g.movedim(1, -1).flatten(0, -2)
            self._add(name, 1, g.unflatten(1, (groups, -1)).movedim(1, 0), 1.0)

        output.register_hook(take_gradient)

    def inverse(self) -> object:
        return [_inverse(factor) for pair in self.made.values() for factor in pair]

    def eigh(self) -> object:
        return [torch.linalg.eigh(factor) for pair in self.made.values() for factor in pair]

    def product(self) -> object:
        return [G @ A.new_ones(*G.shape[:-1], A.shape[-1]) @ A for A, G in self.made.values()]

    def _add(self, name: str, side: int, units: Tensor, weight: float) -> None:
        """Add the Gram matrices of units ``[groups, units, features]``, weighted."""
        n = units.shape[2]
        both = self.sums.setdefault(name, [])
        if len(both) == side:
            both.append(units.new_zeros(len(units), n, n).squeeze(0))
        total = both[side]
        if total.dim() == 2:
            total.addmm_(units[0].T, units[0], alpha=weight)
        else:
            total.baddbmm_(units.mT, units, alpha=weight)


def _units(module: nn.Module, x: Tensor) -> Tensor:
    """Inputs of the affine map, ``[groups, units, features]``."""
    if not isinstance(module, nn.Conv2d):
        return x.flatten(0, -2)[None]
    assert not isinstance(module.padding, str)
    patches = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
    by_group = patches.unflatten(1, (module.groups, -1))
    return by_group.permute(1, 0, 3, 2).flatten(1, 2)


def _inverse(factor: Tensor) -> Tensor:
    damped = factor + DAMPING**0.5 * torch.eye(factor.shape[-1], device=factor.device)
    return torch.cholesky_inverse(torch.linalg.cholesky(damped))
