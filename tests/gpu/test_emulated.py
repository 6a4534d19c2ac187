"""The CUDA backend without a GPU: the whole suite over emulated libraries, and missing ones."""

import ctypes.util
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import ekfac_rs as ek
from ekfac_rs import _core
from gpu.devices import EMULATED_CUDA
from gpu.emulator_build import CompilerMissingError, build

TESTS = Path(__file__).parents[1]

# Test files and how many tests of each must pass at the least: a suite that is skipped fails.
# Tensors are torch's on the CPU: what is tested is the backend, not where tensors are made.
SUITES = {
    "exactness/test_convolutions.py exactness/test_known_answers.py core/test_kronecker_sum.py "
    "gpu/test_agreement.py gpu/test_faults.py gpu/test_counts.py": 400,
    "exactness/test_channel_blocks.py exactness/test_definitions.py penalty "
    "learner/test_continual_learner.py learner/test_many_tasks.py io/test_curvature_files.py "
    "layers/test_convolutions_in_use.py bn": 370,
}
# What says no more about a device than others: thousands of samples or steps, each computed by
# itself; what is known of factors that other tests compare with the oracle's; training, whose parts
# are tested one by one; single precision, in which test_agreement.py compares everything.
ELSEWHERE = (
    *("covariance", "unbiased", "hundred_times", "just_above", "there_on_corrected"),
    *("positive_semidefinite", "one_convolution", "exact_for", "two_forms", "patches_times"),
    *("exact_block", "one_example_with", "relabelings", "single_precision", "around_a_circle"),
    *("not_trained_are_left_out", "fine_tuning_forgets", "part_of_another_kind", "puts_no_look"),
    *("fixed_point", "is_prepared_for", "corrected_curvatures_are_stored", "large_factor", "bce-"),
    *("stays_finite_at_strengths", "round_trip_changes_a_deep_net", "splitting_a_batch"),
    *("nearly_as_all_terms_do", "memory_does_not_grow", "goes_on_as"),
    # The order of examples and of memory, where other layers' were shuffled on the device.
    "merging_and_memory_layout",
    # Of coordinates and statistics two of four combinations: both of each.
    *("modes1", "modes2"),
)


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        return build(tmp_path_factory.mktemp("emulator"))
    except CompilerMissingError as error:
        pytest.skip(str(error))


def run(
    libraries: Path, arguments: Sequence[str], **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run Python with these libraries in place of the system's."""
    environment = os.environ | {
        "LD_LIBRARY_PATH": str(libraries),
        "PYTHONPATH": str(TESTS),
        "EKFAC_EMULATOR_DEVICES": "200",
        **variables,
    }
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=TESTS.parent, check=False
    )


@pytest.fixture(scope="module")
def outcomes(
    emulator: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[subprocess.CompletedProcess[str]]]]:
    """Every suite, run in a process of its own, as many at once as there are cores."""
    # Processes share compiled kernels.
    cache = str(tmp_path_factory.mktemp("kernels"))

    def run_suite(suite: str) -> subprocess.CompletedProcess[str]:
        files = [f"tests/{name}" for name in suite.split()]
        options = ["-q", "-p", "gpu.emulated_device", "-k", f"not ({' or '.join(ELSEWHERE)})"]
        return run(emulator, ["-m", "pytest", *options, *files], EKFAC_EMULATOR_CACHE=cache)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        yield {suite: pool.submit(run_suite, suite) for suite in SUITES}


@pytest.mark.parametrize("suite", SUITES)
def test_suites_pass_through_the_cuda_backend(outcomes, suite):
    done = outcomes[suite].result()
    last = (done.stdout.strip().splitlines() or [done.stderr])[-1]
    assert done.returncode == 0, done.stdout[-4000:]
    passed = int(last.split(" passed")[0].split()[-1])
    assert passed >= SUITES[suite], last


def test_importing_touches_no_library(emulator):
    script = (
        "import ekfac_rs, pathlib\n"
        "maps = pathlib.Path('/proc/self/maps').read_text()\n"
        f"print({str(emulator)!r} in maps)\n"
        "ekfac_rs.cuda_info()\n"
        "maps = pathlib.Path('/proc/self/maps').read_text()\n"
        f"print({str(emulator)!r} in maps)\n"
    )
    assert run(emulator, ["-c", script]).stdout.split() == ["False", "True"]


USE = (
    "import torch, ekfac_rs as ek\n"
    "from gpu import emulated_device\n"
    "emulated_device.use()\n"
    "try:\n"
    "    ek.KroneckerSum([(torch.eye(3), torch.eye(2))]).trace()\n"
    "except ek.errors.CudaError as error:\n"
    "    print(error)\n"
    "info = ek.cuda_info()\n"
    "print(info['usable'], info['problem'])\n"
    "print(info['libraries'])\n"
)


def test_a_driver_that_is_too_old_is_named(emulator):
    done = run(emulator, ["-c", USE], EKFAC_EMULATOR_FAULT="cuDriverGetVersion=11080!")
    error, problem, _ = done.stdout.splitlines()
    assert error == "the driver (libcuda) is too old: it supports CUDA 11.8, expected 12.0 or later"
    assert problem == f"False {error}"


@pytest.mark.parametrize(
    ("library", "function"),
    [
        ("cuda", "cuStreamIsCapturing"),
        ("cusolver", "cusolverDnXsyevBatched"),
    ],
)
def test_a_library_that_is_too_old_is_named_with_what_it_lacks(
    emulator, tmp_path, library, function
):
    old = build(tmp_path / "old", without=[function])
    error, problem, libraries = run(old, ["-c", USE]).stdout.splitlines()
    assert error.startswith(f"lib{library} ({old}/lib{library}.so) is too old: it lacks {function}")
    assert problem == f"False {error}"
    assert f"'missing': ['{function}']" in libraries


def test_a_driver_that_is_missing_is_named():
    if ctypes.util.find_library("cuda"):
        pytest.skip("this machine has an NVIDIA driver")
    x = torch.eye(3)
    with pytest.raises(ek.errors.CudaError, match="libcuda was not found: it comes with"):
        _core.symmetrize(EMULATED_CUDA.borrow(x), 1.0)
    info = ek.cuda_info()
    assert not info["usable"]
    assert info["problem"].startswith("libcuda was not found")
    assert info["devices"] == []


@pytest.mark.parametrize(
    ("element", "real", "architecture"),
    [
        *((x, "float32", "sm_90") for x in ("float32", "float64", "float16", "bfloat16")),
        ("float64", "float64", "sm_90"),
        # The text is the same for all architectures.
        ("float32", "float32", "sm_80"),
    ],
)
def test_kernels_compile_to_machine_code(element, real, architecture):
    if not ek.cuda_info()["libraries"]["libnvrtc"]["found"]:
        pytest.skip("NVRTC is not installed")
    code = _core.compile_cuda_kernels(element, real, architecture)
    assert code.startswith(b"\x7fELF")
    for kernel in _core.cuda_kernels():
        assert kernel.encode() in code


def test_an_architecture_nobody_has_is_refused_in_the_compilers_words():
    if not ek.cuda_info()["libraries"]["libnvrtc"]["found"]:
        pytest.skip("NVRTC is not installed")
    with pytest.raises(ek.errors.CudaError, match=r"did not compile for sm_1 .*architecture"):
        _core.compile_cuda_kernels("float32", "float32", "sm_1")
