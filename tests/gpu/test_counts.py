"""What the CUDA backend asks of a GPU: waits, launches, products by type, memory.

Counted over emulated libraries (see test_emulated.py): properties of the code, not of a machine.
"""

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import ekfac_rs as ek
from ekfac_rs import _core
from ekfac_rs._tensors import accumulation_dtype
from gpu import emulated_device
from gpu.devices import CPU, EMULATED, EMULATED_CUDA
from gpu.emulated_device import bytes_of_products, calls, flops

pytestmark = pytest.mark.skipif(
    not os.environ.get(EMULATED), reason="runs over emulated CUDA libraries only"
)

borrow = EMULATED_CUDA.borrow
TYPES = ("float16", "bfloat16", "tf32", "float32", "float64")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 6, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(54, 4)),
    )


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(5, 3, 8, 8, generator=generator), torch.arange(5) % 4) for _ in range(count)
    ]


def counted(work: Callable[[], object], *functions: tuple[str, str]) -> list[int]:
    """How often work calls functions of the libraries."""
    before = [calls(*function) for function in functions]
    work()
    return [calls(*function) - old for function, old in zip(functions, before, strict=True)]


WAIT, LAUNCH = ("cuda", "cuStreamSynchronize"), ("cuda", "cuLaunchKernel")
PRODUCTS = ("cublas", "cublasGemmStridedBatchedEx_64")


@pytest.mark.parametrize("approximation", ek.curvature.settings.APPROXIMATIONS)
def test_a_pass_never_waits_for_the_device(approximation):
    data = batches(3)

    def estimate() -> None:
        ek.estimate_curvature(network(), data, approximation=approximation)

    assert counted(estimate, WAIT) == [0]


@pytest.mark.parametrize(
    ("approximation", "launches", "products"),
    [
        # Units are read once, and packed as they are read.
        ("kfac-expand", 1, 1),
        # Sums in two steps, then what is centred, and the mean's root.
        ("xkfac", None, 1),
    ],
)
def test_launches_of_a_factor(approximation, launches, products):
    x = torch.randn(40, 3, 16)
    strata = len(_core.strata()[approximation])
    out = [torch.zeros(16, 16) for _ in range(strata)]
    if approximation == "xkfac":
        out[-1] = torch.zeros(16)
    note = torch.full((1,), -1, dtype=torch.int64)

    def accumulate() -> None:
        word = borrow(note.view(torch.float64))
        options = (approximation, "gradient", False, 1.0, "ieee", (word, 0))
        _core.accumulate_gram(borrow(x), [borrow(A) for A in out], *options)

    waited, launched, multiplied = counted(accumulate, WAIT, LAUNCH, PRODUCTS)
    assert (waited, multiplied) == (0, products)
    assert launched == launches if launches else launched <= 6
    assert int(note) == -1


def flops_by_type(work: Callable[[], object]) -> dict[str, float]:
    before = {name: flops(name) for name in TYPES}
    work()
    return {name: flops(name) - before[name] for name in TYPES if flops(name) > before[name]}


@pytest.mark.parametrize("size", [64, 600, 1100])
@pytest.mark.parametrize(
    ("dtype", "precision", "rounded_to"),
    [
        (torch.float32, "ieee", "float32"),
        (torch.float32, "tf32", "tf32"),
        (torch.float32, "bf16", "bfloat16"),
        (torch.float16, "ieee", "float16"),
        (torch.bfloat16, "ieee", "bfloat16"),
        (torch.bfloat16, "tf32", "bfloat16"),
        (torch.float64, "bf16", "float64"),
    ],
)
def test_products_are_in_the_type_asked_for_and_of_one_triangle(size, dtype, precision, rounded_to):
    x = torch.randn(12, size, dtype=torch.float64).to(dtype)
    real = accumulation_dtype(dtype)
    out = torch.zeros(size, size, dtype=real)
    options = ("kfac-expand", "input", False, 1.0, precision)
    done = flops_by_type(lambda: _core.accumulate_gram(borrow(x), [borrow(out)], *options))
    whole = 2.0 * 12 * size * size
    # Blocks of at most 512 rows: the more of them, the less above the diagonal.
    share = {64: 1.0, 600: 0.75, 1100: 0.67}[size]
    assert set(done) == {rounded_to}
    assert 0.5 * whole < done[rounded_to] <= share * whole * 1.01


