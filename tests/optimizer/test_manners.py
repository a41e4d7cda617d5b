"""Mixed precision, losses, learning rates, accumulation, metrics, memory: how the optimizer fits into loops."""

import gc
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import Parameter
from torch.optim import lr_scheduler as schedulers

from cruxy_triton import CruxyOptimizer, MetaLion


def gradients(params, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = (scale * torch.randn(p.shape, generator=generator)).to(p.dtype)


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((8, 5), (5,))]


def equal(a, b):
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


# -- mixed precision -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("unscale_first", [False, True])
@pytest.mark.parametrize("kwargs", [{}, {"use_lion": True}, {"use_lion": True, "state_bits": 8}])
def test_grad_scaler(kwargs, unscale_first):
    """With the scaler, after `unscale_` as well as without, the run is the one of unscaled gradients."""
    scaled, plain = parameters(), parameters()
    a, b = CruxyOptimizer(scaled, lr=1e-2, **kwargs), CruxyOptimizer(plain, lr=1e-2, **kwargs)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=4)
    for step in range(10):
        for params, scale in ((scaled, scaler.get_scale()), (plain, 1.0)):
            gradients(params, seed=step)
            for p in params:
                p.grad.mul_(scale)
        if unscale_first:
            scaler.scale(torch.ones(()))
            scaler.unscale_(a)
        else:
            scaler.scale(torch.ones(()))
        scaler.step(a, loss=torch.tensor(1.0 / (step + 1)))
        scaler.update()
        b.step(loss=1.0 / (step + 1))
        assert a.metrics()["grad_norm"] == pytest.approx(b.metrics()["grad_norm"], rel=1e-6)
    assert scaler.get_scale() > 1024, "the scale never grew"
    # powers of two scale exactly; gamma^1.5 of them rounds
    for p, q in zip(scaled, plain, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("unscale_first", [False, True])
def test_grad_scaler_skips_an_overflow(unscale_first):
    params = parameters()
    optimizer = CruxyOptimizer(params)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    gradients(params)
    scaler.scale(torch.ones(()))
    scaler.step(optimizer, loss=1.0)
    scaler.update()
    before, state = [p.detach().clone() for p in params], optimizer.state[params[0]]["exp_avg"].clone()
    gradients(params)
    params[0].grad[0, 0] = math.inf
    scaler.scale(torch.ones(()))
    if unscale_first:
        scaler.unscale_(optimizer)
    scaler.step(optimizer, loss=1.0)
    scaler.update()
    assert scaler.get_scale() == 512
    assert equal(params, before)
    assert torch.equal(optimizer.state[params[0]]["exp_avg"], state)
    assert optimizer.metrics()["skipped_steps"] == 1
    assert not hasattr(optimizer, "found_inf")


def test_found_inf_alone_skips():
    """Fused optimizers are called with `found_inf` set even where their own eyes see nothing."""
    params = parameters()
    optimizer = CruxyOptimizer(params)
    before = [p.detach().clone() for p in params]
    gradients(params)
    optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(1.0)
    optimizer.step(loss=1.0)
    assert equal(params, before)
    optimizer.found_inf = torch.tensor([0.0])
    optimizer.step(loss=1.0)
    assert not equal(params, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lion", [False, True])
def test_16_bit_parameters_follow_the_fp32_run(dtype, lion):
    """300 steps of 1e-5 to 1e-4 on values near 1, whose gap is 1e-3 to 8e-3: the mean must follow."""
    wide, narrow = Parameter(torch.ones(4096)), Parameter(torch.ones(4096, dtype=dtype))
    runs = [CruxyOptimizer([p], lr=1e-4, use_lion=lion, weight_decay=0.0) for p in (wide, narrow)]
    for step in range(300):
        gradients([wide, narrow], seed=step, scale=0.1)
        wide.grad += 0.05
        narrow.grad = wide.grad.to(dtype)
        for optimizer in runs:
            optimizer.step(loss=1.0)
    moved = 1 - wide.mean().item()
    assert moved > 2e-3
    assert 1 - narrow.float().mean().item() == pytest.approx(moved, rel=0.1)


# -- the loss ------------------------------------------------------------------------------------------------


def test_the_loss_in_every_form_gives_the_same_run():
    def run(form):
        params = parameters()
        optimizer = CruxyOptimizer(params, lr=1e-2)
        for step in range(30):
            gradients(params, seed=step)
            value = math.cos(step)
            form(optimizer, value)
        return params

    forms = [
        lambda o, v: o.step(loss=v),
        lambda o, v: o.step(loss=torch.tensor(v)),
        lambda o, v: o.step(loss=torch.tensor([v], dtype=torch.float64)),
        lambda o, v: o.step(loss=torch.tensor(v, requires_grad=True) * 1),
        lambda o, v: o.step(lambda: v),
        lambda o, v: o.step(lambda: torch.tensor(v)),
        lambda o, v: o.step(lambda: 123.0, loss=v),
    ]
    first = run(forms[0])
    assert all(equal(first, run(form)) for form in forms[1:])
    silent = parameters()
    optimizer = CruxyOptimizer(silent, lr=1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(30):
            gradients(silent, seed=step)
            optimizer.step()
    assert not equal(first, silent), "the loss made no difference"


def test_the_missing_loss_is_said_once():
    params = parameters()
    optimizer = CruxyOptimizer(params)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(5):
            gradients(params, seed=step)
            optimizer.step()
    assert [str(w.message).split(",")[0] for w in caught] == ["CruxyOptimizer(mode='meta3') gets no loss"]
    assert __file__ in [w.filename for w in caught]


def test_what_step_returns():
    params = parameters()
    optimizer = CruxyOptimizer(params)
    gradients(params)
    assert optimizer.step(loss=2.5) == 2.5
    assert optimizer.step(lambda: 3.5) == 3.5
    for p in params:
        p.grad = None
    assert optimizer.step(lambda: 4.5) == 4.5


def test_a_loss_that_is_no_number_is_refused():
    params = parameters()
    gradients(params)
    with pytest.raises(ValueError, match="3 elements"):
        CruxyOptimizer(params).step(loss=torch.ones(3))


def test_the_closure_has_gradients():
    params = parameters()
    optimizer = CruxyOptimizer(params)

    def closure():
        optimizer.zero_grad()
        loss = sum(p.square().sum() for p in params)
        loss.backward()
        return loss

    with torch.no_grad():
        first = optimizer.step(closure)
    assert first.requires_grad
    assert optimizer.step(closure) < first


# -- learning rates ------------------------------------------------------------------------------------------


def test_the_groups_rate_is_never_written():
    params = parameters()
    optimizer = CruxyOptimizer([{"params": params[:1], "lr": 3e-3}, {"params": params[1:]}], lr=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
    reference = [Parameter(torch.ones(1)), Parameter(torch.ones(1))]
    plain = torch.optim.AdamW([{"params": reference[:1], "lr": 3e-3}, {"params": reference[1:]}], lr=1e-3)
    expected = torch.optim.lr_scheduler.CosineAnnealingLR(plain, T_max=20)
    for step in range(20):
        gradients(params, seed=step)
        optimizer.step(loss=1.0)
        used = optimizer.metrics()
        factor = used["lr_scale"] * (1 - 0.5 * used["phase"])
        wanted = [g["lr"] * factor for g in optimizer.param_groups]
        assert used["lrs"] == pytest.approx(wanted, rel=1e-5)
        scheduler.step()
        plain.step()
        expected.step()
        assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in plain.param_groups]


SCHEDULERS = {
    "warm restarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, T_0=4),
    "one cycle": lambda o: schedulers.OneCycleLR(o, max_lr=[1e-2, 3e-2], total_steps=20),
    "cyclic": lambda o: schedulers.CyclicLR(o, base_lr=1e-4, max_lr=1e-2, step_size_up=3),
    "multiplicative": lambda o: schedulers.MultiplicativeLR(o, lambda step: 0.9),
    "polynomial": lambda o: schedulers.PolynomialLR(o, total_iters=10),
    "sequential": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, total_iters=5), schedulers.ExponentialLR(o, 0.9)], milestones=[5]
    ),
    "chained": lambda o: schedulers.ChainedScheduler([schedulers.ConstantLR(o), schedulers.StepLR(o, 4)]),
    "averaged": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=1e-4, anneal_epochs=5),
}


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("name", list(SCHEDULERS))
def test_every_scheduler_sets_the_rates_it_sets_for_adamw(name, tensor_lr):
    def run(cls):
        params = parameters()
        second = torch.tensor(3e-3) if tensor_lr else 3e-3
        optimizer = cls([{"params": params[:1], "lr": second}, {"params": params[1:]}], lr=1e-3)
        scheduler, rates = SCHEDULERS[name](optimizer), []
        for step in range(19):
            gradients(params, seed=step)
            optimizer.step()
            scheduler.step()
            rates.append([float(group["lr"]) for group in optimizer.param_groups])
            if isinstance(optimizer, CruxyOptimizer):
                assert min(optimizer.metrics()["lrs"]) >= 0
        return rates

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no loss is given; a chained scheduler's own remarks
        assert run(CruxyOptimizer) == run(torch.optim.AdamW)


