"""The update in Triton: one frame for every rule and codec, one launch for all tensors of one dtype pair.

A program serves 1,024 elements of one tensor: it decodes the state, hands fp32 values to the rule's function (a
constant of the kernel, rules/), rounds the parameters and encodes the state again. Every value that changes in
training is read from the control vector on the device.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from . import tables as T
from ._triton import HAS_TRITON
from .codec import BLOCK, Codec, scale_name
from .launch import Batch, batches, launch
from .laws import layout as L
from .rules import Rule

LINES = T.CHUNK // BLOCK

if HAS_TRITON:
    import triton
    import triton.language as tl

    from .rounding import random_bits_kernel, round_stochastic_kernel
    from .storage import load_values, store_raw

    _BLOCK = tl.constexpr(BLOCK)

    @triton.jit
    def random_bits_of(entry, slots, element):
        """uint32 of the elements of an entry; all that is stored at random in a step takes other ones of them."""
        seed = tl.load(slots + L.SEED).to(tl.int32)
        step = tl.load(slots + L.STEP).to(tl.int32)
        return random_bits_kernel(seed, step, tl.load(entry + T.ID), element)

    @triton.jit
    def store_param(entry, start, local, remaining, p, random, TYPE: tl.constexpr, MASKED: tl.constexpr):
        """Stores fp32 parameters; 16-bit ones with stochastic rounding (rounding.py), by the lower bits of `random`."""
        address = tl.load(entry + T.PARAM)
        if TYPE != "fp32":
            p = round_stochastic_kernel(p, random, TYPE)
        store_raw(address, start, local, remaining, p, TYPE, MASKED)

    @triton.jit
    def load_state(
        entry, NUMBER: tl.constexpr, start, local, remaining, TYPE: tl.constexpr, LOAD: tl.constexpr,
        LINES: tl.constexpr, MASKED: tl.constexpr,
    ):  # fmt: skip
        """fp32 of state buffer NUMBER."""
        columns = entry + NUMBER * T.STATE_COLUMNS
        address, scales = tl.load(columns + T.STATE), tl.load(columns + T.SCALE)
        return LOAD(address, scales, start, local, remaining, TYPE, LINES, MASKED)

    @triton.jit
    def store_state(
        entry, NUMBER: tl.constexpr, start, local, remaining, values, random, TYPE: tl.constexpr, STORE: tl.constexpr,
        LINES: tl.constexpr, MASKED: tl.constexpr,
    ):  # fmt: skip
        """A codec rounds by the upper half of `random`."""
        columns = entry + NUMBER * T.STATE_COLUMNS
        address, scales = tl.load(columns + T.STATE), tl.load(columns + T.SCALE)
        STORE(address, scales, start, local, remaining, values, random, TYPE, LINES, MASKED)

    @triton.jit
    def update_chunk(
        entry, slots, start, remaining, factor, multiplier,
        lr, weight_decay, beta1, beta2, eps, correction1, correction2_sqrt,
        RULE: tl.constexpr, FLAGS: tl.constexpr, STATES: tl.constexpr, PARAM_TYPE: tl.constexpr,
        GRAD_TYPE: tl.constexpr, STATE_TYPE: tl.constexpr, LOAD: tl.constexpr, STORE: tl.constexpr,
        LOAD_2: tl.constexpr, STORE_2: tl.constexpr, CODED: tl.constexpr, RANDOM: tl.constexpr,
        LINES: tl.constexpr, MASKED: tl.constexpr,
    ):  # fmt: skip
        random = 0
        local = tl.arange(0, LINES)[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
        if CODED:
            # Decoded before the rest is loaded: together they take registers that sm_75 does not have. Each barrier
            # ends what the compiler would have overlap; where they stand was found by compiling (inspect/).
            v = load_state(entry, 1, start, local, remaining, STATE_TYPE, LOAD_2, LINES, MASKED)
            m = load_state(entry, 0, start, local, remaining, STATE_TYPE, LOAD, LINES, MASKED)
            tl.debug_barrier()
        p = load_values(tl.load(entry + T.PARAM), start, local, remaining, PARAM_TYPE, MASKED)
        g = load_values(tl.load(entry + T.GRAD), start, local, remaining, GRAD_TYPE, MASKED) * factor
        if not CODED:
            m = load_state(entry, 0, start, local, remaining, STATE_TYPE, LOAD, LINES, MASKED)
        if STATES == 1:
            p, m = RULE(p, g, m, lr, weight_decay, beta1, beta2, eps, correction1, correction2_sqrt, multiplier, FLAGS)
            if RANDOM:
                random = random_bits_of(entry, slots, start + local)
            store_param(entry, start, local, remaining, p, random, PARAM_TYPE, MASKED)
            store_state(entry, 0, start, local, remaining, m, random, STATE_TYPE, STORE, LINES, MASKED)
        else:
            if not CODED:
                v = load_state(entry, 1, start, local, remaining, STATE_TYPE, LOAD_2, LINES, MASKED)
            p, m, v = RULE(
                p, g, m, v, lr, weight_decay, beta1, beta2, eps, correction1, correction2_sqrt, multiplier, FLAGS
            )
            # What needs no random bits is stored before they are there, and leaves its registers to them.
            if PARAM_TYPE == "fp32":
                if CODED:
                    tl.debug_barrier()
                store_param(entry, start, local, remaining, p, random, PARAM_TYPE, MASKED)
            store_state(entry, 0, start, local, remaining, m, random, STATE_TYPE, STORE, LINES, MASKED)
            if CODED:
                tl.debug_barrier()
            if RANDOM:
                random = random_bits_of(entry, slots, start + local)
            if PARAM_TYPE != "fp32":
                store_param(entry, start, local, remaining, p, random, PARAM_TYPE, MASKED)
            store_state(entry, 1, start, local, remaining, v, random, STATE_TYPE, STORE_2, LINES, MASKED)

    @triton.jit
    def update_kernel(
        entries,  # int64 (tensors, COLUMNS)
        chunk_entry,  # int32 (chunks,)
        chunk_index,  # int32 (chunks,)
        control,  # fp32 (rows, NUM_SLOTS)
        lr_multipliers,  # fp32 (tensors of the caller,)
        grad_factors,  # fp32 (tensors of the caller,)
        RULE: tl.constexpr,
        FLAGS: tl.constexpr,
        STATES: tl.constexpr,
        PARAM_TYPE: tl.constexpr,
        GRAD_TYPE: tl.constexpr,
        STATE_TYPE: tl.constexpr,
        LOAD: tl.constexpr,
        STORE: tl.constexpr,
        LOAD_2: tl.constexpr,
        STORE_2: tl.constexpr,
        CODED: tl.constexpr,
        RANDOM: tl.constexpr,
        HAS_MULTIPLIERS: tl.constexpr,
        HAS_FACTORS: tl.constexpr,
        LINES: tl.constexpr,
        LAYOUT: tl.constexpr,
    ):
        program = tl.program_id(0)
        entry = entries + tl.load(chunk_entry + program).to(tl.int64) * T.COLUMNS
        slots = control + tl.load(entry + T.ROW) * L.NUM_SLOTS
        if tl.load(slots + L.SKIP) == 0:
            start = tl.load(chunk_index + program).to(tl.int64) * (LINES * _BLOCK)
            remaining = tl.minimum(tl.load(entry + T.NUMEL) - start, LINES * _BLOCK).to(tl.int32)
            factor = tl.load(slots + L.GRAD_FACTOR)
            if HAS_FACTORS:
                factor = factor * tl.load(grad_factors + tl.load(entry + T.INDEX))
            # What a rule does not use is not loaded: the compiler leaves it out.
            lr = tl.load(slots + L.LR_OUT)
            weight_decay = tl.load(slots + L.WEIGHT_DECAY)
            beta1 = tl.load(slots + L.BETA1_OUT)
            beta2 = tl.load(slots + L.BETA2_OUT)
            eps = tl.load(slots + L.EPS)
            correction1 = tl.load(slots + L.BIAS_CORRECTION1)
            correction2_sqrt = tl.load(slots + L.BIAS_CORRECTION2_SQRT)
            multiplier = 1.0
            if HAS_MULTIPLIERS:
                multiplier = tl.load(lr_multipliers + tl.load(entry + T.INDEX))
            if (remaining == LINES * _BLOCK) & (tl.load(entry + T.ALIGNED) != 0):
                update_chunk(
                    entry, slots, start, remaining, factor, multiplier,
                    lr, weight_decay, beta1, beta2, eps, correction1, correction2_sqrt, RULE, FLAGS, STATES,
                    PARAM_TYPE, GRAD_TYPE, STATE_TYPE, LOAD, STORE, LOAD_2, STORE_2, CODED, RANDOM, LINES, False,
                )  # fmt: skip
            else:
                update_chunk(
                    entry, slots, start, remaining, factor, multiplier,
                    lr, weight_decay, beta1, beta2, eps, correction1, correction2_sqrt, RULE, FLAGS, STATES,
                    PARAM_TYPE, GRAD_TYPE, STATE_TYPE, LOAD, STORE, LOAD_2, STORE_2, CODED, RANDOM, LINES, True,
                )  # fmt: skip


def columns_of(
    rule: Rule, params: Sequence[Tensor], grads: Sequence[Tensor], state: Mapping[str, Sequence[Tensor]]
) -> dict[int, Sequence[Tensor]]:
    """The columns of an update's table."""
    columns = {T.PARAM: params, T.GRAD: grads}
    for i, name in enumerate(rule.state):
        columns[T.STATE + i * T.STATE_COLUMNS] = state[name]
        if scale_name(name) in state:
            columns[T.SCALE + i * T.STATE_COLUMNS] = state[scale_name(name)]
    return columns


