"""A curvature made by several processes is the one that a single process makes of all data."""

import os
import signal

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ekfac_rs as ek
from ekfac_rs._ranks import Ranks
from ekfac_rs.batchnorm.statistics import moments_of
from ekfac_rs.batchnorm.statistics import synchronised as over_ranks
from nets import classification_loader, mlp
from team import Failure, team_of

KINDS = ("kfac-expand", "kfac-reduce", "xkfac", "xkfac-nested", "diagonal")


@pytest.fixture(scope="module")
def team():
    with team_of(2) as pair:
        yield pair


# --- networks and data, the same in every process ------------------------------------------------


def plain():
    return mlp(5, 6, 4, 3)


def synchronised():
    """Every kind of side: patches, groups, an Embedding's counts, a BatchNorm of its own."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 2, groups=6, bias=False),
        nn.BatchNorm2d(6),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 3),
    )
    return nn.SyncBatchNorm.convert_sync_batchnorm(model).double()


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(7, 4)
        self.mixed = nn.Linear(4, 4)
        self.normed = nn.SyncBatchNorm(4)
        self.head = nn.Linear(4, 3)
        self.double()

    def forward(self, x):
        h = torch.tanh(self.mixed(self.embedding(x))).mT
        return self.head(self.normed(h).square().mean(-1))


def images(parts, seed=0):
    """Mini-batches as lists of so many examples for each rank."""
    generator = torch.Generator().manual_seed(seed)
    return [
        [
            (
                torch.randn(n, 4, 4, 5, generator=generator, dtype=torch.float64) + 1.0,
                torch.randint(3, (n,), generator=generator),
            )
            for n in part
        ]
        for part in parts
    ]


def words(parts):
    generator = torch.Generator().manual_seed(0)
    return [
        [
            (
                torch.randint(7, (n, 5), generator=generator),
                torch.randint(3, (n,), generator=generator),
            )
            for n in part
        ]
        for part in parts
    ]


def together(batches):
    return [tuple(torch.cat(part) for part in zip(*batch, strict=True)) for batch in batches]


NETWORKS = {"images": (synchronised, images), "words": (Words, words)}
PARTS = [(3, 2), (1, 4), (2, 2)]


def estimate(model, loader, **options):
    return ek.estimate_curvature(
        model, loader, process_group=dist.group.WORLD, labels="empirical", **options
    )


def equal_bits(first, second):
    ours, theirs = first.tensors(), second.tensors()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert first.metadata() == second.metadata()


def close(actual, expected):
    torch.testing.assert_close(actual.tensors(), expected.tensors(), rtol=1e-10, atol=1e-12)
    mine, theirs = actual.metadata(), expected.metadata()
    for name in ("examples", "gradient_examples", "batches"):
        assert mine[name] == theirs[name], name
    assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-12)


# --- a mini-batch is a process's own -------------------------------------------------------------


def shares():
    """Three mini-batches for the first rank, of different sizes, and one for the second."""
    batches = classification_loader(5, 3, examples=30, batch_size=8)
    return batches[:3], batches[3:]


def own_batches(rank, kind, correction):
    model = plain()
    model[1].eval()
    return estimate(model, shares()[rank], approximation=kind, correction=correction)


@pytest.mark.parametrize("kind", KINDS)
def test_processes_make_what_one_makes_of_all_their_mini_batches(team, kind):
    first, second = team.results(own_batches, kind, None)
    equal_bits(first, second)
    mine, theirs = shares()
    model = plain()
    model[1].eval()
    options = {"approximation": kind, "labels": "empirical"}
    close(first, ek.estimate_curvature(model, mine + theirs, **options))
    merged = ek.estimate_curvature(model, mine, **options)
    close(first, merged.merge(ek.estimate_curvature(model, theirs, **options)))


@pytest.mark.parametrize("correction", ["scale", "eigenvalues", "nearest"])
def test_corrections_are_made_of_all_processes_samples(team, correction):
    first, second = team.results(own_batches, "xkfac", correction)
    equal_bits(first, second)
    mine, theirs = shares()
    model = plain()
    model[1].eval()
    alone = ek.estimate_curvature(
        model, mine + theirs, approximation="xkfac", labels="empirical", correction=correction
    )
    # Bases of equal eigenvalues may turn: the operators are compared.
    for name, block in alone.items():
        torch.testing.assert_close(first[name].dense(), block.dense(), rtol=1e-8, atol=1e-10)


def drawn(rank, kind):
    torch.manual_seed(0)
    model = plain().eval()
    batches = classification_loader(5, 3, examples=8)
    alone = ek.estimate_curvature(model, batches, approximation=kind, statistics="running")
    options = {"approximation": kind, "statistics": "running", "process_group": dist.group.WORLD}
    return alone, ek.estimate_curvature(model, batches, **options), torch.get_rng_state()


def test_processes_with_one_seed_draw_different_labels_and_leave_it_alone(team):
    (alone, both, state), (_, again, theirs) = team.results(drawn, "kfac-expand")
    equal_bits(both, again)
    assert torch.equal(state, theirs)
    # Twice the same labels would give the gradients of one process alone.
    head, other = alone["6"].terms[0], both["6"].terms[0]
    torch.testing.assert_close(head[0], other[0])
    assert not torch.allclose(head[1], other[1], rtol=1e-3)


# --- synchronised BatchNorms: it is that of all processes ----------------------------------------


def in_step(rank, network, kind, coordinates):
    make, data = NETWORKS[network]
    batches = [batch[rank] for batch in data(PARTS)]
    return estimate(make(), batches, approximation=kind, coordinates=coordinates)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("kind", KINDS)
def test_synchronised_batchnorms_make_one_mini_batch_of_all_processes(team, network, kind):
    first, second = team.results(in_step, network, kind, "merged")
    equal_bits(first, second)
    make, data = NETWORKS[network]
    model = unsynchronised(make())
    options = {"approximation": kind, "labels": "empirical"}
    close(first, ek.estimate_curvature(model, together(data(PARTS)), **options))
    if kind.startswith("xkfac"):
        # Strata of each process's own part would be another number.
        apart = [pair for batch in data(PARTS) for pair in batch if len(pair[0]) > 1]
        wrong = ek.estimate_curvature(model, apart, **options)
        name = next(reversed(first.layers))
        assert not torch.allclose(wrong[name].dense(), first[name].dense(), rtol=0.05)


def test_synchronised_batchnorms_in_raw_coordinates(team):
    first, _ = team.results(in_step, "images", "xkfac-nested", "raw")
    alone = ek.estimate_curvature(
        unsynchronised(synchronised()),
        together(images(PARTS)),
        labels="empirical",
        coordinates="raw",
    )
    close(first, alone)


def alone_in_a_group(rank):
    group = dist.new_group([rank], use_local_synchronization=True)
    model, batch = synchronised(), together(images(PARTS))[0]
    for module in model.modules():
        if isinstance(module, nn.SyncBatchNorm):
            module.process_group = group
    return ek.estimate_curvature(model, [batch], process_group=group, labels="empirical")


def test_a_group_of_one_process_is_one_process(team):
    batch = together(images(PARTS))[0]
    alone = ek.estimate_curvature(unsynchronised(synchronised()), [batch], labels="empirical")
    for curvature in team.results(alone_in_a_group):
        close(curvature, alone)


def unsynchronised(model):
    """Replace every SyncBatchNorm by the BatchNorm that one process has."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.SyncBatchNorm):
            kind = nn.BatchNorm1d if isinstance(model, Words) else nn.BatchNorm2d
            plain_one = kind(module.num_features).double()
            plain_one.load_state_dict(module.state_dict())
            model.set_submodule(name, plain_one)
    return model


