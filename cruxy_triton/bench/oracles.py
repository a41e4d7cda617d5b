"""What the kernels must compute, written down once more: in float64, tensor by tensor, from docs/laws.md.

Nothing here is shared with `cruxy_kernels` but the names of the control vector's slots. Each `check_*` returns
sentences about what is wrong; no sentence, no fault. `Guarded` lays every tensor between cells that nobody may touch.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cruxy_kernels import layout as L

GUARD = 64  # cells on either side
BLOCK, SHARPNESS = 64, 3  # of the codes
LEVELS = {"softsign8": 127, "softsign4": 7, "quartic8": 255}  # on each side of 0
# Relative errors that fp32 arithmetic may leave: of a result beside what was added up for it, and of a long sum.
FP32, SUM = 1e-6, 1e-5
FP32_MAX = torch.finfo(torch.float32).max
MANTISSA = {torch.float16: 10, torch.bfloat16: 7}


class Guarded:
    """`values` on `device` in a buffer with guard cells around it; `offset` cells further, so that it is unaligned."""

    def __init__(self, values: Tensor, device: str | torch.device = "cpu", offset: int = 0) -> None:
        n = values.numel()
        self.buffer = torch.full(
            (n + 2 * GUARD + offset,), 0.5 if values.is_floating_point() else 77, dtype=values.dtype
        )
        self.inside = slice(GUARD + offset, GUARD + offset + n)
        self.buffer[self.inside] = values.reshape(-1)
        self.before = self.buffer.clone()
        self.buffer = self.buffer.to(device)
        self.tensor = self.buffer[self.inside].view(values.shape)

    def strided(self, columns: int, step: int = 1) -> Tensor:
        """The tensor seen as a matrix of so many columns, transposed or with every `step`-th column."""
        matrix = self.tensor.reshape(-1)[: self.tensor.numel() // columns * columns].view(-1, columns)
        return matrix.T if step == 1 else matrix[:, ::step]

    def original(self) -> Tensor:
        """What the tensor held at the beginning, on the CPU."""
        return self.before[self.inside].view(self.tensor.shape)

    def check(self, name: str, *, whole: bool = False) -> list[str]:
        """whole: the tensor itself must be as it was too."""
        now, before = self.buffer.cpu().view(torch.uint8).clone(), self.before.view(torch.uint8).clone()
        if not whole:
            size = self.before.element_size()
            for part in (now, before):
                part[self.inside.start * size : self.inside.stop * size] = 0
        return (
            [] if torch.equal(now, before) else [f"{name}: {'it was written' if whole else 'a guard cell was written'}"]
        )


def telemetry(grads: Sequence[Tensor], gamma: float) -> list[float]:
    """[sum |g|^gamma, sum g^2, max |g|, non-finite count], of finite elements but for the last.

    A float64 element beyond fp32 counts as an infinity: the sums are fp32.
    """
    flat = torch.cat([torch.zeros(1)] + [g.detach().cpu().float().reshape(-1) for g in grads]).double()
    finite = flat[flat.isfinite()].abs()
    return [
        float((finite**gamma).sum()),
        float((finite**2).sum()),
        float(finite.max()),
        float((~flat.isfinite()).sum()),
    ]


def check_telemetry(got: Tensor, grads: Sequence[Tensor], gamma: float) -> list[str]:
    found = []
    names = ("sum |g|^gamma", "sum g^2", "max |g|", "non-finite")
    for name, value, wanted in zip(names, got.cpu().double().tolist(), telemetry(grads, gamma), strict=True):
        if wanted > FP32_MAX or (value == math.inf and wanted * (1 + SUM) > FP32_MAX):
            wanted = math.inf  # an infinity is right where rounding may reach it
        # The smallest fp32 values: a card may flush what is below 2^-126.
        right = value == wanted or abs(value - wanted) <= SUM * wanted + 1e-37 * (name != "non-finite") * max(
            1, len(grads)
        )
        if not right:
            found.append(f"{name} is {value!r}; expected {wanted!r}")
    return found


def lion(p: Tensor, g: Tensor, m: Tensor, c: dict[str, float], multiplier: float) -> tuple[Tensor, Tensor, Tensor]:
    """(p, m, doubtful): all float64; doubtful where rounding may decide the sign."""
    u = c["beta1"] * m + (1 - c["beta1"]) * g
    doubtful = u.abs() <= 4 * FP32 * (c["beta1"] * m.abs() + (1 - c["beta1"]) * g.abs()) + 1e-37
    doubtful &= (m != 0) | (g != 0)
    return (
        p - c["lr"] * (multiplier * torch.sign(u) + c["weight_decay"] * p),
        c["beta2"] * m + (1 - c["beta2"]) * g,
        doubtful,
    )


def adamw(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, c: dict[str, float], multiplier: float, nesterov: bool, decoupled: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(p, m, v), all float64."""
    if not decoupled:
        g = g + c["weight_decay"] * p
    m = c["beta1"] * m + (1 - c["beta1"]) * g
    v = c["beta2"] * v + (1 - c["beta2"]) * g * g
    ahead = c["beta1"] * m + (1 - c["beta1"]) * g if nesterov else m
    p = p * (1 - c["lr"] * c["weight_decay"]) if decoupled else p
    return p - multiplier * c["lr"] * c["correction2_sqrt"] / c["correction1"] * ahead / (v.sqrt() + c["eps"]), m, v


