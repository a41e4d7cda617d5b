"""Lion in Triton: one launch for all tensors of one dtype pair, every changing value read from device memory.

Equations: paper eq 11-13; equations.md section 3. Twin: `reference.lion_update_`. A program serves 1,024 elements
of one tensor; whole, aligned chunks take 128-bit loads, the others go element by element.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from cruxy_kernels import layout as L
from cruxy_kernels.codec import BLOCK
from cruxy_kernels.launch import batches, launch
from cruxy_kernels.storage import load_momentum, store_momentum, store_param
from cruxy_kernels.tables import (
    ALIGNED,
    CHUNK,
    COLUMNS,
    EXP_AVG,
    EXP_AVG_SCALE,
    GRAD,
    GROUP,
    INDEX,
    NUMEL,
    PARAM,
    load_values,
)

NUM_SLOTS = tl.constexpr(L.NUM_SLOTS)
STEP = tl.constexpr(L.STEP)
SKIP = tl.constexpr(L.SKIP)
LR_OUT = tl.constexpr(L.LR_OUT)
WEIGHT_DECAY = tl.constexpr(L.WEIGHT_DECAY)
BETA1_OUT = tl.constexpr(L.BETA1_OUT)
BETA2_OUT = tl.constexpr(L.BETA2_OUT)
CLIP_COEF = tl.constexpr(L.CLIP_COEF)


@triton.jit
def lion_chunk(
    row,
    start,
    remaining,
    factor,
    step_size,
    keep,
    beta1,
    beta2,
    step,
    PARAM_TYPE: tl.constexpr,
    GRAD_TYPE: tl.constexpr,
    STATE_TYPE: tl.constexpr,
    ROWS: tl.constexpr,
    MASKED: tl.constexpr,
):
    scale_local = tl.arange(0, ROWS)
    local = scale_local[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    g = load_values(tl.load(row + GRAD), start, local, remaining, GRAD_TYPE, MASKED) * factor
    m = load_momentum(row, start, local, scale_local, remaining, STATE_TYPE, MASKED)
    p = load_values(tl.load(row + PARAM), start, local, remaining, PARAM_TYPE, MASKED)
    u = beta1 * m + (1 - beta1) * g
    sign = tl.where(u > 0, 1.0, tl.where(u < 0, -1.0, 0.0))
    store_param(row, start, local, remaining, p * keep - step_size * sign, step, PARAM_TYPE, MASKED)
    m = beta2 * m + (1 - beta2) * g
    store_momentum(row, start, local, scale_local, remaining, m, STATE_TYPE, MASKED)


@triton.jit
def lion_kernel(
    rows,  # int64 (tensors, COLUMNS)
    block_tensor,  # int32 (blocks,)
    block_chunk,  # int32 (blocks,)
    control,  # fp32 (groups, NUM_SLOTS)
    lr_multipliers,  # fp32 (tensors of the caller,)
    grad_scale,  # fp32 (1,)
    PARAM_TYPE: tl.constexpr,
    GRAD_TYPE: tl.constexpr,
    STATE_TYPE: tl.constexpr,
    HAS_MULTIPLIERS: tl.constexpr,
    HAS_GRAD_SCALE: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    ROWS: tl.constexpr,
):
    program = tl.program_id(0)
    row = rows + tl.load(block_tensor + program).to(tl.int64) * COLUMNS
    slots = control + tl.load(row + GROUP) * NUM_SLOTS
    if tl.load(slots + SKIP) == 0:
        start = tl.load(block_chunk + program).to(tl.int64) * (ROWS * BLOCK)
        remaining = tl.minimum(tl.load(row + NUMEL) - start, ROWS * BLOCK).to(tl.int32)
        factor = tl.load(slots + CLIP_COEF)
        if HAS_GRAD_SCALE:
            factor = factor / tl.load(grad_scale)
        if MAXIMIZE:
            factor = -factor
        lr = tl.load(slots + LR_OUT)
        keep = 1 - lr * tl.load(slots + WEIGHT_DECAY)
        if HAS_MULTIPLIERS:
            lr = lr * tl.load(lr_multipliers + tl.load(row + INDEX))
        beta1 = tl.load(slots + BETA1_OUT)
        beta2 = tl.load(slots + BETA2_OUT)
        step = tl.load(slots + STEP)
        if (remaining == ROWS * BLOCK) & (tl.load(row + ALIGNED) != 0):
            lion_chunk(
                row, start, remaining, factor, lr, keep, beta1, beta2, step,
                PARAM_TYPE, GRAD_TYPE, STATE_TYPE, ROWS, False,
            )  # fmt: skip
        else:
            lion_chunk(
                row, start, remaining, factor, lr, keep, beta1, beta2, step,
                PARAM_TYPE, GRAD_TYPE, STATE_TYPE, ROWS, True,
            )  # fmt: skip


@torch.no_grad()
def lion_update_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    control: Tensor,
    *,
    exp_avg_scales: Sequence[Tensor] | None = None,
    rows: Sequence[int] | None = None,
    lr_multipliers: Tensor | None = None,
    grad_scale: Tensor | None = None,
    maximize: bool = False,
) -> None:
    """Lion in place; arguments, formula and errors as `reference.lion_update_`."""
    columns = {PARAM.value: params, GRAD.value: grads, EXP_AVG.value: exp_avgs}
    if exp_avg_scales is not None:
        columns[EXP_AVG_SCALE.value] = exp_avg_scales
    for batch in batches(columns, rows, read_only=(GRAD.value,)):
        here = control.to(batch.device, non_blocking=True)
        launch(
            lion_kernel,
            batch.table.blocks,
            batch.table.rows,
            batch.table.block_tensor,
            batch.table.block_chunk,
            here,
            here if lr_multipliers is None else lr_multipliers.to(batch.device, non_blocking=True),
            here if grad_scale is None else grad_scale.to(batch.device, torch.float32, non_blocking=True),
            PARAM_TYPE=batch.types[0],
            GRAD_TYPE=batch.types[1],
            STATE_TYPE=batch.types[2],
            HAS_MULTIPLIERS=lr_multipliers is not None,
            HAS_GRAD_SCALE=grad_scale is not None,
            MAXIMIZE=maximize,
            ROWS=CHUNK // BLOCK.value,
        )
        batch.finish()
