"""The Cruxy white paper's benchmark: a character model on Tiny Shakespeare, by training *and* by validation loss.

The setting is that of the PyPI package cruxy 2.1.0, which published the headline table: 0.8 M parameters (4 layers,
width 128, 4 heads, context 64, learned positions, GELU, weights as torch initialises them: embeddings of variance 1),
random windows, batch 16, 1,000 steps, no warm-up; the AdamW rule at 5e-3 with decay .1, Meta-Lion at 1e-3 with decay
.2, betas .9/.99 and gradient centralization. That table shows the loss of the last training batch of one seed. This one
shows it beside the validation loss, over seeds, at the published rate and at the best of five, chosen for each
optimizer by validation loss on the first seed.
"""

import functools
import math
import statistics
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cruxy_kernels import RULES
from cruxy_triton.bench.characters import CharacterModel, Size, Text, embedded_text, read_text
from cruxy_triton.bench.runs import Runs
from cruxy_triton.bench.step import state_bytes
from cruxy_triton.errors import UserError
from cruxy_triton.files import write_text
from cruxy_triton.optimizer import CruxyOptimizer

ADDRESS = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
FULL = Size(steps=1000, evaluations=40)
QUICK = Size(layers=2, width=64, steps=200, evaluations=10)
SEEDS = (1337, 1, 2)
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the published rate
POINTS = 100  # of a curve


@dataclass(frozen=True)
class Contestant:
    """An optimizer of `package` (which may be absent), made from parameters and a rate."""

    make: Callable[[Any, float], Any]
    published: float
    package: str = "torch"


def _ours(mode: str = "meta3", **settings: Any) -> Callable[[Any, float], Any]:
    return lambda params, lr: CruxyOptimizer(params, mode, lr, **settings)


def _peer(module: str, name: str, **settings: Any) -> Callable[[Any, float], Any]:
    return lambda params, lr: getattr(import_module(module), name)(params, lr=lr, **settings)


_ADAMW: dict[str, Any] = {"weight_decay": 0.1}
_LION: dict[str, Any] = {"weight_decay": 0.2, "betas": (0.9, 0.99)}
_META_LION: dict[str, Any] = {**_LION, "use_lion": True, "use_gc": True}
CONTESTANTS = {
    "torch AdamW": Contestant(_peer("torch.optim", "AdamW", **_ADAMW), 5e-3),
    "lion-pytorch Lion": Contestant(_peer("lion_pytorch", "Lion", **_LION), 1e-3, "lion_pytorch"),
    "schedulefree AdamW": Contestant(_peer("schedulefree", "AdamWScheduleFree", **_ADAMW), 5e-3, "schedulefree"),
    "cruxy 2.1.0 meta3": Contestant(_peer("cruxy", "CruxyOptimizer", mode="meta3", **_ADAMW), 5e-3, "cruxy"),
    "cruxy 2.1.0 Meta-Lion": Contestant(_peer("cruxy", "CruxyOptimizer", mode="meta3", **_META_LION), 1e-3, "cruxy"),
    "stability_v1": Contestant(_ours("stability_v1", **_ADAMW), 5e-3),
    "stability_v2": Contestant(_ours("stability_v2", **_ADAMW), 5e-3),
    "meta3": Contestant(_ours(**_ADAMW), 5e-3),
    **{
        f"Meta-Lion, {bits}-bit state": Contestant(_ours(state_bits=bits, **_META_LION), 1e-3)
        for bits in sorted(RULES["lion"].state_bits, reverse=True)
    },
    "adv_optm Lion_adv, 1-bit": Contestant(_peer("adv_optm", "Lion_adv", nnmf_factor=True, **_LION), 1e-3, "adv_optm"),
}


@dataclass(frozen=True)
class Cell:
    optimizer: str
    lr: float
    seed: int
    data: Path | None
    size: Size

    def key(self) -> tuple[Any, ...]:
        return self.optimizer, self.lr, self.seed


@dataclass(frozen=True)
class Run:
    """One run. `curve`: (step, training loss, learning rate, phase or None), about `POINTS` of them."""

    optimizer: str
    lr: float
    seed: int
    last_batch: float
    validation: float
    state_bytes: int
    step_ms: float
    curve: list[list[float | None]]

    def key(self) -> tuple[Any, ...]:
        return self.optimizer, self.lr, self.seed


# -- the text --------------------------------------------------------------------------------------------------------


