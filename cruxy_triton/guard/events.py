"""Events: what the guard saw, in which regime, what it did, what that cost; as JSON lines and as a summary."""

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cruxy_triton import files

# Kinds of events. The first six are actions; "regime" is a change of regime; "note" a finding without action.
SKIP, CLIP, LR, RESET, ROLLBACK, STOP = "skip", "clip", "lr", "momentum_reset", "rollback", "stop"
REGIME, NOTE, OVERFLOW, DAMAGED = "regime", "note", "overflow", "damaged_checkpoint"
ACTIONS = (SKIP, CLIP, LR, RESET, ROLLBACK, STOP)


@dataclass(frozen=True)
class Event:
    """One thing that happened.

    `step` counts the optimizer steps that the guard saw, from 1; `layer` is the parameter that stood out, by name
    where the names are known; `batch` is what `observe(batch=...)` was given; `seen` holds the numbers; `cost` says
    what the action cost (steps lost, gradient kept out); `acted` is False where the policy only observes.
    """

    step: int
    kind: str
    regime: str
    message: str
    layer: str | None = None
    batch: Any = None
    seen: dict[str, float] = field(default_factory=dict)
    cost: str = ""
    acted: bool = True

    def line(self) -> str:
        where = "".join(f" [{name} {value}]" for name, value in (("layer", self.layer), ("batch", self.batch))
                        if value is not None)  # fmt: skip
        return f"step {self.step} ({self.regime}): {self.message}{where}{'' if self.acted else ' (observed only)'}"


class EventLog:
    """A list of events in memory, and beside it, where a path is given, a file of JSON lines.

    A path that cannot be written (a full disk) does not end a training run: the events stay in memory and
    `write_error` says why they are not in the file.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None):
        self.path = None if path is None else Path(path)
        self.events: list[Event] = []
        self.write_error: str | None = None

    @property
    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]

    def add(self, event: Event) -> None:
        self.events.append(event)
        if self.path is None:
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_json(event))
        except OSError as error:
            self.write_error = f"{self.path}: {error.strerror or error}"

    def state_dict(self) -> list[dict[str, Any]]:
        return [plain(asdict(event)) for event in self.events]

    def load(self, events: Iterable[Event]) -> None:
        """Go on from the events of a saved run; what a file holds beyond them is of steps that are taken again."""
        self.events = list(events)
        if self.path is None:
            return
        try:
            files.write_text(self.path, "".join(map(_json, self.events)))
        except OSError as error:
            self.write_error = f"{self.path}: {error.strerror or error}"

    def __iter__(self) -> Iterator[Event]:
        return iter(self.events)

    def __len__(self) -> int:
        return len(self.events)

    def count(self, kind: str) -> int:
        return sum(event.kind == kind for event in self.events)

    def actions(self) -> dict[str, int]:
        """How many actions of each kind there were, in the order of `ACTIONS`."""
        counts = Counter(event.kind for event in self.events)
        return {kind: counts[kind] for kind in ACTIONS if counts[kind]}

    def summary(self) -> str:
        """A few lines for people: how often what, and the events that changed the run's course."""
        lines = [", ".join(f"{n} x {kind}" for kind, n in self.actions().items()) or "no action was needed"]
        lines += [event.line() for event in self.events if event.kind not in (SKIP, CLIP)][-20:]
        if self.write_error:
            lines.append(f"events could not be written: {self.write_error}")
        return "\n".join(lines)


def read_events(path: str | os.PathLike[str]) -> list[Event]:
    """The events of a JSON-lines file; a last line cut off by a crash is left out."""
    lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
    events = []
    for number, line in enumerate(lines, 1):
        try:
            events.append(Event(**json.loads(line)))
        except (json.JSONDecodeError, TypeError) as error:
            if number == len(lines) and not line.endswith("\n"):
                break
            raise ValueError(f"{path}, line {number}: not an event of the guard ({error})") from error
    return events


def _json(event: Event) -> str:
    return json.dumps(plain(asdict(event)), ensure_ascii=False) + "\n"


def plain(value: Any) -> Any:
    """JSON has no NaN: non-finite numbers are written as words, and what JSON does not know as its repr."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | bool | None) else repr(value)