def left_alone(rank):
    model = synchronised().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    estimate(model, [images(PARTS)[0][rank]])
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(module.training for module in model.modules())


def test_a_synchronised_model_is_left_as_it_was(team):
    team.results(left_alone)


def synchronised_with(rank, change):
    model, group, options = synchronised(), dist.group.WORLD, {}
    if change == "no group":
        group = None
    elif change == "another group":
        model[0].process_group = dist.new_group([rank], use_local_synchronization=True)
        model[2].process_group = model[0].process_group
        group = model[0].process_group
    elif change == "another kind":
        model[2] = nn.BatchNorm2d(6).double()
    elif change == "own forward":
        model[2].forward = model[2].forward
    else:
        options = {"correction": "scale"} if change == "correction" else {"labels": "exact"}
    ek.estimate_curvature(model, [images(PARTS)[0][rank]], process_group=group, **options)


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        ("no group", "BatchNormError", "layer '0': expected process_group= to be the group"),
        ("another group", "BatchNormError", "layer '5': expected process_group= to be the group"),
        ("another kind", "BatchNormError", "layer '2': expected every BatchNorm or none"),
        ("own forward", "BatchNormError", "layer '2': expected a SyncBatchNorm with torch's own"),
        ("correction", "OptionError", "correction: expected another one with SyncBatchNorm"),
        ("labels", "OptionError", "labels: expected another one with SyncBatchNorm"),
    ],
)
def test_strata_of_a_part_are_never_taken_for_those_of_the_whole(team, change, kind, said):
    for failure in team.run(synchronised_with, change):
        assert isinstance(failure, Failure)
        assert failure.kind == kind
        assert said in failure.message


