"""The step's large loops on a CPU, compiled from native.cpp on first use: one pass over memory for many tensors.

PyTorch operators (pieces.py) read and write every buffer a dozen times; a fused loop does it once, and the law, a
hundred operators on a few numbers, takes microseconds. A C++ compiler is needed (CXX, g++ or clang++); without one
`library()` says why, and dispatch.py tells. Serves fp32, fp16 and bfloat16 on the CPU.

The shared object lies in $CRUXY_CACHE, or cruxy-triton in the user's cache folder, under a name that depends on
source, compiler, flags and processor. $CRUXY_NATIVE_FLAGS are more flags for the compiler (sanitizers, say).
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..codec import Codec, scale_name
from ..laws import layout as L
from ..laws.clipping import TensorClip, tensor_law
from ..laws.judge import CLIPS, Limits
from ..laws.judge import size as judgement_size
from ..rules import Rule

SOURCE = Path(__file__).with_name("native.cpp")
# No fused multiply-add: codes and signs are then those of the specification.
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-pthread", "-ffp-contract=off", "-fno-math-errno",
         "-fno-trapping-math")  # fmt: skip
# Below this a step takes less time than the compiler would: PyTorch serves it, unless the loops are there already.
MIN_ELEMENTS = 1 << 18
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # native.cpp's Type
CODES = {"softsign8": 3, "softsign4": 4, "quartic8": 5}  # the same, of codecs
_COMPILE_SECONDS = 300
RULES_SERVED = ("lion", "adamw")  # the functions of native.cpp


@functools.lru_cache(maxsize=1)
def library() -> tuple[ctypes.CDLL | None, str]:
    """(the compiled loops or None, how they were made or why not)."""
    compiler = _compiler()
    if compiler is None:
        return None, "no C++ compiler found (CXX, g++, clang++)"
    try:
        path, version = _target(compiler)
        if not path.exists():
            _compile(compiler, path)
        loaded = ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        return None, f"{compiler} could not build native.cpp: {detail.strip().splitlines()[-1]}"
    pointer, integer, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    flag = ctypes.c_int
    loaded.telemetry.argtypes = [pointer, integer, real, flag, pointer, flag]
    loaded.control_law.argtypes = [pointer, integer, pointer, integer, *[pointer] * 4, integer, flag, flag]
    for name in RULES_SERVED:
        getattr(loaded, name).argtypes = [pointer, integer, pointer, pointer, pointer, flag, flag]
    loaded.judge.argtypes = [pointer, integer, pointer, integer, *[pointer] * 6, flag, flag]
    for name in ("telemetry", "control_law", "judge", *RULES_SERVED):
        getattr(loaded, name).restype = None
    return loaded, f"loops compiled by {version}"


@functools.lru_cache(maxsize=1)
def built() -> bool:
    """Whether the loops were there when this process first asked: they then serve small steps too."""
    compiler = _compiler()
    try:
        return compiler is not None and _target(compiler)[0].exists()
    except (OSError, subprocess.SubprocessError):
        return False


def _compiler() -> str | None:
    return next((c for c in (os.environ.get("CXX"), "g++", "clang++") if c and shutil.which(c)), None)


def _flags() -> list[str]:
    return [*FLAGS, *os.environ.get("CRUXY_NATIVE_FLAGS", "").split()]


def _target(compiler: str) -> tuple[Path, str]:
    """(where the compiled loops lie, the compiler's version)."""
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, check=True, timeout=60
    ).stdout.partition("\n")[0]
    parts = [_source(), " ".join(_flags()), version]
    key = hashlib.sha256(b"\0".join([*[part.encode() for part in parts], _processor()]))
    return _build_folder() / f"native-{key.hexdigest()[:20]}.so", version


def _source() -> str:
    """native.cpp behind the numbers of layout.py, as namespace L."""
    numbers = {name: value for name, value in vars(L).items() if name.isupper() and isinstance(value, (int, float))}
    lines = [
        f"constexpr int {name} = {value};" if isinstance(value, int) else f"constexpr float {name} = {value!r}f;"
        for name, value in numbers.items()
    ]
    return "\n".join(["namespace L {", *lines, "}", f'#line 1 "{SOURCE.name}"', SOURCE.read_text()])


