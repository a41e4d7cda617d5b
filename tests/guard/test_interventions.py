"""What the guard does to a run that goes wrong, above real optimizers, and what it says of it."""

import math

import pytest
import torch
from torch import nn

from cruxy_triton import CruxyOptimizer
from cruxy_triton.guard import Policy, Regime, TrainingGuard, TrainingStopped

pytestmark = pytest.mark.filterwarnings("ignore:CruxyOptimizer.*gets no loss")


def test_a_nan_gradient_is_skipped_exactly_and_named(regression, make_optimizer):
    broken, reference = regression(), regression()
    one, two = make_optimizer(broken.model.parameters()), make_optimizer(reference.model.parameters())
    guard, quiet = TrainingGuard(one, broken.model), TrainingGuard(two, reference.model)

    def poison(model, step):
        if step == 12:
            model[2].weight.grad[0, 3] = math.nan

    broken.train(one, guard, 13, broken=poison)
    reference.train(two, quiet, 12)
    torch.testing.assert_close(broken.params(), reference.params(), rtol=0, atol=0)
    broken.train(one, guard, 1, start=13)
    (event,) = [event for event in guard.log if event.kind == "skip"]
    assert (event.step, event.layer, event.batch) == (13, "2.weight", 12)
    assert "gradient is not finite" in event.message


def test_a_nan_loss_is_called_the_loss(regression):
    run = regression()
    optimizer = torch.optim.SGD(run.model.parameters(), lr=1e-2)
    guard = TrainingGuard(optimizer, run.model)
    run.train(optimizer, guard, 5)
    before = run.params()
    optimizer.zero_grad()
    run.loss(5).backward()
    guard.observe(float("nan"))
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(run.params(), before, strict=True))
    guard.finish()
    (event,) = [event for event in guard.log if event.kind == "skip"]
    assert "the loss is not finite" in event.message


def test_the_skip_of_the_optimizers_own_kind_agrees_with_the_hosts(regression, monkeypatch):
    """On an accelerator skipping is left to `found_inf`; here the same path on the CPU.

    AdamW agrees bit for bit. CruxyOptimizer's slow loop counts calls, of which a hidden gradient makes none, so that it
    adapts one step earlier or later.
    """

    def poison(model, step):
        if step in (7, 20):
            model[0].bias.grad[0] = math.inf

    for make, tolerance in (
        (lambda p: CruxyOptimizer(p, lr=5e-3), 1e-3),
        (lambda p: torch.optim.AdamW(p, lr=3e-3, fused=True), 0.0),
    ):
        results = []
        for on_device in (False, True):
            with monkeypatch.context() as patch:
                patch.setattr(TrainingGuard, "_decides_on_device", lambda *_, on=on_device: on)
                run = regression()
                optimizer = make(run.model.parameters())
                guard = TrainingGuard(optimizer, run.model)
                run.train(optimizer, guard, 30, broken=poison)
                assert not hasattr(optimizer, "found_inf")
                assert guard.log.kinds.count("skip") == 2
                results.append(run.params())
        torch.testing.assert_close(*results, rtol=0, atol=tolerance)


def test_a_parameter_set_to_nan_rolls_back(regression, make_optimizer):
    run = regression()
    optimizer = make_optimizer(run.model.parameters())
    guard = TrainingGuard(optimizer, run.model, Policy(snapshot_interval=20, snapshot_confirm=5))
    run.train(optimizer, guard, 60)
    with torch.no_grad():
        run.model[0].weight[3, 3] = math.nan
    losses = run.train(optimizer, guard, 60, start=60)
    assert all(bool(torch.isfinite(p).all()) for p in run.params())
    assert math.isfinite(losses[-1])
    assert losses[-1] < 3 * min(losses[5:])
    (event,) = [event for event in guard.log if event.kind == "rollback"]
    assert event.layer == "0.weight"
    assert "back to the weights after step 40" in event.message
    assert guard.lr_factor == 1.0  # it was not the rate's fault


def test_nan_for_ever_stops_with_a_report_and_good_weights(regression, make_optimizer):
    run = regression()
    optimizer = make_optimizer(run.model.parameters())
    guard = TrainingGuard(optimizer, run.model)
    run.train(optimizer, guard, 30)

    def poison(model, step):
        model[0].weight.grad[0, 0] = math.nan

    with pytest.raises(TrainingStopped, match=r"5 steps in a row were not finite.*5 rollbacks did not help") as stop:
        run.train(optimizer, guard, 500, start=30, broken=poison)
    assert "Where: 0.weight. Last batch:" in str(stop.value)
    assert all(bool(torch.isfinite(p).all()) for p in run.params())
    assert guard._steps < 80
    with pytest.raises(TrainingStopped):  # and it stays stopped
        run.train(optimizer, guard, 1)


def test_without_raising_a_stopped_run_changes_nothing(regression):
    run = regression()
    optimizer = torch.optim.SGD(run.model.parameters(), lr=1e-2)
    guard = TrainingGuard(optimizer, run.model, Policy(max_rollbacks=0), raise_on_stop=False)

    def poison(model, step):
        model[0].weight.grad[0, 0] = math.nan

    run.train(optimizer, guard, 20, broken=poison)
    assert guard.stopped is not None
    before = run.params()
    run.train(optimizer, guard, 5)
    assert all(torch.equal(a, b) for a, b in zip(run.params(), before, strict=True))


