"""The law of a step whose gradients are used and freed layer by layer, in the middle of the backward pass.

The sums over all gradients are there when the last layer has been updated. So the per-step law (cruxy_kernels,
laws/control.py) reads them one step late, and what cannot wait is decided per layer (docs/full-parameter.md):

    open    law of the last step's sums and loss; a step that was skipped leaves its state alone, ages go on
    layer   a layer with a non-finite element is left alone; N = max(norm of what has come of this step, the last
            step's) stands for the norm of all gradients; G_factor = 1 / (loss scale) min(1, limit / N)
    close   sums of the step, unscaled; loss scale: halved after a non-finite element, doubled after a run without

All of it is device-agnostic torch on a few numbers, and no host reads them. `release` is a float32 vector with the
slots below, part of the checkpoint.
"""

import torch
from torch import Tensor

import cruxy_kernels as kernels
from cruxy_kernels import layout as L
from cruxy_kernels.laws.clipping import tensor_law
from cruxy_kernels.laws.control import write_log
from cruxy_kernels.laws.telemetry import combine

KEY = "release"  # of the first parameter group

SCALE = 0  # what the loss of this step is multiplied by; 1 without a loss scale
RUN = 1  # steps without a non-finite element since the scale was changed
OVERFLOWS = 2  # steps that had one
FRESH = 3  # 1: TOTALS and LOSS are of the last step, and the law has not seen them
SKIPPED = 4  # 1: the last step has nothing for the law: it was not finite, or broken off
TOTALS = 5  # telemetry of the last step that was finite, unscaled; its count is of the last step
LOSS = TOTALS + L.NUM_TELEMETRY
HAS_LOSS = LOSS + 1
NORM = LOSS + 2  # of all gradients in the last step that was finite and no outlier
NUM_RELEASE = LOSS + 3

# GradScaler's own start and interval; its scale has no bounds.
INITIAL_SCALE, GROWTH_INTERVAL = 2.0**16, 2000
MIN_SCALE, MAX_SCALE = 2.0**-14, 2.0**24


def new_release(control: Tensor, scale: float) -> Tensor:
    """The vector before its first step, on the CPU; `control`: what an optimizer knows from steps without release."""
    release = torch.zeros(NUM_RELEASE)
    release[SCALE] = scale
    row = control[0].detach().cpu()  # once, when release begins
    known = row[[L.GAMMA_NORM, L.GRAD_NORM, L.MAX_GRAD]]
    if row[L.STEP] > 0 and bool((known.isfinite() & (known > 0)).all()):
        release[TOTALS : TOTALS + 3] = torch.stack((known[0] ** row[L.GAMMA], known[1] ** 2, known[2]))
        release[NORM] = known[1]
    return release


@torch.no_grad()
def open_step(
    control: Tensor,
    release: Tensor,
    *,
    law: str,
    clip: str | None,
    has_loss: bool,
    log: Tensor | None,
    backend: str | None,
) -> None:
    """Before a step's first layer: what the last step's statistics make of learning rate, betas and limits.

    Args:
        control: float32 (num_rows, layout.NUM_SLOTS), with this step's settings; in place. Its AGE counts this step,
            its STEP those whose statistics it has seen. SKIP says of the last step that it was skipped.
        release: float32 (NUM_RELEASE,), same device; in place.
        has_loss: whether the last step had a loss.
        log: as for `control_step`.
    """
    fresh = release[FRESH] > 0
    after = control.clone()
    after[:, L.LOSS_SEEN] *= fresh
    totals = release[TOTALS : TOTALS + L.NUM_TELEMETRY]
    # Before there are any, the learning rate is that of every first step: with any sums the phase is near 1 then.
    totals = torch.where(totals[L.SUM_SQ] > 0, totals, 1.0)
    totals[L.COUNT_NONFINITE] = 0
    loss = torch.where(fresh, release[LOSS], control[0, L.PREV_LOSS]) if has_loss else None
    kernels.control_step(after, totals, loss, law=law, clip="global" if clip == "global" else None, backend=backend)
    age = after[:, L.AGE].clone()
    for first, last in ((L.NUM_INPUTS, L.OUTPUTS), (L.GRAD_NORM, L.NONFINITE), (L.LOSS, L.LOSS + 1)):
        after[:, first:last] = torch.where(fresh, after[:, first:last], control[:, first:last])
    after[:, L.TREND] *= fresh
    after[:, L.AGE] = age
    after[:, L.SKIPPED] += release[SKIPPED]
    after[:, L.SKIP] = release[SKIPPED]
    after[:, L.NONFINITE] = release[TOTALS + L.COUNT_NONFINITE]
    control.copy_(after)
    usual = fresh & (control[0, L.OUTLIERS] == 0)
    release[NORM] = torch.where(usual, control[0, L.GRAD_NORM], release[NORM])
    release[FRESH : SKIPPED + 1] = 0
    if log is not None:
        write_log(control, log)


