"""`plan()`: the best configuration of a model on a card, over everything that the caller left open.

What serves the result goes first: the sequence length and batch that were asked for, then the precision of the
base weights, then LoRA's rank and targets, then speed. Within one choice of the first three, the most frugal
settings decide whether it is possible at all; the fastest settings that fit are taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from cruxy_triton import settings
from cruxy_triton.errors import UserError
from cruxy_triton.planner.accuracy import error_bytes
from cruxy_triton.planner.card import Card, GiB, MiB, card_names, load_card
from cruxy_triton.planner.footprint import Footprint, allocations, footprint
from cruxy_triton.planner.losses import tiles_pay
from cruxy_triton.planner.models import load_model
from cruxy_triton.planner.optimizers import FINETUNE_OPTIMIZERS
from cruxy_triton.planner.plan import Configuration, Option, Plan
from cruxy_triton.planner.replay import OutOfMemory, replay, smallest_pool
from cruxy_triton.planner.shape import ModelShape
from cruxy_triton.planner.speed import step_seconds
from cruxy_triton.planner.step import BYTES, Step

LENGTHS = (4096, 3072, 2048, 1536, 1024, 768, 512, 384, 256, 128, 64)  # tokens, where one is looked for
DEFAULT_LENGTH = 1024  # the longest that is tried where none is asked for
LARGEST_MICRO_BATCH = 32
# With their state's bits, best first and most frugal last, by method.
SEARCHED_OPTIMIZERS = {
    "lora": (("cruxy", 32), ("cruxy-lion", 32), ("cruxy-lion", 8)),
    "full": (("cruxy", 32), ("cruxy", 8), ("cruxy-lion", 8), ("cruxy-lion", 4)),
}


class Weights(NamedTuple):
    """What becomes of the base weights: their dtype, 4 bits, and whether they learn in the backward pass."""

    dtype: str
    load_in_4bit: bool = False
    double_quant: bool = False
    release: bool = False


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
        allocated, full = self.footprint(config).peak_allocated, config.method == "full"
        traced = self.shape.learned is not None
        return error_bytes(allocated, self.card, config.attention, full, config.load_in_4bit, traced)

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
            self._last = (config, allocations(self.step(config)))
        return self._last[1]

    def memory(self, config: Configuration) -> tuple[int, int, int]:
        """(allocated, reserved without limits, least memory that does) for PyTorch's allocator, bytes."""
        peak = self.footprint(config).peak_allocated
        if self.card.device == "cpu":
            return peak, peak, peak
        events = self.events(config)
        free_run = replay(events)
        return free_run.allocated, free_run.reserved, smallest_pool(events, max(8 * MiB, peak // 128), free_run)

    def about(self, config: Configuration) -> int:
        """The process's peak without replaying the allocator: half of its allowance is added instead."""
        extra = self.allowance(config) // 2 if self.card.device == "cuda" else 0
        return self.footprint(config).peak_allocated + extra + self.card.context_bytes


def codec_of(config: Configuration) -> str:
    """The planner's name for the optimizer and the state that it keeps."""
    kept = (config.optimizer, config.state_bits)
    return next(codec for codec, names in FINETUNE_OPTIMIZERS.items() if names == kept)


def step_of(shape: ModelShape, card: Card, config: Configuration) -> Step:
    """The `Step` that `cruxy-triton finetune` runs for `config` on `card`."""
    # Where gradients are released the loss has a scale of its own in place of autocast's scaler.
    half = card.device == "cuda" and config.dtype != "float32" and not config.release
    return Step(
        shape=shape,
        batch=config.micro_batch_size,
        seq=config.max_seq_length,
        precision=config.precision,
        beside_nf4=config.dtype,
        double_quant=config.double_quant,
        lora_r=config.lora_r if config.method == "lora" else 0,
        targets=config.target_modules,
        lora_dropout=config.lora_dropout,
        use_dora=config.use_dora,
        ranks=tuple(settings.ranks_of(config.target_modules, config.lora_r, config.rank_pattern).items()),
        checkpointing=config.gradient_checkpointing,
        chunked_loss=config.chunked_loss,
        attention=config.attention,
        optimizer=codec_of(config),
        accumulation=config.gradient_accumulation,
        device=card.device,
        cublas_workspace=card.cublas_workspace_bytes,
        autocast=half,
        upcast_outputs=half,
        warmup=card.device == "cuda",
        release=config.release,
    )


# -- what may be chosen ------------------------------------------------------------------------------


def pinned(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are given, checked; None is open. Raises UserError for one that is no setting of a plan."""
    found = {}
    for name, value in given.items():
        if name not in settings.CONFIGURES or name in ("device", "vram_bytes"):
            near = settings.suggestion(name, settings.CONFIGURES)
            raise UserError(f"{name} is no setting of a plan; expected one of {', '.join(settings.CONFIGURES)}{near}")
        if value is not None:
            found[name] = settings.SETTINGS[name].check(value)
    settings.check_together(found)
    return found


class _Space:
    """The choices that `given` leaves open: each list best first and most frugal last, of one where it is pinned."""

    def __init__(self, shape: ModelShape, card: Card, given: Mapping[str, Any], longest: int | None):
        self.shape, self.card = shape, card
        self.given = pinned(given)
        self.method = self._value("method")
        if (length := self.given.get("max_seq_length") or 0) > shape.max_position_embeddings:
            raise UserError(
                f"--max-seq-length {length} is beyond {shape.name}'s maximum of {shape.max_position_embeddings} "
                "positions"
            )
        self.lengths = self._lengths(longest or shape.max_position_embeddings)
        self.weights = self._weights()
        self.adapters = self._adapters() if self.method == "lora" else [(0, ())]
        self.optimizers = self._optimizers()
        self.checkpointing = self._open("gradient_checkpointing", [False, True])
        self.batch_size = self._value("batch_size") or settings.BATCH_SIZE
        divisors = [n for n in range(LARGEST_MICRO_BATCH, 0, -1) if self.batch_size % n == 0]
        self.micro_batches = self._open("micro_batch_size", divisors)
        batch = None if self.given.get("release") and not self.pins("batch_size") else self.batch_size
        settings.check_together({"batch_size": batch, "micro_batch_size": self.micro_batches[0]})
        self.attention = self._attention()

    def pins(self, name: str) -> bool:
        return name in self.given

    def _value(self, name: str) -> Any:
        return self.given.get(name, settings.SETTINGS[name].default)

    def _open(self, name: str, choices: list[Any]) -> list[Any]:
        return [self.given[name]] if self.pins(name) else choices

    def _lengths(self, longest: int) -> list[int]:
        wanted = max(8, min(longest, self.shape.max_position_embeddings, DEFAULT_LENGTH))
        return self._open("max_seq_length", [wanted, *shorter(wanted)])

    def _weights(self) -> list[Weights]:
        asked, card = self._value("dtype"), self.card
        dtype = settings.resolve_dtype(asked, card.device, card.capability)
        if self.method == "full":
            return self._learning(list(dict.fromkeys(["float32", dtype])) if asked == "auto" else [dtype])
        plain = [Weights(dtype)]
        quantized = [Weights(dtype, True, double) for double in self._open("double_quant", [False, True])]
        if self.given.get("load_in_4bit"):
            if dtype == "float32" and card.device == "cuda":
                raise UserError("--load-in-4bit computes in 16 bits on a GPU; leave --dtype float32 out")
            return quantized
        searched = dtype != "float32" and card.device == "cuda"
        return plain + quantized if searched and not self.pins("load_in_4bit") else plain

    def _learning(self, dtypes: list[str]) -> list[Weights]:
        """Whole gradients first: they can be clipped by their norm, and a step can take more than a micro-batch."""
        found = [Weights(dtype, release=release) for release in (False, True) for dtype in dtypes]
        if self.given.get("optimizer") in settings.TORCHS:
            found = [x for x in found if not x.release and x.dtype != "float16"]
        return [x for x in found if x.release == self.given.get("release", x.release)]

    def _adapters(self) -> list[tuple[int, tuple[str, ...]]]:
        """(rank, targets): all linear layers, then attention, then q and v."""
        names = self.shape.family.names
        rank = settings.SETTINGS["lora_r"].default
        ladder = [(rank, names), (rank // 2, names), (rank // 2, names[:4]), (rank // 4, (names[0], names[2]))]
        if self.pins("target_modules"):
            targets = self.given["target_modules"]
            wrong = [name for name in targets if name not in (*names, settings.ALL_LINEAR)]
            if wrong:
                raise UserError(
                    f"--target-modules: unknown LoRA targets {', '.join(wrong)}; {self.shape.name} has "
                    f"{', '.join(names)}"
                )
            chosen = names if targets == [settings.ALL_LINEAR] else tuple(n for n in names if n in targets)
            ladder = [(r, chosen) for r, _ in ladder]
        if self.pins("lora_r"):
            ladder = [(self.given["lora_r"], targets) for _, targets in ladder]
        return list(dict.fromkeys(ladder))

    def _optimizers(self) -> list[tuple[str, int]]:
        if not self.pins("optimizer"):
            found = list(SEARCHED_OPTIMIZERS[self.method])
        else:
            found = [(self.given["optimizer"], bits) for bits in settings.STATE_BITS[self.given["optimizer"]]]
        return [(name, bits) for name, bits in found if bits == self.given.get("state_bits", bits)]

    def _attention(self) -> str:
        asked = self.given.get("attention")
        kind = self.card.attention(asked)
        if self.shape.family.sdpa or kind == "eager":
            return kind
        if asked is not None:
            raise UserError(f"{self.shape.name} caps its attention scores, which only eager attention can")
        return "eager"

    def _batch(self, micro_batch: int, release: bool) -> int:
        """Sequences per optimizer step."""
        return micro_batch if release and not self.pins("batch_size") else self.batch_size

    def loss(self, length: int, micro_batch: int, dtype: str) -> bool:
        """Whether it is made in tiles: for adapters always, and for a type that has to be traced."""
        open_to_search = self.method == "full" and self.shape.learned is None
        tiled = not open_to_search or tiles_pay(self.shape, length * micro_batch, BYTES[dtype])
        return self.given.get("chunked_loss", tiled)

    def options(self, length: int, weights: Weights, adapter: tuple) -> list[Configuration]:
        """The optimizer's state, then settings that change speed but not the result: best first, most frugal last."""
        return [
            Configuration(
                max_seq_length=length,
                dtype=weights.dtype,
                load_in_4bit=weights.load_in_4bit,
                double_quant=weights.double_quant,
                release=weights.release,
                device=self.card.device,
                vram_bytes=self.card.budget_bytes,
                attention=self.attention,
                gradient_checkpointing=checkpointing,
                chunked_loss=self.loss(length, micro_batch, weights.dtype),
                method=self.method,
                lora_r=adapter[0],
                lora_alpha=self.alpha(adapter[0]),
                lora_dropout=self._value("lora_dropout") if self.method == "lora" else 0.0,
                use_dora=self._value("use_dora") if self.method == "lora" else False,
                rank_pattern=tuple(self._value("rank_pattern")) if self.method == "lora" else (),
                target_modules=adapter[1],
                optimizer=optimizer,
                state_bits=bits,
                batch_size=self._batch(micro_batch, weights.release),
                micro_batch_size=micro_batch,
            )
            for optimizer, bits in self.optimizers
            for checkpointing in self.checkpointing
            for micro_batch in self.micro_batches
            if not weights.release or micro_batch == self._batch(micro_batch, True)
        ]

    def alpha(self, rank: int) -> float:
        return self.given.get("lora_alpha", 2 * rank) if rank else 0

    def frugal(self, config: Configuration, **changes: Any) -> Configuration:
        """`config` with `changes`, and of what only costs speed the settings that take least memory."""
        least = {"gradient_checkpointing": self.checkpointing[-1]}
        if not config.release:  # where every micro-batch is a step
            least["micro_batch_size"] = self.micro_batches[-1]
        other = replace(config, **{**least, **changes})
        return replace(other, chunked_loss=self.loss(other.max_seq_length, other.micro_batch_size, other.dtype))

    def least(self) -> Configuration:
        """The configuration that takes least memory of all."""
        return self.options(self.lengths[-1], self.weights[-1], self.adapters[-1])[-1]


def shorter(length: int, least: int = 0) -> list[int]:
    return [n for n in LENGTHS if least <= n < length]


def _search(judge: _Judge, space: _Space, margin: bool) -> Configuration | None:
    """The first configuration, in order of preference, that fits."""
    for length in space.lengths:
        for weights in space.weights:
            if not judge.fits(space.options(length, weights, space.adapters[-1])[-1], margin):
                continue  # not even the smallest adapters fit at this length and precision
            for adapter in space.adapters:
                options = space.options(length, weights, adapter)
                if judge.fits(options[-1], margin):
                    return _fastest(judge, options, margin)
    return None


def _fastest(judge: _Judge, options: list[Configuration], margin: bool) -> Configuration:
    """The first of `options` that fits; their last one does. A group whose most frugal member fails is skipped."""

    def group(config: Configuration) -> tuple[str, int, bool]:
        return config.optimizer, config.state_bits, config.gradient_checkpointing

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


def describe_optimizer(config: Configuration) -> str:
    return config.optimizer + (f" {config.state_bits}-bit" if config.state_bits != 32 else "")


def _traded(judge: _Judge, space: _Space, config: Configuration) -> tuple[str, ...]:
    """What the chosen configuration gave up against the best one, and what that would have taken."""

    def needs(other: Configuration) -> str:
        need = judge.footprint(other).peak_allocated + judge.error(other)
        return f"{_gib(need + judge.card.context_bytes)} needed with its error bar, {_gib(judge.usable)} usable"

    lines = []
    best_length, best_weights = space.lengths[0], space.weights[0]
    best_adapter, best_optimizer = space.adapters[0], space.optimizers[0]
    if config.max_seq_length < best_length:
        other = space.frugal(config, max_seq_length=best_length)
        lines.append(f"sequence length {best_length} -> {config.max_seq_length}: {needs(other)}")
    best = space.frugal(config, dtype=best_weights.dtype, load_in_4bit=best_weights.load_in_4bit, double_quant=False)
    if config.release and not best_weights.release:
        batch, micro = space.batch_size, space.micro_batches[-1]
        best = space.frugal(best, release=False, batch_size=batch, micro_batch_size=micro)
        what = "" if config.precision == best.precision else f"{best.precision} weights with "
        what += f"whole gradients and steps of {batch} -> "
        what += "" if config.precision == best.precision else f"{config.precision} with "
        lines.append(f"{what}gradients released layer by layer and steps of {config.batch_size}: {needs(best)}")
    elif config.precision != best.precision:
        lines.append(f"{best.precision} base weights -> {config.precision}: {needs(best)}")
    if config.double_quant and not space.pins("double_quant"):
        lines.append(f"single -> double quantization: {needs(space.frugal(config, double_quant=False))}")
    if (config.lora_r, config.target_modules) != best_adapter:
        other = space.frugal(config, lora_r=best_adapter[0], target_modules=best_adapter[1])
        what = f"{describe_adapters(space.shape, other)} -> {describe_adapters(space.shape, config)}"
        lines.append(f"{what}: {needs(other)}")
    if config.gradient_checkpointing and not space.checkpointing[0]:
        other = space.frugal(config, gradient_checkpointing=False)
        if not judge.surely_fits(other):
            lines.append(f"speed (about a third of the step): gradient checkpointing is on; without it {needs(other)}")
    if (config.optimizer, config.state_bits) != best_optimizer:
        other = space.frugal(config, optimizer=best_optimizer[0], state_bits=best_optimizer[1])
        lines.append(f"optimizer {describe_optimizer(other)} -> {describe_optimizer(config)}: {needs(other)}")
    return tuple(lines)


def _alternatives(judge: _Judge, space: _Space, config: Configuration) -> tuple[Option, ...]:
    """Two other configurations that fit: longer sequences, better precision, or a faster step."""
    found: list[tuple[str, Configuration]] = []
    frugal = space.frugal(config)
    if config.load_in_4bit and not space.pins("load_in_4bit"):
        dtype = space.weights[0].dtype
        for length in shorter(config.max_seq_length, 128):
            other = replace(frugal, dtype=dtype, load_in_4bit=False, double_quant=False, max_seq_length=length)
            if judge.surely_fits(other):
                found.append((f"{dtype} base weights at sequence length {length}", other))
                break
    if not config.load_in_4bit and space.weights[-1].load_in_4bit:
        other = replace(config, load_in_4bit=True, double_quant=space.weights[-1].double_quant)
        found.append(("4-bit base weights: less memory, a slower step", other))
    longest = _longest(judge, frugal)
    if longest > config.max_seq_length:
        found.append((f"sequence length {longest}, the longest that fits", replace(frugal, max_seq_length=longest)))
    if config.gradient_checkpointing and not space.checkpointing[0]:
        for length in shorter(config.max_seq_length, 128):
            other = replace(frugal, gradient_checkpointing=False, max_seq_length=length)
            if judge.surely_fits(other):
                found.append((f"no gradient checkpointing at sequence length {length}: a faster step", other))
                break
    if config.lora_r > 4 and not space.pins("lora_r"):
        other = replace(config, lora_r=config.lora_r // 2, lora_alpha=space.alpha(config.lora_r // 2))
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


def _needed(judge: _Judge, space: _Space, nearest: Configuration) -> Option:
    """Nothing fits: the one change that would do it, from the cheapest to a larger card."""
    card, half = judge.card, settings.resolve_dtype("auto", judge.card.device, judge.card.capability)
    quantized = {"dtype": half, "load_in_4bit": True, "double_quant": True}
    changes: list[tuple[str, Configuration]] = []
    if not nearest.load_in_4bit and card.device == "cuda" and space.method == "lora":
        changes.append(("--load-in-4bit", replace(nearest, **quantized)))
    if not nearest.gradient_checkpointing:
        changes.append(("--gradient-checkpointing", replace(nearest, gradient_checkpointing=True)))
    if space.given.get("chunked_loss") is False:
        changes.append(("--chunked-loss", replace(nearest, chunked_loss=True)))
    if nearest.attention in ("eager", "math") and space.shape.family.sdpa:
        best = card.attention_kinds[0]
        changes.append((f"--attention {best}", replace(nearest, attention=best)))
    if nearest.micro_batch_size > 1:
        changes.append(("--micro-batch-size 1", replace(nearest, micro_batch_size=1)))
    frugal = SEARCHED_OPTIMIZERS[space.method][-1]
    if (nearest.optimizer, nearest.state_bits) != frugal:
        other = replace(nearest, optimizer=frugal[0], state_bits=frugal[1])
        changes.append((f"--optimizer {other.optimizer} --state-bits {other.state_bits}", other))
    if space.pins("lora_r") and nearest.lora_r > 4:
        changes.append(("--lora-r 4", replace(nearest, lora_r=4, lora_alpha=space.alpha(4))))
    if space.method == "full":
        if not nearest.release and nearest.optimizer not in settings.TORCHS:
            batch = nearest.micro_batch_size
            changes.append(("--release", replace(nearest, dtype=half, release=True, batch_size=batch)))
        lora = replace(
            nearest, method="lora", lora_r=8, lora_alpha=16, target_modules=space.shape.family.names, release=False,
            chunked_loss=space.given.get("chunked_loss", True), optimizer="cruxy", state_bits=32,
        )  # fmt: skip
        changes.append(("LoRA instead of full fine-tuning", replace(lora, dtype=half)))
        if card.device == "cuda":
            changes.append(("QLoRA instead of full fine-tuning", replace(lora, **quantized)))
    if space.pins("max_seq_length"):
        for length in shorter(nearest.max_seq_length):
            changes.append((f"--max-seq-length {length}", replace(nearest, max_seq_length=length)))
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
    os: str | None = None,
    longest: int | None = None,
    margin: bool = True,
    alternatives: bool = True,
    **given: Any,
) -> Plan:
    """Whether `model` trains on `card`, and the best way to do it.

    model: a profile's name, a Hugging Face id, a folder, a config.json, a parsed config or a `ModelShape`.
    card: a profile's name or file, "auto", a `Card`, or a budget (bytes, or "4GiB"); `Card.cpu(ram)` for a CPU.
    os: "linux" (no desktop), "linux-desktop" or "windows"; decides how much of a profile's memory is usable.
    longest: tokens of the longest record, where no `max_seq_length` is given.
    margin: prefer what fits with the error bar's width to spare, at the cost of the length; False takes the first
    choice that fits at all.
    alternatives: also look for two other configurations (costs a few tenths of a second).
    given: settings of `cruxy_triton.settings` by name (`max_seq_length=1024`), which stay as they are; a setting that
    is not given, or None, is searched over where the planner searches it, else at its default.

    Raises UserError (a ValueError) for anything unknown or impossible. Imports no torch.
    """
    shape = load_model(model)
    device = load_card(card)
    space = _Space(shape, device, given, longest)
    judge = _Judge(shape, device, os)
    config = (_search(judge, space, margin=True) if margin else None) or _search(judge, space, margin=False)
    fits = config is not None
    config = config or space.least()
    found = judge.footprint(config)
    allocated, reserved, pool = judge.memory(config)
    if fits:  # the bisection stops some MiB short of what the search has seen survive
        pool = min(pool, judge.room(config, margin=judge.fits(config)))
    components = dict(found.components)
    if device.context_bytes:
        components["context"] = device.context_bytes
    if pool > found.peak_allocated:
        components["allocator"] = pool - found.peak_allocated
    peak = pool + device.context_bytes
    return Plan(
        model=shape.name,
        hf_id=shape.hf_id,
        folder=_folder(model),
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
        gave_up=_traded(judge, space, config) if fits else (),
        alternatives=_alternatives(judge, space, config) if fits and alternatives else (),
        needed=None if fits else _needed(judge, space, config),
        notes=_notes(shape, device, os, config),
    )


def _folder(model: Any) -> str:
    """The folder that a model was given as, or whose config.json was; empty for a name."""
    if not isinstance(model, (str, Path)):
        return ""
    path = Path(model).expanduser()
    folder = path.parent if path.name == "config.json" else path
    return str(folder.resolve()) if folder.is_dir() else ""


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
