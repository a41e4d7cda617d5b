"""Fault injection: what a guarded run makes of seeded disasters, beside the same run without them.

A scenario is a small regression (an MLP of 161 parameters, noisy targets, 160 steps, linearly decaying rate), one
optimizer, one fault at one time. Its run must end finite, and within 2 % of the undisturbed run's loss where the fault
is transient; a fault that stays must end in a stop with a report that names it. Faults of the disk are injected into
the writing of checkpoints: whatever happens, the newest good one has to load, and damage has to be named.
"""

import multiprocessing
import os
import random
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cruxy_triton.guard import CheckpointError, Policy, TrainingGuard, TrainingStopped, checkpoints, events
from cruxy_triton.optimizer import CruxyOptimizer

STEPS, SIZE, BATCH = 160, 512, 32
TOLERANCE = 1.02
# Snapshots closer together than the defaults: the whole run is 160 steps.
POLICY = Policy(snapshot_interval=20, snapshot_confirm=5)

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "SGD": lambda p: torch.optim.SGD(p, lr=5e-2, momentum=0.9),
    "CruxyOptimizer": lambda p: CruxyOptimizer(p, lr=2e-2),
}
TRANSIENT = ("nan in one gradient", "inf in one gradient", "nan in all gradients", "nan loss", "spike", "burst",
             "shuffled labels", "padding batch", "fp16 overflow", "nan parameter")  # fmt: skip
LASTING = ("dead layer", "nan for ever", "overflow for ever")
DISK = ("kill while a checkpoint is written", "full disk", "truncated checkpoint", "changed byte")


@dataclass(frozen=True)
class Scenario:
    fault: str
    optimizer: str
    seed: int
    step: int = 0
    length: int = 1
    magnitude: float = 1.0


@dataclass(frozen=True)
class Outcome:
    scenario: Scenario
    passed: bool
    result: str
    ratio: float | None = None  # final loss over the undisturbed run's


def scenarios(count: int, first_seed: int = 0) -> list[Scenario]:
    """`count` scenarios, the faults in turn, everything else drawn from the seed."""
    faults = [*TRANSIENT, *LASTING, *DISK]
    made = []
    for i in range(count):
        draw = random.Random(first_seed + i)
        fault = faults[i % len(faults)]
        made.append(
            Scenario(
                fault=fault,
                optimizer=draw.choice(sorted(OPTIMIZERS)),
                seed=first_seed + i,
                step=draw.randrange(5, 110),
                length=draw.randint(2, 4) if fault == "burst" else draw.randint(1, 2) if "gradient" in fault else 1,
                magnitude=10 ** draw.uniform(1, 6),
            )
        )
    return made


class Problem:
    """Noisy regression of a random teacher; the noise dominates the loss, as it does in language."""

    def __init__(self, seed: int):
        generator = torch.Generator().manual_seed(seed % 8)
        self.x = torch.randn(SIZE, 8, generator=generator)
        teacher = torch.randn(8, 1, generator=generator) / 3
        self.y = (self.x @ teacher).tanh() + 0.7 * torch.randn(SIZE, 1, generator=generator)
        self.order = torch.stack([torch.randperm(SIZE, generator=generator)[:BATCH] for _ in range(STEPS)])
        torch.manual_seed(seed % 8)
        self.model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        rows = self.order[step]
        return self.x[rows], self.y[rows]

    def loss(self) -> float:
        with torch.no_grad():
            return float((self.model(self.x) - self.y).square().mean())


def run(scenario: Scenario) -> Outcome:
    """Play one scenario; deterministic."""
    if scenario.fault in DISK:
        return _disk(scenario)
    clean = _clean_loss(scenario.optimizer, scenario.seed % 8)
    problem, guard, stopped = _train(scenario)
    ratio = problem.loss() / clean
    finite = ratio == ratio and all(bool(torch.isfinite(p).all()) for p in problem.model.parameters())
    if scenario.fault in TRANSIENT:
        done = f"ended within {100 * (TOLERANCE - 1):.0f} %" if ratio <= TOLERANCE else f"ended at {ratio:.3f}x"
        passed = finite and stopped is None and ratio <= TOLERANCE
        return Outcome(scenario, passed, stopped or done, ratio)
    if scenario.fault == "dead layer":
        named = [event.layer for event in guard.log if event.kind == events.NOTE]
        return Outcome(scenario, finite and stopped is None and "2.weight" in named, "went on, layer named", ratio)
    word = "overflow" if scenario.fault == "overflow for ever" else "not finite"
    passed = finite and stopped is not None and word in stopped
    return Outcome(scenario, passed, "stopped with a report" if stopped else "did not stop", ratio)


_CLEAN: dict[tuple[str, int], float] = {}


def _clean_loss(optimizer: str, seed: int) -> float:
    key = (optimizer, seed)
    if key not in _CLEAN:
        problem, _, stopped = _train(Scenario("none", optimizer, seed, step=STEPS + 1))
        assert stopped is None, stopped
        _CLEAN[key] = problem.loss()
    return _CLEAN[key]


def _train(scenario: Scenario) -> tuple[Problem, TrainingGuard, str | None]:
    problem = Problem(scenario.seed)
    model = problem.model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # CruxyOptimizer is not told the loss here; schedulers and skips
        optimizer = OPTIMIZERS[scenario.optimizer](model.parameters())
        scaled = "overflow" in scenario.fault
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=40) if scaled else None
        guard = TrainingGuard(optimizer, model, POLICY, scaler=scaler)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
        try:
            for step in range(STEPS):
                lasting = scenario.fault in LASTING
                at = step >= scenario.step if lasting else scenario.step <= step < scenario.step + scenario.length
                _step(problem, optimizer, guard, scaler, scenario, step, at)
                schedule.step()
            guard.finish()
        except TrainingStopped as report:
            return problem, guard, str(report)
    return problem, guard, None


