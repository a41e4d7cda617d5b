"""The embedded default: `cruxy-triton finetune --demo` from nothing, and that it fails with a broken optimizer."""

import json
import time
from pathlib import Path

import pytest

from cruxy_triton.finetune import demo

MIB = 1 << 20

# One process for all of them: the second test uses the model that the first has made.
pytestmark = pytest.mark.xdist_group("demo")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def test_demo_from_nothing(cache: Path, command) -> None:
    started = time.monotonic()
    done = command("finetune", "--demo", "--json", timeout=900, CRUXY_CACHE=str(cache))
    seconds = time.monotonic() - started
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["before"]["loss"] - summary["after"]["loss"] >= demo.REQUIRED_GAIN
    assert "perplexity" in done.stderr
    run = json.loads((command.folder / "runs" / "demo" / "run.json").read_text())
    assert run["sample"]["after"] != run["sample"]["before"]
    assert run["result"]["peak_rss_bytes"] < 3000 * MIB
    # The promise is 4 minutes on two idle cores; a shared machine may be several times slower, so the clock is
    # reported here and only a run that hangs fails.
    print(f"demo: {seconds:.0f} s, {run['result']['peak_rss_bytes'] / MIB:.0f} MiB")  # noqa: T201


def test_demo_fails_with_an_optimizer_that_does_nothing(cache: Path, command) -> None:
    """Uses the model that the test above made: also shows that the cache is used."""
    done = command("finetune", "--demo", "--lr", "0", "--max-steps", "20", CRUXY_CACHE=str(cache))
    assert done.returncode == 1, done.stderr
    assert "using the demo model made earlier" in done.stdout
    assert "the demo's held-out loss fell by 0.000" in done.stderr


def test_a_second_demo_keeps_the_first(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for expected in ("runs/demo", "runs/demo-2", "runs/demo-3"):
        assert demo.free_output() == expected
        Path(expected).mkdir(parents=True)


def test_questions_come_from_docstrings_and_answers_do_not_repeat() -> None:
    import ast

    tree = ast.parse(
        'def f():\n    """Return the answer to a long question.\n\n    More."""\n'
        'def _hidden():\n    """Not for the public eye, this one."""\n'
        'class C:\n    def m(self):\n        """Return the answer to a long question."""\n'
    )
    found = demo._docstrings(tree, "mod")
    sentence = "Return the answer to a long question."
    assert found == {"mod.f": sentence, "mod.C.m": sentence}


def test_a_cache_that_cannot_be_written_is_one_sentence(command) -> None:
    (command.folder / "file").write_text("")
    done = command("finetune", "--demo", CRUXY_CACHE=str(command.folder / "file" / "below"))
    assert done.returncode == 2
    assert "set CRUXY_CACHE" in done.stderr