def test_a_cleared_state_starts_anew():
    params = parameters()
    optimizer = CruxyOptimizer(params, lr=1e-2)
    for step in range(8):
        gradients(params, seed=step)
        optimizer.step(loss=1.0)
    optimizer.state.clear()
    before = params[0].detach().clone()
    gradients(params)
    optimizer.step(loss=1.0)
    assert optimizer.state_dict()["state"][0]["step"] == 1
    assert (params[0] - before).abs().max() <= 1.9 * 1.01 * optimizer.metrics()["lr"] + 1e-3


def test_lora_plus_groups_with_an_empty_one():
    """peft's LoRA+ helper makes four groups, of which some have no parameters."""
    a, b = Parameter(torch.randn(4, 8)), Parameter(torch.zeros(8, 4))
    groups = [
        {"params": [a], "lr": 1e-3, "weight_decay": 0.0},
        {"params": [], "lr": 1e-3},
        {"params": [b], "lr": 16e-3, "weight_decay": 0.0},
        {"params": [], "lr": 16e-3},
    ]
    optimizer = MetaLion(groups, lr=1e-3)
    before = a.detach().clone()
    gradients([a, b])
    optimizer.step(loss=1.0)
    # Lion moves every coordinate by the rate, so the groups' steps are 16 : 1.
    ratio = (b.abs().mean() / (a - before).abs().mean()).item()
    assert ratio == pytest.approx(16, rel=1e-3)
    other = MetaLion(groups, lr=1e-3)
    other.load_state_dict(optimizer.state_dict())
    assert len(other.metrics()["lrs"]) == 4


