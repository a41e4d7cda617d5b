"""What an optimizer step costs its host: the whole of `optimizer.step()` with kernels that are counted, not started.

A step of a few hundred small tensors (LoRA) is bound by the host: Python and small operators decide how soon the next
kernel can start. Here the step runs with backend "triton" on CPU tensors, `launch` being replaced by a counter, so a
machine without a GPU shows it too. What a card adds is Triton's own launcher, a few microseconds per launch. Beside
it torch's fused AdamW over as many tensors of one element: its arithmetic is nothing, what is left is its host time.
"""

import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import cruxy_kernels.launch
from cruxy_triton.bench.census import census
from cruxy_triton.optimizer import CruxyOptimizer, MetaLion

ADDRESSES = 16  # sets of gradients that take turns; more than the tables that are kept for sets seen before
SPACING = 4  # elements between two of a tensor's addresses: 16 bytes, so that all of them are aligned
METHODS = ("data_ptr", "is_contiguous")


@contextmanager
def _replaced(original: Any, replacement: Any) -> Iterator[None]:
    """Puts `replacement` where the modules of this project hold `original`."""
    ours = (cruxy_kernels.__name__, __name__.partition(".")[0])
    modules = [m for name, m in list(sys.modules.items()) if name.partition(".")[0] in ours]
    with ExitStack() as stack:
        for module in modules:
            for name in [name for name, value in vars(module).items() if value is original]:
                stack.enter_context(mock.patch.object(module, name, replacement))
        yield


@contextmanager
def counted_launches() -> Iterator[Counter[str]]:
    """Replaces `launch` by a counter of kernel names, and allows "triton" on a CPU."""
    counts: Counter[str] = Counter()

    def launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        if programs:
            counts[kernel.__name__] += 1

    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"), _replaced(cruxy_kernels.launch.launch, launch):
        yield counts


@contextmanager
def one_thread() -> Iterator[None]:
    """Keeps torch to the calling thread: the time that others spin for it would be counted too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Operators(TorchDispatchMode):
    """Counts by name the operators that compute; views and allocations do not.

    Where gradients keep their addresses they work on the control vector alone: on a GPU each of them is a launch.
    Where they move, tables are made anew, which is the host's own work on any machine.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and not name.startswith(("empty", "new_empty", "detach", "_record_function")):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


class Case:
    """One optimizer over tensors of the given shapes, and several sets of gradients for them."""

    def __init__(self, name: str, make: Callable[[list[Any]], Any], shapes: list[tuple[int, ...]]) -> None:
        self.name = name
        self.params = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
        self.optimizer = make(self.params)
        self.loss = torch.tensor(1.0)
        self.sets: list[list[Tensor]] = [[] for _ in range(ADDRESSES)]
        for p in self.params:
            pool = torch.full((p.numel() + SPACING * ADDRESSES,), 1e-3)
            for i, grads in enumerate(self.sets):
                grads.append(pool[i * SPACING : i * SPACING + p.numel()].view(p.shape))
        self.turn = 0

    def set_grads(self, number: int) -> None:
        for p, grad in zip(self.params, self.sets[number % ADDRESSES], strict=True):
            p.grad = grad

    def step(self) -> None:
        self.turn += 1
        if isinstance(self.optimizer, CruxyOptimizer):
            self.optimizer.step(loss=self.loss)
        else:
            self.optimizer.step()

    def seconds(self, *, move: bool) -> float:
        """CPU time of this thread for one step; `move`: every gradient has another address than in the step before."""
        self.set_grads(self.turn + 1 if move else 0)
        start = time.thread_time()
        self.step()
        return time.thread_time() - start


def _saved(params: list[Any]) -> CruxyOptimizer:
    """An optimizer whose state somebody may hold: each step then finds out where that lies, too."""
    optimizer = CruxyOptimizer(params, lr=1e-4, backend="triton")
    optimizer.state_dict()
    return optimizer


