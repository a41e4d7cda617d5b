"""The embedded default: a small model made and pre-trained on the spot, and question/answer data for it.

Everything comes from what each Python installation carries: the sources and docstrings of the standard
library. No network, no account, no GPU. The made model goes to a cache folder and is used again.
"""

import ast
import hashlib
import itertools
import json
import math
import os
import random
import shutil
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cruxy_kernels.backends.native import cache_folder
from cruxy_triton import __version__, files
from cruxy_triton.errors import UserError
from cruxy_triton.optimizer import CruxyOptimizer

VOCABULARY = 2048
CONTEXT = 256
PRETRAIN_STEPS = 500
PRETRAIN_BATCH = 16
PRETRAIN_LENGTH = 128
PRETRAIN_LR = 4e-3
TEXT_BYTES = 6_000_000  # of the standard library's sources: enough for the steps above without repeating much
QUESTIONS = 2400
MINIMUM_QUESTIONS = 400

# A broken optimizer must not pass for a working one: the demo fails unless the held-out loss falls by this
# much (nats per token). A run with learning rate 0 changes nothing at all.
REQUIRED_GAIN = 0.5

# The best of eight or nine rates by median over three seeds (profiles/measured/learning_rates_demo.json). A model
# this small wants far larger ones than the defaults.
LEARNING_RATES = {"adamw": 7e-3, "cruxy": 2e-2, "cruxy-lion": 5e-3}
LORA_R = 8  # what they were measured with
STEPS = 200
LENGTH = 128

EOS = "<|end|>"


def free_output(base: str = "runs/demo") -> str:
    """`base`, or the first of base-2, base-3, ... where nothing is yet: a second demo keeps the first."""
    names = (base if n == 1 else f"{base}-{n}" for n in itertools.count(1))
    return next(name for name in names if not Path(name).exists())


