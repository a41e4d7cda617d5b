"""The per-step law: what the statistics of a step make of learning rate, betas and clipping (white paper eq 2-7).

docs/laws.md has the equations, layout.py the slots and constants. `step_law` is the specification; the Triton kernel
behind it does the same in one program per row, after adding the telemetry's partial sums in a fixed order, and the
host reads nothing of it. There tanh, log and expm1 are built from exp and sqrt, because libdevice has no
interpreter; their errors stand beside them. backends/native.cpp has the law once more, for the CPU.

The gradients are those that were stored, multiplied by a GradScaler's factor where there is one: it is taken out
here, once, of the statistics and of GRAD_FACTOR, by which the update multiplies every gradient. Where every tensor is
clipped by itself (clipping.py), programs behind those of the rows do that, after judging the step as those do.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

import functools
import math
from typing import Any

import torch
from torch import Tensor

from .._triton import HAS_TRITON
from ..launch import launch, on_device
from . import layout as L
from .clipping import TensorClip, tensor_law
from .telemetry import PARTIALS_AT_ONCE, combine


def control_inputs(
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    gamma: float = 1.5,
    meta_lr_eta: float = 0.05,
    meta_lr_beta2: float = 0.03,
    meta_interval: int = 10,
    bounds: tuple[float, float] | None = (0.1, 4.0),
    guard: bool = True,
    maximize: bool = False,
    seed: int = 0,
) -> list[float]:
    """The inputs of a control row in the order of their slots: what `control[row, :NUM_INPUTS]` has to hold.

    bounds: of the controller's multiplier LR_SCALE. None: no such bounds, and meta3's learning rate within the
    PyPI package's own clamp. The others are `CruxyOptimizer`'s arguments.
    """
    values = {
        L.LR: lr,
        L.WEIGHT_DECAY: weight_decay,
        L.BETA1: betas[0],
        L.BETA2: betas[1],
        L.EPS: eps,
        L.GAMMA: gamma,
        L.META_LR_ETA: meta_lr_eta,
        L.META_LR_BETA2: meta_lr_beta2,
        L.META_INTERVAL: meta_interval,
        L.SCALE_MIN: -math.inf if bounds is None else bounds[0],
        L.SCALE_MAX: math.inf if bounds is None else bounds[1],
        L.LR_MIN: L.SDK_LR_MIN if bounds is None else -math.inf,
        L.LR_MAX: L.SDK_LR_MAX if bounds is None else math.inf,
        L.GUARD: guard,
        L.MAXIMIZE: maximize,
        L.SEED: seed,
    }
    return [float(values[slot]) for slot in range(L.NUM_INPUTS)]


def new_control(rows: int = 1, *, device: torch.device | str = "cpu", **inputs: Any) -> Tensor:
    """A control vector before its first step: float32 (rows, layout.NUM_SLOTS), all rows with the same inputs.

    inputs: those of `control_inputs`: lr, betas, eps, weight_decay, gamma, meta_lr_eta, meta_lr_beta2,
    meta_interval, bounds, guard, maximize, seed.
    """
    row = torch.zeros(L.NUM_SLOTS)
    row[: L.NUM_INPUTS] = torch.tensor(control_inputs(**inputs))
    row[L.LR_SCALE] = 1
    row[L.META_BETA2] = row[L.BETA2]
    return row.to(device).expand(rows, -1).contiguous()


@functools.lru_cache(maxsize=8)
def _history_weights(device: torch.device) -> tuple[Tensor, Tensor]:
    k = torch.arange(L.FAST_HISTORY_LEN, device=device, dtype=torch.float32)
    return k, torch.exp(-k / L.HISTORY_DECAY)


def bias_corrections(beta1: Tensor, beta2: Tensor, age: Tensor) -> tuple[Tensor, Tensor]:
    """`1 - beta1^t` and `sqrt(1 - beta2^t)` at t = `age`; all of shape (num_rows,)."""
    # -expm1(t log beta) keeps 1 - beta^t exact to fp32 where beta is close to 1.
    return -torch.expm1(age * beta1.log()), (-torch.expm1(age * beta2.log())).sqrt()


def phase_modulation(
    lr: Tensor, scale: Tensor, beta2: Tensor, phase: Tensor, lr_min: Tensor, lr_max: Tensor
) -> tuple[Tensor, Tensor]:
    """What meta3 hands to the update: `lr s (1 - .5 phi)` (paper eq 7) and `beta2 (1 - .3 phi)`, bounded.

    All arguments and both results have the shape (num_rows,). A learning rate of 0 stays 0.
    """
    lr_out = lr * scale * (1 - L.PHASE_THROTTLE * phase)
    lr_out = torch.where(lr > 0, lr_out.clamp(lr_min, lr_max), lr_out)
    beta2_out = (beta2 * (1 - L.PHASE_BETA2 * phase)).clamp(L.META_BETA2_MIN, L.META_BETA2_MAX)
    return lr_out, beta2_out


def write_log(control: Tensor, log: Tensor) -> None:
    """Copies row 0 to the place of its step in `log`, (n, NUM_SLOTS), which starts again when it is full."""
    row = control[0]
    turn = torch.remainder(row[L.STEP] + row[L.SKIPPED] - 1, len(log)).long()
    log.index_copy_(0, turn.reshape(1), row[None])


def refresh(control: Tensor, log: Tensor | None = None) -> None:
    """meta3's outputs anew, after a controller has moved LR_SCALE or META_BETA2; nothing in a skipped step."""
    slot = control.unbind(1)
    lr_out, beta2 = phase_modulation(
        slot[L.LR], slot[L.LR_SCALE], slot[L.META_BETA2], slot[L.PHASE], slot[L.LR_MIN], slot[L.LR_MAX]
    )
    _, correction2_sqrt = bias_corrections(slot[L.BETA1_OUT], beta2, slot[L.AGE])
    for index, value in ((L.LR_OUT, lr_out), (L.BETA2_OUT, beta2), (L.BIAS_CORRECTION2_SQRT, correction2_sqrt)):
        control[:, index] = torch.where(slot[L.SKIP] > 0, slot[index], value)
    if log is not None:
        write_log(control, log)


