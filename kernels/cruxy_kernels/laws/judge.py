"""A step's gradients against their own history: whether to skip the step, and by how much to clip it (docs/guard.md).

x = log of the norm of a tensor's gradient, unscaled; the same for the norm of all gradients together. Of each the state
keeps mean m and mean absolute deviation d of x, how many values it took in (n), and outliers in a row (r):

    s = max(1.25 d, .2 + 2 / n)            a young history is slow to call something an outlier
    score = (x - m) / s                    0 where x is not finite
    outlier: score > sigmas
    limit = m + sigmas s                   times far / score beyond `far` deviations: of what is that much too large
                                           less is left the larger it is, as ZClip has it (arXiv 2504.02507)
    skip: the norm of all or the loss is not finite, the score of all > `skip`, or the loss scaler says so
    m, d <- moved by 1 / min(n + 1, memory) towards x, by 3 s at most; not by outliers nor in a step that is skipped;
            after `patience` outliers in a row m starts again from x

`specification` says it in PyTorch. The kernel does all of it in one launch per dtype of the gradients: each program
leaves the sum of squares of its run of chunks, and the last one to be done judges.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import tables as T
from .._triton import HAS_TRITON
from ..launch import Batch, launch, on_device
from . import layout as L
from .telemetry import Runs

CLIPS = {None: 0, "global": 1, "tensors": 2}
LANES = 128  # tensors at once, one per thread

@dataclass(frozen=True)
class Limits:
    """Thresholds of the law. `skip` and `far` count deviations, `memory` and `patience` steps.

    ratio: clip a tensor at this multiple of its history (AdaGC, arXiv 2502.11034); None: only by deviations.
    clip: "tensors" each tensor and all together, "global" all together, None nothing.
    """

    skip: float
    far: float
    memory: int
    patience: int
    ratio: float | None = None
    clip: str | None = "tensors"

    @property
    def log_ratio(self) -> float:
        return math.inf if self.ratio is None else math.log(self.ratio)

    def thresholds(self, sigmas: float) -> list[float]:
        """The numbers of the law as kernel and loops take them, in their order."""
        numbers = (sigmas, self.far, self.skip, 1 / self.memory, self.patience, self.log_ratio)
        return [1.0 * number for number in numbers]  # Triton compiles anew for a whole number


def size(tensors: int) -> int:
    """How many numbers the judgement of this many tensors has."""
    return L.JUDGE_REPORT + L.JUDGE_HEAD + 3 * (tensors + 1)


def specification(
    norms: Tensor,
    state: Tensor,
    loss: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    sigmas: float,
    limits: Limits,
) -> Tensor:
    """The judgement, fp32 (size(n),), of norms (n,) that are unscaled; moves `state` (4, n + 1) in place.

    loss, grad_scale, found_inf: 0-dim fp32 or None.
    """
    n = len(norms)
    norms = torch.cat([norms, torch.linalg.vector_norm(norms).reshape(1)])
    mean, deviation, count, streak = state
    zero, one, empty = (torch.full((), value, device=state.device) for value in (0.0, 1.0, math.nan))

    # Few operators: each is a launch on an accelerator.
    log = norms.log()
    finite = log.abs() < math.inf
    sigma = torch.maximum(L.JUDGE_NORMAL * deviation, L.JUDGE_YOUNG / count.clamp(min=1e-6) + L.JUDGE_FLOOR)
    delta = torch.where(finite, log - mean, zero)
    score = delta / sigma
    outlier = score > sigmas
    limit = sigma * sigmas * torch.where(score > limits.far, limits.far / score, one)
    if limits.ratio is not None:
        limit[:n] = torch.minimum(limit[:n], torch.where(count[:n] > 0, limits.log_ratio, math.inf))
    above = (limit - delta).clamp(max=0)
    if limits.clip is None:
        above.zero_()
    elif limits.clip == "global":
        above[:n] = 0

    checked = norms[n] if loss is None else norms[n] + loss  # finite only where both are
    good = (checked.abs() < math.inf) & (score[n] <= limits.skip)
    overflow = zero
    if found_inf is not None:
        overflow = (found_inf > 0).float()
        good = good & (overflow == 0)

    start = ((outlier & (streak >= limits.patience - 1)) | (count == 0)) & finite
    accept = finite & ~outlier & good
    rate = (1 / (count + 1)).clamp(min=1 / limits.memory) * accept
    move = score.clamp(-L.JUDGE_WINSOR, L.JUDGE_WINSOR) * sigma
    torch.where(start, zero, torch.lerp(deviation, move.abs(), rate), out=deviation)
    torch.where(start, log, torch.addcmul(mean, rate, move), out=mean)
    torch.where(start, one, count + accept, out=count)
    torch.mul(streak + 1, outlier, out=streak)

    skip, clipped = (~good).float(), (above < 0).sum().float()
    apply = torch.exp(-above[n])
    if grad_scale is not None:
        apply = grad_scale * apply
    head = [zero] * L.JUDGE_REPORT
    head[L.JUDGE_FOUND], head[L.JUDGE_APPLY] = skip, apply
    head += [skip, empty if loss is None else loss, overflow, empty if grad_scale is None else grad_scale, clipped]
    head += [norms[n], score[n], empty]
    return torch.cat([torch.stack(head), norms, score, above])


if HAS_TRITON:
    import triton
    import triton.language as tl

    from ..storage import load_values

    @triton.jit
    def norms_of(partials, spans, lane, mask, scale, GIVEN: tl.constexpr, LANES: tl.constexpr):
        """The unscaled norms of these tensors: given, or of their partial sums, added in their order."""
        if GIVEN:
            return tl.load(partials + lane, mask=mask, other=0.0)
        else:
            first = tl.load(spans + lane * 2, mask=mask, other=0)
            count = tl.load(spans + lane * 2 + 1, mask=mask, other=0)
            total = tl.zeros((LANES,), tl.float32)
            for k in range(0, tl.max(count, axis=0)):
                # Not from the cache of this processor: other programs have just written them.
                total += tl.load(partials + first + k, mask=k < count, other=0.0, cache_modifier=".cg")
            return tl.sqrt(total) / scale

    @triton.jit
    def compared(norm, mean, deviation, count, sigmas, far):
        """Logarithm, whether it is finite, deviation in use, distance and score of a norm; what it may be at most."""
        log = tl.log(norm)
        finite = tl.abs(log) < float("inf")
        sigma = tl.maximum(L.JUDGE_NORMAL * deviation, L.JUDGE_YOUNG / tl.maximum(count, 1e-6) + L.JUDGE_FLOOR)
        delta = tl.where(finite, log - mean, 0.0)
        score = delta / sigma
        limit = sigma * sigmas * tl.where(score > far, far / score, 1.0)
        return log, finite, sigma, delta, score, limit

    @triton.jit
    def moved(log, finite, sigma, score, good, mean, deviation, count, streak, sigmas, least_rate, patience):
        """The history with this value in it. good: 1 where the step is taken, else 0."""
        outlier = score > sigmas
        start = ((outlier & (streak >= patience - 1)) | (count == 0)) & finite
        accept = tl.where(finite & (score <= sigmas), good, 0.0)
        rate = tl.maximum(1 / (count + 1), least_rate) * accept
        move = tl.minimum(tl.maximum(score, -L.JUDGE_WINSOR), L.JUDGE_WINSOR) * sigma
        return (
            tl.where(start, log, mean + rate * move),
            tl.where(start, 0.0, deviation + rate * (tl.abs(move) - deviation)),
            tl.where(start, 1.0, count + accept),
            tl.where(outlier, streak + 1, 0.0),
        )

    @triton.jit(
        do_not_specialize=["first", "tensors"],
        do_not_specialize_on_alignment=["loss_pointer", "found_inf", "grad_scale"],
    )
    def judge_kernel(
        entries,  # int64 (tensors, COLUMNS)
        chunk_entry,  # int32 (chunks,)
        chunk_index,  # int32 (chunks,)
        bounds,  # int32 (programs + 1,): where the chunks of each program begin
        partials,  # fp32: the sums of squares of all launches; GIVEN: the norms
        first,  # where those of this launch begin
        done,  # int32 (1,): programs that are done; 0 between launches
        spans,  # int32 (tensors, 2): the first partial sum of each tensor and how many it has
        tensors,
        state,  # fp32 (4, tensors + 1)
        out,  # fp32 (size(tensors),)
        loss_pointer,
        grad_scale,
        found_inf,
        sigmas,
        far,
        skip_sigmas,
        least_rate,
        patience,
        log_ratio,
        GRAD_TYPE: tl.constexpr,
        CLIP: tl.constexpr,
        HAS_LOSS: tl.constexpr,
        HAS_GRAD_SCALE: tl.constexpr,
        HAS_FOUND_INF: tl.constexpr,
        GIVEN: tl.constexpr,
        LAST: tl.constexpr,
        LINES: tl.constexpr,
        LANES: tl.constexpr,
        LAYOUT: tl.constexpr,
    ):
        program = tl.program_id(0)
        if not GIVEN:
            squares = tl.zeros((LINES,), tl.float32)
            local = tl.arange(0, LINES)[:, None] * 8 + tl.arange(0, 8)[None, :]
            for chunk in range(tl.load(bounds + program), tl.load(bounds + program + 1)):
                entry = entries + tl.load(chunk_entry + chunk).to(tl.int64) * T.COLUMNS
                start = tl.load(chunk_index + chunk).to(tl.int64) * (LINES * 8)
                address = tl.load(entry + T.GRAD)
                remaining = tl.minimum(tl.load(entry + T.NUMEL) - start, LINES * 8).to(tl.int32)
                if (remaining == LINES * 8) & (tl.load(entry + T.ALIGNED) != 0):
                    g = load_values(address, start, local, remaining, GRAD_TYPE, False)
                    squares += tl.sum(g * g, axis=1)
                else:
                    g = load_values(address, start, local, remaining, GRAD_TYPE, True)
                    squares += tl.sum(g * g, axis=1)
            tl.store(partials + first + program, tl.sum(squares, axis=0))
        if LAST:
            arrived = 0
            if not GIVEN:
                tl.debug_barrier()
                arrived = tl.atomic_add(done, 1, sem="acq_rel")
            if arrived == tl.num_programs(0) - 1:
                judge_all(
                    partials, spans, tensors, state, out, loss_pointer, grad_scale, found_inf, sigmas, far,
                    skip_sigmas, least_rate, patience, log_ratio, CLIP, HAS_LOSS, HAS_GRAD_SCALE, HAS_FOUND_INF,
                    GIVEN, LANES,
                )  # fmt: skip
                if not GIVEN:
                    tl.store(done, 0)

    @triton.jit
    def judge_all(
        partials, spans, tensors, state, out, loss_pointer, grad_scale, found_inf, sigmas, far,
        skip_sigmas, least_rate, patience, log_ratio, CLIP: tl.constexpr, HAS_LOSS: tl.constexpr,
        HAS_GRAD_SCALE: tl.constexpr, HAS_FOUND_INF: tl.constexpr, GIVEN: tl.constexpr, LANES: tl.constexpr,
    ):  # fmt: skip
        """`specification`, by one program."""
        width = tensors + 1
        report = out + L.JUDGE_REPORT
        norms, scores, aboves = report + L.JUDGE_HEAD, report + L.JUDGE_HEAD + width, report + L.JUDGE_HEAD + 2 * width
        scale = 1.0
        if HAS_GRAD_SCALE:
            scale = tl.load(grad_scale)
        total = tl.zeros((LANES,), tl.float32)
        for start in range(0, tensors, LANES):
            lane = start + tl.arange(0, LANES)
            mask = lane < tensors
            norm = norms_of(partials, spans, lane, mask, scale, GIVEN, LANES)
            tl.store(norms + lane, norm, mask=mask)
            total += norm * norm
        whole = tl.sqrt(tl.sum(total, axis=0))

        last = state + tensors
        mean, deviation = tl.load(last), tl.load(last + width)
        count, streak = tl.load(last + 2 * width), tl.load(last + 3 * width)
        log, finite, sigma, delta, score, limit = compared(whole, mean, deviation, count, sigmas, far)
        above = tl.minimum(limit - delta, 0.0)
        if CLIP == 0:
            above *= 0.0
        checked = whole
        loss = float("nan")
        if HAS_LOSS:
            loss = tl.load(loss_pointer)
            checked += loss
        good = tl.where((tl.abs(checked) < float("inf")) & (score <= skip_sigmas), 1.0, 0.0)
        overflow = 0.0
        if HAS_FOUND_INF:
            overflow = tl.where(tl.load(found_inf) > 0, 1.0, 0.0)
            good *= 1 - overflow
        # The norms are there for whoever loads them next, and everybody has read the history of the whole.
        tl.debug_barrier()
        mean, deviation, count, streak = moved(
            log, finite, sigma, score, good, mean, deviation, count, streak, sigmas, least_rate, patience
        )
        tl.store(last, mean)
        tl.store(last + width, deviation)
        tl.store(last + 2 * width, count)
        tl.store(last + 3 * width, streak)

        clipped = tl.zeros((LANES,), tl.float32)
        for start in range(0, tensors, LANES):
            lane = start + tl.arange(0, LANES)
            mask = lane < tensors
            here = state + lane
            own_mean = tl.load(here, mask=mask, other=0.0)
            own_deviation = tl.load(here + width, mask=mask, other=0.0)
            own_count = tl.load(here + 2 * width, mask=mask, other=0.0)
            own_streak = tl.load(here + 3 * width, mask=mask, other=0.0)
            norm = tl.load(norms + lane, mask=mask, other=0.0)
            own_log, own_finite, own_sigma, own_delta, own_score, own_limit = compared(
                norm, own_mean, own_deviation, own_count, sigmas, far
            )
            own_limit = tl.where(own_count > 0, tl.minimum(own_limit, log_ratio), own_limit)
            own_above = tl.zeros((LANES,), tl.float32)
            if CLIP == 2:
                own_above = tl.minimum(own_limit - own_delta, 0.0)
            clipped += tl.where(mask & (own_above < 0), 1.0, 0.0)
            tl.store(scores + lane, own_score, mask=mask)
            tl.store(aboves + lane, own_above, mask=mask)
            tl.debug_barrier()
            own_mean, own_deviation, own_count, own_streak = moved(
                own_log, own_finite, own_sigma, own_score, good, own_mean, own_deviation, own_count, own_streak,
                sigmas, least_rate, patience,
            )  # fmt: skip
            tl.store(here, own_mean, mask=mask)
            tl.store(here + width, own_deviation, mask=mask)
            tl.store(here + 2 * width, own_count, mask=mask)
            tl.store(here + 3 * width, own_streak, mask=mask)

        skip = 1 - good
        handed = tl.arange(0, L.JUDGE_REPORT)
        apply = tl.where(above < 0, scale * tl.exp(-above), scale)
        value = tl.where(handed == L.JUDGE_APPLY, apply, tl.where(handed == L.JUDGE_FOUND, skip, 0.0))
        tl.store(out + handed, value)
        tl.store(norms + tensors, whole)
        tl.store(scores + tensors, score)
        tl.store(aboves + tensors, above)
        tl.store(report + L.JUDGE_SKIP, skip)
        tl.store(report + L.JUDGE_LOSS, loss)
        tl.store(report + L.JUDGE_FOUND_INF, overflow)
        tl.store(report + L.JUDGE_CLIPPED, tl.sum(clipped, axis=0) + tl.where(above < 0, 1.0, 0.0))
        tl.store(report + L.JUDGE_NORM, whole)
        tl.store(report + L.JUDGE_SCORE, score)
        tl.store(report + L.JUDGE_RATIO, float("nan"))
        if HAS_GRAD_SCALE:
            tl.store(report + L.JUDGE_SCALE, scale)
        else:
            tl.store(report + L.JUDGE_SCALE, float("nan"))


class Sums:
    """What a launch over these batches needs besides their tables: their runs, and the place of each partial sum."""

    def __init__(self, batches: list[Batch], ids: list[int], tensors: int, device: torch.device) -> None:
        """ids: of each tensor of the batches its place among all `tensors`."""
        spans = torch.zeros((tensors, 2), dtype=torch.int32)
        self.first, self.bounds, rows = [], [], 0
        for batch in batches:
            runs = Runs(batch.table)
            spans[[ids[i] for i in batch.indices]] = runs.spans + torch.tensor([rows, 0], dtype=torch.int32)
            self.first.append(rows)
            self.bounds.append(runs.bounds)
            rows += len(runs.bounds) - 1
        self.spans = T.to_device(spans, device)
        self.partials = torch.empty(max(1, rows), device=device)
        self.done = torch.zeros(1, dtype=torch.int32, device=device)


def launch_judge(
    batches: list[Batch] | None,
    given: Sums | Tensor,
    state: Tensor,
    loss: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    sigmas: float,
    limits: Limits,
) -> Tensor:
    """`specification` by the kernel: of batches of gradients and their `Sums`, or (batches None) of given norms."""
    tensors = state.shape[1] - 1
    out = torch.empty(size(tensors), device=state.device)
    numbers = [state if value is None else value for value in (loss, grad_scale, found_inf)]
    constants = {
        "CLIP": CLIPS[limits.clip], "HAS_LOSS": loss is not None, "HAS_GRAD_SCALE": grad_scale is not None,
        "HAS_FOUND_INF": found_inf is not None, "LINES": T.CHUNK // 8, "LANES": LANES, "LAYOUT": L.KEY + T.KEY,
    }  # fmt: skip
    thresholds = limits.thresholds(sigmas)
    with on_device(state.device):
        if isinstance(given, Tensor):
            launch(
                judge_kernel, 1, state, state, state, state, given, 0, state, state, tensors, state, out,
                *numbers, *thresholds, GRAD_TYPE="fp32", GIVEN=True, LAST=True, **constants,
            )  # fmt: skip
            return out
        for number, batch in enumerate(batches or ()):
            table, bounds = batch.table, given.bounds[number]
            launch(
                judge_kernel, len(bounds) - 1, table.entries, table.chunk_entry, table.chunk_index, bounds,
                given.partials, given.first[number], given.done, given.spans, tensors, state, out,
                *numbers, *thresholds,
                GRAD_TYPE=batch.types[T.GRAD], GIVEN=False, LAST=number == len(given.bounds) - 1, **constants,
            )  # fmt: skip
    return out
