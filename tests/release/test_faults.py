"""Overflow in the middle of a backward pass, a NaN in one layer, a spike, the loss scale at both ends, SIGKILL."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cruxy_triton import MetaLion, release_gradients
from cruxy_triton.controllers import release as law

STEPS = 160


def held_out(model):
    with torch.no_grad():
        return model.loss(-1, rows=256).item()


def train(make, run, scale=2.0**10, interval=2000, fault=None, **settings):
    """(held-out loss, released, optimizer) of a run: float16, 4-bit momentum; `fault(model, step)` before each step."""
    model = make(torch.float16)
    optimizer = MetaLion(model.parameters(), lr=3e-3, state_bits=4, **{"clip": "tensor", **settings})
    released = release_gradients(model, optimizer, loss_scale=scale, growth_interval=interval)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    for step in range(STEPS):
        handles = fault(model, step) if fault is not None else ()
        if fault is spike and step == 50:
            (1e4 * released.scale(model.loss(step))).backward()
            optimizer.step()
        else:
            run(model, optimizer, released, step, step + 1)
        for handle in handles or ():
            handle.remove()
        schedule.step()
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    return held_out(model), released, optimizer


def spike(model, step):
    """The loss of one step, times 10,000."""


def overflow(model, step):
    """The gradients of everything below the middle layer are infinite in one step."""
    if step == 50:
        hook = lambda module, grads, outputs: (torch.full_like(grads[0], math.inf),)  # noqa: E731
        return [model.layers[1].register_full_backward_hook(hook)]
    return None


def nan(model, step):
    """One weight's gradient is NaN in three steps."""
    if step in (50, 51, 90):
        return [model.layers[1].down.weight.register_hook(lambda g: g * math.nan)]
    return None


@pytest.fixture(scope="module")
def clean():
    return {}


@pytest.mark.parametrize("clip", ["tensor", "global"])
@pytest.mark.parametrize(
    ("fault", "overflows"), [(overflow, 1), (nan, 3), (spike, 0)], ids=["overflow", "nan", "spike"]
)
def test_a_fault_costs_nothing(make, run, clean, fault, overflows, clip):
    """The run ends finite and within 1 % of the clean one."""
    if clip not in clean:
        clean[clip] = train(make, run, clip=clip)[0]
        assert clean[clip] < 1.3  # log 3 is 1.10
    loss, released, _ = train(make, run, fault=fault, clip=clip)
    assert loss == pytest.approx(clean[clip], rel=0.01)
    metrics = released.metrics()
    assert metrics["overflows"] >= overflows  # the spike may be one, by the loss scale
    assert metrics["loss_scale"] == 2.0 ** (10 - metrics["overflows"])


def test_what_overflows_is_left_alone(make, run):
    """One step: parameters, momentum and history of the layers below the overflow keep their bits; those above move."""
    model = make(torch.float16, tied=False)
    optimizer = MetaLion(model.parameters(), lr=3e-3, state_bits=4, clip="tensor")
    released = release_gradients(model, optimizer, loss_scale=2.0**10)
    run(model, optimizer, released, 0, 5)
    parts = lambda p: (p, *[v for n, v in optimizer.state[p].items() if n != "step"])  # noqa: E731
    before = {name: [t.clone() for t in parts(p)] for name, p in model.named_parameters()}
    (handle,) = overflow(model, 50)
    run(model, optimizer, released, 5, 6)
    handle.remove()
    metrics = released.metrics()
    assert metrics["nonfinite_layers"] == ["layers.0", "embed"]
    for name, p in model.named_parameters():
        same = [torch.equal(a, b) for a, b in zip(before[name], parts(p), strict=True)]
        hurt = any(name.startswith(layer) for layer in metrics["nonfinite_layers"])
        assert all(same) if hurt else not any(same), name
    assert metrics["overflows"] == 1
    assert metrics["loss_scale"] == 2.0**9
    assert metrics["nonfinite"] > 0
    run(model, optimizer, released, 6, 7)
    assert released.metrics()["nonfinite_layers"] == []
    assert released.metrics()["overflows"] == 1
    assert optimizer.metrics()["skipped_steps"] == 1


