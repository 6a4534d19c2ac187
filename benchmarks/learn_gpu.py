"""Permuted MNIST's quick preset on a GPU: what methods keep, and how long they take there.

Each method at one setting of the preset, the middle of its grid, and one seed, on each device in
turn. Labels of curvatures are drawn by another generator on a GPU, so accuracies differ as those of
two seeds do. ``--device cpu --quick`` is a dry run.
"""

import argparse
import dataclasses
import time
from collections import defaultdict
from collections.abc import Iterator

import torch
from bench_gpu import header, row

from ekfac_rs import AccuracyMatrix
from ekfac_rs.experiments.data import TensorLoader
from ekfac_rs.experiments.permuted_mnist import (
    METHODS,
    PRESETS,
    PermutedConfig,
    PermutedMnist,
    PermutedRuns,
)

DEFAULT = ("fine-tuning", "kfac-frozen", "xkfac", "scheduled-kfac-first-own")
SEED = 0
TRIAL = dataclasses.replace(PRESETS["quick"], tasks=2, epochs=1, examples=1000, factor_examples=500)


def learn(experiment: PermutedMnist, method: str, device: torch.device) -> tuple[float, ...]:
    """Average accuracy over all tasks, and seconds of fitting, consolidating and evaluating."""
    settings = METHODS[method].settings(experiment.preset)
    middle = settings[len(settings) // 2]
    options = experiment.config("final", SEED, {**METHODS[method].fixed, **middle})
    config = PermutedConfig(**options)
    runs = PermutedRuns(experiment.data)
    tasks = runs.tasks(config)
    learner = config.learner(
        runs.network(config).to(device),
        max_examples=config.factor_examples,
        generator=torch.Generator(device).manual_seed(SEED),
    )
    seconds: dict[str, float] = defaultdict(float)

    def there(loader: TensorLoader) -> TensorLoader:
        loader.x, loader.y = loader.x.to(device), loader.y.to(device)
        return loader

    def timed(part: str, began: float) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        seconds[part] += now - began
        return now

    rows = []
    now = time.perf_counter()
    for task in range(config.tasks):
        training = there(tasks.training(task))
        now = timed("data", now)
        learner.fit(training, epochs=config.epochs, lr=config.lr)
        now = timed("fit", now)
        learner.consolidate(training)
        now = timed("consolidate", now)
        rows.append(learner.evaluate([there(tasks.evaluation(j)) for j in range(task + 1)]))
        now = timed("evaluate", now)
    parts = (seconds[part] for part in ("fit", "consolidate", "evaluate"))
    return (100 * AccuracyMatrix.from_rows(rows).average(), *parts)


def report(experiment: PermutedMnist, methods: list[str], devices: list[str]) -> Iterator[str]:
    preset = experiment.preset
    yield f"# Permuted MNIST, {preset.name} preset\n"
    yield (
        f"torch {torch.__version__}; {preset.tasks} tasks, seed {SEED}, each method at the middle "
        "of its grid. Seconds of the whole run."
    )
    columns = ("average accuracy, %", "fit, s", "consolidate, s", "evaluate, s")
    yield header("method", "device", *columns)
    for device in devices:
        for method in methods:
            yield row(method, device, *learn(experiment, method, torch.device(device)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", nargs="+", default=["cuda:0"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=DEFAULT, metavar="METHOD")
    parser.add_argument("--quick", action="store_true", help="two tasks of few images, one epoch")
    arguments = parser.parse_args()
    preset = TRIAL if arguments.quick else PRESETS["quick"]
    experiment = PermutedMnist.read(preset, None)
    for line in report(experiment, list(arguments.methods), arguments.device):
        print(line, flush=True)


if __name__ == "__main__":
    main()
