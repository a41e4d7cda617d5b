"""A model on torch's `meta` device, as `cruxy-triton finetune` has it before its first step: sizes without weights."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.pytorch_utils import Conv1D

from cruxy_triton.errors import UserError
from cruxy_triton.planner.families import Family
from cruxy_triton.planner.shape import Learned, Linear, ModelShape
from cruxy_triton.planner.step import Step
from cruxy_triton.planner.workspaces import NF4_BLOCK, NF4_NESTED_BLOCK

_LONGEST = 2**17  # positions, where a model has no limit of its own
_OWN = (
    "model_type",
    "hf_id",
    "aliases",
    "source",
    "sources",
    "name",
    "config",
    "learned",
)  # no fields of a transformers config


# Model types whose kernels read some weights past the layers, where an adapter would not be seen (refused by peft).
_MAMBA_TYPES = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}


def without_adapter(config: Any) -> list[str]:
    """Names of the linear layers that "all linear" leaves out of a model with this transformers config."""
    return ["out_proj", "conv1d"] if config.model_type in _MAMBA_TYPES else []


def _config(model_type: str, values: Mapping[str, Any], where: str) -> Any:
    """transformers' config of these values. Raises UserError where transformers does not take them."""
    values = {key: value for key, value in values.items() if key not in _OWN}
    try:
        # With a pad token some models look for it among the tokens, which have no values here.
        return AutoConfig.for_model(model_type, **{**values, "use_cache": False, "pad_token_id": None})
    except ValueError as error:
        if model_type not in CONFIG_MAPPING:
            raise UserError(
                f"{where}: transformers {transformers.__version__} has no model_type {model_type!r}"
            ) from None
        raise UserError(f"{where}: transformers does not take this config: {_line(error)}") from None
    except Exception as error:  # its validators raise classes of their own
        raise UserError(f"{where}: transformers does not take this config: {_line(error)}") from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _model(config: Any, dtype: torch.dtype, where: str) -> Any:
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"{where}: model_type {config.model_type!r} is no causal language model to transformers")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:  # whatever the model's own code makes of the numbers
        raise UserError(f"{where}: transformers does not build this model: {_line(error)}") from None


def _of(step: Step) -> Any:
    """The config of the step's model: what the shape was read from, or its own fields where it was made by hand."""
    shape = step.shape
    values = dict(json.loads(shape.config)) if shape.config else {**vars(shape), "hidden_activation": shape.hidden_act}
    layers, had = shape.num_hidden_layers, values.get("num_hidden_layers")
    config = _config(shape.model_type, values, shape.name)
    if had != layers:
        full = config.num_hidden_layers
        lists = {k: v[:layers] for k, v in vars(config).items() if isinstance(v, list) and len(v) == full}
        for key, value in {**lists, "num_hidden_layers": layers}.items():
            setattr(config, key, value)
    config._attn_implementation = "eager" if step.attention == "eager" else "sdpa"
    return config


def dtype_of(step: Step) -> torch.dtype:
    """The dtype of what is not quantized."""
    return getattr(torch, step.dtype)


def _linear(module: torch.nn.Module) -> tuple[int, int] | None:
    """(outputs, inputs) of a linear layer, None of another."""
    if isinstance(module, torch.nn.Linear):
        return module.out_features, module.in_features
    return (module.nf, module.nx) if isinstance(module, Conv1D) else None


