"""The figures of the README and of modes.md, as SVG that reads on a light and on a dark page.

    python docs/figures.py                 draws memory.svg, run.svg and modes.svg in docs/images
    python docs/figures.py --run FOLDER    first takes the run's figures over from a folder of `cruxy-triton finetune`

memory.svg shows what the planner says now; run.svg what profiles/measured/finetune_demo.json recorded, modes.svg what
modes.json beside it did (examples/modes.py).
"""

import argparse
import json
from datetime import date
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from cruxy_triton.planner import plan

ROOT = Path(__file__).resolve().parent.parent
RUN = ROOT / "profiles" / "measured" / "finetune_demo.json"
MODES = RUN.with_name("modes.json")
IMAGES = Path(__file__).parent / "images"
GIB = 2**30

TEXT = "#6e7781"  # contrast above 4 on white and on GitHub's dark page
BLUE, ORANGE, GREEN, PURPLE, YELLOW = "#3b82d6", "#e0762f", "#2fa37a", "#9b6bd0", "#d6a419"
MODELS = ("tinyllama-1.1b", "qwen2.5-1.5b", "gemma-2b", "phi-2")
TOKENS = 1024
# (label, components of a plan, colour)
PARTS = (
    ("base weights", ("weights", "quantization"), BLUE),
    ("adapters, their gradients and optimizer state", ("adapters", "gradients", "optimizer state"), ORANGE),
    ("activations, loss, workspaces", ("activations", "logits and loss", "workspaces"), GREEN),
    ("allocator and CUDA context", ("allocator", "context"), PURPLE),
)
# Of a run's recipe: what decides its course, and no path of the machine that it ran on.
SETTINGS = ("optimizer", "mode", "lr", "lr_schedule", "warmup_fraction", "weight_decay", "batch_size", "lora_r", "seed")
STYLE = {
    "font.size": 10,
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "axes.edgecolor": TEXT,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "svg.fonttype": "none",  # the reader's own fonts
    "svg.hashsalt": "cruxy",  # the same figure, the same bytes
}


def memory() -> None:
    """One bar per model: its planned peak on a GTX 1650, by component, against what the card has."""
    plans = [plan(model, "gtx1650", max_seq_length=TOKENS) for model in MODELS]
    figure, axes = pyplot.subplots(figsize=(8.4, 3.1), layout="constrained")
    for row, answer in enumerate(plans):
        left = 0.0
        for _, names, colour in PARTS:
            width = sum(answer.components.get(name, 0) for name in names) / GIB
            axes.barh(row, width, left=left, color=colour, height=0.62)
            left += width
        c = answer.config
        settings = f"{c.precision}, r = {c.lora_r}, {c.micro_batch_size} at once"
        axes.text(0.06, row, f"{left:.2f} GiB", va="center", color="white", weight="bold")
        axes.text(-0.06, row - 0.13, answer.model, ha="right", va="center", weight="bold")
        axes.text(-0.06, row + 0.17, settings, ha="right", va="center", size=8)
    usable = plans[0].usable_bytes / GIB
    axes.axvline(usable, color=TEXT, lw=1.2, ls=(0, (4, 3)))
    axes.text(usable + 0.03, 1.5, f"{usable:.2f} GiB usable", rotation=90, va="center", size=9)
    axes.set(xlim=(0, 4.05), ylim=(len(plans) - 0.5, -0.5), yticks=[])
    axes.set_xlabel(f"GiB at the peak of a training step, {TOKENS:,} tokens, GTX 1650, headless Linux (planned)")
    axes.spines["left"].set_visible(False)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for _, _, colour in PARTS]
    figure.legend(handles, [label for label, _, _ in PARTS], loc="outside upper left", ncols=2, frameon=False)
    save(figure, "memory.svg")


def run() -> None:
    """Loss, learning rate and phase of one run, by step."""
    data = json.loads(RUN.read_text(encoding="utf-8"))
    steps, held_out = data["steps"], data["held_out"]
    x, losses = [s["step"] for s in steps], [s["loss"] for s in steps]
    means = [sum(losses[max(0, i - 9) : i + 1]) / len(losses[max(0, i - 9) : i + 1]) for i in range(len(losses))]
    figure, (loss, rate) = pyplot.subplots(1, 2, figsize=(8.4, 3.1), layout="constrained")
    loss.plot(x, losses, color=BLUE, lw=0.8, alpha=0.35, label="training, each step")
    loss.plot(x, means, color=BLUE, lw=1.8, label="training, mean of 10")
    loss.plot([h["step"] for h in held_out], [h["loss"] for h in held_out], "o", color=ORANGE, label="held out")
    for h in held_out:
        loss.annotate(f"{h['loss']:.2f}", (h["step"], h["loss"]), xytext=(8, 0), textcoords="offset points",
                      va="center", color=ORANGE, weight="bold")  # fmt: skip
    loss.set_xlim(-0.03 * x[-1], 1.13 * x[-1])
    loss.legend(frameon=False, loc="lower left", fontsize=8)
    loss.set_title("loss, nats per token", loc="left", size=10)
    phase = rate.twinx()
    for axes, key, place, text, style in (
        (rate, "lr", 0.45, "rate asked for", {"color": TEXT, "lw": 1.2, "ls": (0, (4, 3))}),
        (rate, "lr_used", 0.22, "rate used", {"color": GREEN, "lw": 1.8}),
        (phase, "phase", 0.6, "phase (right)", {"color": PURPLE, "lw": 1.5}),
    ):
        y = [s[key] for s in steps]
        axes.plot(x, y, **style)
        at = int(place * len(x))
        axes.annotate(text, (x[at], y[at]), xytext=(5, 6), textcoords="offset points", color=style["color"])
    rate.set_ylim(0, 1.06 * max(s["lr"] for s in steps))
    phase.set_ylim(0, 1.06)
    phase.spines["right"].set_visible(True)
    rate.set_title("learning rate and phase", loc="left", size=10)
    for axes in (loss, rate):
        axes.set_xlabel("optimizer step")
        axes.grid(color=TEXT, alpha=0.2, lw=0.6)
    save(figure, "run.svg")


