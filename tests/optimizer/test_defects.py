"""The defects of PyPI `cruxy` 2.1.0, each as a scene that it fails and ours passes.

Every scene takes an optimizer class; one test asserts it for ours, one asserts that the SDK (PyPI `cruxy`
2.1.0) breaks it. If a scene no longer tells the two apart, the second test says so.
"""

import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from cruxy_triton import CruxyOptimizer

Make = Callable[..., Any]


def _model(dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(6, 4).to(dtype)


def _step(model: nn.Module, optimizer: Any, value: float = 0.1, loss: float = 1.0, seed: int = 0) -> None:
    """One step on random gradients of the given size."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = (value * torch.randn(p.shape, generator=generator)).to(p.dtype)
    optimizer.step(loss=loss)


def _finite(model: nn.Module) -> bool:
    return all(bool(p.isfinite().all()) for p in model.parameters())


def _lr_used(optimizer: Any) -> float:
    if isinstance(optimizer, CruxyOptimizer):
        return optimizer.metrics()["lr"]
    controller = optimizer.controller
    if hasattr(controller, "current_lr"):
        tracker = controller.inner.variance_tracker
        phase = tracker.var_fast / (tracker.var_fast + tracker.var_slow + 1e-8)
        return max(1e-7, min(1e-2, controller.current_lr * (1 - 0.5 * phase)))
    return controller.prev_lr


def _poisoned(make: Make, mode: str, poison: Callable[[nn.Module], None], loss: float = 1.0) -> None:
    """A step with something non-finite changes nothing, and the next one trains."""
    model = _model()
    optimizer = make(model.parameters(), mode=mode, lr=1e-2)
    for step in range(5):
        _step(model, optimizer, seed=step)
    before = [p.detach().clone() for p in model.parameters()]
    state_before = [
        t.clone() for p in model.parameters() for t in optimizer.state[p].values() if isinstance(t, torch.Tensor)
    ]
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.1)
    poison(model)
    optimizer.step(loss=loss)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    state_after = [t for p in model.parameters() for t in optimizer.state[p].values() if isinstance(t, torch.Tensor)]
    assert all(torch.equal(a, b) for a, b in zip(state_after, state_before, strict=True))
    _step(model, optimizer, seed=9)
    assert _finite(model)
    assert not torch.equal(next(model.parameters()), before[0])


def nan_gradient(make: Make) -> None:
    def poison(model: nn.Module) -> None:
        next(model.parameters()).grad[0, 0] = math.nan  # pyright: ignore

    _poisoned(make, "meta3", poison)


def infinite_gradient(make: Make) -> None:
    def poison(model: nn.Module) -> None:
        next(model.parameters()).grad[1, 2] = -math.inf  # pyright: ignore

    _poisoned(make, "stability_v2", poison)


def nan_gradient_v1(make: Make) -> None:
    def poison(model: nn.Module) -> None:
        next(model.parameters()).grad[0, 0] = math.nan  # pyright: ignore

    _poisoned(make, "stability_v1", poison)


def nan_loss(make: Make) -> None:
    _poisoned(make, "meta3", lambda model: None, loss=math.nan)


def spike(make: Make) -> None:
    """A finite gradient 1,000 times the usual must not raise the learning rate afterwards."""
    model = _model()
    optimizer = make(model.parameters(), mode="meta3", lr=1e-3)
    for step in range(1500):  # past the built-in warm-up, which raises it as well
        _step(model, optimizer, seed=step)
    before = _lr_used(optimizer)
    _step(model, optimizer, value=100.0, seed=1500)
    afterwards = []
    for step in range(150):
        _step(model, optimizer, seed=1501 + step)
        afterwards.append(_lr_used(optimizer))
    assert max(afterwards) < 1.02 * before


def windup(make: Make) -> None:
    """Gradients that shrink steadily over 5,000 steps must not drive the rate beyond its bound."""
    model = _model()
    optimizer = make(model.parameters(), mode="meta3", lr=1e-3, weight_decay=0.0)
    highest = 0.0
    for step in range(5000):
        for p in model.parameters():
            p.grad = torch.full_like(p, math.exp(-step / 300))
        optimizer.step(loss=math.exp(-step / 300))
        if step % 10 == 0:
            highest = max(highest, _lr_used(optimizer))
    assert highest <= 4e-3


def freeze(make: Make) -> None:
    """stability_v2 on stationary gradients must keep learning."""
    model = _model()
    optimizer = make(model.parameters(), mode="stability_v2", lr=1e-3)
    for step in range(400):
        _step(model, optimizer, seed=step)
    assert _lr_used(optimizer) >= 1e-4 * 0.999


def parameter_groups(make: Make) -> None:
    model = _model()
    optimizer = make(
        [{"params": [model.weight], "lr": 0.0}, {"params": [model.bias], "lr": 1e-2}], lr=1e-3, weight_decay=0.0
    )
    before = model.weight.detach().clone(), model.bias.detach().clone()
    _step(model, optimizer)
    assert torch.equal(model.weight, before[0])
    assert not torch.equal(model.bias, before[1])


def schedulers(make: Make) -> None:
    """A schedule that takes the rate to 0 stops the parameters."""
    model = _model()
    optimizer = make(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step < 3))
    for step in range(3):
        _step(model, optimizer, seed=step)
        schedule.step()
    before = [p.detach().clone() for p in model.parameters()]
    _step(model, optimizer, seed=4)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def _resumed(make: Make, mode: str) -> None:
    model = _model()
    optimizer = make(model.parameters(), mode=mode, lr=1e-2)
    for step in range(30):
        _step(model, optimizer, seed=step, loss=1 / (step + 1))
    other = _model()
    other.load_state_dict(model.state_dict())
    resumed = make(other.parameters(), mode=mode, lr=1e-2)
    resumed.load_state_dict(optimizer.state_dict())
    for step in range(30, 60):
        _step(model, optimizer, seed=step, loss=1 / (step + 1))
        _step(other, resumed, seed=step, loss=1 / (step + 1))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def resume_v1(make: Make) -> None:
    _resumed(make, "stability_v1")


def resume_v2(make: Make) -> None:
    _resumed(make, "stability_v2")


def closure_graph(make: Make) -> None:
    """The graph of a closure's loss must die with the step."""
    model = _model()
    optimizer = make(model.parameters(), lr=1e-3)
    seen: list[weakref.ref] = []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            seen.append(weakref.ref(ctx))
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = Probe.apply(model(torch.ones(2, 6)).square().mean())
        loss.backward()
        return loss

    optimizer.step(closure)
    gc.collect()
    assert seen
    assert all(ref() is None for ref in seen)


def small_fp16_gradients(make: Make) -> None:
    """|g|^1.5 of 1e-4 is 1e-6, whose sum fp16 cannot hold: the statistic must not be lost."""
    model = _model(torch.float16)
    optimizer = make(model.parameters(), lr=1e-3, gamma_norm=3.0)
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e-4)
    optimizer.step(loss=1.0)
    expected = 0.1 * 28 ** (1 / 3) * 1e-4
    if isinstance(optimizer, CruxyOptimizer):
        v_fast = optimizer.metrics()["v_fast"]
    else:
        v_fast = optimizer.controller.inner.variance_tracker.var_fast
    assert v_fast == pytest.approx(expected, rel=1e-2)


