"""The optimizer step against its peers: all in one process, interleaved round by round, compared by ratios.

Every contestant steps the same parameters with the same gradients, so what one leaves in a cache the next finds.
On a GPU three figures are taken: wall time with 80 steps between synchronisations, GPU time between two events,
and the bandwidth of a plain copy, measured in the same run.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cruxy_triton.bench.census import census
from cruxy_triton.errors import UserError
from cruxy_triton.optimizer import CruxyOptimizer

GRADIENT = 1e-3  # standard deviation of the random gradients
STEPS_PER_SYNC = 80
COPY_BYTES = 1 << 30
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass
class Contestant:
    """One optimizer: its name, a call that takes a step, and the optimizer whose state is counted."""

    name: str
    step: Callable[[], Any]
    optimizer: Any
    seconds: list[float] = field(default_factory=list)  # wall time of a step, one per round
    gpu_seconds: list[float] = field(default_factory=list)


def contestants(params: Sequence[Tensor], only: str | None) -> tuple[list[Contestant], dict[str, str]]:
    """Everything that can run here, and {name: why not} for what cannot."""
    loss = torch.tensor(1.0, device=params[0].device)
    found: list[Contestant] = []
    absent: dict[str, str] = {}

    def add(name: str, make: Callable[[], Any], **step: Any) -> None:
        if only is not None and only not in name:
            return
        try:
            optimizer = make()
            optimizer.step(**step)  # makes the state, compiles
        except Exception as error:  # a peer that does not run here is reported, whatever its reason
            absent[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            return
        found.append(Contestant(name, lambda: optimizer.step(**step), optimizer))

    def peer(module: str, name: str, **arguments: Any) -> Callable[[], Any]:
        def make() -> Any:
            import importlib

            return getattr(importlib.import_module(module), name)(params, **arguments)

        return make

    add("torch AdamW fused", lambda: torch.optim.AdamW(params, fused=True))
    add("torch AdamW foreach", lambda: torch.optim.AdamW(params, foreach=True))

    def ours(**arguments: Any) -> Callable[[], Any]:
        return lambda: CruxyOptimizer(params, "meta3", 1e-4, **arguments)

    add("cruxy-triton meta3 Lion 8-bit", ours(use_lion=True, state_bits=8), loss=loss)
    add("cruxy-triton meta3 Lion fp32", ours(use_lion=True, state_bits=32), loss=loss)
    add("cruxy-triton meta3 AdamW", ours(), loss=loss)
    add("lion-pytorch", peer("lion_pytorch", "Lion", lr=1e-4))
    if params[0].is_cuda:
        add("lion-pytorch Triton", peer("lion_pytorch", "Lion", lr=1e-4, use_triton=True))
        add("bitsandbytes Lion8bit", peer("bitsandbytes.optim", "Lion8bit", lr=1e-4))
        add("FlashLion", peer("flashoptim", "FlashLion", lr=1e-4))
    add("cruxy SDK Meta-Lion", peer("cruxy", "CruxyOptimizer", mode="meta3", use_lion=True, lr=1e-4), loss=1.0)
    add("cruxy SDK meta3", peer("cruxy", "CruxyOptimizer", mode="meta3", lr=1e-4), loss=1.0)
    return found, absent


def state_bytes(optimizer: Any) -> int:
    """Bytes of the tensors that an optimizer keeps for its parameters."""
    total = 0
    for state in optimizer.state.values():
        total += sum(v.numel() * v.element_size() for v in state.values() if isinstance(v, Tensor))
    return total


def copy_bandwidth(device: torch.device) -> float:
    """GB/s of a device-to-device copy, read plus write."""
    source = torch.empty(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(10):
        target.copy_(source)
    end.record()
    end.synchronize()
    return 10 * 2 * COPY_BYTES / (start.elapsed_time(end) * 1e-3) / 1e9


def measure(contestant: Contestant, device: torch.device) -> None:
    """One round of one contestant."""
    if device.type != "cuda":
        start = time.perf_counter()
        contestant.step()
        contestant.seconds.append(time.perf_counter() - start)
        return
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start = time.perf_counter()
    begin.record()
    for _ in range(STEPS_PER_SYNC):
        contestant.step()
    end.record()
    torch.cuda.synchronize()
    contestant.seconds.append((time.perf_counter() - start) / STEPS_PER_SYNC)
    contestant.gpu_seconds.append(begin.elapsed_time(end) * 1e-3 / STEPS_PER_SYNC)


def run(
    device_name: str, census_name: str, rounds: int, dtype_name: str = "fp32", only: str | None = None
) -> dict[str, Any]:
    """The measured table, as plain data. Raises UserError for a device, census or dtype that is not there."""
    try:
        device = torch.device(device_name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device_name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    if dtype_name not in DTYPES:
        raise UserError(f"unknown dtype {dtype_name!r}: expected one of {', '.join(DTYPES)}")
    torch.manual_seed(0)
    dtype = DTYPES[dtype_name]
    shapes = census(census_name)
    params = [torch.nn.Parameter(torch.randn(shape, device=device).mul_(0.02).to(dtype)) for shape in shapes]
    for p in params:
        p.grad = (torch.randn(p.shape, device=device) * GRADIENT).to(dtype)
    numel = sum(p.numel() for p in params)
    racers, absent = contestants(params, only)
    if not racers:
        raise UserError(f"no contestant has {only!r} in its name")
    for _ in range(2):
        for racer in racers:
            measure(racer, device)
    for racer in racers:
        racer.seconds.clear()
        racer.gpu_seconds.clear()
    for _ in range(rounds):
        for racer in racers:
            measure(racer, device)
    bandwidth = copy_bandwidth(device) if device.type == "cuda" else None
    by_name = {racer.name: racer for racer in racers}
    rows = []
    for racer in racers:
        row: dict[str, Any] = {
            "name": racer.name,
            "median_ms": statistics.median(racer.seconds) * 1e3,
            "state_bytes_per_parameter": state_bytes(racer.optimizer) / numel,
        }
        # A ratio is the median of the rounds' ratios: both sides of each were measured side by side.
        for other in ("torch AdamW fused", "cruxy SDK Meta-Lion"):
            if other in by_name:
                pairs = zip(racer.seconds, by_name[other].seconds, strict=True)
                row[f"times {other}"] = statistics.median([a / b for a, b in pairs])
        if racer.gpu_seconds:
            row["gpu_median_ms"] = statistics.median(racer.gpu_seconds) * 1e3
        rows.append(row)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "census": census_name,
        "dtype": dtype_name,
        "tensors": len(shapes),
        "parameters": numel,
        "rounds": rounds,
        "copy_gb_s": bandwidth,
        "rows": rows,
        "absent": absent,
    }
