"""A step on a CPU where one shape or another is dear: 16 bits, many small tensors, groups, experts.

Beside torch's AdamW as it comes. CPU time of one thread, so that what else runs on the machine disturbs it little;
interleaved rounds, of which the least counts.
"""

import random
import statistics
import time
from typing import Any, NamedTuple

import torch

from cruxy_kernels import explain_backend
from cruxy_triton.bench.host import one_thread
from cruxy_triton.errors import UserError
from cruxy_triton.optimizer import CruxyOptimizer, MetaLion

GRADIENT = 1e-3  # standard deviation
OPTIMIZERS = {"torch AdamW": torch.optim.AdamW, "meta3 AdamW": CruxyOptimizer, "MetaLion": MetaLion}


class Case(NamedTuple):
    tensors: int
    elements: int  # of each
    dtype: torch.dtype = torch.float32
    groups: bool = False  # each tensor in its own
    active: int | None = None  # tensors with a gradient, other ones in each step


CASES = {
    "3 M, fp32": Case(1, 3_000_000),
    "3 M, bf16": Case(1, 3_000_000, torch.bfloat16),
    "3 M, fp16": Case(1, 3_000_000, torch.float16),
    "60 tensors, 250 k in all": Case(60, 4_166),
    "300 groups of 64 elements": Case(300, 64, groups=True),
    "2 of 64 experts": Case(64, 4_096, active=2),
}


def run(rounds: int, only: str | None = None) -> dict[str, Any]:
    """The table, as plain data: milliseconds (least), and the median of the rounds' ratios to torch's.

    Raises UserError where no case has `only` in its name.
    """
    chosen = {name: case for name, case in CASES.items() if only is None or only in name}
    if not chosen:
        raise UserError(f"no case has {only!r} in its name: expected a part of one of {', '.join(CASES)}")
    with one_thread():
        rows = [{"case": name, **_row(case, rounds)} for name, case in chosen.items()]
    return {"rows": rows, "rounds": rounds, "torch": torch.__version__, "backend": explain_backend("cpu")[1]}


def _row(case: Case, rounds: int) -> dict[str, float]:
    racers = {name: _Racer(make, case) for name, make in OPTIMIZERS.items()}
    choose = random.Random(0)
    everybody = list(range(case.tensors))
    warm = 3 if case.active is None else 4 * case.tensors  # until all have joined
    for turn in range(warm + rounds):
        active = everybody if case.active is None else choose.sample(everybody, case.active)
        for racer in racers.values():
            racer.step(active, counts=turn >= warm)
    first = racers["torch AdamW"]
    row = {f"{name}, ms": min(racer.seconds) * 1e3 for name, racer in racers.items()}
    for name, racer in racers.items():
        if racer is not first:
            pairs = zip(racer.seconds, first.seconds, strict=True)
            row[f"{name} x torch"] = statistics.median([a / b for a, b in pairs])
    return row


class _Racer:
    def __init__(self, make: Any, case: Case) -> None:
        torch.manual_seed(0)
        values, grads = (torch.randn(case.tensors, case.elements).to(case.dtype).unbind(0) for _ in range(2))
        self.params = [torch.nn.Parameter(value.clone()) for value in values]
        self.grads = [grad * GRADIENT for grad in grads]
        self.optimizer = make([{"params": [p]} for p in self.params] if case.groups else self.params)
        self.arguments = {"loss": 1.0} if isinstance(self.optimizer, CruxyOptimizer) else {}
        self.seconds: list[float] = []

    def step(self, active: list[int], *, counts: bool) -> None:
        for p in self.params:
            p.grad = None
        for i in active:
            self.params[i].grad = self.grads[i]
        start = time.thread_time()
        self.optimizer.step(**self.arguments)
        if counts:
            self.seconds.append(time.thread_time() - start)