# --- failing together ----------------------------------------------------------------------------


def uneven(rank):
    return estimate(synchronised(), [batch[rank] for batch in images(PARTS)[: 3 - rank]])


def test_synchronised_processes_with_different_numbers_of_mini_batches_all_hear_of_it(team):
    for failure in team.run(uneven):
        assert isinstance(failure, Failure)
        assert failure.kind == "DistributedError"
        assert "equally many" in failure.message


def one_value(rank, how):
    """Of all ranks together: the second one has no example."""
    ranks = Ranks(dist.group.WORLD)
    x = torch.zeros(1 - rank, 3, dtype=torch.float64)
    if how == "moments":
        moments_of(x, "body.norm", ranks)
    batchnorm = nn.SyncBatchNorm(3, track_running_stats=False).double()
    with over_ranks({"body.norm": batchnorm}, ranks):
        batchnorm(x)


@pytest.mark.parametrize("how", ["moments", "forward"])
def test_one_value_a_channel_of_all_ranks_is_refused_by_the_layers_name(team, how):
    for failure in team.run(one_value, how):
        assert isinstance(failure, Failure)
        assert failure.kind == "BatchNormError"
        assert "layer 'body.norm': expected at least 2 values a channel" in failure.message


def failing(rank, change):
    model, batches = plain(), shares()[rank]
    if rank == 1:
        if change == "empty":
            batches = []
        elif change == "not finite":
            batches = [
                *batches,
                (torch.full((4, 5), torch.nan, dtype=torch.float64), batches[0][1][:4]),
            ]
        elif change == "weights":
            model[0].weight.data += 1.0
        elif change == "statistics":
            model[1].running_mean += 1.0
        elif change == "kept from exchanging":
            model.register_forward_hook(_interrupt)
    approximation = "xkfac" if (change, rank) == ("settings", 1) else "kfac-expand"
    return estimate(model, batches, approximation=approximation)


def _interrupt(*args):
    raise RuntimeError("a user's own")


@pytest.mark.parametrize(
    ("change", "own", "said"),
    [
        ("empty", "EmptyLoaderError", "rank 1 failed: EmptyLoaderError: loader: expected at least"),
        ("not finite", "NonFiniteError", "rank 1 failed: NonFiniteError: model: expected logits"),
        ("kept from exchanging", "RuntimeError", "rank 1 failed: RuntimeError: a user's own"),
        ("weights", "DistributedError", "layer '0': expected the same weights"),
        ("statistics", "DistributedError", "broadcast_buffers"),
        ("settings", "DistributedError", "settings: expected the same on all ranks"),
    ],
)
def test_a_process_that_fails_tells_the_others(team, change, own, said):
    first, second = team.run(failing, change)
    assert first.kind == "DistributedError"
    assert said in first.message
    assert second.kind == own


