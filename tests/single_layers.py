"""Networks of a single layer at an anchor, and the curvature there."""

from functools import cache

import torch
from torch import nn

import ekfac_rs as ek


def move(model, size=0.1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(size * noise)


def merged_under_batch(linear, batchnorm, a):
    """Merged weights written out from the definition, statistics of the batch ``a``."""
    h = linear(a)
    sigma = torch.sqrt(h.var(0, correction=0) + batchnorm.eps)
    gamma = torch.ones_like(sigma) if batchnorm.weight is None else batchnorm.weight
    beta = torch.zeros_like(sigma) if batchnorm.bias is None else batchnorm.bias
    bias = torch.zeros_like(sigma) if linear.bias is None else linear.bias
    weight = torch.diag(gamma / sigma) @ linear.weight
    shift = beta + gamma * (bias - h.mean(0)) / sigma
    return torch.cat([weight, shift[:, None]], 1)


def conv(*channels, **options):
    return nn.Sequential(nn.Conv2d(*channels, 3, **options), nn.BatchNorm2d(channels[1]))


ONE_LAYER = {
    "Linear alone": (lambda: nn.Sequential(nn.Linear(4, 3)), (4,)),
    "Linear": (lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), (4,)),
    "Linear without bias": (
        lambda: nn.Sequential(nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3)),
        (4,),
    ),
    "no affine parameters": (
        lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, affine=False)),
        (4,),
    ),
    "convolution": (lambda: conv(2, 4), (2, 5, 5)),
    "depthwise": (lambda: conv(4, 4, groups=4), (4, 5, 5)),
    "grouped": (lambda: conv(4, 6, groups=2), (4, 5, 5)),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose1d(2, 4, 3, stride=2), nn.BatchNorm1d(4)),
        (2, 5),
    ),
    "BatchNorm alone": (lambda: nn.Sequential(nn.BatchNorm1d(4)), (4,)),
    "LayerNorm": (lambda: nn.Sequential(nn.LayerNorm(4)), (4,)),
}


@cache
def one_layer(name, gain, approximation="xkfac", correction=None):
    """A single layer with statistics of the data and gains all about ``gain``; its curvature."""
    build, shape = ONE_LAYER[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build().double()
        x = torch.randn(48, *shape, dtype=torch.float64) + torch.randn(shape, dtype=torch.float64)
        batchnorm = model[-1]
        if isinstance(batchnorm, nn.BatchNorm1d | nn.BatchNorm2d):
            variance, mean = torch.var_mean(
                model[:-1](x).detach().transpose(0, 1).flatten(1), 1, correction=0
            )
            batchnorm.running_mean.copy_(mean)
            batchnorm.running_var.copy_(variance)
            if batchnorm.affine:
                nn.init.uniform_(batchnorm.weight, 0.5, 1.5)
                batchnorm.weight.data.mul_(gain * torch.sqrt(variance.mean()))
                nn.init.normal_(batchnorm.bias)
        y = torch.zeros_like(model.eval()(x))
    curvature = _curvature(model, x, y, approximation, correction)
    return model, x, curvature, ek.merged_weights(model, example=x)


@cache
def other_curvatures(name, gain, approximation, tasks, correction=None):
    """Curvatures of further tasks, on inputs of their own, at the same weights."""
    model, x, _, _ = one_layer(name, gain, approximation, correction)
    generator = torch.Generator().manual_seed(1)
    curvatures = []
    for _ in range(tasks):
        shift = torch.randn(x.shape[1:], generator=generator, dtype=x.dtype)
        z = torch.randn(x.shape, generator=generator, dtype=x.dtype) + shift
        target = torch.zeros_like(model.eval()(z)).detach()
        curvatures.append(_curvature(model, z, target, approximation, correction))
    return curvatures


def _curvature(model, x, y, approximation, correction):
    return ek.estimate_curvature(
        model,
        [(x, y)],
        loss="mse",
        approximation=approximation,
        labels="type2",
        correction=correction,
        generator=torch.Generator().manual_seed(0),
    )
