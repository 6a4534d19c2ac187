"""The comparison with other libraries works where none of them is there, and says so."""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from memory import needs_proc

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "bench_peers.py"
BY_HAND = "torch, written by hand"

pytestmark = needs_proc


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCHMARK), *arguments],
        # Tiny sizes: more threads would only wait for each other.
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("matplotlib")
    path = tmp_path_factory.mktemp("speed")
    done = run("conv", "eigh", "--quick", "--beside", BY_HAND, "nngeometry", "--output", str(path))
    assert done.returncode == 0, done.stderr + done.stdout
    assert done.stdout.strip() == (path / "peers.md").read_text().strip()
    return path


def test_it_leaves_numbers_a_table_and_a_picture(output):
    results = json.loads((output / "peers.json").read_text())
    rows = results["workloads"]["conv"]["rows"]
    for name in ("ekfac_rs, K-FAC", BY_HAND):
        for key in ("factors_ms", "over_bare", "bytes_above_bare", "inverse_ms", "product_ms"):
            assert key in rows[name], (name, key)
        assert rows[name]["differences"] == []
    assert rows["bare forward + backward"]["over_bare"] == 1.0
    assert set(results["eigh_ms"]) == {"torch.linalg.eigh", "ekfac_rs"}
    assert (output / "peers.png").read_bytes()[:4] == b"\x89PNG"


def test_a_library_that_is_not_there_is_told(output):
    try:
        import nngeometry  # noqa: F401
    except ImportError:
        row = json.loads((output / "peers.json").read_text())["workloads"]["conv"]["rows"]
        assert "No module named 'nngeometry'" in row["nngeometry"]["refused"]
        assert "No module named 'nngeometry'" in (output / "peers.md").read_text()


def test_a_candidate_that_nobody_knows_is_refused():
    done = run("--beside", "unheard-of")
    assert done.returncode == 2
    assert "unheard-of" in done.stderr


def test_by_hand_is_what_we_compute(tmp_path):
    done = run("MLP with BN", "grouped convolution", "--check", "--beside", BY_HAND)
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    compared = [row for row in rows if row[0] == f"| {BY_HAND}"]
    assert len(compared) == 2
    for row in compared:
        assert float(row[2]) > 0.9999  # A does not depend on labels
        assert float(row[3]) > 0.9  # G does, which are drawn


def test_candidates_tell_their_times_in_turns_after_a_warm_up(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARK.parent))
    asked = []
    times = {"ours": iter([900.0, 3.0, 1.0, 2.0]), "theirs": iter([800.0, 6.0, 5.0, 4.0])}

    def told_by(name):
        def ask():
            asked.append(name)
            return next(times[name])

        return ask

    able = {name: told_by(name) for name in times}
    assert import_module("bench_peers").medians_told(able, 3) == {"ours": 2.0, "theirs": 5.0}
    assert asked == ["ours", "theirs"] * 4
