"""Part of `bench gpu`: every kernel on the device against the float64 oracles, over odd sizes, offsets and dtypes."""

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor

import cruxy_kernels as kernels
from cruxy_kernels import CODECS, RULES
from cruxy_kernels import layout as L
from cruxy_kernels.laws.control import step_law
from cruxy_triton.bench import oracles
from cruxy_triton.bench.oracles import Guarded

SIZES = ((1,), (63,), (64, 2), (1023,), (1025,), (3, 5, 7), (4097,), (33, 129), (0,))
OFFSETS = (0, 1, 8, 3)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAW_STEPS = 40
ROUNDED = 1 << 16  # elements over which stochastic rounding must be right on average


def kernels_of(device: str) -> list[tuple[str, Callable[[], list[str]]]]:
    """(name, check) of everything there is to launch."""
    checks: list[tuple[str, Callable[[], list[str]]]] = []
    for dtype, gamma in product(DTYPES, (1.5, 2.0, 3.1)):
        checks.append((f"telemetry {dtype} gamma={gamma}", lambda d=dtype, g=gamma: telemetry(device, d, g)))
    for law, scaled in product(L.LAWS, (False, True)):
        checks.append((f"control {law} scaled={scaled}", lambda w=law, s=scaled: control(device, w, s)))
    for rule, param, grad in product(RULES.values(), DTYPES, DTYPES):
        states: list[torch.dtype | int] = [*rule.storage, *[bits for bits in rule.state_bits if bits != 32]]
        for state in states:
            for flags in ({}, {name: not default for name, default in rule.flags.items()}):
                if flags or not rule.flags or state in states[:1] or isinstance(state, int):
                    name = f"{rule.name} {param}/{grad} state {state} {flags or ''}"
                    call = (device, rule.name, param, grad, state, flags)
                    checks.append((name, lambda arguments=call: update(*arguments)))
    checks.append(("rounding on average", lambda: unbiased(device)))
    for name, dtype in product([name for name, c in CODECS.items() if c.block], DTYPES):
        checks.append((f"codec {name} {dtype}", lambda n=name, d=dtype: codec(device, n, d)))
    return checks


