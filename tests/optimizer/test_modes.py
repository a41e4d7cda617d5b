"""What each mode's multiplier of the learning rate does in the long run."""

import pytest
import torch

from cruxy_kernels import control_step, new_control
from cruxy_kernels import layout as L


def multipliers(size, steps=2000, **inputs):
    """LR_SCALE of stability_v2 after each step; `size` of the gradients' 2-norm by step, with 10 % of noise."""
    control = new_control(**inputs)
    generator = torch.Generator().manual_seed(0)
    noise = 1 + 0.1 * torch.randn(steps, generator=generator)
    seen = []
    for step in range(steps):
        norm = size(step) * noise[step].abs().item()
        telemetry = torch.tensor([16 * (norm / 16) ** 1.5 * 16, norm**2, norm / 4, 0.0])
        control_step(control, telemetry, law="stability_v2")
        seen.append(control[0, L.LR_SCALE].item())
    return seen


def stationary(step):
    return 1.0


def falling(step):
    return 10 ** (-step / 1000)


def test_stability_v2_rests_at_the_rate_that_was_asked_for():
    """Stationary gradients: a warm-up of half the rate, and then the rate; never a drift to a bound."""
    seen = multipliers(stationary)
    assert min(seen) > 0.55
    assert seen[-1] == pytest.approx(1.0, abs=0.03)
    assert max(seen) < 1.1


def test_stability_v2_does_not_wind_up():
    """Gradients that fall ten-fold every 1,000 steps: no more than twice the rate."""
    assert 1.0 < max(multipliers(falling)) < 1.8


def test_the_published_recursion_is_there():
    """guard=False: to the lower bound within 50 steps, to the upper one when the gradients fall."""
    assert multipliers(stationary, 50, guard=False)[-1] == pytest.approx(0.1)
    assert multipliers(falling, guard=False)[-1] == pytest.approx(4.0)
