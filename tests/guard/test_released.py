"""The guard above steps that are taken in the backward pass: it acts on the next one, and goes back between two."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from cruxy_triton import MetaLion, release_gradients
from cruxy_triton.guard import Policy
from cruxy_triton.guard.released import ReleasedGuard


def made(folder: Path | None = None, **policy):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = MetaLion(model.parameters(), lr=1e-3, weight_decay=0.0, clip="tensor")
    released = release_gradients(model, optimizer)
    guard = ReleasedGuard(released, optimizer, model, Policy(**policy), snapshots=folder, raise_on_stop=False)
    return model, optimizer, released, guard


def step(model, optimizer, released, guard, *, scale: float = 1.0) -> None:
    x = torch.linspace(-1, 1, 32).reshape(8, 4)
    loss = scale * (model(x) - x.sum(1, keepdim=True)).square().mean()
    guard.begin()
    released.scale(loss).backward()
    guard.end()
    guard.observe(loss)
    optimizer.step()
    guard.settle()


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_a_lowered_rate_is_the_backward_passes_and_nobody_elses() -> None:
    lengths = {}
    for factor in (1.0, 0.25):
        run = made()
        run[3]._ladder.rate.factor = factor
        before = weights(run[0])
        step(*run)
        lengths[factor] = float((weights(run[0]) - before).abs().max())
        assert run[1].param_groups[0]["lr"] == 1e-3
    assert lengths[0.25] == pytest.approx(lengths[1.0] / 4, rel=1e-3)


def test_weights_that_broke_are_put_back_from_the_disk(tmp_path: Path) -> None:
    policy = {"snapshot_max_bytes": 0, "snapshot_interval": 5, "snapshot_confirm": 2, "warmup_steps": 3}
    run = model, _, _, guard = made(tmp_path, **policy)
    for _ in range(12):
        step(*run)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["snapshot-0.pt", "snapshot-10.pt", "snapshot-5.pt"]
    with torch.no_grad():
        next(model.parameters())[0, 0] = math.nan
    for _ in range(4):
        step(*run)
    (rollback,) = [event for event in guard.log if event.kind == "rollback"]
    assert "back to the weights after step 10" in rollback.message
    assert bool(weights(model).isfinite().all())
    loss = guard.metrics["loss"]
    for _ in range(5):
        step(*run)
    assert guard.metrics["loss"] < loss


def test_a_guard_goes_on_where_its_state_was_saved() -> None:
    first, second = made(), made()
    for _ in range(6):
        step(*first)
    second[0].load_state_dict(first[0].state_dict())
    second[1].load_state_dict(first[1].state_dict())
    second[3].load_state_dict(first[3].state_dict())
    for run in (first, second):
        for _ in range(30):
            step(*run)
        step(*run, scale=50.0)
    assert torch.equal(weights(first[0]), weights(second[0]))
    assert first[3].metrics == second[3].metrics
    assert first[3].metrics["loss_score"] > 4


def test_ordinary_steps_are_not_for_it() -> None:
    model = nn.Linear(4, 1)
    with pytest.raises(ValueError, match="has ordinary steps; give release_gradients"):
        ReleasedGuard(None, MetaLion(model.parameters()), model)
