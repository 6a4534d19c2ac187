"""Ours, other libraries and hand-written torch in one run, in turns: passes, memory, algebra.

Every candidate has a process of its own for each workload; they are asked in turns, so that a
noisy machine disturbs all of them alike. The report is a table, its numbers as JSON, and a picture.
With ``--device cuda`` networks and mini-batches are on a GPU, and larger.
"""

import argparse
import json
import math
import os
import platform
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peers import report
from peers.candidates import BARE, FLOOR, NAMES, OURS
from peers.worker import CandidateError, Worker
from peers.workloads import CHECKS, ON_GPU, QUICK, WORKLOADS, Workload
from timing import medians

import ekfac_rs as ek
from ekfac_rs.curvature.kronecker import eigh

Row = dict[str, Any]

EIGH_SIZES = {"full": (512, 1024, 2048, 4608), "quick": (128, 256)}


@dataclass(frozen=True)
class Place:
    """Where to compute, and how exactly torch does there what a GPU does in TF32, too."""

    device: str
    precision: str

    @property
    def on_gpu(self) -> bool:
        return torch.device(self.device).type == "cuda"


def compare(
    candidates: Sequence[str], workloads: str, key: str, workload: Workload, place: Place
) -> dict[str, Row]:
    """Measure candidates on one workload."""
    rows: dict[str, Row] = {}
    with ExitStack() as cleanup:
        workers: dict[str, Worker] = {}
        # All begin at once: to start takes longer than to compute, on a GPU.
        begun = {
            name: Worker(name, workloads, key, place.device, place.precision) for name in candidates
        }
        for worker in begun.values():
            cleanup.callback(worker.close)
        for name, worker in begun.items():
            rows[name] = {}
            try:
                rows[name]["version"] = worker.ask("version")
                rows[name]["mode"] = worker.ask("mode")
                rows[name] |= worker.ask("first_pass")
                workers[name] = worker
            except CandidateError as error:
                rows[name]["refused"] = str(error)
            print(f"  {name}: {rows[name]}", file=sys.stderr, flush=True)
        died: dict[str, str] = {}

        def ask(name: str, operation: str) -> float:
            if name in died:
                return math.nan
            try:
                return float(workers[name].ask(operation))
            except CandidateError as error:  # for want of memory, as a rule: the others go on
                died[name] = str(error)
                return math.nan

        for operation in ("factors", *workload.operations):
            able = {
                name: partial(ask, name, operation)
                for name, worker in workers.items()
                if name not in died and (operation == "factors" or _can(worker, operation))
            }
            rounds = workload.rounds if operation == "factors" else workload.operation_rounds
            taken = medians_told(able, rounds)
            for name, milliseconds in taken.items():
                if name not in died:
                    rows[name][f"{operation}_ms"] = milliseconds
        for name, how in died.items():
            rows[name]["refused"] = how
    bare = rows[BARE]
    for row in rows.values():
        if "factors_ms" in row:
            row["over_bare"] = row["factors_ms"] / bare["factors_ms"]
            row["bytes_above_bare"] = row["peak_bytes"] - bare["peak_bytes"]
    return rows


