"""How far the predicted increase of earlier tasks' losses can be believed, on permuted MNIST.

Prints two tables. The first: over learning rates and scales, the second task's predicted increase
of the first one's loss beside the measured one. The second: along a stream, what is measured over
what is predicted, and whether a task's own data tell that ratio in advance. On one thread half an
hour; --quick for a try. MNIST is looked for where the experiments do.
"""

import argparse
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from statistics import mean, median, stdev

import torch
from torch import Tensor, nn

import ekfac_rs as ek
from ekfac_rs.experiments.permuted_mnist import (
    PRESETS,
    PermutedConfig,
    PermutedMnist,
    PermutedRuns,
)
from ekfac_rs.experiments.runs import DIVERGENCE

# Curvature, and after which share of a task BatchNorm is frozen.
GROUPS = tuple(product(("kfac-eval", "kfac-train", "xkfac"), (1.0, 0.2)))
LRS = (0.03, 0.1, 0.3)
SCALES = (0.3, 1.0, 3.0, 10.0, 30.0)
# Of the earlier tasks' losses: where a displacement is predicted to bring them, as scale="auto".
BUDGET = 0.04
# The recipe for many tasks, as docs/what-to-use.md has it.
RECIPE = {
    "curvature": "kfac-eval",
    "freeze_bn_after": 0.2,
    "weights": "first",
    "own": True,
    "scale": "auto",
    "lr": 0.2,
}


@dataclass(frozen=True)
class Increase:
    """Of a task's mean loss, after another has been learnt."""

    predicted: float
    measured: float

    @property
    def ratio(self) -> float:
        """Measured over predicted."""
        return self.measured / self.predicted


@dataclass
class Stream:
    """A learner on permuted images, and the losses of its tasks."""

    runs: PermutedRuns
    config: PermutedConfig

    def __post_init__(self) -> None:
        self.tasks = self.runs.tasks(self.config)
        self.learner = self.config.learner(
            self.runs.network(self.config),
            max_examples=self.config.factor_examples,
            generator=torch.Generator().manual_seed(self.config.seed),
        )

    @property
    def model(self) -> nn.Module:
        """The network."""
        return self.learner.model

    def learn(self, task: int) -> None:
        """Train on a task, without consolidating it."""
        loader = self.tasks.training(task)
        self.learner.fit(loader, epochs=self.config.epochs, lr=self.config.lr)

    def consolidate(self, task: int) -> None:
        """Take a task's curvature."""
        self.learner.consolidate(self.tasks.training(task))

    @torch.no_grad()
    def loss(self, task: int) -> float:
        """Mean loss on a task's training images, in eval mode."""
        self.model.eval()
        total, count = 0.0, 0
        for x, y in self.tasks.training(task):
            total += float(nn.functional.cross_entropy(self.model(x), y, reduction="sum"))
            count += len(y)
        return total / count

    def increase(self, task: int, before: float, penalty: ek.QuadraticPenalty) -> Increase:
        """Of a task's loss, at the weights as they are."""
        return Increase(self.predicted(penalty), self.loss(task) - before)

    def predicted(self, penalty: ek.QuadraticPenalty) -> float:
        """By the curvatures of a penalty, at the weights as they are."""
        self.model.eval()
        with torch.no_grad():
            penalty()
        return float(penalty.predicted_increase())


def of_the_first_task(runs: PermutedRuns, config: PermutedConfig) -> Increase | None:
    """What the second task, learnt at lr and scale of a config, does to the first.

    None where training diverges.
    """
    stream = Stream(runs, replace(config, lr=0.1))
    stream.learn(0)
    stream.consolidate(0)
    before = stream.loss(0)
    stream.config = config
    try:
        stream.learn(1)
    except DIVERGENCE:
        return None
    with stream.learner.penalty() as penalty:
        return stream.increase(0, before, penalty)


def along_a_stream(runs: PermutedRuns, config: PermutedConfig) -> Iterator[tuple[Increase, float]]:
    """For each task but the last: what the next one does to it, and its calibration before."""
    stream = Stream(runs, config)
    anchor: Mapping[str, Tensor] = ek.merged_weights(stream.model)
    earlier: tuple[ek.QuadraticPenalty, float, float] | None = None
    for task in range(config.tasks):
        stream.learn(task)
        if earlier is not None:
            penalty, before, calibration = earlier
            with penalty:
                yield stream.increase(task - 1, before, penalty), calibration
        stream.consolidate(task)
        assert stream.learner.anchor is not None
        moved = {name: D - anchor[name] for name, D in stream.learner.anchor.items()}
        anchor, before = stream.learner.anchor, stream.loss(task)
        calibration = own_calibration(stream, task, moved, before)
        penalty = ek.QuadraticPenalty(stream.model, stream.learner.curvatures[-1], anchor)
        earlier = penalty, before, calibration


