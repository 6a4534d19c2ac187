"""Side by side with torch, in one run: curvature passes and training steps with the penalty.

Every comparison interleaves its candidates and reports medians and the ratio of medians, so that
a noisy machine disturbs all of them alike.
"""

import argparse
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import cycle, islice, pairwise

import torch
from timing import Work, medians
from torch import Tensor, nn
from torch.nn import functional as F

import ekfac_rs as ek


def mlp(*widths: int) -> nn.Sequential:
    """Linear-BN-ReLU blocks and a Linear head."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths[:-1]):
        layers += [nn.Linear(fan_in, fan_out), nn.BatchNorm1d(fan_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))


def images(examples: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Digit-like inputs: the embedded MNIST images, repeated where more are asked for."""
    from ekfac_rs.experiments.data import image_features, load_mnist_subset

    mnist = load_mnist_subset()
    order = torch.randperm(len(mnist.train_labels), generator=torch.Generator().manual_seed(seed))
    rows = order.repeat(-(-examples // len(order)))[:examples]
    labels = torch.from_numpy(mnist.train_labels).long()
    return image_features(mnist.train_images)[rows], labels[rows]


def report(title: str, results: dict[str, float], base: str, goals: dict[str, float]) -> None:
    """Print medians and their ratios to one of them."""
    print(f"\n{title}")
    for name, milliseconds in results.items():
        ratio = milliseconds / results[base]
        goal = f"   (goal <= {goals[name]})" if name in goals else ""
        print(f"  {name:<44} {milliseconds:9.2f} ms   {ratio:6.2f} x{goal}")


# --- curvature pass ------------------------------------------------------------------------------


def torch_factors(model: nn.Sequential, x: Tensor, centred: bool) -> None:
    """The same factors written directly in torch: full Gram matrices, hooks, sampled labels."""
    inputs: list[Tensor] = []
    points: list[Tensor] = []
    h = x
    modules = list(model)
    for i, module in enumerate(modules):
        if isinstance(module, nn.Linear):
            inputs.append(h.detach())
        h = module(h)
        last_of_block = isinstance(module, nn.BatchNorm1d) or i == len(modules) - 1
        if last_of_block:
            points.append(h)
    drawn = torch.multinomial(h.detach().softmax(1), 1)[:, 0]
    gradients = torch.autograd.grad(F.cross_entropy(h, drawn, reduction="sum"), points)
    for a, g in zip(inputs, gradients, strict=True):
        a = torch.cat([a, a.new_ones(len(a), 1)], 1)
        if centred:
            mean_a, sum_g = a.mean(0), g.sum(0)
            a, g = a - mean_a, g - sum_g / len(g)
            torch.outer(mean_a, mean_a).mul_(len(a))
            torch.outer(sum_g, sum_g).div_(len(g) ** 2)
        (a.T @ a).div_(len(a))
        (g.T @ g).div_(len(g))


def bench_pass(batches: int, batch_size: int, base: str, goal: float, rounds: int) -> None:
    """Factor pass of MLP 784-1024x3-10: bare forward and backward, torch's factors, and ours."""
    model = mlp(784, 1024, 1024, 1024, 10)
    x, y = images(batch_size * batches)
    loader = list(zip(x.split(batch_size), y.split(batch_size), strict=True))

    def bare() -> None:
        for a, b in loader:
            F.cross_entropy(model(a), b).backward()
            model.zero_grad()

    def ours(approximation: str) -> Work:
        return lambda: ek.estimate_curvature(model, loader, approximation=approximation)

    def theirs(centred: bool) -> Work:
        return lambda: [torch_factors(model, a, centred) for a, _ in loader]

    candidates = {
        "bare forward + backward": bare,
        "ekfac_rs, xkfac": ours("xkfac"),
        "ekfac_rs, kfac-expand": ours("kfac-expand"),
        "torch, the factors of xkfac": theirs(True),
        "torch, the factors of kfac-expand": theirs(False),
    }
    report(
        f"Curvature pass, MLP 784-1024x3-10 with BN, {batches} mini-batches of {batch_size}",
        medians(candidates, rounds),
        base,
        {"ekfac_rs, xkfac": goal, "ekfac_rs, kfac-expand": goal},
    )


def bench_resnet50(rounds: int) -> None:
    """Factor pass of ResNet-50 at 128 px, batch 16, against bare forward and backward."""
    from torchvision.models import resnet50

    torch.manual_seed(0)
    model = resnet50(weights=None)
    x, y = torch.randn(32, 3, 128, 128), torch.randint(1000, (32,))
    loader = list(zip(x.split(16), y.split(16), strict=True))

    def bare() -> None:
        for a, b in loader:
            F.cross_entropy(model(a), b).backward()
            model.zero_grad()

    def ours(approximation: str) -> Work:
        return lambda: ek.estimate_curvature(model, loader, approximation=approximation)

    candidates = {
        "bare forward + backward": bare,
        "ekfac_rs, xkfac-nested": ours("xkfac-nested"),
        "ekfac_rs, xkfac": ours("xkfac"),
        "ekfac_rs, kfac-expand": ours("kfac-expand"),
    }
    report(
        "Curvature pass, ResNet-50 at 128 px, 2 mini-batches of 16",
        medians(candidates, rounds),
        "bare forward + backward",
        {},
    )
    description = ek.describe(model)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        f"  factors {description.total_bytes / 1e9:.2f} GB, "
        f"peak of the process {peak / 1e9:.2f} GB   (goal <= 6)"
    )


# --- training step -------------------------------------------------------------------------------


def torch_penalty(
    model: nn.Sequential,
    blocks: dict[str, list[tuple[Tensor, Tensor]]],
    anchor: dict[str, Tensor],
    batch: dict[str, Tensor],
) -> Tensor:
    """The same penalty written directly in torch: autograd through ``G D A``."""
    total = torch.zeros(())
    for name, terms in blocks.items():
        linear = model[int(name)]
        weight = torch.cat([linear.weight, linear.bias[:, None]], 1)
        if name in batch:
            batchnorm = model[int(name) + 1]
            variance, mean = torch.var_mean(batch[name], 0, correction=0)
            gain = batchnorm.weight * torch.rsqrt(variance + batchnorm.eps)
            shift = batchnorm.bias + gain * (linear.bias - mean)
            weight = torch.cat([gain[:, None] * linear.weight, shift[:, None]], 1)
        deviation = weight - anchor[name]
        with torch.no_grad():
            product = sum((G @ deviation @ A for A, G in terms), torch.zeros_like(deviation))
        # value and gradient of a quadratic form from one product
        total = total + (product * deviation).sum() - 0.5 * (product * deviation.detach()).sum()
    return total


def training_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: tuple[Tensor, Tensor],
    extra: Callable[[], Tensor] | None = None,
    stable_at: float | None = None,
) -> None:
    """Make a step on the loss and something extra: a penalty's own step where a rate is given."""
    x, y = batch
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    if extra is not None:
        loss = loss + extra()
    loss.backward()
    if stable_at is not None and isinstance(extra, ek.QuadraticPenalty):
        extra.precondition(stable_at)
    optimizer.step()


