"""Gradients come one at a time: the same numbers, without all of them in memory at once."""

import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import ekfac_rs as ek
from cases import NETWORKS
from ekfac_rs.curvature.accumulators import KroneckerAccumulator
from ekfac_rs.curvature.gradients import Gradients
from ekfac_rs.errors import UnsupportedLayerError
from memory import needs_proc
from processes import in_fresh_process


class AllAtOnce(Gradients):
    """What is handed over here is what one call of autograd returns for all places."""

    def __init__(self):
        super().__init__()
        self.values = {}

    def watch(self, name, value):
        self.values[name] = get_gradient_edge(value)

    def clear(self):
        self.values.clear()

    def hand_over(self, outputs, score, take, *, keep_graph):
        gradients = torch.autograd.grad(
            outputs,
            list(self.values.values()),
            grad_outputs=score,
            retain_graph=True,
            allow_unused=True,
        )
        for name, g in zip(self.values, gradients, strict=True):
            take(name, g)
        return frozenset(self.values)


def tripled(value):
    """Let a hook of the user's change the gradient that goes on."""
    if value.requires_grad:
        value.register_hook(lambda g: 3.0 * g)


class Branches(nn.Module):
    """Two towers, of which neither is behind the other, a skip connection and user's hooks."""

    def __init__(self, checkpointed=False):
        super().__init__()
        self.left, self.right = nn.Linear(6, 5), nn.Linear(6, 5)
        self.norm = nn.BatchNorm1d(5)
        self.middle, self.last = nn.Linear(5, 5), nn.Linear(5, 4)
        self.checkpointed = checkpointed

    def forward(self, x):
        left, right = self.norm(self.left(x)), self.right(x)
        for value in (left, right):
            tripled(value)
        h = F.relu(left, inplace=True) + right.tanh()
        h = checkpoint(self.tail, h, use_reentrant=False) if self.checkpointed else self.tail(h)
        return self.last(h)

    def tail(self, h):
        m = self.middle(h)
        tripled(m)
        return h + m.tanh()


def branches(checkpointed):
    torch.manual_seed(0)
    model = Branches(checkpointed).double()
    x = torch.randn(8, 6, dtype=torch.float64)
    return model, [(x, torch.arange(8) % 4), (x[:5] + 1.0, torch.arange(5) % 4)]


