"""Tasks with heads of their own: new output layers, and given models that share layers."""

import copy
import io
import math

import pytest
import torch
from torch import nn

import ekfac_rs as ek
from ekfac_rs.errors import (
    EmptyLoaderError,
    IncompatibleError,
    LabelError,
    ModelChangedError,
    OptionError,
    UnknownLayerError,
    UnsupportedLayerError,
)
from nets import classification_loader, random_batchnorms

CLASSES = (3, 2, 4)
LOADERS = [
    classification_loader(6, classes, examples=48, batch_size=12, seed=classes, dtype=torch.float32)
    for classes in CLASSES
]


class Net(nn.Module):
    """A backbone with BatchNorm and an output layer."""

    def __init__(self, classes=CLASSES[0], after=None):
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU())
        )
        self.fc = nn.Linear(5, classes)
        self.after = after

    def forward(self, x):
        outputs = self.fc(self.body(x))
        return outputs if self.after is None else self.after(outputs)


def net(**options):
    torch.manual_seed(0)
    return random_batchnorms(Net(**options), torch.Generator().manual_seed(0))


def learner_of(model=None, **options):
    options = {"damping": 0.01, "head": "new", "generator": torch.Generator().manual_seed(0)} | (
        options
    )
    return ek.ContinualLearner(net() if model is None else model, **options)


def learn(learner, loaders=LOADERS, **options):
    for loader in loaders:
        learner.fit(loader, **({"epochs": 2, "lr": 0.02} | options))
        learner.consolidate(loader)
    return learner


def given_models(**options):
    """A learner of models around one backbone, and the models."""
    first = net()
    models = [first, *(net(classes=classes) for classes in CLASSES[1:])]
    for model in models[1:]:
        model.body = first.body
    layers = ("body.0", "body.3")
    return learner_of(first, head=models.__getitem__, layers=layers, **options), models


def outputs_of(learner, task, x):
    model = learner.use_task(task)
    return copy.deepcopy(model).eval()(x).detach()


def everything(learner):
    """What a learner holds, to be compared later."""
    file = io.BytesIO()
    torch.save(learner.state_dict(), file)
    file.seek(0)
    return torch.load(file)


def leaves(value, path=""):
    """All that a state consists of, by where it is."""
    if isinstance(value, dict):
        return {k: v for key in value for k, v in leaves(value[key], f"{path}/{key}").items()}
    if isinstance(value, list | tuple):
        return leaves(dict(enumerate(value)), path)
    return {path: value}


def require_equal(learner, expected):
    actual, expected = leaves(everything(learner)), leaves(expected)
    assert actual.keys() == expected.keys()
    for path, value in expected.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(actual[path], value, rtol=0, atol=0, msg=path)
        else:
            assert actual[path] == value, path


KINDS = {"new": learner_of, "given": lambda **options: given_models(**options)[0]}
both = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


# --- what is trained, and what is held -----------------------------------------------------------


def test_every_task_has_an_output_layer_as_wide_as_its_targets_need():
    model = net()
    own = model.fc
    learner = learner_of(model)
    learner.fit(LOADERS[0])
    assert model.fc is own
    learner.consolidate(LOADERS[0])
    learner.fit(LOADERS[1])
    assert (model.fc.out_features, model.fc.in_features) == (2, 5)
    learner.consolidate(LOADERS[1])
    learner.fit(LOADERS[2], classes=7)
    assert model.fc.weight.shape == (7, 5)
    assert learner.use_task(0).fc is own


@pytest.mark.parametrize("bias", [True, False])
def test_a_new_output_layer_begins_at_zero_and_takes_no_random_numbers(bias):
    model = net()
    model.fc = nn.Linear(5, 3, bias=bias).double()
    model.body.double()
    loaders = [[(x.double(), y) for x, y in loader] for loader in LOADERS]
    learner = learn(learner_of(model), loaders[:1])
    state = torch.get_rng_state()
    learner.fit(loaders[1], steps=1, lr=0.0)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.fc.weight.dtype == torch.float64
    assert not model.fc.weight.any()
    assert (model.fc.bias is not None) == bias
    assert all(p.requires_grad for p in model.fc.parameters())


