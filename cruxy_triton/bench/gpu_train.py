"""Parts of `bench gpu` that train through `cruxy-triton finetune`: measured peaks under a cap, float16 with scaling.

The models are made here, from the planner's profiles, so nothing is downloaded: a checkpoint whose tensors hold 64 KiB
of random values each, the rest being a hole in the file. Memory does not ask what the values are.
"""

import json
import math
import os
import random
import struct
import threading
import time
from pathlib import Path
from typing import Any

import torch

from cruxy_triton import cli
from cruxy_triton.bench.gpu_device import smi
from cruxy_triton.planner.lookup import profiles

CAP = "4GiB"
MIB = 1 << 20
SHARD_BYTES = 5 * 10**9  # as save_pretrained cuts checkpoints
FILLED_BYTES = 1 << 16
STEPS, BATCH = 2, 4  # the first step has no optimizer state yet
# A CPU trains the same families in this size.
TINY = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512}


def config_of(model: str, *, tiny: bool) -> Any:
    """The transformers config of a profile, or of its family in a small size."""
    from transformers import AutoConfig

    profile = profiles("models")[model]
    values = {name: value for name, value in profile.items() if isinstance(value, (int, float, bool))}
    if tiny:
        values |= TINY
        if profile["model_type"] == "phi":
            values["num_key_value_heads"] = TINY["num_attention_heads"]
    if profile["model_type"] == "phi":
        values.pop("head_dim", None)
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    return AutoConfig.for_model(profile["model_type"], **values, hidden_act=profile["hidden_act"], **tokens)


def write_tokenizer(folder: Path) -> None:
    """A tokenizer whose tokens are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<|end|>", "<|pad|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")
    fast.save_pretrained(folder)


def write_checkpoint(folder: Path, config: Any) -> int:
    """A bfloat16 checkpoint of `config` in `folder`, mostly holes; its bytes."""
    from transformers import AutoModelForCausalLM

    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if config.tie_word_embeddings else set()
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    size = total = 0
    for name, parameter in model.named_parameters():
        if name in tied:
            continue
        nbytes = 2 * parameter.numel()
        if size and size + nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append((name, tuple(parameter.shape)))
        size += nbytes
        total += nbytes
    torch.manual_seed(0)
    where = {}
    for i, tensors in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        where |= {name: file for name, _ in tensors}
        _write_shard(folder / file, tensors)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return total


def _write_shard(path: Path, tensors: list[tuple[str, tuple[int, ...]]]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors:
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        base = file.tell()
        for name, shape in tensors:
            count = min(math.prod(shape), FILLED_BYTES // 2)
            values = torch.randn(count) * 0.02 if len(shape) > 1 else torch.full((count,), float("norm" in name))
            file.seek(base + header[name]["data_offsets"][0])
            file.write(values.to(torch.bfloat16).view(torch.int16).numpy().tobytes())
        file.truncate(base + end)


def write_text(path: Path, characters: int) -> None:
    words = random.Random(0)
    line = lambda: " ".join(str(words.randrange(10**6)) for _ in range(12))  # noqa: E731
    text = ""
    while len(text) < characters:
        text += line() + "\n"
    path.write_text(text, encoding="utf-8")


class Watch(threading.Thread):
    """The most memory that the card had in use, read every 20 ms once CUDA is there."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        before = smi("memory.used")
        self.before = None if before is None else int(float(before[0]) * MIB)
        self.highest = 0
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.02):
            if torch.cuda.is_initialized():
                free, total = torch.cuda.mem_get_info()
                self.highest = max(self.highest, total - free)

    def peak(self) -> int | None:
        """Bytes of this process at its peak, if nothing else came or went; None where the driver cannot be asked."""
        self.ended.set()
        return None if self.before is None or not self.highest else self.highest - self.before


