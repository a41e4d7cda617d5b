"""Gradient statistics in Triton: Σ|g|^γ, Σg², max|g| and the count of non-finite elements in one read.

equations.md section 1, paper eq 1. Twin: `reference.gradient_telemetry`. Every program sums a fixed run of chunks
in a fixed order, so equal gradients give equal bits; the partial sums go to the control kernel, which adds them.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from cruxy_kernels.launch import batches, launch, on_device
from cruxy_kernels.tables import (
    ALIGNED,
    CHUNK,
    COLUMNS,
    FIRST_BLOCK,
    GRAD,
    NUMEL,
    load_values,
    to_device,
)

# Programs of one launch: enough to fill any card, few enough that one program can add what they leave.
MAX_PARTIALS = 4096
STATISTICS = 4  # Σ|g|^γ, Σg², max|g|, non-finite count


@triton.jit
def chunk_statistics(g, gamma, GAMMA_IS_1_5: tl.constexpr):
    """The four statistics of each row of `g` (fp32): with 8 elements a row, most of the sum is within a thread."""
    finite = tl.abs(g) < float("inf")  # False for NaN
    a = tl.where(finite, tl.abs(g), 0.0)
    if GAMMA_IS_1_5:
        power = a * tl.sqrt(a)
    else:
        power = tl.where(a > 0, tl.exp2(gamma * tl.log2(tl.where(a > 0, a, 1.0))), 0.0)
    return (
        tl.sum(power, axis=1),
        tl.sum(a * a, axis=1),
        tl.max(a, axis=1),
        tl.sum(tl.where(finite, 0.0, 1.0), axis=1),
    )


@triton.jit
def telemetry_kernel(
    rows,  # int64 (tensors, COLUMNS)
    block_tensor,  # int32 (blocks,)
    block_chunk,  # int32 (blocks,)
    blocks,
    blocks_a_program,
    grad_scale,  # fp32 (1,): gradients are divided by it
    gamma,
    partials,  # fp32 (programs, 4)
    GRAD_TYPE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    GAMMA_IS_1_5: tl.constexpr,
    ROWS: tl.constexpr,
):
    program = tl.program_id(0)
    if HAS_SCALE:
        factor = 1.0 / tl.load(grad_scale)
    else:
        factor = 1.0
    power_sum = tl.zeros((ROWS,), tl.float32)
    square_sum = tl.zeros((ROWS,), tl.float32)
    largest = tl.zeros((ROWS,), tl.float32)
    bad = tl.zeros((ROWS,), tl.float32)
    local = tl.arange(0, ROWS)[:, None] * 8 + tl.arange(0, 8)[None, :]
    first = program * blocks_a_program
    last = tl.minimum(first + blocks_a_program, blocks)
    for block in range(first, last):
        row = rows + tl.load(block_tensor + block).to(tl.int64) * COLUMNS
        start = tl.load(block_chunk + block).to(tl.int64) * (ROWS * 8)
        address = tl.load(row + GRAD)
        remaining = tl.minimum(tl.load(row + NUMEL) - start, ROWS * 8).to(tl.int32)
        if (remaining == ROWS * 8) & (tl.load(row + ALIGNED) != 0):
            g = load_values(address, start, local, remaining, GRAD_TYPE, False)
            power, square, top, count = chunk_statistics(g * factor, gamma, GAMMA_IS_1_5)
        else:
            g = load_values(address, start, local, remaining, GRAD_TYPE, True)
            power, square, top, count = chunk_statistics(g * factor, gamma, GAMMA_IS_1_5)
        power_sum += power
        square_sum += square
        largest = tl.maximum(largest, top)
        bad += count
    out = partials + program * 4
    tl.store(out, tl.sum(power_sum, axis=0))
    tl.store(out + 1, tl.sum(square_sum, axis=0))
    tl.store(out + 2, tl.max(largest, axis=0))
    tl.store(out + 3, tl.sum(bad, axis=0))


@triton.jit
def sum_partials(partials, first, count, BLOCK: tl.constexpr):
    """Σ|g|^γ, Σg², max|g|, non-finite count of partials[first : first + count], in a fixed order."""
    power_sum = tl.zeros((BLOCK,), tl.float32)
    square_sum = tl.zeros((BLOCK,), tl.float32)
    largest = tl.zeros((BLOCK,), tl.float32)
    bad = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        index = start + tl.arange(0, BLOCK)
        mask = index < count
        here = partials + (first + index) * 4
        power_sum += tl.load(here, mask=mask, other=0.0)
        square_sum += tl.load(here + 1, mask=mask, other=0.0)
        largest = tl.maximum(largest, tl.load(here + 2, mask=mask, other=0.0))
        bad += tl.load(here + 3, mask=mask, other=0.0)
    return (
        tl.sum(power_sum, axis=0),
        tl.sum(square_sum, axis=0),
        tl.max(largest, axis=0),
        tl.sum(bad, axis=0),
    )


@triton.jit
def total_kernel(partials, count, totals, BLOCK: tl.constexpr):
    """totals (4,) of partials (count, 4): one program."""
    power_sum, square_sum, largest, bad = sum_partials(partials, 0, count, BLOCK)
    tl.store(totals, power_sum)
    tl.store(totals + 1, square_sum)
    tl.store(totals + 2, largest)
    tl.store(totals + 3, bad)


@triton.jit
def tensor_kernel(partials, rows, totals, CHUNK_: tl.constexpr, BLOCK: tl.constexpr):
    """totals (tensors, 4) of partials (blocks, 4): one program a tensor."""
    tensor = tl.program_id(0)
    row = rows + tensor.to(tl.int64) * COLUMNS
    count = (tl.load(row + NUMEL) + CHUNK_ - 1) // CHUNK_
    power_sum, square_sum, largest, bad = sum_partials(partials, tl.load(row + FIRST_BLOCK), count, BLOCK)
    out = totals + tensor * 4
    tl.store(out, power_sum)
    tl.store(out + 1, square_sum)
    tl.store(out + 2, largest)
    tl.store(out + 3, bad)


@torch.no_grad()
def gradient_telemetry(
    grads: Sequence[Tensor],
    *,
    gamma: float = 1.5,
    grad_scale: Tensor | None = None,
    per_tensor: bool = False,
    partial: bool = False,
) -> Tensor:
    """Statistics of all gradients; arguments, result and errors as `reference.gradient_telemetry`.

    partial: skip the last launch and return partial sums, float32 (n, 4), which `control_step` adds.
    """
    if not 1.0 <= gamma <= 4.0:
        raise ValueError(f"gamma is {gamma}; expected a value from 1 to 4")
    if not grads:
        if per_tensor:
            return torch.zeros((0, STATISTICS))
        raise ValueError("gradient_telemetry got no gradients; expected at least one tensor")
    device = grads[0].device
    found = []
    for batch in batches({GRAD.value: grads}, read_only=(GRAD.value,)):
        table = batch.table
        blocks_a_program = 1 if per_tensor else max(1, -(-table.blocks // MAX_PARTIALS))
        programs = -(-table.blocks // blocks_a_program)
        partials = torch.empty((programs, STATISTICS), dtype=torch.float32, device=batch.device)
        launch(
            telemetry_kernel,
            programs,
            table.rows,
            table.block_tensor,
            table.block_chunk,
            table.blocks,
            blocks_a_program,
            partials if grad_scale is None else grad_scale.to(batch.device, torch.float32, non_blocking=True),
            float(gamma),
            partials,
            GRAD_TYPE=batch.types[0],
            HAS_SCALE=grad_scale is not None,
            GAMMA_IS_1_5=gamma == 1.5,
            ROWS=CHUNK // 8,
        )
        if per_tensor:
            totals = torch.empty((table.tensors, STATISTICS), dtype=torch.float32, device=batch.device)
            launch(tensor_kernel, table.tensors, partials, table.rows, totals, CHUNK_=CHUNK, BLOCK=1024)
            partials = totals
        found.append((batch.indices, partials.to(device, non_blocking=True)))
    if per_tensor:
        if len(found) == 1:
            return found[0][1]
        out = torch.empty((len(grads), STATISTICS), dtype=torch.float32, device=device)
        for indices, totals in found:
            out[to_device(torch.tensor(indices), device)] = totals
        return out
    partials = found[0][1] if len(found) == 1 else torch.cat([totals for _, totals in found])
    if partial:
        return partials
    totals = torch.empty(STATISTICS, dtype=torch.float32, device=device)
    with on_device(device):
        launch(total_kernel, 1, partials, len(partials), totals, BLOCK=1024)
    return totals
