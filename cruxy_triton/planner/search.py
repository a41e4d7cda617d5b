"""`plan()`: the best configuration of a model on a card, over everything that the caller left open.

What serves the result goes first: the sequence length and batch that were asked for, then the precision of the
base weights, then LoRA's rank and targets, then speed. Within one choice of the first three, the most frugal
settings decide whether it is possible at all; the fastest settings that fit are taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cruxy_triton.errors import UserError
from cruxy_triton.planner.card import Card, GiB, MiB, card_names, load_card
from cruxy_triton.planner.footprint import Footprint, footprint
from cruxy_triton.planner.optimizers import OPTIMIZERS
from cruxy_triton.planner.plan import Configuration, Option, Plan
from cruxy_triton.planner.replay import OutOfMemory, replay, smallest_pool
from cruxy_triton.planner.shape import ModelShape, load_model
from cruxy_triton.planner.speed import step_seconds
from cruxy_triton.planner.step import Step
from cruxy_triton.planner.walk import walk

LENGTHS = (1024, 768, 512, 384, 256, 128)  # tried in this order where no sequence length is asked for
EFFECTIVE_BATCH = 8  # sequences an optimizer step, where neither batch nor accumulation is asked for
MICRO_BATCHES = (8, 4, 2, 1)
SEARCHED_OPTIMIZERS = ("adamw-fp32", "lion-fp32", "lion-8bit")

_PRECISIONS = {
    "float16": "float16", "fp16": "float16", "half": "float16",
    "bfloat16": "bfloat16", "bf16": "bfloat16",
    "float32": "float32", "fp32": "float32",
    "nf4": "nf4", "4bit": "nf4", "int4": "nf4",
}  # fmt: skip
ATTENTIONS = ("flash", "efficient", "eager", "math", "sdpa-cpu")


@dataclass(frozen=True)
class _Wish:
    """What the caller pinned; None is open."""

    seq: int | None
    batch: int | None
    precision: str | None
    double_quant: bool | None
    lora_r: int | None
    targets: tuple[str, ...] | None
    checkpointing: bool | None
    chunked_loss: bool | None
    attention: str | None
    optimizer: str | None
    accumulation: int | None
    lora_dropout: float
    method: str


class _Judge:
    """Answers "does this configuration fit?", cheaply where the answer is plain."""

    def __init__(self, shape: ModelShape, card: Card, system: str | None):
        self.shape = shape
        self.card = card
        self.usable = card.usable_bytes(system)
        self._footprints: dict[Step, Footprint] = {}
        self._verdicts: dict[tuple[Configuration, int], bool] = {}
        self._last: tuple[Configuration | None, list[tuple[int, int]]] = (None, [])

    def step(self, config: Configuration) -> Step:
        return step_of(self.shape, self.card, config)

    def footprint(self, config: Configuration) -> Footprint:
        step = self.step(config)
        # Accumulation above one keeps gradients through the forward pass; more of it changes nothing.
        step = replace(step, accumulation=min(step.accumulation, 2))
        if step not in self._footprints:
            self._footprints[step] = footprint(step)
        return self._footprints[step]

    def error(self, config: Configuration) -> int:
        return error_bytes(self.footprint(config).peak_allocated, self.card, config.attention, config.method == "full")

    def allowance(self, config: Configuration) -> int:
        """More than the allocator was ever seen to lose to fragmentation: 12 % of what is not weights, 64 MiB."""
        found = self.footprint(config)
        return 64 * MiB + (found.peak_allocated - found.components.get("weights", 0)) * 12 // 100

    def room(self, config: Configuration, margin: bool) -> int:
        return self.usable - self.card.context_bytes - (self.error(config) if margin else 0)

    def surely_fits(self, config: Configuration) -> bool:
        """Fits with the error bar and the allocator's allowance to spare."""
        return self.footprint(config).peak_allocated + self.allowance(config) <= self.room(config, True)

    def fits(self, config: Configuration, margin: bool = True) -> bool:
        """Whether the process survives in the usable memory, with the error bar's width to spare if `margin`.

        Where the footprint does not decide it, the allocator is replayed with the room that there is.
        """
        room = self.room(config, margin)
        if self.footprint(config).peak_allocated > room:
            return False
        if self.card.device == "cpu" or self.surely_fits(config):
            return True
        key = (config, room)
        if key not in self._verdicts:
            try:
                replay(self.events(config), room)
                self._verdicts[key] = True
            except OutOfMemory:
                self._verdicts[key] = False
        return self._verdicts[key]

    def events(self, config: Configuration) -> list[tuple[int, int]]:
        """The whole model's allocations; those of the last configuration asked for are kept."""
        if self._last[0] != config:
            self._last = (config, walk(self.step(config), record=True).events or [])
        return self._last[1]

    def memory(self, config: Configuration) -> tuple[int, int, int]:
        """(allocated, reserved without limits, least memory that does) for PyTorch's allocator, bytes."""
        peak = self.footprint(config).peak_allocated
        if self.card.device == "cpu":
            return peak, peak, peak
        events = self.events(config)
        free_run = replay(events)
        return free_run.allocated, free_run.reserved, smallest_pool(events, max(8 * MiB, peak // 128))

    def about(self, config: Configuration) -> int:
        """The process's peak without replaying the allocator: half of its allowance is added instead."""
        extra = self.allowance(config) // 2 if self.card.device == "cuda" else 0
        return self.footprint(config).peak_allocated + extra + self.card.context_bytes


def error_bytes(allocated: int, card: Card, attention: str, full: bool = False) -> int:
    """How far the process's peak may be off, either way: the context's own uncertainty, and a share of what is
    allocated: 2 %; 5 % where large score matrices make the allocator's fragmentation depend on chance (eager and
    math attention) and for full fine-tuning, whose closed form was seen up to 4.7 % off the trace. Against a real
    T4 LoRA's worst were 1.6 % (SDPA) and 3.8 % (eager; tests/planner/test_t4.py)."""
    share = 0.05 if full or attention in ("eager", "math") else 0.02
    return int(share * allocated) + card.context_error_bytes


def step_of(shape: ModelShape, card: Card, config: Configuration) -> Step:
    """The `Step` that `cruxy-triton finetune` runs for `config` on `card`."""
    half = card.device == "cuda" and config.precision != "float32"
    return Step(
        shape=shape,
        batch=config.batch_size,
        seq=config.max_seq_length,
        precision=config.precision,
        double_quant=config.double_quant,
        lora_r=config.lora_r if config.method == "lora" else 0,
        targets=config.target_modules,
        lora_dropout=config.lora_dropout,
        checkpointing=config.gradient_checkpointing,
        chunked_loss=config.chunked_loss,
        attention=config.attention,
        optimizer=config.optimizer,
        accumulation=config.gradient_accumulation,
        device=card.device,
        cublas_workspace=card.cublas_workspace_bytes,
        autocast=half,
        upcast_outputs=half,
        warmup=card.device == "cuda",
    )


# -- the wish ----------------------------------------------------------------------------------------


def _count(value: int | None, name: str, most: int) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"{name} must be a whole number, not {value!r}")
    if not 1 <= value <= most:
        raise UserError(f"{name} must be between 1 and {most}, not {value}")
    return value


def _wish(shape: ModelShape, card: Card, given: Mapping[str, Any]) -> _Wish:
    seq = _count(given["seq"], "seq", 10**7)
    if seq is not None and seq > shape.max_position_embeddings:
        raise UserError(f"seq {seq} is beyond {shape.name}'s maximum of {shape.max_position_embeddings} positions")
    if seq == 1:
        raise UserError("seq must be at least 2: a token and the one to predict from it")
    precision = given["precision"]
    if precision is not None:
        if str(precision).lower() not in _PRECISIONS:
            raise UserError(f"unknown precision {precision!r}; expected {', '.join(sorted(set(_PRECISIONS.values())))}")
        precision = _PRECISIONS[str(precision).lower()]
        if precision == "bfloat16" and card.device == "cuda" and not card.bf16:
            raise UserError(
                f"{card.name} has no bfloat16 (compute capability {card.capability[0]}.{card.capability[1]}, "
                "8.0 needed); use float16 or nf4"
            )
    attention = given["attention"]
    if attention is not None:
        if attention not in ATTENTIONS:
            raise UserError(f"unknown attention {attention!r}; expected one of {', '.join(ATTENTIONS)}")
        if attention not in card.attention_kinds:
            raise UserError(
                f"attention {attention!r} does not run on {card.name}; it has {', '.join(card.attention_kinds)}"
            )
        if attention != "eager" and not shape.family.sdpa:
            raise UserError(f"{shape.name} caps its attention scores, which only eager attention can")
    optimizer = given["optimizer"]
    if optimizer is not None and optimizer not in OPTIMIZERS:
        raise UserError(f"unknown optimizer {optimizer!r}; expected one of {', '.join(OPTIMIZERS)}")
    targets = given["targets"]
    if targets is not None:
        names = shape.family.names
        if isinstance(targets, str):
            targets = names if targets in ("all", "all-linear") else targets.split(",")
        targets = tuple(dict.fromkeys(t.strip() for t in targets))
        wrong = [t for t in targets if t not in names]
        if wrong or not targets:
            raise UserError(f"unknown LoRA targets {', '.join(wrong) or '(none)'}; {shape.name} has {', '.join(names)}")
        targets = tuple(n for n in names if n in targets)
    method = given["method"]
    if method not in ("lora", "full"):
        raise UserError(f"unknown method {method!r}; expected lora or full")
    if method == "full" and precision == "nf4":
        raise UserError("4-bit weights cannot learn; full fine-tuning needs float32 or bfloat16")
    if method == "full" and precision == "float16":
        raise UserError(
            "full fine-tuning of float16 weights does not work with a GradScaler (its gradients would be float16); "
            "use float32, or bfloat16 on compute capability 8.0 and later"
        )
    dropout = given["lora_dropout"]
    if not 0 <= dropout < 1:
        raise UserError(f"lora_dropout must be in [0, 1), not {dropout}")
    return _Wish(
        seq=seq,
        batch=_count(given["batch"], "batch", 4096),
        precision=precision,
        double_quant=given["double_quant"],
        lora_r=_count(given["lora_r"], "lora_r", 4096),
        targets=targets,
        checkpointing=given["checkpointing"],
        chunked_loss=given["chunked_loss"],
        attention=attention,
        optimizer=optimizer,
        accumulation=_count(given["accumulation"], "accumulation", 10**6),
        lora_dropout=dropout,
        method=method,
    )


# -- the choices, best first -------------------------------------------------------------------------


def _lengths(shape: ModelShape, wish: _Wish) -> tuple[int, ...]:
    if wish.seq is not None:
        return (wish.seq,)
    return tuple(n for n in LENGTHS if n <= shape.max_position_embeddings) or (shape.max_position_embeddings,)


def _precisions(card: Card, wish: _Wish) -> list[tuple[str, bool]]:
    """(precision, double quantisation), best first."""
    doubles = [wish.double_quant] if wish.double_quant is not None else [False, True]
    if wish.precision is not None:
        return [(wish.precision, d) for d in doubles] if wish.precision == "nf4" else [(wish.precision, False)]
    if card.device == "cpu":
        return [("float32", False)]
    if wish.method == "full":
        return [("float32", False), ("bfloat16", False)] if card.bf16 else [("float32", False)]
    return [("bfloat16" if card.bf16 else "float16", False), *(("nf4", d) for d in doubles)]


def _adapters(shape: ModelShape, wish: _Wish) -> list[tuple[int, tuple[str, ...]]]:
    """(rank, targets), best first: all linear layers, then attention, then q and v."""
    names = shape.family.names
    every, attention, least = names, names[:4], (names[0], names[2])
    ladder = [(16, every), (8, every), (8, attention), (4, least)]
    if wish.targets is not None:
        ladder = [(r, wish.targets) for r in (16, 8, 4)]
    if wish.lora_r is not None:
        ladder = [(wish.lora_r, t) for _, t in ladder]
    return list(dict.fromkeys(ladder))


def _batches(wish: _Wish) -> list[tuple[int, int]]:
    """(micro batch, accumulation), fastest first."""
    if wish.batch is not None:
        if wish.accumulation is not None:
            return [(wish.batch, wish.accumulation)]
        return [(wish.batch, max(1, EFFECTIVE_BATCH // wish.batch))]
    if wish.accumulation is not None:
        return [(b, wish.accumulation) for b in MICRO_BATCHES]
    return [(b, EFFECTIVE_BATCH // b) for b in MICRO_BATCHES]


def _open(pinned: Any, options: Sequence[Any]) -> Sequence[Any]:
    return options if pinned is None else (pinned,)


def _attentions(shape: ModelShape, card: Card, wish: _Wish) -> Sequence[str]:
    if wish.attention is not None:
        return (wish.attention,)
    return card.attention_kinds[:1] if shape.family.sdpa else ("eager",)


def _speeds(shape: ModelShape, card: Card, wish: _Wish, base: Configuration) -> list[Configuration]:
    """The optimizer's state, then settings that change speed but not the result: best first, most frugal last."""
    return [
        replace(
            base,
            batch_size=batch,
            gradient_accumulation=accumulation,
            gradient_checkpointing=checkpointing,
            chunked_loss=wish.chunked_loss is not False,
            optimizer=optimizer,
        )
        for optimizer in _open(wish.optimizer, SEARCHED_OPTIMIZERS)
        for checkpointing in _open(wish.checkpointing, (False, True))
        for batch, accumulation in _batches(wish)
    ]


def _base(shape: ModelShape, card: Card, wish: _Wish, seq: int, precision, adapter) -> Configuration:
    rank, targets = adapter
    return Configuration(
        precision=precision[0],
        double_quant=precision[1],
        max_seq_length=seq,
        batch_size=1,
        gradient_accumulation=1,
        lora_r=rank if wish.method == "lora" else 0,
        lora_alpha=2 * rank if wish.method == "lora" else 0,
        target_modules=targets if wish.method == "lora" else (),
        lora_dropout=wish.lora_dropout if wish.method == "lora" else 0.0,
        gradient_checkpointing=True,
        chunked_loss=True,
        attention=_attentions(shape, card, wish)[0],
        optimizer=SEARCHED_OPTIMIZERS[0],
        method=wish.method,
    )


def _search(judge: _Judge, wish: _Wish, margin: bool) -> Configuration | None:
    """The first configuration, in order of preference, that fits."""
    shape, card = judge.shape, judge.card
    adapters = _adapters(shape, wish)
    if wish.method == "full":
        adapters = adapters[:1]
    for seq in _lengths(shape, wish):
        for precision in _precisions(card, wish):
            least = _base(shape, card, wish, seq, precision, adapters[-1])
            if not judge.fits(_speeds(shape, card, wish, least)[-1], margin):
                continue  # not even the smallest adapters fit at this length and precision
            for adapter in adapters:
                options = _speeds(shape, card, wish, _base(shape, card, wish, seq, precision, adapter))
                if judge.fits(options[-1], margin):
                    return _fastest(judge, options, margin)
    return None


def _fastest(judge: _Judge, options: list[Configuration], margin: bool) -> Configuration:
    """The first of `options` that fits; their last one does. A group whose most frugal member fails is skipped."""

    def group(config: Configuration) -> tuple[str, bool]:
        return config.optimizer, config.gradient_checkpointing

    frugal = {group(option): option for option in options}
    for option in options:
        if judge.fits(frugal[group(option)], margin) and judge.fits(option, margin):
            return option
    return options[-1]


# -- what was given up, what else there is, what would be needed --------------------------------------


def _gib(amount: float) -> str:
    return f"{amount / GiB:.2f} GiB"


def describe_adapters(shape: ModelShape, config: Configuration) -> str:
    if config.method == "full":
        return "full fine-tuning"
    names = shape.family.names
    which = {names: "all linear layers", names[:4]: "attention"}.get(
        config.target_modules, ", ".join(config.target_modules)
    )
    return f"rank {config.lora_r} on {which}"


def _traded(judge: _Judge, wish: _Wish, config: Configuration) -> tuple[str, ...]:
    """What the chosen configuration gave up against the best one, and what that would have taken."""
    shape, card = judge.shape, judge.card

    def needs(other: Configuration) -> str:
        need = judge.footprint(other).peak_allocated + judge.error(other)
        return f"{_gib(need + judge.card.context_bytes)} needed with its error bar, {_gib(judge.usable)} usable"

    lines = []
    best_seq, best_precision = _lengths(shape, wish)[0], _precisions(card, wish)[0][0]
    best_adapter = _adapters(shape, wish)[0]
    frugal = replace(config, batch_size=wish.batch or 1, gradient_checkpointing=wish.checkpointing is not False)
    if config.max_seq_length < best_seq:
        lines.append(
            f"sequence length {best_seq} -> {config.max_seq_length}: {needs(replace(frugal, max_seq_length=best_seq))}"
        )
    if config.precision != best_precision:
        other = replace(frugal, precision=best_precision, double_quant=False)
        lines.append(f"{best_precision} base weights -> {config.precision}: {needs(other)}")
    if config.double_quant and wish.double_quant is None:
        lines.append(f"single -> double quantisation: {needs(replace(frugal, double_quant=False))}")
    if config.method == "lora" and (config.lora_r, config.target_modules) != best_adapter:
        other = replace(frugal, lora_r=best_adapter[0], target_modules=best_adapter[1])
        lines.append(f"{describe_adapters(shape, other)} -> {describe_adapters(shape, config)}: {needs(other)}")
    if config.gradient_checkpointing and wish.checkpointing is None:
        other = replace(config, gradient_checkpointing=False, batch_size=wish.batch or 1)
        if not judge.surely_fits(other):
            lines.append(f"speed (about a third of the step): gradient checkpointing is on; without it {needs(other)}")
    if config.optimizer != SEARCHED_OPTIMIZERS[0] and wish.optimizer is None:
        other = replace(frugal, optimizer=SEARCHED_OPTIMIZERS[0])
        lines.append(f"optimizer {SEARCHED_OPTIMIZERS[0]} -> {config.optimizer}: {needs(other)}")
    return tuple(lines)


def _alternatives(judge: _Judge, wish: _Wish, config: Configuration) -> tuple[Option, ...]:
    """Two other configurations that fit: longer sequences, better precision, or a faster step."""
    card = judge.card
    found: list[tuple[str, Configuration]] = []
    frugal = replace(
        config,
        gradient_checkpointing=True if wish.checkpointing is None else config.gradient_checkpointing,
        batch_size=wish.batch or 1,
        gradient_accumulation=wish.accumulation or max(1, EFFECTIVE_BATCH // (wish.batch or 1)),
    )
    if config.precision == "nf4" and wish.precision is None:
        best = _precisions(card, wish)[0]
        for seq in (n for n in (512, 384, 256, 128) if n < config.max_seq_length):
            other = replace(frugal, precision=best[0], double_quant=False, max_seq_length=seq)
            if judge.surely_fits(other):
                found.append((f"{best[0]} base weights at sequence length {seq}", other))
                break
    if config.precision not in ("nf4", "float32") and wish.precision is None and config.method == "lora":
        other = replace(config, precision="nf4", double_quant=True)
        found.append(("4-bit base weights: less memory, a slower step", other))
    longest = _longest(judge, frugal)
    if longest > config.max_seq_length and longest != frugal.max_seq_length:
        found.append((f"sequence length {longest}, the longest that fits", replace(frugal, max_seq_length=longest)))
    if config.gradient_checkpointing and wish.checkpointing is None:
        for seq in (n for n in LENGTHS if n < config.max_seq_length):
            other = replace(frugal, gradient_checkpointing=False, max_seq_length=seq)
            if judge.surely_fits(other):
                found.append((f"no gradient checkpointing at sequence length {seq}: a faster step", other))
                break
    if config.method == "lora" and config.lora_r > 4 and wish.lora_r is None:
        other = replace(config, lora_r=config.lora_r // 2, lora_alpha=config.lora_alpha // 2)
        found.append((f"rank {other.lora_r}: fewer trainable parameters", other))
    return tuple(Option(text, c, judge.about(c)) for text, c in found[:2] if judge.fits(c, margin=False))


def _longest(judge: _Judge, config: Configuration) -> int:
    """The longest sequence (a multiple of 128, at most 32,768) that fits with these settings."""
    low, high = config.max_seq_length // 128, min(judge.shape.max_position_embeddings, 32768) // 128
    while low < high:
        middle = (low + high + 1) // 2
        if judge.surely_fits(replace(config, max_seq_length=middle * 128)):
            low = middle
        else:
            high = middle - 1
    return low * 128


def _needed(judge: _Judge, wish: _Wish, nearest: Configuration) -> Option:
    """Nothing fits: the one change that would do it, from the cheapest to a larger card."""
    changes: list[tuple[str, Configuration]] = []
    if wish.precision not in (None, "nf4") and judge.card.device == "cuda" and wish.method == "lora":
        changes.append(("--precision nf4", replace(nearest, precision="nf4", double_quant=True)))
    if wish.checkpointing is False:
        changes.append(("gradient checkpointing on", replace(nearest, gradient_checkpointing=True)))
    if wish.chunked_loss is False:
        changes.append(("the chunked loss", replace(nearest, chunked_loss=True)))
    if wish.attention in ("eager", "math") and judge.shape.family.sdpa:
        best = judge.card.attention_kinds[0]
        changes.append((f"--attention {best}", replace(nearest, attention=best)))
    if wish.batch not in (None, 1):
        changes.append(("--batch 1", replace(nearest, batch_size=1)))
    if wish.optimizer not in (None, "lion-8bit"):
        changes.append(("--optimizer lion-8bit", replace(nearest, optimizer="lion-8bit")))
    if wish.lora_r is not None and wish.lora_r > 4:
        changes.append(("--lora-r 4", replace(nearest, lora_r=4, lora_alpha=8)))
    if wish.method == "full":
        names = judge.shape.family.names
        lora = replace(nearest, method="lora", lora_r=8, lora_alpha=16, target_modules=names)
        precision = "bfloat16" if judge.card.bf16 else "float16"
        changes.append(("LoRA instead of full fine-tuning", replace(lora, precision=precision)))
        changes.append(("QLoRA instead of full fine-tuning", replace(lora, precision="nf4", double_quant=True)))
    if wish.seq is not None:
        for seq in (n for n in (4096, 3072, 2048, 1536, *LENGTHS, 64) if n < wish.seq):
            changes.append((f"--seq {seq}", replace(nearest, max_seq_length=seq)))
    for text, config in changes:
        if judge.fits(config):
            return Option(text, config, judge.about(config))
    total = judge.about(nearest)
    want = total + judge.error(nearest)
    text = f"a card with {_gib(want)} usable"
    if judge.card.device == "cuda":
        cards = [load_card(name) for name in card_names()]
        large = sorted((c for c in cards if c.usable_bytes() >= want), key=lambda c: (c.usable_bytes(), c.name))
        if large:
            text += f", for example {large[0].name}"
    return Option(text, nearest, total)


# -- the entry ---------------------------------------------------------------------------------------


def plan(
    model: str | Path | Mapping[str, Any] | ModelShape,
    card: str | int | Path | Card,
    *,
    seq: int | None = None,
    batch: int | None = None,
    precision: str | None = None,
    double_quant: bool | None = None,
    lora_r: int | None = None,
    targets: str | Sequence[str] | None = None,
    checkpointing: bool | None = None,
    chunked_loss: bool | None = None,
    attention: str | None = None,
    optimizer: str | None = None,
    os: str | None = None,
    accumulation: int | None = None,
    lora_dropout: float = 0.0,
    method: str = "lora",
    alternatives: bool = True,
) -> Plan:
    """Whether `model` trains on `card`, and the best way to do it.

    model: a profile's name, a Hugging Face id, a folder, a config.json, a parsed config or a `ModelShape`.
    card: a profile's name or file, "auto", a `Card`, or a budget (bytes, or "4GiB"); `Card.cpu(ram)` for a CPU.
    seq and batch: tokens and sequences of one forward pass. What is given stays as given; None is searched over.
    os: "linux" (no desktop), "linux-desktop" or "windows"; decides how much of a profile's memory is usable.
    alternatives: also look for two other configurations (costs a few tenths of a second).

    Raises UserError (a ValueError) for anything unknown or impossible. Imports no torch.
    """
    shape = load_model(model)
    device = load_card(card)
    wish = _wish(shape, device, locals())
    judge = _Judge(shape, device, os)
    config = _search(judge, wish, margin=True)
    margin = config is not None
    config = config or _search(judge, wish, margin=False)
    fits = config is not None
    if config is None:
        seqs, precisions = _lengths(shape, wish), _precisions(device, wish)
        nearest = _base(shape, device, wish, seqs[-1], precisions[-1], _adapters(shape, wish)[-1])
        config = _speeds(shape, device, wish, nearest)[-1]
    found = judge.footprint(config)
    allocated, reserved, pool = judge.memory(config)
    if fits:  # the bisection stops some MiB short of what the search has seen survive
        pool = min(pool, judge.room(config, margin))
    components = dict(found.components)
    if device.context_bytes:
        components["context"] = device.context_bytes
    if pool > found.peak_allocated:
        components["allocator"] = pool - found.peak_allocated
    peak = pool + device.context_bytes
    return Plan(
        model=shape.name,
        hf_id=shape.hf_id,
        card=device.name,
        os="any" if "any" in device.usable else os or "linux",
        fits=fits,
        config=config,
        components=components,
        phases=found.phases,
        peak_phase=found.peak_phase,
        allocated_bytes=allocated,
        reserved_bytes=reserved,
        peak_bytes=peak,
        usable_bytes=judge.usable,
        error_bytes=judge.error(config),
        step_seconds=step_seconds(judge.step(config), device),
        parameters=shape.parameters,
        trainable_parameters=judge.step(config).trainable_parameters(),
        gave_up=_traded(judge, wish, config) if fits else (),
        alternatives=_alternatives(judge, wish, config) if fits and alternatives else (),
        needed=None if fits else _needed(judge, wish, config),
        notes=_notes(shape, device, os, config),
    )


def _notes(shape: ModelShape, card: Card, system: str | None, config: Configuration) -> tuple[str, ...]:
    notes = [card.note] if card.note else []
    if system == "windows":
        notes.append("Windows does not fail when VRAM runs out: it pages silently, at about an eighth of the speed")
    if config.attention == "efficient" and shape.num_key_value_heads < shape.num_attention_heads:
        notes.append(
            "attention runs on K and V expanded to all heads: before sm_80 transformers' own grouped call lands on "
            "the math kernel, which takes more memory"
        )
    return tuple(notes)
