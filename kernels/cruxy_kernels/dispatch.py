"""Which implementation serves a call, and why. The only file that asks about devices.

    "triton"  the kernels: CUDA devices of compute capability 7.0 or newer, where triton can be imported
    "native"  compiled loops for the CPU (native.py): where a C++ compiler is, for large fp32 steps
    "torch"   PyTorch operators (reference.py): everywhere else

The argument `backend=` decides, then the environment variable CRUXY_BACKEND, then the device. A backend that was
asked for and cannot run raises; nothing is replaced in silence. Under TRITON_INTERPRET=1 "triton" also takes CPU
tensors, for tests, when asked for.
"""

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cruxy_kernels import native

BACKENDS = ("triton", "native", "torch")
VARIABLE = "CRUXY_BACKEND"
MIN_CAPABILITY = (7, 0)

# function: the module of its Triton kernel; its twin has the same name in the PyTorch module.
TRITON = {
    "gradient_telemetry": "telemetry",
    "control_step": "control",
    "lion_update_": "lion",
    "adamw_update_": "adamw",
    "quantize_blockwise": "codec",
    "dequantize_blockwise": "codec",
}
TORCH = dict.fromkeys(TRITON, "reference") | {
    "quantize_blockwise": "codec_reference",
    "dequantize_blockwise": "codec_reference",
}
# The loops that native.cpp has; the rest of a step is small or reference.py's.
NATIVE = TORCH | dict.fromkeys(("gradient_telemetry", "lion_update_", "adamw_update_"), "native")
MODULES = {"triton": TRITON, "native": NATIVE, "torch": TORCH}
STORAGE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def explain(device: torch.device | str, backend: str | None = None) -> tuple[str, str]:
    """(backend, reason): what serves tensors of `device`, and why, in a sentence for people.

    Raises ValueError for an unknown backend, RuntimeError for a chosen one that cannot run.
    """
    device = torch.device(device)
    index = device.index
    if device.type == "cuda" and index is None and torch.cuda.is_available():
        index = torch.cuda.current_device()
    return _explain(device.type, index, backend, os.environ.get(VARIABLE), os.environ.get("TRITON_INTERPRET"))


@functools.lru_cache(maxsize=64)
def _explain(
    type: str, index: int | None, backend: str | None, variable: str | None, interpret: str | None
) -> tuple[str, str]:
    asked, by = (backend, "backend=") if backend is not None else (variable or None, f"{VARIABLE}=")
    if asked is not None and asked not in BACKENDS:
        raise ValueError(f"unknown backend {by}{asked!r}: expected one of {', '.join(BACKENDS)}")
    if asked == "torch":
        return "torch", f"chosen by {by}'torch'"
    if asked == "native" or (asked is None and type == "cpu"):
        loops, note = native.library() if type == "cpu" else (None, f"native loops serve the CPU, not {type}")
        if asked is None:
            return ("native", f"CPU; {note}") if loops else ("torch", f"CPU; PyTorch operators, slower: {note}")
        if loops is None:
            raise RuntimeError(f"{by}'native' cannot run: {note}; use backend='torch' or leave the choice open")
        return "native", f"chosen by {by}'native' ({note})"
    obstacle, note = _obstacle(type, index, interpret == "1")
    if asked == "triton":
        if obstacle is not None:
            raise RuntimeError(
                f"{by}'triton' cannot run on {type}: {obstacle}; use backend='torch' or leave the choice open"
            )
        return "triton", f"chosen by {by}'triton' ({note})"
    return ("torch", obstacle) if obstacle is not None else ("triton", note)


