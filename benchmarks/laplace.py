"""What an approximation, and its correction, is worth to a Laplace approximation.

A small convolutional network on CIFAR-10, its BatchNorms merged into the weights, so small that the
exact Gauss-Newton matrix fits: posterior around the trained weights, prior precision by the
marginal likelihood, predictions of the linearised network. Prints one table; three seeds take a
quarter of an hour on one thread. Images are looked for where the experiments look for them.
"""

import argparse
import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise, product
from statistics import mean, stdev

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vmap

import ekfac_rs as ek
from ekfac_rs.experiments.data import ImageTree, find_data

CHANNELS = (3, 8, 16, 16)
APPROXIMATIONS = ("kfac-expand", "kfac-reduce", "xkfac-nested")
CORRECTIONS = (None, "scale", "eigenvalues", "nearest")
PRIOR_PRECISIONS = [10.0 ** (k / 4) for k in range(-8, 17)]
SAMPLES = 50
BINS = 15


def network() -> nn.Sequential:
    """Convolutions with BatchNorm, pooled at the end."""
    blocks = (
        (nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2))
        for a, b in pairwise(CHANNELS)
    )
    pooled = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS[-1], 10)
    return nn.Sequential(*chain.from_iterable(blocks), *pooled)


def merged(model: nn.Sequential) -> nn.Sequential:
    """The same function of eval mode without BatchNorms."""
    weights = ek.merged_weights(model)
    twin = nn.Sequential(*(m for m in network() if not isinstance(m, nn.BatchNorm2d)))
    layers = [m for m in twin if isinstance(m, nn.Conv2d | nn.Linear)]
    with torch.no_grad():
        for layer, W in zip(layers, weights.values(), strict=True):
            layer.weight.copy_(W[:, :-1].view_as(layer.weight))
            layer.bias.copy_(W[:, -1])
    return twin.eval()


