"""State, events and the plot: what a resumed run continues with, and what can be read afterwards."""

import copy
import itertools
import json
import math

import pytest
import torch
from torch import nn

from cruxy_triton.guard import Policy, Regime, TrainingGuard, read_events


def test_a_resumed_run_continues_exactly(regression):
    def poison(model, step):
        if step in (15, 16, 41):
            model[2].weight.grad.mul_(1e4)

    def make():
        run = regression()
        optimizer = torch.optim.AdamW(run.model.parameters(), lr=0.3)
        return run, optimizer, TrainingGuard(optimizer, run.model)

    whole, optimizer, guard = make()
    whole.train(optimizer, guard, 35, broken=poison)
    saved = copy.deepcopy((whole.model.state_dict(), optimizer.state_dict(), guard.state_dict()))
    whole.train(optimizer, guard, 25, start=35, broken=poison)
    again, second, resumed = make()
    again.model.load_state_dict(saved[0])
    second.load_state_dict(saved[1])
    resumed.load_state_dict(saved[2])
    again.train(second, resumed, 25, start=35, broken=poison)
    torch.testing.assert_close(again.params(), whole.params(), rtol=0, atol=0)
    assert guard.lr_factor < 1
    assert resumed.metrics == guard.metrics
    assert [e.line() for e in resumed.log] == [e.line() for e in guard.log], "with the events before"


def test_state_loads_with_weights_only(regression, tmp_path):
    run = regression()
    optimizer = torch.optim.SGD(run.model.parameters(), lr=1e-2)
    guard = TrainingGuard(optimizer, run.model)
    run.train(optimizer, guard, 3)
    run.loss(0).backward()
    guard.observe(run.loss(0), batch=Regime)  # anything may name a batch
    optimizer.step()
    torch.save(guard.state_dict(), tmp_path / "guard.pt")
    loaded = torch.load(tmp_path / "guard.pt", weights_only=True)
    assert "Regime" in loaded["pending"][1]["batch"]
    guard.load_state_dict(loaded)
    guard.finish()
    assert guard.metrics["step"] == 4


def test_state_of_another_model_is_refused(regression):
    run = regression()
    optimizer = torch.optim.SGD(run.model.parameters(), lr=1e-2)
    guard = TrainingGuard(optimizer, run.model)
    run.train(optimizer, guard, 2)
    other = TrainingGuard(torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1))
    with pytest.raises(ValueError, match="of 4 tensors and the optimizer has 1"):
        other.load_state_dict(guard.state_dict())


def test_events_are_json_lines_that_read_back(regression, tmp_path):
    run = regression()
    optimizer = torch.optim.SGD(run.model.parameters(), lr=1e-2)
    file = tmp_path / "events.jsonl"
    guard = TrainingGuard(optimizer, run.model, events=file)

    def poison(model, step):
        if step == 5:
            model[0].weight.grad[0, 0] = math.nan

    run.train(optimizer, guard, 30, broken=poison)
    lines = [json.loads(line, parse_constant=pytest.fail) for line in file.read_text().splitlines()]
    assert [line["kind"] for line in lines] == guard.log.kinds
    assert [event.step for event in read_events(file)] == [event.step for event in guard.log]
    with file.open("a") as handle:
        handle.write('{"step": 31, "ki')  # a crash while writing
    assert len(read_events(file)) == len(lines)
    file.write_text("nonsense\n{}\n")
    with pytest.raises(ValueError, match="line 1: not an event"):
        read_events(file)
    assert "1 x skip" in guard.summary()


def test_events_on_a_full_disk_do_not_end_the_run(regression, tmp_path):
    run = regression()
    optimizer = torch.optim.SGD(run.model.parameters(), lr=1e-2)
    guard = TrainingGuard(optimizer, run.model, events=tmp_path / "missing" / "events.jsonl")
    run.train(optimizer, guard, 25)
    assert "events could not be written" in guard.summary()


def test_plot(regression, tmp_path):
    pytest.importorskip("matplotlib")
    from cruxy_triton.guard.plot import plot, spans

    run = regression()
    optimizer = torch.optim.AdamW(run.model.parameters(), lr=1.0)
    guard = TrainingGuard(optimizer, run.model)
    losses = run.train(optimizer, guard, 60)
    found = spans(guard.log, 60)
    assert found[0][0] == 1
    assert found[-1][1] == 60
    assert all(b[0] == a[1] + 1 and a[2] is not b[2] for a, b in itertools.pairwise(found))
    plot(tmp_path / "run.png", losses, guard.log)
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


def test_adapters_are_known_as_such_in_a_resumed_run(tmp_path):
    """Their matrices no longer begin at zero then, and the limit of a step's size is that of adapters all the same."""

    def make():
        matrices = [nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.zeros(4, 4))]
        optimizer = torch.optim.SGD(matrices, lr=0.1)
        return matrices, optimizer, TrainingGuard(optimizer)

    matrices, optimizer, guard = make()
    for p in matrices:
        p.grad = torch.ones(4, 4)
    optimizer.step()
    others, _, resumed = make()
    with torch.no_grad():
        others[1].fill_(1)
    resumed.load_state_dict(guard.state_dict())
    assert resumed._ladder.ratio_limit == guard._ladder.ratio_limit == Policy().update_ratio_limit * 5


def test_a_state_that_is_none_changes_nothing(regression):
    run = regression()
    optimizer = torch.optim.SGD(run.model.parameters(), lr=1e-2)
    guard = TrainingGuard(optimizer, run.model)
    run.train(optimizer, guard, 8)
    before = guard.state_dict()
    for broken in ({}, {**before, "ladder": {}}, {**before, "events": [{"when": 3}]}, {**before, "steps": None}):
        with pytest.raises(ValueError, match="no state of a guard"):
            guard.load_state_dict(broken)
        assert str(guard.state_dict()) == str(before)