@both
@pytest.mark.parametrize(
    "options",
    [{}, {"approximation": None}, {"coordinates": "raw"}, {"freeze_bn_after": 0.5}],
    ids=str,
)
def test_curvature_anchor_and_penalty_are_on_shared_layers(make, options):
    learner = learn(make(**options))
    assert set(learner.anchor) == {"body.0", "body.3"}
    assert all(set(c) == {"body.0", "body.3"} for c in learner.curvatures)
    assert len(learner.curvatures) == (0 if "approximation" in options else 3)
    with learner.penalty() as penalty, torch.no_grad():
        learner.model.eval()
        assert penalty().item() == pytest.approx(0.0, abs=1e-6)
        learner.model.fc.weight.add_(1.0)
        assert penalty().item() == pytest.approx(0.0, abs=1e-6)
        learner.model.body[3].weight.add_(1.0)
        assert penalty().item() > 0.01


def test_a_curvature_is_that_of_its_tasks_own_head():
    learner = learn(learner_of(), LOADERS[:1])
    learner.fit(LOADERS[1], epochs=2)
    model = copy.deepcopy(learner.model)
    generator = torch.Generator()
    generator.set_state(learner.generator.get_state())
    learner.consolidate(LOADERS[1])
    expected = ek.estimate_curvature(
        model, LOADERS[1], layers=["body.0", "body.3"], generator=generator
    )
    torch.testing.assert_close(learner.curvatures[1].tensors(), expected.tensors(), rtol=0, atol=0)


@both
def test_a_head_stays_bit_for_bit_what_its_task_made_it(make):
    learner = make()
    kept = []
    for task, loader in enumerate(LOADERS):
        learn(learner, [loader])
        kept.append(copy.deepcopy(learner.use_task(task).fc.state_dict()))
    for task, expected in enumerate(kept):
        torch.testing.assert_close(learner.use_task(task).fc.state_dict(), expected, rtol=0, atol=0)


@both
def test_old_tasks_outputs_stay_bit_for_bit_over_a_frozen_backbone(make):
    learner = make(approximation=None, damping=0.0)
    learner.model.body.requires_grad_(False)
    learner.model.body[1].eval()
    x, outputs = LOADERS[0][0][0], []
    for task, loader in enumerate(LOADERS):
        learn(learner, [loader])
        outputs.append(outputs_of(learner, task, x))
    for task, expected in enumerate(outputs):
        assert torch.equal(outputs_of(learner, task, x), expected)


def test_training_with_a_new_output_layer_is_the_loop_written_out_bit_for_bit():
    learner = learner_of(damping=0.01, scale=100.0)
    learn(learner, LOADERS[:1])
    expected = copy.deepcopy(learner.model)
    learner.fit(LOADERS[1], epochs=2, lr=0.02)

    expected.fc = nn.Linear(5, 2)
    for parameter in expected.fc.parameters():
        nn.init.zeros_(parameter)
    ek.reparameterize(expected, LOADERS[1])
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.02, momentum=0.9)
    expected.train()
    steps = 2 * len(LOADERS[1])
    with ek.QuadraticPenalty(
        expected, learner.curvatures, learner.anchor, damping=0.01, scale=100.0
    ) as penalty:
        for step, (x, y) in enumerate([*LOADERS[1], *LOADERS[1]]):
            optimizer.param_groups[0]["lr"] = 0.01 * (1.0 + math.cos(math.pi * step / steps))
            optimizer.zero_grad()
            (nn.functional.cross_entropy(expected(x), y) + penalty()).backward()
            penalty.precondition(0.02)
            optimizer.step()
    torch.testing.assert_close(learner.model.state_dict(), expected.state_dict(), rtol=0, atol=0)


