"""Tables and launches: what is rebuilt and when, and how many launches there are in one step."""

import gc
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cases import CODEC_CASES, wide

from cruxy_kernels import (
    adamw_update_,
    control_step,
    gradient_telemetry,
    launch,
    lion_update_,
    quantize_blockwise,
    tables,
)
from cruxy_kernels import layout as L
from cruxy_kernels.backends import dispatch
from cruxy_kernels.codec import CODECS
from cruxy_kernels.laws import control as control_module
from cruxy_kernels.laws import telemetry as telemetry_module
from cruxy_kernels.rules import RULES
from cruxy_kernels.update import constants, update_kernel


@pytest.fixture
def cache(monkeypatch):
    fresh = tables.TableCache()
    monkeypatch.setattr(launch, "tables", fresh)
    return fresh


def columns(table):
    entries = table.entries.cpu()
    names = ("GRAD", "NUMEL", "ALIGNED", "INDEX", "ID", "ROW", "FIRST_CHUNK")
    return {name: entries[:, getattr(tables, name)].tolist() for name in names}


def test_entries_and_map(device, cache):
    base = torch.zeros(5000, device=device)
    grads = [base[:2048], base[4:4], base[1:1026], base[7]]
    table = cache.get({tables.GRAD: grads})
    wanted = {
        "GRAD": [g.data_ptr() for g in grads],
        "NUMEL": [2048, 0, 1025, 1],
        "ALIGNED": [1, int(base[4:4].data_ptr() % 16 == 0), 0, 0],
        "INDEX": [0, 1, 2, 3],
        "ID": [0, 1, 2, 3],
        "ROW": [0, 0, 0, 0],
        "FIRST_CHUNK": [0, 2, 2, 4],
    }
    assert columns(table) == wanted
    assert table.chunk_entry.tolist() == [0, 0, 2, 2, 3]
    assert table.chunk_index.tolist() == [0, 1, 0, 1, 0]
    assert (table.chunks, table.tensors) == (5, 4)
    part = cache.get({tables.GRAD: grads}, rows=[3, 2, 1, 0], indices=[9, 7, 5, 3], ids=[20, 21, 22, 23])
    assert columns(part) == wanted | {"ROW": [3, 2, 1, 0], "INDEX": [9, 7, 5, 3], "ID": [20, 21, 22, 23]}
    assert columns(cache.get({tables.GRAD: grads}, indices=[9, 7, 5, 3]))["ID"] == [9, 7, 5, 3]


def test_rebuilt_only_when_an_address_changes(device, cache):
    grads = [torch.zeros(n, device=device) for n in (100, 3000)]
    first = cache.get({tables.GRAD: grads})
    assert cache.get({tables.GRAD: [g.view(-1) for g in grads]}) is first  # other objects, same memory
    assert cache.built == 1
    moved = cache.get({tables.GRAD: [grads[0], torch.zeros(3000, device=device)]})
    assert moved is not first
    assert cache.built == 2
    cache.get({tables.GRAD: [grads[0], grads[1][:2000]]})
    assert cache.built == 3
    assert cache.get({tables.GRAD: grads}, rows=[0, 1]) is not first


def test_old_tables_are_dropped(device, cache):
    kept = [torch.zeros(8 + i, device=device) for i in range(tables.CACHED_TABLES + 5)]
    for t in kept:
        cache.get({tables.GRAD: [t]})
    assert len(cache._tables) == tables.CACHED_TABLES


@pytest.fixture
def stream(monkeypatch, cache):
    """What tables.py asks of CUDA, answered by the test: there need be no device. `.on` and `.capturing` are set."""
    state = SimpleNamespace(on=1, capturing=False, sources=[])

    def pin_memory(values):
        copy = values.clone()
        state.sources.append(weakref.ref(copy))
        return copy

    monkeypatch.setattr(tables, "tables", cache)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(tables, "to_device", lambda values, device: tables.pinned(values, device).clone())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: SimpleNamespace(cuda_stream=state.on))
    return state


def on_cuda(numel, address):
    return SimpleNamespace(numel=lambda: numel, data_ptr=lambda: address, device=torch.device("cuda:0"))


def test_a_table_of_a_captured_graph_is_never_handed_out_again(cache, stream):
    """Its contents arrive when the graph is replayed, not before: an eager step at those addresses needs its own."""
    grads = {tables.GRAD: [on_cuda(3000, 4096), on_cuda(10, 64)]}
    stream.capturing = True
    captured = [cache.get(grads) for _ in range(2)]
    stream.capturing = False
    eager = cache.get(grads)
    ours = [eager, *captured]
    for name in ("entries", "chunk_entry", "chunk_index"):
        assert len({id(getattr(table, name)) for table in ours}) == 3
    assert cache.get(grads) is eager
    # A graph may read a table that an eager step has filled, and then keeps it when the cache drops it.
    stream.capturing = True
    again = cache.get(grads)
    for i in range(3 * tables.CACHED_TABLES):
        stream.capturing = i % 2 == 0
        cache.get({tables.GRAD: [on_cuda(3000 + i, 4096)]})
    assert not any(kept is again for kept in cache._tables.values())
    assert all(any(kept is table for kept in cache._captured) for table in (*captured, again))