def bench_step(widths: Sequence[int], rounds: int, tasks: int = 3, batch_size: int = 256) -> None:
    """A training step with and without the penalty of several tasks."""
    model = mlp(*widths)
    x, y = images(10_000)
    loader = list(zip(x.split(batch_size), y.split(batch_size), strict=True))
    permutations = [torch.randperm(784) for _ in range(tasks)]
    curvatures = [
        ek.estimate_curvature(model, [(a[:, order], b) for a, b in loader])
        for order in permutations
    ]
    anchor = ek.merged_weights(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    a, b = loader[0]
    penalty = ek.QuadraticPenalty(model, curvatures, anchor, scale=1e-3)
    blocks = {name: [t for c in curvatures for t in c[name].terms] for name in curvatures[0]}

    def step(extra: Callable[[], Tensor] | None) -> None:
        training_step(model, optimizer, (a, b), extra)

    seen: dict[str, Tensor] = {}
    for name, block_name in ((n, curvatures[0].batchnorms[n]) for n in blocks):
        if block_name is not None:
            model.get_submodule(block_name).register_forward_pre_hook(
                lambda module, args, name=name: seen.__setitem__(name, args[0])
            )
    candidates = {
        "step without penalty": lambda: step(None),
        "step with ekfac_rs' penalty": lambda: step(penalty),
        "step with the same penalty in torch": lambda: step(
            lambda: 1e-3 * torch_penalty(model, blocks, anchor, seen)
        ),
    }
    report(
        f"Training step, {'-'.join(map(str, widths))} with BN, batch {batch_size}, "
        f"XK-FAC penalty of {tasks} tasks",
        medians(candidates, rounds),
        "step without penalty",
        {"step with ekfac_rs' penalty": 1.15},
    )


def bench_stable_step(model: nn.Module, x: Tensor, y: Tensor, title: str, rounds: int) -> None:
    """What the stable step adds to a step with the penalty, where the penalty is stiff."""
    model.train()
    for _ in range(20):  # running statistics, without which merged weights mean nothing
        model(x)
    curvature = ek.estimate_curvature(model, [(x, y)], approximation="kfac-expand")
    anchor = ek.merged_weights(model, example=x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    with ek.QuadraticPenalty(model, curvature, anchor) as probe:
        # A hundred times what explicit steps bear: most layers have stiff directions.
        scale = 100.0 * probe.max_stable_lr(0.9) / 0.1

    def step(penalty: ek.QuadraticPenalty | None, stable_at: float | None = None) -> None:
        training_step(model, optimizer, (x, y), penalty, stable_at)

    explicit, stable = (ek.QuadraticPenalty(model, curvature, anchor, 0.0, scale) for _ in "es")

    def first_step() -> None:
        with ek.QuadraticPenalty(model, curvature, anchor, 0.0, scale) as penalty:
            step(penalty, 0.1)

    # Looks at the model come at growing intervals: measured apart, as the first step.
    results = medians({"first step, with a look at the model": first_step}, max(rounds // 5, 1))
    step(stable, 0.1)
    results |= medians(
        {
            "step without penalty": lambda: step(None),
            "explicit step with the penalty": lambda: step(explicit),
            "stable step, between two looks": lambda: step(stable, 0.1),
        },
        min(rounds, 9),
    )
    report(
        f"Stable step, {title}, K-FAC penalty of one task, scale {scale:.3g}",
        results,
        "explicit step with the penalty",
        {"stable step, between two looks": 1.15},
    )


def small_stable_step(rounds: int) -> None:
    """The stable step of an MLP at batch 256."""
    x, y = images(256)
    bench_stable_step(mlp(784, 100, 100, 10), x, y, "784-100-100-10, batch 256", rounds)


def resnet_stable_step(rounds: int) -> None:
    """The stable step of ResNet-18 at 32 px, batch 64."""
    from torchvision.models import resnet18

    torch.manual_seed(0)
    model = resnet18(weights=None, num_classes=10)
    x, y = torch.randn(64, 3, 32, 32), torch.randint(10, (64,))
    bench_stable_step(model, x, y, "ResNet-18 at 32 px, batch 64", rounds)


def bench_many_tasks(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    batch_size: int,
    title: str,
    goal: float,
    rounds: int,
    *,
    permuted: bool = False,
) -> None:
    """A step with the penalty of ten tasks: exact products, and by truncated roots.

    The tasks' curvatures are one and the same, ten times over: as dear as ten others. Of permuted
    inputs they are ten, and are compressed to three terms, too.
    """
    loader = list(zip(x.split(batch_size), y.split(batch_size), strict=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    model.train()

    def step(penalty: ek.QuadraticPenalty | None, stable_at: float | None = None) -> None:
        training_step(model, optimizer, loader[0], penalty, stable_at)

    # Gradients of a network that knows nothing yet are unlike later ones.
    for batch in islice(cycle(loader), 20):
        training_step(model, optimizer, batch)
    orders = [torch.randperm(x.shape[1]) for _ in range(10)] if permuted else []
    tasks = [[(a[:, order], b) for a, b in loader] for order in orders] or [loader]
    taken = [ek.estimate_curvature(model, task, approximation="kfac-expand") for task in tasks]
    curvatures = list(islice(cycle(taken), 10))
    anchor = ek.merged_weights(model, example=loader[0][0])
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    shares = {"exact products": 0.0, "1 % dropped": 0.01, "10 % dropped": 0.1}
    penalties = {
        name: ek.QuadraticPenalty(model, curvatures, anchor, 0.01, 3.0, dropped=dropped)
        for name, dropped in shares.items()
    }
    if permuted:
        three = [ek.compress_curvatures(curvatures, 3)]
        for name, dropped in (("3 terms", 0.0), ("3 terms, 10 % dropped", 0.1)):
            penalties[name] = ek.QuadraticPenalty(model, three, anchor, 0.01, 3.0, dropped=dropped)
    candidates: dict[str, Work] = {"step without penalty": lambda: step(None)}
    for name, penalty in penalties.items():
        candidates[name] = lambda penalty=penalty: step(penalty)
    with ek.QuadraticPenalty(model, curvatures, anchor, 0.01, 3.0, dropped=0.1) as penalty:
        candidates["10 % dropped, stable step between two looks"] = lambda: step(penalty, 0.05)
        results = medians(candidates, rounds)
    report(
        f"Training step, {title}, K-FAC penalty of 10 tasks",
        results,
        "step without penalty",
        {"10 % dropped, stable step between two looks": goal},
    )
    for name, penalty in penalties.items():
        described = penalty.describe().values()
        flops = sum(layer.flops or 0 for layer in described)
        errors = sorted(layer.error for layer in described)
        print(
            f"  {name:<22} {flops / 1e9:8.2f} GFlop a product, error at most {errors[-1]:.3f}, "
            f"median {errors[len(errors) // 2]:.3f}"
        )


def many_tasks_mlp(rounds: int) -> None:
    """Ten tasks on 784-1024x3-10, batch 256."""
    x, y = images(2048)
    title = "784-1024x3-10 with BN, batch 256"
    network = mlp(784, 1024, 1024, 1024, 10)
    bench_many_tasks(network, x, y, 256, title, 1.5, rounds, permuted=True)


def many_tasks_resnet56(rounds: int) -> None:
    """Ten tasks on ResNet-56, batch 32."""
    from ekfac_rs.experiments.networks import CifarResNet

    torch.manual_seed(0)
    x, y = images(256)
    x = F.pad(x.view(-1, 1, 28, 28), (2, 2, 2, 2)).expand(-1, 3, -1, -1)
    bench_many_tasks(CifarResNet(9), x, y, 32, "ResNet-56 at 32 px, batch 32", 1.15, rounds)


def many_tasks_resnet18(rounds: int) -> None:
    """Ten tasks on ResNet-18 with a stem for 32 pixels, batch 64."""
    from torchvision.models import resnet18

    torch.manual_seed(0)
    model = resnet18(weights=None, num_classes=10)
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    x, y = images(128)
    x = F.pad(x.view(-1, 1, 28, 28), (2, 2, 2, 2)).expand(-1, 3, -1, -1)
    bench_many_tasks(model, x, y, 64, "ResNet-18 at 32 px, batch 64", 1.1, rounds)


def bench_gram(rounds: int) -> None:
    """One Gram matrix (lower triangle) against torch's full product."""
    from ekfac_rs import _core
    from ekfac_rs._tensors import borrow

    for rows, columns in ((512, 785), (512, 1025), (4096, 577)):
        x = torch.randn(rows, columns)
        out = torch.zeros(columns, columns)

        def ours(x: Tensor = x, out: Tensor = out) -> None:
            _core.accumulate_gram(
                borrow(x), [borrow(out)], "kfac-expand", "gradient", False, 1.0, "ieee"
            )

        def theirs(x: Tensor = x, out: Tensor = out) -> None:
            torch.addmm(out, x.T, x, out=out)

        results = medians({"torch, full x.T @ x": theirs, "ekfac_rs, lower triangle": ours}, rounds)
        report(f"Gram matrix of [{rows}, {columns}]", results, "torch, full x.T @ x", {})


BENCHMARKS: dict[str, Callable[[int], None]] = {
    "pass": lambda rounds: bench_pass(8, 512, "bare forward + backward", 1.4, rounds),
    "small-pass": lambda rounds: bench_pass(
        2, 4, "torch, the factors of kfac-expand", 2.0, 5 * rounds
    ),
    "resnet50": lambda rounds: bench_resnet50(rounds=max(rounds // 5, 1)),
    "small-step": lambda rounds: bench_step((784, 100, 100, 10), rounds=20 * rounds),
    "wide-step": lambda rounds: bench_step((784, 1024, 1024, 1024, 10), rounds=2 * rounds),
    "small-stable-step": small_stable_step,
    "resnet-stable-step": lambda rounds: resnet_stable_step(max(rounds // 3, 1)),
    "many-tasks-mlp": lambda rounds: many_tasks_mlp(max(rounds // 3, 1)),
    "many-tasks-resnet56": lambda rounds: many_tasks_resnet56(max(rounds // 5, 1)),
    "many-tasks-resnet18": lambda rounds: many_tasks_resnet18(max(rounds // 5, 1)),
    "gram": lambda rounds: bench_gram(rounds=10 * rounds),
}


def main() -> None:
    """Print all comparisons, each in a process of its own: its memory is its own then."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"which: {', '.join(BENCHMARKS)}; default all")
    parser.add_argument("--rounds", type=int, default=15, help="repetitions behind each median")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(BENCHMARKS)
    if unknown:
        parser.error(f"expected some of {', '.join(BENCHMARKS)}, got {', '.join(unknown)}")
    if len(arguments.names) == 1:
        BENCHMARKS[arguments.names[0]](arguments.rounds)
        return
    print(
        f"ekfac_rs {ek.__version__}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} torch threads, {ek.num_threads()} ekfac_rs threads"
    )
    for name in arguments.names or BENCHMARKS:
        command = [sys.executable, __file__, name, "--rounds", str(arguments.rounds)]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
