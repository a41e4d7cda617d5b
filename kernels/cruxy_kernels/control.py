"""The per-step law in Triton: one program for each row of the control vector, nothing of it read by the host.

Equations and constants: layout.py and equations.md sections 2 and 5. Twin: `reference.control_step`. Every program
first adds the telemetry's partial sums, in a fixed order, so that no launch is needed for that. tanh, log and
expm1 are built from exp and sqrt, because libdevice has no interpreter; their errors stand beside them.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

import hashlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from cruxy_kernels import layout as L
from cruxy_kernels.launch import launch, on_device
from cruxy_kernels.telemetry import sum_partials

# Triton's cache of compiled kernels does not see constants that are read from a module: this key makes it.
LAYOUT_KEY = hashlib.sha256(repr(sorted((k, v) for k, v in vars(L).items() if k.isupper())).encode()).hexdigest()
PARTIALS_AT_ONCE = 1024


@triton.jit
def tanh(x):
    """Absolute error below 2e-7: the laws add it to 1 or multiply it by a gain below 1."""
    return 1 - 2 / (tl.exp(2 * x) + 1)


@triton.jit
def one_minus_power(beta, t):
    """1 - beta^t for beta in [0, 1), t >= 0, relative error below 2e-6 also where beta is close to 1."""
    # log(beta) = 2 artanh(z): tl.log has an absolute error of about 1e-7, too much for log(.99999).
    z = (beta - 1) / (beta + 1)
    z2 = z * z
    series = 2 * z * (1 + z2 * (1 / 3 + z2 * (1 / 5 + z2 * (1 / 7 + z2 * (1 / 9 + z2 / 11)))))
    y = t * tl.where(beta > 0.5, series, tl.log(tl.maximum(beta, 1e-30)))
    # 1 - exp(y), by its series where the difference would cancel.
    small = -y * (1 + y * (1 / 2 + y * (1 / 6 + y * (1 / 24 + y * (1 / 120 + y * (1 / 720 + y / 5040))))))
    return tl.where(y > -0.5, small, 1 - tl.exp(y))


@triton.jit
def clamp(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def control_kernel(
    control,  # fp32 (rows, NUM_SLOTS)
    telemetry,  # fp32 (partials, 4)
    partials,
    loss_pointer,  # fp32 (1,)
    found_inf,  # fp32 (1,)
    LAW: tl.constexpr,
    HAS_LOSS: tl.constexpr,
    HAS_FOUND_INF: tl.constexpr,
    LAYOUT: tl.constexpr,
    PARTIALS: tl.constexpr,
):
    slots = control + tl.program_id(0) * L.NUM_SLOTS
    sum_pow, sum_sq, max_abs, nonfinite = sum_partials(telemetry, 0, partials, PARTIALS)
    norm = tl.sqrt(sum_sq)
    good = (nonfinite == 0) & (sum_pow + sum_sq < float("inf"))
    loss = float("nan")
    if HAS_LOSS:
        loss = tl.load(loss_pointer)
        good = good & (tl.abs(loss) < float("inf"))
    if HAS_FOUND_INF:
        good = good & (tl.load(found_inf) <= 0)

    step = tl.load(slots + L.STEP) + 1
    age = tl.load(slots + L.AGE) + 1
    skipped = tl.load(slots + L.SKIPPED)
    guard = tl.load(slots + L.GUARD) > 0
    lr = tl.load(slots + L.LR)
    scale = tl.load(slots + L.LR_SCALE)
    v_fast = tl.load(slots + L.V_FAST)
    v_slow = tl.load(slots + L.V_SLOW)

    # The signal: sum g^2 in stability_v1, else the gamma-norm (eq 1).
    exponent = 1 / tl.load(slots + L.GAMMA)
    gamma_norm = tl.where(sum_pow > 0, tl.exp2(tl.log2(tl.where(sum_pow > 0, sum_pow, 1.0)) * exponent), 0.0)
    if LAW == L.STABILITY_V1:
        sigma = sum_sq
        outlier_ratio = L.OUTLIER_RATIO * L.OUTLIER_RATIO
    else:
        sigma = gamma_norm
        outlier_ratio = L.OUTLIER_RATIO
    started = step > 1
    level = tl.where(started, v_fast / one_minus_power(L.ALPHA_FAST, tl.maximum(step - 1, 1)), 0.0)
    outlier = guard & (level > 0) & (sigma > outlier_ratio * level)
    outliers = tl.where(outlier, tl.load(slots + L.OUTLIERS) + 1, 0.0)
    sigma = tl.where(outlier & (outliers <= L.OUTLIER_PATIENCE), level, sigma)

    # Dual EMA (eq 2, 3), history correction
    v_fast = L.ALPHA_FAST * v_fast + (1 - L.ALPHA_FAST) * sigma
    v_slow = L.ALPHA_SLOW * v_slow + (1 - L.ALPHA_SLOW) * sigma
    k = tl.arange(0, 16)
    recent = tl.load(
        slots + L.FAST_HISTORY + k - 1, mask=(k >= 1) & (k < L.FAST_HISTORY_LEN), other=0.0
    )
    fast_history = tl.where(k == 0, v_fast, recent)
    if LAW != L.STABILITY_V1:
        weights = tl.where((k < L.FAST_HISTORY_LEN) & (k < step), tl.exp(-k.to(tl.float32) / L.HISTORY_DECAY), 0.0)
        history = tl.sum(weights * fast_history, axis=0) / tl.sum(weights, axis=0)
        v_fast = v_fast + L.HISTORY_GAIN * (history - v_fast)
    j = tl.arange(0, 64)
    older = tl.load(slots + L.META_HISTORY + j - 1, mask=(j >= 1) & (j < L.META_HISTORY_LEN), other=0.0)
    meta_history = tl.where(j == 0, v_fast, older)

    # Curvature (eq 4, 5)
    curvature = tl.load(slots + L.CURVATURE)
    prev_loss = tl.load(slots + L.PREV_LOSS)
    loss_seen = 0.0
    if HAS_LOSS:
        c = (loss - prev_loss) / (tl.load(slots + L.PREV_NORM) + L.EPS_RATIO)
        c_ema = L.ALPHA_CURVATURE * curvature + (1 - L.ALPHA_CURVATURE) * c
        curvature = tl.where(tl.load(slots + L.LOSS_SEEN) > 0, c_ema, curvature)
        prev_loss = loss
        loss_seen = 1.0

    phase = v_fast / (v_fast + v_slow + L.EPS_RATIO)  # eq 6
    error = v_fast - v_slow
    pd = L.KP * error + L.KD * (error - tl.load(slots + L.ERROR))
    meta_beta2 = tl.load(slots + L.META_BETA2)
    warnings = tl.load(slots + L.WARNINGS)
    cooldown = tl.load(slots + L.COOLDOWN)
    warning = 0.0

    if LAW == L.STABILITY_V1:
        factor = tl.where(phase > L.V1_PHASE_HIGH, 1 - L.V1_DECAY * phase, 1.0)
        factor = tl.where(phase < L.V1_PHASE_LOW, 1 + L.V1_RECOVERY * (1 - phase), factor)
        lr_out = lr * factor
        beta1 = tl.load(slots + L.BETA1) * 0 + L.V1_BETA1
        beta2 = tl.load(slots + L.BETA2) * (1 + L.BETA2_GAIN * tanh(pd / L.V1_TAU))
        beta2 = clamp(beta2, L.V2_BETA2_MIN, L.V2_BETA2_MAX)
        threshold = float("inf")
    else:
        gain = tanh((curvature - L.BETA1_CENTER) / L.BETA1_WIDTH)
        beta1 = clamp(tl.load(slots + L.BETA1) * (1 + L.BETA1_GAIN * gain), L.V2_BETA1_MIN, L.V2_BETA1_MAX)
        threshold = L.CLIP_BASE * (1 + L.CLIP_GAIN * tl.sqrt(v_fast / (v_slow + L.EPS_RATIO)))
        corrected_slow = v_slow / one_minus_power(L.ALPHA_SLOW, step)
        ratio = v_fast / one_minus_power(L.ALPHA_FAST, step) / (corrected_slow + L.EPS_RATIO)
        warning = tl.where(ratio > L.WARN_SURGE_RATIO, L.WARN_SURGE, 0.0)
        warning += tl.where(tl.abs(curvature) > L.WARN_CURVATURE_LEVEL, L.WARN_CURVATURE, 0.0)
        alarm = warning >= L.WARNING_LEVEL - 1e-6
        warnings += tl.where(alarm, 1.0, 0.0)
        if LAW == L.STABILITY_V2:
            phase = phase * (1 + L.V2_PHASE_CURVATURE * tanh(curvature))
            temperature = tl.where(error > 0, L.V2_TEMPERATURE_UP, L.V2_TEMPERATURE_EQUAL)
            temperature = tl.where(error < 0, L.V2_TEMPERATURE_DOWN, temperature)
            beta2 = tl.load(slots + L.BETA2) * (1 + L.BETA2_GAIN * tanh(pd / temperature))
            beta2 = clamp(beta2, L.V2_BETA2_MIN, L.V2_BETA2_MAX)
            decay = tl.exp(-L.V2_DECAY * (phase - L.V2_PHASE_HIGH))
            recovery = 1 + L.V2_RECOVERY * (L.V2_PHASE_HIGH - phase)
            scale = scale * tl.where(phase > L.V2_PHASE_HIGH, decay, 1.0)
            scale = scale * tl.where(phase < L.V2_PHASE_LOW, recovery, 1.0)
            scale_max = tl.load(slots + L.SCALE_MAX)
            emergency = alarm & guard & (scale_max < float("inf")) & (cooldown <= 0)
            scale = tl.where(emergency, L.EMERGENCY_SCALE * scale, scale)
            beta2 = tl.where(emergency, tl.minimum(beta2 + L.EMERGENCY_BETA2, L.V2_BETA2_MAX), beta2)
            cooldown = tl.where(emergency, tl.load(slots + L.META_INTERVAL), tl.maximum(cooldown - 1, 0.0))
            scale = clamp(scale, tl.load(slots + L.SCALE_MIN), scale_max)
            lr_out = lr * scale
        else:
            lr_out = lr * scale * (1 - L.PHASE_THROTTLE * phase)
            bounded = clamp(lr_out, tl.load(slots + L.LR_MIN), tl.load(slots + L.LR_MAX))
            lr_out = tl.where(lr > 0, bounded, lr_out)
            beta2 = clamp(meta_beta2 * (1 - L.PHASE_BETA2 * phase), L.META_BETA2_MIN, L.META_BETA2_MAX)
    clip = tl.minimum(threshold / (norm + L.CLIP_EPS), 1.0)

    # Everything has been read: what follows overwrites it, and other warps may lag behind.
    tl.debug_barrier()
    tl.store(slots + L.SKIPPED, skipped + tl.where(good, 0.0, 1.0))
    tl.store(slots + L.SKIP, tl.where(good, 0.0, 1.0))
    tl.store(slots + L.GRAD_NORM, norm)
    tl.store(slots + L.NONFINITE, nonfinite)
    if good:
        tl.store(slots + L.STEP, step)
        tl.store(slots + L.AGE, age)
        tl.store(slots + L.V_FAST, v_fast)
        tl.store(slots + L.V_SLOW, v_slow)
        tl.store(slots + L.CURVATURE, curvature)
        tl.store(slots + L.PREV_LOSS, prev_loss)
        tl.store(slots + L.PREV_NORM, norm)
        tl.store(slots + L.LOSS_SEEN, loss_seen)
        tl.store(slots + L.ERROR, error)
        tl.store(slots + L.LR_SCALE, scale)
        tl.store(slots + L.OUTLIERS, outliers)
        tl.store(slots + L.WARNINGS, warnings)
        tl.store(slots + L.COOLDOWN, cooldown)
        tl.store(slots + L.FAST_HISTORY + k, fast_history, mask=k < L.FAST_HISTORY_LEN)
        tl.store(slots + L.META_HISTORY + j, meta_history, mask=j < L.META_HISTORY_LEN)
        tl.store(slots + L.LR_OUT, lr_out)
        tl.store(slots + L.BETA1_OUT, beta1)
        tl.store(slots + L.BETA2_OUT, beta2)
        tl.store(slots + L.CLIP_THRESHOLD, threshold)
        tl.store(slots + L.CLIP_COEF, clip)
        tl.store(slots + L.PHASE, phase)
        tl.store(slots + L.GAMMA_NORM, gamma_norm)
        tl.store(slots + L.MAX_GRAD, max_abs)
        tl.store(slots + L.WARNING, warning)
        tl.store(slots + L.BIAS_CORRECTION1, one_minus_power(beta1, age))
        tl.store(slots + L.BIAS_CORRECTION2_SQRT, tl.sqrt(one_minus_power(beta2, age)))
        tl.store(slots + L.LOSS, loss)


@torch.no_grad()
def control_step(
    control: Tensor,
    telemetry: Tensor,
    loss: Tensor | None = None,
    *,
    law: str = "meta3",
    found_inf: Tensor | None = None,
) -> None:
    """One step of the law, in place; arguments and errors as `reference.control_step`."""
    if law not in L.LAWS:
        raise ValueError(f"unknown law {law!r}; expected one of {', '.join(L.LAWS)}")
    if control.dim() != 2 or control.shape[1] != L.NUM_SLOTS or telemetry.shape[-1:] != (L.NUM_TELEMETRY,):
        raise ValueError(
            f"control has shape {tuple(control.shape)} and telemetry {tuple(telemetry.shape)}; "
            f"expected (num_rows, {L.NUM_SLOTS}) and ({L.NUM_TELEMETRY},) or (n, {L.NUM_TELEMETRY})"
        )
    if not control.is_contiguous():
        raise ValueError("control is not contiguous; expected one contiguous float32 tensor")
    with on_device(control.device):
        launch(
            control_kernel,
            len(control),
            control,
            telemetry.contiguous(),
            telemetry.numel() // L.NUM_TELEMETRY,
            control if loss is None else loss,
            control if found_inf is None else found_inf,
            LAW=L.LAWS[law],
            HAS_LOSS=loss is not None,
            HAS_FOUND_INF=found_inf is not None,
            LAYOUT=LAYOUT_KEY,
            PARTIALS=PARTIALS_AT_ONCE,
        )