def test_what_a_captured_graph_copies_from_stays(cache, stream):
    """Every replay copies again from the pinned memory: freed, it would hold another copy's values by then."""
    stream.capturing = True
    cache.get({tables.GRAD: [on_cuda(3000, 4096), on_cuda(10, 64)]})
    stream.capturing = False
    cache.get({tables.GRAD: [on_cuda(3000, 8192), on_cuda(10, 128)]})
    gc.collect()
    assert [source() is None for source in stream.sources] == [False] * 3 + [True] * 3
    cache.clear()
    gc.collect()
    assert all(source() is None for source in stream.sources)


def test_other_gradients_in_a_table_of_ones_own(device):
    """The addresses and what they do to the alignment; everything else stays."""
    p = [torch.zeros(100, device=device), torch.zeros(101, device=device)[1:]]
    table = tables.build({tables.PARAM: p, tables.GRAD: p}, rows=[1, 0], ids=[5, 6])
    before = table.entries.clone()
    assert before[:, tables.ALIGNED].tolist() == [1, 0]
    for addresses, aligned in (([8192, 128], [1, 0]), ([4100, 64], [0, 0]), ([64, 64], [1, 0])):
        table.set_grads(torch.tensor(addresses))
        wanted = before.clone()
        wanted[:, tables.GRAD] = torch.tensor(addresses)
        wanted[:, tables.ALIGNED] = torch.tensor(aligned)
        assert torch.equal(table.entries, wanted)


def test_a_table_belongs_to_its_stream(cache, stream):
    """Its copy is queued on that stream: a launch on another one might read it before."""
    grads = {tables.GRAD: [on_cuda(3000, 4096)]}
    first = cache.get(grads)
    stream.on = 2
    second = cache.get(grads)
    assert second is not first
    assert second.chunk_entry is not first.chunk_entry
    stream.on = 1
    assert cache.get(grads) is first


def census(device, count):
    """308 tensors as TinyLlama's LoRA has them in kind, small enough for the interpreter; 0-dim ones beyond."""
    shapes = [(8, 16), (32, 8), (130,)] * 102 + [(3,), (64,)]
    shapes = (shapes + [()] * count)[:count]
    p, g, m, v = ([torch.randn(s, device=device) for s in shapes] for _ in range(4))
    return p, g, m, [t.abs() for t in v]


def step(p, g, m, v, control, scales=None, rule="lion"):
    telemetry = gradient_telemetry(g, partial=True, backend="triton")
    control_step(control, telemetry, backend="triton")
    if rule == "lion":
        lion_update_(p, g, m, control, exp_avg_scales=scales, backend="triton")
    else:
        adamw_update_(p, g, m, v, control, backend="triton")


@pytest.mark.parametrize(("rule", "count"), [("lion", 1), ("adamw", 1), ("lion", 308)])
def test_three_launches(device, cache, started, control_rows, count, rule):
    p, g, m, v = census(device, count)
    control = control_rows(device=device)
    before = [t.clone() for t in p]
    for _ in range(2 if count == 1 else 1):
        started.clear()
        step(p, g, m, v, control, rule=rule)
        assert started == ["telemetry_kernel", "control_kernel", "update_kernel"]
    assert all((a != b).any() for a, b in zip(p, before, strict=True))
    assert cache.built == 2  # gradients for telemetry; parameters, gradients and state for the update


def test_three_launches_for_5000_tensors(device, cache, started, control_rows, monkeypatch):
    """Counts what would be started: the interpreter would need minutes for so many programs."""
    if device == "cpu":
        for kernel in (telemetry_module.telemetry_kernel, control_module.control_kernel, update_kernel):
            monkeypatch.setattr(kernel, "run", lambda *args, **kwargs: None)
    p, g, m, v = census(device, 5000)
    pairs = [quantize_blockwise(t, backend="torch") for t in m]
    step(p, g, [c for c, _ in pairs], v, control_rows(device=device), [s for _, s in pairs])
    assert started == ["telemetry_kernel", "control_kernel", "update_kernel"]


def test_one_launch_more_for_each_dtype_pair(device, cache, started, control_rows):
    p, g, m, v = census(device, 3)
    p[1], g[1] = p[1].half(), g[1].half()
    step(p, g, m, v, control_rows(device=device))
    assert started == ["telemetry_kernel", "telemetry_kernel", "control_kernel", "update_kernel", "update_kernel"]


