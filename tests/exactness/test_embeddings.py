"""Embeddings, held against a Linear without bias on one-hot inputs."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import ekfac_rs as ek
from cases import APPROXIMATIONS, LOSSES, MeanOverPositions, OverPositions
from ekfac_rs.errors import NumericalError, UnsupportedLayerError
from oracle import exact_block_of_loader, relative_error

VOCABULARY, WIDTH = 5, 3
EXACT = 1e-12


class OneHot(nn.Module):
    """What an Embedding is: a Linear without bias on one-hot vectors, zero for the padding."""

    def __init__(self, embedding):
        super().__init__()
        self.linear = nn.Linear(VOCABULARY, WIDTH, bias=False).double()
        self.linear.weight.data.copy_(embedding.weight.data.T)

    def forward(self, x):
        return self.linear(x)


def one_hot(tokens, padding=None):
    vectors = F.one_hot(tokens, VOCABULARY).double()
    if padding is not None:
        vectors[..., padding] = 0.0
    return vectors


def words(embedding):
    """One token an example, a BatchNorm on what is made of it."""
    return [embedding, nn.Linear(WIDTH, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)]


def straight_into_batchnorm(embedding):
    return [embedding, nn.BatchNorm1d(WIDTH), nn.Tanh(), nn.Linear(WIDTH, 3)]


def sentences(embedding):
    """Several tokens an example, a BatchNorm over features of all of them."""
    return [
        *(embedding, nn.Linear(WIDTH, 4), OverPositions(4), nn.Tanh()),
        *(MeanOverPositions(), nn.Linear(4, 3)),
    ]


NETS = {
    "words": (words, ()),
    "into BN": (straight_into_batchnorm, ()),
    "sentences": (sentences, (4,)),
}


def pair(name, padding=None, seed=0):
    """The network with an Embedding, one with a Linear on one-hot inputs, and inputs of both."""
    build, shape = NETS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        embedding = nn.Embedding(VOCABULARY, WIDTH, padding_idx=padding)
        model = nn.Sequential(*build(embedding)).double()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
                nn.init.normal_(module.running_mean)
        other = copy.deepcopy(model)
        other[0] = OneHot(embedding).linear
        batches = []
        for size in (6, 4):
            tokens = torch.randint(VOCABULARY, (size, *shape))
            batches.append((tokens, torch.randint(3, (size,))))
    return model, other, batches, [(one_hot(x, padding), y) for x, y in batches]


def blocks(name, padding=None, **options):
    """The Embedding's block and the one of the Linear, dense."""
    model, other, batches, vectors = pair(name, padding)
    options = {"labels": "exact", **options}
    own = ek.estimate_curvature(model, batches, **options)["0"]
    if name == "into BN":
        # A BatchNorm is never merged into an Embedding, but a layer of its own.
        options["coordinates"] = "raw"
    return own, ek.estimate_curvature(other, vectors, **options)["0"].dense()


def within_tokens(dense):
    """The part of a dense block between equal tokens."""
    token = torch.arange(len(dense)) % VOCABULARY
    return dense * (token[:, None] == token)


@pytest.mark.parametrize("padding", [None, 2])
@pytest.mark.parametrize("statistics", ["batch", "running"])
@pytest.mark.parametrize("coordinates", ["raw", "merged"])
@pytest.mark.parametrize("approximation", [*APPROXIMATIONS, "diagonal"])
@pytest.mark.parametrize("name", NETS)
def test_it_is_the_one_hot_linear_between_equal_tokens(
    name, approximation, coordinates, statistics, padding
):
    block, dense = blocks(
        name, padding, approximation=approximation, coordinates=coordinates, statistics=statistics
    )
    assert relative_error(block.dense(), within_tokens(dense)) < EXACT


@pytest.mark.parametrize("name", NETS)
def test_of_kfac_expand_nothing_is_neglected_and_of_the_strata_something_is(name):
    block, dense = blocks(name, approximation="kfac-expand")
    assert relative_error(block.dense(), dense) < EXACT
    block, dense = blocks(name, approximation="xkfac")
    assert relative_error(block.dense(), dense) > 0.01


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_before_a_linear_network_kfac_is_exact_for_squared_error_and_for_no_other(loss):
    model, other, batches, vectors = pair("words")
    linear = nn.Sequential(model[0], model[1], nn.Linear(4, 3).double())
    reference = nn.Sequential(other[0], *linear[1:])
    if loss == "mse":
        batches, vectors = (
            [(x, torch.randn(len(x), 3, dtype=torch.float64)) for x, _ in b]
            for b in (batches, vectors)
        )
    block = ek.estimate_curvature(
        linear, batches, loss=loss, approximation="kfac-expand", labels="exact"
    )["0"]
    exact = exact_block_of_loader(reference, "0", vectors, LOSSES[loss].of_example)
    error = relative_error(block.dense(), exact)
    assert error < EXACT if loss == "mse" else error > 0.01


