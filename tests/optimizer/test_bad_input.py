"""What cannot be used is refused in a sentence, where it is given, and nothing has changed then."""

import math
import warnings

import pytest
import torch
from torch.nn import Parameter

from cruxy_triton import CruxyOptimizer, MetaLion


def parameters(count=2):
    return [Parameter(torch.full((3, 2), 1.0 + i)) for i in range(count)]


def give_gradients(params):
    for i, p in enumerate(params):
        p.grad = torch.linspace(-1, 1, p.numel()).reshape(p.shape) * (i + 1)


ARGUMENTS = [
    (lambda p: CruxyOptimizer(p, 1e-3), ValueError, r"write lr=0\.001"),
    (lambda p: CruxyOptimizer(p, fused=True), TypeError, "every step is fused"),
    (lambda p: CruxyOptimizer(p, foreach=False), TypeError, "all tensors at once"),
    (lambda p: MetaLion(p, amsgrad=True), TypeError, "no amsgrad form"),
    (lambda p: CruxyOptimizer(p, momentum=0.9), TypeError, "unexpected argument 'momentum'"),
    (lambda p: CruxyOptimizer(p, betas=0.9), ValueError, r"betas is 0\.9; expected two floats"),
    (lambda p: CruxyOptimizer(p, betas=("a", "b")), ValueError, "expected two floats"),
    (lambda p: CruxyOptimizer(p, lr="1e-3"), ValueError, "lr is '1e-3'; expected a finite number"),
    (lambda p: CruxyOptimizer(p, lr=torch.tensor(-1.0)), ValueError, r"lr is -1\.0"),
    (lambda p: CruxyOptimizer(p, weight_decay=None), ValueError, "weight_decay is None"),
    (lambda p: CruxyOptimizer(p, gamma_norm="2"), ValueError, "gamma_norm is '2'"),
    (lambda p: CruxyOptimizer(p, bounds=2.0), ValueError, r"bounds is 2\.0"),
    (lambda p: CruxyOptimizer(p, rule="adan"), ValueError, "rule is 'adan'; expected one of lion, adamw"),
    (lambda p: CruxyOptimizer(p, rule="adamw", use_lion=True), ValueError, "exclude each other"),
    (lambda p: CruxyOptimizer([{"params": p, "mode": "stability_v1"}]), ValueError, "mode is a setting of the whole"),
    (lambda p: MetaLion([{"params": p, "state_bits": 32}]), ValueError, "state_bits is a setting of the whole"),
]


@pytest.mark.parametrize(("make", "error", "message"), ARGUMENTS, ids=[message for *_, message in ARGUMENTS])
def test_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make(parameters())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_lion", "no"), ("use_nesterov", 0), ("decoupled_weight_decay", None), ("use_gc", "yes"), ("maximize", 2),
        ("capturable", "yes"), ("guard", "no"), ("history", True), ("seed", True), ("meta_interval", True),
    ],
)  # fmt: skip
def test_switches_and_counts(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value!r}; expected"):
        CruxyOptimizer(parameters(), **{name: value})


def test_a_group_may_repeat_what_the_optimizer_says():
    """Groups that come from another optimizer have its settings in them."""
    old = CruxyOptimizer(parameters(), mode="stability_v2")
    assert len(CruxyOptimizer(old.param_groups, mode="stability_v2").param_groups) == 1


CHANGES = [
    ("lr", -1.0, r"lr is -1\.0"),
    ("lr", math.nan, "lr is nan"),
    ("lr", "fast", "lr is 'fast'"),
    ("betas", (1.5, 2.0), "betas"),
    ("eps", -1.0, "eps"),
    ("weight_decay", math.inf, "weight_decay"),
    ("use_lion", True, "states are of another rule"),
    ("use_nesterov", "no", "use_nesterov is 'no'; expected True or False"),
    ("maximize", 2, "maximize is 2"),
]


@pytest.mark.parametrize(("name", "value", "message"), CHANGES)
def test_settings_that_turn_bad_during_a_run(name, value, message):
    params = parameters()
    optimizer = CruxyOptimizer(params)
    give_gradients(params)
    optimizer.step(loss=1.0)
    good = optimizer.param_groups[0][name]
    before, control = [p.detach().clone() for p in params], optimizer.control.clone()
    optimizer.param_groups[0][name] = value
    for _ in range(2):  # again and again, until it is repaired
        with pytest.raises(ValueError, match=message):
            optimizer.step(loss=1.0)
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    assert torch.equal(optimizer.control.nan_to_num(), control.nan_to_num())
    optimizer.param_groups[0][name] = good
    optimizer.step(loss=1.0)
    assert optimizer.metrics()["step"] == 2


