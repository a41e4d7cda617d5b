"""The slow loop of meta3 (white paper section 4, eq 8-10): every N calls it moves LR_SCALE and META_BETA2.

It works on the control vector where that lives and never asks the host for a value, so a GPU does not wait. The
signal z of eq 8 and 9 is formed by `control_step`, which has the history at hand: TREND is tanh z in a call in which
the slow loop is due, and 0 in the others, in skipped steps and before there are two values to compare. With TREND 0
nothing moves, so a CUDA graph may hold the slow loop in every step.
"""

import functools

import torch
from torch import Tensor

from cruxy_kernels import layout as L
from cruxy_kernels import refresh_outputs


@functools.lru_cache(maxsize=16)
def _ones(count: int, device: torch.device) -> Tensor:
    return torch.ones(count, device=device)


@torch.no_grad()
def slow_loop(
    control: Tensor, *, bounded: bool = True, log: Tensor | None = None, backend: str | None = None
) -> None:
    """Update LR_SCALE and META_BETA2 of every row, and what follows from them: LR_OUT, BETA2_OUT, its correction.

        s <- s exp(-kappa tanh z)                                                  (eq 10)
        beta2 <- beta2 + kappa_beta2 tanh(z) (1 - beta2)

    Args:
        control: float32 (num_rows, NUM_SLOTS), after `control_step(law="meta3")` of the same step.
        bounded: keep beta2 in [0.9, 0.99999] (anti-windup); LR_SCALE has its own bounds in the vector.
        log: as for `control_step`; its row of this step is written again.
        backend: as for `control_step`.
    """
    trend, scale, beta2 = control[:, L.TREND], control[:, L.LR_SCALE], control[:, L.META_BETA2]
    # Eight launches on a GPU with the last one: each operator counts in a step that takes tens of microseconds.
    scale.div_((control[:, L.META_LR_ETA] * trend).exp_())
    scale.clamp_(control[:, L.SCALE_MIN], control[:, L.SCALE_MAX])
    beta2.lerp_(_ones(len(control), control.device), control[:, L.META_LR_BETA2] * trend)
    if bounded:
        beta2.clamp_(L.META_BETA2_MIN, L.META_BETA2_MAX)
    refresh_outputs(control, log=log, backend=backend)
