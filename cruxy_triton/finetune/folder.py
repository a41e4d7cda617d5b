"""The output folder of a run: what lies in it, and the rules that keep earlier output safe.

    run.json       settings, versions, seed, plan and results      metrics.jsonl  one line a step or evaluation
    adapter/       the LoRA adapter, loadable with peft            report.md, plot.png
    checkpoints/   checkpoint-<step>, the newest two               gradients/     with --record-gradients

A checkpoint is written under another name and moved into place, so each one that is there is complete.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from cruxy_triton import files
from cruxy_triton.errors import UserError

KEPT_CHECKPOINTS = 2


class RunFolder:
    """One run's folder. Nothing is created or moved before `begin`."""

    def __init__(self, path: str | os.PathLike[str], *, overwrite: bool = False, resume: bool = False) -> None:
        """Checks that the run may use `path`; raises UserError where it may not."""
        self.path = Path(path).expanduser().absolute()
        self.resuming = resume
        self._previous = self.path.with_name(f".{self.path.name}.previous")
        if overwrite and resume:
            raise UserError("--overwrite and --resume exclude each other; give one")
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"output {self.path} is a file; give a folder")
        occupied = self.path.is_dir() and any(self.path.iterdir())
        if resume:
            if not self.run_json.is_file():
                raise UserError(f"{self.path} holds no run to resume (no run.json)")
        elif occupied and not overwrite:
            raise UserError(f"output folder {self.path} is not empty; give --overwrite, --resume or another --output")
        elif occupied and not self.run_json.is_file():
            raise UserError(
                f"output folder {self.path} holds files but no run.json; --overwrite only replaces an earlier run"
            )
        self._must_replace = occupied and overwrite
        parent = next(p for p in (self.path, *self.path.parents) if p.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise UserError(f"output folder {self.path} is not writable (no permission in {parent})")

    @property
    def run_json(self) -> Path:
        return self.path / "run.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def begin(self) -> None:
        """Creates the folder; an earlier run there (--overwrite) is set aside until `finish`."""
        try:
            if self._must_replace:
                if self._previous.exists():
                    # Left by an overwrite that was itself interrupted: what lies at `path` is newer but unfinished,
                    # so the one set aside stays the earlier output and the unfinished one goes.
                    shutil.rmtree(self.path)
                else:
                    self.path.rename(self._previous)
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"output folder {self.path} cannot be created: {error.strerror}") from None
        for leftover in self.checkpoints.glob(".partial*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def finish(self) -> None:
        """Called when the new output is complete: removes what --overwrite had set aside."""
        shutil.rmtree(self._previous, ignore_errors=True)

    def read_run(self) -> dict[str, Any]:
        try:
            run = json.loads(self.run_json.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{self.run_json} cannot be read: {error}") from None
        if not isinstance(run, dict) or not isinstance(run.get("recipe"), dict):
            raise UserError(f"{self.run_json} holds no recipe; it was not written by `cruxy-triton finetune`")
        return run

    def newest_checkpoint(self) -> Path | None:
        return max(self._checkpoints(), key=_step, default=None)

    def _checkpoints(self) -> list[Path]:
        return [p for p in self.checkpoints.glob("checkpoint-*") if p.name.partition("-")[2].isdecimal()]

    def keep_checkpoint(self, written: Path) -> None:
        """Moves a complete checkpoint into place and removes all but the newest two."""
        target = self.checkpoints / written.name
        if target.exists():  # the same step saved twice: on schedule and by an interruption
            shutil.rmtree(target)
        os.replace(written, target)
        for old in sorted(self._checkpoints(), key=_step)[:-KEPT_CHECKPOINTS]:
            shutil.rmtree(old, ignore_errors=True)

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

    def rewind_metrics(self, step: int) -> None:
        """Drops the rows of steps after `step`, which a resumed run computes again."""
        kept = [row for row in self.read_metrics() if row["step"] <= step]
        files.write_text(self.metrics, "".join(json.dumps(row) + "\n" for row in kept))


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.partition("-")[2])