STEPS = [
    (lambda o: o.step(1.5), TypeError, r"step\(loss=loss\)"),
    (lambda o: o.step(torch.tensor(1.5)), TypeError, r"step\(loss=loss\)"),
    (lambda o: o.step(lambda: (1.0, 2.0)), TypeError, "loss is a tuple"),
    (lambda o: o.step(loss="1.5"), TypeError, "loss is a str"),
    (lambda o: o.step(loss=1j), TypeError, "loss is a complex"),
    (lambda o: o.step(loss=torch.tensor(1j)), TypeError, "complex64"),
    (lambda o: o.step(loss=torch.ones(3)), ValueError, "3 elements"),
    (lambda o: o.set_loss([1.0]), TypeError, "loss is a list"),
]


@pytest.mark.parametrize(("step", "error", "message"), STEPS)
def test_losses(step, error, message):
    params = parameters()
    optimizer = CruxyOptimizer(params)
    before, control = [p.detach().clone() for p in params], optimizer.control.clone()
    give_gradients(params)
    with pytest.raises(error, match=message):
        step(optimizer)
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    assert torch.equal(optimizer.control, control)
    assert not optimizer.state


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_a_gradient_whose_sign_is_a_bit(backend):
    """torch._neg_view: memory holds the other sign. In the first step, and in one that goes by a plan."""
    ends = []
    for turned in (False, True):
        params = parameters()
        optimizer = CruxyOptimizer(params, backend=backend, lr=0.1)
        for step in range(4):
            give_gradients(params)
            if turned and step != 1:
                for p in params:
                    p.grad = torch._neg_view(p.grad.neg())
            optimizer.step(loss=1.0)
        ends.append(params)
    assert all(torch.equal(p, q) for p, q in zip(*ends, strict=True))


# -- betas ---------------------------------------------------------------------------------------------------


def test_a_rule_has_one_default_for_its_betas():
    params = parameters(3)
    both = [{"params": params[:1]}, {"params": params[1:2], "use_lion": True}]
    assert [g["betas"] for g in CruxyOptimizer(both).param_groups] == [(0.9, 0.999), (0.9, 0.99)]
    assert CruxyOptimizer(params, use_lion=True).defaults["betas"] == (0.9, 0.99)
    assert MetaLion(params).defaults["betas"] == (0.9, 0.99)
    given = CruxyOptimizer([{"params": params, "use_lion": True}], betas=(0.8, 0.999))
    assert given.param_groups[0]["betas"] == (0.8, 0.999)


@pytest.mark.parametrize(
    ("mode", "betas", "said"),
    [
        ("meta3", (0.9, 0.95), True),
        ("meta3", (0.8, 0.999), False),
        ("stability_v1", (0.95, 0.999), True),
        ("stability_v1", (0.9, 0.95), False),
        ("stability_v2", (0.8, 0.95), False),
    ],
)
def test_betas_without_effect_are_said_to_be(mode, betas, said):
    """The warning stands where the betas make no difference to 40 steps, and only there."""

    def run(betas):
        params = parameters()
        optimizer = CruxyOptimizer(params, mode=mode, betas=betas)
        for step in range(40):
            give_gradients(params)
            for p in params:  # small: large signals drive stability_v1 to the upper clamp
                p.grad.mul_(0.01 * math.sin(step))
            optimizer.step(loss=1.0)
        return params

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        changed = run(betas)
        plain = run((0.9, 0.999))
    same = all(torch.equal(p, q) for p, q in zip(changed, plain, strict=True))
    assert [__file__ == w.filename for w in caught] == [True] * said
    assert same == said


# -- warnings ------------------------------------------------------------------------------------------------


def test_warnings_point_at_the_users_line():
    """A scheduler and a GradScaler put frames of torch between the user's line and the optimizer."""
    params = parameters()
    optimizer = CruxyOptimizer(params)
    torch.optim.lr_scheduler.StepLR(optimizer, 10)
    scaler = torch.amp.GradScaler("cpu")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            give_gradients(params)
            scaler.scale(torch.ones(()))
            scaler.step(optimizer)
            scaler.update()
    assert [w.filename for w in caught if "gets no loss" in str(w.message)] == [__file__]
