"""Which code for Lion's momentum: sign flips against an exact Lion on recorded gradients, and validation loss.

Two Lions read the same gradients. One keeps its momentum in fp32, the other stores it in 8 or 4 bits after every
step. A flip is an element whose update sign differs in a step. `cruxy_kernels.codec` uses the winners; the
choice can be repeated with `cruxy-triton bench codec --gradients FILE`, and for 4 bits with `--bits 4`. `--text FILE`
trains the small model of `bench stress` on that text with the winners in the place of Lion's and AdamW's state.

FILE is the folder that `cruxy-triton finetune --record-gradients N` leaves, or a safetensors file with a key for
each parameter, its value of shape (steps, *parameter shape), and `source` in the metadata.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cruxy_kernels.codec import SHARPNESS
from cruxy_triton.bench.characters import CharacterModel, Text
from cruxy_triton.errors import UserError

# How a value between two codes takes one of them: the nearest one; up with the distance in levels for a probability;
# up with a probability that is right on average.
ROUNDINGS = ("nearest", "by level", "by value")


@dataclass(frozen=True)
class Candidate:
    """A way to store a value: `block` values share one scale of `scale` format, each has a code of `bits` bits.

    `compress` maps |x|/scale in [0, 1] onto [0, 1], where `side` evenly spaced levels are taken; `expand` is its
    inverse. `levels` replaces both by a sorted table of signed values. `rounding`: one of ROUNDINGS.
    """

    name: str
    block: int
    scale: str = "fp32"
    compress: Callable[[Tensor], Tensor] | None = None
    expand: Callable[[Tensor], Tensor] | None = None
    levels: Tensor | None = None
    bits: int = 8
    rounding: str = "nearest"
    signed: bool = True  # False: for values of at least 0; none above 0 becomes 0, since AdamW divides by its root

    @property
    def state_bytes(self) -> float:
        """Bytes of optimizer state per parameter, scales included."""
        return self.bits / 8 + {"fp32": 4, "bf16": 2, "bf16 up": 2, "fp16": 2}[self.scale] / self.block

    def round_trip(self, m: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """`m` (1-D fp32) as it comes back from storage; random rounding draws from `generator`."""
        pad = -m.numel() % self.block
        rows = torch.nn.functional.pad(m, (0, pad)).view(-1, self.block)
        scale = store_scale(rows.abs().amax(dim=1, keepdim=True), self.scale)
        x = torch.where(scale > 0, rows / scale, 0.0).clamp(-1, 1)
        if self.levels is not None:
            middles = (self.levels[1:] + self.levels[:-1]) / 2
            y = self.levels[torch.bucketize(x, middles)]
        else:
            assert self.compress is not None
            assert self.expand is not None
            y = self.expand(self._level(x.abs(), generator)).copysign(x)
        return (y * scale).view(-1)[: m.numel()]

    def _level(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """The level that magnitudes take, in [0, 1]."""
        assert self.compress is not None
        assert self.expand is not None
        side = 2 ** (self.bits - self.signed) - 1
        exact = self.compress(x) * side
        if self.rounding == "nearest":
            level = exact.round()
        else:
            low = exact.floor().clamp(max=side - 1)
            up = exact - low
            if self.rounding == "by value":
                below, above = self.expand(low / side), self.expand((low + 1) / side)
                up = (x - below) / (above - below)
            level = low + (torch.rand(x.shape, generator=generator) < up)
        return (level if self.signed else torch.where(x > 0, level.clamp(min=1), 0.0)) / side


def store_scale(absmax: Tensor, format: str) -> Tensor:
    """absmax as it comes back from its storage format."""
    if format == "bf16 up":  # so that |m|/scale <= 1: costs more flips than a rare clamp does
        bits = absmax.view(torch.int32)
        return (((bits + 0xFFFF) >> 16) << 16).view(torch.float32)
    # fp16 as FlashOptim stores it: 0 below 6e-8.
    return absmax.to({"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[format]).float()


def power(p: float) -> dict:
    return {"compress": lambda x: x**p, "expand": lambda y: y ** (1 / p)}


def softsign(k: float) -> dict:
    """(1+k)x/(1+kx): slope 1+k at 0. k=1 is FlashOptim's 2x/(1+|x|)."""
    return {"compress": lambda x: (1 + k) * x / (1 + k * x), "expand": lambda y: y / (1 + k - k * y)}


def logarithm(octaves: float) -> dict:
    """ln(1 + cx) / ln(1 + c) with c = 2^octaves: codes are a constant factor apart but for those near 0."""
    c = 2.0**octaves
    return {
        "compress": lambda x: torch.log1p(c * x) / math.log1p(c),
        "expand": lambda y: torch.expm1(y * math.log1p(c)) / c,
    }


