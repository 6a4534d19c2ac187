"""What all pictures have in common: matplotlib, imported here alone, and only to draw."""

import io
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from ekfac_rs._packages import missing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Of panels side by side, in inches, and how many letters of a title fit over one.
_PANEL, _LETTERS = (3.2, 2.2), 40
_COLUMNS = 3
# Of a curve, over the logarithm of ranks.
_POINTS = 300
# Below this share of the largest, eigenvalues are rounding.
_SMALLEST = 1e-12


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure of so many inches that needs no display.

    Raises
    ------
    MissingPackageError
        matplotlib is not there.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing(error, "matplotlib", "matplotlib", "experiments") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def in_lines(title: str, letters: int) -> str:
    """Break a title that is too long for one line."""
    return "\n".join(textwrap.wrap(title, letters, subsequent_indent="  ")) or title


def svg(figure: "Figure") -> str:
    """Draw a figure as an element of a page: no file beside it."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    return text[text.index("<svg") :]


def figure_of_spectra(spectra: Sequence[tuple[str, Tensor, bool]], title: str) -> "Figure":
    """Draw spectra, each over its ranks in a panel of its own.

    Parameters
    ----------
    spectra : sequence of (name, values, exact)
        Values descending.
    title : str
    """
    columns = min(_COLUMNS, len(spectra))
    rows = -(-len(spectra) // columns)
    figure = new_figure(_PANEL[0] * columns + 0.6, _PANEL[1] * rows + 1.0)
    figure.suptitle(in_lines(title, _LETTERS * columns), fontsize=10)
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for panel, (name, values, exact) in zip(panels, spectra, strict=False):
        _draw_spectrum(panel, values.cpu(), "-" if exact else "--")
        panel.set_title(in_lines(name, _LETTERS), fontsize=9)
    for panel in list(panels)[len(spectra) :]:
        panel.set_axis_off()
    figure.supxlabel("rank", fontsize=9)
    figure.supylabel("eigenvalue", fontsize=9)
    return figure


def _draw_spectrum(panel: "Axes", values: Tensor, style: str) -> None:
    positive = int((values > _SMALLEST * values[0]).sum()) if float(values[0]) > 0.0 else 0
    panel.set_xlim(0.8, 1.25 * len(values))
    panel.set_xscale("log")
    panel.tick_params(labelsize=7)
    if not positive:
        panel.text(0.5, 0.5, "all zero", transform=panel.transAxes, ha="center", va="center")
        panel.set_yticks([])
        return
    ranks = np.unique(np.geomspace(1, positive, min(_POINTS, positive)).round().astype(int))
    marker = "." if positive < 10 else ""
    panel.plot(ranks, values[ranks - 1].tolist(), style, marker=marker, color="#332288")
    panel.set_yscale("log")
    if positive < len(values):
        panel.axvline(positive, linestyle=":", color="0.6")
