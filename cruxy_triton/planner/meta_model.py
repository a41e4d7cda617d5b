"""A model on torch's `meta` device, as `cruxy-triton finetune` has it before its first step: sizes without weights."""

from __future__ import annotations

import json
import logging
import warnings
from typing import Any

import torch

from cruxy_triton.planner.shape import ModelShape
from cruxy_triton.planner.step import Step
from cruxy_triton.planner.workspaces import NF4_BLOCK, NF4_NESTED_BLOCK

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "nf4": torch.float16,
}
_OWN = ("model_type", "hf_id", "aliases", "source", "sources", "name", "config")  # no fields of a transformers config


def _config(shape: ModelShape, attention: str) -> Any:
    """transformers' config from what the shape was read from; from the shape's own fields where it was made by hand."""
    from transformers import AutoConfig

    values = dict(json.loads(shape.config)) if shape.config else {**vars(shape), "hidden_activation": shape.hidden_act}
    values = {key: value for key, value in values.items() if key not in _OWN}
    values |= {"num_hidden_layers": shape.num_hidden_layers, "use_cache": False}
    if isinstance(values.get("layer_types"), list):
        values["layer_types"] = values["layer_types"][: shape.num_hidden_layers]
    config = AutoConfig.for_model(shape.model_type, **values)
    config._attn_implementation = "eager" if attention == "eager" else "sdpa"
    return config


def _quantize(model: torch.nn.Module, double: bool, compute: torch.dtype) -> None:
    """Replace every linear layer but the head by bitsandbytes' Linear4bit with an NF4 weight on meta."""
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import modules

    bnb: Any = modules  # its annotations know less than its constructors take

    def empty(size: int | tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    for name, module in list(model.named_modules()):
        if not isinstance(module, torch.nn.Linear) or name.endswith("lm_head"):
            continue
        rows, cols = module.weight.shape
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
    from transformers import AutoModelForCausalLM

    # At import it reports which CPU kernels it lacks; none of them runs here.
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
    dtype = DTYPES[step.precision]
    with torch.device(device), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = _config(step.shape, step.attention)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
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
                    task_type="CAUSAL_LM",
                ),
            )
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
    model.train()
    return model
