"""Moments that a BatchNorm knows, and their gradients on their way through its own.

Held against `torch.var_mean` of its input, which autograd goes back through by itself.
"""

import gc
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from itertools import combinations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ekfac_rs as ek
from ekfac_rs import _core
from ekfac_rs.batchnorm import Normalising, NormalisingCall, moments_of_all
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
        self.normalising = Normalising("bn", self.batchnorm)
        C = values.shape[1]
        self.of_mean, self.of_variance = torch.randn(2, C, dtype=dtype)

    def forward(self) -> Tensor:
        self.x = self.leaf * 1.5
        output = self.batchnorm(self.x)
        self.call = self.normalising.call(self.x, output)
        return (output.sin() * torch.linspace(0.5, 2.0, output.numel()).view_as(output)).sum()

    def of_moments(self, known: bool) -> Tensor:
        """A function of mean and variance."""
        if known:
            [(mean, variance)] = moments_of_all([self.x], [self.call])
        else:
            others = [axis for axis in range(self.x.dim()) if axis != 1]
            variance, mean = torch.var_mean(self.x, others, correction=0)
        return (mean * self.of_mean + variance.sqrt() * self.of_variance).sum()

    def go_back_once(self) -> None:
        """Show that gradients come through."""
        self.forward().backward()

    def gradients(self, known: bool, backward: Callable[[Tensor, Tensor], None]) -> list[Tensor]:
        """Gradients of the leaf and the parameters."""
        wanted = [self.leaf, *self.batchnorm.parameters()]
        self.go_back_once()
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
        case.go_back_once()
        case.leaf.grad = None
        loss = case.forward()
        (loss + case.of_moments(known) + 2.0 * case.of_moments(known)).backward()
        return case.leaf.grad

    torch.testing.assert_close(both(Case(), True), both(Case(), False))
    assert ways == ["with the input's own"] * 2


@pytest.mark.parametrize("wanted", ["input", "leaf", "parameter"])
def test_gradients_of_some_alone(wanted):
    def gradient(known: bool) -> Tensor:
        case = Case()
        case.go_back_once()
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


def after(case: Case, function: Callable[[Tensor], Tensor], known: bool = True) -> None:
    """Go back from a function of the output and from the moments."""
    case.x = case.leaf * 1.5
    output = case.batchnorm(case.x)
    case.call = case.normalising.call(case.x, output)
    case.leaf.grad = None
    (function(output) + case.of_moments(known)).backward()


def dropped(output: Tensor) -> Tensor:
    return Dropped.apply(output).sum()


def test_an_output_whose_gradient_is_nothing(ways):
    case = Case()
    gradients = []
    for known in (True, True, False):
        after(case, dropped, known)
        gradients.append(case.leaf.grad)
    torch.testing.assert_close(gradients[0], gradients[2])
    torch.testing.assert_close(gradients[1], gradients[2])
    assert ways == ["by itself"] * 2


def test_an_output_whose_gradient_is_nothing_all_of_a_sudden(ways):
    """Torch lets no hook put a gradient where there is none; the next pass goes another way."""
    case = Case()
    case.go_back_once()
    with pytest.raises(BatchNormError, match=r"'bn'.*go back once more"):
        after(case, dropped)
    after(case, dropped)
    got = case.leaf.grad
    after(case, dropped, False)
    torch.testing.assert_close(got, case.leaf.grad)
    assert ways == ["by itself"]


def test_hooks_of_the_input_see_the_whole_gradient():
    def seen(known: bool) -> Tensor:
        case, gradients = Case(), []
        case.go_back_once()
        loss = case.forward()
        case.x.register_hook(gradients.append)
        (loss + case.of_moments(known)).backward()
        [gradient] = gradients
        return gradient

    torch.testing.assert_close(seen(True), seen(False))


def test_an_output_that_is_changed_in_place(ways):
    case, gradients = Case(), []
    case.go_back_once()
    for known in (True, False):
        after(case, lambda output: output.relu_().square().sum(), known)
        gradients.append(case.leaf.grad)
    torch.testing.assert_close(*gradients)
    assert ways == ["with the input's own"]


