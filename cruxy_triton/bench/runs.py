"""Grids of small runs: side by side, and in a file from which an interrupted grid goes on."""

import concurrent.futures
import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from cruxy_triton.bench.characters import Size
from cruxy_triton.environment import quiet_libraries
from cruxy_triton.errors import UserError
from cruxy_triton.files import writing


class Keyed(Protocol):
    """A dataclass whose `key()` says which run of the grid it is."""

    def key(self) -> Hashable: ...


Cell = TypeVar("Cell", bound=Keyed)
Run = TypeVar("Run", bound=Keyed)


def _begin() -> None:
    """What a worker does first."""
    quiet_libraries()
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Not after it: a parent that is killed ends nobody."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


class Runs:
    """The runs of one command, kept in a file of JSON lines where there is a `path`.

    Raises:
        UserError: the file holds runs of another size, or of another command.
    """

    def __init__(self, kind: Callable[..., Any], size: Size, path: Path | None) -> None:
        self.kind, self.size, self.path = kind, size, path
        self.done: dict[Hashable, Any] = {}
        text = path.read_text(encoding="utf-8") if path is not None and path.exists() else ""
        for number, line in enumerate(text.splitlines(), 1):
            try:
                written = json.loads(line)
                of = Size(**written.pop("size"))
                found = kind(**written)
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(f"{path}, line {number}: not a run of this benchmark; name a new file") from error
            if of != size:
                raise UserError(f"{path}, line {number}: a run of {of}, not of {size}; name a new file")
            self.done[found.key()] = found

    def play(self, function: Callable[[Cell], Run], cells: Iterable[Cell], workers: int) -> Iterator[Run]:
        """Runs what is not done yet, and yields each as it ends; each worker is a process of one thread."""
        missing = [cell for cell in cells if cell.key() not in self.done]
        context = multiprocessing.get_context("spawn")
        others = set(multiprocessing.active_children())
        with concurrent.futures.ProcessPoolExecutor(workers, context, _begin) as pool:
            futures = [pool.submit(function, cell) for cell in missing]
            try:
                for future in concurrent.futures.as_completed(futures):
                    run = future.result()
                    self.add(run)
                    yield run
            except BaseException:  # an interrupted grid does not wait for the runs that have begun
                pool.shutdown(wait=False, cancel_futures=True)
                for worker in set(multiprocessing.active_children()) - others:
                    worker.terminate()
                raise

    def add(self, run: Any) -> None:
        self.done[run.key()] = run
        if self.path is not None:
            with writing(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**asdict(run), "size": asdict(self.size)}) + "\n")
