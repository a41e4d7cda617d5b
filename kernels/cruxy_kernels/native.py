"""The step's large loops on a CPU, compiled from native.cpp on first use: one pass over memory for many tensors.

PyTorch operators (reference.py) read and write every buffer a dozen times; a fused loop does it once. A C++
compiler is needed (CXX, g++ or clang++); without one `library()` says why, and dispatch.py tells. Serves fp32
parameters and gradients on the CPU; what else a step needs (control law, codec) is reference.py's.

The shared object lies in $CRUXY_CACHE, or cruxy-triton in the user's cache folder, under a name that depends on
source, compiler and processor.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from cruxy_kernels import layout as L
from cruxy_kernels.codec_reference import scale_count

SOURCE = Path(__file__).with_name("native.cpp")
# No fused multiply-add: codes and signs are then those of the PyTorch twin.
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-pthread", "-ffp-contract=off", "-fno-math-errno",
         "-fno-trapping-math")  # fmt: skip
# Below this a step takes less time than the compiler would: PyTorch serves it.
MIN_ELEMENTS = 1 << 18
_ROW = 8  # int64 columns of native.cpp's Row
_COMPILE_SECONDS = 300


@functools.lru_cache(maxsize=1)
def library() -> tuple[ctypes.CDLL | None, str]:
    """(the compiled loops or None, how they were made or why not)."""
    compiler = next((c for c in (os.environ.get("CXX"), "g++", "clang++") if c and shutil.which(c)), None)
    if compiler is None:
        return None, "no C++ compiler found (CXX, g++, clang++)"
    try:
        source = SOURCE.read_bytes()
        version = subprocess.run(
            [compiler, "--version"], capture_output=True, text=True, check=True, timeout=60
        ).stdout.partition("\n")[0]
        key = hashlib.sha256(b"\0".join([source, " ".join(FLAGS).encode(), version.encode(), _processor()]))
        folder = _build_folder()
        path = folder / f"native-{key.hexdigest()[:20]}.so"
        if not path.exists():
            _compile(compiler, path)
        loaded = ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        return None, f"{compiler} could not build native.cpp: {detail.strip().splitlines()[-1]}"
    pointer, integer, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    flag = ctypes.c_int
    loaded.telemetry.argtypes = [pointer, integer, real, real, flag, pointer, flag]
    loaded.lion.argtypes = [pointer, integer, pointer, pointer, flag, flag]
    loaded.adamw.argtypes = [pointer, integer, pointer, pointer, flag, flag, flag]
    for function in (loaded.telemetry, loaded.lion, loaded.adamw):
        function.restype = None
    return loaded, f"loops compiled by {version}"


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
    """Compiles to a temporary name and moves it into place, so that processes may race."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".so")
    os.close(handle)
    try:
        command = [compiler, *FLAGS, "-o", temporary, str(SOURCE)]
        run = functools.partial(
            subprocess.run, capture_output=True, text=True, check=True, timeout=_COMPILE_SECONDS
        )
        try:
            run([*command, "-march=native"])
        except subprocess.CalledProcessError:  # some compilers and processors have no "native"
            run(command)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def obstacle(tensors: Sequence[Tensor], momentum: Sequence[Tensor] = ()) -> str | None:
    """Why these tensors cannot be served, or None."""
    dtypes = {t.dtype for t in tensors}
    if dtypes - {torch.float32}:
        return f"{', '.join(sorted(map(str, dtypes)))} parameters or gradients: it needs float32"
    dtypes = {t.dtype for t in momentum}
    if len(dtypes) > 1 or dtypes - {torch.float32, torch.int8}:
        return f"{', '.join(sorted(map(str, dtypes)))} momentum: it needs float32 or int8"
    if not all([t.is_cpu and t.is_contiguous() for t in tensors]):
        return "tensors that are not contiguous or not on the CPU"
    if not all([t.is_contiguous() for t in momentum]):
        return "momentum that is not contiguous"
    return None


