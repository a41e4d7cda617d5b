"""One fine-tuning run from a recipe to an adapter or a model: check, plan, load, evaluate, train, evaluate, report.

Everything that can refuse the input comes before `RunFolder.begin`, the first thing that writes.
"""

import contextlib
import copy
import math
import os
import platform
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cruxy_triton import files, settings
from cruxy_triton.environment import require_reporter, versions
from cruxy_triton.errors import UserError
from cruxy_triton.finetune import data as data_module
from cruxy_triton.finetune import full, load, memory, preview, processes, report, retry, selftest
from cruxy_triton.finetune.folder import KEPT_CHECKPOINTS, RunFolder
from cruxy_triton.finetune.recipe import Recipe
from cruxy_triton.guard import TrainingStopped
from cruxy_triton.guard import events as guard_events
from cruxy_triton.guard.checkpoints import step_of

# Settings that a resumed run may differ in: they do not change what is computed, the second row but for rounding.
RESUME_MAY_CHANGE = {
    "output", "save_steps", "sample_tokens", "retry", "report_to",
    "micro_batch_size", "gradient_checkpointing", "chunked_loss", "attention",
}  # fmt: skip
PATHS = ("model", "data", "eval_data")
TEXT_PROMPT_TOKENS = 32
MIN_APPLIED = 0.1  # of a run's steps; one with fewer has failed
ENDED = ("finished", "diverged", "stopped")  # with a result and a report
# Of what is trained and the optimizer's state: how many there may be on the disk at once, in the checkpoints and in the
# guard's snapshots (those at hand, and those that the last two checkpoints refer to).
COPIES_IN_CHECKPOINTS, COPIES_IN_SNAPSHOTS = KEPT_CHECKPOINTS + 1, 7


class TrainingFailed(RuntimeError):
    """Training stopped for a reason that is not bad input: out of memory, a full disk, a loss that is not finite."""


@dataclass
class Result:
    """What a finished (or interrupted) run has to say; `step` is the last one saved, `signal` what interrupted it."""

    folder: Path
    finished: bool
    step: int
    before: dict[str, float]
    after: dict[str, float] | None
    samples: list[dict[str, str]]
    signal: int = 0


@dataclass
class Hooks:
    """How a run speaks to whoever started it; the default says nothing."""

    say: Callable[[str], None] = lambda line: None
    progress: Callable[[dict[str, Any], int], None] = lambda row, total: None


def resume_recipe(folder: RunFolder, given: dict[str, Any]) -> Recipe:
    """The recipe of the run in `folder`; raises UserError if `given` (settings typed by the user) contradict it."""
    record = folder.read_run()
    recipe = Recipe.from_dict(record["recipe"])
    recipe.output = str(folder.path)
    for name, value in given.items():
        if name in RESUME_MAY_CHANGE:
            setattr(recipe, name, value)
        elif name == "lr" and value == settings.AUTO and "rate_search" in record:
            continue  # found when the run began
        elif (_absolute(value) if name in PATHS else value) != getattr(recipe, name):
            raise UserError(
                f"--resume continues a run with {name} = {getattr(recipe, name)!r}, but {value!r} is given now; "
                "leave it out, or start a new run in another --output"
            )
    recipe.__post_init__()  # what is given now may contradict what was
    return recipe


def _absolute(path: str | None) -> str | None:
    """A path that exists, whole, so that it is the same from every folder; anything else is a name of the hub."""
    return os.path.abspath(Path(path).expanduser()) if path and Path(path).expanduser().exists() else path


def finetune(recipe: Recipe, folder: RunFolder, hooks: Hooks, *, record_gradients: int = 0) -> Result:
    """Runs (or resumes) `recipe` in `folder`.

    Raises UserError for input that cannot be used, before anything is written, and TrainingFailed when
    training itself breaks; checkpoints and metrics up to then are kept.
    """
    ran_out: list[str] = []
    with contextlib.ExitStack() as stack:
        together = processes.start(recipe.device)
        if not together.first:
            hooks = Hooks()
        with together.together():
            if together.first:
                stack.enter_context(folder.locked(hooks.say))
        while True:
            try:
                return _attempt(recipe, folder, hooks, ran_out, together, record_gradients if together.first else 0)
            except retry.OutOfMemory as error:
                retry.release(error)
                # Of several processes one alone cannot change what all of them compute.
                able = recipe.retry and together.count == 1
                following = retry.following(error.attempt) if able else None
                if following is None:
                    raise TrainingFailed(f"{error}: {retry.advice(error.attempt)}") from error
                recipe, how = following
                ran_out.append(f"{error}; {how}")
                hooks.say(f"warning: {ran_out[-1]}")
                if error.attempt.begun:
                    folder.go_on()
            except RuntimeError as error:
                if not processes.lost(error):
                    raise
                raise TrainingFailed("another process of this run has ended; its own message says why") from error