def test_given_models_learn_as_new_output_layers_of_the_same_start_do():
    new = learn(learner_of(layers=("body.3", "body.0")))
    given, models = given_models()
    for model in models[1:]:
        for parameter in model.fc.parameters():
            nn.init.zeros_(parameter)
    learn(given)
    for task in range(3):
        torch.testing.assert_close(
            given.use_task(task).state_dict(), new.use_task(task).state_dict(), rtol=0, atol=0
        )
    assert given.use_task(2) is models[2]


def test_a_tasks_training_may_go_on_with_its_head():
    learner = learn(learner_of(), LOADERS[:1])
    learner.fit(LOADERS[1])
    layer = learner.model.fc
    learner.use_task(0)
    learner.fit(LOADERS[1], classes=2)
    assert learner.model.fc is layer
    learner.use_task(0)
    learner.consolidate(LOADERS[1])
    assert learner.model.fc is layer


# --- evaluation ----------------------------------------------------------------------------------


@both
def test_every_task_is_evaluated_with_its_own_head_and_the_model_left_as_it_was(make):
    learner = learn(make())
    expected = []
    for task, loader in enumerate(LOADERS):
        x, y = (torch.cat(parts) for parts in zip(*loader, strict=True))
        hits = outputs_of(learner, task, x).argmax(1) == y
        expected.append(float(hits.double().mean()))
    learner.use_task(1).train()
    before = everything(learner)
    assert learner.evaluate(LOADERS) == pytest.approx(expected)
    again = [LOADERS[2], LOADERS[0], LOADERS[2]]
    assert learner.evaluate(again, tasks=[2, 0, 2]) == pytest.approx(
        [expected[2], expected[0], expected[2]]
    )
    with pytest.raises(LabelError):
        learner.evaluate([LOADERS[0]], tasks=[1])
    require_equal(learner, before)
    assert learner.model.training
    assert learner.model.fc.out_features == 2


@both
def test_tasks_that_have_no_head_are_refused(make):
    learner = learn(make(), LOADERS[:1])
    with pytest.raises(OptionError, match="one of 0, got 1"):
        learner.evaluate(LOADERS[:2])
    with pytest.raises(OptionError, match="one of 0, got -1"):
        learner.use_task(-1)
    with pytest.raises(OptionError, match="one for each of 2, got 1"):
        learner.evaluate(LOADERS[:2], tasks=[0])
    learner.fit(LOADERS[1])
    assert len(learner.evaluate(LOADERS[:2])) == 2


def test_with_one_output_layer_all_tasks_are_evaluated_alike():
    learner = learn(learner_of(head=None), LOADERS[:1])
    assert learner.evaluate([LOADERS[0]] * 3) == learner.evaluate([LOADERS[0]] * 3, [0, 1, 0])
    assert learner.use_task(1) is learner.model
    with pytest.raises(OptionError, match="one of 0, 1, got 2"):
        learner.evaluate([LOADERS[0]], [2])
    with pytest.raises(OptionError, match=r"classes: .*\"new\""):
        learner.fit(LOADERS[0], classes=3)


# --- states and copies ---------------------------------------------------------------------------


@both
@pytest.mark.parametrize("fitted", [0, 1, 2])
@pytest.mark.parametrize("consolidated", [True, False], ids=["between tasks", "amid a task"])
def test_a_saved_state_goes_on_as_the_original_would(make, fitted, consolidated):
    learner = learn(make(), LOADERS[:fitted])
    if not consolidated:
        learner.fit(LOADERS[fitted], lr=0.02)
    if fitted:
        learner.use_task(0)
    state = everything(learner)
    other = make()
    other.load_state_dict(state)
    require_equal(other, state)
    for each in (learner, other):
        each.generator.manual_seed(1)
        learn(each, LOADERS[fitted:])
    require_equal(other, everything(learner))
    assert other.evaluate(LOADERS) == learner.evaluate(LOADERS)


@both
def test_a_learner_goes_back_to_a_state_of_its_own(make):
    learner = learn(make(), LOADERS[:1])
    state, own = everything(learner), learner.model.fc
    learn(learner, LOADERS[1:])
    learner.load_state_dict(state)
    require_equal(learner, state)
    assert learner.use_task(0).fc is own
    assert learner.task == 1
    learn(learner, LOADERS[1:])


