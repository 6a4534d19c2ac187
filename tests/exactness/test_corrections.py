"""Corrections from the gradients of mini-batches: exact in expectation, near the nearest."""

import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ekfac_rs as ek
from cases import EMBEDDINGS, LOSSES, NETWORKS, Network, estimate, with_head
from ekfac_rs.curvature.corrections import Estimate, Mean
from ekfac_rs.errors import OptionError
from ekfac_rs.likelihood import CrossEntropy
from oracle import exact_block_of_loader, relative_error

EXACT = 1e-10
# The share of their size by which factors may move in a round of "nearest" that is the last.
MOVED = 1e-3
CORRECTIONS = ("scale", "eigenvalues", "nearest")
APPROXIMATIONS = ("kfac-expand", "xkfac", "xkfac-nested", "diagonal")
MERGED = {"coordinates": "merged", "statistics": "batch"}
RAW = {"coordinates": "raw", "statistics": "running"}
MODES = [
    *((approximation, MERGED) for approximation in ("kfac-expand", "xkfac", "xkfac-nested")),
    *(("diagonal", MERGED), ("xkfac", RAW), ("xkfac", MERGED | {"statistics": "running"})),
]


def _convolutions() -> nn.Sequential:
    body = [
        *(nn.Conv2d(2, 4, 3, padding=1, stride=2), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.Conv2d(4, 4, (1, 2), groups=2), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.Conv2d(4, 4, 2, groups=4, padding=1, bias=False), nn.Tanh()),
        nn.Conv2d(4, 2, 1),
    ]
    return with_head(body, (2, 4, 4))


def _channels() -> nn.Sequential:
    return nn.Sequential(
        *(nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 4), nn.LayerNorm(4)),
        *(nn.Tanh(), nn.Linear(4, 3)),
    )


def _transposed() -> nn.Sequential:
    body = [nn.ConvTranspose1d(2, 4, 3, stride=2, groups=2), nn.BatchNorm1d(4), nn.ReLU()]
    return with_head(body, (2, 2))


NETS: dict[str, Network] = {
    "mlp-bn": NETWORKS["mlp-bn"],
    "locations-bn": NETWORKS["locations-bn"],
    "convolutions": Network(_convolutions, (2, 4, 4), (3,)),
    "transposed": Network(_transposed, (2, 2), (3,)),
    "channels": Network(_channels, (4,), (3,)),
    "embedding": EMBEDDINGS["sequence with padding"],
}


def blocks(name, modes, *, sizes=(5, 3), **options):
    """Of each layer the exact block and, by correction, those of the package."""
    network = NETS[name]
    model, batches = network.make(), network.batches("cross_entropy", sizes)
    of_example = LOSSES["cross_entropy"].of_example
    found = {
        correction: estimate(
            model, batches, "cross_entropy", correction=correction, **options, **modes
        )
        for correction in (None, *CORRECTIONS)
    }
    for layer in found[None]:
        exact = exact_block_of_loader(model, layer, batches, of_example, **modes)
        yield exact, {correction: curvature[layer] for correction, curvature in found.items()}


def basis_of(block):
    """The eigenvectors of a corrected block as columns of a matrix."""
    if isinstance(block, ek.DiagonalBlock):
        return torch.eye(block.values.numel(), dtype=block.dtype)
    ((U, Q, _),) = block.terms
    U = torch.eye(block.shape[1], dtype=block.dtype) if U is None else U
    if Q.dim() == 2:
        return torch.kron(Q, U)
    return torch.block_diag(*map(torch.kron, Q.unbind(), U.unbind()))


def in_basis_of(found, H):
    """Diagonal of a matrix in the basis of the corrected eigenvalues."""
    block = found["eigenvalues"]
    basis = basis_of(block)
    return (basis.T @ H @ basis).diagonal().reshape(block.shape)


def values_of(block):
    return block.values if isinstance(block, ek.DiagonalBlock) else block.terms[0].values


def positive(block):
    """Whether every term is positive semi-definite, to rounding."""
    if isinstance(block, ek.DiagonalBlock):
        return bool((block.values >= 0).all())
    factors = [F if F.dim() > 1 else F[:, None, None] for term in block.terms for F in term]
    values = [torch.linalg.eigvalsh(F) for F in factors]
    return all(bool((v >= -1e-12 * v.abs().max()).all()) for v in values)


