"""The settings: declared once, said the same way by every command, and handed on whole from a plan to a run."""

import dataclasses
import functools
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from cruxy_kernels import layout
from cruxy_triton import cli, settings
from cruxy_triton.cli.arguments import translated
from cruxy_triton.cli.finetune import obeying
from cruxy_triton.errors import UserError
from cruxy_triton.finetune.recipe import Recipe
from cruxy_triton.planner import Card, Configuration, Plan, plan
from cruxy_triton.planner.card import SYSTEMS
from cruxy_triton.planner.render import finetune_command, render
from cruxy_triton.planner.search import codec_of

FIELDS = [field.name for field in dataclasses.fields(Configuration)]
NF4 = {"load_in_4bit": True}
LLAMA = {
    "model_type": "llama", "vocab_size": 3200, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 2048,
}  # fmt: skip
SMALL = {**LLAMA, "hf_id": "owner/small"}

# For each field of a configuration: plans that differ in it, as (card, settings given).
VARIED = {
    "max_seq_length": [("t4", {"max_seq_length": 384})],
    "dtype": [("rtx3060-12gb", {"dtype": name}) for name in ("float16", "bfloat16", "float32")] + [("t4", NF4)],
    "load_in_4bit": [("rtx3060-12gb", NF4), ("rtx3060-12gb", {**NF4, "dtype": "float16"})],
    "double_quant": [("t4", {**NF4, "double_quant": value}) for value in (True, False)],
    "device": [(Card.cpu("8GiB"), {}), ("t4", {})],
    "vram_bytes": [(Card.budget(size), {}) for size in ("3GiB", "3900MiB", "4GB", 3_000_000_001)],
    "attention": [("t4", {"attention": kind}) for kind in ("efficient", "math", "eager")]
    + [("rtx3060-12gb", {"attention": kind}) for kind in ("flash", "efficient", "math")]
    + [(Card.cpu("8GiB"), {"attention": kind}) for kind in ("sdpa-cpu", "eager")],
    "gradient_checkpointing": [("t4", {"gradient_checkpointing": value}) for value in (True, False)],
    "chunked_loss": [("t4", {"chunked_loss": value}) for value in (True, False)],
    "release": [("rtx3090", {"method": "full", "release": value}) for value in (False, True)],
    "method": [("rtx3090", {"method": name}) for name in ("lora", "full")]
    + [("rtx3090", {"method": "full", "optimizer": name}) for name in settings.STATE_BITS],
    "lora_r": [("t4", {"lora_r": value}) for value in (8, 24)],
    "lora_alpha": [("t4", {"lora_alpha": value}) for value in (3, 17.5)],
    "lora_dropout": [("t4", {"lora_dropout": 0.05})],
    "use_dora": [("t4", {"use_dora": True})],
    "rank_pattern": [("t4", {"rank_pattern": ["q_proj=4", "v_proj=32"]})],
    "target_modules": [("t4", {"target_modules": "q_proj, v_proj"}), ("t4", {"target_modules": ["all-linear"]})],
    "optimizer": [("t4", {"optimizer": name}) for name in settings.STATE_BITS],
    "state_bits": [("t4", {"optimizer": "cruxy-lion", "state_bits": bits}) for bits in (4, 8, 32)],
    "batch_size": [("t4", {"batch_size": 12})],
    "micro_batch_size": [("t4", {"micro_batch_size": 4})],
}
CASES = [(name, number) for name in VARIED for number in range(len(VARIED[name]))]


@functools.cache
def planned(name: str, number: int) -> Plan:
    card, given = VARIED[name][number]
    return plan(SMALL, card, alternatives=False, **given)


def parsed(command: str, words: list[str]) -> dict:
    return dict(cli.build_parser(command).parse_args([command, *words]).given)


def test_every_field_is_varied() -> None:
    assert set(VARIED) == set(FIELDS) == set(settings.CONFIGURES)


@pytest.mark.parametrize(("name", "number"), CASES)
def test_a_plan_runs_as_planned(name: str, number: int, tmp_path: Path) -> None:
    """The command that is printed, and the file that is saved, give finetune exactly the plan's configuration."""
    made = planned(name, number)
    assert made.fits
    program, command, *words = shlex.split(finetune_command(made))
    assert (program, command) == ("cruxy-triton", "finetune")
    assert shlex.join([program, command, *words]) in render(made)
    printed = Recipe(output="run", **parsed(command, words))

    made.save(tmp_path / "plan.json")
    _, _, *words = shlex.split(finetune_command(made, str(tmp_path / "plan.json")))
    parser = cli.build_parser("finetune").parse_args(["finetune", *words])
    saved = Recipe(output="run", **obeying(parser.plan, dict(parser.given)))

    for recipe in (printed, saved):
        found = Configuration.of(vars(recipe))
        for field in FIELDS:
            assert getattr(found, field) == getattr(made.config, field), field
        assert recipe.model == made.hf_id