def usable(rows: Tensor) -> Tensor:
    """bool (n,) of telemetry (n, 4): whether the gradients and their sums are finite."""
    return (rows[:, L.COUNT_NONFINITE] == 0) & (rows[:, L.SUM_POW] + rows[:, L.SUM_SQ]).isfinite()


@torch.no_grad()
def layer_step(
    control: Tensor,
    release: Tensor,
    table: Tensor,
    telemetry: Tensor,
    *,
    clip: str | kernels.TensorClip | None,
    loss: Tensor | None,
) -> Tensor:
    """A layer's own rows of the control vector, for its update; `clip` has its factors then.

    Args:
        control, release: after `open_step`, same device; not changed.
        table: float32 (n, NUM_TELEMETRY): the layers of this step so far; the last row, this one's, is written here.
        telemetry: float32 (m, NUM_TELEMETRY) of its gradients as stored, multiplied by the loss scale.
        clip: "global": against the limit of the law; a TensorClip: each tensor against its own history; None.
        loss: 0-dim float32 that the step began with; where it is not finite the layer is left alone.
    """
    table[-1] = combine(telemetry)
    finite = usable(table)
    good = finite[-1] if loss is None else finite[-1] & loss.isfinite()
    inverse = release[SCALE].reciprocal()
    norm = torch.where(finite, table[:, L.SUM_SQ], 0.0).sum().sqrt() * inverse
    norm = torch.maximum(norm, release[NORM])
    own = control.clone()
    own[:, L.SKIP] = (~good).to(own.dtype)
    coefficient = (own[:, L.CLIP_THRESHOLD] / (norm + L.CLIP_EPS)).clamp(max=1.0) if clip == "global" else 1.0
    own[:, L.GRAD_FACTOR] = (1 - 2 * own[:, L.MAXIMIZE]) * inverse * coefficient
    if isinstance(clip, kernels.TensorClip):
        tensor_law(clip, telemetry, norm, inverse, ~good)
    return own


@torch.no_grad()
def close_step(
    release: Tensor, table: Tensor, loss: Tensor | None, gamma: float, *, scaled: bool, whole: bool, interval: int
) -> None:
    """After a step's last layer: its sums and loss wait in `release` for the next, and the loss scale moves.

    Args:
        table: float32 (layers, NUM_TELEMETRY), as `layer_step` wrote it. gamma: the exponent of its first column.
        scaled: whether there is a loss scale. whole: False for a step that was broken off.
        interval: steps without a non-finite element after which the scale is doubled.
    """
    total, inverse = combine(table), release[SCALE].reciprocal()
    unscale = torch.stack((inverse**gamma, inverse.square(), inverse))
    sums = total[: L.COUNT_NONFINITE] * unscale
    finite = usable(table).all() & sums.isfinite().all()
    fresh = finite if whole else torch.zeros_like(finite)
    if loss is not None:
        fresh = fresh & loss.isfinite()
        release[LOSS] = torch.where(fresh, loss, release[LOSS])
    release[HAS_LOSS] = float(loss is not None)
    release[TOTALS : TOTALS + 3] = torch.where(fresh, sums, release[TOTALS : TOTALS + 3])
    release[TOTALS + L.COUNT_NONFINITE] = total[L.COUNT_NONFINITE]
    release[FRESH], release[SKIPPED] = fresh.to(release.dtype), (~fresh).to(release.dtype)
    release[OVERFLOWS] += ~finite
    run = torch.where(finite, release[RUN] + 1, 0.0)
    if scaled:
        grown = run >= interval
        factor = torch.where(finite, 1.0 + grown, 0.5)
        release[SCALE] = (release[SCALE] * factor).clamp(MIN_SCALE, MAX_SCALE)
        run = torch.where(grown, 0.0, run)
    release[RUN] = run