def trained(x: Tensor, y: Tensor, epochs: int, seed: int) -> nn.Sequential:
    """A network after SGD with weight decay."""
    torch.manual_seed(seed)
    model, batch = network(), 50
    steps = epochs * (len(x) // batch)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(batch)[: len(x) // batch]:
            sgd.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            sgd.step()
            schedule.step()
    return model.eval()


# --- posteriors: of each, log-determinants and draws ---------------------------------------------


@dataclass(frozen=True)
class Posterior:
    """Gaussian around the weights.

    Attributes
    ----------
    logdet
        Of the precision ``N H + tau I``, given tau.
    draws
        Moves of all parameters, by name, each with an axis of samples, given tau.
    trace
        Of ``H``.
    """

    logdet: Callable[[float], float]
    draws: Callable[[float, int], dict[str, Tensor]]
    trace: float


def of_blocks(curvature: ek.Curvature, examples: int) -> Posterior:
    """Of a curvature's blocks."""

    def logdet(tau: float) -> float:
        damping = tau / examples
        count = sum(math.prod(block.shape) for block in curvature.values())
        return count * math.log(examples) + sum(b.logdet(damping) for b in curvature.values())

    def draws(tau: float, samples: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        moves = {}
        for name, block in curvature.items():
            V = block.sample(samples, tau / examples, generator) / examples**0.5
            moves[f"{name}.weight"], moves[f"{name}.bias"] = V[..., :-1], V[..., -1]
        return moves

    return Posterior(logdet, draws, sum(block.trace() for block in curvature.values()))


def of_matrices(parts: Sequence[tuple[Sequence[str], Tensor]], model: nn.Module) -> Posterior:
    """Of exact blocks, summed over examples: of some parameters each, in their order."""
    shapes = {name: p.shape for name, p in model.named_parameters()}
    spectra = [(names, *torch.linalg.eigh(matrix)) for names, matrix in parts]

    def logdet(tau: float) -> float:
        return sum(float((values.clamp_min(0.0) + tau).log().sum()) for _, values, _ in spectra)

    def draws(tau: float, samples: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        moves = {}
        for names, values, vectors in spectra:
            noise = torch.randn(samples, len(values), generator=generator, dtype=values.dtype)
            V = (noise * (values.clamp_min(0.0) + tau).rsqrt()) @ vectors.T
            sizes = [math.prod(shapes[name]) for name in names]
            for name, part in zip(names, V.split(sizes, 1), strict=True):
                moves[name] = part.reshape(samples, *shapes[name]).float()
        return moves

    return Posterior(logdet, draws, sum(float(m.trace()) for _, m in parts))


def exact(model: nn.Module, x: Tensor) -> Tensor:
    """Gauss-Newton matrix in all parameters, summed over examples."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    total: Tensor | None = None

    def root(values: Mapping[str, Tensor], example: Tensor) -> Tensor:
        outputs = functional_call(model, values, (example[None],))[0]
        p = outputs.detach().softmax(0).sqrt()
        return p * outputs - p * (p.square() @ outputs)  # by a root of diag p - p p^T

    rows = torch.func.jacrev(root)
    for batch in x.split(50):
        jacobians = vmap(rows, (None, 0))(parameters, batch)
        J = torch.cat([jacobians[name].flatten(2) for name in parameters], 2).flatten(0, 1)
        part = (J.T @ J).double()
        total = part if total is None else total + part
    assert total is not None
    return total


def blocks_of(model: nn.Module, whole: Tensor) -> Iterator[tuple[list[str], Tensor]]:
    """Diagonal blocks of a matrix in all parameters, one for each layer."""
    first = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            size = sum(p.numel() for p in module.parameters())
            yield (
                [f"{name}.weight", f"{name}.bias"],
                whole[first : first + size, first : first + size],
            )
            first += size


# --- predictions ---------------------------------------------------------------------------------


def prior_precision(posterior: Posterior, model: nn.Module) -> float:
    """Largest marginal likelihood."""
    square = sum(float(p.detach().square().sum()) for p in model.parameters())
    count = sum(p.numel() for p in model.parameters())

    def evidence(tau: float) -> float:
        return 0.5 * (count * math.log(tau) - tau * square - posterior.logdet(tau))

    return max(PRIOR_PRECISIONS, key=evidence)


@torch.no_grad()
def predicted(model: nn.Module, posterior: Posterior, tau: float, x: Tensor) -> Tensor:
    """Mean probabilities of the linearised network."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    draws = posterior.draws(tau, SAMPLES)
    total = torch.zeros(len(x), 10)

    def call(values: Mapping[str, Tensor]) -> Tensor:
        outputs: Tensor = functional_call(model, values, (x,))
        return outputs

    for k in range(SAMPLES):
        move = {name: draws[name][k].view_as(p).to(p) for name, p in parameters.items()}
        outputs, tangent = jvp(call, (parameters,), (move,))
        total += (outputs + tangent).softmax(1)
    return total / SAMPLES


def scores(probabilities: Tensor, y: Tensor) -> dict[str, float]:
    """Negative log-likelihood, expected calibration error and accuracy."""
    confidence, guess = probabilities.max(1)
    hit = (guess == y).float()
    bins = (confidence * BINS).long().clamp_max(BINS - 1)
    error = sum(
        abs(float(hit[bins == b].sum() - confidence[bins == b].sum())) for b in range(BINS)
    ) / len(y)
    nll = -float(probabilities[torch.arange(len(y)), y].log().mean())
    return {"NLL": nll, "ECE": 100.0 * error, "accuracy": 100.0 * float(hit.mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed, few images and epochs")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    count, epochs, seeds = (500, 3, 1) if quick else (2000, 20, 3)
    tree = ImageTree(find_data("cifar10_jpeg.tar"))
    (x, y), (test_x, test_y) = (
        (torch.from_numpy(s.images).float() / 127.5 - 1.0, torch.from_numpy(s.labels))
        for s in (tree.read("train", 32).part(count), tree.read("test", 32).part(500))
    )
    found: dict[str, list[dict[str, float]]] = {}
    for seed in range(seeds):
        model = merged(trained(x, y, epochs, seed))
        with torch.no_grad():
            plain = scores(model(test_x).softmax(1), test_y)
        found.setdefault("trained weights alone", []).append(plain)
        whole = exact(model, x)
        names = [name for name, _ in model.named_parameters()]
        layers = list(blocks_of(model, whole))
        posteriors = {
            "exact, all layers together": of_matrices([(names, whole)], model),
            "exact blocks": of_matrices(layers, model),
        }
        trace = posteriors["exact blocks"].trace / count
        # In double precision: of the smallest prior precisions nothing else is left in float32.
        precise = copy.deepcopy(model).double()
        loader = list(zip(x.double().split(50), y.split(50), strict=True))
        for approximation, correction in product(APPROXIMATIONS, CORRECTIONS):
            curvature = ek.estimate_curvature(
                precise,
                loader,
                approximation=approximation,
                correction=correction,
                correction_batches=len(loader),
                generator=torch.Generator().manual_seed(seed),
            )
            posteriors[f"{approximation}, {correction or 'as it is'}"] = of_blocks(curvature, count)
        for name, posterior in posteriors.items():
            tau = prior_precision(posterior, model)
            result = scores(predicted(model, posterior, tau, test_x), test_y)
            scale = 1.0 if name.startswith("exact") else posterior.trace / trace
            found.setdefault(name, []).append({**result, "tau": tau, "trace": scale})
    print(
        f"\n{count:,} training and {len(test_y):,} test images, {seeds} seeds, mean ± standard "
        "deviation; trace relative to the exact blocks'\n\n"
        "| posterior | trace | prior precision | NLL | ECE, % | accuracy, % |\n"
        "|---|---:|---:|---:|---:|---:|"
    )
    for name, rows in found.items():
        told = (_told([r.get(key, math.nan) for r in rows], digits) for key, digits in COLUMNS)
        print(f"| {name} | " + " | ".join(told) + " |")


COLUMNS = (("trace", 2), ("tau", 2), ("NLL", 4), ("ECE", 1), ("accuracy", 1))


def _told(values: list[float], digits: int) -> str:
    if math.isnan(values[0]):
        return "-"
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"


if __name__ == "__main__":
    main()
