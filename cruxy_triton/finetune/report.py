"""What a run leaves behind: adapter or model with its card, the plot by step, and the one-page report in Markdown."""

import re
import shutil
from pathlib import Path
from typing import Any

from cruxy_triton import files, settings
from cruxy_triton.finetune import full
from cruxy_triton.finetune.folder import RunFolder
from cruxy_triton.guard import Regime
from cruxy_triton.guard import plot as guard_plot

MIB = 1 << 20
SHOWN_SAMPLES = 5
SHOWN_EVENTS = 20
CARD_SETTINGS = (
    "method", "lora_r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern",
    "loraplus_lr_ratio", "target_modules",
    "optimizer", "state_bits", "mode", "clip", "lr", "lr_schedule",
    "warmup_fraction", "weight_decay", "batch_size", "max_seq_length", "load_in_4bit", "seed",
)  # fmt: skip
CHART = "memory.svg"  # written by memory.draw, for the model types that the planner walks


def save(model: Any, tokenizer: Any, folder: RunFolder, run: dict[str, Any]) -> None:
    """Writes adapter/, or of a run that trains every weight model/: weights, config, tokenizer, a card; complete or
    not at all."""
    method, base = run["recipe"]["method"], run["recipe"]["model"]
    target = folder.trained(method)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    full.write_weights(model, partial)
    tokenizer.save_pretrained(partial)
    library = f"library_name: {'peft' if method == 'lora' else 'transformers'}"
    lines = ["---", f"base_model: {_shared_name(base)}", library, *_licence(Path(base)), "---", "", *_card(run), ""]
    (partial / "README.md").write_text("\n".join(lines), encoding="utf-8")
    for path in partial.iterdir():
        files.make_readable(path)
    files.move_folder(partial, target)


def _shared_name(model: str) -> str:
    """The id by which others know the model: of a folder, what its own card says it was made from."""
    return next(iter(_header(Path(model), "base_model")), model).removeprefix("base_model:").strip()


def _card(run: dict[str, Any]) -> list[str]:
    """What whoever finds the result alone has to know: its base, how it was trained, what it reached."""
    recipe, result = run["recipe"], run["result"]
    before, after = result["before"], result["after"]
    base, shared = recipe["model"], _shared_name(recipe["model"])
    data = Path(recipe["data"]).name if Path(recipe["data"]).exists() else recipe["data"]
    adapter = recipe["method"] == "lora"
    made = f"made by cruxy-triton {run['versions'].get('cruxy-triton', '')} from {data}."
    lines = [
        f"LoRA adapter for {shared}, {made} It is of use with that model only, whose licence applies to it too."
        if adapter
        else f"{shared} with every weight trained on, {made} That model's licence applies to it too. The weights are "
        f"in {run['dtype']}.",
    ]
    if Path(base).is_dir() and adapter:
        same = f"; by its card it is {shared} in another form" if shared != base else ""
        lines += [
            "",
            f"The base was the folder {base} of the machine it was trained on{same}. `base_model_name_or_path` in "
            "adapter_config.json names that folder: elsewhere give peft the base model yourself.",
        ]
    held_out = f"{after['sequences']} held-out sequences, {after['tokens']:,} tokens"
    lines += [
        "",
        f"| {held_out} | before | after |",
        "|---|---|---|",
        f"| loss (nats per token) | {before['loss']:.4f} | {after['loss']:.4f} |",
        f"| perplexity | {before['perplexity']:.3f} | {after['perplexity']:.3f} |",
        "",
        f"| after {result['step']} steps | |",
        "|---|---|",
    ]
    names = [name for name in CARD_SETTINGS if adapter or not settings.SETTINGS[name].of_adapters]
    return lines + [f"| {name} | {recipe[name]} |" for name in names if recipe[name] is not None]


def _header(model: Path, field: str) -> list[str]:
    """The lines of `field` in the header of the card in a model folder."""
    card = model / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    header = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    return re.findall(rf"^{field}:.*$", header[1], re.MULTILINE) if header else []


def _licence(model: Path) -> list[str]:
    """The lines about the licence in the card of a model folder."""
    return _header(model, "license(?:_name|_link)?")


def write(folder: RunFolder, run: dict[str, Any]) -> None:
    """Writes plot.png and report.md from the run's record and its metrics."""
    rows = folder.read_metrics()
    plot(rows, folder.path / "plot.png", f"{Path(run['recipe']['model']).name} on {Path(run['recipe']['data']).name}")
    text = markdown(run, rows)
    if (folder.path / CHART).is_file():
        text += f"## Memory over one step\n\n![planned memory over one step, and the measured peak]({CHART})\n"
    files.write_text(folder.path / "report.md", text)


