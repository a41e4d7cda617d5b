"""Two gloo processes: every rank decides the same, from numbers that are summed over the ranks."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("ranks")
    worker = Path(__file__).with_name("distributed_worker.py")
    ranks = [
        subprocess.Popen(
            [sys.executable, str(worker), str(rank), "2", str(folder)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    output = []
    for rank in ranks:
        try:
            output.append(rank.communicate(timeout=150)[0])
        except subprocess.TimeoutExpired:
            rank.kill()
            output.append("timed out: " + rank.communicate()[0])
    return folder, output


@pytest.mark.parametrize("scenario", ["ddp", "fsdp"])
def test_ranks_agree(finished, scenario):
    folder, output = finished
    done = [(folder / f"{scenario}.{rank}").is_file() for rank in range(2)]
    assert all(done), "\n".join(output)
