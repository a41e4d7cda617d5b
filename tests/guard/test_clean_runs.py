"""What the guard leaves alone: clean runs, schedulers' rates, and everything where it only observes."""

import math
import warnings

import pytest
import torch
from torch import nn

from cruxy_triton.guard import Policy, Regime, TrainingGuard

pytestmark = pytest.mark.filterwarnings("ignore:CruxyOptimizer.*gets no loss")


def warm_up_and_cosine(steps):
    return lambda step: min(1, (step + 1) / (steps // 10)) * (0.5 + 0.5 * math.cos(math.pi * step / steps))


@pytest.mark.parametrize("seed", range(5))
def test_clean_runs_are_left_alone(regression, make_optimizer, seed):
    """Twenty runs over four optimizers, at the usual rate and below, constant or with warm-up and cosine.

    Each is bit-equal to the run without a guard, and there is no action but early clipping.
    """
    losses = []
    for guarded in (False, True):
        run = regression(seed)
        optimizer = make_optimizer(run.model.parameters())
        for group in optimizer.param_groups:
            group["lr"] *= (0.3, 1.0, 0.5)[seed % 3]
        guard = TrainingGuard(optimizer, run.model) if guarded else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            shape = warm_up_and_cosine(150) if seed % 2 else lambda step: 1.0
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, shape)
        losses.append([])
        for step in range(1000 * seed, 1000 * seed + 150):
            losses[-1] += run.train(optimizer, guard, 1, start=step)
            schedule.step()
    guard.finish()
    actions = [event for event in guard.log if event.kind not in ("regime",)]
    assert all(event.kind == "clip" and event.step <= 20 for event in actions), guard.summary()
    assert guard.regime is Regime.STABLE
    if not actions:
        assert losses[0] == losses[1]


@pytest.mark.parametrize("schedule", ["warm-up and cosine", "constant", "one cycle"])
def test_schedulers_keep_their_rate(regression, schedule):
    run = regression()
    optimizer = torch.optim.AdamW(run.model.parameters(), lr=3e-3)
    other = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=3e-3)

    def make(o):
        if schedule == "one cycle":
            return torch.optim.lr_scheduler.OneCycleLR(o, 3e-3, total_steps=80)
        if schedule == "constant":
            return torch.optim.lr_scheduler.ConstantLR(o, 1.0)
        return torch.optim.lr_scheduler.LambdaLR(o, warm_up_and_cosine(60))

    guard = TrainingGuard(optimizer, run.model)
    guard._ladder.rate.factor = 0.25  # as after a cut
    mine, theirs = make(optimizer), make(other)
    for step in range(60):
        run.train(optimizer, guard, 1, start=step)
        other.step()
        mine.step()
        theirs.step()
        assert optimizer.param_groups[0]["lr"] == other.param_groups[0]["lr"]
    assert not [event for event in guard.log if event.kind in ("rollback", "stop", "skip")]


def test_observing_changes_nothing_and_says_what_it_would_do(regression):
    run, plain = regression(), regression()
    one = torch.optim.AdamW(run.model.parameters(), lr=1.0)
    guard = TrainingGuard(one, run.model, Policy(act=False))
    two = torch.optim.AdamW(plain.model.parameters(), lr=1.0)
    assert run.train(one, guard, 60) == plain.train(two, None, 60)
    assert "rollback" in guard.log.kinds
    assert all(not event.acted for event in guard.log if event.kind in ("rollback", "lr", "skip", "clip"))
    assert guard.lr_factor == 1.0
