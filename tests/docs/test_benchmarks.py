"""The GPU benchmark works from the first line to the last, shown by a dry run on the CPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "bench_gpu.py"
SECTIONS = (
    "Gram matrices",
    "Gram matrices of patches",
    "Curvature pass",
    "Eigendecomposition",
    "Training step with the penalty of one task",
    "Product of the penalty",
)
TABLE = r"^\|.*\|\n\|-[-:|]*\|\n(\|.*\|\n)+"


def dry_run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCHMARK), "--quick", *arguments],
        # Tiny sizes: more threads would only wait for each other.
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_section_of_the_gpu_benchmark_prints_a_table(tmp_path):
    done = dry_run("--device", "cpu", "--output", str(tmp_path / "report.md"))
    assert done.returncode == 0, done.stderr + done.stdout
    machine, *sections = re.split(r"^## ", done.stdout, flags=re.MULTILINE)
    assert "dry run" in machine
    for library in ("libcuda", "libcublas", "libcusolver", "libnvrtc"):
        assert f"- {library}: " in machine
    assert tuple(section.splitlines()[0] for section in sections) == SECTIONS
    for section in sections:
        assert re.search(TABLE, section, re.MULTILINE), section
    assert (tmp_path / "report.md").read_text() == done.stdout


def test_one_section_can_be_run_alone():
    done = dry_run("--device", "cpu", "--only", "product")
    assert re.findall(r"^## (.*)$", done.stdout, re.MULTILINE) == ["Product of the penalty"]
