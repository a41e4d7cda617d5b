"""`layerwise=`: what the multipliers do to a step, and that their state is kept, resumed and shared by all ranks."""

import copy
import math
import os
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

from cruxy_kernels import layout as L
from cruxy_triton import CruxyOptimizer
from cruxy_triton.controllers.layers import layer_name
from cruxy_triton.controllers.sketch_align import SKETCH
from cruxy_triton.release import release_gradients


def make(kind="blade", **settings):
    """A model of two blocks with an embedding and a head, and its optimizer."""
    torch.manual_seed(0)
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))
    model = nn.ModuleDict({"embed": nn.Embedding(11, 8), "layers": blocks, "head": nn.Linear(8, 11)})
    return model, CruxyOptimizer(model.named_parameters(), **{"lr": 1e-2, "layerwise": kind, **settings})


def train(model, optimizer, first, last):
    tokens = torch.arange(11)
    for step in range(first, last):
        x = model["embed"](tokens)
        for block in model["layers"]:
            x = x + block(x)
        loss = nn.functional.cross_entropy(model["head"](x), (tokens * 3 + step % 4) % 11)
        optimizer.zero_grad()
        loss.backward()
        if step % 5 == 3:
            model["embed"].weight.grad = None
        optimizer.set_entropy(1.0 + step % 3)
        optimizer.step(loss=loss)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.7.self_attn.q_proj.weight", "model.layers.7"),
        ("base_model.model.model.layers.17.mlp.up_proj.lora_A.default.weight", "base_model.model.model.layers.17"),
        ("layers.7.mlp.experts.3.w1", "layers.7"),
        ("h.0.ln_1.weight", "h.0"),
        ("0.weight", "0"),
        ("model.embed_tokens.weight", "model.embed_tokens"),
        ("model.norm.weight", "model.norm"),
        ("layer1x.weight", "layer1x"),
        ("base_model.model.lm_head.lora_B.default.weight", "base_model.model.lm_head"),
        ("position", "position"),
    ],
)
def test_layers_by_name(name, layer):
    assert layer_name(name) == layer


@pytest.mark.parametrize("backend", ["torch", None])
def test_the_multiplier_scales_the_step_and_not_the_decay(backend):
    """Lion: theta (1 - eta decay) - eta m sign, layer by layer; in groups, each tensor without a name for itself."""
    weights = [nn.Parameter(torch.ones(6)) for _ in range(3)]
    groups = [{"params": weights[:1]}, {"params": weights[1:], "lr": 3e-3}]
    optimizer = CruxyOptimizer(groups, layerwise="blade", use_lion=True, weight_decay=0.5, backend=backend)
    assert list(optimizer.layer_multipliers()) == ["parameter 0", "parameter 1", "parameter 2"]
    for sizes in ((1, 1, 1), (1, 2, 1.5)):
        before = [p.detach().clone() for p in weights]
        for p, size in zip(weights, sizes, strict=True):
            p.grad = torch.full((6,), float(size))
        optimizer.step(loss=1.0)
    multipliers = [math.sqrt(1.5 / size) for size in sizes]  # the loss at its average is a signal too
    assert list(optimizer.layer_multipliers().values()) == pytest.approx(multipliers)
    for p, old, m, lr in zip(weights, before, multipliers, [optimizer.metrics()["lrs"][i] for i in (0, 1, 1)],
                             strict=True):  # fmt: skip
        torch.testing.assert_close(p.detach(), old * (1 - 0.5 * lr) - lr * m)


@pytest.mark.parametrize("kind", ["blade", "sketch_align"])
@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "pickle"])
def test_it_continues_bit_for_bit(how, kind, tmp_path):
    """Past a refresh of the samples; what is saved shares nothing with the optimizer."""
    model, optimizer = make(kind)
    train(model, optimizer, 0, 12)
    if kind == "blade":
        optimizer.param_groups[0]["layers"]["shared"][L.SHARED_STEPS] = 95
    if how == "state_dict":
        torch.save({"o": optimizer.state_dict(), "m": model.state_dict()}, tmp_path / "saved")
        held = optimizer.state_dict()["param_groups"][0]["layers"]
        kept = copy.deepcopy(held)
    else:
        optimizer.zero_grad()
        copied = copy.deepcopy((model, optimizer)) if how == "deepcopy" else pickle.loads(
            pickle.dumps((model, optimizer)))  # fmt: skip
    train(model, optimizer, 12, 30)
    if how == "state_dict":
        assert all(torch.equal(held[k], v) if isinstance(v, torch.Tensor) else held[k] == v for k, v in kept.items())
        saved = torch.load(tmp_path / "saved", weights_only=True)
        copied = make(kind)
        copied[0].load_state_dict(saved["m"])
        copied[1].load_state_dict(saved["o"])
    train(*copied, 12, 30)
    assert same(model, copied[0])
    assert copied[1].layer_multipliers() == optimizer.layer_multipliers()
    assert len(set(optimizer.layer_multipliers().values())) == (4 if kind == "blade" else 1)
    for name, value in optimizer.param_groups[0]["layers"].items():
        assert not isinstance(value, torch.Tensor) or torch.equal(value, copied[1].param_groups[0]["layers"][name])


