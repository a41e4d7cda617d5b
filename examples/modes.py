"""What each mode makes of the learning rate that was asked for, over 4,000 steps of gradients of known size.

    python examples/modes.py

Runs the laws alone (no model learns) on gradients of constant size, of a size that falls ten-fold, and of constant size
with one spike; both rules, with and without a warm-up of the rate; then continues a run of torch's AdamW under meta3.
Prints rate used over rate asked (medians of the seeds), writes every series to modes.json; a few minutes on one core.
docs/figures.py draws the figure.
"""

import argparse
import copy
import json
import math
import statistics
import sys
import warnings
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cruxy_kernels as kernels
from cruxy_kernels import layout as L
from cruxy_triton import CruxyOptimizer, files
from cruxy_triton.controllers.meta import slow_loop

STEPS, SPIKE, WARM_UP = 4000, 2000, 200
SIZE = 4096  # elements of the gradient
NOISE = 0.2  # standard deviation of the logarithm of its norm
RATE = 1e-3
INTERVAL = 10  # of the slow loop
# What the rows of a run are: guarded, unguarded.
MODES = {
    "meta3": ("meta3", "meta3 without guard"),
    "stability_v2": ("stability_v2", "stability_v2 as published"),
    "stability_v1": ("stability_v1", "stability_v1 without guard"),
}
RULES = {name: kernels.RULES[name].betas for name in ("adamw", "lion")}
# The norm of the gradients by step, and their loss.
COURSES = {
    "constant": (lambda step: 1.0, lambda step: 2.0),
    "falling ten-fold": (lambda step: 10 ** (-step / STEPS), lambda step: 1 + 10 ** (-step / STEPS)),
    "one spike of 30 times": (lambda step: 30.0 if step == SPIKE else 1.0, lambda step: 2.0),
}
PRINTED = (10, 60, 200, 500, 1000, SPIKE, SPIKE + 50, 3000, STEPS)
KEPT = sorted({1, 20, 40, 100, 300, *PRINTED, *range(750, STEPS, 250), *(SPIKE + k for k in (-1, 10, 30, 100))})
# Beside used over asked; beta2 is of the AdamW rule.
SLOTS = {"lr_scale": L.LR_SCALE, "phase": L.PHASE, "beta2": L.BETA2_OUT, "clip_threshold": L.CLIP_THRESHOLD}


def signals(course: str, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Telemetry and loss of each step."""
    generator = torch.Generator().manual_seed(seed)
    norm, loss = COURSES[course]
    steps = []
    for step in range(1, STEPS + 1):
        gradient = torch.randn(SIZE, generator=generator)
        noise = torch.randn(2, generator=generator)
        gradient *= norm(step) * math.exp(NOISE * noise[0].item()) / gradient.norm()
        steps.append((kernels.gradient_telemetry([gradient]), loss(step) + 0.05 * noise[1]))
    return steps


def run(law: str, steps: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The control rows after each step, (steps, guard on or off, rules, no warm-up or one, slots)."""
    inputs = [{"betas": betas, "guard": guard} for guard in (True, False) for betas in RULES.values()]
    control = torch.cat([kernels.new_control(2, lr=RATE, meta_interval=INTERVAL, **one) for one in inputs])
    seen = []
    for step, (telemetry, loss) in enumerate(steps, 1):
        if step <= WARM_UP:
            control[1::2, L.LR] = RATE * step / WARM_UP
        kernels.control_step(control, telemetry, loss, law=law)
        if law == "meta3" and step % INTERVAL == 0:
            slow_loop(control)
        seen.append(control.clone())
    return torch.stack(seen).unflatten(1, (2, len(RULES), 2))


def continued_adamw(steps: int = 2000, more: int = 50) -> dict[str, float]:
    """The mean step of meta3 after `steps` of torch's AdamW on pure noise, over AdamW's own at the same rate."""
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(SIZE, generator=generator) / SIZE**0.5 for _ in range(steps + more)]

    def mean_step(optimizer: Any) -> float:
        (param,) = optimizer.param_groups[0]["params"]
        moved = []
        for gradient in gradients[steps:]:
            before, param.grad = param.detach().clone(), gradient
            optimizer.step()
            moved.append((param.detach() - before).abs().mean().item())
        return statistics.mean(moved)

    def make(kind: Any, **settings: Any) -> Any:
        return kind([torch.nn.Parameter(torch.zeros(SIZE))], lr=RATE, weight_decay=0.0, **settings)

    first = make(torch.optim.AdamW)
    for gradient in gradients[:steps]:
        first.param_groups[0]["params"][0].grad = gradient
        first.step()
    state = first.state_dict()
    adamw = mean_step(copy.deepcopy(first))
    parts = {}
    for name, settings in {"meta3": {}, "meta3 without Nesterov": {"use_nesterov": False}}.items():
        optimizer = make(CruxyOptimizer, **settings)
        optimizer.load_state_dict(copy.deepcopy(state))
        parts[name] = round(mean_step(optimizer) / adamw, 3)
    return parts