def test_a_copy_of_a_learner_has_heads_of_its_own():
    learner = learn(learner_of(), LOADERS[:2])
    before = everything(learner)
    other = copy.deepcopy(learner)
    learn(other, LOADERS[2:])
    require_equal(learner, before)
    learn(learner, LOADERS[2:])
    require_equal(other, everything(learner))


def test_a_copy_of_given_models_does_not_train_the_originals():
    learner, _ = given_models()
    learn(learner, LOADERS[:2])
    other = copy.deepcopy(learner)
    before = everything(learner)
    # The next model shares what the originals share.
    with pytest.raises(ModelChangedError, match="'body.0'.* model of task 2"):
        other.fit(LOADERS[2])
    assert other.evaluate(LOADERS[:2]) == learner.evaluate(LOADERS[:2])
    require_equal(learner, before)


@both
def test_a_state_that_does_not_fit_changes_nothing(make):
    learner = learn(make(), LOADERS[:2])
    before, used = everything(learner), learner.model
    good = everything(learn(make()))
    wrong_width = copy.deepcopy(good)
    wrong_head = copy.deepcopy(good)
    wrong_model = copy.deepcopy(good)
    cut_off = copy.deepcopy(good)
    if "layers" in good["heads"]:
        wrong_width["heads"]["layers"][2]["weight"] = torch.zeros(4, 6)
        wrong_head["heads"]["layers"][1] = {"weight": torch.zeros(2, 5)}
        del cut_off["heads"]["layers"][1]["weight"]
    else:
        wrong_width["heads"]["models"][2]["fc.weight"] = torch.zeros(4, 6)
        del wrong_head["heads"]["models"][1]["fc.bias"]
        del cut_off["heads"]["models"]
    wrong_model["model"]["body.0.weight"] = torch.zeros(8, 7)
    other_kind = good | {"heads": {"kind": "one"}}
    without = {key: value for key, value in good.items() if key != "heads"}
    for state in (wrong_width, wrong_head, wrong_model, cut_off, other_kind, without):
        with pytest.raises(IncompatibleError, match="state: expected"):
            learner.load_state_dict(state)
        require_equal(learner, before)
        assert learner.model is used
    learner.load_state_dict(good)
    require_equal(learner, good)


@both
def test_a_state_that_does_not_fit_neither_adds_nor_takes_away_heads(make):
    states = [everything(learn(make(), LOADERS[:tasks])) for tasks in (1, 3)]
    for learner, state in ((learn(make()), states[0]), (make(), states[1])):
        before, layer, tasks = everything(learner), learner.model.fc, learner.task
        state["model"]["body.0.weight"] = torch.zeros(8, 7)
        with pytest.raises(IncompatibleError, match="state: expected"):
            learner.load_state_dict(state)
        require_equal(learner, before)
        assert learner.model.fc is layer
        if tasks:
            assert len(learner.evaluate(LOADERS)) == 3


def test_given_models_go_on_sharing_batchnorms_after_loading_a_state():
    state = everything(learn(given_models()[0], LOADERS[:1]))
    learner, models = given_models()
    models[1].body = copy.copy(models[0].body)
    models[1].body._modules = dict(models[0].body._modules) | {"1": nn.BatchNorm1d(8)}
    learner.load_state_dict(state)
    with pytest.raises(ModelChangedError, match="'body.1'.*model of task 1"):
        learner.fit(LOADERS[1])


def test_a_state_from_before_there_were_heads_is_loaded():
    learner = learn(learner_of(head=None), LOADERS[:1])
    state = everything(learner)
    del state["heads"]
    other = learner_of(head=None)
    other.load_state_dict(state)
    require_equal(other, everything(learner))


