"""Profiles, the search, the plan as data, and what happens with input that makes no sense."""

import contextlib
import itertools
import json
import runpy
from dataclasses import replace
from pathlib import Path

import pytest

from cruxy_triton.errors import UserError
from cruxy_triton.planner import (
    Card,
    Configuration,
    Plan,
    card_names,
    load_card,
    load_model,
    model_names,
    parse_bytes,
    plan,
    shape_from_config,
)
from cruxy_triton.planner.footprint import Step, footprint
from cruxy_triton.planner.losses import tiles_pay
from cruxy_triton.planner.render import finetune_command, render
from cruxy_triton.planner.speed import flops, step_seconds

ROOT = Path(__file__).resolve().parents[2]
GiB = 2**30
LLAMA = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}


# -- profiles ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # what the profiles come to: guards against an edit by mistake, not a check of the profiles' figures
        ("tinyllama-1.1b", 1_100_048_384),
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen2.5-1.5b", 1_543_714_304),
        ("qwen2.5-3b", 3_085_938_688),
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-1.7b", 1_720_574_976),
        ("gemma-2b", 2_506_172_416),
        ("gemma-2-2b", 2_614_341_888),
        ("phi-2", 2_779_683_840),
        ("smollm2-135m", 134_515_008),
        ("smollm2-360m", 361_821_120),
        ("smollm2-1.7b", 1_711_376_384),
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.2-3b", 3_212_749_824),
    ],
)
def test_parameter_counts(name, parameters):
    assert load_model(name).parameters == parameters


@pytest.mark.parametrize("name", model_names())
def test_models_are_found_by_name_and_by_hugging_face_id(name):
    shape = load_model(name)
    assert shape.source.startswith("https://huggingface.co/")
    assert load_model(shape.hf_id) == shape
    assert load_model(name.upper()) == shape


@pytest.mark.parametrize("name", card_names())
def test_cards(name):
    card = load_card(name)
    linux, desktop, windows = (card.usable_bytes(s) for s in ("linux", "linux-desktop", "windows"))
    assert linux > desktop > 0
    assert linux > windows > 0
    assert card.vram_bytes > linux
    assert card.bandwidth_gb_s > 50
    assert card.half_tflops >= card.fp32_tflops > 1
    assert card.sms >= 10
    assert {
        "hardware", "half_tflops", "usable_linux_mib", "usable_linux_desktop_mib", "usable_windows_mib", "context_mib"
    } <= set(card.sources)  # fmt: skip
    assert card.bf16 == (card.capability >= (8, 0))


def test_the_cards_that_were_asked_for():
    wanted = """gtx1650 gtx1650-gddr6 gtx1650-super gtx1660 gtx1660-super gtx1660-ti rtx2060-6gb rtx2060-12gb rtx2070
    rtx2080-ti 3050-4gb 3050-6gb 3050-8gb rtx3060-8gb rtx3060-12gb 3070 3080 3090 4060 rtx4060-ti-8gb rtx4060-ti-16gb
    4070 4080 4090 5060 rtx5060-ti-8gb 5070 5070-ti 5080 5090 t4 gtx1650-laptop rtx3050-laptop"""
    assert len({load_card(name).name for name in wanted.split()}) == len(wanted.split())


# -- the plan ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny() -> Plan:
    return plan("tinyllama-1.1b", "gtx1650")


@pytest.mark.parametrize(("model", "card"), [("gemma-2-2b", "gtx1650"), ("qwen2.5-1.5b", "t4")])
def test_allocated_is_the_highest_phase_and_rests(model, card):
    found = plan(model, card, alternatives=False)
    highest = found.phases[found.peak_phase]
    assert highest == max(found.phases.values())
    assert highest < found.allocated_bytes <= 1.01 * highest


