"""The comparison with other libraries works where none of them is there, and says so."""

import json
from collections.abc import Iterator
from contextlib import redirect_stdout
from importlib import import_module
from io import StringIO
from pathlib import Path
from types import ModuleType

import pytest

from memory import needs_proc

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
BY_HAND = "torch, written by hand"

pytestmark = needs_proc


@pytest.fixture(scope="module")
def bench_peers() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        # Tiny sizes: more threads would only wait for each other.
        patch.setenv("OMP_NUM_THREADS", "1")
        yield import_module("bench_peers")


@pytest.fixture(scope="module")
def output(bench_peers: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("matplotlib")
    path = tmp_path_factory.mktemp("speed")
    told = StringIO()
    with redirect_stdout(told):
        beside = ["--beside", BY_HAND, "nngeometry"]
        bench_peers.main(["conv", "eigh", "--quick", *beside, "--output", str(path)])
    assert told.getvalue().strip() == (path / "peers.md").read_text().strip()
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


def test_a_candidate_that_nobody_knows_is_refused(bench_peers, capsys):
    with pytest.raises(SystemExit) as caught:
        bench_peers.main(["--beside", "unheard-of"])
    assert caught.value.code == 2
    assert "unheard-of" in capsys.readouterr().err


def test_by_hand_is_what_we_compute(bench_peers, capsys):
    bench_peers.main(["MLP with BN", "grouped convolution", "--check", "--beside", BY_HAND])
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| ")]
    compared = [row for row in rows if row[0] == f"| {BY_HAND}"]
    assert len(compared) == 2
    for row in compared:
        assert float(row[2]) > 0.9999  # A does not depend on labels
        assert float(row[3]) > 0.9  # G does, which are drawn


def test_candidates_tell_their_times_in_turns_after_a_warm_up(bench_peers):
    asked = []
    times = {"ours": iter([900.0, 3.0, 1.0, 2.0]), "theirs": iter([800.0, 6.0, 5.0, 4.0])}

    def told_by(name):
        def ask():
            asked.append(name)
            return next(times[name])

        return ask

    able = {name: told_by(name) for name in times}
    assert bench_peers.medians_told(able, 3) == {"ours": 2.0, "theirs": 5.0}
    assert asked == ["ours", "theirs"] * 4