# --- what fails ----------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    ("loader", "options", "error"),
    [
        ([], {"steps": 1}, EmptyLoaderError),
        (LOADERS[1], {"epochs": 1, "steps": 1}, OptionError),
        ([(x, y + 100) for x, y in LOADERS[1]], {"steps": 1}, LabelError),
        ([(x[:, 1:], y) for x, y in LOADERS[1]], {"steps": 1}, RuntimeError),
    ],
    ids=["empty", "options", "labels", "inputs"],
)
def test_a_task_that_could_not_begin_leaves_no_head(make, loader, options, error):
    learner = learn(make(), LOADERS[:1])
    before, model, layer = everything(learner), learner.model, learner.model.fc
    learner.evaluate(LOADERS[:1])
    more = {"classes": 2} if make is learner_of else {}
    with pytest.raises(error):
        learner.fit(loader, **options, **more)
    require_equal(learner, before)
    assert learner.model is model
    assert model.fc is layer
    learn(learner, LOADERS[1:])


def test_classes_must_be_told_where_targets_do_not():
    x = LOADERS[0][0][0]
    loader = [(x, torch.randn(12, 3))]
    learner = learn(learner_of(loss="mse"), [loader])
    with pytest.raises(OptionError, match="classes: expected the number.*MSE"):
        learner.fit(loader)
    learner.fit(loader, classes=3)
    assert learner.model.fc.out_features == 3


def test_classes_are_counted_over_probabilities_and_without_ignored_targets():
    x = LOADERS[0][0][0]
    learner = learn(learner_of(loss=ek.likelihood.CrossEntropy(ignore_index=9)), LOADERS[:1])
    learner.fit([(x, torch.tensor([0, 3, 9] * 4))])
    assert learner.model.fc.out_features == 4
    learner.consolidate([(x, torch.tensor([0, 3, 9] * 4))])
    learner.fit([(x, torch.rand(12, 6))])
    assert learner.model.fc.out_features == 6


def test_counting_needs_a_loader_that_can_be_gone_through_again():
    learner = learn(learner_of(approximation=None), LOADERS[:1])
    with pytest.raises(OptionError, match="counts the classes of a new output layer .classes="):
        learner.fit(iter(LOADERS[1]), steps=2)
    learner = learn(learner_of(approximation=None, damping=0.0), LOADERS[:1])
    learner.fit(iter(LOADERS[1]), steps=2, classes=2)


def test_counting_takes_no_random_numbers_of_a_shuffling_loader():
    data = torch.utils.data.TensorDataset(
        *(torch.cat(parts) for parts in zip(*LOADERS[1], strict=True))
    )
    loader = torch.utils.data.DataLoader(data, batch_size=12, shuffle=True)
    learner = learn(learner_of(approximation=None, damping=0.0), LOADERS[:1])
    other = copy.deepcopy(learner)
    for each, options in ((learner, {}), (other, {"classes": 2})):
        torch.manual_seed(3)
        each.fit(loader, epochs=2, **options)
    require_equal(other, everything(learner))


def test_classes_that_a_task_cannot_have_are_refused():
    learner = learner_of()
    with pytest.raises(OptionError, match="first task, whose output layer is the model's own"):
        learner.fit(LOADERS[0], classes=3)
    learn(learner, LOADERS[:1])
    with pytest.raises(OptionError, match="classes: expected an integer of at least 1, got 0"):
        learner.fit(LOADERS[1], classes=0)
    learner.fit(LOADERS[1])
    with pytest.raises(OptionError, match="classes: expected 2, as task 1 began with, got 3"):
        learner.fit(LOADERS[1], classes=3)
    given, _ = given_models()
    with pytest.raises(OptionError, match="with a callable as head=, which makes them"):
        given.fit(LOADERS[0], classes=3)


def test_an_output_layer_comes_in_the_mode_of_the_one_before():
    learner = learn(learner_of(), LOADERS[:2])
    for training in (True, False):
        learner.model.train(training)
        for task in (0, 1):
            assert {m.training for m in learner.use_task(task).modules()} == {training}


