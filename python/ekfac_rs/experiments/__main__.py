"""Command line of the experiments: ``python -m ekfac_rs.experiments --help``."""

import argparse
import dataclasses
import os
import shlex
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ekfac_rs.errors import EkfacError
from ekfac_rs.experiments.comparison import Comparison, Experiment
from ekfac_rs.experiments.finegrained import FineGrained
from ekfac_rs.experiments.options import device, positive
from ekfac_rs.experiments.permuted_mnist import PermutedMnist
from ekfac_rs.experiments.settings import Preset
from ekfac_rs.experiments.split_cifar import SplitCifar
from ekfac_rs.experiments.study import PARTS, Study

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

EXPERIMENTS: tuple[type[Experiment], ...] = (PermutedMnist, SplitCifar, FineGrained)


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


def _compare(options: argparse.Namespace, command: str) -> None:
    experiment = options.experiment.from_options(_preset(options), options)
    output = options.output or Path("results", experiment.folder)
    workers = options.workers or experiment.workers(_processors())
    comparison = Comparison(
        experiment,
        output,
        options.methods,
        command=command,
        workers=workers,
        threads_each=experiment.threads_each(_processors(), workers),
    )
    print(comparison.run())
    print(f"written to {output}")


def _study(options: argparse.Namespace, command: str) -> None:
    output = options.output or Path("results", "study-quick" if options.quick else "study")
    study = Study(
        PARTS,
        output,
        quick=options.quick,
        data_dir=options.data_dir,
        device=options.device,
        command=command,
        processors=_processors(),
        workers=options.workers,
    )
    print(study.run(options.part))
    print(f"written to {output}")


def _preset(options: argparse.Namespace) -> Preset:
    """Return the preset with what the command line says otherwise."""
    experiment: type[Experiment] = options.experiment
    preset = experiment.default if options.preset is None else experiment.presets[options.preset]
    given = {name: getattr(options, name) for name in _changeable(preset)}
    return preset.changed({name: value for name, value in given.items() if value is not None})


def _changeable(preset: Preset) -> "dict[str, dataclasses.Field[Any]]":
    """Return the fields of a preset that have an option."""
    return {field.name: field for field in dataclasses.fields(preset) if field.metadata}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ekfac_rs.experiments",
        description="Continual-learning experiments of ekfac_rs.",
    )
    commands = parser.add_subparsers(required=True, metavar="EXPERIMENT")
    for experiment in EXPERIMENTS:
        _add_command(commands, experiment)
    _add_study(commands)
    return parser


def _add_command(commands: "Commands", experiment: type[Experiment]) -> None:
    parser = commands.add_parser(
        experiment.name,
        help=experiment.summary,
        description=experiment.description,
        epilog=experiment.epilog,
        formatter_class=_HelpFormatter,
    )
    parser.set_defaults(run=_compare, experiment=experiment)
    parser.add_argument("--preset", choices=list(experiment.presets), help=experiment.preset_help)
    experiment.add_arguments(parser)
    parser.add_argument("--data-dir", type=Path, metavar="FOLDER", help=experiment.data_help)
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="results, table, pictures and finished runs (default: below results, named after "
        "experiment and preset)",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=list(experiment.methods),
        metavar="METHOD",
        help=f"some of (default: as the preset says): {', '.join(experiment.methods)}",
    )
    _add_workers(
        parser, "as many as there are processors; one for a network given by path, and on a GPU"
    )
    changes = parser.add_argument_group(
        "changes to the preset", "In brackets: what holds without --preset."
    )
    for name, field in _changeable(experiment.default).items():
        _add_change(changes, name, field, getattr(experiment.default, name))


def _add_study(commands: "Commands") -> None:
    parser = commands.add_parser(
        "study",
        help="all of it: which method to use when",
        description=(
            "Make all comparisons and one report. Finished runs are kept: the same command goes "
            "on where it was interrupted. It begins by saying how many runs there are to make, "
            "and about how long they take: some two days of one processor in all."
        ),
        formatter_class=_HelpFormatter,
    )
    parser.set_defaults(run=_study)
    parser.add_argument(
        "--part",
        nargs="+",
        choices=list(PARTS),
        metavar="PART",
        help=f"some of (default: all): {', '.join(PARTS)}",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="small forms of all parts, ten minutes on two processors: to see that it works",
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        metavar="FOLDER",
        help="folder with MNIST, the archives and the weights (default: the folder in EKFAC_DATA, "
        "otherwise ../shared/data, or a download for MNIST)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="report, a folder for each part, and finished runs (default: results/study, or "
        "results/study-quick)",
    )
    parser.add_argument(
        "--device",
        type=device,
        default="cpu",
        metavar="NAME",
        help="cpu, or cuda for an NVIDIA GPU, one run at a time (default: cpu)",
    )
    _add_workers(parser, "as many as there are processors; one on a GPU")


def _add_workers(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--workers",
        type=positive,
        metavar="N",
        help=f"runs made at the same time (default: {default})",
    )


def _add_change(
    changes: "argparse._ArgumentGroup", name: str, field: "dataclasses.Field[Any]", value: Any
) -> None:
    kind, choices = field.metadata["kind"], field.metadata["choices"]
    several = isinstance(value, tuple)
    known = "" if value in (None, ()) else f" ({_text(value)})"
    changes.add_argument(
        f"--{name.replace('_', '-')}",
        type=kind,
        choices=choices,
        nargs="+" if several else None,
        action=_Tuple if several else "store",
        metavar=None if choices else "N",
        help=field.metadata["text"] + known,
    )


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(_text, value))
    return value if isinstance(value, str) else f"{value:g}"


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


if __name__ == "__main__":
    raise SystemExit(main())