def numbers(values: Tensor) -> list[float]:
    return [float(f"{value:.4g}") for value in values.tolist()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("modes.json"))
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*gets no loss")
    torch.set_num_threads(1)

    at = torch.tensor(KEPT) - 1
    series, rules_apart, schedules_apart = [], 0.0, 0.0
    for course in COURSES:
        data = [signals(course, seed) for seed in args.seeds]
        print(f"\nrate used / asked, gradients: {course}\n{'step':<27}" + "".join(f"{step:>7}" for step in PRINTED))
        for law, modes in MODES.items():
            parts = []
            for seed, steps in zip(args.seeds, data, strict=True):
                rows = run(law, steps)
                part = rows[..., L.LR_OUT] / rows[..., L.LR]
                rules_apart = max(rules_apart, (part[:, :, 0] - part[:, :, 1]).abs().max().item())
                schedules_apart = max(schedules_apart, (part[..., 0] - part[..., 1]).abs().max().item())
                parts.append(part[:, :, 0, 0])
                for mode, row, used in zip(modes, rows[at, :, 0, 0].unbind(1), parts[-1][at].unbind(1), strict=True):
                    kept = {"used_over_asked": used, **{name: row[:, slot] for name, slot in SLOTS.items()}}
                    if law == "stability_v1":
                        del kept["clip_threshold"]  # infinite
                    values = {name: numbers(value) for name, value in kept.items()}
                    series.append({"gradients": course, "mode": mode, "seed": seed, **values})
            middle = torch.stack(parts).median(0).values
            for index, mode in enumerate(modes):
                print(f"{mode:<27}" + "".join(f"{middle[step - 1, index]:7.3f}" for step in PRINTED), flush=True)
    report = {
        "what": "Learning rate used over the one asked for, by mode and step, by examples/modes.py",
        "date": date.today().isoformat(),
        "versions": {name: version(name) for name in ("cruxy-triton", "torch")},
        "seeds": args.seeds,
        "gradients": {"elements": SIZE, "norm": 1.0, "noise of its logarithm": NOISE},
        "largest difference of used over asked": {
            "between the AdamW and the Lion rule": rules_apart,
            f"between no warm-up and one of {WARM_UP} steps": float(f"{schedules_apart:.1e}"),
        },
        "mean step after torch's AdamW, over AdamW's": continued_adamw(),
        "steps": KEPT,
    }
    for name in ("largest difference of used over asked", "mean step after torch's AdamW, over AdamW's"):
        print(f"\n{name}: {report[name]}")
    lines = ",\n  ".join(json.dumps(one) for one in series)
    files.write_text(args.output, json.dumps(report, indent=1)[:-2] + f',\n "series": [\n  {lines}\n ]\n}}\n')
    return 0


if __name__ == "__main__":
    sys.exit(main())
