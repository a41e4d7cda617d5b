"""Many tensors as one small device table, so that one launch serves them all.

A row a tensor: addresses of parameter, gradient and state, length, parameter group, and whether every address is
a multiple of 16 bytes. Beside it a block map: which tensor, and which of its chunks of 1,024 elements, a program
serves. The map depends on the lengths only and is kept; the rows are rebuilt when an address changes (gradients
often do, after `zero_grad(set_to_none=True)`), and travel from pinned memory without blocking.
"""

# pyright: reportArgumentType=false

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

# Columns of a row.
PARAM = tl.constexpr(0)
GRAD = tl.constexpr(1)
EXP_AVG = tl.constexpr(2)
EXP_AVG_SCALE = tl.constexpr(3)
EXP_AVG_SQ = tl.constexpr(4)
EXP_AVG_SQ_SCALE = tl.constexpr(5)
NUMEL = tl.constexpr(6)
GROUP = tl.constexpr(7)
ALIGNED = tl.constexpr(8)
FIRST_BLOCK = tl.constexpr(9)
INDEX = tl.constexpr(10)  # in the caller's list: for multipliers and random bits
COLUMNS = tl.constexpr(11)

# Elements a program works on: 8 a thread with 4 warps, and two programs for the smallest LoRA tensors (2,048).
CHUNK = 1024
ALIGNMENT = 16  # bytes of the widest load

# Tables kept for later steps. A model needs one for each (device, dtype pair) and call, twice that when two sets
# of gradient buffers take turns.
CACHED_TABLES = 32


@dataclass(frozen=True)
class TensorTable:
    """Rows, block map and counts; see the module's docstring. Addresses are valid while the tensors live."""

    rows: Tensor  # int64 (tensors, COLUMNS)
    block_tensor: Tensor  # int32 (blocks,): the row a program serves
    block_chunk: Tensor  # int32 (blocks,): which chunk of it
    blocks: int
    tensors: int


class TableCache:
    """Finds or makes the table for given tensors; `rows_built` and `maps_built` count the work done."""

    def __init__(self) -> None:
        self._tables: OrderedDict[tuple, TensorTable] = OrderedDict()
        self._maps: OrderedDict[tuple, tuple[Tensor, Tensor, list[int]]] = OrderedDict()
        self._captured: list[TensorTable] = []
        self.rows_built = 0
        self.maps_built = 0

    def get(
        self,
        columns: dict[int, Sequence[Tensor]],
        groups: Sequence[int] | None = None,
        indices: Sequence[int] | None = None,
    ) -> TensorTable:
        """The table with these tensors; `columns` maps a column's number to one contiguous tensor a row.

        groups: the control row of each tensor, 0 where None. indices: its place in the caller's list, counted
        from 0 where None. All tensors are on one device; those of a row have
        the row's number of elements, except scales.
        """
        lists = list(columns.values())
        numels = tuple([t.numel() for t in lists[0]])
        addresses = tuple([tuple([t.data_ptr() for t in column]) for column in lists])
        device = lists[0][0].device
        groups = None if groups is None else tuple(groups)
        indices = None if indices is None else tuple(indices)
        key = (device, tuple(columns), numels, addresses, groups, indices)
        table = self._tables.get(key)
        if table is None:
            table = self._build(device, tuple(columns), numels, addresses, groups, indices)
            self._tables[key] = table
            if len(self._tables) > CACHED_TABLES:
                self._tables.popitem(last=False)
        else:
            self._tables.move_to_end(key)
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self._captured.append(table)  # a graph replays these addresses for as long as it lives
        return table

    def _build(
        self,
        device: torch.device,
        columns: tuple[int, ...],
        numels: tuple[int, ...],
        addresses: tuple[tuple[int, ...], ...],
        groups: Sequence[int] | None,
        indices: Sequence[int] | None,
    ) -> TensorTable:
        block_tensor, block_chunk, first_blocks = self._map(device, numels)
        rows = torch.zeros((len(numels), COLUMNS.value), dtype=torch.int64)
        pointers = torch.tensor(addresses, dtype=torch.int64)
        rows[:, list(columns)] = pointers.T
        rows[:, NUMEL.value] = torch.tensor(numels)
        if groups is not None:
            rows[:, GROUP.value] = torch.tensor(groups)
        rows[:, INDEX.value] = torch.arange(len(numels)) if indices is None else torch.tensor(indices)
        rows[:, ALIGNED.value] = (pointers % ALIGNMENT == 0).all(dim=0)
        rows[:, FIRST_BLOCK.value] = torch.tensor(first_blocks)
        self.rows_built += 1
        return TensorTable(
            rows=to_device(rows, device),
            block_tensor=block_tensor,
            block_chunk=block_chunk,
            blocks=len(block_tensor),
            tensors=len(numels),
        )

    def _map(self, device: torch.device, numels: tuple[int, ...]) -> tuple[Tensor, Tensor, list[int]]:
        key = (device, numels)
        if key not in self._maps:
            counts = torch.tensor([triton.cdiv(n, CHUNK) for n in numels])
            first = counts.cumsum(0) - counts
            block_tensor = torch.repeat_interleave(torch.arange(len(numels)), counts)
            block_chunk = torch.arange(len(block_tensor)) - first[block_tensor]
            self._maps[key] = (
                to_device(block_tensor.to(torch.int32), device),
                to_device(block_chunk.to(torch.int32), device),
                first.tolist(),  # made on the host above: nothing to wait for
            )
            self.maps_built += 1
            if len(self._maps) > CACHED_TABLES:
                self._maps.popitem(last=False)
        self._maps.move_to_end(key)
        return self._maps[key]

    def clear(self) -> None:
        """Forgets every table, also those a CUDA graph was captured with."""
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


