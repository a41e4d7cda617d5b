"""`release_gradients`: against whole updates, equations in Python floats, and a count of gradients that are alive."""

import copy
import math
import os
import subprocess
import sys
import weakref

import pytest
import torch
from torch import nn

import cruxy_kernels as kernels
from cruxy_kernels import layout as L
from cruxy_kernels.backends import native
from cruxy_kernels.codec import scale_name
from cruxy_triton import CruxyOptimizer, MetaLion, release_gradients
from cruxy_triton.controllers.meta import slow_loop
from cruxy_triton.release import layer_groups

LION4 = {"use_lion": True, "state_bits": 4, "lr": 1e-3}


def whole_update(optimizer, params, grads, state, factor):
    """The update of all tensors in one call, with the outputs that the released step had."""
    control = optimizer.control.clone()
    control[:, L.SKIP], control[:, L.GRAD_FACTOR] = 0, factor
    rule = "lion" if optimizer.param_groups[0]["use_lion"] else "adamw"
    kernels.update_(rule, params, grads, state, control, ids=list(range(len(params))), backend=optimizer.backend)


def new_state(optimizer, params):
    """Zeros in the form of the optimizer's state."""
    rule = kernels.RULES["lion" if optimizer.param_groups[0]["use_lion"] else "adamw"]
    state = {}
    for name, codec in zip(rule.state, rule.codecs(optimizer.state_bits), strict=True):
        state[name] = [torch.zeros(codec.shape(p.shape), dtype=codec.dtype or torch.float32) for p in params]
        if codec.block:
            scales = [torch.zeros(codec.scale_count(p.numel()), dtype=codec.scale_dtype) for p in params]
            state[scale_name(name)] = scales
    return state


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["kept", "checkpointed", "reentrant"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    ("dtype", "settings"),
    [(torch.float32, {"lr": 1e-2}), (torch.float16, LION4), (torch.bfloat16, {"lr": 1e-2, "state_bits": 8})],
    ids=["adamw fp32", "lion 4-bit fp16", "adamw 8-bit bf16"],
)
def test_layer_by_layer_is_all_at_once(make, dtype, settings, tied, reentrant):
    """The bits of parameters, codes and scales after 12 steps: random rounding, tied tables, checkpointing."""
    model, other = make(dtype, tied=tied, reentrant=reentrant), make(dtype, tied=tied)
    optimizer = CruxyOptimizer(model.parameters(), clip=None, backend="torch", **settings)
    released = release_gradients(model, optimizer, loss_scale=1024.0)
    params = list(other.parameters())
    state = new_state(optimizer, params)
    if reentrant:  # the nested graphs want an input that requires a gradient
        model.embed.register_forward_hook(lambda module, args, output: output.requires_grad_())
    for step in range(12):
        released.scale(model.loss(step)).backward()
        optimizer.step()
        (1024 * other.loss(step)).backward()
        whole_update(optimizer, params, [p.grad for p in params], state, 1 / 1024)
        other.zero_grad()
    for p, q, i in zip(model.parameters(), params, range(100), strict=False):
        assert torch.equal(p, q)
        for name, tensors in state.items():
            assert torch.equal(optimizer.state[p][name], tensors[i]), name
    assert released.metrics()["overflows"] == 0


