"""The embedded default: a model, and questions about Python's standard library to teach it.

Two of them. "smollm2" is a real chat model of 135 M parameters, which learns to answer from docstrings. "tiny" needs no
network: a model of 2 M parameters made and pre-trained on the spot, which learns to say what is a class, a method or a
function. The questions come from the sources that each Python installation carries. All is kept in a cache folder.
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
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from cruxy_kernels.backends.native import cache_folder
from cruxy_triton import __version__, files
from cruxy_triton.errors import UserError
from cruxy_triton.finetune import smollm2
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

LORA_R = 8
# What `--demo NAME` sets; what is typed wins.
SETTINGS: dict[str, dict[str, Any]] = {
    "smollm2": {
        "lora_r": LORA_R,
        "max_steps": 40,
        "micro_batch_size": 4,
        "max_eval_samples": 32,
        "samples": 3,
        "sample_tokens": 32,
    },
    "tiny": {"lora_r": LORA_R, "max_steps": 200, "max_seq_length": 128, "samples": 60, "sample_tokens": 4},
}
# For these tasks and steps. cruxy's were tried; the others are a half and a quarter of it, as in settings.DEFAULT_LR.
LEARNING_RATES = {
    "smollm2": {"adamw": 1e-3, "cruxy": 2e-3, "cruxy-lion": 5e-4},
    "tiny": {"adamw": 2.5e-3, "cruxy": 5e-3, "cruxy-lion": 1.25e-3},
}

EOS = "<|end|>"


def free_output(base: str = "runs/demo") -> str:
    """`base`, or the first of base-2, base-3, ... where nothing is yet: a second demo keeps the first."""
    names = (base if n == 1 else f"{base}-{n}" for n in itertools.count(1))
    return next(name for name in names if not Path(name).exists())


def defaults(name: str, optimizer: str) -> dict[str, Any]:
    """What the demo sets where nothing is typed."""
    rates = LEARNING_RATES[name]
    return {**SETTINGS[name], **({"lr": rates[optimizer]} if optimizer in rates else {})}


def prepare(name: str, say: Callable[[str], None], cache: Path | None = None) -> tuple[str, str, Path]:
    """Makes (or finds) model and questions of the demo `name`; returns the name, the model and the data file.

    Where SmolLM2 cannot be had the answer is "tiny", and `say` is told why.
    """
    if name == "smollm2":
        try:
            model = smollm2.smollm2(say, cache)
        except smollm2.Unavailable as reason:
            say(f"note: SmolLM2 cannot be had here ({reason}); taking the tiny model, as with --demo tiny")
        else:
            return "smollm2", model, questions(say, cache) / "docstrings.jsonl"
    return "tiny", str(tiny(say, cache)), questions(say, cache) / "kinds.jsonl"


def questions(say: Callable[[str], None], cache: Path | None = None) -> Path:
    """The folder with both data files: docstrings.jsonl (what does it do?) and kinds.jsonl (what is it?)."""
    sources = _sources()

    def make(folder: Path) -> None:
        sentences, kinds = _asked(sources)
        for name, records in (("docstrings", _docstring_records(sentences)), ("kinds", _kind_records(kinds))):
            lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
            files.write_text(folder / f"{name}.jsonl", lines)
            say(f"demo data: {len(records)} questions in {name}.jsonl, from the standard library's sources")

    return _cached("questions", [QUESTIONS], sources, make, cache)


def tiny(say: Callable[[str], None], cache: Path | None = None) -> Path:
    """The folder of the model that is made and pre-trained on the spot."""
    sources = _sources()
    data = questions(say, cache) / "docstrings.jsonl"

    def make(folder: Path) -> None:
        answers = {json.loads(line)["answer"] for line in data.read_text(encoding="utf-8").splitlines()}
        pieces = [text for path in sources if (text := _text(path)) is not None]
        _pretrain(_pretraining_text(pieces, answers), folder, say)

    recipe = [VOCABULARY, PRETRAIN_STEPS, PRETRAIN_BATCH, PRETRAIN_LENGTH, PRETRAIN_LR, QUESTIONS]
    return _cached("tiny", recipe, sources, make, cache)


def right_answers(samples: Sequence[dict[str, str]]) -> tuple[int, int, int]:
    """Of the samples: right before, right after, and right with always the most frequent answer."""
    expected = [s["expected"].strip() for s in samples]
    before, after = (
        sum(s[when].strip() == right for s, right in zip(samples, expected, strict=True))
        for when in ("before", "after")
    )
    return before, after, max(Counter(expected).values(), default=0)


def _cached(
    what: str, recipe: list[Any], sources: list[Path], make: Callable[[Path], None], cache: Path | None
) -> Path:
    """The cache's folder for `what`, filled by `make` where it is not there, and whole or not there."""
    # The sources differ between Python versions, and with them what is made; the recipe decides the rest.
    recipe = [__version__, *recipe]
    key = hashlib.sha256(repr((recipe, [(p.name, p.stat().st_size) for p in sources])).encode()).hexdigest()[:12]
    folder = (cache or cache_folder()) / f"demo-{what}-{key}"
    if not folder.is_dir():
        partial = folder.with_name(f".{folder.name}.{os.getpid()}")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
        except OSError as error:
            raise UserError(
                f"cache folder {partial.parent} cannot be written ({error.strerror}); set CRUXY_CACHE to one that can"
            ) from None
        try:
            make(partial)
            files.move_folder(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def _sources() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3", "encodings"}
    found = sorted(p for p in root.rglob("*.py") if not skipped & set(p.relative_to(root).parts))
    if not found:
        raise UserError(f"this Python has no sources of its standard library in {root}; the demo needs them")
    return found


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):  # a few files of the library are such on purpose
        return None


