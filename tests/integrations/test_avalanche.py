"""A learner as a plugin of Avalanche's strategies, beside its own, on its own benchmarks."""

import copy
import importlib.util
import io
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import ekfac_rs as ek
from ekfac_rs.errors import ModelChangedError
from ekfac_rs.experiments.data import load_mnist_subset
from extras import importing
from nets import mlp
from pages import PAGES, entries_of

with importing("avalanche"):
    from avalanche.benchmarks import nc_benchmark
    from avalanche.benchmarks.classic import SplitMNIST
    from avalanche.models import IncrementalClassifier, MTSimpleMLP
    from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
    from avalanche.training.supervised import Naive

    from ekfac_rs.integrations import avalanche as avalanche_of_ours
    from ekfac_rs.integrations.avalanche import CurvaturePlugin

# Avalanche's own.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
LR = 0.05


@pytest.fixture(scope="module")
def bench():
    path = Path(__file__).parents[2] / "benchmarks" / "bench_avalanche.py"
    spec = importlib.util.spec_from_file_location("bench_avalanche", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def mnist(bench, tmp_path_factory):
    """A folder with a few of MNIST's images, where Avalanche's benchmarks find them."""
    root = tmp_path_factory.mktemp("mnist")
    bench.write_mnist(load_mnist_subset(), bench.Preset(150, 60, 1), root)
    return root


class Labelled(TensorDataset):
    @property
    def targets(self):
        return self.tensors[1].tolist()

    def __getitem__(self, index):
        return self.tensors[0][index], int(self.tensors[1][index])


def experiences(count=3, examples=64):
    generator = torch.Generator().manual_seed(3)
    data = []
    for _ in range(count):
        x = torch.randn(examples, 8, generator=generator, dtype=torch.float64)
        data.append(Labelled(x, torch.randint(3, (examples,), generator=generator)))
    return nc_benchmark(
        data, data, n_experiences=count, task_labels=False, shuffle=False,
        one_dataset_per_exp=True, class_ids_from_zero_in_each_exp=True,
    )  # fmt: skip


def learner_of(model, **options):
    # Expectations over labels instead of draws: no order of examples matters.
    options = {"scale": 3.0, "damping": 0.01, "labels": "exact", **options}
    return ek.ContinualLearner(model, **options)


def naive(model, *plugins, size=16, epochs=2, **options):
    return Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=size,
        train_epochs=epochs,
        plugins=list(plugins),
        evaluator=EvaluationPlugin(loggers=[]),
        **options,
    )


def assert_close(first, second):
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    "options", [{}, {"scale": "auto"}, {"freeze_bn_after": 0.4, "own": True}], ids=str
)
def test_training_is_that_of_the_learner(options):
    # Whole experiences as mini-batches: the plugin goes through them in an order of its own.
    model = mlp(8, 12, 12, 3)
    other = copy.deepcopy(model)
    learner = learner_of(other, scheduler=None, **options)
    plugin = CurvaturePlugin(learner_of(model, **options))
    for experience in experiences().train_stream:
        # A strategy's optimiser remembers its last steps; a learner's is made anew.
        naive(model, plugin, size=64, epochs=6).train(experience, shuffle=False)
        data = [experience.dataset[k] for k in range(64)]
        batch = torch.stack([x for x, *_ in data]), torch.tensor([y for _, y, *_ in data])
        learner.fit([batch], epochs=6, lr=LR)
        learner.consolidate([batch])
        assert_close(model, other)
    assert plugin.learner.task == 3
    for mine, theirs in zip(plugin.learner.selection, learner.selection, strict=True):
        assert mine.scale == pytest.approx(theirs.scale)


class Recorder(SupervisedPlugin):
    def __init__(self):
        super().__init__()
        self.before, self.after = [], []

    def after_forward(self, strategy, **kwargs):
        self.before.append(strategy._criterion(strategy.mb_output, strategy.mb_y).item())

    def after_backward(self, strategy, **kwargs):
        self.after.append(strategy.loss.item())


def test_the_first_experience_is_ordinary_training_and_random_states_are_the_users():
    model = mlp(8, 12, 3)
    plain = copy.deepcopy(model)
    first, second = list(experiences(2).train_stream)
    recorder = Recorder()
    held, free = naive(model, CurvaturePlugin(learner_of(model)), recorder), naive(plain)
    states = []
    for strategy in (held, free):
        torch.manual_seed(0)
        strategy.train(first)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    assert_close(model, plain)
    assert recorder.after == pytest.approx(recorder.before)
    held.train(second)
    steps = len(recorder.before) // 2
    assert recorder.after[-1] > recorder.before[-1]
    assert held.plugins[0].learner.selection[0].loss == pytest.approx(
        recorder.before[steps:], rel=1e-6
    )


def test_nothing_listens_to_the_model_between_experiences():
    model = mlp(8, 12, 3)
    strategy = naive(model, CurvaturePlugin(learner_of(model)))
    strategy.train(experiences(2).train_stream)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_short_last_mini_batch_is_no_mini_batch_of_one():
    # 49 examples, mini-batches of 16: the strategy leaves out the last, the plugin does not.
    model = mlp(8, 12, 3)
    strategy = naive(model, CurvaturePlugin(learner_of(model)))
    [experience] = experiences(1, examples=49).train_stream
    strategy.train(experience, drop_last=True)
    assert strategy.plugins[0].learner.curvatures[0].examples == 49