def step_law(
    control: Tensor,
    telemetry: Tensor,
    loss: Tensor | None,
    law: str,
    found_inf: Tensor | None,
    grad_scale: Tensor | None,
    log: Tensor | None = None,
    clip: str | TensorClip | None = "global",
) -> None:
    """The specification of `dispatch.control_step`, in place; same arguments."""
    slot = control[:, : L.FAST_HISTORY].unbind(1)
    sum_pow, sum_sq, max_abs, nonfinite = (telemetry if telemetry.dim() == 1 else combine(telemetry)).unbind(0)
    gamma, factor, inverse = slot[L.GAMMA], 1 - 2 * slot[L.MAXIMIZE], 1.0
    if grad_scale is not None:
        inverse = grad_scale.reshape(()).to(control).reciprocal()
        sum_pow, sum_sq, max_abs = sum_pow * inverse**gamma, sum_sq * inverse.square(), max_abs * inverse
        factor = factor * inverse
    norm = sum_sq.sqrt()

    bad = (nonfinite > 0) | ~(sum_pow + sum_sq < math.inf).all()
    if loss is not None:
        bad = bad | ~loss.isfinite()
    if found_inf is not None:
        bad = bad | (found_inf.reshape(()) > 0)
    step, age = slot[L.STEP] + 1, slot[L.AGE] + 1
    guard = slot[L.GUARD] > 0

    # The signal: sum g^2 in stability_v1, else the gamma-norm (eq 1).
    v1 = law == "stability_v1"
    gamma_norm = sum_pow ** gamma.reciprocal()
    sigma = sum_sq.expand_as(step) if v1 else gamma_norm
    v_fast, v_slow = slot[L.V_FAST], slot[L.V_SLOW]
    level = v_fast / (1 - L.ALPHA_FAST ** slot[L.STEP])  # NaN before the first step: no outlier then
    outlier = guard & (sigma > (L.OUTLIER_RATIO**2 if v1 else L.OUTLIER_RATIO) * level) & (level > 0)
    outliers = (slot[L.OUTLIERS] + 1) * outlier
    sigma = torch.where(outlier & (outliers <= L.OUTLIER_PATIENCE), level, sigma)

    # Dual EMA (eq 2, 3)
    v_fast = torch.lerp(sigma, v_fast, L.ALPHA_FAST)  # alpha v + (1 - alpha) sigma
    v_slow = torch.lerp(sigma, v_slow, L.ALPHA_SLOW)
    k, weights = _history_weights(control.device)
    fast_history = torch.cat((v_fast[:, None], control[:, L.FAST_HISTORY : L.FAST_HISTORY + L.FAST_HISTORY_LEN - 1]), 1)
    if not v1:  # history correction
        weights = weights * (k < step[:, None])
        h = (weights * fast_history).sum(1) / weights.sum(1)
        v_fast = v_fast + L.HISTORY_GAIN * (h - v_fast)
    meta_history = torch.cat((v_fast[:, None], control[:, L.META_HISTORY : L.META_HISTORY + L.META_HISTORY_LEN - 1]), 1)

    # Curvature (eq 4, 5)
    curvature, prev_loss, loss_seen = slot[L.CURVATURE], slot[L.PREV_LOSS], torch.zeros_like(step)
    if loss is not None:
        c = (loss - prev_loss) / (slot[L.PREV_NORM] + L.EPS_RATIO)
        c_ema = torch.lerp(c, curvature, L.ALPHA_CURVATURE)
        curvature = torch.where(slot[L.LOSS_SEEN] > 0, c_ema, curvature)
        prev_loss, loss_seen = loss.expand_as(step), torch.ones_like(step)

    phase = v_fast / (v_fast + v_slow + L.EPS_RATIO)  # eq 6
    error = v_fast - v_slow
    pd = L.KP * error + L.KD * (error - slot[L.ERROR])
    scale, meta_beta2 = slot[L.LR_SCALE], slot[L.META_BETA2]
    warning, warnings, cooldown = torch.zeros_like(step), slot[L.WARNINGS], slot[L.COOLDOWN]
    trend = torch.zeros_like(step)

    if v1:
        throttle = torch.where(phase > L.V1_PHASE_HIGH, 1 - L.V1_DECAY * phase, 1.0)
        throttle = torch.where(phase < L.V1_PHASE_LOW, 1 + L.V1_RECOVERY * (1 - phase), throttle)
        lr_out = slot[L.LR] * throttle
        beta1_out = torch.full_like(step, L.V1_BETA1)
        beta2_out = slot[L.BETA2] * (1 + L.BETA2_GAIN * torch.tanh(pd / L.V1_TAU))
        beta2_out = beta2_out.clamp(L.V2_BETA2_MIN, L.V2_BETA2_MAX)
        threshold = torch.full_like(step, math.inf)
    else:
        beta1_out = slot[L.BETA1] * (1 + L.BETA1_GAIN * torch.tanh((curvature - L.BETA1_CENTER) / L.BETA1_WIDTH))
        beta1_out = beta1_out.clamp(L.V2_BETA1_MIN, L.V2_BETA1_MAX)
        threshold = L.CLIP_BASE * (1 + L.CLIP_GAIN * (v_fast / (v_slow + L.EPS_RATIO)).sqrt())
        ratio = (v_fast / (1 - L.ALPHA_FAST**step)) / (v_slow / (1 - L.ALPHA_SLOW**step) + L.EPS_RATIO)
        surge, steep = ratio > L.WARN_SURGE_RATIO, curvature.abs() > L.WARN_CURVATURE_LEVEL
        warning = L.WARN_SURGE * surge + L.WARN_CURVATURE * steep
        alarm = warning >= L.WARNING_LEVEL - 1e-6
        warnings = warnings + alarm
        if law == "stability_v2":
            phase = phase * (1 + L.V2_PHASE_CURVATURE * torch.tanh(curvature))
            temperature = torch.where(error > 0, L.V2_TEMPERATURE_UP, L.V2_TEMPERATURE_EQUAL)
            temperature = torch.where(error < 0, L.V2_TEMPERATURE_DOWN, temperature)
            beta2_out = slot[L.BETA2] * (1 + L.BETA2_GAIN * torch.tanh(pd / temperature))
            beta2_out = beta2_out.clamp(L.V2_BETA2_MIN, L.V2_BETA2_MAX)
            decay = torch.exp(-L.V2_DECAY * (phase - L.V2_PHASE_HIGH))
            recovery = 1 + L.V2_RECOVERY * (L.V2_PHASE_HIGH - phase)
            scale = scale + guard * L.V2_RELAXATION * (1 - scale)
            scale = scale * torch.where(phase > L.V2_PHASE_HIGH, decay, 1.0)
            scale = scale * torch.where(phase < L.V2_PHASE_LOW, recovery, 1.0)
            emergency = alarm & guard & (slot[L.SCALE_MAX] < math.inf) & (cooldown <= 0)
            scale = torch.where(emergency, L.EMERGENCY_SCALE * scale, scale)
            beta2_out = torch.where(emergency, (beta2_out + L.EMERGENCY_BETA2).clamp(max=L.V2_BETA2_MAX), beta2_out)
            cooldown = torch.where(emergency, slot[L.META_INTERVAL], (cooldown - 1).clamp(min=0))
            scale = scale.clamp(slot[L.SCALE_MIN], slot[L.SCALE_MAX])
            lr_out = slot[L.LR] * scale
        else:
            lr_out, beta2_out = phase_modulation(slot[L.LR], scale, meta_beta2, phase, slot[L.LR_MIN], slot[L.LR_MAX])
            # The slow loop's signal (eq 8, 9), for controllers that act in every META_INTERVAL-th call.
            sigma_ref = meta_history.sum(1) / step.clamp(max=L.META_HISTORY_LEN)
            z = (v_fast - sigma_ref) / (sigma_ref + L.META_EPS)
            due = (torch.remainder(step + slot[L.SKIPPED], slot[L.META_INTERVAL]) == 0) & (step >= 2)
            trend = torch.tanh(z) * due
    if clip != "global":
        threshold = torch.full_like(step, math.inf)
    coefficient = (threshold / (norm + L.CLIP_EPS)).clamp(max=1.0)
    correction1, correction2_sqrt = bias_corrections(beta1_out, beta2_out, age)

    new = {
        L.STEP: step, L.AGE: age, L.SKIPPED: slot[L.SKIPPED], L.V_FAST: v_fast, L.V_SLOW: v_slow,
        L.CURVATURE: curvature, L.PREV_LOSS: prev_loss, L.PREV_NORM: norm, L.LOSS_SEEN: loss_seen, L.ERROR: error,
        L.LR_SCALE: scale, L.META_BETA2: meta_beta2, L.OUTLIERS: outliers, L.WARNINGS: warnings, L.COOLDOWN: cooldown,
        L.TREND: trend,
        L.LR_OUT: lr_out, L.BETA1_OUT: beta1_out, L.BETA2_OUT: beta2_out, L.CLIP_THRESHOLD: threshold,
        L.CLIP_COEF: coefficient, L.PHASE: phase, L.GAMMA_NORM: gamma_norm, L.MAX_GRAD: max_abs, L.WARNING: warning,
        L.BIAS_CORRECTION1: correction1, L.BIAS_CORRECTION2_SQRT: correction2_sqrt, L.GRAD_FACTOR: coefficient * factor,
        L.LOSS: torch.full_like(step, math.nan) if loss is None else loss,
    }  # fmt: skip
    zero = torch.zeros_like(step)

    def columns(first: int, last: int) -> Tensor:
        return torch.stack([new.get(slot, zero).expand_as(step) for slot in range(first, last)], 1)

    after = torch.cat(
        (columns(L.NUM_INPUTS, L.FAST_HISTORY), fast_history, meta_history, columns(L.OUTPUTS, L.NUM_SLOTS)), 1
    )
    torch.where(bad, control[:, L.NUM_INPUTS :], after, out=control[:, L.NUM_INPUTS :])
    slot[L.SKIPPED].add_(bad)
    control[:, L.SKIP].copy_(bad)
    control[:, L.TREND].mul_(~bad)
    control[:, L.GRAD_NORM].copy_(norm)
    control[:, L.NONFINITE].copy_(nonfinite)
    if isinstance(clip, TensorClip):
        tensor_law(clip, telemetry, norm, inverse, bad)
    if log is not None:
        write_log(control, log)


