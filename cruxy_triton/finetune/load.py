"""Loading: a causal language model by Hugging Face id or folder, its tokenizer, and LoRA on top, each read once.

`config_of` resolves the name: a folder becomes absolute and a revision its commit in the recipe, so that what
comes after (tokenizer, weights, adapter, a resumed run) means the same model without looking it up again.

Precision by device: float32 on a CPU, bfloat16 where the compute capability is 8.0 or more, float16 under
autocast with a gradient scaler on older GPUs. The adapters are always float32.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cruxy_triton.environment import expect_no_hub_in_vain
from cruxy_triton.errors import UserError
from cruxy_triton.finetune.memory import ran_out
from cruxy_triton.finetune.recipe import Recipe
from cruxy_triton.settings import pattern_of, resolve_dtype

WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin")
# Of the weights that NF4 is for (all matrices but embeddings and head) so many must be in 4 bits, or the plan is void.
MIN_QUANTIZED = 0.95


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
    """The transformers config of `recipe.model`, which is checked to be loadable as a causal LM.

    Fills in what the name and the config decide of the recipe: the folder's absolute path or the commit of a
    Hugging Face id, and for a checkpoint that is quantized already `load_in_4bit` and `double_quant`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = Path(recipe.model).expanduser()
    if folder.is_dir():
        recipe.model = os.path.abspath(folder)
        _check_folder(Path(recipe.model))
    elif folder.exists():
        raise UserError(f"model {recipe.model} is a file; expected a folder with config.json, or a Hugging Face id")
    elif recipe.model.count("/") > 1 or recipe.model.startswith((".", "~", "/")):
        raise UserError(f"model folder {recipe.model} does not exist")
    else:
        expect_no_hub_in_vain()
    try:
        config = AutoConfig.from_pretrained(
            recipe.model, revision=recipe.revision, trust_remote_code=recipe.trust_remote_code
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
    recipe.revision = getattr(config, "_commit_hash", None) or recipe.revision
    if quantization := _quantization_of(config):
        method = quantization.get("quant_method")
        if method != "bitsandbytes" or not quantization.get("load_in_4bit"):
            raise UserError(
                f"model {recipe.model} is quantized already, with {method}; expected plain weights, or the 4-bit ones "
                "of bitsandbytes"
            )
        if recipe.method == "full":
            raise UserError(
                f"model {recipe.model} is kept in 4 bits, and 4-bit weights cannot learn; give the plain model that it "
                "was made of, or leave --method full out"
            )
        recipe.load_in_4bit = True
        recipe.double_quant = bool(quantization.get("bnb_4bit_use_double_quant"))
    return config


def _quantization_of(config: Any) -> dict[str, Any] | None:
    found = getattr(config, "quantization_config", None)
    return found if found is None or isinstance(found, dict) else found.to_dict()


def _check_folder(folder: Path) -> None:
    config_path = folder / "config.json"
    if (folder / "adapter_config.json").is_file() and not config_path.is_file():
        raise UserError(f"{folder} holds a LoRA adapter, not a model; give the base model that the adapter belongs to")
    if not config_path.is_file():
        raise UserError(f"{folder} has no config.json; expected a model folder as save_pretrained writes it")
    if not any(any(folder.glob(pattern)) for pattern in WEIGHT_PATTERNS):
        raise UserError(f"{folder} has no weights; expected one of {', '.join(WEIGHT_PATTERNS)}")


def _why_not_loaded(recipe: Recipe, error: Exception) -> str:
    text = str(error)
    first_line = text.strip().partition("\n")[0]
    folder = Path(recipe.model)
    if "trust_remote_code" in text or "custom code" in text:
        return (
            f"model {recipe.model} brings code of its own: read it, and if you trust it give --trust-remote-code "
            "(it runs with your rights)"
        )
    if folder.is_dir():
        if "JSON" in text:
            return f"{folder / 'config.json'} cannot be read as JSON: {first_line}"
        if "model_type" in text and "does not recognize" not in text:
            return f"{folder / 'config.json'} names no model_type that transformers knows: {first_line}"
        return f"the model in {folder} cannot be loaded: {first_line}"
    if "gated" in text.lower():
        return (
            f"model {recipe.model} is gated: accept its licence on its Hugging Face page, then log in with "
            "`hf auth login`"
        )
    return (
        f"model {recipe.model} is neither a folder here nor a Hugging Face model that could be reached: check the "
        f"spelling (owner/name) and the network ({first_line})"
    )


def tokenizer_of(recipe: Recipe, config: Any) -> Any:
    """The model's tokenizer, with a padding token."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            recipe.model, config=config, revision=recipe.revision, trust_remote_code=recipe.trust_remote_code
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


@dataclass(frozen=True)
class Weights:
    """What lies in memory after loading: elements in 4 bits, and elements of all weights.

    beyond: bytes of linear layers that a checkpoint keeps out of its 4 bits, above those that the plan has for them.
    """

    quantized: int
    total: int
    beyond: int = 0

    def __str__(self) -> str:
        share = f", {self.quantized / self.total:.0%} of them in 4 bits" if self.quantized else ""
        return f"{self.total:,} weights{share}"


def model_of(
    recipe: Recipe,
    config: Any,
    device: torch.device,
    dtype: torch.dtype,
    attention: str | None = None,
    checkpoint: Path | None = None,
) -> tuple[Any, Weights]:
    """The base model, frozen, on `device`, in `dtype` or in 4-bit NF4 (bitsandbytes), and what was loaded.

    `attention` is "sdpa" or "eager", what the plan counts with; None leaves transformers' choice. `checkpoint` is a
    folder with weights to take in place of the base's. Raises UserError where weights are missing, damaged or of
    another shape, and where NF4 was asked for and not had.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = None
    if recipe.load_in_4bit:
        _require_bitsandbytes()
        if (already := _quantization_of(config)) is None:
            quantization = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=recipe.double_quant,
                bnb_4bit_compute_dtype=dtype,
            )
        else:  # made elsewhere, perhaps to compute in bfloat16, which this device may only emulate
            config.quantization_config = {**already, "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch.")}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            recipe.model if checkpoint is None else str(checkpoint),
            config=config,
            revision=recipe.revision if checkpoint is None else None,
            trust_remote_code=recipe.trust_remote_code,
            dtype=dtype,
            attn_implementation=attention,
            quantization_config=quantization,
            # bitsandbytes quantizes while a weight is placed, so that the whole model never lies there unquantized.
            device_map={"": device} if recipe.load_in_4bit or device.type == "cuda" else None,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
        )
    except Exception as error:
        if ran_out(error):
            raise UserError(
                f"the weights of {recipe.model} do not fit the memory allowed; try --load-in-4bit or a smaller model "
                "(`cruxy-triton plan` says what fits)"
            ) from None
        raise UserError(_damaged_file(recipe) or _why_not_loaded(recipe, error)) from error
    model, info = loaded
    _check_loaded(recipe, info)
    model.requires_grad_(False)
    model.config.use_cache = False
    module: Any
    for module in model.modules():
        # On CPUs with AVX512-BF16 bitsandbytes repacks a weight at its first use in evaluation mode, for a kernel
        # that has no backward; training after an evaluation would then lose the gradient of every layer below.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model, _count(model, recipe, asked=quantization is not None)


