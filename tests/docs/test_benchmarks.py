"""The GPU benchmark works from the first line to the last, shown by a dry run on the CPU."""

import re
from importlib import import_module
from pathlib import Path

import pytest
import torch

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


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARK.parent))


def dry_run(*arguments: str) -> None:
    with pytest.raises(SystemExit) as caught, torch.random.fork_rng(devices=[]):
        import_module("bench_gpu").main(["--quick", "--device", "cpu", *arguments])
    assert not caught.value.code


@pytest.mark.usefixtures("benchmarks")
def test_every_section_of_the_gpu_benchmark_prints_a_table(tmp_path, capsys):
    dry_run("--output", str(tmp_path / "report.md"))
    printed = capsys.readouterr().out
    machine, *sections = re.split(r"^## ", printed, flags=re.MULTILINE)
    assert "dry run" in machine
    for library in ("libcuda", "libcublas", "libcusolver", "libnvrtc"):
        assert f"- {library}: " in machine
    assert tuple(section.splitlines()[0] for section in sections) == SECTIONS
    for section in sections:
        assert re.search(TABLE, section, re.MULTILINE), section
    assert (tmp_path / "report.md").read_text() == printed


@pytest.mark.usefixtures("benchmarks")
def test_one_section_can_be_run_alone(capsys):
    dry_run("--only", "product")
    titles = re.findall(r"^## (.*)$", capsys.readouterr().out, re.MULTILINE)
    assert titles == ["Product of the penalty"]


def precisions() -> tuple[str, str]:
    """Of torch's products and of its convolutions."""
    return (
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.cudnn.conv.fp32_precision,
    )


@pytest.mark.usefixtures("benchmarks")
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_a_precision_holds_for_products_and_convolutions_until_the_end(precision):
    torch_precision = import_module("timing").torch_precision
    before = precisions()
    with torch_precision(precision):
        assert precisions() == (precision, precision)
        with torch_precision("ieee"):
            assert precisions() == ("ieee", "ieee")
        assert precisions() == (precision, precision)
    assert precisions() == before
    with pytest.raises(RuntimeError, match="within"), torch_precision(precision):
        raise RuntimeError("within")
    assert precisions() == before
    # The older flags still answer: nothing is left of a mixture.
    assert torch.backends.cudnn.allow_tf32
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.usefixtures("benchmarks")
def test_every_section_asks_torch_for_the_precision_that_it_names(monkeypatch):
    bench_gpu = import_module("bench_gpu")
    section, seen = "", {}

    def medians(self, *candidates):
        seen.setdefault(section, []).append(precisions())
        return {name: 1.0 for name, _ in candidates}

    monkeypatch.setattr(bench_gpu.Setting, "medians", medians)
    monkeypatch.setattr(bench_gpu.Setting, "precisions", ("ieee", "tf32"))
    before = precisions()
    setting = bench_gpu.Setting(torch.device("cpu"), quick=True)
    for section in bench_gpu.SECTIONS:
        lines = list(bench_gpu.write_report(setting, [section]))
        assert not any(line.startswith(bench_gpu.FAILED) for line in lines), lines
    assert precisions() == before
    exact, rounded = ("ieee", "ieee"), ("tf32", "tf32")
    assert set(seen) == set(bench_gpu.SECTIONS)
    for name, found in seen.items():
        one_alone = name in ("eigh", "product")
        assert set(found) == ({exact} if one_alone else {exact, rounded}), name


@pytest.mark.usefixtures("benchmarks")
def test_a_profile_tells_where_the_time_went():
    setting = import_module("bench_gpu").Setting(torch.device("cpu"), quick=True)
    text = "\n".join(import_module("profile_gpu").profiled(setting, "kfac-expand", "ieee"))
    assert len(re.findall(TABLE, text + "\n", re.MULTILINE)) == 2  # waits, operations
    assert len(re.findall(r"^\| `aten::", text, re.MULTILINE)) > 10, text
    shares = [float(share) for share in re.findall(r"([\d.]+) % \|$", text, re.MULTILINE)]
    assert sorted(shares, reverse=True) == shares
    assert 50.0 < sum(shares) < 101.0


@pytest.mark.usefixtures("benchmarks")
def test_a_learner_tells_accuracy_and_seconds_on_each_device():
    learn_gpu = import_module("learn_gpu")
    experiment = learn_gpu.PermutedMnist.read(learn_gpu.TRIAL, None)
    lines = list(learn_gpu.report(experiment, ["fine-tuning", "xkfac"], ["cpu"]))
    cells = [line.split(" | ") for line in lines if line.startswith(("| fine", "| xkfac"))]
    assert [row[:2] for row in cells] == [["| fine-tuning", "cpu"], ["| xkfac", "cpu"]]
    for row in cells:
        assert 10.0 < float(row[2]) <= 100.0
        assert float(row[3]) > 0.0