class OneStepLate:
    """stability_v1 above Lion, in float64, with AdaGC per tensor; all statistics are of the step before."""

    def __init__(self, params, lr, beta2, decay):
        self.p = [p.detach().double().clone() for p in params]
        self.m = [torch.zeros_like(p) for p in self.p]
        self.lr, self.beta2, self.decay = lr, beta2, decay
        self.fast = self.slow = self.error = 0.0
        self.gamma, self.seen, self.norm = [0.0] * len(params), 0, 0.0
        self.out = lr * (1 - 0.3 * 0.1 / 0.101), beta2 * (1 + 0.15 * math.tanh((0.05 + 0.02) * 0.099 / 0.1))

    def step(self, grads, order):
        lr, beta2 = self.out[0], min(max(self.out[1], 0.9), 0.9999)
        grads = [g.double() for g in grads]
        so_far = 0.0
        self.seen += 1
        for layer in order:
            so_far += sum(float(grads[i].square().sum()) for i in layer)
            near = max(math.sqrt(so_far), self.norm)
            for i in layer:
                n = float(grads[i].norm())
                if self.seen <= 30:
                    h = min(1.0, 1.0 / near)
                    self.gamma[i] = min(self.gamma[i], h * n) if self.seen > 1 else h * n
                else:
                    h = min(1.0, 1.05 * self.gamma[i] / n)
                    self.gamma[i] = 0.98 * self.gamma[i] + 0.02 * h * n
                g = h * grads[i]
                sign = torch.sign(0.9 * self.m[i] + 0.1 * g)
                self.p[i] = self.p[i] * (1 - lr * self.decay) - lr * sign
                self.m[i] = beta2 * self.m[i] + (1 - beta2) * g
        self.norm = math.sqrt(so_far)
        self.fast, self.slow = 0.9 * self.fast + 0.1 * so_far, 0.999 * self.slow + 0.001 * so_far
        phi, error = self.fast / (self.fast + self.slow + 1e-8), self.fast - self.slow
        pd, self.error = 0.05 * error + 0.02 * (error - self.error), error
        factor = 1 - 0.3 * phi if phi > 0.55 else 1 + 0.2 * (1 - phi) if phi < 0.45 else 1.0
        self.out = self.lr * factor, self.beta2 * (1 + 0.15 * math.tanh(pd / 0.1))


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_it_is_the_law_one_step_late(backend):
    """45 steps, beyond the warm-up of the histories; a spike in the 34th."""
    if backend == "native" and native.library()[0] is None:
        pytest.skip(native.library()[1])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 3))
    optimizer = CruxyOptimizer(
        model.parameters(), mode="stability_v1", use_lion=True, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1,
        clip="tensor", guard=False, backend=backend,
    )  # fmt: skip
    released = release_gradients(model, optimizer, loss_scale=8.0)
    assert [name for name, _ in released.layers] == ["0", "2"]
    params = list(model.parameters())
    oracle = OneStepLate(params, 1e-3, 0.95, 0.1)
    for step in range(45):
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))

        def loss(network, x=x, step=step):
            return (network(x) - x[:, :3].sin()).square().mean() * (50 if step == 33 else 1)

        with torch.no_grad():  # the oracle's gradients are of the same point
            for p, q in zip(params, oracle.p, strict=True):
                p.copy_(q)
        grads = torch.autograd.grad(loss(model), params)
        released.scale(loss(model)).backward()
        optimizer.step()
        oracle.step(grads, ((2, 3), (0, 1)))
        for i, (p, q) in enumerate(zip(params, oracle.p, strict=True)):
            torch.testing.assert_close(p.detach().double(), q, rtol=1e-5, atol=1e-8)
            tiny = 1e-5 * float(oracle.m[i].abs().max())
            torch.testing.assert_close(optimizer.state[p]["exp_avg"].double(), oracle.m[i], rtol=1e-4, atol=tiny)
            assert float(optimizer.state[p]["clip"][0]) == pytest.approx(oracle.gamma[i], rel=1e-4)


@pytest.mark.parametrize("mode", L.LAWS)
def test_the_laws_see_what_they_would_see(make, mode):
    """The state of the control vector after 25 steps is that of 25 calls with these gradients, bit for bit."""
    model = make()
    optimizer = CruxyOptimizer(model.parameters(), mode=mode, lr=3e-3, clip=None, backend="torch", meta_interval=4)
    released = release_gradients(model, optimizer)
    params = list(model.parameters())
    control = kernels.new_control(lr=3e-3, betas=(0.9, 0.999), meta_interval=4)
    for step in range(25):
        loss = model.loss(step)
        grads = torch.autograd.grad(loss, params, retain_graph=True)
        sums = kernels.gradient_telemetry(grads, backend="torch")
        kernels.control_step(control, sums, loss, law=mode, clip=None, backend="torch")
        if mode == "meta3" and step % 4 == 3:
            slow_loop(control, backend="torch")
        released.scale(loss).backward()
        optimizer.step()
    released.scale(model.loss(25)).backward()  # opens the next, with the law of the last
    state = slice(L.NUM_INPUTS, L.OUTPUTS)
    ages = control.clone()
    ages[:, L.AGE] += 1
    torch.testing.assert_close(optimizer.control[:, state], ages[:, state], rtol=1e-5, atol=1e-7)
    assert optimizer.control[0, L.LR_OUT].item() == pytest.approx(control[0, L.LR_OUT].item(), rel=1e-5)
    assert len(optimizer.history()) == 25