def _check_loaded(recipe: Recipe, info: dict[str, Any]) -> None:
    """Raises UserError for weights that transformers has filled with random numbers."""
    wrong = [(name, "is missing") for name in sorted(info["missing_keys"])]
    wrong += [(n, f"has shape {list(a)} instead of {list(b)}") for n, a, b in sorted(info["mismatched_keys"])]
    if wrong:
        shown = "; ".join(f"{name} {what}" for name, what in wrong[:3]) + ("; ..." if len(wrong) > 3 else "")
        raise UserError(
            f"{len(wrong)} weights of {recipe.model} cannot be used: {shown}. They would be random numbers, different "
            "in each run, and what is trained worthless: expected all weights that config.json describes"
        )


def _damaged_file(recipe: Recipe) -> str | None:
    """A sentence about the first weight file that cannot be opened; None when all can."""
    from safetensors import SafetensorError, safe_open

    folder = Path(recipe.model)
    if not folder.is_dir():
        import huggingface_hub

        found = huggingface_hub.try_to_load_from_cache(recipe.model, "config.json", revision=recipe.revision)
        if not isinstance(found, str):
            return None
        folder = Path(found).parent
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            return f"{path} is damaged or cut off ({error}): copy or download it again"
    return None


def _count(model: Any, recipe: Recipe, asked: bool) -> Weights:
    """Counts elements by what they really are; refuses NF4 that was asked for and is none."""
    ends = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    if (head := model.get_output_embeddings()) is not None:
        ends.add(id(head.weight))
    total = quantized = matrices = 0
    left: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        size = parameter.numel() if state is None else state.shape.numel()
        total += size
        if state is not None:
            quantized += size
        elif parameter.ndim < 2 or id(parameter) in ends:
            continue
        else:
            left[name] = size
        matrices += size
    # Not for a checkpoint that is quantized already: who made it may have left out layers on purpose.
    if asked and quantized < MIN_QUANTIZED * matrices:
        largest = max(left, key=lambda name: left[name])
        raise UserError(
            f"only {quantized / matrices:.0%} of the {matrices:,} weights of {recipe.model} that --load-in-4bit is "
            f"for would be in 4 bits ({type(model).__name__} keeps {largest} and {len(left) - 1} others in forms that "
            "bitsandbytes does not quantize), and the plan would not hold; leave --load-in-4bit out or take another "
            "model"
        )
    kept = [
        m.weight
        for m in model.modules()
        if isinstance(m, torch.nn.Linear) and id(m.weight) not in ends and not hasattr(m.weight, "quant_state")
    ]
    beyond = int(sum(w.numel() * (w.element_size() - 0.5) for w in kept)) if recipe.load_in_4bit else 0
    return Weights(quantized, total, beyond)


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
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers import set_seed
    from transformers.pytorch_utils import Conv1D

    from cruxy_triton.planner.meta_model import without_adapter

    set_seed(recipe.seed)
    targets: Any = recipe.target_modules
    head = model.get_output_embeddings()
    linear = [n for n, m in model.named_modules() if isinstance(m, (torch.nn.Linear, Conv1D)) and m is not head]
    excluded: list[str] = []
    if targets == ["all-linear"]:
        targets = "all-linear"
        excluded = without_adapter(model.config)
    lora = LoraConfig(
        r=recipe.lora_r,
        # peft declares an int but computes alpha / r, so halves are as good
        lora_alpha=recipe.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=recipe.lora_dropout,
        use_rslora=recipe.use_rslora,
        use_dora=recipe.use_dora,
        rank_pattern={name: int(rank) for name, rank in pattern_of(recipe.rank_pattern).items()},
        alpha_pattern=pattern_of(recipe.alpha_pattern),  # type: ignore[arg-type]
        target_modules=targets,
        exclude_modules=excluded or None,
        task_type="CAUSAL_LM",
        revision=recipe.revision,
    )
    try:
        adapted = get_peft_model(model, lora)
    except ValueError as error:
        names = sorted({name.rpartition(".")[2] for name in linear})
        if "lora_dropout" in str(error):
            raise UserError(
                f"--lora-dropout {recipe.lora_dropout} cannot be had: {recipe.model} holds its experts in one tensor, "
                "on which peft has no dropout; leave it out"
            ) from None
        raise UserError(
            f"--target-modules {' '.join(recipe.target_modules)} does not match this model; its linear layers are "
            f"{', '.join(names) or 'none'} ({str(error).partition(chr(10))[0]})"
        ) from None
    _check_patterns(adapted, recipe)
    if isinstance(model.get_output_embeddings(), BaseTunerLayer):
        raise UserError(
            f"--target-modules {' '.join(recipe.target_modules)} takes in the output layer, which TRL's loss reads "
            "past its adapter; leave that one out"
        )
    return adapted


def _check_patterns(adapted: Any, recipe: Recipe) -> None:
    """Raises UserError for a pattern that no adapter follows; peft goes on without it."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import get_pattern_key

    layers = [name for name, module in adapted.base_model.model.named_modules() if isinstance(module, BaseTunerLayer)]
    for flag, words in (("--rank-pattern", recipe.rank_pattern), ("--alpha-pattern", recipe.alpha_pattern)):
        keys = list(pattern_of(words))
        followed = {get_pattern_key(keys, name) for name in layers}
        if idle := [key for key in keys if key not in followed]:
            ends = sorted({name.rpartition(".")[2] for name in layers})
            raise UserError(
                f"{flag} {idle[0]} concerns no layer with an adapter, or each follows an earlier pattern; these layers "
                f"are {', '.join(ends)}"
            )
