"""Layer-wise control above other optimizers: `attach_blade`, `attach_sketch_align`."""

import copy
import math

import pytest
import torch
from torch import nn

from cruxy_triton import CruxyOptimizer
from cruxy_triton.controllers.attach import attach_blade, attach_sketch_align
from cruxy_triton.guard import TrainingGuard


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.head(x)


def train(model, optimizer, control, first, last, schedule=None, clip=None):
    tokens = torch.arange(11)
    for step in range(first, last):
        loss = nn.functional.cross_entropy(model(tokens), (tokens * 3 + step % 4) % 11)
        optimizer.zero_grad()
        loss.backward()
        control.observe(loss, 1.0 + step % 3)
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        if schedule is not None:
            schedule.step()


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def adamw(model):
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    return torch.optim.AdamW([{"params": decayed, "weight_decay": 0.3}, {"params": others, "lr": 3e-2}], lr=1e-2)


def apply(control, *given):
    """The hook before a step, with multipliers that are not those of the gradients."""
    control._observed = control._there = True
    control._before(*given)


def test_multipliers_of_one_leave_the_optimizer_as_it_is():
    """SGD, AdamW: groups that are split, and decay that is done here, give the bits of the optimizer alone."""
    for make in (adamw, lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)):
        models = Model(), Model()
        one, other = make(models[0]), make(models[1])
        control = attach_blade(one, models[0])
        control.control.entry["multipliers"].fill_(1)
        control.detach()
        one.register_step_pre_hook(lambda *given, control=control: apply(control, *given))
        one.register_step_post_hook(control._after)
        for _ in range(5):
            for model, optimizer in zip(models, (one, other), strict=True):
                optimizer.zero_grad()
                model(torch.arange(11)).square().mean().backward()
                optimizer.step()
        assert same(*models)
        assert not same(models[0], Model())


def test_the_multiplier_scales_the_rate_and_not_the_decay():
    """SGD without momentum: theta - lr m g. AdamW with a gradient of 0 after the first: the decay alone."""
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    control = attach_blade(optimizer, model, response="paper")
    assert [group["layer"] for group in optimizer.param_groups] == ["embed", "head", "layers.0", "layers.1"]
    for size in (1.0, 1.4):
        before = [p.detach().clone() for p in model.parameters()]
        for i, p in enumerate(model.parameters()):
            p.grad = torch.full_like(p, size if i == 0 else 1.0)
        optimizer.step()
    multipliers = control.multipliers()
    assert multipliers["embed"] == pytest.approx(1.4)
    for (name, p), old in zip(model.named_parameters(), before, strict=True):
        m = next(m for layer, m in multipliers.items() if name.startswith(layer))
        torch.testing.assert_close(p.detach(), old - 0.1 * m * p.grad)
    assert all(group["lr"] == 0.1 for group in optimizer.param_groups)

    p, q = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([p, q], lr=0.1, weight_decay=0.5, betas=(0.0, 0.0))
    control = attach_blade(optimizer)
    for size in (1.0, 2.0):
        p.grad, q.grad, before = torch.ones(4), torch.full((4,), size), q.detach().clone()
        optimizer.step()
    assert control.multipliers()["parameter 1"] == pytest.approx(1.5 / 2)
    torch.testing.assert_close(q.detach(), before * 0.95 - 0.1 * 0.75)


@pytest.mark.parametrize("attach", [attach_blade, attach_sketch_align])
def test_it_continues_bit_for_bit_under_a_scheduler(attach, tmp_path):
    """The state is in the optimizer's own state_dict; clipping comes after the gradients were seen."""

    def make():
        model = Model()
        optimizer = adamw(model)
        control = attach(optimizer, model)
        return model, optimizer, control, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)

    one = make()
    train(*one[:3], 0, 10, one[3], clip=0.5)
    torch.save([x.state_dict() for x in (one[0], one[1], one[3])], tmp_path / "saved")
    train(*one[:3], 10, 25, one[3], clip=0.5)
    other = make()
    saved = torch.load(tmp_path / "saved", weights_only=True)
    for part, held in zip((other[0], other[1], other[3]), saved, strict=True):
        part.load_state_dict(held)
    train(*other[:3], 10, 25, other[3], clip=0.5)
    assert same(one[0], other[0])
    assert one[2].multipliers() == other[2].multipliers()
    assert set(one[2].multipliers()) == {"embed", "layers.0", "layers.1", "head"}
    rates = sorted({group["lr"] for group in one[1].param_groups})
    assert rates == pytest.approx([1e-2 * 0.97**25, 3e-2 * 0.97**25])
    damaged = copy.deepcopy(one[1].state_dict())
    damaged["param_groups"][0]["layers"]["shared"].fill_(math.nan)
    other[1].load_state_dict(damaged)
    with pytest.raises(ValueError, match="damaged: shared has values that are not finite"):
        train(*other[:3], 25, 26)


