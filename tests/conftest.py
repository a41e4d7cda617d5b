"""Fixtures shared by all tests: small models and tokenizers made on the spot, and the command line as a process."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# One thread per process: the suite runs in as many processes as there are cores, and OpenMP's waiting threads cost
# more than they bring on models this small. Before torch is imported anywhere.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Sums in the same order, whatever OMP_NUM_THREADS was."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


# Sizes every architecture shares; small enough that a step takes milliseconds.
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def make_model(architecture: str, folder: Path, *, chat: bool = False, **overrides: int) -> Path:
    """Writes a randomly initialised model of `architecture` and a byte-level BPE tokenizer to `folder`."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = Path(argparse.__file__).read_text(encoding="utf-8")
    special = ["<|end|>", "<|pad|>", "<|user|>", "<|assistant|>", "<|system|>"]
    tokenizer.train_from_iterator(
        text.splitlines(),
        trainers.BpeTrainer(
            vocab_size=512,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    values: dict = {**SMALL, "vocab_size": len(fast), "eos_token_id": 0, "pad_token_id": 1, "bos_token_id": 0}
    if architecture in ("gemma", "qwen3"):
        values["head_dim"] = 16
    if architecture == "phi":
        values["num_key_value_heads"] = 4
    config = AutoConfig.for_model(architecture, **{**values, **overrides})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """small_model(architecture, chat=False, **config) -> folder, made once per session."""
    made: dict[tuple, Path] = {}

    def get(architecture: str = "llama", *, chat: bool = False, **overrides: int) -> Path:
        key = (architecture, chat, *sorted(overrides.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp(f"{architecture}{'-chat' if chat else ''}")
            made[key] = make_model(architecture, folder, chat=chat, **overrides)
        return made[key]

    return get


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Question/answer records: GSM8K where it is at hand, else arithmetic of the same form."""
    gsm8k = SHARED_DATA / "gsm8k" / "train.jsonl"
    path = tmp_path_factory.mktemp("data") / "questions.jsonl"
    if gsm8k.is_file():
        lines = gsm8k.read_text(encoding="utf-8").splitlines()[:240]
    else:
        lines = [
            json.dumps({"question": f"What is {a} plus {b}?", "answer": f"{a} + {b} = {a + b}\n#### {a + b}"})
            for a in range(2, 17)
            for b in range(3, 19)
        ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    pairs = [(a, b) for a in range(2, 12) for b in range(3, 13)]
    lines = [json.dumps({"question": f"What is {a} plus {b}?", "answer": f"{a} + {b} = {a + b}"}) for a, b in pairs]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


class Command:
    """Runs `cruxy-triton` as a process, as a user would; PYTHONPATH-free, from a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def environment(self, **extra: str) -> dict[str, str]:
        return {**os.environ, "HF_HUB_OFFLINE": "1", "CRUXY_CACHE": str(self.folder / "cache"), **extra}

    def __call__(
        self, *words: str | Path, timeout: float = 300, input: str = "", **extra: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "cruxy_triton", *map(str, words)],
            cwd=self.folder,
            env=self.environment(**extra),
            capture_output=True,
            text=True,
            timeout=timeout,
            input=input,
        )

    def start(self, *words: str | Path, **extra: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "cruxy_triton", *map(str, words)],
            cwd=self.folder,
            env=self.environment(**extra),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            stdin=subprocess.DEVNULL,
        )


@pytest.fixture
def command(tmp_path: Path) -> Command:
    return Command(tmp_path)
