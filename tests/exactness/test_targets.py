"""Targets of every kind: the scores' outer products are the Hessian of torch's own loss."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian
from torch.nn import functional as F

import ekfac_rs as ek
from cases import LOSSES, NETWORKS, dense_block
from ekfac_rs.errors import DtypeError, LabelError, NonFiniteError, ShapeError
from ekfac_rs.likelihood import BCE, MSE, CrossEntropy
from oracle import empirical_fisher, exact_block, example_loss, relative_error

INF = math.inf


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def soft(*shape, seed=0):
    """Class probabilities on axis 1 whose sums are between 0 and 3, some exactly 0 or 1."""
    t = random(*shape, seed=seed).softmax(1)
    masses = torch.tensor([0.0, 1.0, 0.25, 3.0]).double().repeat(len(t))[: len(t)]
    return t * masses.reshape(-1, *[1] * (len(shape) - 1))


def with_ignored(*shape, classes=4):
    y = torch.randint(classes, shape, generator=torch.Generator().manual_seed(1))
    y[0] = -100
    if len(shape) > 1:
        y[1, 0] = -100
    return y


# A likelihood's settings, torch's loss over the mini-batch, outputs and targets.
TARGETS = {
    "weighted probabilities": (CrossEntropy, F.cross_entropy, random(5, 4), soft(5, 4)),
    "weighted probabilities of locations": (
        CrossEntropy,
        F.cross_entropy,
        random(5, 4, 3),
        soft(5, 4, 3),
    ),
    "smoothed labels": (
        CrossEntropy,
        F.cross_entropy,
        random(5, 4),
        0.9 * F.one_hot(torch.arange(5) % 4, 4).double() + 0.025,
    ),
    "ignored labels": (CrossEntropy, F.cross_entropy, random(5, 4), with_ignored(5)),
    "ignored locations": (CrossEntropy, F.cross_entropy, random(5, 4, 3), with_ignored(5, 3)),
    "one class": (CrossEntropy, F.cross_entropy, random(5, 1, 3), with_ignored(5, 3, classes=1)),
    "mse": (MSE, F.mse_loss, random(5, 4), random(5, 4, seed=1)),
    "mse of locations": (MSE, F.mse_loss, random(5, 4, 3), random(5, 4, 3, seed=1)),
    "bce": (BCE, F.binary_cross_entropy_with_logits, random(5, 4), soft(5, 4)[:, :] / 3),
    "bce of one output": (
        BCE,
        F.binary_cross_entropy_with_logits,
        random(5, 1),
        torch.tensor([[0.0], [1.0], [0.3], [1.0], [0.0]]).double(),
    ),
}


def torch_loss(function, reduction):
    """Torch's loss of a mini-batch; summed ones are means over examples in this package."""
    if reduction == "mean":
        return function
    return lambda z, t: function(z, t, reduction="sum") / len(z)


def blocks(z: Tensor, loss) -> Tensor:
    """Each example's Hessian of the loss summed over examples, by automatic differentiation."""
    count = z[0].numel()
    full = hessian(lambda z: len(z) * loss(z), z).reshape(len(z), count, len(z), count)
    return torch.stack([full[n, :, n] for n in range(len(z))])


def outer_products(likelihood, z, t, labels, generator, draws=1) -> Tensor:
    scores = likelihood.scores(z, t, labels=labels, draws=draws, generator=generator)
    return sum(
        weight * torch.einsum("ni,nj->nij", score.flatten(1), score.flatten(1))
        for score, weight in scores
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("case", TARGETS)
def test_scores_make_the_hessian_of_torchs_loss(case, reduction, generator):
    kind, function, z, t = TARGETS[case]
    likelihood, loss = kind(reduction), torch_loss(function, reduction)
    likelihood.validate(z, t)
    expected = blocks(z, lambda z: loss(z, t))
    for labels in ("exact", "type2"):
        found = outer_products(likelihood, z, t, labels, generator)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    drawn = outer_products(likelihood, z, t, "mc", generator, draws=2000)
    assert (drawn - expected).norm() <= 0.1 * expected.norm()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("case", TARGETS)
def test_the_loss_and_its_gradient_are_torchs(case, reduction, generator):
    kind, function, z, t = TARGETS[case]
    likelihood, loss = kind(reduction), torch_loss(function, reduction)
    z = z.clone().requires_grad_()
    ours, theirs = likelihood.loss(z, t), loss(z, t)
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=0)
    (expected,) = torch.autograd.grad(theirs, z)
    (found,) = torch.autograd.grad(ours, z)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)
    [(score, weight)] = likelihood.scores(z, t, labels="empirical", draws=1, generator=generator)
    assert weight == 1.0
    torch.testing.assert_close(score, len(z) * expected, rtol=1e-12, atol=1e-15)


