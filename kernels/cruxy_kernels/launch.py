"""Launches: the one place that starts a kernel, and the one that makes tensors fit for a table.

`observers` are called with the name of each kernel that is started; tests and benchmarks count with them.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .tables import ELEMENT_TYPES, TensorTable, tables

NUM_WARPS = 4

# The most registers that a thread may take. With 64, sm_75 and older hold all the threads they can. Newer cards hold
# more threads than that anyhow, and there the assembler spills a few of AdamW's registers to stay at 64.
MAX_REGISTERS, MAX_REGISTERS_NEWER = 64, 80
NEWER = (8, 0)

_AS_IT_IS = nullcontext()

observers: list[Callable[[str], None]] = []


def launch(kernel: Any, programs: int, *arguments: Any, num_warps: int = NUM_WARPS, **constants: Any) -> None:
    """Starts `programs` programs of a @triton.jit function on the current stream of the current device."""
    if programs == 0:
        return
    for observer in observers:
        observer(kernel.__name__)
    kernel[(programs,)](*arguments, num_warps=num_warps, **limits(), **constants)


def register_limit(capability: tuple[int, int]) -> int:
    """The most registers per thread that kernels may take on a card of this compute capability."""
    return MAX_REGISTERS if capability < NEWER else MAX_REGISTERS_NEWER


@functools.lru_cache(maxsize=16)
def _limits_of(device: int) -> dict[str, int]:
    return {} if torch.version.hip else {"maxnreg": register_limit(torch.cuda.get_device_capability(device))}


def limits() -> dict[str, int]:
    """Compiler options for the current device."""
    return _limits_of(torch.cuda.current_device()) if torch.cuda.is_available() else {}


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Makes `device` current, because Triton launches on the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else _AS_IT_IS


@dataclass
class Batch:
    """The tensors of one launch: one device, one dtype in each column."""

    device: torch.device
    types: dict[int, str]  # element type of each column
    table: TensorTable
    indices: list[int]  # of its tensors, in the caller's list
    copied: list[tuple[Tensor, Tensor]]  # (tensor, the contiguous copy that stands in for it)

    def finish(self) -> None:
        """Writes the copies back."""
        for tensor, copy in self.copied:
            tensor.copy_(copy)


def batches(
    columns: dict[int, Sequence[Tensor]],
    rows: Sequence[int] | None = None,
    ids: Sequence[int] | None = None,
    read_only: tuple[int, ...] = (),
    make_table: Callable[..., TensorTable] | None = None,
) -> Iterator[Batch]:
    """The tensors as few launches as their devices and dtypes allow.

    columns: tables.PARAM and so on -> a list of tensors, all lists of one length (dispatch.py has checked them). A
    tensor that is not contiguous is served through a copy, written back by `finish` unless its column is in
    `read_only`. make_table: `tables.build` for a table of one's own, instead of one that is kept for later calls.
    """
    lists = list(columns.values())
    count = len(lists[0])
    kinds: dict[tuple, list[int]] = {}
    for index, tensors in enumerate(zip(*lists, strict=True)):
        key = (tensors[0].device, *[t.dtype for t in tensors])
        kinds.setdefault(key, []).append(index)
    for (device, *dtypes), indices in kinds.items():
        whole = len(indices) == count

        def part(values: Sequence[Any], whole: bool = whole, indices: list[int] = indices) -> Sequence[Any]:
            return values if whole else [values[i] for i in indices]

        copied: list[tuple[Tensor, Tensor]] = []
        chosen: dict[int, Sequence[Tensor]] = {}
        for column, tensors in columns.items():
            originals = part(tensors)
            chosen[column] = originals
            if not all([t.is_contiguous() for t in originals]):
                chosen[column] = [t.contiguous() for t in originals]
                if column not in read_only:
                    copied += [(t, c) for t, c in zip(originals, chosen[column], strict=True) if t is not c]
        with on_device(device):
            table = (make_table or tables.get)(
                chosen,
                None if rows is None else part(rows),
                None if whole else indices,
                None if ids is None else part(ids),
            )
            types = {column: ELEMENT_TYPES[dtype] for column, dtype in zip(columns, dtypes, strict=True)}
            yield Batch(device, types, table, indices, copied)
