"""The white paper's benchmark: one run against a loop of plain torch, the table by hand, the text, the command."""

import io
import json
import math
import urllib.error
from importlib.util import find_spec

import pytest
import torch

from cruxy_triton.bench import shakespeare
from cruxy_triton.bench.characters import CharacterModel, Size, Text
from cruxy_triton.bench.shakespeare import ADDRESS, CONTESTANTS, Cell, Run
from cruxy_triton.errors import UserError

TINY = Size(layers=1, width=16, context=16, batch=4, steps=12, evaluations=2)
WORDS = "".join(f"{i} times {i} is {i * i}, they say; " for i in range(600))


@pytest.fixture
def words(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text(WORDS)
    return path


def test_a_run_is_that_of_a_plain_loop(words):
    """torch's AdamW on the same windows by hand; every other contestant begins at the same loss."""
    run = shakespeare.play(Cell("torch AdamW", 1e-2, 5, words, TINY))
    text = Text(WORDS, TINY)
    torch.manual_seed(5)
    model = CharacterModel(text.symbols, TINY, std=None)
    assert 0.9 < float(model.embed.weight.std()) < 1.1  # the published model's
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    losses = []
    for step in range(1, 13):
        loss = model.loss(*text.batch(5_000_015 + step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert run.last_batch == losses[-1]
    assert [point[:3] for point in run.curve] == [[i + 1, loss, 1e-2] for i, loss in enumerate(losses)]
    assert run.validation == model.held_out_loss(text)
    assert run.state_bytes == sum(8 * p.numel() + 4 for p in model.parameters())
    for name, contestant in CONTESTANTS.items():
        if not find_spec(contestant.package):
            continue  # the extra `bench` brings it
        other = shakespeare.play(Cell(name, 1e-3, 5, words, TINY))
        assert other.curve[0][1] == losses[0]
        assert other.validation < 3.4, name
        tells = name in ("stability_v1", "stability_v2", "meta3") or name.startswith("Meta-Lion")
        assert (other.curve[-1][3] is not None) == tells


def test_table_by_hand():
    def made(lr, seed, last, validation):
        return Run("x", lr, seed, last, validation, 80, 2.0, [])

    assert shakespeare.best_rate([made(1.0, 1, 0.0, 2.0), made(2.0, 1, 9.0, 1.5), made(4.0, 1, 0.0, math.inf)]) == 2.0
    row = shakespeare.row("x", 1.0, "best", [made(1.0, 1, 1.0, 2.0), made(1.0, 2, 2.0, 2.5)])
    assert row["last batch"] == 1.5
    assert row["spread"] == 1.0
    assert row["validation"] == 2.25
    assert row["spread "] == 0.5
    assert shakespeare.row("x", 1.0, "best", [made(1.0, 1, 1.0, math.inf)])["validation"] == math.inf


def test_the_text_is_fetched_once_and_never_silently_another(tmp_path, monkeypatch, words):
    said, asked = [], []

    def refused(address, timeout):
        asked.append(address)
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(shakespeare.urllib.request, "urlopen", refused)
    path, source = shakespeare.find_text(None, tmp_path / "cache", said.append)
    assert path is None
    assert source == "the sources of torch.nn, because Tiny Shakespeare cannot be fetched (no route)"
    monkeypatch.setattr(shakespeare.urllib.request, "urlopen", lambda address, timeout: io.BytesIO(WORDS.encode()))
    path, source = shakespeare.find_text(None, tmp_path / "cache", said.append)
    assert source == "Tiny Shakespeare"
    assert path.read_text() == WORDS
    monkeypatch.setattr(shakespeare.urllib.request, "urlopen", refused)
    assert shakespeare.find_text(None, tmp_path / "cache", said.append) == (path, source)
    assert asked == [ADDRESS]
    assert shakespeare.find_text(words, tmp_path / "cache", said.append) == (words, str(words))
    (tmp_path / "short.txt").write_text("To be")
    with pytest.raises(UserError, match="has 5 characters; expected a text of at least 10,000"):
        shakespeare.find_text(tmp_path / "short.txt", tmp_path, said.append)


@pytest.mark.slow
def test_as_a_command(command, words):
    names = ("torch AdamW", "Meta-Lion, 8-bit state")
    done = command("bench", "shakespeare", "--quick", "--data", words, "--optimizers", *names, "--json",
                   "--out", "runs.jsonl", "--plot", "curves.png", "--workers", "2")  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["text"] == str(words)
    assert {row["optimizer"] for row in report["rows"]} == set(names)
    assert all(any(word in row["rate"] for word in ("best", "published")) for row in report["rows"])
    assert len(report["runs"]) == 6 == len((command.folder / "runs.jsonl").read_text().splitlines())
    assert (command.folder / "curves.png").read_bytes()[:4] == b"\x89PNG"
    for words_, message in ((("--optimizers", "SGD"), "unknown optimizer 'SGD'"), (("--workers", "0"), "at least 1"),
                            (("--data", "absent.txt"), "absent.txt cannot be read: No such file")):  # fmt: skip
        refused = command("bench", "shakespeare", "--quick", *words_)
        assert refused.returncode == 2
        assert message in refused.stderr
