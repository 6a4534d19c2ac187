"""Stable steps of all layers together, on the whole of the new task's loss."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call

import ekfac_rs as ek
from ekfac_rs import StabilityWarning
from ekfac_rs._lanczos import start_vector, top_eigenpair
from ekfac_rs.errors import NonFiniteError, NumericalError, OptionError
from ekfac_rs.experiments.data import image_features, load_mnist_subset
from nets import Averaging, classification_loader, mlp

LR, SCALE = 20.0, 2.0
OLD = classification_loader(5, 3, seed=0)
NEW = classification_loader(5, 3, seed=1)[0]
LAYERS = (("0", "1"), ("3", "4"), ("6", None))


def deep():
    """Two hidden layers with gains around 1, at the anchor of an old task."""
    model = mlp(5, 7, 7, 3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.weight.data.abs_().add_(0.5)
    return model


def held(model, **options):
    curvature = ek.estimate_curvature(
        model, OLD, approximation="kfac-expand", generator=torch.Generator().manual_seed(0)
    )
    options = {"scale": SCALE, "damping": 0.01, **options}
    return ek.QuadraticPenalty(model, curvature, ek.merged_weights(model), **options), curvature


def new_loss(model):
    return 4.0 * nn.functional.cross_entropy(model(NEW[0]), NEW[1])


def dense_hessian(model, curvature):
    """Of the new loss, all of it, and of the penalty, layer by layer; float64 and autograd."""
    names = [name for name, _ in model.named_parameters()]
    values = [p.detach() for p in model.parameters()]

    def unpacked(v):
        parts = v.split([x.numel() for x in values])
        return {n: part.view_as(x) for n, part, x in zip(names, parts, values, strict=True)}

    def loss(v):
        outputs = functional_call(model, unpacked(v), (NEW[0],))
        return 4.0 * nn.functional.cross_entropy(outputs, NEW[1])

    anchor = ek.merged_weights(model)
    # What each layer sees, a constant: its penalty moves with its own parameters.
    seen, x = {}, NEW[0]
    for name, module in model.named_children():
        seen[name] = x.detach()
        x = module(x)

    def penalty(v):
        parameters, total = unpacked(v), 0.0
        for name, batchnorm in LAYERS:
            W, b = parameters[f"{name}.weight"], parameters[f"{name}.bias"]
            if batchnorm is not None:
                module = model.get_submodule(batchnorm)
                z = seen[name] @ W.T + b
                of_batch = module.training
                mean = z.mean(0) if of_batch else module.running_mean
                variance = z.var(0, unbiased=False) if of_batch else module.running_var
                gain = parameters[f"{batchnorm}.weight"] / (variance + module.eps).sqrt()
                W, b = gain[:, None] * W, parameters[f"{batchnorm}.bias"] + gain * (b - mean)
            # The gradient at the anchor vanishes, and with it what bends the merged weights.
            D = (torch.cat([W, b[:, None]], 1) - anchor[name]).flatten()
            H = SCALE * curvature[name].dense()
            total = total + 0.5 * D @ H @ D + 0.005 * D @ D
        return total

    flat = torch.cat([x.flatten() for x in values])
    H = torch.autograd.functional.hessian(lambda v: loss(v), flat)
    return H + torch.autograd.functional.hessian(penalty, flat)


def multiplied(model, penalty, **options):
    """The matrix that gradients of all parameters are multiplied by."""
    parameters = list(model.parameters())
    columns = []
    for unit in torch.eye(sum(p.numel() for p in parameters), dtype=torch.float64):
        model(NEW[0])
        penalty()
        for p, part in zip(parameters, unit.split([p.numel() for p in parameters]), strict=True):
            p.grad = part.view_as(p).clone()
        penalty.precondition(LR, **options)
        columns.append(torch.cat([p.grad.flatten() for p in parameters]))
    return torch.stack(columns, 1)


@pytest.fixture(params=["eval", "train"])
def situation(request):
    """A model whose statistics are those of the new mini-batch, so that both modes are at the
    anchor, with penalty and exact Hessian.
    """
    model = deep()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.momentum = 1.0
    model(NEW[0])  # the running variance is unbiased
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_var *= (len(NEW[0]) - 1) / len(NEW[0])
            module.momentum = 0.0
    model.train(request.param == "train")
    penalty, curvature = held(model)
    with penalty:
        yield model, penalty, dense_hessian(model, curvature)


@pytest.mark.parametrize(("momentum", "share"), [(0.0, 1.0), (0.9, 1.0), (0.9, 0.5)])
def test_steps_are_as_long_as_the_exact_hessian_of_the_whole_allows(situation, momentum, share):
    model, penalty, H = situation
    options = {"loss": lambda: new_loss(model), "momentum": momentum, "step_lr": share * LR}
    alone = torch.linalg.eigvals(share * LR * multiplied(model, penalty) @ H).real.max()
    together = torch.linalg.eigvals(share * LR * multiplied(model, penalty, **options) @ H)
    limit = 1.5 * (1.0 + momentum)
    assert float(alone) > 1.3 * limit
    assert 0.95 * limit < float(together.real.max()) < 1.06 * limit


def test_steps_that_are_short_enough_stay_as_they_are(situation):
    model, penalty, _ = situation

    def gradients(**options):
        (new_loss(model) + penalty()).backward()
        penalty.precondition(1e-3, **options)
        found = [p.grad for p in model.parameters()]
        model.zero_grad()
        return found

    without, together = gradients(), gradients(loss=lambda: new_loss(model))
    assert all(map(torch.equal, without, together))


def test_nothing_of_the_users_is_touched_by_a_look():
    torch.manual_seed(3)
    model = nn.Sequential(*list(deep())[:-1], nn.Dropout(0.5), nn.Linear(7, 3).double())
    x, y = NEW
    penalty, _ = held(model)
    with penalty:
        (nn.functional.cross_entropy(model(x), y) + penalty()).backward()
        before = copy.deepcopy(model.state_dict())
        random, modes = torch.get_rng_state(), [m.training for m in model.modules()]
        ratios = [p.grad.clone() for p in model.parameters()]
        calls = []

        def loss():
            calls.append([m.training for m in model.modules()])
            return 100.0 * nn.functional.cross_entropy(model(x), y)

        penalty.precondition(LR, loss=loss)
        assert calls == [modes]
        assert torch.equal(random, torch.get_rng_state())
        assert modes == [m.training for m in model.modules()]
        assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)
        # All parameters, those too that no layer's steps would have touched, in the end.
        assert all(
            float(p.grad.norm()) < 0.9 * float(g.norm())
            for p, g in zip(model.parameters(), ratios, strict=True)
            if float(g.norm()) > 1e-9
        )
        # The look was no pass that penalty() takes for the model's.
        penalty()


def test_a_loss_without_second_derivatives_warns_once_and_steps_go_layer_by_layer():
    model = deep().eval()
    penalty, _ = held(model)

    def gradients(loss):
        (new_loss(model) + penalty()).backward()
        penalty.precondition(LR, loss=loss)
        found = [p.grad for p in model.parameters()]
        model.zero_grad()
        return found

    def once():
        return nn.functional.multi_margin_loss(model(NEW[0]), NEW[1])

    with penalty:
        without = gradients(None)
        with pytest.warns(StabilityWarning, match="expected a loss with second derivatives.*mult"):
            assert all(map(torch.equal, without, gradients(once)))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            gradients(once)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss": lambda: 1.0}, "loss: expected a call to return a real scalar tensor, got 1.0"),
        ({"loss": lambda: torch.ones(3)}, r"loss: .*, got 'torch.float32 of shape \(3,\)'"),
        ({"loss": lambda: torch.ones(()) * 1j}, "loss: .*, got 'torch.complex64 of shape"),
        ({"loss": lambda: torch.ones(())}, "loss: expected a tensor with gradients, got one with"),
        ({"loss": torch.ones(())}, "loss: expected a callable that returns it, got a Tensor"),
        (
            {"loss": lambda: torch.ones((), requires_grad=True) * 2.0},
            "loss: expected one of the model's parameters, got one of others",
        ),
        ({"momentum": -1.0}, "momentum"),
        ({"momentum": 5.0}, "momentum: expected at most 1, got 5"),
        ({"step_lr": 2.0 * LR}, "step_lr: expected at most lr, 20, got 40"),
        ({"step_lr": float("nan")}, "step_lr"),
    ],
)
def test_what_is_no_loss_is_refused_and_changes_nothing(options, words):
    model = deep().eval()
    penalty, _ = held(model)
    with penalty:
        (new_loss(model) + penalty()).backward()
        before = [p.grad.clone() for p in model.parameters()]
        with pytest.raises(OptionError, match=words):
            penalty.precondition(LR, **options)
        with pytest.raises(NonFiniteError, match="loss: expected a finite value, got inf"):
            penalty.precondition(LR, loss=lambda: new_loss(model) * float("inf"))
        assert all(map(torch.equal, before, [p.grad for p in model.parameters()]))


def test_users_own_errors_come_through():
    model = deep().eval()
    penalty, _ = held(model)

    def raising(*args):
        raise RuntimeError("a user's own")

    with penalty:
        (new_loss(model) + penalty()).backward()
        with pytest.raises(RuntimeError, match="a user's own"):
            penalty.precondition(LR, loss=raising)
        handle = model[0].weight.register_hook(raising)
        with pytest.raises(RuntimeError, match="a user's own"):
            penalty.precondition(LR, loss=lambda: new_loss(model))
        handle.remove()


def shortened(model, penalty, lr, **options):
    """What a call multiplies gradients by, beside the layers' own steps."""
    norms = []
    for loss in (None, lambda: new_loss(model)):
        model.zero_grad()
        (new_loss(model) + penalty()).backward()
        penalty.precondition(lr, loss=loss, **options)
        norms.append(float(torch.cat([p.grad.flatten() for p in model.parameters()]).norm()))
    return norms[1] / norms[0]


