"""Command line of the experiments: ``python -m ekfac_rs.experiments --help``."""

import argparse
import dataclasses
import math
import os
import shlex
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ekfac_rs.errors import EkfacError, OptionError
from ekfac_rs.experiments import finegrained, permuted_mnist
from ekfac_rs.experiments.data import find_data, load_mnist, load_mnist_subset
from ekfac_rs.experiments.networks import ARCHITECTURES

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

P = TypeVar("P", bound="DataclassInstance")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(given)
    try:
        options.run(options, shlex.join(["python", "-m", "ekfac_rs.experiments", *given]))
    except EkfacError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on after the runs finished", file=sys.stderr)
        return 130
    return 0


def _permuted_mnist(options: argparse.Namespace, command: str) -> None:
    preset = _changed(permuted_mnist.PRESETS[options.preset], options)
    mnist = load_mnist_subset() if preset.dataset == "subset" else load_mnist(options.data_dir)
    output = options.output or Path("results", f"permuted-mnist-{options.preset}")
    workers = options.workers or _processors()
    print(permuted_mnist.study(preset, mnist, output, options.methods, command, workers))
    print(f"written to {output}")


def _finegrained(options: argparse.Namespace, command: str) -> None:
    named = options.preset is not None
    preset = _changed(
        finegrained.PRESETS[options.preset] if named else finegrained.FOLDERS, options
    )
    weights = options.source_weights or _weights(preset, options.data_dir)
    source = options.source_data or _data("source-data", preset.source, options.data_dir)
    target = options.target_data or _data("target-data", preset.target, options.data_dir)
    output = options.output or Path("results", f"finegrained-{options.preset or preset.model}")
    # Networks given by path may be large: one run at a time then, on all processors.
    workers = options.workers or (_processors() if named else 1)
    data, notes = finegrained.read_images(preset, source, target)
    table = finegrained.study(
        preset,
        data,
        weights,
        output,
        options.methods,
        about={
            "command": command,
            "source": {"data": source.name, "weights": weights.name},
            "target": {"data": target.name},
        },
        notes=notes,
        workers=workers,
        threads_each=max(1, _processors() // workers),
    )
    print(table)
    print(f"written to {output}")


def _changed(preset: P, options: argparse.Namespace) -> P:
    """Return the preset with what the command line says otherwise."""
    names = {field.name for field in dataclasses.fields(preset)}
    given = {k: v for k, v in vars(options).items() if k in names and v is not None}
    return dataclasses.replace(preset, **given)


def _weights(preset: finegrained.Preset, data_dir: Path | None) -> Path:
    packaged = ARCHITECTURES[preset.model].packaged_weights
    if preset.weights is None and packaged is not None:
        return packaged()
    return _data("source-weights", preset.weights, data_dir)


def _data(option: str, name: str | None, data_dir: Path | None) -> Path:
    if name is None:
        raise OptionError(f"--{option}: needed without a --preset")
    return find_data(name, data_dir)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ekfac_rs.experiments",
        description="Continual-learning experiments of ekfac_rs.",
    )
    commands = parser.add_subparsers(required=True, metavar="EXPERIMENT")
    _add_permuted_mnist(commands)
    _add_finegrained(commands)
    return parser


def _add_permuted_mnist(commands: "Commands") -> None:
    presets = permuted_mnist.PRESETS
    permuted = commands.add_parser(
        "permuted-mnist",
        help="permuted MNIST with BatchNorm",
        description="Compare methods on permuted MNIST with BatchNorm, each at its best setting. "
        "Finished runs are kept: the same command goes on where it was interrupted.",
        formatter_class=_HelpFormatter,
    )
    permuted.set_defaults(run=_permuted_mnist)
    permuted.add_argument(
        "--preset",
        choices=list(presets),
        default="quick",
        help="quick (default): the embedded subset, minutes; full: the whole of MNIST, an hour or "
        "two",
    )
    permuted.add_argument(
        "--data-dir",
        type=Path,
        metavar="FOLDER",
        help="MNIST's IDX files, for --preset full; otherwise the folder in EKFAC_DATA, "
        "otherwise a download",
    )
    permuted.add_argument(
        "--workers",
        type=_positive,
        metavar="N",
        help="runs made at the same time, one thread and about 1 GB (full) each (default: as many "
        "as there are processors)",
    )
    _add_common(permuted, list(permuted_mnist.METHODS), "permuted-mnist-PRESET")
    changes = permuted.add_argument_group("changes to the preset")
    changes.add_argument("--tasks", type=_positive, metavar="N", help="tasks in a stream")
    changes.add_argument("--epochs", type=_positive, metavar="N", help="epochs per task")
    _add_seeds(changes)
    changes.add_argument(
        "--hidden",
        type=_positive,
        nargs="+",
        action=_Tuple,
        metavar="N",
        help="widths of the hidden layers",
    )
    changes.add_argument("--batch-size", type=_batch_size, metavar="N", help="at least 2, for BN")
    changes.add_argument(
        "--finalists",
        type=_natural,
        metavar="N",
        help="best settings of each method's grid that are tried again on all tasks",
    )
    changes.add_argument("--examples", type=_batch_size, metavar="N", help="training images used")


