"""The allocator's replay: CUDACachingAllocator's rules on hand-made streams, and what must hold for any stream."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cruxy_triton.planner.replay import CachingAllocator, OutOfMemory, replay, smallest_pool

MiB = 2**20


def reserved_after(*sizes: int) -> int:
    allocator = CachingAllocator()
    for size in sizes:
        allocator.malloc(size)
    return allocator.reserved


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        pytest.param([1], 2 * MiB, id="the smallest request takes a 2 MiB segment"),
        pytest.param([MiB], 2 * MiB, id="1 MiB is still small"),
        pytest.param([MiB, MiB], 2 * MiB, id="two of them share the segment"),
        pytest.param([MiB, MiB, 1], 4 * MiB, id="a third opens another"),
        pytest.param([MiB + 1], 20 * MiB, id="above 1 MiB: a 20 MiB segment"),
        pytest.param([9 * MiB, 9 * MiB], 20 * MiB, id="two of 9 MiB share it"),
        pytest.param([10 * MiB], 10 * MiB, id="from 10 MiB on, a segment of its own"),
        pytest.param([10 * MiB + 1], 12 * MiB, id="rounded up to 2 MiB"),
        pytest.param([8_519_680, 8_519_680], 20 * MiB, id="both cuBLAS workspaces in one segment"),
    ],
)
def test_segments(sizes, expected):
    assert reserved_after(*sizes) == expected


def test_sizes_are_rounded_to_512():
    allocator = CachingAllocator()
    allocator.malloc(1)
    allocator.malloc(513)
    assert allocator.allocated == 512 + 1024


def test_a_rest_of_up_to_a_mebibyte_is_not_split_off():
    allocator = CachingAllocator()
    block = allocator.malloc(20 * MiB)
    allocator.free(block)
    assert allocator.malloc(19 * MiB).size == 20 * MiB
    assert allocator.allocated == 20 * MiB


def test_neighbours_merge():
    allocator = CachingAllocator()
    blocks = [allocator.malloc(5 * MiB) for _ in range(4)]
    assert allocator.reserved == 20 * MiB
    for block in (blocks[0], blocks[2], blocks[1], blocks[3]):
        allocator.free(block)
    assert allocator.malloc(20 * MiB).size == 20 * MiB
    assert allocator.reserved == 20 * MiB


def test_best_fit_takes_the_smallest_block_that_does():
    allocator = CachingAllocator()
    large, kept, small = allocator.malloc(64 * MiB), allocator.malloc(12 * MiB), allocator.malloc(32 * MiB)
    allocator.free(large)
    allocator.free(small)
    assert allocator.malloc(31 * MiB).address == small.address
    assert kept.size == 12 * MiB


def test_free_segments_go_back_before_it_fails():
    events = [(1, 60 * MiB), (1, -60 * MiB), (2, 70 * MiB)]
    assert replay(events).reserved == 130 * MiB
    tight = replay(events, 100 * MiB)
    assert tight.retries == 1
    assert tight.reserved == 70 * MiB
    with pytest.raises(OutOfMemory):
        replay(events, 69 * MiB)


streams = st.lists(st.tuples(st.integers(1, 40 * MiB), st.integers(0, 10)), min_size=1, max_size=60)


def events_of(stream) -> list[tuple[int, int]]:
    """Allocations, each released `age` allocations later."""
    due: dict[int, list[int]] = {}
    events = []
    sizes = {}
    for index, (size, age) in enumerate(stream):
        for ident in due.pop(index, []):
            events.append((ident, -sizes[ident]))
        sizes[index] = size
        events.append((index, size))
        due.setdefault(index + 1 + age, []).append(index)
    return events


@settings(max_examples=60, deadline=None)
@given(streams)
def test_any_stream(stream):
    events = events_of(stream)
    found = replay(events)
    live = peak = 0
    for _, size in events:
        rounded = -(-abs(size) // 512) * 512
        live += rounded if size > 0 else -rounded
        peak = max(peak, live)
    assert peak <= found.allocated <= found.reserved
    pool = smallest_pool(events, 2 * MiB)
    assert found.allocated <= pool <= found.reserved
    assert replay(events, pool).reserved <= pool