def plot(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Panels over the optimizer step: loss (training and held-out), learning rate, gradient norm, phase.

    The guard's regimes are the background, its actions marks on the loss.
    """
    import matplotlib

    matplotlib.use("Agg")  # no display is needed for a file
    from matplotlib import pyplot

    steps = [row for row in rows if "loss" in row]
    evaluations = [row for row in rows if "eval_loss" in row]
    # Another optimizer has no phase, and without a guard no norm.
    panels = [("gradient norm", "grad_norm"), ("phase φ", "phase")]
    panels = [(label, name) for label, name in panels if any(row.get(name) is not None for row in steps)]
    count = 2 + len(panels)
    figure, axes = pyplot.subplots(count, 1, figsize=(8, 2 + 2 * count), sharex=True, layout="constrained")
    figure.suptitle(title)
    x = [row["step"] for row in steps]
    axes[0].plot(x, [row["loss"] for row in steps], lw=0.8, alpha=0.5, color="C0", label="training, each step")
    axes[0].plot(x, _smooth([row["loss"] for row in steps]), color="C0", label="training, running mean of 10")
    # Marks without a line: nothing was measured between them.
    held_out = [row["eval_loss"] for row in evaluations]
    axes[0].plot([row["step"] for row in evaluations], held_out, "o", color="C3", label="held out")
    for axis in axes:
        guard_plot.background(axis, _regimes(steps), named=axis is axes[0])
    heights: dict[int, float] = {}  # of marks: a step without a finite loss has that of the step before
    actions: dict[str, list[int]] = {}
    for row in steps:
        known = row["loss"] is not None
        heights[row["step"]] = row["loss"] if known else next(reversed(heights.values()), 0.0)
        for kind in row.get("actions", ()):
            actions.setdefault(kind, []).append(row["step"])
    guard_plot.marks(axes[0], heights, actions)
    axes[0].set_ylabel("loss (nats per token)")
    axes[0].legend()
    axes[1].plot(x, [row["lr"] for row in steps], color="C1", label="asked for")
    if any("lr_used" in row for row in steps):
        axes[1].plot(x, [row.get("lr_used", row["lr"]) for row in steps], color="C2", label="used")
        axes[1].legend()
    axes[1].set_ylabel("learning rate")
    for axis, (label, name) in zip(axes[2:], panels, strict=True):
        shown = [row for row in steps if row.get(name) is not None]
        axis.plot([row["step"] for row in shown], [row[name] for row in shown], color="C4")
        axis.set_ylabel(label)
        if name == "phase":
            axis.set_ylim(0, 1)
    axes[-1].set_xlabel("optimizer step")
    for axis in axes:
        axis.grid(alpha=0.3)
    with files.replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    pyplot.close(figure)


def _regimes(steps: list[dict[str, Any]]) -> list[tuple[int, int, Regime]]:
    """(first step, last step, regime) of the guard's regimes, in order."""
    found: list[tuple[int, int, Regime]] = []
    for row in steps:
        if "regime" in row:
            regime = Regime(row["regime"])
            if found and found[-1][2] is regime:
                found[-1] = (found[-1][0], row["step"], regime)
            else:
                found.append((row["step"], row["step"], regime))
    return found


def _smooth(values: list[float | None], width: int = 10) -> list[float]:
    smoothed = []
    for end in range(1, len(values) + 1):
        window = [v for v in values[max(0, end - width) : end] if v is not None]
        smoothed.append(sum(window) / len(window) if window else float("nan"))
    return smoothed


def markdown(run: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The report's text. `run` is the content of run.json after training."""
    recipe, result, records = run["recipe"], run["result"], run["records"]
    before, after = result["before"], result["after"]
    revision = f", revision={recipe['revision']!r}" if recipe["revision"] else ""
    steps = [row for row in rows if "loss" in row]
    seconds = sorted(row["seconds"] for row in steps)
    median = seconds[len(seconds) // 2] if seconds else float("nan")
    asked = sum(row["lr"] for row in steps) if any(row.get("lr_used") is not None for row in steps) else 0
    used = sum(row.get("lr_used", row["lr"]) or 0 for row in steps)
    adapter = recipe["method"] == "lora"
    lines = [
        f"# Fine-tuning {recipe['model']}",
        "",
        *([f"**{run['stopped']}**", ""] if "stopped" in run else []),
        f"{run['status'].capitalize()} after {result['step']} optimizer steps, {result['epochs']:.2f} epochs, in "
        f"{result['seconds']:.0f} s of training on {run['device']}: {result['tokens'] / result['seconds']:,.0f} tokens "
        f"per second, median step {median:.3f} s.",
        "",
        f"| held out ({after['sequences']} sequences, {after['tokens']:,} tokens) | before | after |",
        "|---|---|---|",
        f"| loss (nats per token) | {before['loss']:.4f} | {after['loss']:.4f} |",
        f"| perplexity | {before['perplexity']:.3f} | {after['perplexity']:.3f} |",
        *(
            []
            if after["accuracy"] is None
            else [f"| tokens put first that were right | {before['accuracy']:.1%} | {after['accuracy']:.1%} |"]
        ),
        "",
        *_best(run),
        *(f"- {warning}" for warning in [*run["warnings"], *run.get("out_of_memory", ())]),
        "",
        "![loss, learning rate, gradient norm and phase by step](plot.png)",
        "",
        "## What was run",
        "",
        "| setting | value |",
        "|---|---|",
        f"| data | {recipe['data']}: {records['train']} records ({records['form']}), {records['held_out']} held out, "
        f"{records['cut']} cut at the sequence length, {records['dropped']} left out |",
        f"| tokens per epoch | {records['tokens']:,} in {records['sequences']:,} sequences, "
        f"{records['trained_tokens']:,} of them trained on; per record {records['median_length']:,} in the median, "
        f"{records['longest']:,} at most |",
        f"| sequence length, batch | {recipe['max_seq_length']} tokens, {recipe['batch_size']} sequences per step "
        f"in micro-batches of {recipe['micro_batch_size']} |",
        f"| base weights | {run['weights']['total']:,} in {run['dtype']}, {run['weights']['quantized']:,} of them in 4 "
        f"bits; gradient checkpointing {'on' if recipe['gradient_checkpointing'] else 'off'} |",
        f"| LoRA | r {recipe['lora_r']}, alpha {recipe['lora_alpha']}, dropout {recipe['lora_dropout']}, on "
        f"{', '.join(recipe['target_modules'])}{_adapter_kind(recipe)}: "
        f"{run['trainable_parameters']:,} parameters (float32) |"
        if adapter
        else f"| trained | every weight: {run['trainable_parameters']:,} parameters ({run['dtype']})"
        f"{', each layer in the backward pass' if recipe['release'] else ''} |",
        f"| optimizer | {recipe['optimizer']}, state in {recipe['state_bits']} bits"
        + (f", mode {recipe['mode']}" if recipe["optimizer"].startswith("cruxy") else "")
        + f", learning rate {run['lr']:g} ({recipe['lr_schedule']}, warm-up {recipe['warmup_fraction']:g})"
        + (f", of which control used {used / asked:.0%}" if asked else "")
        + f", weight decay {recipe['weight_decay']:g}, clipping {recipe['clip']} |",
        f"| seed | {recipe['seed']} |",
        f"| memory | {_memory(run)} |",
        f"| versions | {', '.join(f'{k} {v}' for k, v in run['versions'].items())} |",
    ]
    if run.get("resumed_at_steps"):
        lines.append(f"| resumed at step | {', '.join(map(str, run['resumed_at_steps']))} |")
    if found := run.get("rate_search"):
        lines += ["", "## The learning rate", "", *_rate(found)]
    if guard := result.get("guard"):
        lines += ["", "## The guard", "", *_guard(guard)]
    lines += _samples(run["samples"])
    used_with_peft = [
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"base = AutoModelForCausalLM.from_pretrained({recipe['model']!r}{revision}, dtype='auto')",
        "model = PeftModel.from_pretrained(base, 'adapter')  # the folder beside this report",
        "tokenizer = AutoTokenizer.from_pretrained('adapter')",
    ]
    used_alone = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        "model = AutoModelForCausalLM.from_pretrained('model', dtype='auto')  # the folder beside this report",
        "tokenizer = AutoTokenizer.from_pretrained('model')",
    ]
    code = used_with_peft if adapter else used_alone
    lines += ["", f"## Using the {'adapter' if adapter else 'model'}", "", "```python", *code, "```", ""]
    return "\n".join(lines)


def _adapter_kind(recipe: dict[str, Any]) -> str:
    """What sets the adapters apart from plain LoRA."""
    said = ["scaled by 1/sqrt(r)"] if recipe["use_rslora"] else []
    said += ["with DoRA"] if recipe["use_dora"] else []
    for name in ("rank", "alpha"):
        said += [f"{name} {' '.join(recipe[f'{name}_pattern'])}"] if recipe[f"{name}_pattern"] else []
    return "".join(f", {each}" for each in said)


def _best(run: dict[str, Any]) -> list[str]:
    """Which of the evaluated adapters this is, where there were evaluations during the run."""
    found = run["result"].get("best")
    if found is None:
        return []
    said = []
    if run["recipe"]["load_best_model_at_end"] and found["step"] is not None:
        said.append(
            f"The adapter is that of step {found['step']}, which had the lowest held-out loss of {found['count']} "
            "evaluations: chosen by this loss, so the loss on records of neither part may be a little higher."
        )
    if found["stopped"]:
        said.append(f"Stopped early, after {found['since']} evaluations without a lower loss.")
    return [" ".join(said), ""] if said else []


def _rate(found: dict[str, Any]) -> list[str]:
    """What `--lr auto` tried, and what it cost."""
    steps, count = found["steps"], len(found["tried"])
    lines = [
        f"Found before the run: {steps} steps at each rate, from one start on the same {found['records']} training "
        f"records, then the loss on {found['judges']} others ({found['before']:.4f} before). In all {steps * count} "
        f"steps and {found['seconds']:.0f} s, no part of the times above.",
        *(["", "The best rate is at the edge of what was tried."] if found["at_edge"] else []),
        "",
        "| learning rate | loss | seconds |",
        "|---|---|---|",
    ]
    for row in found["tried"]:
        loss = "not finite" if row["loss"] is None else f"{row['loss']:.4f}"
        chosen = row["lr"] == found["lr"]
        lines.append(f"| {row['lr']:g} | {f'**{loss}**' if chosen else loss} | {row['seconds']:.1f} |")
    return lines


def _guard(guard: dict[str, Any]) -> list[str]:
    """What the guard saw and did; the events in full are in events.jsonl."""
    actions = ", ".join(f"{count} x {kind}" for kind, count in guard["actions"].items()) or "none"
    lines = [
        "| the guard | |",
        "|---|---|",
        f"| mode | {guard['mode']} |",
        f"| {'actions' if guard['mode'] == 'act' else 'actions that it would have taken'} | {actions} |",
        f"| steps in each regime | {', '.join(f'{count} {name}' for name, count in guard['regimes'].items())} |",
        f"| learning rate at the end | x {guard['lr_factor']:.3g} |",
    ]
    shown = guard["events"][-SHOWN_EVENTS:]
    left_out = len(guard["events"]) - len(shown)
    lines += ["", *([f"The last {len(shown)} of {left_out + len(shown)} events:", ""] if left_out else [])]
    return lines + [f"- {' '.join(event.split())}" for event in shown]


def _samples(samples: list[dict[str, str]]) -> list[str]:
    if not samples:
        return []
    lines = ["", "## Held-out samples", ""]
    if asked := [s for s in samples if s["expected"]]:
        before, after = (sum(s[when].strip() == s["expected"].strip() for s in asked) for when in ("before", "after"))
        lines += [f"Of {len(asked)} answers {before} were exactly as expected before and {after} after.", ""]
    for sample in samples[:SHOWN_SAMPLES]:
        for title, key in (("Prompt", "prompt"), ("Expected", "expected"), ("Before", "before"), ("After", "after")):
            if sample[key]:
                lines += [f"**{title}**", "", *(f"> {line}" for line in sample[key].strip().splitlines()[:12]), ""]
    return lines


def _memory(run: dict[str, Any]) -> str:
    result = run["result"]
    parts = []
    if run.get("plan"):
        what = "of the tensors " if "peak_rss_bytes" in result else ""
        parts.append(f"planned peak {what}{run['plan']['peak_bytes'] / MIB:,.0f} MiB")
    if "peak_reserved_bytes" in result:
        parts.append(
            f"measured {result['peak_allocated_bytes'] / MIB:,.0f} MiB allocated, "
            f"{result['peak_reserved_bytes'] / MIB:,.0f} MiB reserved on the GPU"
        )
    if "peak_rss_bytes" in result:
        parts.append(f"measured peak of the process {result['peak_rss_bytes'] / MIB:,.0f} MiB")
    return "; ".join(parts)