# --- through a network --------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("layer", ["0", "2", "4"])
def test_weighted_probabilities_give_the_exact_diagonal(layer, reduction):
    model = NETWORKS["mlp"].make()
    x, t = random(6, 4), soft(6, 3)
    of_example = example_loss("cross_entropy", reduction)
    estimate = {"loss": CrossEntropy(reduction), "approximation": "diagonal"}
    exact = ek.estimate_curvature(model, [(x, t)], labels="exact", **estimate)
    expected = exact_block(model, layer, (x, t), of_example, statistics="running").diagonal()
    assert relative_error(exact[layer].values.flatten(), expected) < 1e-12
    biased = ek.estimate_curvature(model, [(x, t)], labels="empirical", **estimate)
    expected = empirical_fisher(model, layer, (x, t), of_example).diagonal()
    assert relative_error(biased[layer].values.flatten(), expected) < 1e-12


@pytest.mark.parametrize("mass", [0.25, 1.0, 3.0])
@pytest.mark.parametrize("labels", ["type2", "exact"])
def test_one_weighted_example_gives_the_exact_block(labels, mass, generator):
    model = NETWORKS["mlp"].make()
    x, t = random(1, 4), mass * random(1, 3, seed=2).softmax(1)
    found = ek.estimate_curvature(
        model, [(x, t)], labels=labels, approximation="kfac-expand", generator=generator
    )
    assert found.loss == pytest.approx(F.cross_entropy(model(x), t).item(), rel=1e-13)
    for layer, block in found.items():
        expected = exact_block(model, layer, (x, t), LOSSES["cross_entropy"].of_example)
        assert relative_error(dense_block(block), expected) < 1e-12


def test_rows_without_labels_count_for_nothing_but_their_number():
    model = NETWORKS["mlp-bn"].make().eval()
    x, t = random(6, 4), soft(6, 3)
    t[:3], t[3:] = 0.0, random(3, 3).softmax(1)
    options = {"approximation": "diagonal", "labels": "exact", "statistics": "running"}
    found = ek.estimate_curvature(model, [(x, t)], **options)
    labelled = ek.estimate_curvature(model, [(x[3:], t[3:])], **options)
    for layer in found:
        torch.testing.assert_close(found[layer].values, 0.5 * labelled[layer].values)
    assert found.loss == pytest.approx(0.5 * labelled.loss)


# --- masked classes -----------------------------------------------------------------------------


class Masked(nn.Module):
    """Puts a class of logit minus infinity, or several, before the others."""

    def __init__(self, value=-INF, count=1):
        super().__init__()
        self.value, self.count = value, count

    def forward(self, z):
        mask = z.new_full((len(z), self.count, *z.shape[2:]), self.value)
        return torch.cat([mask, z], 1)


def masked_targets(kind, examples):
    """Targets over three classes, and the same with two masked classes before them."""
    if kind == "labels":
        y = torch.arange(examples) % 3
        return y, y + 2
    t = soft(examples, 3)
    return t, torch.cat([torch.zeros(examples, 2).double(), t], 1)