@pytest.mark.parametrize(
    ("channels", "side", "kernel", "padding", "by_offsets"),
    [
        (32, 28, 3, 1, True),
        (32, 14, 3, 1, True),
        # Without padding there are too many strips; small images are all border; few channels are
        # no products.
        (32, 28, 3, 0, False),
        (32, 3, 3, 1, False),
        (8, 28, 3, 1, False),
        (32, 28, 1, 0, False),
    ],
)
def test_patches_are_multiplied_by_offsets_where_that_is_less(
    channels, side, kernel, padding, by_offsets
):
    x = torch.randn(4, channels, side, side)
    features = channels * kernel**2
    out = torch.zeros(features, features)
    geometry = ((kernel,) * 2, (1, 1), (1, 1), ((padding, padding),) * 2)

    def accumulate() -> None:
        options = ("kfac-expand", *geometry, False, 1.0, "tf32")
        word = borrow(note.view(torch.float64))
        _core.accumulate_patch_gram(borrow(x), [borrow(out)], *options, (word, 0))

    note = torch.full((1,), -1, dtype=torch.int64)
    before = calls(*LAUNCH), calls(*PRODUCTS), calls(*WAIT)
    reached = bytes_of_products()
    done = flops_by_type(accumulate)
    reached = bytes_of_products() - reached
    launched, multiplied, waited = (
        calls(*function) - old
        for function, old in zip((LAUNCH, PRODUCTS, WAIT), before, strict=True)
    )
    assert (set(done), waited) == ({"tf32"}, 0)
    locations = 4 * (side + 2 * padding - kernel + 1) ** 2
    # Unfolded, half of all products and what blocks of the triangle have above the diagonal.
    whole = 2.0 * locations * features**2
    if by_offsets:
        # A copy, strips, and all put together; three runs of offsets, strips of some sizes.
        assert launched == 3
        assert multiplied <= 8
        assert done["tf32"] < 0.26 * whole
        # Unfolded, rows of nine times the image as either factor, and the result.
        assert reached < 0.5 * 4 * (2 * locations * features + features**2)
    else:
        assert done["tf32"] >= 0.5 * whole


@pytest.mark.parametrize("approximation", ["kfac-expand", "xkfac", "xkfac-nested"])
def test_centred_patches_go_by_offsets_too(approximation):
    """At most a tenth more operations than K-FAC, of which those of the border are not rounded."""
    side, channels, examples = 28, 32, 4
    x, features = torch.randn(examples, channels, side, side), 9 * channels
    out = [torch.zeros(features, features) for _ in _core.strata()[approximation]]
    if approximation != "kfac-expand":
        out[-1] = torch.zeros(features)
    note = torch.full((1,), -1, dtype=torch.int64)

    def accumulate() -> None:
        options = (approximation, (3, 3), (1, 1), (1, 1), ((1, 1), (1, 1)), False, 1.0, "tf32")
        word = borrow(note.view(torch.float64))
        _core.accumulate_patch_gram(borrow(x), list(map(borrow, out)), *options, (word, 0))

    waits = calls(*WAIT)
    done = flops_by_type(accumulate)
    assert calls(*WAIT) == waits
    whole = 2.0 * examples * side**2 * features**2
    assert done["tf32"] < 0.26 * whole
    assert done.get("float32", 0.0) < 0.1 * done["tf32"]


def test_what_is_centred_of_half_precision_is_multiplied_in_single():
    x = torch.randn(12, 3, 8).half()
    out = [torch.zeros(8, 8) for _ in _core.strata()["xkfac"]]
    options = ("xkfac", "input", False, 1.0, "ieee")
    done = flops_by_type(
        lambda: _core.accumulate_gram(borrow(x), [borrow(A) for A in out], *options)
    )
    assert set(done) == {"float32"}