def constants(rule: Rule, codecs: Sequence[Codec], flags: int, param: str, grad: str, state: str) -> dict[str, Any]:
    """The kernel's constants but for its multipliers; `flags` is `Rule.bits`, the others are element types."""
    first, last = codecs[0], codecs[-1]
    return {
        "RULE": rule.kernel, "FLAGS": flags, "STATES": len(rule.state), "PARAM_TYPE": param, "GRAD_TYPE": grad,
        "STATE_TYPE": state, "LOAD": first.load, "STORE": first.store, "LOAD_2": last.load, "STORE_2": last.store,
        "CODED": len(codecs) == 2 and last.block > 0,
        "RANDOM": param != "fp32" or any(codec.random for codec in codecs), "LINES": LINES, "LAYOUT": L.KEY + T.KEY,
    }  # fmt: skip


def launch_batch(
    rule: Rule,
    batch: Batch,
    codecs: Sequence[Codec],
    control: Tensor,
    lr_multipliers: Tensor | None,
    grad_factors: Tensor | None,
    flags: int,
) -> None:
    """One launch of the rule; the three tensors are on the batch's device, `flags` is `Rule.bits`."""
    launch(
        update_kernel,
        batch.table.chunks,
        batch.table.entries,
        batch.table.chunk_entry,
        batch.table.chunk_index,
        control,
        control if lr_multipliers is None else lr_multipliers,
        control if grad_factors is None else grad_factors,
        HAS_MULTIPLIERS=lr_multipliers is not None,
        HAS_FACTORS=grad_factors is not None,
        **constants(rule, codecs, flags, batch.types[T.PARAM], batch.types[T.GRAD], batch.types[T.STATE]),
    )


def launch_update(
    rule: Rule,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    state: Mapping[str, Sequence[Tensor]],
    control: Tensor,
    rows: Sequence[int] | None,
    ids: Sequence[int] | None,
    lr_multipliers: Tensor | None,
    grad_factors: Tensor | None,
    flags: int,
) -> None:
    """`dispatch.update_` by the kernel, with arguments that it has checked."""
    codecs = rule.codecs_of(state)
    for batch in batches(columns_of(rule, params, grads, state), rows, ids, read_only=(T.GRAD,)):
        here = control.to(batch.device, non_blocking=True)
        multipliers, factors = (
            None if values is None else values.to(batch.device, non_blocking=True)
            for values in (lr_multipliers, grad_factors)
        )
        launch_batch(rule, batch, codecs, here, multipliers, factors, flags)
        batch.finish()
