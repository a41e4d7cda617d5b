"""What `--tiny` puts in the place of a model and its data, so that the other examples run on a CPU in seconds.

The same architecture with random weights and some 100,000 parameters, a tokenizer made of Python's own sources, and
sums to learn. Everything else that an example does is done as it is at full size.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from cruxy_triton.finetune.folder import RunFolder
from cruxy_triton.finetune.recipe import Recipe
from cruxy_triton.finetune.run import Hooks, Result, finetune

SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 16, "max_position_embeddings": 256,
}  # fmt: skip
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_model(architecture: str, chat: bool, folder: Path) -> Path:
    """Writes a model of `architecture` ("llama", "qwen2", "gemma", "phi") with its tokenizer to `folder`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, set_seed

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|pad|>", "<|user|>", "<|assistant|>", "<|system|>"]
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=special, initial_alphabet=letters, show_progress=False
    )  # fmt: skip
    bpe.train_from_iterator(Path(argparse.__file__).read_text(encoding="utf-8").splitlines(), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|pad|>")
    if chat:
        tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    ids = {"eos_token_id": 0, "pad_token_id": 1, "bos_token_id": 0}
    set_seed(0)
    config = AutoConfig.for_model(architecture, vocab_size=len(tokenizer), **SIZES, **ids)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def make_sums(path: Path) -> Path:
    pairs = [(a, b) for a in range(2, 14) for b in range(3, 15)]
    records = [{"question": f"What is {a} plus {b}?", "answer": f"{a} + {b} = {a + b}"} for a, b in pairs]
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return path


def tiny(architecture: str, chat: bool) -> dict[str, Any]:
    """The settings that differ from those at full size."""
    folder = Path(tempfile.mkdtemp(prefix="cruxy-tiny-"))
    return {
        "model": str(make_model(architecture, chat, folder / architecture)),
        "data": str(make_sums(folder / "sums.jsonl")),
        "subset": None,
        "output": f"runs/tiny-{architecture}",
        "device": "cpu",
        "lr": 1e-2,
        "max_steps": 12,
        "max_eval_samples": 8,
        "sample_tokens": 8,
    }


def settings_of(settings: dict[str, Any], about: str, architecture: str, *, chat: bool) -> dict[str, Any]:
    """`settings`, with what the command line of an example says: --tiny, --data, --output."""
    parser = argparse.ArgumentParser(description=about.partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="a stand-in for the model, on the CPU")
    parser.add_argument("--data", help="records of your own: JSONL with question and answer, or messages")
    parser.add_argument("--output", help="folder of the run")
    args = parser.parse_args()
    changed = tiny(architecture, chat) if args.tiny else {}
    typed = {name: value for name, value in (("data", args.data), ("output", args.output)) if value}
    if "data" in typed:
        typed["subset"] = None
    return {**settings, **changed, **typed}


def train(settings: dict[str, Any]) -> Result:
    """The run of `settings`; ends the process where it learned nothing."""
    recipe = Recipe(**settings)
    result = finetune(recipe, RunFolder(recipe.output), Hooks(say=print))
    before, after = result.before["loss"], (result.after or {}).get("loss")
    if after is None or not after < before:
        raise SystemExit(f"the held-out loss went from {before} to {after}: nothing was learned")
    print(f"held-out loss {before:.3f} -> {after:.3f}")
    return result