def _processor() -> bytes:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features"))).encode()
    except (OSError, StopIteration):
        return f"{platform.machine()} {platform.processor()}".encode()


def cache_folder() -> Path:
    """CRUXY_CACHE, or cruxy-triton in the user's cache folder (XDG_CACHE_HOME, else ~/.cache)."""
    if chosen := os.environ.get("CRUXY_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cruxy-triton"


@functools.lru_cache(maxsize=1)
def _build_folder() -> Path:
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass  # a read-only home: build for this process alone
    return Path(tempfile.mkdtemp(prefix="cruxy-native-"))


def _compile(compiler: str, path: Path) -> None:
    """Compiles in a folder of its own and moves the result into place, so that processes may race and be stopped."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder, path.name)
        source = Path(folder, SOURCE.name)
        source.write_text(_source())
        command = [compiler, *_flags(), "-o", str(built), str(source)]
        run = functools.partial(
            subprocess.run, capture_output=True, text=True, check=True, timeout=_COMPILE_SECONDS,
            env={**os.environ, "TMPDIR": folder},
        )  # fmt: skip
        try:
            run([*command, "-march=native"])
        except subprocess.CalledProcessError:  # some compilers and processors have no "native"
            run(command)
        os.replace(built, path)


def obstacle(tensors: Sequence[Tensor], rule: str | None = None, codecs: Sequence[Codec] = ()) -> str | None:
    """Why these parameters, gradients and state buffers cannot be served, or None."""
    if rule not in (None, *RULES_SERVED):
        return f"the rule {rule}: native.cpp has {', '.join(RULES_SERVED)}"
    if absent := [codec.name for codec in codecs if codec.block and codec.name not in CODES]:
        return f"the codec {absent[0]}: native.cpp has {', '.join(CODES)}"
    if odd := {t.dtype for t in tensors} - {*TYPES, torch.int8, torch.uint8}:
        return f"{', '.join(sorted(map(str, odd)))} tensors: it needs float32, float16 or bfloat16"
    if not all([t.is_cpu for t in tensors]):
        return "tensors that are not on the CPU"
    return None


# Columns of native.cpp's Row.
PARAM, GRAD, STATE, SCALE, PARAM_TYPE, GRAD_TYPE, STATE_TYPE = 0, 1, 2, 4, 6, 7, 8
NUMEL, ROW, INDEX, ID, COLUMNS = 10, 11, 12, 13, 14


def table_of(
    params: Sequence[Tensor] | None,
    grads: Sequence[Tensor],
    states: Sequence[Sequence[Tensor]] = (),
    scales: Sequence[Sequence[Tensor] | None] = (),
    rows: Sequence[int] | None = None,
    ids: Sequence[int] | None = None,
    codecs: Sequence[Codec] = (),
) -> Tensor:
    """int64 (tensors, COLUMNS): native.cpp's Rows of contiguous tensors, valid while they live."""
    table = torch.zeros((len(grads), COLUMNS), dtype=torch.int64)
    addresses = {GRAD: grads}
    if params is not None:
        addresses[PARAM] = params
    addresses |= {STATE + i: tensors for i, tensors in enumerate(states)}
    addresses |= {SCALE + i: tensors for i, tensors in enumerate(scales) if tensors is not None}
    for column, tensors in addresses.items():
        table[:, column] = torch.tensor([t.data_ptr() for t in tensors])
    if params is not None:
        table[:, PARAM_TYPE] = torch.tensor([TYPES[t.dtype] for t in params])
    table[:, GRAD_TYPE] = torch.tensor([TYPES[g.dtype] for g in grads])
    for i, (tensors, codec) in enumerate(zip(states, codecs, strict=True)):
        table[:, STATE_TYPE + i] = CODES.get(codec.name) or torch.tensor([TYPES[t.dtype] for t in tensors])
    table[:, NUMEL] = torch.tensor([g.numel() for g in grads])
    table[:, INDEX] = torch.arange(len(grads))
    table[:, ID] = table[:, INDEX] if ids is None else torch.tensor(ids)
    if rows is not None:
        table[:, ROW] = torch.tensor(rows)
    return table


def _loops() -> ctypes.CDLL:
    loaded, reason = library()
    if loaded is None:
        raise RuntimeError(f"backend 'native' cannot run: {reason}; use backend='torch'")
    return loaded


def run_telemetry(table: Tensor, gamma: float, per_tensor: bool = False) -> Tensor:
    """(tensors, 4), or the totals (4,), of a table's gradients."""
    out = torch.zeros((len(table) if per_tensor else 1, L.NUM_TELEMETRY))
    _loops().telemetry(table.data_ptr(), len(table), gamma, per_tensor, out.data_ptr(), torch.get_num_threads())
    return out if per_tensor else out[0]


def run_update(
    rule: Rule,
    table: Tensor,
    control: Tensor,
    lr_multipliers: Tensor | None,
    grad_factors: Tensor | None,
    flags: int,
) -> None:
    """The rule over a table; `flags` is `Rule.bits`."""
    # native.cpp's Values of each control row.
    values = control[:, [L.SKIP, L.GRAD_FACTOR, L.LR_OUT, L.WEIGHT_DECAY, L.BETA1_OUT, L.BETA2_OUT, L.EPS,
                         L.BIAS_CORRECTION1, L.BIAS_CORRECTION2_SQRT, L.STEP, L.SEED]]  # fmt: skip
    multipliers, factors = (None if v is None else v.data_ptr() for v in (lr_multipliers, grad_factors))
    threads = torch.get_num_threads()
    getattr(_loops(), rule.name)(table.data_ptr(), len(table), values.data_ptr(), multipliers, factors, flags, threads)


def control(
    control: Tensor,
    telemetry: Tensor,
    loss: Tensor | None,
    law: str,
    found_inf: Tensor | None,
    grad_scale: Tensor | None,
    log: Tensor | None = None,
    clip: str | TensorClip | None = "global",
) -> None:
    """`dispatch.control_step`, with arguments that it has checked."""
    numbers = [None if value is None else value.data_ptr() for value in (loss, found_inf, grad_scale, log)]
    parts, length = telemetry.numel() // L.NUM_TELEMETRY, 0 if log is None else log.shape[0]
    _loops().control_law(
        control.data_ptr(), control.shape[0], telemetry.data_ptr(), parts, *numbers, length, L.LAWS[law],
        clip == "global",
    )  # fmt: skip
    if isinstance(clip, TensorClip):
        inverse = 1.0 if grad_scale is None else grad_scale.reciprocal()
        tensor_law(clip, telemetry, control[0, L.GRAD_NORM], inverse, control[0, L.SKIP] > 0)


def judge(
    table: Tensor | None,
    norms: Tensor | None,
    state: Tensor,
    loss: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    sigmas: float,
    limits: Limits,
) -> Tensor:
    """`laws.judge.specification` of a table's gradients, or of given norms."""
    tensors = state.shape[1] - 1
    out = torch.empty(judgement_size(tensors))
    numbers = [None if value is None else value.data_ptr() for value in (loss, grad_scale, found_inf)]
    thresholds = (ctypes.c_float * 6)(*limits.thresholds(sigmas))
    rows, present = (None, 0) if table is None else (table.data_ptr(), len(table))
    _loops().judge(
        rows, present, None if norms is None else norms.data_ptr(), tensors, state.data_ptr(), out.data_ptr(), *numbers,
        ctypes.addressof(thresholds), CLIPS[limits.clip], torch.get_num_threads(),
    )  # fmt: skip
    return out


def telemetry(grads: Sequence[Tensor], gamma: float, per_tensor: bool) -> Tensor:
    """`dispatch.gradient_telemetry`: (len(grads), 4), or the totals (4,)."""
    grads = [g.contiguous() for g in grads]
    return run_telemetry(table_of(None, grads), gamma, per_tensor)


def update(
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
    """`dispatch.update_`, with arguments that it has checked and `obstacle` has let pass."""
    written = {"": params, **state}
    here = {name: [t.contiguous() for t in tensors] for name, tensors in written.items()}
    states, scales = [here[name] for name in rule.state], [here.get(scale_name(name)) for name in rule.state]
    grads = [g.contiguous() for g in grads]
    table = table_of(here[""], grads, states, scales, rows, ids, rule.codecs_of(state))
    run_update(rule, table, control, lr_multipliers, grad_factors, flags)
    for name, tensors in written.items():  # copies that stood in for tensors that are not contiguous
        for tensor, copy in zip(tensors, here[name], strict=True):
            if copy is not tensor:
                tensor.copy_(copy)
