"""Results of an experiment as JSON, a Markdown table and pictures.

Knows methods, runs and accuracy matrices, and nothing of the experiment they come from.
"""

import json
import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch

import ekfac_rs as ek
from ekfac_rs.errors import FileFormatError
from ekfac_rs.experiments.intervals import Interval, Outcome, best_at, interval
from ekfac_rs.experiments.pictures import (
    Frontier,
    TradeOff,
    draw_bars,
    draw_curves,
    draw_frontiers,
    draw_trade_offs,
)
from ekfac_rs.experiments.runs import RunRecord, write_json
from ekfac_rs.experiments.settings import Setting, edges, setting_text, strength_of
from ekfac_rs.metrics import AccuracyMatrix

__all__ = [
    "STREAM",
    "TRANSFER",
    "Column",
    "GridPoint",
    "Layout",
    "MethodResult",
    "counted",
    "environment",
    "equal_target_levels",
    "equal_target_table",
    "markdown_table",
    "read_results",
    "summary_table",
    "trade_off",
    "write_report",
]


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
    measures
        Other results, by name; the choice does not look at them.
    runs
        Its final runs, one per seed, where every setting has some.
    """

    setting: Setting
    score: float
    full_length_score: float | None
    diverged: str | None
    seconds: float
    measures: Mapping[str, float] = field(default_factory=dict)
    runs: Sequence[RunRecord] = ()

    @property
    def best_known_score(self) -> float:
        """The score over the longer stream where there is one."""
        return self.score if self.full_length_score is None else self.full_length_score


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

    def stable_grid(self) -> list[GridPoint]:
        """Return the points of the grid where no run diverged."""
        return [point for point in self.grid if point.diverged is None]

    def edges(self) -> list[str]:
        """Return the axes whose chosen value is at an end of what was tried."""
        return edges(self.setting, [point.setting for point in self.grid])

    def summary(self) -> dict[str, list[float]]:
        """Return each measure of the table, one value per final run."""
        matrices = self.matrices
        return {
            "average_accuracy": [matrix.average() for matrix in matrices],
            "first_task_before": [float(matrix.task_curve(0)[0]) for matrix in matrices],
            "first_task": [float(matrix.task_curve(0)[-1]) for matrix in matrices],
            "last_task": [float(matrix.task_curve(matrix.tasks - 1)[-1]) for matrix in matrices],
            "forgetting": [matrix.forgetting() for matrix in matrices],
            "backward_transfer": [matrix.backward_transfer() for matrix in matrices],
            "seconds": [run.seconds["total"] for run in self.runs],
        }


@dataclass(frozen=True)
class Column:
    """A column of the table: the mean of a measure over the final runs.

    Attributes
    ----------
    measure
        A key of `MethodResult.summary`.
    with_interval
        Add the half width of its 95 % interval.
    """

    measure: str
    with_interval: bool = False


Picture = Callable[[Path, str, Sequence[MethodResult]], None]
Table = Callable[[Sequence[MethodResult]], str]


@dataclass(frozen=True)
class Layout:
    """What a report shows.

    Attributes
    ----------
    columns
        By heading.
    pictures
        By file name: what draws it, from its path, the report's title and the results.
    tables
        By heading: what else makes a table of the results; empty where they do not give one.
    """

    columns: Mapping[str, Column]
    pictures: Mapping[str, Picture]
    tables: Mapping[str, Table] = field(default_factory=dict)


def _draw_average(path: Path, title: str, results: Sequence[MethodResult]) -> None:
    draw_curves(
        path,
        f"{title}: average accuracy",
        "mean accuracy over the tasks seen",
        {result.label: [m.average_curve() for m in result.matrices] for result in results},
    )


def _draw_first_task(path: Path, title: str, results: Sequence[MethodResult]) -> None:
    draw_curves(
        path,
        f"{title}: the first task over time",
        "accuracy on task 1",
        {result.label: [m.task_curve(0) for m in result.matrices] for result in results},
    )


STREAM = Layout(
    columns={
        "average accuracy": Column("average_accuracy", with_interval=True),
        "task 1": Column("first_task"),
        "last task": Column("last_task"),
        "forgetting": Column("forgetting"),
        "backward transfer": Column("backward_transfer"),
    },
    pictures={"average_accuracy.png": _draw_average, "first_task.png": _draw_first_task},
)


def trade_off(result: MethodResult) -> TradeOff:
    """Return source against target accuracy over the strength of a method's penalty.

    For every strength the learning rate that is best for the target's validation images; settings
    that diverged are left out.
    """
    best: dict[float, GridPoint] = {}
    for point in result.stable_grid():
        strength = strength_of(point.setting)
        if strength not in best or point.score > best[strength].score:
            best[strength] = point
    return TradeOff(
        result.label,
        [(p.measures["target"], p.measures["source"]) for _, p in sorted(best.items())],
        [(run.accuracy[-1][1], run.accuracy[-1][0]) for run in result.runs],
    )


def _draw_trade_offs(path: Path, title: str, results: Sequence[MethodResult]) -> None:
    texts = (f"{title}: source against target", "target accuracy", "source accuracy")
    reference = float(np.mean(results[0].summary()["first_task_before"]))
    if _has_frontiers(results):
        frontiers = [Frontier(result.label, _outcomes(result.stable_grid())) for result in results]
        draw_frontiers(path, *texts, frontiers, reference)
    else:
        draw_trade_offs(path, *texts, [trade_off(result) for result in results], reference)


def _has_frontiers(results: Sequence[MethodResult]) -> bool:
    """Whether every setting has final runs."""
    return all(result.grid and all(point.runs for point in result.grid) for result in results)


def _outcomes(grid: Sequence[GridPoint]) -> list[Outcome]:
    """Return source and target accuracies of settings that have final runs."""
    return [
        Outcome(
            target=[run.accuracy[-1][1] for run in point.runs],
            source=[run.accuracy[-1][0] for run in point.runs],
        )
        for point in grid
    ]


def equal_target_levels(
    outcomes: Sequence[Outcome], step: float = 0.02, count: int = 6
) -> list[float]:
    """Return target accuracies to compare at: round ones, from the highest reached down."""
    highest = max(float(np.mean(outcome.target)) for outcome in outcomes)
    top = math.floor(highest / step + 1e-9)
    return [round((top - i) * step, 10) for i in range(count) if top - i > 0]


def equal_target_table(results: Sequence[MethodResult]) -> str:
    """Return the table of what each method keeps of the source at equal target accuracy.

    For each target accuracy the best source accuracy of any of its settings that reach it, mean
    and 95 % interval; empty unless every setting has final runs.
    """
    if not _has_frontiers(results):
        return ""
    # Those of runs that diverged, too: with them a setting's mean reaches little.
    outcomes = {result.label: _outcomes(result.grid) for result in results}
    levels = equal_target_levels([outcome for each in outcomes.values() for outcome in each])
    reached = {
        label: [best_at(level, each) for level in levels] for label, each in outcomes.items()
    }
    best = [
        max(kept.mean for row in reached.values() if (kept := row[i]) is not None)
        for i in range(len(levels))
    ]
    head = ("source at target of", *(f"{100 * level:g}" for level in levels))
    rule = ("---", *["---:"] * len(levels))
    rows = [
        (
            label,
            *(
                "-" if kept is None else _bold(_percent(kept), kept.mean == highest)
                for kept, highest in zip(row, best, strict=True)
            ),
        )
        for label, row in reached.items()
    ]
    return _table(head, rule, rows)


def _draw_bars(path: Path, title: str, results: Sequence[MethodResult]) -> None:
    names = {"source after": "first_task", "target": "last_task", "average": "average_accuracy"}
    draw_bars(
        path,
        f"{title}: both tasks",
        "accuracy",
        {
            result.label: {name: result.summary()[measure] for name, measure in names.items()}
            for result in results
        },
    )


TRANSFER = Layout(
    columns={
        "source before": Column("first_task_before"),
        "source after": Column("first_task", with_interval=True),
        "target": Column("last_task", with_interval=True),
        "average": Column("average_accuracy", with_interval=True),
    },
    pictures={"trade_off.png": _draw_trade_offs, "accuracies.png": _draw_bars},
    tables={"Source accuracy at equal target accuracy": equal_target_table},
)


def write_report(
    output: Path,
    title: str,
    results: Sequence[MethodResult],
    about: Mapping[str, Any],
    notes: Sequence[str] = (),
    layout: Layout = STREAM,
    device: str = "cpu",
) -> str:
    """Write everything about an experiment into a folder.

    ``results.json`` (all figures, also those of the grid), ``table.md`` and the pictures.

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
    layout
        Columns of the table, and the pictures.
    device
        That made the runs.

    Returns
    -------
    str
        The content of ``table.md``.
    """
    output.mkdir(parents=True, exist_ok=True)
    content = {
        "title": title,
        **about,
        "notes": list(notes),
        "environment": environment(device),
        "methods": {result.key: _method_entry(result) for result in results},
    }
    write_json(output / "results.json", content)
    lines = [f"# {title}", "", markdown_table(results, layout), ""]
    for heading, make in layout.tables.items():
        if further := make(results):
            lines += [f"## {heading}", "", further, ""]
    lines += [f"- {note}" for note in notes]
    table = "\n".join(lines).rstrip() + "\n"
    (output / "table.md").write_text(table, encoding="utf-8")
    for name, draw in layout.pictures.items():
        draw(output / name, title, results)
    return table


def read_results(path: Path) -> list[MethodResult]:
    """Return the methods that `write_report` wrote into a ``results.json``.

    Raises
    ------
    FileFormatError
        If it is something else.
    """
    try:
        methods = json.loads(path.read_text(encoding="utf-8"))["methods"]
        return [
            MethodResult(
                key,
                entry["label"],
                entry["setting"],
                [_grid_point(point) for point in entry["grid"]],
                [RunRecord(**run) for run in entry["runs"]],
            )
            for key, entry in methods.items()
        ]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise FileFormatError(f"{path}: not the results of a comparison ({error})") from error


def _grid_point(entry: Mapping[str, Any]) -> GridPoint:
    runs = tuple(RunRecord(**run) for run in entry.get("runs", ()))
    return GridPoint(**{**entry, "runs": runs})


def environment(device: str = "cpu") -> dict[str, str | int | None]:
    """Return versions and machine size, as far as they bear on results and timings."""
    gpu = {"gpu": torch.cuda.get_device_name(device)} if device != "cpu" else {}
    return {
        **gpu,
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


def markdown_table(results: Sequence[MethodResult], layout: Layout = STREAM) -> str:
    """Return the table of all methods: percentages, means with 95 % intervals over the seeds."""
    head = ("method", "chosen setting", *layout.columns, "seconds per run", "remarks")
    rule = ("---", "---", *["---:"] * (len(layout.columns) + 1), "---")
    summaries = [result.summary() for result in results]
    best = max(float(np.mean(summary["average_accuracy"])) for summary in summaries)
    rows = [
        (
            result.label,
            setting_text(result.setting),
            *(_cell(summary, column, best) for column in layout.columns.values()),
            f"{np.mean(summary['seconds']):.1f}",
            "; ".join(_remarks(result)),
        )
        for result, summary in zip(results, summaries, strict=True)
    ]
    return _table(head, rule, rows)


def summary_table(parts: Mapping[str, Sequence[MethodResult]]) -> str:
    """Return a table of several comparisons, by name: average accuracy, a column for each.

    Methods are the rows, those with the same label in one; the best of each column is in bold.
    """
    columns = {
        name: {each.label: interval(each.summary()["average_accuracy"]) for each in results}
        for name, results in parts.items()
    }
    best = {name: max(found.mean for found in column.values()) for name, column in columns.items()}
    labels = list(dict.fromkeys(label for column in columns.values() for label in column))
    rows = [
        (
            label,
            *(
                _bold(_percent(found), found.mean == best[name])
                if (found := column.get(label)) is not None
                else "-"
                for name, column in columns.items()
            ),
        )
        for label in labels
    ]
    return _table(("method", *columns), ("---", *["---:"] * len(columns)), rows)


def _table(head: Sequence[str], rule: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Return the number with its noun in singular or plural."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def _cell(summary: Mapping[str, Sequence[float]], column: Column, best: float) -> str:
    """Return a measure in per cent, the best average accuracy in bold."""
    found = interval(summary[column.measure])
    is_best = column.measure == "average_accuracy" and found.mean == best
    return _bold(_percent(found, column.with_interval), is_best)


def _bold(text: str, is_best: bool) -> str:
    return f"**{text}**" if is_best else text


def _method_entry(result: MethodResult) -> dict[str, Any]:
    summary = {
        name: {
            "mean": _number(interval(values).mean),
            "interval": _number(interval(values).half_width),
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
    scales = [run.measures["scale"] for run in result.runs if "scale" in run.measures]
    if scales:
        remarks.append(f"scale {np.mean(scales):.2g} at the end of a task")
    elif len(result.grid) <= 1:
        remarks.append("nothing chosen")
    if result.edges():
        remarks.append(f"{' and '.join(result.edges())} at the edge of the grid")
    return remarks


def _percent(found: Interval, with_interval: bool = True) -> str:
    if math.isnan(found.mean):
        return "n/a"
    text = f"{100 * found.mean:.2f}"
    if with_interval and not math.isnan(found.half_width):
        text += f" ± {100 * found.half_width:.2f}"
    return text


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