def test_a_failed_consolidation_does_not_decide_which_layer_is_the_output():
    learner = learner_of()
    learner.fit(LOADERS[0])
    with pytest.raises(EmptyLoaderError):
        learner.consolidate([])
    learner.model.fc = nn.Sequential(learner.model.fc)
    learn(learner)
    assert set(learner.anchor) == {"body.0", "body.3"}
    assert learner.model.fc[0].out_features == CLASSES[2]


def test_an_output_layer_exchanged_by_hand_is_noticed():
    learner = learn(learner_of(), LOADERS[:2])
    own, learner.model.fc = learner.model.fc, nn.Linear(5, 2)
    for call in (
        lambda: learner.fit(LOADERS[2]),
        lambda: learner.evaluate(LOADERS[:2]),
        lambda: learner.use_task(0),
    ):
        with pytest.raises(ModelChangedError, match="'fc'.*of task 1"):
            call()
    learner.model.fc = own
    learner.fit(LOADERS[2])


@both
def test_a_new_task_is_not_consolidated_before_it_was_fitted(make):
    learner = learn(make(), LOADERS[:1])
    if make is learner_of:
        with pytest.raises(OptionError, match="task 1: expected fit before consolidate"):
            learner.consolidate(LOADERS[1])
    else:
        learner.consolidate(LOADERS[1])


def test_a_task_learnt_elsewhere_is_adopted_without_its_head():
    """Transfer: a pretrained network's curvature, and a head for the target."""
    learner = learner_of()
    curvature = ek.estimate_curvature(learner.model, LOADERS[0], layers=["body.0", "body.3"])
    whole = ek.estimate_curvature(learner.model, LOADERS[0])
    with pytest.raises(OptionError, match="shared layers, got 'fc'"):
        learner.adopt(whole, ek.merged_weights(learner.model))
    learner.adopt(curvature, ek.merged_weights(learner.model, layers=["body.0", "body.3"]))
    # Another one, whose head stays where it was learnt.
    learner.adopt(curvature, learner.anchor)
    learn(learner, LOADERS[1:2])
    assert learner.evaluate(LOADERS[:2], tasks=[0, 2])[1] > 0.5
    with pytest.raises(OptionError, match="one of 0, 2, got 1"):
        learner.use_task(1)


# --- which layer is the output -------------------------------------------------------------------


def test_an_output_layer_that_is_not_the_output_must_be_named():
    model = net(after=nn.LogSoftmax(1))
    learner = learner_of(model)
    learner.fit(LOADERS[0])
    before = everything(learner)
    with pytest.raises(OptionError, match="output_layer: .*got none: name the one"):
        learner.consolidate(LOADERS[0])
    require_equal(learner, before)
    named = learn(learner_of(net(after=nn.LogSoftmax(1)), output_layer="fc"))
    assert set(named.anchor) == {"body.0", "body.3"}


def test_two_outputs_leave_the_choice_to_the_user():
    class TwoOutputs(Net):
        def __init__(self):
            super().__init__()
            self.other = nn.Linear(5, 2)

        def forward(self, x):
            features = self.body(x)
            return self.fc(features), self.other(features)

    options = {"output_fn": lambda outputs: outputs[0], "layers": ("body.0",)}
    learner = learner_of(TwoOutputs(), **options)
    learner.fit(LOADERS[0])
    with pytest.raises(OptionError, match="got 'fc', 'other'"):
        learner.consolidate(LOADERS[0])
    learn(learner_of(TwoOutputs(), output_layer="fc", **options))