def settings(row: Tensor) -> dict[str, float]:
    """What a rule reads from a control row."""
    slots = {
        "lr": L.LR_OUT, "weight_decay": L.WEIGHT_DECAY, "beta1": L.BETA1_OUT, "beta2": L.BETA2_OUT, "eps": L.EPS,
        "correction1": L.BIAS_CORRECTION1, "correction2_sqrt": L.BIAS_CORRECTION2_SQRT, "factor": L.GRAD_FACTOR,
    }  # fmt: skip
    return {name: float(row[slot]) for name, slot in slots.items()}


def codec_of(buffer: str, codes: Tensor) -> str:
    """The codec of a state buffer."""
    return "quartic8" if buffer.endswith("_sq") else "softsign8" if codes.dtype == torch.int8 else "softsign4"


def levels(codec: str, codes: Tensor, numel: int) -> Tensor:
    """float64 codes, 1-D: as they are, or of 4 bits the first `numel` halves, the lower one first, from -8 to 7."""
    q = codes.cpu().double().reshape(-1)
    if codec != "softsign4":
        return q
    high = torch.floor(q / 16)
    halves = torch.stack((q - 16 * high, high), 1).reshape(-1)[:numel]
    return halves - 16 * (halves > 7)


def value(codec: str, q: Tensor) -> Tensor:
    """What codes stand for, as parts of their scale."""
    side = LEVELS[codec]
    return (q / side) ** 4 if codec == "quartic8" else q / (side * (1 + SHARPNESS) - SHARPNESS * q.abs())


def decode(codec: str, codes: Tensor, scales: Tensor, numel: int) -> Tensor:
    """float64 values, 1-D, of codes and their bfloat16 scales."""
    q = levels(codec, codes, numel)
    return scales.cpu().double().repeat_interleave(BLOCK)[: q.numel()] * value(codec, q)


