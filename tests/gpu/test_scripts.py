"""What goes to a machine with a GPU: every part is run, none stops the others, and none is lost."""

import os
import shutil
import stat
import subprocess
import sys
import textwrap
from importlib import util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# The parts of a run, in turn, by the words that tell their commands apart; peers are several.
PARTS = {
    "installation": "-m pip install",
    "information": "-m ekfac_rs.info",
    "tests": "-m pytest",
    "bench-gpu: pass": "bench_gpu.py * --only pass",
    "bench-gpu: gram": "bench_gpu.py * --only gram",
    "bench-gpu: patches": "bench_gpu.py * --only patches",
    "bench-gpu: step": "bench_gpu.py * --only step",
    "bench-gpu: product": "bench_gpu.py * --only product",
    "bench-gpu: eigh": "bench_gpu.py * --only eigh",
    "peers": "bench_peers.py",
    "profile": "profile_gpu.py",
    "permuted MNIST": "learn_gpu.py",
}
FILES = {
    *("summary.md", "information.txt", "tests.txt", "bench.md", "peers.md", "peers.json"),
    *("profile.md", "permuted-mnist.md"),
}

needs_bash = pytest.mark.skipif(
    not (shutil.which("bash") and shutil.which("timeout")), reason="needs bash and timeout"
)