@pytest.mark.parametrize("lrs", [(LR, 1e-3), (1e-3, LR), (LR, 1.0, 0.1), (0.01, 0.1, 1.0, LR)])
def test_another_learning_rate_is_looked_at_by_itself(lrs):
    model = deep().eval()
    penalty, _ = held(model)
    with penalty:
        for lr in lrs:
            found = shortened(model, penalty, lr)
        with held(model)[0] as fresh:
            alone = shortened(model, fresh, lrs[-1])
        # What is prepared for more has some room.
        assert found == pytest.approx(alone, rel=0.35)
        assert (alone < 0.5) == (lrs[-1] == LR) or alone == 1.0


def test_steps_become_longer_by_twice_at_most_from_one_look_to_the_next():
    model = deep().eval()
    penalty, _ = held(model)
    found = []
    with penalty:
        for weight in (1.0, 1e-3, 1e-3):
            # The same one, and another one: steps are made ready anew.
            _, own = held(model)
            model.zero_grad()
            (new_loss(model) + penalty()).backward()
            penalty.precondition(LR, own, loss=lambda weight=weight: weight * new_loss(model))
            found.append(float(torch.cat([p.grad.flatten() for p in model.parameters()]).norm()))
    assert found[1] == pytest.approx(2.0 * found[0], rel=1e-6)
    assert found[2] == pytest.approx(4.0 * found[0], rel=1e-6)