def check_codes(codec: str, codes: Tensor, scales: Tensor, values: Tensor, *, stochastic: bool = False) -> list[str]:
    """codes and scales against float64 `values`; drawn codes are the nearest in value, or `stochastic` one of two."""
    x = values.reshape(-1)
    s = scales.cpu().double()
    found = []
    finite = torch.nn.functional.pad(x.isfinite(), (0, -x.numel() % BLOCK), value=True).view(-1, BLOCK).all(1)
    if bool((s.isfinite() != finite).any()):
        return ["a block's scale is finite where the block is not, or the other way round"]
    largest = torch.nn.functional.pad(x.abs(), (0, -x.numel() % BLOCK)).view(-1, BLOCK).amax(1)
    off = (s - largest).abs()[finite]
    allowed = largest[finite] * (2.0**-8 + 2 * FP32) + 1e-40
    if bool((off > allowed).any()):
        found.append(f"a scale is off by {float((off - allowed).max()):.3g} more than half a bfloat16 step")
    every = s.repeat_interleave(BLOCK)[: x.numel()]
    usable = (every > 0) & every.isfinite() & x.isfinite()
    side, part = LEVELS[codec], (x.abs() / every).clamp(max=1)
    level = side * part**0.25 if codec == "quartic8" else side * (1 + SHARPNESS) * part / (1 + SHARPNESS * part)
    q = levels(codec, codes, x.numel())
    if codec == "softsign8":
        low, high = level - 0.5, level + 0.5
    else:
        low, high = level.floor(), level.floor() + 1
        if not stochastic:
            below, above = value(codec, low), value(codec, high)
            share = (part - below) / (above - below)
            low, high = low + (share > 0.5 + 1e-3), low + (share >= 0.5 - 1e-3)
        # A level that fp32 puts on the other side of a whole number is drawn there, and the same comes out.
        on_it, one = (level - level.round()).abs() < 4e-4, int(stochastic)
        low = torch.where(on_it, level.round() - one, low)
        high = torch.where(on_it, level.round() + one, high)
        if codec == "quartic8":
            low, high = low.clamp(min=1), high.clamp(min=1)
            low = torch.where(x == 0, 0.0, low)
    wrong = usable & ((q.abs() < low - 4e-4) | (q.abs() > high + 4e-4))
    wrong |= usable & (q != 0) & (q.sign() != x.sign())
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        found.append(
            f"{int(wrong.sum())} codes differ; the first is {int(q[at])} for {float(x[at])!r} of {float(every[at])!r}"
        )
    return found


