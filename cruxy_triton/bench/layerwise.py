"""Layer-wise control: AdamW alone, under BLADE in both responses and under SKETCH-ALIGN, up to 30 times a tuned rate.

The published experiment, scaled to a CPU: a Qwen3-architecture model (8 layers, width 64, 0.5 M parameters) reads
characters of Tiny Shakespeare, or of question/answer records, in the published schedule: 50 steps of warm-up to the
peak, then linear to 0; AdamW with betas .9/.999 and decay .01; gradients clipped at norm 1 after the controller has
seen them. The peak is AdamW's best of five by validation loss on the first seed; every contestant then runs at 1, 3, 10
and 30 times it, with float32 gradients and with emulated float16 ones: multiplied by a dynamic loss scale, rounded to
float16 and divided again, and a step with an overflow is skipped.

With `--model smollm2` the same, smaller, for LoRA on SmolLM2-135M (`adapters.py`): float32 gradients, 80 steps, one and
ten times the rate that is AdamW's best there.
"""

import functools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cruxy_triton.bench import adapters
from cruxy_triton.bench.characters import Size, Text, embedded_text, read_text
from cruxy_triton.bench.runs import Runs
from cruxy_triton.bench.shakespeare import find_text
from cruxy_triton.controllers.attach import Attached, attach_blade, attach_sketch_align
from cruxy_triton.errors import UserError

FULL = Size(layers=8, width=64, context=64, batch=16, steps=350, evaluations=12)
QUICK = Size(layers=2, width=32, context=32, batch=8, steps=60, evaluations=2)
LORA_FULL = replace(adapters.FULL, steps=80, evaluations=12)
SEEDS = (1337, 1, 2)
PEAKS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
FACTORS = (1.0, 3.0, 10.0, 30.0)
LORA_FACTORS = (1.0, 10.0)
GRADIENTS = ("fp32", "fp16")
WARMUP = 50
POINTS = 100  # of a curve
SCALE, GROWTH, LARGEST = 2.0**16, 2000, 65504.0  # GradScaler's own; the largest float16

CONTESTANTS: dict[str, Callable[[torch.optim.Optimizer, nn.Module], Attached] | None] = {
    "AdamW": None,
    "BLADE (paper)": lambda optimizer, model: attach_blade(optimizer, model, response="paper"),
    "BLADE (damped)": lambda optimizer, model: attach_blade(optimizer, model, response="damped"),
    "SKETCH-ALIGN": attach_sketch_align,
}


@dataclass(frozen=True)
class Cell:
    contestant: str
    peak: float
    gradients: str
    seed: int
    data: Path | None
    size: Size
    model: str = "characters"

    def key(self) -> tuple[Any, ...]:
        return self.contestant, self.peak, self.gradients, self.seed


@dataclass(frozen=True)
class Run:
    """One run. `curve`: (step, training loss); `multipliers`: of every layer in those steps, by its name.

    validation is infinite where the run diverged, `steps` are those that were taken until then, `skipped` those of
    them with an overflow.
    """

    contestant: str
    peak: float
    gradients: str
    seed: int
    validation: float
    steps: int
    skipped: int
    step_ms: float
    control_ms: float
    curve: list[list[float]]
    multipliers: dict[str, list[float]]

    def key(self) -> tuple[Any, ...]:
        return self.contestant, self.peak, self.gradients, self.seed


def records_text(path: Path) -> str:
    """The text of a file; of JSONL with question and answer, both, one after the other.

    Raises UserError for a file that cannot be read, or records without them.
    """
    text = read_text(path)
    if path.suffix != ".jsonl":
        return text
    parts = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            record = json.loads(line)
            parts.append(f"{record['question']}\n{record['answer']}\n\n")
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}, line {number}: expected a record with question and answer") from None
    return "".join(parts)


@functools.cache
def _text(model: str, data: Path | None, size: Size) -> Text | adapters.Questions:
    if model == "smollm2":
        return adapters.Questions(data, size)
    return Text(embedded_text() if data is None else records_text(data), size)


def make_model(symbols: int, size: Size) -> nn.Module:
    """A Qwen3 of this size, float32, initialised by torch's seed."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    heads = 4
    config = Qwen3Config(
        vocab_size=symbols, hidden_size=size.width, intermediate_size=3 * size.width, num_hidden_layers=size.layers,
        num_attention_heads=heads, num_key_value_heads=heads // 2, head_dim=size.width // heads,
        max_position_embeddings=size.context, tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


def loss_and_entropy(model: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mean negative log-likelihood and mean entropy of the output, nats."""
    logits = model(input_ids=inputs).logits.flatten(0, 1)
    log_p = logits.log_softmax(-1)
    with torch.no_grad():
        entropy = -(log_p.exp() * log_p).sum(-1).mean()
    return nn.functional.nll_loss(log_p, targets.flatten()), entropy