def test_parameters_without_gradients_at_first_are_seen_when_they_have_some():
    model = deep().eval()
    with held(model)[0] as penalty:
        (new_loss(model) + penalty()).backward()
        found = [p.grad for p in model.parameters()]
        model.zero_grad()
        penalty.precondition(LR, loss=lambda: new_loss(model))
        for p, gradient in zip(model.parameters(), found, strict=True):
            p.grad = gradient.clone()
        # One that is frozen in between has a gradient still.
        model[0].weight.requires_grad_(False)
        penalty.precondition(LR, loss=lambda: new_loss(model))
        assert float(model[6].bias.grad.norm()) < 0.3 * float(found[-1].norm())


def test_buffers_of_all_modules_stay_those_of_the_training_steps():
    loader = classification_loader(5, 3, dtype=torch.float32)

    def buffers_after(own):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = nn.Sequential(
                nn.Unflatten(1, (1, 5)),
                nn.Conv1d(1, 4, 3),
                nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
                Averaging(),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(12, 3),
            )
        generator = torch.Generator().manual_seed(0)
        learner = ek.ContinualLearner(model, own=own, damping=0.01, generator=generator)
        learner.fit(loader, lr=0.1)
        learner.consolidate(loader)
        learner.fit(loader, epochs=3, lr=0.0)
        return list(model.buffers())

    assert all(map(torch.equal, buffers_after(False), buffers_after(True)))