def find_text(data: Path | None, cache: Path, say: Callable[[str], Any]) -> tuple[Path | None, str]:
    """(file, what it is); without `data` the published text, from the cache or the network, else the embedded one.

    Raises:
        UserError: `data` cannot be read.
    """
    if data is not None:
        read_text(data)
        return data, str(data)
    kept = cache / "tinyshakespeare.txt"
    if not kept.is_file():
        say(f"fetching {ADDRESS}")
        try:
            with urllib.request.urlopen(ADDRESS, timeout=20) as answer:
                text = answer.read(10_000_000).decode("utf-8")
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            return None, f"the sources of torch.nn, because Tiny Shakespeare cannot be fetched ({reason})"
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_text(kept, text)
    return kept, "Tiny Shakespeare"


@functools.cache
def _text(data: Path | None, size: Size) -> Text:
    return Text(embedded_text() if data is None else read_text(data), size)


# -- one run -----------------------------------------------------------------------------------------------------------


def play(cell: Cell) -> Run:
    """The run of one cell; deterministic, but for the time."""
    text, size = _text(cell.data, cell.size), cell.size
    torch.manual_seed(cell.seed)
    model = CharacterModel(text.symbols, size, std=None)
    optimizer = CONTESTANTS[cell.optimizer].make(model.parameters(), cell.lr)
    _switch(optimizer, "train")
    seconds, curve, loss = [], [], torch.tensor(math.nan)
    every = max(1, size.steps // POINTS)
    for step in range(1, size.steps + 1):
        loss = model.loss(*text.batch(cell.seed * 1_000_003 + step))
        optimizer.zero_grad()
        loss.backward()
        begun = time.perf_counter()
        _step(optimizer, loss.detach())
        seconds.append(time.perf_counter() - begun)
        if step % every == 0:
            rate, phase = _control(optimizer)
            curve.append([step, float(loss.detach()), cell.lr if rate is None else rate, phase])
    _switch(optimizer, "eval")
    return Run(
        *cell.key(),
        last_batch=_finite(float(loss.detach())),
        validation=_finite(model.held_out_loss(text)),
        state_bytes=state_bytes(optimizer),
        step_ms=1000 * statistics.median(seconds),
        curve=curve,
    )


def _step(optimizer: Any, loss: Tensor) -> None:
    module = type(optimizer).__module__.partition(".")[0]
    if isinstance(optimizer, CruxyOptimizer):
        optimizer.step(loss=loss)
    elif module == "cruxy":
        optimizer.step(loss=loss.item())
    else:
        optimizer.step()


def _switch(optimizer: Any, to: str) -> None:
    """Schedule-Free keeps other weights for training than for evaluation."""
    if hasattr(optimizer, to):
        getattr(optimizer, to)()


def _control(optimizer: Any) -> tuple[float | None, float | None]:
    """The learning rate in use and the phase, of an optimizer that tells."""
    if not isinstance(optimizer, CruxyOptimizer):
        return None, None
    metrics = optimizer.metrics()
    return metrics["lr"], metrics["phase"]


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.inf


# -- the table -------------------------------------------------------------------------------------------------------


def best_rate(runs: Iterable[Run]) -> float:
    return min(runs, key=lambda run: (run.validation, run.lr)).lr


def row(name: str, lr: float, which: str, runs: list[Run]) -> dict[str, Any]:
    """Mean over the seeds; the spread is the largest less the smallest."""

    def spread(values: list[float]) -> float:
        return max(values) - min(values) if all(map(math.isfinite, values)) else math.inf

    last, validation = [run.last_batch for run in runs], [run.validation for run in runs]
    return {
        "optimizer": name, "rate": which, "lr": lr, "seeds": len(runs),
        "last batch": statistics.fmean(last), "spread": spread(last),
        "validation": statistics.fmean(validation), "spread ": spread(validation),
        "state bytes": runs[0].state_bytes, "step ms": statistics.median(run.step_ms for run in runs),
    }  # fmt: skip


def rows(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """A row for each contestant at its published rate, and at its best of those that the first seed had."""
    by: dict[str, dict[float, list[Run]]] = {name: {} for name in CONTESTANTS}
    for run in runs:
        by[run.optimizer].setdefault(run.lr, []).append(run)
    found = []
    for name, at in by.items():
        if not at:
            continue
        tried = sorted(lr for lr, mine in at.items() if any(run.seed == SEEDS[0] for run in mine))
        best = best_rate(run for lr in tried for run in at[lr] if run.seed == SEEDS[0])
        for lr in dict.fromkeys((CONTESTANTS[name].published, best)):
            which = "best" if lr == best else "published"
            if lr == best == CONTESTANTS[name].published:
                which = "published, best"
            elif lr == best and lr in (tried[0], tried[-1]):
                which = "best, at the edge"
            found.append(row(name, lr, which, at[lr]))
    return found


def report(
    *, quick: bool, data: Path | None, optimizers: list[str] | None, workers: int, out: Path | None, plot: Path | None,
    cache: Path, say: Callable[[str], Any],
) -> dict[str, Any]:
    """The whole benchmark; see `bench shakespeare --help`.

    Raises:
        UserError: an unknown optimizer, a text that cannot be read, or an `out` that holds something else.
    """
    chosen = optimizers or list(CONTESTANTS)
    unknown = [name for name in chosen if name not in CONTESTANTS]
    if unknown:
        raise UserError(f"unknown optimizer {unknown[0]!r}; expected one of {', '.join(CONTESTANTS)}")
    if workers < 1:
        raise UserError("--workers must be at least 1")
    packages = {name: CONTESTANTS[name].package for name in chosen}
    absent = {name: f"{package} is not installed" for name, package in packages.items() if not find_spec(package)}
    present = [name for name in chosen if name not in absent]
    if not present:
        raise UserError(f"nothing to run: {', '.join(sorted(set(absent.values())))}")
    path, source = find_text(data, cache, say)
    say(f"text: {source}")
    size, factors, seeds = (QUICK, (0.5, 1.0, 2.0), SEEDS[:1]) if quick else (FULL, FACTORS, SEEDS)
    store = Runs(Run, size, out)

    def play_all(cells: list[Cell]) -> None:
        for run in store.play(play, cells, workers):
            loss = f"last batch {run.last_batch:.4f}, validation {run.validation:.4f}"
            say(f"{run.optimizer}, lr {run.lr:g}, seed {run.seed}: {loss}")

    def rates(name: str) -> list[float]:
        return [float(f"{CONTESTANTS[name].published * factor:.6g}") for factor in factors]

    play_all([Cell(name, lr, seeds[0], path, size) for name in present for lr in rates(name)])
    best = {name: best_rate(store.done[name, lr, seeds[0]] for lr in rates(name)) for name in present}
    pairs = [(name, lr) for name in present for lr in dict.fromkeys((CONTESTANTS[name].published, best[name]))]
    play_all([Cell(name, lr, seed, path, size) for name, lr in pairs for seed in seeds[1:]])
    runs = [run for run in store.done.values() if run.optimizer in present]
    if plot is not None:
        draw(plot, [store.done[name, best[name], seeds[0]] for name in present])
    return {
        "rows": rows(runs), "absent": absent, "text": source, "size": asdict(size), "seeds": list(seeds),
        "versions": {package: metadata.version(package) for package in dict.fromkeys(packages.values())
                     if find_spec(package)},
        "runs": [asdict(run) for run in runs],
    }  # fmt: skip


def draw(path: Path, runs: list[Run]) -> None:
    """Loss curves above, learning rate (and phase, dashed) beneath, each at its best rate. Needs matplotlib."""
    from matplotlib.figure import Figure

    from cruxy_triton.files import replacing

    figure = Figure(figsize=(9, 7), layout="constrained")
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    phase = rate.twinx()
    for number, run in enumerate(runs):
        steps, losses, rates, phases = zip(*run.curve, strict=True)
        colour = f"C{number}"
        smooth = [statistics.fmean(losses[max(0, i - 4) : i + 1]) for i in range(len(losses))]
        loss.plot(steps, smooth, color=colour, lw=1.1, label=f"{run.optimizer}, {run.lr:g}: {run.validation:.3f}")
        rate.plot(steps, rates, color=colour, lw=1.1)
        if phases[0] is not None:
            phase.plot(steps, phases, color=colour, lw=0.8, ls="--")
    loss.set_ylabel("training loss, mean of 5 points")
    loss.legend(fontsize=8, title="rate: validation loss")
    rate.set(xlabel="step", ylabel="learning rate", yscale="log")
    phase.set_ylabel("phase (dashed)")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format=path.suffix[1:] or "png")
