"""`--lr auto`: a learning rate for adapters, found by trying a few for some steps each before the run.

All from the same start, on the same batches, with the run's own trainer and optimizer (each rule has its own scale),
but without warm-up, decay and guard, which would save a rate that is too large. The loss on other training records
decides; the held-out ones are left for the judgement of the run. The rates are three times apart, and more are tried
beyond the edge while the best one lies there, so that no rate is taken that was not tried. Afterwards adapters and
random numbers are what they were: the run is that of the rate found, bit for bit on a CPU.
"""

import gc
import math
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from cruxy_triton.errors import UserError
from cruxy_triton.finetune.data import Rows
from cruxy_triton.finetune.folder import RunFolder
from cruxy_triton.finetune.preview import steps_of
from cruxy_triton.finetune.recipe import Recipe
from cruxy_triton.finetune.train import Trainer
from cruxy_triton.settings import DEFAULT_LR, TORCHS

STEPS = 12  # at each rate: what was tried to pick the rate that is also the best of whole runs
APART = 3.0
FIRST = (1.0, APART, APART**2)  # times the optimizer's default, which is that of models of a billion parameters
MOST_RATES = 8
JUDGES = 32  # other records that decide, or fewer of a small data set: a fifth of it
JUDGING_TOKENS = 16_384  # at most: records of plain text are long


class _NextStep(TrainerCallback):
    """What the run's telemetry does beside its rows: each step has its own loss."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._start_step()


class _Trial(Trainer):
    """The run's trainer, which leaves nothing behind."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(_NextStep(self))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """transformers saves after the last step whatever the interval is."""


def search(
    model: Any,
    tokenizer: Any,
    rows: Rows,
    recipe: Recipe,
    dtype: torch.dtype,
    *,
    packed: bool,
    sequences: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Tries rates for `recipe`, whose `lr` is open, on `rows`, which make `sequences`; changes nothing.

    Returns what goes into run.json: steps, records, before (the judging loss), tried (lr, loss, seconds), lr, seconds.
    Raises UserError for too few records, and where no rate gives a finite loss.
    """
    if len(rows) < 2:
        raise UserError("--lr auto needs at least 2 training records, one to try on and one to judge by; give a rate")
    steps = min(STEPS, steps_of(sequences, recipe))
    used, judges = _split(rows, recipe, steps, packed)
    default = DEFAULT_LR[recipe.optimizer]
    began = time.perf_counter()
    say(
        f"learning rate: trying some for {steps} steps each, judged by the loss on {len(judges)} other training records"
    )
    tried: dict[float, dict[str, Any]] = {}
    before = math.nan
    with _put_back(model) as put_back, tempfile.TemporaryDirectory(prefix="cruxy-rate-") as place:

        def judged(lr: float) -> float:
            nonlocal before
            clock = time.perf_counter()
            trial = _Trial(
                model, tokenizer, [used, judges], _trial_recipe(recipe, lr, steps), RunFolder(Path(place) / "trial"),
                dtype, packed=packed,
            )  # fmt: skip
            if not tried:
                before = trial.held_out()["loss"]
            trial.train()
            loss = trial.held_out()["loss"]
            del trial
            gc.collect()  # its optimizer's state, before the next one's
            put_back()
            known, seconds = math.isfinite(loss), time.perf_counter() - clock
            tried[lr] = {"lr": lr, "loss": loss if known else None, "seconds": seconds}
            say(f"  {lr:g}: {loss:.4f} after {steps} steps ({before:.4f} before), {seconds:.1f} s")
            return loss if known else math.inf

        found = _climb([default * factor for factor in FIRST], judged)
    lr, at_edge = found
    if tried[lr]["loss"] is None:
        raise UserError(
            f"--lr auto: the loss is not finite at any of the rates {', '.join(f'{x:g}' for x in sorted(tried))}; give "
            "--dtype float32, or look at the data"
        )
    seconds = time.perf_counter() - began
    say(f"learning rate: {lr:g}, the best of {len(tried)}; the search took {steps * len(tried)} steps, {seconds:.0f} s")
    if at_edge:
        say(f"warning: {lr:g} is at the edge of what was tried; the best rate may lie beyond")
    return {
        "lr": lr,
        "steps": steps,
        "records": len(used),
        "judges": len(judges),
        "before": before,
        "tried": [tried[x] for x in sorted(tried)],
        "at_edge": at_edge,
        "seconds": seconds,
    }


def _climb(first: list[float], judged: Callable[[float], float]) -> tuple[float, bool]:
    """The rate with the lowest loss of `first` and of those beyond its edges; whether it is at the edge still."""
    losses = {rate: judged(rate) for rate in first}
    while True:
        best = min(losses, key=lambda rate: losses[rate])
        further = {min(losses): best / APART, max(losses): best * APART}.get(best)
        if further is None or len(losses) >= MOST_RATES:
            return best, further is not None
        losses[further] = judged(further)


def _split(rows: Rows, recipe: Recipe, steps: int, packed: bool) -> tuple[Rows, Rows]:
    """Rows to try on, as many as the steps take, and others to judge by."""
    order = list(range(len(rows)))
    random.Random(recipe.seed).shuffle(order)
    judges: Rows = []
    tokens = 0
    for index in order[: min(JUDGES, max(1, len(rows) // 5))]:
        if judges and tokens + len(rows[index]["input_ids"]) > JUDGING_TOKENS:
            break
        judges.append(rows[index])
        tokens += len(rows[index]["input_ids"])
    rest = [rows[index] for index in order[len(judges) :]]
    needed = steps * recipe.batch_size
    if not packed:
        return rest[:needed], judges
    assert recipe.max_seq_length is not None, "the plan decides the sequence length first"
    ends = np.cumsum([len(row["input_ids"]) for row in rest])
    return rest[: int(np.searchsorted(ends, needed * recipe.max_seq_length)) + 1], judges


def _trial_recipe(recipe: Recipe, lr: float, steps: int) -> Recipe:
    # The clipping of each tensor is the guard's work where the optimizer has none of its own.
    guarded = recipe.clip == "tensor" and recipe.optimizer in TORCHS
    return replace(
        recipe,
        lr=lr,
        max_steps=steps,
        lr_schedule="constant",
        warmup_fraction=0.0,
        guard="act" if guarded else "off",
        eval_steps=None,
        early_stopping_patience=None,
    )


@contextmanager
def _put_back(model: Any) -> Iterator[Callable[[], None]]:
    """Yields what restores the weights that learn; at the end random numbers are restored too."""
    learned = {name: p.detach().cpu().clone() for name, p in model.named_parameters() if p.requires_grad}
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    python, numpy = random.getstate(), np.random.get_state()

    def put_back() -> None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(learned[name])
                    parameter.grad = None

    with torch.random.fork_rng(devices=devices):
        try:
            yield put_back
        finally:
            put_back()
            random.setstate(python)
            np.random.set_state(numpy)
