"""Two threads at once, each with more tables than are kept: the same bits as one thread alone."""

import sys
import threading
from contextlib import contextmanager

import pytest
import torch

from cruxy_kernels import CODECS, adamw_update_, control_step, gradient_telemetry, launch, lion_update_, new_control
from cruxy_kernels.tables import CACHED_TABLES


@pytest.fixture(autouse=True)
def kernels_in_turn(place, monkeypatch):
    """Triton's interpreter keeps the program it is at in a global: kernels take turns there, and nothing else does."""
    if place == ("triton", "cpu"):
        lock, start = threading.Lock(), launch.launch

        def one(*arguments, **constants):
            with lock:
                start(*arguments, **constants)

        for module in [
            m for name, m in sys.modules.items() if name.startswith("cruxy_kernels") and hasattr(m, "launch")
        ]:
            if module.launch is start:
                monkeypatch.setattr(module, "launch", one)


@contextmanager
def quick_switches():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


def work(place, seed, sets):
    """Steps of `sets` sets of tensors in turn, so that every cache of tables is always full of other ones."""
    generator = torch.Generator().manual_seed(seed)

    def make(n):
        return torch.randn(n, generator=generator).to(place.device)

    models = []
    for i in range(sets):
        sizes = [65 + i, 3, 130]
        p, g, m, v = ([make(n) for n in sizes] for _ in range(4))
        codes, scales = zip(*[CODECS["softsign8"].encode(t) for t in m], strict=True)
        models.append((p, g, m, [t.abs() for t in v], list(codes), list(scales), new_control(device=place.device)))
    for _ in range(2):
        for p, g, m, v, codes, scales, control in models:
            control_step(control, gradient_telemetry(g, backend=place.backend), backend=place.backend)
            lion_update_(p, g, codes, control, exp_avg_scales=scales, backend=place.backend)
            adamw_update_(p, g, m, v, control, backend=place.backend)
    return [t for model in models for part in model for t in (part if isinstance(part, list) else [part])]


def test_two_threads_are_as_good_as_one(place):
    sets = CACHED_TABLES // 3 + 4  # three tables for each set
    alone = [work(place, seed, sets) for seed in (1, 2)]
    together: list = [None, None]
    barrier = threading.Barrier(2, timeout=60)

    def run(i):
        barrier.wait()
        try:
            together[i] = work(place, i + 1, sets)
        except Exception as error:  # shown by the assertion below
            together[i] = error

    with quick_switches():
        threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for one, other in zip(alone, together, strict=True):
        assert isinstance(other, list), repr(other)
        assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(one, other, strict=True))