def test_a_plan_adds_up(tiny):
    assert tiny.fits
    assert sum(tiny.components.values()) == tiny.peak_bytes
    assert tiny.headroom_bytes == tiny.usable_bytes - tiny.peak_bytes >= tiny.error_bytes
    assert max(tiny.phases.values()) == tiny.phases[tiny.peak_phase]
    assert tiny.allocated_bytes >= tiny.phases[tiny.peak_phase]
    assert tiny.reserved_bytes >= tiny.allocated_bytes
    assert len(tiny.alternatives) == 2
    assert not tiny.tight


def test_a_plan_survives_json(tiny, tmp_path):
    assert Plan.from_dict(json.loads(json.dumps(tiny.to_dict()))) == tiny
    path = tmp_path / "plan.json"
    tiny.save(path)
    assert Plan.load(path) == tiny
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    for settings in ({}, {"method": "full"}):
        nothing = plan("phi-2", "1GiB", **settings)
        nothing.save(path)
        assert Plan.load(path) == nothing
        assert nothing.needed is not None


def test_what_is_pinned_stays():
    pinned = dict(
        dtype="bfloat16",
        load_in_4bit=True,
        double_quant=True,
        max_seq_length=640,
        batch_size=15,
        micro_batch_size=3,
        lora_r=24,
        lora_alpha=36,
        target_modules=["v_proj", "q_proj"],
        gradient_checkpointing=True,
        chunked_loss=False,
        attention="efficient",
        optimizer="cruxy-lion",
        state_bits=8,
        lora_dropout=0.1,
        method="lora",
        release=False,
        use_dora=False,
        rank_pattern=["v_proj=8"],
    )
    found = plan("qwen2.5-1.5b", "rtx3060-12gb", **pinned)
    kept = {"target_modules": ("q_proj", "v_proj"), "rank_pattern": ("v_proj=8",)}
    assert found.config == Configuration(**pinned | kept | {"device": "cuda", "vram_bytes": None})
    assert found.config.gradient_accumulation == 5
    assert found.config.precision == "nf4"


def test_the_choices_of_finetune_can_be_asked_for():
    """The length of the data first, at no rank but its own, and no margin kept at the cost of length or speed."""
    shape = load_model("tinyllama-1.1b")
    pinned = dict(dtype="float16", load_in_4bit=False, lora_r=16, optimizer="cruxy", state_bits=32)
    for budget in (3450, 3500, 3550, 3600, 3650, 3700):
        card = Card.budget(budget * 2**20)
        safe, bold = (plan(shape, card, margin=m, alternatives=False, longest=700, **pinned) for m in (True, False))
        assert safe.config.max_seq_length <= bold.config.max_seq_length <= 700
        assert bold.fits
        assert bold.config.lora_r == 16
    assert plan(shape, Card.budget(3 * GiB), longest=700, batch_size=12, **pinned).config.batch_size == 12


@pytest.mark.parametrize("model", ["tinyllama-1.1b", "gemma-2b"])
def test_more_memory_never_gives_less(model):
    """Length first, then precision, then adapters: a larger budget is at least as good in that order."""
    rank = {"nf4": 0, "float16": 1}
    quality = []
    for budget in ("2GiB", "3GiB", "4GiB", "8GiB"):
        found = plan(model, budget, alternatives=False)
        c = found.config
        if found.fits:
            quality.append((c.max_seq_length, rank[c.precision], c.lora_r, len(c.target_modules)))
        else:
            quality.append((0, 0, 0, 0))
    assert quality == sorted(quality)
    assert quality[-1][:2] == (1024, 1)


def test_what_fits_is_found_fitting_again():
    """Pinning every choice of a plan, and asking again, changes nothing."""
    first = plan("gemma-2b", "gtx1650", os="windows", alternatives=False)
    pinned = {name: value for name, value in vars(first.config).items() if name not in ("device", "vram_bytes")}
    again = plan("gemma-2b", "gtx1650", os="windows", alternatives=False, **pinned)
    assert again.fits
    assert again.config == first.config
    assert again.peak_bytes == first.peak_bytes


