"""A learner as a callback of Lightning's trainer trains as a loop written by hand."""

import copy
import logging

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ekfac_rs as ek
from ekfac_rs.errors import IncompatibleError, ModelChangedError, OptionError
from extras import importing
from nets import mlp
from pages import PAGES, entries_of

with importing("lightning"):
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import Callback, ModelCheckpoint
    from lightning.pytorch.plugins.precision import MixedPrecision

    from ekfac_rs.integrations import lightning as lightning_of_ours
    from ekfac_rs.integrations.lightning import CurvatureCallback

# Lightning's own.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*num_workers.*|.*litlogger.*|.*GPU available.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
LR = 0.05


class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.network = mlp(8, 12, 12, 3)
        self.told = []

    def training_step(self, batch, number):
        x, y = batch
        loss = nn.functional.cross_entropy(self.network(x), y)
        self.log("loss", loss)
        return loss

    def on_train_batch_end(self, outputs, batch, number):
        self.told.append(outputs["loss"].item())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=LR, momentum=0.9)


def loaders(count=2, examples=80):
    generator = torch.Generator().manual_seed(3)
    found = []
    for _ in range(count):
        x = torch.randn(examples, 8, generator=generator, dtype=torch.float64)
        y = torch.randint(3, (examples,), generator=generator)
        found.append(DataLoader(TensorDataset(x, y), batch_size=16))
    return found


def learner_of(network, **options):
    options = {"scale": 3.0, "damping": 0.01, **options}
    return ek.ContinualLearner(network, generator=torch.Generator().manual_seed(0), **options)


def trainer(*callbacks, epochs=2, **options):
    options = {"logger": False, "enable_checkpointing": False, **options}
    return Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


@pytest.fixture
def module():
    return Module()


def same(first, second):
    return all(
        torch.equal(a, b)
        for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def train_by_hand(network, learner, loader, *, epochs=2, accumulate=1, clip=None):
    """One task: penalty and loss divided alike, preconditioned, then clipped."""
    optimizer = torch.optim.SGD(network.parameters(), lr=LR, momentum=0.9)
    learner.reparameterize(loader)
    penalty = learner.penalty()
    network.train()
    told = []
    for _ in range(epochs):
        batches = list(loader)
        for number, (x, y) in enumerate(batches, 1):
            loss = nn.functional.cross_entropy(network(x), y)
            told.append(loss.item() / accumulate)
            total = loss / accumulate
            if penalty is not None:
                total = total + penalty() / accumulate
            if (number - 1) % accumulate == 0:
                optimizer.zero_grad()
            total.backward()
            if number % accumulate and number < len(batches):
                continue
            if penalty is not None:
                penalty.precondition(LR)
            if clip is not None:
                nn.utils.clip_grad_norm_(network.parameters(), clip)
            optimizer.step()
    if penalty is not None:
        penalty.close()
    learner.consolidate(loader)
    return told


@pytest.mark.parametrize(
    ("accumulate", "clip"), [(1, None), (1, 0.05), (2, None), (2, 0.05)], ids=str
)
def test_training_is_that_of_a_loop_written_by_hand_bit_for_bit(module, accumulate, clip):
    # Five mini-batches: with two a step, an epoch's last step is of one.
    by_hand = copy.deepcopy(module.network)
    twin, callback = learner_of(by_hand), CurvatureCallback(learner_of(module.network))
    for loader in loaders(3):
        module.told.clear()
        trainer(callback, accumulate_grad_batches=accumulate, gradient_clip_val=clip).fit(
            module, loader
        )
        told = train_by_hand(by_hand, twin, loader, accumulate=accumulate, clip=clip)
        # What the module hears of is its own loss, without penalty.
        assert module.told == pytest.approx(told, rel=1e-12)
        assert same(module.network, by_hand)
    assert callback.learner.task == 3


@pytest.mark.parametrize(
    "options",
    [
        {"scale": "auto"},
        {"scale": "adaptive"},
        {"freeze_bn_after": 0.4, "own": True, "statistics": "running", "weights": "first"},
    ],
    ids=str,
)
def test_training_is_that_of_the_learner_bit_for_bit(module, options):
    fitted = copy.deepcopy(module.network)
    learner = learner_of(fitted, scheduler=None, **options)
    callback = CurvatureCallback(learner_of(module.network, **options))
    for loader in loaders():
        trainer(callback).fit(module, loader)
        learner.fit(loader, epochs=2, lr=LR)
        learner.consolidate(loader)
    assert same(module.network, fitted)
    assert callback.learner.selection == learner.selection


def test_with_mini_batches_accumulated_a_rule_sees_the_mean_loss_of_each_step(module):
    callback = CurvatureCallback(learner_of(module.network))
    first, second = loaders()
    trainer(callback).fit(module, first)
    module.told.clear()
    trainer(callback, epochs=1, accumulate_grad_batches=2).fit(module, second)
    # Lightning tells losses as it divides them.
    a, b, c, d, e = (2.0 * loss for loss in module.told)
    [selection] = callback.learner.selection
    assert selection.loss == pytest.approx([(a + b) / 2, (c + d) / 2, e])


def test_the_whole_module_may_be_the_learners_model(module):
    class Whole(Module):
        def forward(self, x):
            return self.network(x)

    whole = Whole()
    callback = CurvatureCallback(learner_of(whole))
    for loader in loaders():
        trainer(callback).fit(whole, loader)
    assert "network.0" in callback.learner.anchor
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in whole.modules())


