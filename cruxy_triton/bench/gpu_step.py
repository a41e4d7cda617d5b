"""Parts of `bench gpu` about a whole optimizer step: launches, no synchronisation, CUDA graphs, streams, devices."""

import contextlib
import math
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from cruxy_kernels import dequantize_blockwise, explain_backend, quantize_blockwise
from cruxy_triton.optimizer import CruxyOptimizer

LION = {"use_lion": True, "betas": (0.9, 0.99), "lr": 1e-4}
SETTINGS: dict[str, dict[str, Any]] = {
    "meta3 adamw": {},
    "meta3 lion": LION,
    "meta3 lion 8-bit": LION | {"state_bits": 8},
    "stability_v1 adamw": {"mode": "stability_v1"},
    "stability_v2 adamw": {"mode": "stability_v2", "use_nesterov": False},
}
DTYPES = (torch.float32, torch.float16)
SHAPES = ((64, 33), (33,), (5, 7, 3), (2048,))
# In Triton's interpreter, where a step takes a tenth of a second: two of the combinations, small tensors, fewer steps.
FEW = (("meta3 lion 8-bit", torch.float16), ("stability_v2 adamw", torch.float32))
FEW_SHAPES, FEWER = ((9, 5), (33,)), 8


def combinations(device: str) -> list[tuple[str, torch.dtype, dict[str, Any]]]:
    """(name, dtype of the parameters, arguments of the optimizer)."""
    chosen = FEW if device == "cpu" else [(name, dtype) for name in SETTINGS for dtype in DTYPES]
    return [(name, dtype, SETTINGS[name]) for name, dtype in chosen]


