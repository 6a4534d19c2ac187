"""What this installation is made of, for bug reports: ``python -m ekfac_rs.info``."""

import os
import platform
from importlib import metadata

import torch

from ekfac_rs._core import build_info, num_threads
from ekfac_rs._cuda import cuda_info

__all__ = ["describe_installation"]

_REQUIRED = ("numpy", "safetensors", "tqdm")
_OPTIONAL = {
    "avalanche-lib": "ekfac_rs.integrations.avalanche",
    "lightning": "ekfac_rs.integrations.lightning",
    "matplotlib": "pictures and experiments",
    "torchvision": "experiments with ResNet-50",
    "pillow": "experiments with images of one's own",
}


def describe_installation() -> str:
    """Tell versions, threads, devices, and what is missing.

    Returns
    -------
    str
        A line for each, to be put into a bug report. Nothing is said of files or of who runs it.

    Examples
    --------
    >>> from ekfac_rs.info import describe_installation
    >>> describe_installation().splitlines()[0].split()[0]
    'ekfac_rs'
    """
    build = build_info()
    lines = [
        f"ekfac_rs {build['version']} ({build['profile']} build, SIMD here: {build['simd']})",
        f"Python {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"torch {torch.__version__}",
        *(f"{name} {_version(name) or 'missing'}" for name in _REQUIRED),
        *(f"{name} {_version(name) or f'missing: for {use}'}" for name, use in _OPTIONAL.items()),
        f"processors: {os.cpu_count()}; threads: ekfac_rs {num_threads()} ({build['threads']}), "
        f"torch {torch.get_num_threads()}",
    ]
    return "\n".join((*lines, *_of_cuda()))


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _of_cuda() -> list[str]:
    """Say which GPUs there are, or why none can be used, and which libraries were found."""
    info = cuda_info()
    lines = [
        f"CUDA: {'usable' if info['usable'] else info['problem']} (torch: built for "
        f"{torch.version.cuda or 'none'}; driver: {info['driver_version'] or 'none'})",
        *(
            f"device {number}: {name}, compute capability {capability}"
            for number, (name, capability) in enumerate(info["devices"])
        ),
    ]
    for name, library in info["libraries"].items():
        found = "found" if library["found"] else "not found"
        lacks = f", lacks {', '.join(library['missing'])}" if library["missing"] else ""
        lines.append(f"{name}: {found}{lacks}")
    return lines


if __name__ == "__main__":
    print(describe_installation())