def test_sums_of_examples_are_not_rounded():
    x = torch.randn(12, 3, 8)
    out = [torch.zeros(8, 8) for _ in _core.strata()["xkfac-nested"]]
    options = ("xkfac-nested", "input", False, 1.0, "bf16")
    done = flops_by_type(
        lambda: _core.accumulate_gram(borrow(x), [borrow(A) for A in out], *options)
    )
    # Within examples 36 rows; between them 12, and the mean.
    assert done == {"bfloat16": 2.0 * 36 * 64, "float32": 2.0 * 13 * 64}


def test_a_pass_needs_no_more_than_a_tile_beside_its_factors():
    x = torch.randn(70_000, 256)
    out = torch.zeros(256, 256)
    options = ("kfac-expand", "input", False, 1.0, "ieee")
    _core.accumulate_gram(borrow(x[:8]), [borrow(out)], *options)
    emulated_device.forget_the_most()
    before = emulated_device.most_allocated()
    _core.accumulate_gram(borrow(x), [borrow(out)], *options)
    # The units are 70 MB, a tile of them half of that.
    assert 30 * 2**20 < emulated_device.most_allocated() - before < 34 * 2**20


@pytest.mark.parametrize("approximation", ["kfac-expand", "kfac-reduce", "xkfac", "xkfac-nested"])
@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_found_at_the_end_of_the_pass(approximation, batch, value):
    data = batches(3)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), Masked(), nn.Flatten(), nn.Linear(16, 2))
    data[batch][0][3, 1, 0, 0] = value
    with pytest.raises(
        ek.errors.NonFiniteError,
        match=rf"layer '0': input: .* NaN or infinity in example 3 of mini-batch {batch}",
    ):
        ek.estimate_curvature(
            model, [(x, y % 2) for x, y in data], approximation=approximation, statistics="running"
        )


class Masked(nn.Module):
    """Lets nothing through that is not finite."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x.isfinite(), x, torch.zeros_like(x))


def test_gradients_that_are_not_finite_are_found_at_the_end_of_the_pass():
    model = nn.Sequential(nn.Linear(3, 4), Roots(), nn.Linear(4, 2))
    x = torch.ones(6, 3)
    model[0].weight.data.zero_()
    model[0].bias.data.copy_(torch.tensor([1.0, 2.0, 0.0, 3.0]))
    with pytest.raises(
        ek.errors.NonFiniteError, match=r"layer '0': gradient: .* in example 0 of mini-batch 0"
    ):
        ek.estimate_curvature(model, [(x, torch.zeros(6, dtype=torch.long))])


class Roots(nn.Module):
    """Square roots: at zero their slope is infinite."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sqrt()


def test_a_note_is_one_number_on_the_device_of_the_units():
    x, out = torch.ones(4, 3), torch.zeros(3, 3)
    options = ("kfac-expand", "input", False, 1.0, "ieee")
    for word, error in [
        (borrow(torch.zeros(2, dtype=torch.float64)), ek.errors.ShapeError),
        (borrow(torch.zeros(1)), ek.errors.ShapeError),
        (CPU.borrow(torch.zeros(1, dtype=torch.float64)), ek.errors.DeviceError),
    ]:
        with pytest.raises(error):
            _core.accumulate_gram(borrow(x), [borrow(out)], *options, (word, 0))
    assert not out.any()


def test_merged_weights_of_all_layers_take_three_launches_and_statistics_one_each():
    counts = []
    depths = (2, 12, 40)
    for depth in depths:
        layers = [(nn.Linear(6, 6, bias=False), nn.BatchNorm1d(6)) for _ in range(depth)]
        model = nn.Sequential(*(module for pair in layers for module in pair))
        penalty = ek.QuadraticPenalty(model, [], ek.merged_weights(model), damping=0.1)

        def step(model: nn.Module = model, penalty: ek.QuadraticPenalty = penalty) -> None:
            (model(torch.randn(8, 6)).square().sum() + penalty()).backward()

        step()  # the first looks at how statistics move
        waited, launched = counted(step, WAIT, LAUNCH)
        assert waited == 0
        counts.append(launched)
    # One forward and two backward for every 32 layers; a BatchNorm's statistics are its own, and
    # their gradient is added to that of its input where that is made.
    assert counts == [extra + depth for extra, depth in zip((3, 3, 6), depths, strict=True)]