def _attempt(
    recipe: Recipe,
    folder: RunFolder,
    hooks: Hooks,
    ran_out: list[str],
    together: processes.Processes,
    record_gradients: int,
) -> Result:
    """A frame of its own, so that `retry.release` reaches what an attempt holds."""
    with together.together():
        run = _Run(recipe, folder, hooks, ran_out, together)
    return run.go(record_gradients)


def dry_run(recipe: Recipe, folder: RunFolder, hooks: Hooks) -> dict[str, Any]:
    """What `recipe` would do: plan, statistics and the first sequences; nothing is loaded or written.

    Raises UserError for what `finetune` would refuse before it loads the model.
    """
    run = _Run(recipe, folder, hooks, [])
    run._look()
    run._read()
    return preview.of(run.rows, run.tokens, recipe, run.tokenizer, packed=run.data.packed) | {
        "plan": run.plan.to_dict(),
        "recipe": recipe.to_dict(),
        "warnings": [str(loss) for loss in run.data.losses],
    }


class _Run:
    """One run; its methods are its stages, in order."""

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        hooks: Hooks,
        ran_out: list[str],
        together: processes.Processes = processes.Processes(),  # noqa: B008 (frozen: one process)
    ) -> None:
        """`ran_out` has a sentence for each attempt that ran out of memory and is not in run.json yet."""
        self.recipe = recipe
        self.processes = together
        self.ran_out = ran_out
        self.folder = folder
        self.hooks = hooks
        self.saved = folder.read_run() if folder.resuming else None
        if self.saved is not None and self.saved.get("status") == "finished":
            raise UserError(
                f"the run in {folder.path} is finished (step {self.saved['result']['step']}); nothing to resume"
            )
        recipe.data, recipe.eval_data = str(_absolute(recipe.data)), _absolute(recipe.eval_data)

    def go(self, record_gradients: int) -> Result:
        self._look()
        with self.processes.together():
            self._read()
        try:
            self._load()
        except Exception as error:
            if not memory.ran_out(error):
                raise
            raise self._out_of_memory("before training", error, begun=self.folder.resuming) from error
        self.run = self.processes.from_first(self._begin)
        with self.processes.together():
            if not self.folder.run_json.is_file():
                raise UserError(f"{self.folder.path} is not on storage that all machines of this run share")
        return self._train(record_gradients)

    def _look(self) -> None:
        """The device, and the smallest card of all processes, for which all of them plan."""
        with self.processes.together():
            self.device = load.device_of(self.recipe)
            card = memory.card_of(self.recipe, self.device, self.processes.local)
        self.card = min(self.processes.gather(card), key=lambda each: each.usable_bytes())

    def _out_of_memory(self, when: str, error: Exception, *, begun: bool) -> retry.OutOfMemory:
        attempt = retry.Attempt(self.recipe, self.shape, self.plan, self.device, self.dtype, begun)
        return retry.OutOfMemory(when, attempt, error)

    def _read(self) -> None:
        """Config, tokenizer, data and plan: all that can be known without the weights."""
        recipe, say = self.recipe, self.hooks.say
        require_reporter(recipe.report_to)
        if self.processes.count > 1:
            self._share()
        self.dtype = selftest.trusted(load.dtype_of(recipe, self.device), self.device, recipe.dtype, say)
        for note in full.check(recipe, self.dtype):
            say(note)
        self.config = load.config_of(recipe)
        limit = load.max_length_of(self.config)
        if limit is not None and recipe.max_seq_length is not None and recipe.max_seq_length > limit:
            raise UserError(f"--max-seq-length {recipe.max_seq_length} is beyond the {limit} tokens of {recipe.model}")
        if limit is not None and recipe.sample_tokens >= limit:
            raise UserError(
                f"--sample-tokens {recipe.sample_tokens} is beyond the {limit} tokens of {recipe.model}, of which the "
                "prompt needs some too; give less"
            )
        self.tokenizer = load.tokenizer_of(recipe, self.config)
        self.data = data_module.load(
            recipe.data,
            eval_source=recipe.eval_data,
            eval_fraction=recipe.eval_fraction,
            max_eval_samples=recipe.max_eval_samples,
            seed=recipe.seed,
            subset=recipe.subset,
            split=recipe.split,
            chat=recipe.chat_template and self.tokenizer.chat_template is not None,
        )
        data = self.data
        if self.saved is not None and self.saved["data_sha256"] != data.fingerprint:
            raise UserError(
                f"{recipe.data} has changed since the run in {self.folder.path} began; --resume needs the same data"
            )
        say(f"data: {len(data.train)} records to train on, {len(data.held_out)} held out ({data.form})")
        self.tokens = [data_module.tokenize(part, self.tokenizer) for part in (data.train, data.held_out)]
        rows = self.config.get_text_config().vocab_size
        if (highest := max(int(t.ids.max(initial=0)) for part in self.tokens for t in part)) >= rows:
            raise UserError(
                f"the tokenizer of {recipe.model} gives token {highest} for this data, and the model knows tokens "
                f"below {rows} only: tokenizer and model do not belong together"
            )
        needed = sys.maxsize if data.packed else data_module.longest(self.tokens[0])
        # The plan is made from the plain shape; how a checkpoint is quantized already is in the recipe by now.
        shape = copy.deepcopy(self.config)
        shape.__dict__.pop("quantization_config", None)
        self.shape = shape
        self.plan = memory.make_plan(
            recipe, shape, self.device, self.dtype, limit or needed, needed, self.card, self.processes.count
        )
        for line in memory.describe(self.plan, recipe):
            say(line)
        if self.processes.count > 1:
            part = recipe.batch_size // self.processes.count
            say(f"  on each of {self.processes.count} devices, of every step's sequences {part}")
        if recipe.vram_bytes is not None and self.device.type == "cpu":
            say("note: the budget is planned with; on a CPU nothing keeps the process to it")
        self._fit(limit)
        memory.limit(recipe, self.device)

    def _share(self) -> None:
        """Raises UserError for what several processes cannot do together."""
        recipe, count = self.recipe, self.processes.count
        odd = {
            "--method full": recipe.method == "full",
            f"--layerwise {recipe.layerwise}": recipe.layerwise != "none",
            "--lr auto": recipe.lr == settings.AUTO,
            "--eval-steps": recipe.eval_steps is not None,
        }
        if any(odd.values()):
            flag = next(flag for flag, given in odd.items() if given)
            raise UserError(f"{flag} is for one process, and these are {count}; leave out one of the two")
        part, rest = divmod(recipe.batch_size, count)
        if rest or part % (recipe.micro_batch_size or 1):
            raise UserError(
                f"--batch-size {recipe.batch_size} cannot be divided among {count} processes in micro-batches of "
                f"{recipe.micro_batch_size or 1}; give a multiple of their product"
            )

    def _fit(self, limit: int | None) -> None:
        """Cuts the tokens to the sequence length; raises UserError when it leaves nothing, says what it costs."""
        length = sys.maxsize if self.data.packed else self.recipe.max_seq_length  # the trainer fills packed sequences
        assert length is not None, "the plan decides the sequence length first"
        self.rows: list[data_module.Rows] = []
        self.lengths: dict[str, int] = {}
        for name, tokens in zip(("training", "held-out"), self.tokens, strict=True):
            rows, cut = data_module.fit(tokens, length)
            if not rows:
                advice = "shorten the prompts, the model takes no more" if length == limit else "give a larger one"
                raise UserError(
                    f"--max-seq-length {length} leaves no token of an answer in any {name} record; {advice}"
                )
            dropped = len(tokens) - len(rows)
            self.rows.append(rows)
            self.lengths = self.lengths or {"cut": cut, "dropped": dropped, **data_module.token_statistics(rows)}
            for count, what in (
                (dropped, f"left out: their prompt alone fills the {length} tokens"),
                (cut, f"cut at {length} tokens"),
            ):
                if count:
                    self.data.losses.append(data_module.Loss(count, len(tokens), f"{name} records are {what}"))
        for loss in self.data.losses:
            self.hooks.say(str(loss))

    def _load(self) -> None:
        """The model, tried out and evaluated; what of an earlier part of the run is whole."""
        recipe, say = self.recipe, self.hooks.say
        self.checkpoint, faults = None, []
        if self.folder.resuming:
            self.checkpoint, faults = self.processes.from_first(self.folder.intact_checkpoint)
        for fault in faults:
            say(f"warning: {fault}; going on from the one before")
        with self.processes.together():
            self._load_model()
        # Imported here: TRL takes seconds, and everything above can already have refused the input.
        from cruxy_triton.finetune.train import Trainer

        self.trainer: Any = Trainer(
            self.model, self.tokenizer, self.rows, recipe, self.folder, self.dtype, packed=self.data.packed,
            processes=self.processes,
        )  # fmt: skip
        self.lengths["sequences"] = self.trainer.sequences
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.trainable = sum(p.numel() for p in self.parameters)
        self.dtype_name = "nf4" if recipe.load_in_4bit else str(self.dtype).removeprefix("torch.")
        say(
            f"model: {recipe.model}, {self.dtype_name} on {self.device} ({self.weights}); {self.trainable:,} trainable "
            f"parameters in {len(self.parameters)} {'' if recipe.method == 'full' else 'adapter '}tensors"
        )
        if recipe.guard == "act" and not full.keeps_snapshots(recipe, self.parameters):
            size = full.copy_bytes(recipe, self.parameters)[1]
            say(
                f"note: the guard keeps no snapshots of {size / memory.MIB:,.0f} MiB each: it clips, skips, lowers the "
                "rate and stops, but does not go back; --resume does, to a checkpoint"
            )
        with self.processes.together():
            for note in self.trainer.try_out():
                say(note)
        if self.saved is not None and "before" in self.saved:
            return
        say(f"evaluating on {len(self.trainer.eval_dataset)} held-out sequences before training")
        self.before = self.trainer.held_out()
        if not math.isfinite(self.before["loss"]):
            wider = "--dtype float32" if self.dtype is not torch.float32 else "another copy of the model"
            raise UserError(
                f"the loss of {recipe.model} is {self.before['loss']} before any training: its weights hold no "
                f"numbers, or overflow in {self.dtype_name}; try {wider}"
            )
        self.samples = self._samples()
        self.rate_search = self._find_rate() if recipe.lr == settings.AUTO else None

    def _find_rate(self) -> dict[str, Any]:
        from cruxy_triton.finetune import rate

        found = rate.search(
            self.model, self.tokenizer, self.rows[0], self.recipe, self.dtype, packed=self.data.packed,
            sequences=self.lengths["sequences"], say=self.hooks.say,
        )  # fmt: skip
        self.recipe.lr = found["lr"]
        return found

    def _load_model(self) -> None:
        recipe = self.recipe
        attention = load.use_attention(recipe.attention, self.device)
        whole = recipe.method == "full"  # then a checkpoint has all weights
        base, self.weights = load.model_of(
            recipe, self.config, self.device, self.dtype, attention, self.checkpoint if whole else None
        )
        if self.weights.beyond:
            self.hooks.say(memory.larger(self.plan, recipe, self.weights.beyond))
        self.model = base.requires_grad_(True) if whole else load.add_lora(base, recipe)

    def _begin(self) -> dict[str, Any]:
        """The first process makes the folder; what the run is, for all of them."""
        recipe, folder = self.recipe, self.folder
        copies = COPIES_IN_CHECKPOINTS
        copies += COPIES_IN_SNAPSHOTS if full.keeps_snapshots(recipe, self.parameters) else 0
        best = COPIES_IN_CHECKPOINTS + 1 if self.trainer.best.keeps else 0
        result, copy_bytes = full.copy_bytes(recipe, self.parameters)
        folder.begin((1 + best) * result + copies * copy_bytes)
        data, device = self.data, self.device
        self.run: dict[str, Any] = self.saved or {
            "status": "running",
            "recipe": recipe.to_dict(),
            "lr": recipe.lr,
            "data_sha256": data.fingerprint,
            "records": {
                "train": len(data.train),
                "held_out": len(data.held_out),
                "form": data.form,
                "asked": data.asked,
                **self.lengths,
            },
            "warnings": [str(loss) for loss in data.losses],
            "trainable_parameters": self.trainable,
            "weights": {"total": self.weights.total, "quantized": self.weights.quantized},
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
            "dtype": self.dtype_name,
            "processes": self.processes.count,
            "plan": self.plan.to_dict(),
            "versions": versions(),
            "command": sys.argv,
        }
        if self.ran_out:
            self.run.setdefault("out_of_memory", []).extend(self.ran_out)
            self.ran_out.clear()
        if folder.resuming:
            self.run |= {"recipe": recipe.to_dict(), "plan": self.plan.to_dict()}
            self.run.pop("stopped", None)
            self.run.setdefault("resumed_at_steps", []).append(self._saved_step)
            folder.drop_after(self.checkpoint)
            self.hooks.say(f"resuming at step {self._saved_step} of the run in {folder.path}")
        if folder.replaces:
            self.hooks.say(f"the earlier run is kept in {folder.previous} until this one is finished")
        if "before" not in self.run:
            self.run |= {"before": self.before, "samples": self.samples}
            if self.rate_search is not None:
                self.run["rate_search"] = self.rate_search
        folder.write_run(self.run, "running")
        if recipe.guard != "off":
            with files.writing(folder.events):
                folder.events.touch()
        return self.run

    @property
    def _saved_step(self) -> int:
        return 0 if self.checkpoint is None else step_of(self.checkpoint)

    def _train(self, record_gradients: int) -> Result:
        from cruxy_triton.finetune.best import Evaluation
        from cruxy_triton.finetune.paging import watch
        from cruxy_triton.finetune.train import GradientRecorder, Interruption, Telemetry

        run, folder, trainer = self.run, self.folder, self.trainer
        interruption = Interruption(self.hooks.say, self.processes)
        telemetry = Telemetry(trainer, self.hooks.progress)
        evaluation = Evaluation(trainer, telemetry, self.hooks.say)
        trainer.add_callback(telemetry)
        trainer.add_callback(evaluation)
        trainer.add_callback(interruption)
        for callback in watch(self.device, self.hooks.say):
            trainer.add_callback(callback)
        if record_gradients:
            trainer.add_callback(GradientRecorder(trainer, record_gradients))
        status = "failed"
        try:
            with interruption.installed():
                if not folder.read_metrics():
                    telemetry.write({"step": 0, "eval_loss": run["before"]["loss"]})
                with contextlib.suppress(TrainingStopped):  # `_conclude` says why
                    if self.checkpoint is None or not trainer.restore_if_trained(self.checkpoint):
                        trainer.train(resume_from_checkpoint=None if self.checkpoint is None else str(self.checkpoint))
                interruption.training = False
                if interruption.number is None:
                    status = self._conclude(evaluation)
        except KeyboardInterrupt:
            if interruption.number is None:
                raise
        except files.WriteFailed as error:
            raise TrainingFailed(f"{error}; make room and continue with --resume --output {folder.path}") from error
        except Exception as error:
            if not memory.ran_out(error):
                raise
            status, at = "out of memory", trainer.state.global_step
            when = f"at step {at + 1}" if at < trainer.state.max_steps or not at else "after training"
            raise self._out_of_memory(when, error, begun=True) from error
        finally:
            if interruption.number is not None and status == "failed":
                status = "interrupted"
            if status not in ENDED and self.processes.first:
                with contextlib.suppress(files.WriteFailed):  # the disk may be full
                    folder.write_run(run, status)
        if interruption.number is not None and status == "interrupted":
            saved, _ = folder.intact_checkpoint()
            step = 0 if saved is None else step_of(saved)
            return Result(folder.path, False, step, run["before"], None, [], interruption.number)
        if status == "stopped":
            result = "Model" if self.recipe.method == "full" else "Adapter"
            raise TrainingFailed(f"{run['stopped']} {result} and report are in {folder.path}")
        if status == "diverged":
            raise TrainingFailed(f"the held-out loss is not finite after training; see {folder.path / 'report.md'}")
        result = run["result"]
        return Result(folder.path, True, result["step"], result["before"], result["after"], run["samples"])

    def _conclude(self, evaluation: Any) -> str:
        """Evaluation, result and report; returns the run's last status."""
        run, folder, trainer = self.run, self.folder, self.trainer
        guard = trainer.guard
        if guard is not None:
            self.hooks.say(guard.finish())
        step = trainer.state.global_step
        after = evaluation.conclude(step)
        answers = self._answers(len(run["samples"]))
        if not self.processes.first:
            run |= self.processes.from_first(dict)
            return run["status"]
        run["samples"] = [{**sample, "after": text} for sample, text in zip(run["samples"], answers, strict=False)]
        status = "finished" if math.isfinite(after["loss"]) else "diverged"
        if guard is not None and guard.stopped is not None:
            status, run["stopped"] = "stopped", guard.stopped.partition("\n")[0]
        rows = [row for row in folder.read_metrics() if "seconds" in row]
        skipped = sum(row.get("skipped", 0) for row in rows)
        if status == "finished" and len(rows) - skipped < MIN_APPLIED * len(rows):
            lower = "--lr" if self.recipe.method == "full" else "--lora-alpha or --lr"
            status, run["stopped"] = "stopped", (
                f"{skipped} of {len(rows)} steps were skipped, because their loss or gradients were not finite or far "
                f"out, so that next to nothing was learned; lower {lower}, or give --dtype float32."
            )
        run["result"] = {
            "step": step,
            "epochs": trainer.state.epoch,
            "before": run["before"],
            "after": after,
            "seconds": sum(row["seconds"] for row in rows),
            "tokens": sum(row["tokens"] for row in rows),
            **memory.measured(self.device),
        }
        if trainer.best.count:
            run["result"]["best"] = trainer.best.record()
        if guard is not None:
            run["result"]["guard"] = {
                "mode": self.recipe.guard,
                "actions": guard.log.actions(),
                "regimes": dict(Counter(row["regime"] for row in rows)),
                "lr_factor": guard.lr_factor,
                "events": [event.line() for event in guard.log if event.kind != guard_events.REGIME],
            }
        with files.writing(folder.path):
            report.save(self.model, self.tokenizer, folder, run)
            memory.draw(folder.path / report.CHART, self.plan, self.shape, self.card, run["result"])
            report.write(folder, {**run, "status": status})
        folder.write_run(run, status)
        if status == "finished":
            trainer.best.clear()
            folder.finish()
        self.processes.from_first(lambda: run)
        return status

    def _prompt(self, index: int) -> list[int]:
        """The ids of a held-out prompt, as far as there is room beside an answer."""
        tokens = self.tokens[1][index]
        room = (load.max_length_of(self.config) or 2048) - self.recipe.sample_tokens
        if self.data.packed:
            return tokens.ids[: min(TEXT_PROMPT_TOKENS, room)].tolist()
        return tokens.ids[: max(1, tokens.prompt)][-room:].tolist()

    def _answers(self, count: int) -> list[str]:
        """The model's answers to the first `count` held-out prompts; none, and a note, where generating fails: no
        reason to stop a training."""
        if not self.recipe.sample_tokens:
            return []
        try:
            return [self.trainer.generate(self._prompt(i), self.recipe.sample_tokens) for i in range(count)]
        except Exception as error:
            if memory.ran_out(error):
                raise
            first_line = str(error).strip().partition("\n")[0]
            self.hooks.say(f"note: no samples, because generating fails ({type(error).__name__}: {first_line})")
            return []

    def _samples(self) -> list[dict[str, str]]:
        answers = self._answers(min(self.recipe.samples, len(self.data.held_out)))
        found = []
        for index, (before, record) in enumerate(zip(answers, self.data.held_out, strict=False)):
            prompt = self.tokenizer.decode(self._prompt(index)) if "text" in record else _text(record["prompt"])
            found.append({"prompt": prompt, "expected": _text(record.get("completion", "")), "before": before})
        return found


def _text(part: Any) -> str:
    """The text of a prompt or completion, of a conversation that of its last message."""
    return part if isinstance(part, str) else part[-1]["content"]