def _obstacle(type: str, index: int | None, interpret: bool) -> tuple[str | None, str]:
    """(why Triton cannot serve this kind of device or None, what it will do otherwise)."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (it has wheels for Linux, and triton-windows for Windows)", ""
    if interpret and type in ("cpu", "cuda"):
        return None, "Triton's interpreter, because TRITON_INTERPRET=1: slow, for tests"
    if type != "cuda":
        return f"Triton has no backend for {type} tensors here", ""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device", ""
    capability = torch.cuda.get_device_capability(index)
    name = torch.cuda.get_device_name(index)
    if torch.version.hip is None and capability < MIN_CAPABILITY:
        return f"{name} has compute capability {capability[0]}.{capability[1]}, Triton needs 7.0", ""
    arch = f"sm_{capability[0]}{capability[1]}"
    if torch.version.hip is None and capability < (8, 0):
        return None, f"{name} ({arch}): not on Triton's list, but these kernels use nothing that {arch} lacks"
    return None, f"{name} ({arch})"


def choose(
    tensors: Sequence[Tensor], backend: str | None = None, momentum: Sequence[Tensor] = ()
) -> str:
    """The backend for a call on these parameters and gradients.

    Dtypes that no kernel stores (float64) go to PyTorch, as do CPU steps that are too small to compile for.
    """
    if not tensors:
        return "torch"
    if tensors[0].device.type == "cpu" and _open(backend) and _elements(tensors) < native.MIN_ELEMENTS:
        return "torch"
    chosen = explain(tensors[0].device, backend)[0]
    if chosen == "native":
        obstacle = native.obstacle(tensors, momentum)
        if obstacle is not None:
            if not _open(backend):
                raise TypeError(f"backend 'native' cannot serve {obstacle}")
            return "torch"
    if chosen == "triton":
        strange = {t.dtype for t in tensors} - set(STORAGE_DTYPES)
        if strange:
            names = ", ".join(sorted(map(str, strange)))
            if not _open(backend):
                raise TypeError(f"the Triton kernels take float32, float16 and bfloat16, got {names}")
            _warn_dtype(names)
            return "torch"
    return chosen


def _choose_small(device: torch.device, backend: str | None) -> str:
    """The backend of what native.cpp does not have: on a CPU nothing needs to be compiled for it."""
    if device.type == "cpu" and _open(backend):
        return "torch"
    return explain(device, backend)[0]


def _open(backend: str | None) -> bool:
    """Whether nobody asked for a backend."""
    return backend is None and not os.environ.get(VARIABLE)


def _elements(tensors: Sequence[Tensor]) -> int:
    return sum([t.numel() for t in tensors])


@functools.lru_cache(maxsize=8)
def _warn_dtype(names: str) -> None:
    warnings.warn(f"{names} tensors are served by PyTorch: the Triton kernels have no such dtype", stacklevel=4)


@functools.lru_cache(maxsize=32)
def implementation(name: str, backend: str) -> Callable[..., Any]:
    """The function `name` of a backend; modules with kernels are imported here, when they are first needed."""
    return getattr(importlib.import_module(f"cruxy_kernels.{MODULES[backend][name]}"), name)


def gradient_telemetry(
    grads: Sequence[Tensor],
    *,
    gamma: float = 1.5,
    grad_scale: Tensor | None = None,
    per_tensor: bool = False,
    partial: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Sums over all gradients, one read of each: [Σ|g|^γ, Σg², max|g|, non-finite count]. Paper eq 1.

    The γ-norm is `out[0] ** (1 / gamma)`. Only finite elements enter the first three. Accumulated in fp32 in a
    fixed order: the same gradients give the same bits.

    Args:
        grads: tensors of any shape, float32, float16 or bfloat16 (float64: by PyTorch).
        gamma: exponent in [1, 4].
        grad_scale: 0-dim or 1-element tensor; the statistics are those of `g / grad_scale`.
        per_tensor: one row a tensor instead of the totals.
        partial: the totals may come as several rows, float32 (n, 4), which `control_step` adds: one launch less.
        backend: "triton", "native" or "torch"; see the module's docstring.

    Returns:
        float32 (4,), (len(grads), 4) with `per_tensor`, or (n, 4) with `partial`, on the gradients' device.

    Raises:
        ValueError: `gamma` outside [1, 4], or no gradients without `per_tensor`.
    """
    chosen = choose(grads, backend)
    function = implementation("gradient_telemetry", chosen)
    if chosen == "triton":
        return function(grads, gamma=gamma, grad_scale=grad_scale, per_tensor=per_tensor, partial=partial)
    out = function(grads, gamma=gamma, grad_scale=grad_scale, per_tensor=per_tensor)
    return out[None] if partial and not per_tensor else out