@pytest.mark.parametrize(
    ("name", "approximation", "modes"),
    [(name, *row) for name in ("mlp-bn", "convolutions") for row in MODES]
    + [
        pytest.param(name, *row, marks=[pytest.mark.thorough] if i else [])
        for name in NETS
        for i, row in enumerate(MODES[1:4])
        if name not in ("mlp-bn", "convolutions")
    ],
    ids=lambda m: m if isinstance(m, str) else "-".join(m.values()),
)
def test_they_are_what_they_say_where_labels_are_summed_over(name, approximation, modes):
    for H, found in blocks(name, modes, approximation=approximation):
        plain = found[None].dense()
        best = float((plain * H).sum() / plain.square().sum())
        assert relative_error(found["scale"].dense(), best * plain) < EXACT
        assert relative_error(values_of(found["eigenvalues"]), in_basis_of(found, H)) < EXACT
        assert found["eigenvalues"].trace() == pytest.approx(float(H.trace()))
        errors = {c: relative_error(block.dense(), H) for c, block in found.items()}
        assert errors["nearest"] <= errors["scale"] + EXACT
        assert errors["scale"] <= errors[None] + EXACT
        assert positive(found["nearest"])
        if approximation != "diagonal":
            assert type(found["nearest"]) is type(found[None])
            assert len(found["nearest"].terms) == len(found[None].terms)


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 99),
    sizes=st.lists(st.integers(2, 6), min_size=1, max_size=3),
    approximation=st.sampled_from(["kfac-expand", "xkfac"]),
)
def test_properties_of_random_nets(seed, sizes, approximation):
    """Each correction lowers the error, none depends on the order of examples or mini-batches."""
    network = NETS["mlp-bn"]
    model, batches = network.make(seed), network.batches("cross_entropy", tuple(sizes), seed)
    backwards = [(x.flip(0), y.flip(0)) for x, y in reversed(batches)]
    options = {"approximation": approximation, "layers": ["3"], **MERGED}
    of_example = LOSSES["cross_entropy"].of_example
    H = exact_block_of_loader(model, "3", batches, of_example, **MERGED)
    errors = {}
    for correction in (None, *CORRECTIONS):
        found, again = (
            estimate(model, loader, "cross_entropy", correction=correction, **options)["3"]
            for loader in (batches, backwards)
        )
        errors[correction] = relative_error(found.dense(), H)
        assert torch.linalg.eigvalsh(found.dense())[0] > -1e-10 * found.norm()
        if correction == "eigenvalues":  # in a basis that need not be unique
            assert again.trace() == pytest.approx(found.trace())
        else:
            assert relative_error(again.dense(), found.dense()) < 1e-5
    assert errors["nearest"] <= errors["scale"] + EXACT
    assert errors["scale"] <= errors[None] + EXACT


# --- the nearest of all ---------------------------------------------------------------------------


def nearest_of_all(H, D, K, terms):
    """Error of the best sum of so many Kronecker products: that of its rearrangement's SVD."""
    rearranged = H.reshape(D, K, D, K).permute(0, 2, 1, 3).reshape(D * D, K * K)
    sizes = torch.linalg.svdvals(rearranged)
    return float(sizes[terms:].norm() / sizes.norm())


def symmetric_nonnegative(H, D, K, start, rounds=60):
    """Error of a good sum of positive semi-definite products, as many as the start has.

    By descent on one factor at a time from the start, each the positive part of what is left.
    """
    R = H.reshape(D, K, D, K)

    def positive_part(X):
        values, vectors = torch.linalg.eigh((X + X.T) / 2)
        return (vectors * values.clamp_min(0)) @ vectors.T

    pairs = [list(pair) for pair in start]
    for _ in range(rounds):
        for k, pair in enumerate(pairs):
            others = [torch.einsum("de,kl->dkel", G, A) for A, G in pairs[:k] + pairs[k + 1 :]]
            left = R - sum(others) if others else R
            A, _ = pair
            pair[1] = positive_part(torch.einsum("dkel,kl->de", left, A) / A.square().sum())
            pair[0] = positive_part(
                torch.einsum("dkel,de->kl", left, pair[1]) / pair[1].square().sum()
            )
    return relative_error(sum(torch.kron(G, A) for A, G in pairs), H)


@pytest.mark.parametrize("approximation", ["kfac-expand", "xkfac", "xkfac-nested"])
@pytest.mark.parametrize("name", ["mlp-bn", "locations-bn", "convolutions"])
def test_nearest_is_near_the_nearest_of_all(name, approximation):
    errors, reachable, floors = [], [], []
    for H, found in blocks(name, MERGED, approximation=approximation):
        block = found["nearest"]
        if block.groups > 1:
            continue
        errors.append(relative_error(block.dense(), H))
        floors.append(nearest_of_all(H, *block.shape, len(block.terms)))
        reachable.append(symmetric_nonnegative(H, *block.shape, found[None].terms))
        assert floors[-1] <= errors[-1] + EXACT
    assert len(errors) >= 3
    assert sum(errors) <= 1.3 * sum(reachable), (errors, reachable)
    if approximation == "kfac-expand":
        assert sum(errors) <= 1.3 * sum(floors), (errors, floors)