def element_type(dtype: torch.dtype) -> str:
    """The name by which kernels know a storage dtype. TypeError for one they cannot serve."""
    names = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int8: "int8"}
    if dtype not in names:
        raise TypeError(f"expected float32, float16 or bfloat16 tensors, got {dtype}")
    return names[dtype]


# The pointer casts stand inside load_raw and store_raw: a hint put on the result of a call is lost when the call
# is inlined, and without the hint every access falls to one element.


@triton.jit
def load_raw(address, start, local, remaining, TYPE: tl.constexpr, MASKED: tl.constexpr):
    """The stored elements start + local of the tensor at `address` (int64); 0 from `remaining` on when MASKED.

    Unmasked, the address has to be a multiple of 16. bfloat16 elements are int16 bits.
    """
    if TYPE == "fp32":
        pointer = address.to(tl.pointer_type(tl.float32))
    elif TYPE == "fp16":
        pointer = address.to(tl.pointer_type(tl.float16))
    elif TYPE == "bf16":
        pointer = address.to(tl.pointer_type(tl.int16))
    else:
        pointer = address.to(tl.pointer_type(tl.int8))
    if MASKED:
        return tl.load(pointer + start + local, mask=local < remaining, other=0)
    else:
        return tl.load(tl.multiple_of(pointer, 16) + start + local)


@triton.jit
def store_raw(address, start, local, remaining, values, TYPE: tl.constexpr, MASKED: tl.constexpr):
    """Stores what load_raw loads."""
    if TYPE == "fp32":
        pointer = address.to(tl.pointer_type(tl.float32))
    elif TYPE == "fp16":
        pointer = address.to(tl.pointer_type(tl.float16))
    elif TYPE == "bf16":
        pointer = address.to(tl.pointer_type(tl.int16))
    else:
        pointer = address.to(tl.pointer_type(tl.int8))
    if MASKED:
        tl.store(pointer + start + local, values, mask=local < remaining)
    else:
        tl.store(tl.multiple_of(pointer, 16) + start + local, values)


@triton.jit
def load_values(address, start, local, remaining, TYPE: tl.constexpr, MASKED: tl.constexpr):
    """What load_raw loads, as fp32. A bfloat16 is the upper half of an fp32: sm_75 cannot convert it."""
    raw = load_raw(address, start, local, remaining, TYPE, MASKED)
    if TYPE == "bf16":
        return (raw.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return raw.to(tl.float32)