def test_the_variants_are_variants() -> None:
    """A field that no plan above moves would be tested by nothing."""
    usual = planned("device", 1).config
    for name in FIELDS:
        configs = [planned(name, number).config for number in range(len(VARIED[name]))]
        assert any(getattr(config, name) != getattr(usual, name) for config in configs), name


def test_what_every_weight_learns_with_where_nothing_is_said() -> None:
    lora, full = (Recipe("m", "d", "o", method=method) for method in ("lora", "full"))
    assert (lora.optimizer, lora.state_bits, lora.clip) == ("cruxy", 32, "global")
    assert (full.optimizer, full.state_bits, full.clip) == ("cruxy-lion", None, "tensor")
    assert (lora.chunked_loss, full.chunked_loss) == (True, None), "planned: what takes less depends on the length"
    assert full.lr == settings.FULL_LR["cruxy-lion"] < lora.lr / 10
    assert Recipe("m", "d", "o", method="full", optimizer="adamw").clip == "global", "the norm bounds its steps"


def test_the_folder_of_a_local_model_is_handed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "my model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    monkeypatch.chdir(tmp_path)
    for given in ("my model", "./my model/config.json", folder):
        made = plan(given, "t4", alternatives=False)
        assert parsed("finetune", shlex.split(finetune_command(made))[2:])["model"] == str(folder)
        made.save("plan.json")
        assert obeying("plan.json", {})["model"] == str(folder)
    assert shlex.split(finetune_command(plan(LLAMA, "t4", alternatives=False)))[2] == "MODEL"

    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({**LLAMA, "num_hidden_layers": 5}))
    with pytest.raises(UserError, match=r"is for my model .* not for other"):
        obeying("plan.json", {"model": "other"})
    (other / "config.json").write_text(json.dumps(LLAMA))  # the same dimensions: the plan holds
    assert obeying("plan.json", {"model": "other"})["model"] == "other"


def test_a_plan_that_is_contradicted_is_refused(tmp_path: Path) -> None:
    made = planned("device", 1)
    made.save(tmp_path / "plan.json")
    path = str(tmp_path / "plan.json")
    for name in FIELDS:
        value = made.config.target_modules[:1] if name == "target_modules" else "another"
        if name in ("vram_bytes", "double_quant"):  # the plan has no budget of its own, and no 4-bit weights
            continue
        with pytest.raises(UserError, match=f"sets {name} = "):
            obeying(path, {name: value})
    assert obeying(path, {"vram_bytes": 2**30})["vram_bytes"] == 2**30
    Plan.load(path).save(path)
    plan("phi-2", "1GiB", alternatives=False).save(path)
    with pytest.raises(UserError, match="does not fit"):
        obeying(path, {})


# -- one declaration --------------------------------------------------------------------------------------


def test_the_recipe_has_every_setting_of_finetune() -> None:
    names = {field.name for field in dataclasses.fields(Recipe)}
    assert {s.name for s in settings.of_command("finetune")} - names == {"record_gradients"}
    assert set(FIELDS) <= names


@pytest.mark.parametrize("command", ["plan", "finetune"])
def test_the_command_line_has_every_setting_of_the_command(command: str) -> None:
    parser = cli.build_parser(command)
    sub = next(a for a in parser._actions if a.choices and command in a.choices).choices[command]
    flags = {flag for action in sub._actions for flag in action.option_strings}
    assert {s.flag for s in settings.of_command(command) if s.flag} <= flags
    for action in sub._actions:
        if (setting := getattr(action, "setting", None)) is not None:
            assert action.help.startswith(setting.help)
            said = re.search(r" \(default: (?!None).+\)$", action.help)
            assert said or setting.name in ("model", "data"), setting.name


