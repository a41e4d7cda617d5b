"""BLADE: a step-size multiplier for each layer, from 16 gradient signs, its gradient's norm, loss and output entropy.

    a  = 1 - popcount((signs XOR signs before) AND votes) / popcount(votes)
    s  = (r_L r_H r_G)^(1/3),  r = value / average      c = ((1 + a) / (1 + A))^(-1/2)      d = s c
    m  = clamp(median(d) d, .3, 1.7)  ("paper")   or   clamp(median(d) / d, .3, 1.7)  ("damped")

docs/laws.md, section 7, has every decision. `blade_law` is the specification; `blade_kernel` is one launch with a
program per layer, of which the last to finish takes the median. Nothing is read by the host: the samples that are
replaced every 100 steps are drawn on the device too, by the hash of rounding.py.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .._triton import HAS_TRITON
from ..launch import launch, on_device
from ..rounding import STEP_FACTOR, hash32, signed
from ..tables import to_device
from . import layout as L

RESPONSES = ("damped", "paper")
# What programs take at once: tensors of a layer, rows of telemetry, layers for the median, factors.
TENSORS_AT_ONCE, ROWS_AT_ONCE, LAYERS_AT_ONCE, FACTORS_AT_ONCE = 16, 256, 32, 256


@dataclass
class BladeState:
    """What BLADE keeps of its layers from step to step; all on one device, changed in place.

    signs, known: int16 (layers,). Bit k of signs: the gradient at sample k was negative; of known: it was there.
    index: int64 (layers, 16), a sample's element, counted through the tensors of its layer in their order.
    numels: int64 (layers,), the elements of each layer.
    averages: float32 (layers, layout.NUM_LAYER). shared: float32 (layout.NUM_SHARED,).
    multipliers: float32 (layers,), of the last step; 1 for a layer that had none.
    """

    signs: Tensor
    known: Tensor
    index: Tensor
    numels: Tensor
    averages: Tensor
    shared: Tensor
    multipliers: Tensor

    def tensors(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def to(self, device: torch.device) -> "BladeState":
        return BladeState(**{name: tensor.to(device) for name, tensor in self.tensors().items()})


def new_blade_state(
    numels: Sequence[int], seed: int = L.BLADE_SEED, device: torch.device | str = "cpu"
) -> BladeState:
    """The state before the first step of layers with so many elements each.

    Raises ValueError for a layer without elements.
    """
    if not numels or min(numels) < 1:
        raise ValueError(f"layers of {list(numels)} elements; expected at least one layer, and an element in each")
    count, sizes = len(numels), torch.tensor(list(numels))
    bits = draw(seed, count, torch.zeros((), dtype=torch.int32), range(L.BLADE_SAMPLES))
    state = BladeState(
        signs=torch.zeros(count, dtype=torch.int16),
        known=torch.zeros(count, dtype=torch.int16),
        index=position(bits, sizes[:, None]),
        numels=sizes,
        averages=torch.zeros(count, L.NUM_LAYER),
        shared=torch.zeros(L.NUM_SHARED),
        multipliers=torch.ones(count),
    )
    return state.to(torch.device(device))


class LayerTensors:
    """The tensors of a step and the layers that they are in, on a device; made once for as long as they are the same.

    Args:
        layers: of each tensor the number of its layer.
        starts: its first element's number within the layer.
        numels, widths: its elements, and the bytes of one of its gradient's.
        count: layers that there are; some may have no tensor in the step.
        spans: int32 (tensors, 2) on the CPU: of each tensor the first row of telemetry and how many, as TensorClip
            takes them. None: row i is tensor i.
        cells: for the Triton kernel, of each tensor the address on the device of the int64 that is its gradient's
            address (`PreparedUpdate.grad_cells`). None: `blade_step` is given the gradients.

    factors: float32 (tensors,), after a step the multiplier of each tensor, for `update_(lr_multipliers=...)`.
    """

    def __init__(
        self,
        layers: Sequence[int],
        starts: Sequence[int],
        numels: Sequence[int],
        widths: Sequence[int],
        count: int,
        *,
        device: torch.device | str,
        spans: Tensor | None = None,
        cells: Sequence[int] | None = None,
    ) -> None:
        device = torch.device(device)
        total = len(layers)
        lengths = {len(starts), len(numels), len(widths), total if cells is None else len(cells)}
        if lengths != {total} or (spans is not None and spans.shape != (total, 2)):
            raise ValueError(f"layers, starts, numels, widths, spans and cells are not lists of one length ({total})")
        if total and not (min(layers) >= 0 and max(layers) < count):
            raise ValueError(f"layers are {min(layers)} to {max(layers)}; there are {count}, counted from 0")
        self.count, self.device, self.given_cells, self.numels = count, device, cells is not None, list(numels)
        layer = torch.tensor(layers, dtype=torch.int64)
        order = layer.argsort(stable=True)
        spans = torch.stack((torch.arange(total), torch.ones(total)), 1).long() if spans is None else spans.long()
        rows = torch.repeat_interleave(layer, spans[:, 1])
        first = spans[:, 0] - (spans[:, 1].cumsum(0) - spans[:, 1])
        row = torch.arange(len(rows)) + torch.repeat_interleave(first, spans[:, 1])
        by_layer = rows.argsort(stable=True)
        self.telemetry_rows = len(rows)
        self.cells = torch.zeros(total, dtype=torch.int64, device=device)
        where = [self.cells.data_ptr() + 8 * i for i in range(total)] if cells is None else list(cells)
        table = torch.tensor([where, list(starts), list(numels), list(widths)], dtype=torch.int64)
        self.table = to_device(table.t()[order].contiguous(), device)
        self.tensor_bounds = to_device(_bounds(layer[order], count), device)
        self.rows = to_device(row[by_layer].to(torch.int32), device)
        self.row_bounds = to_device(_bounds(rows[by_layer], count), device)
        self.layer = to_device(layer.to(torch.int32), device)
        self.row_layer = to_device(rows[row.argsort()], device)
        self.places = to_device(table[L.LAYER_START : L.LAYER_NUMEL + 1], device)
        self.factors = torch.ones(total, device=device)
        self.scores = torch.zeros(count, device=device)
        self.finished = torch.zeros(1, dtype=torch.int32, device=device)


def _bounds(layers: Tensor, count: int) -> Tensor:
    """int32 (count + 1,): where each layer begins among layers that are sorted."""
    return torch.searchsorted(layers, torch.arange(count + 1)).to(torch.int32)


# -- random samples ----------------------------------------------------------------------------------------------------


def draw(seed: int, layers: int, number: Tensor, elements: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """31 random bits (layers, elements), int64, of refresh `number` (0: the first samples)."""
    layer = torch.arange(layers, dtype=torch.int32, device=device)
    key = hash32(layer + signed(_hash(seed)))
    key = hash32(key + number.to(torch.int32) * signed(STEP_FACTOR))
    element = torch.arange(elements[0], elements[-1] + 1, dtype=torch.int32, device=device)
    return (hash32(element ^ hash32(key)[:, None]).long() >> 1) & 0x7FFFFFFF


def _hash(value: int) -> int:
    """`hash32` of a number as an unsigned one."""
    return int(hash32(torch.tensor(signed(value), dtype=torch.int32))) & 0xFFFFFFFF


def position(bits: Tensor, numel: Tensor) -> Tensor:
    """An element of `numel`, all as likely, from 31 random bits: floor(bits numel / 2^31)."""
    return (bits * (numel & 0x7FFFFFFF) >> 31) + bits * (numel >> 31)


# -- the specification -------------------------------------------------------------------------------------------------


def blade_law(
    state: BladeState,
    tensors: LayerTensors,
    telemetry: Tensor,
    skip: Tensor,
    grads: Sequence[Tensor],
    loss: Tensor | None,
    entropy: Tensor | None,
    grad_scale: Tensor | None,
    response: str,
    seed: int,
) -> None:
    """The specification: the new state, `state.multipliers` and `tensors.factors`. Arguments: `blade_step`."""
    device, layers = tensors.device, tensors.count
    good = skip <= 0
    # The samples: as they were, and as they are from this step on.
    steps = state.shared[L.SHARED_STEPS] + 1
    number = (steps / L.BLADE_REFRESH).floor()
    due = good & (number * L.BLADE_REFRESH == steps)
    bits = draw(seed, layers, number, range(L.NUM_DRAWS), device)
    first = bits[:, L.DRAW_PLACE_1] % L.BLADE_SAMPLES
    second = (first + 1 + bits[:, L.DRAW_PLACE_2] % (L.BLADE_SAMPLES - 1)) % L.BLADE_SAMPLES
    new = position(bits[:, : L.DRAW_NEW_2 + 1], state.numels[:, None])
    sample = torch.arange(L.BLADE_SAMPLES, device=device)
    fresh = torch.where(sample == first[:, None], new[:, :1], state.index)
    fresh = torch.where(sample == second[:, None], new[:, 1:], fresh)
    fresh = torch.where(due, fresh, state.index)
    now, here, fresh_now, fresh_here = _record(tensors, torch.cat([state.index, fresh], 1), grads)

    # Alignment of the samples that were there in this step and before.
    before, known = state.signs.int(), state.known.int()
    votes = here & known
    voters = _popcount(votes)
    distance = _popcount((now ^ before) & votes)
    alignment = 2 - distance / voters.clamp(min=1)  # 1 + a
    average = state.averages[:, L.LAYER_ALIGNMENT]
    aligned = (average > 0) & (voters > 0)
    log_c = torch.where(aligned, -0.5 * torch.log2(alignment / average), 0.0)

    # Ratios to the averages before this step.
    inverse = 1.0 if grad_scale is None else 1 / grad_scale
    squares = torch.zeros(layers, device=device).index_add_(0, tensors.row_layer, telemetry[:, L.SUM_SQ])
    norm = squares.sqrt() * inverse
    old_norm = state.averages[:, L.LAYER_NORM]
    part = (norm > 0) & (old_norm > 0)
    log_s = torch.where(part, torch.log2(norm / old_norm), 0.0)
    signals = torch.ones((), device=device)
    shared = [state.shared[L.SHARED_LOSS], state.shared[L.SHARED_ENTROPY]]
    for i, value in enumerate((loss, entropy)):
        if value is not None:
            usable = (value > 0) & (value < torch.inf)
            both = usable & (shared[i] > 0)
            log_s = log_s + torch.where(both, torch.log2(value / shared[i]), 0.0)
            signals = signals + both
            shared[i] = torch.where(usable, _average(shared[i], value), shared[i])
    limit = torch.tensor(L.BLADE_SCORE_MAX, device=device).log2()
    score = torch.exp2((log_s / signals + log_c).clamp(-limit, limit))

    # The median of the layers that take part.
    ordered = torch.where(part, score, torch.inf).sort().values
    count = part.sum()
    middle = ordered[torch.stack([(count - 1).clamp(min=0) // 2, (count // 2).clamp(max=layers - 1)])].mean()
    multiplier = middle * score if response == "paper" else middle / score
    multiplier = torch.where(part, multiplier.clamp(L.BLADE_MIN, L.BLADE_MAX), 1.0)

    new_norm = torch.where(norm > 0, _average(old_norm, norm), old_norm)
    new_alignment = torch.where(voters > 0, _average(average, alignment), average)
    updated = BladeState(
        signs=((before & ~fresh_here) | fresh_now).to(torch.int16),
        known=_known(known, state.index, fresh, fresh_here).to(torch.int16),
        index=fresh,
        numels=state.numels,
        averages=torch.stack([new_norm, new_alignment], 1),
        shared=torch.stack([*shared, steps]),
        multipliers=multiplier,
    )
    for name, tensor in state.tensors().items():
        tensor.copy_(torch.where(good, getattr(updated, name), tensor))
    tensors.factors.copy_(state.multipliers[tensors.layer.long()])


def _record(tensors: LayerTensors, index: Tensor, grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Negative and present samples as bits, int32 (layers,) each, of both halves of index (layers, 2 x 16)."""
    start, numel = tensors.places[:, :, None]
    local = index[tensors.layer.long()] - start
    inside = (local >= 0) & (local < numel)
    local = local.clamp(min=0).minimum((numel - 1).clamp(min=0))
    negative = []
    for grad, at in zip(grads, local.unbind(), strict=True):
        if not grad.numel():
            negative.append(torch.zeros_like(at, dtype=torch.bool))
            continue
        found = torch.take(grad.detach(), at if grad.device == at.device else at.to(grad.device)) < 0
        negative.append(found if grad.device == at.device else found.to(at.device, non_blocking=True))
    weight = 1 << (torch.arange(index.shape[1], device=index.device, dtype=torch.int32) % L.BLADE_SAMPLES)
    found = []
    both = torch.stack(negative) & inside, inside
    for half in (slice(0, L.BLADE_SAMPLES), slice(L.BLADE_SAMPLES, None)):
        for which in both:
            bits = which[:, half].int() * weight[half]
            total = torch.zeros((tensors.count, L.BLADE_SAMPLES), dtype=torch.int32, device=index.device)
            found.append(total.index_add_(0, tensors.layer.long(), bits).sum(1, dtype=torch.int32))
    return tuple(found)


