"""`clip="tensor"` in the optimizer: each tensor against its own history; the oracle is the paper's recursion."""

import copy
import math
import os
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
from torch import Tensor, nn

from cruxy_kernels import layout as L
from cruxy_kernels.backends import native
from cruxy_triton import CruxyOptimizer

RULES = {"adamw": {"lr": 1e-2}, "lion": {"lr": 1e-2, "use_lion": True, "betas": (0.9, 0.99)}}
SHAPES = [(4, 5), (7,), (), (33, 3)]
BACKENDS = ["torch", "native"]


def served(backend: str) -> str:
    if backend == "native" and native.library()[0] is None:
        pytest.skip(native.library()[1])
    return backend


def make(**settings):
    generator = torch.Generator().manual_seed(5)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 3e-3, "weight_decay": 0.2}]
    return params, CruxyOptimizer(groups, clip="tensor", **settings)


def gradients(step: int, scale: float = 1.0) -> list[Tensor | None]:
    """Of about the same size, with spikes; the second tensor has none in every third step."""
    generator = torch.Generator().manual_seed(100 + step)
    size = [0.3 * (i + 1) * (40 if step == 34 + i else 1) for i in range(len(SHAPES))]
    grads = [scale * s * torch.randn(shape, generator=generator) for s, shape in zip(size, SHAPES, strict=True)]
    return [None if i == 1 and step % 3 == 0 else g for i, g in enumerate(grads)]


def step_with(optimizer, params, grads, loss=1.0):
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    optimizer.step(loss=loss)


def tensors_of(params, optimizer):
    kept = [t for p in params for _, t in sorted(optimizer.state[p].items())]
    return [t.detach().clone() for t in [*params, *kept, optimizer.control]]


def assert_same(one, other):
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(one, other, strict=True))


class Oracle:
    """AdaGC (arXiv 2502.11034) above Lion and AdamW, float64; the rate and betas of each step are given."""

    def __init__(self, params):
        self.p = [p.detach().double().clone() for p in params]
        self.m = [torch.zeros_like(p) for p in self.p]
        self.v = [torch.zeros_like(p) for p in self.p]
        self.gamma, self.seen = [0.0] * len(params), [0] * len(params)

    def step(self, grads, rows, rule, sign):
        everything = math.sqrt(sum(float(g.double().square().sum()) for g in grads if g is not None))
        for i, g in enumerate(grads):
            if g is None:
                continue
            norm = float(g.double().norm())
            self.seen[i] += 1
            if self.seen[i] <= 30:
                h = min(1.0, 1.0 / everything)
                self.gamma[i] = min(self.gamma[i], h * norm) if self.seen[i] > 1 else h * norm
            else:
                h = min(1.0, 1.05 * self.gamma[i] / norm)
                self.gamma[i] = 0.98 * self.gamma[i] + 0.02 * h * norm
            c, g = rows[i], sign * h * g.double()
            lr, b1, b2, decay = c[L.LR_OUT], c[L.BETA1_OUT], c[L.BETA2_OUT], c[L.WEIGHT_DECAY]
            if rule == "lion":
                update = torch.sign(b1 * self.m[i] + (1 - b1) * g)
                self.m[i] = b2 * self.m[i] + (1 - b2) * g
            else:
                self.m[i] = b1 * self.m[i] + (1 - b1) * g
                self.v[i] = b2 * self.v[i] + (1 - b2) * g * g
                ahead = b1 * self.m[i] + (1 - b1) * g
                corrections = c[L.BIAS_CORRECTION2_SQRT] / c[L.BIAS_CORRECTION1]
                update = corrections * ahead / (self.v[i].sqrt() + 1e-8)
            self.p[i] = self.p[i] * (1 - lr * decay) - lr * update


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("mode", "maximize"), [("meta3", False), ("stability_v1", True)])
@pytest.mark.parametrize("rule", RULES)
def test_it_is_the_papers_algorithm(rule, mode, maximize, backend):
    """45 steps past the warm-up: spikes, a tensor that is often absent, two groups, skipped steps, a loss scale."""
    params, optimizer = make(mode=mode, maximize=maximize, backend=served(backend), **RULES[rule])
    oracle = Oracle(params)
    optimizer.grad_scale = torch.tensor(1024.0)
    for step in range(45):
        grads = gradients(step)
        optimizer.found_inf = torch.tensor(float(step == 20))
        before = tensors_of(params, optimizer)[:-1]
        scaled = [None if g is None else 1024 * g for g in grads]
        if step == 33:
            scaled[0][0, 0] = math.nan
        step_with(optimizer, params, scaled, loss=math.inf if step == 9 else 2.0)
        assert optimizer.metrics()["skipped"] == (step in (9, 20, 33))
        if step in (9, 20, 33):
            assert_same(before, tensors_of(params, optimizer)[:-1])
            continue
        rows = [optimizer.control[optimizer._rows.of(p)].double() for p in params]
        oracle.step(grads, rows, rule, -1 if maximize else 1)
        for i, p in enumerate(params):
            if step == 0 and grads[i] is None:
                continue
            history = optimizer.state[p]["clip"]
            assert history.tolist() == pytest.approx([oracle.gamma[i], min(oracle.seen[i], 30)], rel=1e-5)
            torch.testing.assert_close(p.detach().double(), oracle.p[i], rtol=2e-5, atol=2e-6)
            torch.testing.assert_close(optimizer.state[p]["exp_avg"].double(), oracle.m[i], rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("at", [0, 11, 37])
@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "pickle"])
def test_it_continues_bit_for_bit(how, at, backend):
    """In the warm-up and behind it; what is saved shares nothing with the optimizer."""
    params, optimizer = make(backend=served(backend), **RULES["lion"])
    for step in range(at):
        step_with(optimizer, params, gradients(step))
    if how == "state_dict":
        saved = optimizer.state_dict()
        kept = copy.deepcopy(saved)
        other_params, other = make(backend=backend, **RULES["lion"])
        for p, q in zip(other_params, params, strict=True):
            p.data.copy_(q.data)
    else:
        for p in params:
            p.grad = None
        other = copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
        other_params = [p for group in other.param_groups for p in group["params"]]
    for step in range(at, 42):
        step_with(optimizer, params, gradients(step))
    if how == "state_dict":
        for index, value in kept["state"].items():
            assert torch.equal(saved["state"][index]["clip"], value["clip"])
            assert value["clip"].untyped_storage().nbytes() == 8
        other.load_state_dict(kept)
    for step in range(at, 42):
        step_with(other, other_params, gradients(step))
    assert_same(tensors_of(params, optimizer), tensors_of(other_params, other))


