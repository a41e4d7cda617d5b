"""Many tensors as one small device table, so that one launch serves them all.

An entry per tensor: addresses of parameter, gradient and state, length, row of the control vector, and whether every
address is a multiple of 16 bytes. Beside it a map: which entry, and which of its chunks of 1,024 elements, a program
serves. The map depends on the lengths only and is kept; the entries are made anew when an address changes (gradients
often do, after `zero_grad(set_to_none=True)`), and travel from pinned memory without blocking.
"""

# pyright: reportArgumentType=false

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class TensorTable:
    """Entries, map and counts; see the module's docstring. Addresses are valid while the tensors live."""

    entries: Tensor  # int64 (tensors, COLUMNS)
    chunk_entry: Tensor  # int32 (chunks,): the entry that a program serves
    chunk_index: Tensor  # int32 (chunks,): which chunk of it
    chunks: int
    tensors: int


class TableCache(threading.local):
    """Finds or makes the table for given tensors; `entries_built` and `maps_built` count the work done.

    Each thread has its own, so that nobody drops what another one is about to launch with. A table that is made
    while a CUDA graph is captured is filled when the graph is replayed and not before: it is never handed out again.
    """

    def __init__(self) -> None:
        self._tables: OrderedDict[tuple, TensorTable] = OrderedDict()
        self._maps: OrderedDict[tuple, tuple[Tensor, Tensor, list[int]]] = OrderedDict()
        self._captured: list[TensorTable] = []
        self.entries_built = 0
        self.maps_built = 0

    def get(
        self,
        columns: dict[int, Sequence[Tensor]],
        rows: Sequence[int] | None = None,
        indices: Sequence[int] | None = None,
        ids: Sequence[int] | None = None,
    ) -> TensorTable:
        """The table with these tensors; `columns` maps a column's number to one contiguous tensor per entry.

        rows: the control row of each tensor, 0 where None. indices: its place in the caller's list, counted from 0
        where None; ids: its own number, the place where None. All tensors are on one device; those of an entry have
        its number of elements, except scales.
        """
        lists = list(columns.values())
        numels = tuple([t.numel() for t in lists[0]])
        addresses = tuple([tuple([t.data_ptr() for t in column]) for column in lists])
        device = lists[0][0].device
        numbers = tuple([None if n is None else tuple(n) for n in (rows, indices, ids)])
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            table = self._build(device, tuple(columns), numels, addresses, *numbers)
            self._captured.append(table)  # the graph replays these addresses for as long as it lives
            return table
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        key = (device, stream, tuple(columns), numels, addresses, numbers)
        table = self._tables.get(key)
        if table is None:
            table = self._tables[key] = self._build(device, tuple(columns), numels, addresses, *numbers, stream=stream)
            if len(self._tables) > CACHED_TABLES:
                self._tables.popitem(last=False)
        else:
            self._tables.move_to_end(key)
        return table

    def _build(
        self,
        device: torch.device,
        columns: tuple[int, ...],
        numels: tuple[int, ...],
        addresses: tuple[tuple[int, ...], ...],
        rows: Sequence[int] | None,
        indices: Sequence[int] | None,
        ids: Sequence[int] | None,
        stream: int | None = None,
    ) -> TensorTable:
        """`stream` is None during a capture: the map is then made for the graph alone."""
        chunk_entry, chunk_index, first_chunks = self._map(device, numels, stream)
        entries = torch.zeros((len(numels), COLUMNS), dtype=torch.int64)
        pointers = torch.tensor(addresses, dtype=torch.int64)
        entries[:, list(columns)] = pointers.T
        entries[:, NUMEL] = torch.tensor(numels)
        if rows is not None:
            entries[:, ROW] = torch.tensor(rows)
        entries[:, INDEX] = torch.arange(len(numels)) if indices is None else torch.tensor(indices)
        entries[:, ID] = entries[:, INDEX] if ids is None else torch.tensor(ids)
        entries[:, ALIGNED] = (pointers % ALIGNMENT == 0).all(dim=0)
        entries[:, FIRST_CHUNK] = torch.tensor(first_chunks)
        self.entries_built += 1
        return TensorTable(
            entries=to_device(entries, device),
            chunk_entry=chunk_entry,
            chunk_index=chunk_index,
            chunks=len(chunk_entry),
            tensors=len(numels),
        )

    def _map(
        self, device: torch.device, numels: tuple[int, ...], stream: int | None
    ) -> tuple[Tensor, Tensor, list[int]]:
        key = (device, stream, numels)
        found = None if stream is None else self._maps.get(key)
        if found is not None:
            self._maps.move_to_end(key)
            return found
        counts = (torch.tensor(numels, dtype=torch.int64) + CHUNK - 1) // CHUNK
        first = counts.cumsum(0) - counts
        chunk_entry = torch.repeat_interleave(torch.arange(len(numels)), counts)
        chunk_index = torch.arange(len(chunk_entry)) - first[chunk_entry]
        made = (
            to_device(chunk_entry.to(torch.int32), device),
            to_device(chunk_index.to(torch.int32), device),
            first.tolist(),  # made on the host above: nothing to wait for
        )
        self.maps_built += 1
        if stream is not None:
            self._maps[key] = made
            if len(self._maps) > CACHED_TABLES:
                self._maps.popitem(last=False)
        return made

    def clear(self) -> None:
        """Forgets this thread's tables, also those a CUDA graph was captured with."""
        self._tables.clear()
        self._maps.clear()
        self._captured.clear()


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """`values` (CPU) on `device`, without the host waiting: pinned memory lives until its copy has run."""
    if device.type == "cpu":
        return values
    if device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


tables = TableCache()


# The names by which kernels know a storage dtype.
ELEMENT_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int8: "int8"}
