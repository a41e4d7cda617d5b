"""`cruxy-triton finetune`: arguments, the progress display and what is printed."""

import argparse
import json
import logging
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

from cruxy_triton.cli.arguments import add_settings
from cruxy_triton.cli.arguments import given as typed
from cruxy_triton.environment import require_train_extra
from cruxy_triton.errors import UserError
from cruxy_triton.finetune.recipe import Recipe

DESCRIPTION = """\
Fine-tunes a causal language model with LoRA: plans the memory, loads, trains with TRL and CruxyOptimizer,
evaluates on held-out records before and after, and writes the adapter, run.json, metrics.jsonl, events.jsonl, a
plot and a one-page report to the output folder.

  cruxy-triton finetune --demo
  cruxy-triton finetune TinyLlama/TinyLlama-1.1B-Chat-v1.0 --data train.jsonl --vram 4GiB
  cruxy-triton finetune --resume --output runs/TinyLlama-1.1B-Chat-v1.0-train
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.usage = "cruxy-triton finetune MODEL --data FILE [options]"
    add = parser.add_argument
    add("--demo", action="store_true", help="make a small model and data here, and fine-tune it (no network, no GPU)")
    add("--plan", metavar="FILE", help="run exactly the plan saved by `cruxy-triton plan --save`")
    add("--resume", action="store_true", help="continue the interrupted run in --output")
    add("--overwrite", action="store_true", help="replace the run in --output")
    add("--json", action="store_true", help="print the result as one JSON object on standard output")
    add_settings(parser, "finetune")


def run(args: argparse.Namespace) -> int:
    require_train_extra()
    _environment()
    given = typed(args, "finetune")
    record_gradients = given.pop("record_gradients", 0)
    _say_what_only_the_hub_knows(given)
    if args.json:  # standard output is for the result alone
        say = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    else:
        say = lambda line: print(line, flush=True)  # noqa: E731
    if args.plan is not None:
        given = obeying(args.plan, given, args.resume)
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
        result = run_module.finetune(recipe, folder, hooks, record_gradients=record_gradients)
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


def obeying(path: str, given: dict[str, Any], resume: bool = False) -> dict[str, Any]:
    """`given` with the settings of the plan in `path`; raises UserError where the two contradict."""
    from cruxy_triton.planner import Plan, load_model

    plan = Plan.load(path)
    if not plan.fits:
        raise UserError(f"the plan in {path} does not fit {plan.card}; make one that does")
    for name, value in vars(plan.config).items():
        value = list(value) if isinstance(value, tuple) else value
        if value is None:  # no budget: one that is given cuts the plan's card down further
            continue
        if name == "double_quant" and not plan.config.load_in_4bit:
            continue
        if given.setdefault(name, value) != value:
            raise UserError(
                f"the plan in {path} sets {name} = {value!r}, but {given[name]!r} is given; leave one of them out"
            )
    model = plan.folder or plan.hf_id
    if model and not resume:
        given.setdefault("model", model)
    if given.get("model") not in (None, model) and load_model(given["model"]).parameters != plan.parameters:
        raise UserError(
            f"the plan in {path} is for {plan.model} ({plan.parameters:,} parameters), not for {given['model']}; "
            "make one for it with `cruxy-triton plan`"
        )
    return given


def _complete(given: dict[str, Any], is_demo: bool) -> dict[str, Any]:
    if is_demo:
        from cruxy_triton.finetune import demo

        defaults = {
            "output": demo.free_output(),
            "lora_r": demo.LORA_R,
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


def _say_what_only_the_hub_knows(given: dict[str, Any]) -> None:
    local = {"subset": given.get("data"), "split": given.get("data"), "revision": given.get("model")}
    for name, source in local.items():
        if name in given and source and Path(source).expanduser().exists():
            print(f"cruxy-triton finetune: note: --{name} has no effect on {source}, which is here", file=sys.stderr)


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


class Progress:
    """A bar with loss, learning rate and phase on a terminal; a line every tenth elsewhere."""

    def __init__(self) -> None:
        self.bar: Any = None

    def __call__(self, row: dict[str, Any], total: int) -> None:
        lr = row.get("lr_used", row["lr"])
        shown = f"loss {row['loss']:.4f}  lr {lr:.2e}"
        if row.get("phase") is not None:
            shown += f"  phase {row['phase']:.3f}"
        if row.get("regime") not in (None, "warming", "stable"):
            shown += f"  {row['regime']}"
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
