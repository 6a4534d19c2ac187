"""Embeddings: blocks of each token for itself, by definition and where the answer is known."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ekfac_rs as ek
from cases import (
    APPROXIMATIONS,
    COORDINATES,
    EMBEDDINGS,
    LOSSES,
    MeanOverSequence,
    TokenNetwork,
    estimate,
)
from ekfac_rs.errors import OptionError, UnsupportedLayerError
from ekfac_rs.layers import find_layers
from oracle import (
    diagonal_from_units,
    exact_block,
    exact_block_of_loader,
    relative_error,
    strata_terms,
    units_of,
)

EXACT = 1e-10
DIFFERENT = 1e-3
MODES = [
    {"coordinates": coordinates, "statistics": statistics}
    for coordinates in COORDINATES
    for statistics in ("batch", "running")
]
ALL = [*APPROXIMATIONS, "diagonal"]


def of_equal_tokens(matrix: Tensor, tokens: int = 7) -> Tensor:
    """A block ``[D * V, D * V]`` with zeros between different tokens."""
    rows = torch.arange(len(matrix)) % tokens
    return matrix * (rows[:, None] == rows)


def strata_of_equal_tokens(approximation: str, units: list) -> Tensor:
    terms = strata_terms(approximation, units)
    return of_equal_tokens(sum(torch.kron(G, A) for A, G in terms))


# --- definitions --------------------------------------------------------------------------


@pytest.mark.parametrize("modes", MODES)
@pytest.mark.parametrize("name", EMBEDDINGS)
def test_blocks_are_the_strata_of_one_hot_units_between_equal_tokens(name, modes, device):
    network = EMBEDDINGS[name]
    model, batches = network.make(), network.batches("cross_entropy", (5, 3))
    of_example = LOSSES["cross_entropy"].of_example
    units = [units_of(model, "0", batch, of_example, **modes) for batch in batches]
    for approximation in APPROXIMATIONS:
        options = {"approximation": approximation, **modes}
        block = estimate(model, batches, "cross_entropy", device, **options)["0"]
        assert block.shape == (4, 7)
        expected = strata_of_equal_tokens(approximation, units)
        assert relative_error(block.dense().cpu(), expected) < EXACT, approximation


@pytest.mark.parametrize("modes", MODES)
@pytest.mark.parametrize("name", EMBEDDINGS)
def test_the_diagonal_is_made_of_each_examples_gradient(name, modes):
    network = EMBEDDINGS[name]
    model, (batch,) = network.make(), network.batches("bce", (5,))
    block = estimate(model, [batch], "bce", approximation="diagonal", **modes)["0"]
    of_example = LOSSES["bce"].of_example
    units = units_of(model, "0", batch, of_example, **modes)
    assert relative_error(block.values, diagonal_from_units(units)) < EXACT
    exact = exact_block(model, "0", batch, of_example, **modes).diagonal()
    error = relative_error(block.values.flatten(), exact)
    interacting = modes["statistics"] == "batch" and "linear" not in name
    if not interacting:
        assert error < EXACT


@pytest.mark.parametrize("approximation", ALL)
@pytest.mark.parametrize("name", ["token", "sequence with padding"])
def test_it_is_a_linear_on_one_hot_inputs_between_equal_tokens(name, approximation):
    network = EMBEDDINGS[name]
    model, batches = network.make(), network.batches("cross_entropy", (5, 3))
    linear = nn.Linear(7, 4, bias=False).double()
    linear.weight.data.copy_(model[0].weight.T)
    padding = model[0].padding_idx
    hot = []
    for x, y in batches:
        a = F.one_hot(x, 7).double()
        if padding is not None:
            a[..., padding] = 0.0
            linear.weight.data[:, padding] = model[0].weight.data[padding] = 0.0
        hot.append((a, y))
    as_linear = nn.Sequential(linear, *model[1:])
    options = {"approximation": approximation, "coordinates": "merged"}
    found = estimate(model, batches, "cross_entropy", **options)["0"]
    # In merged coordinates the Linear would take up a BatchNorm that comes right after it.
    expected = estimate(as_linear, hot, "cross_entropy", **options)["0"].dense()
    assert relative_error(found.dense(), of_equal_tokens(expected)) < 1e-12
    if approximation in ("xkfac", "xkfac-nested", "kfac-reduce") and name != "token":
        assert relative_error(found.dense(), expected) > DIFFERENT


def test_padding_and_tokens_that_are_not_seen_weigh_nothing():
    network = EMBEDDINGS["sequence with padding"]
    model, batches = network.make(), network.batches("cross_entropy", (6,))
    assert (batches[0][0] == 1).any()
    assert not (batches[0][0] == 6).any()
    for approximation in ALL:
        diagonal = estimate(model, batches, "cross_entropy", approximation=approximation)[
            "0"
        ].diagonal()
        seen = diagonal.ne(0.0).all(0).tolist()
        assert [seen[1], seen[6]] == [False, False]
        assert seen[0]
        assert not diagonal[:, [1, 6]].any()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_tokens_of_any_integers_and_axes(dtype):
    network = EMBEDDINGS["linear pooled"]
    model, ((x, y),) = network.make(), network.batches("cross_entropy", (6,))
    expected = estimate(model, [(x, y)], "cross_entropy")["0"].dense()
    found = estimate(model, [(x.to(dtype), y)], "cross_entropy")["0"].dense()
    assert relative_error(found, expected) < 1e-14
    # Two axes of locations.
    folded = nn.Sequential(model[0], nn.Flatten(1, 2), *model[1:])
    found = estimate(folded, [(x.reshape(6, 2, 2), y)], "cross_entropy")["0"].dense()
    assert relative_error(found, expected) < 1e-14


@pytest.mark.parametrize("approximation", ALL)
def test_examples_and_locations_on_one_axis(approximation):
    class Flat(nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, x):
            return self.network(x.flatten())

    network = EMBEDDINGS["linear token"]
    model = network.make()
    x = torch.randint(7, (3, 4), generator=torch.Generator().manual_seed(0))
    y = torch.randint(3, (3, 4), generator=torch.Generator().manual_seed(1))
    options = {"approximation": approximation}
    flat = estimate(Flat(model), [(x, y.flatten())], "cross_entropy", **options)["network.0"]

    class ClassesOnAxis1(nn.Module):
        def forward(self, h):
            return h.transpose(1, 2)

    whole = nn.Sequential(*model, ClassesOnAxis1())
    expected = estimate(whole, [(x, y)], "cross_entropy", **options)["0"]
    assert relative_error(flat.dense(), expected.dense()) < 1e-12


@pytest.mark.parametrize("approximation", ALL)
@pytest.mark.parametrize("name", EMBEDDINGS)
def test_single_precision_is_close_to_double(name, approximation, device):
    network = EMBEDDINGS[name]
    model, batches = network.make(), network.batches("cross_entropy", (4, 3))
    options = {"approximation": approximation, "coordinates": "merged"}
    double = estimate(model, batches, "cross_entropy", **options)["0"]
    found = estimate(model.float(), batches, "cross_entropy", device, **options)["0"]
    assert found.dtype == torch.float32
    assert relative_error(found.dense().cpu(), double.dense()) < 1e-5


# --- known answers ------------------------------------------------------------------------


@pytest.mark.parametrize("approximation", APPROXIMATIONS)
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_tokens_on_their_own_under_a_linear_net_are_exact(loss, approximation):
    network = EMBEDDINGS["linear token"]
    model, batches = network.make(), network.batches(loss, (6, 1, 3))
    of_example = LOSSES[loss].of_example
    exact = exact_block_of_loader(
        model, "0", batches, of_example, coordinates="raw", statistics="running"
    )
    # Tokens that are seen apart make a block without products of different ones.
    assert relative_error(of_equal_tokens(exact), exact) < 1e-14
    options = {"approximation": approximation, "statistics": "running"}
    block = estimate(model, batches, loss, **options)["0"]
    error = relative_error(block.dense(), exact)
    # The variance between examples is n - n^2 / N over N - 1, their mean makes up for it.
    assert error < EXACT if loss == "mse" else error > DIFFERENT


@pytest.mark.parametrize("approximation", APPROXIMATIONS)
def test_squared_error_on_every_location_is_exact_for_expand(approximation):
    network = EMBEDDINGS["linear sequence"]
    model, batches = network.make(), network.batches("mse", (5, 1, 2))
    of_example = LOSSES["mse"].of_example
    exact = exact_block_of_loader(model, "0", batches, of_example, statistics="running")
    options = {"approximation": approximation, "statistics": "running"}
    error = relative_error(estimate(model, batches, "mse", **options)["0"].dense(), exact)
    if approximation == "kfac-reduce":
        assert error > DIFFERENT
    else:
        assert error < EXACT


@pytest.mark.parametrize("approximation", APPROXIMATIONS)
def test_squared_error_of_a_mean_is_exact_for_reduce_between_equal_tokens(approximation):
    network = EMBEDDINGS["linear pooled"]
    model, batches = network.make(), network.batches("mse", (5, 1, 2))
    of_example = LOSSES["mse"].of_example
    exact = exact_block_of_loader(model, "0", batches, of_example, statistics="running")
    options = {"approximation": approximation, "statistics": "running"}
    dense = estimate(model, batches, "mse", **options)["0"].dense()
    error = relative_error(dense, of_equal_tokens(exact))
    if approximation in ("kfac-reduce", "xkfac-nested"):
        assert error < EXACT
    else:
        assert error > DIFFERENT
    assert relative_error(dense, exact) > DIFFERENT


@pytest.mark.parametrize("approximation", ALL)
def test_merging_of_passes_and_order_of_examples(approximation):
    for name in ("token", "sequence with padding"):
        network = EMBEDDINGS[name]
        model, batches = network.make(), network.batches("cross_entropy", (5, 3, 1, 2))
        if approximation != "diagonal" and name == "token":
            batches = [b for b in batches if len(b[0]) > 1]
        options = {"approximation": approximation, "statistics": "running"}
        whole, first, rest = (
            estimate(model, part, "cross_entropy", **options)
            for part in (batches, batches[:1], batches[1:])
        )
        merged = first.merge(rest)["0"]
        assert relative_error(merged.dense(), whole["0"].dense()) < 1e-12
        shuffled = [(x.flip(0), y.flip(0)) for x, y in batches]
        found = estimate(model, shuffled, "cross_entropy", **options)["0"]
        assert relative_error(found.dense(), whole["0"].dense()) < 1e-12


# --- found, described, merged, penalised, stored, refused -------------------------------------


@pytest.mark.parametrize("observed", [False, True], ids=["traced", "observed"])
def test_a_batchnorm_after_it_is_a_layer_of_its_own(observed):
    network = EMBEDDINGS["token before BatchNorm"]
    model, ((x, _),) = network.make().eval(), network.batches("mse", (5,))
    found = find_layers(model, example=x if observed else None)
    assert [(layer.name, layer.batchnorm_name) for layer in found] == [
        ("0", None),
        ("1", "1"),
        ("3", None),
    ]
    before = model(x)
    weights = ek.merged_weights(model, example=x if observed else None)
    assert torch.equal(weights["0"], model[0].weight.T)
    ek.reparameterize(model, [x])
    assert relative_error(model(x), before) < 1e-12
    ek.merge_batchnorm(model, example=x)
    assert relative_error(model(x), before) < 1e-12


def test_it_is_described_with_the_memory_that_it_takes():
    model = nn.Sequential(nn.Embedding(50_000, 8), nn.Linear(8, 2))
    description = ek.describe(model, approximation="xkfac")
    assert description.parameters[0].block == "Kronecker 8 x 50000, each token for itself"
    assert description.factor_bytes["0"] == 2 * 4 * (50_000 + 64)


@pytest.mark.parametrize("approximation", ALL)
@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_the_penalty_is_the_quadratic_form_of_the_block(training, coordinates, approximation):
    network = EMBEDDINGS["sequence with padding"]
    model, batches = network.make(), network.batches("cross_entropy", (6,))
    options = {"approximation": approximation, "coordinates": coordinates}
    curvatures = [ek.estimate_curvature(model, batches, **options) for _ in range(2)]
    anchor_of = ek.merged_weights if coordinates == "merged" else ek.raw_weights
    anchor = anchor_of(model, example=batches[0][0])
    penalty = ek.QuadraticPenalty(model, curvatures, anchor, damping=0.1, scale=2.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.train(training)(batches[0][0])
    deviations = {name: D.detach() for name, D in penalty.deviations().items()}
    expected = sum(
        sum(c[name].quadratic(D) for c in curvatures) + 0.05 * D.square().sum().item()
        for name, D in deviations.items()
    )
    value = penalty()
    assert value.item() == pytest.approx(expected, rel=1e-9)
    value.backward()
    if training and coordinates == "merged":
        return  # the statistics of the BatchNorms after it depend on it, too
    D = deviations["0"]
    gradient = 2.0 * sum(c["0"].product(D) for c in curvatures) + 0.1 * D
    assert relative_error(model[0].weight.grad.T, gradient) < 1e-10
    assert penalty.max_stable_lr() > 0.0


@pytest.mark.parametrize("approximation", ALL)
@pytest.mark.parametrize("storage", ["full", "triangle", "half"])
def test_files_keep_it(storage, approximation, tmp_path):
    network = EMBEDDINGS["sequence with padding"]
    model, batches = network.make(), network.batches("cross_entropy", (6,))
    curvature = estimate(model, batches, "cross_entropy", approximation=approximation)
    curvature.save(tmp_path / "file", storage=storage)
    loaded = ek.Curvature.load(tmp_path / "file")
    assert type(loaded["0"]) is type(curvature["0"])
    error = relative_error(loaded["0"].dense(), curvature["0"].dense())
    assert error < (1e-3 if storage == "half" else 1e-15)
    again = loaded.merge(curvature)
    assert relative_error(again["0"].dense(), curvature["0"].dense()) < 1e-3


REFUSED = {
    "max_norm": {"max_norm": 1.0},
    "sparse": {"sparse": True},
    "scale_grad_by_freq": {"scale_grad_by_freq": True},
}


@pytest.mark.parametrize("option", REFUSED)
def test_an_embedding_that_is_not_plain_is_refused_before_it_is_run(option):
    model = nn.Sequential(nn.Embedding(7, 4, **REFUSED[option]), nn.Linear(4, 3))
    before = copy.deepcopy(model.state_dict())
    x = torch.arange(6)
    batches = [(x, x % 3)]
    calls = {
        "find": lambda: find_layers(model, example=x),
        "named": lambda: find_layers(model, layers=["0"], example=x),
        "merged": lambda: ek.merged_weights(model),
        "estimate": lambda: ek.estimate_curvature(model, batches),
    }
    for call in calls.values():
        with pytest.raises(UnsupportedLayerError, match=f"'0.*plain Embedding, got {option}="):
            call()
    assert torch.equal(before["0.weight"], model[0].weight)
    assert option in ek.describe(model).parameters[0].block


def test_an_embedding_called_otherwise_than_it_promises_is_refused():
    class Renormed(nn.Embedding):
        def forward(self, x):
            return F.embedding(x, self.weight, max_norm=1.0)

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(7, 4)

        def forward(self, x):
            return self.embedding(x) @ self.embedding.weight.T

    x = torch.arange(6)
    for example in (None, x):
        with pytest.raises(UnsupportedLayerError, match="'0': .*max_norm"):
            find_layers(nn.Sequential(Renormed(7, 4)), example=example)
        with pytest.raises(UnsupportedLayerError, match="'embedding': .*weight.*'T'"):
            find_layers(Tied(), example=example)
    with pytest.raises(UnsupportedLayerError, match="EmbeddingBag has no"):
        find_layers(nn.Sequential(nn.EmbeddingBag(7, 4)))


def test_drawn_labels_average_to_the_exact_ones():
    network = EMBEDDINGS["sequence with padding"]
    model, batches = network.make(), network.batches("cross_entropy", (6,))
    exact = estimate(model, batches, "cross_entropy")["0"].dense()
    options = {"labels": "mc", "draws": 4000, "generator": torch.Generator().manual_seed(0)}
    drawn = estimate(model, batches, "cross_entropy", **options)["0"].dense()
    assert relative_error(drawn, exact) < 0.1


def test_a_learner_trains_and_consolidates_it():
    network = EMBEDDINGS["sequence with padding"]
    model, batches = network.make(), network.batches("cross_entropy", (6, 4))
    before = model[0].weight.detach().clone()
    learner = ek.ContinualLearner(model, damping=0.01)
    for task in (1, 2):
        learner.fit(batches, epochs=2, lr=0.01)
        learner.consolidate(batches)
        assert learner.task == task
    assert not torch.equal(model[0].weight[0], before[0])


def test_a_large_vocabulary_makes_neither_one_hot_inputs_nor_a_square_matrix():
    tokens, width = 200_000, 4
    network = TokenNetwork(
        lambda: nn.Sequential(nn.Embedding(tokens, width), MeanOverSequence(), nn.Linear(4, 3)),
        (16,),
        (3,),
        tokens,
    )
    model, batches = network.make(), network.batches("cross_entropy", (64,))
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for leaf in torch.utils._pytree.tree_leaves(out):
                if isinstance(leaf, Tensor):
                    largest = max(largest, leaf.numel())
            return out

    with Watch():
        curvature = estimate(model, batches, "cross_entropy", approximation="xkfac-nested")
        diagonal = estimate(model, batches, "cross_entropy", approximation="diagonal")
        block = curvature["0"]
        V = torch.randn(width, tokens, dtype=torch.float64)
        block.product(V)
        block.top_eigenvalue()
        block.solve(V, damping=0.1)
        block.logdet(0.1)
    # Its own weights have four numbers for each token; a one-hot batch would have 1,024.
    assert largest <= 4 * width * tokens
    assert diagonal["0"].shape == block.shape == (width, tokens)
    with pytest.raises(OptionError):
        block.compress(0)