def test_what_both_commands_take_means_the_same() -> None:
    both = [s for s in settings.SETTINGS.values() if len(s.commands) == 2 and s.flag]
    assert {"max_seq_length", "batch_size", "vram_bytes", "optimizer", "target_modules"} <= {s.name for s in both}
    examples = {"size": ["4G", "4GB", "4GiB"], "names": ["q_proj,v_proj"], "float": ["0.5"], "int": ["32"]}
    examples["pattern"] = ["q_proj=8"]
    for setting in both:
        for text in examples.get(setting.kind, setting.choices[:1]) if setting.kind != "switch" else [None]:
            words = [setting.flag, *([] if text is None else [str(text)])]
            assert parsed("plan", words) == parsed("finetune", words)
    spaced, joined = ["--target-modules", "q_proj", "v_proj"], ["--target-modules", "q_proj,v_proj"]
    assert parsed("plan", spaced) == parsed("plan", joined) == parsed("finetune", spaced) == parsed("finetune", joined)


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("4G", 2**32),
        ("4g", 2**32),
        ("4GiB", 2**32),
        ("4 GB", 4 * 10**9),
        ("4096M", 2**32),
        ("5000000K", 5_000_000 * 1024),
        ("3800MB", 3800 * 10**6),
        ("0.5 TiB", 2**39),
        ("4294967296", 2**32),
        ("4294967296B", 2**32),
    ],
)
def test_sizes(text: str, amount: int) -> None:
    assert parsed("plan", ["--vram", text]) == parsed("finetune", ["--vram", text]) == {"vram_bytes": amount}


def test_every_setting_survives_its_own_words() -> None:
    values = {"text": "x", "int": 32, "float": 0.25, "size": 3_000_000_001, "names": ["a", "b"]}
    values["pattern"] = ["a=2", "b=3"]
    for setting in settings.SETTINGS.values():
        if not setting.flag:
            continue
        command = setting.commands[0]
        for value in setting.choices or ((True, False) if setting.kind == "switch" else (values[setting.kind],)):
            assert parsed(command, setting.words(value)) == {setting.name: value}


def test_choices_are_those_of_the_rooms_below() -> None:
    assert set(settings.SETTINGS["mode"].choices) == set(layout.LAWS)
    assert settings.SETTINGS["os"].choices == SYSTEMS
    cards = (Card.cpu("1GiB"), Card.budget("1GiB"), Card.budget("1GiB", (8, 0)))
    assert set(settings.SETTINGS["attention"].choices) == {kind for card in cards for kind in card.attention_kinds}
    usual = planned("device", 1).config
    for optimizer, kinds in settings.STATE_BITS.items():
        for bits in kinds:
            assert codec_of(dataclasses.replace(usual, optimizer=optimizer, state_bits=bits))
    assert set(settings.DEFAULT_LR) == set(settings.FULL_LR) == set(settings.STATE_BITS)


def test_it_is_data_and_imports_nothing_heavy() -> None:
    assert json.loads(json.dumps([dataclasses.asdict(s) for s in settings.SETTINGS.values()]))
    code = (
        "import sys, cruxy_triton.settings, cruxy_triton.finetune.recipe\n"
        "sys.exit(', '.join({'torch', 'transformers', 'numpy', 'psutil', 'argparse'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_each_bound_is_kept_and_said() -> None:
    """The first value outside every declared range is refused in a sentence that names the flag and the range."""
    for setting in settings.SETTINGS.values():
        step = 1 if setting.kind == "int" else 1e-9
        outside = [
            *([setting.minimum - step] if setting.minimum is not None else []),
            *([setting.maximum + step] if setting.maximum is not None else []),
            *(x for x in (setting.above, setting.below) if x is not None),
            *([float("nan"), float("inf"), "1", True] if setting.kind in ("int", "float") else []),
            *(["", " ", 3] if setting.kind == "text" else []),
            *(["no such choice"] if setting.choices else []),
        ]
        for value in outside:
            with pytest.raises(UserError) as error:
                setting.check(value)
            assert str(error.value).startswith(f"{setting.flag or setting.metavar} is {value!r}; expected ")
        inside = [x for x in (setting.minimum, setting.maximum, *setting.choices) if x is not None]
        assert [setting.check(x) for x in inside] == inside


# -- what has no effect, and what was called otherwise --------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--mode", "meta3", "--optimizer", "adamw"], "--mode has no effect with --optimizer adamw"),
        (["--double-quant"], "--double-quant has no effect without --load-in-4bit"),
        (["--epochs", "2", "--max-steps", "9"], "--epochs has no effect with --max-steps 9"),
        (["--eval-fraction", ".1", "--eval-data", "e.jsonl"], "--eval-fraction has no effect with --eval-data e.jsonl"),
        (["--warmup-fraction", ".1", "--lr-schedule", "constant"], "--warmup-fraction has no effect with"),
        (["--mode", "meta3", "--optimizer", "cruxy-lion"], ""),
        (["--double-quant", "--load-in-4bit"], ""),
        (["--max-steps", "9"], ""),
    ],
)
def test_options_without_effect_are_said(words: list[str], said: str) -> None:
    notes = settings.without_effect(parsed("finetune", words), "finetune")
    assert [note[: len(said)] for note in notes] == ([said] if said else [])