def gap(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance of the two values of `dtype` around each of `x` (float64)."""
    smallest = -24 if dtype == torch.float16 else -133
    exponent = torch.floor(torch.log2(x.abs().clamp(min=2.0**-150))) - MANTISSA[dtype]
    return torch.exp2(exponent.clamp(min=smallest))


def check_values(name: str, got: Tensor, wanted: Tensor, size: Tensor, *, stochastic: bool = False) -> list[str]:
    """got against float64 `wanted`, whose terms are as large as `size`; 16-bit values are a rounding of it."""
    value = got.detach().cpu().double().reshape(wanted.shape)
    allowed = FP32 * (size + wanted.abs()) + 1e-37
    if got.dtype in MANTISSA:
        step = gap(wanted, got.dtype)
        allowed = allowed + step * (1.0 if stochastic else 0.5) * (1 + 1e-6)
        top = torch.finfo(got.dtype).max
        if stochastic:
            wanted = wanted.clamp(-top, top)
        else:
            value, wanted = value.clamp(-top, top), wanted.clamp(-top, top)
    both_nan = value.isnan() & wanted.isnan()
    wrong = ~(((value - wanted).abs() <= allowed) | both_nan | (value == wanted))
    if not bool(wrong.any()):
        return []
    at = int(wrong.reshape(-1).nonzero()[0])
    return [
        f"{name}: {int(wrong.sum())} of {wrong.numel()} differ; element {at} is {float(value.reshape(-1)[at])!r}, "
        f"expected {float(wanted.reshape(-1)[at])!r}"
    ]


def check_update(
    rule: str,
    before: dict[str, Tensor],
    after: dict[str, Tensor],
    row: Tensor,
    multiplier: float = 1.0,
    flags: dict[str, bool] | None = None,
) -> list[str]:
    """One tensor of an update: `before` and `after` hold "p" and the state, `before` also "g"; all on the CPU.

    The scales of coded state are under its name and "_scale".
    """
    if float(row[L.SKIP]) != 0:
        changed = [name for name in after if not torch.equal(_bits(before[name]), _bits(after[name]))]
        return [f"{name} changed in a skipped step" for name in changed]
    c = settings(row)
    shape = before["p"].shape
    p, g = (before[name].double().reshape(-1) for name in ("p", "g"))
    g = g * c["factor"]
    coded = "exp_avg_scale" in before

    def held(name: str) -> Tensor:
        if not coded:
            return before[name].double().reshape(-1)
        return decode(codec_of(name, before[name]), before[name], before[name + "_scale"], p.numel())

    m = held("exp_avg")
    step = c["lr"] * abs(multiplier)
    if rule == "lion":
        new_p, new_m, doubtful = lion(p, g, m, c, multiplier)
        moments = {"exp_avg": new_m}
        size = p.abs() + step
        new_p = torch.where(doubtful, after["p"].double().reshape(-1), new_p)
    else:
        v = held("exp_avg_sq")
        given = {"nesterov": True, "decoupled": True} | (flags or {})
        new_p, new_m, new_v = adamw(p, g, m, v, c, multiplier, **given)
        moments = {"exp_avg": new_m, "exp_avg_sq": new_v}
        terms = c["beta1"] ** 2 * m.abs() + (1 - c["beta1"] ** 2) * (g.abs() + c["weight_decay"] * p.abs())
        # What is lost where the gradient and its decay cancel out comes back through the root of v.
        full = g if given["decoupled"] else g + c["weight_decay"] * p
        lost = (1 - c["beta2"]) * full.abs() * (g.abs() + c["weight_decay"] * p.abs()) / new_v.clamp(min=1e-300)
        scale = step * c["correction2_sqrt"] / c["correction1"] / (new_v.sqrt() + c["eps"])
        size = p.abs() + 4 * scale * terms * (1 + lost)
    found = check_values("p", after["p"].reshape(-1), new_p, size, stochastic=before["p"].dtype in MANTISSA)
    terms = m.abs() + g.abs() + c["weight_decay"] * p.abs()
    for name, wanted in moments.items():
        if coded:
            codec = codec_of(name, after[name])
            found += check_codes(codec, after[name], after[name + "_scale"], wanted, stochastic=True)
        else:
            of = terms if name == "exp_avg" else held(name) + terms**2
            found += check_values(name, after[name].reshape(-1), wanted, of)
    return [f"{rule} {tuple(shape)}: {text}" for text in found]


def _bits(x: Tensor) -> Tensor:
    return x.detach().contiguous().view(-1).view(torch.uint8)


def control_row(generator: torch.Generator, **slots: float) -> Tensor:
    """A control row after some step, with plausible outputs; fp32 (NUM_SLOTS,)."""

    def between(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    row = torch.zeros(L.NUM_SLOTS)
    values: dict[str, float] = {
        "WEIGHT_DECAY": between(0, 0.2), "EPS": 1e-8, "STEP": float(int(between(1, 1000))),
        "SEED": float(int(between(0, 1 << 24))), "LR_OUT": 10 ** between(-5, -1), "BETA1_OUT": between(0.8, 0.95),
        "BETA2_OUT": between(0.9, 0.999), "GRAD_FACTOR": between(0.1, 1.0), "BIAS_CORRECTION1": between(0.1, 1.0),
        "BIAS_CORRECTION2_SQRT": between(0.1, 1.0),
    }  # fmt: skip
    for name, value in {**values, **slots}.items():
        row[getattr(L, name)] = value
    return row


def compare_control(got: Tensor, wanted: Tensor, names: dict[int, str]) -> list[str]:
    """The slots of fp32 rows against float64 ones."""
    found: list[str] = []
    for slot, name in names.items():
        a, b = got[:, slot].double(), wanted[:, slot]
        close = torch.isclose(a, b, rtol=2e-4, atol=2e-6, equal_nan=True)
        if not bool(close.all()):
            at = int((~close).nonzero()[0])
            found.append(f"{name} of row {at} is {float(a[at])!r}; expected {float(b[at])!r}")
    return found


SLOTS: dict[int, str] = {
    value: name
    for name, value in vars(L).items()
    if name.isupper() and isinstance(value, int) and L.NUM_INPUTS <= value < L.NUM_SLOTS
    and not name.endswith(("_LEN", "PATIENCE")) and name not in ("NUM_INPUTS", "OUTPUTS")
}  # fmt: skip
