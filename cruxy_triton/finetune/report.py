"""The run's plot (loss, learning rate, phase by step) and its one-page report in Markdown."""

from pathlib import Path
from typing import Any

from cruxy_triton import files
from cruxy_triton.finetune.folder import RunFolder

MIB = 1 << 20


def write(folder: RunFolder, run: dict[str, Any]) -> None:
    """Writes plot.png and report.md from the run's record and its metrics."""
    rows = folder.read_metrics()
    plot(rows, folder.path / "plot.png")
    files.write_text(folder.path / "report.md", markdown(run, rows))


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Three panels over the optimizer step: loss (training and held-out), learning rate, phase."""
    import matplotlib

    matplotlib.use("Agg")  # no display is needed for a file
    from matplotlib import pyplot

    steps = [row for row in rows if "loss" in row]
    evaluations = [row for row in rows if "eval_loss" in row]
    with_phase = [row for row in steps if row.get("phase") is not None]
    figure, panels = pyplot.subplots(
        3 if with_phase else 2, 1, figsize=(8, 8 if with_phase else 6), sharex=True, layout="constrained"
    )
    x = [row["step"] for row in steps]
    panels[0].plot(x, [row["loss"] for row in steps], lw=0.8, alpha=0.5, color="C0", label="training, each step")
    panels[0].plot(x, _smooth([row["loss"] for row in steps]), color="C0", label="training, running mean of 10")
    held_out = [row["eval_loss"] for row in evaluations]
    panels[0].plot([row["step"] for row in evaluations], held_out, "o-", color="C3", label="held out")
    panels[0].set_ylabel("loss (nats a token)")
    panels[0].legend()
    panels[1].plot(x, [row["lr"] for row in steps], color="C1", label="asked for")
    if with_phase:
        panels[1].plot(x, [row["lr_used"] for row in steps], color="C2", label="used")
        panels[1].legend()
        panels[2].plot([row["step"] for row in with_phase], [row["phase"] for row in with_phase], color="C4")
        panels[2].set_ylabel("phase φ")
        panels[2].set_ylim(0, 1)
    panels[1].set_ylabel("learning rate")
    panels[-1].set_xlabel("optimizer step")
    for panel in panels:
        panel.grid(alpha=0.3)
    with files.replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    pyplot.close(figure)


def _smooth(values: list[float | None], width: int = 10) -> list[float]:
    smoothed = []
    for end in range(1, len(values) + 1):
        window = [v for v in values[max(0, end - width) : end] if v is not None]
        smoothed.append(sum(window) / len(window) if window else float("nan"))
    return smoothed


def markdown(run: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The report's text. `run` is the content of run.json after training."""
    recipe, result = run["recipe"], run["result"]
    before, after = result["before"], result["after"]
    steps = [row for row in rows if "loss" in row]
    seconds = sorted(row["seconds"] for row in steps)
    median = seconds[len(seconds) // 2] if seconds else float("nan")
    used = [row for row in steps if row.get("lr_used") is not None]
    asked = sum(row["lr"] for row in used)
    lines = [
        f"# Fine-tuning {recipe['model']}",
        "",
        f"{run['status'].capitalize()} after {result['step']} optimizer steps in {result['seconds']:.0f} s on "
        f"{run['device']} (median step {median:.3f} s).",
        "",
        f"| held out ({before['tokens']:,} tokens) | before | after |",
        "|---|---|---|",
        f"| loss (nats a token) | {before['loss']:.4f} | {after['loss']:.4f} |",
        f"| perplexity | {before['perplexity']:.3f} | {after['perplexity']:.3f} |",
        "",
        "![loss, learning rate and phase by step](plot.png)",
        "",
        "## What was run",
        "",
        "| setting | value |",
        "|---|---|",
        f"| data | {recipe['data']}: {run['records']['train']} records ({run['records']['form']}), "
        f"{run['records']['held_out']} held out, {run['records']['cut']} cut at the sequence length, "
        f"{run['records']['dropped']} dropped |",
        f"| sequence length, batch | {recipe['max_seq_length']} tokens, {recipe['batch_size']} sequences a step "
        f"in micro-batches of {recipe['micro_batch_size']} |",
        f"| base weights | {run['dtype']}, gradient checkpointing "
        f"{'on' if recipe['gradient_checkpointing'] else 'off'} |",
        f"| LoRA | r {recipe['lora_r']}, alpha {recipe['lora_alpha']}, dropout {recipe['lora_dropout']}, on "
        f"{', '.join(recipe['target_modules'])}: {run['trainable_parameters']:,} parameters (float32) |",
        f"| optimizer | {recipe['optimizer']}"
        + (f", mode {recipe['mode']}" if recipe["optimizer"].startswith("cruxy") else "")
        + f", learning rate {run['lr']:g} ({recipe['lr_schedule']}, warm-up {recipe['warmup_fraction']:g})"
        + (f", of which control used {sum(row['lr_used'] for row in used) / asked:.0%}" if asked else "")
        + f", weight decay {recipe['weight_decay']:g} |",
        f"| seed | {recipe['seed']} |",
        f"| memory | {_memory(run)} |",
        f"| versions | {', '.join(f'{k} {v}' for k, v in run['versions'].items())} |",
    ]
    if run.get("resumed_at_steps"):
        lines.append(f"| resumed at step | {', '.join(map(str, run['resumed_at_steps']))} |")
    if sample := run.get("sample"):
        lines += ["", "## A held-out sample", ""]
        for title, key in (("Prompt", "prompt"), ("Expected", "expected"), ("Before", "before"), ("After", "after")):
            if sample.get(key):
                lines += [f"**{title}**", "", *(f"> {line}" for line in sample[key].strip().splitlines()[:12]), ""]
    lines += [
        "",
        "## Using the adapter",
        "",
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"base = AutoModelForCausalLM.from_pretrained({recipe['model']!r}, dtype='auto')",
        "model = PeftModel.from_pretrained(base, 'adapter')  # the folder beside this report",
        "tokenizer = AutoTokenizer.from_pretrained('adapter')",
        "```",
        "",
    ]
    return "\n".join(lines)


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