def test_in_a_plan_what_is_searched_may_still_have_an_effect() -> None:
    assert settings.without_effect({"double_quant": True}, "plan") == []
    assert settings.without_effect({"double_quant": True, "load_in_4bit": False}, "plan") != []
    assert settings.without_effect({"lora_r": 8, "method": "full"}, "plan") != []


def test_options_for_the_hub_say_so_where_the_model_is_here(tmp_path: Path, capsys) -> None:
    (tmp_path / "d.jsonl").write_text("{}\n")
    words = ["finetune", str(tmp_path), "--data", str(tmp_path / "d.jsonl"), "--output", str(tmp_path / "run")]
    assert cli.main([*words, "--split", "test", "--revision", "v2"]) == 2  # there is no model in that folder
    error = capsys.readouterr().err
    assert "note: --split has no effect on" in error
    assert "note: --revision has no effect on" in error


OLD = {
    "--seq 512": {"max_seq_length": 512},
    "--seq=512": {"max_seq_length": 512},
    "--batch 2": {"micro_batch_size": 2},
    "--targets q_proj,v_proj": {"target_modules": ["q_proj", "v_proj"]},
    "--targets all": {"target_modules": ["all-linear"]},
    "--checkpointing": {"gradient_checkpointing": True},
    "--no-checkpointing": {"gradient_checkpointing": False},
    "--cpu 16GiB": {"device": "cpu", "vram_bytes": 2**34},
    "--precision nf4": {"load_in_4bit": True},
    "--precision=float16": {"dtype": "float16", "load_in_4bit": False},
    "--precision bf16": {"dtype": "bfloat16", "load_in_4bit": False},
    "--precision float32": {"dtype": "float32", "load_in_4bit": False},
    "--optimizer adamw-fp32": {"optimizer": "cruxy"},
    "--optimizer=lion-fp32": {"optimizer": "cruxy-lion", "state_bits": 32},
    "--optimizer lion-8bit": {"optimizer": "cruxy-lion", "state_bits": 8},
    "--optimizer torch-adamw": {"optimizer": "adamw"},
}


@pytest.mark.parametrize("old", OLD)
def test_old_options_still_work_and_say_the_new_name(old: str) -> None:
    words, notes = translated("plan", ["plan", "phi-2", *old.split()])
    assert parsed("plan", words[1:]) == {"model": "phi-2", **OLD[old]}
    assert len(notes) == 1
    assert " is now --" in notes[0]


def test_every_old_name_is_tried_or_ends_in_a_sentence(capsys) -> None:
    tried = {old.replace("=", " ").split()[0] for old in OLD}
    assert {name.split()[0] for name in settings.RENAMED} <= tried
    for words, said in [(["--accumulation", "4"], "--batch-size"), (["--precision", "fp8"], "--load-in-4bit")]:
        assert cli.main(["plan", "phi-2", *words]) == 2
        assert said in capsys.readouterr().err
    assert cli.main(["plan", "smollm2-135m", "--vram", "4GiB", "--seq", "256"]) == 0
    assert "note: --seq is now --max-seq-length" in capsys.readouterr().err


# -- one way down -----------------------------------------------------------------------------------------


def test_the_learning_rate_goes_from_the_command_line_to_the_control_vector() -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("trl")
    from cruxy_triton.finetune.train import make_optimizer

    for optimizer, usual in settings.DEFAULT_LR.items():
        for words, lr in (([], usual), (["--lr", "0.0123"], 0.0123)):
            recipe = Recipe("m", "d", "o", **parsed("finetune", ["--optimizer", optimizer, *words]))
            assert recipe.to_dict()["lr"] == lr
            parameter = torch.nn.Parameter(torch.ones(8))
            made = make_optimizer(recipe, [parameter])
            assert [group["lr"] for group in made.param_groups] == [lr]
            if optimizer.startswith("cruxy"):
                parameter.grad = torch.ones(8)
                made.step()
                control = made.state_dict()["param_groups"][0]["control"]
                assert float(control[layout.LR]) == pytest.approx(lr)
