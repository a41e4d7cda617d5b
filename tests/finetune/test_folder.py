"""The output folder: what a run may use, and that earlier output survives until the new one is complete."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cruxy_triton import files
from cruxy_triton.errors import UserError
from cruxy_triton.finetune.folder import RunFolder


def finished_run(path: Path) -> Path:
    path.mkdir()
    files.write_json(path / "run.json", {"recipe": {}, "status": "finished"})
    (path / "report.md").write_text("earlier")
    return path


def test_nothing_is_created_before_begin(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    folder.begin()
    assert folder.checkpoints.is_dir()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "is not empty"),
        ({"overwrite": True, "resume": True}, "exclude each other"),
    ],
)
def test_an_earlier_run_is_refused(tmp_path: Path, options: dict, says: str) -> None:
    run = finished_run(tmp_path / "run")
    with pytest.raises(UserError, match=says):
        RunFolder(run, **options)
    assert (run / "report.md").read_text() == "earlier"


def test_overwrite_only_takes_folders_of_runs(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"no run\.json"):
        RunFolder(tmp_path, overwrite=True)
    assert (tmp_path / "thesis.tex").exists()


def test_overwrite_keeps_the_earlier_run_until_the_new_one_is_complete(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    folder = RunFolder(run, overwrite=True)
    assert (run / "report.md").exists(), "checking alone must not move anything"
    folder.begin()
    assert not (run / "report.md").exists()
    assert (tmp_path / "run.previous" / "report.md").read_text() == "earlier"
    folder.finish()
    assert not (tmp_path / "run.previous").exists()


def test_overwriting_an_unfinished_overwrite_keeps_the_finished_run(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    started = RunFolder(run, overwrite=True)
    started.begin()
    started.write_run({"recipe": {}}, "running")  # killed here
    again = RunFolder(run, overwrite=True)
    again.begin()
    assert (tmp_path / "run.previous" / "report.md").read_text() == "earlier"
    again.write_run({"recipe": {}}, "finished")  # killed here, before the earlier one is removed
    (run / "report.md").write_text("later")
    RunFolder(run, overwrite=True).begin()
    assert (tmp_path / "run.previous" / "report.md").read_text() == "later", "the newer of two finished runs is kept"


def test_overwrite_leaves_a_folder_alone_that_only_has_its_name(tmp_path: Path) -> None:
    run, own = finished_run(tmp_path / "run"), finished_run(tmp_path / "run.previous")
    with pytest.raises(UserError, match=r"run\.previous is in the way"):
        RunFolder(run, overwrite=True)
    started = RunFolder(tmp_path / "run2")
    started.begin()
    finished_run(tmp_path / "run2.previous")
    started.finish()
    assert own.exists()
    assert (tmp_path / "run2.previous").exists()


def test_a_run_killed_while_it_began_is_no_obstacle(tmp_path: Path) -> None:
    RunFolder(tmp_path / "run").begin()
    RunFolder(tmp_path / "run").begin()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    """Two runs write to one folder: the second is refused with the process of the first, until that is dead."""
    path = tmp_path / "runs" / "run"
    script = (
        "import sys, time\n"
        "from cruxy_triton.finetune.folder import RunFolder\n"
        "with RunFolder(sys.argv[1]).locked():\n"
        "    print('locked', flush=True)\n"
        "    time.sleep(60)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "locked\n"
    with pytest.raises(UserError, match=f"another run is writing to .*process {holder.pid} "), RunFolder(path).locked():
        pytest.fail("locked twice")
    holder.kill()
    holder.wait()
    assert [p.name for p in (tmp_path / "runs").iterdir()] == [".run.lock"], "left by the dead process"
    with RunFolder(path).locked(), pytest.raises(UserError, match=f"process {os.getpid()} "), RunFolder(path).locked():
        pytest.fail("locked twice in one process")
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_lock_leaves_nothing_where_nothing_was(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="refused"), RunFolder(tmp_path / "a" / "b" / "run").locked():
        raise UserError("refused for another reason")
    assert list(tmp_path.iterdir()) == []


def test_what_happened_before_the_lock_is_seen_under_it(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    finished_run(tmp_path / "run")  # by another process, while this one was starting
    with pytest.raises(UserError, match="is not empty"), folder.locked():
        pytest.fail("took over a finished run")


def test_a_full_disk_is_known_before_anything_is_moved(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    with pytest.raises(UserError, match=r"needs about .* MiB .* MiB free"):
        RunFolder(run, overwrite=True).begin(needed_bytes=1 << 60)
    assert (run / "report.md").exists()


def test_file_missing_run_and_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        RunFolder(tmp_path / "file")
    with pytest.raises(UserError, match="no run to resume"):
        RunFolder(tmp_path, resume=True)
    with pytest.raises(UserError, match="not writable"):
        RunFolder(tmp_path / "file" / "below")


def test_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Not by chmod: the administrator, as whom tests run in containers, may write everywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(UserError, match="no permission"):
        RunFolder(tmp_path / "run")


def test_the_newest_two_checkpoints_are_kept_and_found_by_number(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.begin()
    for step in (5, 50, 100, 95):
        partial = folder.checkpoints / ".partial" / f"checkpoint-{step}"
        partial.mkdir(parents=True)
        (partial / "weights").write_bytes(bytes(1000))
        folder.keep_checkpoint(partial)
    assert sorted(p.name for p in folder.checkpoints.glob("checkpoint-*")) == ["checkpoint-100", "checkpoint-95"]
    newest, before = folder.checkpoints / "checkpoint-100", folder.checkpoints / "checkpoint-95"
    assert folder.intact_checkpoint() == (newest, [])

    (newest / "weights").write_bytes(bytes(500) + b"\1" + bytes(499))
    found, faults = folder.intact_checkpoint()
    assert found == before
    assert faults == [f"{newest} is damaged (weights is not as it was written)"]
    (before / "weights").unlink()
    with pytest.raises(UserError, match="no checkpoint is whole"):
        folder.intact_checkpoint()


def test_the_last_good_checkpoint_is_never_removed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.begin()

    def keep(step: int) -> Path:
        partial = folder.checkpoints / ".partial" / f"checkpoint-{step}"
        partial.mkdir(parents=True, exist_ok=True)
        (partial / "weights").write_bytes(bytes(100))
        folder.keep_checkpoint(partial)
        return folder.checkpoints / partial.name

    good = keep(5)
    for step in (6, 7):
        (keep(step) / "weights").write_bytes(b"damaged")
    assert folder.intact_checkpoint()[0] == good
    assert folder.intact_checkpoint()[0] in (good, keep(8))
    assert good.exists(), "one of the two good ones"


def test_killed_at_every_call_into_the_file_system_a_checkpoint_is_left(tmp_path: Path) -> None:
    """Also where the same step is saved a second time (on schedule and by an interruption), and it is the only one."""
    from cruxy_triton.bench import faults

    for point in range(1, 200):
        folder = RunFolder(tmp_path / str(point))
        folder.begin()
        partial = folder.checkpoints / ".partial" / "checkpoint-5"
        for again in (False, True):
            partial.mkdir(parents=True)
            (partial / "weights").write_bytes(bytes(100))
            if not again:
                folder.keep_checkpoint(partial)
        killed = faults._killed_at(point, folder.keep_checkpoint, partial)
        folder.begin()  # of the resumed run
        assert folder.intact_checkpoint() == (folder.checkpoints / "checkpoint-5", [])
        if not killed:
            break
    else:
        pytest.fail("the write never came to its end")
    assert point > 5


def test_a_half_written_checkpoint_is_no_checkpoint_and_is_cleared_away(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.begin()
    (folder.checkpoints / ".partial" / "checkpoint-7").mkdir(parents=True)
    assert folder.intact_checkpoint() == (None, [])
    folder.begin()
    assert list(folder.checkpoints.iterdir()) == []


def test_a_resumed_run_forgets_later_steps_and_a_cut_line(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.begin()
    rows = [json.dumps({"step": s}) for s in range(6)]
    rows[4:4] = [json.dumps({"step": 3, "eval_loss": 1.0, **last}) for last in ({}, {"final": True})]
    for step in (2, 3, 5):
        (folder.checkpoints / f"checkpoint-{step}").mkdir()
    folder.metrics.write_text("\n".join(rows) + '\n{"step": 6, "lo')
    assert [r["step"] for r in folder.read_metrics()] == [0, 1, 2, 3, 3, 3, 4, 5]
    folder.drop_after(folder.checkpoints / "checkpoint-3")
    assert [(r["step"], "final" in r) for r in folder.read_metrics()] == [(s, False) for s in (0, 1, 2, 3, 3)]
    assert sorted(p.name for p in folder.checkpoints.iterdir()) == ["checkpoint-2", "checkpoint-3"]


def test_replacing_leaves_the_old_file_when_writing_fails(tmp_path: Path) -> None:
    target = tmp_path / "value.json"
    files.write_json(target, {"a": 1})
    with pytest.raises(TypeError):
        files.write_json(target, {"a": object()})

    def interrupted() -> None:
        with files.replacing(target) as temporary:
            temporary.write_text("half")
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        interrupted()
    assert json.loads(target.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [target]