if HAS_TRITON:
    import triton
    import triton.language as tl

    from .clipping import clip_tensor
    from .telemetry import sum_partials

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
    def modulate(slots, lr, scale, meta_beta2, phase):
        """`phase_modulation`."""
        lr_out = lr * scale * (1 - L.PHASE_THROTTLE * phase)
        bounded = clamp(lr_out, tl.load(slots + L.LR_MIN), tl.load(slots + L.LR_MAX))
        beta2 = clamp(meta_beta2 * (1 - L.PHASE_BETA2 * phase), L.META_BETA2_MIN, L.META_BETA2_MAX)
        return tl.where(lr > 0, bounded, lr_out), beta2

    @triton.jit
    def write_log_kernel(slots, log, log_length):
        """`write_log`, by the program of row 0."""
        if tl.program_id(0) == 0:
            tl.debug_barrier()
            count = tl.load(slots + L.STEP) + tl.load(slots + L.SKIPPED)
            turn = (count.to(tl.int32) - 1) % log_length
            slot = tl.arange(0, 128)
            row = tl.load(slots + slot, mask=slot < L.NUM_SLOTS)
            tl.store(log + turn * L.NUM_SLOTS + slot, row, mask=slot < L.NUM_SLOTS)

    @triton.jit(do_not_specialize=["log_length"])
    def refresh_kernel(control, log, log_length, HAS_LOG: tl.constexpr, LAYOUT: tl.constexpr):
        """`refresh`: one program per row."""
        slots = control + tl.program_id(0) * L.NUM_SLOTS
        lr = tl.load(slots + L.LR)
        scale = tl.load(slots + L.LR_SCALE)
        lr_out, beta2 = modulate(slots, lr, scale, tl.load(slots + L.META_BETA2), tl.load(slots + L.PHASE))
        correction = tl.sqrt(one_minus_power(beta2, tl.load(slots + L.AGE)))
        if tl.load(slots + L.SKIP) == 0:
            tl.store(slots + L.LR_OUT, lr_out)
            tl.store(slots + L.BETA2_OUT, beta2)
            tl.store(slots + L.BIAS_CORRECTION2_SQRT, correction)
        if HAS_LOG:
            write_log_kernel(slots, log, log_length)

    @triton.jit
    def row_law(
        slots, sum_pow, sum_sq, max_abs, nonfinite, norm, loss, gamma, factor, good, log, log_length,
        LAW: tl.constexpr, HAS_LOSS: tl.constexpr, HAS_LOG: tl.constexpr, CLIP_GLOBAL: tl.constexpr,
    ):  # fmt: skip
        """The law of one row, from statistics that are unscaled."""
        step = tl.load(slots + L.STEP) + 1
        age = tl.load(slots + L.AGE) + 1
        skipped = tl.load(slots + L.SKIPPED)
        guard = tl.load(slots + L.GUARD) > 0
        lr = tl.load(slots + L.LR)
        scale = tl.load(slots + L.LR_SCALE)
        v_fast = tl.load(slots + L.V_FAST)
        v_slow = tl.load(slots + L.V_SLOW)

        # The signal: sum g^2 in stability_v1, else the gamma-norm (eq 1).
        exponent = 1 / gamma
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
        recent = tl.load(slots + L.FAST_HISTORY + k - 1, mask=(k >= 1) & (k < L.FAST_HISTORY_LEN), other=0.0)
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
        trend = 0.0

        if LAW == L.STABILITY_V1:
            throttle = tl.where(phase > L.V1_PHASE_HIGH, 1 - L.V1_DECAY * phase, 1.0)
            throttle = tl.where(phase < L.V1_PHASE_LOW, 1 + L.V1_RECOVERY * (1 - phase), throttle)
            lr_out = lr * throttle
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
                scale += tl.where(guard, L.V2_RELAXATION * (1 - scale), 0.0)
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
                lr_out, beta2 = modulate(slots, lr, scale, meta_beta2, phase)
                # The slow loop's signal (eq 8, 9).
                total = tl.sum(tl.where(j < L.META_HISTORY_LEN, meta_history, 0.0), axis=0)
                sigma_ref = total / tl.minimum(step, L.META_HISTORY_LEN)
                calls = (step + skipped).to(tl.int32)
                due = (calls % tl.load(slots + L.META_INTERVAL).to(tl.int32) == 0) & (step >= 2)
                trend = tl.where(due, tanh((v_fast - sigma_ref) / (sigma_ref + L.META_EPS)), 0.0)
        if not CLIP_GLOBAL:
            threshold = float("inf")
        clip = tl.minimum(threshold / (norm + L.CLIP_EPS), 1.0)

        # Everything has been read: what follows overwrites it, and other warps may lag behind.
        tl.debug_barrier()
        tl.store(slots + L.SKIPPED, skipped + tl.where(good, 0.0, 1.0))
        tl.store(slots + L.SKIP, tl.where(good, 0.0, 1.0))
        tl.store(slots + L.TREND, tl.where(good, trend, 0.0))
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
            tl.store(slots + L.GRAD_FACTOR, clip * factor)
            tl.store(slots + L.PHASE, phase)
            tl.store(slots + L.GAMMA_NORM, gamma_norm)
            tl.store(slots + L.MAX_GRAD, max_abs)
            tl.store(slots + L.WARNING, warning)
            tl.store(slots + L.BIAS_CORRECTION1, one_minus_power(beta1, age))
            tl.store(slots + L.BIAS_CORRECTION2_SQRT, tl.sqrt(one_minus_power(beta2, age)))
            tl.store(slots + L.LOSS, loss)
        if HAS_LOG:
            write_log_kernel(slots, log, log_length)

    @triton.jit(
        do_not_specialize=["partials", "rows", "log_length"],
        do_not_specialize_on_alignment=["loss_pointer", "found_inf", "grad_scale"],
    )
    def control_kernel(
        control,  # fp32 (rows, NUM_SLOTS)
        telemetry,  # fp32 (partials, 4)
        partials,
        loss_pointer,  # fp32 (1,)
        found_inf,  # fp32 (1,)
        grad_scale,  # fp32 (1,)
        log,  # fp32 (log_length, NUM_SLOTS)
        log_length,
        rows,
        history,  # of TensorClip, as the three that follow
        index,
        spans,
        factors,
        LAW: tl.constexpr,
        HAS_LOSS: tl.constexpr,
        HAS_FOUND_INF: tl.constexpr,
        HAS_GRAD_SCALE: tl.constexpr,
        HAS_LOG: tl.constexpr,
        CLIP_GLOBAL: tl.constexpr,
        CLIP_TENSORS: tl.constexpr,
        HAS_SPANS: tl.constexpr,
        LAYOUT: tl.constexpr,
        PARTIALS: tl.constexpr,
    ):
        """A program per row and, with CLIP_TENSORS, behind them one per tensor."""
        program = tl.program_id(0)
        slots = control + program * L.NUM_SLOTS
        if CLIP_TENSORS:  # a tensor's program reads the settings of the first row, which are all rows' here
            slots = control + tl.where(program < rows, program, 0) * L.NUM_SLOTS
        sum_pow, sum_sq, max_abs, nonfinite = sum_partials(telemetry, 0, partials, PARTIALS)
        gamma = tl.load(slots + L.GAMMA)
        factor = 1 - 2 * tl.load(slots + L.MAXIMIZE)
        inverse = 1.0
        if HAS_GRAD_SCALE:
            inverse = 1 / tl.load(grad_scale)
            sum_pow = sum_pow * tl.exp2(gamma * tl.log2(inverse))
            sum_sq = sum_sq * inverse * inverse
            max_abs = max_abs * inverse
            factor = factor * inverse
        norm = tl.sqrt(sum_sq)
        good = (nonfinite == 0) & (sum_pow + sum_sq < float("inf"))
        loss = float("nan")
        if HAS_LOSS:
            loss = tl.load(loss_pointer)
            good = good & (tl.abs(loss) < float("inf"))
        if HAS_FOUND_INF:
            good = good & (tl.load(found_inf) <= 0)
        if CLIP_TENSORS:
            if program >= rows:
                clip_tensor(
                    program - rows, telemetry, history, index, spans, factors, norm, inverse, good, HAS_SPANS, PARTIALS
                )
            else:
                row_law(
                    slots, sum_pow, sum_sq, max_abs, nonfinite, norm, loss, gamma, factor, good, log, log_length,
                    LAW, HAS_LOSS, HAS_LOG, CLIP_GLOBAL,
                )  # fmt: skip
        else:
            row_law(
                slots, sum_pow, sum_sq, max_abs, nonfinite, norm, loss, gamma, factor, good, log, log_length,
                LAW, HAS_LOSS, HAS_LOG, CLIP_GLOBAL,
            )  # fmt: skip