def test_peft_lora_plus():
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_loraplus_optimizer

    model = get_peft_model(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), LoraConfig(target_modules=["0"], r=2))
    optimizer = create_loraplus_optimizer(model, CruxyOptimizer, lr=1e-3, loraplus_lr_ratio=16)
    assert isinstance(optimizer, CruxyOptimizer)
    filled = [g["lr"] for g in optimizer.param_groups if g["params"]]
    assert sorted(filled) == [1e-3, 16e-3]
    assert len(filled) < len(optimizer.param_groups), "the helper makes no empty group any more"
    loss = model(torch.ones(3, 8)).square().mean()
    loss.backward()
    optimizer.step(loss=loss)
    assert model(torch.ones(3, 8)).square().mean() < loss


def test_a_group_that_joins_later():
    params = parameters()
    optimizer = CruxyOptimizer(params[:1], lr=1e-2)
    for step in range(12):
        gradients(params[:1], seed=step)
        optimizer.step(loss=1.0)
    scale = optimizer.metrics()["lr_scale"]
    optimizer.add_param_group({"params": params[1:], "lr": 1e-3})
    before = params[1].detach().clone()
    gradients(params)
    optimizer.step(loss=1.0)
    lrs = optimizer.metrics()["lrs"]
    assert lrs[0] == pytest.approx(10 * lrs[1], rel=1e-5)
    assert optimizer.metrics()["lr_scale"] == scale
    assert (params[1] - before).abs().max() <= 2 * lrs[1]


# -- loops ---------------------------------------------------------------------------------------------------