def peak(device: str, model: str, length: int, load_in_4bit: bool, folder: str = "peak") -> dict[str, Any]:
    """Predicted and measured memory of two steps of finetune, as it plans them itself for a card of 4 GiB."""
    work = Path(os.environ.get("TMPDIR", ".")) / folder
    on_cpu = device == "cpu"
    length = min(length, 128) if on_cpu else length
    weights = write_checkpoint(work / "model", config_of(model, tiny=on_cpu))
    write_tokenizer(work / "model")
    write_text(work / "text.txt", 24 * BATCH * length)
    words = ["--load-in-4bit"] if load_in_4bit else ["--dtype", "float32" if on_cpu else "float16"]
    words += ["--device", "cpu"] if on_cpu else ["--vram", CAP]
    watch = Watch()
    if not on_cpu:
        watch.start()
    started = time.monotonic()
    code = cli.main(
        [
            "finetune", str(work / "model"), "--data", str(work / "text.txt"), "--output", str(work / "run"),
            "--max-seq-length", str(length), "--lora-r", "16", "--lora-alpha", "32", "--batch-size", str(BATCH),
            "--max-steps", str(STEPS), "--max-eval-samples", "1", "--sample-tokens", "0", *words,
        ]
    )  # fmt: skip
    seconds = time.monotonic() - started
    run_json = work / "run" / "run.json"
    run = json.loads(run_json.read_text(encoding="utf-8")) if run_json.exists() else {}
    if run.get("status") == "out of memory":
        return {"status": "out of memory", "predicted": _predicted(run), "failures": ["the card's cap was reached"]}
    if code != 0 or "result" not in run:
        return {"failures": [f"finetune ended with exit code {code}"]}
    found = {"model": model, "weights_bytes": weights, "seconds": round(seconds, 1), "predicted": _predicted(run)}
    if on_cpu:
        return found | {"note": "a CPU's allocator has no cap and keeps no account: nothing was measured"}
    result, predicted = run["result"], found["predicted"]
    measured = {
        "allocated_bytes": result["peak_allocated_bytes"],
        "reserved_bytes": result["peak_reserved_bytes"],
        "process_bytes": watch.peak(),
    }
    off = {
        name: round(predicted[name] / value - 1, 4) for name, value in measured.items() if value and predicted.get(name)
    }
    # The driver's own share of the process differs by card far more than by configuration: it is told, not judged.
    bar, here = predicted["error_bytes"], measured["allocated_bytes"]
    failures = []
    if abs(here - predicted["allocated_bytes"]) > bar:
        told = (here, predicted["allocated_bytes"], bar)
        failures.append(
            "allocated {:,.0f} MiB; predicted {:,.0f}, give or take {:,.0f}".format(*(n / MIB for n in told))
        )
    return found | {"measured": measured, "predicted_over_measured_minus_1": off, "failures": failures}


def _predicted(run: dict[str, Any]) -> dict[str, Any]:
    plan = run.get("plan") or {}
    found = {name: plan.get(name) for name in ("allocated_bytes", "reserved_bytes", "error_bytes", "config", "notes")}
    return found | {"process_bytes": plan.get("peak_bytes")}


def float16_run(device: str, steps: int = 30, folder: str = "float16") -> dict[str, Any]:
    """A small model from random weights on arithmetic, in float16 with loss scaling: the held-out loss falls."""
    from transformers import AutoModelForCausalLM

    work = Path(os.environ.get("TMPDIR", ".")) / folder
    torch.manual_seed(0)
    model = work / "model"
    AutoModelForCausalLM.from_config(config_of("tinyllama-1.1b", tiny=True)).save_pretrained(model)
    write_tokenizer(model)
    pairs = [(a, b) for a in range(2, 17) for b in range(3, 19)]
    records = [{"prompt": f"What is {a} plus {b}?", "completion": f" {a} + {b} = {a + b}"} for a, b in pairs]
    (work / "sums.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n", encoding="utf-8")
    dtype = "float32" if device == "cpu" else "float16"  # finetune refuses float16 on a CPU
    code = cli.main(
        [
            "finetune", str(model), "--data", str(work / "sums.jsonl"), "--output", str(work / "run"), "--lr", "0.01",
            "--max-steps", str(steps), "--batch-size", "4", "--max-seq-length", "64", "--lora-r", "8",
            "--sample-tokens", "0", "--dtype", dtype, *(["--device", "cpu"] if device == "cpu" else []),
        ]
    )  # fmt: skip
    if code != 0:
        return {"failures": [f"finetune ended with exit code {code}"]}
    run = json.loads((work / "run" / "run.json").read_text(encoding="utf-8"))
    lines = (work / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if "eval_loss" not in row]
    before, after = run["before"]["loss"], run["result"]["after"]["loss"]
    skipped = max(row.get("skipped_steps") or 0 for row in rows)
    failures = (
        [] if after < before - 0.2 else [f"the held-out loss went from {before:.3f} to {after:.3f}; expected 0.2 less"]
    )
    if not math.isfinite(after) or any(row["loss"] is None for row in rows):
        failures.append("a loss is not finite")
    if skipped > steps // 2:
        failures.append(f"{skipped} of {steps} steps were skipped")
    found = {"dtype": dtype, "loss_before": before, "loss_after": after, "steps": steps, "skipped_steps": skipped}
    return found | {"losses": [row["loss"] for row in rows], "failures": failures}
