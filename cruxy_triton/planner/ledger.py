"""A ledger of device memory: what lives, the peak of each phase, and the stream of allocations.

`trace` books the storages of a real training step here, `autograd` those of its imitation. A storage is rounded up
to 512 bytes, as CUDA's caching allocator does (pytorch: c10/cuda/CUDACachingAllocator.cpp, kMinBlockSize).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Ledger:
    """Live bytes in all and by component, the peak of each phase, and (if asked) the stream of events.

    `round_to` is 512 for CUDA and 1 for the CPU, whose allocator counts what was asked for.
    """

    def __init__(self, round_to: int = 512, record: bool = False):
        self.round_to = round_to
        self.live = 0
        self.by_component: dict[str, int] = {}
        self.component = "activations"
        self.phase = ""
        self.phases: dict[str, int] = {}  # phase: peak bytes
        self.parts: dict[str, dict[str, int]] = {}  # phase: bytes by component at that peak
        self.events: list[tuple[int, int]] | None = [] if record else None  # (storage id, +bytes or -bytes)
        self.changes: list[tuple[str, str, int]] = []  # the same as (phase, component, +bytes or -bytes), and moves
        self.next_id = 0
        self.enter("load")

    def rounded(self, nbytes: int) -> int:
        return -(-nbytes // self.round_to) * self.round_to

    def book(self, nbytes: int, component: str) -> int:
        """Book `nbytes` (rounded already) and return the id to release them by."""
        self.live += nbytes
        self.by_component[component] = self.by_component.get(component, 0) + nbytes
        self._look()
        self.next_id += 1
        if self.events is not None:
            self.events.append((self.next_id, nbytes))
            self.changes.append((self.phase, component, nbytes))
        return self.next_id

    def release(self, ident: int, nbytes: int, component: str) -> None:
        self.live -= nbytes
        self.by_component[component] -= nbytes
        if self.events is not None:
            self.events.append((ident, -nbytes))
            self.changes.append((self.phase, component, -nbytes))

    def move(self, nbytes: int, old: str, new: str) -> None:
        """Account `nbytes` to another component."""
        self.by_component[old] -= nbytes
        self.by_component[new] = self.by_component.get(new, 0) + nbytes
        if self.events is not None:
            self.changes += [(self.phase, old, -nbytes), (self.phase, new, nbytes)]

    def enter(self, phase: str) -> None:
        """Begin a phase; what is live now counts for it from the start."""
        self.phase = phase
        self._look()

    def _look(self) -> None:
        if self.live > self.phases.get(self.phase, -1):
            self.phases[self.phase] = self.live
            self.parts[self.phase] = dict(self.by_component)

    @contextmanager
    def booked_as(self, component: str) -> Iterator[None]:
        """Storages made inside are booked under `component`."""
        before, self.component = self.component, component
        try:
            yield
        finally:
            self.component = before


class Storage:
    """Bytes on the device. Gone when the last reference to it goes."""

    __slots__ = ("component", "ident", "ledger", "nbytes")

    def __init__(self, ledger: Ledger, nbytes: int, component: str):
        self.nbytes = ledger.rounded(nbytes)
        self.component = component
        self.ledger = ledger
        self.ident = ledger.book(self.nbytes, component)

    def __del__(self):
        self.ledger.release(self.ident, self.nbytes, self.component)
