"""The study: which method to use when, as one command over several experiments.

Every part is the comparison of one experiment at sizes of its own; what the parts found is put
together in one report. Finished runs are kept, and parts share them where they are the same.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ekfac_rs.errors import OptionError
from ekfac_rs.experiments import finegrained, permuted_mnist, split_cifar
from ekfac_rs.experiments.comparison import Comparison, Experiment
from ekfac_rs.experiments.finegrained import FineGrained, TransferPreset
from ekfac_rs.experiments.methods import rule_names
from ekfac_rs.experiments.permuted_mnist import PermutedMnist
from ekfac_rs.experiments.report import counted, environment, read_results, summary_table
from ekfac_rs.experiments.runs import PlannedRun, config_digest
from ekfac_rs.experiments.settings import Preset
from ekfac_rs.experiments.split_cifar import SplitCifar

__all__ = ["PARTS", "Part", "Study"]


@dataclass(frozen=True)
class Part:
    """One comparison of the study.

    Attributes
    ----------
    experiment
        What is compared.
    preset, quick
        Its size in the study, and in its quick form.
    question
        What it is to tell: a sentence of the report.
    """

    experiment: type[Experiment]
    preset: Preset
    quick: Preset
    question: str


class Study:
    """Several comparisons with one report.

    Parameters
    ----------
    parts
        By name, in the order of the report.
    output
        Folder of the report, ``README.md``, and of a folder for each part. Finished runs are kept
        in ``runs`` below it.
    quick
        Take each part's quick form.
    data_dir
        Where to look for data; None for where they usually are.
    device
        That makes the runs.
    command
        The command line, for the report.
    processors
        To share among runs.
    workers
        Runs made at the same time; by default what each experiment makes of the processors.
    progress
        Print plans and show progress bars.
    """

    def __init__(
        self,
        parts: Mapping[str, Part],
        output: Path,
        *,
        quick: bool = False,
        data_dir: Path | None = None,
        device: str = "cpu",
        command: str = "",
        processors: int = 1,
        workers: int | None = None,
        progress: bool = True,
    ) -> None:
        self.parts = parts
        self.output = output
        self.quick = quick
        self.data_dir = data_dir
        self.device = device
        self.command = command
        self.processors = processors
        self.workers = workers
        self.progress = progress

    def run(self, names: Sequence[str] | None = None) -> str:
        """Make the runs that are not there yet, and write the report.

        It is written anew when a part is finished, with all parts finished so far.

        Parameters
        ----------
        names
            Of the parts to make; all by default.

        Returns
        -------
        str
            The report, in Markdown.

        Raises
        ------
        OptionError
            There is no such part, or none is named.
        EkfacError
            Data are missing or damaged: before any run is made.
        """
        comparisons = {name: self._comparison(name) for name in self._named(names)}
        if self.progress:
            print(self._announcement(comparisons), flush=True)
        for name, comparison in comparisons.items():
            if self.progress:
                print(f"\n{name}: {comparison.experiment.title()}", flush=True)
            comparison.run()
            report = self._report()
        return report

    def _named(self, names: Sequence[str] | None) -> list[str]:
        named = list(self.parts) if names is None else list(names)
        unknown = sorted(set(named) - set(self.parts))
        if unknown or not named:
            raise OptionError(f"part: expected some of {', '.join(self.parts)}, got {unknown}")
        return [name for name in self.parts if name in named]

    def _comparison(self, name: str) -> Comparison:
        part = self.parts[name]
        preset = part.quick if self.quick else part.preset
        experiment = part.experiment.read(preset.changed({"device": self.device}), self.data_dir)
        workers = self.workers or experiment.workers(self.processors)
        return Comparison(
            experiment,
            self.output / name,
            command=self.command,
            workers=workers,
            threads_each=experiment.threads_each(self.processors, workers),
            store=self.output / "runs",
            progress=self.progress,
            estimate=not self.quick,
        )

    def _announcement(self, comparisons: Mapping[str, Comparison]) -> str:
        """Say how many runs there are to make and, but for the quick form, how long they take."""
        runs = _runs_to_make(comparisons)
        count = sum(map(len, runs.values()))
        if self.quick:
            return f"{counted(count, 'run')} to make, in {counted(len(runs), 'part')}"
        seconds = dict.fromkeys(runs, 0.0)
        with tqdm(total=count, desc="estimating what runs take", leave=False) as bar:
            for name, of_part in runs.items():
                for run in of_part:
                    seconds[name] += comparisons[name].experiment.seconds(run.config) or 0.0
                    bar.update()
        here = sum(seconds[name] / comparisons[name].workers for name in runs)
        return "\n".join(
            (
                *(f"{name}: {_amount(len(runs[name]), seconds[name])}" for name in runs),
                f"in all: {_amount(count, sum(seconds.values()))}, {here / 3600:.1f} hours here",
            )
        )

    def _report(self) -> str:
        """Write what all parts that are finished have found."""
        finished = {
            name: self.output / name for name in self.parts if _is_finished(self.output / name)
        }
        results = {name: read_results(folder / "results.json") for name, folder in finished.items()}
        versions = ", ".join(f"{name} {value}" for name, value in environment(self.device).items())
        lines = [
            "# The study",
            "",
            f"Made by `{self.command}`, part by part; {versions}. Each part has its figures, the "
            "grid's and those of every run, in its `results.json`.",
            "",
            "## Average accuracy",
            "",
            "Over the tasks of a stream, or of source and target, in per cent on test images, each "
            "method at its chosen setting, ± the half width of the mean's 95 % interval.",
            "",
            summary_table(results),
        ]
        for name, folder in finished.items():
            lines += ["", *_section(name, folder, self.parts[name].question)]
        report = "\n".join(lines) + "\n"
        (self.output / "README.md").write_text(report, encoding="utf-8")
        return report


def _is_finished(folder: Path) -> bool:
    return (folder / "results.json").is_file() and (folder / "table.md").is_file()


def _section(name: str, folder: Path, question: str) -> list[str]:
    """Return a part's own report as a section: its headings a step down, its pictures shown."""
    title, *lines = (folder / "table.md").read_text(encoding="utf-8").splitlines()
    pictures = [
        f"![{path.stem.replace('_', ' ')}]({name}/{path.name})"
        for path in sorted(folder.glob("*.png"))
    ]
    return [
        f"#{title}",
        "",
        question,
        *(f"#{line}" if line.startswith("#") else line for line in lines),
        "",
        "\n".join(pictures),
    ]


