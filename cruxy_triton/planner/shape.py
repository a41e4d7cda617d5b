"""A model's dimensions, read from its Hugging Face config: all that the planner needs to know of it.

No weights are read and no torch is imported. Names resolve in this order: a profile of `profiles/models`, a
folder with a config.json or a path to one, a Hugging Face id (the local cache first, then the hub).
"""

from __future__ import annotations

import difflib
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from cruxy_triton.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]


@dataclass(frozen=True)
class Family:
    """What a model_type of transformers fixes beyond its numbers."""

    norm: str = "rms"  # rms: Llama's RMSNorm; gemma: 1 + weight in fp32; layer: LayerNorm
    gated: bool = True  # down(act(gate(x)) * up(x)), else fc2(act(fc1(x)))
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    parallel: bool = False  # attention and MLP read the same normalised input (Phi)
    qk_norm: bool = False  # an RMSNorm per head on q and k (Qwen3)
    sandwich: bool = False  # norms behind attention and MLP too (Gemma 2)
    sdpa: bool = True  # Gemma 2 caps the attention scores, which only its eager path can
    scaled_embedding: bool = False  # Gemma multiplies the embedding by sqrt(hidden_size)
    names: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


_PHI = ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2")
FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(qk_norm=True),
    "gemma": Family(norm="gemma", scaled_embedding=True),
    "gemma2": Family(norm="gemma", sandwich=True, sdpa=False, scaled_embedding=True),
    "phi": Family(
        norm="layer",
        gated=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        head_bias=True,
        parallel=True,
        names=_PHI,
    ),
}

# What transformers 5 assumes where a config.json is silent (its configuration_*.py files).
_TIED_BY_DEFAULT = {"gemma", "gemma2"}
_HEAD_DIM_DEFAULT = {"gemma": 256, "gemma2": 256, "qwen3": 128}


@dataclass(frozen=True)
class Linear:
    """One linear layer of a block: its name in the model and its [out, in] weight."""

    name: str
    rows: int
    cols: int
    bias: bool

    @property
    def weight(self) -> int:
        return self.rows * self.cols


@dataclass(frozen=True)
class ModelShape:
    """The dimensions of a causal language model. Counts are elements."""

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
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    hf_id: str = ""
    source: str = ""

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    @property
    def query_width(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def key_width(self) -> int:
        return self.num_key_value_heads * self.head_dim

    def linears(self) -> tuple[Linear, ...]:
        """The linear layers of one block, in the order of execution."""
        f, h, i = self.family, self.hidden_size, self.intermediate_size
        qkv = f.qkv_bias or (self.attention_bias and self.model_type != "qwen2")
        out = f.out_bias or (self.attention_bias and self.model_type != "qwen2")
        mlp = f.mlp_bias or self.mlp_bias
        sizes = [(self.query_width, h, qkv), (self.key_width, h, qkv), (self.key_width, h, qkv)]
        sizes += [(h, self.query_width, out)]
        sizes += [(i, h, mlp), (i, h, mlp), (h, i, mlp)] if f.gated else [(i, h, mlp), (h, i, mlp)]
        return tuple(Linear(name, *size) for name, size in zip(f.names, sizes, strict=True))

    def norms(self) -> tuple[int, ...]:
        """Elements of each norm weight (and bias) of one block."""
        f, h = self.family, self.hidden_size
        if f.norm == "layer":
            return (h, h) if f.parallel else (h, h, h, h)
        count = 4 if f.sandwich else 2
        return (h,) * count + ((self.head_dim, self.head_dim) if f.qk_norm else ())

    @property
    def layer_parameters(self) -> int:
        return sum(x.weight + (x.rows if x.bias else 0) for x in self.linears()) + sum(self.norms())

    @property
    def parameters(self) -> int:
        """All parameters, with tied embeddings counted once."""
        tables = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        final = self.hidden_size * (2 if self.family.norm == "layer" else 1)
        head_bias = self.vocab_size if self.family.head_bias else 0
        return tables + final + head_bias + self.num_hidden_layers * self.layer_parameters

    def with_layers(self, layers: int) -> ModelShape:
        return replace(self, num_hidden_layers=layers)


_NEEDED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)


def shape_from_config(config: Mapping[str, Any], name: str = "", source: str = "") -> ModelShape:
    """A `ModelShape` from a parsed config.json.

    Raises UserError for an architecture the planner does not know, a missing or impossible field, or a
    checkpoint that is quantised already.
    """
    where = name or "the config"
    kind = config.get("model_type")
    if kind not in FAMILIES:
        near = difflib.get_close_matches(str(kind), FAMILIES, n=2)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise UserError(
            f"{where}: model_type {kind!r} is not known to the planner; it knows {', '.join(FAMILIES)}.{hint}"
        )
    missing = [field for field in _NEEDED if config.get(field) is None]
    if missing:
        raise UserError(
            f"{where}: the config lacks {', '.join(missing)}; a causal language model's config.json with "
            f"{', '.join(_NEEDED)} is needed"
        )
    if config.get("quantization_config"):
        raise UserError(
            f"{where}: the checkpoint is quantised already; plan with the unquantised one and precision nf4"
        )
    numbers = {field: _positive(config, field, where) for field in _NEEDED}
    heads = numbers["num_attention_heads"]
    head_dim = config.get("head_dim") or _HEAD_DIM_DEFAULT.get(kind) or numbers["hidden_size"] // heads
    key_heads = config.get("num_key_value_heads") or heads
    if heads % int(key_heads):
        raise UserError(f"{where}: {heads} attention heads cannot share {key_heads} key/value heads evenly")
    rope = config.get("rope_parameters") or {}
    partial = config.get("partial_rotary_factor", rope.get("partial_rotary_factor"))
    tied = config.get("tie_word_embeddings")
    return ModelShape(
        name=name or str(config.get("_name_or_path") or kind),
        model_type=kind,
        num_key_value_heads=int(key_heads),
        head_dim=int(head_dim),
        tie_word_embeddings=kind in _TIED_BY_DEFAULT if tied is None else bool(tied),
        hidden_act=str(config.get("hidden_activation") or config.get("hidden_act") or "silu"),
        attention_bias=bool(config.get("attention_bias", False)),
        mlp_bias=bool(config.get("mlp_bias", False)),
        partial_rotary_factor=float(partial if partial is not None else (0.5 if kind == "phi" else 1.0)),
        attn_logit_softcapping=config.get("attn_logit_softcapping"),
        final_logit_softcapping=config.get("final_logit_softcapping"),
        hf_id=str(config.get("hf_id", "")),
        source=source or str(config.get("source", "")),
        **numbers,
    )