def test_what_cannot_be_an_output_layer_is_refused():
    class Scaled(nn.Linear):
        pass

    shared = net()
    shared.twin = shared.fc
    tied = net()
    tied.tied = nn.Linear(5, 3)
    tied.tied.weight = tied.fc.weight
    scaled = net()
    scaled.fc = Scaled(5, 3)
    bare = nn.Linear(6, 3)
    for error, model, name, message in (
        (UnknownLayerError, net(), "head", "got 'head'"),
        (UnknownLayerError, net(), "body.9", "got 'body.9'"),
        (UnknownLayerError, net(), "fc.weight", "got 'fc.weight'"),
        (UnknownLayerError, bare, "", "got ''"),
        (UnsupportedLayerError, net(), "body", "'body'.*got Sequential"),
        (UnsupportedLayerError, scaled, "fc", "'fc'.*got Scaled"),
        (UnsupportedLayerError, shared, "fc", "'fc'.*is shared"),
        (UnsupportedLayerError, tied, "fc", "'fc'.*is shared"),
    ):
        with pytest.raises(error, match=message):
            learner_of(model, output_layer=name)
    learner = learner_of(bare)
    with pytest.raises(OptionError, match="inside the model.*got ''"):
        learner.consolidate(LOADERS[0])


def test_an_output_layer_is_no_shared_layer():
    with pytest.raises(OptionError, match="shared layers, got 'fc'"):
        learner_of(output_layer="fc", layers=["body.0", "fc"])
    learner = learner_of(layers=["body.0", "fc"])
    with pytest.raises(OptionError, match="shared layers, got 'fc'"):
        learner.consolidate(LOADERS[0])
    assert learner.task == 0


def test_an_output_layer_before_a_batchnorm_is_refused():
    learner = learner_of(net(after=nn.BatchNorm1d(3)), output_layer="fc")
    learner.fit(LOADERS[0])
    with pytest.raises(UnsupportedLayerError, match="'fc'.*feeds no BatchNorm"):
        learner.consolidate(LOADERS[0])


def test_something_must_be_shared():
    learner = learner_of()
    learner.model.body.requires_grad_(False)
    learner.fit(LOADERS[0])
    with pytest.raises(OptionError, match="besides the output layer 'fc'"):
        learner.consolidate(LOADERS[0])


# --- given models --------------------------------------------------------------------------------


def test_given_models_need_the_names_of_what_they_share():
    with pytest.raises(OptionError, match="names of the layers that all tasks share"):
        learner_of(head=lambda task: net())
    with pytest.raises(OptionError, match="output_layer: expected none"):
        learner_of(head=lambda task: net(), layers=["body.0"], output_layer="fc")
    for head in ("old", 3, nn.Linear(5, 2)):
        with pytest.raises(OptionError, match="head: expected one of 'new'"):
            learner_of(head=head)


def test_given_models_must_share_what_was_named_and_its_batchnorm():
    first = net()
    strangers, own_batchnorm = net(), net()
    own_batchnorm.body[0], own_batchnorm.body[3] = first.body[0], first.body[3]
    for model, error, message in (
        (strangers, ModelChangedError, "'body.0'.*model of task 1"),
        (nn.Linear(6, 2), ModelChangedError, "'body.0'.*model of task 1"),
        (own_batchnorm, ModelChangedError, "'body.1'.*model of task 1"),
        (None, OptionError, "head: expected a torch.nn.Module for task 1, got NoneType"),
    ):
        learner = learner_of(
            copy.deepcopy(first), head=lambda _, model=model: model, layers=["body.0", "body.3"]
        )
        if model is own_batchnorm:
            learner = learner_of(first, head=lambda _: own_batchnorm, layers=["body.0", "body.3"])
        learn(learner, LOADERS[:1])
        before = everything(learner)
        with pytest.raises(error, match=message):
            learner.fit(LOADERS[1])
        require_equal(learner, before)


def test_in_raw_coordinates_given_models_may_have_batchnorms_of_their_own():
    first, second = net(), net(classes=2)
    second.body[0], second.body[3] = first.body[0], first.body[3]
    learner = learner_of(
        first, head=lambda _: second, layers=["body.0", "body.3"], coordinates="raw"
    )
    learn(learner, LOADERS[:1])
    before = copy.deepcopy(first.body[1].state_dict())
    learn(learner, LOADERS[1:2])
    torch.testing.assert_close(first.body[1].state_dict(), before, rtol=0, atol=0)
    assert len(learner.evaluate(LOADERS[:2])) == 2