def candidates(bits: int = 8) -> list[Candidate]:
    """The candidates of docs/laws.md section 3 and the ones found on the way."""
    return _of_8_bits() if bits == 8 else _of_4_bits()


def _of_4_bits() -> list[Candidate]:
    """Bfloat16 scales, blocks of 32 to 128, every way to round."""
    maps = {f"softsign k={k}": softsign(k) for k in (1, 2, 3, 4, 5)}
    maps |= {"signed square root": power(0.5)} | {f"logarithmic, {n} octaves": logarithm(n) for n in (3, 5)}
    return [
        Candidate(name, block, "bf16", **functions, bits=4, rounding=rounding)
        for block in (32, 64, 128)
        for name, functions in maps.items()
        for rounding in ROUNDINGS
    ]


def _of_8_bits() -> list[Candidate]:
    """Blocks of 32 to 256, rounded to nearest."""
    found: list[Candidate] = []
    for block in (32, 64, 128, 256):
        scales = ("fp32", "bf16") if block < 256 else ("fp32",)
        for scale in scales:
            found.append(Candidate("linear", block, scale, **power(1.0)))
            found.append(Candidate("signed square root", block, scale, **power(0.5)))
            found.append(Candidate("power 2/3", block, scale, **power(2 / 3)))
            for k in (1, 2, 3, 4, 5, 6, 8):
                found.append(Candidate(f"softsign k={k}", block, scale, **softsign(k)))
    found.append(Candidate(f"softsign k={SHARPNESS}", 64, "bf16 up", **softsign(SHARPNESS)))
    found.append(Candidate("softsign k=1 (FlashOptim)", 32, "fp16", **softsign(1)))
    levels = bitsandbytes_map()
    if levels is not None:
        for block in (32, 64, 128, 256):
            found.append(Candidate("bitsandbytes dynamic map", block, "fp32", levels=levels))
    return found


def bitsandbytes_map() -> Tensor | None:
    """The signed dynamic map of the installed bitsandbytes, sorted; None where it is not installed."""
    try:
        from bitsandbytes.functional import create_dynamic_map
    except ImportError:
        return None
    return create_dynamic_map(signed=True).sort().values


def flips(
    gradients: Iterable[Tensor], candidate: Candidate, betas: tuple[float, float], skip: int = 0
) -> tuple[int, int]:
    """(elements whose sign differs, elements compared) over the steps of one parameter's gradients.

    gradients: 1-D fp32 tensors, one per step. Steps before `skip` run but are not counted.
    """
    beta1, beta2 = betas
    generator = torch.Generator().manual_seed(0)
    exact = stored = None
    different = compared = 0
    for step, g in enumerate(gradients):
        if exact is None or stored is None:
            exact, stored = torch.zeros_like(g), torch.zeros_like(g)
        if step >= skip:
            u = torch.sign(beta1 * exact + (1 - beta1) * g)
            different += int((u != torch.sign(beta1 * stored + (1 - beta1) * g)).sum())
            compared += g.numel()
        exact = beta2 * exact + (1 - beta2) * g
        stored = candidate.round_trip(beta2 * stored + (1 - beta2) * g, generator)
    return different, compared


def read_gradients(path: Path) -> tuple[dict[str, Tensor], str]:
    """{parameter name: (steps, ...) gradients}, and words on their source.

    path: what `cruxy-triton finetune --record-gradients N` leaves (a folder of step-*.safetensors), or one file.
    Raises UserError for anything else.
    """
    if path.is_dir():
        files = sorted(path.glob("step-*.safetensors"))
        if not files:
            raise UserError(f"{path}: no step-*.safetensors in it; record some with finetune --record-gradients")
        steps = [_read(file)[0] for file in files]
        if any(step.keys() != steps[0].keys() for step in steps):
            raise UserError(f"{path}: its files hold different parameters; expected one run's gradients")
        stacked = {name: torch.stack([step[name] for step in steps]) for name in steps[0]}
        return stacked, f"{len(files)} steps in {path}"
    gradients, metadata = _read(path)
    lengths = {len(g) for g in gradients.values() if g.dim()}
    if not gradients or len(lengths) != 1:
        raise UserError(f"{path}: expected (steps, *shape) tensors with equal steps, found steps {lengths}")
    return gradients, metadata.get("source", "not stated in the file")


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot read gradients ({error}); expected a safetensors file") from error


