"""The output folder of a run: what lies in it, and the rules that keep earlier output safe.

    run.json       settings, versions, seed, plan and results      metrics.jsonl  one line per step or evaluation
    adapter/       the LoRA adapter, loadable with peft            report.md, plot.png
    model/         in its place with --method full: the model, loadable with transformers
    checkpoints/   checkpoint-<step>, the newest two               gradients/     with --record-gradients
    events.jsonl   what the guard saw and did                      snapshots/     what it goes back to, until the end

The folder's state is `status` in run.json:

    (absent) --begin--> running --> finished, diverged, or stopped by the guard
                        |    ^
                        v    | --resume (after `out of memory` also by itself)
                   interrupted, out of memory, failed (or running still, when the process was killed)

A folder belongs to one process at a time (`locked`). `begin` comes when nothing can refuse the input any more;
until then an earlier run stays where it is. With --overwrite it moves to <output>.previous then, in plain sight,
and goes when the new run is finished. How a checkpoint is written, kept and known to be whole: `guard/checkpoints.py`.
"""

import contextlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cruxy_triton import files
from cruxy_triton.errors import UserError
from cruxy_triton.guard import checkpoints

KEPT_CHECKPOINTS = 2
MIB = 1 << 20


class RunFolder:
    """One run's folder. Nothing is created or moved before `begin`, but for the lock."""

    def __init__(self, path: str | os.PathLike[str], *, overwrite: bool = False, resume: bool = False) -> None:
        """Checks that the run may use `path`; raises UserError where it may not."""
        self.path = Path(path).expanduser().absolute()
        self.previous = self.path.with_name(f"{self.path.name}.previous")
        self.resuming = resume
        self._overwrite = overwrite
        if not self.path.name:
            raise UserError(f"output {str(path)!r} is no folder that a run could have for itself; give another")
        if overwrite and resume:
            raise UserError("--overwrite and --resume exclude each other; give one")
        self._check()
        self.replaces = resume and bool(_record(self.path).get("replaces"))

    def _check(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"output {self.path} is a file; give a folder")
        occupied = self._occupied
        if self.resuming:
            if not self.run_json.is_file():
                raise UserError(f"{self.path} holds no run to resume (no run.json)")
        elif occupied and not self._overwrite:
            raise UserError(f"output folder {self.path} is not empty; give --overwrite, --resume or another --output")
        elif occupied and not self.run_json.is_file():
            raise UserError(
                f"output folder {self.path} holds files but no run.json; --overwrite only replaces an earlier run"
            )
        elif occupied and self.previous.exists() and not _record(self.path).get("replaces"):
            raise UserError(f"{self.previous} is in the way: --overwrite keeps the earlier run there; move it away")
        first = self.path.parent if self._overwrite and occupied else self.path
        parent = next(p for p in (first, *first.parents) if p.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise UserError(f"output folder {self.path} is not writable (no permission in {parent})")

    @property
    def _occupied(self) -> bool:
        """Whether there is any file; a run that was killed while it began leaves empty folders."""
        return self.path.is_dir() and any(p.is_file() and p.name != ".lock" for p in self.path.rglob("*"))

    @property
    def run_json(self) -> Path:
        return self.path / "run.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def snapshots(self) -> Path:
        return self.path / "snapshots"

    def trained(self, method: str) -> Path:
        """Where the result goes of a run that trains adapters ("lora") or every weight ("full")."""
        return self.path / {"lora": "adapter", "full": "model"}[method]

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @contextmanager
    def locked(self, say: Callable[[str], None] = lambda line: None) -> Iterator[None]:
        """Keeps other processes out of the folder; raises UserError, with the number of the one that has it."""
        made = [p for p in self.path.parents if not p.exists()]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Beside the folder, because --overwrite moves the folder; inside where only the folder is writable.
        beside = os.access(self.path.parent, os.W_OK)
        place = self.path.with_name(f".{self.path.name}.lock") if beside else self.path / ".lock"
        with contextlib.ExitStack() as stack:
            stack.callback(_remove_empty, made)
            try:
                stack.enter_context(files.lock(place, f"process {os.getpid()} on {socket.gethostname()}"))
            except files.Locked as error:
                raise UserError(
                    f"another run is writing to {self.path} ({error}); wait for its end or give another --output"
                ) from None
            except OSError as error:
                say(f"note: {place.parent} cannot be locked ({error.strerror}); let no other run write to {self.path}")
            self._check()  # again: a run may have begun or ended here since the first look
            yield

    def begin(self, needed_bytes: int = 0) -> None:
        """Creates the folder; an earlier run there (--overwrite) is set aside until `finish`, and `replaces` says so.

        `needed_bytes` is what the run will write; raises UserError where the disk has less.
        """
        existing = next(p for p in (self.path, *self.path.parents) if p.exists())
        free = shutil.disk_usage(existing).free
        if self.resuming:  # what lies there already is part of what is needed
            free += sum(p.stat().st_size for p in self.path.rglob("*") if p.is_file())
        if free < needed_bytes:
            raise UserError(
                f"{self.path} needs about {needed_bytes / MIB:,.0f} MiB for checkpoints and results, and the disk has "
                f"{free / MIB:,.0f} MiB free; make room or give another --output"
            )
        try:
            if self._overwrite and self._occupied:
                # Two runs lie here after an overwrite that was itself cut off: a finished one is worth more.
                earlier, last = (_record(p).get("status") == "finished" for p in (self.previous, self.path))
                if earlier and not last:
                    shutil.rmtree(self.path)
                else:
                    shutil.rmtree(self.previous, ignore_errors=True)
                    self.path.rename(self.previous)
                self.replaces = True
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"output folder {self.path} cannot be created: {error.strerror}") from None
        for leftover in self.checkpoints.glob(".partial*"):
            shutil.rmtree(leftover, ignore_errors=True)
        checkpoints.checkpoints(self.checkpoints)  # puts back one that a crash left aside

    def go_on(self) -> None:
        """From now on the run that `begin` began is continued."""
        self.resuming, self._overwrite = True, False

    def finish(self) -> None:
        """Called when the run is finished: removes what only a resumed one needs, and what --overwrite set aside."""
        shutil.rmtree(self.snapshots, ignore_errors=True)
        if self.replaces:
            shutil.rmtree(self.previous, ignore_errors=True)

    def read_run(self) -> dict[str, Any]:
        try:
            run = json.loads(self.run_json.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{self.run_json} cannot be read: {error}") from None
        if not isinstance(run, dict) or not isinstance(run.get("recipe"), dict):
            raise UserError(f"{self.run_json} holds no recipe; it was not written by `cruxy-triton finetune`")
        return run

    def write_run(self, run: dict[str, Any], status: str) -> None:
        run |= {"status": status, "replaces": self.replaces}
        with files.writing(self.run_json):
            files.write_json(self.run_json, run)

    def intact_checkpoint(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint that is as it was written, and a line for each newer one that is not.

        Raises UserError when there are checkpoints and none is whole.
        """
        checkpoint, damaged = checkpoints.newest_good(self.checkpoints)
        faults = [f"{path} is damaged ({fault})" for path, fault in damaged]
        if checkpoint is None and faults:
            raise UserError(f"no checkpoint is whole: {'; '.join(faults)}; start the run anew with --overwrite")
        return checkpoint, faults

    def drop_after(self, checkpoint: Path | None) -> None:
        """Removes what a run resumed from `checkpoint` computes again: damaged checkpoints, metrics of later steps.

        The final evaluation is always done again. Without a checkpoint only the evaluation before training stays. The
        guard's events are in the checkpoint.
        """
        step = 0 if checkpoint is None else checkpoints.step_of(checkpoint)
        for later in checkpoints.checkpoints(self.checkpoints):
            if checkpoints.step_of(later) > step:
                shutil.rmtree(later, ignore_errors=True)
        kept = [row for row in self.read_metrics() if row["step"] <= step and not row.get("final")]
        files.write_text(self.metrics, "".join(json.dumps(row) + "\n" for row in kept))
        if checkpoint is None:
            self.events.unlink(missing_ok=True)

    def keep_checkpoint(self, written: Path) -> None:
        """Moves a complete checkpoint into place; of the older good ones the newest stays."""
        checkpoints.keep_checkpoint(written, self.checkpoints, checkpoints.step_of(written), keep=KEPT_CHECKPOINTS)

    def read_metrics(self) -> list[dict[str, Any]]:
        """All rows of metrics.jsonl; a last line cut by a kill is left out."""
        if not self.metrics.is_file():
            return []
        rows = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
        return rows


def _record(folder: Path) -> dict[str, Any]:
    """The content of run.json; empty where there is none that can be read."""
    try:
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:  # the deepest first
        with contextlib.suppress(OSError):
            folder.rmdir()