def test_limited_training_batches_limit_what_is_consolidated(module):
    callback = CurvatureCallback(learner_of(module.network))
    trainer(callback, limit_train_batches=2).fit(module, loaders(1)[0])
    [curvature] = callback.learner.curvatures
    assert curvature.examples == 32


@pytest.mark.parametrize(
    "options", [{"scale": "auto"}, {"freeze_bn_after": 0.3, "own": True}], ids=str
)
def test_going_on_from_a_checkpoint_amid_a_task_ends_in_the_same_weights(module, tmp_path, options):
    first, second = loaders()
    learner = learner_of(module.network, **options)
    callback = CurvatureCallback(learner)
    trainer(callback).fit(module, first)
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer(callback, saving, epochs=4, enable_checkpointing=True).fit(module, second)

    path = tmp_path / "epoch=1.ckpt"
    # Tensors, numbers and words: nothing that loading would run.
    state = torch.load(path, weights_only=True)["callbacks"]["CurvatureCallback"]
    assert state["training"]["protection"]["steps_done"] == 10
    other = Module()
    going_on = CurvatureCallback(learner_of(other.network, **options))
    # A checkpoint beside it, as in the run that was interrupted.
    again = ModelCheckpoint(tmp_path / "again", filename="{epoch}", save_top_k=-1)
    trainer(going_on, again, epochs=4, enable_checkpointing=True).fit(
        other, second, ckpt_path=path, weights_only=False
    )
    assert same(module.network, other.network)
    assert going_on.learner.selection == learner.selection
    assert going_on.learner.task == 2


def test_the_next_task_can_be_learnt_in_another_process(module, tmp_path):
    first, second = loaders()
    callback = CurvatureCallback(learner_of(module.network))
    of_first = trainer(callback)
    of_first.fit(module, first)
    of_first.save_checkpoint(tmp_path / "task0.ckpt")
    trainer(callback).fit(module, second)

    content = torch.load(tmp_path / "task0.ckpt", weights_only=True)
    other = Module()
    other.load_state_dict(content["state_dict"])
    later = CurvatureCallback(learner_of(other.network))
    later.load_state_dict(content["callbacks"][later.state_key])
    assert later.learner.task == 1
    later.learner.generator.set_state(
        torch.Generator().manual_seed(0).get_state()
    )  # as fresh as it gets: labels of the second task are drawn anew
    trainer(later).fit(other, second)
    assert same(module.network, other.network)


def test_a_state_of_another_network_is_refused(module):
    callback = CurvatureCallback(learner_of(module.network))
    trainer(callback).fit(module, loaders(1)[0])
    other = CurvatureCallback(learner_of(mlp(8, 10, 3)))
    with pytest.raises(IncompatibleError, match="state: expected"):
        other.load_state_dict(callback.state_dict())
    assert other.learner.task == 0


class Broken(Callback):
    def on_train_batch_end(self, *args, **kwargs):
        raise RuntimeError("broken")


def test_training_that_fails_leaves_no_hooks_and_is_not_consolidated(module):
    callback = CurvatureCallback(learner_of(module.network))
    first, second = loaders()
    trainer(callback).fit(module, first)
    with pytest.raises(RuntimeError, match="broken"):
        trainer(callback, Broken()).fit(module, second)
    assert callback.learner.task == 1
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


class ByHand(Module):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class WithLbfgs(Module):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters())


@pytest.mark.parametrize(
    ("make", "options", "data", "match"),
    [
        (ByHand, {}, None, "automatic_optimization: expected True"),
        (WithLbfgs, {}, None, "expected one whose step.. needs nothing"),
        (Module, {}, "two", "train_dataloader: expected one loader, got a list"),
        (
            Module,
            {"plugins": [MixedPrecision("16-mixed", "cpu")]},
            None,
            "precision: expected one whose losses are not scaled",
        ),
    ],
    ids=["manual", "LBFGS", "two loaders", "scaled losses"],
)
def test_what_the_callback_is_not_made_for_is_refused_before_training(make, options, data, match):
    module = make()
    before = copy.deepcopy(module.network)
    callback = CurvatureCallback(learner_of(module.network))
    [loader] = loaders(1)
    with pytest.raises(OptionError, match=match):
        trainer(callback, **options).fit(module, [loader, loader] if data else loader)
    assert same(before, module.network)


def test_a_module_that_does_not_hold_the_learners_network_is_refused(module):
    callback = CurvatureCallback(learner_of(Module().network))
    with pytest.raises(ModelChangedError, match="the one that the learner was made with"):
        trainer(callback).fit(module, loaders(1)[0])


def test_without_a_task_before_training_is_ordinary(module):
    plain = copy.deepcopy(module)
    [loader] = loaders(1)
    trainer(CurvatureCallback(learner_of(module.network))).fit(module, loader)
    trainer().fit(plain, loader)
    assert same(module.network, plain.network)


def test_it_has_an_entry_in_the_apis_pages():
    assert lightning_of_ours.__all__ == ["CurvatureCallback"]
    entries = [entry for page in PAGES for entry in entries_of(page)]
    assert entries.count("ekfac_rs.integrations.lightning.CurvatureCallback") == 1
