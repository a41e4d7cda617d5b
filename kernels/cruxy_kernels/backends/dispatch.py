"""The public functions: the one place that checks their arguments, and the one that asks which backend serves them.

    "triton"  the kernels: CUDA devices of compute capability 7.0 or newer, where triton can be imported
    "native"  compiled loops for the CPU (native.py): where a C++ compiler is, for large fp32 steps
    "torch"   PyTorch operators (pieces.py): everywhere else

The argument `backend=` decides, then the environment variable CRUXY_BACKEND, then the device. A backend that was
asked for and cannot run raises; nothing is replaced in silence. Under TRITON_INTERPRET=1 "triton" also takes CPU
tensors, for tests, when asked for.
"""

import functools
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import codec as codec_module
from .._triton import HAS_TRITON
from ..codec import CODECS, PLAIN, Codec, scale_name
from ..launch import launch, on_device
from ..laws import layout as L
from ..laws.blade import RESPONSES, BladeState, LayerTensors, blade_law, launch_blade
from ..laws.clipping import TensorClip
from ..laws.control import launch_control, launch_refresh, refresh, step_law
from ..laws.telemetry import launch_telemetry
from ..rules import RULES, Rule
from ..tables import ALIGNMENT, CHUNK, ELEMENT_TYPES, to_device
from ..update import LINES, launch_update
from . import native, pieces

BACKENDS = ("triton", "native", "torch")
VARIABLE = "CRUXY_BACKEND"
MIN_CAPABILITY = (7, 0)


# -- which ------------------------------------------------------------------


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
    if not HAS_TRITON:
        return "triton cannot be imported (it has wheels for Linux, and triton-windows for Windows)", ""
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
    tensors: Sequence[Tensor], backend: str | None = None, rule: str | None = None, codecs: Sequence[Codec] = ()
) -> str:
    """The backend for a call on these parameters, gradients and states, with this update rule.

    Dtypes that no kernel stores (float64) go to PyTorch, as do CPU steps that are too small to compile for.
    """
    is_open = backend is None and not os.environ.get(VARIABLE)
    if is_open and tensors[0].is_cpu and not native.built() and _elements(tensors) < native.MIN_ELEMENTS:
        return "torch"
    chosen = explain(tensors[0].device, backend)[0]
    if chosen == "native":
        obstacle = native.obstacle(tensors, rule, codecs)
        if obstacle is not None:
            if not is_open:
                raise TypeError(f"backend 'native' cannot serve {obstacle}")
            return "torch"
    if chosen == "triton":
        strange = {t.dtype for t in tensors} - set(ELEMENT_TYPES)
        if strange:
            names = ", ".join(sorted(map(str, strange)))
            if not is_open:
                raise TypeError(f"the Triton kernels take float32, float16 and bfloat16, got {names}")
            _warn_dtype(names)
            return "torch"
    return chosen


def choose_for_update(
    rule: Rule,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    state: Mapping[str, Sequence[Tensor]],
    backend: str | None,
) -> str:
    """The backend that serves this update."""
    buffers = [t for name in rule.state for t in state[name]]
    return choose([*params, *grads, *buffers], backend, rule.name, rule.codecs_of(state))


def _choose_small(device: torch.device, backend: str | None) -> str:
    """The backend of what is small: on a CPU nothing is compiled for it alone."""
    if device.type == "cpu" and backend is None and not os.environ.get(VARIABLE):
        return "native" if native.built() else "torch"
    return explain(device, backend)[0]


def _elements(tensors: Sequence[Tensor]) -> int:
    return sum([t.numel() for t in tensors])


@functools.lru_cache(maxsize=8)
def _warn_dtype(names: str) -> None:
    warnings.warn(f"{names} tensors are served by PyTorch: the Triton kernels have no such dtype", stacklevel=5)


# -- telemetry and control ------------------------------------------------------------------


