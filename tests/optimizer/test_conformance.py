"""torch's own frame for optimizers: `OptimizerInfo` and its error inputs, for each mode and rule.

torch keeps the tests themselves outside its wheel; those below ask the same questions of our classes with
torch's `OptimizerInfo`, error inputs and schedulers.
"""

import copy
import itertools
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import Parameter
from torch.optim.lr_scheduler import ExponentialLR, LinearLR, ReduceLROnPlateau, StepLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    get_error_inputs_for_all_optims,
)

from cruxy_triton import CruxyOptimizer, MetaLion

# The test of a bare optimizer's manners gives no loss; the sentence about it is tested in test_manners.py, the one
# about betas in test_bad_input.py.
pytestmark = [
    pytest.mark.filterwarnings("ignore:CruxyOptimizer.*gets no loss"),
    pytest.mark.filterwarnings("ignore:betas.*mode='meta3'"),
]


def inputs(device: Any, dtype: Any = None) -> list[OptimizerInput]:
    """Every mode and rule, and every argument once off its default."""
    settings: list[dict[str, Any]] = [
        {"mode": mode, "use_lion": lion}
        for mode, lion in itertools.product(("stability_v1", "stability_v2", "meta3"), (False, True))
    ]
    settings += [
        {"lr": 0.01}, {"lr": torch.tensor(0.01)}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "maximize": True},
        {"maximize": True, "use_lion": True}, {"use_nesterov": False}, {"decoupled_weight_decay": False},
        {"use_gc": True}, {"state_bits": 8, "use_lion": True}, {"state_bits": 4, "use_lion": True}, {"bounds": None},
        {"state_bits": 8}, {"guard": False}, {"capturable": True}, {"betas": (0.8, 0.9)}, {"eps": 1e-6},
        {"gamma_norm": 2.0}, {"meta_interval": 1},
        {"lr": torch.tensor([0.01]), "capturable": True}, {"history": 0},
    ]  # fmt: skip
    return [OptimizerInput(params=None, kwargs=s, desc=str(s)) for s in settings]


def error_inputs(device: Any, dtype: Any) -> list[ErrorOptimizerInput]:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"lr": -1.0}, "lr is -1.0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"betas": (1.0, 0.9)}, "betas"),
        ({"betas": (0.9, -0.1)}, "betas"),
        ({"betas": (0.9,)}, "betas"),
        ({"eps": -1e-8}, "eps"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"mode": "meta4"}, "unknown mode 'meta4'"),
        ({"gamma_norm": 0.5}, "gamma_norm"),
        ({"meta_interval": 0}, "meta_interval"),
        ({"meta_interval": 2.5}, "meta_interval"),
        ({"meta_lr_eta": -0.1}, "meta_lr_eta"),
        ({"meta_lr_beta2": 1.5}, "meta_lr_beta2"),
        ({"bounds": (2.0, 4.0)}, "bounds"),
        ({"bounds": (0.0, 4.0)}, "bounds"),
        ({"state_bits": 5}, "state_bits"),
        ({"state_bits": 4}, "use_lion=True"),
        ({"state_bits": 16}, "state_bits is 16; expected 4 or 8 or 32"),
        ({"backend": "cuda"}, "backend"),
        ({"history": -1}, "history"),
    ]
    ours = [
        ErrorOptimizerInput(
            OptimizerInput(params=None, kwargs=kwargs, desc=str(kwargs)), error_type=ValueError, error_regex=regex
        )
        for kwargs, regex in wrong
    ]
    return ours + get_error_inputs_for_all_optims(device, dtype)


INFO = OptimizerInfo(
    CruxyOptimizer,
    optim_inputs_func=inputs,
    optim_error_inputs_func=error_inputs,
    scheduler_inputs=(
        [lambda opt: StepLR(opt, gamma=0.9, step_size=10)],
        [lambda opt: ExponentialLR(opt, gamma=0.99), lambda opt: ReduceLROnPlateau(opt)],
        [lambda opt: LinearLR(opt, start_factor=0.4, total_iters=4)],
    ),
    supported_impls=(),
    not_og_supported_flags=("maximize", "capturable"),
    has_capturable_arg=True,
    supports_complex=False,
)
INPUTS = INFO.optim_inputs_func(device="cpu")
every_input = pytest.mark.parametrize("case", INPUTS, ids=lambda case: case.desc)


def make(case: OptimizerInput, params: Any) -> CruxyOptimizer:
    return INFO.optim_cls(params, **copy.deepcopy(case.kwargs))