def _asked(sources: list[Path]) -> tuple[dict[str, str], dict[str, str]]:
    """By qualified name of what is public: the first sentence of its docstring, and whether it is a class, a method
    or a function."""
    root = Path(sysconfig.get_paths()["stdlib"])
    sentences: dict[str, str] = {}
    kinds: dict[str, str] = {}
    for path in sources:
        try:
            tree = ast.parse(_text(path) or "")
        except SyntaxError:
            continue
        module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        found, what = _public(tree, module)
        sentences |= found
        kinds |= what
    return sentences, kinds


def _public(tree: ast.Module, module: str) -> tuple[dict[str, str], dict[str, str]]:
    sentences: dict[str, str] = {}
    kinds: dict[str, str] = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                continue
            name = f"{prefix}.{child.name}"
            if child.name.startswith("_"):
                continue
            is_class, in_class = isinstance(child, ast.ClassDef), isinstance(node, ast.ClassDef)
            kinds[name] = "class" if is_class else "method" if in_class else "function"
            if doc := ast.get_docstring(child):
                sentence = " ".join(doc.split("\n\n")[0].split())
                if 20 <= len(sentence) <= 160:
                    sentences[name] = sentence
            if is_class:
                visit(child, name)

    visit(tree, module)
    return sentences, kinds


def _docstring_records(sentences: dict[str, str]) -> list[dict[str, str]]:
    """Question/answer records, one for each distinct answer (the same sentence would leak to the held-out split)."""
    by_answer: dict[str, str] = {}
    for name, sentence in sorted(sentences.items()):
        by_answer.setdefault(sentence, name)
    if len(by_answer) < MINIMUM_QUESTIONS:
        raise UserError(
            f"only {len(by_answer)} docstrings found in this Python's standard library; the demo needs at least "
            f"{MINIMUM_QUESTIONS} (a Python stripped of docstrings?)"
        )
    return _some([(f"What does {name} do?", sentence) for sentence, name in by_answer.items()])


def _kind_records(kinds: dict[str, str]) -> list[dict[str, str]]:
    return _some([(f"Is {name} a class, a method or a function?", kind) for name, kind in kinds.items()])


def _some(pairs: list[tuple[str, str]]) -> list[dict[str, str]]:
    pairs = sorted(pairs)
    random.Random(0).shuffle(pairs)
    return [{"question": question, "answer": answer} for question, answer in pairs[:QUESTIONS]]


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