def test_frequent_skips_do_not_freeze_a_run_silently(regression):
    """Two of three steps skipped, never five in a row: after a while the run is ended, with the reason."""
    run = regression()
    optimizer = torch.optim.SGD(run.model.parameters(), lr=1e-2)
    guard = TrainingGuard(optimizer, run.model)

    def poison(model, step):
        if step % 3:
            model[0].weight.grad[0, 0] = math.nan

    with pytest.raises(TrainingStopped, match=r"of the last \d+ steps were skipped"):
        run.train(optimizer, guard, 400, broken=poison)


def test_a_rate_far_too_large_starts_again_with_less(regression):
    run, wild = regression(), regression()
    optimizer = torch.optim.AdamW(run.model.parameters(), lr=1.0)
    guard = TrainingGuard(optimizer, run.model)
    losses = run.train(optimizer, guard, 200)
    unguarded = wild.train(torch.optim.AdamW(wild.model.parameters(), lr=1.0), None, 200)
    (event,) = [event for event in guard.log if event.kind == "rollback"]
    assert event.step == 1
    assert "of their size" in event.message
    assert optimizer.param_groups[0]["lr"] == 1.0
    assert sum(losses[-20:]) < 0.5 * sum(unguarded[-20:])


@pytest.mark.parametrize(
    ("ratios", "tripped"),
    [
        ([0.14], 1),
        ([0.05, 0.12], None),  # mean .085
        ([0.05, 0.12, 0.12], 3),  # .0967
        ([0.02, 0.04, 0.06, 0.08, 0.085, 0.085, 0.08], None),  # momentum that gathers: .078 at most
        ([0.04, 0.06, 0.08, 0.09, 0.1, 0.1, 0.11], 7),  # a rate that climbs: .086 at the sixth, .096 at the seventh
    ],
)
def test_the_update_ratio_is_judged_in_the_mean_of_five(ratios, tripped, monkeypatch):
    p = nn.Parameter(torch.ones(4, 4))
    optimizer = torch.optim.SGD([p], lr=1e-3)
    guard = TrainingGuard(optimizer)
    given = iter(ratios)
    p.grad = torch.ones(4, 4)
    optimizer.step()
    monkeypatch.setattr(guard._ratio, "end", lambda: torch.tensor(next(given)))
    guard._mail.take()
    for _ in ratios:
        optimizer.step()
    guard.finish()
    steps = [event.step - 1 for event in guard.log if event.kind == "rollback"]
    assert steps == ([] if tripped is None else [tripped])


def test_a_rising_loss_cuts_resets_and_rolls_back(regression):
    """The loss leaves its level for good: cut at once, reset after 5, back after 10; then the new level holds."""
    run = regression()
    optimizer = torch.optim.SGD(run.model.parameters(), lr=1e-3, momentum=0.9)
    guard = TrainingGuard(optimizer, run.model)
    seen = []
    for step in range(160):
        optimizer.zero_grad()
        run.loss(step).backward()
        guard.observe(1.0 if step < 80 else 5.0)
        optimizer.step()
        seen.append(guard.regime)
    changes = [(event.step, event.kind) for event in guard.log if event.kind not in ("regime", "clip")]
    # Steps 81, 82, 83 are severe: 2, 3.8, 5.42. Cut on entering; reset 5 later; rollback 10 later.
    assert changes[:3] == [(83, "lr"), (88, "momentum_reset"), (93, "rollback")]
    assert guard.log.kinds.count("rollback") == 1
    assert guard.stopped is None
    assert seen[-1] is Regime.STABLE


def test_a_dead_layer_is_reported_once(regression):
    run = regression()
    optimizer = torch.optim.SGD(run.model.parameters(), lr=1e-2)
    guard = TrainingGuard(optimizer, run.model)

    def kill(model, step):
        if step >= 25:
            model[0].weight.grad.zero_()

    run.train(optimizer, guard, 100, broken=kill)
    (event,) = [event for event in guard.log if event.kind == "note"]
    assert event.layer == "0.weight"
    assert "dead layer" in event.message


def test_without_clipping_nothing_is_clipped(regression):
    run = regression()
    optimizer = torch.optim.SGD(run.model.parameters(), lr=1e-2)
    guard = TrainingGuard(optimizer, run.model, Policy(clip=False))

    def spike(model, step):
        if step == 30:  # more than 6 deviations, less than the 12 at which a step is skipped
            for p in model.parameters():
                p.grad.mul_(15)

    run.train(optimizer, guard, 40, broken=spike)
    assert "clip" not in guard.log.kinds
    clipping = regression()
    optimizer = torch.optim.SGD(clipping.model.parameters(), lr=1e-2)
    guard = TrainingGuard(optimizer, clipping.model)
    clipping.train(optimizer, guard, 40, broken=spike)
    assert "clip" in guard.log.kinds
