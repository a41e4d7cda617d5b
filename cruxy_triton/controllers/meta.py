"""The slow loop of meta3 (white paper section 4, eq 8-10): every N steps it moves lr_scale and beta2.

It works on the control vector where that lives, one 0-dim value a row, and never asks the host for one:
the same code runs on a GPU without a synchronisation. `control_step` has taken the fast loop's values
just before; the slow loop then renews the two outputs that follow from lr_scale and beta2.
"""

import torch
from torch import Tensor

from cruxy_kernels import layout as L
from cruxy_kernels.laws.control import bias_corrections, phase_modulation


@torch.no_grad()
def slow_loop(control: Tensor, *, bounded: bool = True) -> None:
    """Update LR_SCALE and META_BETA2 of every row, and LR_OUT, BETA2_OUT and the bias corrections.

        sigma_ref = mean of the last <= 50 v_fast, this one included               (eq 8)
        z = (v_fast - sigma_ref) / (sigma_ref + 1e-6)                              (eq 9)
        s <- s exp(-kappa tanh z)                                                  (eq 10)
        beta2 <- beta2 + kappa_beta2 tanh(z) (1 - beta2)

    It acts in every N-th call of the optimizer's step and does nothing in the others (the host calls it only
    then, unless the step is captured in a CUDA graph). Nothing moves in a skipped step, nor before there are
    two values to compare.

    Args:
        control: float32 (num_rows, NUM_SLOTS), after `control_step(law="meta3")` of the same step.
        bounded: keep beta2 in [0.9, 0.99999] (anti-windup); LR_SCALE has its own bounds in the vector.
    """
    slot = control.unbind(1)
    v_fast, step = slot[L.V_FAST], slot[L.STEP]
    due = torch.remainder(step + slot[L.SKIPPED], slot[L.META_INTERVAL]) == 0
    active = due & (slot[L.SKIP] == 0) & (step >= 2)

    history = control[:, L.META_HISTORY : L.META_HISTORY + L.META_HISTORY_LEN]
    sigma_ref = history.sum(1) / step.clamp(1, L.META_HISTORY_LEN)
    z = (v_fast - sigma_ref) / (sigma_ref + L.META_EPS)

    scale = slot[L.LR_SCALE] * torch.exp(-slot[L.META_LR_ETA] * torch.tanh(z))
    scale = scale.clamp(slot[L.SCALE_MIN], slot[L.SCALE_MAX])
    beta2 = slot[L.META_BETA2] + slot[L.META_LR_BETA2] * torch.tanh(z) * (1 - slot[L.META_BETA2])
    if bounded:
        beta2 = beta2.clamp(L.META_BETA2_MIN, L.META_BETA2_MAX)

    lr_out, beta2_out = phase_modulation(slot[L.LR], scale, beta2, slot[L.PHASE], slot[L.LR_MIN], slot[L.LR_MAX])
    correction1, correction2_sqrt = bias_corrections(slot[L.BETA1_OUT], beta2_out, slot[L.AGE])
    for index, value in (
        (L.LR_SCALE, scale),
        (L.META_BETA2, beta2),
        (L.LR_OUT, lr_out),
        (L.BETA2_OUT, beta2_out),
        (L.BIAS_CORRECTION1, correction1),
        (L.BIAS_CORRECTION2_SQRT, correction2_sqrt),
    ):
        control[:, index] = torch.where(active, value, slot[index])