def test_gradient_accumulation_is_one_step():
    """Four micro-batches with the mean of their losses are one step of the whole batch."""
    torch.manual_seed(0)
    models = [nn.Linear(6, 1) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [CruxyOptimizer(m.parameters(), lr=1e-2) for m in models]
    for step in range(10):
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
        y = x.sum(1, keepdim=True)
        total = 0.0
        for chunk in range(4):
            part = slice(4 * chunk, 4 * chunk + 4)
            loss = (models[0](x[part]) - y[part]).square().mean() / 4
            loss.backward()
            total += loss.detach()
        whole = (models[1](x) - y).square().mean()
        whole.backward()
        for optimizer, loss in zip(optimizers, (total, whole), strict=True):
            optimizer.step(loss=loss)
            optimizer.zero_grad()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_step_inside_a_gradient_hook():
    """Optimizer-in-backward: each parameter has its optimizer, stepped as its gradient arrives."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    optimizers = {p: CruxyOptimizer([p], mode="stability_v1", lr=1e-2) for p in model.parameters()}

    def hook(p):
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(hook)
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.ones(2, 4)).sum().backward()
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_a_compiled_model():
    """The model compiled by torch.compile, the optimizer as it is: the same run."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
    reference = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
    reference.load_state_dict(model.state_dict())
    compiled = torch.compile(model, backend="aot_eager")
    runs = [
        (compiled, CruxyOptimizer(compiled.parameters(), lr=1e-2)),
        (reference, CruxyOptimizer(reference.parameters(), lr=1e-2)),
    ]
    for step in range(5):
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
        for m, optimizer in runs:
            optimizer.zero_grad()
            loss = m(x).square().mean()
            loss.backward()
            optimizer.step(loss=loss)
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_frozen_and_unused_parameters_stay():
    used, frozen, unused = (Parameter(torch.ones(3)) for _ in range(3))
    frozen.requires_grad_(False)
    optimizer = CruxyOptimizer([used, frozen, unused])
    used.sum().backward()
    optimizer.step(loss=1.0)
    assert torch.equal(frozen, torch.ones(3))
    assert torch.equal(unused, torch.ones(3))
    assert set(optimizer.state) == {used}


@pytest.mark.parametrize("capturable", [False, True])
def test_the_slow_loop_acts_every_interval(capturable):
    params = parameters()
    optimizer = CruxyOptimizer(params, meta_interval=4, capturable=capturable)
    scales = []
    for step in range(16):
        gradients(params, seed=step, scale=1 + step)
        optimizer.step(loss=1.0)
        scales.append(optimizer.metrics()["lr_scale"])
    changes = [step + 1 for step in range(1, 16) if scales[step] != scales[step - 1]]
    assert changes == [4, 8, 12, 16]


# -- metrics -------------------------------------------------------------------------------------------------


def test_metrics_and_history():
    params = parameters()
    optimizer = CruxyOptimizer(params, history=5, lr=1e-3)
    seen = []
    for step in range(8):
        gradients(params, seed=step)
        if step == 6:
            params[0].grad[0, 0] = math.nan
        optimizer.step(loss=0.5 + step)
        seen.append(optimizer.metrics())
    assert all(type(v) in (int, float, list) for v in seen[-1].values())
    assert seen[-1]["step"] == 7
    assert (seen[6]["skipped"], seen[7]["skipped"], seen[7]["skipped_steps"], seen[6]["nonfinite"]) == (1, 0, 1, 1)
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in params))
    assert seen[-1]["grad_norm"] == pytest.approx(norm, rel=1e-6)
    assert seen[-1]["loss"] == 7.5
    history = optimizer.history()
    assert len(history) == 5
    assert [h["loss"] for h in history if not h["skipped"]] == [3.5, 4.5, 5.5, 7.5]
    assert history[-1] == {k: v for k, v in seen[-1].items() if k != "lrs"}
    assert CruxyOptimizer(parameters(), history=0).history() == []


# -- memory --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "limit"),
    [
        (lambda p: torch.optim.AdamW(p), 8.001),
        (lambda p: CruxyOptimizer(p), 8.001),
        (lambda p: CruxyOptimizer(p, use_lion=True), 4.001),
        (lambda p: MetaLion(p), 1.04),
    ],
    ids=["torch AdamW", "AdamW fp32", "Lion fp32", "Lion 8-bit"],
)
def test_bytes_of_state_a_parameter(make, limit):
    """What the tensors of the state really hold, over a TinyLlama LoRA (r=8) layer and a small dense layer."""
    shapes = [(8, 2048), (2048, 8), (8, 2048), (256, 8), (8, 5632), (2048, 8), (512, 512), (512,)]
    params = [Parameter(torch.zeros(shape)) for shape in shapes]
    optimizer = make(params)
    gradients(params)
    optimizer.step()
    storages = {}
    for state in optimizer.state.values():
        for name, tensor in state.items():
            if name != "step":
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    numel = sum(p.numel() for p in params)
    assert sum(storages.values()) / numel <= limit
    assert sum(storages.values()) / numel > 0.9 * limit


def test_a_step_leaves_no_tensor_behind():
    params = parameters()
    optimizer = CruxyOptimizer(params)

    def tensors_after(steps):
        for step in range(steps):
            gradients(params, seed=step)
            optimizer.step(loss=torch.ones(()))
        gc.collect()
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    assert tensors_after(12) == tensors_after(50)