def _runs_to_make(comparisons: Mapping[str, Comparison]) -> dict[str, list[PlannedRun]]:
    """Return the runs that are not there yet by part, those that parts share in the first."""
    runs: dict[str, list[PlannedRun]] = {}
    planned: set[str] = set()
    for name, comparison in comparisons.items():
        to_make = [(config_digest(run.config), run) for run in comparison.to_make()]
        runs[name] = [run for digest, run in to_make if digest not in planned]
        planned |= {digest for digest, _ in to_make}
    return runs


def _amount(runs: int, seconds: float) -> str:
    """Say how many runs, and how long they take on one processor."""
    return f"{counted(runs, 'run')}, about {seconds / 3600:.1f} core-hours"


# --- the parts -----------------------------------------------------------------------------------

# The same for all streams of permuted images, so that parts find each other's runs.
_PERMUTED = dataclasses.replace(
    permuted_mnist.PRESETS["full"],
    name="study",
    examples=15_000,
    factor_examples=5_000,
    grid_tasks=10,
    finalists=0,
    crossed=True,
    extensions=3,
    lrs=(0.03, 0.1, 0.3),
    frozen_lrs=(0.01, 0.03, 0.1),
    plain_lrs=(0.001, 0.003, 0.01, 0.03, 0.1),
    plain_epochs=(1, 2),
    rule_lrs=(0.2,),
)
_QUICK_PERMUTED = dataclasses.replace(
    permuted_mnist.PRESETS["quick"],
    name="study-quick",
    examples=4_000,
    tasks=3,
    epochs=1,
    finalists=0,
    seeds=(0, 1, 2),
    lrs=(0.1,),
    frozen_lrs=(0.03,),
    plain_lrs=(0.01, 0.1),
    scales=(1.0, 10.0),
    diagonal_scales=(10.0, 100.0),
    l2=(0.1, 1.0),
    factor_examples=1_000,
)
# All images, at settings chosen on as many as above.
_WHOLE = dataclasses.replace(_PERMUTED, examples=None, grid_examples=15_000)
_QUICK_WHOLE = dataclasses.replace(_QUICK_PERMUTED, examples=None, grid_examples=4_000)
_DEEP = (100,) * 6
# Enough to see what diverges in one run of ten.
_MANY_SEEDS, _SOME_SEEDS = tuple(range(30)), tuple(range(5))
# One that needs no search, to be met in every part: what does best on permuted images.
_WITHOUT_SEARCH = "scheduled-kfac-first-own-auto"
_BEST = (
    *("fine-tuning", "kfac-frozen", "kfac-frozen-own", "kfac-train"),
    *("scheduled-kfac-first", "scheduled-kfac-first-own", _WITHOUT_SEARCH),
)
# The rows of the rules that choose a scale; () leaves them out. Halving takes six times as long.
_RULES_OF_STREAMS = tuple(rule_names("scheduled-kfac-first-own"))
_RULES_OF_TRANSFER = tuple(
    name for name in rule_names("xkfac-nested") if not name.endswith("halving")
)
_QUICK = ("fine-tuning", "kfac-frozen", "xkfac")
_CIFAR = finegrained.PRESETS["cifar-clothing"]
_LITE0 = finegrained.PRESETS["lite0-clothing"]


