"""Run Avalanche's own benchmarks with its strategies and with ours, in one run.

``just avalanche`` runs Permuted and Split MNIST with Naive, EWC, LwF and the curvature plugin, each
with its own learning rate and strength, chosen on a seed that is not among those reported.
Its images are those that come with the package: nothing is downloaded.
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from avalanche.benchmarks import nc_benchmark
from avalanche.benchmarks.classic import PermutedMNIST, SplitMNIST
from avalanche.evaluation.metrics import accuracy_metrics, forgetting_metrics
from avalanche.logging import TextLogger
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.supervised import EWC, LwF, Naive
from torch import nn
from torch.utils.data import TensorDataset

import ekfac_rs as ek
from ekfac_rs.experiments.data import Mnist, load_mnist_subset
from ekfac_rs.integrations.avalanche import CurvaturePlugin

TUNING_SEED = 1000
LEARNING_RATES = (0.01, 0.03, 0.1)


@dataclass(frozen=True)
class Preset:
    """Sizes of a run: images for training and testing, epochs of an experience."""

    train: int
    test: int
    epochs: int
    mini_batch: int = 50


PRESETS = {"small": Preset(5000, 1000, 1), "smoke": Preset(200, 100, 1)}


@dataclass(frozen=True)
class Benchmark:
    """One of Avalanche's.

    Attributes
    ----------
    title : str
    classes : int
        Outputs of the network, which all experiences share.
    make : callable
        From a folder with MNIST and a seed.
    """

    title: str
    classes: int
    make: Callable[[Path, int], Any]


BENCHMARKS = {
    "permuted": Benchmark(
        "Permuted MNIST, 5 experiences",
        10,
        lambda root, seed: PermutedMNIST(5, seed=seed, dataset_root=root),
    ),
    "split": Benchmark(
        "Split MNIST, 5 experiences of two classes, two outputs for all",
        2,
        lambda root, seed: SplitMNIST(
            5, seed=seed, class_ids_from_zero_in_each_exp=True, dataset_root=root
        ),
    ),
}


@dataclass(frozen=True)
class Method:
    """A strategy.

    Attributes
    ----------
    title : str
    strengths : tuple of float
        Of what holds on, to choose from; empty for one that holds on to nothing.
    make : callable
        From model, strength and what all strategies are given.
    """

    title: str
    strengths: tuple[float, ...]
    make: Callable[[nn.Module, float, dict[str, Any]], Any]


def ours(model: nn.Module, strength: float, common: dict[str, Any]) -> Any:
    learner = ek.ContinualLearner(
        model, scale=strength, damping=0.01, generator=torch.Generator().manual_seed(0)
    )
    return Naive(model=model, plugins=[CurvaturePlugin(learner)], **common)


METHODS = {
    "naive": Method("Naive", (), lambda model, _, common: Naive(model=model, **common)),
    "ewc": Method(
        "EWC",
        (10.0, 100.0, 1000.0, 10000.0),
        lambda model, strength, common: EWC(model=model, ewc_lambda=strength, **common),
    ),
    "lwf": Method(
        "LwF",
        (0.3, 1.0, 3.0, 10.0),
        lambda model, strength, common: LwF(model=model, alpha=strength, temperature=2.0, **common),
    ),
    "ours": Method("CurvaturePlugin (ours)", (1.0, 3.0, 10.0, 30.0), ours),
}


@dataclass(frozen=True)
class Choice:
    """What is chosen for each method: its learning rate, and how strongly it holds on."""

    lr: float
    strength: float


@dataclass(frozen=True)
class Result:
    """Of one run.

    Attributes
    ----------
    accuracy : float
        Mean over all experiences' test sets after the last, as Avalanche measures it.
    learnt : float
        Mean over experiences of the accuracy right after learning them.
    forgetting : float
    seconds : float
        Of training, consolidation included.
    """

    accuracy: float
    learnt: float
    forgetting: float
    seconds: float


def network(classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        *(nn.Linear(784, 100), nn.BatchNorm1d(100), nn.ReLU()),
        *(nn.Linear(100, 100), nn.BatchNorm1d(100), nn.ReLU()),
        nn.Linear(100, classes),
    )


def write_mnist(mnist: Mnist, preset: Preset, root: Path) -> None:
    """Write some images as the files that torchvision looks for before it downloads."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    random = np.random.default_rng(0)
    parts = {
        "train": (mnist.train_images, mnist.train_labels, preset.train),
        "t10k": (mnist.test_images, mnist.test_labels, preset.test),
    }
    for name, (images, labels, count) in parts.items():
        some = random.permutation(len(images))[:count]
        for kind, values in (("images-idx3", images[some]), ("labels-idx1", labels[some])):
            header = bytes([0, 0, 8, values.ndim])
            sizes = np.array(values.shape, dtype=">i4").tobytes()
            (raw / f"{name}-{kind}-ubyte").write_bytes(header + sizes + values.tobytes())