@pytest.mark.parametrize(("first", "interval"), [(law.MAX_SCALE, 20), (law.MIN_SCALE, 4)], ids=["top", "bottom"])
def test_the_scale_at_both_ends(make, run, clean, first, interval):
    """From the top it is halved until gradients are finite; from the bottom it is doubled until they are not."""
    if "tensor" not in clean:
        clean["tensor"] = train(make, run)[0]
    loss, released, _ = train(make, run, scale=first, interval=interval)
    assert loss == pytest.approx(clean["tensor"], rel=0.01)
    metrics = released.metrics()
    assert metrics["overflows"] > 3
    assert 2**15 <= metrics["loss_scale"] <= 2**21


def test_the_scale_keeps_its_bounds(make, run):
    model = make()
    optimizer = MetaLion(model.parameters(), lr=1e-4)
    released = release_gradients(model, optimizer, loss_scale=law.MAX_SCALE, growth_interval=1)
    run(model, optimizer, released, 0, 2)
    assert released.metrics()["loss_scale"] == law.MAX_SCALE  # float32 gradients do not overflow
    for p in model.parameters():
        p.register_hook(lambda g: g * math.nan)
    before = [p.clone() for p in model.parameters()]
    run(model, optimizer, released, 2, 45)
    assert released.metrics()["loss_scale"] == law.MIN_SCALE
    assert released.metrics()["overflows"] == 43
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_a_loss_that_is_not_finite_changes_nothing(make, run):
    model = make()
    optimizer = MetaLion(model.parameters(), lr=1e-3)
    released = release_gradients(model, optimizer)
    run(model, optimizer, released, 0, 3)
    before = [p.clone() for p in model.parameters()]
    released.scale(model.loss(3) + math.inf).backward()  # its gradients are finite
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    run(model, optimizer, released, 4, 6)
    assert optimizer.metrics()["skipped_steps"] == 1
    assert math.isfinite(optimizer.metrics()["loss"])


SCRIPT = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import torch
from conftest import Model
from cruxy_triton import MetaLion, release_gradients

folder, kill, last = sys.argv[2], int(sys.argv[3]), 16
torch.set_num_threads(1)
model = Model(reentrant=False).to(torch.float16)
optimizer = MetaLion(model.parameters(), lr=3e-3, state_bits=4, clip="tensor")
released = release_gradients(model, optimizer)
first = 0
if os.path.exists(folder + "/saved"):
    saved = torch.load(folder + "/saved", weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    first = saved["step"]
for step in range(first, last):
    if step == kill:  # the last layer has been updated, the first has not
        model.layers[1].up.weight.register_post_accumulate_grad_hook(lambda p: os.kill(os.getpid(), signal.SIGKILL))
    released.scale(model.loss(step)).backward()
    optimizer.step()
    if step % 5 == 4:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
        torch.save(state, folder + "/new")
        os.replace(folder + "/new", folder + "/saved")
torch.save([list(model.parameters()), released.metrics()], folder + "/end")
"""


def test_killed_in_a_step_and_resumed(tmp_path: Path):
    """Killed in the middle of the 13th backward pass; from the checkpoint of the 10th it ends with the same bits."""

    def start(folder: str, kill: int) -> int:
        (tmp_path / folder).mkdir(exist_ok=True)
        command = [sys.executable, "-c", SCRIPT, os.path.dirname(__file__), str(tmp_path / folder), str(kill)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode in (0, -9), done.stderr
        return done.returncode

    assert start("whole", -1) == 0
    assert start("killed", 12) == -9
    assert torch.load(tmp_path / "killed" / "saved", weights_only=True)["step"] == 10
    assert start("killed", -1) == 0
    one, other = (torch.load(tmp_path / name / "end", weights_only=False) for name in ("whole", "killed"))
    assert all(torch.equal(p, q) for p, q in zip(one[0], other[0], strict=True))
    assert one[1] == other[1]
