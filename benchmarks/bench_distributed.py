"""What a curvature of several processes takes: measured with gloo here, modelled for many.

Each process has one thread and as many mini-batches as every other, so that without any cost of
exchange the time would be the same for any number of them, as long as there are processors.
"""

import argparse
import math
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchvision.models import resnet50

import ekfac_rs as ek
from ekfac_rs._ranks import assigned
from ekfac_rs.layers import find_layers

STRATA = {"kfac-expand": 1, "xkfac": 2, "xkfac-nested": 3}
MEASURED = ("kfac-expand", "xkfac-nested")


# --- measured ------------------------------------------------------------------------------------


class Traffic:
    """What is handed to torch to be exchanged, by this process."""

    def __init__(self) -> None:
        self.messages, self.bytes, self.seconds = 0, 0, 0.0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count what is exchanged inside."""
        names = ("all_reduce", "all_gather", "broadcast")
        before = {name: getattr(dist, name) for name in names}
        for name in names:
            setattr(dist, name, self._counting(before[name]))
        try:
            yield
        finally:
            for name in names:
                setattr(dist, name, before[name])

    def _counting(self, exchange: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            tensor = next(x for x in args if isinstance(x, Tensor))
            start = time.perf_counter()
            try:
                return exchange(*args, **kwargs)
            finally:
                self.messages, self.bytes = self.messages + 1, self.bytes + tensor.nbytes
                self.seconds += time.perf_counter() - start

        return counted


def network(synchronised: bool) -> nn.Module:
    """Three convolutions with BatchNorm and a Linear: 0.4 million weights."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for fan_in, fan_out in ((3, 64), (64, 128), (128, 256)):
        layers += [
            nn.Conv2d(fan_in, fan_out, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(fan_out),
            nn.ReLU(),
        ]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10))
    return nn.SyncBatchNorm.convert_sync_batchnorm(model) if synchronised else model