@pytest.mark.parametrize("name", ["mlp-bn", "convolutions"])
def test_the_nearest_product_has_the_size_of_its_part_of_the_block(name):
    """As any best approximation: ``<H, X> = <X, X>``. The traces need not be equal."""
    for H, found in blocks(name, MERGED, approximation="kfac-expand"):
        X = found["nearest"].dense()
        assert float((H * X).sum()) == pytest.approx(float(X.square().sum()))


# --- expectations ---------------------------------------------------------------------------------


class Enumerated(CrossEntropy):
    """Every labelling of the mini-batch that "mc" could draw, weighted by its probability."""

    def scores(self, outputs, targets, **options) -> Iterator[tuple[torch.Tensor, float]]:
        outputs = outputs.detach()
        root = self.constant(outputs, targets).sqrt()
        p = outputs.softmax(1)
        N, C = outputs.shape
        for labels in itertools.product(range(C), repeat=N):
            drawn = torch.tensor(labels)
            weight = p[torch.arange(N), drawn].prod()
            yield root * self._minus_one_hot(p, drawn), float(weight)


class EverySign(CrossEntropy):
    """Every choice of signs that "type2" could draw."""

    def scores(self, outputs, targets, **options) -> Iterator[tuple[torch.Tensor, float]]:
        outputs = outputs.detach()
        root = self.constant(outputs, targets).sqrt()
        N, C = outputs.shape
        for column in range(C):
            direction = root * self.root_column(outputs, column)
            for signs in itertools.product((-1.0, 1.0), repeat=N):
                sign = torch.tensor(signs, dtype=outputs.dtype)[:, None]
                yield direction * sign, 0.5**N


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize(
    ("name", "likelihood"),
    [
        *(("mlp-bn", Enumerated), ("convolutions", Enumerated), ("channels", Enumerated)),
        ("mlp-bn", EverySign),
    ],
)
def test_expectations_over_all_label_draws_are_the_exact_sums(name, correction, likelihood):
    network = NETS[name]
    model, batches = network.make(), network.batches("cross_entropy", (4,))
    options = {"approximation": "xkfac", "correction": correction, "labels": "exact"}
    expected = ek.estimate_curvature(model, batches, **options)
    found = ek.estimate_curvature(model, batches, loss=likelihood(), **options)
    for layer in expected:
        H = exact_block_of_loader(
            model, layer, batches, LOSSES["cross_entropy"].of_example, **MERGED
        )
        if correction == "eigenvalues":
            # Of equal eigenvalues any vectors are a basis: not the blocks are comparable.
            assert found[layer].trace() == pytest.approx(expected[layer].trace())
            values = in_basis_of({correction: found[layer]}, H)
            assert relative_error(values_of(found[layer]), values) < EXACT
            continue
        blocks = found[layer].dense(), expected[layer].dense()
        if correction == "nearest":
            # Rounds end when little moves any more, which rounding may decide: where they end is
            # apart by less than a round's move, and the squares of errors by less than its square.
            squares = [relative_error(block, H) ** 2 for block in blocks]
            assert abs(squares[0] - squares[1]) < MOVED**2
            assert relative_error(*blocks) < MOVED
        else:
            assert relative_error(*blocks) < EXACT


@pytest.mark.parametrize(("labels", "statistics"), [("mc", "batch"), ("type2", "running")])
def test_many_draws_come_near_the_expectation(labels, statistics):
    network = NETS["mlp-bn"]
    repeats = 100 if statistics == "batch" else 30
    model, batches = network.make(), network.batches("cross_entropy", (6, 6)) * repeats
    modes = {"coordinates": "merged", "statistics": statistics}
    found = estimate(
        model,
        batches,
        "cross_entropy",
        correction="eigenvalues",
        labels=labels,
        draws=4,
        correction_batches=len(batches),
        generator=torch.Generator().manual_seed(0),
        **modes,
    )
    for layer, block in found.items():
        H = exact_block_of_loader(
            model, layer, batches[:2], LOSSES["cross_entropy"].of_example, **modes
        )
        assert relative_error(block.terms[0].values, in_basis_of({"eigenvalues": block}, H)) < 0.12
        assert block.trace() == pytest.approx(float(H.trace()), rel=0.06)