def test_a_loss_is_looked_at_under_the_autocast_of_its_caller():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    loader = [(x.bfloat16(), y) for x, y in OLD]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        learner = ek.ContinualLearner(model, own=True, damping=0.01)
        for _ in range(2):
            history = learner.fit(loader, epochs=3, lr=0.1)
            learner.consolidate(loader)
    assert history[-1]["loss"] < history[0]["loss"]


class Deviation(nn.Module):
    """Standard deviations of halves, whose second derivative is NaN where they are 0."""

    def forward(self, x):
        return torch.stack([x[:, :4].std(1), x[:, 4:].std(1)], 1)


def test_second_derivatives_that_are_not_finite_warn_and_training_goes_on():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), Deviation(), nn.Linear(2, 3))
    model[0].bias.data[:4] = -100.0
    with held(model.double().train())[0] as penalty:
        (new_loss(model) + penalty()).backward()
        with pytest.warns(StabilityWarning, match="second derivatives"):
            penalty.precondition(LR, loss=lambda: new_loss(model))


class Attending(nn.Module):
    """Attention by torch's fused kernel, which has no second derivative."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(5, 6).double()
        self.outer = nn.Linear(6, 3).double()

    def forward(self, x):
        q = self.inner(x)[None, None]
        return self.outer(nn.functional.scaled_dot_product_attention(q, q, q)[0, 0])


def test_attention_goes_by_products_that_can_be_differentiated_twice():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Attending()
    penalty, _ = held(model)

    def gradients(loss):
        (new_loss(model) + penalty()).backward()
        penalty.precondition(LR, loss=loss)
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    with penalty:
        without = gradients(None)
        model.zero_grad()
        together = gradients(lambda: 10.0 * new_loss(model))
    assert float(together.norm()) < 0.5 * float(without.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "spectrum", [[-1.0], [-2.0, -2.0, -2.0], [0.0, 0.0], [-5.0, 0.0, 1e-3], [-50.0, -3.0, 2.0, 7.0]]
)
def test_the_top_of_an_indefinite_operator_is_found(spectrum, dtype):
    values = torch.tensor(spectrum, dtype=dtype)
    top, vector = top_eigenpair(lambda v: values * v, start_vector(len(values), values))
    assert top == pytest.approx(max(spectrum), rel=1e-4, abs=1e-5)
    assert torch.isfinite(vector).all()


def second_task(lr):
    """Losses of a deep network's second task of permuted images, with BatchNorms frozen early."""
    images = load_mnist_subset()
    x, y = image_features(images.train_images[:4000]), torch.tensor(images.train_labels[:4000])
    generator = torch.Generator().manual_seed(0)
    model = mlp(784, *(100,) * 6, 10, dtype=torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.BatchNorm1d):
                module.reset_parameters()
    learner = ek.ContinualLearner(
        model,
        approximation="kfac-expand",
        statistics="running",
        freeze_bn_after=0.2,
        own=True,
        damping=0.01,
        generator=torch.Generator().manual_seed(0),
    )
    for _ in range(2):
        order = torch.randperm(784, generator=generator)
        loader = list(zip(x[:, order].split(256), y.long().split(256), strict=True))
        history = learner.fit(loader, epochs=2, lr=lr)
        learner.consolidate(loader)
    return [epoch["loss"] for epoch in history]


def test_a_deep_networks_steps_hold_where_those_of_its_layers_alone_do_not(monkeypatch):
    first, second = second_task(0.2)
    assert second < 0.3 * first

    original = ek.QuadraticPenalty.precondition

    def layer_by_layer(self, *args, loss, **options):
        return original(self, *args, **options)

    monkeypatch.setattr(ek.QuadraticPenalty, "precondition", layer_by_layer)
    try:
        _, alone = second_task(0.2)
    except NumericalError:
        return
    assert alone > 3.0 * second
