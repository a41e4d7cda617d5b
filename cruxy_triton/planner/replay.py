"""CUDA's caching allocator, replayed over a stream of allocations: what the process reserves, and the least it needs.

The rules are those of `c10/cuda/CUDACachingAllocator.cpp` with its default settings: sizes rounded to 512 bytes;
requests up to 1 MiB come from 2 MiB segments of their own pool, others from 20 MiB segments (requests under
10 MiB) or from segments rounded to 2 MiB; best fit; a block is split where the rest is worth keeping; neighbours
merge when freed; when the device refuses, segments that are wholly free go back to it and the request is retried.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

MiB = 2**20
SMALL_SIZE = 1 * MiB  # kSmallSize
SMALL_BUFFER = 2 * MiB  # kSmallBuffer
LARGE_BUFFER = 20 * MiB  # kLargeBuffer
MIN_LARGE = 10 * MiB  # kMinLargeAlloc
ROUND_LARGE = 2 * MiB  # kRoundLarge
MIN_BLOCK = 512  # kMinBlockSize


class OutOfMemory(Exception):
    """The device's capacity does not hold the request, even after every free segment was returned."""


class _Block:
    __slots__ = ("address", "free", "next", "prev", "size", "small")

    def __init__(self, address: int, size: int, small: bool):
        self.address = address
        self.size = size
        self.small = small
        self.free = False
        self.prev: _Block | None = None
        self.next: _Block | None = None


class CachingAllocator:
    """One device's allocator. `capacity` is what the device can give in all (bytes), None for no limit."""

    def __init__(self, capacity: int | None = None):
        self.capacity = capacity
        self.reserved = 0
        self.allocated = 0
        self.peak_reserved = 0
        self.peak_allocated = 0
        self.retries = 0
        self._free: dict[bool, list[tuple[int, int, _Block]]] = {True: [], False: []}
        self._bottom = 1 << 60

    def malloc(self, nbytes: int) -> _Block:
        size = max(MIN_BLOCK, -(-nbytes // MIN_BLOCK) * MIN_BLOCK)
        small = size <= SMALL_SIZE
        block = self._take(size, small) or self._segment(size, small)
        rest = block.size - size
        if rest >= MIN_BLOCK if small else rest > SMALL_SIZE:
            tail = _Block(block.address + size, rest, small)
            block.size = size
            tail.prev, tail.next = block, block.next
            if block.next is not None:
                block.next.prev = tail
            block.next = tail
            self._put(tail)
        block.free = False
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block

    def free(self, block: _Block) -> None:
        self.allocated -= block.size
        for near in (block.prev, block.next):
            if near is None or not near.free:
                continue
            self._drop(near)
            block.size += near.size
            if near is block.prev:
                block.address = near.address
                block.prev = near.prev
                if near.prev is not None:
                    near.prev.next = block
            else:
                block.next = near.next
                if near.next is not None:
                    near.next.prev = block
        self._put(block)

    def _put(self, block: _Block) -> None:
        block.free = True
        insort(self._free[block.small], (block.size, block.address, block))

    def _drop(self, block: _Block) -> None:
        pool = self._free[block.small]
        del pool[bisect_left(pool, (block.size, block.address))]

    def _take(self, size: int, small: bool) -> _Block | None:
        pool = self._free[small]
        at = bisect_left(pool, (size, -1))
        if at == len(pool):
            return None
        return pool.pop(at)[2]

    def _segment(self, size: int, small: bool) -> _Block:
        if small:
            amount = SMALL_BUFFER
        elif size < MIN_LARGE:
            amount = LARGE_BUFFER
        else:
            amount = -(-size // ROUND_LARGE) * ROUND_LARGE
        if self.capacity is not None and self.reserved + amount > self.capacity:
            self._return_segments()
            if self.reserved + amount > self.capacity:
                raise OutOfMemory
        self.reserved += amount
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        # A new segment lies below the older ones. Which of two free blocks of one size is taken depends on it;
        # this order was chosen because it reproduces a T4's eager runs; with the other, two miss by a whole block.
        self._bottom -= amount
        return _Block(self._bottom, amount, small)

    def _return_segments(self) -> None:
        """release_cached_blocks: every segment that is one free block goes back to the device."""
        self.retries += 1
        for small, pool in self._free.items():
            kept = []
            for entry in pool:
                block = entry[2]
                if block.prev is None and block.next is None:
                    self.reserved -= block.size
                else:
                    kept.append(entry)
            self._free[small] = kept


@dataclass(frozen=True)
class Replayed:
    """Peaks in bytes of one replay; `retries` counts how often cached segments had to be given back."""

    allocated: int
    reserved: int
    retries: int


def replay(events: Sequence[tuple[int, int]], capacity: int | None = None) -> Replayed:
    """Replay `(id, +bytes)` allocations and `(id, -bytes)` releases, in order.

    Raises OutOfMemory where `capacity` bytes do not do.
    """
    allocator = CachingAllocator(capacity)
    blocks: dict[int, _Block] = {}
    for ident, nbytes in events:
        if nbytes > 0:
            blocks[ident] = allocator.malloc(nbytes)
        elif nbytes < 0:
            allocator.free(blocks.pop(ident))
    return Replayed(allocator.peak_allocated, allocator.peak_reserved, allocator.retries)


def smallest_pool(events: Sequence[tuple[int, int]], tolerance: int = 4 * MiB, free_run: Replayed | None = None) -> int:
    """The least capacity (bytes, within `tolerance`) in which the replay survives.

    Between the peak of what is allocated and what an unlimited device would have had reserved. free_run: the replay on
    such a device, where it is known already.
    """
    free_run = free_run or replay(events)
    low, high = free_run.allocated - 1, free_run.reserved
    while high - low > tolerance:
        middle = (low + high) // 2
        try:
            replay(events, middle)
            high = middle
        except OutOfMemory:
            low = middle
    return high