def launch_control(
    control: Tensor,
    telemetry: Tensor,
    loss: Tensor | None,
    law: str,
    found_inf: Tensor | None,
    grad_scale: Tensor | None,
    log: Tensor | None = None,
    clip: str | TensorClip | None = "global",
) -> None:
    """`dispatch.control_step` by the kernel; same arguments."""
    tensors = clip if isinstance(clip, TensorClip) else None
    with on_device(control.device):
        launch(
            control_kernel,
            len(control) + (0 if tensors is None else len(tensors.factors)),
            control,
            telemetry,
            telemetry.numel() // L.NUM_TELEMETRY,
            control if loss is None else loss,
            control if found_inf is None else found_inf,
            control if grad_scale is None else grad_scale,
            control if log is None else log,
            1 if log is None else len(log),
            len(control),
            control if tensors is None else tensors.history,
            control if tensors is None else tensors.index,
            control if tensors is None or tensors.spans is None else tensors.spans,
            control if tensors is None else tensors.factors,
            LAW=L.LAWS[law],
            HAS_LOSS=loss is not None,
            HAS_FOUND_INF=found_inf is not None,
            HAS_GRAD_SCALE=grad_scale is not None,
            HAS_LOG=log is not None,
            CLIP_GLOBAL=clip == "global",
            CLIP_TENSORS=tensors is not None,
            HAS_SPANS=tensors is not None and tensors.spans is not None,
            LAYOUT=L.KEY,
            PARTIALS=PARTIALS_AT_ONCE,
        )


def launch_refresh(control: Tensor, log: Tensor | None) -> None:
    """`refresh` by the kernel."""
    with on_device(control.device):
        launch(
            refresh_kernel,
            len(control),
            control,
            control if log is None else log,
            1 if log is None else len(log),
            HAS_LOG=log is not None,
            LAYOUT=L.KEY,
        )
