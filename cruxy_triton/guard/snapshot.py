"""Snapshots: the trained parameters, the optimizer's and the guard's state, to roll back to; in host memory or on disk.

What trains is small in the runs that this is for (an adapter, a small model); `bytes_needed` says what a snapshot
would take. One that is too large for the policy's limit goes into a file where a folder is given, else there is none.
A snapshot counts as good only when the steps after it were calm: `confirm` is what makes it one. Kept are the start of
the run, the two newest good ones and one candidate.
"""

import os
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cruxy_triton import files


@dataclass
class Snapshot:
    """The state after `step` steps: its tensors in memory, or the name and SHA-256 of the file that holds them.

    Neither of a guard that only observes.
    """

    step: int
    content: dict[str, Any] | None = None
    file: str | None = None
    digest: str | None = None


class Snapshots:
    """
    Args:
        optimizer: the optimizer whose parameters and state are kept.
        model: its buffers (the running statistics of batch norm) are kept too; None: the parameters alone.
        folder: for the files, of this run alone; made with the first of them.
        say: called with a sentence for each file that could not be written, or is damaged and gone round.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module | None = None,
        folder: str | os.PathLike[str] | None = None,
        say: Callable[[str], Any] = lambda sentence: None,
    ):
        self.optimizer, self.model, self.say = optimizer, model, say
        self.folder = None if folder is None else Path(folder)
        self.start: Snapshot | None = None
        self.good: list[Snapshot] = []
        self.candidate: Snapshot | None = None
        self.empty = True  # until the first was tried
        # Files that the state saved last, and the one before it, refer to: a resumed run may want them.
        self._saved: list[set[str | None]] = [set(), set()]

    def bytes_needed(self) -> int:
        """Bytes of one snapshot, as far as the optimizer has made its state."""
        tensors = [*self._params(), *self._buffers()]
        for state in self.optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, Tensor)]
        return sum(t.numel() * t.element_size() for t in tensors)

    def take(self, step: int, baselines: Tensor, *, on_disk: bool = False) -> None:
        """Copy the present state: the first becomes the start, later ones candidates."""
        state = {
            "params": [p.detach() for p in self._params()],
            "optimizer": self.optimizer.state_dict(),
            "buffers": [b.detach() for b in self._buffers()],
            "baselines": baselines,
        }
        if not on_disk:
            self._keep(Snapshot(step, _host_copy(state)))
            return
        assert self.folder is not None
        if self.empty:  # whatever lies there is of an earlier run
            self._remove_files()
        file = self.folder / f"snapshot-{step}.pt"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with files.writing(file), files.replacing(file) as temporary:
                torch.save(state, temporary)
            self._keep(Snapshot(step, None, file.name, files.digest(file)))
        except (OSError, files.WriteFailed) as error:
            self.empty = False
            self.say(f"no snapshot after step {step}: {error}")

    def mark(self, step: int) -> None:
        """Remember that a snapshot would have been taken here; `restore` cannot use it."""
        self._keep(Snapshot(step))

    def _keep(self, snapshot: Snapshot) -> None:
        if self.empty:
            self.start = snapshot
        else:
            self.candidate = snapshot
        self.empty = False
        self._remove_files()

    def confirm(self) -> None:
        """The steps after the candidate were calm: it is good, and replaces the older of two."""
        if self.candidate is not None:
            self.good = [*self.good[-1:], self.candidate]
            self.candidate = None
            self._remove_files()

    def discard_candidate(self) -> None:
        if self.candidate is not None:
            self.candidate = None
            self._remove_files()

    def newest(self) -> Snapshot | None:
        """The newest good snapshot that is whole, else the start of the run."""
        while self.good and not self._whole(self.good[-1]):
            self.good.pop()
        return self.good[-1] if self.good else self.first()

    def first(self) -> Snapshot | None:
        """The start of the run, where it is whole."""
        if self.start is not None and not self._whole(self.start):
            self.start = None
        return self.start

    def drop_newest(self) -> None:
        """A rollback to it did not help: the next goes further back. The start is never dropped."""
        if self.good:
            self.good.pop()
            self._remove_files()

    @torch.no_grad()
    def restore(self, snapshot: Snapshot) -> Tensor:
        """Put a snapshot's parameters and state back; the groups' settings (lr, betas ...) stay as they are now.

        Returns the baselines that were kept with it.
        """
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # copies to the host are asynchronous; a rollback may wait
        if snapshot.content is not None:
            content = {**snapshot.content, "optimizer": deepcopy(snapshot.content["optimizer"])}
        else:
            # Of an optimizer that may keep anything in its state; the file is this run's own, by its digest.
            content = torch.load(self._path(snapshot), map_location="cpu", weights_only=False)
        for param, saved in zip(self._params(), content["params"], strict=True):
            param.detach().copy_(saved)
        for buffer, saved in zip(self._buffers(), content["buffers"], strict=True):
            buffer.copy_(saved)
        kept = [
            {k: v for k, v in group.items() if k in self.optimizer.defaults or k == "initial_lr"}
            for group in self.optimizer.param_groups
        ]
        self.optimizer.load_state_dict(content["optimizer"])
        for group, settings in zip(self.optimizer.param_groups, kept, strict=True):
            group.update(settings)
        return content["baselines"]

    # -- files ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Which snapshots lie in files; those in memory end with the process. Their files stay until the state that
        is saved after the next one."""
        self._saved = [self._saved[1], {s.file for s in self._all()}]
        self._remove_files()
        entries = {
            "start": None if self.start is None else _entry(self.start),
            "candidate": None if self.candidate is None else _entry(self.candidate),
        }
        return {**entries, "good": [entry for s in self.good if (entry := _entry(s)) is not None]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the snapshots of a saved state whose files are as they were written."""

        def found(entry: dict[str, Any] | None) -> Snapshot | None:
            if entry is None:
                return None
            snapshot = Snapshot(int(entry["step"]), None, entry["file"], entry["digest"])
            return snapshot if self._whole(snapshot) else None

        self.start, self.candidate = found(state["start"]), found(state["candidate"])
        self.good = [snapshot for entry in state["good"] if (snapshot := found(entry)) is not None]
        self.empty = self.start is None
        self._saved = [set(), {s.file for s in self._all()}]
        self._remove_files()

    def _path(self, snapshot: Snapshot) -> Path:
        assert self.folder is not None
        assert snapshot.file is not None
        return self.folder / snapshot.file

    def _whole(self, snapshot: Snapshot) -> bool:
        if snapshot.file is None:
            return True
        where = f"the snapshot after step {snapshot.step} ({snapshot.file})"
        if self.folder is None:
            self.say(f"{where} is left out: no folder for snapshots is given")
            return False
        try:
            if files.digest(self._path(snapshot)) == snapshot.digest:
                return True
            self.say(f"{where} is damaged and left out: not as it was written")
        except OSError as error:
            self.say(f"{where} is left out: {error.strerror or error}")
        return False

    def _all(self) -> list[Snapshot]:
        return [s for s in (self.start, *self.good, self.candidate) if s is not None]

    def _remove_files(self) -> None:
        """Remove the files that neither a snapshot nor a saved state refers to."""
        if self.folder is None:
            return
        wanted = {s.file for s in self._all()}.union(*self._saved)
        for path in (*self.folder.glob("snapshot-*.pt"), *self.folder.glob(".snapshot-*.pt")):
            if path.name not in wanted:
                path.unlink(missing_ok=True)

    def _params(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _buffers(self) -> list[Tensor]:
        return [] if self.model is None else list(self.model.buffers())


def _entry(snapshot: Snapshot) -> dict[str, Any] | None:
    if snapshot.content is not None:
        return None
    return {"step": snapshot.step, "file": snapshot.file, "digest": snapshot.digest}


def _host_copy(value: Any) -> Any:
    """A deep copy with its tensors in host memory (pinned and asynchronous from an accelerator)."""
    if isinstance(value, Tensor):
        value = value.detach()
        if value.device.type != "cuda" or hasattr(value, "device_mesh"):
            return value.clone() if value.device.type == "cpu" or hasattr(value, "device_mesh") else value.cpu()
        copy = torch.empty_like(value, device="cpu", pin_memory=True)
        return copy.copy_(value, non_blocking=True)
    if isinstance(value, dict):
        return {k: _host_copy(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_host_copy(v) for v in value)
    return deepcopy(value)
