"""The picture of a run's memory in its report."""

from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

from cruxy_triton.finetune import memory, report
from cruxy_triton.planner import Card, plan
from cruxy_triton.planner.lookup import profiles

CONFIG = SimpleNamespace(to_dict=lambda: dict(profiles("models")["smollm2-135m"]))


def texts(path: Path) -> list[str]:
    return ["".join(text.itertext()) for text in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")]


def test_plan_and_measured_peak_are_in_one_picture(tmp_path: Path) -> None:
    card = Card.budget("4GiB")
    made = plan(CONFIG.to_dict(), card, alternatives=False)
    path = tmp_path / report.CHART
    memory.draw(path, made, CONFIG, card, {"peak_allocated_bytes": 1 << 30, "peak_reserved_bytes": 3 << 29})
    shown = texts(path)
    assert f"peak {made.peak_bytes / 2**30:.2f} GiB" in shown
    assert f"measured, with context {(3 << 29) / 2**30 + 150 / 1024:.2f} GiB" in shown
    without_card = Card.cpu("4GiB")
    made = plan(CONFIG.to_dict(), without_card, alternatives=False)
    memory.draw(path, made, CONFIG, without_card, {"peak_rss_bytes": 3 << 30})
    assert "measured, interpreter and libraries included 3.00 GiB" in texts(path)