def prepare(say: Callable[[str], None], cache: Path | None = None) -> tuple[Path, Path]:
    """Makes (or finds) the demo's model folder and data file; returns both paths."""
    sources = _sources()
    # The text differs between Python versions, and with it the model; the recipe above decides the rest.
    recipe = [__version__, VOCABULARY, PRETRAIN_STEPS, PRETRAIN_BATCH, PRETRAIN_LENGTH, PRETRAIN_LR, QUESTIONS]
    key = hashlib.sha256(repr((recipe, [(p.name, p.stat().st_size) for p in sources])).encode()).hexdigest()[:12]
    folder = (cache or cache_folder()) / f"demo-{key}"
    if not (folder / "model" / "config.json").is_file():
        partial = folder.with_name(f".{folder.name}.{os.getpid()}")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
        except OSError as error:
            raise UserError(
                f"cache folder {partial.parent} cannot be written ({error.strerror}); set CRUXY_CACHE to one that can"
            ) from None
        try:
            _make(sources, partial, say)
            files.move_folder(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    else:
        say(f"using the demo model made earlier in {folder}")
    return folder / "model", folder / "docstrings.jsonl"


def _sources() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3", "encodings"}
    found = sorted(p for p in root.rglob("*.py") if not skipped & set(p.relative_to(root).parts))
    if not found:
        raise UserError(f"this Python has no sources of its standard library in {root}; the demo needs them")
    return found


def _make(sources: list[Path], folder: Path, say: Callable[[str], None]) -> None:
    root = Path(sysconfig.get_paths()["stdlib"])
    questions: dict[str, str] = {}
    pieces: list[str] = []
    for path in sources:
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (OSError, UnicodeDecodeError, SyntaxError):  # a few files of the library are such on purpose
            continue
        module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        pieces.append(source)
        questions |= _docstrings(tree, module)
    records = _records(questions)
    text = _pretraining_text(pieces, {r["answer"] for r in records})
    lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
    files.write_text(folder / "docstrings.jsonl", lines)
    say(f"demo data: {len(records)} questions from docstrings, {len(text) / 1e6:.1f} MB of sources to pre-train on")
    _pretrain(text, folder / "model", say)


def _docstrings(tree: ast.Module, module: str) -> dict[str, str]:
    """Qualified name -> first sentence of its docstring, for the module's public functions and classes."""
    found = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                continue
            name = f"{prefix}.{child.name}"
            if child.name.startswith("_"):
                continue
            if doc := ast.get_docstring(child):
                sentence = " ".join(doc.split("\n\n")[0].split())
                if 20 <= len(sentence) <= 160:
                    found[name] = sentence
            if isinstance(child, ast.ClassDef):
                visit(child, name)

    visit(tree, module)
    return found


def _records(questions: dict[str, str]) -> list[dict[str, str]]:
    """Question/answer records, one for each distinct answer (the same sentence would leak to the held-out split)."""
    by_answer: dict[str, str] = {}
    for name, sentence in sorted(questions.items()):
        by_answer.setdefault(sentence, name)
    if len(by_answer) < MINIMUM_QUESTIONS:
        raise UserError(
            f"only {len(by_answer)} docstrings found in this Python's standard library; the demo needs at least "
            f"{MINIMUM_QUESTIONS} (a Python stripped of docstrings?)"
        )
    items = sorted(by_answer.items(), key=lambda item: item[1])
    random.Random(0).shuffle(items)
    return [{"question": f"What does {name} do?", "answer": sentence} for sentence, name in items[:QUESTIONS]]


def _pretraining_text(pieces: list[str], answers: set[str]) -> str:
    """Sources in random order, without the paragraphs that the questions ask for."""
    random.Random(0).shuffle(pieces)
    heads = {a[:40] for a in answers}
    kept: list[str] = []
    size = 0
    for piece in pieces:
        lines = [ln for ln in piece.split("\n") if ln.strip().strip("\"'ru")[:40] not in heads]
        kept.append("\n".join(lines))
        size += len(kept[-1])
        if size > TEXT_BYTES:
            break
    return f"{EOS}".join(kept)


def _pretrain(text: str, folder: Path, say: Callable[[str], None]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=_bpe(text),
        eos_token=EOS,
        bos_token=EOS,
        pad_token="<|pad|>",
        clean_up_tokenization_spaces=False,
    )
    ids = torch.tensor(
        [i for e in tokenizer.backend_tokenizer.encode_batch(text.split(EOS)) for i in (*e.ids, tokenizer.eos_token_id)]
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=192,
                intermediate_size=512,
                num_hidden_layers=4,
                num_attention_heads=6,
                num_key_value_heads=3,
                max_position_embeddings=CONTEXT,
                tie_word_embeddings=True,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        say(
            f"pre-training a {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameter Llama on "
            f"{len(ids):,} tokens for {PRETRAIN_STEPS} steps"
        )
        optimizer = CruxyOptimizer(model.parameters(), mode="meta3", lr=PRETRAIN_LR, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: min(1.0, (step + 1) / 30) * 0.5 * (1 + math.cos(math.pi * step / PRETRAIN_STEPS)),
        )
        started = time.perf_counter()
        model.train()
        for step in range(1, PRETRAIN_STEPS + 1):
            starts = torch.randint(len(ids) - PRETRAIN_LENGTH, (PRETRAIN_BATCH,))
            batch = ids[starts[:, None] + torch.arange(PRETRAIN_LENGTH)]
            loss = model(input_ids=batch, labels=batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step(loss=loss)
            schedule.step()
            if step % 100 == 0:
                seconds = time.perf_counter() - started
                say(f"  step {step}/{PRETRAIN_STEPS}  loss {loss.detach().item():.3f}  {seconds:.0f} s")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _bpe(text: str) -> "object":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[EOS, "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text[i : i + 10_000] for i in range(0, len(text), 10_000)], trainer)
    return tokenizer
