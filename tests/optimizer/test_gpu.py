"""The optimizer on a CUDA device: no synchronization in a step, CUDA graphs, the CPU's trajectory."""

import math

import pytest
import torch
from torch.nn import Parameter

from cruxy_triton import CruxyOptimizer, MetaLion

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SETTINGS = {
    "adamw": {},
    "lion": {"use_lion": True, "betas": (0.9, 0.99), "lr": 1e-4},
    "lion8": {"use_lion": True, "betas": (0.9, 0.99), "lr": 1e-4, "state_bits": 8},
    "adamw8": {"lr": 1e-3, "state_bits": 8},
    "lion4": {"use_lion": True, "betas": (0.9, 0.99), "lr": 1e-4, "state_bits": 4},
    "v1": {"mode": "stability_v1"},
    "v2": {"mode": "stability_v2"},
    "clip": {"clip": "tensor"},
}


def parameters(device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(s, generator=generator).to(device, dtype)) for s in ((64, 33), (33,), (5, 7, 3))]


def gradients(params, step):
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)


@pytest.mark.parametrize("name", list(SETTINGS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_no_synchronization(name, dtype):
    params = parameters("cuda", dtype)
    optimizer = CruxyOptimizer(params, **SETTINGS[name])
    loss = torch.tensor(1.0, device="cuda")
    optimizer.grad_scale = torch.tensor(1024.0, device="cuda")
    optimizer.found_inf = torch.tensor(0.0, device="cuda")
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
    gradients(params, 0)
    for _ in range(3):  # state, compilation
        optimizer.step(loss=loss)
        schedule.step()
    optimizer.metrics()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(25):
            optimizer.step(loss=loss)
            schedule.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert optimizer.metrics(wait=True)["step"] == 28


@pytest.mark.parametrize("name", list(SETTINGS))
def test_the_cpus_trajectory(name):
    runs = []
    for device in ("cpu", "cuda"):
        params = parameters(device)
        optimizer = CruxyOptimizer(params, **SETTINGS[name])
        for step in range(40):
            gradients(params, step)
            if step == 20:
                params[0].grad[0, 0] = math.nan
            optimizer.step(loss=math.cos(step))
        runs.append(([p.detach().cpu() for p in params], optimizer.metrics(wait=True)))
    difference = sum((p - q).square().sum() for p, q in zip(runs[0][0], runs[1][0], strict=True))
    assert (difference / sum(p.square().sum() for p in runs[0][0])).sqrt() < 1e-4
    assert runs[1][1]["skipped_steps"] == 1
    assert runs[0][1]["lr"] == pytest.approx(runs[1][1]["lr"], rel=1e-4)


@pytest.mark.parametrize("clip", ["global", "tensor"])
def test_in_a_cuda_graph(clip):
    """A captured step, replayed, is the run without a graph: slow loop and history included."""
    plain, captured = parameters("cuda"), parameters("cuda")
    a, b = (
        MetaLion(params, capturable=True, lr=torch.tensor(1e-4, device="cuda"), clip=clip)
        for params in (plain, captured)
    )
    loss = torch.tensor(1.0, device="cuda")
    for params in (plain, captured):
        gradients(params, 0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            b.step(loss=loss)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        b.step(loss=loss)
    for _ in range(3):
        a.step(loss=loss)
    for step in range(30):
        generator = torch.Generator().manual_seed(step)
        for p, q in zip(plain, captured, strict=True):
            grad = torch.randn(p.shape, generator=generator).cuda()
            p.grad.copy_(grad)
            q.grad.copy_(grad)
        loss.fill_(math.cos(step))
        a.step(loss=loss)
        graph.replay()
    for p, q in zip(plain, captured, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        if clip == "tensor":
            torch.testing.assert_close(a.state[p]["clip"], b.state[q]["clip"], rtol=1e-5, atol=0)
    assert b.metrics(wait=True)["step"] == a.metrics(wait=True)["step"] == 33


def test_metrics_do_not_wait():
    params = parameters("cuda")
    optimizer = CruxyOptimizer(params)
    gradients(params, 0)
    for _ in range(5):
        optimizer.step(loss=1.0)
    first = optimizer.metrics()
    assert 1 <= first["step"] <= 5
    assert optimizer.metrics(wait=True)["step"] == 5
