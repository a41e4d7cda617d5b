"""`cruxy-triton finetune`: arguments, the progress display and what is printed."""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from cruxy_triton import settings
from cruxy_triton.cli.arguments import Parser, add_settings
from cruxy_triton.cli.arguments import given as typed
from cruxy_triton.cli.config import with_file
from cruxy_triton.environment import quiet_libraries, require_train_extra
from cruxy_triton.errors import UserError
from cruxy_triton.finetune.recipe import Recipe

DESCRIPTION = """\
Fine-tunes a causal language model, with LoRA or every weight of it: plans the memory, loads, trains with TRL and
CruxyOptimizer, evaluates on held-out records before and after, and writes the adapter (or the model), run.json,
metrics.jsonl, events.jsonl, a plot and a one-page report to the output folder.

  cruxy-triton finetune --demo
  cruxy-triton finetune TinyLlama/TinyLlama-1.1B-Chat-v1.0 --data train.jsonl --vram 4GiB
  cruxy-triton finetune TinyLlama/TinyLlama-1.1B-Chat-v1.0 --data train.jsonl --vram 4GiB --method full
  cruxy-triton finetune --resume --output runs/TinyLlama-1.1B-Chat-v1.0-train
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.usage = "cruxy-triton finetune MODEL --data FILE [options]"
    add = parser.add_argument
    add("--demo", nargs="?", const="smollm2", choices=("smollm2", "tiny"), metavar="tiny",
        help="fine-tune a real chat model of 135 M parameters (93 MB to download, no account); tiny: a small model "
        "that is made here, without a network")  # fmt: skip
    add("--config", metavar="FILE", help="take options from a YAML file, by their names; what is typed wins")
    add("--dry-run", action="store_true", help="show the plan, the first records as the model will see them and token "
        "statistics; nothing is loaded, trained or written")  # fmt: skip
    add("--plan", metavar="FILE", help="run exactly the plan saved by `cruxy-triton plan --save`")
    add("--resume", action="store_true", help="continue the interrupted run in --output")
    add("--overwrite", action="store_true", help="replace the run in --output")
    add("--merge", action="store_true", help="when done, write base and adapter as one model to merged/ in --output")
    add("--json", action="store_true", help="print the result as one JSON object on standard output")
    add_settings(parser, "finetune")


def run(args: argparse.Namespace) -> int:
    require_train_extra()
    quiet_libraries()
    if args.config is not None:
        parser = Parser(prog="cruxy-triton finetune")
        configure(parser)
        with_file(args, parser)
    settings.refuse_adapters(getattr(args, "given", {}), getattr(args, "given", {}).get("method"))
    given = typed(args, "finetune")
    from cruxy_triton.finetune import processes

    together = processes.start(given.get("device", "auto"))
    try:
        return _run(args, given, together)
    except processes.Elsewhere:  # said by the first process
        return 2
    finally:
        processes.leave()


def _run(args: argparse.Namespace, given: dict[str, Any], together: Any) -> int:
    record_gradients = given.pop("record_gradients", 0)
    _say_what_only_the_hub_knows(given)
    if not together.first:
        say = lambda line: None  # noqa: E731
    elif args.json:  # standard output is for the result alone
        say = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    else:
        say = lambda line: print(line, flush=True)  # noqa: E731
    if args.plan is not None:
        planned = obeying(args.plan, dict(given), args.resume)
        settings.refuse_adapters(given, planned["method"])
        given = planned
    if args.demo:
        if given.get("method") == "full":
            raise UserError("--demo shows LoRA, with settings that were tried for it; leave --method full out")
        clash = sorted({"model", "data", "eval_data"} & set(given))
        if clash:
            raise UserError(f"--demo brings its own model and data; leave out {', '.join(clash)}")

    from cruxy_triton.finetune.folder import RunFolder

    if args.resume:
        if args.dry_run:
            raise UserError("--dry-run shows a run before it begins; leave out --resume")
        if "output" not in given:
            raise UserError("--resume needs --output, the folder of the run to continue")
        folder = RunFolder(given["output"], resume=True, overwrite=args.overwrite)
        from cruxy_triton.finetune import run as run_module

        recipe = run_module.resume_recipe(folder, given)
        _check_merge(args, recipe)
    else:
        recipe = Recipe(**_complete(given, args.demo))  # checks the settings before anything slow is imported
        _check_merge(args, recipe)
        folder = RunFolder(recipe.output, overwrite=args.overwrite)
        _check_data_file(recipe.data)
        if args.demo:
            from cruxy_triton.finetune import demo

            asked = args.demo
            args.demo, model, data = together.from_first(lambda: demo.prepare(asked, say))
            if args.demo != asked:
                recipe = Recipe(**_complete(given, args.demo))
            recipe.model, recipe.data = model, str(data)
        from cruxy_triton.finetune import run as run_module

    if record_gradients and recipe.releases:
        raise UserError("--record-gradients needs --no-release: released gradients are gone before they could be saved")
    if args.dry_run:
        from cruxy_triton.finetune import preview

        found = run_module.dry_run(recipe, folder, run_module.Hooks(say=say))
        for line in preview.lines(found):
            say(line)
        if args.json:
            print(json.dumps(found))
        return 0

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
        say(f"  cruxy-triton finetune --resume --output {recipe.output}{' --merge' if args.merge else ''}")
        return 128 + result.signal
    if not together.first:
        return 0
    if args.merge:
        from cruxy_triton.cli.merge import merge

        merge(str(result.folder), trusted=recipe.trust_remote_code, say=say)
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
        if plan.config.method == "full" and settings.SETTINGS[name].of_adapters:
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


def _complete(given: dict[str, Any], demo_name: str | None) -> dict[str, Any]:
    if demo_name:
        from cruxy_triton.finetune import demo

        defaults = demo.defaults(demo_name, given.get("optimizer", "cruxy"))
        return {"output": demo.free_output(), **defaults, "model": "", "data": "", **given}
    for name, flag in (("model", "MODEL"), ("data", "--data FILE")):
        if name not in given:
            raise UserError(f"{flag} is missing; `cruxy-triton finetune --demo` runs without any")
    if "output" not in given:
        parts = (given["model"].rstrip("/"), re.sub(r"\.(jsonl?|txt|md)$", "", given["data"]))
        given["output"] = "runs/" + "-".join(re.sub(r"[^\w.-]", "_", p.rpartition("/")[2]) for p in parts)
    return given


def _check_merge(args: argparse.Namespace, recipe: Recipe) -> None:
    if args.merge and recipe.method == "full":
        raise UserError("--merge is for adapters, and --method full writes a whole model already; leave --merge out")


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
    from cruxy_triton.finetune.report import SHOWN_SAMPLES

    before, after = result.before, result.after
    say(
        f"held-out loss {before['loss']:.4f} -> {after['loss']:.4f}, perplexity {before['perplexity']:.2f} -> "
        f"{after['perplexity']:.2f} ({before['tokens']:,} tokens)"
    )
    for sample in result.samples[:SHOWN_SAMPLES]:
        for key in ("prompt", "expected", "before", "after"):
            say(f"  {key:>8}: {' '.join(sample[key].split())[:200]}")
    say(f"{'adapter' if (result.folder / 'adapter').is_dir() else 'model'}, report and metrics: {result.folder}")
    if args.json:
        summary = {"folder": str(result.folder), "step": result.step, "before": before, "after": after}
        summary["samples"] = result.samples
        print(json.dumps(summary))
    if args.demo:
        return _judge_demo(args.demo, result, say)
    return 0


def _judge_demo(name: str, result: Any, say: Any) -> int:
    """Exit code 1 where the demo has not learned what a working optimizer teaches."""
    from cruxy_triton.finetune.demo import REQUIRED_GAIN, right_answers

    gain = result.before["loss"] - result.after["loss"]
    wrong = ""
    if name == "tiny" and result.samples:
        before, after, constant = right_answers(result.samples)
        said = f"{after} of {len(result.samples)} answers are right after training"
        say(f"{said}, {before} before; always the most frequent one: {constant}")
        if after <= constant:
            wrong = f"{said}, and always the same one would be in {constant}"
    if not gain >= REQUIRED_GAIN:
        wrong = f"the held-out loss fell by {gain:.3f}; a working optimizer reaches at least {REQUIRED_GAIN}"
    if wrong:
        print(f"cruxy-triton finetune: error: the demo failed: {wrong}", file=sys.stderr)
        return 1
    return 0


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