class Passes(TorchDispatchMode):
    """Counts torch's own passes over tensors of some size."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self._elements = elements
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        looks_only = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        looks_only |= func.overloadpacket.__name__.startswith("empty")
        written = [] if looks_only else out if isinstance(out, tuple | list) else [out]
        self.count += any(isinstance(x, Tensor) and x.numel() >= self._elements for x in written)
        return out


def test_no_operation_of_torch_goes_through_activations_for_the_penalty():
    model, x = network(), batches(1)[0][0]
    penalty = ek.QuadraticPenalty(model, [], ek.merged_weights(model), damping=0.1)

    def step(with_penalty: bool) -> int:
        with Passes(5 * 8 * 8 * 8) as passes:
            loss = model(x).square().sum()
            (loss + penalty() if with_penalty else loss).backward()
        return passes.count

    step(True)  # the first looks at how statistics move
    assert step(True) == step(False) > 0


@pytest.mark.parametrize("depth", [1, 5, 40])
def test_all_products_are_scaled_damped_and_summed_in_three_launches(depth):
    layers = [(nn.Linear(6, 6, bias=False), nn.BatchNorm1d(6)) for _ in range(depth)]
    model = nn.Sequential(*(module for pair in layers for module in pair))
    data = [(torch.randn(8, 6), torch.arange(8) % 6) for _ in range(2)]
    curvature = ek.estimate_curvature(model, data, approximation="kfac-expand")
    penalty = ek.QuadraticPenalty(model, curvature, ek.merged_weights(model), damping=0.1)

    def value() -> None:
        model(data[0][0])
        penalty()

    value()  # the first looks at how statistics move
    waited, launched, multiplied = counted(value, WAIT, LAUNCH, ("cublas", "cublasSgemm_v2_64"))
    # For every 32 layers; merged weights are one launch more.
    assert (waited, launched) == (0, 4 * (1 + depth // 32))
    assert multiplied == 2 * depth


@pytest.mark.parametrize("dropped", [0.0, 0.3])
@pytest.mark.parametrize(
    ("dtype", "precision", "rounded_to"),
    [
        (torch.float32, "ieee", "float32"),
        (torch.float32, "auto", "float32"),  # what torch has for matrices
        (torch.float32, "tf32", "tf32"),
        (torch.float64, "tf32", "float64"),
    ],
)
def test_products_with_curvatures_are_in_the_type_asked_for(dtype, precision, rounded_to, dropped):
    model = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 6)).to(dtype)
    data = [(torch.randn(9, 16, dtype=dtype), torch.arange(9) % 6) for _ in range(2)]
    curvature = ek.estimate_curvature(model, data, approximation="kfac-expand")
    anchor = ek.merged_weights(model)
    penalty = ek.QuadraticPenalty(
        model, curvature, anchor, 0.1, dropped=dropped, precision=precision
    )
    exact = ek.QuadraticPenalty(model, curvature, anchor, 0.1, dropped=dropped, precision="ieee")
    with torch.no_grad():
        model[0].weight.add_(torch.randn_like(model[0].weight))
    values = []
    done = flops_by_type(lambda: values.append(penalty().item()))
    assert set(done) == {rounded_to}
    bound = 2e-3 if rounded_to == "tf32" else 1e-6
    assert values[0] == pytest.approx(exact().item(), rel=bound)


@pytest.mark.parametrize(
    ("shape", "rotated", "batched"), [((960, 9, 9), 1, 0), ((3, 32, 32), 1, 0), ((3, 33, 33), 0, 1)]
)
def test_stacks_of_small_matrices_are_rotated_all_at_once(shape, rotated, batched):
    x = torch.randn(shape)
    values, vectors = torch.zeros(shape[:-1]), torch.zeros(shape)

    def decompose() -> None:
        _core.eigh(*map(borrow, (x + x.mT, values, vectors)))

    functions = "cusolverDnSsyevjBatched", "cusolverDnXsyevBatched"
    assert counted(decompose, *(("cusolver", name) for name in functions)) == [rotated, batched]
