"""Model types that the planner has no entry for, and entries of `families` as data. test_cpu.py has the real steps."""

import sys

import pytest

from cruxy_triton.errors import UserError
from cruxy_triton.planner import Card, plan, shape_from_config
from cruxy_triton.planner.families import FAMILIES
from cruxy_triton.planner.footprint import footprint
from cruxy_triton.planner.step import Step

torch = pytest.importorskip("torch")
for package in ("transformers", "peft", "trl", "bitsandbytes"):
    pytest.importorskip(package)

SIZES = {
    "vocab_size": 4000,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def config(model_type: str, **changes) -> dict:
    return {"model_type": model_type, **SIZES, **changes}


def test_a_plan_for_an_unknown_type():
    given = {"max_seq_length": 128, "gradient_checkpointing": False, "batch_size": 1, "alternatives": False}
    found = plan(config("olmo2"), "1GiB", **given)
    assert found.fits
    assert found.config.target_modules[:4] == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert found.parameters == shape_from_config(config("olmo2")).parameters
    assert sum(found.components.values()) == found.peak_bytes
    assert {"weights", "adapters", "optimizer state", "activations"} <= set(found.components)
    assert plan(config("olmo2"), Card.cpu("1GiB"), **given).fits


@pytest.mark.parametrize("model_type", ["arcee", "hunyuan_v1_dense"])
@pytest.mark.parametrize(("precision", "attention"), [("float16", "efficient"), ("bfloat16", "eager")])
def test_a_family_is_one_entry_of_data(model_type, precision, attention, monkeypatch):
    """The walk that an entry of `families` gives is the trace that the type gets without it."""
    values = config(model_type, vocab_size=32000, head_dim=32)
    settings = {"checkpointing": False, "attention": attention}
    with monkeypatch.context() as without:
        without.delitem(FAMILIES, model_type)
        learned = shape_from_config(values)
        traced = footprint(Step(learned, 2, 512, precision, targets=learned.family.names, **settings))
    known = shape_from_config(values)
    walked = footprint(Step(known, 2, 512, precision, targets=known.family.names, **settings))
    assert (known.parameters, known.family.names) == (learned.parameters, learned.family.names)
    assert walked.peak_allocated == pytest.approx(traced.peak_allocated, rel=0.002)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (config("paligemma", text_config={}, vision_config={}), "several parts .text_config, vision_config"),
        (config("llava", text_config=config("llama"), vision_config={}), "causal language models of text alone"),
        (config("llama", vision_config={"hidden_size": 64}), "several parts .vision_config"),
        ({"model_type": "musicgen", "audio_encoder": {"model_type": "encodec"}}, "several parts .audio_encoder"),
        ({"model_type": "t5"}, "no causal language model"),
        ({"model_type": "vit"}, "no causal language model"),
        (config("lama"), "has no model_type 'lama'"),
        (config("olmo2", num_key_value_heads="abc"), "transformers does not take this config"),
        (config("olmo2", num_attention_heads=0), "transformers does not"),
    ],
)
def test_what_finetune_would_not_load(values, said):
    """The criterion is AutoModelForCausalLM's own."""
    with pytest.raises(UserError, match=said):
        shape_from_config(values)


def test_several_parts_are_those_that_transformers_gives_more_than_text(monkeypatch):
    """Nested settings alone (attn_config, per_layer_config, ...) make no model of several parts."""
    from transformers import AutoConfig
    from transformers.models.auto import modeling_auto as auto

    beside_text = {
        *auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        *auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
        *auto.MODEL_FOR_TEXT_TO_WAVEFORM_MAPPING_NAMES,
        "moshi",  # speech; transformers has no list of those
        "gemma4_unified_assistant",  # drafts for a model of several parts, of whose config it is made
    }
    monkeypatch.setattr("cruxy_triton.planner.models._learned", lambda *given: None)
    nested = []
    for model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        if model_type in FAMILIES:
            continue
        try:
            values = AutoConfig.for_model(model_type).to_dict()
        except Exception:  # a type whose own defaults contradict each other
            continue
        if any(isinstance(value, dict) and key.endswith("_config") for key, value in values.items()):
            nested.append(model_type)
        if model_type in beside_text:
            with pytest.raises(UserError, match="several parts"):
                shape_from_config(values)
        else:
            shape_from_config(values)
    assert {"mpt", "dbrx", "gemma3"} <= set(nested)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [("mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2}), ("gemma4_text", {"num_hidden_layers": 2, "head_dim": 32})],
)
def test_a_text_model_with_nested_settings_has_a_plan(model_type, changes):
    transformers = pytest.importorskip("transformers")
    small = {**SIZES, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 4000}
    given = {**({"vocab_size": 4000} if model_type == "mpt" else small), **changes}
    built = transformers.AutoConfig.for_model(model_type, **given)
    found = plan(built.to_dict(), Card.cpu("1GiB"), max_seq_length=64, batch_size=1, alternatives=False)
    with torch.device("meta"):
        assert found.parameters == transformers.AutoModelForCausalLM.from_config(built).num_parameters()
    assert found.fits


def test_a_model_whose_step_cannot_be_followed_says_so():
    bloom = {"model_type": "bloom", "vocab_size": 500, "hidden_size": 64, "n_layer": 2, "n_head": 4}
    with pytest.raises(UserError, match="cannot follow a training step of model_type 'bloom'"):
        plan(bloom, "2GiB", max_seq_length=64)


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "cruxy_triton.planner.meta_model", raising=False)
    with pytest.raises(UserError, match=r"pip install 'cruxy-triton\[train\]'"):
        shape_from_config(config("olmo2"))
    with pytest.raises(UserError, match="several parts"):
        shape_from_config(config("llava", text_config={}))
    assert shape_from_config(config("llama")).parameters
