"""Snapshots on disk: those in memory in another place, whatever happens to the files."""

import copy
import math

import torch

from cruxy_triton.guard import Policy, TrainingGuard


def large(regression, folder, **policy):
    """A run whose snapshots are all on disk: its regression, optimizer and guard."""
    run = regression()
    optimizer = torch.optim.AdamW(run.model.parameters(), lr=3e-3)
    policy = Policy(snapshot_max_bytes=0, snapshot_interval=10, snapshot_confirm=3, **policy)
    return run, optimizer, TrainingGuard(optimizer, run.model, policy, snapshots=folder)


def poison_weights(step):
    def poison(model, number):
        if number == step:
            with torch.no_grad():
                model[0].weight[0, 0] = math.nan

    return poison


def test_snapshots_on_disk_are_those_in_memory(regression, tmp_path):
    run, optimizer, guard = large(regression, tmp_path / "snapshots")
    other = regression()
    second = torch.optim.AdamW(other.model.parameters(), lr=3e-3)
    memory = TrainingGuard(second, other.model, Policy(snapshot_interval=10, snapshot_confirm=3))
    for each, its, watching in ((run, optimizer, guard), (other, second, memory)):
        each.train(its, watching, 60, broken=poison_weights(47))
        watching.finish()
    assert [event.line() for event in guard.log] == [event.line() for event in memory.log]
    (rollback,) = [event for event in guard.log if event.kind == "rollback"]
    assert "back to the weights after step 40" in rollback.message
    torch.testing.assert_close(run.params(), other.params(), rtol=0, atol=0)
    snapshots = guard._ladder.snapshots
    assert all(s.content is None for s in (snapshots.start, *snapshots.good))
    wanted = {"snapshot-0.pt", *(f"snapshot-{s.step}.pt" for s in (*snapshots.good, snapshots.candidate) if s)}
    assert {path.name for path in (tmp_path / "snapshots").iterdir()} == wanted, "what is of no use any more is removed"


def test_a_damaged_snapshot_is_said_and_gone_round(regression, tmp_path):
    run, optimizer, guard = large(regression, tmp_path)
    run.train(optimizer, guard, 46)
    data = bytearray((tmp_path / "snapshot-40.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "snapshot-40.pt").write_bytes(data)
    (tmp_path / "snapshot-30.pt").unlink()
    run.train(optimizer, guard, 10, start=46, broken=poison_weights(47))
    notes = [event.message for event in guard.log if event.kind == "note"]
    assert notes[0] == "the snapshot after step 40 (snapshot-40.pt) is damaged and left out: not as it was written"
    assert notes[1].startswith("the snapshot after step 30 (snapshot-30.pt) is left out: No such file")
    (rollback,) = [event for event in guard.log if event.kind == "rollback"]
    assert "back to the weights after step 0" in rollback.message
    assert all(bool(p.isfinite().all()) for p in run.params())


def test_a_full_disk_leaves_the_snapshots_before_it(regression, tmp_path):
    from cruxy_triton.bench import faults

    run, optimizer, guard = large(regression, tmp_path)
    run.train(optimizer, guard, 25)
    with faults._failing_writes(0):
        run.train(optimizer, guard, 10, start=25)
    (note,) = [event.message for event in guard.log if event.kind == "note"]
    assert note.startswith("no snapshot after step 30: ")
    assert "No space left on device" in note
    run.train(optimizer, guard, 10, start=35, broken=poison_weights(36))
    (rollback,) = [event for event in guard.log if event.kind == "rollback"]
    assert "back to the weights after step 20" in rollback.message


def test_a_resumed_run_finds_its_snapshots(regression, tmp_path):
    run, optimizer, guard = large(regression, tmp_path)
    run.train(optimizer, guard, 37)
    saved = copy.deepcopy((run.model.state_dict(), optimizer.state_dict(), guard.state_dict()))
    run.train(optimizer, guard, 30, start=37, broken=poison_weights(39))  # removes nothing that the state refers to
    again, second, resumed = large(regression, tmp_path)
    again.model.load_state_dict(saved[0])
    second.load_state_dict(saved[1])
    resumed.load_state_dict(saved[2])
    again.train(second, resumed, 30, start=37, broken=poison_weights(39))
    assert [event.line() for event in resumed.log] == [event.line() for event in guard.log]
    assert "rollback" in resumed.log.kinds
    torch.testing.assert_close(again.params(), run.params(), rtol=0, atol=0)