def test_passes_merge_as_one_and_files_keep_every_bit(tmp_path):
    model, _, batches, _ = pair("sentences")
    options = {"labels": "exact", "approximation": "xkfac-nested"}
    whole = ek.estimate_curvature(model, batches, **options)
    first, second = (ek.estimate_curvature(model, [batch], **options) for batch in batches)
    assert relative_error(first.merge(second)["0"].dense(), whole["0"].dense()) < EXACT
    for storage, tolerance in (("full", 0.0), ("triangle", 0.0), ("half", 1e-3)):
        whole.save(tmp_path / storage, storage=storage)
        loaded = ek.Curvature.load(tmp_path / storage)
        assert isinstance(loaded["0"], ek.ColumnwiseSum)
        assert relative_error(loaded["0"].dense(), whole["0"].dense()) <= tolerance


def test_mc_labels_average_to_the_exact_ones():
    model, _, batches, _ = pair("sentences")
    exact = ek.estimate_curvature(model, batches, labels="exact")["0"].dense()
    drawn = ek.estimate_curvature(
        model, batches, draws=4000, generator=torch.Generator().manual_seed(0)
    )["0"].dense()
    assert relative_error(drawn, exact) < 0.1


def test_the_penalty_on_it_is_the_dense_one():
    model, _, batches, _ = pair("sentences")
    curvature = ek.estimate_curvature(model, batches, labels="exact")
    x = batches[0][0]
    anchor = ek.merged_weights(model, example=x)
    with torch.no_grad():
        model[0].weight.add_(0.3)
    with ek.QuadraticPenalty(model.eval(), curvature, anchor, damping=0.1) as penalty:
        value = penalty()
        (gradient,) = torch.autograd.grad(value, model[0].weight)
    D = torch.full((WIDTH * VOCABULARY,), 0.3, dtype=torch.float64)
    expected = curvature["0"].dense() @ D + 0.1 * D
    torch.testing.assert_close(value.detach(), 0.5 * D @ expected)
    torch.testing.assert_close(gradient, expected.reshape(WIDTH, VOCABULARY).T)


def test_a_learner_trains_and_consolidates_it():
    model, _, batches, _ = pair("sentences")
    learner = ek.ContinualLearner(model, damping=0.01)
    for _ in range(2):
        learner.fit(batches, epochs=2, lr=0.01)
        learner.consolidate(batches)
    assert learner.task == 2


def test_no_matrix_over_the_vocabulary_is_ever_made():
    """With 300,000 tokens one of these alone would be 360 GB."""
    model = nn.Sequential(nn.Embedding(300_000, 4), nn.Linear(4, 2))
    tokens = torch.randint(300_000, (64,), generator=torch.Generator().manual_seed(0))
    curvature = ek.estimate_curvature(model, [(tokens, tokens % 2)])
    block = curvature["0"]
    assert block.shape == (4, 300_000)
    V = torch.ones(block.shape)
    assert block.quadratic(V) == pytest.approx(float((V * block.product(V)).sum()), rel=1e-5)
    seen = block.product(V).any(0)
    assert set(seen.nonzero().flatten().tolist()) <= set(tokens.tolist())
    assert block.top_eigenvalue() > 0.0
    assert float((block.solve(block.product(V) + V, damping=1.0) - V).abs().max()) < 1e-4


def test_describe_and_memory():
    description = ek.describe(pair("words")[0])
    by_name = {p.name: p for p in description.parameters}
    assert by_name["0.weight"].block == f"Kronecker {WIDTH} x {VOCABULARY}, each token for itself"
    # Three strata of float64.
    assert description.factor_bytes["0"] == 3 * 8 * (VOCABULARY + WIDTH**2)