def test_histories_follow_their_tensors():
    """A group that joins, a state that is cleared, one that is handed to another tensor, groups in another order."""
    params, optimizer = make(**RULES["lion"])
    for step in range(4):
        step_with(optimizer, params, gradients(step))
    histories = [optimizer.state[p]["clip"].clone() for p in params]
    assert histories[0][1] == 4
    late = nn.Parameter(torch.ones(6))
    optimizer.add_param_group({"params": [late]})
    late.grad = torch.full((6,), 0.01)
    for p in params:
        p.grad = None
    optimizer.step(loss=1.0)
    assert optimizer.state[late]["clip"].tolist() == pytest.approx([0.01 * math.sqrt(6), 1])
    assert [optimizer.state[p]["clip"].tolist() for p in params] == [h.tolist() for h in histories]

    optimizer.param_groups.reverse()
    heir = nn.Parameter(params[3].detach().clone())
    optimizer.state[heir] = optimizer.state.pop(params[3])
    optimizer.param_groups[1]["params"][1] = heir
    optimizer.state[params[0]].clear()
    everything = [*params[:3], heir, late]
    norm = 0.01 * math.sqrt(sum(p.numel() for p in everything))
    for p in everything:
        p.grad = torch.full_like(p, 0.01)
    optimizer.step(loss=1.0)
    seen = [optimizer.state[p]["clip"][1].item() for p in everything]
    assert seen == [1, histories[1][1] + 1, 5, 5, 2]
    assert optimizer.state[params[0]]["clip"][0].item() == pytest.approx(0.01 * math.sqrt(20))
    assert norm < 1
    assert optimizer.state[heir]["clip"][0] <= histories[3][0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_state_that_was_away_comes_back(backend):
    """Offloading replaces the tensors of the states, or these themselves."""
    results = []
    for away in (False, True):
        params, optimizer = make(backend=served(backend), **RULES["adamw"])
        for step in range(8):
            step_with(optimizer, params, gradients(step))
            if away and step == 3:
                for p in params:
                    optimizer.state[p] = {name: t.clone() for name, t in optimizer.state[p].items()}
            if away and step == 5:
                for state in optimizer.state.values():
                    state["clip"] = state["clip"].clone()
                    state["exp_avg"] = state["exp_avg"].clone()
        results.append([state["clip"] for state in optimizer.state_dict()["state"].values()] + list(params))
    assert_same(*results)


@pytest.mark.parametrize("use_gc", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_batch_gets_its_own_factors(backend, use_gc):
    """Two rules, two dtypes, a tensor that is not contiguous: spikes are cut to 1.05 times their tensor's norm."""
    generator = torch.Generator().manual_seed(6)
    params = [nn.Parameter(torch.randn(9, 4, generator=generator)) for _ in range(4)]
    params[1].data, params[2].data = params[1].data.half(), params[2].data.t().contiguous().t()
    groups = [{"params": params[:2], "use_lion": True}, {"params": params[2:]}]
    optimizer = CruxyOptimizer(groups, clip="tensor", backend=served(backend), lr=1e-3, use_gc=use_gc)
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0])  # centralization leaves them
    for step in range(40):
        for i, p in enumerate(params):
            p.grad = torch.empty_like(p).copy_(signs * 0.01 * (i + 1) * (100 if step == 35 + i else 1))
        optimizer.step(loss=1.0)
    for i, p in enumerate(params):
        assert optimizer.state[p]["clip"].tolist() == pytest.approx([0.06 * (i + 1) * 1.001, 30], rel=1e-3)
        momentum = (optimizer.state[p]["exp_avg"] * signs).float() / (0.01 * (i + 1))
        assert 0.8 < momentum.min() <= momentum.max() < 1.06
    gradients_left = [weakref.ref(p.grad) for p in params]
    optimizer.zero_grad()
    assert not any(ref() is not None for ref in gradients_left)


