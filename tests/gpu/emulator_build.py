"""Builds the emulated CUDA libraries, with which the CUDA backend runs on a CPU in tests.

A process uses them when it starts with ``LD_LIBRARY_PATH`` set to the folder that `build` returns;
they then answer to the names under which the backend loads CUDA. More variables of the environment:

- ``EKFAC_EMULATOR_DEVICES``: how many devices there are, one by default.
- ``EKFAC_EMULATOR_CACHE``: a folder for compiled kernels, shared by processes.
- ``EKFAC_EMULATOR_FAULT``: comma-separated, ``cuInit=100`` makes a function return that status
  at every call, ``cuDriverGetVersion=12000!`` makes it report that value. Values that can be
  set: ``cuDriverGetVersion``, ``cuDeviceGetCount``, ``cuDeviceGetAttribute.75`` (by number),
  ``cuStreamIsCapturing``, ``nvrtcVersion``, ``cublasGetVersion_v2``, ``cusolverGetVersion``,
  ``potrf.info``, ``syevd.info``, ``syevBatched.info`` and ``syevjBatched.info``.

Each library also has ``long emulator_calls(const char *name)``: how often the process called one of
its functions. ``double emulator_asked(const char *what)`` of libcublas: floating-point operations
of the process's products whose operands are rounded to ``float16``, ``bfloat16``, ``tf32``,
``float32`` or ``float64``, or the ``bytes`` of operands and results, each counted once where
matrices of a stack share them.
"""

import functools
import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

_SOURCES = Path(__file__).parent / "emulator"
# Where Cargo builds, too.
_BUILT = Path(__file__).parents[2] / "target"
_LIBRARIES = ("cuda", "cublas", "cusolver", "nvrtc")


class CompilerMissingError(RuntimeError):
    """There is no g++ here to build the emulator with."""


def build(directory: Path, without: Sequence[str] = ()) -> Path:
    """Build the four libraries in a directory and return it.

    The functions named in `without` are left out, as they are in a library that is too old.
    """
    objects = _objects()
    directory.mkdir(parents=True, exist_ok=True)
    version_script = directory / "exports.map"
    # A full name wins over a pattern.
    hidden = "".join(f"{name}; " for name in without)
    version_script.write_text(f"{{ global: cu*; nvrtc*; emulator_*; local: {hidden}*; }};\n")
    _run_compiler(
        lambda library: [
            "-shared",
            f"-Wl,--version-script={version_script}",
            *("-o", str(directory / f"lib{library}.so")),
            str(objects / f"{library}.o"),
            *("-ldl", "-pthread"),
        ]
    )
    return directory


@functools.cache
def _objects() -> Path:
    """A folder with the compiled sources, for all processes: linking takes no time."""
    sources = b"".join(path.read_bytes() for path in sorted(_SOURCES.iterdir()))
    objects = _BUILT / f"emulator-{hashlib.sha256(sources).hexdigest()[:16]}"
    if not objects.is_dir():
        _BUILT.mkdir(exist_ok=True)
        # Whole or not there: another process may be at it, too.
        with tempfile.TemporaryDirectory(prefix="emulator-", dir=_BUILT) as directory:
            made = Path(directory, "objects")
            made.mkdir()
            _compile_into(made)
            with suppress(OSError):
                made.rename(objects)
    return objects


def _compile_into(directory: Path) -> None:
    _run_compiler(
        lambda library: [
            *("-std=c++17", "-O3", "-fPIC", "-c", "-Wall"),
            *("-fvisibility=hidden", "-fno-gnu-unique", "-U_FORTIFY_SOURCE"),
            f"-Wa,-I,{_SOURCES}",
            *("-o", str(directory / f"{library}.o")),
            str(_SOURCES / f"{library}.cpp"),
        ]
    )


def _run_compiler(arguments: Callable[[str], Sequence[str]]) -> None:
    """Run g++ with the arguments for each library, side by side."""
    compiler = shutil.which("g++")
    if compiler is None:
        raise CompilerMissingError("the CUDA emulator is built with g++, which is not installed")
    processes = {
        library: subprocess.Popen(
            [compiler, *arguments(library)], stderr=subprocess.PIPE, text=True
        )
        for library in _LIBRARIES
    }
    # Each is waited for, also when an earlier one failed.
    errors = {library: process.communicate()[1] for library, process in processes.items()}
    for library, process in processes.items():
        if process.returncode != 0:
            raise RuntimeError(f"g++ could not build lib{library}.so:\n{errors[library]}")
