"""Gradient statistics in Triton: Σ|g|^γ, Σg², max|g| and the count of non-finite elements in one read.

equations.md section 1, paper eq 1. Twin: `reference.gradient_telemetry`. Every program sums a fixed run of chunks
in a fixed order, so equal gradients give equal bits; the partial sums go to the control kernel, which adds them.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false


import triton
import triton.language as tl

from cruxy_kernels.tables import (
    ALIGNED,
    COLUMNS,
    FIRST_BLOCK,
    GRAD,
    NUMEL,
    load_values,
)

# Programs of one launch: enough to fill any card, few enough that one program can add what they leave.
MAX_PARTIALS = 4096
STATISTICS = 4  # Σ|g|^γ, Σg², max|g|, non-finite count


@triton.jit
def add_values(power_sum, square_sum, largest, bad, g, gamma, GAMMA_IS_1_5: tl.constexpr):
    """The four running statistics, elementwise, with the values `g` (fp32) taken in."""
    finite = tl.abs(g) < float("inf")  # False for NaN
    a = tl.where(finite, tl.abs(g), 0.0)
    if GAMMA_IS_1_5:
        power = a * tl.sqrt(a)
    else:
        power = tl.where(a > 0, tl.exp2(gamma * tl.log2(tl.where(a > 0, a, 1.0))), 0.0)
    return power_sum + power, square_sum + a * a, tl.maximum(largest, a), bad + tl.where(finite, 0.0, 1.0)


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
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    if HAS_SCALE:
        factor = 1.0 / tl.load(grad_scale)
    else:
        factor = 1.0
    power_sum = tl.zeros((BLOCK,), tl.float32)
    square_sum = tl.zeros((BLOCK,), tl.float32)
    largest = tl.zeros((BLOCK,), tl.float32)
    bad = tl.zeros((BLOCK,), tl.float32)
    local = tl.arange(0, BLOCK)
    first = program * blocks_a_program
    last = tl.minimum(first + blocks_a_program, blocks)
    for block in range(first, last):
        row = rows + tl.load(block_tensor + block).to(tl.int64) * COLUMNS
        start = tl.load(block_chunk + block).to(tl.int64) * BLOCK
        address = tl.load(row + GRAD)
        numel = tl.load(row + NUMEL)
        remaining = tl.minimum(numel - start, BLOCK).to(tl.int32)
        if (remaining == BLOCK) & (tl.load(row + ALIGNED) != 0):
            g = load_values(address, start, local, remaining, GRAD_TYPE, False) * factor
            power_sum, square_sum, largest, bad = add_values(
                power_sum, square_sum, largest, bad, g, gamma, GAMMA_IS_1_5
            )
        else:
            g = load_values(address, start, local, remaining, GRAD_TYPE, True) * factor
            power_sum, square_sum, largest, bad = add_values(
                power_sum, square_sum, largest, bad, g, gamma, GAMMA_IS_1_5
            )
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
