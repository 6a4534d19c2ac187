"""Pictures of results: curves over the tasks, trade-offs, bars."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ekfac_rs.experiments.intervals import Interval, Outcome, best_at, interval

__all__ = [
    "Frontier",
    "TradeOff",
    "draw_bars",
    "draw_curves",
    "draw_frontiers",
    "draw_trade_offs",
]

# Paul Tol's "muted" scheme: told apart with any common colour vision, and in print.
_COLOURS = (
    "#999933", "#DDCC77", "#CC6677", "#117733", "#88CCEE",
    "#332288", "#AA4499", "#882255", "#44AA99",
)  # fmt: skip
_MARKERS = "ovs^DPX<>"
# Inches.
_ROW_HEIGHT = 0.25
_LETTER_WIDTH = 0.09
# That have room beside a panel anyway.
_LETTERS = 25


@dataclass(frozen=True)
class TradeOff:
    """What one method made of two aims, as points ``(x, y)``.

    Attributes
    ----------
    label
        Of the method.
    curve
        One point for each strength of its penalty, weakest first.
    finals
        One point for each final run.
    """

    label: str
    curve: Sequence[tuple[float, float]]
    finals: Sequence[tuple[float, float]]


def draw_trade_offs(
    path: Path,
    title: str,
    xlabel: str,
    ylabel: str,
    trade_offs: Sequence[TradeOff],
    reference: float,
) -> None:
    """Draw for each method a curve over the strength of its penalty, and its final runs' mean.

    Parameters
    ----------
    path, title, xlabel, ylabel
        The file and its texts.
    trade_offs
        One for each method.
    reference
        What ``y`` was before: a dashed line.
    """
    figure, (axes,) = _figure(title, panels=1)
    axes.axhline(reference, color="#666666", linestyle="--", linewidth=1.0, label="source, before")
    for trade_off, style in zip(trade_offs, _styles(len(trade_offs)), strict=True):
        if trade_off.curve:
            x, y = np.array(trade_off.curve).T
            axes.plot(x, y, color=style["color"], linewidth=1.2, alpha=0.8)
            # Larger markers for stronger penalties.
            sizes = 12.0 * np.arange(1, len(x) + 1)
            axes.scatter(x, y, s=sizes, c=style["color"], marker=style["marker"], linewidths=0)
        x, y = (interval(values) for values in zip(*trade_off.finals, strict=True))
        axes.errorbar(
            *(x.mean, y.mean, _half_width(y), _half_width(x)),
            color=style["color"],
            marker=style["marker"],
            markersize=9,
            markeredgecolor="black",
            linestyle="none",
            label=trade_off.label,
            zorder=3,
        )
    _finish_plane(figure, axes, xlabel, ylabel, path)


@dataclass(frozen=True)
class Frontier:
    """What all settings of one method made of two aims.

    Attributes
    ----------
    label
        Of the method.
    outcomes
        One for each setting; without any the method is left out of the picture.
    """

    label: str
    outcomes: Sequence[Outcome]


def draw_frontiers(
    path: Path,
    title: str,
    xlabel: str,
    ylabel: str,
    frontiers: Sequence[Frontier],
    reference: float,
) -> None:
    """Draw each method's settings, and the staircase of the best source at equal target accuracy.

    A band is the 95 % interval of the setting that a step of the staircase belongs to.

    Parameters
    ----------
    path, title, xlabel, ylabel
        The file and its texts.
    frontiers
        One for each method.
    reference
        What the source's accuracy was before: a dashed line.
    """
    figure, (axes,) = _figure(title, panels=1)
    axes.axhline(reference, color="#666666", linestyle="--", linewidth=1.0, label="source, before")
    for frontier, style in zip(frontiers, _styles(len(frontiers)), strict=True):
        if not frontier.outcomes:
            continue
        x, y = _means(frontier.outcomes)
        axes.scatter(
            *(x, y),
            s=30.0,
            c=style["color"],
            marker=style["marker"],
            linewidths=0,
            label=frontier.label,
        )
        steps = _staircase(frontier.outcomes)
        axes.plot(steps.levels, steps.means, color=style["color"], linewidth=1.4)
        axes.fill_between(
            *(steps.levels, steps.means - steps.half_widths, steps.means + steps.half_widths),
            color=style["color"],
            alpha=0.1,
            linewidth=0,
        )
    _finish_plane(figure, axes, xlabel, ylabel, path)


def _finish_plane(figure: Figure, axes: Axes, xlabel: str, ylabel: str, path: Path) -> None:
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    figure.legend(loc="outside right center", frameon=False, fontsize=9)
    figure.savefig(path)


@dataclass(frozen=True)
class _Staircase:
    """Corners, each step given by its left and its right end."""

    levels: npt.NDArray[np.float64]
    means: npt.NDArray[np.float64]
    half_widths: npt.NDArray[np.float64]


def _staircase(outcomes: Sequence[Outcome]) -> _Staircase:
    """Return `best_at` over all levels from the lowest target accuracy up."""
    targets = sorted({float(np.mean(outcome.target)) for outcome in outcomes})
    corners = []
    left = targets[0]
    for level in targets:
        kept = best_at(level, outcomes)
        assert kept is not None  # one of them has this level
        corners += [(left, kept.mean, _half_width(kept)), (level, kept.mean, _half_width(kept))]
        left = level
    return _Staircase(*np.array(corners).T)


def _means(outcomes: Sequence[Outcome]) -> tuple[list[float], list[float]]:
    targets = [float(np.mean(outcome.target)) for outcome in outcomes]
    return targets, [float(np.mean(outcome.source)) for outcome in outcomes]


def _half_width(found: Interval) -> float:
    """Return what can be drawn: nothing for a single run."""
    return 0.0 if math.isnan(found.half_width) else found.half_width


def draw_bars(
    path: Path, title: str, ylabel: str, bars: Mapping[str, Mapping[str, Sequence[float]]]
) -> None:
    """Draw groups of bars, each a mean over runs with its 95 % interval.

    Parameters
    ----------
    path, title, ylabel
        The file and its texts.
    bars
        Label of the method to name of the bar to one value per run; all methods have the same
        names.
    """
    figure, (axes,) = _figure(title, panels=1, rows=len(bars))
    names = list(next(iter(bars.values())))
    width = 0.8 / len(names)
    groups = np.arange(len(bars))
    for i, name in enumerate(names):
        found = [interval(by_name[name]) for by_name in bars.values()]
        means = [each.mean for each in found]
        spreads = [_half_width(each) for each in found]
        places = groups + (i - (len(names) - 1) / 2) * width
        axes.barh(places, means, width, xerr=spreads, label=name, color=_COLOURS[(3 * i + 2) % 9])
        for place, mean in zip(places, means, strict=True):
            axes.annotate(f"{100 * mean:.1f}", (0.01, place), va="center", fontsize=7, color="w")
    axes.set_yticks(groups, list(bars))
    axes.invert_yaxis()
    axes.set_xlabel(ylabel)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    figure.legend(loc="outside right center", frameon=False, fontsize=9)
    figure.savefig(path)


def draw_curves(
    path: Path,
    title: str,
    ylabel: str,
    curves: Mapping[str, Sequence[npt.NDArray[np.float64]]],
) -> None:
    """Draw one curve per method: mean over the seeds, with a band of its 95 % interval.

    Where some methods are far below the others, a second panel shows the upper ones enlarged.
    """
    means = {label: np.mean(values, axis=0) for label, values in curves.items()}
    finals = {label: float(mean[-1]) for label, mean in means.items()}
    upper = _upper_group(finals)
    panels = [list(curves), upper] if len(upper) < len(curves) else [upper]
    figure, all_axes = _figure(
        title, len(panels), rows=max(map(len, panels)), beside=max(map(len, curves))
    )
    styles = dict(zip(curves, _styles(len(curves)), strict=True))
    for panel, (axes, shown) in enumerate(zip(all_axes, panels, strict=True)):
        for label in shown:
            _draw_curve(axes, means[label], curves[label], styles[label])
        axes.set_xlabel("tasks learnt")
        axes.set_ylabel(ylabel)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if panel == 1:
            axes.set_title("enlarged", fontsize=10)
        named = [label for label in shown if panel == len(panels) - 1 or label not in upper]
        _label_ends(figure, axes, {label: finals[label] for label in named}, means, styles)
    figure.savefig(path)


def _figure(
    title: str, panels: int, rows: int = 0, beside: int = 0
) -> tuple[Figure, Sequence[Axes]]:
    """Make a picture with panels side by side.

    As high as so many rows of text need, and wide enough for so many letters beside each panel.
    """
    height = max(4.6, _ROW_HEIGHT * (rows + 3))
    width = (6.0 + _LETTER_WIDTH * max(0, beside - _LETTERS)) * panels + 1.2
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12)
    all_axes = figure.subplots(1, panels, squeeze=False)[0]
    for axes in all_axes:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, all_axes


def _styles(count: int) -> list[dict[str, str]]:
    """Return a colour and a marker for each method."""
    # Colours come again with other markers.
    return [
        {
            "color": _COLOURS[i % len(_COLOURS)],
            "marker": _MARKERS[(i + i // len(_COLOURS)) % len(_MARKERS)],
        }
        for i in range(count)
    ]


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
        spread = np.array([interval(values).half_width for values in np.transpose(curves)])
        axes.fill_between(
            tasks, mean - spread, mean + spread, color=style["color"], alpha=0.15, linewidth=0
        )


def _label_ends(
    figure: Figure,
    axes: Axes,
    finals: Mapping[str, float],
    means: Mapping[str, npt.NDArray[np.float64]],
    styles: Mapping[str, Mapping[str, str]],
) -> None:
    """Write each curve's name at its right end, moved apart where names would overlap."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    gap = _ROW_HEIGHT / figure.get_figheight() * (high - low)
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