def modes() -> None:
    """Learning rate used over the one asked for, by mode and step: median and range of the seeds."""
    data = json.loads(MODES.read_text(encoding="utf-8"))
    lines = {
        "meta3": {"color": GREEN, "lw": 2.2},
        "stability_v2": {"color": BLUE, "lw": 1.5},
        "stability_v1": {"color": ORANGE, "lw": 1.5},
        "stability_v2 as published": {"color": PURPLE, "lw": 1.5},
        "meta3 without guard": {"color": YELLOW, "lw": 1.5},
    }
    courses = list(dict.fromkeys(one["gradients"] for one in data["series"]))
    figure, panels = pyplot.subplots(1, len(courses), figsize=(8.4, 3.4), sharey=True, layout="constrained")
    for axes, course in zip(panels, courses, strict=True):
        spike = "spike" in course
        shown = [(i, step) for i, step in enumerate(data["steps"]) if not spike or 1750 <= step <= 2250]
        x = [step for _, step in shown]
        for mode, style in lines.items():
            if mode == "meta3 without guard" and not spike:
                continue  # nothing else tells it from meta3
            seeds = [one for one in data["series"] if (one["gradients"], one["mode"]) == (course, mode)]
            values = [sorted(one["used_over_asked"][i] for one in seeds) for i, _ in shown]
            axes.fill_between(x, [v[0] for v in values], [v[-1] for v in values], color=style["color"], alpha=0.2, lw=0)
            axes.plot(x, [v[len(v) // 2] for v in values], label=mode, **style)
        axes.axhline(1, color=TEXT, lw=1, ls=(0, (4, 3)))
        axes.set_yscale("log")
        axes.set(ylim=(0.09, 4.5), xlim=(1940, 2250) if spike else None, xlabel="step")
        axes.set_xticks([2000, 2100, 2200] if spike else [0, 1000, 2000, 3000, 4000])
        axes.set_yticks([0.1, 0.2, 0.5, 1, 2, 4], ["0.1", "0.2", "0.5", "1", "2", "4"])
        axes.minorticks_off()
        axes.grid(color=TEXT, alpha=0.2, lw=0.6)
        axes.set_title(f"gradients: {course}", loc="left", size=10)
    panels[0].set_ylabel("rate used / rate asked for")
    figure.legend(*panels[-1].get_legend_handles_labels(), loc="outside upper left", ncols=3, frameon=False)
    save(figure, "modes.svg")


def save(figure: Any, name: str) -> None:
    IMAGES.mkdir(exist_ok=True)
    path = IMAGES / name
    figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})
    text = path.read_text(encoding="utf-8").replace("'DejaVu Sans'", "system-ui, 'Segoe UI', 'DejaVu Sans'")
    path.write_text("\n".join(line.rstrip() for line in text.splitlines()) + "\n", encoding="utf-8")
    pyplot.close(figure)


def collect(folder: Path) -> None:
    """Writes profiles/measured/finetune_demo.json from a run's run.json and metrics.jsonl."""
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    keys = ("step", "loss", "lr", "lr_used", "phase", "clip_threshold", "grad_norm")
    steps = [{k: _short(row.get(k)) for k in keys} for row in rows if "loss" in row]
    held_out = [{"step": row["step"], "loss": _short(row["eval_loss"])} for row in rows if "eval_loss" in row]
    data = {
        "what": "One run of `cruxy-triton finetune --demo`: loss, rate asked for and used, phase by step",
        "device": record["device"],
        "date": date.fromtimestamp((folder / "metrics.jsonl").stat().st_mtime).isoformat(),
        "versions": record["versions"],
        "settings": {k: record["recipe"][k] for k in SETTINGS},
        "held_out": held_out,
    }
    lines = ",\n  ".join(json.dumps(step) for step in steps)
    RUN.write_text(json.dumps(data, indent=1)[:-2] + f',\n "steps": [\n  {lines}\n ]\n}}\n', encoding="utf-8")


def _short(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, metavar="FOLDER", help="a finished run to take the second figure from")
    folder = parser.parse_args().run
    if folder is not None:
        collect(folder)
    with pyplot.rc_context(STYLE):
        memory()
        run()
        modes()
