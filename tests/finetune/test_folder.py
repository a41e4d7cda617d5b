"""The output folder: what a run may use, and that earlier output survives until the new one is complete."""

import json
import os
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
    assert (tmp_path / ".run.previous" / "report.md").read_text() == "earlier"
    folder.finish()
    assert not (tmp_path / ".run.previous").exists()


def test_overwriting_an_unfinished_overwrite_keeps_the_finished_run(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    RunFolder(run, overwrite=True).begin()  # killed here
    files.write_json(run / "run.json", {"recipe": {}, "status": "running"})
    RunFolder(run, overwrite=True).begin()
    assert (tmp_path / ".run.previous" / "report.md").read_text() == "earlier"


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
        folder.keep_checkpoint(partial)
    assert sorted(p.name for p in folder.checkpoints.glob("checkpoint-*")) == ["checkpoint-100", "checkpoint-95"]
    assert folder.newest_checkpoint() == folder.checkpoints / "checkpoint-100"


def test_a_half_written_checkpoint_is_no_checkpoint_and_is_cleared_away(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.begin()
    (folder.checkpoints / ".partial" / "checkpoint-7").mkdir(parents=True)
    assert folder.newest_checkpoint() is None
    folder.begin()
    assert list(folder.checkpoints.iterdir()) == []


def test_metrics_rewind_drops_later_steps_and_a_cut_line(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.begin()
    rows = [json.dumps({"step": s}) for s in range(6)]
    folder.metrics.write_text("\n".join(rows) + '\n{"step": 6, "lo')
    assert [r["step"] for r in folder.read_metrics()] == [0, 1, 2, 3, 4, 5]
    folder.rewind_metrics(3)
    assert [r["step"] for r in folder.read_metrics()] == [0, 1, 2, 3]


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
