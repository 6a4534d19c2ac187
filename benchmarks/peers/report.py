"""What a run found: as a table, and as a picture."""

import math
from pathlib import Path
from typing import Any

from peers.candidates import BARE

Results = dict[str, Any]


def table(results: Results) -> str:
    """Return all results in Markdown."""
    machine = results["machine"]
    gpu = ""
    if "gpu" in machine:
        gpu = f"{machine['gpu']}, CUDA {machine['cuda']}, torch in {machine['torch_precision']}; "
    lines = [
        "# Beside other libraries",
        "",
        f"{gpu}{machine['processor']}, {machine['cores']} cores, "
        f"{machine['torch_threads']} threads; "
        f"Python {machine['python']}, torch {machine['torch']}, ekfac_rs {machine['ekfac_rs']}. "
        "Medians; ratios are within the run.",
    ]
    for workload in results["workloads"].values():
        lines += _of_workload(workload)
    if "eigh_ms" in results:
        lines += _of_eigh(results["eigh_ms"])
    return "\n".join(lines) + "\n"


def _of_workload(workload: dict[str, Any]) -> list[str]:
    rows = workload["rows"]
    lines = [
        *("", f"## {workload['title']}", "", _rounds(workload)),
        *("", "| | version | mode | factors | over bare | memory above bare | inverse | eigh |"),
    ]
    lines[-1] += " product | |"
    lines.append("|---|---|---|---:|---:|---:|---:|---:|---:|---|")
    for name, row in rows.items():
        note = row.get("refused") or "; ".join(row.get("differences", []))
        above = row.get("bytes_above_bare")
        cells = [
            *(name, row.get("version", ""), row.get("mode", "")),
            _time(row.get("factors_ms")),
            f"{row['over_bare']:.2f} x" if "over_bare" in row else "",
            f"{above / 1e6:.0f} MB" if above is not None and name != BARE else "",
            *(_time(row.get(f"{operation}_ms")) for operation in ("inverse", "eigh", "product")),
            note.replace("|", "/"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _of_eigh(rows: dict[str, dict[str, float]]) -> list[str]:
    sizes = list(next(iter(rows.values())))
    head = " | ".join(f"n = {n}" for n in sizes)
    lines = ["", "## Eigendecomposition of a factor, float32", "", f"| | {head} |"]
    lines.append(f"|---|{'---:|' * len(sizes)}")
    lines += [
        f"| {name} | {' | '.join(_time(row[n]) for n in sizes)} |" for name, row in rows.items()
    ]
    return lines


def _time(milliseconds: float | None) -> str:
    if milliseconds is None:
        return ""
    return f"{milliseconds / 1e3:.2f} s" if milliseconds >= 1e3 else f"{milliseconds:.1f} ms"


def picture(results: Results, path: Path) -> None:
    """Draw the passes over bare forward and backward, a panel for each workload."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    workloads = list(results["workloads"].values())
    if not workloads:
        return
    figure = Figure(figsize=(4.2 * len(workloads), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    shown = [name for name in workloads[0]["rows"] if name != BARE]
    for index, workload in enumerate(workloads):
        axes = figure.add_subplot(1, len(workloads), index + 1)
        ratios = [workload["rows"].get(name, {}).get("over_bare") for name in shown]
        colours = ["tab:green" if name.startswith("ekfac_rs") else "tab:gray" for name in shown]
        axes.barh(shown, [ratio or 0.0 for ratio in ratios], color=colours)
        for place, ratio in enumerate(ratios):
            axes.text(ratio or 0.0, place, f" {ratio:.2f}" if ratio else " no figure", va="center")
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.invert_yaxis()
        axes.set_title(workload["title"].replace(", ", ",\n", 1), fontsize=9)
        axes.set_xlabel("pass over forward + backward")
        axes.margins(x=0.2)
        if index:
            axes.set_yticklabels([])
    figure.savefig(path, dpi=120)


def of_check(found: dict[str, dict[str, Any]]) -> str:
    """Return how near everybody's factors are to the exact ones: the worst layer of each."""
    lines = []
    for network, candidates in found.items():
        lines += [
            *("", f"## {network}", ""),
            *("| | layers | cosine of A | cosine of G | scale |", "|---|---:|---:|---:|---|"),
        ]
        for name, layers in candidates.items():
            if isinstance(layers, str):
                lines.append(f"| {name} | {layers.replace('|', '/')} | | | |")
                continue
            # Of other shapes are factors that groups share.
            alike = [values for values in layers.values() if not math.isnan(values[0])]
            A, G, scale = zip(*alike, strict=True)
            lines.append(
                f"| {name} | {len(alike)} of {len(layers)} | {min(A):.4f} | {min(G):.4f} | "
                f"{min(scale):.3f} to {max(scale):.3f} |"
            )
    return "\n".join(lines[1:])


def _rounds(workload: dict[str, Any]) -> str:
    of_passes, of_others = workload["rounds"], workload.get("operation_rounds")
    if of_others in (None, of_passes):
        return f"{of_passes} rounds."
    return f"{of_passes} rounds; of inverse, eigh and product {of_others}."
