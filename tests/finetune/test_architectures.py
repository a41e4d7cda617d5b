"""The four models of the examples at their real widths and vocabularies, two layers of each: a step of `finetune` on
the CPU against plain transformers and peft, and against the plan.

The run has what it has always: the loss in tiles, attention on repeated heads, checkpointing or not. The other side
has none of it: a model as transformers loads it, peft's adapter, `model(labels=...).loss`.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cruxy_triton.finetune import load, run, train
from cruxy_triton.finetune.folder import RunFolder
from cruxy_triton.finetune.recipe import Recipe

pytestmark = pytest.mark.slow  # up to 8 GB each, which go one at a time because they are in one file

SEQ, LAYERS, R = 96, 2, 8
MODELS: dict[str, dict[str, Any]] = {
    "llama": {  # TinyLlama-1.1B
        "vocab_size": 32_000, "hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32,
        "num_key_value_heads": 4, "max_position_embeddings": 2048,
    },
    "qwen2": {  # Qwen2.5-1.5B
        "vocab_size": 151_936, "hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12,
        "num_key_value_heads": 2, "max_position_embeddings": 32_768, "tie_word_embeddings": True,
    },
    "gemma": {  # Gemma 2B
        "vocab_size": 256_000, "hidden_size": 2048, "intermediate_size": 16_384, "num_attention_heads": 8,
        "num_key_value_heads": 1, "head_dim": 256, "max_position_embeddings": 8192,
    },
    "phi": {  # Phi-2
        "vocab_size": 51_200, "hidden_size": 2560, "intermediate_size": 10_240, "num_attention_heads": 32,
        "num_key_value_heads": 32, "partial_rotary_factor": 0.4, "max_position_embeddings": 2048,
    },
}  # fmt: skip
# Of a gradient's norm: float32 sums in another order. (In NF4 both sides dequantize the same codes.)
GRADIENT_TOLERANCE = 1e-4
LOSS_TOLERANCE = 1e-6


@pytest.fixture(params=MODELS)
def model(request, tmp_path: Path, small_model) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / request.param
    AutoTokenizer.from_pretrained(small_model()).save_pretrained(folder)  # its tokens are among the first 512
    ids = {"eos_token_id": 0, "pad_token_id": 1, "bos_token_id": 0}
    config = AutoConfig.for_model(request.param, num_hidden_layers=LAYERS, **MODELS[request.param], **ids)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def records(path: Path) -> Path:
    """Two records longer than SEQ: each step sees both, of SEQ tokens each."""
    pairs = [("Name some numbers:", range(100, 200)), ("And these are?", range(300, 200, -1))]
    lines = [json.dumps({"prompt": p, "completion": " " + " ".join(map(str, numbers))}) for p, numbers in pairs]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def lasting_bytes(model: torch.nn.Module) -> int:
    parts: list[torch.Tensor] = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        if (state := getattr(parameter, "quant_state", None)) is not None:
            parts += [v for v in state.as_dict().values() if isinstance(v, torch.Tensor)]
    return sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in parts}.values())


def profiled(monkeypatch) -> list[int]:
    """The peak of the CPU's allocator in each training step: what lasts, and the most on top of it."""
    from torch._C._profiler import _EventType
    from torch.profiler import ProfilerActivity, profile
    from torch.profiler._utils import traverse_dfs

    peaks: list[int] = []
    real = train.Trainer.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        lasting = lasting_bytes(self.peft_model)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            marker = torch.empty(123_457, dtype=torch.uint8)
            loss = real(self, *args, **kwargs)
        tree = traverse_dfs(profiler.profiler.kineto_results.experimental_event_tree())
        found = [node.extra_fields for node in tree if node.tag == _EventType.Allocation]
        (before,) = (event.total_allocated for event in found if event.alloc_size == marker.nbytes)
        peaks.append(lasting + max(event.total_allocated for event in found) - before)
        return loss

    monkeypatch.setattr(train.Trainer, "training_step", training_step)
    return peaks


def stock(model: Path, adapter: Path, rows: list[list[int]], labels: list[list[int]], bits: bool) -> tuple[float, dict]:
    """Loss and gradients of both records at the adapter's weights.

    The loss is that of the model's logits in float64: its own, in float32, is 3e-6 off over 256,000 words.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    ) if bits else None  # fmt: skip
    plain = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, quantization_config=quantization, device_map={"": "cpu"} if bits else None
    )
    adapted = PeftModel.from_pretrained(plain, adapter, is_trainable=True)
    adapted.train()
    if bits:
        adapted.enable_input_require_grads()
    output = adapted(input_ids=torch.tensor(rows), labels=torch.tensor(labels))
    output.loss.backward()
    logits, next_ones = output.logits.detach()[:, :-1].double().flatten(0, 1), torch.tensor(labels)[:, 1:].flatten()
    loss = float(torch.nn.functional.cross_entropy(logits, next_ones))
    return loss, {n: p.grad for n, p in adapted.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("bits", [False, True], ids=["float32", "nf4"])
def test_a_step_at_real_widths(bits: bool, model: Path, tmp_path: Path, monkeypatch) -> None:
    from transformers import AutoTokenizer
    from transformers.integrations import sdpa_attention

    from cruxy_triton.finetune import data

    monkeypatch.setattr(sdpa_attention, "use_gqa_in_sdpa", sdpa_attention.use_gqa_in_sdpa)  # put back afterwards
    use = load.use_attention
    monkeypatch.setattr(load, "use_attention", lambda kind, device: use("efficient", device))
    peaks = profiled(monkeypatch)
    path = records(tmp_path / "records.jsonl")
    folder = RunFolder(tmp_path / "run")
    recipe = Recipe(
        str(model), str(path), str(folder.path), eval_data=str(path), load_in_4bit=bits, lora_r=R, optimizer="sgd",
        lr=0.5, lr_schedule="constant", warmup_fraction=0.0, clip="none", guard="off", batch_size=2,
        micro_batch_size=2, max_seq_length=SEQ, gradient_checkpointing=bits, attention="sdpa-cpu", max_steps=2,
        save_steps=1, sample_tokens=0,
    )  # fmt: skip
    result = run.finetune(recipe, folder, run.Hooks(), record_gradients=2)
    assert result.finished
    monkeypatch.undo()
    rows = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    ours = {row["step"]: row["loss"] for row in rows if "loss" in row}
    tokens = [row["tokens"] for row in rows if "loss" in row]
    assert tokens == [2 * SEQ, 2 * SEQ]

    found = data.tokenize([json.loads(line) for line in path.read_text().splitlines()],
                          AutoTokenizer.from_pretrained(model))  # fmt: skip
    fitted, _ = data.fit(found, SEQ)
    ids, labels = ([row[name].tolist() for row in fitted] for name in ("input_ids", "labels"))
    # The second step: B is zero in the first, and with it every gradient of A.
    loss, gradients = stock(model, folder.checkpoints / "checkpoint-1", ids, labels, bits)
    assert ours[2] == pytest.approx(loss, rel=LOSS_TOLERANCE)
    assert abs(ours[2] - ours[1]) > 1000 * LOSS_TOLERANCE, "the adapter says something by then"
    recorded = load_file(folder.path / "gradients" / "step-00002.safetensors")
    assert recorded.keys() == gradients.keys()
    off = {n: float((recorded[n] - g).norm() / g.norm()) for n, g in gradients.items()}
    worst = max(off, key=lambda name: off[name])
    assert off[worst] < GRADIENT_TOLERANCE, worst
    planned = json.loads(folder.run_json.read_text())["plan"]["peak_bytes"]
    assert planned == pytest.approx(peaks[1], rel=0.01)
