"""What release cannot go together with, each in one sentence; nothing is changed without a word."""

import copy
import pickle

import pytest
import torch
from torch import nn

from cruxy_triton import CruxyOptimizer, MetaLion, release_gradients


@pytest.fixture
def released(make):
    model = make()
    optimizer = CruxyOptimizer(model.parameters(), lr=1e-3)
    return model, optimizer, release_gradients(model, optimizer)


def test_accumulation(released):
    model, optimizer, hooks = released
    hooks.scale(model.loss(0)).backward()
    with pytest.raises(
        RuntimeError, match=r"norm.(weight|bias) got a second gradient .* gradient_accumulation_steps=1"
    ):
        hooks.scale(model.loss(1)).backward()
    optimizer.zero_grad()  # as a loop does that goes on after an error: the step is broken off
    hooks.scale(model.loss(1)).backward()
    optimizer.step()
    assert optimizer.metrics()["skipped_steps"] == 1


def test_clip_grad_norm(released):
    from torch.nn.utils import clip_grad_norm_

    model, optimizer, hooks = released
    hooks.scale(model.loss(0)).backward()
    with pytest.raises(RuntimeError, match="clip_grad_norm_ comes when released gradients have been used"):
        clip_grad_norm_(model.parameters(), 1.0)
    with pytest.raises(RuntimeError, match="clip_grad_norm_ comes"):
        torch.nn.utils.clip_grad_norm_(model.head.weight, 1.0)
    assert clip_grad_norm_(model.parameters(), float("inf")) == 0  # Trainers measure so
    optimizer.step()
    other = nn.Linear(2, 1)
    other(torch.ones(1, 2)).sum().backward()
    clip_grad_norm_(other.parameters(), 0.5)
    assert sum(float(p.grad.square().sum()) for p in other.parameters()) == pytest.approx(0.25, rel=1e-4)
    hooks.remove()
    clip_grad_norm_(model.parameters(), 1.0)


def test_grad_scaler(released):
    model, optimizer, _ = released
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(model.loss(0)).backward()
    with pytest.raises(RuntimeError, match="a GradScaler cannot serve updates in the backward pass"):
        scaler.step(optimizer)


def test_a_scale_that_is_not_used(make):
    model = make(torch.float16)
    optimizer = MetaLion(model.parameters())
    released = release_gradients(model, optimizer)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"gradients came without a loss scale; call released.scale\(loss\)"):
        model.loss(0).backward()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    optimizer.zero_grad()
    released.scale(model.loss(0)).backward()
    optimizer.step()
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_several_processes(released, monkeypatch):
    model, _optimizer, _ = released
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *group: 2)
    with pytest.raises(RuntimeError, match="work in one process: DDP and FSDP"):
        model.loss(0).backward()


def test_ddp(make, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        model = make()
        wrapped = nn.parallel.DistributedDataParallel(model)
        with pytest.raises(ValueError, match="model is a DistributedDataParallel, which combines"):
            release_gradients(wrapped, CruxyOptimizer(model.parameters()))
        optimizer = CruxyOptimizer(model.parameters())
        released = release_gradients(model, optimizer)  # one process alone is served
        released.scale(model.loss(0)).backward()
        optimizer.step()
        assert released.metrics()["layers"] == 5
    finally:
        torch.distributed.destroy_process_group()


def test_arguments(make):
    model = make()
    optimizer = CruxyOptimizer(model.parameters())
    with pytest.raises(TypeError, match="optimizer is a AdamW; expected a CruxyOptimizer"):
        release_gradients(model, torch.optim.AdamW(model.parameters()))
    for scale in (0.0, 2.0**25, "yes", float("nan")):
        with pytest.raises(ValueError, match=r"loss_scale is .*; expected 'auto', True, False or a number"):
            release_gradients(model, optimizer, loss_scale=scale)
    with pytest.raises(ValueError, match="growth_interval is 0; expected a whole number of steps"):
        release_gradients(model, optimizer, growth_interval=0)
    other = make(tied=False)
    part = CruxyOptimizer([p for n, p in other.named_parameters() if n != "head.weight"])
    with pytest.raises(
        ValueError, match=r"1 parameters that require a gradient are not in the optimizer \(head.weight\)"
    ):
        release_gradients(other, part)
    released = release_gradients(model, optimizer)
    with pytest.raises(ValueError, match="updated in the backward pass already"):
        release_gradients(model, optimizer)
    with pytest.raises(TypeError, match=r"scale\(\) got a float; expected the loss"):
        released.scale(1.0)
    with pytest.raises(TypeError, match="a tensor without a gradient"):
        released.scale(torch.ones(()))
    with pytest.raises(ValueError, match="got 2 numbers"):
        released.scale(torch.ones(2, requires_grad=True))
    model.embed.weight.grad = torch.zeros_like(model.embed.weight)
    with pytest.raises(RuntimeError, match="release_gradients updates these tensors already"):
        optimizer.step_parameter(model.embed.weight, optimizer.param_groups[0], 0)


def test_a_weight_that_the_backward_pass_still_needs(make):
    """Kernels write by address; autograd hears of it, and does not go on with the new weights in silence."""
    model = make(tied=False)
    optimizer = CruxyOptimizer(model.parameters(), backend="native")
    released = release_gradients(model, optimizer)
    loss = released.scale(model.loss(0))
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_copy_of_the_optimizer_steps_as_ever(released):
    model, optimizer, hooks = released
    hooks.scale(model.loss(0)).backward()
    optimizer.step()
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        p = other.param_groups[0]["params"][0]
        before, p.grad = p.detach().clone(), torch.ones_like(p)
        other.step(loss=1.0)
        assert not torch.equal(p, before)