def own_calibration(stream: Stream, task: int, moved: Mapping[str, Tensor], before: float) -> float:
    """Measured over predicted on the task's own data, at displacements like the last one.

    Of a size that is predicted to use up the budget, both ways, so that the slope cancels.
    """
    kept = copy.deepcopy(stream.model.state_dict())
    curvature, anchor = stream.learner.curvatures[-1], stream.learner.anchor
    assert anchor is not None
    with ek.QuadraticPenalty(stream.model, curvature, anchor) as penalty:
        displace(stream.model, moved, 1.0)
        size = (BUDGET * before / stream.predicted(penalty)) ** 0.5
        increases = []
        for sign in (1.0, -1.0):
            stream.model.load_state_dict(kept)
            displace(stream.model, moved, sign * size)
            increases.append(stream.increase(task, before, penalty))
    stream.model.load_state_dict(kept)
    return mean(increase.ratio for increase in increases)


@torch.no_grad()
def displace(model: nn.Module, by: Mapping[str, Tensor], size: float) -> None:
    """Move merged weights under running statistics by so many times a displacement."""
    modules = dict(model.named_modules())
    for name, D in by.items():
        layer, normed = modules[name], modules.get(name.replace("fc", "bn"))
        weights, bias = size * D[:, :-1], size * D[:, -1]
        if isinstance(normed, nn.BatchNorm1d):
            gain = normed.weight / (normed.running_var + normed.eps).sqrt()
            layer.weight += weights / gain[:, None]
            normed.bias += bias
        else:
            layer.weight += weights
            layer.bias += bias


def rank_correlation(pairs: list[tuple[float, float]]) -> float:
    """Spearman's, of pairs without ties."""
    ranks = [
        torch.tensor(values).argsort().argsort().double() for values in zip(*pairs, strict=True)
    ]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two settings, three tasks")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    preset = replace(PRESETS["full"], examples=4_000 if quick else 15_000, factor_examples=5_000)
    experiment = PermutedMnist.read(preset, None)
    runs = PermutedRuns(experiment.data)

    def config(seed: int, **options: object) -> PermutedConfig:
        values = experiment.config("final", seed, {"damping": 0.01, **options})
        return PermutedConfig(**values)

    settings = list(product(LRS, SCALES))[:: 7 if quick else 1]
    seeds = (0,) if quick else (0, 1, 2)
    print(
        f"\nSecond task, {len(settings)} settings of learning rate and scale, {len(seeds)} seeds: "
        "rank correlation of predicted and measured increase, and measured / predicted (least, "
        "median, most)\n\n| curvature | BatchNorm on for | diverged | measured above 0 | "
        "rank correlation, by seed | ratio |\n|---|---:|---:|---:|---|---|"
    )
    for curvature, share in GROUPS:
        correlations, ratios, above = [], [], 0
        for seed in seeds:
            results = [
                of_the_first_task(
                    runs,
                    config(seed, curvature=curvature, freeze_bn_after=share, lr=lr, scale=scale),
                )
                for lr, scale in settings
            ]
            of_seed = [increase for increase in results if increase is not None]
            correlations.append(rank_correlation([(x.predicted, x.measured) for x in of_seed]))
            ratios += [x.ratio for x in of_seed]
            above += sum(x.measured > 0.0 for x in of_seed)
        print(
            f"| {curvature} | {share:.0%} | {len(settings) * len(seeds) - len(ratios)} | "
            f"{above} of {len(ratios)} | "
            f"{', '.join(f'{r:.2f}' for r in correlations)} | "
            f"{min(ratios):.2f}, {median(ratios):.2f}, {max(ratios):.2f} |",
            flush=True,
        )
    print(
        '\nStream of the recipe for many tasks, scale="auto": measured / predicted of each task '
        "after the next one, and its calibration on its own data before\n\n"
        "| hidden layers | seed | ratio | calibration | spread of ratio | of ratio / calibration "
        "|\n|---:|---:|---|---|---:|---:|"
    )
    for hidden, seed in product(((100, 100), (100,) * 6), seeds):
        tasks = 3 if quick else 8
        pairs = list(along_a_stream(runs, config(seed, **RECIPE, tasks=tasks, hidden=hidden)))
        ratios = [increase.ratio for increase, _ in pairs]
        told = [calibration for _, calibration in pairs]
        left = [ratio / c for ratio, c in zip(ratios, told, strict=True)]
        print(
            f"| {len(hidden)} | {seed} | {', '.join(f'{x:.1f}' for x in ratios)} | "
            f"{', '.join(f'{x:.2f}' for x in told)} | {stdev(ratios) / mean(ratios):.2f} | "
            f"{stdev(left) / mean(left):.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
