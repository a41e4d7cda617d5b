"""Every kernel in plain PyTorch: the oracle of the Triton kernels, and the path where Triton does not run.

A step is three calls, `gradient_telemetry` -> `control_step` -> `lion_update_` or `adamw_update_`; the host
reads nothing in between, so they run on any device without a synchronisation. The laws are those of the
Cruxy white paper v2.1 (equation numbers below) with the constants of `layout.py`.

The per-tensor work runs over pieces that fit the cache (`pieces.py`).
"""

import functools
import math
from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from cruxy_kernels import layout as L
from cruxy_kernels.codec_reference import (
    BLOCK,
    decode_rows,
    dequantize_blockwise,
    encode_rows,
    quantize_blockwise,
)
from cruxy_kernels.pieces import Piece, copy_all, cut
from cruxy_kernels.rounding_reference import random_bits, round_stochastic

# -- telemetry ------------------------------------------------------------------


@torch.no_grad()
def gradient_telemetry(
    grads: Sequence[Tensor],
    *,
    gamma: float = 1.5,
    grad_scale: Tensor | None = None,
    per_tensor: bool = False,
) -> Tensor:
    """Sums over all gradients, from one read of each: [sum |g|^gamma, sum g^2, max |g|, non-finite count].

    Paper eq 1 is `sigma = out[0] ** (1 / gamma)`. Only finite elements enter the first three; the fourth
    counts the others. Everything is accumulated in fp32 in a fixed order (same inputs, same bits).

    Args:
        grads: tensors of any shape and any real floating dtype, on one device; may be empty tensors.
        gamma: exponent in [1, 4]; 1.5 and 2 have fast forms.
        grad_scale: 0-dim or 1-element tensor; the statistics are those of `g / grad_scale`.
        per_tensor: one row a tensor instead of the totals.

    Returns:
        float32 of shape (4,), or (len(grads), 4), on the gradients' device.

    Raises:
        ValueError: `gamma` outside [1, 4], or no gradients without `per_tensor`.
    """
    if not 1.0 <= gamma <= 4.0:
        raise ValueError(f"gamma is {gamma}; expected a value from 1 to 4")
    if not grads:
        if per_tensor:
            return torch.zeros((0, L.NUM_TELEMETRY))
        raise ValueError("gradient_telemetry got no gradients; expected at least one tensor")
    if per_tensor:
        out = torch.stack([_statistics(g.detach().float().reshape(-1), gamma) for g in grads])
    else:
        parts = []
        for piece in cut(3, torch.float32, grads):
            copy_all(piece.views[0], piece.select(grads))
            parts.append(_statistics(piece.flat[0], gamma, piece.flat[1], piece.flat[2]))
        if not parts:
            return torch.zeros(L.NUM_TELEMETRY, device=grads[0].device)
        table = torch.stack(parts)
        out = table.sum(0)
        out[L.MAX_ABS] = table[:, L.MAX_ABS].amax()
    if grad_scale is None:
        return out
    inverse = grad_scale.reshape(()).to(out.device, torch.float32).reciprocal()
    one = torch.ones_like(inverse)
    return out * torch.stack([inverse**gamma, inverse.square(), inverse, one])