# --- few samples ----------------------------------------------------------------------------------


@pytest.mark.parametrize("approximation", APPROXIMATIONS)
@pytest.mark.parametrize("correction", CORRECTIONS)
def test_a_single_sample_changes_nothing(correction, approximation):
    network = NETS["mlp-bn"]
    options = {"approximation": approximation, "labels": "mc"}
    options["generator"] = torch.Generator().manual_seed(0)
    model, batches = network.make(), network.batches("cross_entropy", (6,))
    plain = estimate(model, batches, "cross_entropy", **options)
    options["generator"].manual_seed(0)
    found = estimate(model, batches, "cross_entropy", correction=correction, **options)
    for layer, block in found.items():
        expected = plain[layer]
        if isinstance(block, ek.EigenbasisSum):
            expected = ek.EigenbasisSum.near(expected)
        assert relative_error(block.dense(), expected.dense()) < EXACT


def test_the_variance_of_a_mean_is_that_of_its_samples():
    samples = torch.randn(7, 2, 3, generator=torch.Generator().manual_seed(0)).double()
    mean = Mean([samples[0]])
    for sample in samples:
        mean.begin(5)
        mean.add([5.0 * sample], 1.0, 5)
    (found,), variance = mean.result()
    assert relative_error(found, samples.mean(0)) < EXACT
    assert variance == pytest.approx(float(samples.var(0).sum()) / 7)


def test_draws_and_parts_of_a_mini_batch_count_as_samples():
    samples = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0)).double()
    mean = Mean([samples[0, 0]])
    for batch in samples:
        mean.begin(6)
        for draw in batch.chunk(2):
            for part in draw:
                mean.add([3.0 * part], 0.5, 3)
    (found,), variance = mean.result()
    flat = samples.flatten(0, 1)
    assert relative_error(found, flat.mean(0)) < EXACT
    assert variance == pytest.approx(float(flat.var(0).sum()) / len(flat))


def test_columns_of_a_root_add_up():
    samples = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0)).double()
    mean = Mean([samples[0, 0]])
    for batch in samples:
        mean.begin(5)
        for column in batch:
            mean.add([5.0 * column], 1.0, 5)
    (found,), variance = mean.result()
    assert relative_error(found, samples.sum(1).mean(0)) < EXACT
    # As though columns were samples, too: rather too large.
    assert variance == pytest.approx(float((4.0 * samples).flatten(0, 1).var(0).sum()) / 12)


def test_shrinking_lowers_the_error_of_a_noisy_mean(generator):
    """Over many repetitions the positive-part estimate is nearer than the mean and the target."""
    truth = torch.rand(10, generator=generator).double() + 1.0
    target = 1.5 * torch.ones(10).double()
    errors = torch.zeros(3, dtype=torch.float64)
    for _ in range(200):
        estimate = Estimate([target], exact=False)
        noise = torch.randn(8, 10, generator=generator).double()
        # Squares of normal numbers, as those of gradients in an eigenbasis.
        samples = truth * noise.square()
        for sample in samples:
            estimate.begin(1)
            estimate.add([sample], 1.0, 1)
        (found,) = estimate.result()
        errors += torch.stack(
            [(x - truth).square().sum() for x in (found, samples.mean(0), target)]
        )
    assert errors[0] < 0.5 * errors[1]
    assert errors[0] < 2.0 * errors[2]


# --- which mini-batches ---------------------------------------------------------------------------


class Counting(list):
    """A loader that counts what is taken of it in each pass."""

    def __init__(self, batches):
        super().__init__(batches)
        self.passes = []

    def __iter__(self):
        self.passes.append(0)
        for batch in super().__iter__():
            self.passes[-1] += 1
            yield batch


@pytest.mark.parametrize(
    ("correction", "passes"), [("scale", 1), ("eigenvalues", 1), ("nearest", 4)]
)
def test_each_pass_takes_so_many_mini_batches(correction, passes):
    model, batches = NETS["mlp-bn"].make(), NETS["mlp-bn"].batches("cross_entropy", (4,) * 6)
    options = {"correction": correction, "approximation": "xkfac"}
    loader = Counting(batches)
    found = estimate(model, loader, "cross_entropy", correction_batches=2, **options)
    assert loader.passes == [6] + passes * [2]
    assert (found.batches, found.examples) == (6, 24)
    loader = Counting(batches)
    estimate(model, loader, "cross_entropy", correction_batches=9, max_examples=10, **options)
    assert loader.passes == [3] + passes * [3]


