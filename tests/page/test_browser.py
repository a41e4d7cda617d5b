"""The built page in Node.js against the command line, and in Chromium as people use it.

`CRUXY_NODE_MODULES=node_modules pytest -m browser -n0 tests/page/test_browser.py`; CRUXY_SCREENSHOTS=DIR keeps
pictures and times there.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cruxy_triton import cli, settings
from cruxy_triton.planner.lookup import profiles

pytestmark = pytest.mark.browser

MODELS = ("tinyllama-1.1b", "qwen2.5-1.5b", "gemma-2-2b", "phi-2", "smollm2-360m")
CARDS = ("gtx1650-gddr5", "rtx4060")
WAYS = {
    "lora": [],
    "qlora": ["--method", "lora", "--load-in-4bit"],
    "full": ["--method", "full"],
    "lora-16": ["--method", "lora", "--no-load-in-4bit"],
}
LENGTHS = {"lora": "", "qlora": "512", "full": "256", "lora-16": "1024"}


def command_line(request: dict[str, str], capsys: pytest.CaptureFixture[str]) -> dict:
    words = ["plan", request["model"], *WAYS[request["way"]], "--json"]
    for name, value in request.items():
        if name not in ("model", "way") and value:
            words += [settings.SETTINGS[name].flag, value]
    assert cli.main(words) in (0, 1)
    return json.loads(capsys.readouterr().out)


def test_forty_combinations_equal_the_command_line(drive: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    requests = [
        {"model": model, "gpu": card, "way": way, "max_seq_length": LENGTHS[way]}
        for model in MODELS
        for card in CARDS
        for way in WAYS
    ]
    start, *rows = drive("drive.mjs", requests)
    assert len(requests) == len(rows) == 40
    for request, row in zip(requests, rows, strict=True):
        assert row["reply"]["plan"] == command_line(request, capsys), request
        assert row["picture"] > 5000
    times = {name: sorted(row[name] for row in rows) for name in ("seconds", "cpu", "drawing")}
    record = {"start": start, "first": rows[0]["seconds"]}
    record |= {name: {"median": values[20], "longest": values[-1]} for name, values in times.items()}
    if folder := os.environ.get("CRUXY_SCREENSHOTS"):
        (Path(folder) / "times.json").write_text(json.dumps(record, indent=1))


@pytest.fixture(scope="session")
def scenes(drive: Callable, needs: Callable, hostile: dict) -> dict[str, dict]:
    """What tests/page/browser.mjs saw, by scene."""
    needs("playwright-core", "axe-core")
    browser = os.environ.get("CRUXY_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium here; install Debian's chromium or name one in CRUXY_CHROMIUM")
    good = json.dumps({key: value for key, value in profiles("models")["smollm2-135m"].items() if key != "hf_id"})
    given = {"chromium": browser, "shots": os.environ.get("CRUXY_SCREENSHOTS"), "hostile": hostile, "good": good}
    return {scene["scene"]: scene for scene in drive("browser.mjs", given, timeout=1500)}


def test_no_error_on_the_console_and_no_request_elsewhere(scenes: dict[str, dict]) -> None:
    for name, scene in scenes.items():
        # the browser itself reports the hub's 404, and that the server is gone
        errors = [error for error in scene["errors"] if "Failed to load resource" not in error]
        assert not errors, name
        assert all(url.startswith("https://huggingface.co/") for url in scene["elsewhere"]), name
        assert not scene["elsewhere"] or name in ("configs", "hostile")
        assert scene["dialogs"] == 0, name


@pytest.mark.parametrize("name", [f"opens {width} {scheme}" for width in (1280, 390) for scheme in ("light", "dark")])
def test_opens(scenes: dict[str, dict], name: str) -> None:
    scene = scenes[name]
    assert scene["verdict"].startswith("Fits: 3.55 of 3.81")
    assert scene["wide"] <= 0, "the page scrolls sideways"
    assert scene["at"].startswith("backward, layer 21: ")
    assert scene["start"].startswith("load: ")
    assert scene["end"].startswith("optimizer: ")


def test_nothing_serious_for_a_screen_reader(scenes: dict[str, dict]) -> None:
    looked = [
        finding
        for scene in scenes.values()
        for finding in scene.get("axe", ["nothing"] if "opens" in scene["scene"] else [])
    ]
    assert not [finding for finding in looked if finding["impact"] in ("serious", "critical")]
    order = scenes["keyboard"]["order"]
    assert order[0] == "Skip to the form"
    assert [x for x in order if x in ("gpu", "os", "model", "file", "way", "max_seq_length")] == [
        "gpu", "os", "model", "file", "way", "max_seq_length"
    ]  # fmt: skip


def test_longer_until_it_no_longer_fits(scenes: dict[str, dict]) -> None:
    scene = scenes["longer and longer"]
    verdicts = [said.split(":")[0] for _, said, _ in scene["steps"]]
    assert verdicts[0].startswith("Fits")
    assert verdicts[-1] == "Does not fit"
    assert verdicts.index("Does not fit") == len([v for v in verdicts if v.startswith("Fits")])
    assert scene["remedied"].startswith("Fits"), scene["remedy"]
    assert "expected a whole number of at least 8" in scene["beside"]
    assert scene["invalid"] == "true"
    assert scene["reset"].startswith("Fits: 3.55 of 3.81 GiB")


def test_configs_are_dropped_fetched_and_refused(scenes: dict[str, dict]) -> None:
    scene = scenes["configs"]
    assert scene["dropped"].startswith("Fits")
    assert scene["name"].startswith("config.json (0.13 B parameters)")
    assert scene["broken"].startswith("No plan")
    assert "not a JSON file" in scene["beside"]
    assert scene["hub"].startswith("Fits")
    assert "The hub has no such model" in scene["absent"]
    assert scene["shared"] == scene["dropped"]


def test_a_link_is_the_plan(scenes: dict[str, dict]) -> None:
    scene = scenes["shared link"]
    assert scene["fields"] == ["t4", "phi-2", "512", "4"]
    assert scene["open"] is True
    assert "odd" in scene["notice"]


def test_works_offline(scenes: dict[str, dict]) -> None:
    assert scenes["offline"]["verdict"].startswith("Fits: 3.55 of 3.81")


def test_a_file_that_is_not_the_pinned_one_is_not_run(scenes: dict[str, dict]) -> None:
    assert "pyodide.asm.mjs is not the file that this page was built with" in scenes["tampered"]["verdict"]


def test_what_takes_too_long_can_be_stopped(scenes: dict[str, dict]) -> None:
    assert "Stopped" in scenes["stop"]["stopped"]
    assert scenes["stop"]["again"].startswith("Fits: 3.55 of 3.81 GiB")


def test_strangers_inject_nothing(scenes: dict[str, dict]) -> None:
    scene = scenes["hostile"]
    assert len(scene["results"]) == 30
    for said, elements, handlers, clean in scene["results"]:
        assert (elements, handlers, clean) == (0, 0, True), said
        assert said.startswith(("No plan", "Fits", "Does not fit"))
    assert scene["verdict"].startswith("Fits: 3.55 of 3.81"), "the page is as it was"
