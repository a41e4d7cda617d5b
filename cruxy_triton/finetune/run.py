"""One fine-tuning run from a recipe to an adapter: check, plan, load, evaluate, train, evaluate, report."""

import importlib.metadata
import math
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cruxy_triton import files
from cruxy_triton.errors import UserError
from cruxy_triton.finetune import data as data_module
from cruxy_triton.finetune import load, memory, report
from cruxy_triton.finetune.folder import RunFolder
from cruxy_triton.finetune.recipe import Recipe

PACKAGES = (
    "cruxy-triton",
    "torch",
    "triton",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "tokenizers",
    "bitsandbytes",
    "safetensors",
)
# Settings that a resumed run may differ in: they do not change what is computed.
RESUME_MAY_CHANGE = {"output", "save_steps", "sample_tokens"}


class TrainingFailed(RuntimeError):
    """Training stopped for a reason that is not bad input: out of memory, or a loss that is not finite."""


@dataclass
class Result:
    """What a finished (or interrupted) run has to say."""

    folder: Path
    finished: bool
    step: int
    before: dict[str, float]
    after: dict[str, float] | None
    sample: dict[str, str] | None


@dataclass
class Hooks:
    """How a run speaks to whoever started it; the default says nothing."""

    say: Callable[[str], None] = lambda line: None
    progress: Callable[[dict[str, Any], int], None] = lambda row, total: None


