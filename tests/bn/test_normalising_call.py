"""Moments that a BatchNorm knows, and their gradients on their way through its own.

Held against `torch.var_mean` of its input, which autograd goes back through by itself.
"""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ekfac_rs import _core
from ekfac_rs.batchnorm import NormalisingCall, moments_of_all
from ekfac_rs.errors import BatchNormError

LAYOUTS = {
    "matrices": lambda: (nn.BatchNorm1d(5), torch.randn(7, 5)),
    "sequences": lambda: (nn.BatchNorm1d(3), torch.randn(4, 3, 6)),
    "images": lambda: (nn.BatchNorm2d(4), torch.randn(5, 4, 3, 2)),
    "channels last": lambda: (
        nn.BatchNorm2d(4),
        torch.randn(5, 4, 3, 2).to(memory_format=torch.channels_last),
    ),
    "volumes": lambda: (nn.BatchNorm3d(2), torch.randn(3, 2, 2, 3, 2)),
    "nothing learnt": lambda: (nn.BatchNorm1d(5, affine=False, eps=0.3), torch.randn(7, 5)),
    "no statistics kept": lambda: (
        nn.BatchNorm1d(5, track_running_stats=False),
        torch.randn(7, 5),
    ),
    "a part of a tensor": lambda: (nn.BatchNorm2d(3), torch.randn(6, 7, 4, 3)[::2, 1::2, :, 1:]),
    "turned": lambda: (nn.BatchNorm1d(5), torch.randn(5, 9).T),
}


class Case:
    """A BatchNorm amid a network: what it was called with, and a loss of what it returned."""

    def __init__(self, layout: str = "images", dtype: torch.dtype = torch.float64) -> None:
        torch.manual_seed(len(layout))
        self.batchnorm, values = LAYOUTS[layout]()
        self.batchnorm.to(dtype)
        for parameter in self.batchnorm.parameters():
            nn.init.normal_(parameter, 1.0, 0.5)
        self.leaf = (2.0 + 3.0 * values).to(dtype).requires_grad_()
        C = values.shape[1]
        self.of_mean, self.of_variance = torch.randn(2, C, dtype=dtype)

    def forward(self) -> Tensor:
        self.x = self.leaf * 1.5
        output = self.batchnorm(self.x)
        self.call = NormalisingCall.of("bn", self.batchnorm, self.x, output)
        return (output.sin() * torch.linspace(0.5, 2.0, output.numel()).view_as(output)).sum()

    def of_moments(self, known: bool) -> Tensor:
        """A function of mean and variance."""
        if known:
            [(mean, variance)] = moments_of_all([self.x], [self.call])
        else:
            others = [axis for axis in range(self.x.dim()) if axis != 1]
            variance, mean = torch.var_mean(self.x, others, correction=0)
        return (mean * self.of_mean + variance.sqrt() * self.of_variance).sum()

    def gradients(self, known: bool, backward: Callable[[Tensor, Tensor], None]) -> list[Tensor]:
        """Gradients of the leaf and the parameters."""
        wanted = [self.leaf, *self.batchnorm.parameters()]
        for x in wanted:
            x.grad = None
        backward(self.forward(), self.of_moments(known))
        return [x.grad.clone() for x in wanted]


def together(loss: Tensor, of_moments: Tensor) -> None:
    (loss + of_moments).backward()


@pytest.fixture
def ways(monkeypatch) -> list[str]:
    """How each gradient of moments went, in order."""
    found = []
    write = _core.moments_backward

    def watched(*arguments):
        found.append("with the input's own" if arguments[-1] else "by itself")
        write(*arguments)

    monkeypatch.setattr(_core, "moments_backward", watched)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_known_moments_and_their_gradients_are_autograd_s(layout, dtype, ways):
    case = Case(layout, dtype)
    case.forward()
    others = [axis for axis in range(case.x.dim()) if axis != 1]
    variance, mean = torch.var_mean(case.x.double(), others, correction=0)
    [(known_mean, known_variance)] = moments_of_all([case.x], [case.call])
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {}
    torch.testing.assert_close(known_mean, mean.to(dtype), **tolerance)
    torch.testing.assert_close(known_variance, variance.to(dtype), **tolerance)
    got = case.gradients(True, together)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {}
    torch.testing.assert_close(got, case.gradients(False, together), **tolerance)
    assert ways == ["with the input's own"]


def separately(loss: Tensor, of_moments: Tensor) -> None:
    loss.backward(retain_graph=True)
    of_moments.backward()


def moments_first(loss: Tensor, of_moments: Tensor) -> None:
    of_moments.backward(retain_graph=True)
    loss.backward()


def twice(loss: Tensor, of_moments: Tensor) -> None:
    total = loss + of_moments
    total.backward(retain_graph=True)
    total.backward()


def moments_twice(loss: Tensor, of_moments: Tensor) -> None:
    (loss + of_moments + of_moments.square()).backward()


def interrupted_before(loss: Tensor, of_moments: Tensor) -> None:
    """One backward pass fails before it comes to the BatchNorm; the next knows nothing of it."""

    def fail(_: object, __: object) -> None:
        raise KeyboardInterrupt

    # The product with the weights, which the BatchNorm's node comes after.
    handle = loss.grad_fn.next_functions[0][0].register_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        (loss + of_moments).backward(retain_graph=True)
    handle.remove()
    (loss + of_moments).backward()


