"""A page that tells what a learner did: one HTML file that needs nothing else."""

from collections.abc import Iterable, Iterator, Sequence
from html import escape

import torch

from ekfac_rs._core import build_info
from ekfac_rs._pictures import new_figure, svg
from ekfac_rs.curvature import Curvature
from ekfac_rs.metrics import AccuracyMatrix
from ekfac_rs.scales import Selection

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 60em; padding: 0 1em; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { border: 1px solid #ccc; padding: .3em .7em; text-align: right; }
th:first-child, td:first-child { text-align: left; }
svg { height: auto; max-width: 100%; }
"""


def page(
    options: dict[str, str],
    curvatures: Sequence[Curvature],
    losses: Sequence[float | None],
    selections: Sequence[Selection],
    accuracy: AccuracyMatrix | None,
) -> str:
    """Return the page.

    Parameters
    ----------
    options : dict of str to str
        Of the learner.
    curvatures : sequence of Curvature
    losses : sequence of float or None
        Of each task, when it was consolidated.
    selections : sequence of Selection
    accuracy : AccuracyMatrix, optional

    Raises
    ------
    MissingPackageError
        matplotlib is not there: ``pip install 'ekfac-rs[experiments]'``.
    """
    parts = [
        "<h1>Continual learning</h1>",
        f"<p>Tasks learnt: {len(losses)}. ekfac_rs {escape(build_info()['version'])}, "
        f"torch {escape(torch.__version__)}.</p>",
        *([] if accuracy is None else _of_accuracy(accuracy)),
        *_of_tasks(curvatures, losses),
        *_of_scales(selections),
        "<h2>Options</h2>",
        _table(("option", "value"), options.items()),
    ]
    head = f'<meta charset="utf-8"><title>Continual learning</title><style>{_STYLE}</style>'
    body = "\n".join(parts)
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _of_accuracy(accuracy: AccuracyMatrix) -> Iterator[str]:
    yield "<h2>Accuracy</h2>"
    summary = [f"Average after the last task: <b>{_percent(accuracy.average())}</b>"]
    if accuracy.tasks > 1:
        summary.append(f"forgetting: {_percent(accuracy.forgetting())}")
        summary.append(f"backward transfer: {_percent(accuracy.backward_transfer())}")
    yield f"<p>{'; '.join(summary)}.</p>"
    columns = range(accuracy.values.shape[1])
    rows = (
        (f"task {i}", *("" if value != value else _percent(value) for value in row))
        for i, row in enumerate(accuracy.values.tolist())
    )
    yield _table(("after", *(f"on task {j}" for j in columns)), rows)
    figure = new_figure(7.0, 4.0)
    axes = figure.subplots()
    for j in range(accuracy.tasks):
        curve = accuracy.task_curve(j)
        axes.plot(range(j, j + len(curve)), 100.0 * curve, marker="o", label=f"task {j}")
    axes.plot(100.0 * accuracy.average_curve(), color="black", linestyle="--", label="average")
    axes.set(xlabel="after task", ylabel="accuracy in per cent")
    axes.legend()
    yield svg(figure)


def _of_tasks(curvatures: Sequence[Curvature], losses: Sequence[float | None]) -> Iterator[str]:
    yield "<h2>What is held on to</h2>"
    if not curvatures:
        yield "<p>No curvature.</p>"
        return
    rows = [
        (
            f"{curvature.tasks} task{'s' if curvature.tasks > 1 else ''}",
            str(curvature.examples),
            f"{curvature.loss:.4g}",
            f"{sum(block.trace() for block in curvature.values()):.4g}",
        )
        for curvature in curvatures
    ]
    yield _table(("curvature of", "examples", "mean loss", "trace"), rows)
    known = [(f"task {k}", f"{loss:.4g}") for k, loss in enumerate(losses) if loss is not None]
    if known:
        yield _table(("task", "mean loss when it was consolidated"), known)


def _of_scales(selections: Sequence[Selection]) -> Iterator[str]:
    yield "<h2>How strongly</h2>"
    if not selections:
        yield "<p>Nothing was learnt under a penalty.</p>"
    for selection in selections:
        yield f"<h3>{escape(selection.rule)}; earlier tasks: {selection.tasks}</h3>"
        if selection.tries:
            rows = ((f"{s:g}", "diverged" if r is None else f"{r:.4g}") for s, r in selection.tries)
            yield _table(("scale tried", "accuracy, or minus the loss"), rows)
        if selection.scale:
            yield svg(selection.figure())


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def line(kind: str, cells: Sequence[str]) -> str:
        return f"<tr>{''.join(f'<{kind}>{escape(cell)}</{kind}>' for cell in cells)}</tr>"

    return f"<table>{line('th', head)}{''.join(line('td', row) for row in rows)}</table>"


def _percent(value: float) -> str:
    return f"{100.0 * value:.2f} %"