def test_sketch_align_by_hand():
    """Two elements of every tensor's sketch are the tensor: cosine of (3, 4) with (4, 3) is .96."""
    p = nn.Parameter(torch.zeros(2))
    optimizer = CruxyOptimizer([p], layerwise="sketch_align", use_lion=True)
    state = optimizer.param_groups[0]["layers"]
    assert state["sketch"].shape == (SKETCH,) == (4096,)
    found = []
    for grad in ((3.0, 4.0), (4.0, 3.0), (6.0, 6.0), (0.0, 5.0)):
        p.grad = torch.tensor(grad)
        optimizer.step()
        found.append(optimizer.layer_multipliers()["parameter 0"])
    places = torch.randint(2, (SKETCH,), generator=torch.Generator().manual_seed(13))
    ones = int(places.sum())

    def cosine(a, b):
        dot, lengths = (4096 - ones) * a[0] * b[0] + ones * a[1] * b[1], []
        for v in (a, b):
            lengths.append(math.sqrt((4096 - ones) * v[0] ** 2 + ones * v[1] ** 2))
        return dot / math.prod(lengths)

    first, second = cosine((3, 4), (4, 3)), cosine((4, 3), (6, 6))
    assert found[:2] == [1, pytest.approx(1)]
    # Third step: r = sqrt(72) / 5 and c^2 = (1 + a) over its average, which is that of the second step.
    assert (72 / 25) / ((1 + second) / (1 + first)) > 1.7
    assert found[2] == pytest.approx(1.7)
    norm = 0.98 * 5 + 0.02 * math.sqrt(72)
    average = 0.98 * (1 + first) + 0.02 * (1 + second)
    assert found[3] == pytest.approx((5 / norm) ** 2 / ((1 + cosine((6, 6), (0, 5))) / average), rel=1e-4)


def test_a_skipped_step_changes_nothing():
    for kind in ("blade", "sketch_align"):
        model, optimizer = make(kind)
        train(model, optimizer, 0, 3)
        before = copy.deepcopy(optimizer.param_groups[0]["layers"])
        model["head"].weight.grad[0, 0] = math.nan
        optimizer.step(loss=1.0)
        model["head"].weight.grad[0, 0] = 0
        optimizer.step(loss=math.inf)
        assert optimizer.metrics()["skipped_steps"] == 2
        for name, value in optimizer.param_groups[0]["layers"].items():
            assert not isinstance(value, torch.Tensor) or torch.equal(value, before[name])


def test_layers_that_come_and_go():
    """What is known of a layer stays with it; a new one begins; a group keeps no state of another optimizer."""
    model, optimizer = make()
    train(model, optimizer, 0, 6)
    norms = optimizer.param_groups[0]["layers"]["averages"][:, L.LAYER_NORM].clone()
    late = nn.Parameter(torch.ones(5))
    optimizer.add_param_group({"params": [("layers.2.weight", late)]})
    assert optimizer.state_dict()["param_groups"][0]["layers"]["names"][-1] == "layers.2"
    state = optimizer.param_groups[0]["layers"]
    assert state["averages"][:, L.LAYER_NORM].tolist() == [*norms.tolist(), 0]
    late.grad = torch.ones(5)
    train(model, optimizer, 6, 8)
    assert any(m != 1 for m in optimizer.layer_multipliers().values())
    other = CruxyOptimizer(optimizer.param_groups)
    assert "layers" not in other.state_dict()["param_groups"][0]


