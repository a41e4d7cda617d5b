"""Many tensors as one small device table, so that one launch serves them all.

An entry per tensor: addresses of parameter, gradient and state, length, row of the control vector, and whether every
address is a multiple of 16 bytes. Beside it a map: which entry, and which of its chunks of 1,024 elements, a program
serves. A table is made anew when an address changes (gradients' often do, after `zero_grad(set_to_none=True)`), and
travels from pinned memory without blocking.
"""

# pyright: reportArgumentType=false

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Columns of an entry.
PARAM, GRAD = 0, 1
STATE, SCALE = 2, 3  # of the first state buffer; those of the second one follow
STATE_COLUMNS = 2
NUMEL, ROW, ALIGNED, FIRST_CHUNK = 6, 7, 8, 9
INDEX = 10  # in the caller's list: for multipliers
ID = 11  # the tensor's own number: for random bits
COLUMNS = 12

# Elements per program: 8 per thread with 4 warps, and two programs for the smallest LoRA tensors (2,048).
CHUNK = 1024
ALIGNMENT = 16  # bytes of the widest load

# Tables kept for later steps. A model needs one for each (device, dtype pair) and call, twice that when two sets
# of gradient buffers take turns.
CACHED_TABLES = 32

# Triton's cache of compiled kernels does not see numbers that a kernel reads from a module; this argument shows it.
KEY = "-".join(
    map(str, (PARAM, GRAD, STATE, SCALE, STATE_COLUMNS, NUMEL, ROW, ALIGNED, FIRST_CHUNK, INDEX, ID, COLUMNS))
)


@dataclass
class TensorTable:
    """Entries, map and counts; see the module's docstring. Addresses are valid while the tensors live."""

    entries: Tensor  # int64 (tensors, COLUMNS)
    chunk_entry: Tensor  # int32 (chunks,): the entry that a program serves
    chunk_index: Tensor  # int32 (chunks,): which chunk of it
    chunks: int
    tensors: int
    on_host: Tensor  # what `entries` was copied from
    others_aligned: Tensor  # bool (tensors,): of every column but GRAD

    def set_grads(self, addresses: Tensor) -> None:
        """Points the entries at other gradients, int64 (tensors,); for a table that no cache holds."""
        self.on_host[:, GRAD] = addresses
        self.on_host[:, ALIGNED] = self.others_aligned & (addresses % ALIGNMENT == 0)
        if self.entries is not self.on_host:
            # A fresh piece of pinned memory each time: the copy of the last one may still be under way.
            self.entries.copy_(pinned(self.on_host, self.entries.device), non_blocking=True)


Columns = dict[int, Sequence[Tensor]]
Numbers = Sequence[int] | None


def build(columns: Columns, rows: Numbers = None, indices: Numbers = None, ids: Numbers = None) -> TensorTable:
    """The table with these tensors; `columns` maps a column's number to one contiguous tensor per entry.

    rows: the control row of each tensor, 0 where None. indices: its place in the caller's list, counted from 0 where
    None; ids: its own number, the place where None. All tensors are on one device; those of an entry have its number
    of elements, except scales.
    """
    lists = list(columns.values())
    numels = torch.tensor([t.numel() for t in lists[0]], dtype=torch.int64)
    device = lists[0][0].device
    entries = torch.zeros((len(numels), COLUMNS), dtype=torch.int64)
    aligned = torch.ones(len(numels), dtype=torch.bool)
    for column, tensors in columns.items():
        entries[:, column] = torch.tensor([t.data_ptr() for t in tensors])
        if column != GRAD:
            aligned &= entries[:, column] % ALIGNMENT == 0
    counts = (numels + CHUNK - 1) // CHUNK
    first = counts.cumsum(0) - counts
    entries[:, NUMEL] = numels
    entries[:, FIRST_CHUNK] = first
    entries[:, ALIGNED] = aligned & (entries[:, GRAD] % ALIGNMENT == 0)
    if rows is not None:
        entries[:, ROW] = torch.tensor(rows)
    entries[:, INDEX] = torch.arange(len(numels)) if indices is None else torch.tensor(indices)
    entries[:, ID] = entries[:, INDEX] if ids is None else torch.tensor(ids)
    chunk_entry = torch.repeat_interleave(torch.arange(len(numels)), counts)
    chunk_index = torch.arange(len(chunk_entry)) - first[chunk_entry]
    return TensorTable(
        entries=to_device(entries, device),
        chunk_entry=to_device(chunk_entry.to(torch.int32), device),
        chunk_index=to_device(chunk_index.to(torch.int32), device),
        chunks=len(chunk_entry),
        tensors=len(numels),
        on_host=entries,
        others_aligned=aligned,
    )


class TableCache(threading.local):
    """Finds or builds the table for given tensors; `built` counts.

    Each thread has its own, so that nobody drops what another one is about to launch with. A table that is made
    while a CUDA graph is captured is filled when the graph is replayed and not before: it is never handed out again.
    """

    def __init__(self) -> None:
        self._tables: OrderedDict[tuple, TensorTable] = OrderedDict()
        self._captured: list[Any] = []  # what graphs read and copy from when they are replayed
        self.built = 0

    def get(self, columns: Columns, rows: Numbers = None, indices: Numbers = None, ids: Numbers = None) -> TensorTable:
        """`build` with these arguments, or what it made for the same addresses before."""
        lists = list(columns.values())
        device = lists[0][0].device
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        numels = tuple([t.numel() for t in lists[0]])
        addresses = tuple([tuple([t.data_ptr() for t in column]) for column in lists])
        numbers = tuple([None if n is None else tuple(n) for n in (rows, indices, ids)])
        key = (device, stream, tuple(columns), numels, addresses, numbers)
        table = self._tables.get(key)
        if is_capturing(device):
            table = build(columns, rows, indices, ids) if table is None else table
            self.keep(table)
        elif table is None:
            table = self._tables[key] = build(columns, rows, indices, ids)
            self.built += 1
            if len(self._tables) > CACHED_TABLES:
                self._tables.popitem(last=False)
        else:
            self._tables.move_to_end(key)
        return table

    def keep(self, captured: Any) -> None:
        """Keeps what a graph that is being captured will use; nothing says when the graph is gone (`clear` does)."""
        self._captured.append(captured)

    def clear(self) -> None:
        """Forgets this thread's tables, also those a CUDA graph was captured with."""
        self._tables.clear()
        self._captured.clear()


def is_capturing(device: torch.device) -> bool:
    """Whether calls on this device are recorded in a CUDA graph at the moment."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """`values` (CPU) on `device`, without the host waiting."""
    return values if device.type == "cpu" else pinned(values, device).to(device, non_blocking=True)


def pinned(values: Tensor, device: torch.device) -> Tensor:
    """A copy of `values` from which `device` copies in the background; it lives until such a copy has run."""
    if device.type != "cuda":
        return values
    copy = values.pin_memory()
    if is_capturing(device):
        tables.keep(copy)  # each replay copies from it again
    return copy


tables = TableCache()


# The names by which kernels know a storage dtype.
ELEMENT_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int8: "int8",
                 torch.uint8: "uint8"}  # fmt: skip