@pytest.mark.parametrize("handed_on", [False, True])
def test_a_gradient_that_somebody_has_kept_stays_as_it_is(handed_on, ways):
    case, kept = Case(), []
    case.go_back_once()
    own = torch.ones((), dtype=torch.float64).expand_as(case.leaf)

    def keep(of_inputs: tuple[Tensor, ...], _: object) -> tuple[Tensor, ...] | None:
        gradient = own if handed_on else of_inputs[0]
        kept.append((gradient, gradient.clone()))
        return (own, *of_inputs[1:]) if handed_on else None

    case.x = case.leaf * 1.5
    output = case.batchnorm(case.x)
    output.grad_fn.register_hook(keep)
    case.call = case.normalising.call(case.x, output)
    (output.sin().sum() + case.of_moments(True)).backward()
    [(gradient, before)] = kept
    torch.testing.assert_close(gradient, before, rtol=0, atol=0)
    assert ways == ["with the input's own"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_beside_single(dtype, ways):
    case = Case(dtype=torch.float32)
    leaf = (torch.randn(5, 4, 3, 2) + 2.0).to(dtype).requires_grad_()
    for _ in range(2):
        x = leaf * 1.0
        with torch.autocast("cpu", dtype=dtype):
            output = case.batchnorm(x)
        call = case.normalising.call(x, output)
        assert call is not None
        [(mean, variance)] = moments_of_all([x], [call])
        assert mean.dtype == variance.dtype == torch.float32
        leaf.grad = None
        (output.float().square().sum() + 50.0 * (mean + variance).sum()).backward()
    assert ways == ["by itself", "with the input's own"]
    wide = leaf.detach().float().requires_grad_()
    variance, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
    total = case.batchnorm(wide).square().sum() + 50.0 * (mean + variance).sum()
    [expected] = torch.autograd.grad(total, wide)
    assert leaf.grad.dtype == dtype
    torch.testing.assert_close(leaf.grad.float(), expected, rtol=0.02, atol=0.02)


def test_it_is_once_differentiable():
    case = Case()
    total = case.forward() + case.of_moments(True)
    [gradient] = torch.autograd.grad(total, case.leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


class Scaled(nn.BatchNorm2d):
    """Normalises a multiple of its input, which lies in the same memory."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.view_as(x))


def test_where_nothing_can_be_seen():
    case = Case()
    bn, x = case.batchnorm, case.leaf * 1.5
    seen: list[NormalisingCall | None] = []

    def look(x: Tensor, of: nn.Module = bn) -> Tensor:
        output = of(x)
        seen.append(case.normalising.call(x, output))
        return output

    look(x)
    assert seen.pop() is not None
    checkpoint(look, x, use_reentrant=False)  # to unpack them would take another pass
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        look(x)
    with torch.no_grad():
        look(x)
    look(x, bn.eval())
    look(x, Scaled(4).double())
    look(case.leaf, bn.train())  # nothing comes before it that could be asked
    call = case.normalising.call
    seen += [call(x, output) for output in (bn(x) + 1.0, bn(2.0 * x), bn(x.detach()), x, (bn(x),))]
    alone = nn.BatchNorm2d(4, track_running_stats=False).double()
    torch.func.grad(lambda x: look(x, alone).sin().sum())(x.detach())
    assert seen == [None] * 12


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


# --- penalties on whole networks -----------------------------------------------------------------


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4), nn.BatchNorm1d(4)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Linear(4, 3)).double()


def penalty_of(model: nn.Module) -> ek.QuadraticPenalty:
    anchor = {name: W + 0.1 for name, W in ek.merged_weights(model).items()}
    return ek.QuadraticPenalty(model, [], anchor, damping=0.1)


X, Y = torch.randn(32, 6, dtype=torch.float64), torch.arange(32) % 3


def loss_of(model: nn.Module) -> Tensor:
    return nn.functional.cross_entropy(model(X), Y)


def fail(gradient: Tensor) -> None:
    raise MemoryError


def failed_pass(model: nn.Module, penalty: ek.QuadraticPenalty) -> None:
    total = loss_of(model) + penalty()
    handle = model[3].weight.register_hook(fail)
    with pytest.raises(MemoryError):
        total.backward()
    handle.remove()


def gradient_of_an_output(model: nn.Module, penalty: ek.QuadraticPenalty) -> None:
    h = model[1](model[0](X))
    loss = nn.functional.cross_entropy(model[2:](h), Y)
    torch.autograd.grad(loss + penalty(), h)


@pytest.mark.parametrize("use", [failed_pass, gradient_of_an_output])
def test_what_was_not_gone_back_through_is_freed(use):
    model, alive = network(), []
    with penalty_of(model) as penalty:
        model[1].register_forward_hook(lambda _, args, __: alive.append(weakref.ref(args[0])))
        (loss_of(model) + penalty()).backward()
        for _ in range(5):
            use(model, penalty)
        (loss_of(model) + penalty()).backward()
    del penalty
    gc.collect()
    held = [x() for x in alive if x() is not None]
    # By the traceback of the last failure, which pytest keeps.
    assert len(held) <= (use is failed_pass)


NAMES = [name for name, _ in network().named_parameters()]


@pytest.mark.parametrize("wanted", [*combinations(NAMES, 1), *combinations(NAMES, 2)])
def test_gradients_of_any_parameters_are_those_of_all(wanted):
    model = network()
    with penalty_of(model) as penalty:
        (loss_of(model) + penalty()).backward()
        expected = [model.get_parameter(name).grad.clone() for name in wanted]
        total = loss_of(model) + penalty()
        got = torch.autograd.grad(total, [model.get_parameter(name) for name in wanted])
    torch.testing.assert_close(list(got), expected)


class TwoHeads(nn.Module):
    """Of two outputs, of which a loss may leave out one."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU())
        self.head, self.other = nn.Linear(5, 3), nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x)
        return self.head(h), self.other(h)


def test_an_output_that_a_hook_of_the_whole_model_lets_no_gradient_through():
    gradients = []
    for hooked in (True, False):
        torch.manual_seed(0)
        model = TwoHeads().double()
        if hooked:
            model.register_full_backward_hook(lambda *_: None)
        with penalty_of(model) as penalty:
            for _ in range(2):
                model.zero_grad()
                (model(X.clone().requires_grad_())[0].logsumexp(1).mean() + penalty()).backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore")
def test_compiled_autograd():
    from torch._dynamo import compiled_autograd

    model, gradients = network(), []
    with penalty_of(model) as penalty:
        for compiled in (False, True, True):
            model.zero_grad()
            total = loss_of(model) + penalty()
            with ExitStack() as stack:
                if compiled:
                    compiler = torch.compile(backend="eager")
                    stack.enter_context(compiled_autograd._enable(compiler))
                total.backward()
            gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(gradients[2], gradients[0])
