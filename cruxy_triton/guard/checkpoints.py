"""Checkpoints that survive: a folder per step, written aside, synchronised to the disk, sealed, moved into place.

    FOLDER/checkpoint-STEP/NAME.pt

A folder without its checksums (`files.seal`), or whose files do not agree with them, is damaged; `newest_good` names
it and takes the one before. Old folders are removed only after the new one was read back and found good, and never
the last good one. The names are those of the Hugging Face Trainer.
"""

import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from cruxy_triton import files

_NAME = re.compile(r"checkpoint-(\d+)$")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or none can be read; what was on the disk before is unchanged."""


def save_checkpoint(folder: str | os.PathLike[str], step: int, objects: dict[str, Any], *, keep: int = 2) -> Path:
    """Write FOLDER/checkpoint-STEP, one `NAME.pt` per object; returns its path.

    Args:
        folder: made where it does not exist.
        step: number in the folder's name; an existing checkpoint of that step is replaced.
        objects: name to whatever `torch.save` takes (state_dicts).
        keep: how many good checkpoints stay; older ones are removed.

    Raises:
        CheckpointError: it could not be written (a full disk); the checkpoints that were there are unchanged.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}; expected at least 1: the last good checkpoint is never removed")
    folder = Path(folder)
    temporary = folder / f".checkpoint-{step}.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        for name, value in objects.items():
            torch.save(value, temporary / f"{name}.pt")
        return keep_checkpoint(temporary, folder, step, keep=keep)
    except (OSError, RuntimeError) as error:  # torch.save reports a failing write as a RuntimeError
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"checkpoint {step} could not be written to {folder} ({error}); the checkpoints before it are unchanged. "
            "Make room or choose another folder"
        ) from error


def keep_checkpoint(written: Path, folder: Path, step: int, *, keep: int) -> Path:
    """Seal `written`, a folder with all that belongs to a checkpoint, and move it to FOLDER/checkpoint-STEP.

    It is read back before anything older goes: another checkpoint of that step, and all but the newest `keep` good
    ones. `written` is on the same disk, under a name that no checkpoint has. Raises OSError where the disk does not
    take it; the checkpoints that were there are unchanged.
    """
    files.seal(written)
    fault = files.damage(written)
    if fault is not None:
        raise OSError(fault)
    target = folder / f"checkpoint-{step}"
    old = folder / f".checkpoint-{step}.old"
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    written.rename(target)
    files.sync(folder)
    shutil.rmtree(old, ignore_errors=True)
    _rotate(folder, keep)
    return target


def load_checkpoint(
    folder: str | os.PathLike[str], *, map_location: Any = "cpu", weights_only: bool = True
) -> tuple[int, dict[str, Any], list[str]]:
    """The newest good checkpoint of a folder: (step, objects by name, what was found damaged).

    Raises:
        CheckpointError: there is none that can be read; the message names what is wrong with each.
    """
    path, faults = newest_good(folder)
    damaged = [f"{bad.name} is damaged ({fault})" for bad, fault in faults]
    if path is None:
        found = "; ".join(damaged) if damaged else "no checkpoint-STEP folder in it"
        raise CheckpointError(f"{folder}: no good checkpoint ({found})")
    objects = {
        file.stem: torch.load(file, map_location=map_location, weights_only=weights_only)
        for file in sorted(path.glob("*.pt"))
    }
    return step_of(path), objects, damaged


def newest_good(folder: str | os.PathLike[str]) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest checkpoint that agrees with its checksums; each newer one, and what is wrong with it."""
    damaged: list[tuple[Path, str]] = []
    for path in reversed(checkpoints(folder)):
        fault = files.damage(path)
        if fault is None:
            return path, damaged
        damaged.append((path, fault))
    return None, damaged


def checkpoints(folder: str | os.PathLike[str]) -> list[Path]:
    """The checkpoint folders, oldest first; one that a crash left aside while it was replaced is put back."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    for old in folder.glob(".checkpoint-*.old"):
        if not _replaced(old).exists():
            old.rename(_replaced(old))
    found = [path for path in folder.iterdir() if path.is_dir() and _NAME.match(path.name)]
    return sorted(found, key=step_of)


def _replaced(old: Path) -> Path:
    return old.with_name(old.name[1 : -len(".old")])


def step_of(path: Path) -> int:
    match = _NAME.match(path.name)
    if match is None:
        raise ValueError(f"{path} is not a checkpoint-STEP folder")
    return int(match[1])


def _rotate(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` good checkpoints; damaged ones older than those go as well."""
    good = 0
    for path in reversed(checkpoints(folder)):
        if good >= keep:
            shutil.rmtree(path, ignore_errors=True)
        elif files.damage(path) is None:
            good += 1
    for leftover in folder.glob(".checkpoint-*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    for old in folder.glob(".checkpoint-*.old"):  # a crash came between the replacing and the removing
        if files.damage(_replaced(old)) is None:
            shutil.rmtree(old, ignore_errors=True)