def control_step(
    control: Tensor,
    telemetry: Tensor,
    loss: Tensor | None = None,
    *,
    law: str = "meta3",
    found_inf: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """One step of the per-step law, in place (white paper eq 2-7; equations.md section 2 and 5).

    Reads the inputs and the state of `control`, writes the new state and the outputs; `layout` names the slots. A
    step whose gradients, loss or norm are not finite sets SKIP, counts SKIPPED and leaves the rest alone.

    Args:
        control: float32 (num_rows, layout.NUM_SLOTS), contiguous; a row a parameter group.
        telemetry: float32 (4,) or (n, 4) from `gradient_telemetry`, same device.
        loss: 0-dim tensor on the same device, or None: the curvature estimate is then left as it is.
        law: "stability_v1", "stability_v2" or "meta3".
        found_inf: 0-dim or 1-element tensor of torch's GradScaler, same device.
        backend: "triton", "native" or "torch".

    Raises:
        ValueError: unknown law, or tensors of the wrong shape.
    """
    chosen = _choose_small(control.device, backend)
    if chosen != "triton" and telemetry.dim() == 2:
        telemetry = _total(telemetry)
    implementation("control_step", chosen)(control, telemetry, loss, law=law, found_inf=found_inf)


def _total(partials: Tensor) -> Tensor:
    sums = partials.sum(0)
    return torch.stack([sums[0], sums[1], partials[:, 2].amax(), sums[3]])


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
    backend: str | None = None,
) -> None:
    """Lion (white paper eq 11-13) in place; clip, betas, learning rate and the skip flag come from `control`.

        g = clip_coef * grad / grad_scale
        u = sign(beta1 m + (1 - beta1) g)
        p <- p - lr (multiplier u + weight_decay p)
        m <- beta2 m + (1 - beta2) g

    Computed in fp32. 16-bit parameters are rounded stochastically. Where SKIP is set nothing changes.

    Args:
        params, grads: tensors of the same shapes; float32, float16 or bfloat16.
        exp_avgs: momentum of the same shapes: float32, float16 or bfloat16, or the int8 codes of
            `quantize_blockwise`.
        control: float32 (num_rows, layout.NUM_SLOTS), after `control_step`.
        exp_avg_scales: bfloat16 (ceil(numel/64),) for each tensor, with int8 codes only.
        rows: control row of each tensor; all in row 0 without it.
        lr_multipliers: float32 (len(params),), scales the step of each tensor (not its weight decay).
        grad_scale: 0-dim or 1-element tensor of torch's GradScaler.
        maximize: ascend instead of descend.
        backend: "triton", "native" or "torch".

    Raises:
        ValueError, TypeError: lists or dtypes that do not fit.
    """
    _check_state(exp_avgs, exp_avg_scales)
    chosen = choose([*params, *grads], backend, exp_avgs)
    implementation("lion_update_", chosen)(
        params,
        grads,
        exp_avgs,
        control,
        exp_avg_scales=exp_avg_scales,
        rows=rows,
        lr_multipliers=lr_multipliers,
        grad_scale=grad_scale,
        maximize=maximize,
    )


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
    exp_avg_scales: Sequence[Tensor] | None = None,
    backend: str | None = None,
) -> None:
    """AdamW in place; clip, betas, learning rate, bias corrections and the skip flag come from `control`.

        g = clip_coef * grad / grad_scale          (+ weight_decay p, unless `decoupled`)
        m <- beta1 m + (1 - beta1) g
        v <- beta2 v + (1 - beta2) g²
        n = beta1 m + (1 - beta1) g if nesterov else m
        p <- p (1 - lr weight_decay) - multiplier lr √(1 - beta2^t) / (1 - beta1^t) n / (√v + eps)

    Computed in fp32. 16-bit parameters are rounded stochastically. Where SKIP is set nothing changes.

    Args:
        exp_avgs: first moment, float32, or int8 codes of `quantize_blockwise`.
        exp_avg_sqs: second moment, float32.
        nesterov: look one step of momentum ahead.
        decoupled: weight decay on the parameter (AdamW) and not through the gradient (Adam).
        The others are those of `lion_update_`.
    """
    _check_state(exp_avgs, exp_avg_scales)
    chosen = choose([*params, *grads], backend, [*exp_avgs, *exp_avg_sqs])
    implementation("adamw_update_", chosen)(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        control,
        rows=rows,
        lr_multipliers=lr_multipliers,
        grad_scale=grad_scale,
        maximize=maximize,
        nesterov=nesterov,
        decoupled=decoupled,
        **({} if exp_avg_scales is None else {"exp_avg_scales": exp_avg_scales}),
    )


def quantize_blockwise(x: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """(codes, scales) of `x` in the 8-bit code of the updates' momentum; 1.03 bytes a value.

    x: floating point, any shape. Codes: int8, its shape. Scales: bfloat16 (ceil(numel/64),), one a block of 64
    consecutive values. Formula and limits: codec_reference.py. Raises TypeError for other dtypes.
    """
    return implementation("quantize_blockwise", _choose_small(x.device, backend))(x)


def dequantize_blockwise(
    codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32, *, backend: str | None = None
) -> Tensor:
    """The values of codes and scales from `quantize_blockwise`, in `dtype`. Raises ValueError if they do not fit."""
    return implementation("dequantize_blockwise", _choose_small(codes.device, backend))(codes, scales, dtype)


def _check_state(exp_avgs: Sequence[Tensor], exp_avg_scales: Sequence[Tensor] | None) -> None:
    if not exp_avgs:
        return
    coded = exp_avgs[0].dtype == torch.int8
    if coded != (exp_avg_scales is not None):
        raise ValueError(
            f"exp_avgs are {exp_avgs[0].dtype} and exp_avg_scales are "
            f"{'missing' if exp_avg_scales is None else 'given'}: int8 codes need their scales, others have none"
        )