def measure(rank: int, count: int, store: str, batches: int, results: Any) -> None:
    """Time curvatures on one of so many ranks; the first one tells."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", rank=rank, world_size=count, store=dist.FileStore(store, count))
    generator = torch.Generator().manual_seed(rank)
    loader = [
        (torch.randn(32, 3, 32, 32, generator=generator), torch.randint(10, (32,)))
        for _ in range(batches)
    ]
    for synchronised in (False, True):
        for approximation in MEASURED:
            taken, traffic = [], Traffic()
            for attempt in range(4):
                traffic = Traffic()
                dist.barrier()
                start, worked = time.perf_counter(), time.process_time()
                with traffic.counted():
                    ek.estimate_curvature(
                        network(synchronised),
                        loader,
                        approximation=approximation,
                        process_group=dist.group.WORLD,
                    )
                if attempt:  # the first one warms up
                    now = time.perf_counter() - start, time.process_time() - worked
                    taken.append(now)
            if rank == 0:
                seconds, of_cpu = (median(times) for times in zip(*taken, strict=True))
                row = (seconds, of_cpu, traffic.messages, traffic.bytes, traffic.seconds)
                results.put((synchronised, approximation, *row))
    results.put((rank, *solved()))
    dist.barrier()


def solved() -> tuple[float, float, int]:
    """Time what is shared out: seconds and CPU seconds of this rank, and bytes."""
    torch.manual_seed(0)
    widths = (512,) * 7
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths)), nn.Linear(512, 10))
    curvature = ek.estimate_curvature(
        model, [(torch.randn(64, 512), torch.randint(10, (64,)))], approximation="xkfac"
    )
    V = {name: torch.randn(block.shape) for name, block in curvature.items()}
    taken, traffic = [], Traffic()
    for attempt in range(4):
        traffic = Traffic()
        # Another damping each time: an inverse is made anew.
        damping = 0.1 * (attempt + 1)
        dist.barrier()
        start, worked = time.perf_counter(), time.process_time()
        with traffic.counted():
            ek.distributed.map_blocks(
                curvature, lambda name, block, d=damping: block.solve(V[name], d)
            )
        if attempt:
            taken.append((time.perf_counter() - start, time.process_time() - worked))
    seconds, of_cpu = (median(times) for times in zip(*taken, strict=True))
    return seconds, of_cpu, traffic.bytes


def measured(counts: list[int], batches: int) -> None:
    """Print times and bytes for so many processes."""
    context = multiprocessing.get_context("spawn")
    shared = []
    print(
        f"{batches} mini-batches of 32 on each rank, one thread each, {os.cpu_count()} processors"
    )
    columns = ("mini-batch", "factors", "ranks", "s", "CPU s", "exchanging, s", "messages")
    print(f"| {' | '.join(columns)} | MB a rank | by the model |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|")
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            results = context.Queue()
            arguments = (count, os.path.join(folder, "store"), batches, results)
            processes = [
                context.Process(target=measure, args=(rank, *arguments)) for rank in range(count)
            ]
            for process in processes:
                process.start()
            for _ in range(2 * len(MEASURED)):
                synchronised, approximation, seconds, of_cpu, messages, sent, within = results.get(
                    timeout=300
                )
                words = "of all ranks" if synchronised else "own"
                of = Pass.of(network(synchronised=False).eval(), approximation)
                said = of.at_end + synchronised * batches * of.in_batch
                print(
                    f"| {words} | {approximation} | {count} | {seconds:.2f} | {of_cpu:.2f} | "
                    f"{within:.2f} | "
                    f"{messages} | {sent / 1e6:.2f} | {said / 1e6:.2f} |",
                    flush=True,
                )
            # Each rank tells of its own share.
            rows = sorted(results.get(timeout=300) for _ in range(count))
            _, seconds, works, sent = zip(*rows, strict=True)
            shared.append(
                f"| {count} | {max(seconds):.2f} | {min(works):.2f} to {max(works):.2f} | "
                f"{sent[0] / 1e6:.2f} |"
            )
            for process in processes:
                process.join()
    print("\nInverses of two terms applied, six Linears of 512 and one of 10, shared out")
    print("| ranks | s | CPU s of a rank | MB a rank |")
    print("|---:|---:|---:|---:|")
    print("\n".join(shared))


# --- modelled ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """A link between machines: bytes a second, and seconds until the first one arrives."""

    bandwidth: float
    latency: float

    def all_reduce(self, ranks: int, sent: float, messages: int) -> float:
        """Seconds of sums over ranks: whole ones go round a ring, and up and down a tree.

        A ring moves ``2 (R - 1) / R`` times the bytes, however many ranks there are; what a
        message waits for is the depth of a tree, twice.
        """
        if ranks == 1:
            return 0.0
        waits = 2 * math.ceil(math.log2(ranks)) * self.latency
        return 2 * (ranks - 1) / ranks * sent / self.bandwidth + messages * waits


@dataclass(frozen=True)
class Pass:
    """What a curvature pass exchanges, for each rank.

    Attributes
    ----------
    at_end : int
        Bytes of factors.
    messages_at_end : int
    in_batch : int
        Bytes in every mini-batch, under synchronised BatchNorms.
    messages_in_batch : int
    """

    at_end: int
    messages_at_end: int
    in_batch: int
    messages_in_batch: int

    @classmethod
    def of(cls, model: nn.Module, approximation: str) -> "Pass":
        """Count what a model's pass in float32 exchanges, with one label draw."""
        layers = find_layers(model, example=torch.zeros(2, 3, 64, 64))
        strata, numbers, means = STRATA[approximation], 0, 0
        for layer in layers:
            for shape in layer.factor_shapes("merged"):
                n, groups = shape[-1], math.prod(shape[:-2])
                numbers += strata * groups * n * (n + 1) // 2
                means += groups * n if strata > 1 else 0
        channels = [m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        # Forward, sums and squares; backward, the gradients of both, but for the first BatchNorm's,
        # behind which no gradient is wanted. Each follows a word of 24 bytes.
        sums = 4 * (2 * sum(2 * c + 1 for c in channels) - (2 * channels[0] + 1))
        messages = 2 * (4 * len(channels) - 1 + (strata > 1))
        ending = 4 * strata * len(layers) + 6
        return cls(4 * numbers + 12 * ending, ending, sums + 4 * means + 12 * messages, messages)


def modelled(images: int, batch: int, speed: float) -> None:
    """Print what a ResNet-50 would take on up to 1,000 ranks, by the model alone."""
    model = resnet50().eval()
    links = {
        "10 Gbit/s, 50 us": Network(1.25e9, 50e-6),
        "200 Gbit/s, 10 us": Network(25e9, 10e-6),
    }
    print(f"\nResNet-50, {images:,} images, {speed:g} images/s a rank, mini-batches of {batch}")
    for approximation in STRATA:
        of = Pass.of(model, approximation)
        print(
            f"{approximation}: {of.at_end / 1e6:.0f} MB of factors at the end in "
            f"{of.messages_at_end} messages; with SyncBatchNorm {of.in_batch / 1e6:.2f} MB a "
            f"mini-batch in {of.messages_in_batch} messages"
        )
    print(
        "| link | ranks | pass alone, s | factors, s | SyncBatchNorm, s | speed-up (own / sync) |"
    )
    print("|---|---:|---:|---:|---:|---:|")
    of = Pass.of(model, "xkfac-nested")
    for words, link in links.items():
        for ranks in (1, 2, 4, 16, 64, 256, 1000):
            steps = math.ceil(images / (batch * ranks))
            alone = steps * batch / speed
            end = link.all_reduce(ranks, of.at_end, of.messages_at_end)
            within = steps * link.all_reduce(ranks, of.in_batch, of.messages_in_batch)
            own, sync = (images / speed / x for x in (alone + end, alone + end + within))
            print(
                f"| {words} | {ranks} | {alone:.1f} | {end:.2f} | {within:.2f} | "
                f"{own:.1f} / {sync:.1f} |"
            )


def shares(model: nn.Module) -> None:
    """Print by how much decompositions of all factors are faster where they are shared out."""
    sizes = {
        layer.name: [(shape[-1], math.prod(shape[:-2])) for shape in layer.factor_shapes("merged")]
        for layer in find_layers(model, example=torch.zeros(2, 3, 64, 64))
    }
    costs = {name: float(sum(m * n**3 for n, m in factors)) for name, factors in sizes.items()}
    print("\nResNet-50, decompositions shared out by the cubes of factors' sizes")
    print("| ranks | speed-up |")
    print("|---:|---:|")
    for ranks in (2, 4, 8, 16, 64):
        makers = assigned(costs, ranks)
        most = max(sum(c for n, c in costs.items() if makers[n] == k) for k in range(ranks))
        print(f"| {ranks} | {sum(costs.values()) / most:.1f} |")


def main() -> None:
    """Measure, and print what the model says beside it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--batches", type=int, default=3, help="mini-batches on each rank")
    parser.add_argument("--images", type=int, default=100_000, help="of the model's pass")
    parser.add_argument("--batch", type=int, default=32, help="images of its mini-batches")
    parser.add_argument("--speed", type=float, default=500.0, help="images a second of its ranks")
    arguments = parser.parse_args()
    if arguments.ranks:
        measured(arguments.ranks, arguments.batches)
    modelled(arguments.images, arguments.batch, arguments.speed)
    shares(resnet50().eval())


if __name__ == "__main__":
    main()