def _known(known: Tensor, index: Tensor, fresh: Tensor, here: Tensor) -> Tensor:
    """Which samples have a recorded sign: those that are here now, and those that had one and are still the same."""
    weight = 1 << torch.arange(L.BLADE_SAMPLES, device=index.device, dtype=torch.int32)
    return (known & ((index == fresh) * weight).sum(1, dtype=torch.int32)) | here


def _popcount(bits: Tensor) -> Tensor:
    return ((bits[:, None] >> torch.arange(L.BLADE_SAMPLES, device=bits.device)) & 1).sum(1)


def _average(average: Tensor, value: Tensor) -> Tensor:
    """The average with the new value in it; the first value fills it."""
    return torch.where(average > 0, L.BLADE_BETA * average + (1 - L.BLADE_BETA) * value, value)


# -- the kernel --------------------------------------------------------------------------------------------------------

if HAS_TRITON:
    import triton
    import triton.language as tl

    from ..rounding import random_bits_kernel

    @triton.jit
    def popcount(bits):
        """Of 16 bits in an int32."""
        bits = bits - ((bits >> 1) & 0x5555)
        bits = (bits & 0x3333) + ((bits >> 2) & 0x3333)
        bits = (bits + (bits >> 4)) & 0x0F0F
        return (bits + (bits >> 8)) & 0x1F

    @triton.jit
    def record(index, table, first, last, SAMPLES: tl.constexpr, TENSORS: tl.constexpr):
        """(negative, present) samples as bits of an int32, of the tensors table[first : last]."""
        negative = tl.zeros((SAMPLES,), tl.int32)
        present = tl.zeros((SAMPLES,), tl.int32)
        for begin in range(first, last, TENSORS):
            which = begin + tl.arange(0, TENSORS)
            mask = which < last
            entry = table + which * L.LAYER_COLUMNS
            cell = tl.load(entry + L.LAYER_CELL, mask=mask, other=0)
            start = tl.load(entry + L.LAYER_START, mask=mask, other=0)
            numel = tl.load(entry + L.LAYER_NUMEL, mask=mask, other=0)
            width = tl.load(entry + L.LAYER_WIDTH, mask=mask, other=0)
            address = tl.load(cell.to(tl.pointer_type(tl.int64)), mask=mask, other=0)
            local = index[None, :] - start[:, None]
            inside = (local >= 0) & (local < numel[:, None])
            # Only the sign matters: all that is asked of a dtype is where its bits lie.
            four = tl.load(
                address[:, None].to(tl.pointer_type(tl.int32)) + local, mask=inside & (width[:, None] == 4), other=0
            )
            two = tl.load(
                address[:, None].to(tl.pointer_type(tl.int16)) + local, mask=inside & (width[:, None] == 2), other=0
            ).to(tl.int32)
            below = ((four < 0) & ((four & 0x7FFFFFFF) != 0)) | ((two < 0) & ((two & 0x7FFF) != 0))
            negative += tl.sum(below.to(tl.int32), axis=0)
            present += tl.sum(inside.to(tl.int32), axis=0)
        weight = 1 << tl.arange(0, SAMPLES)
        return tl.sum(negative * weight, axis=0), tl.sum(present * weight, axis=0)

    @triton.jit
    def drawn(seed, number, layer, element, numel):
        """A random element of `numel`: `position` of `draw`."""
        bits = (random_bits_kernel(seed, number, layer, element).to(tl.int64) >> 1) & 0x7FFFFFFF
        return (bits * (numel & 0x7FFFFFFF) >> 31) + bits * (numel >> 31)

    @triton.jit
    def average_of(average, value):
        return tl.where(average > 0, L.BLADE_BETA * average + (1 - L.BLADE_BETA) * value, value)

    @triton.jit
    def log2_ratio(value, average, counts):
        """log2(value / average) where it counts, else 0."""
        return tl.log2(tl.where(counts, value, 1.0) / tl.where(counts, average, 1.0))

    @triton.jit
    def median_of(scores, layers, LAYERS: tl.constexpr):
        """Of the positive ones among scores[:layers], by their ranks; 0 where there is none."""
        count = 0
        for begin in range(0, layers, LAYERS):
            i = begin + tl.arange(0, LAYERS)
            x = tl.load(scores + i, mask=i < layers, other=0.0, cache_modifier=".cg")
            count += tl.sum((x > 0).to(tl.int32), axis=0)
        low = 0.0
        high = 0.0
        for begin in range(0, layers, LAYERS):
            i = begin + tl.arange(0, LAYERS)
            x = tl.load(scores + i, mask=i < layers, other=0.0, cache_modifier=".cg")
            rank = tl.zeros((LAYERS,), tl.int32)
            for other in range(0, layers, LAYERS):
                j = other + tl.arange(0, LAYERS)
                y = tl.load(scores + j, mask=j < layers, other=0.0, cache_modifier=".cg")
                tied = (y[None, :] == x[:, None]) & (j[None, :] < i[:, None])
                below = (y[None, :] > 0) & ((y[None, :] < x[:, None]) | tied)
                rank += tl.sum(below.to(tl.int32), axis=1)
            low += tl.sum(tl.where((x > 0) & (rank == (count - 1) // 2), x, 0.0), axis=0)
            high += tl.sum(tl.where((x > 0) & (rank == count // 2), x, 0.0), axis=0)
        return 0.5 * (low + high)

    @triton.jit(
        do_not_specialize=["layers", "tensors", "seed"],
        do_not_specialize_on_alignment=["skip", "loss_pointer", "entropy_pointer", "grad_scale"],
    )
    def blade_kernel(
        telemetry,  # fp32 (rows, 4)
        rows,  # of LayerTensors, as the five that follow
        row_bounds,
        table,
        tensor_bounds,
        layer_of,
        factors,
        skip,  # fp32 (1,)
        loss_pointer,
        entropy_pointer,
        grad_scale,
        signs,  # of BladeState, as the six that follow
        known,
        index,
        numels,
        averages,
        shared,
        multipliers,
        scores,  # fp32 (layers,): d of the layers that take part, 0 of the others
        finished,  # int32 (1,): programs that have come to their end; 0 between launches
        layers,
        tensors,
        seed,
        HAS_LOSS: tl.constexpr,
        HAS_ENTROPY: tl.constexpr,
        HAS_GRAD_SCALE: tl.constexpr,
        DAMPED: tl.constexpr,
        SAMPLES: tl.constexpr,
        TENSORS: tl.constexpr,
        ROWS: tl.constexpr,
        LAYERS: tl.constexpr,
        FACTORS: tl.constexpr,
        LAYOUT: tl.constexpr,
    ):
        layer = tl.program_id(0)
        good = tl.load(skip) <= 0
        steps = tl.load(shared + L.SHARED_STEPS) + 1
        loss_average = tl.load(shared + L.SHARED_LOSS)
        entropy_average = tl.load(shared + L.SHARED_ENTROPY)

        # The samples: as they were, and as they are from this step on.
        sample = tl.arange(0, SAMPLES)
        old = tl.load(index + layer * SAMPLES + sample)
        first = tl.load(tensor_bounds + layer)
        last = tl.load(tensor_bounds + layer + 1)
        now, here = record(old, table, first, last, SAMPLES, TENSORS)
        number = (steps / L.BLADE_REFRESH).to(tl.int32)
        fresh, fresh_now, fresh_here, same = old, now, here, 0xFFFF
        if number * L.BLADE_REFRESH == steps:
            numel = tl.load(numels + layer)
            element = sample.to(tl.int64)
            bits = random_bits_kernel(seed, number, layer, element).to(tl.int64) >> 1
            one = tl.sum(tl.where(sample == L.DRAW_PLACE_1, bits, 0), axis=0) % SAMPLES
            two = (one + 1 + tl.sum(tl.where(sample == L.DRAW_PLACE_2, bits, 0), axis=0) % (SAMPLES - 1)) % SAMPLES
            new = drawn(seed, number, layer, element, numel)
            fresh = tl.where(sample == one, tl.sum(tl.where(sample == L.DRAW_NEW_1, new, 0), axis=0), fresh)
            fresh = tl.where(sample == two, tl.sum(tl.where(sample == L.DRAW_NEW_2, new, 0), axis=0), fresh)
            fresh_now, fresh_here = record(fresh, table, first, last, SAMPLES, TENSORS)
            same = tl.sum(tl.where(fresh == old, 1 << sample, 0), axis=0)

        # Alignment of the samples that were there in this step and before.
        before = tl.load(signs + layer).to(tl.int32) & 0xFFFF
        seen = tl.load(known + layer).to(tl.int32) & 0xFFFF
        votes = here & seen
        voters = popcount(votes)
        alignment = 2 - popcount((now ^ before) & votes) / tl.maximum(voters, 1).to(tl.float32)  # 1 + a
        slots = averages + layer * L.NUM_LAYER
        alignment_average = tl.load(slots + L.LAYER_ALIGNMENT)
        aligned = (alignment_average > 0) & (voters > 0)
        log_c = -0.5 * log2_ratio(alignment, alignment_average, aligned)

        # Ratios to the averages before this step.
        squares = tl.zeros((ROWS,), tl.float32)
        end = tl.load(row_bounds + layer + 1)
        for begin in range(tl.load(row_bounds + layer), end, ROWS):
            which = begin + tl.arange(0, ROWS)
            row = tl.load(rows + which, mask=which < end, other=0)
            squares += tl.load(telemetry + row * L.NUM_TELEMETRY + L.SUM_SQ, mask=which < end, other=0.0)
        norm = tl.sqrt(tl.sum(squares, axis=0))
        if HAS_GRAD_SCALE:
            norm = norm * (1 / tl.load(grad_scale))
        norm_average = tl.load(slots + L.LAYER_NORM)
        part = (norm > 0) & (norm_average > 0)
        log_s = log2_ratio(norm, norm_average, part)
        signals = 1.0
        if HAS_LOSS:
            loss = tl.load(loss_pointer)
            loss_usable = (loss > 0) & (loss < float("inf"))
            both = loss_usable & (loss_average > 0)
            log_s += log2_ratio(loss, loss_average, both)
            signals += tl.where(both, 1.0, 0.0)
        if HAS_ENTROPY:
            entropy = tl.load(entropy_pointer)
            entropy_usable = (entropy > 0) & (entropy < float("inf"))
            both = entropy_usable & (entropy_average > 0)
            log_s += log2_ratio(entropy, entropy_average, both)
            signals += tl.where(both, 1.0, 0.0)
        score = tl.exp2(log_s / signals + log_c)
        score = tl.minimum(tl.maximum(score, 1 / L.BLADE_SCORE_MAX), L.BLADE_SCORE_MAX)

        # Everything has been read: what follows overwrites it, and other warps may lag behind.
        tl.debug_barrier()
        tl.store(scores + layer, tl.where(part, score, 0.0))
        if good:
            tl.store(signs + layer, ((before & ~fresh_here) | fresh_now).to(tl.int16))
            tl.store(known + layer, ((seen & same) | fresh_here).to(tl.int16))
            tl.store(index + layer * SAMPLES + sample, fresh)
            tl.store(slots + L.LAYER_NORM, tl.where(norm > 0, average_of(norm_average, norm), norm_average))
            kept = tl.where(voters > 0, average_of(alignment_average, alignment), alignment_average)
            tl.store(slots + L.LAYER_ALIGNMENT, kept)

        # Who comes last has every score before it.
        tl.debug_barrier()
        if tl.atomic_add(finished, 1) == layers - 1:
            tl.store(finished, 0)
            if good:
                tl.store(shared + L.SHARED_STEPS, steps)
                if HAS_LOSS:
                    kept = tl.where(loss_usable, average_of(loss_average, loss), loss_average)
                    tl.store(shared + L.SHARED_LOSS, kept)
                if HAS_ENTROPY:
                    kept = tl.where(entropy_usable, average_of(entropy_average, entropy), entropy_average)
                    tl.store(shared + L.SHARED_ENTROPY, kept)
                median = median_of(scores, layers, LAYERS)
                for begin in range(0, layers, LAYERS):
                    i = begin + tl.arange(0, LAYERS)
                    x = tl.load(scores + i, mask=i < layers, other=0.0, cache_modifier=".cg")
                    taking_part = x > 0
                    if DAMPED:
                        m = median / tl.where(taking_part, x, 1.0)
                    else:
                        m = median * x
                    m = tl.where(taking_part, tl.minimum(tl.maximum(m, L.BLADE_MIN), L.BLADE_MAX), 1.0)
                    tl.store(multipliers + i, m, mask=i < layers)
                tl.debug_barrier()
                for begin in range(0, tensors, FACTORS):
                    t = begin + tl.arange(0, FACTORS)
                    which = tl.load(layer_of + t, mask=t < tensors, other=0)
                    tl.store(factors + t, tl.load(multipliers + which), mask=t < tensors)


def launch_blade(
    state: BladeState,
    tensors: LayerTensors,
    telemetry: Tensor,
    skip: Tensor,
    loss: Tensor | None,
    entropy: Tensor | None,
    grad_scale: Tensor | None,
    response: str,
    seed: int,
) -> None:
    """`blade_law` by the kernel; the cells of `tensors` hold the gradients' addresses."""
    with on_device(tensors.device):
        launch(
            blade_kernel,
            tensors.count,
            telemetry,
            tensors.rows,
            tensors.row_bounds,
            tensors.table,
            tensors.tensor_bounds,
            tensors.layer,
            tensors.factors,
            skip,
            skip if loss is None else loss,
            skip if entropy is None else entropy,
            skip if grad_scale is None else grad_scale,
            state.signs,
            state.known,
            state.index,
            state.numels,
            state.averages,
            state.shared,
            state.multipliers,
            tensors.scores,
            tensors.finished,
            tensors.count,
            len(tensors.factors),
            seed,
            HAS_LOSS=loss is not None,
            HAS_ENTROPY=entropy is not None,
            HAS_GRAD_SCALE=grad_scale is not None,
            DAMPED=response == "damped",
            **blade_sizes(),
        )


def blade_sizes() -> dict[str, object]:
    """The constants of the kernel that are no choice."""
    return {
        "SAMPLES": L.BLADE_SAMPLES, "TENSORS": TENSORS_AT_ONCE, "ROWS": ROWS_AT_ONCE, "LAYERS": LAYERS_AT_ONCE,
        "FACTORS": FACTORS_AT_ONCE, "LAYOUT": L.KEY,
    }  # fmt: skip