def learn(values: Mapping[str, Any], name: str = "", source: str = "") -> ModelShape:
    """The shape of any causal language model of transformers, read off the model that it builds from the config.

    Raises UserError where transformers does not know the type, does not take the config, or has no causal language
    model of it.
    """
    model_type = values["model_type"]
    where = name or model_type
    config = _config(model_type, values, where)
    with torch.device("meta"):
        model = _model(config, torch.float16, where)
    # Layers may differ in what is read here (Gemma 4's head_dim); what is counted with is the model.
    config.allow_global_per_layer_attribute_access = True
    head = model.get_output_embeddings()
    counts: dict[Linear, int] = {}
    for path, module in model.named_modules():
        size = _linear(module)
        if size is not None and module is not head:
            linear = Linear(path.rpartition(".")[2], *size, getattr(module, "bias", None) is not None)
            counts[linear] = counts.get(linear, 0) + 1
    heads = int(getattr(config, "num_attention_heads", None) or 1)
    kinds = getattr(config, "layer_types", None) or [None]
    period = next(n for n in range(1, len(kinds) + 1) if all(kinds[i] == kinds[i % n] for i in range(len(kinds))))
    return ModelShape(
        name=where,
        model_type=model_type,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=int(getattr(config, "intermediate_size", None) or 4 * config.hidden_size),
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        max_position_embeddings=int(getattr(config, "max_position_embeddings", None) or _LONGEST),
        tie_word_embeddings=bool(getattr(config, "tie_word_embeddings", False)),
        final_logit_softcapping=getattr(config, "final_logit_softcapping", None),
        hf_id=str(values.get("hf_id", "")),
        source=source,
        config=json.dumps(dict(values), default=str),
        learned=Learned(
            family=Family(
                names=tuple(dict.fromkeys(x.name for x in counts if x.name not in without_adapter(model.config))),
                sdpa=bool(model._supports_sdpa),
            ),
            linears=tuple(counts.items()),
            parameters=model.num_parameters(),
            period=period,
        ),
    )


def _quantize(model: Any, double: bool, compute: torch.dtype) -> None:
    """Replace every linear layer but the head by bitsandbytes' Linear4bit with an NF4 weight on meta."""
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import modules

    bnb: Any = modules  # its annotations know less than its constructors take

    def empty(size: int | tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        size = _linear(module)
        if size is None or module is head:
            continue
        rows, cols = size
        blocks = -(-rows * cols // NF4_BLOCK)
        state = QuantState(
            absmax=empty(blocks, dtype=torch.uint8 if double else torch.float32),
            shape=torch.Size((rows, cols)),
            code=empty(16, dtype=torch.float32),
            blocksize=NF4_BLOCK,
            quant_type="nf4",
            dtype=compute,
        )
        if double:
            state.offset = empty((), dtype=torch.float32)
            state.state2 = QuantState(
                absmax=empty(-(-blocks // NF4_NESTED_BLOCK), dtype=torch.float32),
                code=empty(256, dtype=torch.float32),
                blocksize=NF4_NESTED_BLOCK,
                dtype=torch.float32,
            )
            state.nested = True
        layer = bnb.Linear4bit(
            cols, rows, bias=module.bias is not None, compute_dtype=compute, quant_type="nf4", device="meta"
        )
        layer.weight = bnb.Params4bit(
            empty(((rows * cols + 1) // 2, 1), dtype=torch.uint8),
            requires_grad=False,
            quant_state=state,
            blocksize=NF4_BLOCK,
            quant_type="nf4",
            bnb_quantized=True,
        )
        layer.quant_state = state
        if module.bias is not None:
            layer.bias = module.bias
        parent = model.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], layer)


def build(step: Step, device: str = "meta") -> Any:
    """The model as `cruxy-triton finetune` has it before its first step, of `step.shape`'s layers, on `device`."""
    # At import it reports which CPU kernels it lacks; none of them runs here.
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
    dtype = dtype_of(step)
    with torch.device(device), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = _model(_of(step), dtype, step.shape.name)
        if step.shape.learned is None and model.num_parameters() != step.shape.parameters:
            raise UserError(
                f"{step.shape.name}: transformers' model has {model.num_parameters():,} parameters and the planner "
                f"counts {step.shape.parameters:,}: it misreads this config, and its plan does not hold"
            )
        model.requires_grad_(step.lora_r == 0)
        if step.precision == "nf4":
            _quantize(model, step.double_quant, dtype)
            model.is_loaded_in_4bit = True  # what peft asks to choose its 4-bit layer
        if step.kbit_prepared:
            for parameter in model.parameters():
                if parameter.dtype in (torch.float16, torch.bfloat16):
                    parameter.data = parameter.data.float()
        if step.checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        if step.lora_r:
            from peft import LoraConfig, get_peft_model

            model = get_peft_model(
                model,
                LoraConfig(
                    r=step.lora_r,
                    lora_alpha=2 * step.lora_r,
                    target_modules=list(step.targets),
                    lora_dropout=step.lora_dropout,
                    use_dora=step.use_dora,
                    rank_pattern=dict(step.ranks),
                    task_type="CAUSAL_LM",
                ),
            )
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
    model.train()
    return model
