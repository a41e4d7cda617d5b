"""Checkpoints that survive: a folder per step, written aside, synchronised to the disk, checksummed, moved into place.

    FOLDER/checkpoint-STEP/{NAME.pt, ..., checksums.json}

A folder without `checksums.json`, or whose files do not agree with it, is damaged; `newest_good` names it and takes
the one before. Old folders are removed only after the new one was read back and found good, and never the last good.
The names are those of the Hugging Face Trainer, whose folders `seal` makes verifiable after the fact.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch

CHECKSUMS = "checksums.json"
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
    target = folder / f"checkpoint-{step}"
    temporary = folder / f".checkpoint-{step}.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        for name, value in objects.items():
            with (temporary / f"{name}.pt").open("wb") as file:
                torch.save(value, file)
                file.flush()
                os.fsync(file.fileno())
        seal(temporary)
        problems = verify(temporary)  # as the disk has it, before anything older goes
        if problems:
            raise OSError("; ".join(problems))
        old = folder / f".checkpoint-{step}.old"
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
        temporary.rename(target)
        _fsync_folder(folder)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, RuntimeError) as error:  # torch.save reports a failing write as a RuntimeError
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"checkpoint {step} could not be written to {folder} ({error}); the checkpoints before it are unchanged. "
            "Make room or choose another folder"
        ) from error
    _rotate(folder, keep)
    return target


def load_checkpoint(
    folder: str | os.PathLike[str], *, map_location: Any = "cpu", weights_only: bool = True
) -> tuple[int, dict[str, Any], list[str]]:
    """The newest good checkpoint of a folder: (step, objects by name, what was found damaged).

    Raises:
        CheckpointError: there is none that can be read; the message names what is wrong with each.
    """
    path, damaged = newest_good(folder)
    if path is None:
        found = "; ".join(damaged) if damaged else "no checkpoint-STEP folder in it"
        raise CheckpointError(f"{folder}: no good checkpoint ({found})")
    objects = {
        file.stem: torch.load(file, map_location=map_location, weights_only=weights_only)
        for file in sorted(path.glob("*.pt"))
    }
    return step_of(path), objects, damaged


def newest_good(folder: str | os.PathLike[str]) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that agrees with its checksums, and a sentence for each damaged one that is newer."""
    damaged: list[str] = []
    for path in reversed(checkpoints(folder)):
        problems = verify(path)
        if not problems:
            return path, damaged
        damaged.append(f"{path.name} is damaged: {', '.join(problems)}")
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


def seal(path: str | os.PathLike[str]) -> None:
    """Synchronise a folder's files to the disk and write `checksums.json` (SHA-256 and size of each)."""
    path = Path(path)
    files = {}
    for file in _files(path):
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
        files[file.relative_to(path).as_posix()] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
    temporary = path / f".{CHECKSUMS}.tmp"
    with temporary.open("w", encoding="utf-8") as handle:
        json.dump({"files": files}, handle, indent=1)
        handle.flush()
        os.fsync(handle.fileno())
    temporary.replace(path / CHECKSUMS)
    _fsync_folder(path)


def verify(path: str | os.PathLike[str]) -> list[str]:
    """What is wrong with a sealed folder, a phrase per file; an empty list where nothing is."""
    path = Path(path)
    try:
        files = json.loads((path / CHECKSUMS).read_text(encoding="utf-8"))["files"]
        expected = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except FileNotFoundError:
        return [f"{CHECKSUMS} is missing: it was not written to its end"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return [f"{CHECKSUMS} cannot be read"]
    problems = []
    for name, (size, digest) in expected.items():
        file = path / name
        if not file.is_file():
            problems.append(f"{name} is missing")
        elif file.stat().st_size != size:
            problems.append(f"{name} has {file.stat().st_size} bytes instead of {size}")
        elif _sha256(file) != digest:
            problems.append(f"{name} does not agree with its checksum")
    return problems


def _rotate(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` good checkpoints; damaged ones older than those go as well."""
    good = 0
    for path in reversed(checkpoints(folder)):
        if good >= keep:
            shutil.rmtree(path, ignore_errors=True)
        elif not verify(path):
            good += 1
    for leftover in folder.glob(".checkpoint-*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    for old in folder.glob(".checkpoint-*.old"):  # a crash came between the replacing and the removing
        if not verify(_replaced(old)):
            shutil.rmtree(old, ignore_errors=True)


def _files(path: Path) -> list[Path]:
    return sorted(f for f in path.rglob("*") if f.is_file() and f.name not in (CHECKSUMS, f".{CHECKSUMS}.tmp"))


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _fsync_folder(path: Path) -> None:
    if os.name == "nt":  # Windows has no handle on a folder to synchronise
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
