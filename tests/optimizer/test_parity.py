"""The three modes against PyPI `cruxy` 2.1.0, guard off and bounds wide.

300 steps in float32, three modes, two rules, an MLP and a transformer. Ours keeps its control values in fp32
and the SDK in Python floats, so the trajectories part by rounding; Lion's sign turns a rounding of a value
near 0 into a whole step of one coordinate. The limit is a relative parameter difference of 1e-4.
"""

import pytest
import torch

from cruxy_triton import CruxyOptimizer

LIMIT = 1e-4


def difference(a: torch.nn.Module, b: torch.nn.Module) -> float:
    """||a - b|| / ||b|| over all parameters."""
    pairs = list(zip(a.parameters(), b.parameters(), strict=True))
    return (sum((p - q).square().sum() for p, q in pairs) / sum(q.square().sum() for _, q in pairs)).sqrt().item()


@pytest.mark.parametrize("workload", ["mlp", "transformer"])
def test_same_trajectory(request, sdk, train, mode, rule, workload):
    make = request.getfixturevalue(workload)
    settings = {"mode": mode, "lr": 1e-4 if rule["use_lion"] else 1e-3, "weight_decay": 0.1, **rule}
    (model, loss), (theirs, _) = make(), make()
    start = difference(model, make()[0])
    losses = train(model, CruxyOptimizer(model.parameters(), **settings, bounds=None, guard=False), loss, 300)
    train(theirs, sdk.CruxyOptimizer(theirs.parameters(), **settings), loss, 300)
    assert start == 0
    assert difference(theirs, make()[0]) > 30 * LIMIT, "nothing was trained"
    assert sum(losses[-50:]) < sum(losses[:50])
    assert difference(model, theirs) <= LIMIT


def test_same_adam_without_nesterov_and_with_coupled_decay(sdk, train, mlp):
    settings = {"lr": 1e-3, "use_nesterov": False, "decoupled_weight_decay": False, "weight_decay": 0.1}
    (model, loss), (theirs, _) = mlp(), mlp()
    train(model, CruxyOptimizer(model.parameters(), **settings, bounds=None, guard=False), loss, 300)
    train(theirs, sdk.CruxyOptimizer(theirs.parameters(), **settings), loss, 300)
    assert difference(model, theirs) <= LIMIT


def test_same_gradient_centralisation(sdk, train, mlp):
    settings = {"lr": 1e-3, "use_gc": True}
    (model, loss), (theirs, _), (plain, _) = mlp(), mlp(), mlp()
    train(model, CruxyOptimizer(model.parameters(), **settings, bounds=None, guard=False), loss, 300)
    train(theirs, sdk.CruxyOptimizer(theirs.parameters(), **settings), loss, 300)
    train(plain, CruxyOptimizer(plain.parameters(), lr=1e-3, bounds=None, guard=False), loss, 300)
    assert difference(model, theirs) <= LIMIT
    assert difference(plain, theirs) > 100 * LIMIT, "centralisation made no difference"


@pytest.mark.parametrize("settings", [{"gamma_norm": 2.0}, {"gamma_norm": 3.1}, {"meta_interval": 3}])
def test_same_with_other_settings(sdk, train, mlp, settings):
    (model, loss), (theirs, _) = mlp(), mlp()
    train(model, CruxyOptimizer(model.parameters(), **settings, bounds=None, guard=False), loss, 300)
    train(theirs, sdk.CruxyOptimizer(theirs.parameters(), **settings), loss, 300)
    assert difference(model, theirs) <= LIMIT


# -- where we differ on purpose: each difference alone -------------------------------------------------------


def test_bounds_are_the_only_difference_of_bounded_stability_v2(sdk, train, mlp):
    """The SDK's rate leaves [0.1, 4] x lr here; with our bounds it stops at the edge."""
    (model, loss), (theirs, _) = mlp(), mlp()
    ours = CruxyOptimizer(model.parameters(), mode="stability_v2", lr=1e-3, guard=False)
    published = sdk.CruxyOptimizer(theirs.parameters(), mode="stability_v2", lr=1e-3)
    lowest = 1.0
    for start in range(0, 300, 50):
        train(model, ours, loss, 50, start)
        train(theirs, published, loss, 50, start)
        lowest = min(lowest, ours.metrics()["lr_scale"])
    assert published.controller.prev_lr < 0.1e-3
    assert lowest == pytest.approx(0.1)


def test_the_guard_changes_nothing_on_a_calm_run(train, mlp):
    (model, loss), (other, _) = mlp(), mlp()
    train(model, CruxyOptimizer(model.parameters(), guard=True), loss, 300)
    train(other, CruxyOptimizer(other.parameters(), guard=False), loss, 300)
    assert difference(model, other) == 0


def test_no_loss_means_no_curvature_and_not_a_loss_of_0(sdk, mlp):
    """Between steps with and without a loss the SDK sees the loss fall to 0; ours sees nothing."""
    (model, loss), (theirs, _) = mlp(), mlp()
    ours = CruxyOptimizer(model.parameters(), bounds=None, guard=False)
    published = sdk.CruxyOptimizer(theirs.parameters())
    for step in range(10):
        for m, o in ((model, ours), (theirs, published)):
            o.zero_grad()
            value = loss(m, step)
            value.backward()
            o.step(loss=value.item() if step < 5 else None)
    curvature_before = ours.history()[4]["curvature"]
    assert ours.metrics()["curvature"] == curvature_before
    assert published.controller.inner.curvature_estimator.curv_ema < curvature_before