def test_the_mini_batches_taken_are_what_the_block_is_corrected_to():
    network = NETS["mlp-bn"]
    model, batches = network.make(), network.batches("cross_entropy", (4, 5, 6))
    options = {"correction": "eigenvalues", "correction_batches": 2}
    for layer, block in estimate(model, batches, "cross_entropy", **options).items():
        H = exact_block_of_loader(
            model, layer, batches[:2], LOSSES["cross_entropy"].of_example, coordinates="raw"
        )
        assert relative_error(values_of(block), in_basis_of({"eigenvalues": block}, H)) < EXACT


def test_parts_of_a_mini_batch_are_samples_only_where_examples_are_independent():
    """From one mini-batch something is learnt in eval mode, and nothing in train mode."""
    network = NETS["mlp-bn"]
    model, batches = network.make(), network.batches("cross_entropy", (64,))
    for statistics, learns in (("running", True), ("batch", False)):
        generator = torch.Generator()
        options = {"labels": "mc", "statistics": statistics, "approximation": "kfac-expand"}
        found = [
            estimate(
                model,
                batches,
                "cross_entropy",
                correction=correction,
                generator=generator.manual_seed(0),
                **options,
            )
            for correction in (None, "nearest")
        ]
        changed = any(
            relative_error(found[1][layer].dense(), block.dense()) > 1e-6
            for layer, block in found[0].items()
        )
        assert changed == learns


# --- what is refused, and what stays --------------------------------------------------------------


def test_bad_arguments_are_refused_before_anything_is_run():
    model, batches = NETS["mlp-bn"].make(), NETS["mlp-bn"].batches("cross_entropy", (4,))
    for options, message in (
        ({"correction": "best"}, "correction: expected one of 'scale', 'eigenvalues', 'nearest'"),
        ({"correction": "scale", "correction_batches": 0}, "correction_batches: expected an int"),
    ):
        loader = Counting(batches)
        with pytest.raises(OptionError, match=message):
            ek.estimate_curvature(model, loader, **options)
        assert loader.passes == []
    for correction, passes in (("scale", 2), ("nearest", 5)):
        iterator = iter(batches)
        with pytest.raises(OptionError, match=f"{passes} times for correction={correction!r}"):
            ek.estimate_curvature(model, iterator, correction=correction)
        assert next(iterator) is batches[0]


def test_a_pass_that_fails_late_takes_its_label_draws_back():
    class Failing(Counting):
        def __iter__(self):
            yield from super().__iter__()
            if len(self.passes) == 3:
                raise RuntimeError("the disk is gone")

    model, batches = NETS["mlp-bn"].make(), NETS["mlp-bn"].batches("cross_entropy", (4, 4))
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    generator = torch.Generator().manual_seed(7)
    state, own = generator.get_state(), torch.get_rng_state()
    with pytest.raises(RuntimeError, match="disk"):
        ek.estimate_curvature(model, Failing(batches), correction="nearest", generator=generator)
    assert torch.equal(generator.get_state(), state)
    found = ek.estimate_curvature(model, batches, correction="nearest", generator=generator)
    again = ek.estimate_curvature(
        model, batches, correction="nearest", generator=torch.Generator().manual_seed(7)
    )
    for layer in found:
        assert torch.equal(found[layer].dense(), again[layer].dense())
    assert torch.equal(torch.get_rng_state(), own)
    assert model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_single_precision_and_half_precision_are_corrected_in_single():
    network = NETS["convolutions"]
    model, batches = network.make(), network.batches("cross_entropy", (6, 6))
    options = {"correction": "nearest", "labels": "exact", "approximation": "xkfac"}
    exact = ek.estimate_curvature(model, batches, **options)
    single = [(x.float(), y) for x, y in batches]
    found = ek.estimate_curvature(model.float(), single, **options)
    for layer, block in found.items():
        assert block.dtype == torch.float32
        assert relative_error(block.dense(), exact[layer].dense()) < 1e-3
    half = [(x.bfloat16(), y) for x, y in batches]
    for correction in CORRECTIONS:
        options["correction"] = correction
        rough = ek.estimate_curvature(model.bfloat16(), half, **options)
        assert {block.dtype for block in rough.values()} == {torch.float32}


def test_a_block_of_zeros_stays_one():
    """Where nothing depends on a layer's inputs, as with inputs that are all zero."""
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Tanh(), nn.Linear(3, 3)).double()
    batches = [(torch.zeros(4, 4).double(), torch.arange(4) % 3)] * 3
    for correction in CORRECTIONS:
        for approximation in APPROXIMATIONS:
            options = {"correction": correction, "approximation": approximation}
            block = ek.estimate_curvature(model, batches, **options)["0"]
            assert not block.dense().any()