def _quick_transfer(preset: TransferPreset) -> TransferPreset:
    """Return a form with few images."""
    return dataclasses.replace(
        preset,
        name="study-quick",
        methods=("fine-tuning", "kfac-frozen", "xkfac-nested"),
        source_images=300,
        target_images=400,
        every_setting=True,
        epochs=1,
        seeds=(0, 1),
    )


PARTS: dict[str, Part] = {
    "permuted-mnist": Part(
        PermutedMnist,
        dataclasses.replace(
            _PERMUTED,
            methods=(
                *("fine-tuning", "l2", "ewc", "kfac-frozen", "kfac-frozen-own", "kfac-eval"),
                *("kfac-train", "kfac-train-first", "kfac-train-explicit", "xkfac"),
                *("xkfac-explicit", "xkfac-merged", "scheduled-kfac", "scheduled-kfac-first"),
                *("scheduled-kfac-first-own", "scheduled-xkfac"),
                *_RULES_OF_STREAMS,
            ),
        ),
        dataclasses.replace(
            _QUICK_PERMUTED,
            methods=(
                *("fine-tuning", "l2", "ewc", "kfac-frozen", "kfac-train", "xkfac"),
                *("scheduled-kfac-first-own", "scheduled-kfac-first-own-auto"),
            ),
        ),
        "Which curvature, which step, and what of BatchNorm and of the weights' norms? Every layer "
        "is a Linear here, for which nested XK-FAC is XK-FAC.",
    ),
    "permuted-mnist-whole": Part(
        PermutedMnist,
        dataclasses.replace(_WHOLE, methods=("fine-tuning", "kfac-frozen", _WITHOUT_SEARCH)),
        dataclasses.replace(_QUICK_WHOLE, methods=_QUICK),
        "All images, at the settings chosen above.",
    ),
    "permuted-mnist-deep": Part(
        PermutedMnist,
        dataclasses.replace(
            _PERMUTED,
            methods=(
                *("fine-tuning", "ewc", "kfac-frozen", "kfac-frozen-own", "kfac-train", "xkfac"),
                *("xkfac-explicit", "scheduled-kfac-first-own", _WITHOUT_SEARCH),
            ),
            # What is best in one epoch diverges in two, here, and frozen BatchNorms bear less.
            finalists=3,
            frozen_lrs=(0.003, 0.01, 0.03),
            hidden=_DEEP,
        ),
        dataclasses.replace(_QUICK_PERMUTED, methods=_QUICK, hidden=_DEEP),
        "Does a deeper network change who wins?",
    ),
    "permuted-mnist-long": Part(
        PermutedMnist,
        dataclasses.replace(_PERMUTED, methods=_BEST, tasks=30),
        dataclasses.replace(_QUICK_PERMUTED, methods=_QUICK, tasks=6),
        "Does it last for many more tasks, at settings chosen on fewer?",
    ),
    "permuted-mnist-whole-deep": Part(
        PermutedMnist,
        dataclasses.replace(
            _WHOLE,
            methods=("fine-tuning", "scheduled-kfac-first-own", _WITHOUT_SEARCH),
            finalists=3,
            frozen_lrs=(0.003, 0.01, 0.03),
            hidden=_DEEP,
        ),
        dataclasses.replace(_QUICK_WHOLE, methods=_QUICK, hidden=_DEEP),
        "What needs least of a search, in the deeper network, on all images.",
    ),
    "permuted-mnist-whole-long": Part(
        PermutedMnist,
        dataclasses.replace(
            _WHOLE, methods=("fine-tuning", "kfac-frozen-own", _WITHOUT_SEARCH), tasks=30
        ),
        dataclasses.replace(_QUICK_WHOLE, methods=_QUICK, tasks=6),
        "What does best over many tasks, on all images.",
    ),
    "permuted-mnist-seeds": Part(
        PermutedMnist,
        dataclasses.replace(_PERMUTED, methods=(_WITHOUT_SEARCH,), seeds=_MANY_SEEDS),
        dataclasses.replace(_QUICK_PERMUTED, methods=(_WITHOUT_SEARCH,), seeds=_SOME_SEEDS),
        "Does what needs no search hold, whatever the seed?",
    ),
    "permuted-mnist-deep-seeds": Part(
        PermutedMnist,
        dataclasses.replace(_PERMUTED, methods=(_WITHOUT_SEARCH,), seeds=_MANY_SEEDS, hidden=_DEEP),
        dataclasses.replace(
            _QUICK_PERMUTED, methods=(_WITHOUT_SEARCH,), seeds=_SOME_SEEDS, hidden=_DEEP
        ),
        "And in the deeper network?",
    ),
    "split-cifar": Part(
        SplitCifar,
        dataclasses.replace(
            split_cifar.PRESETS["full"],
            name="study",
            methods=(
                *("fine-tuning", "ewc", "kfac-frozen", "kfac-train", "xkfac-nested"),
                *("xkfac-nested-auto", _WITHOUT_SEARCH),
            ),
            examples=5_000,
            epochs=5,
            batch_size=50,
            grid_tasks=3,
            grid_epochs=3,
            extensions=2,
            lrs=(0.03, 0.1),
            frozen_lrs=(0.01, 0.03),
            scheduled_lrs=(0.01, 0.03),
            scales=(0.3, 1.0, 3.0),
            plain_lrs=(0.003, 0.01, 0.03, 0.1),
            rule_lrs=(0.01, 0.03, 0.1, 0.3),
        ),
        dataclasses.replace(split_cifar.PRESETS["quick"], name="study-quick"),
        "And convolutions, learnt from scratch, with an output layer for each task?",
    ),
    "cifar-clothing": Part(
        FineGrained,
        dataclasses.replace(
            _CIFAR,
            name="study",
            every_setting=True,
            methods=(
                *("fine-tuning", "fine-tuning-frozen", "fine-tuning-put-back", "l2", "ewc"),
                *("kfac-frozen", "kfac-train", "xkfac-nested"),
                *_RULES_OF_TRANSFER,
                *("scheduled-kfac-first-own", _WITHOUT_SEARCH),
            ),
            source_images=1_000,
            # Crossed: 0.03 with 10, 0.1 with 3 and with 10.
            lrs=(0.03, 0.1),
            frozen_lrs=(0.003, 0.01),
            scheduled_lrs=(0.003, 0.01),
            scales=(3.0, 10.0),
            diagonal_scales=(1.0, 3.0),
            l2=(0.01, 0.1),
            plain_lrs=(0.003, 0.01, 0.03, 0.1),
            plain_epochs=(1, 2),
            rule_lrs=(0.1,),
        ),
        dataclasses.replace(
            _quick_transfer(_CIFAR),
            lrs=(0.1,),
            frozen_lrs=(0.01,),
            scales=(3.0, 30.0),
            plain_lrs=(0.01, 0.1),
        ),
        "From a trained network to other images: what is kept of the source where the target has "
        "been learnt equally well?",
    ),
    "lite0-clothing": Part(
        FineGrained,
        dataclasses.replace(
            _LITE0,
            name="study",
            every_setting=True,
            methods=(
                *("fine-tuning", "fine-tuning-frozen", "fine-tuning-put-back", "l2"),
                *("kfac-frozen", "xkfac-nested", "xkfac-nested-auto", _WITHOUT_SEARCH),
            ),
            lrs=(0.001, 0.003, 0.01, 0.03),
            frozen_lrs=(0.0003, 0.001, 0.003, 0.01),
            scales=(1.0, 10.0),
            # Weak ones: fine-tuning, but for the statistics that are put back.
            l2=(1e-6, 1e-5),
            plain_lrs=(0.0003, 0.001, 0.003, 0.01, 0.03, 0.1),
            # What nested chooses: rules are of the scale alone.
            rule_lrs=(0.01,),
        ),
        dataclasses.replace(
            _quick_transfer(_LITE0),
            lrs=(0.003,),
            frozen_lrs=(0.001,),
            scales=(1.0, 10.0),
            plain_lrs=(0.001, 0.003),
        ),
        "The same of a network with depthwise convolutions, and with channels that are all but "
        "dead.",
    ),
}
