"""Every kernel in every variant, for resources.py: argument types, constants, and the bytes that it has to move."""

from itertools import product

from cruxy_kernels import codec_reference
from cruxy_kernels import layout as L
from cruxy_kernels.adamw import adamw_kernel
from cruxy_kernels.codec import BLOCK, ROWS_A_PROGRAM, dequantize_kernel, quantize_kernel
from cruxy_kernels.control import LAYOUT_KEY, PARTIALS_AT_ONCE, control_kernel
from cruxy_kernels.launch import NUM_WARPS
from cruxy_kernels.lion import lion_kernel
from cruxy_kernels.resources import Variant
from cruxy_kernels.tables import CHUNK
from cruxy_kernels.telemetry import telemetry_kernel, tensor_kernel, total_kernel

BYTES = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": 1 + 2 / codec_reference.BLOCK}
ELEMENTS_A_THREAD = CHUNK // (32 * NUM_WARPS)
# The block map: two int32 a program. A table row is 88 bytes a tensor, read through the cache.
MAP_BYTES = 8 / CHUNK
# architecture.md, "Numbers that bound a step": parameter, gradient, and 8-bit momentum with a scale every 128.
LION_INT8_FLOOR = {"fp32": 14.03, "fp16": 8.03, "bf16": 8.03}

TABLE = {"rows": "*i64", "block_tensor": "*i32", "block_chunk": "*i32"}
UPDATE = TABLE | {"control": "*fp32", "lr_multipliers": "*fp32", "grad_scale": "*fp32"}
# parameter, gradient, momentum
LION = [
    ("fp32", "fp32", "int8"),
    ("fp32", "fp32", "fp32"),
    ("fp32", "fp16", "int8"),
    ("fp32", "bf16", "int8"),
    ("fp16", "fp16", "int8"),
    ("fp16", "fp16", "fp16"),
    ("fp16", "fp16", "fp32"),
    ("fp16", "fp32", "int8"),
    ("bf16", "bf16", "int8"),
    ("bf16", "bf16", "bf16"),
    ("bf16", "bf16", "fp32"),
]
ADAMW = [
    ("fp32", "fp32", "fp32"),
    ("fp32", "fp32", "int8"),
    ("fp32", "fp16", "fp32"),
    ("fp16", "fp16", "fp32"),
    ("fp16", "fp16", "int8"),
    ("bf16", "bf16", "fp32"),
    ("bf16", "bf16", "int8"),
]


def wide(*types: str) -> int:
    """128-bit accesses that a thread needs for its elements of these types."""
    return sum(int(ELEMENTS_A_THREAD * BYTES[t]) // 16 for t in types)


def all_variants() -> list[Variant]:
    """Telemetry, control, updates and codec, each with every constant that changes its code."""
    found = []
    for grad in ("fp32", "fp16", "bf16"):
        for gamma, exact in (("1.5", True), ("any", False)):
            found.append(
                Variant(
                    f"telemetry {grad} gamma={gamma}",
                    telemetry_kernel,
                    TABLE
                    | {"blocks": "i32", "blocks_a_program": "i32", "gamma": "fp32"}
                    | {"grad_scale": "*fp32", "partials": "*fp32"},
                    {"GRAD_TYPE": grad, "HAS_SCALE": True, "GAMMA_IS_1_5": exact, "ROWS": CHUNK // 8},
                    aligned=(*TABLE, "grad_scale", "partials"),
                    wide_loads=wide(grad),
                    bytes_moved=BYTES[grad] + MAP_BYTES,
                    floor=BYTES[grad],
                )
            )
    found.append(
        Variant(
            "telemetry total",
            total_kernel,
            {"partials": "*fp32", "count": "i32", "totals": "*fp32"},
            {"BLOCK": 1024},
            aligned=("partials", "totals"),
        )
    )
    found.append(
        Variant(
            "telemetry per tensor",
            tensor_kernel,
            {"partials": "*fp32", "rows": "*i64", "totals": "*fp32"},
            {"CHUNK_": CHUNK, "BLOCK": 1024},
            aligned=("partials", "rows", "totals"),
        )
    )
    for law, number in L.LAWS.items():
        found.append(
            Variant(
                f"control {law}",
                control_kernel,
                {"control": "*fp32", "telemetry": "*fp32", "partials": "i32"}
                | {"loss_pointer": "*fp32", "found_inf": "*fp32"},
                {"LAW": number, "HAS_LOSS": True, "HAS_FOUND_INF": True, "LAYOUT": LAYOUT_KEY}
                | {"PARTIALS": PARTIALS_AT_ONCE},
                aligned=("control", "telemetry", "loss_pointer", "found_inf"),
            )
        )
    for param, grad, state in LION:
        found.append(
            Variant(
                f"lion {param}/{grad} momentum {state}",
                lion_kernel,
                UPDATE,
                {"PARAM_TYPE": param, "GRAD_TYPE": grad, "STATE_TYPE": state, "HAS_MULTIPLIERS": True}
                | {"HAS_GRAD_SCALE": True, "MAXIMIZE": False, "ROWS": CHUNK // BLOCK.value},
                aligned=tuple(UPDATE),
                wide_loads=wide(param, grad),
                wide_stores=wide(param),
                bytes_moved=2 * BYTES[param] + BYTES[grad] + 2 * BYTES[state] + MAP_BYTES,
                floor=LION_INT8_FLOOR[param] if state == "int8" and param == grad else None,
            )
        )
    for (param, grad, state), nesterov in product(ADAMW, (True, False)):
        found.append(
            Variant(
                f"adamw {param}/{grad} momentum {state}{' nesterov' if nesterov else ''}",
                adamw_kernel,
                UPDATE,
                {"PARAM_TYPE": param, "GRAD_TYPE": grad, "STATE_TYPE": state, "HAS_MULTIPLIERS": True}
                | {"HAS_GRAD_SCALE": True, "MAXIMIZE": False, "NESTEROV": nesterov, "DECOUPLED": nesterov}
                | {"ROWS": CHUNK // BLOCK.value},
                aligned=tuple(UPDATE),
                wide_loads=wide(param, grad),
                wide_stores=wide(param),
                bytes_moved=2 * BYTES[param] + BYTES[grad] + 2 * BYTES[state] + 8 + MAP_BYTES,
                floor=28.0 if (param, grad, state) == ("fp32", "fp32", "fp32") else None,
            )
        )
    for value in ("fp32", "fp16"):
        found.append(
            Variant(
                f"quantize {value}",
                quantize_kernel,
                {"x": f"*{value}", "codes": "*i8", "scale_bits": "*i16", "numel": "i32"},
                {"ROWS": ROWS_A_PROGRAM},
                aligned=("x", "codes", "scale_bits", "numel"),
                wide_loads=wide(value),
                bytes_moved=BYTES[value] + BYTES["int8"],
            )
        )
        found.append(
            Variant(
                f"dequantize {value}",
                dequantize_kernel,
                {"codes": "*i8", "scale_bits": "*i16", "out": f"*{value}", "numel": "i32"},
                {"ROWS": ROWS_A_PROGRAM},
                aligned=("codes", "scale_bits", "out", "numel"),
                wide_stores=wide(value),
                bytes_moved=BYTES[value] + BYTES["int8"],
            )
        )
    return found