@torch.no_grad()
def held_out_loss(model: nn.Module, text: Text | adapters.Questions) -> float:
    batches = range(10**9, 10**9 + text.size.evaluations)
    losses = [float(loss_and_entropy(model, *text.batch(i, held_out=True))[0]) for i in batches]
    mean = statistics.fmean(losses)
    return mean if math.isfinite(mean) else math.inf


def lr_factor(step: int, steps: int) -> float:
    """Part of the peak at `step` (from 0): linear to 1 over the warm-up, a seventh of a shorter run, then to 0."""
    warm = min(WARMUP, max(1, steps // 7))
    return (step + 1) / warm if step < warm else (steps - step) / (steps - warm)


class Float16:
    """Gradients as float16 training has them: through a loss scale that falls with each overflow."""

    def __init__(self) -> None:
        self.scale, self.run = SCALE, 0

    @torch.no_grad()
    def __call__(self, params: list[Tensor]) -> bool:
        """Round the gradients; False where one overflowed."""
        grads = [p.grad for p in params if p.grad is not None]
        rounded = [(g * self.scale).half() for g in grads]
        finite = all(bool(g.isfinite().all()) for g in rounded)
        if finite:
            for g, half in zip(grads, rounded, strict=True):
                g.copy_(half.float() / self.scale)
            self.run += 1
            if self.run == GROWTH:
                self.scale, self.run = 2 * self.scale, 0
        else:
            self.scale, self.run = self.scale / 2, 0
        return finite


def play(cell: Cell) -> Run:
    """The run of one cell; deterministic, but for the times."""
    text, size = _text(cell.model, cell.data, cell.size), cell.size
    torch.manual_seed(cell.seed)
    model = text.model().model if isinstance(text, adapters.Questions) else make_model(text.symbols, size)
    params: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=cell.peak, betas=(0.9, 0.999), weight_decay=0.01)
    attach = CONTESTANTS[cell.contestant]
    control = None if attach is None else attach(optimizer, model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, size.steps))
    rounding = Float16() if cell.gradients == "fp16" else None
    every, skipped, step = max(1, size.steps // POINTS), 0, 0
    seconds, controlled, curve = [], [], []
    multipliers: dict[str, list[float]] = {}
    for step in range(1, size.steps + 1):
        begun = time.perf_counter()
        loss, entropy = loss_and_entropy(model, *text.batch(cell.seed * 1_000_003 + step))
        optimizer.zero_grad()
        loss.backward()
        value = float(loss.detach())
        if not math.isfinite(value):
            break
        if rounding is None or rounding(params):
            before = time.perf_counter()
            if control is not None:
                control.observe(loss, entropy)
            controlled.append(time.perf_counter() - before)
            nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
        else:
            skipped += 1
        schedule.step()
        seconds.append(time.perf_counter() - begun)
        if step % every == 0:
            curve.append([step, value])
            for name, m in ({} if control is None else control.multipliers()).items():
                multipliers.setdefault(name, []).append(round(m, 4))
    return Run(
        *cell.key(),
        validation=held_out_loss(model, text),
        steps=step, skipped=skipped,
        step_ms=1000 * statistics.median(seconds or [0.0]),
        control_ms=1000 * statistics.median(controlled or [0.0]),
        curve=curve, multipliers=multipliers,
    )  # fmt: skip


# -- the table ---------------------------------------------------------------------------------------------------------


def rows(runs: Iterable[Run], peak: float, factors: Iterable[float]) -> list[dict[str, Any]]:
    """Mean validation loss over the seeds by contestant, gradients and multiple of the tuned peak."""
    by: dict[tuple[str, str, float], list[Run]] = {}
    for run in runs:
        by.setdefault((run.contestant, run.gradients, run.peak), []).append(run)
    table: dict[tuple[str, str], dict[str, Any]] = {}
    for (contestant, gradients, _), _ in by.items():
        table[contestant, gradients] = {"contestant": contestant, "gradients": gradients}
    for factor in factors:
        for (contestant, gradients), row in table.items():
            mine = by[contestant, gradients, times(peak, factor)]
            losses = [run.validation for run in mine]
            row[f"{factor:g}x"] = statistics.fmean(losses)
            row[f"{factor:g}x spread"] = max(losses) - min(losses) if all(map(math.isfinite, losses)) else math.inf
            row["diverged"] = row.get("diverged", 0) + sum(not math.isfinite(loss) for loss in losses)
    return list(table.values())


def verdict(table: list[dict[str, Any]], factors: Iterable[float]) -> list[dict[str, Any]]:
    """Of each controller how much lower than AdamW alone its loss is: above 0 it helps."""
    alone = {row["gradients"]: row for row in table if row["contestant"] == "AdamW"}
    found = []
    for row in table:
        base = alone.get(row["gradients"])
        if base is not None and row is not base:
            gains = {f"{f:g}x": _gain(base[f"{f:g}x"], row[f"{f:g}x"]) for f in factors}
            found.append({"contestant": row["contestant"], "gradients": row["gradients"], **gains})
    return found


def _gain(alone: float, under: float) -> float:
    return 0.0 if alone == under else alone - under  # two runs that diverged are no different


def times(peak: float, factor: float) -> float:
    return float(f"{peak * factor:.6g}")


def report(
    *, model: str, quick: bool, data: Path | None, contestants: list[str] | None, seeds: int, workers: int,
    out: Path | None, plot: Path | None, peak: float | None, cache: Path, say: Callable[[str], Any],
) -> dict[str, Any]:
    """The whole benchmark; see `bench layerwise --help`.

    Raises:
        UserError: an unknown contestant, a text that cannot be read, or an `out` that holds something else.
    """
    chosen = contestants or list(CONTESTANTS)
    unknown = [name for name in chosen if name not in CONTESTANTS]
    if unknown:
        raise UserError(f"unknown contestant {unknown[0]!r}; expected one of {', '.join(CONTESTANTS)}")
    if not 1 <= seeds <= len(SEEDS):
        raise UserError(f"--seeds is {seeds}; expected 1 to {len(SEEDS)}")
    if workers < 1:
        raise UserError("--workers must be at least 1")
    if peak is not None and not 0 < peak < math.inf:
        raise UserError(f"--peak is {peak}; expected a rate above 0")
    if model == "smollm2":
        path, source, peak = data, adapters.NAME, peak or adapters.RATES[0]
        size, factors, kinds = adapters.QUICK if quick else LORA_FULL, LORA_FACTORS, GRADIENTS[:1]
    else:
        path, source = (data, str(data)) if data is not None else find_text(data, cache, say)
        size, factors, kinds = (QUICK, (1.0, 30.0), GRADIENTS[:1]) if quick else (FULL, FACTORS, GRADIENTS)
    _text(model, path, size)  # what is wrong with it is said here and not by every worker
    say(f"text: {source}")
    chosen_seeds = SEEDS[:1] if quick else SEEDS[:seeds]
    store = Runs(Run, size, out)

    def play_all(cells: list[Cell]) -> list[Run]:
        for run in store.play(play, cells, workers):
            who = f"{run.contestant}, peak {run.peak:g}, {run.gradients}, seed {run.seed}"
            say(f"{who}: validation {run.validation:.4f}")
        return [store.done[cell.key()] for cell in cells]

    first = Cell("AdamW", 0.0, "fp32", chosen_seeds[0], path, size, model)
    tuning: list[Run] = []
    if peak is None:
        tuning = play_all([replace(first, peak=rate) for rate in (PEAKS[1:4] if quick else PEAKS)])
        peak = min(tuning, key=lambda run: (run.validation, run.peak)).peak
        say(f"AdamW is best at a peak of {peak:g}")
    runs = play_all([
        replace(first, contestant=name, peak=times(peak, factor), gradients=kind, seed=seed)
        for seed in chosen_seeds for name in chosen for kind in kinds for factor in factors
    ])  # fmt: skip
    if plot is not None:
        draw(plot, [run for run in runs if run.seed == chosen_seeds[0] and run.gradients == "fp32"])
    table = rows(runs, peak, factors)
    return {
        "rows": table, "verdict": verdict(table, factors), "peak": peak, "text": source, "size": asdict(size),
        "seeds": list(chosen_seeds), "versions": {"torch": torch.__version__},
        "step ms": statistics.median(run.step_ms for run in runs),
        "runs": [asdict(run) for run in {run.key(): run for run in [*tuning, *runs]}.values()],
    }  # fmt: skip


def draw(path: Path, runs: list[Run]) -> None:
    """Heat maps of the multipliers, layer by step: from above the contestants, from the left the peaks. Needs
    matplotlib."""
    from matplotlib.figure import Figure

    from cruxy_triton.files import replacing

    shown = [run for run in runs if run.multipliers]
    if not shown:
        raise UserError("--plot shows multipliers, and AdamW alone has none; name a controller as a contestant")
    names, peaks = list(dict.fromkeys(run.contestant for run in shown)), sorted({run.peak for run in shown})
    figure = Figure(figsize=(1 + 3.2 * len(peaks), 1 + 2.4 * len(names)), layout="constrained")
    axes = figure.subplots(len(names), len(peaks), squeeze=False)
    image = None
    for run in shown:
        axis = axes[names.index(run.contestant)][peaks.index(run.peak)]
        layers = list(run.multipliers)
        last = run.curve[-1][0]
        image = axis.imshow(list(run.multipliers.values()), aspect="auto", vmin=0.3, vmax=1.7, cmap="RdBu_r",
                            interpolation="nearest", extent=(0, last, len(layers) - 0.5, -0.5))  # fmt: skip
        axis.set_title(f"{run.contestant}, peak {run.peak:g}: {run.validation:.3f}", fontsize=8)
        axis.set_xlabel("step", fontsize=8)
        axis.set_yticks(range(len(layers)), [name.rpartition("model.")[2] for name in layers], fontsize=6)
    figure.colorbar(image, ax=axes, label="multiplier of the step size")  # pyright: ignore[reportArgumentType]
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format=path.suffix[1:] or "png")