class _Tables:
    """The last tables made, by addresses; gradients that are made anew each step need a new one."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple, Tensor] = OrderedDict()

    def get(self, columns: Sequence[Sequence[Tensor] | None], groups: Sequence[int] | None) -> Tensor:
        first = next(column for column in columns if column is not None)
        count = len(first)
        zeros = [0] * count
        values = [zeros if column is None else [t.data_ptr() for t in column] for column in columns]
        values += [[t.numel() for t in first], zeros if groups is None else list(groups)]
        key = tuple([tuple(column) for column in values])
        table = self._kept.get(key)
        if table is None:
            _check_columns(columns)
            table = torch.tensor([*values, list(range(count))], dtype=torch.int64).T.contiguous()
            self._kept[key] = table
            if len(self._kept) > 16:
                self._kept.popitem(last=False)
        else:
            self._kept.move_to_end(key)
        return table


def _check_columns(columns: Sequence[Sequence[Tensor] | None]) -> None:
    """Raises ValueError where the tensors of a row differ in length, or scales do not fit their codes."""
    for name, column in zip(("params", "grads", "exp_avgs", "scales", "exp_avg_sqs"), columns, strict=True):
        if column is None:
            continue
        expected = [t.numel() for t in next(c for c in columns if c is not None)]
        if name == "scales":
            expected = [scale_count(n) for n in expected]
            if any(t.dtype != torch.bfloat16 or not t.is_contiguous() for t in column):
                raise TypeError("exp_avg_scales must be contiguous bfloat16 tensors, as quantize_blockwise makes them")
        found = [t.numel() for t in column]
        if found != expected:
            raise ValueError(f"{name} have {found[:4]}... elements, expected {expected[:4]}...")


_tables = _Tables()


def _loops() -> ctypes.CDLL:
    loaded, reason = library()
    if loaded is None:
        raise RuntimeError(f"backend 'native' cannot run: {reason}; use backend='torch'")
    return loaded


@torch.no_grad()
def gradient_telemetry(
    grads: Sequence[Tensor],
    *,
    gamma: float = 1.5,
    grad_scale: Tensor | None = None,
    per_tensor: bool = False,
) -> Tensor:
    """Statistics of all gradients; arguments, result and errors as `reference.gradient_telemetry`."""
    if not 1.0 <= gamma <= 4.0:
        raise ValueError(f"gamma is {gamma}; expected a value from 1 to 4")
    out = torch.zeros((len(grads) if per_tensor else 1, L.NUM_TELEMETRY))
    if not grads:
        if per_tensor:
            return out
        raise ValueError("gradient_telemetry got no gradients; expected at least one tensor")
    table = _tables.get([None, grads, None, None, None], None)
    scale = 1.0 if grad_scale is None else 1.0 / float(grad_scale)
    _loops().telemetry(
        table.data_ptr(), len(table), scale, gamma, per_tensor, out.data_ptr(), torch.get_num_threads()
    )
    return out if per_tensor else out[0]


def _values(control: Tensor, grad_scale: Tensor | None, maximize: bool) -> Tensor:
    """native.cpp's Values for each control row."""
    factor = control[:, L.CLIP_COEF]
    if grad_scale is not None:
        factor = factor / grad_scale.reshape(()).to(factor)
    slots = control.unbind(1)
    step_size = slots[L.LR_OUT] * slots[L.BIAS_CORRECTION2_SQRT] / slots[L.BIAS_CORRECTION1]
    return torch.stack(
        [slots[L.SKIP], -factor if maximize else factor, slots[L.LR_OUT], slots[L.WEIGHT_DECAY],
         slots[L.BETA1_OUT], slots[L.BETA2_OUT], slots[L.EPS], step_size], dim=1
    )  # fmt: skip


@torch.no_grad()
def lion_update_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    control: Tensor,
    *,
    exp_avg_scales: Sequence[Tensor] | None = None,
    rows: Sequence[int] | None = None,
    lr_multipliers: Tensor | None = None,
    grad_scale: Tensor | None = None,
    maximize: bool = False,
) -> None:
    """Lion in place; arguments, formula and errors as `reference.lion_update_`."""
    table = _tables.get([params, grads, exp_avgs, exp_avg_scales, None], rows)
    values = _values(control, grad_scale, maximize)
    multipliers = None if lr_multipliers is None else lr_multipliers.float().contiguous()
    _loops().lion(
        table.data_ptr(),
        len(table),
        values.data_ptr(),
        None if multipliers is None else multipliers.data_ptr(),
        exp_avg_scales is not None,
        torch.get_num_threads(),
    )


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
) -> None:
    """AdamW in place; arguments, formula and errors as `reference.adamw_update_`."""
    table = _tables.get([params, grads, exp_avgs, None, exp_avg_sqs], rows)
    values = _values(control, grad_scale, maximize)
    multipliers = None if lr_multipliers is None else lr_multipliers.float().contiguous()
    _loops().adamw(
        table.data_ptr(),
        len(table),
        values.data_ptr(),
        None if multipliers is None else multipliers.data_ptr(),
        nesterov,
        decoupled,
        torch.get_num_threads(),
    )