@pytest.mark.parametrize("kind", ["labels", "probabilities"])
@pytest.mark.parametrize("labels", ["exact", "empirical", "mc"])
def test_masked_classes_are_as_good_as_absent(labels, kind):
    model, x = NETWORKS["mlp"].make(), random(6, 4)
    y, y_masked = masked_targets(kind, 6)
    draws = 2000 if labels == "mc" else 1
    options = {"labels": labels, "approximation": "xkfac", "draws": draws}
    expected = ek.estimate_curvature(model, [(x, y)], **options)
    masked = nn.Sequential(*model, Masked(count=2))
    found = ek.estimate_curvature(masked, [(x, y_masked)], **options)
    assert found.loss == pytest.approx(expected.loss, rel=1e-13)
    for layer in expected:
        error = relative_error(dense_block(found[layer]), dense_block(expected[layer]))
        assert error < (0.1 if labels == "mc" else 1e-12)


@pytest.mark.parametrize("kind", ["labels", "probabilities"])
def test_the_loss_over_masked_classes_has_a_gradient(kind):
    z = random(6, 3).requires_grad_()
    y, y_masked = masked_targets(kind, 6)
    ours = CrossEntropy().loss(Masked(count=2)(z), y_masked)
    theirs = F.cross_entropy(z, y)
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=0)
    torch.testing.assert_close(torch.autograd.grad(ours, z), torch.autograd.grad(theirs, z))


LOGITS = {
    "a row all masked": (Masked(count=1), lambda z: torch.full_like(z, -INF), "all minus infinity"),
    "NaN": (nn.Identity(), lambda z: z * math.nan, "finite"),
    "plus infinity": (Masked(INF), lambda z: z, "finite"),
    "NaN beside masked classes": (Masked(), lambda z: z * math.nan, "finite"),
}


class Changed(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, z):
        return self.change(z)


@pytest.mark.parametrize("case", LOGITS)
def test_other_logits_that_are_not_finite_are_refused(case):
    module, change, message = LOGITS[case]
    model = nn.Sequential(*NETWORKS["mlp"].make(), Changed(change), module)
    with pytest.raises(NonFiniteError, match=f"model.*{message}"):
        ek.estimate_curvature(model, [(random(4, 4), torch.ones(4).long())])


@pytest.mark.parametrize("loss", ["mse", "bce"])
def test_other_losses_take_no_infinite_outputs(loss):
    model = nn.Sequential(*NETWORKS["mlp"].make(), Masked())
    with pytest.raises(NonFiniteError, match="model.*finite"):
        ek.estimate_curvature(model, [(random(4, 4), torch.zeros(4, 4).double())], loss=loss)


# --- what cannot be right is refused --------------------------------------------------------------

