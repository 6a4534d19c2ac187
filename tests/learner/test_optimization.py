"""Optimisers and schedules of the user's own, against the same loop written out."""

import copy
import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LinearLR, OneCycleLR, ReduceLROnPlateau

import ekfac_rs as ek
from ekfac_rs.errors import NumericalError, OptionError
from nets import classification_loader, mlp


def name_of(value):
    """Return what a test of this value is called, the same in every process."""
    return getattr(value, "__name__", None) or str(value)


LOADERS = [
    classification_loader(6, 3, examples=48, batch_size=12, seed=seed, dtype=torch.float32)
    for seed in (1, 2)
]
STEPS = 2 * len(LOADERS[0])


def net():
    return mlp(6, 8, 5, 3, dtype=torch.float32)


def cosine(optimizer, steps):
    return LambdaLR(optimizer, lambda step: 0.5 * (1.0 + math.cos(math.pi * step / steps)))


def written_out(model, loader, make, schedule=cosine, lr=0.02, penalty=None):
    """Two epochs as anyone would write them."""
    model.train()
    optimizer = make([p for p in model.parameters() if p.requires_grad], lr=lr)
    highest = max(group["lr"] for group in optimizer.param_groups)
    scheduler = None if schedule is None else schedule(optimizer, STEPS)
    for x, y in [*loader, *loader]:
        highest = max(highest, *(float(group["lr"]) for group in optimizer.param_groups))
        loss = nn.functional.cross_entropy(model(x), y)
        if penalty is not None:
            loss = loss + penalty()
        optimizer.zero_grad()
        loss.backward()
        if penalty is not None:
            penalty.precondition(highest)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def groups_of_their_own(parameters, lr):
    weights = [p for p in parameters if p.dim() == 2]
    others = [p for p in parameters if p.dim() < 2]
    return torch.optim.SGD(
        [{"params": weights, "lr": 0.5 * lr}, {"params": others, "lr": 3.0 * lr}], momentum=0.8
    )


