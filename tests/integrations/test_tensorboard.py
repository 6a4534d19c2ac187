"""`fit(log=)` takes tensorboard's own writer."""

import copy

import torch

import ekfac_rs as ek
from extras import importing
from nets import classification_loader, mlp

with importing("tensorboard"):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter


def test_scalars_of_each_step_are_in_the_event_file(tmp_path):
    model = mlp(8, 12, 3)
    learner = ek.ContinualLearner(copy.deepcopy(model), scale="auto")
    with SummaryWriter(tmp_path) as writer:
        for seed in range(2):
            loader = classification_loader(8, 3, seed=seed)
            learner.fit(loader, epochs=2, log=writer)
            learner.consolidate(loader)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    names = ("loss", "penalty", "scale", "predicted increase")
    assert set(events.Tags()["scalars"]) == {"task0/loss", *(f"task1/{name}" for name in names)}
    scales = [event.value for event in events.Scalars("task1/scale")]
    assert [event.step for event in events.Scalars("task1/scale")] == [1, 2, 3, 4]
    torch.testing.assert_close(
        torch.tensor(scales), torch.tensor(learner.selection[0].scale, dtype=torch.float32)
    )