def work(case: Case, launches: Counter[str], *, move: bool) -> dict[str, Any]:
    """Launches by kernel and operators in one step of `case`."""
    case.set_grads(case.turn + 1 if move else 0)
    launches.clear()
    with Operators() as operators:
        case.step()
    return {"launches": dict(sorted(launches.items())), "operators": dict(sorted(operators.counts.items()))}


def method_calls(case: Case, *, move: bool) -> dict[str, int]:
    """Calls of METHODS in one step of `case`."""
    case.set_grads(case.turn + 1 if move else 0)
    calls: Counter[str] = Counter()

    def counting(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def method(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return original(self, *args, **kwargs)

        return method

    with ExitStack() as stack:
        for name in METHODS:
            original = getattr(Tensor, name)
            counter = counting(name, original)
            stack.enter_context(mock.patch.object(Tensor, name, counter))
            stack.enter_context(_replaced(original, counter))
        case.step()
    return {name: calls[name] for name in METHODS}


def python_calls(case: Case, *, move: bool) -> int:
    """Python functions entered in one step of `case`, comprehensions included where they are functions."""
    case.set_grads(case.turn + 1 if move else 0)
    count = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        case.step()
    finally:
        sys.setprofile(before)
    return count


def run(census_name: str = "lora-r8", rounds: int = 50, only: str | None = None) -> dict[str, Any]:
    """The table of host times and the work of each kind of step, as plain data.

    Times are in microseconds: the least and the median of `rounds` interleaved rounds. The counts are of steps in
    which nothing is due but the step itself ("same", "moved": gradients at new addresses), and of a tenth one.
    """
    shapes = census(census_name)
    makers: dict[str, tuple[Callable[[list[Any]], Any], list[tuple[int, ...]]]] = {
        "cruxy-triton MetaLion": (lambda params: MetaLion(params, lr=1e-4, backend="triton"), shapes),
        "cruxy-triton meta3 AdamW": (lambda params: CruxyOptimizer(params, lr=1e-4, backend="triton"), shapes),
        "cruxy-triton meta3 AdamW, after a checkpoint": (_saved, shapes),
        "torch AdamW fused, 1 element each": (
            lambda params: torch.optim.AdamW(params, fused=True),
            [(1,)] * len(shapes),
        ),
    }
    rows, counts = [], {}
    with counted_launches() as launches, one_thread():
        cases = [Case(name, *made) for name, made in makers.items() if only is None or only in name]
        for case in cases:
            for move in (False, True, False):  # state, tables
                case.seconds(move=move)
        times: dict[tuple[str, bool], list[float]] = {(case.name, move): [] for case in cases for move in (False, True)}
        for move in (False, True):
            for case in cases:
                case.seconds(move=False)
            for _ in range(rounds):
                for case in cases:
                    times[case.name, move].append(case.seconds(move=move) * 1e6)
        for case in cases:
            same, moved = times[case.name, False], times[case.name, True]
            row = {"name": case.name, "least_us": min(same), "median_us": statistics.median(same)}
            rows.append(row | {"moved_least_us": min(moved), "moved_median_us": statistics.median(moved)})
            if isinstance(case.optimizer, CruxyOptimizer):
                counts[case.name] = _counts(case, launches)
    return {
        "rows": rows,
        "tensors": len(shapes),
        "census": census_name,
        "rounds": rounds,
        "torch": torch.__version__,
        "work": counts,
    }


def _counts(case: Case, launches: Counter[str]) -> dict[str, Any]:
    interval = case.optimizer.meta_interval

    def until(phase: int) -> None:
        case.seconds(move=False)
        while (case.turn + 1) % interval != phase:
            case.seconds(move=False)

    found = {}
    for name, phase, move in (("same", 2, False), ("moved", 3, True), ("every tenth", 0, False)):
        until(phase)
        found[name] = work(case, launches, move=move)
    for name, phase, move in (("same", 2, False), ("moved", 3, True), ("every tenth", 0, False)):
        until(phase)
        found[name] |= method_calls(case, move=move)
    for name, phase, move in (("same", 2, False), ("moved", 3, True), ("every tenth", 0, False)):
        until(phase)
        found[name]["python_calls"] = python_calls(case, move=move)
    return found