def _statistics(g: Tensor, gamma: float, a: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    """The four numbers of one flat fp32 tensor; `a` and `b` are scratch of its size."""
    if g.numel() == 0:
        return g.new_zeros(L.NUM_TELEMETRY)
    a = torch.abs(g, out=a)
    finite = a < math.inf  # False for NaN as well
    a = torch.where(finite, a, a.new_zeros(()), out=a) if a is not g else a
    max_abs = a.amax()
    if gamma == 1.5:
        sum_pow = torch.mul(a, torch.sqrt(a, out=b), out=b).sum()
        sum_sq = torch.mul(a, a, out=b).sum()
    else:
        sum_sq = torch.mul(a, a, out=b).sum()
        sum_pow = sum_sq if gamma == 2.0 else torch.pow(a, gamma, out=b).sum()
    return torch.stack([sum_pow, sum_sq, max_abs, g.numel() - finite.sum()])


# -- control ------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def _history_weights(device: torch.device) -> tuple[Tensor, Tensor]:
    k = torch.arange(L.FAST_HISTORY_LEN, device=device, dtype=torch.float32)
    return k, torch.exp(-k / L.HISTORY_DECAY)


def bias_corrections(beta1: Tensor, beta2: Tensor, age: Tensor) -> tuple[Tensor, Tensor]:
    """`1 - beta1^t` and `sqrt(1 - beta2^t)` at t = `age`; all of shape (num_rows,)."""
    # -expm1(t log beta) keeps 1 - beta^t exact to fp32 where beta is close to 1.
    return -torch.expm1(age * beta1.log()), (-torch.expm1(age * beta2.log())).sqrt()


@torch.no_grad()
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


@torch.no_grad()
def control_step(
    control: Tensor,
    telemetry: Tensor,
    loss: Tensor | None = None,
    *,
    law: str = "meta3",
    found_inf: Tensor | None = None,
) -> None:
    """One step of the per-step law, in place: inputs and state in, new state and outputs out.

    A step whose gradients, loss or gradient norm are not finite (or `found_inf` > 0) sets SKIP, counts
    SKIPPED and leaves the rest of the state as it was.

    Args:
        control: float32 (num_rows, layout.NUM_SLOTS), contiguous.
        telemetry: float32 (4,) from `gradient_telemetry`, same device.
        loss: 0-dim tensor on the same device, or None: curvature (paper eq 4, 5) is then left as it is.
        law: "stability_v1", "stability_v2" or "meta3".
        found_inf: 0-dim or 1-element tensor of torch's GradScaler, same device.

    Raises:
        ValueError: unknown law, or tensors of the wrong shape.
    """
    if law not in L.LAWS:
        raise ValueError(f"unknown law {law!r}; expected one of {', '.join(L.LAWS)}")
    if control.dim() != 2 or control.shape[1] != L.NUM_SLOTS or telemetry.shape != (L.NUM_TELEMETRY,):
        raise ValueError(
            f"control has shape {tuple(control.shape)} and telemetry {tuple(telemetry.shape)}; "
            f"expected (num_rows, {L.NUM_SLOTS}) and ({L.NUM_TELEMETRY},)"
        )
    slot = control[:, : L.FAST_HISTORY].unbind(1)
    sum_pow, sum_sq, max_abs, nonfinite = telemetry.unbind(0)
    norm = sum_sq.sqrt()

    bad = (nonfinite > 0) | ~(sum_pow + sum_sq < math.inf)
    if loss is not None:
        bad = bad | ~loss.isfinite()
    if found_inf is not None:
        bad = bad | (found_inf.reshape(()) > 0)
    step, age = slot[L.STEP] + 1, slot[L.AGE] + 1
    guard = slot[L.GUARD] > 0

    # The signal: sum g^2 in stability_v1, else the gamma-norm (eq 1).
    v1 = law == "stability_v1"
    gamma_norm = sum_pow ** slot[L.GAMMA].reciprocal()
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

    if v1:
        factor = torch.where(phase > L.V1_PHASE_HIGH, 1 - L.V1_DECAY * phase, 1.0)
        factor = torch.where(phase < L.V1_PHASE_LOW, 1 + L.V1_RECOVERY * (1 - phase), factor)
        lr_out = slot[L.LR] * factor
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
    clip = (threshold / (norm + L.CLIP_EPS)).clamp(max=1.0)
    correction1, correction2_sqrt = bias_corrections(beta1_out, beta2_out, age)

    def column(value: Tensor) -> Tensor:
        return value.expand_as(step)

    # The order is that of the slots STEP ... COOLDOWN, then the two histories, then LR_OUT ... LOSS.
    state = torch.stack(
        [step, age, slot[L.SKIPPED], v_fast, v_slow, curvature, prev_loss, column(norm), loss_seen, error,
         scale, meta_beta2, outliers, warnings, cooldown, torch.zeros_like(step)], 1
    )  # fmt: skip
    outputs = torch.stack(
        [lr_out, beta1_out, beta2_out, threshold, clip, torch.zeros_like(step), phase, column(norm),
         gamma_norm, column(max_abs), column(nonfinite), warning, correction1, correction2_sqrt,
         torch.full_like(step, math.nan) if loss is None else column(loss), torch.zeros_like(step)], 1
    )  # fmt: skip
    new = torch.cat((state, fast_history, meta_history, outputs), 1)
    torch.where(bad, control[:, L.NUM_INPUTS :], new, out=control[:, L.NUM_INPUTS :])
    slot[L.SKIPPED].add_(bad)
    control[:, L.SKIP].copy_(bad)
    control[:, L.GRAD_NORM].copy_(norm)
    control[:, L.NONFINITE].copy_(nonfinite)


# -- updates ------------------------------------------------------------------


def _row_runs(rows: Sequence[int] | None, count: int) -> list[tuple[int, list[int]]]:
    """The tensors of each control row: [(row, indices), ...]."""
    if rows is None:
        return [(0, list(range(count)))]
    order = sorted(range(count), key=lambda i: rows[i])
    return [(row, list(run)) for row, run in groupby(order, key=lambda i: rows[i])]


class _Row:
    """The control values of one row as 0-dim tensors, under the names of the equations."""

    def __init__(self, control: Tensor, row: int, grad_scale: Tensor | None, maximize: bool):
        slot = control[row].unbind(0)
        self.skip, self.step = slot[L.SKIP] > 0, slot[L.STEP]
        self.beta1, self.beta2 = slot[L.BETA1_OUT], slot[L.BETA2_OUT]
        self.lr, self.eps = slot[L.LR_OUT], slot[L.EPS]
        self.weight_decay = slot[L.WEIGHT_DECAY]
        # One factor takes a stored gradient to the g of the equations: unscaled, clipped, signed.
        self.gradient = -slot[L.CLIP_COEF] if maximize else slot[L.CLIP_COEF]
        if grad_scale is not None:
            self.gradient = self.gradient / grad_scale.reshape(()).to(control.device, torch.float32)
        self.correction1 = slot[L.BIAS_CORRECTION1]
        self.correction2_sqrt = slot[L.BIAS_CORRECTION2_SQRT]


def _scale_steps(piece: Piece, views: list[Tensor], lr_multipliers: Tensor | None) -> None:
    if lr_multipliers is not None:
        factors = lr_multipliers.unbind(0)
        torch._foreach_mul_(  # pyright: ignore[reportPrivateImportUsage]
            views, [factors[i] for i in piece.indices]
        )


def _store(
    params: list[Tensor], value: Tensor, views: list[Tensor], piece: Piece, numbers: list[int], step: Tensor
) -> None:
    """Write fp32 values into the parameters; 16-bit ones are rounded stochastically."""
    if params[0].dtype in (torch.float16, torch.bfloat16):
        random = random_bits(step, [numbers[i] for i in piece.indices], piece.sizes, piece.start)
        # A representable value survives the rounding, so parameters of a skipped step keep their bits.
        value.copy_(round_stochastic(value, random, params[0].dtype))
    copy_all(params, views)


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
    """Lion (paper eq 11-13) in place, with clipping, unscaling and the skip flag taken from `control`.

        g = clip_coef * grad / grad_scale
        u = sign(beta1 m + (1 - beta1) g)
        p <- p - lr (multiplier u + weight_decay p)
        m <- beta2 m + (1 - beta2) g

    Everything is computed in fp32; 16-bit parameters are rounded stochastically (`rounding_reference.py`),
    the tensor number being the position in `params`. Where SKIP is set, parameters and momentum keep
    their bits.

    Args:
        params, grads: tensors of the same shapes, on one device; the parameters all of one dtype, float32,
            bfloat16, float16 or float64.
        exp_avgs: momentum `m` of the same shapes: float32 (float64 for float64 parameters), float16 or
            bfloat16 (rounded to nearest), or the int8 codes of `quantize_blockwise`.
        control: float32 (num_rows, layout.NUM_SLOTS), after `control_step`.
        exp_avg_scales: bfloat16 (ceil(numel/64),) for each tensor, with int8 codes only.
        rows: control row of each tensor; all in row 0 without it.
        lr_multipliers: float32 (len(params),), scales the step of each tensor (not its weight decay).
        grad_scale: 0-dim or 1-element tensor of torch's GradScaler.
        maximize: ascend instead of descend.
    """
    coded = exp_avg_scales is not None
    for row, indices in _row_runs(rows, len(params)):
        c = _Row(control, row, grad_scale, maximize)
        p_list, g_list, m_list = ([ts[i] for i in indices] for ts in (params, grads, exp_avgs))
        s_list = [] if exp_avg_scales is None else [exp_avg_scales[i] for i in indices]
        multipliers = None if lr_multipliers is None else lr_multipliers[indices]
        keep = 1 - c.lr * c.weight_decay
        dtype = torch.float64 if exp_avgs[0].dtype == torch.float64 else torch.float32
        for piece in cut(4, dtype, p_list, g_list, m_list, coded=coded):
            (p, g, m, u), (p_views, g_views, m_views, u_views) = piece.flat, piece.views
            p_piece, m_piece = piece.select(p_list), piece.select(m_list)
            copy_all(p_views, p_piece)
            if coded:
                if piece.padded:  # stale values behind a tensor would enter the scale of its short block
                    g.zero_()
                    piece.codes.zero_()
                s_piece = piece.select(s_list, BLOCK)
                copy_all(piece.code_views, m_piece)
                copy_all(piece.scale_views, s_piece)
                m.copy_(decode_rows(piece.codes.view(-1, BLOCK), piece.scales).view(-1))
            else:
                copy_all(m_views, m_piece)
            copy_all(g_views, piece.select(g_list))
            g.mul_(c.gradient)
            torch.lerp(g, m, c.beta1, out=u).sign_()
            _scale_steps(piece, u_views, multipliers)
            u.mul_(-c.lr).addcmul_(p, keep)
            g.lerp_(m, c.beta2)
            torch.where(c.skip, p, u, out=p)
            _store(p_piece, p, p_views, piece, indices, c.step)
            if coded:
                codes, scales = encode_rows(g.view(-1, BLOCK))
                torch.where(c.skip, piece.codes, codes.view(-1), out=piece.codes)
                torch.where(c.skip, piece.scales, scales, out=piece.scales)
                copy_all(m_piece, piece.code_views)
                copy_all(s_piece, piece.scale_views)
            else:
                torch.where(c.skip, m, g, out=m)
                copy_all(m_piece, m_views)


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
    exp_avg_scales: Sequence[Tensor] | None = None,
) -> None:
    """AdamW in place, with clipping, unscaling and the skip flag taken from `control`.

        g = clip_coef * grad / grad_scale          (+ weight_decay p, unless `decoupled`)
        m <- beta1 m + (1 - beta1) g
        v <- beta2 v + (1 - beta2) g^2
        n = beta1 m + (1 - beta1) g if nesterov else m
        p <- p (1 - lr weight_decay) - multiplier lr sqrt(1 - beta2^t) / (1 - beta1^t) n / (sqrt(v) + eps)

    The epsilon stands where the Cruxy SDK has it: beside sqrt(v), before the bias correction.
    Where SKIP is set, parameters and state keep their bits.

    Args:
        exp_avgs, exp_avg_sqs: first and second moment, float32 (float64 for float64 parameters).
        exp_avg_scales: makes `exp_avgs` the int8 codes of `quantize_blockwise`, these their scales.
        nesterov: look one step of momentum ahead (the SDK's default).
        decoupled: weight decay on the parameter (AdamW) and not through the gradient (Adam).
        The others are those of `lion_update_`.
    """
    if exp_avg_scales is not None:
        decoded = [dequantize_blockwise(c, s) for c, s in zip(exp_avgs, exp_avg_scales, strict=True)]
        adamw_update_(
            params, grads, decoded, exp_avg_sqs, control, rows=rows, lr_multipliers=lr_multipliers,
            grad_scale=grad_scale, maximize=maximize, nesterov=nesterov, decoupled=decoupled,
        )  # fmt: skip
        skip = control[0, L.SKIP] > 0  # the same in every row
        for m, codes, scales in zip(decoded, exp_avgs, exp_avg_scales, strict=True):
            for target, value in zip((codes, scales), quantize_blockwise(m), strict=True):
                target.copy_(torch.where(skip, target, value))
        return
    for row, indices in _row_runs(rows, len(params)):
        c = _Row(control, row, grad_scale, maximize)
        p_list, g_list = [params[i] for i in indices], [grads[i] for i in indices]
        m_list, v_list = [exp_avgs[i] for i in indices], [exp_avg_sqs[i] for i in indices]
        multipliers = None if lr_multipliers is None else lr_multipliers[indices]
        keep = 1 - c.lr * c.weight_decay
        step_size = c.lr * c.correction2_sqrt / c.correction1
        for piece in cut(6, exp_avgs[0].dtype, p_list, g_list, m_list, v_list):
            (p, g, m, v, u, w), (p_views, g_views, m_views, v_views, u_views, _) = piece.flat, piece.views
            p_piece, m_piece, v_piece = piece.select(p_list), piece.select(m_list), piece.select(v_list)
            copy_all(p_views, p_piece)
            copy_all(g_views, piece.select(g_list))
            copy_all(m_views, m_piece)
            copy_all(v_views, v_piece)
            g.mul_(c.gradient)
            if not decoupled:
                g.addcmul_(p, c.weight_decay)
            torch.lerp(g, m, c.beta1, out=u)
            torch.where(c.skip, m, u, out=m)
            copy_all(m_piece, m_views)
            if nesterov:
                torch.lerp(g, u, c.beta1, out=u)
            g.mul_(g)
            torch.lerp(g, v, c.beta2, out=w)
            torch.where(c.skip, v, w, out=v)
            copy_all(v_piece, v_views)
            u.div_(w.sqrt_().add_(c.eps))
            _scale_steps(piece, u_views, multipliers)
            u.mul_(-step_size)
            if decoupled:
                u.addcmul_(p, keep)
            else:
                u.add_(p)
            torch.where(c.skip, p, u, out=p)
            _store(p_piece, p, p_views, piece, indices, c.step)
