"""The embedded default: `cruxy-triton finetune --demo` from nothing, and that it fails with a broken optimizer."""

import ast
import json
import time
from pathlib import Path

import pytest

from cruxy_triton.finetune import demo, smollm2

MIB = 1 << 20


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The second test uses the model that the first has made."""
    return tmp_path_factory.mktemp("cache")


def test_without_an_index_the_demo_is_the_tiny_one_from_nothing(cache: Path, command) -> None:
    started = time.monotonic()
    without = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(command.folder), "HF_HOME": str(command.folder / "hub")}
    done = command("finetune", "--demo", "--json", timeout=900, CRUXY_CACHE=str(cache), **without)
    seconds = time.monotonic() - started
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("SmolLM2 cannot be had here") == 1
    summary = json.loads(done.stdout)
    assert summary["before"]["loss"] - summary["after"]["loss"] >= demo.REQUIRED_GAIN
    run = json.loads((command.folder / "runs" / "demo" / "run.json").read_text())
    assert run["recipe"]["lr"] == demo.LEARNING_RATES["tiny"]["cruxy"]
    kinds = {"class", "method", "function"}
    assert {s["expected"].strip() for s in run["samples"]} == kinds
    after = sum(s["after"].strip() == s["expected"].strip() for s in run["samples"])
    assert len(run["samples"]) == 60
    assert after > 45
    assert f"{after} of 60 answers are right after training, 0 before" in done.stderr
    assert f"Of 60 answers 0 were exactly as expected before and {after} after" in (
        command.folder / "runs" / "demo" / "report.md"
    ).read_text(encoding="utf-8")
    assert run["result"]["peak_rss_bytes"] < 3000 * MIB
    # A shared machine may be several times slower than two idle cores, so the clock is reported here and only a run
    # that hangs fails.
    print(f"demo: {seconds:.0f} s, {run['result']['peak_rss_bytes'] / MIB:.0f} MiB")  # noqa: T201


def test_demo_fails_with_an_optimizer_that_does_nothing(cache: Path, command) -> None:
    """Uses the model that the test above made: also shows that the cache is used."""
    words = ("finetune", "--demo", "tiny", "--lr", "0", "--max-steps", "5", "--samples", "3")
    done = command(*words, CRUXY_CACHE=str(cache))
    assert done.returncode == 1, done.stderr
    assert "pre-training" not in done.stdout
    assert "the demo failed: the held-out loss fell by 0.000" in done.stderr


@pytest.mark.slow
def test_the_real_demo(command) -> None:
    """With the user's own cache, since the model is 93 MB to download."""
    try:
        smollm2.smollm2()
    except smollm2.Unavailable as reason:
        pytest.skip(str(reason))
    done = command("finetune", "--demo", "--json", timeout=3600, CRUXY_CACHE="")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["before"]["loss"] - summary["after"]["loss"] >= demo.REQUIRED_GAIN
    assert len(summary["samples"]) == 3
    assert all(s["before"] != s["after"] for s in summary["samples"])
    run = json.loads((command.folder / "runs" / "demo" / "run.json").read_text())
    assert run["weights"]["total"] == 134_515_008
    assert run["result"]["peak_rss_bytes"] < 3000 * MIB


def test_right_answers_are_counted_beside_always_the_same_one() -> None:
    pairs = [("class", "a", "class"), ("class", "class", "method"), ("method", "x", " method"), ("function", "", "")]
    samples = [{"prompt": "?", "expected": e, "before": b, "after": a} for e, b, a in pairs]
    assert demo.right_answers(samples) == (1, 2, 2)


def test_a_second_demo_keeps_the_first(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for expected in ("runs/demo", "runs/demo-2", "runs/demo-3"):
        assert demo.free_output() == expected
        Path(expected).mkdir(parents=True)


def test_questions_come_from_docstrings_and_answers_do_not_repeat() -> None:
    tree = ast.parse(
        'def f():\n    """Return the answer to a long question.\n\n    More."""\n'
        'def _hidden():\n    """Not for the public eye, this one."""\n'
        'class C:\n    def m(self):\n        """Return the answer to a long question."""\n'
    )
    sentences, kinds = demo._public(tree, "mod")
    sentence = "Return the answer to a long question."
    assert sentences == {"mod.f": sentence, "mod.C.m": sentence}
    assert kinds == {"mod.f": "function", "mod.C": "class", "mod.C.m": "method"}
    many = {f"mod.g{i}": f"Return the number {i}, and nothing else." for i in range(demo.MINIMUM_QUESTIONS)}
    answers = [record["answer"] for record in demo._docstring_records(sentences | many)]
    assert answers.count(sentence) == 1
    assert len(answers) == len(set(answers)) == demo.MINIMUM_QUESTIONS + 1


def test_a_cache_that_cannot_be_written_is_one_sentence(command) -> None:
    (command.folder / "file").write_text("")
    done = command("finetune", "--demo", "tiny", CRUXY_CACHE=str(command.folder / "file" / "below"))
    assert done.returncode == 2
    assert "set CRUXY_CACHE" in done.stderr
