"""DDP and FSDP2 with two gloo processes on the CPU; the scenarios are in distributed_worker.py."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

WORKER = Path(__file__).with_name("distributed_worker.py")
WORLD = 2

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch was built without gloo")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, list[str]]:
    """Both processes, started once: importing torch twice costs more than the scenarios."""
    folder = tmp_path_factory.mktemp("ranks")
    ranks = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), str(WORLD), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    return folder, outputs


@pytest.mark.parametrize(
    "scenario", ["ddp", "ddp_layers", "ddp_bad_steps", "fsdp", "fsdp_bad_steps", "fsdp_checkpoint"]
)
def test_two_processes(run, scenario):
    folder, outputs = run
    finished = [(folder / f"{scenario}.{rank}").exists() for rank in range(WORLD)]
    assert all(finished), "\n".join(outputs)