class InMemory(TensorDataset):
    """An experience's data, as its transformations have made them."""

    def __init__(self, data: Any) -> None:
        images, labels, *_ = zip(*(data[k] for k in range(len(data))), strict=True)
        super().__init__(torch.stack(images), torch.tensor(labels))
        self.targets = self.tensors[1].tolist()

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.tensors[0][index], self.targets[index]


def in_memory(benchmark: Any) -> Any:
    """Return the same experiences without what takes half a millisecond for each image."""
    streams = (benchmark.train_stream, benchmark.test_stream)
    train, test = ([InMemory(exp.dataset) for exp in stream] for stream in streams)
    return nc_benchmark(
        train,
        test,
        n_experiences=len(train),
        task_labels=False,
        shuffle=False,
        one_dataset_per_exp=True,
        class_ids_from_zero_in_each_exp=True,
    )


def run(
    method: Method, choice: Choice, data: Any, classes: int, preset: Preset, seed: int, log: Any
) -> Result:
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    model = network(classes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluator = EvaluationPlugin(
            accuracy_metrics(experience=True, stream=True),
            forgetting_metrics(stream=True),
            loggers=[TextLogger(log)],
        )
        strategy = method.make(
            model,
            choice.strength,
            {
                "criterion": nn.CrossEntropyLoss(),
                "optimizer": torch.optim.SGD(model.parameters(), lr=choice.lr, momentum=0.9),
                "train_mb_size": preset.mini_batch,
                "train_epochs": preset.epochs,
                "eval_mb_size": 500,
                "evaluator": evaluator,
            },
        )
        learnt, seconds, metrics = [], 0.0, {}
        for number, experience in enumerate(data.train_stream):
            begun = time.perf_counter()
            # The last mini-batch may be of one, which is none for a BatchNorm.
            strategy.train(experience, drop_last=True)
            seconds += time.perf_counter() - begun
            metrics = strategy.eval(data.test_stream)
            learnt.append(_only(metrics, "Top1_Acc_Exp/", f"Exp{number:03}"))
    return Result(
        _only(metrics, "Top1_Acc_Stream/", "test_stream"),
        statistics.mean(learnt),
        _only(metrics, "StreamForgetting/", "test_stream"),
        seconds,
    )


def _only(metrics: dict[str, float], begins: str, holds: str) -> float:
    [value] = [v for k, v in metrics.items() if k.startswith(begins) and holds in k]
    return float(value)


def choose(method: Method, measure: Callable[[Choice], Result]) -> Choice:
    """Choose strength and learning rate one after the other.

    What holds on to nothing is ordinary fine-tuning: its learning rate is the one with which
    experiences are learnt best, whatever is forgotten.
    """
    if not method.strengths:
        return max((Choice(lr, 0.0) for lr in LEARNING_RATES), key=lambda c: measure(c).learnt)
    begun = [Choice(LEARNING_RATES[1], strength) for strength in method.strengths]
    best = max(begun, key=lambda c: measure(c).accuracy)
    return max((replace(best, lr=lr) for lr in LEARNING_RATES), key=lambda c: measure(c).accuracy)


def compare(
    benchmark: Benchmark, names: Sequence[str], seeds: Sequence[int], preset: Preset, root: Path,
    log: Any,
) -> dict[str, Any]:  # fmt: skip
    tuning = in_memory(benchmark.make(root, TUNING_SEED))
    found: dict[str, Any] = {}
    for name in names:

        @cache
        def measured(choice: Choice, name: str = name) -> Result:
            result = _run_or_fail(
                METHODS[name], choice, tuning, benchmark.classes, preset, TUNING_SEED, log
            )
            print(f"{name}: {choice}: {result}", file=sys.stderr, flush=True)
            return result

        choice = choose(METHODS[name], measured)
        found[name] = {"choice": asdict(choice), "runs": []}
    for seed in seeds:
        data = in_memory(benchmark.make(root, seed))
        for name in names:
            choice = Choice(**found[name]["choice"])
            result = run(METHODS[name], choice, data, benchmark.classes, preset, seed, log)
            found[name]["runs"].append({"seed": seed, **asdict(result)})
            print(f"{name}, seed {seed}: {result}", file=sys.stderr, flush=True)
    return found


def _run_or_fail(*arguments: Any) -> Result:
    """Run, where too high a learning rate may end in numbers that are none."""
    try:
        return run(*arguments)
    except ek.errors.NumericalError:
        return Result(0.0, 0.0, math.inf, 0.0)


def table(results: dict[str, Any]) -> str:
    preset = Preset(**results["preset"])
    lines = [
        f"{preset.train} training and {preset.test} test images of MNIST, epochs of an "
        f"experience: {preset.epochs}, mini-batches of {preset.mini_batch}; MLP 784-100-100 with "
        "BatchNorm; SGD with momentum 0.9. Mean and standard deviation over seeds, in per cent.",
    ]
    for key, found in results["benchmarks"].items():
        lines += ["", f"**{BENCHMARKS[key].title}**", ""]
        lines += [
            "| strategy | learning rate | strength | accuracy at the end | accuracy when learnt | "
            "forgetting | seconds |",
            "|---|---|---|---|---|---|---|",
        ]
        for name, row in found.items():
            method, choice, runs = METHODS[name], row["choice"], row["runs"]
            strength = f"{choice['strength']:g}" if method.strengths else ""
            numbers = [
                _in_words([100.0 * r[what] for r in runs])
                for what in ("accuracy", "learnt", "forgetting")
            ]
            seconds = statistics.mean(r["seconds"] for r in runs)
            lines.append(
                f"| {method.title} | {choice['lr']:g} | {strength} | {' | '.join(numbers)} | "
                f"{seconds:.0f} |"
            )
    return "\n".join(lines) + "\n"


def _in_words(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"which: {', '.join(BENCHMARKS)}; all")
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--output", type=Path, default=Path("results/avalanche"))
    arguments = parser.parse_args()
    names = arguments.names or list(BENCHMARKS)
    if unknown := set(names) - set(BENCHMARKS):
        parser.error(f"expected some of {', '.join(BENCHMARKS)}, got {', '.join(unknown)}")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    preset = PRESETS[arguments.preset]
    results: dict[str, Any] = {"preset": asdict(preset), "benchmarks": {}}
    arguments.output.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as folder, open(arguments.output / "log.txt", "w") as log:
        write_mnist(load_mnist_subset(), preset, Path(folder))
        for name in names:
            results["benchmarks"][name] = compare(
                BENCHMARKS[name],
                arguments.methods,
                range(arguments.seeds),
                preset,
                Path(folder),
                log,
            )
            # After each, so that a run that is cut short leaves what it has.
            text = json.dumps(results, indent=1)
            (arguments.output / "avalanche.json").write_text(text + "\n")
            (arguments.output / "table.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
