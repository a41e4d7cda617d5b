"""Tables and launches: what is rebuilt and when, and how many kernels a step starts."""

import pytest
import torch

from cruxy_kernels import adamw, control, launch, lion, tables, telemetry
from cruxy_kernels import layout as L
from cruxy_kernels.codec_reference import quantize_blockwise


@pytest.fixture
def cache(monkeypatch):
    fresh = tables.TableCache()
    monkeypatch.setattr(launch, "tables", fresh)
    return fresh


@pytest.fixture
def started():
    names: list[str] = []

    def note(name: str) -> None:
        names.append(name)

    launch.observers.append(note)
    yield names
    launch.observers.remove(note)


def columns(table):
    rows = table.rows.cpu()
    return {name: rows[:, getattr(tables, name).value].tolist() for name in ("GRAD", "NUMEL", "ALIGNED", "INDEX")}


def test_rows_and_block_map(device, cache):
    base = torch.zeros(5000, device=device)
    grads = [base[:2048], base[4:4], base[1:1026], base[7]]
    table = cache.get({tables.GRAD.value: grads})
    assert columns(table) == {
        "GRAD": [g.data_ptr() for g in grads],
        "NUMEL": [2048, 0, 1025, 1],
        "ALIGNED": [1, int(base[4:4].data_ptr() % 16 == 0), 0, 0],
        "INDEX": [0, 1, 2, 3],
    }
    assert table.block_tensor.tolist() == [0, 0, 2, 2, 3]
    assert table.block_chunk.tolist() == [0, 1, 0, 1, 0]
    assert (table.blocks, table.tensors) == (5, 4)


def test_rebuilt_only_when_an_address_changes(device, cache):
    grads = [torch.zeros(n, device=device) for n in (100, 3000)]
    first = cache.get({tables.GRAD.value: grads})
    assert cache.get({tables.GRAD.value: [g.view(-1) for g in grads]}) is first  # other objects, same memory
    assert (cache.rows_built, cache.maps_built) == (1, 1)
    moved = cache.get({tables.GRAD.value: [grads[0], torch.zeros(3000, device=device)]})
    assert moved is not first
    assert (cache.rows_built, cache.maps_built) == (2, 1)
    cache.get({tables.GRAD.value: [grads[0], grads[1][:2000]]})
    assert (cache.rows_built, cache.maps_built) == (3, 2)
    assert cache.get({tables.GRAD.value: grads}, groups=[0, 1]) is not first


def test_old_tables_are_dropped(device, cache):
    kept = [torch.zeros(8, device=device) for _ in range(tables.CACHED_TABLES + 5)]
    for t in kept:
        cache.get({tables.GRAD.value: [t]})
    assert len(cache._tables) == tables.CACHED_TABLES


def census(device, count):
    """308 tensors as TinyLlama's LoRA has them in kind, small enough for the interpreter; 0-dim ones beyond."""
    shapes = [(8, 16), (256, 8), (130,)] * 102 + [(3,), (64,)]
    shapes = (shapes + [()] * count)[:count]
    p, g, m, v = ([torch.randn(s, device=device) for s in shapes] for _ in range(4))
    return p, g, m, [t.abs() for t in v]


def step(p, g, m, v, values, scales=None, rule="lion"):
    control.control_step(values, telemetry.gradient_telemetry(g, partial=True))
    if rule == "lion":
        lion.lion_update_(p, g, m, values, exp_avg_scales=scales)
    else:
        adamw.adamw_update_(p, g, m, v, values)


@pytest.mark.parametrize(("rule", "count"), [("lion", 1), ("adamw", 1), ("lion", 308)])
def test_three_launches(device, cache, started, control_rows, count, rule):
    p, g, m, v = census(device, count)
    values = control_rows()
    before = [t.clone() for t in p]
    for _ in range(2 if count == 1 else 1):
        started.clear()
        step(p, g, m, v, values, rule=rule)
        assert started == ["telemetry_kernel", "control_kernel", f"{rule}_kernel"]
    assert all((a != b).any() for a, b in zip(p, before, strict=True))
    assert cache.rows_built == 2  # gradients for telemetry; parameters, gradients and state for the update


def test_three_launches_for_5000_tensors(device, cache, started, control_rows, monkeypatch):
    """Counts what would be started: the interpreter would need minutes for so many programs."""
    if device == "cpu":
        for kernel in (telemetry.telemetry_kernel, control.control_kernel, lion.lion_kernel):
            monkeypatch.setattr(kernel, "run", lambda *args, **kwargs: None)
    p, g, m, v = census(device, 5000)
    pairs = [quantize_blockwise(t) for t in m]
    step(p, g, [c for c, _ in pairs], v, control_rows(), [s for _, s in pairs])
    assert started == ["telemetry_kernel", "control_kernel", "lion_kernel"]


def test_one_launch_more_for_each_dtype_pair(device, cache, started, control_rows):
    p, g, m, v = census(device, 3)
    p[1], g[1] = p[1].half(), g[1].half()
    step(p, g, m, v, control_rows())
    assert started == ["telemetry_kernel", "telemetry_kernel", "control_kernel", "lion_kernel", "lion_kernel"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_no_synchronisation(device, control_rows):
    p, g, m, v = census(device, 308)
    values = control_rows()
    pairs = [quantize_blockwise(t) for t in m]
    codes, scales = [c for c, _ in pairs], [s for _, s in pairs]
    step(p, g, codes, v, values, scales)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            g = [torch.randn_like(t) for t in p]  # new addresses
            step(p, g, codes, v, values, scales)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert values[0, L.SKIP] == 0


def test_rows_are_where_kernels_look(device, cache, control_rows):
    """Column numbers are one contract of the table and the kernels: a row written by hand gives the same step."""
    p, g, m = (torch.randn(8, device=device) for _ in range(3))
    wanted = [p.clone(), g.clone(), m.clone()]
    lion.lion_update_([wanted[0]], [wanted[1]], [wanted[2]], control_rows())
    row = [p.data_ptr(), g.data_ptr(), m.data_ptr(), 0, 0, 0, 8, 0, 0, 0, 0]
    rows = torch.tensor([row], dtype=torch.int64, device=device)
    zero = torch.zeros(1, dtype=torch.int32, device=device)
    control_vector = control_rows()
    launch.launch(
        lion.lion_kernel, 1, rows, zero, zero, control_vector, control_vector, control_vector, PARAM_TYPE="fp32",
        GRAD_TYPE="fp32", STATE_TYPE="fp32", HAS_MULTIPLIERS=False, HAS_GRAD_SCALE=False, MAXIMIZE=False,
        ROWS=tables.CHUNK // 64,
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip((p, g, m), wanted, strict=True))