@pytest.mark.parametrize(
    ("backward", "expected"),
    [
        (separately, ["by itself"]),
        (moments_first, ["by itself"]),
        (twice, ["with the input's own"] * 2),
        (moments_twice, ["with the input's own"]),
        (interrupted_before, ["with the input's own"]),
    ],
)
def test_whatever_is_gone_back_through(backward, expected, ways):
    case = Case()
    got = case.gradients(True, backward)
    torch.testing.assert_close(got, case.gradients(False, backward))
    assert ways == expected


def test_two_readers_of_the_same_moments(ways):
    def both(case: Case, known: bool) -> Tensor:
        loss = case.forward()
        (loss + case.of_moments(known) + 2.0 * case.of_moments(known)).backward()
        return case.leaf.grad

    torch.testing.assert_close(both(Case(), True), both(Case(), False))
    assert ways == ["with the input's own"] * 2


@pytest.mark.parametrize("wanted", ["input", "leaf", "parameter"])
def test_gradients_of_some_alone(wanted):
    def gradient(known: bool) -> Tensor:
        case = Case()
        total = case.forward() + case.of_moments(known)
        of = {"input": case.x, "leaf": case.leaf, "parameter": case.batchnorm.weight}[wanted]
        return torch.autograd.grad(total, of)[0]

    torch.testing.assert_close(gradient(True), gradient(False))


def test_an_output_that_nothing_is_made_of(ways):
    case = Case()
    case.forward()
    case.of_moments(True).backward()
    got, case.leaf.grad = case.leaf.grad, None
    case.forward()
    case.of_moments(False).backward()
    torch.testing.assert_close(got, case.leaf.grad)
    assert ways == ["by itself"]


class Dropped(torch.autograd.Function):
    """Passes values on, and no gradients back."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return None


def test_an_output_whose_gradient_is_nothing_is_named():
    """Torch lets no hook put a gradient where there is none."""
    case = Case()
    case.x = case.leaf * 1.5
    output = case.batchnorm(case.x)
    case.call = NormalisingCall.of("bn", case.batchnorm, case.x, output)
    with pytest.raises(BatchNormError, match=r"'bn'.*return zeros"):
        (Dropped.apply(output).sum() + case.of_moments(True)).backward()


def test_hooks_of_the_input_see_the_whole_gradient():
    def seen(known: bool) -> Tensor:
        case, gradients = Case(), []
        loss = case.forward()
        case.x.register_hook(gradients.append)
        (loss + case.of_moments(known)).backward()
        [gradient] = gradients
        return gradient

    torch.testing.assert_close(seen(True), seen(False))


def test_an_output_that_is_changed_in_place():
    def gradient(known: bool) -> Tensor:
        case = Case()
        case.x = case.leaf * 1.5
        output = case.batchnorm(case.x)
        case.call = NormalisingCall.of("bn", case.batchnorm, case.x, output)
        assert case.call is not None
        (output.relu_().square().sum() + case.of_moments(known)).backward()
        return case.leaf.grad

    torch.testing.assert_close(gradient(True), gradient(False))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_beside_single(dtype):
    case = Case(dtype=torch.float32)
    x = (torch.randn(5, 4, 3, 2) + 2.0).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        output = case.batchnorm(x)
    call = NormalisingCall.of("bn", case.batchnorm, x, output)
    assert call is not None
    [(mean, variance)] = moments_of_all([x], [call])
    assert mean.dtype == variance.dtype == torch.float32
    (output.float().square().sum() + 50.0 * (mean + variance).sum()).backward()
    wide = x.detach().float().requires_grad_()
    variance, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
    total = case.batchnorm(wide).square().sum() + 50.0 * (mean + variance).sum()
    [expected] = torch.autograd.grad(total, wide)
    assert x.grad.dtype == dtype
    torch.testing.assert_close(x.grad.float(), expected, rtol=0.02, atol=0.02)


def test_it_is_once_differentiable():
    case = Case()
    total = case.forward() + case.of_moments(True)
    [gradient] = torch.autograd.grad(total, case.leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_where_nothing_can_be_seen():
    case = Case()
    bn, x = case.batchnorm, case.leaf * 1.5
    seen: list[NormalisingCall | None] = []

    def look(x: Tensor) -> Tensor:
        output = bn(x)
        seen.append(NormalisingCall.of("bn", bn, x, output))
        return output

    look(x)
    assert seen.pop() is not None
    checkpoint(look, x, use_reentrant=False)  # to unpack them would take another pass
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        look(x)
    with torch.no_grad():
        look(x)
    bn.eval()
    look(x)
    bn.train()
    seen.append(NormalisingCall.of("bn", bn, x, bn(x) + 1.0))
    seen.append(NormalisingCall.of("bn", bn, x, bn(2.0 * x)))
    seen.append(NormalisingCall.of("bn", bn, x, x))
    assert seen == [None] * 7


def test_a_graph_is_freed_as_soon_as_nobody_needs_it():
    case = Case()
    loss = case.forward()
    waiting = weakref.ref(case.call.gradients)
    of_moments = case.of_moments(True)
    gc.disable()
    try:
        del loss, of_moments
        case.call = case.x = None
        assert waiting() is None
    finally:
        gc.enable()