def table(path: Path, betas: tuple[float, float], skip: int = 0, bits: int = 8) -> tuple[list[dict], str]:
    """A row for each candidate of `bits` bits, fewest flips first, and the source of the gradients.

    Every tensor is padded to whole blocks on its own, as the optimizer stores it.
    """
    gradients, source = read_gradients(path)
    steps = len(next(iter(gradients.values())))
    rows = []
    together: dict[int, Tensor] = {}
    for candidate in candidates(bits):
        if candidate.block not in together:
            padded = []
            for g in gradients.values():
                flat = g.reshape(steps, -1).float()
                padded.append(torch.nn.functional.pad(flat, (0, -flat.shape[1] % candidate.block)))
            # One long tensor: the same blocks, far fewer operators.
            together = {candidate.block: torch.cat(padded, dim=1)}
        real = sum(g[0].numel() for g in gradients.values())
        # Padding is 0 in both and never flips.
        different, _ = flips(together[candidate.block].unbind(0), candidate, betas, skip)
        rows.append(
            {
                "name": candidate.name,
                "rounding": candidate.rounding,
                "block": candidate.block,
                "scale": candidate.scale,
                "state_bytes_per_parameter": candidate.state_bytes,
                "flips": different / (real * (steps - skip)),
            }
        )
    return sorted(rows, key=lambda row: row["flips"]), source


# -- validation loss ---------------------------------------------------------------------------------------------

# Rate, betas and weight decay of the runs: those that suit Lion and AdamW on this model; cosine after a tenth.
SETTINGS = {"lion": (5e-4, (0.9, 0.95), 0.3), "adamw": (2e-3, (0.9, 0.99), 0.1)}


FOUR_BITS = Candidate("softsign k=3", 64, "bf16", **softsign(SHARPNESS), bits=4, rounding="by value")
EIGHT_BITS = Candidate("softsign k=3", 64, "bf16", **softsign(SHARPNESS))
SECOND_MOMENT = Candidate("fourth root", 64, "bf16", **power(0.25), rounding="by value", signed=False)
# What `losses` trains: the rule, and for each of its buffers a candidate, None for fp32.
KEPT = {
    "Lion, fp32": ("lion", (None,)),
    "Lion, 8 bits": ("lion", (EIGHT_BITS,)),
    "Lion, 4 bits": ("lion", (FOUR_BITS,)),
    "AdamW, fp32": ("adamw", (None, None)),
    "AdamW, 8 bits": ("adamw", (EIGHT_BITS, SECOND_MOMENT)),
}


def losses(text: Text, seeds: int, say: Callable[[str], Any]) -> list[dict[str, Any]]:
    """A row of validation losses for each of KEPT."""
    rows: list[dict[str, Any]] = []
    for name, (rule, kept) in KEPT.items():
        found = []
        for seed in range(seeds):
            found.append(loss_of(text, rule, kept, seed))
            say(f"{name}, seed {seed}: {found[-1]:.4f}")
        by_seed = {f"seed {i}": loss for i, loss in enumerate(found)}
        rows.append({"state": name} | by_seed | {"mean": sum(found) / seeds})
    return rows


def loss_of(text: Text, rule: str, kept: tuple[Candidate | None, ...], seed: int) -> float:
    """Validation loss of the model of `bench stress` after a run whose state goes through `kept` after every step.

    kept: a candidate for each state buffer of the rule, None for fp32. Gradients are clipped to
    a norm of 1.
    """
    lr, (beta1, beta2), decay = SETTINGS[rule]
    size = text.size
    torch.manual_seed(seed)
    model = CharacterModel(text.symbols, size)
    generator = torch.Generator().manual_seed(seed)
    params = list(model.parameters())
    state = [[torch.zeros(p.numel()) for _ in kept] for p in params]
    for step in range(size.steps):
        loss = model.loss(*text.batch(seed * 1_000_003 + step))
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        warm = min(1.0, (step + 1) / (0.1 * size.steps))
        rate = lr * warm * (0.5 + 0.5 * math.cos(math.pi * step / size.steps))
        with torch.no_grad():
            for p, buffers in zip(params, state, strict=True):
                assert p.grad is not None
                g = p.grad.view(-1)
                if rule == "lion":
                    (m,) = buffers
                    update = torch.sign(beta1 * m + (1 - beta1) * g)
                    new = [beta2 * m + (1 - beta2) * g]
                else:
                    new = [beta1 * buffers[0] + (1 - beta1) * g, beta2 * buffers[1] + (1 - beta2) * g * g]
                    corrected = (1 - beta1 ** (step + 1)) / (1 - beta2 ** (step + 1)) ** 0.5
                    update = new[0] / corrected / (new[1].sqrt() + 1e-8)
                p.mul_(1 - rate * decay).sub_(rate * update.view_as(p))
                for i, candidate in enumerate(kept):
                    buffers[i] = new[i] if candidate is None else candidate.round_trip(new[i], generator)
    return model.held_out_loss(text)
