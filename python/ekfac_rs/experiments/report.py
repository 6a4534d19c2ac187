"""Results of an experiment as JSON, a Markdown table and pictures.

Knows methods, runs and accuracy matrices, and nothing of the experiment they come from.
"""

import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

import ekfac_rs as ek
from ekfac_rs.experiments.runs import RunRecord, write_json
from ekfac_rs.metrics import AccuracyMatrix

__all__ = ["GridPoint", "MethodResult", "environment", "markdown_table", "write_report"]

Setting = Mapping[str, float | str]

# Paul Tol's "muted" scheme: told apart with any common colour vision, and in print.
_COLOURS = (
    "#999933", "#DDCC77", "#CC6677", "#117733", "#88CCEE",
    "#332288", "#AA4499", "#882255", "#44AA99",
)  # fmt: skip
_MARKERS = "ovs^DPX<>"


@dataclass(frozen=True)
class GridPoint:
    """One setting that was tried.

    Attributes
    ----------
    setting
        By name.
    score
        Validation accuracy in the grid, over all its tasks.
    full_length_score
        The same over a stream as long as the final ones; None where that was not tried.
    diverged
        What happened in any of its runs, if one diverged.
    seconds
        Wall-clock of its runs.
    """

    setting: Setting
    score: float
    full_length_score: float | None
    diverged: str | None
    seconds: float


@dataclass(frozen=True)
class MethodResult:
    """A method with its chosen setting and its final runs.

    Attributes
    ----------
    key, label
        Name in files and on the command line; name in tables and pictures.
    setting
        The chosen point of the grid.
    grid
        All points that were tried.
    runs
        The final runs, one per seed, each with a ``seed`` in its config.
    """

    key: str
    label: str
    setting: Setting
    grid: Sequence[GridPoint]
    runs: Sequence[RunRecord]

    @property
    def matrices(self) -> list[AccuracyMatrix]:
        """Accuracy matrices of the final runs."""
        return [run.matrix for run in self.runs]

    def edges(self) -> list[str]:
        """Return the settings chosen at an end of the range tried: the best may lie beyond it.

        Zero is a natural end and does not count.
        """
        axes = {
            name: {point.setting[name] for point in self.grid}
            for name, value in self.setting.items()
            if not isinstance(value, str)
        }
        return [
            name
            for name, tried in axes.items()
            if len(tried) > 1
            and self.setting[name] != 0
            and self.setting[name] in (min(tried), max(tried))
        ]

    def summary(self) -> dict[str, list[float]]:
        """Return each measure of the table, one value per final run."""
        matrices = self.matrices
        return {
            "average_accuracy": [matrix.average() for matrix in matrices],
            "first_task": [float(matrix.task_curve(0)[-1]) for matrix in matrices],
            "last_task": [float(matrix.task_curve(matrix.tasks - 1)[-1]) for matrix in matrices],
            "forgetting": [matrix.forgetting() for matrix in matrices],
            "backward_transfer": [matrix.backward_transfer() for matrix in matrices],
            "seconds": [run.seconds["total"] for run in self.runs],
        }


def write_report(
    output: Path,
    title: str,
    results: Sequence[MethodResult],
    about: Mapping[str, Any],
    notes: Sequence[str] = (),
) -> str:
    """Write everything about an experiment into a folder.

    ``results.json`` (all figures, also those of the grid), ``table.md``,
    ``average_accuracy.png`` and ``first_task.png``.

    Parameters
    ----------
    output
        The folder; made if need be.
    title
        Heading of the table and of the pictures.
    results
        The methods, in the order of the table.
    about
        What ``results.json`` says beside the results (JSON types): config, command, ...
    notes
        Sentences below the table.

    Returns
    -------
    str
        The content of ``table.md``.
    """
    output.mkdir(parents=True, exist_ok=True)
    content = {
        "title": title,
        **about,
        "environment": environment(),
        "methods": {result.key: _method_entry(result) for result in results},
    }
    write_json(output / "results.json", content)
    lines = [f"# {title}", "", markdown_table(results), "", *(f"- {note}" for note in notes)]
    table = "\n".join(lines).rstrip() + "\n"
    (output / "table.md").write_text(table, encoding="utf-8")
    _plot(
        output / "average_accuracy.png",
        f"{title}: average accuracy",
        "mean accuracy over the tasks seen",
        {result.label: [m.average_curve() for m in result.matrices] for result in results},
    )
    _plot(
        output / "first_task.png",
        f"{title}: the first task over time",
        "accuracy on task 1",
        {result.label: [m.task_curve(0) for m in result.matrices] for result in results},
    )
    return table


def environment() -> dict[str, str | int | None]:
    """Return versions and machine size, as far as they bear on results and timings."""
    return {
        "ekfac_rs": ek.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "matplotlib": mpl.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
    }


