"""The step's large loops on a CPU, compiled from native.cpp on first use: one pass over memory for many tensors.

PyTorch operators (pieces.py) read and write every buffer a dozen times; a fused loop does it once. A C++ compiler
is needed (CXX, g++ or clang++); without one `library()` says why, and dispatch.py tells. Serves fp32, fp16 and
bfloat16 on the CPU; what else a step needs (control law, codec) is small.

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
# Below this a step takes less time than the compiler would: PyTorch serves it, unless the loops are there already.
MIN_ELEMENTS = 1 << 18
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int8: 3}  # native.cpp's Type
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
    for name in RULES_SERVED:
        getattr(loaded, name).argtypes = [pointer, integer, pointer, pointer, flag, flag]
    for name in ("telemetry", *RULES_SERVED):
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


def _target(compiler: str) -> tuple[Path, str]:
    """(where the compiled loops lie, the compiler's version)."""
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, check=True, timeout=60
    ).stdout.partition("\n")[0]
    key = hashlib.sha256(b"\0".join([SOURCE.read_bytes(), " ".join(FLAGS).encode(), version.encode(), _processor()]))
    return _cache_folder() / f"native-{key.hexdigest()[:20]}.so", version


def _processor() -> bytes:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features"))).encode()
    except (OSError, StopIteration):
        return f"{platform.machine()} {platform.processor()}".encode()


@functools.lru_cache(maxsize=1)
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


def _compile(compiler: str, path: Path) -> None:
    """Compiles to a temporary name and moves it into place, so that processes may race."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".so")
    os.close(handle)
    try:
        command = [compiler, *FLAGS, "-o", temporary, str(SOURCE)]
        run = functools.partial(subprocess.run, capture_output=True, text=True, check=True, timeout=_COMPILE_SECONDS)
        try:
            run([*command, "-march=native"])
        except subprocess.CalledProcessError:  # some compilers and processors have no "native"
            run(command)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def obstacle(tensors: Sequence[Tensor]) -> str | None:
    """Why these parameters, gradients and state buffers cannot be served, or None."""
    if odd := {t.dtype for t in tensors} - set(TYPES):
        return f"{', '.join(sorted(map(str, odd)))} tensors: it needs float32, float16 or bfloat16"
    if not all([t.is_cpu for t in tensors]):
        return "tensors that are not on the CPU"
    return None


class _Tables(threading.local):
    """The last tables made, by addresses; gradients that are made anew each step need a new one."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple, Tensor] = OrderedDict()

    def get(self, columns: Sequence[Sequence[int] | None]) -> Tensor:
        """int64 (tensors, columns): native.cpp's Rows."""
        count = len(next(column for column in columns if column is not None))
        key = tuple([(0,) * count if column is None else tuple(column) for column in columns])
        table = self._kept.get(key)
        if table is None:
            table = self._kept[key] = torch.tensor(key, dtype=torch.int64).T.contiguous()
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


def _addresses(tensors: Sequence[Tensor] | None) -> list[int] | None:
    return None if tensors is None else [t.data_ptr() for t in tensors]


def _types(tensors: Sequence[Tensor]) -> list[int]:
    return [TYPES[t.dtype] for t in tensors]


def telemetry(grads: Sequence[Tensor], gamma: float, per_tensor: bool) -> Tensor:
    """`dispatch.gradient_telemetry`: (len(grads), 4), or the totals (4,)."""
    grads = [g.contiguous() for g in grads]
    out = torch.zeros((len(grads) if per_tensor else 1, L.NUM_TELEMETRY))
    numels = [g.numel() for g in grads]
    columns = [None, _addresses(grads), None, None, None, None, None, _types(grads), None, numels, None, None, None]
    table = _tables.get(columns)
    _loops().telemetry(table.data_ptr(), len(table), gamma, per_tensor, out.data_ptr(), torch.get_num_threads())
    return out if per_tensor else out[0]


def _values(control: Tensor) -> Tensor:
    """native.cpp's Values for each control row."""
    return control[:, [L.SKIP, L.GRAD_FACTOR, L.LR_OUT, L.WEIGHT_DECAY, L.BETA1_OUT, L.BETA2_OUT, L.EPS,
                       L.BIAS_CORRECTION1, L.BIAS_CORRECTION2_SQRT, L.STEP, L.SEED]]  # fmt: skip


def update(
    rule: Rule,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    state: Mapping[str, Sequence[Tensor]],
    control: Tensor,
    rows: Sequence[int] | None,
    ids: Sequence[int] | None,
    lr_multipliers: Tensor | None,
    flags: int,
) -> None:
    """`dispatch.update_`, with arguments that it has checked and `obstacle` has let pass."""
    written = {"": params, **state}
    here = {name: [t.contiguous() for t in tensors] for name, tensors in written.items()}
    grads = [g.contiguous() for g in grads]
    numbers = range(len(params))
    states = [_addresses(here.get(name)) for name in (*rule.state, "none")[:2]]
    scales = [_addresses(here.get(name + "_scale")) for name in (*rule.state, "none")[:2]]
    table = _tables.get(
        [_addresses(here[""]), _addresses(grads), *states, *scales, _types(params), _types(grads),
         _types(state[rule.state[0]]), [p.numel() for p in params], rows, numbers, numbers if ids is None else ids]
    )  # fmt: skip
    values = _values(control)
    getattr(_loops(), rule.name)(
        table.data_ptr(),
        len(table),
        values.data_ptr(),
        None if lr_multipliers is None else lr_multipliers.data_ptr(),
        flags,
        torch.get_num_threads(),
    )
    for name, tensors in written.items():  # copies that stood in for tensors that are not contiguous
        for tensor, copy in zip(tensors, here[name], strict=True):
            if copy is not tensor:
                tensor.copy_(copy)
