"""Configs and card names as people have them: what is meant is found, what makes no sense is said in one sentence."""

import itertools
import json
import re

import pytest

from cruxy_triton.errors import UserError
from cruxy_triton.planner import Card, load_card, load_model, shape_from_config
from cruxy_triton.planner.card import card_names
from cruxy_triton.planner.lookup import profiles

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
GEMMA_2 = {**LLAMA, "model_type": "gemma2", "num_attention_heads": 8, "head_dim": 256}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_key_value_heads": "abc"}, "num_key_value_heads must be a positive whole number .*, not 'abc'"),
        ({"num_key_value_heads": 4.7}, "num_key_value_heads must be a positive whole number"),
        ({"num_key_value_heads": 0}, "num_key_value_heads must be a positive whole number"),
        ({"num_attention_heads": True}, "num_attention_heads must be a positive whole number"),
        ({"head_dim": -64}, "head_dim must be a positive whole number"),
        ({"num_hidden_layers": 10**9}, "at most 10000"),
        ({"hidden_size": 2049}, "no multiple of its 32 attention heads"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false, not 'false'"),
        ({"attention_bias": 1}, "attention_bias must be true or false"),
        ({"partial_rotary_factor": 2.0}, "between 0 and 1, not 2.0"),
        ({"rope_parameters": {"partial_rotary_factor": 2.0}}, "between 0 and 1"),
        ({"final_logit_softcapping": "30"}, "must be a number of at least 0"),
        ({"final_logit_softcapping": float("nan")}, "must be a number of at least 0"),
        ({"hidden_act": 3}, "hidden_act must be text"),
        ({"model_type": ["llama"]}, "not the name of an architecture"),
    ],
    ids=str,
)
def test_fields_that_make_no_sense(change, said):
    with pytest.raises(UserError, match=said):
        shape_from_config({**LLAMA, **change})


@pytest.mark.parametrize("text", ["[1, 2]", "{", "\ufeff", "3"])
def test_files_that_are_no_config(text, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"config\.json"):
        load_model(path)


def test_gemma_2_caps_by_default():
    """transformers fills in 50 and 30 where a config is silent; null means no cap."""
    silent, explicit = shape_from_config(GEMMA_2), shape_from_config({**GEMMA_2, "attn_logit_softcapping": None})
    assert (silent.attn_logit_softcapping, silent.final_logit_softcapping) == (50.0, 30.0)
    assert (explicit.attn_logit_softcapping, explicit.final_logit_softcapping) == (None, 30.0)


def test_defaults_are_transformers_own():
    """Every default of `families` against the class that it stands for."""
    transformers = pytest.importorskip("transformers")
    from cruxy_triton.planner.families import FAMILIES

    own = {"hidden_act": "hidden_activation", "partial_rotary_factor": "rope_parameters"}
    for model_type, family in FAMILIES.items():
        config = transformers.AutoConfig.for_model(model_type)
        for name, value in family.defaults.items():
            found = getattr(config, name, None) if hasattr(config, name) else getattr(config, own.get(name, name))
            assert (found[name] if isinstance(found, dict) else found) == value, (model_type, name)
        silent = {k: v for k, v in LLAMA.items() if k not in ("num_key_value_heads", "tie_word_embeddings")}
        shape = shape_from_config({**silent, "model_type": model_type})
        built = transformers.AutoConfig.for_model(model_type, **{k: v for k, v in silent.items() if k != "model_type"})
        assert shape.num_key_value_heads == built.num_key_value_heads, model_type
        assert shape.tie_word_embeddings == built.tie_word_embeddings, model_type


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA GeForce GTX 1650", "gtx1650-gddr5"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 3070", "rtx3070"),
        ("NVIDIA GeForce GTX 1660 SUPER", "gtx1660-super"),
        ("NVIDIA GeForce RTX 2080 Ti", "rtx2080-ti"),
        ("NVIDIA GeForce RTX 3050 Laptop GPU", "rtx3050-laptop-4gb"),
        ("Tesla T4", "t4"),
        ("rtx 3050 8gb", "rtx3050-8gb"),
    ],
)
def test_the_drivers_names(name, known):
    assert load_card(name) == load_card(known)


@pytest.mark.parametrize(
    "name",
    [
        "rtx 3050",
        "NVIDIA GeForce RTX 3050",
        "4060 ti",
        "NVIDIA GeForce RTX 5060 Ti",
        "2060",
        "rtx 2060",
        "rtx3060",
        "NVIDIA GeForce RTX 2060",
        "NVIDIA GeForce RTX 3060",
    ],
)
def test_an_ambiguous_name_asks(name):
    with pytest.raises(UserError, match=r"is \d cards; which one"):
        load_card(name)


def test_no_alias_hides_a_card_of_another_memory():
    """Cards that share a name have the same memory, or the name asks."""
    for name in card_names():
        for alias in profiles("gpus")[name].get("aliases", ()):
            try:
                card = load_card(alias)
            except UserError:
                continue
            assert card.vram_bytes == load_card(name).vram_bytes


def test_cards_that_the_driver_calls_alike_ask():
    """All pairs: the driver's name is the profile's without the memory that people put behind it."""
    drivers = {name: re.sub(r" \d+ GB$", "", data["name"]) for name, data in profiles("gpus").items()}
    alike = [(a, b) for a, b in itertools.combinations(drivers, 2) if drivers[a] == drivers[b]]
    assert ("rtx2060-12gb", "rtx2060-6gb") in alike
    for a, b in alike:
        assert load_card(a).vram_bytes != load_card(b).vram_bytes
        for spelling in (
            f"NVIDIA {drivers[a]}",
            drivers[a],
            drivers[a].replace("GeForce ", "").replace(" ", "").lower(),
        ):
            with pytest.raises(UserError, match="which one") as error:
                load_card(spelling)
            assert a in str(error.value)
            assert b in str(error.value)


@pytest.mark.parametrize("capability", [(99, 9), (3, 5), (7, 15)])
def test_no_such_compute_capability(capability):
    with pytest.raises(UserError, match="compute capability"):
        Card.budget("4GiB", capability)


def test_no_operating_system_for_a_budget():
    with pytest.raises(UserError, match="leave the operating system out"):
        Card.budget("4GiB").usable_bytes("windows")


@pytest.mark.parametrize("field", ["context_mib", "sms", "usable_linux_mib"])
def test_profiles_that_make_no_sense(field, tmp_path):
    data = {**profiles("gpus")["t4"], field: "many"}
    text = "".join(f"{k} = {json.dumps(v)}\n" for k, v in data.items() if not isinstance(v, dict))
    path = tmp_path / "card.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=field):
        load_card(path)
