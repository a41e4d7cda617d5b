"""Every kernel with every choice of its constants that changes its code: made from the rules, codecs and laws."""

from itertools import product

from .. import tables as T
from ..codec import CODECS, dequantize_kernel, quantize_kernel
from ..laws import layout as L
from ..laws.blade import blade_kernel, blade_sizes
from ..laws.control import control_kernel, refresh_kernel
from ..laws.judge import CLIPS, LANES, judge_kernel
from ..laws.telemetry import PARTIALS_AT_ONCE, telemetry_kernel, tensor_kernel, total_kernel
from ..rules import RULES
from ..update import LINES, constants, update_kernel
from .resources import Variant

BYTES = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0}
ELEMENTS_PER_THREAD = 8
# The map's two int32 per chunk; the entry is 96 bytes per tensor, read through the cache.
MAP_BYTES = 8 / T.CHUNK
# Parameter and gradient dtypes that training meets: fp32 adapters under autocast or 16-bit gradients, 16-bit weights.
PAIRS = [("fp32", "fp32"), ("fp32", "fp16"), ("fp32", "bf16"), ("fp16", "fp16"), ("fp16", "fp32"), ("bf16", "bf16")]


def wide(*types: str) -> int:
    """128-bit accesses that a thread needs for its elements of these types."""
    return sum(int(ELEMENTS_PER_THREAD * BYTES[t]) // 16 for t in types)


def all_variants() -> list[Variant]:
    """Telemetry, control, layers, judgement, updates and codecs."""
    return [*_telemetry(), *_control(), *_layers(), *_judgements(), *_updates(), *_codecs()]


def _telemetry() -> list[Variant]:
    table = {"entries": "*i64", "chunk_entry": "*i32", "chunk_index": "*i32"}
    found = [
        Variant(
            f"telemetry {grad} gamma={'1.5' if exact else 'any'}{' by tensor' if by_tensor else ''}",
            telemetry_kernel,
            table
            | {"chunks": "i32", "chunks_per_program": "i32", "gamma": "fp32", "partials": "*fp32", "bounds": "*i32"},
            {"GRAD_TYPE": grad, "GAMMA_IS_1_5": exact, "BY_TENSOR": by_tensor, "LINES": T.CHUNK // 8, "LAYOUT": T.KEY},
            aligned=(*table, "partials", "bounds"),
            wide_loads=wide(grad),
            bytes_moved=BYTES[grad] + MAP_BYTES,
            floor=BYTES[grad],
        )
        for by_tensor, grad, exact in product((False, True), BYTES, (True, False))
        if exact or not by_tensor
    ]
    sums = {"PARTIALS": PARTIALS_AT_ONCE}
    found.append(
        Variant(
            "telemetry total",
            total_kernel,
            {"partials": "*fp32", "count": "i32", "totals": "*fp32"},
            sums,
            aligned=("partials", "totals"),
        )
    )
    found.append(
        Variant(
            "telemetry per tensor",
            tensor_kernel,
            {"partials": "*fp32", "spans": "*i32", "totals": "*fp32"},
            sums,
            aligned=("partials", "spans", "totals"),
        )
    )
    return found


def _control() -> list[Variant]:
    scalars = {"loss_pointer": "*fp32", "found_inf": "*fp32", "grad_scale": "*fp32"}
    scalars |= {"log": "*fp32", "log_length": "i32"}
    given = {"HAS_LOSS": True, "HAS_FOUND_INF": True, "HAS_GRAD_SCALE": True, "HAS_LOG": True}
    refresh = Variant(
        "control refresh",
        refresh_kernel,
        {"control": "*fp32", "log": "*fp32", "log_length": "i32"},
        {"HAS_LOG": True, "LAYOUT": L.KEY},
        aligned=("control", "log"),
    )
    clip = {"history": "*fp32", "index": "*i32", "spans": "*i32", "factors": "*fp32"}
    laws = [
        Variant(
            f"control {law}{' by tensor' if tensors else ''}",
            control_kernel,
            {"control": "*fp32", "telemetry": "*fp32", "partials": "i32"} | scalars | {"rows": "i32"} | clip,
            {"LAW": number, "CLIP_GLOBAL": not tensors, "CLIP_TENSORS": tensors, "HAS_SPANS": tensors}
            | {"LAYOUT": L.KEY, "PARTIALS": PARTIALS_AT_ONCE}
            | given,
            aligned=("control", "telemetry", "log", *clip),
        )
        for tensors, (law, number) in product((False, True), L.LAWS.items())
    ]
    return [*laws, refresh]


def _judgements() -> list[Variant]:
    table = {"entries": "*i64", "chunk_entry": "*i32", "chunk_index": "*i32", "bounds": "*i32", "partials": "*fp32"}
    places = {"first": "i32", "done": "*i32", "spans": "*i32", "tensors": "i32", "state": "*fp32", "out": "*fp32"}
    numbers = {"loss_pointer": "*fp32", "grad_scale": "*fp32", "found_inf": "*fp32"}
    numbers |= dict.fromkeys(("sigmas", "far", "skip_sigmas", "least_rate", "patience", "log_ratio"), "fp32")
    return [
        Variant(
            f"judge {'norms' if given else grad}{'' if last else ' sums only'}",
            judge_kernel,
            table | places | numbers,
            {"GRAD_TYPE": grad, "GIVEN": given, "LAST": last, "CLIP": CLIPS["tensors"], "LINES": T.CHUNK // 8}
            | {"HAS_LOSS": True, "HAS_GRAD_SCALE": True, "HAS_FOUND_INF": True, "LANES": LANES}
            | {"LAYOUT": L.KEY + T.KEY},
            aligned=(*table, "done", "spans", "state", "out"),
            wide_loads=0 if given else wide(grad),
            bytes_moved=0.0 if given else BYTES[grad] + MAP_BYTES,
            floor=None if given else BYTES[grad],
            counts=last and not given,
        )
        for grad, given, last in [*product(BYTES, (False,), (True, False)), ("fp32", True, True)]
    ]


def _layers() -> list[Variant]:
    tensors = {"telemetry": "*fp32", "rows": "*i32", "row_bounds": "*i32", "table": "*i64", "tensor_bounds": "*i32"}
    tensors |= {"layer_of": "*i32", "factors": "*fp32"}
    scalars = {"skip": "*fp32", "loss_pointer": "*fp32", "entropy_pointer": "*fp32", "grad_scale": "*fp32"}
    state = {"signs": "*i16", "known": "*i16", "index": "*i64", "numels": "*i64", "averages": "*fp32"}
    state |= {"shared": "*fp32", "multipliers": "*fp32", "scores": "*fp32", "finished": "*i32"}
    return [
        Variant(
            f"blade {'damped' if damped else 'paper'}",
            blade_kernel,
            tensors | scalars | state | {"layers": "i32", "tensors": "i32", "seed": "i32"},
            {"HAS_LOSS": True, "HAS_ENTROPY": True, "HAS_GRAD_SCALE": True, "DAMPED": damped, **blade_sizes()},
            aligned=(*tensors, *state),
            counts=True,
        )
        for damped in (True, False)
    ]


def _updates() -> list[Variant]:
    found = []
    arguments = {"entries": "*i64", "chunk_entry": "*i32", "chunk_index": "*i32", "control": "*fp32"}
    arguments |= {"lr_multipliers": "*fp32", "grad_factors": "*fp32"}
    for rule in RULES.values():
        floats = [T.ELEMENT_TYPES[dtype] for dtype in rule.storage]
        kept = [(name, rule.codecs(32), len(rule.state) * BYTES[name]) for name in floats]
        for bits in [bits for bits in rule.state_bits if bits != 32]:
            codecs = rule.codecs(bits)
            kept.append((f"int{bits}", codecs, sum(codec.bytes_per_value for codec in codecs)))
        choices = product((False, True), PAIRS, kept, _flag_sets(len(rule.flags)))
        for factors, (param, grad), (state, codecs, size), flags in choices:
            if factors and (param != grad or flags != _flag_sets(len(rule.flags))[0]):
                continue  # one value per program more: what it costs shows in the others
            if state in ("fp16", "bf16") and (param != state or grad != state):
                continue  # 16-bit momentum is for parameters of its own kind
            given = [name for i, name in enumerate(rule.flags) if flags >> i & 1]
            moved = 2 * BYTES[param] + BYTES[grad] + 2 * size
            found.append(
                Variant(
                    " ".join([*["clipped"] * factors, rule.name, f"{param}/{grad}", f"state {state}", *given]),
                    update_kernel,
                    arguments,
                    constants(rule, codecs, flags, param, grad, state)
                    | {"HAS_MULTIPLIERS": True, "HAS_FACTORS": factors},
                    aligned=tuple(arguments),
                    wide_loads=wide(param, grad),
                    wide_stores=wide(param),
                    bytes_moved=moved + MAP_BYTES,
                    floor=moved if param == grad else None,
                )
            )
    return found


def _flag_sets(count: int) -> list[int]:
    """All switches on, and all off."""
    return [(1 << count) - 1, 0] if count else [0]


def _codecs() -> list[Variant]:
    found = []
    for codec in CODECS.values():
        if not codec.block:
            continue
        tensors = {"codes": "*i8", "scales": "*i16", "numel": "i32"}
        for value in ("fp32", "fp16"):
            moved = BYTES[value] + codec.bits / 8
            found.append(
                Variant(
                    f"quantize {value} to {codec.name}",
                    quantize_kernel,
                    {"x": f"*{value}"} | tensors,
                    {"STORE": codec.store, "ALIGNED": True, "LINES": LINES},
                    aligned=("x", *tensors),
                    wide_loads=wide(value),
                    bytes_moved=moved,
                )
            )
            found.append(
                Variant(
                    f"dequantize {value} from {codec.name}",
                    dequantize_kernel,
                    tensors | {"out": f"*{value}"},
                    {"LOAD": codec.load, "ALIGNED": True, "LINES": LINES},
                    aligned=("out", *tensors),
                    wide_stores=wide(value),
                    bytes_moved=moved,
                )
            )
    return found