class Bundle:
    """A bundle as scripts/gpu.sh finds it, with a Python that only tells what it was asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "out"
        self.asked_for = folder / "asked"
        (folder / "scripts").mkdir()
        shutil.copy2(ROOT / "scripts/gpu.sh", folder / "scripts")
        (folder / "wheels/needed").mkdir(parents=True)
        self.python("")

    def python(self, behaviour: str) -> None:
        """Write the stand-in: cases of bash, by what the arguments look like."""
        python = self.folder / "python"
        python.write_text(
            textwrap.dedent(
                f"""\
                #!/usr/bin/env bash
                echo "$*" >>"{self.asked_for}"
                if [ "$1" = benchmarks/bench_peers.py ]; then
                    mkdir -p "$8"
                    echo "table of $2" >"$8/peers.md"
                    printf '{{\\n"workload": "%s"}}\\n' "$2" >"$8/peers.json"
                fi
                case "$*" in
                {behaviour}
                esac
                echo "done: $*"
                """
            )
        )
        python.chmod(python.stat().st_mode | stat.S_IXUSR)

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(self.folder / "scripts/gpu.sh"), *arguments],
            env={**os.environ, "PYTHON": str(self.folder / "python"), **environment},
            capture_output=True,
            text=True,
            check=False,
        )

    def rows(self) -> dict[str, list[str]]:
        """Cells of the summary, by the name of the part."""
        lines = (self.out / "summary.md").read_text().splitlines()
        cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line]
        return {name: rest for name, *rest in cells[2:]}


@pytest.fixture
def bundle(tmp_path):
    return Bundle(tmp_path)


def like(command: str, words: str) -> bool:
    """Whether words occur in a command, in turn, with anything at each star."""
    place = 0
    for word in words.split(" * "):
        place = command.find(word, place) + 1
        if not place:
            return False
    return True


@needs_bash
@pytest.mark.parametrize("dry", [True, False])
def test_every_part_is_run_and_leaves_what_it_said(bundle, dry):
    done = bundle.run(*(["--dry-run"] if dry else []), str(bundle.out))
    assert done.returncode == 0, done.stderr + done.stdout
    assert {file.name for file in bundle.out.iterdir()} == FILES
    assert len(FILES) <= 8
    commands = bundle.asked_for.read_text().splitlines()
    rows = bundle.rows()
    for name, words in PARTS.items():
        assert any(like(command, words) for command in commands), name
        of_name = [row for part, row in rows.items() if part == name or part.startswith(f"{name}:")]
        assert of_name, name
        for row in of_name:
            assert row[2] == "ok"
    where = "cpu" if dry else "cuda:0"
    for command in commands:
        if "benchmarks/" in command:
            assert f"--device {where}" in command
            assert ("--quick" in command) == dry
    tests = next(command for command in commands if "-m pytest" in command)
    assert "-p no:benchmark" in tests
    assert ("-m cuda" in tests) != dry
    assert "done: -m ekfac_rs.info" in (bundle.out / "information.txt").read_text()
    workloads = ["conv"] if dry else ["resnet50", "mlp", "resnet18"]
    tables = (bundle.out / "peers.md").read_text()
    assert [line for line in tables.splitlines() if line.startswith("table")] == [
        f"table of {name}" for name in workloads
    ]
    assert tables.count("```") == 2 * len(workloads)
    numbers = (bundle.out / "peers.json").read_text().splitlines()
    assert numbers == [f'{{"workload": "{name}"}}' for name in workloads]


@needs_bash
def test_parts_that_fail_or_hang_are_told_and_stop_no_other(bundle):
    bundle.python(
        """
        *"-m pytest"*) echo; echo "12 failed, 1012 passed"; echo; exit 1 ;;
        *"--only step") trap "" TERM; echo begun; while :; do sleep 1; done ;;
        """
    )
    done = bundle.run("--dry-run", str(bundle.out), PART_LIMIT="1")
    assert done.returncode == 1
    rows = bundle.rows()
    assert rows.pop("tests")[2:] == ["**failed** (1)", "12 failed, 1012 passed"]
    assert rows.pop("bench-gpu: step")[1:] == ["1", "**stopped**", "begun"]
    assert len(rows) == len(PARTS) - 2
    for row in rows.values():
        assert row[2] == "ok"
    # What came before the end is kept.
    assert "begun" in (bundle.out / "bench.md").read_text()
    assert "2 parts without success" in done.stdout


@needs_bash
def test_a_second_run_begins_anew_and_leaves_other_files_alone(bundle):
    bundle.out.mkdir()
    (bundle.out / "bench.md").write_text("of another day")
    (bundle.out / "notes").write_text("mine")
    assert bundle.run("--dry-run", str(bundle.out)).returncode == 0
    assert "another day" not in (bundle.out / "bench.md").read_text()
    assert (bundle.out / "notes").read_text() == "mine"


@needs_bash
@pytest.mark.parametrize("arguments", [(), ("--dry-run",), ("--help",), ("a", "b")])
def test_other_arguments_are_refused(bundle, arguments):
    done = bundle.run(*arguments)
    assert done.returncode == 2
    assert "usage" in done.stderr
    assert not bundle.asked_for.exists()


def test_limits_of_a_part_are_below_nine_minutes():
    script = (ROOT / "scripts/gpu.sh").read_text()
    total = int(script.partition("\nTOTAL=")[2].split()[0])
    # What is left is for stopping the last part, which gets two seconds, and the summary.
    assert total + 2 < 9 * 60


@needs_bash
def test_what_the_bundle_holds_decides_what_is_installed(bundle):
    bundle.python('"- "*) exec ' + sys.executable + ' "$@" ;;')
    for name in ("ekfac_rs-0.1.0-cp311-abi3-linux_x86_64", "torch-1-py3-none-any"):
        (bundle.folder / "wheels" / f"{name}.whl").touch()
    for name in ("Py_Test-1-py3-none-any", "not_there-2-py3-none-any"):
        (bundle.folder / "wheels/needed" / f"{name}.whl").touch()
    bundle.run("--dry-run", str(bundle.out))
    commands = bundle.asked_for.read_text().splitlines()
    ours, others = (command for command in commands if "-m pip install" in command)
    assert "--no-deps" in ours
    assert "--no-index" in ours
    assert "/ekfac_rs-0.1.0" in ours
    assert "torch-1" not in ours
    assert "not_there-2" in others


@pytest.fixture(scope="module")
def gpu_bundle():
    path = ROOT / "scripts/gpu_bundle.py"
    spec = util.spec_from_file_location("gpu_bundle", path)
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_needed_is_pinned_in_the_lock_files(gpu_bundle):
    found = []
    for lock, names in gpu_bundle.NEEDED.items():
        found += gpu_bundle.pins((ROOT / lock).read_text(), names)
    for name in ("curvlinops-for-pytorch", "nngeometry", "asdfghjkl", "laplace-torch"):
        assert sum(pin.startswith(f"{name}==") for pin in found) == 1
    for large in ("torch==", "numpy==", "scipy==", "nvidia-", "triton=="):
        assert not any(pin.startswith(large) for pin in found)


@pytest.mark.parametrize("lock", ["other==1\n", "a==1 ; x\na==2 ; y\n", "a-b==1\n"])
def test_a_name_without_one_version_is_refused(gpu_bundle, lock):
    with pytest.raises(ValueError, match="a: expected one version"):
        gpu_bundle.pins(lock, ["a"])
    assert gpu_bundle.pins("a==1.5 ; python_version > '3'\n", ["a"]) == ["a==1.5"]


def test_all_that_the_script_runs_is_in_the_bundle(gpu_bundle):
    files = {path.relative_to(ROOT).as_posix() for path in gpu_bundle.sources()}
    scripts = ("bench_gpu", "bench_peers", "profile_gpu", "learn_gpu", "timing", "peers/worker")
    assert files >= {f"benchmarks/{name}.py" for name in scripts}
    assert files >= {"scripts/gpu.sh", "pyproject.toml", "tests/conftest.py", "README.md"}
    assert not any(name.endswith((".so", ".pyc")) for name in files)
