"""A model's shape from its name or config: profiles, files, the hub; known families, or what transformers builds.

No weights are read; torch and transformers are imported only for a type that is none of `families`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cruxy_triton.errors import UserError
from cruxy_triton.planner.families import FAMILIES
from cruxy_triton.planner.lookup import find_config
from cruxy_triton.planner.shape import ModelShape

# What a config.json has to say, and what it may: (field, type, least, most). A count is a whole number.
_MOST = 2**31 - 1
_NEEDED = (
    ("vocab_size", int, 1, _MOST),
    ("hidden_size", int, 1, _MOST),
    ("intermediate_size", int, 1, _MOST),
    ("num_hidden_layers", int, 1, 10_000),
    ("num_attention_heads", int, 1, _MOST),
    ("max_position_embeddings", int, 1, _MOST),
)
_OPTIONAL = (
    ("num_key_value_heads", int, 1, _MOST),
    ("head_dim", int, 1, _MOST),
    ("tie_word_embeddings", bool, False, True),
    ("attention_bias", bool, False, True),
    ("mlp_bias", bool, False, True),
    ("hidden_act", str, None, None),
    ("partial_rotary_factor", float, 0.0, 1.0),
    ("resid_pdrop", float, 0.0, 1.0),
    ("attn_logit_softcapping", float, 0.0, math.inf),
    ("final_logit_softcapping", float, 0.0, math.inf),
    ("hf_id", str, None, None),
)


# How a config calls the parts of a model that takes more than text. Other mappings (attn_config, ffn_config,
# per_layer_config, decoder_config) are settings of one model.
_MODALITIES = ("text_", "vision_", "visual_", "image_", "video_", "vq_", "audio_", "speech_")


def _checked(config: Mapping[str, Any], spec: tuple[str, type, Any, Any], where: str) -> Any:
    """The field's value, or None. Raises UserError where it is none of that type or out of range."""
    name, kind, least, most = spec
    value = config.get(name)
    if value is None:
        return None
    if kind in (bool, str):
        if isinstance(value, kind):
            return value
        raise UserError(f"{where}: {name} must be {'true or false' if kind is bool else 'text'}, not {value!r}")
    number = not isinstance(value, bool) and isinstance(value, int if kind is int else (int, float))
    if kind is int and not (number and least <= value <= most):
        raise UserError(f"{where}: {name} must be a positive whole number (at most {most}), not {value!r}")
    if kind is float and not (number and least <= value <= most and math.isfinite(value)):
        bounds = "of at least 0" if most == math.inf else f"between {least:g} and {most:g}"
        raise UserError(f"{where}: {name} must be a number {bounds}, not {value!r}")
    return value


def shape_from_config(config: Mapping[str, Any], name: str = "", source: str = "") -> ModelShape:
    """A `ModelShape` from a parsed config.json. A model_type that is none of `families` is read off transformers' own
    model, which imports torch and transformers.

    Raises UserError for what AutoModelForCausalLM does not load or the planner cannot (multimodal models), a missing
    or impossible field, or a checkpoint that is quantized already.
    """
    where = name or "the config"
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise UserError(f"{where}: model_type {kind!r} is not the name of an architecture, for example llama")
    if parts := [key for key, value in config.items() if isinstance(value, Mapping) and key.startswith(_MODALITIES)]:
        raise UserError(
            f"{where}: model_type {kind!r} is a model of several parts ({', '.join(parts)}); plan and finetune take "
            "causal language models of text alone"
        )
    if config.get("quantization_config"):
        raise UserError(
            f"{where}: the checkpoint is quantized already; plan with the unquantized one and 4-bit base weights"
        )
    if kind not in FAMILIES:
        return _learned(config, name, source)
    missing = [name for name, *_ in _NEEDED if config.get(name) is None]
    if missing:
        raise UserError(
            f"{where}: the config lacks {', '.join(missing)}; a causal language model's config.json with "
            f"{', '.join(spec[0] for spec in _NEEDED)} is needed"
        )
    rope = config.get("rope_parameters")
    given = {**FAMILIES[kind].defaults, **(rope if isinstance(rope, Mapping) else {}), **config}
    if given.get("hidden_activation"):  # Gemma's own name for it
        given["hidden_act"] = given["hidden_activation"]
    values: dict[str, Any] = {spec[0]: _checked(given, spec, where) for spec in (*_NEEDED, *_OPTIONAL)}
    heads = values["num_attention_heads"]
    key_heads = values["num_key_value_heads"] = values["num_key_value_heads"] or heads
    if heads % key_heads:
        raise UserError(f"{where}: {heads} attention heads cannot share {key_heads} key/value heads evenly")
    if values["head_dim"] is None and values["hidden_size"] % heads:
        raise UserError(
            f"{where}: hidden_size {values['hidden_size']} is no multiple of its {heads} attention heads; "
            "such a config has to give head_dim"
        )
    values["head_dim"] = values["head_dim"] or values["hidden_size"] // heads
    softcaps = ("attn_logit_softcapping", "final_logit_softcapping")  # None is a value of theirs: no cap
    tied = bool(values.pop("tie_word_embeddings"))
    found: dict[str, Any] = {key: value for key, value in values.items() if value is not None or key in softcaps}
    return ModelShape(
        name=name or str(config.get("_name_or_path") or kind),
        model_type=kind,
        tie_word_embeddings=tied,
        source=source or str(config.get("source", "")),
        config=json.dumps(dict(config), default=str),
        **found,
    )


def _learned(config: Mapping[str, Any], name: str, source: str) -> ModelShape:
    try:
        from cruxy_triton.planner.meta_model import learn
    except ImportError as error:
        raise UserError(
            f"{name or 'the config'}: model_type {config['model_type']!r} is none of those that the planner knows by "
            f"itself ({', '.join(FAMILIES)}); for any other it needs transformers ({error}): "
            "pip install 'cruxy-triton[train]'"
        ) from None
    return learn(config, name, source)


def load_model(model: str | Path | Mapping[str, Any] | ModelShape) -> ModelShape:
    """A `ModelShape` from a profile's name, a Hugging Face id, a folder, a config.json or .toml, or a dict.

    Names resolve in this order: a folder with a config.json or a path to one, a profile of `profiles/models`, a
    Hugging Face id (the local cache first, then the hub).
    Raises UserError where nothing of that name is found (nearest names offered) or the config does not serve.
    """
    if isinstance(model, ModelShape):
        return model
    if isinstance(model, Mapping):
        return shape_from_config(model)
    return shape_from_config(*find_config(str(model)))
