"""Gradient statistics: Σ|g|^γ, Σg², max|g| and the count of non-finite elements (white paper eq 1; docs/laws.md).

The γ-norm is Σ|g|^γ to the power 1/γ. Only finite elements enter the first three. `statistics` is the specification;
the Triton kernels behind it read every gradient once. There each program sums a fixed run of chunks in a fixed order,
so equal gradients give equal bits; the partial sums go to the control kernel, which adds them.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import tables as T
from .._triton import HAS_TRITON
from ..launch import batches, launch, on_device
from . import layout as L

# Programs per launch: enough to fill any card, few enough that one program can add what they leave.
MAX_PARTIALS = 4096
PARTIALS_AT_ONCE = 1024


def statistics(g: Tensor, gamma: float) -> Tensor:
    """The specification: fp32 (4,) of one gradient of any shape and real dtype."""
    a = g.detach().float().abs().reshape(-1)
    finite = a < math.inf  # False for NaN as well
    a = torch.where(finite, a, 0.0)
    power = a * a.sqrt() if gamma == 1.5 else a * a if gamma == 2.0 else a**gamma
    largest = a.amax() if a.numel() else a.sum()
    return torch.stack([power.sum(), (a * a).sum(), largest, (~finite).sum()])


def combine(parts: Tensor) -> Tensor:
    """One telemetry vector (4,) from the rows of (n, 4), of which there may be none: sums, the maximum of MAX_ABS."""
    total = parts.sum(0)
    if len(parts):
        total[L.MAX_ABS] = parts[:, L.MAX_ABS].amax()
    return total


if HAS_TRITON:
    import triton
    import triton.language as tl

    from ..storage import load_values

    @triton.jit
    def chunk_statistics(g, gamma, GAMMA_IS_1_5: tl.constexpr):
        """The four statistics of each line of `g` (fp32, (LINES, 8)): most of the sum is within a thread."""
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

    @triton.jit(do_not_specialize=["chunks", "chunks_per_program"])
    def telemetry_kernel(
        entries,  # int64 (tensors, COLUMNS)
        chunk_entry,  # int32 (chunks,)
        chunk_index,  # int32 (chunks,)
        chunks,
        chunks_per_program,
        gamma,
        partials,  # fp32 (programs, 4)
        bounds,  # int32 (programs + 1,): with BY_TENSOR, where the chunks of each program begin
        GRAD_TYPE: tl.constexpr,
        GAMMA_IS_1_5: tl.constexpr,
        BY_TENSOR: tl.constexpr,
        LINES: tl.constexpr,
        LAYOUT: tl.constexpr,
    ):
        program = tl.program_id(0)
        power_sum = tl.zeros((LINES,), tl.float32)
        square_sum = tl.zeros((LINES,), tl.float32)
        largest = tl.zeros((LINES,), tl.float32)
        bad = tl.zeros((LINES,), tl.float32)
        local = tl.arange(0, LINES)[:, None] * 8 + tl.arange(0, 8)[None, :]
        first = program * chunks_per_program
        last = tl.minimum(first + chunks_per_program, chunks)
        if BY_TENSOR:
            first = tl.load(bounds + program)
            last = tl.load(bounds + program + 1)
        for chunk in range(first, last):
            entry = entries + tl.load(chunk_entry + chunk).to(tl.int64) * T.COLUMNS
            start = tl.load(chunk_index + chunk).to(tl.int64) * (LINES * 8)
            address = tl.load(entry + T.GRAD)
            remaining = tl.minimum(tl.load(entry + T.NUMEL) - start, LINES * 8).to(tl.int32)
            if (remaining == LINES * 8) & (tl.load(entry + T.ALIGNED) != 0):
                g = load_values(address, start, local, remaining, GRAD_TYPE, False)
                power, square, top, count = chunk_statistics(g, gamma, GAMMA_IS_1_5)
            else:
                g = load_values(address, start, local, remaining, GRAD_TYPE, True)
                power, square, top, count = chunk_statistics(g, gamma, GAMMA_IS_1_5)
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
    def sum_partials(partials, first, count, PARTIALS: tl.constexpr):
        """Σ|g|^γ, Σg², max|g|, non-finite count of partials[first : first + count], in a fixed order."""
        power_sum = tl.zeros((PARTIALS,), tl.float32)
        square_sum = tl.zeros((PARTIALS,), tl.float32)
        largest = tl.zeros((PARTIALS,), tl.float32)
        bad = tl.zeros((PARTIALS,), tl.float32)
        for start in range(0, count, PARTIALS):
            index = start + tl.arange(0, PARTIALS)
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

    @triton.jit(do_not_specialize=["count"])
    def total_kernel(partials, count, totals, PARTIALS: tl.constexpr):
        """totals (4,) of partials (count, 4): one program."""
        power_sum, square_sum, largest, bad = sum_partials(partials, 0, count, PARTIALS)
        tl.store(totals, power_sum)
        tl.store(totals + 1, square_sum)
        tl.store(totals + 2, largest)
        tl.store(totals + 3, bad)

    @triton.jit
    def tensor_kernel(partials, spans, totals, PARTIALS: tl.constexpr):
        """totals (tensors, 4) of partials (n, 4): one program per tensor, whose rows are in spans, (tensors, 2)."""
        tensor = tl.program_id(0)
        first, count = tl.load(spans + tensor * 2), tl.load(spans + tensor * 2 + 1)
        power_sum, square_sum, largest, bad = sum_partials(partials, first, count, PARTIALS)
        out = totals + tensor * 4
        tl.store(out, power_sum)
        tl.store(out + 1, square_sum)
        tl.store(out + 2, largest)
        tl.store(out + 3, bad)


class Runs:
    """A table's chunks in runs that lie within one tensor, for partial sums per tensor; as long as few programs take.

    bounds: int32 (runs + 1,) on the table's device, the first chunk of each run.
    spans: int32 (tensors, 2) on the CPU, the first run of each tensor and how many it has.
    """

    def __init__(self, table: T.TensorTable) -> None:
        first = table.on_host[:, T.FIRST_CHUNK]
        chunks = torch.diff(first, append=torch.tensor([table.chunks]))
        length = max(1, -(-table.chunks // MAX_PARTIALS))
        runs = (chunks + length - 1) // length
        begin = runs.cumsum(0) - runs
        tensor = torch.repeat_interleave(runs)
        starts = first[tensor] + (torch.arange(len(tensor)) - begin[tensor]) * length
        bounds = torch.cat([starts, torch.tensor([table.chunks])]).to(torch.int32)
        self.bounds = T.to_device(bounds, table.entries.device)
        self.spans = torch.stack((begin, runs), 1).to(torch.int32)


def launch_partials(table: T.TensorTable, grad_type: str, gamma: float, runs: Runs | None = None) -> Tensor:
    """Partial sums of a table's gradients, fp32 (programs, 4): as few as add up well, or those of `runs`."""
    per_program = max(1, -(-table.chunks // MAX_PARTIALS))
    programs = -(-table.chunks // per_program) if runs is None else len(runs.bounds) - 1
    partials = torch.empty((programs, L.NUM_TELEMETRY), dtype=torch.float32, device=table.entries.device)
    launch(
        telemetry_kernel,
        programs,
        table.entries,
        table.chunk_entry,
        table.chunk_index,
        table.chunks,
        per_program,
        float(gamma),
        partials,
        table.chunk_entry if runs is None else runs.bounds,
        GRAD_TYPE=grad_type,
        GAMMA_IS_1_5=gamma == 1.5,
        BY_TENSOR=runs is not None,
        LINES=T.CHUNK // 8,
        LAYOUT=T.KEY,
    )
    return partials


def launch_telemetry(grads: Sequence[Tensor], gamma: float, per_tensor: bool, partial: bool) -> Tensor:
    """`dispatch.gradient_telemetry` by the kernels."""
    device = grads[0].device
    found = []
    for batch in batches({T.GRAD: grads}, read_only=(T.GRAD,)):
        table = batch.table
        runs = Runs(table) if per_tensor else None
        partials = launch_partials(table, batch.types[T.GRAD], gamma, runs)
        if runs is not None:
            totals = torch.empty((table.tensors, L.NUM_TELEMETRY), dtype=torch.float32, device=batch.device)
            spans = T.to_device(runs.spans, batch.device)
            launch(tensor_kernel, table.tensors, partials, spans, totals, PARTIALS=PARTIALS_AT_ONCE)
            partials = totals
        found.append((batch.indices, partials.to(device, non_blocking=True)))
    if per_tensor:
        if len(found) == 1:
            return found[0][1]
        out = torch.empty((len(grads), L.NUM_TELEMETRY), dtype=torch.float32, device=device)
        for indices, totals in found:
            out[T.to_device(torch.tensor(indices), device)] = totals
        return out
    partials = found[0][1] if len(found) == 1 else torch.cat([totals for _, totals in found])
    if partial:
        return partials
    totals = torch.empty(L.NUM_TELEMETRY, dtype=torch.float32, device=device)
    with on_device(device):
        launch(total_kernel, 1, partials, len(partials), totals, PARTIALS=PARTIALS_AT_ONCE)
    return totals