class Tied(nn.Module):
    """A decoder that is the Embedding's transpose."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Embedding(VOCABULARY, WIDTH)

    def forward(self, x):
        return F.linear(self.encoder(x).tanh(), self.encoder.weight)


REFUSED = {
    "max_norm": lambda: nn.Sequential(nn.Embedding(5, 3, max_norm=1.0)),
    "scale_grad_by_freq": lambda: nn.Sequential(nn.Embedding(5, 3, scale_grad_by_freq=True)),
    "sparse": lambda: nn.Sequential(nn.Embedding(5, 3, sparse=True)),
    "EmbeddingBag": lambda: nn.Sequential(nn.EmbeddingBag(5, 3)),
    "encoder": Tied,
}


@pytest.mark.parametrize("word", REFUSED)
def test_what_is_no_plain_embedding_is_refused_by_name(word):
    x = torch.tensor([[0, 1], [2, 3]])
    with pytest.raises(UnsupportedLayerError, match=word):
        ek.estimate_curvature(REFUSED[word](), [(x, torch.tensor([0, 1]))])


# --- the block's algebra, against the dense matrix ------------------------------------------------


def random_block(terms, seed, D=3, K=6):
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for _ in range(terms):
        root = torch.randn(D, D, generator=generator, dtype=torch.float64)
        a = torch.rand(K, generator=generator, dtype=torch.float64)
        a[0] = 0.0  # a token that was never seen
        pairs.append((a, root @ root.T))
    return ek.ColumnwiseSum(pairs)


@settings(deadline=None, max_examples=30)
@given(terms=st.integers(1, 3), seed=st.integers(0, 1000), damping=st.sampled_from([0.1, 2.0]))
def test_its_algebra_is_that_of_the_dense_matrix(terms, seed, damping):
    block, other = random_block(terms, seed), random_block(2, seed + 1)
    dense = sum(torch.kron(G, torch.diag(a)) for a, G in block.terms)
    damped = dense + damping * torch.eye(len(dense))
    V = torch.randn(2, *block.shape, generator=torch.Generator().manual_seed(seed)).double()
    rows = V.flatten(1)
    torch.testing.assert_close(block.dense(), dense)
    torch.testing.assert_close(block.product(V).flatten(1), rows @ dense)
    assert block.quadratic(V) == pytest.approx(float((rows @ dense * rows).sum()))
    assert block.trace() == pytest.approx(float(dense.trace()))
    assert block.norm() == pytest.approx(float(dense.norm()))
    assert block.inner(other) == pytest.approx(float((dense * other.dense()).sum()))
    torch.testing.assert_close(block.diagonal().flatten(), dense.diagonal())
    torch.testing.assert_close((block + other).dense(), dense + other.dense())
    torch.testing.assert_close((0.5 * block).dense(), 0.5 * dense)
    top = float(torch.linalg.eigvalsh(dense)[-1])
    assert block.top_eigenvalue(damping) == pytest.approx(top + damping, rel=1e-3)
    solved = block.solve(V, damping).flatten(1)
    torch.testing.assert_close(solved, torch.linalg.solve(damped, rows.T).T)
    assert block.logdet(damping) == pytest.approx(float(torch.logdet(damped)))


@pytest.mark.parametrize("terms", [1, 2])
def test_samples_have_the_inverse_as_covariance(terms):
    block = random_block(terms, seed=3)
    samples = block.sample(40_000, damping=0.5, generator=torch.Generator().manual_seed(0))
    rows = samples.flatten(1)
    expected = torch.linalg.inv(block.dense() + 0.5 * torch.eye(18))
    assert relative_error(rows.T @ rows / len(rows), expected) < 0.05


def test_a_singular_block_is_a_numerical_error():
    for terms in (1, 2):
        block = random_block(terms, seed=0)
        with pytest.raises(NumericalError, match="singular"):
            block.solve(torch.ones(block.shape, dtype=torch.float64))


def test_compressing_finds_the_nearest_sums():
    block = random_block(3, seed=1)
    errors = [relative_error(block.compress(n).dense(), block.dense()) for n in (1, 2, 3)]
    assert all(a > b for a, b in itertools.pairwise(errors))
    assert errors[-1] == 0.0
    # Rows of (a, vec G): the nearest sum of n is the truncated singular value decomposition.
    matrix = sum(torch.outer(a, G.flatten()) for a, G in block.terms)
    sizes = torch.linalg.svdvals(matrix)
    assert errors[0] == pytest.approx(float(sizes[1:].norm() / sizes.norm()), rel=1e-8)