def test_nothing_fits_names_the_one_change():
    found = plan("qwen2.5-3b", "gtx1650", dtype="float16", load_in_4bit=False, max_seq_length=1024)
    assert not found.fits
    assert found.headroom_bytes < 0
    assert found.needed is not None
    assert found.needed.change == "--load-in-4bit"
    assert plan("qwen2.5-3b", "gtx1650", load_in_4bit=True, max_seq_length=1024).fits
    hopeless = plan("phi-2", "1GiB")
    assert hopeless.needed is not None
    assert hopeless.needed.change.startswith("a card with")


def test_what_was_given_up_is_said():
    found = plan("gemma-2b", "gtx1650")
    assert found.config.precision == "nf4"
    assert any(line.startswith("float16 base weights -> nf4") for line in found.gave_up)


def test_kernels_follow_the_compute_capability():
    turing, ampere = plan("tinyllama-1.1b", "rtx2070"), plan("tinyllama-1.1b", "rtx3070")
    assert (turing.config.precision, turing.config.attention) == ("float16", "efficient")
    assert (ampere.config.precision, ampere.config.attention) == ("bfloat16", "flash")
    assert plan("gemma-2-2b", "rtx3090").config.attention == "eager"
    on_cpu = plan("smollm2-135m", Card.cpu("4GiB"))
    assert (on_cpu.config.precision, on_cpu.config.attention) == ("float32", "sdpa-cpu")
    assert "context" not in on_cpu.components


def test_full_fine_tuning_where_it_fits():
    found = plan("smollm2-135m", "rtx3060-12gb", method="full")
    assert found.fits
    assert found.config.method == "full"
    assert not found.config.release  # whole gradients, where there is room for them
    assert found.trainable_parameters == found.parameters
    whole = plan("tinyllama-1.1b", "gtx1650", method="full", release=False)
    assert not whole.fits
    assert whole.needed.change == "--release"


def test_every_weight_on_a_gtx_1650_as_in_the_table():
    """The rows of docs/measurements.md are what examples/every_weight_in_4_gb.py prints."""
    example = runpy.run_path(str(ROOT / "examples" / "every_weight_in_4_gb.py"))
    text = (ROOT / "docs" / "measurements.md").read_text(encoding="utf-8")
    made = [line.strip("| ").split(" | ") for line in example["table"]()]
    for row in made[:1] + made[2:]:
        (line,) = (line for line in text.splitlines() if line.startswith(f"| {' | '.join(row[:4])} |"))
        cells = line.strip("| ").split(" | ")
        assert cells[:4] + cells[5:] == row
        if row is not made[0]:
            assert float(cells[4].partition("(")[2].removesuffix(" % off)")) < 1
    assert [row[5:] for row in made if row[:2] in (["tinyllama-1.1b", "8"], ["tinyllama-1.1b", "4"])] == [
        ["tight", "no, 476 MiB short"], ["yes", "tight"],
    ]  # fmt: skip


def test_every_weight_of_a_billion_on_a_4_gb_card():
    """512 tokens on a GTX 1650, CUDA context included: 4 bits of state within 3.2 GiB, 8 within 3.81."""
    for bits, system, budget in ((4, "windows", 3.2), (8, "linux", 3.81)):
        found = plan(
            "tinyllama-1.1b", "gtx1650", method="full", os=system, max_seq_length=512, batch_size=1,
            optimizer="cruxy-lion", state_bits=bits, alternatives=False,
        )  # fmt: skip
        assert found.fits
        assert found.peak_bytes < budget * GiB
        assert (found.config.dtype, found.config.release) == ("float16", True)
    found = plan("tinyllama-1.1b", "gtx1650", method="full", os="windows", max_seq_length=512)
    assert (found.config.optimizer, found.config.state_bits, found.config.gradient_accumulation) == ("cruxy-lion", 4, 1)
    assert "gradients released" in render(found)
    assert any("released layer by layer" in line for line in found.gave_up)


