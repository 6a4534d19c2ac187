"""What an attempt to break the library found, each as the kind of thing it is."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ekfac_rs as ek
from ekfac_rs import errors
from nets import classification_loader, mlp


def loader(seed=0, examples=64):
    return classification_loader(5, 3, seed=seed, examples=examples)


def student():
    model = copy.deepcopy(mlp(5, 7, 6, 3)).train()
    curvature = ek.estimate_curvature(model, loader(), labels="type2")
    penalty = ek.QuadraticPenalty(model, curvature, ek.merged_weights(model))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    return model, penalty, loader()[0][0]


def unchanged(model, before):
    after = model.state_dict()
    return all(torch.equal(after[key], before[key]) for key in before)


# --- whose pass, and whose weights ----------------------------------------------------------------


def test_a_curvature_taken_between_forward_and_penalty_is_not_a_pass_of_the_student():
    model, penalty, x = student()
    model(x)
    expected = penalty().detach()
    ek.estimate_curvature(model, loader(seed=5, examples=16))
    torch.testing.assert_close(penalty().detach(), expected, rtol=0, atol=0)


def other_weights(model, x):
    weights = {name: p + 0.5 for name, p in model.named_parameters()}
    torch.func.functional_call(model, weights, (x,))


def data_replaced(model, x):
    model[0].weight.data = model[0].weight.data + 0.3


def assigned(model, x):
    state = {name: p + 0.3 for name, p in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


@pytest.mark.parametrize("change", [other_weights, data_replaced, assigned])
def test_weights_that_are_not_those_of_the_last_pass_are_noticed(change):
    model, penalty, x = student()
    model(x)
    change(model, x)
    with pytest.raises(errors.ModelChangedError, match="'0'"):
        penalty()


class Keywords(nn.Module):
    """Calls its BatchNorm by keyword."""

    def __init__(self):
        super().__init__()
        self.inner, self.norm, self.head = nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.norm(input=self.inner(x))))


def test_a_batchnorm_called_by_keyword_is_like_any_other():
    model = Keywords().double().train()
    curvature = ek.estimate_curvature(model, loader())
    ek.reparameterize(model, loader())
    with ek.QuadraticPenalty(model, curvature, ek.merged_weights(model)) as penalty:
        model(loader()[0][0])
        assert penalty().isfinite()
    ek.merge_batchnorm(model)
    with pytest.raises(errors.BatchNormError, match="'norm'"):
        model(loader()[0][0])


class OnItsBehalf(Keywords):
    """Calls the function of its BatchNorm, not the module."""

    def forward(self, x):
        b = self.norm
        statistics = b.running_mean, b.running_var, b.weight, b.bias
        h = F.batch_norm(self.inner(x), *statistics, b.training, b.momentum, b.eps)
        return self.head(torch.tanh(h))


def test_a_batchnorm_whose_input_nothing_sees_takes_no_statistics():
    model = OnItsBehalf().double()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(errors.UnsupportedLayerError, match="'norm'.*called as a module"):
        ek.reparameterize(model, loader())
    assert unchanged(model, before)


@pytest.mark.parametrize("where", [0, 1])
def test_a_trace_does_not_guess_what_hooks_do(where):
    model = mlp(5, 7, 6, 3)
    model[where].register_forward_hook(lambda module, args, output: 2.0 * output)
    for call in (ek.merged_weights, ek.merge_batchnorm, ek.describe):
        with pytest.raises(errors.UnsupportedLayerError, match=f"'{where}'.*hooks.*example="):
            call(model)
    x = loader()[0][0]
    before = model.eval()(x)
    ek.merge_batchnorm(model, example=x)
    torch.testing.assert_close(model(x), before)


# --- the stable learning rate where inputs hardly vary -------------------------------------------


@pytest.mark.parametrize("scale", [1e-6, 1e-5, 1e-4])
def test_dead_channels_before_a_depthwise_convolution_leave_the_bound_finite(scale):
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)),
    ).double()
    model[1].weight.data[:4], model[1].bias.data[:4] = scale, 0.7
    x, y = torch.randn(32, 3, 8, 8, dtype=torch.float64), torch.randint(3, (32,))
    bounds = []
    for dtype in (torch.float32, torch.float64):
        own = copy.deepcopy(model).to(dtype)
        ek.reparameterize(own, [x.to(dtype)])
        curvature = ek.estimate_curvature(own, [(x.to(dtype), y)], labels="type2")
        penalty = ek.QuadraticPenalty(own.train(), curvature, ek.merged_weights(own))
        bounds.append(penalty.max_stable_lr())
    assert bounds[0] == pytest.approx(bounds[1], rel=0.05)


def test_a_row_of_zeros_keeps_its_running_variance():
    model = mlp(5, 7, 6, 3)
    model[0].weight.data[2] = 0.0
    with torch.no_grad():
        model[1].running_var.fill_(1.0)
        model[1].running_mean.zero_()
    curvature = ek.estimate_curvature(model, loader())
    penalty = ek.QuadraticPenalty(model, curvature, ek.merged_weights(model))
    bounds = [penalty.max_stable_lr() for training in (True, False) if model.train(training)]
    assert 0.1 < bounds[0] / bounds[1] < 10.0


# --- all or nothing ------------------------------------------------------------------------------


def test_statistics_that_half_precision_cannot_hold_are_refused():
    model = mlp(5, 7, 3).half()
    with torch.no_grad():
        model[0].weight.mul_(2000.0)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(errors.NonFiniteError, match=r"float16 can hold"):
        ek.reparameterize(model, [x.half() for x, _ in loader()])
    assert unchanged(model, before)


def trained(tasks=1, **options):
    learner = ek.ContinualLearner(mlp(5, 7, 6, 3), damping=0.01, **options)
    for seed in range(tasks):
        learner.fit(loader(seed))
        learner.consolidate(loader(seed))
    return learner


@pytest.mark.parametrize("broken", ["missing", "shape", "anchor", "factor"])
def test_a_learners_state_is_loaded_whole_or_not_at_all(broken):
    learner = trained()
    state = copy.deepcopy(learner.state_dict())
    if broken == "missing":
        del state["model"]["6.bias"]
    elif broken == "shape":
        state["model"]["6.bias"] = torch.zeros(4)
    elif broken == "anchor":
        state["anchor"]["more"] = {}
    else:
        del state["curvatures"][0][0]["0.0.A"]
    learner.fit(loader(1))
    before = copy.deepcopy(learner.model.state_dict())
    with pytest.raises(errors.IncompatibleError, match="state"):
        learner.load_state_dict(state)
    assert unchanged(learner.model, before)
    assert learner.task == 1


class Failing(list):
    """A loader that fails in a pass of one's choice."""

    def __init__(self, batches, failing):
        super().__init__(batches)
        self.left = failing

    def __iter__(self):
        self.left -= 1
        for index, batch in enumerate(super().__iter__()):
            if self.left == 0 and index == 2:
                raise KeyboardInterrupt
            yield batch


