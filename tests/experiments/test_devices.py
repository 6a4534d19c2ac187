"""Where runs are made: on the CPU unless another device is asked for and there."""

import dataclasses
import json

import pytest
import torch

from ekfac_rs.experiments.__main__ import main
from ekfac_rs.experiments.finegrained import PRESETS as TRANSFERS
from ekfac_rs.experiments.permuted_mnist import PRESETS
from ekfac_rs.experiments.settings import RunConfig, config_of
from ekfac_rs.experiments.transfer import SourceConfig

TINY = ["--tasks", "2", "--epochs", "1", "--hidden", "10", "--examples", "200", "--seeds", "0"]
TINY += ["--scales", "1", "--lrs", "0.1", "--finalists", "0"]


@pytest.mark.parametrize("command", ["permuted-mnist", "split-cifar", "finegrained", "study"])
@pytest.mark.parametrize(
    ("device", "told"),
    [
        ("tpu", "expected cpu, cuda or cuda:1, got 'tpu'"),
        ("meta", "expected cpu, cuda or cuda:1, got 'meta'"),
        ("cuda:97", "expected a device that torch finds, got 'cuda:97': it finds"),
    ],
)
def test_a_device_that_is_not_there_is_refused_before_anything_is_done(
    command, device, told, capsys
):
    with pytest.raises(SystemExit) as caught:
        main([command, "--device", device])
    assert caught.value.code == 2
    assert told in capsys.readouterr().err


def test_runs_of_the_cpu_are_found_whatever_else_there_is():
    """Their configs are those of a time that knew no other device."""
    common = {"version": "1", "seed": 0, "batch_size": 8, "curvature": "xkfac"}
    run = RunConfig(**common, epochs=1, momentum=0.9, lr=0.1)
    source = SourceConfig(**common, model="resnet56", pretrained="a", source="b")
    for config in (run, source):
        assert "device" not in config_of(config)
        assert config_of(dataclasses.replace(config, device="cuda"))["device"] == "cuda"
        assert type(config)(**config.as_dict()) == config


@pytest.mark.parametrize("preset", [*PRESETS.values(), *TRANSFERS.values()], ids=lambda p: p.name)
def test_presets_compute_on_the_cpu(preset):
    assert preset.device == "cpu"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
def test_a_stream_is_learnt_on_a_gpu(tmp_path):
    methods = ["--methods", "fine-tuning", "xkfac"]
    options = ["--device", "cuda", "--output", str(tmp_path)]
    assert main(["permuted-mnist", *TINY, *methods, *options]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["environment"]["gpu"]
    assert results["workers"] == 1
    for method in results["methods"].values():
        assert [run["diverged"] for run in method["runs"]] == [None]
        assert {run["config"]["device"] for run in method["runs"]} == {"cuda"}