def markdown_table(results: Sequence[MethodResult]) -> str:
    """Return the table of all methods: percentages, mean ± standard deviation over the seeds."""
    head = (
        "method", "chosen setting", "average accuracy", "task 1", "last task", "forgetting",
        "backward transfer", "seconds per run", "remarks",
    )  # fmt: skip
    best = max(float(np.mean(result.summary()["average_accuracy"])) for result in results)
    rows = []
    for result in results:
        summary = result.summary()
        average = _percent(summary["average_accuracy"], deviation=True)
        if float(np.mean(summary["average_accuracy"])) == best:
            average = f"**{average}**"
        rows.append(
            (
                result.label,
                _setting_text(result.setting),
                average,
                _percent(summary["first_task"]),
                _percent(summary["last_task"]),
                _percent(summary["forgetting"]),
                _percent(summary["backward_transfer"]),
                f"{np.mean(summary['seconds']):.1f}",
                "; ".join(_remarks(result)),
            )
        )
    rule = ("---", "---", *["---:"] * 6, "---")
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def _method_entry(result: MethodResult) -> dict[str, Any]:
    summary = {
        name: {
            "mean": _number(float(np.mean(values))),
            "std": _number(_deviation(values)),
            "values": [_number(value) for value in values],
        }
        for name, values in result.summary().items()
    }
    return {
        "label": result.label,
        "setting": dict(result.setting),
        "at_edge_of_grid": result.edges(),
        "summary": summary,
        "runs": [asdict(run) for run in result.runs],
        "grid": [asdict(point) for point in result.grid],
    }


def _remarks(result: MethodResult) -> list[str]:
    remarks = []
    diverged = sum(run.diverged is not None for run in result.runs)
    warned = sum(bool(run.warnings) for run in result.runs)
    if diverged:
        remarks.append(f"diverged in {diverged} of {len(result.runs)} runs")
    if warned:
        remarks.append(f"stability warning in {warned} of {len(result.runs)} runs")
    if result.edges():
        remarks.append(f"{' and '.join(result.edges())} at the edge of the grid")
    return remarks


def _setting_text(setting: Setting) -> str:
    return ", ".join(
        f"{name} {value if isinstance(value, str) else f'{value:g}'}"
        for name, value in setting.items()
    )


def _percent(values: Sequence[float], deviation: bool = False) -> str:
    mean, spread = 100 * float(np.mean(values)), 100 * _deviation(values)
    if math.isnan(mean):
        return "n/a"
    return f"{mean:.2f} ± {spread:.2f}" if deviation and not math.isnan(spread) else f"{mean:.2f}"


def _deviation(values: Sequence[float]) -> float:
    """Sample standard deviation; NaN for a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _plot(
    path: Path,
    title: str,
    ylabel: str,
    curves: Mapping[str, Sequence[npt.NDArray[np.float64]]],
) -> None:
    """Draw one curve per method, mean and band of one standard deviation over the seeds.

    Where some methods are far below the others, a second panel shows the upper ones enlarged.
    """
    means = {label: np.mean(values, axis=0) for label, values in curves.items()}
    finals = {label: float(mean[-1]) for label, mean in means.items()}
    upper = _upper_group(finals)
    panels = [list(curves), upper] if len(upper) < len(curves) else [upper]
    figure = Figure(figsize=(6.0 * len(panels) + 1.2, 4.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    figure.suptitle(title, fontsize=12)
    styles = {
        label: {"color": _COLOURS[i % len(_COLOURS)], "marker": _MARKERS[i % len(_MARKERS)]}
        for i, label in enumerate(curves)
    }
    for panel, (axes, shown) in enumerate(zip(all_axes, panels, strict=True)):
        for label in shown:
            _draw_curve(axes, means[label], curves[label], styles[label])
        axes.set_xlabel("tasks learnt")
        axes.set_ylabel(ylabel)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if panel == 1:
            axes.set_title("enlarged", fontsize=10)
        named = [label for label in shown if panel == len(panels) - 1 or label not in upper]
        _label_ends(axes, {label: finals[label] for label in named}, means, styles)
    figure.savefig(path)


def _upper_group(finals: Mapping[str, float]) -> list[str]:
    """Return the labels whose final values share the upper part of the range."""
    best, worst = max(finals.values()), min(finals.values())
    if best - worst < 0.1:
        return list(finals)
    return [label for label, value in finals.items() if value >= best - (best - worst) / 4]


def _draw_curve(
    axes: Axes,
    mean: npt.NDArray[np.float64],
    curves: Sequence[npt.NDArray[np.float64]],
    style: Mapping[str, str],
) -> None:
    tasks = np.arange(1, len(mean) + 1)
    axes.plot(
        tasks, mean, color=style["color"], marker=style["marker"], linewidth=1.8, markersize=4.5
    )
    if len(curves) > 1:
        spread = np.std(curves, axis=0, ddof=1)
        axes.fill_between(
            tasks, mean - spread, mean + spread, color=style["color"], alpha=0.15, linewidth=0
        )


def _label_ends(
    axes: Axes,
    finals: Mapping[str, float],
    means: Mapping[str, npt.NDArray[np.float64]],
    styles: Mapping[str, Mapping[str, str]],
) -> None:
    """Write each curve's name at its right end, moved apart where names would overlap."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    gap = 0.055 * (high - low)
    labels = sorted(finals, key=lambda label: finals[label])
    heights = [finals[label] for label in labels]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    excess = max(heights[-1] - high, 0.0) if heights else 0.0
    for i in range(len(heights) - 1, -1, -1):
        ceiling = heights[i + 1] - gap if i + 1 < len(heights) else heights[i] - excess
        heights[i] = min(heights[i], ceiling)
    for label, height in zip(labels, heights, strict=True):
        axes.annotate(
            f"{label}  {100 * finals[label]:.1f}",
            xy=(len(means[label]), finals[label]),
            xytext=(1.05, height),
            textcoords=("axes fraction", "data"),
            va="center",
            fontsize=9,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": styles[label]["color"],
                "linewidth": 1.0,
                "shrinkA": 0,
                "shrinkB": 4,
            },
        )
