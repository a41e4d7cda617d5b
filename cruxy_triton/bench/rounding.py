"""16-bit parameters: what becomes of steps below half a gap, by round-to-nearest, stochastic rounding, a spare byte.

A spare byte ("compensation") keeps eight more bits of each parameter: 1 byte of state per parameter. Stochastic
rounding keeps nothing. Measured is Lion on a small regression and on a drift alone, against fp32 parameters.
"""

from typing import Any

import torch
from torch import Tensor

from cruxy_kernels.rounding import random_bits, round_stochastic

FORMATS = {"fp16": torch.float16, "bf16": torch.bfloat16}


def nearest(value: Tensor, kept: Tensor, dtype: torch.dtype, step: int) -> tuple[Tensor, Tensor]:
    return value.to(dtype), kept


def stochastic(value: Tensor, kept: Tensor, dtype: torch.dtype, step: int) -> tuple[Tensor, Tensor]:
    random = random_bits(torch.tensor(0.0), torch.tensor(float(step)), [0], [value.numel()])
    return round_stochastic(value, random, dtype), kept


def spare_byte(value: Tensor, kept: Tensor, dtype: torch.dtype, step: int) -> tuple[Tensor, Tensor]:
    """The remainder in 1/256 of the format's gap, as a signed byte (held as fp32 here)."""
    stored = value.to(dtype)
    gap = torch.finfo(dtype).eps * 2.0 ** torch.floor(torch.log2(stored.float().abs().clamp(min=2.0**-126)))
    if dtype == torch.float16:
        gap = gap.clamp(min=2.0**-24)
    byte = ((value - stored.float()) / gap * 256).round().clamp(-128, 127)
    return stored, byte / 256 * gap


METHODS = {
    "round to nearest": (nearest, 0.0),
    "stochastic rounding": (stochastic, 0.0),
    "compensation byte": (spare_byte, 1.0),
}


def drift(dtype: torch.dtype, method: Any, lr: float, steps: int = 200) -> float:
    """The mean move of parameters of size .02 under a constant sign, over the move that fp32 makes (1 is right)."""
    torch.manual_seed(0)
    p = (torch.randn(8192) * 0.02).to(dtype)
    start, kept = p.float(), torch.zeros(8192)
    for step in range(steps):
        p, kept = method(p.float() + kept - lr, kept, dtype, step)
    return ((start - p.float() - kept).mean() / (lr * steps)).item()


def regression(dtype: torch.dtype | None, method: Any, lr: float, steps: int = 600) -> float:
    """The final loss of Lion on a noisy linear regression of 256 weights; fp32 parameters where dtype is None."""
    generator = torch.Generator().manual_seed(0)
    goal = torch.randn(256, generator=generator) * 0.5
    p = torch.zeros(256) if dtype is None else torch.zeros(256).to(dtype)
    kept, m, losses = torch.zeros(256), torch.zeros(256), []
    for step in range(steps):
        x = torch.randn(64, 256, generator=generator)
        weight = p.float() + kept
        error = x @ weight - x @ goal
        g = x.T @ error / 64
        u = torch.sign(0.9 * m + 0.1 * g)
        m = 0.99 * m + 0.01 * g
        rate = lr * (1 - step / steps)
        weight = weight - rate * u
        if dtype is None:
            p = weight
        else:
            p, kept = method(weight, kept, dtype, step)
        if step >= steps - 50:
            losses.append((p.float() - goal).square().sum().item())
    return sum(losses) / len(losses)


def table() -> list[dict[str, Any]]:
    """A row for each format and method."""
    rows = []
    exact = regression(None, None, 5e-3)
    for format_name, dtype in FORMATS.items():
        for name, (method, state) in METHODS.items():
            rows.append(
                {
                    "format": format_name,
                    "method": name,
                    "state_bytes_per_parameter": state,
                    "drift_lr_1e-4": drift(dtype, method, 1e-4),
                    "drift_lr_1e-6": drift(dtype, method, 1e-6),
                    "regression_over_fp32": regression(dtype, method, 5e-3) / exact,
                }
            )
    return rows
