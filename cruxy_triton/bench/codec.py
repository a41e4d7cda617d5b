"""Which 8-bit code for Lion's momentum: sign flips against an exact Lion, on recorded gradients.

Two Lions read the same gradients. One keeps its momentum in fp32, the other stores it in 8 bits after every
step. A flip is an element whose update sign differs in a step. `cruxy_kernels.codec` uses the winner; the
choice can be repeated with `cruxy-triton bench codec --gradients FILE`.

FILE is the folder that `cruxy-triton finetune --record-gradients N` leaves, or a safetensors file with a key for
each parameter, its value of shape (steps, *parameter shape), and `source` in the metadata.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cruxy_kernels.codec import SHARPNESS
from cruxy_triton.errors import UserError


@dataclass(frozen=True)
class Candidate:
    """A way to store a value: `block` values share one scale of `scale` format, each has an 8-bit code.

    `compress` maps |x|/scale in [0, 1] onto [0, 1], where 127 evenly spaced levels are taken; `expand` is its
    inverse. `levels` replaces both by a sorted table of 256 signed values.
    """

    name: str
    block: int
    scale: str = "fp32"
    compress: Callable[[Tensor], Tensor] | None = None
    expand: Callable[[Tensor], Tensor] | None = None
    levels: Tensor | None = None

    @property
    def state_bytes(self) -> float:
        """Bytes of optimizer state per parameter, scales included."""
        return 1 + {"fp32": 4, "bf16": 2, "bf16 up": 2, "fp16": 2}[self.scale] / self.block

    def round_trip(self, m: Tensor) -> Tensor:
        """`m` (1-D fp32) as it comes back from storage."""
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
            y = self.expand((self.compress(x.abs()) * 127).round() / 127).copysign(x)
        return (y * scale).view(-1)[: m.numel()]


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


def candidates() -> list[Candidate]:
    """The candidates of docs/laws.md section 3 and the ones found on the way, blocks of 32 to 256."""
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
        stored = candidate.round_trip(beta2 * stored + (1 - beta2) * g)
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


def table(path: Path, betas: tuple[float, float], skip: int = 0) -> tuple[list[dict], str]:
    """A row for each candidate, fewest flips first, and the source of the gradients.

    Every tensor is padded to whole blocks on its own, as the optimizer stores it.
    """
    gradients, source = read_gradients(path)
    steps = len(next(iter(gradients.values())))
    rows = []
    for candidate in candidates():
        padded = []
        for g in gradients.values():
            flat = g.reshape(steps, -1).float()
            padded.append(torch.nn.functional.pad(flat, (0, -flat.shape[1] % candidate.block)))
        together = torch.cat(padded, dim=1)  # one long tensor: the same blocks, far fewer operators
        real = sum(g[0].numel() for g in gradients.values())
        different, _ = flips(together.unbind(0), candidate, betas, skip)  # padding is 0 in both and never flips
        rows.append(
            {
                "name": candidate.name,
                "block": candidate.block,
                "scale": candidate.scale,
                "state_bytes_per_parameter": candidate.state_bytes,
                "flips": different / (real * (steps - skip)),
            }
        )
    return sorted(rows, key=lambda row: row["flips"]), source
