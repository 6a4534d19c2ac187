"""What all pictures have in common: matplotlib, imported here alone, and only to draw."""

import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

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
# Values that are each marked.
_FEW = 10


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
    """Break a title that is too long for one line: between words, or within names of modules."""
    lines = [""]
    for part in re.findall(r".+?(?:[ ._]|$)", title):
        pieces = [part[k : k + letters] for k in range(0, len(part), letters)]
        for piece in pieces:
            if lines[-1] and len(lines[-1]) + len(piece.rstrip()) > letters:
                lines.append("")
            lines[-1] += piece
    return "\n".join(line.rstrip() for line in lines)


def svg(figure: "Figure") -> str:
    """Draw a figure as an element of a page: no file beside it."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    return text[text.index("<svg") :]


class DrawnSpectrum(NamedTuple):
    """What a panel shows.

    Attributes
    ----------
    name : str
    values : Tensor
        Descending.
    exact : bool
        Or else the curve is dashed.
    rounding : float
        Share of the largest below which values are not drawn.
    """

    name: str
    values: Tensor
    exact: bool
    rounding: float


def figure_of_spectra(spectra: Sequence[DrawnSpectrum], title: str) -> "Figure":
    """Draw spectra, each over its ranks in a panel of its own."""
    columns = min(_COLUMNS, len(spectra))
    rows = -(-len(spectra) // columns)
    figure = new_figure(_PANEL[0] * columns + 0.6, _PANEL[1] * rows + 1.0)
    figure.suptitle(in_lines(title, _LETTERS * columns), fontsize=10)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel, drawn in zip(panels, spectra, strict=False):
        _draw_spectrum(panel, drawn)
        panel.set_title(in_lines(drawn.name, _LETTERS), fontsize=9)
    for panel in panels[len(spectra) :]:
        panel.set_axis_off()
    figure.supxlabel("rank", fontsize=9)
    figure.supylabel("eigenvalue", fontsize=9)
    return figure


def _draw_spectrum(panel: "Axes", drawn: DrawnSpectrum) -> None:
    values = drawn.values.cpu()
    certain = int((values > drawn.rounding * float(values[0])).sum())
    panel.set_xlim(0.8, 1.25 * len(values))
    panel.set_xscale("log")
    panel.tick_params(labelsize=7)
    if not certain:
        panel.text(0.5, 0.5, "all zero", transform=panel.transAxes, ha="center", va="center")
        panel.set_yticks([])
        return
    ranks = np.unique(np.geomspace(1, certain, min(_POINTS, certain)).round().astype(int))
    marker, style = "." if certain < _FEW else "", "-" if drawn.exact else "--"
    panel.plot(ranks, values[ranks - 1].tolist(), style, marker=marker, color="#332288")
    panel.set_yscale("log")
    if certain < len(values):
        panel.axvline(certain, linestyle=":", color="0.6")