def _step(
    problem: Problem, optimizer: Any, guard: TrainingGuard, scaler: Any, scenario: Scenario, step: int, at: bool
) -> None:
    fault = scenario.fault if at else ""
    model: Any = problem.model
    x, y = problem.batch(step)
    draw = torch.Generator().manual_seed(scenario.seed)
    if fault == "shuffled labels":
        y = y[torch.randperm(len(y), generator=draw)]
    elif fault == "padding batch":
        x, y = torch.zeros_like(x), torch.zeros_like(y)
    elif fault == "nan parameter":
        with torch.no_grad():
            model[0].weight[scenario.seed % 16, scenario.seed % 8] = float("nan")
    optimizer.zero_grad()
    loss = (model(x) - y).square().mean()
    if fault == "nan loss":
        loss = loss * float("nan")
    (loss if scaler is None else scaler.scale(loss)).backward()
    params = list(model.parameters())
    one = params[scenario.seed % len(params)].grad.view(-1)
    if fault == "nan in one gradient":
        one[0] = float("nan")
    elif fault == "inf in one gradient":
        one[-1] = float("inf")
    elif fault in ("nan in all gradients", "nan for ever"):
        for p in params:
            p.grad.fill_(float("nan"))
    elif fault in ("fp16 overflow", "overflow for ever"):
        one[0] = float("inf")
    elif fault in ("spike", "burst"):
        for p in params:
            p.grad.mul_(scenario.magnitude)
    elif fault == "dead layer":
        model[2].weight.grad.zero_()
    guard.observe(loss, batch=step)
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()


# -- the disk ---------------------------------------------------------------------------------------------------


def _disk(scenario: Scenario) -> Outcome:
    draw = random.Random(scenario.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for step in (1, 2):
            checkpoints.save_checkpoint(folder, step, _objects(step))
        if scenario.fault == "kill while a checkpoint is written":
            point = draw.randrange(1, 25)
            killed = _killed_at(point, checkpoints.save_checkpoint, folder, 3, _objects(3))
            expected, damage = (2, 3) if killed else (3, 3), 0
        elif scenario.fault == "full disk":
            try:
                with _failing_writes(after=draw.randrange(0, 4)):
                    checkpoints.save_checkpoint(folder, 3, _objects(3))
                return Outcome(scenario, False, "a full disk went unnoticed")
            except CheckpointError:
                expected, damage = (2, 2), 0
        else:
            file = folder / "checkpoint-2" / draw.choice(["model.pt", "optimizer.pt"])
            data = bytearray(file.read_bytes())
            if scenario.fault == "truncated checkpoint":
                data = data[: draw.randrange(len(data))]
            else:
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            file.write_bytes(data)
            expected, damage = (1, 1), 1
        step, objects, damaged = checkpoints.load_checkpoint(folder)
        whole = torch.equal(objects["model"]["w"], _objects(step)["model"]["w"])
        passed = expected[0] <= step <= expected[1] and len(damaged) == damage and whole
        return Outcome(scenario, passed, f"continued from a good checkpoint{', damage named' if damage else ''}")


def _objects(step: int) -> dict[str, Any]:
    w = torch.full((64,), float(step))
    return {"model": {"w": w}, "optimizer": {"step": step, "exp_avg": w / 2}}


def _killed_at(point: int, work: Callable[..., Any], *arguments: Any) -> bool:
    """Do `work` (it is pickled) in a child process that is killed at its `point`-th call into the file system."""
    # Forked from a server without threads: a fork of this process could inherit a lock that nobody releases.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([checkpoints.__name__])
    child = context.Process(target=_work_until, args=(point, work, arguments))
    child.start()
    child.join(60)
    if child.exitcode not in (0, -signal.SIGKILL):
        child.kill()
        raise RuntimeError(f"{work.__name__}{arguments}: not done after 60 s (exit code {child.exitcode})")
    return child.exitcode == -signal.SIGKILL


def _work_until(point: int, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    calls = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == point:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for module, name in ((os, "fsync"), (os, "mkdir"), (os, "rename"), (os, "replace"), (os, "open"),
                         (os, "rmdir"), (os, "unlink")):  # fmt: skip
        setattr(module, name, counted(getattr(module, name)))
    work(*arguments)
    os._exit(0)


@contextmanager
def _failing_writes(after: int) -> Iterator[None]:
    """The disk is full at the `after`-th synchronisation."""
    original, calls = os.fsync, 0

    def fsync(handle: int) -> None:
        nonlocal calls
        if calls >= after:
            raise OSError(28, "No space left on device")
        calls += 1
        original(handle)

    os.fsync = fsync
    try:
        yield
    finally:
        os.fsync = original


def table(count: int) -> list[dict[str, Any]]:
    """Play `count` scenarios; a row per fault: how many, how many passed, what happened, the worst loss ratio."""
    rows: dict[str, dict[str, Any]] = {}
    for scenario in scenarios(count):
        outcome = run(scenario)
        empty = {"fault": scenario.fault, "scenarios": 0, "passed": 0, "worst loss": None}
        row = rows.setdefault(scenario.fault, empty)
        row["scenarios"] += 1
        row["passed"] += outcome.passed
        if outcome.ratio is not None and outcome.ratio == outcome.ratio:
            row["worst loss"] = max(row["worst loss"] or 0.0, outcome.ratio)
        row["result"] = outcome.result if outcome.passed or "result" not in row else row["result"]
        if not outcome.passed:
            row.setdefault("failed", f"{scenario} -> {outcome.result}")
    return list(rows.values())