@torch.no_grad()
def gradient_telemetry(
    grads: Sequence[Tensor],
    *,
    gamma: float = 1.5,
    per_tensor: bool = False,
    partial: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Sums over all gradients, one read of each: [Σ|g|^γ, Σg², max|g|, non-finite count]. White paper eq 1.

    The γ-norm is `out[0] ** (1 / gamma)`. Only finite elements enter the first three. Accumulated in fp32 in a
    fixed order: the same gradients give the same bits.

    Args:
        grads: tensors of any shape, float32, float16 or bfloat16 (float64: by PyTorch).
        gamma: exponent in [1, 4].
        per_tensor: one row per tensor instead of the totals.
        partial: the totals may come as several rows, float32 (n, 4), which `control_step` adds: one launch less.
        backend: "triton", "native" or "torch"; see the module's docstring.

    Returns:
        float32 (4,), (len(grads), 4) with `per_tensor`, or (n, 4) with `partial`, on the first gradient's device.

    Raises:
        ValueError: `gamma` outside [1, 4], or no gradients without `per_tensor`.
        TypeError: gradients that are not floating point.
    """
    if not 1.0 <= gamma <= 4.0:
        raise ValueError(f"gamma is {gamma}; expected a value from 1 to 4")
    if not grads:
        if per_tensor:
            return torch.zeros((0, L.NUM_TELEMETRY))
        raise ValueError("gradient_telemetry got no gradients; expected at least one tensor")
    _check_floating("grads", grads)
    chosen = choose(grads, backend)
    if chosen == "triton":
        return launch_telemetry(grads, gamma, per_tensor, partial)
    out = (native if chosen == "native" else pieces).telemetry(grads, gamma, per_tensor)
    return out[None] if partial and not per_tensor else out


@torch.no_grad()
def control_step(
    control: Tensor,
    telemetry: Tensor,
    loss: Tensor | None = None,
    *,
    law: str = "meta3",
    found_inf: Tensor | None = None,
    grad_scale: Tensor | None = None,
    log: Tensor | None = None,
    clip: str | TensorClip | None = "global",
    backend: str | None = None,
) -> None:
    """One step of the per-step law, in place (white paper eq 2-7; docs/laws.md).

    Reads the inputs and the state of `control`, writes the new state and the outputs; `layout` names the slots. A
    step whose gradients, loss or norm are not finite sets SKIP, counts SKIPPED and leaves the rest alone.

    Args:
        control: float32 (num_rows, layout.NUM_SLOTS), contiguous; a row per parameter group (`new_control`).
        telemetry: float32 (4,) or (n, 4) from `gradient_telemetry`, same device.
        loss: 0-dim or 1-element float32 tensor on the same device, or None: the curvature estimate is left as it is.
        law: "stability_v1", "stability_v2" or "meta3".
        found_inf, grad_scale: 0-dim or 1-element float32 tensors of torch's GradScaler, same device. Statistics and
            gradients are those that were stored, divided by grad_scale.
        log: float32 (n, layout.NUM_SLOTS), same device: row 0 after the step is copied to log[(steps - 1) % n], steps
            counting those that were skipped.
        clip: "global", as the law clips; None, not at all; a TensorClip, each tensor against its own history: it has
            their factors then, and its history moves on unless the step is skipped. `telemetry` has the rows that
            its spans say.
        backend: "triton", "native" or "torch".

    Raises:
        ValueError: unknown law or clipping, or tensors of the wrong shape, dtype or device.
    """
    if law not in L.LAWS:
        raise ValueError(f"unknown law {law!r}; expected one of {', '.join(L.LAWS)}")
    _check_control(control)
    if telemetry.shape[-1:] != (L.NUM_TELEMETRY,) or telemetry.dim() > 2 or telemetry.dtype != torch.float32:
        raise ValueError(
            f"telemetry is {telemetry.dtype} of shape {tuple(telemetry.shape)}; expected float32 "
            f"({L.NUM_TELEMETRY},) or (n, {L.NUM_TELEMETRY}), as gradient_telemetry makes it"
        )
    device = control.device
    _check_log(log, device)
    _check_device("telemetry", telemetry, device)
    loss = _scalar("loss", loss, device)
    if isinstance(clip, TensorClip):
        telemetry = telemetry.reshape(-1, L.NUM_TELEMETRY)
        _check_device("the history of clip", clip.history, device)
        if len(telemetry) != clip.telemetry_rows:
            raise ValueError(f"telemetry has {len(telemetry)} rows; clip expected {clip.telemetry_rows}")
    elif clip not in ("global", None):
        raise ValueError(f"clip is {clip!r}; expected 'global', None or a TensorClip")
    found_inf = _scalar("found_inf", found_inf, device)
    grad_scale = _scalar("grad_scale", grad_scale, device)
    chosen = _choose_small(device, backend)
    run = launch_control if chosen == "triton" else native.control if chosen == "native" else step_law
    run(control, telemetry.contiguous(), loss, law, found_inf, grad_scale, log, clip)


@torch.no_grad()
def refresh_outputs(control: Tensor, *, log: Tensor | None = None, backend: str | None = None) -> None:
    """meta3's learning rate and beta2 anew, in place, after a controller has moved LR_SCALE or META_BETA2.

    control, log: as for `control_step`, which has been called in this step. Raises ValueError for other tensors.
    """
    _check_control(control)
    _check_log(log, control.device)
    (launch_refresh if _choose_small(control.device, backend) == "triton" else refresh)(control, log)


def _check_log(log: Tensor | None, device: torch.device) -> None:
    if log is not None:
        _check_control(log, "log")
        if log.device != device:  # a call less in each step where there is no fault
            _check_device("log", log, device)
        if not log.shape[0]:
            raise ValueError("log has no row; expected room for a step, or None")


def _check_device(name: str, value: Tensor, device: torch.device) -> None:
    if value.device != device:
        raise ValueError(f"{name} is on {value.device} and control on {device}; move one to the other")


def _scalar(name: str, value: Tensor | None, device: torch.device) -> Tensor | None:
    """`value` as one float32 number on the device."""
    if value is None:
        return None
    _check_device(name, value, device)
    if value.dtype == torch.float32 and not value.dim():
        return value.detach() if value.requires_grad else value
    if value.numel() != 1 or value.is_complex():
        raise ValueError(f"{name} is {value.dtype} of shape {tuple(value.shape)}; expected one real number")
    return value.detach().reshape(()).to(torch.float32)


# -- layer-wise control ------------------------------------------------------------------


@torch.no_grad()
def blade_step(
    state: BladeState,
    tensors: LayerTensors,
    telemetry: Tensor,
    skip: Tensor,
    grads: Sequence[Tensor] = (),
    *,
    loss: Tensor | None = None,
    entropy: Tensor | None = None,
    grad_scale: Tensor | None = None,
    response: str = "damped",
    seed: int = L.BLADE_SEED,
    backend: str | None = None,
) -> None:
    """One step of BLADE, in place: `state` moves on, `tensors.factors` has each tensor's multiplier of the step size.

    docs/laws.md, section 7. One launch; no value is read by the host.

    Args:
        state: of `new_blade_state`, for as many layers as `tensors` counts.
        tensors: the tensors of this step and their layers.
        telemetry: float32 (rows, 4) by tensor: `gradient_telemetry(per_tensor=True)`, or the rows of its spans.
        skip: 0-dim or 1-element float32: above 0, this step changes nothing (`control[0, layout.SKIP]`).
        grads: the gradients in the order of `tensors`; not needed where it knows their cells and Triton serves.
        loss, entropy, grad_scale: 0-dim or 1-element float32 tensors, or None. The loss and the entropy are the mean
            over the step; what is not positive and finite does not count. Norms are those of `grads / grad_scale`.
        response: "damped" or "paper".
        seed: of the samples, as `new_blade_state` had it.
        backend: "triton", "native" (as "torch": there are no compiled loops for it) or "torch". Gradients in float64
            or on several devices are served by PyTorch.

    All tensors but the gradients are on one device.

    Raises:
        ValueError: an unknown response, or tensors of the wrong number, shape, dtype or device.
        TypeError: gradients that are not floating point.
    """
    if response not in RESPONSES:
        raise ValueError(f"unknown response {response!r}; expected one of {', '.join(RESPONSES)}")
    device, given = tensors.device, list(grads)
    if state.signs.device != device or len(state.signs) != tensors.count:
        raise ValueError(
            f"the state is of {len(state.signs)} layers on {state.signs.device}; the tensors are of {tensors.count} on "
            f"{device}"
        )
    if telemetry.dtype != torch.float32 or telemetry.shape != (tensors.telemetry_rows, L.NUM_TELEMETRY):
        raise ValueError(
            f"telemetry is {telemetry.dtype} of shape {tuple(telemetry.shape)}; expected float32 "
            f"({tensors.telemetry_rows}, {L.NUM_TELEMETRY})"
        )
    if telemetry.device != device:
        raise ValueError(f"telemetry is on {telemetry.device} and the layers on {device}; move one to the other")
    held = _scalar("skip", skip, device)
    assert held is not None
    signals = (
        _scalar("loss", loss, device), _scalar("entropy", entropy, device), _scalar("grad_scale", grad_scale, device)
    )  # fmt: skip
    chosen = _choose_small(device, backend)
    if chosen == "triton" and not tensors.given_cells:
        kinds = {(g.device, g.dtype) for g in given}
        if {where for where, _ in kinds} - {device} or {dtype for _, dtype in kinds} - set(ELEMENT_TYPES):
            chosen = "torch"
    if chosen == "triton" and tensors.given_cells:
        given = []
    else:
        _check_floating("grads", given)
        if [g.numel() for g in given] != tensors.numels:
            raise ValueError(
                f"grads have {[g.numel() for g in given]} elements; expected {tensors.numels}, as the tensors have"
            )
    if chosen == "triton":
        if not tensors.given_cells:
            given = [g.contiguous() for g in given]
            addresses = torch.tensor([g.data_ptr() for g in given], dtype=torch.int64)
            tensors.cells.copy_(to_device(addresses, device), non_blocking=True)
        launch_blade(state, tensors, telemetry.contiguous(), held, *signals, response, seed)
        return
    blade_law(state, tensors, telemetry, held, given, *signals, response, seed)


# -- updates ------------------------------------------------------------------


@torch.no_grad()
def update_(
    rule: str,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    state: Mapping[str, Sequence[Tensor]],
    control: Tensor,
    *,
    rows: Sequence[int] | None = None,
    ids: Sequence[int] | None = None,
    lr_multipliers: Tensor | None = None,
    grad_factors: Tensor | None = None,
    backend: str | None = None,
    **flags: bool,
) -> None:
    """An update rule in place; clip, betas, learning rate and the skip flag come from `control`.

    The formulas are those of `rules/`. Computed in fp32 (float64 for float64 parameters). 16-bit parameters are
    rounded stochastically. Where SKIP is set nothing changes.

    Args:
        rule: "lion" or "adamw", see `RULES`.
        params, grads: tensors of the same shapes; float32, float16 or bfloat16 (float64: by PyTorch).
        state: for each name in `RULES[rule].state` a list of tensors of those shapes, in a dtype of the rule's
            `storage`, or the codes of one of its codecs (`quantize_blockwise`; the same one for all tensors); then
            `name + "_scale"` holds their scales, bfloat16 (ceil(numel/64),).
        control: float32 (num_rows, layout.NUM_SLOTS), contiguous, after `control_step`.
        rows: control row of each tensor; all in row 0 without it.
        ids: a number below 2^31 of each tensor, for the random bits of the rounding; its place in the list without.
        lr_multipliers: float32 (len(params),), scales the step of each tensor (not its weight decay).
        grad_factors: float32 (len(params),), scales the gradient of each tensor before it enters its state, beside
            GRAD_FACTOR of the control vector: `TensorClip.factors`.
        backend: "triton", "native" or "torch".
        flags: the rule's switches, for "adamw" `nesterov` and `decoupled`.

    Raises:
        ValueError, TypeError: an unknown rule or flag; lists, shapes, dtypes or devices that do not fit.
    """
    if rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}; expected one of {', '.join(RULES)}")
    chosen_rule = RULES[rule]
    bits = chosen_rule.bits(flags)
    _check_control(control)
    check_update(chosen_rule, params, grads, state, len(control), rows, ids, lr_multipliers, grad_factors)
    if not params:
        return
    per_tensor = {"lr_multipliers": lr_multipliers, "grad_factors": grad_factors}
    for name, value in ({"control": control} | per_tensor).items():
        if value is not None and value.device.type != params[0].device.type:
            raise ValueError(f"{name} is on {value.device} and params on {params[0].device}; move one to the other")
    chosen = choose_for_update(chosen_rule, params, grads, state, backend)
    multipliers, factors = (None if value is None else value.contiguous() for value in per_tensor.values())
    if chosen in ("triton", "native"):
        run = launch_update if chosen == "triton" else native.update
        run(chosen_rule, params, grads, state, control, rows, ids, multipliers, factors, bits)
    else:
        named = {**chosen_rule.flags, **flags}
        pieces.update(chosen_rule, params, grads, state, control, rows, ids, multipliers, factors, named)


def lion_update_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    control: Tensor,
    *,
    exp_avg_scales: Sequence[Tensor] | None = None,
    rows: Sequence[int] | None = None,
    ids: Sequence[int] | None = None,
    lr_multipliers: Tensor | None = None,
    grad_factors: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Lion in place: `update_("lion", ...)` with its momentum as arguments (formula: rules/lion.py).

    exp_avgs: float32, float16 or bfloat16, or codes of `quantize_blockwise` in 8 or 4 bits with their
    `exp_avg_scales`.
    """
    state = {"exp_avg": exp_avgs} | ({} if exp_avg_scales is None else {scale_name("exp_avg"): exp_avg_scales})
    update_(
        "lion", params, grads, state, control, rows=rows, ids=ids, lr_multipliers=lr_multipliers,
        grad_factors=grad_factors, backend=backend,
    )  # fmt: skip


def adamw_update_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    control: Tensor,
    *,
    exp_avg_scales: Sequence[Tensor] | None = None,
    exp_avg_sq_scales: Sequence[Tensor] | None = None,
    rows: Sequence[int] | None = None,
    ids: Sequence[int] | None = None,
    lr_multipliers: Tensor | None = None,
    grad_factors: Tensor | None = None,
    nesterov: bool = True,
    decoupled: bool = True,
    backend: str | None = None,
) -> None:
    """AdamW in place: `update_("adamw", ...)` with its moments as arguments (formula: rules/adamw.py).

    exp_avgs, exp_avg_sqs: float32, or codes of `quantize_blockwise`, "softsign8" and "quartic8", with their scales.
    nesterov: look one step of momentum ahead. decoupled: weight decay on the parameter (AdamW) and not through the
    gradient (Adam).
    """
    state = {"exp_avg": exp_avgs, "exp_avg_sq": exp_avg_sqs}
    for name, scales in (("exp_avg", exp_avg_scales), ("exp_avg_sq", exp_avg_sq_scales)):
        if scales is not None:
            state[scale_name(name)] = scales
    update_(
        "adamw", params, grads, state, control, rows=rows, ids=ids, lr_multipliers=lr_multipliers,
        grad_factors=grad_factors, nesterov=nesterov, decoupled=decoupled, backend=backend,
    )  # fmt: skip


