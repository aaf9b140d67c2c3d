"""Learning rates: timm's schedules by timm's names, and one that ends with the run."""

import pytest
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn

from timm_hpm.training import TrainConfig
from timm_hpm.training.schedules import create_schedule


def rates(updates, **options) -> list[float]:
    """Returns the learning rates before each update of a run of 10 epochs of 10 updates, at a peak of 1."""
    optimizer = create_optimizer_v2(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "sgd", lr=1.0)
    schedule = create_schedule(TrainConfig(epochs=10, lr=1.0, **options), optimizer, 10)
    found = []
    for update in updates:
        if update:  # as a run that is resumed there
            schedule.step(update)
        found.append(optimizer.param_groups[0]["lr"])
    return found


@pytest.mark.parametrize(("options", "expected"), [
    ({"sched": "onecycle", "warmup_epochs": 5}, [0.04, 0.52, 1, 0.5, 0]),
    ({"sched": "onecycle"}, [1, 0.853553, 0.5, 0.146447, 0]),
    ({"sched": "onecycle", "warmup_epochs": 5, "warmup_lr": 0.1, "min_lr": 0.5}, [0.1, 0.55, 1, 0.75, 0.5]),
    ({"sched": "cosine"}, [1, 0.853553, 0.5, 0.146447, 0]),
    ({"sched": "cosine", "warmup_epochs": 5, "warmup_prefix": True, "warmup_lr": 0.5}, [0.5, 0.75, 1, 0.5, 0]),
    ({"sched": "cosine", "min_lr": 0.5}, [1, 0.926777, 0.75, 0.573223, 0.5]),
    ({"sched": "constant", "warmup_epochs": 5, "warmup_lr": 0.2}, [0.2, 0.6, 1, 1, 1]),
    ({"sched": "step", "decay_epochs": 2.5, "decay_rate": 0.5}, [1, 0.5, 0.25, 0.125, 0.0625]),
    ({"sched": "multistep", "decay_milestones": (5, 7.5), "decay_rate": 0.1}, [1, 1, 0.1, 0.01, 0.01]),
    ({"sched": "poly", "decay_rate": 1.0}, [1, 0.75, 0.5, 0.25, 0]),
], ids=str)
def test_a_schedule_has_its_rates_at_the_quarters_of_a_run(options, expected):
    assert rates((0, 25, 50, 75, 100), **options) == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("sched", ["cosine", "tanh", "step", "multistep", "poly"])
def test_they_are_timm_s_by_the_update(sched):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs, _ = create_scheduler_v2(optimizer, sched, num_epochs=10, decay_epochs=3, decay_milestones=[4, 8],
                                    warmup_epochs=2, min_lr=0.01, step_on_epochs=False, updates_per_epoch=10)
    ours = rates(range(1, 100), sched=sched, warmup_epochs=2, min_lr=0.01, decay_epochs=3, decay_milestones=(4, 8))
    for update, rate in enumerate(ours, start=1):
        theirs.step_update(update)
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)


def test_a_layer_s_rate_keeps_its_ratio():
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1, requires_grad=True)], "lr_scale": 0.5},
                                 {"params": [torch.zeros(1, requires_grad=True)]}], lr=1.0)
    schedule = create_schedule(TrainConfig(epochs=2, lr=1.0), optimizer, 10)
    for update in (0, 5, 10, 15):
        schedule.step(update)
        low, high = (group["lr"] for group in optimizer.param_groups)
        assert low == high / 2 > 0


@pytest.mark.parametrize(("options", "message"), [
    ({"min_lr": 0.2}, "min_lr is 0.2, above the peak 0.1"), ({"warmup_lr": 1}, "warmup_lr is 1.0, above the peak 0.1"),
    ({"sched": "plateau"}, "sched is 'plateau'; expected one of onecycle, cosine"),
    ({"decay_milestones": (0,)}, "decay_milestones is 0.0; expected above 0"),
])
def test_rates_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)
