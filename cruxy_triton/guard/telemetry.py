"""Telemetry: what one step's gradients look like against their own history, judged on the device.

The norm of each tensor's gradient and of the whole are tracked in logarithms, each by a robust baseline (`Baseline`).
`judge` returns device tensors: a factor for each tensor, whether to skip the step, and a `report` vector that the host
receives as an asynchronous copy one step later (`Mailbox`). Nothing here waits for the device.

Under torch.distributed the norms and the loss are summed over the ranks first, in one reduction, so that every rank
judges the same numbers: a shard (DTensor) counts as what it is, a replicated gradient as its share.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cruxy_triton import distributed
from cruxy_triton.guard.policy import Policy

# Mean absolute deviation times this is the standard deviation of a normal distribution: sqrt(pi / 2).
NORMAL = math.sqrt(math.pi / 2)
# A baseline's deviation is never below this (in logarithms); young baselines get 2 / (count + 1) on top, so that the
# second step of a run is an outlier only at more than 1,000 times the first.
FLOOR, YOUNG = 0.2, 2.0
WINSOR = 3.0  # what an accepted value moves a baseline by at most, in deviations

# The head of a report; behind it the norms (n + 1, the last is the global one) and the scores (n + 1).
SKIP, LOSS, FOUND_INF, SCALE, CLIPPED, NORM, SCORE, RATIO = range(8)
HEAD = 8


@dataclass
class Verdict:
    """Device tensors: what to do with this step. `factors` is (n,), `whole` the factor of the global norm."""

    skip: Tensor  # 0-dim bool
    clipped: Tensor  # 0-dim: how many tensors are above their limit
    factors: Tensor
    whole: Tensor
    report: Tensor


class Telemetry:
    """Baselines of n tensors and of their global norm.

    Args:
        params: the tensors that the optimizer owns.
        policy: thresholds.
        process_group: over which ranks the norms and the loss are summed; None: this process alone.
    """

    def __init__(self, params: Sequence[Tensor], policy: Policy, process_group: Any = None):
        self.params, self.policy, self.group = list(params), policy, process_group
        self.device = self.params[0].device
        # Rows: mean and mean absolute deviation of the log norm, values accepted, outliers in a row.
        self.state = torch.zeros((4, len(self.params) + 1), device=self.device)
        self._weights: Tensor | None = None
        self._empty = torch.full((), math.nan, device=self.device)

    def __len__(self) -> int:
        return len(self.params)

    @torch.no_grad()
    def judge(
        self,
        loss: Tensor | None,
        *,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        sigmas: float,
    ) -> Verdict | None:
        """Judge the gradients that the parameters hold now; None where there are none.

        Args:
            loss: this step's loss, one element; None where nobody told.
            grad_scale: what the gradients are still multiplied by.
            found_inf: the loss scaler's finding: the optimizer will skip the step by itself.
            sigmas: clip above this many deviations.
        """
        owners = [i for i, p in enumerate(self.params) if p.grad is not None]
        if not owners:
            return None
        n = len(self.params)
        norms = self._norms(owners)
        if grad_scale is not None:
            norms = norms / grad_scale.to(self.device, non_blocking=True)
        value = self._empty if loss is None else loss.detach().to(self.device, torch.float32, non_blocking=True)
        if value.numel() != 1:
            value = value.mean()
        norms, value = self._over_ranks(norms, value.reshape(()))
        norms = torch.cat([norms, torch.linalg.vector_norm(norms).reshape(1)])

        mean, deviation, count, streak = self.state
        log = norms.log()
        known, finite = count > 0, torch.isfinite(log)
        sigma = torch.maximum(NORMAL * deviation, FLOOR + YOUNG / (count + 1))
        delta = torch.where(known, log - mean, torch.zeros_like(log))
        score = delta / sigma
        limit = sigma * sigmas
        if self.policy.tensor_ratio is not None:
            limit[:n].clamp_(max=math.log(self.policy.tensor_ratio))
        # A level that lasts is no outlier: after `patience` outliers in a row the baseline starts again from there.
        outlier = finite & known & (score > sigmas)
        shift = outlier & (streak >= self.policy.patience)
        high = outlier & ~shift
        over = torch.where(finite & known & ~shift, (delta - limit).clamp(min=0), torch.zeros_like(delta))
        bad = ~torch.isfinite(norms[n]) | (high[n] & (score[n] > self.policy.skip_sigmas))
        if loss is not None:
            bad = bad | ~torch.isfinite(value)

        over_bar = over if self.policy.clip_tensors else over[n].expand_as(over)
        factors = torch.exp(-torch.maximum(over_bar[:n], over[n]))
        clipped = (over_bar[:n] > 0).sum() + (over[n] > 0)

        if found_inf is not None:
            overflow = found_inf.to(self.device, non_blocking=True).reshape(()) > 0
            bad = bad | overflow
        else:
            overflow = torch.zeros_like(bad)
        self._learn(log, finite, outlier, shift, sigma, delta, bad)
        scale = self._empty if grad_scale is None else grad_scale.to(self.device, torch.float32).reshape(())
        head = torch.stack([
            bad.float(), value, overflow.float(), scale, clipped.float(), norms[n], score[n], self._empty
        ])  # fmt: skip
        return Verdict(bad, clipped, factors, torch.exp(-over[n]), torch.cat([head, norms, score]))

    def _norms(self, owners: list[int]) -> Tensor:
        """The norm of each tensor's gradient in fp32 (0 where there is none), on one device."""
        by_device: dict[torch.device, list[int]] = {}
        grads = {i: values(self.params[i].grad) for i in owners}
        for i, grad in grads.items():
            by_device.setdefault(grad.device, []).append(i)
        if len(by_device) == 1 and len(owners) == len(self.params):
            norms = torch.stack(torch._foreach_norm(list(grads.values()), 2, dtype=torch.float32))
            return norms.to(self.device, non_blocking=True)
        out = torch.zeros(len(self.params), device=self.device)
        for part in by_device.values():
            norms = torch.stack(torch._foreach_norm([grads[i] for i in part], 2, dtype=torch.float32))
            index = torch.tensor(part, pin_memory=self.device.type == "cuda").to(self.device, non_blocking=True)
            out.index_copy_(0, index, norms.to(self.device, non_blocking=True))
        return out

    def _over_ranks(self, norms: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
        if self.group is None:
            return norms, loss
        group = None if self.group == "auto" else self.group
        world = dist.get_world_size(group)
        if self._weights is None:
            # A tensor that k ranks hold a share of is held world / k times.
            self._weights = torch.tensor([shards(p) / world for p in self.params], device=self.device)
        total = torch.cat([norms.square() * self._weights, loss.reshape(1) / world])
        dist.all_reduce(total, group=group)
        return total[:-1].sqrt(), total[-1]

    def _learn(
        self, log: Tensor, finite: Tensor, outlier: Tensor, shift: Tensor, sigma: Tensor, delta: Tensor, bad: Tensor
    ) -> None:
        """Move the baselines: not by what is not finite, nor by outliers, nor in a step that is skipped."""
        mean, deviation, count, streak = self.state
        start = shift | (finite & (count == 0) & ~bad)
        accept = (finite & ~outlier & ~bad & ~start).float()
        rate = accept * torch.maximum(1 / (count + 1), torch.full_like(count, 1 / self.policy.baseline_memory))
        # `finite` first: 0 times infinity is not 0.
        move = torch.where(finite, torch.minimum(torch.maximum(delta, -WINSOR * sigma), WINSOR * sigma), 0.0)
        deviation.copy_(torch.where(start, 0.0, deviation + rate * (move.abs() - deviation)))
        mean.copy_(torch.where(start, log, mean + rate * move))
        count.copy_(torch.where(start, 1.0, count + accept))
        streak.copy_(torch.where(finite, (streak + 1) * (outlier & ~shift), streak))


class UpdateRatio:
    """Size of an update relative to the weights, from up to `samples` coordinates of each matrix.

    sqrt(sum (w_after - w_before)^2 / sum w_before^2), each tensor's sample weighted by numel / sampled. Vectors
    count only where there are no matrices.
    """

    def __init__(self, params: Sequence[Tensor], samples: int = 256, process_group: Any = None):
        chosen = [p for p in params if p.dim() >= 2 and p.is_floating_point()] or list(params)
        self.params = [p for p in chosen if distributed.local(p).numel()]
        self.device = params[0].device
        self.samples, self.group = samples, process_group
        self._views: list[tuple[int, Tensor]] = []
        self._weights: Tensor | None = None
        self._before: Tensor | None = None

    @torch.no_grad()
    def begin(self) -> None:
        self._before = self._sample()

    @torch.no_grad()
    def end(self) -> Tensor | None:
        """The ratio of the step between `begin` and now, 0-dim on the device."""
        before, self._before = self._before, None
        if before is None or self._weights is None:
            return None
        after = self._sample()
        sums = torch.stack([((after - before).square() * self._weights).sum(), (before.square() * self._weights).sum()])
        if self.group is not None:
            dist.all_reduce(sums, group=None if self.group == "auto" else self.group)
        return (sums[0] / sums[1].clamp(min=1e-30)).sqrt()

    def _sample(self) -> Tensor:
        locals_ = [distributed.local(p.detach()) for p in self.params]
        if not locals_:  # a rank without a share takes part in the reduction with zeros
            self._weights = torch.zeros(0, device=self.device)
            return self._weights
        if [address for address, _ in self._views] != [p.data_ptr() for p in locals_]:
            device = locals_[0].device
            self._views, weights = [], []
            for p in locals_:
                # A view, whatever the memory order: dimensions by falling stride are contiguous in a dense tensor.
                ordered = p.permute(*sorted(range(p.dim()), key=lambda d: (-p.stride(d), d)))
                flat = ordered.view(-1) if ordered.is_contiguous() else ordered[(0,) * (p.dim() - 1)]
                part = flat[:: max(1, -(-flat.numel() // self.samples))]
                self._views.append((p.data_ptr(), part))
                weights.append(torch.full((part.numel(),), p.numel() / part.numel()))
            self._weights = torch.cat(weights).to(device)
        device = locals_[0].device
        return torch.cat([part.to(device, torch.float32, non_blocking=True) for _, part in self._views])


class Mailbox:
    """A report on its way to the host: posted after each step, taken one step later.

    Taking waits for a copy that was ordered a whole step ago, never for the step in progress, and every rank takes
    the same report at the same step.
    """

    def __init__(self) -> None:
        self._mail: tuple[Tensor, Any] | None = None
        self._event: Any = None

    def post(self, report: Tensor, labels: Any) -> None:
        if report.device.type != "cuda":
            self.put(report.detach().to("cpu", copy=True), labels)
            return
        copy = torch.empty(report.shape, dtype=report.dtype, pin_memory=True)
        copy.copy_(report, non_blocking=True)
        self.put(copy, labels)
        self._event = torch.cuda.Event()
        self._event.record()

    def put(self, report: Tensor, labels: Any) -> None:
        self._mail, self._event = (report, labels), None

    @property
    def pending(self) -> tuple[Tensor, Any] | None:
        if self._event is not None:
            self._event.synchronize()
        return self._mail

    def take(self) -> tuple[Tensor, Any] | None:
        mail = self.pending
        self._mail = self._event = None
        return mail


def values(grad: Any) -> Tensor:
    """The numbers of a gradient that this process holds: a sparse one's values, a shard of a DTensor."""
    grad = distributed.local(grad)
    return grad._values() if grad.is_sparse else grad


def shards(param: Any) -> int:
    """Into how many parts a parameter is split over the ranks."""
    if not distributed.is_sharded(param):
        return 1
    return math.prod(param.device_mesh.size(i) for i, p in enumerate(param.placements) if p.is_shard())
