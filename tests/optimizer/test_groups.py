"""Groups and tensors that change during a run: replaced, moved, added and taken away; and two runs at once."""

import contextlib
import copy
import gc
import threading
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from cruxy_kernels import layout as L
from cruxy_kernels.backends import native
from cruxy_triton import CruxyOptimizer

RULES = {"adamw": {}, "adamw8": {"state_bits": 8}, "lion": {"use_lion": True},
         "lion8": {"use_lion": True, "state_bits": 8}, "lion4": {"use_lion": True, "state_bits": 4}}  # fmt: skip


@pytest.fixture(params=list(RULES))
def settings(request):
    return RULES[request.param]


def tensors(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def step(optimizer, seed, only=None):
    generator = torch.Generator().manual_seed(seed)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn(p.shape, generator=generator) if only is None or any(p is q for q in only) else None
    optimizer.step(loss=1.0)


def ages(optimizer):
    return [int(optimizer.state[p]["step"]) for g in optimizer.param_groups for p in g["params"]]


def replace(optimizer, old, carry):
    """What densification and resizing do: a new tensor in the old one's place, with its state."""
    new = Parameter(old.detach().clone())
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    state = optimizer.state.pop(old)
    if carry:
        optimizer.state[new] = state
    return new


def test_a_replaced_tensor_with_its_state_is_the_same_run(settings):
    """In torch.optim the state is all there is; so it is here, the bias corrections' t included."""
    plain, swapped = tensors((5, 3), (4,)), tensors((5, 3), (4,))
    a, b = CruxyOptimizer(plain, lr=1e-2, **settings), CruxyOptimizer(swapped, lr=1e-2, **settings)
    for turn in range(30):
        if turn and turn % 7 == 0:
            swapped = [replace(b, p, carry=True) for p in swapped]
        step(a, turn)
        step(b, turn)
    assert all(torch.equal(p, q) for p, q in zip(plain, swapped, strict=True))
    assert ages(b) == [30, 30]
    assert len(b.control) == 1


def test_replaced_tensors_are_let_go():
    params = tensors((5, 3))
    optimizer = CruxyOptimizer(params)
    gone = []
    for turn in range(30):
        step(optimizer, turn)
        gone.append(weakref.ref(params[0]))
        params = [replace(optimizer, params[0], carry=turn % 2 == 0)]
        optimizer.zero_grad()
    step(optimizer, 30)
    gc.collect()
    assert [ref() for ref in gone] == [None] * 30
    assert len(optimizer.control) <= 2, "a row for each tensor that ever was"


def test_a_state_of_another_age_is_taken_at_its_word():
    """The tensor's own `step` says how old its moments are, as in torch.optim.AdamW."""
    params = tensors((6,), (6,))
    optimizer = CruxyOptimizer(params, lr=1e-2)
    for turn in range(10):
        step(optimizer, turn)
    new = replace(optimizer, params[1], carry=True)
    optimizer.state[new]["step"] = torch.tensor(4.0)
    step(optimizer, 10)
    assert ages(optimizer) == [11, 5]
    other = CruxyOptimizer([Parameter(p.detach().clone()) for p in (params[0], new)], lr=1e-2)
    other.load_state_dict(optimizer.state_dict())
    step(optimizer, 11)
    step(other, 11)
    mine = [p for p in optimizer.param_groups[0]["params"]]
    assert all(torch.equal(p, q) for p, q in zip(mine, other.param_groups[0]["params"], strict=True))
    assert ages(other) == [12, 6]


def test_a_group_that_is_taken_away():
    """As for torch.optim: the others go on as they were, with their own settings."""

    params = tensors(*[(4, 3)] * 3)
    optimizer = CruxyOptimizer(
        [{"params": [p], "lr": lr} for p, lr in zip(params, (1e-2, 1e-3, 1e-4), strict=True)], weight_decay=0.0
    )
    step(optimizer, 0)
    removed = params[0].detach().clone()
    optimizer.param_groups.pop(0)
    before = [p.detach().clone() for p in params[1:]]
    step(optimizer, 1)
    moved = [(p - q).abs().max().item() for p, q in zip(params[1:], before, strict=True)]
    assert torch.equal(params[0], removed)
    assert moved[0] > 5 * moved[1] > 0
    assert len(optimizer.control) == 2
    assert optimizer.metrics()["step"] == 2
    assert optimizer.metrics()["lrs"] == pytest.approx([optimizer.metrics()["lr"] * k for k in (1, 0.1)], rel=1e-5)
    restored = CruxyOptimizer([{"params": [p]} for p in params[1:]])
    restored.load_state_dict(optimizer.state_dict())
    assert ages(restored) == [2, 2]


def test_a_tensor_that_moves_to_another_group():
    params = tensors((4,), (4,))
    groups = [{"params": params[:], "lr": 1e-2}, {"params": [], "lr": 1e-4}]
    optimizer = CruxyOptimizer(groups, weight_decay=0.0)
    for turn in range(5):
        step(optimizer, turn)
    optimizer.param_groups[1]["params"].append(optimizer.param_groups[0]["params"].pop())
    before = params[1].detach().clone()
    step(optimizer, 5)
    assert 0 < (params[1] - before).abs().max() < 3e-4
    assert ages(optimizer) == [6, 6]


def test_an_appended_group_is_followed():
    """Some libraries write to `param_groups` themselves."""
    params = tensors((4,), (4,))
    optimizer = CruxyOptimizer(params[:1], lr=1e-2)
    step(optimizer, 0)
    optimizer.param_groups.append({**optimizer.param_groups[0], "params": params[1:], "lr": 1e-3})
    step(optimizer, 1)
    lrs = optimizer.metrics()["lrs"]
    assert lrs[0] == pytest.approx(10 * lrs[1], rel=1e-5)
    assert [g["control"][L.STEP].item() for g in optimizer.param_groups] == [2, 2]


@pytest.mark.parametrize("name", ["lion", "lion8", "lion4"])
def test_late_joiners_share_a_row_where_age_means_nothing(name):
    """One tensor a step joins (experts that see their first token); Lion has no bias correction."""
    params = tensors(*[(3,)] * 20)
    optimizer = CruxyOptimizer(params, **RULES[name])
    for turn in range(20):
        step(optimizer, turn, only=params[: turn + 1])
    assert len(optimizer.control) == 1


def test_late_joiners_of_adamw_have_their_own_age():
    params = tensors(*[(3,)] * 6)
    optimizer = CruxyOptimizer(params)
    for turn in range(6):
        step(optimizer, turn, only=params[: turn + 1])
    assert ages(optimizer) == [6, 5, 4, 3, 2, 1]


def test_the_first_steps_of_a_late_joiner_are_adamws(settings):
    """Whenever a tensor joins, its first step has the size of the rate; Lion's always has."""
    early, late = tensors((50,), (50,))
    optimizer = CruxyOptimizer([early, late], lr=1e-2, weight_decay=0.0, **settings)
    for turn in range(12):
        step(optimizer, turn, only=[early])
    before = late.detach().clone()
    step(optimizer, 12)
    moved = (late - before).abs()
    assert moved.max() <= 1.01 * 1.9 * optimizer.metrics()["lr"]
    assert moved.mean() >= 0.5 * optimizer.metrics()["lr"]


def test_a_repeated_parameter_has_the_index_that_torch_gives_it():
    params = tensors((3,), (2,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it will be an error one day
        ours = CruxyOptimizer([params[0], params[1], params[0]])
        theirs = torch.optim.AdamW([params[0], params[1], params[0]])
    for optimizer in (ours, theirs):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    indices = theirs.state_dict()["param_groups"][0]["params"]
    assert ours.state_dict()["param_groups"][0]["params"] == indices
    assert set(ours.state_dict()["state"]) == set(indices)


def test_the_loss_of_loops_that_step_themselves():
    """accelerate's prepared optimizer and Trainer call step() with nothing."""
    from accelerate import Accelerator

    def run(give):
        torch.manual_seed(0)
        model = nn.Linear(4, 1)
        raw = CruxyOptimizer(model.parameters(), lr=1e-2)
        optimizer = Accelerator(cpu=True).prepare(raw)
        for turn in range(12):
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(turn))
            loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
            loss.backward()
            give(raw, optimizer, loss.detach())
            optimizer.zero_grad()
        return list(model.parameters()), raw.history()

    def set_loss(raw, optimizer, loss):
        raw.set_loss(loss)
        optimizer.step()

    (a, seen), (b, expected) = run(set_loss), run(lambda raw, optimizer, loss: raw.step(loss=loss))
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
    assert seen == expected
    with pytest.warns(UserWarning, match="set_loss"):
        run(lambda raw, optimizer, loss: optimizer.step())


def test_a_loss_is_for_one_step():
    params = tensors((3,))
    optimizer = CruxyOptimizer(params)
    optimizer.set_loss(2.0)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.step()
    assert optimizer.history()[0]["loss"] == 2.0
    assert optimizer.metrics()["loss"] != 2.0


# -- tensors that lie somewhere else in the next step ---------------------------------------------------------

needs_native = pytest.mark.skipif(native.library()[0] is None, reason=f"no loops over all rows: {native.library()[1]}")


def _zeros(tensor):
    return torch.zeros_like(tensor)


def _wrapped(optimizer):
    """What Lightning does: another object with the same attributes."""
    wrapper = object.__new__(type("Wrapper", (CruxyOptimizer,), {}))
    wrapper.__dict__ = dict(optimizer.__dict__)
    return wrapper


# How somebody gets hold of the state in the 5th step. What they hold they may change in any later one.
REACHES = {
    "state": lambda optimizer: list(optimizer.state.values()),
    "a wrapper's state": lambda optimizer: list(_wrapped(optimizer).state.values()),
    "state_dict": lambda optimizer: list(optimizer.state_dict()["state"].values()),
    "a shallow copy": lambda optimizer: list(copy.copy(optimizer).state.values()),
    "pickle": lambda optimizer: list(optimizer.__getstate__()["state"].values()),
}
CHANGES = {
    "data": lambda state, name: setattr(state[name], "data", _zeros(state[name])),
    "set_": lambda state, name: state[name].set_(_zeros(state[name])),
    "another tensor": lambda state, name: state.update({name: _zeros(state[name])}),
}


@needs_native
@pytest.mark.parametrize("reach", REACHES)
@pytest.mark.parametrize("change", CHANGES)
def test_a_state_whose_tensors_are_exchanged_is_followed(settings, reach, change):
    """As if the old tensors had been overwritten: in the plan of a step nothing of them is left."""
    shapes = ((70, 3), (4,))
    ours, theirs = tensors(*shapes), tensors(*shapes)
    exchanged = CruxyOptimizer(ours, lr=1e-2, backend="native", **settings)
    written = CruxyOptimizer(theirs, lr=1e-2, backend="native", **settings)
    held, alive = [], []
    for turn in range(9):
        step(exchanged, turn)
        step(written, turn)
        if turn == 4:
            held = REACHES[reach](exchanged)
        if turn == 6:
            if reach == "state_dict" and change == "another tensor":
                held = list(exchanged.state.values())  # the lists of a state dict are its own
            alive = [t.detach() for state in held for t in state.values()]  # a fault shall differ, not crash
            for state, other in zip(held, written.state.values(), strict=True):
                CHANGES[change](state, "exp_avg")
                other["exp_avg"].zero_()
    assert alive
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(exchanged.state[p]["exp_avg"], written.state[q]["exp_avg"])


@needs_native
def test_a_loaded_state_is_nobody_elses(settings):
    """Whoever still holds what was loaded, or what was there before, cannot change the run with it."""
    ours, theirs = tensors((70, 3)), tensors((70, 3))
    source, plain = (CruxyOptimizer(p, lr=1e-2, backend="native", **settings) for p in (ours, theirs))
    step(source, 0)
    step(plain, 0)
    loaded = CruxyOptimizer(ours, lr=1e-2, backend="native", **settings)
    before, saved = loaded.state, source.state_dict()
    loaded.load_state_dict(saved)
    for turn in range(1, 6):
        step(loaded, turn)
        step(plain, turn)
        for state in (*before.values(), *saved["state"].values()):
            state["exp_avg"].zero_()
            state["exp_avg"].data = torch.ones_like(state["exp_avg"])
    assert torch.equal(ours[0], theirs[0])


@needs_native
@pytest.mark.parametrize("which", ["param", "grad"])
def test_parameters_and_gradients_that_move_are_followed(settings, which):
    params, still = tensors((70, 3), (4,)), tensors((70, 3), (4,))
    moving = CruxyOptimizer(params, lr=1e-2, backend="native", **settings)
    plain = CruxyOptimizer(still, lr=1e-2, backend="native", **settings)
    for p, q in zip(params, still, strict=True):
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    for turn in range(8):
        for p in params:
            moved = p if which == "param" else p.grad
            if turn > 3:
                old = moved.data
                moved.data = moved.data.clone()
                old.fill_(float("nan"))  # where the step of before would read
        moving.step(loss=1.0)
        plain.step(loss=1.0)
    assert all(torch.equal(p, q) for p, q in zip(params, still, strict=True))


# -- many small ones -------------------------------------------------------------------------------------------


def operators(optimizer, only=None):
    """Operators that torch dispatches in one step."""

    class Count(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.number += 1
            return func(*args, **(kwargs or {}))

    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p) if only is None or any(p is q for q in only) else None
    with Count() as count:
        optimizer.step(loss=1.0)
    return count.number


@needs_native
def test_groups_cost_a_row_each_and_no_operators(settings):
    """300 groups of one tiny tensor each: what the host does in a warm step does not grow with them."""
    seen = {}
    for count in (3, 300, 3, 300):  # twice: the constants of the slow loop are kept for each number of rows
        optimizer = CruxyOptimizer([{"params": [p]} for p in tensors(*[(8,)] * count)], backend="native", **settings)
        seen[count] = [operators(optimizer) for turn in range(10)]
        assert len(optimizer.control) == count
    assert seen[300][1:] == seen[3][1:]  # every kind of step, the slow loop's included
    assert seen[300][0] - seen[3][0] <= 12 * 297, "the first step makes state and rows"


@needs_native
def test_experts_cost_no_operators(settings):
    """2 of 64 active, other ones each step: once all have joined, a step is that of 2 of 4."""
    seen = {}
    for count in (4, 64):
        experts = tensors(*[(8,)] * count)
        optimizer = CruxyOptimizer(experts, backend="native", **settings)
        pairs = count // 2
        for turn in range(32):
            step(optimizer, turn, only=experts[turn % pairs * 2 :][:2])
        assert len(optimizer.control) == (1 if "use_lion" in settings else pairs), "those that joined together share"
        seen[count] = [operators(optimizer, only=experts[turn % pairs :: pairs]) for turn in range(10)]
    # With more rows torch itself makes one more, a copy, in the slow loop.
    assert all(many <= few + 1 for many, few in zip(seen[64], seen[4], strict=True))


@needs_native
def test_joiners_cost_what_they_bring(settings):
    """200 tensors, one more in each step: a joiner costs its state, and views of the control for all that are there."""
    params = tensors(*[(8,)] * 200)
    optimizer = CruxyOptimizer(params, backend="native", **settings)
    for turn in range(199):
        step(optimizer, turn, only=params[: turn + 1])
    joining, *_, warm = [operators(optimizer) for turn in range(4)]
    assert len(optimizer.control) == (1 if "use_lion" in settings else 200)
    assert joining <= warm + 3 * 200 + 100
    alone = CruxyOptimizer(tensors((8,)), backend="native", **settings)
    assert warm == [operators(alone) for turn in range(9)][-1]


# -- two at once -----------------------------------------------------------------------------------------------


def walk(seed, settings, steps, barrier=None, shapes=((64, 33), (33,), (7, 5))):
    """The parameters after some steps, in a thread of its own where there is a barrier."""
    params = tensors(*shapes)
    optimizer = CruxyOptimizer(params, lr=1e-2, backend="torch", **settings)
    for turn in range(steps):
        if barrier is not None:
            barrier.wait()
        step(optimizer, 1000 * seed + turn)
    return params


def test_two_threads_train_as_one_after_the_other(settings):
    """Two optimizers with tensors of the same shapes share nothing."""
    alone = [walk(seed, settings, 40) for seed in (1, 2)]
    barrier, found = threading.Barrier(2, timeout=60), {}

    def work(seed):
        found[seed] = walk(seed, settings, 40, barrier)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in (1, 2):
        assert all(torch.equal(p, q) for p, q in zip(alone[seed - 1], found[seed], strict=True))


def test_a_first_step_under_inference_mode_leaves_others_alone(settings):
    """Buffers made there must not be kept for others: writing to them is an error outside."""
    shapes = (11, 3), (13,)  # of no other test
    with torch.inference_mode(), contextlib.suppress(RuntimeError):  # this may be refused; what follows may not
        walk(3, settings, 1, shapes=shapes)
    before = tensors(*shapes)
    assert not any(torch.equal(p, q) for p, q in zip(walk(3, settings, 3, shapes=shapes), before, strict=True))


def test_a_copy_goes_its_own_way():
    params = tensors((5,), (3,))
    optimizer = CruxyOptimizer(params)
    for turn in range(3):
        step(optimizer, turn, only=params[: 1 + turn // 2])
    copied = copy.deepcopy(optimizer)
    step(copied, 3)
    assert ages(optimizer) == [3, 1]
    assert ages(copied) == [4, 2]
    assert optimizer.metrics()["step"] == 3


def test_a_tensor_that_leaves_and_comes_back():
    """Its state stays where it was, as in torch.optim, and out of the checkpoints meanwhile."""
    params = tensors((4,), (4,))
    optimizer = CruxyOptimizer(params)
    for turn in range(3):
        step(optimizer, turn)
    away = optimizer.param_groups[0]["params"].pop()
    step(optimizer, 3)
    assert set(optimizer.state_dict()["state"]) == {0}
    optimizer.param_groups[0]["params"].append(away)
    step(optimizer, 4)
    assert ages(optimizer) == [5, 4]


# -- tensors that change where they lie -------------------------------------------------------------------------------


def shorter(p, optimizer):
    p.data = p.data[:4]
    p.grad = p.grad.new_ones(8, 8)[:4]


def transposed(p, optimizer):
    p.data = p.data.t()
    p.grad = torch.ones(8, 8)


def transposed_gradient(p, optimizer):
    p.grad.data = p.grad.data.t()


def one_element_gradient(p, optimizer):
    p.grad.data = p.grad.data.view(-1)[:1]


def resized_gradient(p, optimizer):
    p.grad.resize_(10)


def resized_state(p, optimizer):
    optimizer.state[p]["exp_avg"].resize_(10)


@pytest.mark.parametrize(
    "change", [shorter, transposed, transposed_gradient, one_element_gradient, resized_gradient, resized_state]
)
def test_what_changes_its_shape_in_place_is_looked_at_anew(change, settings):
    """The step after the change is PyTorch's, or refused as there; nothing beside the tensors is read or written."""

    def outcome(backend):
        torch.manual_seed(3)
        p = torch.nn.Parameter(torch.randn(8, 8))
        optimizer = CruxyOptimizer([p], lr=1e-2, backend=backend, **settings)
        for _ in range(3):
            p.grad = torch.randn(8, 8)
            optimizer.step(loss=1.0)
        before = p.data
        change(p, optimizer)
        try:
            optimizer.step(loss=1.0)
        except (ValueError, RuntimeError, TypeError) as error:
            return type(error), str(error)
        return before, optimizer.metrics()["grad_norm"]

    found, expected = outcome("native"), outcome("torch")
    if isinstance(expected[0], type):
        assert found == expected
    else:
        torch.testing.assert_close(found, expected)
