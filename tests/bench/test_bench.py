"""`cruxy-triton bench`: the measurements measure, and the choices that rest on them still follow from them."""

import json

import pytest
import torch
from safetensors.torch import save_file

from cruxy_kernels import CODECS, dequantize_blockwise, quantize_blockwise
from cruxy_kernels.codec import BLOCK, SHARPNESS
from cruxy_triton.bench import census, codec, rounding, step
from cruxy_triton.bench.characters import Text, embedded_text
from cruxy_triton.bench.stress import QUICK
from cruxy_triton.cli import main
from cruxy_triton.errors import UserError


def test_censuses_are_those_of_the_models():
    sizes = {name: [torch.Size(s).numel() for s in census.census(name)] for name in census.CENSUSES}
    assert (len(sizes["lora-r8"]), sum(sizes["lora-r8"])) == (308, 6_307_840)
    assert sum(size == 2048 for size in sizes["lora-r8"]) == 44
    assert sum(sizes["lora-r16"]) == 2 * sum(sizes["lora-r8"])
    assert (len(sizes["gpt2-124m"]), sum(sizes["gpt2-124m"])) == (148, 124_439_808)
    assert (len(sizes["tinyllama-full"]), sum(sizes["tinyllama-full"])) == (201, 1_100_048_384)
    with pytest.raises(UserError, match="unknown census"):
        census.census("gpt5")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Gradients with a persistent part, noise, and columns of different scale, as LoRA's have them."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("gradients") / "synthetic.safetensors"
    scale = torch.exp(torch.randn(64) * 0.7)
    gradients = {"layer": (torch.randn(60, 64, 64) + torch.randn(64, 64) * 0.2) * scale}
    save_file(gradients, path, metadata={"source": "synthetic"})
    return path


def test_codec_table_and_the_choice(recorded):
    rows, source = codec.table(recorded, (0.9, 0.99))
    assert source == "synthetic"
    by_key = {(row["name"], row["block"], row["scale"]): row for row in rows}
    ours = by_key[f"softsign k={SHARPNESS}", BLOCK, "bf16"]
    assert ours["state_bytes_per_parameter"] <= 1.04
    flash = by_key["softsign k=1 (FlashOptim)", 32, "fp16"]
    assert ours["flips"] < flash["flips"]
    assert ours["state_bytes_per_parameter"] < flash["state_bytes_per_parameter"]
    for row in rows:
        if row["name"] == "bitsandbytes dynamic map" and row["state_bytes_per_parameter"] >= 1.03:
            assert ours["flips"] < row["flips"]
    assert {block for _, block, _ in by_key} == {32, 64, 128, 256}


def test_the_candidate_is_the_codec_that_is_used():
    """The row of our own softsign, 64, bf16 is what quantize_blockwise stores."""
    ours = (f"softsign k={SHARPNESS}", BLOCK, "bf16")
    candidate = next(c for c in codec.candidates() if (c.name, c.block, c.scale) == ours)
    m = torch.randn(6400) * torch.exp(torch.randn(6400))
    stored = dequantize_blockwise(*quantize_blockwise(m))
    torch.testing.assert_close(candidate.round_trip(m), stored, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["softsign4", "quartic8"])
def test_the_drawn_candidates_are_the_codecs_that_are_used(name):
    """What a candidate gives back is what the codec stores as it is."""
    candidate = {"softsign4": codec.FOUR_BITS, "quartic8": codec.SECOND_MOMENT}[name]
    m = torch.randn(6400) * torch.exp(torch.randn(6400))
    m = m if candidate.signed else m.square()
    m[::64] = 1024.0  # largest of its block and a scale as it is: a draw below it would change the scale
    back = candidate.round_trip(m, torch.Generator().manual_seed(0))
    stored = dequantize_blockwise(*quantize_blockwise(back, codec=name), codec=name, shape=m.shape)
    torch.testing.assert_close(back, stored, rtol=1e-5, atol=0)
    assert (back != m).any()
    assert candidate.state_bytes == CODECS[name].bytes_per_value


def test_losses_of_kept_states():
    text = Text(embedded_text(), QUICK)
    rows = codec.losses(text, 1, lambda line: None)
    assert [row["state"] for row in rows] == list(codec.KEPT)
    for row in rows:
        exact = rows[0] if row["state"].startswith("Lion") else rows[3]
        assert row["mean"] == pytest.approx(exact["mean"], rel=0.02)
    assert len({row["mean"] for row in rows}) == len(rows)


def test_flips_are_counted_where_signs_differ():
    nothing = codec.Candidate("forgets", 64, compress=lambda x: x * 0, expand=lambda y: y)
    exact = codec.Candidate("exact enough", 32, **codec.power(0.5))
    gradients = [torch.full((64,), 1.0)] * 30 + [torch.full((64,), -0.2)]
    different, compared = codec.flips(gradients, nothing, (0.9, 0.99))
    assert (different, compared) == (64, 31 * 64)  # only the last step hangs on the momentum
    assert codec.flips(gradients, exact, (0.9, 0.99))[0] == 0


def test_recorded_folder(tmp_path):
    for i in range(3):
        save_file({"a": torch.full((4,), float(i))}, tmp_path / f"step-{i:05d}.safetensors")
    gradients, source = codec.read_gradients(tmp_path)
    assert gradients["a"].tolist() == [[i] * 4 for i in (0.0, 1.0, 2.0)]
    assert source.startswith("3 steps")


def test_rounding_table():
    rows = {(row["format"], row["method"]): row for row in rounding.table()}
    for format_name in ("fp16", "bf16"):
        kept = rows[format_name, "stochastic rounding"]
        lost = rows[format_name, "round to nearest"]
        assert kept["drift_lr_1e-6"] == pytest.approx(1, abs=0.02)
        assert lost["drift_lr_1e-6"] < 0.3
        assert kept["regression_over_fp32"] <= lost["regression_over_fp32"]
    assert rows["bf16", "compensation byte"]["state_bytes_per_parameter"] == 1


def test_step_on_a_small_census(monkeypatch, capsys):
    monkeypatch.setitem(census.CENSUSES, "tiny", lambda: [(8, 64), (64, 8), (3,)])
    report = step.run("cpu", "tiny", 2)
    names = [row["name"] for row in report["rows"]]
    assert {"torch AdamW fused", "torch AdamW foreach", "cruxy-triton meta3 Lion 8-bit"} <= set(names)
    assert set(names) | set(report["absent"]) >= {"lion-pytorch", "cruxy SDK Meta-Lion", "cruxy SDK meta3"}
    for row in report["rows"]:
        assert row["median_ms"] > 0
        assert row["times torch AdamW fused"] > 0
    assert main(["bench", "step", "--census", "tiny", "--rounds", "1", "--only", "fused", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["state_bytes_per_parameter"] == pytest.approx(8, abs=0.1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["step", "--device", "nonsense"], "cannot be used here"),
        (["step", "--census", "gpt5"], "unknown census"),
        (["step", "--rounds", "0"], "at least 1"),
        (["codec", "--gradients", "nowhere"], "no such file"),
        (["codec"], "give --gradients or --text"),
        (["codec", "--text", "nowhere"], "nowhere"),
        (["codec", "--gradients", "pyproject.toml"], "cannot read gradients"),
    ],
)
def test_bad_input(words, message, capsys):
    assert main(["bench", *words]) == 2
    assert message in capsys.readouterr().err
