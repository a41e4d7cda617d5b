"""What transformers' from_pretrained does with the allocator, in order: it decides what is reserved later on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cruxy_triton.planner.ledger import Ledger, Storage
from cruxy_triton.planner.step import Step
from cruxy_triton.planner.workspaces import NF4_BLOCK, NF4_NESTED_BLOCK


@dataclass(frozen=True)
class Weight:
    """One tensor of the checkpoint: elements, and whether bitsandbytes quantizes it."""

    n: int
    quantized: bool = False


def load(ledger: Ledger, step: Step, weights: Sequence[Weight]) -> list[list[Storage]]:
    """Load `weights`, in the natural order of their keys, and return what each holds on the device.

    With a device map, from_pretrained first takes the model's bytes at once and gives them back
    (caching_allocator_warmup). A weight that is to be quantized comes to the device in `step.dtype`; `step.ahead` of
    those behind it are there already: before github.com/huggingface/transformers/pull/44576 threads put them there
    while the main thread quantized.
    """
    width = step.width
    if step.warmup:
        whole = Storage(ledger, sum(x.n // 2 if x.quantized else x.n * width for x in weights), "weights")
        del whole
    waiting: list[Storage] = []
    held = []
    for index, weight in enumerate(weights):
        for later in weights[index + len(waiting) : index + step.ahead + 1]:
            waiting.append(Storage(ledger, later.n * width, "weights"))
        arrived = waiting.pop(0)
        held.append(_quantize(ledger, weight.n, step.double_quant) if weight.quantized else [arrived])
        del arrived
    return held


def _quantize(ledger: Ledger, n: int, nested: bool) -> list[Storage]:
    """bitsandbytes' quantize_4bit of `n` elements: packed codes, one fp32 absmax per 64 and the code book (16 fp32).

    `nested`: the absmax less its mean in 8 bits, with an absmax per 256, an offset and a code book (256 fp32).
    """
    scales = -(-n // NF4_BLOCK)
    absmax = Storage(ledger, 4 * scales, "quantization")
    held = [Storage(ledger, -(-n // 2), "weights"), Storage(ledger, 16 * 4, "quantization")]
    if not nested:
        return [*held, absmax]
    held.append(Storage(ledger, 4, "quantization"))
    centred = Storage(ledger, 4 * scales, "quantization")
    held += [Storage(ledger, size, "quantization") for size in (-(-scales // NF4_NESTED_BLOCK) * 4, scales, 256 * 4)]
    del centred, absmax
    return held
