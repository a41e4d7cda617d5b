"""The planner against 16 runs that fitcheck measured on a real Tesla T4 (profiles/measured/t4_fitcheck.json).

They are not held out: four rules were chosen or corrected while looking at them (memory-efficient attention on the
SDPA rows, the order of segment addresses, torch AdamW's temporaries, the order of loading), one number (AHEAD) and the
widths of the error bars. The setup is the file's own `setup` field.
"""

import json
from importlib import resources

import pytest

from cruxy_triton.planner import Card, load_card, load_model
from cruxy_triton.planner.accuracy import error_bytes
from cruxy_triton.planner.footprint import footprint
from cruxy_triton.planner.replay import replay
from cruxy_triton.planner.step import Step
from cruxy_triton.planner.walk import walk

MiB = 2**20
DATA = json.loads(
    resources.files("cruxy_triton.profiles").joinpath("measured/t4_fitcheck.json").read_text(encoding="utf-8")
)
ROWS = DATA["rows"]


# Weights that loading had on the device before their turn. How far transformers' threads ran ahead of quantization is
# not known; 10 to 26 reproduce the NF4 rows alike (mean error of the reserved memory 1.1 to 1.9 %).
AHEAD = 22


def step_of(row: dict) -> Step:
    shape = load_model(row["model"])
    quantized = row["quant"] == "nf4"
    return Step(
        shape=shape,
        batch=row["batch"],
        seq=row["seq"],
        precision="nf4" if quantized else "float16",
        double_quant=False,
        lora_r=32,
        targets=shape.family.names[:4],
        checkpointing=True,
        chunked_loss=False,
        attention="eager" if row["attn"] == "eager" else "efficient",
        optimizer="torch-adamw",
        autocast=False,
        upcast_outputs=False,
        keep_outputs=True,
        kbit_prepared=quantized,
        warmup=quantized,
        ahead=AHEAD if quantized else 0,
    )


@pytest.fixture(scope="module")
def predicted() -> list[tuple[dict, float, float]]:
    """(row, allocated MiB, reserved MiB) by the walk of the whole model and the allocator's replay."""
    found = []
    for row in ROWS:
        result = replay(walk(step_of(row), record=True).events or [])
        found.append((row, result.allocated / MiB, result.reserved / MiB))
    return found


def off(value: float, measured: float) -> float:
    return abs(value / measured - 1)


def test_source_is_named():
    assert "fitcheck" in DATA["source"]
    assert "MIT" in DATA["source"]
    assert len(ROWS) == 16


def test_peak_allocated(predicted):
    errors = [off(allocated, row["peak_allocated_mib"]) for row, allocated, _ in predicted]
    assert sum(errors) / len(errors) <= 0.002  # asked for: 1 %; reached: 0.06 %
    assert max(errors) <= 0.01  # asked for: 2 %; reached: 0.24 %


def test_peak_allocated_float16_to_the_megabyte(predicted):
    for row, allocated, _ in predicted:
        if row["quant"] == "none":
            assert allocated == pytest.approx(row["peak_allocated_mib"], abs=2.5), row


def test_peak_reserved_sdpa(predicted):
    errors = [off(reserved, row["peak_reserved_mib"]) for row, _, reserved in predicted if row["attn"] == "sdpa"]
    assert len(errors) == 9
    assert sum(errors) / len(errors) <= 0.01  # asked for: 3 %; reached: 0.62 %
    assert max(errors) <= 0.02  # asked for: 6 %; reached: 1.6 %


def test_peak_reserved_nf4(predicted):
    errors = [off(reserved, row["peak_reserved_mib"]) for row, _, reserved in predicted if row["quant"] == "nf4"]
    assert len(errors) == 7
    assert sum(errors) / len(errors) <= 0.015  # reached: 1.1 %


def test_peak_reserved_within_the_stated_error_bar(predicted):
    card = load_card("t4")
    for row, allocated, reserved in predicted:
        bar = error_bytes(int(allocated * MiB), card, row["attn"], quantized=row["quant"] == "nf4") / MiB
        assert abs(reserved - row["peak_reserved_mib"]) <= bar, row


def test_phases(predicted):
    """The forward pass (with the loss), the optimizer and the loaded model too, not the highest phase alone."""
    for row in ROWS:
        found = footprint(step_of(row))
        forward = max(found.phases["forward"], found.phases["loss"]) / MiB
        assert forward == pytest.approx(row["peak_fwd_mib"], rel=0.02), row
        assert found.phases["optimizer"] / MiB == pytest.approx(row["peak_opt_mib"], rel=0.05), row
        if row["quant"] == "none":
            assert found.phases["optimizer"] / MiB == pytest.approx(row["peak_opt_mib"], rel=0.015), row
            assert found.phases["load"] / MiB == pytest.approx(row["after_load_mib"], rel=0.01), row


def test_context_is_the_measured_one():
    assert isinstance(load_card("t4"), Card)
    assert load_card("t4").context_bytes / MiB == pytest.approx(140.9, abs=1)
