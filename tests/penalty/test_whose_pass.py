"""The penalty's batch statistics are those of the model's own last pass with gradients."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import ekfac_rs as ek
from ekfac_rs.errors import ModelChangedError
from nets import mlp


def student(seed=0):
    """A model in train mode a little off its anchor, its penalty, and two different batches."""
    generator = torch.Generator().manual_seed(seed)
    model = mlp(5, 6, 6, 3)
    x, other = (torch.randn(64, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    other = 3.0 * other + 1.0
    y = torch.randint(3, (64,), generator=generator)
    curvature = ek.estimate_curvature(model, [(x, y)], labels="type2")
    penalty = ek.QuadraticPenalty(model, curvature, ek.merged_weights(model), damping=0.1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).double())
    return model.train(), penalty, x, other


def value_and_gradients(model, penalty):
    value = penalty()
    return value.detach(), torch.autograd.grad(value, list(model.parameters()), retain_graph=True)


def mean_teacher(model, other):
    copy.deepcopy(model)(other)


def pickled_copy(model, other):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    torch.load(file, weights_only=False).train()(other)


def without_gradients(model, other):
    with torch.no_grad():
        model(other)


def in_inference_mode(model, other):
    with torch.inference_mode():
        model(other)


def in_eval_mode(model, other):
    model.eval()(other)
    model.train()


def of_a_replica(model, other):
    """What `nn.parallel.replicate` makes: modules whose hooks are the very same objects."""
    replica = copy.copy(model)
    replica._modules = {name: copy.copy(m) for name, m in model._modules.items()}
    replica(other)


PASSES = [
    mean_teacher,
    pickled_copy,
    without_gradients,
    in_inference_mode,
    in_eval_mode,
    of_a_replica,
]


@pytest.mark.parametrize("other_pass", PASSES)
def test_no_other_pass_is_taken_for_the_students(other_pass):
    model, penalty, x, other = student()
    model(x)
    expected = value_and_gradients(model, penalty)
    other_pass(model, other)
    torch.testing.assert_close(value_and_gradients(model, penalty), expected, rtol=0, atol=0)
    model(other)
    assert not torch.allclose(penalty().detach(), expected[0])  # a pass of its own does count


@pytest.mark.parametrize("other_pass", PASSES)
def test_where_there_is_no_pass_of_its_own_nothing_is_guessed(other_pass):
    model, penalty, _, other = student()
    other_pass(model, other)
    with pytest.raises(ModelChangedError, match="'1'.*with gradients.*got none"):
        penalty()


class Checkpointed(nn.Module):
    """A model whose first part is run again in the backward pass."""

    def __init__(self, body, head, reentrant):
        super().__init__()
        self.body, self.head, self.reentrant = body, head, reentrant

    def forward(self, x):
        return self.head(checkpoint(self.body, x, use_reentrant=self.reentrant))


def checkpointed(reentrant):
    """The same student, plain and checkpointed, each with an L2 penalty, and a batch."""
    model, _, x, _ = student()
    plain = copy.deepcopy(model)
    whole = Checkpointed(model[:3], model[3:], reentrant).train()
    names = {"0": "body.0", "3": "head.3", "6": "head.6"}
    anchor = {name: weight + 0.1 for name, weight in ek.merged_weights(model).items()}
    renamed = ek.Anchor(
        {names[name]: weight for name, weight in anchor.items()},
        {"body.0": "body.1", "head.3": "head.4", "head.6": None},
    )
    penalty = ek.QuadraticPenalty(whole, [], renamed, damping=0.3)
    return whole, penalty, plain, ek.QuadraticPenalty(plain, [], anchor, damping=0.3), x


def test_a_part_that_is_run_again_in_the_backward_pass_counts_once():
    model, penalty, plain, reference, x = checkpointed(reentrant=False)
    found = []
    for network, own in ((model, penalty), (plain, reference)):
        network(x).sum().backward(retain_graph=True)
        # The pass within the backward pass has left the forward pass's statistics where they were.
        found.append(value_and_gradients(network, own))
    torch.testing.assert_close(*found)


def test_a_part_that_runs_without_gradients_first_is_refused_by_name():
    model, penalty, _, _, x = checkpointed(reentrant=True)
    model(x.clone().requires_grad_())
    with pytest.raises(ModelChangedError, match=r"'body.1'.*with gradients"):
        penalty()


def test_a_model_is_saved_and_copied_with_a_live_penalty():
    model, penalty, x, _ = student()
    model(x)
    for copied in (copy.deepcopy(model), _saved_and_loaded(model)):
        torch.testing.assert_close(copied.state_dict(), model.state_dict())
        copied(x).sum().backward()
    assert float(penalty().detach()) > 0.0


def _saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


# --- statistics --------------------------------------------------------------------------------


def another_pass_in_train_mode(model, other):
    model.train()(other)


def a_write_to_the_statistics(model, other):
    model[1].running_mean.mul_(2.0)


@pytest.mark.parametrize("change", [another_pass_in_train_mode, a_write_to_the_statistics])
def test_gradients_are_of_the_statistics_that_the_value_was_of(change):
    model, penalty, x, other = student()
    model(x)
    model.eval()
    value = penalty()
    expected = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
    change(model, other)
    got = torch.autograd.grad(value, list(model.parameters()))
    for own, before in zip(got, expected, strict=True):
        torch.testing.assert_close(own, before, rtol=0.0, atol=0.0)


def test_a_checkpointed_pass_that_is_made_again_for_a_look_leaves_the_statistics():
    model, penalty, x, _ = student()
    checkpoint(model, x, use_reentrant=False)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    penalty()
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_without_running_statistics_those_of_the_mini_batch_serve_in_eval_mode_too():
    model = nn.Sequential(
        nn.Linear(5, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 2)
    ).double()
    x = torch.randn(16, 5, dtype=torch.float64)
    anchor = {"0": torch.zeros(4, 6).double(), "2": torch.zeros(2, 5).double()}
    with ek.QuadraticPenalty(model, [], anchor, damping=1.0) as penalty:
        model(x)
        expected = penalty()
        model.eval()
        torch.testing.assert_close(penalty(), expected)


def test_a_value_without_gradients_leaves_the_stable_step_as_it_is():
    gradients = []
    for first in (torch.no_grad, torch.enable_grad):
        torch.manual_seed(0)
        model, penalty, x, _ = student()
        model(x)
        with first():
            penalty()
        model(x)
        penalty().backward()
        penalty.precondition(1.0)
        gradients.append([parameter.grad for parameter in model.parameters()])
    for own, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(own, expected)


@pytest.mark.parametrize("kind", ["eigenvalues", "truncated", "packed"])
def test_autocast_rounds_nothing_of_a_penalty(kind):
    generator = torch.Generator().manual_seed(0)
    model = mlp(5, 6, 6, 3).float()
    x = torch.randn(64, 5, generator=generator)
    y = torch.randint(3, (64,), generator=generator)
    correction = "eigenvalues" if kind == "eigenvalues" else None
    values = []
    for enabled in (False, True):
        twin = copy.deepcopy(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            with torch.autocast("cpu", enabled=False):
                curvature = ek.estimate_curvature(
                    twin, [(x, y)], labels="type2", correction=correction
                )
            dropped = 0.1 if kind == "truncated" else 0.0
            anchor = ek.merged_weights(twin)
            penalty = ek.QuadraticPenalty(twin, curvature, anchor, dropped=dropped)
            with torch.no_grad():
                twin[0].weight.add_(0.1)
            twin.eval()
            values.append((penalty().detach(), penalty.predicted_increase()))
    torch.testing.assert_close(values[1], values[0], rtol=1e-6, atol=0.0)
