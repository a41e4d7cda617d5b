"""Stress: a small character model at rates from good to absurd, each optimizer alone and under the guard.

A GPT of 0.8 M parameters (4 layers, width 128, context 64, batch 16) reads Tiny Shakespeare or WikiText-2 for 300
steps, once per learning rate, optimizer, guard and seed; the result is the validation loss. `verdict` puts it beside
the claim: under the guard no run ends above 1.10 times the best unguarded loss of its optimizer, up to 30 times the
rate that is best unguarded, and at that rate the guard costs nothing.

With `--model smollm2` the same, smaller, for LoRA on SmolLM2-135M (`adapters.py`): AdamW at one, ten and thirty times
its rate, 40 steps.
"""

import functools
import itertools
import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cruxy_triton.bench import adapters
from cruxy_triton.bench.characters import CharacterModel, Size, Text, embedded_text, read_text
from cruxy_triton.bench.runs import Runs
from cruxy_triton.errors import UserError
from cruxy_triton.guard import Policy, TrainingGuard, TrainingStopped
from cruxy_triton.optimizer import CruxyOptimizer

RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
TEXTS = {"shakespeare": "tinyshakespeare.txt", "wikitext2": "wikitext2/valid.txt"}
BEYOND, MARGIN = 30.0, 1.10


FULL = Size()
QUICK = Size(layers=1, width=32, context=32, batch=8, steps=40, evaluations=2)


@dataclass(frozen=True)
class Contestant:
    """An optimizer with its schedule and clipping: `clip` works on the model's gradients before each step."""

    make: Callable[[Any, float], torch.optim.Optimizer]
    schedule: str = "constant"
    clip: str | None = None


def _adamw(params: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.95), weight_decay=0.1)


CONTESTANTS = {
    "AdamW": Contestant(_adamw),
    "AdamW, clip 1.0": Contestant(_adamw, clip="norm"),
    "AdamW, warm-up + cosine": Contestant(_adamw, schedule="cosine"),
    "AdamW, ZClip": Contestant(_adamw, clip="zclip"),
    "AdamW, AdaGC": Contestant(_adamw, clip="adagc"),
    "CruxyOptimizer": Contestant(lambda p, lr: CruxyOptimizer(p, lr=lr)),
    "Cruxy Lion": Contestant(
        lambda p, lr: CruxyOptimizer(p, lr=lr, use_lion=True, betas=(0.9, 0.95), weight_decay=0.3)
    ),
}


@dataclass(frozen=True)
class Run:
    text: str
    optimizer: str
    lr: float
    guard: bool
    seed: int
    loss: float  # validation; infinite where the run diverged
    actions: str
    stopped: bool

    def key(self) -> tuple[Any, ...]:
        return self.text, self.optimizer, self.lr, self.guard, self.seed


def read(name: str, folder: Path | None) -> str:
    """A text by name from `folder`; without a folder, the embedded one."""
    return embedded_text() if folder is None else read_text(folder / TEXTS[name])


# -- clipping by others, as published ------------------------------------------------------------------------------


class ZClip:
    """Global z-score clipping, arXiv 2504.02507 (alpha .97, threshold 2.5, 25 steps of warm-up, norm at most 1)."""

    def __init__(self) -> None:
        self.first: list[float] = []
        self.mean = self.variance = 0.0

    def __call__(self, params: list[Tensor]) -> None:
        norm = float(torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None]))
        limit = norm
        if len(self.first) < 25:
            self.first.append(norm)
            self.mean, self.variance = statistics.fmean(self.first), statistics.pvariance(self.first)
        else:
            deviation = math.sqrt(self.variance)
            score = (norm - self.mean) / (deviation + 1e-6)
            if score > 2.5:
                limit = self.mean + 2.5 * deviation / (score / 2.5)
            self.mean = 0.97 * self.mean + 0.03 * limit
            self.variance = 0.97 * self.variance + 0.03 * (limit - self.mean) ** 2
        torch.nn.utils.clip_grad_norm_(params, min(limit, 1.0))


