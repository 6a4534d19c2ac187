"""Where the time of a curvature pass goes on a GPU, by torch's profiler; a report in Markdown.

``--device cpu --quick`` is a dry run on tiny sizes: it shows that the script works, nothing else.
"""

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from bench_gpu import Setting, describe_machine, header, row
from timing import torch_precision
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import ekfac_rs as ek

SHOWN = 25
# Of the host's calls those that wait for the device, beside all that are named Synchronize.
WAITS = ("cudaMemcpy", "cuMemcpyDtoH_v2", "cuMemcpyHtoD_v2", "aten::item")


def profiled(setting: Setting, approximation: str, precision: str) -> Iterator[str]:
    """Profile a pass that has run before, so that nothing is compiled or chosen in it."""
    model, loader = setting.conv_net(), list(setting.images(2))
    options = {"approximation": approximation, "precision": precision}
    work = partial(ek.estimate_curvature, model, loader, **options)
    with torch_precision(precision):
        (milliseconds,) = setting.medians((approximation, work)).values()
        activities = [ProfilerActivity.CPU]
        if setting.on_gpu:
            activities.append(ProfilerActivity.CUDA)
        with profile(activities=activities) as recorded:
            work()
            if setting.on_gpu:
                torch.cuda.synchronize()
    events = recorded.key_averages()
    yield from tables(events, milliseconds, setting.on_gpu)


def tables(events: Sequence[Any], milliseconds: float, on_gpu: bool) -> Iterator[str]:
    """Tell what the device did, or on a CPU torch's operations, and what waited for it."""
    there = DeviceType.CUDA if on_gpu else DeviceType.CPU
    found = [event for event in events if event.device_type == there]
    spent = {
        event.key: (
            event.self_device_time_total if on_gpu else event.self_cpu_time_total,
            event.count,
        )
        for event in found
    }
    busy = sum(time for time, _ in spent.values()) / 1e3
    calls = sum(count for _, count in spent.values())
    what = "device busy" if on_gpu else "in torch's operations"
    yield f"Without the profiler {milliseconds:.1f} ms; {what} {busy:.1f} ms in {calls} calls."
    yield header("waits of the host", "calls")
    for event in events:
        waits = event.key in WAITS or "Synchronize" in event.key
        if waits and event.device_type == DeviceType.CPU:
            yield row(f"`{event.key}`", event.count)
    yield header("kernel" if on_gpu else "operation", "ms", "calls", "share")
    longest = sorted(spent.items(), key=lambda item: -item[1][0])[:SHOWN]
    for name, (time, count) in longest:
        share = f"{100 * time / 1e3 / busy:.1f} %"
        # Names of templates are longer than a line, and have bars in them.
        yield row(f"`{name[:120].replace('|', '/')}`", time / 1e3, count, share)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--approximation", default="kfac-expand")
    arguments = parser.parse_args()
    setting = Setting(torch.device(arguments.device), arguments.quick)
    if setting.on_gpu:
        if not torch.cuda.is_available():
            parser.error("torch finds no CUDA device; for a dry run: --device cpu --quick")
        torch.cuda.set_device(setting.device)
    torch.manual_seed(0)
    print("\n".join(describe_machine(setting)), flush=True)
    for precision in setting.precisions:
        print(f"\n## {arguments.approximation}, {precision}\n", flush=True)
        for line in profiled(setting, arguments.approximation, precision):
            print(line, flush=True)


if __name__ == "__main__":
    main()