def test_releasing_is_what_a_full_fine_tuning_needs():
    found = plan("qwen3-0.6b", "gtx1650", method="full", release=False, optimizer="cruxy", max_seq_length=512)
    assert not found.fits
    assert found.needed.change == "--release"
    assert found.needed.config.release
    assert found.needed.config.gradient_accumulation == 1


@pytest.mark.parametrize("name", ["tinyllama-1.1b", "smollm2-360m", "qwen2.5-0.5b", "llama-3.2-1b", "qwen2.5-1.5b"])
def test_the_loss_of_a_full_fine_tuning_is_the_one_that_takes_less(name):
    shape = load_model(name)
    for length, dtype in itertools.product((128, 512, 2048), ("float16", "float32")):
        step = Step(shape, 1, length, dtype, lora_r=0, release=True, optimizer="lion-4bit", autocast=False)
        step = replace(step, upcast_outputs=False)
        peaks = {tiled: footprint(replace(step, chunked_loss=tiled)).peak_allocated for tiled in (True, False)}
        taken = peaks[tiles_pay(shape, length, step.width)]
        assert taken <= 1.02 * min(peaks.values()), (length, dtype)


def test_the_closed_form_of_the_loss():
    """W + 12 n_lora + act + (4h + 4) T + 12 V T with the output kept, W with the gradients' place taken by none."""
    shape = load_model("tinyllama-1.1b")
    step = Step(
        shape, 2, 512, targets=shape.family.names, chunked_loss=False, autocast=False, upcast_outputs=False,
        keep_outputs=True, cublas_workspace=0,
    )  # fmt: skip
    tokens, h, v = 1024, shape.hidden_size, shape.vocab_size
    adapters = step.lora_parameters()
    expected = 2 * shape.parameters + 12 * adapters + shape.num_hidden_layers * 2 * h * tokens
    expected += (4 * h + 4) * tokens + (12 + 2) * v * tokens
    found = footprint(step)
    assert found.peak_phase == "backward:head"
    assert found.peak_allocated == pytest.approx(expected, rel=0.005)


@pytest.mark.parametrize(
    ("change", "sign"),
    [
        ({"seq": 1024}, 1),
        ({"batch": 2}, 1),
        ({"checkpointing": False}, 1),
        ({"chunked_loss": False}, 1),
        ({"lora_r": 16}, 1),
        ({"lora_r": 0}, 1),
        ({"accumulation": 2}, 1),
        ({"optimizer": "lion-8bit"}, -1),
        ({"precision": "nf4"}, -1),
        ({"attention": "eager"}, 1),
        ({"targets": ("q_proj", "v_proj")}, -1),
    ],
)
def test_each_setting_moves_memory_the_way_it_should(change, sign):
    shape = load_model("tinyllama-1.1b")
    step = Step(shape, 1, 512, targets=shape.family.names)
    before, after = footprint(step).peak_allocated, footprint(replace(step, **change)).peak_allocated
    assert (after - before) * sign > 0


def test_step_time_is_a_roofline():
    shape, card = load_model("tinyllama-1.1b"), load_card("gtx1650")
    step = Step(shape, 1, 512, targets=shape.family.names)
    work = flops(step)
    linears = shape.num_hidden_layers * sum(x.weight for x in shape.linears())
    assert work["forward"] == pytest.approx(2 * linears * 512, rel=0.05)
    plain = replace(step, checkpointing=False)
    assert flops(plain)["recompute"] == 0
    assert step_seconds(step, card) > step_seconds(plain, card) > 0
    assert step_seconds(replace(step, accumulation=4), card) > 3.5 * step_seconds(step, card)
    assert step_seconds(step, Card.budget("4GiB")) == 0


def test_text(tiny):
    text = render(tiny)
    assert "fits" in text
    assert "headroom" in text
    for option in tiny.alternatives:
        assert option.change in text
    assert finetune_command(tiny) in text
    assert "--plan plan.json" in render(tiny, "plan.json")
    missing = render(plan("phi-2", "1GiB"))
    assert "does not fit" in missing
    assert "what would do it" in missing


