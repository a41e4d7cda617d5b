"""The documents' tables are those of the recorded runs (docs/tables.py)."""

import importlib.util
import re
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "docs" / "tables.py"


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("tables", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_page_is_as_the_runs_are(tables):
    found = [name for page in tables.PAGES for _, name, _ in tables.BLOCK.findall(page.read_text(encoding="utf-8"))]
    assert sorted(found) == sorted(tables.TABLES)
    for page in tables.PAGES:
        text = page.read_text(encoding="utf-8")
        assert tables.filled(text) == text, f"{page.name}: run docs/tables.py"


def test_an_edit_by_hand_is_seen(tables):
    text = (SCRIPT.parent / "guard.md").read_text(encoding="utf-8")
    at = re.search(r"(?<=\*\*)\d\.\d{3}(?=\*\*)", text)
    assert at is not None
    assert tables.filled(text[: at.start()] + "0.001" + text[at.end() :]) == text


def test_cells(tables):
    assert tables.markdown([["a", "b"], ["1", "2"]]) == "| a | b |\n|---|---|\n| 1 | 2 |\n"
    assert tables.spread(1.5, 0.25) == "1.500 ± 0.125"
    assert tables.spread(1.5, float("inf")) == "1.500"
    assert tables.spread(float("inf"), float("inf")) == "diverged"