def count_live(model):
    """(bytes of each moment a gradient arrives, bytes of each layer): of gradients that are still alive."""
    live, most = {}, []

    def arrived(p):
        storage = p.grad.untyped_storage()
        live[id(storage)] = storage.nbytes()
        weakref.finalize(storage, live.pop, id(storage))
        most.append(sum(live.values()))

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(arrived)
    return live, most


@pytest.mark.parametrize("reentrant", [None, False], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("backend", ["torch", "native"])
def test_one_layers_gradients_are_alive(make, run, backend, reentrant):
    if backend == "native" and native.library()[0] is None:
        pytest.skip(native.library()[1])
    model = make(tied=False, reentrant=reentrant)
    live, most = count_live(model)
    optimizer = MetaLion(model.parameters(), backend=backend, clip="tensor")
    released = release_gradients(model, optimizer)
    sizes = {name: sum(p.nbytes for p in params) for name, params in released.layers}
    assert list(sizes) == ["embed", "layers.0", "layers.1", "layers.2", "norm", "head"]
    run(model, optimizer, released, 0, 3)
    assert max(most) == max(sizes.values()) == sizes["layers.0"]
    assert not live
    assert all(p.grad is None for p in model.parameters())
    most.clear()
    released.remove()
    model.loss(3).backward()
    assert max(most) == sum(sizes.values())  # the same count finds what there is without release


def test_what_a_layer_is(small_model):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(small_model("llama"))
    model.model.layers[1].mlp.requires_grad_(False)
    groups = dict(layer_groups(model))
    assert list(groups) == ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head"]
    every = [p for params in groups.values() for p in params]
    assert set(map(id, every)) == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(groups["lm_head"]) == 1
    assert len(groups["model.layers.0"]) == 9
    assert len(groups["model.layers.1"]) == 6

    nested = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9)), nn.Linear(2, 2))
    assert [name for name, _ in layer_groups(nested)] == ["0", "1.0", "1.1", "2"]


def test_a_tensor_without_a_gradient_and_one_that_joins(make, run):
    """A layer that is not complete is updated when the next one begins; what no hook knows, in `step()`."""
    model, other = make(tied=False), make(tied=False)
    unused = model.layers[1].unused = nn.Parameter(torch.ones(3))
    model.head.weight.requires_grad_(False)
    other.head.weight.requires_grad_(False)
    for network in (model, other):
        optimizer = CruxyOptimizer(network.parameters(), lr=1e-2, backend="torch")
        released = release_gradients(network, optimizer)
        run(network, optimizer, released, 0, 3)
    assert all(torch.equal(p, other.get_parameter(n)) for n, p in model.named_parameters() if p is not unused)
    assert torch.equal(unused, torch.ones(3))
    late, before = other.head.weight.requires_grad_(True), other.head.weight.clone()
    run(other, optimizer, released, 3, 4)
    assert not torch.equal(late, before)
    assert late.grad is None


@pytest.mark.parametrize("clip", ["global", "tensor", None])
def test_a_copy_and_a_state_dict_go_on_bit_for_bit(make, run, clip):
    """From step 7, between two steps: state, scale, what the law has not seen yet, histories, slow loop, seed."""
    settings = {**LION4, "clip": clip, "seed": 5, "meta_interval": 4}
    model = make(torch.float16)
    optimizer = CruxyOptimizer(model.parameters(), **settings)
    released = release_gradients(model, optimizer, loss_scale=2.0**20, growth_interval=3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    def steps(model, optimizer, released, schedule, first, last):
        for step in range(first, last):
            run(model, optimizer, released, step, step + 1)
            schedule.step()

    steps(model, optimizer, released, schedule, 0, 7)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), schedule.state_dict()))
    steps(model, optimizer, released, schedule, 7, 15)
    assert released.metrics()["overflows"] > 0
    for load_first in (True, False):
        other = make(torch.float16)
        again = CruxyOptimizer(other.parameters(), **settings)
        other.load_state_dict(saved[0])
        if load_first:
            again.load_state_dict(saved[1])
        resumed = release_gradients(other, again, growth_interval=3)
        if not load_first:
            run(other, again, resumed, 50, 52)
            other.load_state_dict(saved[0])
            again.load_state_dict(saved[1])
        follow = torch.optim.lr_scheduler.LambdaLR(again, lambda step: 1 / (1 + step))
        follow.load_state_dict(saved[2])
        for group, one in zip(again.param_groups, saved[1]["param_groups"], strict=True):
            group["lr"] = one["lr"]
        steps(other, again, resumed, follow, 7, 15)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
        assert resumed.metrics() == released.metrics()
        assert again.metrics() == optimizer.metrics()


