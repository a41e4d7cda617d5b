"""AdamW in Triton: one launch for all tensors of one dtype pair, every changing value read from device memory.

Formula: equations.md section 3. Twin: `reference.adamw_update_`. The second moment is fp32: in bfloat16 its
relative step 1 - beta2 = .001 is below half an ulp and would be lost, in fp16 small squares would underflow.
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
    EXP_AVG_SQ,
    GRAD,
    GROUP,
    INDEX,
    NUMEL,
    PARAM,
    load_values,
    store_raw,
)

NUM_SLOTS = tl.constexpr(L.NUM_SLOTS)
STEP = tl.constexpr(L.STEP)
SKIP = tl.constexpr(L.SKIP)
LR_OUT = tl.constexpr(L.LR_OUT)
WEIGHT_DECAY = tl.constexpr(L.WEIGHT_DECAY)
EPS = tl.constexpr(L.EPS)
BETA1_OUT = tl.constexpr(L.BETA1_OUT)
BETA2_OUT = tl.constexpr(L.BETA2_OUT)
CLIP_COEF = tl.constexpr(L.CLIP_COEF)
BIAS_CORRECTION1 = tl.constexpr(L.BIAS_CORRECTION1)
BIAS_CORRECTION2_SQRT = tl.constexpr(L.BIAS_CORRECTION2_SQRT)


@triton.jit
def adamw_chunk(
    row,
    start,
    remaining,
    factor,
    step_size,
    keep,
    l2,
    beta1,
    beta2,
    eps,
    step,
    PARAM_TYPE: tl.constexpr,
    GRAD_TYPE: tl.constexpr,
    STATE_TYPE: tl.constexpr,
    NESTEROV: tl.constexpr,
    ROWS: tl.constexpr,
    MASKED: tl.constexpr,
):
    scale_local = tl.arange(0, ROWS)
    local = scale_local[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    p = load_values(tl.load(row + PARAM), start, local, remaining, PARAM_TYPE, MASKED)
    g = load_values(tl.load(row + GRAD), start, local, remaining, GRAD_TYPE, MASKED) * factor + l2 * p
    m = load_momentum(row, start, local, scale_local, remaining, STATE_TYPE, MASKED)
    m = beta1 * m + (1 - beta1) * g
    if STATE_TYPE != "int8":
        store_momentum(row, start, local, scale_local, remaining, m, STATE_TYPE, MASKED)
    squares = tl.load(row + EXP_AVG_SQ)
    v = beta2 * load_values(squares, start, local, remaining, "fp32", MASKED) + (1 - beta2) * g * g
    store_raw(squares, start, local, remaining, v, "fp32", MASKED)
    if NESTEROV:
        numerator = beta1 * m + (1 - beta1) * g
    else:
        numerator = m
    p = p * keep - step_size * (numerator / (tl.sqrt(v) + eps))
    store_param(row, start, local, remaining, p, step, PARAM_TYPE, MASKED)
    if STATE_TYPE == "int8":  # last: the encoder needs the registers that the parameters have just left
        store_momentum(row, start, local, scale_local, remaining, m, STATE_TYPE, MASKED)


@triton.jit
def adamw_kernel(
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
    NESTEROV: tl.constexpr,
    DECOUPLED: tl.constexpr,
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
        decay = tl.load(slots + WEIGHT_DECAY)
        if DECOUPLED:
            keep = 1 - lr * decay
            l2 = 0.0
        else:
            keep = 1.0
            l2 = decay
        step_size = lr * tl.load(slots + BIAS_CORRECTION2_SQRT) / tl.load(slots + BIAS_CORRECTION1)
        if HAS_MULTIPLIERS:
            step_size = step_size * tl.load(lr_multipliers + tl.load(row + INDEX))
        beta1 = tl.load(slots + BETA1_OUT)
        beta2 = tl.load(slots + BETA2_OUT)
        eps = tl.load(slots + EPS)
        step = tl.load(slots + STEP)
        if (remaining == ROWS * BLOCK) & (tl.load(row + ALIGNED) != 0):
            adamw_chunk(
                row, start, remaining, factor, step_size, keep, l2, beta1, beta2, eps, step,
                PARAM_TYPE, GRAD_TYPE, STATE_TYPE, NESTEROV, ROWS, False,
            )  # fmt: skip
        else:
            adamw_chunk(
                row, start, remaining, factor, step_size, keep, l2, beta1, beta2, eps, step,
                PARAM_TYPE, GRAD_TYPE, STATE_TYPE, NESTEROV, ROWS, True,
            )  # fmt: skip


@torch.no_grad()
def adamw_update_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    control: Tensor,
    *,
    rows: Sequence[int] | None = None,
    lr_multipliers: Tensor | None = None,
    grad_scale: Tensor | None = None,
    maximize: bool = False,
    nesterov: bool = True,
    decoupled: bool = True,
    exp_avg_scales: Sequence[Tensor] | None = None,
) -> None:
    """AdamW in place; arguments, formula and errors as `reference.adamw_update_`."""
    columns = {
        PARAM.value: params,
        GRAD.value: grads,
        EXP_AVG.value: exp_avgs,
        EXP_AVG_SQ.value: exp_avg_sqs,
    }
    if exp_avg_scales is not None:
        columns[EXP_AVG_SCALE.value] = exp_avg_scales
    for batch in batches(columns, rows, read_only=(GRAD.value,)):
        if batch.types[3] != "fp32":
            raise TypeError(f"exp_avg_sqs are {batch.types[3]}; expected float32")
        here = control.to(batch.device, non_blocking=True)
        launch(
            adamw_kernel,
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
            NESTEROV=nesterov,
            DECOUPLED=decoupled,
            ROWS=CHUNK // BLOCK.value,
        )
        batch.finish()