def _add_finegrained(commands: "Commands") -> None:
    folders = finegrained.FOLDERS
    transfer = commands.add_parser(
        "finegrained",
        help="from a pretrained network to a fine-grained set",
        description="Transfer a pretrained network to a target set and compare what methods keep "
        "of its source: accuracy on the source before and after, on the target, and their mean. "
        "With --preset everything has a default; otherwise give --model, --source-weights, "
        "--source-data and --target-data. Each method's setting is chosen from a grid on the "
        "target's validation images alone. Finished runs and curvatures are kept: the same "
        "command goes on where it was interrupted.",
        epilog="Data are directories or tar archives with folders train, validation (or val) and "
        "test, in each of them a folder of images per class. The source's classes, in "
        "alphabetical order, are the outputs of the weights; without splits the same images give "
        "the curvature and the accuracy. Where the target lacks validation or test, a tenth of "
        "its training images is held out for validation.",
        formatter_class=_HelpFormatter,
    )
    transfer.set_defaults(run=_finegrained)
    transfer.add_argument(
        "--preset",
        choices=list(finegrained.PRESETS),
        help="lite0-clothing: EfficientNet-Lite0 with ImageNet weights, source the 1,000 images "
        "of imagenet_sample160.tar; cifar-clothing: CIFAR-10 ResNet-56, source cifar10_jpeg.tar; "
        "the target of both is clothing160.tar. An hour or two on two processors each",
    )
    transfer.add_argument(
        "--model", choices=list(ARCHITECTURES), help=f"network (default: {folders.model})"
    )
    transfer.add_argument(
        "--source-weights",
        type=Path,
        metavar="FILE",
        help="state dict of the network, as torchvision's (default for efficientnet-lite0: those "
        "of its package)",
    )
    transfer.add_argument(
        "--source-data", type=Path, metavar="DIR", help="images the network was trained on"
    )
    transfer.add_argument("--target-data", type=Path, metavar="DIR", help="images to learn")
    transfer.add_argument(
        "--data-dir",
        type=Path,
        metavar="FOLDER",
        help="folder with a preset's archives and weights (default: the folder in EKFAC_DATA, "
        "otherwise ../shared/data)",
    )
    transfer.add_argument(
        "--workers",
        type=_positive,
        metavar="N",
        help="runs made at the same time, which share the processors (default: as many as there "
        "are processors with --preset, else 1)",
    )
    _add_common(transfer, list(finegrained.METHODS), "finegrained-PRESET or -MODEL")
    changes = transfer.add_argument_group(
        "changes to the preset", "In brackets: what holds without --preset."
    )
    changes.add_argument(
        "--image-size",
        type=_positive,
        metavar="N",
        help=f"height and width of all images ({folders.image_size})",
    )
    changes.add_argument(
        "--crop",
        type=_fraction,
        metavar="X",
        help=f"share of an image's shorter side that is kept ({folders.crop:g})",
    )
    changes.add_argument(
        "--source-images",
        type=_batch_size,
        metavar="N",
        help="read at most so many of each of the source's splits, all classes in proportion "
        f"({folders.source_images}); images are kept in memory",
    )
    changes.add_argument(
        "--batch-size",
        type=_batch_size,
        metavar="N",
        help=f"at least 2, for BN ({folders.batch_size})",
    )
    changes.add_argument(
        "--epochs", type=_positive, metavar="N", help=f"on the target ({folders.epochs})"
    )
    _add_seeds(changes)
    for name, text in {
        "lrs": "learning rates of the grid",
        "frozen-lrs": "as many learning rates for a method with BatchNorm frozen",
        "scales": "scales of the curvature's penalty in the grid",
        "l2": "strengths of L2-SP in the grid",
    }.items():
        default = " ".join(f"{value:g}" for value in getattr(folders, name.replace("-", "_")))
        changes.add_argument(
            f"--{name}",
            type=_number,
            nargs="+",
            action=_Tuple,
            metavar="X",
            help=f"{text} ({default})",
        )
    changes.add_argument(
        "--damping",
        type=_number,
        metavar="X",
        help=f"of the penalties with a curvature ({folders.damping:g})",
    )
    changes.add_argument(
        "--tolerance",
        type=_number,
        metavar="X",
        help="validation accuracy, as a fraction, that a stronger penalty may cost: the strongest "
        f"within it is chosen ({folders.tolerance:g})",
    )


def _add_common(parser: argparse.ArgumentParser, methods: list[str], folder: str) -> None:
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help=f"results, table, pictures and finished runs (default: results/{folder})",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=methods,
        default=methods,
        metavar="METHOD",
        help=f"some of (default: all): {', '.join(methods)}",
    )


def _add_seeds(changes: "argparse._ArgumentGroup") -> None:
    changes.add_argument(
        "--seeds", type=_natural, nargs="+", action=_Tuple, metavar="N", help="one final run each"
    )


def _processors() -> int:
    """Return the number of processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _HelpFormatter(argparse.HelpFormatter):
    """Never breaks a line within a name like ``kfac-train``."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


class _Tuple(argparse.Action):
    """Store a list of values as a tuple."""

    def __call__(self, parser, namespace, values, option_string=None):  # type: ignore[no-untyped-def]
        setattr(namespace, self.dest, tuple(values))


def _natural(text: str) -> int:
    return _at_least(text, 0)


def _positive(text: str) -> int:
    return _at_least(text, 1)


def _batch_size(text: str) -> int:
    return _at_least(text, 2)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number from 0 on, got {text!r}")
    return value


def _fraction(text: str) -> float:
    value = _number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0 and up to 1, got {text!r}")
    return value


def _at_least(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"expected a whole number from {least} on, got {text!r}")
    return value


if __name__ == "__main__":
    raise SystemExit(main())
