"""The tables of README.md and docs/*.md that recorded runs decide, written between their markers.

    python docs/tables.py            writes them
    python docs/tables.py --check    exit code 1, and the names, where a page does not say what the runs say

A marker is `<!-- table: NAME -->` and ends at `<!-- /table -->`. The runs are in profiles/measured, as `cruxy-triton
bench stress`, `shakespeare` and `layerwise` write them with --out.
"""

import argparse
import functools
import itertools
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from cruxy_triton.bench import adapters, layerwise, shakespeare, stress
from cruxy_triton.bench.runs import Runs

ROOT = Path(__file__).resolve().parent.parent
MEASURED = ROOT / "profiles" / "measured"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
BLOCK = re.compile(r"(<!-- table: ([^>]+?) -->\n).*?(<!-- /table -->)", re.DOTALL)
PAPERS = {"ZClip": "https://arxiv.org/abs/2504.02507", "AdaGC": "https://arxiv.org/abs/2502.11034"}
SHORT = ("torch AdamW", "schedulefree AdamW", "meta3", "Meta-Lion, 8-bit state")  # of the README


def markdown(rows: Iterable[Sequence[str]]) -> str:
    first, *rest = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([first, "|" + "---|" * (first.count("|") - 1), *rest]) + "\n"


def number(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "diverged"


def lowest(cells: Iterable[str], values: Sequence[float], rivals: Iterable[Sequence[float]]) -> list[str]:
    """The cells of a row, bold where its value is the least of those that stand in the same place of the rivals."""
    least = [min(column) for column in zip(*rivals, strict=True)]
    marks = ["**" if value == best < math.inf else "" for value, best in zip(values, least, strict=True)]
    return [f"{mark}{cell}{mark}" for mark, cell in zip(marks, cells, strict=True)]


def rate(lr: float) -> str:
    digits, _, exponent = f"{lr:.3e}".partition("e")
    return f"{float(digits):g}e{int(exponent)}"


def spread(mean: float, width: float, digits: int = 3) -> str:
    """Mean, and half of what lies between the largest and the smallest."""
    return f"{number(mean, digits)} ± {width / 2:.{digits}f}" if math.isfinite(width) else number(mean, digits)


def stressed(file: str, size: Any, text: str) -> str:
    """Validation loss by rate without and with the guard; bold: the best without."""
    runs = [run for run in Runs(stress.Run, size, MEASURED / file).done.values() if run.text == text]
    found = sorted({run.lr for run in runs})
    rates = [f"{lr:g}" for lr in found]
    lines = [["learning rate", *(rate(lr) for lr in found)]]
    for row in stress.rows(runs):
        name, values = row["optimizer"], [number(row[rate]) for rate in rates]
        if row["guard"] == "yes":
            name = "- with the guard"
        else:
            at = min(range(len(rates)), key=lambda i: row[rates[i]])
            values[at] = f"**{values[at]}**"
            for paper, address in PAPERS.items():
                name = name.replace(paper, f"[{paper}]({address})")
        lines.append([name, *values])
    return markdown(lines)


def benchmark() -> list[dict[str, Any]]:
    return shakespeare.rows(Runs(shakespeare.Run, shakespeare.FULL, MEASURED / "shakespeare.jsonl").done.values())


def published() -> str:
    """The benchmark of the white paper: last batch and validation, at the published rate and at the best."""
    lines = [["optimizer", "rate", "last batch", "validation", "state bytes", "step, ms"]]
    for row in benchmark():
        lines.append([
            row["optimizer"], f"{rate(row['lr'])}, {row['rate']}", spread(row["last batch"], row["spread"]),
            spread(row["validation"], row["spread "]), f"{row['state bytes']:,}", f"{row['step ms']:.1f}",
        ])  # fmt: skip
    return markdown(lines)


def in_short() -> str:
    """Of it what the README has: some optimizers at their best."""
    lines = [["at its best rate", "last batch", "validation"]]
    for row in benchmark():
        if row["optimizer"] in SHORT and "best" in row["rate"]:
            name = f"{row['optimizer']}, {rate(row['lr'])}"
            lines.append([name, number(row["last batch"]), spread(row["validation"], row["spread "])])
    return markdown(lines)


def layers() -> str:
    """Validation loss by multiple of AdamW's best rate, over the seeds that are whole; bold: the lowest of a column."""
    runs = list(Runs(layerwise.Run, layerwise.FULL, MEASURED / "layerwise.jsonl").done.values())
    peak = min(run.peak for run in runs if run.contestant != "AdamW")
    there = {(run.seed, run.contestant, run.gradients, run.peak) for run in runs}
    peaks = [layerwise.times(peak, factor) for factor in layerwise.FACTORS]
    grid = list(itertools.product(layerwise.CONTESTANTS, layerwise.GRADIENTS, peaks))
    whole = [seed for seed in layerwise.SEEDS if all((seed, *cell) in there for cell in grid)]
    table = layerwise.rows([r for r in runs if r.seed in whole and r.peak in peaks], peak, layerwise.FACTORS)
    factors = [f"{factor:g}x" for factor in layerwise.FACTORS]
    lines = [["", "gradients", *factors]]
    for row in table:
        rivals = [[other[f] for f in factors] for other in table if other["gradients"] == row["gradients"]]
        cells = [spread(row[f], row[f"{f} spread"]) if len(whole) > 1 else number(row[f]) for f in factors]
        gradients = {"fp32": "float32", "fp16": "float16"}[row["gradients"]]
        lines.append([row["contestant"], gradients, *lowest(cells, [row[f] for f in factors], rivals)])
    return markdown(lines)


def clipping() -> str:
    """Validation loss by clipping and rate; bold: the lowest of its column."""
    losses: dict[tuple[Any, float], list[float]] = {}
    for run in json.loads((MEASURED / "clipping.json").read_text(encoding="utf-8"))["runs"]:
        losses.setdefault((run["clip"], run["lr"]), []).append(math.inf if run["loss"] is None else run["loss"])
    means = {key: statistics.fmean(values) for key, values in losses.items()}
    clips, rates = dict.fromkeys(clip for clip, _ in losses), sorted({lr for _, lr in losses})
    lines = [["clip", *(rate(lr) for lr in rates)]]
    for clip in clips:
        cells = [spread(means[clip, lr], max(losses[clip, lr]) - min(losses[clip, lr])) for lr in rates]
        rivals = [[means[other, lr] for lr in rates] for other in clips]
        name = "`None`" if clip is None else f'`"{clip}"`'
        lines.append([name, *lowest(cells, [means[clip, lr] for lr in rates], rivals)])
    return markdown(lines)


def injected() -> str:
    """What was injected, and what became of it; the loss is the run's over the clean one's."""
    rows = json.loads((MEASURED / "faults.json").read_text(encoding="utf-8"))["rows"]
    lines = [["fault", "scenarios", "as they should be", "which is", "worst loss"]]
    for row in rows:
        worst = "" if row["worst loss"] is None else number(row["worst loss"])
        lines.append([row["fault"], str(row["scenarios"]), str(row["passed"]), row["result"], worst])
    return markdown(lines)


def overhead() -> str:
    """Time of a training step with the guard over one without."""
    rows = json.loads((MEASURED / "guard_overhead.json").read_text(encoding="utf-8"))["rows"]
    lines = [["model", "optimizer", "parameters that learn", "step without, ms", "with / without, median", "least"]]
    for row in rows:
        lines.append([
            row["model"], row["optimizer"], f"{row['parameters']:,} in {row['tensors']}",
            f"{row['step ms without']:.0f}", f"{row['step ratio']:.3f}", f"{row['step ratio of least']:.3f}",
        ])  # fmt: skip
    return markdown(lines)


TABLES: dict[str, Callable[[], str]] = {
    "stress shakespeare": functools.partial(stressed, "stress.jsonl", stress.FULL, "shakespeare"),
    "stress wikitext2": functools.partial(stressed, "stress.jsonl", stress.FULL, "wikitext2"),
    "clipping": clipping,
    "faults": injected,
    "guard overhead": overhead,
    "stress smollm2": functools.partial(stressed, "stress_smollm2.jsonl", adapters.FULL, adapters.NAME),
    "shakespeare": published,
    "shakespeare, short": in_short,
    "layerwise": layers,
}


def filled(text: str) -> str:
    """A page's text with its tables as the runs have them. Raises KeyError for a name that is none."""
    return BLOCK.sub(lambda found: found[1] + TABLES[found[2]]() + found[3], text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    stale = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        new = filled(text)
        if new != text:
            stale.append(page.name)
            if not check:
                page.write_text(new, encoding="utf-8")
    if stale:
        sys.stdout.write(f"{'not as the runs are' if check else 'written'}: {', '.join(stale)}\n")
    return int(check and bool(stale))


if __name__ == "__main__":
    raise SystemExit(main())
