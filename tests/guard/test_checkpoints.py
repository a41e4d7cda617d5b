"""Checkpoints: whatever happens while one is written, the last good one loads, and damage is named."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from cruxy_triton import files
from cruxy_triton.bench import faults
from cruxy_triton.guard import CheckpointError, checkpoints, load_checkpoint, save_checkpoint


def objects(step: int) -> dict:
    return {"model": {"w": torch.full((64,), float(step))}, "guard": {"step": step}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for step in (10, 20):
        save_checkpoint(tmp_path, step, objects(step))
    return tmp_path


def test_round_trip_and_rotation(folder):
    save_checkpoint(folder, 100, objects(100))
    assert [p.name for p in checkpoints.checkpoints(folder)] == ["checkpoint-20", "checkpoint-100"]  # by number
    step, loaded, damaged = load_checkpoint(folder)
    assert (step, loaded["guard"]["step"], damaged) == (100, 100, [])
    assert torch.equal(loaded["model"]["w"], torch.full((64,), 100.0))
    assert {p.name for p in folder.iterdir()} == {"checkpoint-20", "checkpoint-100"}  # nothing temporary is left


def test_rotation_never_removes_the_last_good_one(folder):
    for step in (20, 10):
        (folder / f"checkpoint-{step}" / "model.pt").write_bytes(b"damaged")
    save_checkpoint(folder, 30, objects(30), keep=1)
    (folder / "checkpoint-30" / "model.pt").write_bytes(b"damaged")
    save_checkpoint(folder, 40, objects(40), keep=1)
    assert load_checkpoint(folder)[0] == 40
    with pytest.raises(ValueError, match="never removed"):
        save_checkpoint(folder, 50, objects(50), keep=0)


@pytest.mark.parametrize("name", ["model.pt", "guard.pt", files.CHECKSUMS])
@pytest.mark.parametrize("damage", ["truncated", "emptied", "changed bit", "removed"])
def test_damage_is_recognised_named_and_gone_round(folder, name, damage):
    file = folder / "checkpoint-20" / name
    data = bytearray(file.read_bytes())
    if damage == "removed":
        file.unlink()
    else:
        data[len(data) // 3] ^= 4
        file.write_bytes({"truncated": data[: len(data) // 2], "emptied": b"", "changed bit": data}[damage])
    step, loaded, damaged = load_checkpoint(folder)
    assert step == 10
    assert loaded["guard"]["step"] == 10
    assert len(damaged) == 1
    assert damaged[0].startswith("checkpoint-20 is damaged (")
    if damage != "changed bit":  # a changed bit in the list of checksums shows in whatever file it belongs to
        assert name in damaged[0]


def test_every_single_bit_of_a_small_file_is_guarded(folder):
    file = folder / "checkpoint-20" / "guard.pt"
    data = file.read_bytes()
    for position in range(0, len(data), 37):
        changed = bytearray(data)
        changed[position] ^= 1 << (position % 8)
        file.write_bytes(changed)
        assert files.damage(file.parent) == "guard.pt is not as it was written"
    file.write_bytes(data)
    assert files.damage(file.parent) is None


def test_nothing_to_load_says_why(folder, tmp_path):
    for step in (10, 20):
        (folder / f"checkpoint-{step}" / "model.pt").unlink()
    both = r"checkpoint-20 is damaged \(model.pt is missing\); checkpoint-10 is damaged"
    with pytest.raises(CheckpointError, match=both):
        load_checkpoint(folder)
    with pytest.raises(CheckpointError, match="no checkpoint-STEP folder"):
        load_checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize("replacing", [False, True])
def test_killed_at_every_call_into_the_file_system(tmp_path, replacing):
    """SIGKILL at the first, second, ... call: afterwards the old checkpoint or the new one loads, whole."""
    new = 20 if replacing else 30
    outcomes = set()
    for point in range(1, 200):
        folder = tmp_path / str(point)
        save_checkpoint(folder, 10, objects(10))
        save_checkpoint(folder, 20, objects(20))
        killed = faults._killed_at(point, save_checkpoint, folder, new, {**objects(20), "new": 1})
        step, loaded, damaged = load_checkpoint(folder)
        assert step in (20, new)
        assert damaged == []
        outcomes.add((step, "new" in loaded))
        save_checkpoint(folder, 40, objects(40))  # and the folder is as good as ever
        assert [p.name for p in folder.iterdir() if p.name.startswith(".")] == []
        shutil.rmtree(folder)
        if not killed:
            break
    else:
        pytest.fail("the write never came to its end")
    assert outcomes == {(20, False), (new, True)}


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_full_disk_leaves_what_was_there(folder, after):
    with faults._failing_writes(after), pytest.raises(CheckpointError, match="No space left on device"):
        save_checkpoint(folder, 30, objects(30))
    assert {p.name for p in folder.iterdir()} == {"checkpoint-10", "checkpoint-20"}
    assert load_checkpoint(folder)[0] == 20


def test_really_full_disk(tmp_path):
    """A tmpfs of 256 KiB: three checkpoints of 100 KB do not fit."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(disk)], capture_output=True)
    if mount.returncode:
        pytest.skip("this user may not mount a file system")
    try:
        big = {"model": torch.ones(25_000)}
        save_checkpoint(disk, 1, big)
        save_checkpoint(disk, 2, big)
        with pytest.raises(CheckpointError, match="Make room"):
            save_checkpoint(disk, 3, big)
        assert load_checkpoint(disk)[0] == 2
        assert {p.name for p in disk.iterdir()} == {"checkpoint-1", "checkpoint-2"}
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_folders_of_others_can_be_sealed(tmp_path):
    folder = tmp_path / "checkpoint-7"
    (folder / "sub").mkdir(parents=True)
    (folder / "weights.bin").write_bytes(b"weights")
    (folder / "sub" / "x.txt").write_text("{}")
    assert files.damage(folder) == f"{files.CHECKSUMS} is missing: it was not written to its end"
    files.seal(folder)
    assert files.damage(folder) is None
    (folder / "sub" / "x.txt").write_text("[]")
    assert files.damage(folder) == "sub/x.txt is not as it was written"
    (folder / "sub" / "x.txt").write_text("{}")
    os.truncate(folder / "weights.bin", 3)
    assert files.damage(folder) == "weights.bin is not as it was written"