def steps(device: str, number: int) -> int:
    """So many steps, or fewer on a CPU."""
    return -(-number // FEWER) if device == "cpu" else number


class Trainee:
    """Parameters and gradient buffers of one optimizer; the gradients of a step depend on its number only."""

    def __init__(self, device: str | torch.device, dtype: torch.dtype = torch.float32, **settings: Any) -> None:
        self.device = torch.device(device)
        generator = torch.Generator().manual_seed(0)
        shapes = FEW_SHAPES if self.device.type == "cpu" else SHAPES
        self.params = [torch.nn.Parameter(self._draw(shape, generator).to(dtype)) for shape in shapes]
        self.buffers = [torch.zeros_like(p) for p in self.params]
        self.loss = torch.zeros((), device=self.device)
        settings = {"backend": "triton"} | settings
        self.optimizer = CruxyOptimizer(self.params, **settings)

    def _draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.randn(shape, generator=generator).to(self.device)

    def give(self, number: int, *, moved: bool = False) -> None:
        """The gradients and the loss of step `number`; `moved`: at new addresses, else in the buffers."""
        generator = torch.Generator().manual_seed(number + 1)
        self.loss.fill_(math.cos(number))
        for p, buffer in zip(self.params, self.buffers, strict=True):
            buffer.copy_(self._draw(tuple(p.shape), generator))
            p.grad = buffer.clone() if moved else buffer

    def step(self, number: int, *, moved: bool = False) -> None:
        self.give(number, moved=moved)
        self.optimizer.step(loss=self.loss)

    def tensors(self) -> list[Tensor]:
        state = [t for p in self.params for t in self.optimizer.state[p].values() if isinstance(t, Tensor)]
        return [t.detach().cpu() for t in (*self.params, *state)]

    def differs_from(self, other: "Trainee") -> int:
        """How many tensors are not the same bits."""
        return sum(not torch.equal(a, b) for a, b in zip(self.tensors(), other.tensors(), strict=True))


def every_rule(device: str) -> dict[str, Any]:
    """Steps of every rule, law and dtype, gradients moving: what the sanitizer watches."""
    for _, dtype, settings in combinations(device):
        trainee = Trainee(device, dtype, **settings)
        for number in range(3):
            trainee.step(number, moved=number == 2)
        trainee.tensors()
    x = torch.randn(4099, device=device)
    dequantize_blockwise(*quantize_blockwise(x, backend="triton"), backend="triton")
    return {"backend": explain_backend(device, "triton")}


# -- no synchronisation, launches ------------------------------------------------------------------------------------


@contextlib.contextmanager
def _no_synchronisation(device: str) -> Iterator[None]:
    """Makes whatever waits for the card raise."""
    if device == "cpu":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def step(device: str) -> dict[str, Any]:
    """No host synchronisation in whole steps, and what a step launches."""
    failures, launched = [], {}
    wanted = steps(device, 25)
    for name, dtype, settings in combinations(device):
        trainee = Trainee(device, dtype, **settings)
        optimizer = trainee.optimizer
        optimizer.grad_scale = torch.tensor(1024.0, device=device)  # type: ignore[attr-defined]
        optimizer.found_inf = torch.tensor(0.0, device=device)  # type: ignore[attr-defined]
        for number in range(3):
            trainee.step(number)
        grads = [[torch.randn_like(b) for b in trainee.buffers] for _ in range(2)]
        try:
            with _no_synchronisation(device):
                for number in range(wanted):
                    for p, grad in zip(trainee.params, grads[number % 2], strict=True):
                        p.grad = grad
                    optimizer.param_groups[0]["lr"] *= 0.99
                    optimizer.step(loss=trainee.loss)
        except RuntimeError as error:
            failures.append(f"{name} {dtype}: {str(error).strip().partition(chr(10))[0]}")
            continue
        taken = optimizer.metrics(wait=True)["step"]
        if taken != wanted + 3:
            failures.append(f"{name} {dtype}: {taken} steps counted; expected {wanted + 3}")
        launched[f"{name} {dtype}"] = launches(trainee)
    return {"launches": launched, "failures": failures}


def _observers() -> list[Callable[[str], None]]:
    """The list of cruxy_kernels' launch observers, wherever it lives."""
    for name, module in list(sys.modules.items()):
        if name.startswith("cruxy_kernels") and isinstance(found := getattr(module, "observers", None), list):
            return found
    raise RuntimeError("cruxy_kernels has no launch observers")


def launches(trainee: Trainee) -> dict[str, Any]:
    """What a usual step and the one of the slow loop start: our kernels, and on a GPU everything by its name."""
    interval = trainee.optimizer.meta_interval
    found: dict[str, Any] = {}
    trainee.give(0)
    for kind, phase in (("usual", 2), ("every tenth", 0)):
        while (trainee.optimizer.metrics(wait=True)["step"] + 1) % interval != phase:
            trainee.optimizer.step(loss=trainee.loss)
        names: Counter[str] = Counter()
        observers = _observers()
        observers.append(lambda name, counts=names: counts.update([name]))
        try:
            on_card: Counter[str] = Counter()
            if trainee.device.type == "cuda":
                from torch.profiler import ProfilerActivity, profile

                torch.cuda.synchronize()
                with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
                    trainee.optimizer.step(loss=trainee.loss)
                    torch.cuda.synchronize()
                cuda = torch.autograd.DeviceType.CUDA
                on_card.update(e.name[:80] for e in profiler.events() or [] if e.device_type == cuda)
            else:
                trainee.optimizer.step(loss=trainee.loss)
        finally:
            observers.pop()
        found[kind] = {"ours": dict(names), "on_card": dict(on_card), "on_card_total": sum(on_card.values())}
    return found


# -- CUDA graphs ------------------------------------------------------------------------------------


def capture(device: str) -> dict[str, Any]:
    """A captured step against one without a graph, bit for bit: replays, and eager steps before and between them."""
    failures = []
    for name, dtype, settings in combinations(device):
        phase = _captured(device, dtype, settings)
        if phase is not None:
            failures.append(f"{name} {dtype}: {phase}")
    return {"captured": device != "cpu", "failures": failures}


def _captured(device: str, dtype: torch.dtype, settings: dict[str, Any]) -> str | None:
    """Where the two part, None if they do not."""
    lr = torch.tensor(float(settings.get("lr", 1e-3)), device=device)
    plain, captured = (Trainee(device, dtype, **settings | {"lr": lr.clone(), "capturable": True}) for _ in range(2))

    def both(number: int, step: Callable[[], Any], *, moved: bool = False) -> None:
        plain.step(number)
        captured.give(number, moved=moved)
        step()

    def eager() -> None:
        captured.optimizer.step(loss=captured.loss)

    replay = eager
    if device == "cpu":
        for number in range(3):
            both(number, eager)
    else:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for number in range(3):
                both(number, eager)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        captured.give(3)
        with torch.cuda.graph(graph):
            eager()
        replay = graph.replay
    phases = (
        ("an eager step on the captured addresses before the first replay", eager, False, 2),
        ("an eager step on new addresses before the first replay", eager, True, 2),
        ("replays with new gradient values", replay, False, 23),
        ("an eager step between replays", eager, False, 1),
        ("an eager step on new addresses between replays", eager, True, 1),
        ("replays after that", replay, False, 12),
    )
    number = 3
    for name, step_once, moved, count in phases:
        for _ in range(steps(device, count)):
            both(number, step_once, moved=moved)
            number += 1
        if different := captured.differs_from(plain):
            return f"after {name} {different} tensors differ from the run without a graph"
    return None


# -- streams, threads, devices ------------------------------------------------------------------------------------


def concurrency(device: str) -> dict[str, Any]:
    """Two optimizers on two streams and in two threads, and on a second device, against each by itself."""
    failures, notes = [], []
    kinds = ("meta3 adamw", "meta3 lion 8-bit")
    backend = None if device == "cpu" else "triton"  # Triton's interpreter knows one thread only

    def make(where: str = device) -> list[Trainee]:
        return [Trainee(where, backend=backend, **SETTINGS[kind]) for kind in kinds]

    alone = make()
    for number in range(12):
        for trainee in alone:
            trainee.step(number)

    def compare(what: str, found: list[Trainee]) -> None:
        for kind, a, b in zip(kinds, alone, found, strict=True):
            if different := a.differs_from(b):
                failures.append(f"{what}: {different} tensors of {kind} differ from the run by itself")

    if device == "cpu":
        notes.append("streams: a CPU has none")
    else:
        found, streams = make(), [torch.cuda.Stream() for _ in kinds]
        torch.cuda.synchronize()
        for number in range(12):
            for trainee, stream in zip(found, streams, strict=True):
                with torch.cuda.stream(stream):
                    trainee.step(number, moved=number % 2 == 1)
        torch.cuda.synchronize()
        compare("two streams", found)

    found = make()
    errors: list[BaseException] = []

    def work(trainee: Trainee) -> None:
        try:
            for number in range(12):
                trainee.step(number, moved=number % 2 == 1)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(trainee,)) for trainee in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    failures += [f"two threads: {type(error).__name__}: {error}" for error in errors]
    if not errors:
        compare("two threads", found)

    if device == "cpu" or torch.cuda.device_count() < 2:
        notes.append("two devices: there is one")
    else:
        torch.cuda.set_device(0)
        x = torch.randn(5000)
        there = quantize_blockwise(x.to("cuda:1"), backend="triton")
        here = quantize_blockwise(x.to("cuda:0"), backend="triton")
        if not all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(here, there, strict=True)):
            failures.append("two devices: quantize_blockwise gives other codes on cuda:1 while cuda:0 is current")
        found = make("cuda:1")
        for number in range(12):
            for trainee in found:
                trainee.step(number)
        compare("cuda:1 while cuda:0 is current", found)
    return {"notes": notes, "failures": failures}