MODELS = {
    **{
        name: lambda row=row: (row.make(), row.batches("cross_entropy", (6, 4)))
        for name, row in NETWORKS.items()
    },
    "branches": lambda: branches(False),
    "branches, checkpointed": lambda: branches(True),
}
OPTIONS = {
    "sampled labels": {"draws": 2},
    "columns": {"labels": "type2", "coordinates": "raw"},
    "diagonal": {"approximation": "diagonal", "statistics": "running"},
    "corrected": {"correction": "eigenvalues"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", MODELS)
def test_the_same_numbers_as_all_gradients_at_once(name, options, monkeypatch):
    model, batches = MODELS[name]()

    def estimate():
        generator = torch.Generator().manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ek.estimate_curvature(model, batches, generator=generator, **options)

    found = estimate()
    monkeypatch.setattr("ekfac_rs.curvature.passes.Gradients", AllAtOnce)
    expected = estimate()
    assert list(found) == list(expected)
    for layer, block in expected.items():
        tensors = found[layer].tensors()
        assert tensors.keys() == block.tensors().keys()
        for key, tensor in block.tensors().items():
            assert torch.equal(tensors[key], tensor), (layer, key)


def chain(depth):
    layers = [nn.Linear(8, 8) for _ in range(depth)]
    return nn.Sequential(*(m for layer in layers for m in (layer, nn.Tanh())))


def alive_at_once(draws):
    """Most gradients of layers that were alive at any time of a pass."""
    model = chain(12)
    gradients = Gradients()
    x = torch.randn(4, 8)
    for index, module in enumerate(model):
        x = module(x)
        if isinstance(module, nn.Linear):
            gradients.watch(str(index), x)
    alive, most = weakref.WeakSet(), []

    def take(name, g):
        alive.add(g)
        most.append(len(alive))

    for draw in range(draws):
        reached = gradients.hand_over(x, torch.ones_like(x), take, keep_graph=draw + 1 < draws)
        assert len(reached) == 12
    gradients.clear()
    return max(most)


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("together", [0, 2, 5])
def test_few_gradients_are_there_at_a_time(together, draws, monkeypatch):
    of_one = 4 * 8 * 4
    monkeypatch.setattr("ekfac_rs.curvature.gradients._TOGETHER", together * of_one)
    # Those that wait for each other, and the one that comes and is too much.
    assert alive_at_once(draws) <= together + 2


@pytest.mark.parametrize("behind", [False, True], ids=["foremost", "others behind"])
def test_of_two_values_of_a_name_it_is_the_last(behind):
    gradients, taken = Gradients(), []
    x = torch.ones(2, requires_grad=True)
    first = 2.0 * x
    if behind:
        gradients.watch("behind", first)
    for value in (3.0 * first, 5.0 * first):
        gradients.watch("twice", value)
        first = value
    gradients.hand_over(
        7.0 * first, torch.ones(2), lambda name, g: taken.append((name, g[0])), keep_graph=False
    )
    assert ("twice", 7.0) in taken
    assert len(taken) == 1 + behind
    gradients.clear()


def test_a_graph_that_nobody_needs_any_more_is_freed_on_the_way():
    model = chain(3)
    x = torch.randn(4, 8)
    gradients = Gradients()
    h = model[0](x)
    gradients.watch("0", h)
    outputs = model[1:](h)
    gradients.hand_over(outputs, torch.ones_like(outputs), lambda name, g: None, keep_graph=True)
    gradients.hand_over(outputs, torch.ones_like(outputs), lambda name, g: None, keep_graph=False)
    with pytest.raises(RuntimeError, match="second time"):
        outputs.sum().backward()


class Keeps(nn.Module):
    """Keeps what passes through it, and may fail on the way back."""

    def __init__(self, fails):
        super().__init__()
        self.fails = fails
        self.kept = []

    def forward(self, x):
        if self.fails and x.requires_grad:
            x.register_hook(broken)
        self.kept.append(x)
        return x


def broken(*args):
    raise RuntimeError("broken on the way back")


@pytest.mark.parametrize("place", ["the model's backward", "an accumulator"])
def test_a_pass_that_fails_on_its_way_back_leaves_no_hook(place, monkeypatch):
    keeps = Keeps(fails=place == "the model's backward")
    model = nn.Sequential(nn.Linear(4, 4), keeps, nn.Tanh(), nn.Linear(4, 3), nn.Tanh())
    if place == "an accumulator":
        monkeypatch.setattr(KroneckerAccumulator, "add_gradients", broken)
    with pytest.raises(RuntimeError, match="broken on the way back"):
        ek.estimate_curvature(model, [(torch.randn(6, 4), torch.arange(6) % 3)])
    assert len(keeps.kept[-1]._backward_hooks or ()) == keeps.fails
    assert all(p.grad is None for p in model.parameters())


def test_a_pass_leaves_no_hook_on_what_a_model_keeps():
    keeps = Keeps(fails=False)
    model = nn.Sequential(nn.Linear(4, 4), keeps, nn.Tanh(), nn.Linear(4, 3))
    ek.estimate_curvature(model, [(torch.randn(6, 4), torch.arange(6) % 3)])
    assert not keeps.kept[-1]._backward_hooks


def test_a_layer_that_the_loss_does_not_depend_on_is_named():
    class Ignores(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.ignored = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            return self.used(x) + self.ignored(x).detach()

    with pytest.raises(UnsupportedLayerError, match="'ignored'.*no gradient"):
        ek.estimate_curvature(Ignores(), [(torch.randn(6, 4), torch.arange(6) % 3)])


def test_no_layer_that_the_loss_depends_on_is_no_error_of_torch():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            return self.layer(x).detach()

    with pytest.raises(UnsupportedLayerError, match="'layer'.*no gradient"):
        ek.estimate_curvature(Constant(), [(torch.randn(6, 4), torch.arange(6) % 3)])


# One process for each: what it once had in memory is its own.
PEAK = """
import torch
from torch import nn
from torch.nn import functional as F
import ekfac_rs as ek
from memory import peak_above

layers = []
for _ in range(16):
    layers += [nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)]
model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))
x, y = torch.randn(32, 4, 96, 96), torch.arange(32) % 4

def bare(x, y):
    F.cross_entropy(model(x), y).backward()
    model.zero_grad()

def ours(x, y):
    ek.estimate_curvature(model, [(x, y)], approximation="kfac-expand")

torch.set_num_threads(1)
work = {"bare": bare, "ours": ours}[which]
work(x[:2, :, :8, :8], y[:2])
print(peak_above(lambda: work(x, y)))
"""


@needs_proc
def test_a_pass_peaks_hardly_above_bare_forward_and_backward():
    def peak(which):
        return int(in_fresh_process(f"which = {which!r}\n{PEAK}"))

    activation = 32 * 4 * 96 * 96 * 4
    bare, ours = peak("bare"), peak("ours")
    assert bare > 32 * activation  # so that it is activations which are measured
    # The gradients of all layers at once would be 16 of them.
    assert ours - bare < 4 * activation
