"""Each action by itself: it does what it says, leaves nothing behind, and is bounded."""

import copy
import math

import pytest
import torch
from torch import nn

from cruxy_triton.guard import Policy
from cruxy_triton.guard.actions import HiddenGradients, LearningRate, nonfinite_tensors, reset_momentum
from cruxy_triton.guard.snapshot import Snapshots


def test_cut_and_recovery_by_hand():
    rate = LearningRate(Policy(lr_recovery=1.1, max_lr_cuts=2, min_lr_factor=0.01))
    assert rate.cut(0.5)
    assert (rate.factor, rate.ceiling) == (0.5, 0.7)
    for _ in range(4):
        rate.recover()
    # .5 * 1.1^4 = .732 passed .7 (the ceiling): from here at a tenth of the speed.
    assert rate.factor == pytest.approx(0.5 * 1.1**4)
    rate.recover()
    assert rate.factor == pytest.approx(0.5 * 1.1**4 * 1.01)
    for _ in range(40):
        rate.recover()
    assert rate.factor == 1.0
    assert rate.cut(1e-9)
    assert rate.factor == 0.01  # the floor
    assert not rate.cut(0.5)  # at the floor, and the budget of two is spent
    assert rate.cuts == 2


def test_hold_follows_the_ratio():
    rate = LearningRate(Policy())
    rate.target = 0.02
    rate.hold(0.2, calm=True)
    assert rate.factor == pytest.approx(0.1)  # down at once
    rate.hold(0.001, calm=True)
    assert rate.factor == pytest.approx(0.105)  # up by 5 % at most
    rate.hold(0.001, calm=False)
    assert rate.factor == pytest.approx(0.105)  # and only in calm


@pytest.mark.parametrize("kind", ["number", "tensor"])
def test_the_rate_is_multiplied_during_the_step_only(kind):
    p = nn.Parameter(torch.ones(3))
    lr = 0.5 if kind == "number" else torch.tensor(0.5)
    optimizer = torch.optim.SGD([p], lr=lr)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    rate = LearningRate(Policy())
    rate.factor = 0.1
    for expected in (0.5, 0.25, 0.125):
        p.grad = torch.ones(3)
        before = p.detach().clone()
        rate.apply(optimizer)
        optimizer.step()
        rate.restore()
        assert float((before - p)[0].detach()) == pytest.approx(0.1 * expected)
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(expected)
        schedule.step()
    if kind == "tensor":
        assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor)


def test_a_rate_that_somebody_set_during_the_step_stays():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.5)
    rate = LearningRate(Policy())
    rate.factor = 0.1
    rate.apply(optimizer)
    optimizer.param_groups[0]["lr"] = 0.3
    rate.restore()
    assert optimizer.param_groups[0]["lr"] == 0.3


def test_hidden_gradients_leave_everything_as_it_was(make_optimizer):
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    optimizer = make_optimizer(model.parameters())
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()

    def everything():
        state = optimizer.state_dict()
        groups = [{k: v for k, v in g.items() if not isinstance(v, str | None)} for g in state["param_groups"]]
        return copy.deepcopy((model.state_dict(), state["state"], groups))

    before = everything()
    hidden = HiddenGradients()
    grads = [p.grad for p in model.parameters()]
    hidden.hide(model.parameters())
    optimizer.step()
    hidden.restore()
    torch.testing.assert_close(everything(), before, rtol=0, atol=0, equal_nan=True)
    assert all(p.grad is grad for p, grad in zip(model.parameters(), grads, strict=True))


def test_momentum_reset_zeroes_first_moments_only(make_optimizer):
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    optimizer = make_optimizer(model.parameters())
    for _ in range(3):
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
    assert reset_momentum(optimizer) == 2
    for state in optimizer.state.values():
        assert all(not state[name].any() for name in ("exp_avg", "momentum_buffer") if name in state)
        if "exp_avg_sq" in state:
            assert state["exp_avg_sq"].all()


def test_momentum_reset_of_8_bit_momentum():
    from cruxy_triton import MetaLion

    p = nn.Parameter(torch.ones(200))
    optimizer = MetaLion([p], lr=1e-3)
    p.grad = torch.ones(200)
    optimizer.step()
    reset_momentum(optimizer)
    assert not optimizer.state[p]["exp_avg_scale"].any()


def test_nonfinite_tensors_are_named():
    good, bad = torch.ones(3), torch.tensor([1.0, math.nan])
    assert nonfinite_tensors([("a", good), ("b", bad), ("c", torch.tensor([1]))]) == ["b"]


def test_snapshot_brings_everything_back_but_the_users_settings(make_optimizer):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    optimizer = make_optimizer(model.parameters())
    x = torch.randn(8, 4)

    def step():
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()

    step()
    snapshots = Snapshots(optimizer, model)
    snapshots.take(1, torch.zeros(1))
    expected = copy.deepcopy(model.state_dict())
    step()
    after_two = copy.deepcopy(model.state_dict())
    for _ in range(3):
        step()
    optimizer.param_groups[0]["lr"] *= 0.5
    lr = optimizer.param_groups[0]["lr"]
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    start = snapshots.newest()
    assert start is not None
    snapshots.restore(start)
    torch.testing.assert_close(model.state_dict(), expected, rtol=0, atol=0)
    assert optimizer.param_groups[0]["lr"] == lr
    optimizer.param_groups[0]["lr"] = lr * 2
    step()  # the optimizer's state came back too: the next step is the second one again
    torch.testing.assert_close(model.state_dict(), after_two, rtol=0, atol=0)


def test_snapshots_go_further_back_and_keep_the_start():
    p = nn.Parameter(torch.zeros(2))
    snapshots = Snapshots(torch.optim.SGD([p], lr=0.1))
    for step in (0, 10, 20, 30):
        snapshots.take(step, torch.zeros(1))
        snapshots.confirm()
    seen = []
    for _ in range(4):
        newest = snapshots.newest()
        assert newest is not None
        seen.append(newest.step)
        snapshots.drop_newest()
    assert seen == [30, 20, 0, 0]