# -- input that makes no sense ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("4GiB", 4 * GiB),
        ("4g", 4 * GiB),
        ("4096 MiB", 4 * GiB),
        ("4GB", 4 * 10**9),
        (str(GiB), GiB),
        ("0.5GiB", GiB // 2),
    ],
)
def test_amounts(text, amount):
    assert parse_bytes(text) == amount


@pytest.mark.parametrize("text", ["", "4", "-4GiB", "4XB", "GiB", "1e12GiB", "0GiB", "9999TiB", "100MiB"])
def test_absurd_budgets(text):
    with pytest.raises(UserError):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("tinylama-1.1b", "tinyllama-1.1b"),
        ("qwen2.5-15b", "qwen2.5-1.5b"),
        ("gema2b", "gemma-2b"),
        ("zzz", "known: "),
    ],
)
def test_unknown_model(model, said):
    with pytest.raises(UserError, match="unknown model") as error:
        load_model(model)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("card", "said"), [("gtx165", "gtx1650"), ("rtx4061", "rtx4060"), ("rtx 3o60 12gb", "rtx3060-12gb")]
)
def test_unknown_card(card, said):
    with pytest.raises(UserError, match="unknown GPU") as error:
        load_card(card)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "mambo"}, "model_type 'mambo'"),
        ({"model_type": None}, "model_type None"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive whole number"),
        ({"vocab_size": "many"}, "vocab_size must be a positive whole number"),
        ({"num_key_value_heads": 5}, "cannot share"),
        ({"quantization_config": {"bits": 4}}, "quantized already"),
    ],
)
def test_configs_that_do_not_serve(change, said):
    with pytest.raises(UserError, match=said):
        shape_from_config({**LLAMA, **change})


def test_a_config_as_dict_file_and_folder(tmp_path):
    expected = load_model("tinyllama-1.1b")
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    for given in (LLAMA, tmp_path, tmp_path / "config.json", str(tmp_path)):
        shape = load_model(given)
        assert (shape.parameters, shape.layer_parameters) == (expected.parameters, expected.layer_parameters)
    with pytest.raises(UserError, match=r"no config\.json"):
        load_model(tmp_path.parent)
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match="not a JSON file"):
        load_model(tmp_path / "bad.json")


def test_own_profiles(tmp_path):
    card = tmp_path / "mine.toml"
    card.write_text(
        'capability = "8.6"\nvram_mib = 4096\nusable_linux_mib = 3800\nusable_linux_desktop_mib = 3500\n'
        "usable_windows_mib = 3200\n"
    )
    assert load_card(card).usable_bytes("windows") == 3200 * 2**20
    assert plan("smollm2-135m", card, alternatives=False).fits
    card.write_text('capability = "8.6"\nvram_mib = 4096\n')
    with pytest.raises(UserError, match="usable_linux_mib"):
        load_card(card)
    card.write_text("capability = \n")
    with pytest.raises(UserError, match="not valid TOML"):
        load_card(card)
    model = tmp_path / "mine-model.toml"
    model.write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in LLAMA.items()))
    assert load_model(model).parameters == load_model("tinyllama-1.1b").parameters


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_seq_length": 4096}, "beyond"),
        ({"max_seq_length": -1}, "--max-seq-length is -1; expected a whole number of at least 8 tokens"),
        ({"max_seq_length": 2.5}, "whole number"),
        ({"micro_batch_size": 0}, "--micro-batch-size is 0; expected a whole number from 1"),
        ({"micro_batch_size": 3}, "not a multiple"),
        ({"batch_size": -2}, "--batch-size is -2; expected"),
        ({"lora_r": 0}, "--lora-r is 0; expected"),
        ({"dtype": "fp8"}, "--dtype is 'fp8'; expected one of auto, float16"),
        ({"dtype": "bfloat16"}, "no bfloat16"),
        ({"dtype": "float32", "load_in_4bit": True}, "16 bits"),
        ({"attention": "flash"}, "does not run"),
        ({"attention": "ring"}, "--attention is 'ring'; expected one of"),
        ({"optimizer": "adam"}, "--optimizer is 'adam'; expected one of .*; did you mean adamw"),
        ({"optimizer": "adamw", "state_bits": 8}, "--state-bits 8 is for --optimizer cruxy or cruxy-lion"),
        ({"target_modules": "q_proj,nope"}, "unknown LoRA targets nope"),
        ({"target_modules": []}, "at least one name"),
        ({"lora_dropout": 1.5}, "--lora-dropout"),
        ({"method": "prefix"}, "--method is 'prefix'"),
        ({"method": "full", "load_in_4bit": True}, "cannot learn"),
        ({"method": "full", "dtype": "float16", "optimizer": "adamw"}, "GradScaler"),
        ({"method": "full", "release": True, "optimizer": "sgd"}, "--release is for --optimizer cruxy"),
        ({"method": "full", "release": True, "batch_size": 8, "micro_batch_size": 2}, "step of every micro-batch"),
        ({"os": "macos"}, "unknown operating system"),
        ({"seq": 512}, "seq is no setting of a plan"),
        ({"max_seq_lenght": 512}, "did you mean max_seq_length"),
    ],
    ids=lambda x: str(x),
)
def test_settings_that_make_no_sense(settings, said):
    with pytest.raises(UserError, match=said):
        plan("tinyllama-1.1b", "gtx1650", **settings)


