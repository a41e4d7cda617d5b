"""Loading: a causal language model by Hugging Face id or folder, its tokenizer, and LoRA on top.

Precision by device: float32 on a CPU, bfloat16 where the compute capability is 8.0 or more, float16 under
autocast with a gradient scaler on older GPUs. The adapters are always float32.
"""

import json
from pathlib import Path
from typing import Any

import torch

from cruxy_triton.errors import UserError
from cruxy_triton.finetune.recipe import Recipe
from cruxy_triton.settings import resolve_dtype

WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin")


def device_of(recipe: Recipe) -> torch.device:
    """The device to train on; raises UserError when CUDA is asked for and absent."""
    if recipe.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device here; `cruxy-triton doctor` says why")
    if recipe.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(recipe.device)


def dtype_of(recipe: Recipe, device: torch.device) -> torch.dtype:
    """The base model's dtype, by request or by what the device computes natively."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    return getattr(torch, resolve_dtype(recipe.dtype, device.type, capability))


def config_of(recipe: Recipe) -> Any:
    """The transformers config of `recipe.model`, which is checked to be loadable as a causal LM."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = Path(recipe.model).expanduser()
    if folder.is_dir():
        _check_folder(folder)
    elif folder.exists():
        raise UserError(f"model {recipe.model} is a file; expected a folder with config.json, or a Hugging Face id")
    elif recipe.model.count("/") > 1 or recipe.model.startswith((".", "~", "/")):
        raise UserError(f"model folder {recipe.model} does not exist")
    try:
        config = AutoConfig.from_pretrained(
            _source(recipe), revision=recipe.revision, trust_remote_code=recipe.trust_remote_code
        )
    except Exception as error:
        raise UserError(_why_not_loaded(recipe, error)) from error
    loadable = type(config) in AutoModelForCausalLM._model_mapping or (
        recipe.trust_remote_code and "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    )
    if not loadable:
        raise UserError(
            f"model {recipe.model} is of type {config.model_type!r}, which is no causal language model; expected one "
            "that transformers loads with AutoModelForCausalLM (llama, qwen2, qwen3, gemma, phi, mistral, ...)"
        )
    return config


def _source(recipe: Recipe) -> str:
    folder = Path(recipe.model).expanduser()
    return str(folder) if folder.is_dir() else recipe.model


def _check_folder(folder: Path) -> None:
    config_path = folder / "config.json"
    if (folder / "adapter_config.json").is_file() and not config_path.is_file():
        raise UserError(f"{folder} holds a LoRA adapter, not a model; give the base model that the adapter belongs to")
    if not config_path.is_file():
        raise UserError(f"{folder} has no config.json; expected a model folder as save_pretrained writes it")
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{config_path} cannot be read as JSON: {error}") from None
    if not isinstance(config, dict) or not ("model_type" in config or "auto_map" in config):
        raise UserError(f"{config_path} names no model_type; expected the config of a transformers model")
    if not any(any(folder.glob(pattern)) for pattern in WEIGHT_PATTERNS):
        raise UserError(f"{folder} has no weights; expected one of {', '.join(WEIGHT_PATTERNS)}")


def _why_not_loaded(recipe: Recipe, error: Exception) -> str:
    text = str(error)
    first_line = text.strip().partition("\n")[0]
    if Path(recipe.model).expanduser().is_dir():
        return f"the model in {recipe.model} cannot be loaded: {first_line}"
    if "gated" in text.lower():
        return (
            f"model {recipe.model} is gated: accept its licence on its Hugging Face page, then log in with "
            "`hf auth login`"
        )
    return (
        f"model {recipe.model} is neither a folder here nor a Hugging Face model that could be reached: check the "
        f"spelling (owner/name) and the network ({first_line})"
    )


def tokenizer_of(recipe: Recipe) -> Any:
    """The model's tokenizer, with a padding token."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            _source(recipe), revision=recipe.revision, trust_remote_code=recipe.trust_remote_code
        )
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0]
        raise UserError(
            f"the tokenizer of {recipe.model} cannot be loaded ({first_line}); a model folder needs tokenizer.json or "
            "the files of its tokenizer class"
        ) from error
    if tokenizer.eos_token is None:
        raise UserError(f"the tokenizer of {recipe.model} has no end-of-sequence token; set eos_token in its config")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def max_length_of(config: Any) -> int | None:
    """The longest sequence (tokens) that the model was made for; None when its config does not say."""
    text_config = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        if isinstance(length := getattr(text_config, name, None), int):
            return length
    return None


def model_of(
    recipe: Recipe, config: Any, device: torch.device, dtype: torch.dtype, attention: str | None = None
) -> Any:
    """The base model, frozen, on `device`, in `dtype` or in 4-bit NF4 (bitsandbytes).

    `attention` is "sdpa" or "eager", what the plan counts with; None leaves transformers' choice.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = None
    if recipe.load_in_4bit:
        _require_bitsandbytes()
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=recipe.double_quant,
            bnb_4bit_compute_dtype=dtype,
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            _source(recipe),
            config=config,
            revision=recipe.revision,
            trust_remote_code=recipe.trust_remote_code,
            dtype=dtype,
            attn_implementation=attention,
            quantization_config=quantization,
            # bitsandbytes quantizes while a weight is placed, so that the whole model never lies there unquantized.
            device_map={"": device} if recipe.load_in_4bit or device.type == "cuda" else None,
        )
    except torch.OutOfMemoryError:
        raise UserError(
            f"the weights of {recipe.model} do not fit the memory allowed; try --load-in-4bit or a smaller model "
            "(`cruxy-triton plan` says what fits)"
        ) from None
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(_why_not_loaded(recipe, error)) from error
    model.requires_grad_(False)
    model.config.use_cache = False
    module: Any
    for module in model.modules():
        # On CPUs with AVX512-BF16 bitsandbytes repacks a weight at its first use in evaluation mode, for a kernel
        # that has no backward; training after an evaluation would then lose the gradient of every layer below.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def use_attention(kind: str | None, device: torch.device) -> str | None:
    """transformers' name for the attention `kind` of the settings; None leaves its choice.

    Makes PyTorch and transformers take that kernel for the rest of the process. "efficient" repeats grouped key/value
    heads instead of passing `enable_gqa=True` to SDPA: with it PyTorch has only the math kernel before compute
    capability 8.0, which keeps whole score matrices; on repeated heads the memory-efficient kernel runs. "flash" is
    PyTorch's own choice, which falls back where a batch is padded: the flash kernel takes no mask.
    """
    if kind == "efficient":
        from transformers.integrations import sdpa_attention

        sdpa_attention.use_gqa_in_sdpa = lambda *args, **kwargs: False
    if device.type == "cuda":
        own_choice = kind not in ("efficient", "math")
        torch.backends.cuda.enable_flash_sdp(own_choice)
        torch.backends.cuda.enable_cudnn_sdp(own_choice)
        torch.backends.cuda.enable_mem_efficient_sdp(kind != "math")
    return kind if kind in (None, "eager") else "sdpa"


def _require_bitsandbytes() -> None:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise UserError(f"--load-in-4bit needs the package bitsandbytes ({error}); pip install bitsandbytes") from None


def add_lora(model: Any, recipe: Recipe) -> Any:
    """Wraps `model` in a peft model with float32 LoRA adapters on `recipe.target_modules`, drawn by `recipe.seed`."""
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    set_seed(recipe.seed)
    targets: Any = recipe.target_modules
    lora = LoraConfig(
        r=recipe.lora_r,
        # peft declares an int but computes alpha / r, so halves are as good
        lora_alpha=recipe.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=recipe.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, lora)
    except ValueError as error:
        names = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)})
        raise UserError(
            f"--target-modules {' '.join(recipe.target_modules)} does not match this model; its linear layers are "
            f"{', '.join(names)} ({str(error).partition(chr(10))[0]})"
        ) from None
