"""What a card is found to do wrong: 16-bit numbers that are none, memory that is not on it."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cruxy_triton.errors import UserError
from cruxy_triton.finetune import load, run, selftest
from cruxy_triton.finetune.folder import RunFolder
from cruxy_triton.finetune.recipe import Recipe

CPU = torch.device("cpu")
MIB = 1 << 20


WRONG = {
    "no numbers": ("matmul", lambda a, b: torch.matmul(a, b) * float("nan"), "values that are no numbers"),
    "one element": ("matmul", lambda a, b: torch.matmul(a, b).index_fill(0, torch.tensor([5]), 0), "is off by"),
    "a part left out": ("matmul", lambda a, b: torch.matmul(a[:, 32:], b[32:]), "is off by"),
    "transposed": ("matmul", lambda a, b: torch.matmul(a, b).flip(0), "is off by"),
    "softmax unscaled": ("softmax", lambda x, dim: torch.softmax(x, dim=dim) * 1.01, "softmax over 32,000 is off by"),
    "softmax zero": ("softmax", lambda x, dim: torch.zeros_like(x), "softmax over 32,000 is off by"),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bits_that_are_right(dtype: torch.dtype) -> None:
    assert selftest.faults(CPU, dtype) == []


@pytest.mark.parametrize("name", WRONG)
def test_sixteen_bits_that_are_wrong(name: str) -> None:
    what, operation, says = WRONG[name]
    found = selftest.faults(CPU, torch.float16, **{what: operation})
    assert says in found[0]
    assert len(found) == (3 if what == "matmul" else 1)


def test_a_card_that_is_wrong_trains_in_float32(small_model, sums: Path, tmp_path: Path, monkeypatch) -> None:
    """The card is a CPU that would train in float16, with a product that gives no numbers."""
    monkeypatch.setattr(load, "dtype_of", lambda recipe, device: torch.float16)
    broken = lambda a, b: torch.full((a.shape[0], b.shape[1]), float("nan"), dtype=a.dtype)  # noqa: E731

    def trusted(dtype: torch.dtype, device: torch.device, asked: str, say: Any) -> torch.dtype:
        wrong = selftest.faults(device, dtype, matmul=broken)
        return selftest._or_float32(dtype, wrong, "NVIDIA GeForce GTX 1660", asked, say)

    monkeypatch.setattr(run.selftest, "trusted", trusted)
    said: list[str] = []
    folder = RunFolder(tmp_path / "run")
    recipe = Recipe(
        str(small_model()), str(sums), str(folder.path), max_steps=2, batch_size=2, max_seq_length=64,
        max_eval_samples=4, sample_tokens=0, load_in_4bit=True,
    )  # fmt: skip
    result = run.finetune(recipe, folder, run.Hooks(say=said.append))
    assert result.finished
    (line,) = [line for line in said if "computes wrong" in line]
    assert line.startswith(
        "warning: NVIDIA GeForce GTX 1660 computes wrong in float16: the product x W^T of [64, 1024] and [1024, 1024] "
        "has 65,536 of 65,536 values that are no numbers; "
    )
    assert "Weights, adapters and all that is computed are float32 instead" in line
    found = json.loads((tmp_path / "run" / "run.json").read_text())
    assert found["plan"]["config"]["dtype"] == "float32", "the plan counts with it"
    recipe.dtype = "float16"
    with pytest.raises(UserError, match=r"--dtype float16: NVIDIA GeForce GTX 1660 computes wrong .*--dtype float32"):
        run.finetune(recipe, RunFolder(tmp_path / "other"), run.Hooks())


def test_only_cards_that_train_in_16_bits_are_tested(monkeypatch) -> None:
    monkeypatch.setattr(selftest, "faults", lambda *given: pytest.fail("tested"))
    assert selftest.trusted(torch.float32, torch.device("cuda"), "auto", print) is torch.float32
    assert selftest.trusted(torch.bfloat16, CPU, "auto", print) is torch.bfloat16


def test_memory_that_is_not_on_the_card_is_said_once() -> None:
    from cruxy_triton.finetune.paging import PagingWatch

    readings = iter([None, (3000 * MIB, 3500 * MIB, 4096 * MIB), *[(4600 * MIB, 4000 * MIB, 4096 * MIB)] * 2])
    said: list[str] = []
    watch = PagingWatch(lambda: next(readings), said.append)
    for step in range(1, 5):
        watch.on_step_begin(None, None, None)
        watch.on_step_end(None, SimpleNamespace(global_step=step), None)
    (line,) = said
    assert line.startswith(
        "warning: step 3: 600 of the 4,600 MiB that this run holds are not on the card (4,000 of its 4,096 MiB are in "
        "use): the driver has moved them to system memory"
    )
    assert "Prefer No Sysmem Fallback" in line
    assert watch.told


@pytest.mark.parametrize(
    ("used", "seconds", "paging"),
    [
        (4090, [1.0] * 5 + [3.5], True),
        (4090, [1.0] * 5 + [2.5], False),  # full, as a card that is used well is
        (3000, [1.0] * 5 + [9.0], False),  # slow, for another reason: a long batch, another program
        (4090, [0.1, 9.0], False),  # compiling
    ],
)
def test_a_full_card_and_slow_steps_together(used: int, seconds: list[float], paging: bool) -> None:
    from cruxy_triton.finetune.paging import judge

    found = judge(3000 * MIB, used * MIB, 4096 * MIB, seconds)
    assert (found is not None) is paging
    if paging:
        assert "the card is full (4,090 of 4,096 MiB) and the step took 3.5 s, where 1.0 s were enough" in found


def test_a_system_that_does_not_page_is_not_watched(monkeypatch) -> None:
    from cruxy_triton.finetune import paging

    assert paging.watch(CPU, print) == []
    driver = SimpleNamespace(version=(551, 86), memory=lambda uuid: (5, 6))
    monkeypatch.setattr(paging.Driver, "open", lambda: driver)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="abc"))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 4)
    monkeypatch.setattr("cruxy_triton.nvml.on_windows", lambda: False)
    assert paging.watch(torch.device("cuda"), print) == []
    monkeypatch.setattr("cruxy_triton.nvml.on_windows", lambda: True)
    (watch,) = paging.watch(torch.device("cuda"), print)
    assert watch.read() == (4, 5, 6)
    driver.version = (531, 18)
    assert paging.watch(torch.device("cuda"), print) == []
