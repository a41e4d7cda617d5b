"""A model's dimensions, read from its Hugging Face config: all that the planner needs to know of it.

No weights are read and no torch is imported.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from cruxy_triton.planner.families import FAMILIES, Family


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
