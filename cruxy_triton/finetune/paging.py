"""Says when the driver for Windows has moved a run's memory off the card: it does that instead of refusing more, and
steps become several times slower without a word.

Two signs. PyTorch holds more than the card has in use: proof. The card is full and a step takes several times what
the quickest took: likely, and neither alone says anything.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback

from cruxy_triton.nvml import Driver, pages

FULL = 0.97  # of the card's memory
SLOW = 3.0  # times the quickest step
STEPS = 5  # before a time says anything: the first ones compile and fill caches
MIB = 1 << 20
SLACK = 64 * MIB  # between figures of two sources, read one after the other
REMEDY = (
    "close what else uses the card, or start anew with a lower --max-seq-length, --micro-batch-size or --vram; 'Prefer "
    "No Sysmem Fallback' (CUDA - Sysmem Fallback Policy in the NVIDIA control panel) makes the driver refuse instead"
)


def judge(reserved: int, used: int, total: int, seconds: list[float]) -> str | None:
    """A sentence where memory has been moved off the card, else None.

    reserved: bytes that PyTorch holds; used, total: bytes of the card, by all processes; seconds: of each step so far.
    """
    if reserved > used + SLACK:
        return (
            f"{(reserved - used) / MIB:,.0f} of the {reserved / MIB:,.0f} MiB that this run holds are not on the card "
            f"({used / MIB:,.0f} of its {total / MIB:,.0f} MiB are in use): the driver has moved them to system memory"
        )
    if len(seconds) > STEPS and used > FULL * total and seconds[-1] > SLOW * min(seconds):
        return (
            f"the card is full ({used / MIB:,.0f} of {total / MIB:,.0f} MiB) and the step took {seconds[-1]:.1f} s, "
            f"where {min(seconds):.1f} s were enough before: the driver is likely to be moving memory off the card"
        )
    return None


class PagingWatch(TrainerCallback):
    """Asks after each step, and tells `say` once. `read` gives (reserved, used, total) in bytes, or None."""

    def __init__(self, read: Callable[[], tuple[int, int, int] | None], say: Callable[[str], None]) -> None:
        self.read = read
        self.say = say
        self.seconds: list[float] = []
        self.began = 0.0
        self.told = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.began)
        if self.told or (found := self.read()) is None:
            return
        if sentence := judge(*found, self.seconds):
            self.told = True
            self.say(f"warning: step {state.global_step}: {sentence}, and is slow; {REMEDY}")


def watch(device: torch.device, say: Callable[[str], None]) -> list[TrainerCallback]:
    """The callbacks that watch `device`: one where its driver may page, else none."""
    if device.type != "cuda":
        return []
    driver = Driver.open()
    if driver is None or not pages(driver):
        return []
    uuid = str(torch.cuda.get_device_properties(device).uuid)

    def read() -> tuple[int, int, int] | None:
        found = driver.memory(uuid)
        return None if found is None else (torch.cuda.memory_reserved(device), *found)

    return [PagingWatch(read, say)]
