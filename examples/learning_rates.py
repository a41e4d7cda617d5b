"""Held-out loss of `finetune` over a grid of settings: how its defaults are chosen.

    python examples/learning_rates.py --vary optimizer=adamw,cruxy lr=1e-4,1e-3 seed=0,1,2
    python examples/learning_rates.py --model smollm2 --data train.jsonl --max-steps 60 \
        --vary optimizer=cruxy,adamw lr=x0.5,x1,x2 seed=0,1,2 --out runs.jsonl

Any option of `finetune` is taken, or varied by the name that run.json has for it; a rate of x2 is twice the
optimizer's default, one of auto is searched. Prints medians over the seeds. Each run is a line of the file, and what
it holds is not run again. Without --model and --data it is the tiny model of the demo, with the docstrings of the other
demo: half a minute per run.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cruxy_triton import files
from cruxy_triton.cli.arguments import Parser, add_settings, columns
from cruxy_triton.environment import quiet_libraries, versions
from cruxy_triton.errors import UserError
from cruxy_triton.finetune import demo, smollm2
from cruxy_triton.finetune.folder import RunFolder
from cruxy_triton.finetune.recipe import Recipe
from cruxy_triton.finetune.run import Hooks, finetune
from cruxy_triton.settings import DEFAULT_LR, SETTINGS

# No samples, no checkpoints: the losses alone. What is typed wins.
QUIET = {"sample_tokens": 0, "save_steps": 10**6}
TINY = {"lora_r": demo.LORA_R, "max_steps": 200, "max_seq_length": 128}


def varied(words: list[str]) -> dict[str, list[Any]]:
    """{"lr": [1e-4, "x2"], ...} of `lr=1e-4,x2`."""
    found: dict[str, list[Any]] = {}
    for word in words:
        name, equals, values = word.partition("=")
        if not equals or name not in SETTINGS:
            raise UserError(f"--vary {word!r}; expected a setting, as lr=1e-4,x2 or seed=0,1,2")
        factor = name == "lr"
        found[name] = [v if factor and v.startswith("x") else SETTINGS[name].parse(v) for v in values.split(",")]
    return found


def grid(vary: dict[str, list[Any]], given: dict[str, Any]) -> list[dict[str, Any]]:
    """The settings of every run."""
    cells = []
    for values in itertools.product(*vary.values()):
        cell = {**given, **dict(zip(vary, values, strict=True))}
        if str(rate := cell.get("lr")).startswith("x"):
            cell["lr"] = float(rate[1:]) * DEFAULT_LR[cell.get("optimizer", SETTINGS["optimizer"].default)]
        cells.append(cell)
    return cells


def run(cell: dict[str, Any]) -> dict[str, Any]:
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = finetune(Recipe(**cell, output=folder), RunFolder(folder), Hooks())
        lr = json.loads((Path(folder) / "run.json").read_text())["lr"]
    assert result.after is not None, "interrupted"
    seconds = time.perf_counter() - start
    before, after = result.before["loss"], result.after["loss"]
    return {"lr": lr, "before": before, "after": after, "steps": result.step, "seconds": seconds}


def table(cells: list[dict[str, Any]], losses: list[float], vary: dict[str, list[Any]]) -> str:
    """Medians over the seeds, a column for each rate."""
    rows = [name for name in vary if name not in ("lr", "seed")]
    rates = list(dict.fromkeys(cell.get("lr") for cell in cells))
    found: dict[tuple[Any, ...], dict[Any, list[float]]] = {}
    for cell, loss in zip(cells, losses, strict=True):
        found.setdefault(tuple(cell[name] for name in rows), {}).setdefault(cell.get("lr"), []).append(loss)
    lines = [[*rows, *("default rate" if rate is None else str(rate) for rate in rates)]]
    for key, row in found.items():
        lines.append([*map(str, key), *(f"{statistics.median(row[r]):.4f}" if r in row else "" for r in rates)])
    return columns(lines)


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vary", nargs="+", required=True, metavar="NAME=A,B")
    parser.add_argument("--model", dest="which", help="folder, Hugging Face id, or smollm2 (default: the tiny one)")
    parser.add_argument("--out", type=Path, default=Path("learning_rates.jsonl"), help="(default: %(default)s)")
    add_settings(parser, "finetune", [name for name in SETTINGS if name not in ("model", "output")])
    args = parser.parse_args()
    quiet_libraries()

    given = {**QUIET, **getattr(args, "given", {})}
    if args.which is None:
        given = {**TINY, "data": str(demo.questions(print) / "docstrings.jsonl"), **given}
    vary = varied(args.vary)
    cells = grid(vary, given)
    lines = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    done = {json.dumps(line["settings"], sort_keys=True): line for line in lines}
    models = {None: lambda: str(demo.tiny(print)), "smollm2": lambda: smollm2.smollm2(print)}
    model = models.get(args.which, lambda: args.which)()
    losses = []
    for cell in cells:
        settings = {"model": args.which or "tiny", **cell, "data": Path(cell["data"]).name}
        key = json.dumps(settings, sort_keys=True)
        if key not in done:
            done[key] = {"settings": settings, **run({**cell, "model": model}), "versions": versions()}
            with files.writing(args.out), args.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(done[key]) + "\n")
        losses.append(done[key]["after"])
        print(*(f"{name} {cell[name]}" for name in vary), f"-> {losses[-1]:.4f}", sep="  ", flush=True)
    print(table(cells, losses, vary), end="")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