def _positive(config: Mapping[str, Any], field: str, where: str) -> int:
    value = config[field]
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise UserError(f"{where}: {field} must be a positive whole number, not {value!r}")
    return value


def profile_texts(kind: str) -> dict[str, str]:
    """{name: TOML text} of every file in profiles/<kind> ("gpus" or "models")."""
    folder = resources.files("cruxy_triton.profiles").joinpath(kind)
    return {
        item.name[: -len(".toml")]: item.read_text(encoding="utf-8")
        for item in sorted(folder.iterdir(), key=lambda item: item.name)
        if item.name.endswith(".toml")
    }


def read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None


def _simple(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum() or c == ".")  # a dot tells 1.5b from 15b


def model_names() -> list[str]:
    """The names of profiles/models."""
    return list(profile_texts("models"))


def load_model(model: str | Path | Mapping[str, Any] | ModelShape) -> ModelShape:
    """A `ModelShape` from a profile's name, a Hugging Face id, a folder, a config.json or .toml, or a dict.

    Raises UserError where nothing of that name is found (nearest names offered) or the config does not serve.
    """
    if isinstance(model, ModelShape):
        return model
    if isinstance(model, Mapping):
        return shape_from_config(model)
    text = str(model)
    path = Path(text).expanduser()
    if path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            raise UserError(f"{path.parent}: the folder has no config.json")
    if path.is_file():
        return _shape_from_file(path)
    wanted = _simple(text)
    profiles = profile_texts("models")
    for name, content in profiles.items():
        if wanted == _simple(name):
            return shape_from_config(tomllib.loads(content), name)
    aliases: dict[str, str] = {}
    for name, content in profiles.items():
        data = tomllib.loads(content)
        for alias in (data.get("hf_id", ""), *data.get("aliases", ())):
            aliases[_simple(alias)] = name
            aliases[_simple(alias.rpartition("/")[2])] = name
    if wanted in aliases:
        name = aliases[wanted]
        return shape_from_config(tomllib.loads(profiles[name]), name)
    if text.count("/") == 1 and not text.startswith((".", "/")) and not text.endswith((".json", ".toml")):
        return _shape_from_hub(text, list(profiles))
    raise UserError(_unknown("model", text, list(profiles)))


def _unknown(what: str, text: str, names: list[str]) -> str:
    by_simple = {_simple(name): name for name in names}
    close = difflib.get_close_matches(_simple(text), by_simple, n=3, cutoff=0.4)
    hint = f"nearest: {', '.join(by_simple[c] for c in close)}" if close else f"known: {', '.join(names)}"
    extra = " A Hugging Face id (owner/name), a folder or a config.json serve as well." if what == "model" else ""
    return f"unknown {what} {text!r}; {hint}.{extra}"


def _shape_from_file(path: Path) -> ModelShape:
    if path.suffix == ".toml":
        return shape_from_config(read_toml(path), path.stem, str(path))
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a JSON file: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a JSON object with the model's configuration")
    if isinstance(data.get("text_config"), dict):
        data = data["text_config"]
    name = path.parent.name if path.name == "config.json" else path.stem
    return shape_from_config(data, name, str(path))


def _shape_from_hub(hf_id: str, names: list[str]) -> ModelShape:
    """The config.json of a Hugging Face id: from the local cache, else from the hub (one request, 10 s)."""
    data = _cached_config(hf_id) or _hub_config(hf_id, names)
    if isinstance(data.get("text_config"), dict):
        data = data["text_config"]
    return replace(shape_from_config(data, hf_id, "huggingface.co"), hf_id=hf_id)


def _cached_config(hf_id: str) -> dict[str, Any] | None:
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    try:
        path = try_to_load_from_cache(hf_id, "config.json")
    except ValueError:  # not a name that the hub could have
        return None
    return json.loads(Path(path).read_text(encoding="utf-8")) if isinstance(path, str) else None


def _hub_config(hf_id: str, names: list[str]) -> dict[str, Any]:
    import urllib.error
    import urllib.parse
    import urllib.request

    base = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    request = urllib.request.Request(f"{base}/{urllib.parse.quote(hf_id)}/resolve/main/config.json")
    if os.environ.get("HF_TOKEN"):
        request.add_header("Authorization", f"Bearer {os.environ['HF_TOKEN']}")
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            data = json.load(answer)
    except (OSError, ValueError) as error:  # URLError and HTTPError are OSErrors
        code = getattr(error, "code", None)
        if code in (401, 403):
            why = "the hub asks for a login: set HF_TOKEN after accepting the model's licence there"
        elif code == 404:
            why = "the hub has no such model"
        else:
            why = f"the hub could not be asked ({error})"
        raise UserError(f"{_unknown('model', hf_id, names)} {why[0].upper()}{why[1:]}.") from None
    if not isinstance(data, dict):
        raise UserError(f"{hf_id}: its config.json is not a JSON object")
    return data