def test_gemma_2_needs_eager_attention():
    with pytest.raises(UserError, match="only eager"):
        plan("gemma-2-2b", "t4", attention="efficient")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe\x00garbage", "not JSON"),
        (b"[1, 2]", "no JSON object"),
        (b'{"model": "a", "card": "b", "config": {}}', "missing or unknown"),
    ],
)
def test_plans_that_are_none(content, said, tmp_path):
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=said) as error:
        Plan.load(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_plan_of_an_older_version(tmp_path):
    (tmp_path / "plan.toml").write_text('model = "a"\n')
    with pytest.raises(UserError, match=r"older version \(TOML\); make one with .* --save .*plan\.json"):
        Plan.load(tmp_path / "plan.toml")


@pytest.mark.parametrize("value", [None, 7, -1, "text", [], [1], {}, {"a": "b"}, True, 1e400])
def test_a_plan_with_any_field_spoilt_is_refused_in_a_sentence(tiny, value):
    """Every field, and every setting of its configuration: refused, or a value of the same kind."""
    data = tiny.to_dict()
    for where, name in [(data, n) for n in data] + [(data["config"], n) for n in data["config"]]:
        right, where[name] = where[name], value
        with contextlib.suppress(UserError):  # and nothing else
            kept = Plan.from_dict(data).to_dict()
            assert (kept if where is data else kept["config"])[name] in (value, [value], right)
        where[name] = right
    assert Plan.from_dict(data) == tiny


def test_a_missing_plan(tmp_path):
    with pytest.raises(UserError, match="no such plan"):
        Plan.load(tmp_path / "none.json")
    with pytest.raises(UserError, match="does not exist"):
        plan("smollm2-135m", "t4", alternatives=False).save(tmp_path / "no" / "plan.json")


def test_four_models_of_the_white_paper_on_a_gtx_1650():
    """The README's table: each of the four trains at 1,024 tokens on headless Linux and on Windows."""
    half, nf4 = {"dtype": "float16", "load_in_4bit": False}, {"load_in_4bit": True}
    for (model, precision), system in itertools.product(
        [("tinyllama-1.1b", half), ("gemma-2b", nf4), ("phi-2", nf4)], ["linux", "windows"]
    ):
        found = plan(model, "gtx1650", max_seq_length=1024, os=system, alternatives=False, **precision)
        assert found.fits, (model, system)
    assert plan("qwen2.5-1.5b", "gtx1650", max_seq_length=1024, alternatives=False, **half).fits
    assert not plan("qwen2.5-1.5b", "gtx1650", max_seq_length=1024, os="windows", **half).fits