def run(device: str, every: int | None = None) -> dict[str, Any]:
    """All checks, or with `every` each so many; by default a seventh in Triton's interpreter, which is slow."""
    checks = kernels_of(device)
    chosen = checks[:: every or (7 if device == "cpu" else 1)]
    failures = []
    for name, check in chosen:
        try:
            found = check()
        except Exception as error:
            found = [f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"]
        failures += [f"{name}: {text}" for text in found]
    backend = kernels.explain_backend(device, "triton")
    return {"checks": len(chosen), "of": len(checks), "backend": backend, "failures": failures}


def _draw(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    values = torch.randn(shape, generator=generator) * torch.exp(torch.randn(shape, generator=generator)) * scale
    return values.to(dtype)


def telemetry(device: str, dtype: torch.dtype, gamma: float) -> list[str]:
    generator = torch.Generator().manual_seed(1)
    held = [
        Guarded(_draw(shape, generator, dtype), device, offset)
        for shape, offset in zip(SIZES, OFFSETS * 3, strict=False)
    ]
    held[3].tensor[5], held[6].tensor[9], held[6].tensor[10] = float("nan"), float("inf"), -float("inf")
    grads = [g.tensor for g in held] + [held[7].strided(16), held[7].strided(16, 2)]
    values = [g.cpu() for g in grads]
    options = {"gamma": gamma, "backend": "triton"}
    found = oracles.check_telemetry(kernels.gradient_telemetry(grads, **options), values, gamma)
    parts = kernels.gradient_telemetry(grads, partial=True, **options).cpu()
    summed = torch.cat([parts[:, :2].sum(0), parts[:, 2].amax()[None], parts[:, 3].sum()[None]])
    found += oracles.check_telemetry(summed, values, gamma)
    for row, value in zip(kernels.gradient_telemetry(grads, per_tensor=True, **options), values, strict=True):
        found += oracles.check_telemetry(row, [value], gamma)
    again = kernels.gradient_telemetry(grads, **options)
    if not torch.equal(again, kernels.gradient_telemetry(grads, **options)):
        found.append("the same gradients gave other bits")
    return found


def control(device: str, law: str, scaled: bool) -> list[str]:
    """Steps of the law on the device and by the specification in float64, non-finite ones among them."""
    generator = torch.Generator().manual_seed(2)
    rows = kernels.new_control(3, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.99), seed=5)
    rows[1, L.LR], rows[2, L.GUARD], rows[2, L.MAXIMIZE] = 2e-2, 0, 1
    on_device, exact = rows.to(device), rows.double()
    scale = torch.tensor(1024.0) if scaled else None
    log = kernels.new_control(16).to(device) if scaled else None
    for step in range(LAW_STEPS):
        g = torch.randn(1000, generator=generator) * (8 if step == 20 else 1) * 0.97**step
        loss = torch.tensor(float("nan") if step == 25 else 2.0 * 0.95**step)
        stored = g if scale is None else g * scale
        if step == 30:
            stored[7] = float("inf")
        values = torch.tensor(oracles.telemetry([stored], 1.5), dtype=torch.float64)
        kernels.control_step(
            on_device, values.float().to(device), loss.to(device), law=law, log=log, backend="triton",
            grad_scale=None if scale is None else scale.to(device),
        )  # fmt: skip
        step_law(exact, values.float().double(), loss.double(), law, None, None if scale is None else scale.double())
        if step == 0:
            on_device[:, L.LR_SCALE] = exact[:, L.LR_SCALE] = 0.5
    found = oracles.compare_control(on_device.cpu(), exact, oracles.SLOTS)
    if float(on_device[0, L.SKIPPED]) != 2:
        found.append(f"{float(on_device[0, L.SKIPPED]):.0f} steps were skipped; expected 2")
    if log is not None and not torch.equal(log[(LAW_STEPS - 1) % 16], on_device[0]):
        found.append("the log does not hold the last step")
    return found


def _state(rule: str, shape: tuple[int, ...], kept: torch.dtype | int, generator: torch.Generator) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for i, name in enumerate(RULES[rule].state):
        values = _draw(shape, generator, torch.float32, 0.1)
        values = values.abs() if name.endswith("sq") else values
        if isinstance(kept, int):
            state[name], state[name + "_scale"] = RULES[rule].codecs(kept)[i].encode(values)
        else:
            state[name] = values.to(kept)
    return state


def update(
    device: str, rule: str, param: torch.dtype, grad: torch.dtype, state: torch.dtype | int, flags: dict[str, Any]
) -> list[str]:
    generator = torch.Generator().manual_seed(3)
    rows = torch.stack([oracles.control_row(generator), oracles.control_row(generator, SKIP=1.0)])
    held: list[dict[str, Guarded]] = []
    for shape, offset in zip(SIZES, OFFSETS * 3, strict=False):
        drawn = {"p": _draw(shape, generator, param), "g": _draw(shape, generator, grad)}
        drawn |= _state(rule, shape, state, generator)
        held.append({name: Guarded(value, device, offset) for name, value in drawn.items()})
    numbers = [int(i == 4) for i in range(len(held))]  # one tensor in the row that is skipped
    multipliers = torch.rand(len(held), generator=generator)
    names = [name for name in held[0] if name not in ("p", "g")]
    kernels.update_(
        rule, [t["p"].tensor for t in held], [t["g"].tensor for t in held],
        {name: [t[name].tensor for t in held] for name in names}, rows.to(device), rows=numbers,
        ids=list(range(7, 7 + len(held))), lr_multipliers=multipliers.to(device), backend="triton", **flags,
    )  # fmt: skip
    found = []
    for t, number, multiplier in zip(held, numbers, multipliers.tolist(), strict=True):
        before = {name: g.original() for name, g in t.items()}
        after = {name: g.tensor.cpu() for name, g in t.items() if name != "g"}
        found += oracles.check_update(rule, before, after, rows[number], multiplier, flags)
        for name, guarded in t.items():
            found += guarded.check(name, whole=name == "g")
    return found


def unbiased(device: str) -> list[str]:
    """Stochastic rounding is right on average, also for steps far below the gap of the format."""
    found = []
    for dtype in (torch.float16, torch.bfloat16):
        p = torch.linspace(1.0, 1.999, ROUNDED).to(dtype)
        control = oracles.control_row(torch.Generator().manual_seed(4), LR_OUT=1e-5, WEIGHT_DECAY=0.0, GRAD_FACTOR=1.0)
        moved, g = p.clone().to(device), torch.ones(ROUNDED, device=device, dtype=dtype)
        kernels.lion_update_([moved], [g], [g.float()], control[None].to(device), backend="triton")
        drift = float((p.double() - moved.cpu().double()).mean())
        deviation = (1e-5 * float(oracles.gap(torch.tensor(1.0, dtype=torch.float64), dtype)) / ROUNDED) ** 0.5
        if not abs(drift - 1e-5) < 5 * deviation:
            found.append(f"{dtype}: a step of 1e-05 moves {drift:.3g} on average, with a deviation of {deviation:.1g}")
    return found


def codec(device: str, name: str, dtype: torch.dtype) -> list[str]:
    generator = torch.Generator().manual_seed(5)
    found = []
    for shape, offset, size in zip(SIZES, OFFSETS * 3, (1.0, 1e-30, 1e30) * 3, strict=False):
        drawn = _draw(shape, generator, dtype, size if dtype != torch.float16 else 1.0)
        held = Guarded(drawn.abs() if name == "quartic8" else drawn, device, offset)
        if held.tensor.numel() > 1000:
            held.tensor.view(-1)[70] = float("nan")
        values = held.tensor.cpu()
        codes, scales = kernels.quantize_blockwise(held.tensor, codec=name, backend="triton")
        found += oracles.check_codes(name, codes, scales, values.double())
        for out in DTYPES:
            back = kernels.dequantize_blockwise(codes, scales, out, codec=name, shape=shape, backend="triton")
            exact = oracles.decode(name, codes, scales, values.numel())
            found += oracles.check_values(f"decoded {out}", back, exact.view(shape), exact.abs().view(shape))
    return found
