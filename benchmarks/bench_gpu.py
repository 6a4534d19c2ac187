"""ekfac_rs on a GPU, side by side with torch in one run; prints a report in Markdown.

``--device cpu --quick`` is a dry run on tiny sizes: it shows that the script works, nothing else.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench import mlp
from timing import Work, captured, medians, torch_precision
from torch import Tensor, nn
from torch.nn import functional as F

import ekfac_rs as ek
from ekfac_rs import _core
from ekfac_rs._tensors import accumulation_dtype, borrow
from ekfac_rs.layers import find_layers

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Setting:
    """Where to compute, and whether only to show that the script works."""

    device: torch.device
    quick: bool

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def precisions(self) -> tuple[str, ...]:
        return ("ieee", "tf32") if self.on_gpu else ("ieee",)

    def pick(self, full: Any, tiny: Any) -> Any:
        return tiny if self.quick else full

    def medians(self, *candidates: tuple[str, Work]) -> dict[str, float]:
        return medians(dict(candidates), self.pick(7, 2), self.device)

    def compare(self, ours: Work, theirs: Work) -> tuple[float, float, float]:
        """Milliseconds of both, and their ratio."""
        found = self.medians(("ours", ours), ("theirs", theirs))
        return found["ours"], found["theirs"], found["ours"] / found["theirs"]

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, device=self.device).to(dtype)

    def covariance(self, *shape: int) -> Tensor:
        """Matrix of full rank, or a stack of them, as a factor is."""
        *stack, size = shape
        x = self.randn(*stack, 2 * size, size)
        return x.mT @ x / (2 * size)

    def batch(self, examples: int, *shape: int) -> Batch:
        return self.randn(examples, *shape), torch.randint(10, (examples,), device=self.device)

    def images(self, count: int) -> Iterator[Batch]:
        """Mini-batches of noise, each made where it is needed."""
        return (self.batch(*self.pick((64, 3, 224, 224), (8, 3, 12, 12))) for _ in range(count))

    def conv_net(self) -> nn.Module:
        if self.quick:
            body = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
            return nn.Sequential(*body, nn.Flatten(), nn.Linear(8, 10)).to(self.device)
        from torchvision.models import resnet50

        return resnet50().to(self.device)


def header(*cells: str) -> str:
    """First column to the left, the others to the right."""
    return f"\n| {' | '.join(cells)} |\n|---|{'---:|' * (len(cells) - 1)}"


def row(*cells: object) -> str:
    texts = (f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in cells)
    return f"| {' | '.join(texts)} |"


def by(*sizes: int) -> str:
    return " x ".join(map(str, sizes))


def bench_gram(setting: Setting) -> Iterator[str]:
    yield (
        "torch computes the full product `x.T @ x`, ekfac_rs the lower triangle: half of it. "
        "For the same flops: against half of torch's time (goal <= 1.2)."
    )
    yield header("x", "dtype", "", "ekfac_rs, ms", "torch, ms", "ratio", "for the same flops")
    kinds = [(torch.float32, precision) for precision in setting.precisions]
    kinds += [(dtype, "") for dtype in (torch.float64, torch.float16, torch.bfloat16)]
    for shape in setting.pick([(512, 1025), (8192, 1153), (200704, 576)], [(32, 9)]):
        for dtype, precision in kinds:
            x = setting.randn(*shape, dtype=dtype)
            out = x.new_zeros(shape[1], shape[1], dtype=accumulation_dtype(dtype))
            options = "kfac-expand", "gradient", False, 1.0, precision or "ieee"
            ours = partial(_core.accumulate_gram, borrow(x), [borrow(out)], *options)
            with torch_precision(precision or "ieee"):
                *found, ratio = setting.compare(ours, partial(torch.mm, x.T, x))
            yield row(by(*shape), str(dtype)[len("torch.") :], precision, *found, ratio, 2 * ratio)


def square(x: Tensor) -> Tensor:
    return x @ x.T


def unfold(x: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """Patches in columns."""
    return F.unfold(x, kernel, padding=padding, stride=stride).transpose(0, 1).flatten(1)


def bench_patches(setting: Setting) -> Iterator[str]:
    yield (
        "Gram matrices of a convolution's inputs, float32. torch unfolds them and multiplies; for "
        "the same flops: against half the time of its product alone (goal <= 1.2)."
    )
    columns = ("ekfac_rs, ms", "unfold + product, ms", "product alone, ms")
    yield header("images", "kernel", "stride", "", *columns, "ratio", "for the same flops")
    convolutions = [((64, 3, 224, 224), 7, 2), ((64, 64, 56, 56), 3, 1), ((64, 256, 56, 56), 1, 1)]
    convolutions += [((64, 256, 14, 14), 3, 1), ((64, 512, 7, 7), 3, 1)]
    for shape, kernel, stride in setting.pick(convolutions, [((2, 3, 8, 8), 3, 1)]):
        x, padding = setting.randn(*shape), kernel // 2
        patches = unfold(x, kernel, stride, padding)
        out = x.new_zeros(len(patches), len(patches))
        geometry = [kernel] * 2, [stride] * 2, [1, 1], [(padding, padding)] * 2
        for precision in setting.precisions:
            arguments = borrow(x), [borrow(out)], "kfac-expand", *geometry, False, 1.0, precision
            with torch_precision(precision):
                found = setting.medians(
                    ("ours", partial(_core.accumulate_patch_gram, *arguments)),
                    ("unfolded", lambda x=x, g=(kernel, stride, padding): square(unfold(x, *g))),
                    ("product", partial(square, patches)),
                )
            ratios = found["ours"] / found["unfolded"], 2 * found["ours"] / found["product"]
            yield row(by(*shape), kernel, stride, precision, *found.values(), *ratios)


def peak_memory(setting: Setting, work: Work) -> str:
    if not setting.on_gpu:
        return "-"
    torch.cuda.reset_peak_memory_stats()
    work()
    return f"{torch.cuda.max_memory_allocated() / 1e9:.2f}"


def bench_pass(setting: Setting) -> Iterator[str]:
    model = setting.conv_net()
    loader = list(setting.images(setting.pick(4, 2)))

    def bare() -> None:
        for x, y in loader:
            F.cross_entropy(model(x), y).backward()
            model.zero_grad()

    yield (
        f"{setting.pick('ResNet-50, 224 px, 4 mini-batches of 64', 'A tiny net')}, already on the "
        "device (goals: 1.4 in tf32, 1.1 in ieee, and the extended forms within a tenth of K-FAC). "
        "tf32: torch's convolutions and products, too."
    )
    yield header("", "precision", "ms", "ratio", "peak memory, GB")
    for precision in setting.precisions:
        works: dict[str, Work] = {"bare forward + backward": bare}
        for name in ("xkfac", "xkfac-nested", "kfac-expand"):
            options = {"approximation": name, "precision": precision}
            works[name] = partial(ek.estimate_curvature, model, loader, **options)
        with torch_precision(precision):
            found = setting.medians(*works.items())
            peaks = {name: peak_memory(setting, work) for name, work in works.items()}
        for name, peak in peaks.items():
            ratio = found[name] / found["bare forward + backward"]
            yield row(name, precision, found[name], ratio, peak)


def bench_eigh(setting: Setting) -> Iterator[str]:
    yield (
        "Two matrices, or two stacks, of each size that a factor of "
        f"{setting.pick('ResNet-50', 'a tiny net')} has, then of a depthwise net; float32."
    )
    yield header("factor", "KroneckerSum.eigh, ms", "torch.linalg.eigh, ms", "ratio")
    layers = find_layers(setting.conv_net())
    sizes = {shape[-1] for layer in layers for shape in layer.factor_shapes("merged")}
    groups = setting.pick(960, 6)
    for *stack, size in [*((size,) for size in sorted(sizes)), (groups, 9), (groups, 10)]:
        factor = setting.covariance(*stack, size)
        ours = ek.KroneckerSum([(factor, factor)]).eigh
        found = setting.compare(ours, lambda f=factor: [torch.linalg.eigh(f) for _ in range(2)])
        yield row(by(*factor.shape), *found)


def penalty_shares(
    setting: Setting,
    model: nn.Module,
    batch: Batch,
    tasks: dict[str, Sequence[Batch]],
    capture: bool,
    count: int = 1,
) -> Iterator[str]:
    """Steps without a penalty, and with that of so many tasks: approximation to examples.

    The penalty's products are rounded as torch's are when it is made.
    """
    anchor = ek.merged_weights(model)
    curvatures = {
        name: [ek.estimate_curvature(model, loader, approximation=name) for _ in range(count)]
        for name, loader in tasks.items()
    }
    # The learning rate is so small that no run diverges.
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)

    def step(penalty: ek.QuadraticPenalty | None) -> None:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch[0]), batch[1])
        if penalty is not None:
            loss = loss + penalty()
        loss.backward()
        optimizer.step()

    yield header("step", "", "torch's precision", "ms", "ratio", "more")
    ways: dict[str, Callable[[Work], Work]] = {"eager": lambda step: step}
    if capture:
        ways["CUDA graph"] = captured
    for precision in setting.precisions:
        for way, wrap in ways.items():
            with torch_precision(precision), ExitStack() as made:
                steps = [("without penalty", wrap(partial(step, None)))]
                for name, own in curvatures.items():
                    penalty = ek.QuadraticPenalty(model, own, anchor, scale=1e-3)
                    made.enter_context(penalty)
                    steps.append((f"with penalty, {name}", wrap(partial(step, penalty))))
                found = setting.medians(*steps)
            for name, time in found.items():
                ratio = time / found["without penalty"]
                yield row(name, way, precision, time, ratio, f"{100 * (ratio - 1):.1f} %")


def bench_step(setting: Setting) -> Iterator[str]:
    name, batches = setting.pick(("ResNet-50, 224 px, batch 64", 32), ("A tiny net", 2))
    yield (
        "The penalty's own products are in torch's precision. Goals: ResNet-50 at most 10 % more, "
        "the MLP as a graph and ten tasks 50 %. With few examples factors have a low rank and cost "
        f"less: here a task has {batches} mini-batches."
    )
    yield f"\n{name}:"
    loader = list(setting.images(batches))
    tasks = dict.fromkeys(("xkfac", "xkfac-nested"), loader)
    batch = next(setting.images(1))
    yield from penalty_shares(setting, setting.conv_net(), batch, tasks, capture=False)

    widths, examples = setting.pick(((784, 1024, 1024, 1024, 10), 256), ((12, 8, 10), 8))
    loader = [setting.batch(examples, widths[0]) for _ in range(batches)]
    model = mlp(*widths).to(setting.device)
    yield f"\nMLP {'-'.join(map(str, widths))} with BatchNorm, batch {examples}:"
    yield from penalty_shares(setting, model, loader[0], {"xkfac": loader}, setting.on_gpu)

    widths, count = setting.pick(((784, 100, 100, 10), 10), ((12, 8, 10), 2))
    loader = [setting.batch(examples, widths[0]) for _ in range(batches)]
    model = mlp(*widths).to(setting.device)
    yield f"\nThe same, {'-'.join(map(str, widths))}, {count} tasks:"
    tasks = {"kfac-expand": loader}
    yield from penalty_shares(setting, model, loader[0], tasks, setting.on_gpu, count)


def torch_product(terms: list[tuple[Tensor, Tensor]], V: Tensor) -> Tensor:
    return sum((G @ V @ A for A, G in terms[1:]), terms[0][1] @ V @ terms[0][0])


def bench_product(setting: Setting) -> Iterator[str]:
    yield "`sum_k G_k V A_k` with factors of full rank, packed beforehand; float32."
    yield header("V", "terms", "ekfac_rs, ms", "torch, ms", "ratio")
    for D, K in setting.pick([(1024, 1025), (256, 2305), (2048, 513), (512, 4609)], [(4, 10)]):
        for count in (1, 2, 6):
            terms = [(setting.covariance(K), setting.covariance(D)) for _ in range(count)]
            V = setting.randn(D, K)
            out = torch.empty_like(V)
            operator = _core.KroneckerOperator([(borrow(A), borrow(G)) for A, G in terms])
            ours = partial(operator.apply, borrow(V), borrow(out))
            yield row(by(D, K), count, *setting.compare(ours, partial(torch_product, terms, V)))


SECTIONS: dict[str, tuple[str, Callable[[Setting], Iterator[str]]]] = {
    "gram": ("Gram matrices", bench_gram),
    "patches": ("Gram matrices of patches", bench_patches),
    "pass": ("Curvature pass", bench_pass),
    "eigh": ("Eigendecomposition", bench_eigh),
    "step": ("Training step with the penalty of one task", bench_step),
    "product": ("Product of the penalty", bench_product),
}
FAILED = "\n**Failed:**"


def describe_machine(setting: Setting) -> Iterator[str]:
    info = ek.cuda_info()
    device = "CPU. A dry run: the times say nothing of a GPU."
    if setting.on_gpu:
        gpu = torch.cuda.get_device_properties(setting.device)
        memory = f"{gpu.total_memory / 2**30:.0f} GiB"
        device = f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {memory}"
    yield f"# ekfac_rs on a GPU\n\n- Device: {device}"
    yield f"- ekfac_rs {ek.__version__}, torch {torch.__version__} for CUDA {torch.version.cuda}"
    yield f"- CUDA version that the driver supports: {info['driver_version'] or 'no driver'}"
    for name, library in info["libraries"].items():
        yield f"- {name}: {library['file'] or 'not found'}"
    yield "\nMedians of calls in turns, within one run. Ratios are of ekfac_rs' time to torch's."


def write_report(setting: Setting, names: Iterable[str]) -> Iterator[str]:
    """Lines of the report. A section that fails is told, and the next one starts."""
    yield from describe_machine(setting)
    for name in names:
        title, bench = SECTIONS[name]
        yield f"\n## {title}\n"
        try:
            # Sections ask for another precision where they compare with it.
            with torch_precision("ieee"):
                yield from bench(setting)
        except (ek.EkfacError, RuntimeError) as error:
            yield f"{FAILED} {type(error).__name__}: {error}"


def main(words: Sequence[str] | None = None) -> None:
    """Print the report; exit with 1 if a section failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, two rounds")
    parser.add_argument("--only", choices=SECTIONS, help="one section")
    parser.add_argument("--output", type=Path, help="write the report to this file, too")
    arguments = parser.parse_args(words)
    setting = Setting(torch.device(arguments.device), arguments.quick)
    own_stream = nullcontext()
    if setting.on_gpu:
        if not torch.cuda.is_available() or not ek.cuda_info()["usable"]:
            problem = ek.cuda_info()["problem"] or "torch finds no device"
            parser.error(f"{problem}; for a dry run: --device cpu --quick")
        torch.cuda.set_device(setting.device)
        # A CUDA graph cannot be captured on the default stream, nor what began on another one.
        own_stream = torch.cuda.stream(torch.cuda.Stream())
    torch.manual_seed(0)
    lines = []
    with own_stream:
        for line in write_report(setting, [arguments.only] if arguments.only else SECTIONS):
            print(line, flush=True)
            lines.append(line)
            if arguments.output:
                arguments.output.write_text("\n".join(lines) + "\n")
    sys.exit(any(line.startswith(FAILED) for line in lines))


if __name__ == "__main__":
    main()