def test_a_consolidation_that_fails_after_new_statistics_takes_them_back():
    learner = trained(freeze_bn_after=0.5)
    learner.fit(loader(1), epochs=2)
    before = copy.deepcopy(learner.model.state_dict())
    with pytest.raises(KeyboardInterrupt):
        learner.consolidate(Failing(loader(1), failing=2))
    assert unchanged(learner.model, before)
    learner.consolidate(loader(1))


def test_a_fit_that_fails_before_its_first_step_takes_its_statistics_back():
    learner = trained()
    before = copy.deepcopy(learner.model.state_dict())
    with pytest.raises(errors.LabelError):
        learner.fit([(x, y + 7) for x, y in loader(1)])
    assert unchanged(learner.model, before)


# --- freezing ------------------------------------------------------------------------------------


def test_freezing_freezes_every_batchnorm_of_the_model():
    learner = trained()
    for index in (0, 1):
        learner.model[index].requires_grad_(False)
    learner.freeze_bn_after = 0.0
    mean = learner.model[1].running_mean.clone()
    learner.fit(loader(1))
    assert torch.equal(learner.model[1].running_mean, mean)


def test_where_weights_are_frozen_gamma_is_all_the_scale_there_is():
    learner = trained()
    for index in (0, 3):
        learner.model[index].requires_grad_(False)
    learner.freeze_bn_after = 0.0
    gamma = learner.model[1].weight.detach().clone()
    learner.fit(loader(1))
    assert not torch.equal(learner.model[1].weight, gamma)


def test_an_export_leaves_no_frozen_layer_out():
    model = mlp(5, 7, 6, 3).eval()
    for index in (0, 1):
        model[index].requires_grad_(False)
    x = loader()[0][0]
    before = model(x)
    ek.merge_batchnorm(model)
    torch.testing.assert_close(model(x), before)
    for index in (1, 4):
        assert torch.equal(model[index].weight, torch.ones_like(model[index].weight))


def test_describe_tells_a_diagonal_from_a_kronecker_product():
    (first, *_) = ek.describe(mlp(5, 7, 3), approximation="diagonal").parameters
    assert first.block == "diagonal 7 x 6, merged with 1"


def test_a_tensor_is_no_loader():
    with pytest.raises(errors.OptionError, match="loader.*tensor"):
        ek.reparameterize(mlp(5, 7, 3), torch.randn(8, 5).double())