def test_a_damaged_state_is_refused(make, run):
    model = make()
    optimizer = CruxyOptimizer(model.parameters())
    run(model, optimizer, release_gradients(model, optimizer), 0, 1)
    saved = optimizer.state_dict()
    for value in (torch.zeros(3), torch.full_like(saved["param_groups"][0]["release"], math.nan), "x"):
        saved["param_groups"][0]["release"] = value
        with pytest.raises(ValueError, match=r"group 0 of the checkpoint: release is not"):
            CruxyOptimizer(make().parameters()).load_state_dict(saved)


def test_from_and_to_ordinary_steps(make, run):
    """A run goes over to release and back: ages, statistics and rates go on, and nothing is skipped."""
    model = make()
    optimizer = CruxyOptimizer(model.parameters(), lr=3e-3)

    def ordinary(first, last):
        for step in range(first, last):
            optimizer.zero_grad()
            loss = model.loss(step)
            loss.backward()
            optimizer.step(loss=loss)

    ordinary(0, 10)
    rate = optimizer.metrics()["lr"]
    released = release_gradients(model, optimizer)
    run(model, optimizer, released, 10, 11)
    assert optimizer.metrics()["lr"] == pytest.approx(rate, rel=0.05)
    run(model, optimizer, released, 11, 20)
    released.remove()
    before = [p.clone() for p in model.parameters()]
    model.loss(20).backward()
    assert all(torch.equal(p, q) and p.grad is not None for p, q in zip(model.parameters(), before, strict=True))
    optimizer.step(loss=1.0)
    metrics = optimizer.metrics()
    assert metrics["skipped_steps"] == 0
    assert metrics["step"] == 20
    assert optimizer.control[0, L.AGE] == 21
    assert "release" not in optimizer.state_dict()["param_groups"][0]


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from conftest import Model
from cruxy_kernels import launch
from cruxy_triton import CruxyOptimizer, release_gradients

names = []
launch.observers.append(names.append)

def run(backend, dtype, **settings):
    model = Model(width=16).to(dtype)
    optimizer = CruxyOptimizer(model.parameters(), lr=1e-3, backend=backend, **settings)
    released = release_gradients(model, optimizer, loss_scale=64.0)
    for step in range(4):
        names.clear()
        if step == 2:
            model.layers[1].up.weight.register_hook(lambda g: g * float("inf"))
        loss = released.scale(model.loss(step, rows=4))
        loss.backward()
        optimizer.step()
    return [p.detach().float() for p in model.parameters()], released.metrics(), optimizer.metrics()

for dtype in (torch.float32, torch.float16):
    for settings in ({"use_lion": True, "state_bits": 4, "clip": "tensor"}, {"clip": "global"}):
        a, of_a, all_a = run("torch", dtype, **settings)
        b, of_b, all_b = run("triton", dtype, **settings)
        launched = [name for name in names if name != "refresh_kernel"]
        assert launched == ["control_kernel"] + ["telemetry_kernel", "update_kernel"] * 5, launched
        assert of_a["overflows"] == of_b["overflows"] == 2 and of_a["loss_scale"] == of_b["loss_scale"] == 16.0
        assert of_a["nonfinite_layers"] == of_b["nonfinite_layers"] == ["layers.1"]
        for name, value in all_a.items():
            other = all_b[name]
            same = name == "lrs" or value == other or abs(value - other) <= 1e-3 * (1 + abs(value))
            assert same, (name, value, other)
        difference = sum(float((p - q).square().sum()) for p, q in zip(a, b))
        moved = sum(float((p - q.float()).square().sum()) for p, q in zip(a, Model(width=16).to(dtype).parameters()))
        assert difference < 1e-3 * moved, (dtype, settings, difference, moved)
print("same")
"""


def test_the_kernels_do_the_same_in_two_launches_per_layer(tmp_path):
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, os.path.dirname(__file__)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout == "same\n", done.stdout + done.stderr
