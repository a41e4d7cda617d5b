"""What the guard costs: the two that are timed take the same steps, and the table is made of what was timed."""

import json

import pytest
import torch

from cruxy_triton import cli
from cruxy_triton.bench import overhead
from cruxy_triton.bench.characters import CharacterModel, Size

TINY = Size(layers=1, width=16, context=8, batch=2)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    models = {"all": (CharacterModel, 11, TINY), "adapters": (overhead._adapted, 11, TINY)}
    monkeypatch.setattr(overhead, "MODELS", models)


@pytest.mark.parametrize("model", ["all", "adapters"])
def test_both_take_the_same_steps(model: str) -> None:
    pair = [overhead.Contestant(model, "AdamW", guarded) for guarded in (False, True)]
    before = [p.detach().clone() for p in pair[0].params]
    for number in range(25):
        rows = torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(number))
        for contestant in pair:
            contestant.step(rows[:, :-1], rows[:, 1:])
    assert pair[0].guard is None
    assert pair[1].guard is not None
    assert pair[1].guard.metrics["step"] == 24, "one step late: it was there"
    for plain, guarded, first in zip(pair[0].params, pair[1].params, before, strict=True):
        assert torch.equal(plain, guarded)
        assert not torch.equal(plain, first)
    names = {name for name, p in pair[0].model.named_parameters() if p.requires_grad}
    assert (model == "adapters") == all(name.rpartition(".")[2] in ("a", "b") for name in names)


def test_the_ratios_are_those_of_the_times(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    real = overhead.Contestant.step

    def slow(self: overhead.Contestant, *batch: torch.Tensor) -> None:
        real(self, *batch)
        for times in (self.seconds, self.cpu_seconds):
            times[-1] = 0.25 if self.guard is None else 0.3

    monkeypatch.setattr(overhead.Contestant, "step", slow)
    assert cli.main(["bench", "guard", "--rounds", "3", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [(row["model"], row["optimizer"]) for row in report["rows"]] == [
        (model, optimizer) for model in ("all", "adapters") for optimizer in ("AdamW", "CruxyOptimizer")
    ]
    for row in report["rows"]:
        assert row["step ms without"] == row["CPU ms without"] == 250
        assert [row[f"{head} ratio{of}"] for head in ("step", "CPU") for of in ("", " of least")] == [1.2] * 4
    assert cli.main(["bench", "guard", "--rounds", "0"]) == 2