def test_from_and_to_other_checkpoints():
    model, optimizer = make()
    train(model, optimizer, 0, 4)
    plain = CruxyOptimizer(model.named_parameters())
    plain.load_state_dict(optimizer.state_dict())
    assert "layers" not in plain.param_groups[0]
    again = CruxyOptimizer(model.named_parameters(), layerwise="blade")
    train(model, again, 0, 2)
    with pytest.warns(UserWarning, match="no layer-wise state"):
        again.load_state_dict(plain.state_dict())
    assert not again.param_groups[0]["layers"]["averages"].any()
    train(model, again, 4, 6)

    def refused(words, change):
        saved = copy.deepcopy(optimizer.state_dict())
        change(saved["param_groups"][0]["layers"])
        before = [t.clone() for t in again.param_groups[0]["layers"].values() if isinstance(t, torch.Tensor)]
        with pytest.raises(ValueError, match=words):
            again.load_state_dict(saved)
        after = [t for t in again.param_groups[0]["layers"].values() if isinstance(t, torch.Tensor)]
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))

    refused("is of 'sketch_align'; expected 'blade'", lambda entry: entry.update(kind="sketch_align"))
    refused("the layers a, b; expected embed, layers.0, layers.1 and 1 more", lambda e: e.update(names=["a", "b"]))
    refused("damaged: signs is not torch.int16", lambda entry: entry.update(signs=torch.zeros(3)))
    refused("averages has values that are not finite", lambda entry: entry["averages"].fill_(math.nan))
    refused("its seed is -1", lambda entry: entry.update(seed=-1))


def test_bad_input_and_manners():
    p = [nn.Parameter(torch.ones(2))]
    with pytest.raises(ValueError, match="layerwise is 'layers'; expected one of 'blade', 'sketch_align', None"):
        CruxyOptimizer(p, layerwise="layers")
    with pytest.raises(ValueError, match="response is 'loud'; expected 'damped' or 'paper'"):
        CruxyOptimizer(p, layerwise="blade", response="loud")
    with pytest.raises(ValueError, match="layerwise is a setting of the whole optimizer"):
        CruxyOptimizer([{"params": p, "layerwise": "blade"}])
    sharded = nn.Parameter(torch.ones(2))
    sharded.device_mesh = None  # what tells a DTensor
    with pytest.raises(ValueError, match="does not serve sharded parameters"):
        CruxyOptimizer([sharded], layerwise="blade")
    model, optimizer = make()
    with pytest.raises(ValueError, match="layerwise='blade' compares the layers' gradients"):
        release_gradients(model, optimizer)
    optimizer = CruxyOptimizer([{"params": []}, {"params": p}], layerwise="blade")
    p[0].grad = torch.ones(2)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(4):
            optimizer.step(loss=1.0)
    assert [str(w.message)[:58] for w in said] == ["layer-wise control (blade) gets no output entropy, so it g"]
    assert "layers" not in repr(optimizer)
    with pytest.raises(TypeError, match="loss is a str"):
        optimizer.set_entropy("high")


SCRIPT = """
import torch
from torch import nn
from cruxy_kernels import launch
from cruxy_triton import CruxyOptimizer

names = []
launch.observers.append(names.append)

def run(backend, layerwise, clip="global", late=False):
    shapes = [("a.0.w", (5, 3)), ("a.0.v", (1500,)), ("a.1.w", (70,)), ("end.w", (9,))]
    params = [(name, nn.Parameter(torch.linspace(-1, 1, torch.Size(s).numel()).view(s))) for name, s in shapes]
    params[2][1].data = params[2][1].data.half()
    if late:  # columns are contiguous in memory: no plan serves it
        params[0][1].data = params[0][1].data.t().contiguous().t()
    optimizer = CruxyOptimizer(params, lr=1e-2, use_lion=True, layerwise=layerwise, clip=clip, backend=backend)
    for step in range(4):
        for i, (_, p) in enumerate(params):
            generator = torch.Generator().manual_seed(10 * step + i)
            p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator) * (1 + 2 * (step == i)))
            if i == 3 and step == 2:
                p.grad = None
        names.clear()
        optimizer.set_entropy(1.0 + step)
        optimizer.step(loss=2.0 - 0.3 * step)
    return [p for _, p in params], list(optimizer.layer_multipliers().values())

steps = {"global": 3, "tensor": 3}
for clip in steps:
    (a, ma), (b, mb) = run("torch", "blade", clip), run("triton", "blade", clip)
    plain = ["telemetry_kernel"] * 2 + ["control_kernel"]
    assert names == plain + ["blade_kernel"] + ["update_kernel"] * 2, names
    for one, other in zip(a + [torch.tensor(ma)], b + [torch.tensor(mb)]):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert len(set(ma)) == 3
(a, ma), (b, mb) = run("torch", "blade", late=True), run("triton", "blade", late=True)
torch.testing.assert_close(torch.tensor(ma), torch.tensor(mb), rtol=1e-4, atol=1e-5)
run("triton", None)
assert names == plain + ["update_kernel"] * 2, names
print("same")
"""


def test_the_kernels_do_the_same_in_one_launch_more():
    """And without `layerwise` in none more."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout == "same\n", done.stdout + done.stderr