def parameters(seed: int = 0) -> list[Parameter]:
    torch.manual_seed(seed)
    return [Parameter(torch.randn(10, 5)), Parameter(torch.randn(10)), Parameter(torch.randn(2, 3, 4))]


def same(a: Any, b: Any) -> bool:
    """Equal in structure, dtype and bits."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and a == b


def distance(params: list[Parameter]) -> torch.Tensor:
    return sum((p - 0.3).square().sum() * (i + 1) for i, p in enumerate(params))  # pyright: ignore


def closure_for(optimizer: Any, params: list[Parameter]) -> Any:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = distance(params)
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("error", error_inputs("cpu", torch.float32), ids=lambda e: e.optimizer_error_input.desc)
def test_errors(error):
    case = error.optimizer_error_input
    params = parameters() if case.params is None else case.params
    if error.error_on != OptimizerErrorEnum.CONSTRUCTION_ERROR:
        pytest.fail("no input of torch's fails in step")
    if issubclass(error.error_type, Warning):
        with pytest.warns(error.error_type, match=error.error_regex):
            INFO.optim_cls(params, **case.kwargs)
    else:
        with pytest.raises(error.error_type, match=error.error_regex):
            INFO.optim_cls(params, **case.kwargs)


@every_input
@pytest.mark.parametrize("schedulers", [[], *INFO.scheduler_inputs], ids=["none", "step", "two", "linear"])
def test_goes_in_the_right_direction(case, schedulers):
    params = parameters()
    optimizer = make(case, params)
    made = [scheduler(optimizer) for scheduler in schedulers]
    closure = closure_for(optimizer, params)
    first = closure().item()
    for _ in range(20):
        loss = optimizer.step(closure)
        for scheduler in made:
            scheduler.step(loss.detach()) if isinstance(scheduler, ReduceLROnPlateau) else scheduler.step()
    last = closure().item()
    assert (last > first) if case.kwargs.get("maximize") else (last < first)


@every_input
def test_param_groups_keep_their_own_settings(case):
    a, b, c = parameters()
    optimizer = make(case, [{"params": [a], "lr": 0.0, "weight_decay": 0.0}, {"params": [b], "lr": 0.02}])
    optimizer.add_param_group({"params": [c]})
    before = a.detach().clone(), b.detach().clone(), c.detach().clone()
    for _ in range(3):
        optimizer.step(closure_for(optimizer, [a, b, c]))
    assert torch.equal(a, before[0])
    assert not torch.equal(b, before[1])
    assert not torch.equal(c, before[2])
    default = torch.as_tensor(case.kwargs.get("lr", 1e-3))
    assert [torch.as_tensor(g["lr"]).item() for g in optimizer.param_groups] == pytest.approx(
        [0.0, 0.02, default.item()]
    )


@every_input
def test_tensor_lr_is_the_same_as_a_float(case):
    if isinstance(case.kwargs.get("lr"), torch.Tensor):
        case = OptimizerInput(None, {k: v for k, v in case.kwargs.items() if k != "lr"}, case.desc)
    for lr in (torch.tensor(0.01), torch.tensor([0.01])):
        with_float, with_tensor = parameters(), parameters()
        kwargs = {k: v for k, v in case.kwargs.items() if k != "lr"}
        plain = INFO.optim_cls(with_float, **kwargs, lr=0.01)
        tensor = INFO.optim_cls(with_tensor, **kwargs, lr=lr)
        schedules = ExponentialLR(plain, 0.9), ExponentialLR(tensor, 0.9)
        for _ in range(5):
            plain.step(closure_for(plain, with_float))
            tensor.step(closure_for(tensor, with_tensor))
            for schedule in schedules:
                schedule.step()
        for p, q in zip(with_float, with_tensor, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        assert tensor.param_groups[0]["lr"] is not None


@every_input
@pytest.mark.parametrize("given", [None, [], "zero-size"])
def test_no_gradient_is_no_step(case, given):
    params = parameters() if given != "zero-size" else [Parameter(torch.empty(0, 3))]
    before = [p.detach().clone() for p in params]
    optimizer = make(case, params)
    if given == "zero-size":
        params[0].grad = torch.empty(0, 3)
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    assert optimizer.metrics()["step"] == int(given == "zero-size")
    for p in params:
        p.grad = None
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


def test_zero_size_parameters_beside_others():
    empty, full = Parameter(torch.empty(3, 0)), Parameter(torch.ones(4))
    for case in INPUTS:
        optimizer = make(case, [empty, full])
        empty.grad, full.grad = torch.empty(3, 0), torch.ones(4)
        optimizer.step()
        assert empty.shape == (3, 0)
        assert bool(full.isfinite().all())


@every_input
def test_state_dict_is_deterministic(case):
    params = parameters()
    optimizer = make(case, params)
    for _ in range(6):
        optimizer.step(closure_for(optimizer, params))
    other = parameters(seed=1)
    with torch.no_grad():
        for p, q in zip(other, params, strict=True):
            p.copy_(q)
    again = make(case, other)
    again.load_state_dict(optimizer.state_dict())
    for _ in range(6):
        optimizer.step(closure_for(optimizer, params))
        again.step(closure_for(again, other))
    assert all(torch.equal(p, q) for p, q in zip(params, other, strict=True))
    assert same(optimizer.state_dict(), again.state_dict())


@every_input
@pytest.mark.parametrize("save_named", [False, True])
@pytest.mark.parametrize("load_named", [False, True])
def test_named_parameters(case, save_named, load_named):
    names = ["first.weight", "first.bias", "deep"]
    params, other = parameters(), parameters()
    optimizer = make(case, list(zip(names, params, strict=True)) if save_named else params)
    optimizer.step(closure_for(optimizer, params))
    again = make(case, list(zip(["x", "y", "z"], other, strict=True)) if load_named else other)
    again.load_state_dict(optimizer.state_dict())
    expected = names if save_named else ["x", "y", "z"] if load_named else None
    assert again.param_groups[0].get("param_names") == expected
    assert again.metrics()["step"] == 1


@every_input
def test_older_state_dicts(case):
    """Keys that a later version added are filled from the defaults."""
    params = parameters()
    optimizer = make(case, params)
    optimizer.step(closure_for(optimizer, params))
    old = copy.deepcopy(optimizer.state_dict())
    for flag in ("maximize", "capturable", "use_gc", "use_nesterov", "decoupled_weight_decay"):
        for group in old["param_groups"]:
            del group[flag]
    again = make(case, parameters())
    again.load_state_dict(old)
    assert set(optimizer.param_groups[0]) == set(again.param_groups[0])
    again.step(closure_for(again, again.param_groups[0]["params"]))


@every_input
def test_weights_only(case, tmp_path):
    params = parameters()
    optimizer = make(case, params)
    optimizer.step(closure_for(optimizer, params))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    again = make(case, parameters())
    again.load_state_dict(loaded)
    assert same(optimizer.state_dict(), again.state_dict())


@every_input
def test_steps_that_are_numbers(case):
    """Older torch optimizers had `step` as an int in their state."""
    params = parameters()
    optimizer = make(case, params)
    optimizer.step(closure_for(optimizer, params))
    state = optimizer.state_dict()
    for value in state["state"].values():
        value["step"] = value["step"].item()
    again = make(case, parameters())
    again.load_state_dict(state)
    assert again.state_dict()["state"][0]["step"] == 1


@every_input
def test_deepcopy_and_pickle_keep_the_public_attributes(case):
    params = parameters()
    optimizer = make(case, params)
    optimizer.step(closure_for(optimizer, params))

    def public(o: Any) -> dict[str, Any]:
        kept = {k: v for k, v in o.__dict__.items() if not k.startswith("_") and k not in ("state", "param_groups")}
        # torch itself adds this default when an optimizer is restored
        kept["defaults"] = {k: v for k, v in o.defaults.items() if k != "differentiable"}
        return kept

    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert same(public(copied), public(optimizer))
        own = [p for g in copied.param_groups for p in g["params"]]
        copied.step(closure_for(copied, own))  # and it steps, through the profiler's hook again
        optimizer_state = optimizer.state_dict()["state"][0]["step"]
        assert copied.state_dict()["state"][0]["step"] == optimizer_state + 1


# -- hooks ---------------------------------------------------------------------------------------------------


def test_hooks_and_their_order():
    params = parameters()
    optimizer = CruxyOptimizer(params)
    calls: list[str] = []
    handles = [
        optimizer.register_step_post_hook(lambda *a: calls.append("own post")),
        optimizer.register_step_pre_hook(lambda *a: calls.append("own pre")),
        register_optimizer_step_post_hook(lambda *a: calls.append("global post")),
        register_optimizer_step_pre_hook(lambda *a: calls.append("global pre")),
    ]
    try:
        optimizer.step(closure_for(optimizer, params))
    finally:
        for handle in handles:
            handle.remove()
    assert calls == ["global pre", "own pre", "own post", "global post"]
    optimizer.step(closure_for(optimizer, params))
    assert len(calls) == 4


def test_a_profile_shows_each_step_once():
    """Also where a subclass has a step of its own, which torch wraps again."""

    class Counting(CruxyOptimizer):
        def step(self, *args, **kwargs):
            return super().step(*args, **kwargs)

    for kind, name in ((MetaLion, "MetaLion"), (Counting, "Counting")):
        params = parameters()
        optimizer = kind(params)
        calls: list[str] = []
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            optimizer.step(closure_for(optimizer, params))
        assert [e.count for e in profile.key_averages() if e.key == f"Optimizer.step#{name}.step"] == [1]
        optimizer.register_step_pre_hook(lambda *a, calls=calls: calls.append("pre"))
        optimizer.step(closure_for(optimizer, params))
        assert calls == ["pre"]


def test_a_pre_hook_can_give_the_loss():
    params = parameters()
    optimizer = CruxyOptimizer(params)
    optimizer.register_step_pre_hook(lambda o, args, kwargs: (args, {**kwargs, "loss": torch.tensor(7.25)}))
    distance(params).backward()
    optimizer.step(None)
    assert optimizer.metrics()["loss"] == 7.25


def test_state_dict_hooks():
    params = parameters()
    optimizer = CruxyOptimizer(params)
    calls: list[str] = []

    def post(o: Any, state: dict[str, Any]) -> dict[str, Any]:
        calls.append("post")
        state["extra"] = 1
        return state

    optimizer.register_state_dict_pre_hook(lambda o: calls.append("pre"))
    optimizer.register_state_dict_post_hook(post)
    optimizer.register_state_dict_pre_hook(lambda o: calls.append("first pre"), prepend=True)
    state = optimizer.state_dict()
    assert calls == ["first pre", "pre", "post"]
    assert state["extra"] == 1

    def load_pre(o: Any, s: dict[str, Any]) -> dict[str, Any]:
        calls.append("load pre")
        s = dict(s)
        s["param_groups"] = copy.deepcopy(s["param_groups"])
        s["param_groups"][0]["lr"] = 0.125
        return s

    calls.clear()
    optimizer.register_load_state_dict_pre_hook(load_pre)
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append("load post"))
    optimizer.load_state_dict(state)
    assert calls == ["load pre", "load post"]
    assert optimizer.param_groups[0]["lr"] == 0.125
    assert state["param_groups"][0]["lr"] == 1e-3


# -- gradients that cannot be used --------------------------------------------------------------------------------


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = CruxyOptimizer(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    before = embedding.weight.detach().clone()
    with pytest.raises(RuntimeError, match="sparse gradients"):
        optimizer.step()
    assert torch.equal(before, embedding.weight)


def test_sparse_gradients_are_refused_in_a_later_step_too():
    """The first step is a dense one, large enough for the loops that keep its tensors for the next."""
    p = nn.Parameter(torch.ones(1 << 19))
    optimizer = CruxyOptimizer([p])
    p.grad = torch.ones_like(p)
    optimizer.step(loss=1.0)
    before = p.detach().clone()
    p.grad = None
    p.grad = torch.ones_like(p).to_sparse()
    with pytest.raises(RuntimeError, match="sparse gradients"):
        optimizer.step(loss=1.0)
    assert torch.equal(p, before)


def test_complex_parameters_are_refused():
    with pytest.raises(ValueError, match="complex"):
        CruxyOptimizer([Parameter(torch.ones(2, dtype=torch.complex64))])
    optimizer = CruxyOptimizer(parameters())
    with pytest.raises(ValueError, match="complex"):
        optimizer.add_param_group({"params": [Parameter(torch.ones(2, dtype=torch.complex64))]})
    assert len(optimizer.param_groups) == 1


def test_meta_lion_is_what_it_says():
    optimizer = MetaLion(parameters())
    assert (optimizer.mode, optimizer.state_bits, optimizer.param_groups[0]["use_lion"]) == ("meta3", 8, True)
    optimizer.step(closure_for(optimizer, optimizer.param_groups[0]["params"]))
    assert optimizer.state[optimizer.param_groups[0]["params"][0]]["exp_avg"].dtype == torch.int8
    assert MetaLion(parameters(), state_bits=32).state_bits == 32
    with pytest.raises(ValueError, match="MetaLion"):
        MetaLion(parameters(), mode="stability_v1")


def test_nothing_is_warned_in_ordinary_use():
    params = parameters()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = CruxyOptimizer(params, capturable=True)
        for _ in range(3):
            optimizer.step(closure_for(optimizer, params))
        copy.deepcopy(optimizer).load_state_dict(optimizer.state_dict())
