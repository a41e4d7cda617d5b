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
# A baseline's deviation is at least FLOOR + YOUNG / count (in logarithms): the second step of a run is an outlier only
# at thousands of times the first, the tenth at more than 10 times the others.
FLOOR, YOUNG = 0.2, 2.0
WINSOR = 3.0  # what an accepted value moves a baseline by at most, in deviations

# The head of a report; behind it the norms (n + 1, the last is the global one) and the scores (n + 1).
SKIP, LOSS, FOUND_INF, SCALE, CLIPPED, NORM, SCORE, RATIO = range(8)
HEAD = 8


@dataclass
class Verdict:
    """Device tensors: what to do with this step.

    `skip` is 0-dim, `clipped` the number of norms above their limit; `under` (n + 1) the logarithms of what brings
    each norm to its limit, 0 where it is below.
    """

    skip: Tensor
    clipped: Tensor
    under: Tensor
    report: Tensor

    @property
    def factors(self) -> Tensor:
        """(n,): what each tensor's gradient is multiplied by."""
        return torch.exp(torch.minimum(self.under[:-1], self.under[-1]))

    @property
    def whole(self) -> Tensor:
        """0-dim: what the global norm alone asks for."""
        return torch.exp(self.under[-1])


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
        self._zero, self._one = torch.zeros((), device=self.device), torch.ones((), device=self.device)

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
        value = self._empty if loss is None else loss.to(self.device, torch.float32, non_blocking=True).reshape(())
        norms, value = self._over_ranks(norms, value)
        norms = torch.cat([norms, torch.linalg.vector_norm(norms).reshape(1)])

        # Few operators: each is a launch on an accelerator. What is not finite has a delta of 0.
        mean, deviation, count, _ = self.state
        log = norms.log()
        finite = log.abs() < math.inf
        sigma = torch.maximum(NORMAL * deviation, YOUNG / count.clamp(min=1e-6) + FLOOR)
        delta = torch.where(finite, log - mean, self._zero)
        score = delta / sigma
        outlier = score > sigmas
        limit = sigma * sigmas
        if self.policy.tensor_ratio is not None:
            ratio = torch.where(count[:n] > 0, math.log(self.policy.tensor_ratio), math.inf)
            limit[:n] = torch.minimum(limit[:n], ratio)
        under = (limit - delta).clamp(max=0)
        if not self.policy.clip:
            under.zero_()
        elif not self.policy.clip_tensors:
            under[:n] = 0

        checked = norms[n] if loss is None else norms[n] + value  # finite only where both are
        good = (checked.abs() < math.inf) & (score[n] <= self.policy.skip_sigmas)
        overflow = self._zero
        if found_inf is not None:
            overflow = (found_inf.to(self.device, non_blocking=True).reshape(()) > 0).float()
            good = good & (overflow == 0)
        self._learn(log, finite, outlier, sigma, score, good)
        skip = ~good
        clipped = (under < 0).sum()
        scale = self._empty if grad_scale is None else grad_scale.to(self.device, torch.float32).reshape(())
        head = torch.stack([skip.float(), value, overflow, scale, clipped.float(), norms[n], score[n], self._empty])
        return Verdict(skip, clipped, under, torch.cat([head, norms, score]))

    def _norms(self, owners: list[int]) -> Tensor:
        """The norm of each tensor's gradient in fp32 (0 where there is none), on one device."""
        grads = {i: values(self.params[i].grad) for i in owners}
        if len({grad.device for grad in grads.values()}) == 1 and len(owners) == len(self.params):
            norms = torch.stack(torch._foreach_norm(list(grads.values()), 2, dtype=torch.float32))
            return norms.to(self.device, non_blocking=True)
        by_device: dict[torch.device, list[int]] = {}
        for i, grad in grads.items():
            by_device.setdefault(grad.device, []).append(i)
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

    def _learn(self, log: Tensor, finite: Tensor, outlier: Tensor, sigma: Tensor, score: Tensor, good: Tensor) -> None:
        """Move the baselines: not by what is not finite, nor by outliers, nor in a step that is skipped.

        A level that lasts is no outlier: at the `patience`-th in a row the baseline starts again from there.
        """
        mean, deviation, count, streak = self.state
        start = ((outlier & (streak >= self.policy.patience - 1)) | (count == 0)) & finite
        accept = finite & ~outlier & good
        rate = (1 / (count + 1)).clamp(min=1 / self.policy.baseline_memory) * accept
        move = score.clamp(-WINSOR, WINSOR) * sigma
        torch.where(start, self._zero, torch.lerp(deviation, move.abs(), rate), out=deviation)
        torch.where(start, log, torch.addcmul(mean, rate, move), out=mean)
        torch.where(start, self._one, count + accept, out=count)
        torch.mul(streak + 1, outlier, out=streak)


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
    if type(grad) is not Tensor:
        grad = distributed.local(grad)
    return grad._values() if grad.is_sparse else grad


def shards(param: Any) -> int:
    """How many ranks share one parameter."""
    if not distributed.is_sharded(param):
        return 1
    return math.prod(param.device_mesh.size(i) for i, p in enumerate(param.placements) if p.is_shard())
