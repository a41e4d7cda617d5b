"""Loops of every kind: GradScaler, accumulation, closures, accelerate, bitsandbytes, groups that join."""

import copy
import math

import pytest
import torch
from torch import nn

from cruxy_triton import CruxyOptimizer
from cruxy_triton.guard import Policy, TrainingGuard

pytestmark = pytest.mark.filterwarnings("ignore:CruxyOptimizer.*gets no loss")


def test_grad_scaler_both_ways(regression):
    """AdamW is not called on overflow, the fused one is; both are counted, none is judged as a fault."""
    for fused in (False, True):
        run = regression()
        optimizer = torch.optim.AdamW(run.model.parameters(), lr=3e-3, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        guard = TrainingGuard(optimizer, run.model, scaler=scaler)
        for step in range(40):
            optimizer.zero_grad()
            loss = run.loss(step)
            scaler.scale(loss).backward()
            if step in (5, 6, 25):
                run.model[0].weight.grad[0, 0] = math.inf
            guard.observe(loss)
            scaler.step(optimizer)
            scaler.update()
        guard.finish()
        assert guard.log.kinds.count("overflow") == 3
        assert "skip" not in guard.log.kinds
        assert scaler.get_scale() == 2.0**7
        assert float(guard._telemetry.state[2, 0]) == 37  # pyright: ignore[reportOptionalMemberAccess]
        # Norms are tracked unscaled; after the step both optimizers leave unscaled gradients behind.
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in run.model.parameters()))
        assert guard.metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_accumulation_is_one_step_with_the_mean_loss(regression):
    run = regression()
    optimizer = torch.optim.SGD(run.model.parameters(), lr=1e-2)
    guard = TrainingGuard(optimizer, run.model)
    for share in (False, True):
        for value in (1.0, 3.0):
            (run.loss(0) / 2).backward()
            guard.observe(value / 2 if share else value, share=share)
        optimizer.step()
        optimizer.zero_grad()
        guard.finish()
        assert guard.metrics["loss"] == 2.0
    assert guard.metrics["step"] == 2


@pytest.mark.parametrize("style", ["positional", "keyword"])
def test_closures(regression, style):
    run, plain = regression(), regression()
    one, two = (torch.optim.AdamW(r.model.parameters(), lr=3e-3) for r in (run, plain))
    guard = TrainingGuard(one, run.model)
    for step in range(20):

        def closure(step=step):
            one.zero_grad()
            loss = run.loss(step)
            loss.backward()
            if step == 10:
                run.model[0].weight.grad[0, 0] = math.nan
            return loss

        result = one.step(closure) if style == "positional" else one.step(closure=closure)
        assert isinstance(result, torch.Tensor)
        if step != 10:
            plain.train(two, None, 1, start=step)
    guard.finish()
    assert guard.log.kinds.count("skip") == 1
    assert guard.metrics["loss"] > 0
    torch.testing.assert_close(run.params(), plain.params(), rtol=0, atol=0)


def test_accelerate(regression):
    accelerate = pytest.importorskip("accelerate")
    run = regression()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = CruxyOptimizer(run.model.parameters(), lr=5e-3)
    model, prepared = accelerator.prepare(run.model, optimizer)
    guard = TrainingGuard(prepared, model)
    assert guard.optimizer is optimizer
    for step in range(20):
        with accelerator.accumulate(model):
            loss = run.loss(step)
            accelerator.backward(loss)
            guard.observe(loss)
            prepared.step()
            prepared.zero_grad()
    guard.finish()
    assert guard.metrics["step"] == 10


def test_the_loss_given_to_cruxys_step_is_seen(regression):
    run = regression()
    optimizer = CruxyOptimizer(run.model.parameters(), lr=5e-3)
    guard = TrainingGuard(optimizer)
    loss = run.loss(0)
    loss.backward()
    optimizer.step(loss=loss)
    guard.finish()
    assert guard.metrics["loss"] == pytest.approx(float(loss.detach()))


def test_a_group_added_later_joins(regression):
    run = regression()
    optimizer = torch.optim.AdamW(run.model[0].parameters(), lr=3e-3)
    guard = TrainingGuard(optimizer, run.model)
    run.train(optimizer, guard, 10)
    optimizer.add_param_group({"params": list(run.model[2].parameters())})
    run.train(optimizer, guard, 10, start=10)
    assert guard._telemetry.state[2].tolist() == [20, 20, 10, 10, 20]  # pyright: ignore[reportOptionalMemberAccess]


def test_a_step_that_raises_leaves_the_rate_alone(regression):
    run = regression()
    optimizer = torch.optim.SGD(run.model.parameters(), lr=0.1)
    guard = TrainingGuard(optimizer, run.model)
    run.train(optimizer, guard, 2)
    guard._ladder.rate.factor = 0.5

    def fail():
        raise MemoryError

    with pytest.raises(MemoryError):
        optimizer.step(fail)
    run.train(optimizer, guard, 1)
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_detached_it_is_gone(regression):
    run = regression()
    optimizer = torch.optim.SGD(run.model.parameters(), lr=1e-2)
    guard = TrainingGuard(optimizer, run.model)
    guard.detach()
    run.train(optimizer, None, 3)
    assert guard._steps == 0


def test_what_has_no_hooks_is_refused():
    with pytest.raises(TypeError, match="has no step hooks"):
        TrainingGuard(object())


@pytest.mark.parametrize("name", ["AdamW8bit", "Lion8bit"])
def test_bitsandbytes(name, regression):
    """Their 8-bit states survive a skip, a momentum reset and a rollback."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from cruxy_triton.guard.actions import reset_momentum

    torch.manual_seed(0)
    # 8,192 weights: their states have 8 bits from 4,096 on.
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 1))
    optimizer = getattr(bitsandbytes.optim, name)(model.parameters(), lr=1e-3)
    guard = TrainingGuard(optimizer, model, Policy(snapshot_interval=10, snapshot_confirm=5))

    def steps(count, poison=None):
        for step in range(count):
            x = torch.randn(32, 64, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            loss = (model(x) - x[:, :1]).square().mean()
            loss.backward()
            if step == poison:
                model[0].weight.grad[0, 0] = math.nan
            guard.observe(loss)
            optimizer.step()

    steps(20)
    state = optimizer.state[model[0].weight]
    assert state["state1"].dtype == torch.uint8
    before = copy.deepcopy((model.state_dict(), state))
    steps(1, poison=0)
    torch.testing.assert_close((model.state_dict(), optimizer.state[model[0].weight]), before, rtol=0, atol=0)
    assert reset_momentum(optimizer) == 4
    assert not state["absmax1"].any()
    with torch.no_grad():
        model[2].weight[0, 0] = math.nan
    steps(20)
    assert guard.log.kinds.count("rollback") == 1
    assert optimizer.state[model[0].weight]["state1"].dtype == torch.uint8
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
