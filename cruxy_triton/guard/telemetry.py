"""Telemetry: what one step's gradients look like against their own history, judged on the device.

The norm of each tensor's gradient and of the whole are tracked in logarithms, each by a robust baseline; the law is
cruxy_kernels/laws/judge.py, one launch. `judge` returns device tensors: a factor for each tensor, whether to skip the
step, and a `report` vector that the host receives as an asynchronous copy one step later (`Mailbox`). Nothing here
waits for the device but `Verdict.read`.

Under torch.distributed the norms and the loss are summed over the ranks first, in one reduction, so that every rank
judges the same numbers: a shard (DTensor) counts as what it is, a replicated gradient as its share.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cruxy_kernels import GradientJudge, Limits
from cruxy_kernels import layout as L
from cruxy_triton import distributed
from cruxy_triton.guard.policy import Policy

# The head of a report; behind it the norms (n + 1, the last is the global one) and the scores (n + 1).
SKIP, LOSS, FOUND_INF, SCALE = L.JUDGE_SKIP, L.JUDGE_LOSS, L.JUDGE_FOUND_INF, L.JUDGE_SCALE
CLIPPED, NORM, SCORE, RATIO = L.JUDGE_CLIPPED, L.JUDGE_NORM, L.JUDGE_SCORE, L.JUDGE_RATIO
HEAD = L.JUDGE_HEAD


class Verdict:
    """What to do with a step: a judgement of n tensors (`cruxy_kernels.GradientJudge`) in its parts, on the device.

    skip, clipped: 0-dim, 1 to skip the step, and how many norms are above their limit. report: what the host receives.
    found_inf, grad_scale: 0-dim, for an optimizer that skips and divides by itself, as with a GradScaler.
    """

    def __init__(self, judgement: Tensor, tensors: int):
        self.report = judgement[L.JUDGE_REPORT : L.JUDGE_REPORT + HEAD + 2 * (tensors + 1)]
        self.skip, self.clipped = self.report[SKIP], self.report[CLIPPED]
        self.found_inf, self.grad_scale = judgement[L.JUDGE_FOUND], judgement[L.JUDGE_APPLY]
        self._above = judgement[-(tensors + 1) :]

    @property
    def factors(self) -> Tensor:
        """(n,): what each tensor's gradient is multiplied by."""
        return torch.exp(torch.minimum(self._above[:-1], self._above[-1]))

    def read(self) -> tuple[bool, bool]:
        """Whether to skip and whether to clip: the host waits for the device."""
        head = self.report[:HEAD].tolist()
        return head[SKIP] > 0, head[CLIPPED] > 0


class Telemetry:
    """Baselines of n tensors and of their global norm.

    Args:
        params: the tensors that the optimizer owns.
        policy: thresholds.
        process_group: over which ranks the norms and the loss are summed; None: this process alone.
        compiles: see `cruxy_kernels.GradientJudge`.
    """

    def __init__(self, params: Sequence[Tensor], policy: Policy, process_group: Any = None, *, compiles: bool = False):
        self.params, self.group = list(params), process_group
        self.device = self.params[0].device
        # Rows: mean and mean absolute deviation of the log norm, values accepted, outliers in a row.
        self.state = torch.zeros((4, len(self.params) + 1), device=self.device)
        limits = Limits(
            skip=policy.skip_sigmas, far=policy.clip_sigmas, memory=policy.baseline_memory, patience=policy.patience,
            ratio=policy.tensor_ratio,
            clip=None if not policy.clip else "tensors" if policy.clip_tensors else "global",
        )  # fmt: skip
        self._judge = GradientJudge(self.state, limits, compiles=compiles)
        self._weights: Tensor | None = None

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
        grads = [None if p.grad is None else values(p.grad) for p in self.params]
        devices = {grad.device for grad in grads if grad is not None}
        if not devices:
            return None
        loss, scale, found_inf = (self._number(x) for x in (loss, grad_scale, found_inf))
        if devices == {self.device} and self.group is None:
            found = self._judge.judge(grads, sigmas=sigmas, loss=loss, grad_scale=scale, found_inf=found_inf)
        else:
            norms, loss = self._over_ranks(self._norms(grads, scale), loss)
            found = self._judge.judge_norms(norms, sigmas=sigmas, loss=loss, grad_scale=scale, found_inf=found_inf)
        return Verdict(found, len(self.params))

    def _number(self, value: Tensor | None) -> Tensor | None:
        return None if value is None else value.to(self.device, torch.float32, non_blocking=True).reshape(())

    def _norms(self, grads: list[Tensor | None], scale: Tensor | None) -> Tensor:
        """The unscaled norm of each tensor's gradient (0 where there is none), from several devices on one."""
        by_device: dict[torch.device, dict[int, Tensor]] = {}
        for i, grad in enumerate(grads):
            if grad is not None:
                by_device.setdefault(grad.device, {})[i] = grad
        out = torch.zeros(len(grads), device=self.device)
        for part in by_device.values():
            norms = torch.stack(torch._foreach_norm(list(part.values()), 2, dtype=torch.float32))
            index = torch.tensor(list(part), pin_memory=self.device.type == "cuda").to(self.device, non_blocking=True)
            out.index_copy_(0, index, norms.to(self.device, non_blocking=True))
        return out if scale is None else out / scale

    def _over_ranks(self, norms: Tensor, loss: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.group is None:
            return norms, loss
        group = None if self.group == "auto" else self.group
        world = dist.get_world_size(group)
        if self._weights is None:
            # A tensor that k ranks hold a share of is held world / k times.
            self._weights = torch.tensor([shards(p) / world for p in self.params], device=self.device)
        # Every rank sends as many numbers, also one that was told no loss.
        value = torch.full((), math.nan, device=self.device) if loss is None else loss
        total = torch.cat([norms.square() * self._weights, value.reshape(1) / world])
        dist.all_reduce(total, group=group)
        return total[:-1].sqrt(), None if loss is None else total[-1]


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