def medians_told(able: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Median of the milliseconds that each tells, asked in turns after a warm-up of each."""
    told: dict[str, list[float]] = {name: [] for name in able}
    for ask in able.values():
        ask()
    for _ in range(rounds):
        for name, ask in able.items():
            told[name].append(ask())
    return {name: median(values) for name, values in told.items()}


def _can(worker: Worker, operation: str) -> bool:
    try:
        worker.ask(operation)
    except CandidateError:
        return False
    return True


def compare_eigh(sizes: tuple[int, ...], rounds: int, device: str) -> dict[str, Row]:
    """Measure eigendecompositions of single factors; all peers call torch's."""
    rows: dict[str, Row] = {"torch.linalg.eigh": {}, "ekfac_rs": {}}
    for n in sizes:
        x = torch.randn(n, 2 * n, generator=torch.Generator().manual_seed(0)).to(device)
        factor = x @ x.mT / (2 * n)
        taken = medians(
            {
                "torch.linalg.eigh": lambda factor=factor: torch.linalg.eigh(factor),
                "ekfac_rs": lambda factor=factor: eigh(factor),
            },
            rounds,
            device,
        )
        for name, milliseconds in taken.items():
            rows[name][str(n)] = milliseconds
    return rows


def check(candidates: Sequence[str], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Say of every candidate how near its factors are to the exact ones, on small networks."""
    found: dict[str, dict[str, Any]] = {}
    # Of ours one is the reference; the others, and K-FAC merged with BatchNorms, are no K-FAC
    # of the layers alone.
    without_factors = {BARE, FLOOR}
    beside = [
        name
        for name in candidates
        if name not in without_factors and not name.startswith("ekfac_rs")
    ]
    for key in names:
        found[key] = {}
        for name in beside:
            worker = Worker(name, "checks", key)
            try:
                found[key][name] = worker.ask("check")
            except CandidateError as error:
                found[key][name] = str(error)
            finally:
                worker.close()
            print(f"{key}: {name}: {found[key][name]}", file=sys.stderr, flush=True)
    return found


def machine(place: Place) -> Row:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    gpu: Row = {}
    if place.on_gpu:
        gpu = {
            "gpu": torch.cuda.get_device_name(place.device),
            "cuda": torch.version.cuda,
            "torch_precision": place.precision,
        }
    return {
        **gpu,
        "processor": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "ekfac_rs_threads": ek.num_threads(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "ekfac_rs": ek.__version__,
    }


def _refuse_unknown(
    parser: argparse.ArgumentParser, names: Iterable[str], known: Iterable[str]
) -> None:
    unknown = sorted(set(names) - set(known))
    if unknown:
        parser.error(f"expected some of {', '.join(known)}, got {', '.join(unknown)}")


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "names",
        nargs="*",
        help=f"which: {', '.join(WORKLOADS)}, eigh, or with --check {', '.join(CHECKS)}; "
        "all that there are",
    )
    parser.add_argument("--device", default="cpu", help="cpu, or cuda for an NVIDIA GPU")
    parser.add_argument(
        "--precision",
        choices=("ieee", "tf32"),
        default="ieee",
        help="of torch's float32 products and convolutions on a GPU, and of ours",
    )
    parser.add_argument("--quick", action="store_true", help="small networks: about five minutes")
    parser.add_argument("--check", action="store_true", help="only compare factors, on small ones")
    parser.add_argument(
        "--beside", nargs="*", default=NAMES, help="some candidates, beside bare and ours"
    )
    parser.add_argument("--output", type=Path, default=Path("docs/results/speed"))
    arguments = parser.parse_args(words)
    _refuse_unknown(parser, arguments.beside, NAMES)
    candidates = [name for name in NAMES if name in {BARE, OURS, *arguments.beside}]
    if arguments.check:
        names = arguments.names or list(CHECKS)
        _refuse_unknown(parser, names, CHECKS)
        print(report.of_check(check(candidates, names)))
        return
    place = Place(arguments.device, arguments.precision)
    if place.on_gpu and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device")
    kind = "gpu" if place.on_gpu else "full"
    workloads = ON_GPU if place.on_gpu else WORKLOADS
    if arguments.quick:
        kind, workloads = "quick", QUICK
    names = arguments.names or [*workloads, "eigh"]
    _refuse_unknown(parser, names, [*workloads, "eigh"])
    results: Row = {"machine": machine(place), "quick": arguments.quick, "workloads": {}}
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name in names:
        print(name, file=sys.stderr, flush=True)
        if name == "eigh":
            results["eigh_ms"] = compare_eigh(
                EIGH_SIZES["quick" if arguments.quick else "full"], 5, arguments.device
            )
        else:
            workload = workloads[name]
            rows = compare(candidates, kind, name, workload, place)
            results["workloads"][name] = {
                "title": workload.title,
                "rounds": workload.rounds,
                "operation_rounds": workload.operation_rounds,
                "rows": rows,
            }
        # After each, so that a run that is cut short leaves what it has.
        (arguments.output / "peers.json").write_text(json.dumps(results, indent=1) + "\n")
        table = report.table(results)
        (arguments.output / "peers.md").write_text(table)
    report.picture(results, arguments.output / "peers.png")
    print(table)


if __name__ == "__main__":
    main()
