"""A model's dimensions, read from its Hugging Face config: all that the planner needs to know of it.

No weights are read and no torch is imported.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cruxy_triton.errors import UserError
from cruxy_triton.planner.families import FAMILIES, Family
from cruxy_triton.planner.lookup import find_config


@dataclass(frozen=True)
class Linear:
    """One linear layer of a block: its name in the model and its [rows, cols] = [out, in] weight."""

    name: str
    rows: int
    cols: int
    bias: bool

    @property
    def weight(self) -> int:
        return self.rows * self.cols


@dataclass(frozen=True)
class Learned:
    """What was read off transformers' own model of a type that is none of `families`.

    linears: each kind of linear layer, and how often the model has it. period: layers after which kinds of layer
    repeat.
    """

    family: Family
    linears: tuple[tuple[Linear, int], ...]
    parameters: int
    period: int


@dataclass(frozen=True)
class ModelShape:
    """The dimensions of a causal language model. Counts are elements.

    config: the JSON text that it was read from, "" where it was made by hand; `trace` builds the model from it.
    learned: None for the types of `families`.
    """

    name: str
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    partial_rotary_factor: float = 1.0
    resid_pdrop: float = 0.0
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    hf_id: str = ""
    source: str = ""
    config: str = field(default="", repr=False, compare=False)
    learned: Learned | None = None

    @property
    def family(self) -> Family:
        return self.learned.family if self.learned else FAMILIES[self.model_type]

    @property
    def query_width(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def key_width(self) -> int:
        return self.num_key_value_heads * self.head_dim

    def linears(self) -> tuple[Linear, ...]:
        """The linear layers of one block, in the order of execution."""
        f, h, i, q, k = self.family, self.hidden_size, self.intermediate_size, self.query_width, self.key_width
        qkv, out, mlp = (
            config if fixed is None else fixed
            for fixed, config in (
                (f.qkv_bias, self.attention_bias),
                (f.out_bias, self.attention_bias),
                (f.mlp_bias, self.mlp_bias),
            )
        )
        sizes = [(q, h, qkv), (k, h, qkv), (k, h, qkv), (h, q, out)]
        sizes += [(i, h, mlp)] * (2 if f.gated else 1) + [(h, i, mlp)]
        return tuple(Linear(name, *size) for name, size in zip(f.names, sizes, strict=True))

    def norms(self) -> dict[str, int]:
        """The norms' tensors of one block, in the order of execution and q's and k's last: key, elements."""
        f = self.family
        names = ["input_layernorm", *([] if f.parallel else ["post_attention_layernorm"])]
        names += ["pre_feedforward_layernorm", "post_feedforward_layernorm"] if f.sandwich else []
        parts = ("weight", "bias") if f.norm == "layer" else ("weight",)
        found = {f"{name}.{part}": self.hidden_size for name in names for part in parts}
        return found | ({f"self_attn.{x}_norm.weight": self.head_dim for x in "qk"} if f.qk_norm else {})

    def all_linears(self) -> tuple[tuple[Linear, int], ...]:
        """Each kind of linear layer but the head, and how often the model has it."""
        return self.learned.linears if self.learned else tuple((x, self.num_hidden_layers) for x in self.linears())

    @property
    def layer_parameters(self) -> int:
        return sum(x.weight + (x.rows if x.bias else 0) for x in self.linears()) + sum(self.norms().values())

    @property
    def parameters(self) -> int:
        """All parameters, with tied embeddings counted once."""
        if self.learned:
            return self.learned.parameters
        tables = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        final = self.hidden_size * (2 if self.family.norm == "layer" else 1)
        head_bias = self.vocab_size if self.family.head_bias else 0
        return tables + final + head_bias + self.num_hidden_layers * self.layer_parameters

    def with_layers(self, layers: int) -> ModelShape:
        return replace(self, num_hidden_layers=layers)


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
    parts = [key for key, value in config.items() if isinstance(value, Mapping) and key.endswith("_config")]
    parts = [key for key in parts if key != "quantization_config"]
    if parts:
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
