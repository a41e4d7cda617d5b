"""The public functions of cruxy_kernels under random shapes, dtypes, strides, offsets, rows and wrong arguments.

Either the result agrees with a float64 oracle and no cell outside the tensors was written, or ValueError or TypeError
is raised and nothing at all was written.
"""

import argparse
import math
import random
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cruxy_kernels as kernels
from cruxy_kernels import CODECS, RULES, PreparedUpdate
from cruxy_kernels import layout as L
from cruxy_kernels.laws.control import step_law
from cruxy_triton.bench import oracles

sys.path.insert(0, str(Path(__file__).parent))
from soak_common import Fault, soak

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
parser = argparse.ArgumentParser()
parser.add_argument("--backend", choices=("torch", "native", "triton"), default="torch")
parser.add_argument("--without", metavar="WORD", help="leave out wrong arguments of this kind, once they are known")
KNOWN = parser.parse_known_args()[0].without
BACKEND = parser.parse_known_args()[0].backend
LARGEST = 300 if BACKEND == "triton" else 5000  # elements; the interpreter is slow


class Placed:
    """A tensor somewhere in a buffer, with some strides; `check` finds what was written beside it."""

    def __init__(self, rng: random.Random, values: Tensor, *, may_expand: bool = False) -> None:
        shape, dims = values.shape, list(range(values.dim()))
        plain = rng.random() < 0.6
        if not plain:
            rng.shuffle(dims)
        strides, step = [0] * len(dims), 1 if plain else rng.choice((1, 1, 2, 3))
        for d in reversed(dims):
            strides[d] = step
            step *= max(1, shape[d]) + (0 if plain else rng.choice((0, 0, 1)))
        if may_expand and not plain and dims and rng.random() < 0.3:
            strides[rng.choice(dims)] = 0
        offset = rng.choice((8, 8, 9, 11, 16))
        size = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True) if n) + 9
        fill = torch.randint(-100, 100, (size,), generator=torch.Generator().manual_seed(rng.getrandbits(30)))
        self.buffer = fill.to(values.dtype)
        self.tensor = self.buffer.as_strided(shape, strides, offset)
        if 0 not in strides:
            self.tensor.copy_(values)
        self.values = self.tensor.clone(memory_format=torch.contiguous_format)
        self.before = self.buffer.clone()
        self.outside = torch.ones(size, dtype=torch.bool)
        self.outside[torch.arange(size).as_strided(shape, strides, offset).reshape(-1)] = False

    def check(self, name: str, *, whole: bool = False) -> None:
        now, before = (x.view(-1, 1).view(torch.uint8) for x in (self.buffer, self.before))
        changed = (now != before).any(1)
        if bool((changed if whole else changed & self.outside).any()):
            raise Fault(f"{name}: {'it was written' if whole else 'a cell outside the tensor was written'}")