def failing_in_step(rank):
    model, batches = synchronised(), [batch[rank] for batch in images(PARTS)]
    if rank == 1:
        calls = []

        def fail(*args):
            calls.append(args)
            if len(calls) == 3:  # find_layers looks at two examples first
                raise RuntimeError("a user's own")

        model[3].register_forward_hook(fail)
    return estimate(model, batches)


def test_a_checkpoint_of_several_processes_is_refused(team, tmp_path):
    for failure in team.run(with_checkpoint, str(tmp_path / "x")):
        assert failure.kind == "OptionError"
        assert "checkpoint: expected none where 2 processes make one" in failure.message


def with_checkpoint(rank, path):
    loader, model = classification_loader(2, 2), mlp(2, 3, 2)
    ek.estimate_curvature(model, loader, checkpoint=path, process_group=dist.group.WORLD)


def test_a_process_that_fails_amid_a_mini_batch_tells_the_others(team):
    first, second = team.run(failing_in_step)
    assert first.kind == "DistributedError"
    assert "rank 1 failed: RuntimeError: a user's own" in first.message
    assert second.kind == "RuntimeError"
    # And all of them go on.
    team.results(in_step, "images", "xkfac", "merged")


# --- statistics of all processes -----------------------------------------------------------------


def with_same_buffers(rank):
    model = plain()
    if rank == 1:
        model[1].running_mean += 1.0
        model[1].num_batches_tracked += 3
    ek.distributed.broadcast_buffers(model, dist.group.WORLD)
    return model.state_dict()


def test_broadcast_buffers_gives_all_processes_those_of_the_first(team):
    expected = plain().state_dict()
    for state in team.results(with_same_buffers):
        assert all(torch.equal(expected[name], x) for name, x in state.items())


def put_back(rank, weights):
    model = plain()
    ek.reparameterize(model, shares()[rank], process_group=dist.group.WORLD, weights=weights)
    return model.state_dict()


@pytest.mark.parametrize("weights", ["kept", "merged"])
def test_reparameterize_takes_statistics_of_all_processes(team, weights):
    first, second = team.results(put_back, weights)
    assert all(torch.equal(first[name], second[name]) for name in first)
    mine, theirs = shares()
    alone = plain()
    ek.reparameterize(alone, mine + theirs, weights=weights)
    torch.testing.assert_close(first, alone.state_dict(), rtol=1e-12, atol=1e-12)


def put_back_without_data(rank):
    model = plain()
    try:
        ek.reparameterize(model, shares()[rank][:rank], process_group=dist.group.WORLD)
    finally:
        expected = plain().state_dict()
        assert all(torch.equal(expected[name], x) for name, x in model.state_dict().items())


def test_reparameterize_fails_on_all_processes_and_writes_nothing(team):
    kinds = [failure.kind for failure in team.run(put_back_without_data)]
    assert kinds == ["EmptyLoaderError", "DistributedError"]


# --- more of them, and fewer ---------------------------------------------------------------------


def four(rank):
    batches = [[(x[rank::4], y[rank::4])] for x, y in together(images([(12,)]))]
    group = dist.group.WORLD
    model = synchronised()
    in_one = ek.estimate_curvature(model, batches[0], process_group=group, labels="empirical")
    if rank == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    ek.estimate_curvature(model, batches[0], process_group=group, labels="empirical")
    return in_one


def four_but_one(rank):
    try:
        four(rank)
    except ek.errors.DistributedError as error:
        return str(error)


def test_four_processes_of_which_one_is_killed():
    with team_of(4, patience=10.0) as team:
        said = team.run(four_but_one, absent=3)
    for message in said[:3]:
        assert "expected to hear of all 4 ranks" in message