def test_it_is_that_of_the_optimizer_that_knows_it():
    """The same gradients give the same multipliers as `layerwise=` does."""
    model, other = Model(), Model()
    ours = CruxyOptimizer(other.named_parameters(), layerwise="blade")
    theirs = torch.optim.SGD(model.parameters(), lr=1e-3)
    control = attach_blade(theirs, model)
    for step in range(6):
        generator = torch.Generator().manual_seed(step)
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=generator) * (1 + p.dim() * (step % 3))
            q.grad = p.grad.clone()
        control.observe(2.0 + step, 1.0)
        theirs.step()
        ours.set_entropy(1.0)
        ours.step(loss=2.0 + step)
        assert control.multipliers() == {name: pytest.approx(m) for name, m in ours.layer_multipliers().items()}
    assert len(set(control.multipliers().values())) == 4


@pytest.mark.parametrize("first", ["guard", "blade"])
def test_beside_a_guard_that_lowers_the_rate(first):
    """Whoever comes first, the rate is the scheduler's after the step and both factors apply in it."""
    model = Model()
    optimizer, used = torch.optim.SGD(model.parameters(), lr=0.1), []
    made = {}
    for name in (first, "blade" if first == "guard" else "guard"):
        made[name] = TrainingGuard(optimizer, model) if name == "guard" else attach_blade(optimizer, model)
    made["guard"]._ladder.rate.factor = 0.5
    optimizer.register_step_pre_hook(lambda o, *_: used.append([group["lr"] for group in o.param_groups]))
    for step in range(3):
        loss = model(torch.arange(11)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        made["guard"].observe(loss, batch=step)
        made["blade"].observe(loss, 1.0)
        optimizer.step()
        assert {group["lr"] for group in optimizer.param_groups} == {0.1}
    factor = made["guard"].lr_factor
    assert used[2] == [pytest.approx(0.1 * m * factor, rel=0.1) for m in made["blade"].multipliers().values()]


def test_a_step_that_is_not_finite_leaves_the_state():
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    control = attach_blade(optimizer, model)
    train(model, optimizer, control, 0, 3)
    before = {k: copy.copy(v) for k, v in control.control.state.items()}
    model.head.weight.grad[0, 0] = math.nan
    control.observe(1.0)
    model.head.weight.grad[0, 0] = 0
    control.observe(math.inf)
    assert all(torch.equal(before[k], v) for k, v in control.control.state.items())
    optimizer.zero_grad()
    optimizer.step()  # without gradients


def test_bad_input():
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="optimizer is a list; expected a torch optimizer"):
        attach_blade([optimizer])
    with pytest.raises(TypeError, match="CruxyOptimizer takes layerwise='blade' itself"):
        attach_blade(CruxyOptimizer(model.parameters()))
    control = attach_blade(optimizer, model)
    with pytest.raises(ValueError, match="has layer-wise control already"):
        attach_sketch_align(optimizer, model)
    model(torch.arange(11)).sum().backward()
    with pytest.raises(ValueError, match="loss or entropy has 2 elements"):
        control.observe(torch.ones(2))
    control.detach()
    scheduled = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.optim.lr_scheduler.ConstantLR(scheduled)
    with pytest.raises(ValueError, match="has a learning-rate scheduler already"):
        attach_blade(scheduled, model)
    assert len(scheduled.param_groups) == 1
