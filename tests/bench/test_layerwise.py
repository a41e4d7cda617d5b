"""`bench layerwise`: a run against a plain loop, the schedule, the emulated gradients, the tables, and the command."""

import json
import math

import pytest
import torch

from cruxy_triton.bench import layerwise
from cruxy_triton.bench.characters import Size, Text
from cruxy_triton.bench.layerwise import CONTESTANTS, Cell, Float16, Run
from cruxy_triton.errors import UserError

WORDS = "".join(f"{a} and {b} are {a + b}; {b} less {a} is {b - a}.\n" for a in range(40) for b in range(a, 40))
TINY = Size(layers=2, width=16, context=16, batch=2, steps=12, evaluations=2)


@pytest.fixture
def words(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text(WORDS)
    return path


def test_a_run_is_that_of_a_plain_loop(words):
    """torch's AdamW by hand; the others begin at the same loss and end elsewhere, with their multipliers."""
    run = layerwise.play(Cell("AdamW", 1e-2, "fp32", 5, words, TINY))
    text = Text(WORDS, TINY)
    torch.manual_seed(5)
    model = layerwise.make_model(text.symbols, TINY)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01)
    losses = []
    for step in range(1, 13):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 if step == 1 else (13 - step) / 11)
        inputs, targets = text.batch(5_000_015 + step)
        loss = model(input_ids=inputs, labels=targets, shift_labels=targets.contiguous()).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert [value for _, value in run.curve] == pytest.approx(losses, rel=1e-4)
    assert (run.steps, run.skipped, run.multipliers) == (12, 0, {})
    found = {name: layerwise.play(Cell(name, 1e-2, "fp32", 5, words, TINY)) for name in CONTESTANTS if name != "AdamW"}
    for other in found.values():
        assert other.curve[0][1] == run.curve[0][1]
        assert other.validation != run.validation
        names = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head"]
        assert list(other.multipliers) == names
        assert {len(values) for values in other.multipliers.values()} == {12}
    late = {name: {values[-1] for values in other.multipliers.values()} for name, other in found.items()}
    assert len(late["SKETCH-ALIGN"]) == 1
    assert len(late["BLADE (damped)"]) > 3


def test_adapters_on_a_chat_model(chat_model):
    """A layer for each transformer block; what is not under control begins at the same loss."""
    size = Size(layers=2, width=64, context=16, batch=2, steps=6, evaluations=2)
    names = ("AdamW", "BLADE (damped)")
    alone, blade = (layerwise.play(Cell(name, 1e-3, "fp32", 5, chat_model, size, "smollm2")) for name in names)
    assert alone.curve[0] == blade.curve[0]
    assert alone.validation != blade.validation
    blocks = [f"base_model.model.model.layers.{n}" for n in range(2)]
    assert list(blade.multipliers)[:2] == blocks
    assert {len(values) for values in blade.multipliers.values()} == {6}


def test_the_schedule_and_the_entropy():
    steps = [layerwise.lr_factor(step, 350) for step in range(350)]
    assert steps[:2] == [1 / 50, 2 / 50]
    assert steps[49] == steps[50] == max(steps) == 1
    assert steps[-1] == 1 / 300

    class Uniform(torch.nn.Module):
        def forward(self, input_ids):
            return type("Output", (), {"logits": torch.zeros(*input_ids.shape, 8)})

    ids = torch.zeros((2, 3), dtype=torch.long)
    assert [float(v) for v in layerwise.loss_and_entropy(Uniform(), ids, ids)] == pytest.approx([math.log(8)] * 2)


def test_float16_gradients():
    """2^-41 is lost, 1 is not; 1 at a scale of 2^16 overflows: half the scale, and no step."""
    p = torch.zeros(2, requires_grad=True)
    rounding = Float16()
    p.grad = torch.tensor([0.25 + 2**-20, 2.0**-41])
    assert rounding([p])
    assert p.grad.tolist() == [0.25, 0]
    p.grad = torch.tensor([1.0, 0.1])
    assert not rounding([p])
    assert (p.grad[0], rounding.scale) == (1, 2**15)
    assert rounding([p])
    rounding.run = layerwise.GROWTH - 1
    assert rounding([p])
    assert rounding.scale == 2**16


def test_tables_by_hand():
    def made(contestant, peak, seed, loss):
        return Run(contestant, peak, "fp32", seed, loss, 9, 0, 1.0, 0.1, [], {})

    runs = [made("AdamW", 1.0, 1, 2.0), made("AdamW", 1.0, 2, 2.5), made("AdamW", 3.0, 1, math.inf),
            made("AdamW", 3.0, 2, 3.0), made("x", 1.0, 1, 2.1), made("x", 1.0, 2, 2.1), made("x", 3.0, 1, 2.5),
            made("x", 3.0, 2, 2.5)]  # fmt: skip
    alone, under = layerwise.rows(runs, 1.0, (1.0, 3.0))
    assert (alone["1x"], alone["1x spread"], alone["3x"], alone["diverged"]) == (2.25, 0.5, math.inf, 1)
    assert (under["3x"], under["3x spread"], under["diverged"]) == (2.5, 0, 0)
    (row,) = layerwise.verdict([alone, under], (1.0, 3.0))
    assert (row["contestant"], row["3x"]) == ("x", math.inf)
    assert row["1x"] == pytest.approx(0.15)


def test_records_and_bad_data(tmp_path):
    path = tmp_path / "some.jsonl"
    path.write_text(json.dumps({"question": "a" * 6000, "answer": "b" * 6000}) + "\n")
    assert layerwise.records_text(path) == "a" * 6000 + "\n" + "b" * 6000 + "\n\n"
    path.write_text(json.dumps({"text": "a" * 12000}) + "\n")
    with pytest.raises(UserError, match=r"some.jsonl, line 1: expected a record with question and answer"):
        layerwise.records_text(path)


@pytest.mark.slow
def test_as_a_command(command, words):
    names = ("AdamW", "BLADE (damped)")
    given = ("bench", "layerwise", "--quick", "--data", words, "--json", "--out", "runs.jsonl", "--workers", "2")
    done = command(*given, "--contestants", *names, "--plot", "maps.png", "--peak", "0.003")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert {row["contestant"] for row in report["rows"]} == set(names)
    assert [row["contestant"] for row in report["verdict"]] == ["BLADE (damped)"]
    assert all(math.isfinite(row["1x"]) and row["30x spread"] == 0 for row in report["rows"])
    assert len(report["runs"]) == 4 == len((command.folder / "runs.jsonl").read_text().splitlines())
    assert (command.folder / "maps.png").read_bytes()[:4] == b"\x89PNG"
    for words_, message in (
        (("--contestants", "SGD"), "unknown contestant 'SGD'"),
        (("--seeds", "4"), "expected 1 to 3"),
        (("--peak", "-1"), "--peak is -1.0; expected a rate above 0"),
    ):
        refused = command("bench", "layerwise", *words_)
        assert refused.returncode == 2
        assert message in refused.stderr