def large_fp16_sums(make: Make) -> None:
    """The sum of |g|^1.5 passes 65504, fp16's largest number; nothing in the step is infinite, though."""
    model = nn.Linear(300, 300).half()
    optimizer = make(model.parameters(), lr=1e-3)
    before = model.weight.detach().clone()
    for p in model.parameters():
        p.grad = torch.full_like(p, 2.0)
    optimizer.step(loss=1.0)
    assert _finite(model)
    assert not torch.equal(before, model.weight)
    if isinstance(optimizer, CruxyOptimizer):
        assert math.isfinite(optimizer.metrics()["v_fast"])
    else:
        assert math.isfinite(optimizer.controller.inner.variance_tracker.var_fast)


def bf16_at_one(make: Make) -> None:
    """Parameters at 1.0 in bfloat16 (gap 0.0078 above, 0.0039 below) must follow steps of 5e-5."""
    p = nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
    optimizer = make([p], lr=1e-4, use_lion=True, weight_decay=0.0)
    for _ in range(100):
        p.grad = torch.ones_like(p)
        optimizer.step(loss=1.0)
    moved = 1 - p.float().mean().item()
    assert moved == pytest.approx(100 * 0.5e-4, rel=0.2)


SCENES = [
    nan_gradient, infinite_gradient, nan_gradient_v1, nan_loss, spike, windup, freeze, parameter_groups,
    schedulers, resume_v1, resume_v2, closure_graph, small_fp16_gradients, large_fp16_sums, bf16_at_one,
]  # fmt: skip


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.__name__)
def test_ours_holds(scene):
    scene(CruxyOptimizer)


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.__name__)
def test_the_sdk_breaks_it(scene, sdk):
    with pytest.raises((AssertionError, RuntimeError)):
        scene(sdk.CruxyOptimizer)


def test_a_new_level_is_accepted_after_five_steps():
    """The guard takes a spike for an outlier, but not a change that stays."""
    model = _model()
    optimizer = CruxyOptimizer(model.parameters(), lr=1e-3)
    for step in range(20):
        _step(model, optimizer, seed=step)
    before = optimizer.metrics()["v_fast"]
    for step in range(20, 25):
        _step(model, optimizer, value=10.0, seed=step)
    assert optimizer.metrics()["v_fast"] < 2 * before
    for step in range(25, 35):
        _step(model, optimizer, value=10.0, seed=step)
    assert optimizer.metrics()["v_fast"] > 20 * before
