"""Checkpoints: every mode, rule and codec continues bit for bit, through every way to save one."""

import copy
import io
import math
import pickle
import warnings
from typing import Any

import pytest
import torch
from lion_pytorch import Lion
from torch import nn

from cruxy_kernels import layout as L
from cruxy_triton import CruxyOptimizer, MetaLion
from cruxy_triton.release import release_gradients

SETTINGS = {
    "adamw": {"use_lion": False},
    "adamw8": {"use_lion": False, "state_bits": 8},
    "lion": {"use_lion": True, "betas": (0.9, 0.99)},
    "lion8": {"use_lion": True, "betas": (0.9, 0.99), "state_bits": 8},
    "lion4": {"use_lion": True, "betas": (0.9, 0.99), "state_bits": 4},
}


@pytest.fixture(params=list(SETTINGS))
def codec(request: pytest.FixtureRequest) -> dict[str, Any]:
    return dict(SETTINGS[request.param])


def make(dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[nn.Module, CruxyOptimizer]:
    """A model of two groups (one with its own rate and decay) and its optimizer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 33), nn.Tanh(), nn.Linear(33, 3)).to(dtype)
    groups = [
        {"params": list(model[0].parameters())},
        {"params": list(model[2].parameters()), "lr": 3e-3, "weight_decay": 0.0},
    ]
    return model, CruxyOptimizer(groups, lr=1e-3, **settings)


def train(model: nn.Module, optimizer: Any, first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        dtype = next(model.parameters()).dtype
        x = torch.randn(16, 7, generator=generator).to(dtype)
        optimizer.zero_grad()
        loss = (model(x) - x[:, :3].sin()).square().mean()
        loss.backward()
        optimizer.step(loss=loss.item()) if isinstance(optimizer, CruxyOptimizer) else optimizer.step()


def same_state(a: CruxyOptimizer, b: CruxyOptimizer) -> bool:
    def flat(optimizer: CruxyOptimizer) -> list[torch.Tensor]:
        packed = optimizer.state_dict()
        tensors = [t for i in sorted(packed["state"]) for _, t in sorted(packed["state"][i].items())]
        return tensors + [g["control"] for g in packed["param_groups"]]

    left, right = flat(a), flat(b)
    return len(left) == len(right) and all(
        x.dtype == y.dtype and torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(left, right, strict=True)
    )


def through_torch_save(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def through_safetensors(state: dict[str, Any]) -> dict[str, Any]:
    """The tensors in safetensors, the rest as it is."""
    from safetensors.torch import load, save

    tensors = {f"{i}.{name}": t for i, values in state["state"].items() for name, t in values.items()}
    tensors |= {f"control.{i}": group["control"] for i, group in enumerate(state["param_groups"])}
    tensors = load(save(tensors))
    loaded: dict[str, Any] = {"state": {}, "param_groups": copy.deepcopy(state["param_groups"])}
    for key, tensor in tensors.items():
        first, second = key.split(".", 1)
        if first == "control":
            loaded["param_groups"][int(second)]["control"] = tensor
        else:
            loaded["state"].setdefault(int(first), {})[second] = tensor
    return loaded


WAYS = {
    "dict": lambda state: state,
    "deepcopy": copy.deepcopy,
    "pickle": lambda state: pickle.loads(pickle.dumps(state)),
    "torch.save": through_torch_save,
    "safetensors": through_safetensors,
}


@pytest.mark.parametrize("way", list(WAYS))
def test_resume_is_bit_exact(mode, codec, way):
    model, optimizer = make(mode=mode, **codec)
    train(model, optimizer, 0, 25)
    other, resumed = make(mode=mode, **codec)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(WAYS[way](optimizer.state_dict()))
    assert same_state(optimizer, resumed)
    assert resumed.history() == []
    train(model, optimizer, 25, 50)
    train(other, resumed, 25, 50)
    assert [row["step"] for row in resumed.history()] == list(range(26, 51))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    assert same_state(optimizer, resumed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_parameters_dtype_does_not_leak_into_the_state(codec, dtype):
    if dtype == torch.float64 and codec.get("state_bits", 32) != 32:
        with pytest.raises(ValueError, match="float64"):
            make(dtype, **codec)
        return
    model, optimizer = make(dtype, **codec)
    train(model, optimizer, 0, 12)
    other, resumed = make(dtype, **codec)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(through_torch_save(optimizer.state_dict()))
    for p in other.parameters():
        state = resumed.state[p]
        expected = {8: torch.int8, 4: torch.uint8}.get(codec.get("state_bits"))
        expected = expected or (torch.float64 if dtype == torch.float64 else torch.float32)
        assert state["exp_avg"].dtype == expected
    train(model, optimizer, 12, 24)
    train(other, resumed, 12, 24)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_of_the_optimizer_keep_everything(mode, codec, copier):
    model, optimizer = make(mode=mode, **codec, bounds=(0.5, 2.0), meta_interval=7, guard=False, gamma_norm=2.0)
    train(model, optimizer, 0, 12)
    other, copied = copier((model, optimizer))
    assert type(copied) is type(optimizer)
    for name in ("mode", "bounds", "meta_interval", "guard", "gamma_norm", "state_bits", "meta_lr_eta", "backend"):
        assert getattr(copied, name) == getattr(optimizer, name)
    assert repr(copied.history()) == repr(optimizer.history())
    train(model, optimizer, 12, 30)
    train(other, copied, 12, 30)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    assert same_state(optimizer, copied)


def test_before_the_first_step(mode, codec):
    """accelerate saves and reloads the state before it."""
    model, optimizer = make(mode=mode, **codec)
    other, resumed = make(mode=mode, **codec)
    resumed.load_state_dict(through_torch_save(optimizer.state_dict()))
    train(model, optimizer, 0, 20)
    train(other, resumed, 0, 20)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_through_accelerate(tmp_path):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, optimizer = make(use_lion=True, state_bits=8)
    model, wrapped = accelerator.prepare(model, optimizer)
    train(model, optimizer, 0, 15)
    accelerator.save_state(str(tmp_path))
    train(model, optimizer, 15, 30)
    expected = [p.detach().clone() for p in model.parameters()]
    accelerator.load_state(str(tmp_path))
    assert optimizer.metrics()["step"] == 15
    train(model, optimizer, 15, 30)
    assert wrapped.optimizer is optimizer
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), expected, strict=True))


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("kind", [*SETTINGS, "layerwise", "release"])
def test_through_distributed_checkpoint(tmp_path, kind, flat):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    def made() -> tuple[nn.Module, CruxyOptimizer]:
        others = {"layerwise": {"layerwise": "blade"}, "release": SETTINGS["lion4"]}
        model, optimizer = make(**{**SETTINGS, **others}[kind])
        if kind == "release":
            release_gradients(model, optimizer)
        return model, optimizer

    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, optimizer = made()
    train(model, optimizer, 0, 15)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that no process group is needed
        state = {"optimizer": get_optimizer_state_dict(model, optimizer, options=options)}
        dcp.save(state, checkpoint_id=str(tmp_path), no_dist=True)
        other, resumed = made()
        other.load_state_dict(model.state_dict())
        target = {"optimizer": get_optimizer_state_dict(other, resumed, options=options)}
        dcp.load(target, checkpoint_id=str(tmp_path), no_dist=True)
        set_optimizer_state_dict(other, resumed, target["optimizer"], options=options)
    assert same_state(optimizer, resumed)
    train(model, optimizer, 15, 30)
    train(other, resumed, 15, 30)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_tensors_of_different_ages_keep_their_ages():
    """A layer that is unfrozen later has bias corrections of its own, also after a resume."""
    model, optimizer = make()
    late = model[2].weight
    late.requires_grad_(False)
    train(model, optimizer, 0, 20)
    late.requires_grad_(True)
    before = late.detach().clone()
    train(model, optimizer, 20, 21)
    # The first step of AdamW has the size of the rate whatever the gradient (Nesterov: times 1.9 at most).
    assert (late - before).abs().max() <= 1.01 * 1.9 * optimizer.metrics()["lrs"][1]
    packed = optimizer.state_dict()
    assert [packed["state"][i]["step"].item() for i in range(4)] == [21, 21, 1, 21]
    other, resumed = make()
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(through_torch_save(packed))
    train(model, optimizer, 21, 40)
    train(other, resumed, 21, 40)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


# -- checkpoints of others -----------------------------------------------------------------------------------


def foreign(cls: type, model: nn.Module, **settings: Any) -> Any:
    groups = [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters()), "lr": 3e-3}]
    return cls(groups, **settings)


def test_a_plain_adamw_is_taken_over():
    model, optimizer = make()
    theirs = foreign(torch.optim.AdamW, model, lr=2e-3, betas=(0.8, 0.95), weight_decay=0.3)
    train(model, theirs, 0, 10)
    optimizer.load_state_dict(through_torch_save(theirs.state_dict()))
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (2e-3, (0.8, 0.95), 0.3)
    assert "amsgrad" not in group
    for p in model.parameters():
        assert torch.equal(optimizer.state[p]["exp_avg"], theirs.state[p]["exp_avg"])
        assert torch.equal(optimizer.state[p]["exp_avg_sq"], theirs.state[p]["exp_avg_sq"])
    train(model, optimizer, 10, 11)
    assert optimizer.state_dict()["state"][0]["step"] == 11
    assert optimizer.metrics()["step"] == 1


def test_the_step_of_a_group_is_that_of_its_tensors():
    """apex keeps the age of all moments in their group."""
    model, optimizer = make()
    theirs = foreign(torch.optim.AdamW, model, lr=2e-3)
    train(model, theirs, 0, 10)
    state_dict = through_torch_save(theirs.state_dict())
    for group in state_dict["param_groups"]:
        group["step"] = 10
        for index in group["params"]:
            del state_dict["state"][index]["step"]
    optimizer.load_state_dict(state_dict)
    assert [float(state["step"]) for state in optimizer.state_dict()["state"].values()] == [10] * 4
    assert "step" not in optimizer.param_groups[0]


@pytest.mark.parametrize("steps", [0, 5])
def test_the_seed_of_a_run_goes_on(steps):
    """16-bit parameters are rounded with bits of the seed."""
    model, optimizer = make(torch.bfloat16, seed=7)
    train(model, optimizer, 0, steps)
    other, resumed = make(torch.bfloat16)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(through_torch_save(optimizer.state_dict()))
    assert resumed.seed == 7
    train(model, optimizer, steps, 12)
    train(other, resumed, steps, 12)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("bits", [8, 32])
def test_a_plain_lion_is_taken_over(bits):
    model, optimizer = make(use_lion=True, state_bits=bits)
    theirs = foreign(Lion, model, lr=2e-4, betas=(0.9, 0.98))
    train(model, theirs, 0, 10)
    optimizer.load_state_dict(through_torch_save(theirs.state_dict()))
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.98)
    train(model, optimizer, 10, 12)
    p = model[0].weight
    assert optimizer.state[p]["exp_avg"].dtype == (torch.int8 if bits == 8 else torch.float32)


def test_momentum_is_taken_from_adamw_to_lion_and_refused_the_other_way():
    model, adamw = make()
    train(model, adamw, 0, 10)
    _, lion = make(use_lion=True, betas=(0.9, 0.99))
    lion.load_state_dict(adamw.state_dict())
    assert lion.param_groups[0]["use_lion"]
    assert lion.param_groups[0]["betas"] == (0.9, 0.99)
    states = list(lion.state.values())
    assert all(set(s) == {"exp_avg", "step"} for s in states)
    assert torch.equal(states[0]["exp_avg"], adamw.state[model[0].weight]["exp_avg"])
    _, fresh = make()
    with pytest.raises(ValueError, match="no second moment"):
        fresh.load_state_dict(lion.state_dict())
    assert not fresh.state


def test_between_modes():
    model, meta = make(mode="meta3")
    train(model, meta, 0, 10)
    _, v2 = make(mode="stability_v2")
    v2.load_state_dict(meta.state_dict())
    assert v2.metrics()["v_fast"] == meta.metrics()["v_fast"]
    _, v1 = make(mode="stability_v1")
    with pytest.warns(UserWarning, match="start afresh"):
        v1.load_state_dict(meta.state_dict())
    assert v1.metrics()["v_fast"] == 0
    assert v1.state_dict()["state"][0]["step"] == 10


@pytest.mark.parametrize(("before", "after"), [(8, 32), (32, 8), (4, 32), (32, 4), (8, 4), (4, 8)])
def test_between_codecs(before, after):
    model, optimizer = make(use_lion=True, state_bits=before)
    train(model, optimizer, 0, 10)
    other, loaded = make(use_lion=True, state_bits=after)
    loaded.load_state_dict(optimizer.state_dict())
    from cruxy_kernels import dequantize_blockwise

    def momentum(o: CruxyOptimizer, p: torch.Tensor) -> torch.Tensor:
        state = o.state[p]
        if o.state_bits == 32:
            return state["exp_avg"]
        return dequantize_blockwise(state["exp_avg"], state["exp_avg_scale"], bits=o.state_bits, shape=p.shape)

    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        old, new = momentum(optimizer, p), momentum(loaded, q)
        # Softsign codes of 8 bits are 1/31 apart at the scale, those of 4 bits 2/5, and finer below: half of that.
        assert (old - new).abs().max() <= old.abs().max() * (1 / 40 if 4 not in (before, after) else 1 / 4.9)
    train(other, loaded, 10, 12)


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), "momentum_buffer"),
        (lambda p: torch.optim.AdamW(p, amsgrad=True), "amsgrad"),
    ],
)
def test_other_optimizers_are_refused(theirs, message):
    model = nn.Linear(3, 2)
    other = theirs(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    other.step()
    optimizer = CruxyOptimizer(model.parameters())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(other.state_dict())
    assert not optimizer.state


def test_another_model_is_refused():
    model, optimizer = make()
    train(model, optimizer, 0, 2)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        CruxyOptimizer(model.parameters()).load_state_dict(optimizer.state_dict())
    other = nn.Linear(2, 2)
    groups = [{"params": list(other.parameters())}, {"params": [nn.Parameter(torch.ones(2)) for _ in range(2)]}]
    with pytest.raises(ValueError, match="another model"):
        CruxyOptimizer(groups).load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="size of optimizer's"):
        CruxyOptimizer([{"params": [nn.Parameter(torch.ones(1))]}, groups[1]]).load_state_dict(optimizer.state_dict())


def damaged(codec: str, damage: Any) -> tuple[CruxyOptimizer, dict[str, Any]]:
    """An optimizer that has trained, and the checkpoint of another run with something wrong in it."""
    model, optimizer = make(**SETTINGS[codec])
    train(model, optimizer, 0, 3)
    saved_model, saved = make(**SETTINGS[codec])
    train(saved_model, saved, 0, 12)
    state_dict = through_torch_save(saved.state_dict())
    damage(state_dict)
    return optimizer, state_dict


def put(*path: Any) -> Any:
    """Sets state_dict[path[0]][path[1]]... to the last entry, or to what it makes of the old value."""

    def damage(state_dict: Any) -> None:
        *keys, last, value = path
        for key in keys:
            state_dict = state_dict[key]
        state_dict[last] = value(state_dict[last]) if callable(value) else value

    return damage


def drop(*path: Any) -> Any:
    def damage(state_dict: Any) -> None:
        *keys, last = path
        for key in keys:
            state_dict = state_dict[key]
        del state_dict[last]

    return damage


def slot(index: int, value: float) -> Any:
    return put("param_groups", 1, "control", lambda row: row.index_fill(0, torch.tensor(index), value))


def with_value(value: float) -> Any:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    return change


DAMAGE = {
    "transposed moment": ("adamw", put("state", 0, "exp_avg_sq", lambda t: t.T.contiguous()), "exp_avg_sq has shape"),
    "NaN moment": ("adamw", put("state", 2, "exp_avg", with_value(math.nan)), "exp_avg has values that are not"),
    "infinite moment": ("lion", put("state", 2, "exp_avg", with_value(math.inf)), "exp_avg has values that are not"),
    "negative square": ("adamw", put("state", 3, "exp_avg_sq", with_value(-1.0)), "exp_avg_sq has negative values"),
    "missing square": ("adamw", drop("state", 1, "exp_avg_sq"), "exp_avg_sq is missing"),
    "missing moment": ("adamw", drop("state", 1, "exp_avg"), "exp_avg is missing"),
    "a list": ("adamw", put("state", 1, "exp_avg", lambda t: t.tolist()), "exp_avg is a list"),
    "a list of tensors": ("adamw", put("state", 1, lambda s: list(s.values())), "state holds a list"),
    "integer moment": ("lion", put("state", 1, "exp_avg", lambda t: t.int()), "exp_avg is torch.int32"),
    "missing scales": ("lion8", drop("state", 0, "exp_avg_scale"), "without exp_avg_scale"),
    "short scales": ("lion8", put("state", 0, "exp_avg_scale", lambda t: t[:-1]), "exp_avg_scale is torch.bfloat16"),
    "fp32 scales": ("lion8", put("state", 0, "exp_avg_scale", lambda t: t.float()), "exp_avg_scale is torch.float32"),
    "NaN scales": ("lion8", put("state", 0, "exp_avg_scale", with_value(math.nan)), "exp_avg_scale has values"),
    "negative scales": ("lion8", put("state", 0, "exp_avg_scale", with_value(-1.0)), "exp_avg_scale has negative"),
    "short packed codes": ("lion4", put("state", 0, "exp_avg", lambda t: t[:-1]), "exp_avg has shape"),
    "scales of floats": ("lion8", put("state", 0, "exp_avg", lambda t: t.float()), "only codes have scales"),
    "negative step": ("adamw", put("state", 0, "step", torch.tensor(-1.0)), "step is"),
    "NaN step": ("adamw", put("state", 0, "step", torch.tensor(math.nan)), "step is"),
    "step of two": ("adamw", put("state", 0, "step", torch.ones(2)), "step is"),
    "NaN statistics": ("adamw", slot(L.V_FAST, math.nan), "control state has values that are not finite"),
    "infinite history": ("adamw", slot(L.META_HISTORY + 3, math.inf), "control state has values that are not finite"),
    "negative statistics": ("adamw", slot(L.V_SLOW, -1.0), "control state is out of range"),
    "empty control": ("adamw", put("param_groups", 1, "control", torch.zeros_like), "lr_scale 0"),
    "beta2 of 1": ("lion", slot(L.META_BETA2, 1.0), "control state is out of range"),
    "fp16 control": ("adamw", put("param_groups", 1, "control", lambda t: t.half()), "torch.float16"),
    "short control": ("adamw", put("param_groups", 1, "control", lambda t: t[:50]), r"\(50,\)"),
    "a control of numbers": ("adamw", put("param_groups", 1, "control", lambda t: t.tolist()), "is a list"),
    "unknown mode": ("adamw", put("param_groups", 1, "mode", "meta9"), "mode is 'meta9'"),
    "betas above 1": ("adamw", put("param_groups", 1, "betas", (1.5, 2.0)), "group 1.*betas"),
    "negative rate": ("lion", put("param_groups", 0, "lr", -1.0), "group 0.*lr is -1.0"),
    "NaN decay": ("lion8", put("param_groups", 0, "weight_decay", math.nan), "group 0.*weight_decay is nan"),
    "a switch of text": ("adamw", put("param_groups", 1, "maximize", "no"), "group 1.*maximize is 'no'"),
    "a rate of text": ("adamw", put("param_groups", 1, "lr", "fast"), "group 1.*lr is 'fast'"),
    "betas of one": ("lion", put("param_groups", 1, "betas", 0.9), "group 1.*betas is 0.9"),
    "a group that is a list": ("adamw", put("param_groups", 1, [1]), "group 1 of the checkpoint is a list; expected"),
    "a group without tensors": ("lion", drop("param_groups", 1, "params"), "group 1 of the checkpoint is one with"),
    "a number of tensors": ("adamw", put("param_groups", 0, "params", 3), "expected its settings and 'params'"),
    "lists of tensors": ("adamw", put("param_groups", 0, "params", [[0], [1]]), "expected its settings and 'params'"),
    "no step": ("adamw", drop("state", 1, "step"), "has no step"),
    "too large": (
        "adamw", put("state", 1, "exp_avg", lambda t: t.double() + 1e300), "exp_avg in torch.float32 has values that",
    ),
    "half a seed": ("adamw", slot(L.SEED, 0.5), "seed is 0.5"),
    "NaN seed": ("lion", slot(L.SEED, math.nan), "seed is nan"),
    "no groups": ("adamw", drop("param_groups"), "'state' and 'param_groups'"),
    "no state": ("adamw", put("state", None), "'state' and 'param_groups'"),
}


@pytest.mark.parametrize("name", list(DAMAGE))
def test_a_damaged_checkpoint_changes_nothing(name):
    codec, damage, message = DAMAGE[name]
    optimizer, state_dict = damaged(codec, damage)
    before, history = copy.deepcopy(optimizer.state_dict()), repr(optimizer.history())
    state = dict(optimizer.state)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state_dict)
    after = optimizer.state_dict()
    assert repr(after) == repr(before)
    assert all(
        torch.equal(a, b)
        for i in before["state"]
        for a, b in zip(before["state"][i].values(), after["state"][i].values(), strict=True)
    )
    assert all(optimizer.state[p] is value for p, value in state.items())
    assert repr(optimizer.history()) == history


def test_the_undamaged_checkpoint_loads():
    for codec in SETTINGS:
        optimizer, state_dict = damaged(codec, lambda state_dict: None)
        optimizer.load_state_dict(state_dict)
        assert optimizer.metrics()["step"] == 12


def test_a_snapshot_does_not_follow_the_run():
    model, optimizer = make()
    train(model, optimizer, 0, 5)
    packed = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, 5, 8)
    assert packed["param_groups"][0]["control"].equal(packed["param_groups"][1]["control"]) is False
    assert packed["state"][0]["step"] == 5


def test_meta_lion_round_trip():
    p = nn.Parameter(torch.ones(100))
    optimizer = MetaLion([p])
    p.grad = torch.ones(100)
    optimizer.step(loss=1.0)
    copied = copy.deepcopy(optimizer)
    assert isinstance(copied, MetaLion)
    fresh = MetaLion([nn.Parameter(torch.ones(100))])
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.metrics()["step"] == 1
