"""`cruxy-triton finetune`: arguments, the progress display and what is printed."""

import argparse
import dataclasses
import json
import logging
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

from cruxy_triton.environment import require_train_extra
from cruxy_triton.errors import UserError
from cruxy_triton.finetune.recipe import DEVICES, DTYPES, OPTIMIZERS, SCHEDULES, Recipe

DESCRIPTION = """\
Fine-tunes a causal language model with LoRA: plans the memory, loads, trains with TRL and CruxyOptimizer,
evaluates on held-out records before and after, and writes the adapter, run.json, metrics.jsonl, a plot and a
one-page report to the output folder.

  cruxy-triton finetune --demo
  cruxy-triton finetune TinyLlama/TinyLlama-1.1B-Chat-v1.0 --data train.jsonl --vram 4GiB
  cruxy-triton finetune --resume --output runs/TinyLlama-1.1B-Chat-v1.0-train
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    # An option that was not typed leaves no attribute: its default is the Recipe's, and --resume can tell
    # what was asked for from what was not.
    add = parser.add_argument
    suppress: dict[str, Any] = {"default": argparse.SUPPRESS}
    add("model", nargs="?", metavar="MODEL", help="Hugging Face id, or a folder with a model", **suppress)
    add("--demo", action="store_true", help="make a small model and data here, and fine-tune it (no network, no GPU)")
    add("--resume", action="store_true", help="continue the interrupted run in --output")
    add("--overwrite", action="store_true", help="replace the run in --output")
    add("--json", action="store_true", help="print the result as one JSON object on standard output")
    add("--record-gradients", type=int, default=0, metavar="N", help="save the gradients of the first N steps")

    data = parser.add_argument_group("data")
    add = data.add_argument
    add("--data", metavar="FILE", help="JSONL, plain text (.txt), or a datasets id", **suppress)
    add("--output", metavar="DIR", help="output folder (default: runs/<model>-<data>)", **suppress)
    add("--subset", help="subset (configuration) of a datasets id", **suppress)
    add("--split", help="split of a datasets id (default: train)", **suppress)
    add("--eval-data", metavar="FILE", help="held-out records (default: split off --data)", **suppress)
    add("--eval-fraction", type=float, help="fraction of --data to hold out (default: 0.05)", **suppress)
    add("--max-eval-samples", type=int, help="evaluate on at most so many records (default: 200)", **suppress)
    add("--max-seq-length", type=int, metavar="TOKENS", help="longest sequence (default: planned)", **suppress)
    add("--no-chat-template", dest="chat_template", action="store_false", help="plain text prompts", **suppress)

    model = parser.add_argument_group("model and memory")
    add = model.add_argument
    add("--vram", dest="vram_bytes", type=_bytes, metavar="SIZE", help="memory budget, as 4GiB or 3800MiB", **suppress)
    add("--plan", metavar="FILE", help="obey a plan saved by `cruxy-triton plan --save`")
    add("--load-in-4bit", action="store_true", help="4-bit NF4 base weights (bitsandbytes)", **suppress)
    add("--no-double-quant", dest="double_quant", action="store_false", help="plain NF4 constants", **suppress)
    add("--dtype", choices=DTYPES, help="base weights (default: by device)", **suppress)
    add("--device", choices=DEVICES, **suppress)
    add("--gradient-checkpointing", action=argparse.BooleanOptionalAction, help="default: planned", **suppress)
    add("--revision", help="revision of a Hugging Face id", **suppress)
    add("--trust-remote-code", action="store_true", help="run code that comes with the model", **suppress)
    add("--lora-r", type=int, metavar="R", help="rank (default: 8)", **suppress)
    add("--lora-alpha", type=float, metavar="A", help="scale is A/R (default: 16)", **suppress)
    add("--lora-dropout", type=float, metavar="P", **suppress)
    add("--target-modules", nargs="+", metavar="NAME", help="layers to adapt (default: all-linear)", **suppress)

    training = parser.add_argument_group("training")
    add = training.add_argument
    add("--optimizer", choices=OPTIMIZERS, help="default: cruxy", **suppress)
    add("--state-bits", type=int, choices=(8, 32), help="momentum of cruxy-lion (default: 32)", **suppress)
    add("--mode", help="control law of CruxyOptimizer (default: meta3)", **suppress)
    add("--lr", type=float, help="peak learning rate (default: by optimizer)", **suppress)
    add("--lr-schedule", choices=SCHEDULES, help="default: linear", **suppress)
    add("--warmup-fraction", type=float, metavar="F", help="part of the steps to warm up in (0.03)", **suppress)
    add("--weight-decay", type=float, **suppress)
    add("--batch-size", type=int, help="sequences an optimizer step (default: 8)", **suppress)
    add("--micro-batch-size", type=int, help="sequences at once (default: planned)", **suppress)
    add("--epochs", type=float, **suppress)
    add("--max-steps", type=int, help="stop after so many optimizer steps", **suppress)
    add("--seed", type=int, **suppress)
    add("--save-steps", type=int, help="steps between checkpoints (default: 50)", **suppress)
    add("--sample-tokens", type=int, help="length of the sample in the report; 0 for none", **suppress)


def run(args: argparse.Namespace) -> int:
    require_train_extra()
    _environment()
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(Recipe) if hasattr(args, f.name)}
    if args.json:  # standard output is for the result alone
        say = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    else:
        say = lambda line: print(line, flush=True)  # noqa: E731
    if args.plan is not None:
        given = _obeying(args.plan, given)
    if args.demo:
        clash = sorted({"model", "data", "eval_data"} & set(given))
        if clash:
            raise UserError(f"--demo brings its own model and data; leave out {', '.join(clash)}")

    from cruxy_triton.finetune.folder import RunFolder

    if args.resume:
        if "output" not in given:
            raise UserError("--resume needs --output, the folder of the run to continue")
        folder = RunFolder(given["output"], resume=True, overwrite=args.overwrite)
        from cruxy_triton.finetune import run as run_module

        recipe = run_module.resume_recipe(folder, given)
    else:
        given = _complete(given, args.demo)
        recipe = Recipe(**given)  # checks the settings before anything slow is imported
        folder = RunFolder(recipe.output, overwrite=args.overwrite)
        _check_data_file(recipe.data)
        if args.demo:
            from cruxy_triton.finetune import demo

            model, data = demo.prepare(say)
            recipe.model, recipe.data = str(model), str(data)
        from cruxy_triton.finetune import run as run_module

    display = Progress()
    hooks = run_module.Hooks(say=say, progress=display)
    try:
        result = run_module.finetune(recipe, folder, hooks, record_gradients=args.record_gradients)
    except run_module.TrainingFailed as error:
        display.close()
        if args.debug:
            raise
        print(f"cruxy-triton finetune: error: {error}", file=sys.stderr)
        return 1
    finally:
        display.close()
    if not result.finished:
        say(f"interrupted: checkpoint of step {result.step} saved; continue with")
        say(f"  cruxy-triton finetune --resume --output {recipe.output}")
        return 128 + result.signal
    return _finish(result, args, say)


def _obeying(path: str, given: dict[str, Any]) -> dict[str, Any]:
    """`given` with the settings of the plan in `path`; raises UserError where the two contradict."""
    from cruxy_triton.finetune.memory import settings_of
    from cruxy_triton.planner import Plan

    plan = Plan.load(path)
    if not plan.fits:
        raise UserError(f"the plan in {path} does not fit {plan.card}; make one that does")
    settings = settings_of(plan)
    for name, value in settings.items():
        if name in given and given[name] != value:
            raise UserError(
                f"the plan in {path} sets {name} = {value!r}, but {given[name]!r} is given; leave one of them out"
            )
    if plan.hf_id:
        given = {"model": plan.hf_id, **given}
    return {**settings, **given}


def _complete(given: dict[str, Any], is_demo: bool) -> dict[str, Any]:
    if is_demo:
        from cruxy_triton.finetune import demo

        defaults = {
            "output": demo.free_output(),
            "max_seq_length": demo.LENGTH,
            "max_steps": demo.STEPS,
            "lr": demo.LEARNING_RATES[given.get("optimizer", "cruxy")],
        }
        return {**defaults, "model": "", "data": "", **given}
    for name, flag in (("model", "MODEL"), ("data", "--data FILE")):
        if name not in given:
            raise UserError(f"{flag} is missing; `cruxy-triton finetune --demo` runs without any")
    if "output" not in given:
        parts = (given["model"].rstrip("/"), re.sub(r"\.(jsonl?|txt|md)$", "", given["data"]))
        given["output"] = "runs/" + "-".join(re.sub(r"[^\w.-]", "_", p.rpartition("/")[2]) for p in parts)
    return given


def _check_data_file(path: str) -> None:
    """What can be said of the data before the slow imports."""
    if path and Path(path).is_dir() and not any(Path(path).iterdir()):
        raise UserError(f"--data {path} is an empty folder; give a JSONL or text file, or a datasets id")


def _finish(result: Any, args: argparse.Namespace, say: Any) -> int:
    before, after = result.before, result.after
    say(
        f"held-out loss {before['loss']:.4f} -> {after['loss']:.4f}, perplexity {before['perplexity']:.2f} -> "
        f"{after['perplexity']:.2f} ({before['tokens']:,} tokens)"
    )
    if result.sample:
        for key in ("prompt", "expected", "before", "after"):
            shown = " ".join(result.sample[key].split())
            say(f"  {key:>8}: {shown[:200]}")
    say(f"adapter, report and metrics: {result.folder}")
    if args.json:
        summary = {"folder": str(result.folder), "step": result.step, "before": before, "after": after}
        print(json.dumps(summary))
    if args.demo:
        from cruxy_triton.finetune.demo import REQUIRED_GAIN

        gain = before["loss"] - after["loss"]
        if not gain >= REQUIRED_GAIN:
            print(
                f"cruxy-triton finetune: error: the demo's held-out loss fell by {gain:.3f}; a working optimizer "
                f"reaches at least {REQUIRED_GAIN}",
                file=sys.stderr,
            )
            return 1
    return 0


def _environment() -> None:
    """One GPU, and no third-party progress bars and notices, which would bury ours; what they warn of stays."""
    if "LOCAL_RANK" not in os.environ:  # not under torchrun or accelerate launch
        # With several GPUs in sight of one process transformers would use DataParallel, which TRL refuses.
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for package in ("transformers", "trl", "peft", "accelerate", "bitsandbytes"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=package)
    # "No module named 'kernels'": an optional download of CPU kernels that would be used for inference only.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _bytes(text: str) -> int:
    """'4GiB', '3800 MiB', '4GB' or plain bytes, as bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; expected something like 4GiB or 3800MiB")
    power = " KMGT".index(match[2].upper() or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


class Progress:
    """A bar with loss, learning rate and phase on a terminal; a line every tenth elsewhere."""

    def __init__(self) -> None:
        self.bar: Any = None

    def __call__(self, row: dict[str, Any], total: int) -> None:
        lr = row.get("lr_used", row["lr"])
        shown = f"loss {row['loss']:.4f}  lr {lr:.2e}"
        if row.get("phase") is not None:
            shown += f"  phase {row['phase']:.3f}"
        if not sys.stderr.isatty():
            if row["step"] % max(1, total // 10) == 0 or row["step"] == total:
                print(f"  step {row['step']}/{total}  {shown}", file=sys.stderr, flush=True)
            return
        if self.bar is None:
            from tqdm.auto import tqdm

            self.bar = tqdm(total=total, initial=row["step"] - 1, unit="step", dynamic_ncols=True, file=sys.stderr)
        self.bar.set_postfix_str(shown, refresh=False)
        self.bar.update(row["step"] - self.bar.n)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
