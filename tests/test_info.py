"""What an installation tells of itself."""

import subprocess
import sys
from importlib import metadata

import pytest
import torch

import ekfac_rs as ek
from ekfac_rs import info
from processes import with_threads


def test_it_tells_versions_threads_and_devices_as_a_command():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "ekfac_rs.info"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    for words in (f"ekfac_rs {ek.__version__} (", f"torch {torch.__version__}", "CUDA: "):
        assert words in done.stdout
    for library in ("libcuda", "libcublas", "libcusolver", "libnvrtc"):
        assert f"{library}: " in done.stdout


def test_threads_are_those_in_force():
    with with_threads(3):
        told = f"threads: ekfac_rs 3 ({ek.build_info()['threads']}), torch"
        assert told in info.describe_installation()


def test_what_is_missing_is_named_with_its_use(monkeypatch):
    def version(name):
        if name in ("matplotlib", "numpy"):
            raise metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(metadata, "version", version)
    lines = info.describe_installation().splitlines()
    assert "numpy missing" in lines
    assert "matplotlib missing: for pictures and experiments" in lines
    assert "tqdm 1.0" in lines


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (
            {"usable": True, "problem": None, "driver_version": "13.0", "devices": [("X", "9.0")]},
            ["CUDA: usable (", "driver: 13.0)", "device 0: X, compute capability 9.0"],
        ),
        (
            {"usable": False, "problem": "too old", "driver_version": None, "devices": []},
            ["CUDA: too old (", "driver: none)"],
        ),
    ],
)
def test_gpus_and_old_libraries_are_told(monkeypatch, found, words):
    libraries = {"libcublas": {"found": True, "file": None, "missing": ["f", "g"]}}
    monkeypatch.setattr(info, "cuda_info", lambda: {**found, "libraries": libraries})
    text = info.describe_installation()
    for word in (*words, "libcublas: found, lacks f, g"):
        assert word in text