class AdaGC:
    """Clipping of each tensor against its history, arXiv 2502.11034 (ratio 1.05, beta .98).

    The paper's warm-up of 100 steps is a tenth of a run here; during it the global norm is clipped at 1.
    """

    def __init__(self, steps: int) -> None:
        self.warm, self.step = max(1, steps // 10), 0
        self.history: list[float] = []

    def __call__(self, params: list[Tensor]) -> None:
        self.step += 1
        if self.step <= self.warm:
            torch.nn.utils.clip_grad_norm_(params, 1.0)
        norms = [float(p.grad.norm()) if p.grad is not None else 0.0 for p in params]
        if self.step <= self.warm:
            self.history = [min(h, n) for h, n in zip(self.history or norms, norms, strict=True)]
            return
        for i, (p, norm) in enumerate(zip(params, norms, strict=True)):
            factor = min(1.0, 1.05 * self.history[i] / max(norm, 1e-30))
            if factor < 1 and p.grad is not None:
                p.grad.mul_(factor)
            self.history[i] = 0.98 * self.history[i] + 0.02 * factor * norm


def _clipping(kind: str | None, steps: int) -> Callable[[list[Tensor]], Any]:
    if kind == "norm":
        return lambda params: torch.nn.utils.clip_grad_norm_(params, 1.0)
    return {"zclip": ZClip, "adagc": lambda: AdaGC(steps), None: lambda: lambda params: None}[kind]()


# -- runs ----------------------------------------------------------------------------------------------------------


def run(text: Text | adapters.Questions, name: str, optimizer: str, lr: float, guarded: bool, seed: int) -> Run:
    """One run from scratch; deterministic per seed."""
    size, contestant = text.size, CONTESTANTS[optimizer]
    torch.manual_seed(seed)
    model: Any = text.model() if isinstance(text, adapters.Questions) else CharacterModel(text.symbols, size)
    params: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    made = contestant.make(params, lr)
    clip = _clipping(contestant.clip, size.steps)
    schedule = None
    if contestant.schedule == "cosine":
        warm = max(1, size.steps // 10)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            made, lambda step: min(1.0, (step + 1) / warm) * (0.5 + 0.5 * math.cos(math.pi * step / size.steps))
        )
    guard = TrainingGuard(made, model, Policy()) if guarded else None
    stopped = False
    try:
        for step in range(size.steps):
            loss = model.loss(*text.batch(seed * 1_000_003 + step))
            made.zero_grad()
            loss.backward()
            clip(params)
            if guard is not None:
                guard.observe(loss, batch=step)
            if isinstance(made, CruxyOptimizer):
                made.step(loss=loss.detach())
            else:
                made.step()
            if schedule is not None:
                schedule.step()
    except TrainingStopped:
        stopped = True
    loss_now = model.held_out_loss(text)
    actions = "" if guard is None else guard.log.summary().partition("\n")[0]
    return Run(name, optimizer, lr, guarded, seed, loss_now if math.isfinite(loss_now) else math.inf, actions, stopped)


@dataclass(frozen=True)
class Cell:
    """One run to be made."""

    text: str
    folder: Path | None
    size: Size
    optimizer: str
    lr: float
    guard: bool
    seed: int

    def key(self) -> tuple[Any, ...]:
        return self.text, self.optimizer, self.lr, self.guard, self.seed


@functools.cache
def _text(name: str, folder: Path | None, size: Size) -> Text | adapters.Questions:
    return adapters.Questions(folder, size) if name == adapters.NAME else Text(read(name, folder), size)


def play(cell: Cell) -> Run:
    return run(_text(cell.text, cell.folder, cell.size), *cell.key())


def grid(
    *, texts: Iterable[str], folder: Path | None, rates: Iterable[float], optimizers: Iterable[str], seeds: int,
    size: Size,
) -> list[Cell]:
    """Every cell, seed by seed, so that what is done first is a whole table."""
    cells = itertools.product(range(seeds), texts, optimizers, rates, (False, True))
    return [Cell(text, folder, size, name, lr, guarded, seed) for seed, text, name, lr, guarded in cells]


def rows(runs: list[Run]) -> list[dict[str, Any]]:
    """Mean validation loss by optimizer and rate, without and with the guard."""
    table: dict[tuple[str, str, bool], dict[str, Any]] = {}
    for r in runs:
        key = (r.text, r.optimizer, r.guard)
        row = table.setdefault(key, {"text": r.text, "optimizer": r.optimizer, "guard": "yes" if r.guard else "no"})
        row.setdefault(f"{r.lr:g}", []).append(r.loss)
    for row in table.values():
        row.update({k: statistics.fmean(v) for k, v in row.items() if isinstance(v, list)})
    return list(table.values())


def verdict(runs: list[Run]) -> list[dict[str, Any]]:
    """Per text and optimizer: the best unguarded rate, the guard's loss there, the worst runs up to 30 times it."""
    found = []
    for text, optimizer in dict.fromkeys((r.text, r.optimizer) for r in runs):
        mine = [r for r in runs if (r.text, r.optimizer) == (text, optimizer)]
        by_rate: dict[tuple[float, bool], list[float]] = {}
        for r in mine:
            by_rate.setdefault((r.lr, r.guard), []).append(r.loss)
        means = {key: statistics.fmean(losses) for key, losses in by_rate.items()}
        best = min((lr for lr, guarded in means if not guarded), key=lambda lr: means[lr, False])
        tuned, spread = means[best, False], max(by_rate[best, False]) - min(by_rate[best, False])
        wild = [r for r in mine if best <= r.lr <= BEYOND * best * 1.001]
        beyond = {guarded: max(r.loss for r in wild if r.guard is guarded) for guarded in (False, True)}
        found.append(
            {
                "text": text, "optimizer": optimizer, "tuned lr": best, "tuned loss": tuned,
                "spread over seeds": spread, "with guard": means[best, True],
                "worst to 30x without": beyond[False] / tuned, "worst to 30x with": beyond[True] / tuned,
                "held": "yes" if beyond[True] <= MARGIN * tuned and means[best, True] <= tuned + spread else "no",
            }
        )  # fmt: skip
    return found


def report(
    *, model: str, quick: bool, data: Path | None, optimizers: list[str] | None, seeds: int, workers: int,
    out: Path | None, say: Callable[[str], Any],
) -> dict[str, Any]:
    """The whole suite, with a line per run on the way; see `bench stress --help`.

    Raises:
        UserError: an unknown optimizer, a missing text, or an `out` that holds something else.
    """
    lora = model == "smollm2"
    chosen = optimizers or (["AdamW"] if lora else list(CONTESTANTS))
    unknown = [name for name in chosen if name not in CONTESTANTS]
    if unknown:
        raise UserError(f"unknown optimizer {unknown[0]!r}; expected one of {', '.join(CONTESTANTS)}")
    if seeds < 1 or workers < 1:
        raise UserError("--seeds and --workers must be at least 1")
    texts = [adapters.NAME] if lora else list(TEXTS) if data is not None else ["embedded"]
    sizes = (adapters.QUICK, adapters.FULL) if lora else (QUICK, FULL)
    size = sizes[0] if quick else sizes[1]
    for name in texts:  # what is wrong with it is said here and not by every worker
        _text(name, data, size)
    rates = (1e-3, 3e-2) if quick else adapters.RATES if lora else RATES
    cells = grid(texts=texts, folder=data, rates=rates, optimizers=chosen, seeds=seeds, size=size)
    store = Runs(Run, size, out)
    for r in store.play(play, cells, workers):
        guard = "with guard" if r.guard else "alone"
        say(f"{r.text}, {r.optimizer}, lr {r.lr:g}, seed {r.seed}, {guard}: {r.loss:.3f} {r.actions}")
    runs = [store.done[cell.key()] for cell in cells]
    return {"rows": rows(runs), "verdict": verdict(runs), "runs": [asdict(r) for r in runs], "seeds": seeds}