def warm_up(optimizer, steps):
    return LinearLR(optimizer, start_factor=0.1, total_iters=steps // 2)


def one_cycle(optimizer, steps):
    return OneCycleLR(optimizer, max_lr=0.05, total_steps=steps)


OPTIMIZERS = {
    "adam": torch.optim.Adam,
    "adamw": partial(torch.optim.AdamW, weight_decay=0.1),
    "nesterov": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "groups": groups_of_their_own,
    "tensor lr": lambda parameters, lr: torch.optim.Adam(parameters, lr=torch.tensor(lr)),
}
SCHEDULERS = {"cosine": "cosine", "none": None, "warm-up": warm_up, "one cycle": one_cycle}


def same(model, expected):
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
def test_training_is_the_loop_written_out_bit_for_bit(make, scheduler):
    model = net()
    expected = copy.deepcopy(model)
    learner = ek.ContinualLearner(model, approximation=None, optimizer=make, scheduler=scheduler)
    learner.fit(LOADERS[0], epochs=2, lr=0.02)
    written_out(expected, LOADERS[0], make, cosine if scheduler == "cosine" else scheduler)
    same(model, expected)


@pytest.mark.parametrize("scheduler", ["cosine", warm_up, one_cycle], ids=name_of)
@pytest.mark.parametrize("make", [torch.optim.Adam, groups_of_their_own], ids=name_of)
def test_under_a_penalty_the_stable_step_takes_the_highest_rate_so_far(make, scheduler):
    learner = ek.ContinualLearner(
        net(), damping=0.01, scale=100.0, optimizer=make, scheduler=scheduler
    )
    learner.fit(LOADERS[0], epochs=2, lr=0.02)
    learner.consolidate(LOADERS[0])
    expected = copy.deepcopy(learner.model)
    learner.fit(LOADERS[1], epochs=2, lr=0.02)

    ek.reparameterize(expected, LOADERS[1])
    with ek.QuadraticPenalty(
        expected, learner.curvatures, learner.anchor, damping=0.01, scale=100.0
    ) as penalty:
        schedule = cosine if scheduler == "cosine" else scheduler
        written_out(expected, LOADERS[1], make, schedule, penalty=penalty)
    same(learner.model, expected)


def test_a_learning_rate_in_a_group_of_its_own_is_stable_where_explicit_steps_diverge():
    def fitted(step):
        learner = ek.ContinualLearner(
            net(),
            scale=300.0,
            step=step,
            optimizer=groups_of_their_own,
            scheduler=None,
            statistics="running",
            freeze_bn_after=0.0,
            generator=torch.Generator().manual_seed(0),
        )
        learner.fit(LOADERS[0], epochs=1, lr=0.002)
        learner.consolidate(LOADERS[0])
        return learner.fit(LOADERS[1], epochs=20, lr=0.1)[-1]

    assert fitted("stable")["penalty"] < 10.0
    with pytest.warns(ek.StabilityWarning), pytest.raises(NumericalError):
        fitted("explicit")


def test_the_warning_of_explicit_steps_knows_the_optimisers_own_rate_and_momentum():
    made = []

    def fast(parameters, lr):
        made.append(torch.optim.SGD(parameters, lr=1000.0 * lr, momentum=0.5))
        return made[-1]

    learner = ek.ContinualLearner(net(), scale=10.0, step="explicit", optimizer=fast)
    learner.fit(LOADERS[0], lr=0.0)
    learner.consolidate(LOADERS[0])
    with pytest.warns(ek.StabilityWarning, match=r"lr 1 .*momentum 0.5"):
        learner.fit(LOADERS[1], steps=1, lr=0.001)
    # Of an adaptive one no bound is known.
    learner.optimizer = torch.optim.Adam
    learner.fit(LOADERS[1], steps=1, lr=10.0)


@pytest.mark.parametrize(
    "make",
    [
        torch.optim.SGD,
        torch.optim.Adam,
        partial(torch.optim.AdamW, weight_decay=0.3),
        torch.optim.RMSprop,
        torch.optim.Adagrad,
        groups_of_their_own,
    ],
    ids=name_of,
)
def test_a_frozen_batchnorm_keeps_what_it_doubles_whatever_the_optimiser_remembers(make):
    kept = []
    learner = ek.ContinualLearner(
        net(), damping=0.01, statistics="running", freeze_bn_after=0.5, optimizer=make
    )
    learner.fit(LOADERS[0], lr=0.01)
    learner.consolidate(LOADERS[0])

    def keep(step, learner):
        kept.append({name: p.detach().clone() for name, p in learner.model.named_parameters()})

    learner.fit(LOADERS[1], epochs=2, lr=0.01, callback=keep)
    biases, gammas = {"0.bias", "3.bias"}, {"1.weight", "4.weight"}

    def still(before, after):
        return {name for name in before if torch.equal(before[name], after[name])}

    # In train mode a bias before a BatchNorm has no gradient but rounding.
    assert still(kept[0], kept[1]) <= biases
    assert still(kept[STEPS // 2 - 1], kept[-1]) == biases | gammas


def test_freezing_takes_nothing_out_of_an_optimiser_that_its_user_keeps():
    model = net()
    own = torch.optim.Adam(model.parameters())
    groups = [id(p) for p in own.param_groups[0]["params"]]
    learner = ek.ContinualLearner(
        model,
        statistics="running",
        freeze_bn_after=0.0,
        optimizer=lambda parameters, lr: own,
        scheduler=None,
    )
    for loader in LOADERS:
        learner.fit(loader)
        learner.consolidate(loader)
    assert [id(p) for p in own.param_groups[0]["params"]] == groups
    assert own.param_groups[0]["lr"] == 1e-3


class NoRate(torch.optim.Optimizer):
    """Signs of gradients, by a step that has no name."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(0.01 * p.grad.sign())


def test_an_optimiser_without_a_learning_rate_needs_explicit_steps():
    learner = ek.ContinualLearner(net(), optimizer=NoRate, scheduler=None)
    learner.fit(LOADERS[0])
    learner.consolidate(LOADERS[0])
    before = copy.deepcopy(learner.model.state_dict())
    with pytest.raises(OptionError, match="'lr' of every group.* group 0 of NoRate"):
        learner.fit(LOADERS[1])
    torch.testing.assert_close(learner.model.state_dict(), before, rtol=0, atol=0)
    learner.step = "explicit"
    learner.fit(LOADERS[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "adam"}, "callable of .parameters, lr=.*got str"),
        ({"optimizer": torch.optim.SGD(net().parameters())}, "got SGD"),
        ({"scheduler": "linear"}, "one of 'cosine', got 'linear'"),
        ({"scheduler": 3}, "got 3"),
    ],
)
def test_what_cannot_make_an_optimiser_or_scheduler_is_refused_at_once(options, message):
    with pytest.raises(OptionError, match=message):
        ek.ContinualLearner(net(), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": lambda parameters, lr: None}, "optimizer: .*got None"),
        ({"optimizer": lambda parameters, lr: net()}, "optimizer: .*got a Sequential"),
        (
            {"optimizer": lambda parameters, lr: torch.optim.SGD(net().parameters())},
            "model's parameters, got one of others",
        ),
        ({"optimizer": torch.optim.LBFGS}, "got a LBFGS, which needs 'closure'"),
        ({"scheduler": lambda optimizer, steps: None}, "scheduler: .*None leaves.*got None"),
        ({"scheduler": lambda optimizer, steps: optimizer}, "got a SGD"),
        (
            {"scheduler": lambda optimizer, steps: ReduceLROnPlateau(optimizer)},
            "ReduceLROnPlateau, which needs 'metrics'",
        ),
    ],
)
def test_what_is_no_optimiser_or_scheduler_is_refused_and_changes_nothing(options, message):
    learner = ek.ContinualLearner(net(), damping=0.01)
    learner.fit(LOADERS[0])
    learner.consolidate(LOADERS[0])
    before = copy.deepcopy(learner.model.state_dict())
    for name, value in options.items():
        setattr(learner, name, value)
    with pytest.raises(OptionError, match=message):
        learner.fit(LOADERS[1])
    torch.testing.assert_close(learner.model.state_dict(), before, rtol=0, atol=0)
    for module in learner.model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


class MoreThanPromised(list):
    def __len__(self):
        return super().__len__() - 2


@pytest.mark.parametrize("scheduler", ["cosine", one_cycle], ids=name_of)
def test_a_loader_that_yields_more_than_it_promised_keeps_the_last_rate(scheduler):
    rates = []

    def noted(parameters, lr):
        rates.append(torch.optim.SGD(parameters, lr=lr))
        return rates[0]

    learner = ek.ContinualLearner(net(), approximation=None, optimizer=noted, scheduler=scheduler)
    # A scheduler of one cycle refuses to be stepped past its end.
    learner.fit(
        MoreThanPromised(LOADERS[0]),
        callback=lambda _, learner: rates.append(rates[0].param_groups[0]["lr"]),
    )
    assert len(rates) == 1 + len(LOADERS[0])
    assert rates[1] != rates[2]
    assert rates[2] == rates[3] == rates[4]


def test_gradients_of_what_the_optimiser_does_not_hold_do_not_add_up():
    learner = ek.ContinualLearner(
        net(),
        approximation=None,
        optimizer=lambda parameters, lr: torch.optim.SGD(parameters[-2:], lr=lr),
    )
    gradients = []
    learner.fit(
        LOADERS[0][:1] * 3,
        lr=0.0,
        callback=lambda _, learner: gradients.append(learner.model[0].weight.grad.clone()),
    )
    assert gradients[0].any()
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)
