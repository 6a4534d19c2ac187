"""Make target/gpu-bundle: all that a machine with a GPU needs that has neither network nor Rust.

    python scripts/gpu_bundle.py

It holds a stripped wheel of the release, the tests and benchmarks with scripts/gpu.sh, and wheels
of what they need beside torch and NumPy; of those scripts/gpu.sh installs the ones that are missing
there. Peers are the versions of benchmarks/peers.lock, the others those of requirements.lock; all
are wheels of Python alone but hypothesis and safetensors. Beside the folder lies its archive.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUNDLE = ROOT / "target/gpu-bundle"
SIZE_LIMIT = 64 * 2**20

# Below the root; tests read what the README and the pages say.
SOURCES = (
    *("benchmarks", "docs", "scripts", "tests", "CHANGELOG.md", "CONTRIBUTING.md", "README.md"),
    *("justfile", "mkdocs.yml", "pyproject.toml", "requirements.lock"),
)
# By lock file: what to take from it. No torch, NumPy, SciPy or torchvision, nothing of NVIDIA's:
# they are on a machine that computes with torch, or too large.
NEEDED = {
    "requirements.lock": (
        *("execnet", "hypothesis", "iniconfig", "packaging", "pluggy", "pygments", "pytest"),
        *("pytest-xdist", "safetensors", "sortedcontainers", "tqdm"),
    ),
    "benchmarks/peers.lock": (
        *("asdfghjkl", "backpack-for-pytorch", "curvlinops-for-pytorch", "einconv", "einops"),
        *("laplace-torch", "lightning-utilities", "linear-operator", "nngeometry", "opt-einsum"),
        *("torchmetrics", "unfoldnd"),
    ),
}
# Of the machine, for the two wheels that are compiled.
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def pins(lock: str, names: Iterable[str]) -> list[str]:
    """Return ``name==version`` of each name, as a lock file's text has it.

    Raises
    ------
    ValueError
        A name is not there, or with more than one version.
    """
    found = []
    for name in names:
        versions = re.findall(rf"^{re.escape(name)}==([^\s;]+)", lock, re.MULTILINE)
        if len(versions) != 1:
            raise ValueError(f"{name}: expected one version, got {versions}")
        found.append(f"{name}=={versions[0]}")
    return found


def sources() -> list[Path]:
    """Return the files of `SOURCES` as they are in the working tree, but for ignored ones."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *SOURCES],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    files = [ROOT / name for name in listed.split("\0") if name]
    return [file for file in files if file.is_file()]


def build_wheel(folder: Path) -> None:
    """Build the release's wheel, for every Python from 3.11 on."""
    maturin = Path(sys.executable).with_name("maturin")
    command = [maturin, "build", "--release", "--strip", "--locked", "--quiet"]
    subprocess.run(
        [*command, "--interpreter", sys.executable, "--out", folder], cwd=ROOT, check=True
    )


def fetch(requirements: list[str], folder: Path, python_version: str) -> None:
    """Fetch wheels for another machine's Python, without what they depend on."""
    platforms = [argument for name in _PLATFORMS for argument in ("--platform", name)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--implementation", "cp"]
    command += ["--python-version", python_version, *platforms, "--dest", str(folder)]
    subprocess.run([*command, *requirements], check=True)


def main() -> None:
    """Make the folder and the archive, and tell their size."""
    parser = argparse.ArgumentParser(description="Make target/gpu-bundle.")
    parser.add_argument("--python-version", default="3.12", help="there; default: %(default)s")
    parser.add_argument("--wheel", type=Path, help="take this one, and build none")
    options = parser.parse_args()

    shutil.rmtree(BUNDLE, ignore_errors=True)
    wheels = BUNDLE / "wheels"
    wheels.mkdir(parents=True)
    if options.wheel:
        shutil.copy(options.wheel, wheels)
    else:
        build_wheel(wheels)
    for lock, names in NEEDED.items():
        fetch(pins((ROOT / lock).read_text(), names), wheels / "needed", options.python_version)
    for source in sources():
        target = BUNDLE / source.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)

    size = sum(file.stat().st_size for file in BUNDLE.rglob("*") if file.is_file())
    if size > SIZE_LIMIT:
        sys.exit(f"{BUNDLE}: {size / 2**20:.1f} MiB, more than {SIZE_LIMIT / 2**20:.0f}")
    archive = BUNDLE.with_suffix(".tar.gz")
    with tarfile.open(archive, "w:gz") as file:
        file.add(BUNDLE, BUNDLE.name)
    print(f"{BUNDLE.relative_to(ROOT)}: {size / 2**20:.1f} MiB; on the machine:")
    print(f"  {BUNDLE.name}/scripts/gpu.sh OUT")


if __name__ == "__main__":
    main()
