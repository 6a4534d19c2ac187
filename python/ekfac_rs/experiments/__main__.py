"""Command line of the experiments: ``python -m ekfac_rs.experiments --help``."""

import argparse
import dataclasses
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from ekfac_rs.data import load_mnist, load_mnist_subset
from ekfac_rs.errors import EkfacError
from ekfac_rs.experiments.permuted_mnist import METHODS, PRESETS, study


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(given)
    try:
        _permuted_mnist(options, shlex.join(["python", "-m", "ekfac_rs.experiments", *given]))
    except EkfacError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on after the runs finished", file=sys.stderr)
        return 130
    return 0


def _permuted_mnist(options: argparse.Namespace, command: str) -> None:
    changes = {
        name: value
        for name in ("tasks", "epochs", "seeds", "hidden", "batch_size", "examples", "finalists")
        if (value := getattr(options, name)) is not None
    }
    preset = dataclasses.replace(PRESETS[options.preset], **changes)
    mnist = load_mnist_subset() if preset.dataset == "subset" else load_mnist(options.data_dir)
    output = options.output or Path("results", f"permuted-mnist-{options.preset}")
    print(study(preset, mnist, output, options.methods, command, options.workers))
    print(f"written to {output}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ekfac_rs.experiments",
        description="Continual-learning experiments of ekfac_rs.",
    )
    commands = parser.add_subparsers(required=True, metavar="EXPERIMENT")
    permuted = commands.add_parser(
        "permuted-mnist",
        help="permuted MNIST with BatchNorm",
        description="Compare methods on permuted MNIST with BatchNorm, each at its best setting. "
        "Finished runs are kept: the same command goes on where it was interrupted.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    permuted.add_argument(
        "--preset",
        choices=list(PRESETS),
        default="quick",
        help="quick: the embedded subset, minutes; full: the whole of MNIST, an hour or two",
    )
    permuted.add_argument(
        "--data-dir",
        type=Path,
        metavar="FOLDER",
        help="MNIST's IDX files, for --preset full; otherwise the folder in EKFAC_DATA, "
        "otherwise a download",
    )
    permuted.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="results, table, pictures and finished runs (default: results/permuted-mnist-PRESET)",
    )
    permuted.add_argument(
        "--methods",
        nargs="+",
        choices=list(METHODS),
        default=list(METHODS),
        metavar="METHOD",
        help=f"some of: {', '.join(METHODS)}",
    )
    permuted.add_argument(
        "--workers",
        type=_positive,
        default=_processors(),
        metavar="N",
        help="runs made at the same time, one thread and about 1 GB (full) each",
    )
    changes = permuted.add_argument_group("changes to the preset")
    changes.add_argument("--tasks", type=_positive, metavar="N", help="tasks in a stream")
    changes.add_argument("--epochs", type=_positive, metavar="N", help="epochs per task")
    changes.add_argument(
        "--seeds", type=_natural, nargs="+", action=_Tuple, metavar="N", help="one final run each"
    )
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
    return parser


def _processors() -> int:
    """Return the number of processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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