REFUSED = {
    "a label of a masked class": (
        CrossEntropy(),
        Masked()(random(4, 3)),
        torch.tensor([1, 0, 2, 3]),
        LabelError,
        "not masked, got 0",
    ),
    "a probability at a masked class": (
        CrossEntropy(),
        Masked()(random(4, 3)),
        torch.full((4, 4), 0.25).double(),
        LabelError,
        "masked classes",
    ),
    "a negative probability": (
        CrossEntropy(),
        random(4, 3),
        -soft(4, 3),
        LabelError,
        ">= 0",
    ),
    "NaN probabilities": (
        CrossEntropy(),
        random(4, 3),
        soft(4, 3) * math.nan,
        NonFiniteError,
        "cross_entropy: targets",
    ),
    "infinite targets": (MSE(), random(4, 3), random(4, 3) * INF, NonFiniteError, "mse: targets"),
    "NaN targets": (BCE(), random(4, 3), random(4, 3) * math.nan, NonFiniteError, "bce: targets"),
    "targets below 0": (BCE(), random(4, 3), random(4, 3), LabelError, r"\[0, 1\]"),
    "complex outputs": (MSE(), random(4, 3) * 1j, random(4, 3), DtypeError, "complex128"),
    "complex targets": (MSE(), random(4, 3), random(4, 3) * 1j, LabelError, "complex128"),
    "integer outputs": (MSE(), torch.ones(4, 3).long(), random(4, 3), DtypeError, "int64"),
    "no outputs": (MSE(), random(4, 0), random(4, 0), ShapeError, r"\(4, 0\)"),
    "no classes": (CrossEntropy(), random(4, 0), torch.zeros(4).long(), ShapeError, r"\(4, 0\)"),
    "no locations": (
        CrossEntropy(),
        random(4, 3, 0),
        torch.zeros(4, 0).long(),
        ShapeError,
        r"\(4, 3, 0\)",
    ),
    "nothing but ignored labels": (
        CrossEntropy(),
        random(4, 3),
        torch.full((4,), -100),
        LabelError,
        "only ignore_index",
    ),
    "a scalar target": (MSE(), random(4, 3), torch.tensor(1.0), LabelError, "4 examples"),
    "targets of other examples": (
        CrossEntropy(),
        random(4, 3),
        torch.zeros(8).long(),
        LabelError,
        r"4 examples on axis 0, got shape \(8,\)",
    ),
    "outputs of other examples": (
        CrossEntropy(),
        random(6, 3),
        torch.zeros(6).long(),
        ShapeError,
        r"4 examples on axis 0, got \(6, 3\)",
    ),
    "three axes of outputs of other examples": (
        CrossEntropy(),
        random(8, 3, 2),
        torch.zeros(8, 2).long(),
        ShapeError,
        r"\[N \* T, C\]",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    likelihood, outputs, targets, error, message = REFUSED[case]

    def check():
        arranged = likelihood.arranged(outputs, targets, examples=4)
        likelihood.validate(*arranged)
        likelihood.check_outputs(*arranged)

    with pytest.raises(error, match=message):
        check()


def test_a_mini_batch_of_ignored_labels_adds_nothing_to_a_sum():
    model, y = NETWORKS["mlp"].make(), torch.tensor([2, -100, 1, 0])
    batches = [(random(4, 4), y), (random(4, 4, seed=1), torch.full((4,), -100))]
    options = {"loss": CrossEntropy("sum"), "approximation": "diagonal", "labels": "exact"}
    found = ek.estimate_curvature(model, batches, **options)
    alone = ek.estimate_curvature(model, batches[:1], **options)
    for layer in found:
        torch.testing.assert_close(found[layer].values, 0.5 * alone[layer].values)
    with pytest.raises(LabelError, match="only ignore_index"):
        ek.estimate_curvature(model, batches)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool, torch.int16])
def test_labels_of_any_integer_dtype_are_taken(dtype):
    model, x, y = NETWORKS["mlp"].make(), random(6, 4), torch.arange(6) % 2
    options = {"labels": "empirical", "approximation": "xkfac"}
    expected = ek.estimate_curvature(model, [(x, y)], **options)
    found = ek.estimate_curvature(model, [(x, y.to(dtype))], **options)
    assert found.loss == expected.loss
    assert all(torch.equal(found[n].dense(), expected[n].dense()) for n in expected)


@pytest.mark.parametrize("loss", ["mse", "bce"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_real_targets_of_another_dtype_are_taken(dtype, loss):
    model, x = NETWORKS["mlp"].make(), random(6, 4)
    t = torch.randint(2, (6, 3), generator=torch.Generator().manual_seed(0))
    options = {"labels": "empirical", "approximation": "xkfac", "loss": loss}
    expected = ek.estimate_curvature(model, [(x, t.double())], **options)
    found = ek.estimate_curvature(model, [(x, t.to(dtype))], **options)
    assert found.loss == expected.loss
    assert all(torch.equal(found[n].dense(), expected[n].dense()) for n in expected)


def test_uint8_masks_may_ignore_255():
    model, x, y = NETWORKS["mlp"].make(), random(6, 4), torch.arange(6) % 3
    y[2] = -100
    options = {"labels": "exact", "approximation": "xkfac"}
    expected = ek.estimate_curvature(model, [(x, y)], **options)
    mask = torch.where(y < 0, 255, y).to(torch.uint8)
    found = ek.estimate_curvature(
        model, [(x, mask)], loss=CrossEntropy(ignore_index=255), **options
    )
    assert found.loss == expected.loss
    assert all(torch.equal(found[n].dense(), expected[n].dense()) for n in expected)