def versions() -> dict[str, str]:
    """Installed versions of the packages that decide the result; absent ones are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def resume_recipe(folder: RunFolder, given: dict[str, Any]) -> Recipe:
    """The recipe of the run in `folder`; raises UserError if `given` (settings typed by the user) contradict it."""
    saved = folder.read_run()
    if saved.get("status") == "finished":
        raise UserError(f"the run in {folder.path} is finished (step {saved['result']['step']}); nothing to resume")
    recipe = Recipe.from_dict(saved["recipe"])
    recipe.output = str(folder.path)
    for name, value in given.items():
        if name in RESUME_MAY_CHANGE:
            setattr(recipe, name, value)
        elif value != getattr(recipe, name):
            raise UserError(
                f"--resume continues a run with {name} = {getattr(recipe, name)!r}, but {value!r} is given now; "
                "leave it out, or start a new run in another --output"
            )
    return recipe


def finetune(recipe: Recipe, folder: RunFolder, hooks: Hooks, *, record_gradients: int = 0) -> Result:
    """Runs (or resumes) `recipe` in `folder`.

    Raises UserError for input that cannot be used, before anything is written, and TrainingFailed when
    training itself breaks; checkpoints and metrics up to then are kept.
    """
    started = time.time()
    device = load.device_of(recipe)
    dtype = load.dtype_of(recipe, device)
    config = load.config_of(recipe)
    longest = load.max_length_of(config)
    if longest is not None and recipe.max_seq_length is not None and recipe.max_seq_length > longest:
        raise UserError(f"--max-seq-length {recipe.max_seq_length} is beyond the {longest} tokens of {recipe.model}")
    if longest is not None and recipe.sample_tokens >= longest:
        raise UserError(f"--sample-tokens {recipe.sample_tokens} is beyond the {longest} tokens of {recipe.model}")
    tokenizer = load.tokenizer_of(recipe)
    data = data_module.load(
        recipe.data,
        eval_source=recipe.eval_data,
        eval_fraction=recipe.eval_fraction,
        max_eval_samples=recipe.max_eval_samples,
        seed=recipe.seed,
        subset=recipe.subset,
        split=recipe.split,
        chat=recipe.chat_template and tokenizer.chat_template is not None,
    )
    saved = folder.read_run() if folder.resuming else None
    if saved is not None and saved["data_sha256"] != data.fingerprint:
        raise UserError(f"{recipe.data} has changed since the run in {folder.path} began; --resume needs the same data")
    hooks.say(
        f"data: {len(data.train)} records to train on, {len(data.held_out)} held out ({data.form})"
        + (f"; {data.skipped_empty} without an answer left out" if data.skipped_empty else "")
    )
    longest_record = data.longest(tokenizer)
    plan = memory.make_plan(recipe, config, device, dtype, longest or longest_record, longest_record)
    for line in memory.describe(plan, recipe):
        hooks.say(line)
    memory.limit(recipe, device)

    attention = load.use_attention(recipe.attention, device)
    model = load.add_lora(load.model_of(recipe, config, device, dtype, attention), recipe)
    # Imported here: TRL takes seconds, and everything above can already have refused the input.
    from cruxy_triton.finetune.train import GradientRecorder, Interruption, Telemetry, Trainer

    folder.begin()
    trainer = Trainer(model, tokenizer, data, recipe, folder, dtype)
    lengths = _lengths(trainer, recipe, data)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    hooks.say(
        f"model: {recipe.model}, {'nf4' if recipe.load_in_4bit else str(dtype).removeprefix('torch.')} on {device}; "
        f"{trainable:,} trainable parameters in {sum(p.requires_grad for p in model.parameters())} adapter tensors"
    )
    if lengths["cut"]:
        hooks.say(f"note: {lengths['cut']} of {len(data.train)} records are cut at {recipe.max_seq_length} tokens")
    if lengths["dropped"]:
        hooks.say(f"note: {lengths['dropped']} records are left out: their prompt alone fills the sequence length")

    run: dict[str, Any] = saved or {
        "status": "running",
        "recipe": recipe.to_dict(),
        "lr": recipe.lr,
        "data_sha256": data.fingerprint,
        "records": {"train": len(data.train), "held_out": len(data.held_out), "form": data.form, **lengths},
        "trainable_parameters": trainable,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
        "dtype": "nf4" if recipe.load_in_4bit else str(dtype).removeprefix("torch."),
        "plan": None if plan is None else plan.to_dict(),
        "versions": versions(),
        "command": sys.argv,
    }
    checkpoint = folder.newest_checkpoint() if folder.resuming else None
    if folder.resuming:
        run.setdefault("resumed_at_steps", []).append(0 if checkpoint is None else int(checkpoint.name[11:]))
        run["status"] = "running"
        folder.rewind_metrics(run["resumed_at_steps"][-1] if "before" in run else -1)
        hooks.say(f"resuming at step {run['resumed_at_steps'][-1]} of the run in {folder.path}")
    files.write_json(folder.run_json, run)

    interruption = Interruption()
    telemetry = Telemetry(trainer, hooks.progress)
    trainer.add_callback(telemetry)
    trainer.add_callback(interruption)
    if record_gradients:
        trainer.add_callback(GradientRecorder(trainer, record_gradients))
    try:
        if "before" not in run:
            hooks.say(f"evaluating on {len(data.held_out)} held-out records before training")
            run["before"] = trainer.held_out()
            run["sample"] = _sample(trainer, tokenizer, data, recipe)
            telemetry.write({"step": 0, "eval_loss": run["before"]["loss"]})
            files.write_json(folder.run_json, run)
        with interruption.installed():
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except torch.OutOfMemoryError as error:
        run["status"] = "out of memory"
        files.write_json(folder.run_json, run)
        raise TrainingFailed(
            f"out of memory at step {trainer.state.global_step + 1} (the plan said {memory.summary(plan)}): close "
            f"other programs and continue with --resume, or lower --max-seq-length ({str(error).partition('.')[0]})"
        ) from error
    step = trainer.state.global_step
    seconds = time.time() - started
    if interruption.requested and step < trainer.state.max_steps:
        run["status"] = "interrupted"
        files.write_json(folder.run_json, run)
        return Result(folder.path, False, step, run["before"], None, None)

    after = trainer.held_out()
    telemetry.write({"step": step, "eval_loss": after["loss"]})
    if run["sample"] is not None:
        run["sample"]["after"] = _generate(trainer, tokenizer, data, recipe)
    _save_adapter(model, tokenizer, folder)
    run["result"] = {
        "step": step,
        "before": run["before"],
        "after": after,
        "seconds": seconds,
        **memory.measured(device),
    }
    run["status"] = "finished" if math.isfinite(after["loss"]) else "diverged"
    files.write_json(folder.run_json, run)
    report.write(folder, run)
    folder.finish()
    if run["status"] == "diverged":
        raise TrainingFailed(f"the held-out loss is not finite after training; see {folder.path / 'report.md'}")
    return Result(folder.path, True, step, run["before"], after, run["sample"])


def _lengths(trainer: Any, recipe: Recipe, data: data_module.Data) -> dict[str, int]:
    """What the sequence length did to the records; raises UserError when it left nothing."""
    dataset = trainer.train_dataset
    if data.packed:
        return {"cut": 0, "dropped": 0, "sequences": len(dataset)}
    if len(dataset) == 0 or len(trainer.eval_dataset) == 0:
        raise UserError(
            f"--max-seq-length {recipe.max_seq_length} leaves no token of an answer in any record of "
            f"{recipe.data if len(dataset) == 0 else 'the held-out split'}; give a larger one"
        )
    cut = sum(len(ids) >= (recipe.max_seq_length or math.inf) for ids in dataset["input_ids"])
    return {"cut": cut, "dropped": len(data.train) - len(dataset), "sequences": len(dataset)}


def _prompt_ids(tokenizer: Any, data: data_module.Data, room: int) -> tuple[str, torch.Tensor]:
    record = data.held_out[0]
    if "text" in record:
        ids = tokenizer(record["text"], return_tensors="pt", truncation=True, max_length=min(32, room))["input_ids"]
        return tokenizer.decode(ids[0], skip_special_tokens=True), ids
    prompt = record["prompt"]
    if isinstance(prompt, str):
        return prompt, tokenizer(prompt, return_tensors="pt", truncation=True, max_length=room)["input_ids"]
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return prompt[-1]["content"], ids["input_ids"][:, -room:]


def _generate(trainer: Any, tokenizer: Any, data: data_module.Data, recipe: Recipe) -> str:
    """The model's greedy continuation of the first held-out prompt."""
    room = (load.max_length_of(trainer.model.config) or 2048) - recipe.sample_tokens
    _, ids = _prompt_ids(tokenizer, data, room)
    ids = ids.to(trainer.args.device)
    model = trainer.model
    model.eval()
    with torch.no_grad(), trainer.compute_loss_context_manager():
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=recipe.sample_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id,
        )
    model.train()
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()


def _sample(trainer: Any, tokenizer: Any, data: data_module.Data, recipe: Recipe) -> dict[str, str] | None:
    if recipe.sample_tokens == 0:
        return None
    record = data.held_out[0]
    expected = record.get("completion")
    return {
        "prompt": _prompt_ids(tokenizer, data, 1 << 30)[0],
        "expected": "" if expected is None else (expected if isinstance(expected, str) else expected[0]["content"]),
        "before": _generate(trainer, tokenizer, data, recipe),
    }


def _save_adapter(model: Any, tokenizer: Any, folder: RunFolder) -> None:
    partial = folder.path / ".adapter.partial"
    model.save_pretrained(partial, safe_serialization=True)
    tokenizer.save_pretrained(partial)
    (partial / "README.md").unlink(missing_ok=True)  # peft's empty model card; report.md says what there is to say
    files.move_folder(partial, folder.adapter)