def test_a_strategy_of_another_model_is_refused():
    strategy = naive(mlp(8, 12, 3), CurvaturePlugin(learner_of(mlp(8, 12, 3))))
    with pytest.raises(ModelChangedError, match="the one that the learner was made with"):
        strategy.train(experiences(1).train_stream)


def test_functions_of_the_learner_read_the_data_sets_mini_batches():
    seen = []
    model = mlp(8, 12, 3)
    learner = learner_of(
        model,
        input_fn=lambda batch: seen.append(len(batch)) or batch[0],
        target_fn=lambda batch: batch[1],
    )
    naive(model, CurvaturePlugin(learner)).train(experiences(1).train_stream)
    assert set(seen) == {3}


def test_shared_layers_of_a_multi_task_module_are_held_and_heads_are_free(mnist):
    torch.manual_seed(0)
    model = MTSimpleMLP(hidden_size=12)
    learner = learner_of(model, layers=["features.0"], approximation="kfac-expand")
    benchmark = SplitMNIST(5, seed=0, return_task_id=True, dataset_root=mnist)
    strategy = naive(model, CurvaturePlugin(learner), epochs=4)
    for experience in list(benchmark.train_stream)[:3]:
        strategy.train(experience)
    assert set(learner.anchor) == {"features.0"}
    assert learner.task == 3
    assert learner.selection[-1].increase[-1] > 0.0
    strategy.eval(benchmark.test_stream)


class Growing(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Flatten(), nn.Linear(784, 12), nn.BatchNorm1d(12))
        self.classifier = IncrementalClassifier(12, 2)

    def forward(self, x):
        return self.classifier(torch.relu(self.features(x)))


def test_an_output_layer_that_grows_is_left_out_by_name_and_refused_otherwise(mnist):
    benchmark = SplitMNIST(5, seed=0, dataset_root=mnist)
    first, second, *_ = benchmark.train_stream
    model = Growing()
    plugin = CurvaturePlugin(learner_of(model, layers=["features.1"]))
    strategy = naive(model, plugin, epochs=3)
    strategy.train([first, second], drop_last=True)
    assert plugin.learner.task == 2
    assert plugin.learner.selection[-1].increase[-1] > 0.0

    model = Growing()
    strategy = naive(model, CurvaturePlugin(learner_of(model)))
    strategy.train(first, drop_last=True)
    with pytest.raises(ModelChangedError, match="expected a curvature of shape"):
        strategy.train(second, drop_last=True)


def test_a_learner_that_was_saved_goes_on_in_another_strategy(tmp_path):
    stream = list(experiences(2).train_stream)
    model, other = mlp(8, 12, 3), mlp(8, 12, 3, seed=1)
    plugin = CurvaturePlugin(learner_of(model))
    naive(model, plugin).train(stream[0])
    plugin.learner.save(tmp_path / "learner.safetensors")
    resumed = CurvaturePlugin(
        ek.ContinualLearner.resume(
            tmp_path / "learner.safetensors", other, scale=3.0, damping=0.01, labels="exact"
        )
    )
    for one, held in ((model, plugin), (other, resumed)):
        torch.manual_seed(0)
        naive(one, held).train(stream[1])
    assert resumed.learner.task == 2
    assert_close(model, other)


@pytest.mark.parametrize("key", ["permuted", "split"])
def test_avalanches_benchmarks_run_with_its_strategies_metrics_and_loggers(bench, mnist, key):
    preset = bench.Preset(150, 60, 1, mini_batch=15)
    benchmark = bench.BENCHMARKS[key]
    data = bench.in_memory(benchmark.make(mnist, 0))
    for method in bench.METHODS.values():
        log = io.StringIO()
        choice = bench.Choice(0.03, 1.0)
        result = bench.run(method, choice, data, benchmark.classes, preset, 0, log)
        assert 0.0 <= result.accuracy <= 1.0
        assert 0.0 < result.learnt <= 1.0
        assert "Top1_Acc_Stream/eval_phase/test_stream" in log.getvalue()
        assert "StreamForgetting/eval_phase/test_stream" in log.getvalue()


def test_what_is_in_memory_is_avalanches_own_data(bench, mnist):
    own = bench.BENCHMARKS["permuted"].make(mnist, 0)
    copied = bench.in_memory(own)
    for streams in ((own.train_stream, copied.train_stream), (own.test_stream, copied.test_stream)):
        for mine, theirs in zip(*streams, strict=True):
            assert len(mine.dataset) == len(theirs.dataset)
            for k in (0, len(mine.dataset) - 1):
                assert torch.equal(mine.dataset[k][0], theirs.dataset[k][0])
                assert mine.dataset[k][1] == theirs.dataset[k][1]


def test_it_has_an_entry_in_the_apis_pages():
    assert avalanche_of_ours.__all__ == ["CurvaturePlugin"]
    entries = [entry for page in PAGES for entry in entries_of(page)]
    assert entries.count("ekfac_rs.integrations.avalanche.CurvaturePlugin") == 1