@pytest.mark.gpu
def test_no_synchronisation(device, control_rows):
    p, g, m, v = census(device, 308)
    control = control_rows(device=device)
    pairs = [quantize_blockwise(t) for t in m]
    codes, scales = [c for c, _ in pairs], [s for _, s in pairs]
    step(p, g, codes, v, control, scales)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            g = [torch.randn_like(t) for t in p]  # new addresses
            step(p, g, codes, v, control, scales)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert control[0, L.SKIP] == 0


def test_entries_are_where_kernels_look(device, cache, control_rows):
    """Column numbers are one contract of the table and the kernels: an entry written by hand gives the same step."""
    p, g, m = (torch.randn(8, device=device) for _ in range(3))
    wanted = [p.clone(), g.clone(), m.clone()]
    control = control_rows(device=device)
    lion_update_([wanted[0]], [wanted[1]], [wanted[2]], control, backend="triton")
    # parameter, gradient, state and its scales, the same of a second state, elements, row, alignment, first chunk,
    # index, number
    entry = [p.data_ptr(), g.data_ptr(), m.data_ptr(), 0, 0, 0, 8, 0, 0, 0, 0, 0]
    entries = torch.tensor([entry], dtype=torch.int64, device=device)
    zero = torch.zeros(1, dtype=torch.int32, device=device)
    launch.launch(
        update_kernel, 1, entries, zero, zero, control, control, control, HAS_MULTIPLIERS=False, HAS_FACTORS=False,
        **constants(RULES["lion"], RULES["lion"].codecs(32), 0, "fp32", "fp32", "fp32"),
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip((p, g, m), wanted, strict=True))


def test_everything_runs_on_the_tensors_own_device(device, monkeypatch, control_rows, started):
    """Triton launches on the current device: whatever is launched has made that of its tensors the current one."""
    entered = []

    class Entered:
        def __init__(self, wanted):
            self.wanted = wanted

        def __enter__(self):
            entered.append(self.wanted)
            inside.append(True)

        def __exit__(self, *error):
            inside.pop()

    inside: list[bool] = []
    outside = []
    for module in (dispatch, launch, control_module, telemetry_module):
        monkeypatch.setattr(module, "on_device", Entered)
    launch.observers.append(lambda name: None if inside else outside.append(name))
    try:
        p, g, m, v = census(device, 2)
        step(p, g, m, v, control_rows(device=device))
        codes, scales = quantize_blockwise(p[0], backend="triton")
        dispatch.dequantize_blockwise(codes, scales, backend="triton")
        gradient_telemetry(g, backend="triton")
    finally:
        launch.observers.pop()
    assert {"quantize_kernel", "dequantize_kernel", "total_kernel", "update_kernel"} <= set(started)
    assert outside == []
    assert {torch.device(d).type for d in entered} == {torch.device(device).type}


@pytest.mark.parametrize("name", [name for name, codec in CODECS.items() if codec.block])
def test_codecs_write_nothing_beyond_their_tensors(device, name):
    """Codes, scales and values that are cut out of buffers, at any offset: the cells around them keep their bits."""
    codec = CODECS[name]
    for offset, length in ((0, 100), (1, 1024), (7, 1025), (64, 2047), (16, 4096)):
        x = torch.rand(length + 20, device=device)[offset % 16 :][:length]
        count, stored = codec.scale_count(length), codec.shape(x.shape).numel()
        codes, scales, values = (
            torch.full((offset + n + 200,), 7, dtype=dtype, device=device)
            for n, dtype in ((stored, codec.dtype), (count, codec.scale_dtype), (length, torch.float32))
        )
        cut = codes[offset:][:stored], scales[offset:][:count], values[offset:][:length]
        bits16 = cut[1].view(torch.int16)
        dispatch._launch_codec("quantize_kernel", length, x, cut[0], bits16, STORE=codec.store)
        dispatch._launch_codec("dequantize_kernel", length, cut[0], bits16, cut[2], LOAD=codec.load)
        wanted, wanted_scales = quantize_blockwise(x, codec=name, backend="torch")
        if device == "cpu":
            assert torch.equal(cut[0], wanted)
        assert torch.equal(cut[1], wanted_scales)
        limit = CODEC_CASES[name].error(wide(x), wide(cut[1]).repeat(codec.block)[:length])
        assert (np.abs(wide(cut[2]) - wide(x)) <= limit).all()
        for buffer, n in ((codes, stored), (scales, count), (values, length)):
            assert (buffer[:offset] == 7).all()
            assert (buffer[offset + n :] == 7).all()