# -- codecs ------------------------------------------------------------------


# What `bits` means where no codec is named: the codes of Lion's momentum.
USUAL = {8: "softsign8", 4: "softsign4"}


def _coded(bits: int, name: str | None) -> Codec:
    if name is None and bits not in USUAL:
        raise ValueError(f"no codec has {bits!r} bits; expected {' or '.join(map(str, USUAL))}")
    found = CODECS.get(name or USUAL[bits])
    if found is None or not found.block:
        raise ValueError(f"no codec is called {name!r}; expected {', '.join(n for n, c in CODECS.items() if c.block)}")
    return found


@torch.no_grad()
def quantize_blockwise(
    x: Tensor, *, bits: int = 8, codec: str | None = None, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """(codes, scales) of `x` in the code of the updates' state: 1.03 bytes per value for 8 bits, 0.53 for 4.

    Every value takes the nearest code; codecs that an update rounds at random take the nearest value here.

    Args:
        x: floating point, any shape.
        bits: 8 or 4, the codes of Lion's momentum.
        codec: any codec by its name in `CODECS` instead.
        backend: "triton", "native" or "torch".

    Returns:
        8 bits: int8 of the shape of `x`; 4 bits: uint8 (ceil(numel/2),), two codes each. Scales: bfloat16
        (ceil(numel/64),), one per block of 64 consecutive values. Formulas and limits: codec.py.

    Raises:
        TypeError: another dtype. ValueError: no such bits or codec.
    """
    chosen = _coded(bits, codec)
    _check_floating("x", [x])
    if _choose_small(x.device, backend) != "triton" or not x.numel():
        return chosen.encode(x)
    values = x.detach().contiguous()
    if values.dtype not in (torch.float32, torch.float16):
        values = values.float()
    codes = torch.empty(chosen.shape(x.shape), dtype=chosen.dtype, device=x.device)
    scales = torch.empty(chosen.scale_count(x.numel()), dtype=chosen.scale_dtype, device=x.device)
    _launch_codec("quantize_kernel", x.numel(), values, codes, scales.view(torch.int16), STORE=chosen.store)
    return codes, scales


@torch.no_grad()
def dequantize_blockwise(
    codes: Tensor,
    scales: Tensor,
    dtype: torch.dtype = torch.float32,
    *,
    bits: int = 8,
    codec: str | None = None,
    shape: Sequence[int] | None = None,
    backend: str | None = None,
) -> Tensor:
    """The values of codes and scales from `quantize_blockwise`, in `dtype`.

    Args:
        bits, codec, backend: as they were given there.
        shape: of the result. Without it that of the codes; two codes in an element give a flat tensor of twice as
            many, whose last value is none of the tensor's where that has an odd number.

    Raises:
        TypeError or ValueError: codes, scales, shape and dtype do not fit.
    """
    chosen = _coded(bits, codec)
    if codes.dtype != chosen.dtype:
        wanted = str(chosen.dtype).removeprefix("torch.")
        raise TypeError(
            f"codes are {codes.dtype}; expected {wanted}, as quantize_blockwise makes them with {chosen.bits} bits"
        )
    given = None if shape is None else torch.Size(shape)
    chosen.check(codes, scales, given)
    if not dtype.is_floating_point:
        raise TypeError(f"dtype is {dtype}; expected a floating-point type")
    if _choose_small(codes.device, backend) != "triton" or not codes.numel():
        return chosen.decode(codes, scales, given).to(dtype)
    if given is None:
        given = codes.shape if chosen.packed == 1 else torch.Size([codes.numel() * chosen.packed])
    kept = dtype if dtype in (torch.float32, torch.float16) else torch.float32
    out = torch.empty(given, dtype=kept, device=codes.device)
    bits16 = scales.contiguous().view(torch.int16)
    _launch_codec("dequantize_kernel", out.numel(), codes.contiguous(), bits16, out, LOAD=chosen.load)
    return out.to(dtype)


def _launch_codec(kernel: str, numel: int, first: Tensor, second: Tensor, third: Tensor, **function: Any) -> None:
    aligned = all(t.data_ptr() % ALIGNMENT == 0 for t in (first, second, third))
    with on_device(first.device):
        launch(
            getattr(codec_module, kernel), -(-numel // CHUNK), first, second, third, numel,
            ALIGNED=aligned, LINES=LINES, **function,
        )  # fmt: skip


# -- checks ------------------------------------------------------------------
# Kernels and compiled loops follow addresses: what does not fit corrupts memory there. So nothing reaches them
# that has not passed here, and every backend refuses the same things in the same words.


def _check_floating(name: str, tensors: Sequence[Tensor]) -> None:
    for i, t in enumerate(tensors):
        if not t.is_floating_point() or t.layout is not torch.strided:
            raise TypeError(f"{name}[{i}] is {t.dtype} ({t.layout}); expected a dense floating-point tensor")
        if t.is_neg():  # its memory holds the other sign, and that is what a kernel reads
            raise ValueError(f"{name}[{i}] is a view with the negative bit of torch; give its resolve_neg()")


def _check_control(control: Tensor, name: str = "control") -> None:
    if control.dtype != torch.float32 or control.dim() != 2 or control.shape[1] != L.NUM_SLOTS:
        raise ValueError(
            f"{name} is {control.dtype} of shape {tuple(control.shape)}; expected float32 "
            f"(num_rows, {L.NUM_SLOTS}), as new_control makes it"
        )
    if not control.is_contiguous():
        raise ValueError(f"{name} is not contiguous; expected one contiguous float32 tensor")


def check_update(
    rule: Rule,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    state: Mapping[str, Sequence[Tensor]],
    num_rows: int,
    rows: Sequence[int] | None,
    ids: Sequence[int] | None,
    lr_multipliers: Tensor | None = None,
    grad_factors: Tensor | None = None,
) -> None:
    count = len(params)
    scales = {scale_name(name) for name in rule.state}
    coded = not scales.isdisjoint(state)
    wanted = {*rule.state, *(scales if coded else ())}
    if set(state) != wanted:
        raise ValueError(f"the state holds {', '.join(sorted(state))}; {rule.name} expects {', '.join(sorted(wanted))}")
    lists: dict[str, Any] = {"params": params, "grads": grads, **state, "rows": rows, "ids": ids}
    for name, values in lists.items():
        if values is not None and len(values) != count:
            raise ValueError(f"{name} has {len(values)} entries for {count} parameters; expected lists of one length")
    if rows is not None and count and not (min(rows) >= 0 and max(rows) < num_rows):
        raise ValueError(f"rows are {min(rows)} to {max(rows)}; control has {num_rows} rows, counted from 0")
    if ids is not None and count and not (min(ids) >= 0 and max(ids) < 1 << 31):
        raise ValueError(f"ids are {min(ids)} to {max(ids)}; expected numbers from 0 to below 2^31")
    for name, value in (("lr_multipliers", lr_multipliers), ("grad_factors", grad_factors)):
        if value is not None and (value.dtype != torch.float32 or value.shape != (count,)):
            raise ValueError(f"{name} is {value.dtype} of shape {tuple(value.shape)}; expected float32 ({count},)")
    _check_floating("params", params)
    _check_floating("grads", grads)
    codecs = rule.codecs_of(state) if count else rule.codecs(32)
    for i, p in enumerate(params):
        if grads[i].shape != p.shape or grads[i].device != p.device:
            raise ValueError(_misfit("grads", i, grads[i], p))
        for name, codec in zip(rule.state, codecs, strict=True):
            value = state[name][i]
            if value.device != p.device or value.shape != codec.shape(p.shape):
                raise ValueError(_misfit(name, i, value, p, codec))
            if coded:
                _check_codes(codec, name, i, value, state[scale_name(name)][i])
            elif value.dtype not in rule.storage and not value.dtype == p.dtype == torch.float64:
                _refuse_storage(rule, name, i, value)


def _misfit(name: str, i: int, value: Tensor, param: Tensor, codec: Codec = PLAIN) -> str:
    wanted = "the shape and device of" if codec.packed == 1 else f"{codec.packed} values per element on the device of"
    return (
        f"{name}[{i}] has shape {tuple(value.shape)} on {value.device}; expected {wanted} params[{i}], "
        f"{tuple(codec.shape(param.shape))} on {param.device}"
    )


def _check_codes(codec: Codec, name: str, i: int, codes: Tensor, scales: Tensor) -> None:
    if codes.dtype != codec.dtype:
        raise TypeError(f"{name}[{i}] is {codes.dtype} and {name}[0] {codec.dtype}; one call has codes of one codec")
    try:
        codec.check(codes, scales)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}_scale[{i}]: {error}") from None


def _refuse_storage(rule: Rule, name: str, i: int, value: Tensor) -> None:
    if value.dtype in {codec.dtype for bits in rule.state_bits for codec in rule.codecs(bits) if codec.block}:
        raise ValueError(
            f"{name} are {value.dtype} and {name}_scale is missing: "
            f"{str(value.dtype).removeprefix('torch.')} codes need their scales"
        )
    expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in rule.storage)
    raise TypeError(f"{name}[{i}] is {value.dtype}; {rule.name} expected {expected}")
