"""The step's large loops on a CPU, compiled from native.cpp on first use: one pass over memory for many tensors.

PyTorch operators (pieces.py) read and write every buffer a dozen times; a fused loop does it once. A C++ compiler
is needed (CXX, g++ or clang++); without one `library()` says why, and dispatch.py tells. Serves fp32 parameters and
gradients on the CPU; what else a step needs (control law, codec) is small.

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
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..laws import layout as L
from ..rules import Rule

SOURCE = Path(__file__).with_name("native.cpp")
# No fused multiply-add: codes and signs are then those of the specification.
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-pthread", "-ffp-contract=off", "-fno-math-errno",
         "-fno-trapping-math")  # fmt: skip
# Below this a step takes less time than the compiler would: PyTorch serves it.
MIN_ELEMENTS = 1 << 18
_ROW = 8  # int64 columns of native.cpp's Row
_COMPILE_SECONDS = 300
RULES_SERVED = ("lion", "adamw")  # the functions of native.cpp


@functools.lru_cache(maxsize=1)
def library() -> tuple[ctypes.CDLL | None, str]:
    """(the compiled loops or None, how they were made or why not)."""
    compiler = next((c for c in (os.environ.get("CXX"), "g++", "clang++") if c and shutil.which(c)), None)
    if compiler is None:
        return None, "no C++ compiler found (CXX, g++, clang++)"
    try:
        source = SOURCE.read_bytes()
        flags = [*FLAGS, *os.environ.get("CRUXY_NATIVE_FLAGS", "").split()]
        version = subprocess.run(
            [compiler, "--version"], capture_output=True, text=True, check=True, timeout=60
        ).stdout.partition("\n")[0]
        key = hashlib.sha256(b"\0".join([source, " ".join(flags).encode(), version.encode(), _processor()]))
        folder = _cache_folder()
        path = folder / f"native-{key.hexdigest()[:20]}.so"
        if not path.exists():
            _compile(compiler, flags, path)
        loaded = ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        return None, f"{compiler} could not build native.cpp: {detail.strip().splitlines()[-1]}"
    pointer, integer, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    flag = ctypes.c_int
    loaded.telemetry.argtypes = [pointer, integer, real, flag, pointer, flag]
    for name in RULES_SERVED:
        getattr(loaded, name).argtypes = [pointer, integer, pointer, pointer, flag, flag, flag]
    for name in ("telemetry", *RULES_SERVED):
        getattr(loaded, name).restype = None
    return loaded, f"loops compiled by {version}"


def _processor() -> bytes:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features"))).encode()
    except (OSError, StopIteration):
        return f"{platform.machine()} {platform.processor()}".encode()


def _cache_folder() -> Path:
    chosen = os.environ.get("CRUXY_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(chosen) if chosen else base / "cruxy-triton"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass  # a read-only home: build for this process alone
    return Path(tempfile.mkdtemp(prefix="cruxy-native-"))


def _compile(compiler: str, flags: Sequence[str], path: Path) -> None:
    """Compiles to a temporary name and moves it into place, so that processes may race."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".so")
    os.close(handle)
    try:
        command = [compiler, *flags, "-o", temporary, str(SOURCE)]
        run = functools.partial(subprocess.run, capture_output=True, text=True, check=True, timeout=_COMPILE_SECONDS)
        try:
            run([*command, "-march=native"])
        except subprocess.CalledProcessError:  # some compilers and processors have no "native"
            run(command)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def obstacle(tensors: Sequence[Tensor], state: Sequence[Tensor] = ()) -> str | None:
    """Why these parameters, gradients and state buffers cannot be served, or None."""
    dtypes = {t.dtype for t in tensors}
    if dtypes - {torch.float32}:
        return f"{', '.join(sorted(map(str, dtypes)))} parameters or gradients: it needs float32"
    dtypes = {t.dtype for t in state}
    if len(dtypes) > 1 or dtypes - {torch.float32, torch.int8}:
        return f"{', '.join(sorted(map(str, dtypes)))} state: it needs float32, or int8 codes"
    if not all([t.is_cpu and t.is_contiguous() for t in tensors]):
        return "tensors that are not contiguous or not on the CPU"
    if not all([t.is_contiguous() for t in state]):
        return "state that is not contiguous"
    return None


class _Tables(threading.local):
    """The last tables made, by addresses; gradients that are made anew each step need a new one."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple, Tensor] = OrderedDict()

    def get(self, columns: Sequence[Sequence[Tensor] | None], rows: Sequence[int] | None) -> Tensor:
        first = next(column for column in columns if column is not None)
        count = len(first)
        zeros = [0] * count
        values = [zeros if column is None else [t.data_ptr() for t in column] for column in columns]
        values += [[t.numel() for t in first], zeros if rows is None else list(rows)]
        key = tuple([tuple(column) for column in values])
        table = self._kept.get(key)
        if table is None:
            table = torch.tensor([*values, list(range(count))], dtype=torch.int64).T.contiguous()
            self._kept[key] = table
            if len(self._kept) > 16:
                self._kept.popitem(last=False)
        else:
            self._kept.move_to_end(key)
        return table


_tables = _Tables()


def _loops() -> ctypes.CDLL:
    loaded, reason = library()
    if loaded is None:
        raise RuntimeError(f"backend 'native' cannot run: {reason}; use backend='torch'")
    return loaded


def telemetry(grads: Sequence[Tensor], gamma: float, per_tensor: bool) -> Tensor:
    """`dispatch.gradient_telemetry`: (len(grads), 4), or the totals (4,)."""
    out = torch.zeros((len(grads) if per_tensor else 1, L.NUM_TELEMETRY))
    table = _tables.get([None, grads, None, None, None], None)
    _loops().telemetry(table.data_ptr(), len(table), gamma, per_tensor, out.data_ptr(), torch.get_num_threads())
    return out if per_tensor else out[0]


def _values(control: Tensor) -> Tensor:
    """native.cpp's Values for each control row."""
    slots = control.unbind(1)
    step_size = slots[L.LR_OUT] * slots[L.BIAS_CORRECTION2_SQRT] / slots[L.BIAS_CORRECTION1]
    return torch.stack(
        [slots[L.SKIP], slots[L.GRAD_FACTOR], slots[L.LR_OUT], slots[L.WEIGHT_DECAY],
         slots[L.BETA1_OUT], slots[L.BETA2_OUT], slots[L.EPS], step_size], dim=1
    )  # fmt: skip


def update(
    rule: Rule,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    state: Mapping[str, Sequence[Tensor]],
    control: Tensor,
    rows: Sequence[int] | None,
    lr_multipliers: Tensor | None,
    flags: int,
) -> None:
    """`dispatch.update_`, with arguments that it has checked and `obstacle` has let pass."""
    first = rule.state[0]
    second = state[rule.state[1]] if len(rule.state) > 1 else None
    table = _tables.get([params, grads, state[first], state.get(first + "_scale"), second], rows)
    values = _values(control.to("cpu"))
    multipliers = None if lr_multipliers is None else lr_multipliers.to("cpu")
    getattr(_loops(), rule.name)(
        table.data_ptr(),
        len(table),
        values.data_ptr(),
        None if multipliers is None else multipliers.data_ptr(),
        first + "_scale" in state,
        flags,
        torch.get_num_threads(),
    )