def test_from_and_to_other_clipping():
    params, optimizer = make(**RULES["lion"])
    for step in range(3):
        step_with(optimizer, params, gradients(step))
    plain = CruxyOptimizer([{"params": params[:2]}, {"params": params[2:]}], **RULES["lion"])
    plain.load_state_dict(optimizer.state_dict())
    assert not any("clip" in state for state in plain.state.values())
    step_with(plain, params, gradients(3))
    again_params, again = make(**RULES["lion"])
    again.load_state_dict(plain.state_dict())
    step_with(again, again_params, gradients(4))
    assert [again.state[p]["clip"][1].item() for p in again_params] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    "value", [torch.zeros(3), torch.zeros(2).double(), torch.tensor([-1.0, 2]), torch.tensor([math.nan, 1]), 3.0]
)
def test_a_damaged_history_is_refused(value):
    params, optimizer = make(**RULES["lion"])
    step_with(optimizer, params, gradients(1))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][2]["clip"] = value
    with pytest.raises(ValueError, match="group 1, parameter 2 of the checkpoint: clip is not 2 float32 numbers"):
        optimizer.load_state_dict(saved)


def test_bad_input():
    p = [nn.Parameter(torch.ones(2))]
    with pytest.raises(ValueError, match=r"clip is 1.0; expected one of 'global', 'tensor', None"):
        CruxyOptimizer(p, clip=1.0)
    with pytest.raises(TypeError, match=r"'max_grad_norm': clip= says"):
        CruxyOptimizer(p, max_grad_norm=1.0)
    optimizer = CruxyOptimizer(p, clip="tensor")
    with pytest.raises(ValueError, match="clip is a setting of the whole optimizer"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "clip": None})


@pytest.mark.parametrize("mode", L.LAWS)
def test_no_clipping_and_the_default(mode):
    """None lets every gradient through; the default is the mode's own limit, as it was before there was a choice."""
    found = {}
    for clip in ("global", None):
        p = nn.Parameter(torch.zeros(3))
        optimizer = CruxyOptimizer([p], mode=mode, clip=clip)
        p.grad = torch.full((3,), 100.0)
        optimizer.step(loss=1.0)
        found[clip] = optimizer.metrics()["clip_coef"]
        if clip == "global":
            assert optimizer.clip == CruxyOptimizer([p], mode=mode).clip
    assert found[None] == 1
    assert (found["global"] < 1) == (mode != "stability_v1")


SCRIPT = """
import torch
from torch import nn
from cruxy_kernels import launch
from cruxy_triton import CruxyOptimizer

names = []
launch.observers.append(names.append)

def run(backend, clip):
    params = [nn.Parameter(torch.linspace(-1, 1, n)) for n in (5, 1500, 70)]
    optimizer = CruxyOptimizer(params, lr=1e-2, use_lion=True, clip=clip, backend=backend)
    for step in range(4):
        for i, p in enumerate(params):
            generator = torch.Generator().manual_seed(10 * step + i)
            p.grad = torch.randn(p.shape, generator=generator) * (1 + 9 * (step == 2))
        if step:
            for p in params:  # past the warm-up
                optimizer.state[p]["clip"][1] = 30
        names.clear()
        optimizer.step(loss=1.0)
    return params, [optimizer.state[p]["clip"] for p in params]

(a, ha), (b, hb) = run("torch", "tensor"), run("triton", "tensor")
assert names == ["telemetry_kernel", "control_kernel", "update_kernel"], names
for one, other in zip(a + ha, b + hb):
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
assert all(h[0] > 0 for h in hb)
print("same")
"""


def test_the_kernels_do_the_same_in_three_launches():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=180)
    assert done.stdout == "same\n", done.stdout + done.stderr