class Case:
    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def shape(self) -> tuple[int, ...]:
        rng = self.rng
        size = rng.choice(
            (0, 1, 2, 63, 64, 65, 127, 128, 1023, 1024, 1025, rng.randrange(LARGEST), rng.randrange(LARGEST))
        )
        size = min(size, LARGEST)
        match rng.randrange(5):
            case 0:
                return (size,)
            case 1:
                return (rng.randrange(1, 5), size // 4)
            case 2:
                return (size // 6, 2, 3)
            case 3:
                return (1, size, 1)
            case _:
                return ()

    def draw(self, shape: tuple[int, ...], dtype: torch.dtype, spread: float = 2.0, top: float = 3.0) -> Tensor:
        """Values of many magnitudes, some of them 0."""
        size = 10 ** (self.rng.uniform(-4, top) if dtype != torch.float16 else self.rng.uniform(-2, 1))
        values = torch.randn(shape, generator=self.generator) * size
        values = values * torch.exp(torch.randn(shape, generator=self.generator) * spread)
        values = values * (torch.rand(shape, generator=self.generator) > 0.1)
        if dtype == torch.float16:
            values = values.clamp(-6e4, 6e4)
        return values.to(dtype)

    def special(self, values: Tensor) -> Tensor:
        """Some elements non-finite or at an end of the format."""
        if values.numel() and self.rng.random() < 0.3:
            info = torch.finfo(values.dtype)
            ends = [math.nan, math.inf, -math.inf, info.max, info.tiny, info.smallest_normal / 4, -0.0]
            for _ in range(self.rng.randrange(1, 4)):
                values.view(-1)[self.rng.randrange(values.numel())] = self.rng.choice(ends)
        return values

    def wide(self) -> tuple[torch.dtype, ...]:
        """Dtypes; float64 where the backend has it."""
        return (*FLOATS, torch.float64) if BACKEND == "torch" else FLOATS


def verdict(found: list[str]) -> None:
    if found:
        raise Fault("; ".join(found[:4]))


def added(parts: Tensor) -> Tensor:
    """The total of partial sums, of which there may be none."""
    return torch.stack(
        [parts[:, 0].sum(), parts[:, 1].sum(), max(parts[:, 2], default=torch.tensor(0.0)), parts[:, 3].sum()]
    )


def telemetry(case: Case) -> None:
    rng = case.rng
    gamma = rng.choice((1.0, 1.5, 1.5, 2.0, 4.0, rng.uniform(1, 4)))
    dtype = rng.choice(case.wide()) if rng.random() < 0.6 else None
    placed = []
    for _ in range(rng.randrange(1, 6)):
        values = case.special(case.draw(case.shape(), dtype or rng.choice(case.wide()), top=2.0))
        placed.append(Placed(rng, values, may_expand=True))
    grads = [p.tensor for p in placed]
    exact = [p.values for p in placed]
    mode = rng.randrange(4)
    if mode == 0:
        rows = kernels.gradient_telemetry(grads, gamma=gamma, per_tensor=True, backend=BACKEND)
        if rows.shape != (len(grads), 4):
            raise Fault(f"per_tensor gave {tuple(rows.shape)}")
        for row, g in zip(rows, exact, strict=True):
            verdict(oracles.check_telemetry(row, [g], gamma))
    elif mode == 1:
        parts = kernels.gradient_telemetry(grads, gamma=gamma, partial=True, backend=BACKEND)
        verdict(oracles.check_telemetry(added(parts), exact, gamma))
    else:
        got = kernels.gradient_telemetry(grads, gamma=gamma, backend=BACKEND)
        verdict(oracles.check_telemetry(got, exact, gamma))
        again = kernels.gradient_telemetry(grads, gamma=gamma, backend=BACKEND)
        if not torch.equal(got.nan_to_num(), again.nan_to_num()):
            raise Fault("the same gradients gave other bits")
    for p in placed:
        p.check("grads", whole=True)


def control(case: Case) -> None:
    rng = case.rng
    law = rng.choice(list(L.LAWS))
    bounds = rng.choice((None, (0.1, 4.0), (0.5, 1.0)))
    rows = kernels.new_control(
        rng.randrange(1, 4), lr=10 ** rng.uniform(-5, -1), betas=(rng.uniform(0, 0.99), rng.uniform(0.5, 0.9999)),
        weight_decay=rng.uniform(0, 0.3), gamma=rng.choice((1.5, 2.0, 3.3)), meta_interval=rng.randrange(1, 20),
        bounds=bounds, guard=rng.random() < 0.5, maximize=rng.random() < 0.3, seed=rng.randrange(1 << 24),
    )  # fmt: skip
    gamma = float(rows[0, L.GAMMA])
    exact = rows.double()
    scale = torch.tensor(2.0 ** rng.randrange(0, 16)) if rng.random() < 0.4 else None
    log = torch.zeros(rng.randrange(1, 9), L.NUM_SLOTS) if rng.random() < 0.5 else None
    decay, size = rng.choice((1.0, 0.97, 1.02)), 10 ** rng.uniform(-3, 1)
    skipped = 0
    for step in range(rng.randrange(1, 25)):
        g = torch.randn(64, generator=case.generator) * size * decay**step * (6 if rng.random() < 0.05 else 1)
        if scale is not None:
            g = g * scale
        stored = torch.tensor(oracles.telemetry([g], gamma), dtype=torch.float32)
        bad = rng.random() < 0.08
        loss = None if rng.random() < 0.3 else torch.tensor([2.0 * 0.98**step])
        found_inf = torch.tensor(0.0) if rng.random() < 0.2 else None
        if bad:
            match rng.randrange(3):
                case 0:
                    stored[L.COUNT_NONFINITE] = 3
                case 1:
                    loss = torch.tensor(rng.choice((math.nan, math.inf)))
                case _:
                    found_inf = torch.tensor([1.0])
        skipped += bad
        before = rows.clone()
        kernels.control_step(
            rows, stored if rng.random() < 0.5 else stored[None], loss, law=law, found_inf=found_inf, grad_scale=scale,
            log=log, backend=BACKEND,
        )  # fmt: skip
        step_law(
            exact, stored.double(), None if loss is None else loss.double().reshape(()), law,
            None if found_inf is None else found_inf.reshape(()), None if scale is None else scale.double(),
        )  # fmt: skip
        if bad:
            told = (L.SKIPPED, L.SKIP, L.TREND, L.GRAD_NORM, L.NONFINITE)
            kept = [s for s in oracles.SLOTS if s not in told]
            if not torch.equal(before[:, kept].nan_to_num(), rows[:, kept].nan_to_num()):
                raise Fault(f"{law}: a skipped step changed more than it may")
        if not torch.equal(rows[:, : L.NUM_INPUTS].nan_to_num(), before[:, : L.NUM_INPUTS].nan_to_num()):
            raise Fault(f"{law}: an input was written")
        if log is not None and not torch.equal(log[step % len(log)].nan_to_num(), rows[0].nan_to_num()):
            raise Fault(f"{law}: the log does not hold step {step}")
    if float(rows[0, L.SKIPPED]) != skipped:
        raise Fault(f"{law}: {float(rows[0, L.SKIPPED])} skipped steps counted; expected {skipped}")
    # A threshold may be met on one side only; the values that follow from counting it are left out.
    slots = {s: n for s, n in oracles.SLOTS.items() if n not in ("WARNING", "WARNINGS", "COOLDOWN", "OUTLIERS")}
    verdict(oracles.compare_control(rows, exact, slots))


class Update:
    """Arguments of a valid update, and what came out."""

    def __init__(self, case: Case) -> None:
        rng = self.rng = case.rng
        self.rule = rng.choice(list(RULES))
        rule = RULES[self.rule]
        self.bits = rng.choice(list(rule.state_bits))
        count = rng.randrange(1, 5)
        shared = rng.choice(case.wide()) if rng.random() < 0.5 else None
        self.tensors: list[dict[str, Placed]] = []
        for _ in range(count):
            shape, param = case.shape(), shared or rng.choice(case.wide())
            if self.bits != 32 and param == torch.float64:
                param = torch.float32
            grad = param if rng.random() < 0.6 else rng.choice(case.wide())
            drawn = {"p": case.draw(shape, param), "g": case.draw(shape, grad)}
            for coding, name in zip(rule.codecs(self.bits), rule.state, strict=True):
                values = case.draw(shape, torch.float32)
                if name.endswith("sq"):
                    values = values.square().clamp(max=1e30)
                if coding.block:
                    drawn[name], drawn[name + "_scale"] = coding.encode(values)
                else:
                    allowed = (torch.float64,) if param == torch.float64 else rule.storage
                    kept = rng.choice(allowed)
                    drawn[name] = (values.clamp(-6e4, 6e4) if kept == torch.float16 else values).to(kept)
            self.tensors.append({name: Placed(rng, v, may_expand=name == "g") for name, v in drawn.items()})
        self.control = torch.stack([oracles.control_row(case.generator) for _ in range(rng.randrange(1, 4))])
        self.control[:, L.SKIP] = torch.tensor([float(rng.random() < 0.15) for _ in range(len(self.control))])
        self.control[:, L.GRAD_FACTOR] *= torch.tensor([rng.choice((1.0, -1.0, 1e-3)) for _ in self.control])
        self.rows = [rng.randrange(len(self.control)) for _ in range(count)] if rng.random() < 0.7 else None
        self.ids = [rng.randrange(1 << 31) for _ in range(count)] if rng.random() < 0.5 else None
        wide = torch.rand(2 * count, generator=case.generator)
        self.multipliers = rng.choice((None, wide[:count], wide[::2], torch.ones(1).expand(count)))
        self.flags = {name: rng.random() < 0.5 for name in rule.flags} if rng.random() < 0.6 else {}
        self.before = self.control.clone()

    def arguments(self) -> dict[str, Any]:
        names = [name for name in self.tensors[0] if name not in ("p", "g")]
        return {
            "rule": self.rule, "params": self.list("p"), "grads": self.list("g"),
            "state": {name: self.list(name) for name in names}, "control": self.control, "rows": self.rows,
            "ids": self.ids, "lr_multipliers": self.multipliers, "backend": BACKEND, **self.flags,
        }  # fmt: skip

    def list(self, name: str) -> list[Tensor]:
        return [t[name].tensor for t in self.tensors]

    def check(self) -> None:
        if not torch.equal(self.before, self.control):
            raise Fault("the control vector was written")
        for i, t in enumerate(self.tensors):
            row = self.control[0 if self.rows is None else self.rows[i]]
            multiplier = 1.0 if self.multipliers is None else float(self.multipliers[i])
            before = {name: placed.values for name, placed in t.items()}
            after = {
                name: p.tensor.clone(memory_format=torch.contiguous_format) for name, p in t.items() if name != "g"
            }
            kinds = " ".join(f"{n}={v.dtype}" for n, v in before.items()).replace("torch.", "")
            found = oracles.check_update(self.rule, before, after, row, multiplier, self.flags)
            verdict([f"{text} [{kinds}]" for text in found])
            for name, placed in t.items():
                placed.check(name, whole=name == "g")

    def check_untouched(self) -> None:
        for t in self.tensors:
            for name, placed in t.items():
                placed.check(f"{name} of a refused call", whole=True)


def update(case: Case) -> None:
    given = Update(case)
    kernels.update_(**given.arguments())
    given.check()


def prepared(case: Case) -> None:
    given = Update(case)
    arguments = given.arguments()
    rule, grads, control = arguments.pop("rule"), arguments.pop("grads"), arguments.pop("control")
    multipliers, params, state = (arguments.pop(name) for name in ("lr_multipliers", "params", "state"))
    if multipliers is not None:
        multipliers = multipliers.contiguous()
    arguments["rows"] = arguments["rows"] or [0] * len(params)
    arguments["ids"] = arguments["ids"] or list(range(len(params)))
    other = [torch.empty_strided(g.shape, g.stride(), dtype=g.dtype) for g in grads]
    update = PreparedUpdate(rule, params, other, state, len(control), **arguments)
    plain = all(t.is_contiguous() for t in [*params, *grads, *[t for held in state.values() for t in held]])
    if update.usable != (plain and BACKEND != "torch"):
        raise Fault(f"usable is {update.usable} for tensors that are {'' if plain else 'not '}contiguous")
    if not update.usable:
        return
    update.set_grads([g.data_ptr() for g in grads])
    verdict(oracles.check_telemetry(added(update.telemetry(1.5)), grads, 1.5))
    update.update(control, multipliers)
    given.check()


def wrong(case: Case) -> None:
    """One argument that does not fit: refused in the same way by every backend, and nothing written."""
    rng = case.rng
    given = Update(case)
    a = given.arguments()
    i = rng.randrange(len(a["params"]))
    name = rng.choice(list(a["state"]))
    p = a["params"][i]

    def put(key: str, value: Any) -> None:
        (a["state"] if key in a["state"] else a)[key][i] = value

    longer = torch.zeros(p.numel() + 1)
    ways = {
        "rule": lambda: a.update(rule="adam"),
        "flag": lambda: a.update(amsgrad=True),
        "grads short": lambda: a["grads"].pop(),
        "state short": lambda: a["state"][name].pop(),
        "grad numel": lambda: put("grads", longer.to(a["grads"][i].dtype)),
        "grad shape": lambda: put("grads", torch.zeros((*p.shape, 1))),
        "grad whole": lambda: put("grads", torch.zeros(p.shape, dtype=torch.int32)),
        "grad sparse": lambda: put("grads", torch.zeros(p.shape or (1,)).to_sparse()),
        "grad meta": lambda: put("grads", torch.zeros(p.shape, device="meta")),
        "grad complex": lambda: put("grads", torch.zeros(p.shape, dtype=torch.complex64)),
        "state numel": lambda: put(name, torch.zeros(a["state"][name][i].numel() + 1, dtype=a["state"][name][i].dtype)),
        "state dtype": lambda: put(name, torch.zeros(a["state"][name][i].shape, dtype=torch.int16)),
        "state missing": lambda: a["state"].pop(name),
        "state extra": lambda: a["state"].update(momentum=a["params"]),
        "control dtype": lambda: a.update(control=a["control"].double()),
        "control width": lambda: a.update(control=torch.zeros(2, L.NUM_SLOTS - 1)),
        "control 1-D": lambda: a.update(control=a["control"][0]),
        "control strided": lambda: a.update(control=torch.zeros(L.NUM_SLOTS, 2).T),
        "row high": lambda: a.update(rows=[len(a["control"])] * len(a["params"])),
        "row negative": lambda: a.update(rows=[-1] * len(a["params"])),
        "rows short": lambda: a.update(rows=[0] * (len(a["params"]) + 1)),
        "id high": lambda: a.update(ids=[1 << 31] * len(a["params"])),
        "id negative": lambda: a.update(ids=[-1] * len(a["params"])),
        "ids short": lambda: a.update(ids=[0] * (len(a["params"]) + 1)),
        "multipliers dtype": lambda: a.update(lr_multipliers=torch.ones(len(a["params"]), dtype=torch.float64)),
        "multipliers shape": lambda: a.update(lr_multipliers=torch.ones(len(a["params"]) + 1)),
        "multipliers meta": lambda: a.update(lr_multipliers=torch.ones(len(a["params"]), device="meta")),
        "control meta": lambda: a.update(control=a["control"].to("meta")),
        "backend": lambda: a.update(backend="cuda"),
    }
    if given.bits != 32:
        scales = a["state"][name if name.endswith("_scale") else name + "_scale"]
        ways |= {
            "scales dtype": lambda: scales.__setitem__(i, scales[i].float()),
            "scales count": lambda: scales.__setitem__(i, torch.zeros(len(scales[i]) + 1, dtype=torch.bfloat16)),
            "scales 2-D": lambda: scales.__setitem__(i, scales[i][None]),
        }
    way = rng.choice([name for name in ways if KNOWN is None or KNOWN not in name])
    ways[way]()
    try:
        kernels.update_(**a)
    except (ValueError, TypeError) as error:
        if not 10 < len(str(error)) < 400:
            raise Fault(f"{way}: the message is {str(error)!r}") from None
    except Exception as error:
        raise Fault(f"{way}: {type(error).__name__} instead of a refusal: {error}") from error
    else:
        raise Fault(f"{way}: not refused (rule {given.rule}, {given.bits} bits)")
    given.check_untouched()


def codec(case: Case) -> None:
    rng = case.rng
    dtype = rng.choice((*FLOATS, torch.float64))
    values = case.draw(case.shape(), dtype, spread=rng.uniform(0, 8), top=rng.choice((3.0, 30.0)))
    name = rng.choice([name for name, codec in CODECS.items() if codec.block])
    special = case.special(values)
    placed = Placed(rng, special.abs() if name == "quartic8" else special, may_expand=name != "quartic8")
    codes, scales = kernels.quantize_blockwise(placed.tensor, codec=name, backend=BACKEND)
    placed.check("x", whole=True)
    verdict(oracles.check_codes(name, codes, scales, placed.values.float().double()))
    out = rng.choice((*FLOATS, torch.float64))
    held = [Placed(rng, codes), Placed(rng, scales)]
    back = kernels.dequantize_blockwise(
        held[0].tensor, held[1].tensor, out, codec=name, shape=values.shape, backend=BACKEND
    )
    exact = oracles.decode(name, codes, scales, values.numel()).view(values.shape)
    verdict(oracles.check_values("decoded", back, exact, exact.abs()))
    for h in held:
        h.check("codes or scales", whole=True)


CASES = (telemetry, control, update, update, update, prepared, wrong, wrong, codec)


def case(seed: int) -> None:
    here = Case(seed)
    function = here.rng.choice(CASES)
    try:
        function(here)
    except Fault as fault:
        raise Fault(f"{function.__name__}: {fault}") from fault


if __name__ == "__main__":
    soak(case, parser)
