"""What becomes of an adapter: merged it answers as it did, and `generate` asks it as its training did."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cruxy_triton.errors import UserError
from cruxy_triton.finetune import adapter, run
from cruxy_triton.finetune.folder import RunFolder
from cruxy_triton.finetune.recipe import Recipe

ADAPTER = Path("adapter") / "adapter_model.safetensors"


@pytest.fixture
def trained(tmp_path: Path, small_model, sums: Path) -> Callable[..., Path]:
    """trained(**recipe) -> the folder of a short run of a small model, with a rate that changes its answers."""

    def go(**settings) -> Path:
        folder = RunFolder(tmp_path / settings.pop("output", "run"))
        few = {
            "max_steps": 4, "batch_size": 2, "micro_batch_size": 2, "max_seq_length": 64, "max_eval_samples": 6,
            "samples": 2, "sample_tokens": 8, "lr": 0.05, "model": str(small_model()), "data": str(sums),
        }  # fmt: skip
        recipe = Recipe(**{**few, "output": str(folder.path), **settings})
        run.finetune(recipe, folder, run.Hooks())
        return folder.path

    return go


def logits_by(load: Callable[[], torch.nn.Module]) -> torch.Tensor:
    ids = torch.arange(20, 60)[None]
    with torch.no_grad():
        return load().eval()(input_ids=ids).logits


def plain(folder: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    return logits_by(lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=dtype))


def with_peft(base: Path, folder: Path) -> torch.Tensor:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return logits_by(lambda: PeftModel.from_pretrained(model, folder / "adapter"))


@pytest.mark.parametrize("architecture", ["llama", "gemma", "gpt2"])
def test_a_merged_model_answers_as_base_and_adapter_do(architecture: str, trained, small_model, tmp_path: Path) -> None:
    base = small_model(architecture)
    kinds = {"llama": {"use_rslora": True}, "gemma": {"use_dora": True, "rank_pattern": ["q_proj=4", "v_proj=24"]}}
    folder = trained(model=str(base), **kinds.get(architecture, {}))
    assert adapter.merge(adapter.find(str(folder)), tmp_path / "merged") == "float32"
    together = with_peft(base, folder)
    assert torch.allclose(plain(tmp_path / "merged"), together, atol=1e-5 * float(together.abs().max()))
    assert (together - plain(base)).abs().max() > 0.05 * together.abs().max(), "the adapter must say something"
    assert "merged into the weights here (float32)" in (tmp_path / "merged" / "README.md").read_text()
    adapter.merge(adapter.find(str(folder / "adapter")), tmp_path / "half", "bfloat16")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    assert torch.allclose(plain(tmp_path / "half"), together, atol=0.05 * float(together.abs().max()))


@pytest.mark.slow
def test_the_real_model_merged_answers_as_base_and_adapter_do(tmp_path: Path) -> None:
    """SmolLM2-135M-Instruct under an adapter on every linear layer, in float32 and in the dtype it is kept in."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from cruxy_triton.finetune import smollm2

    try:
        base = smollm2.smollm2()
    except smollm2.Unavailable as reason:
        pytest.skip(str(reason))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    asked = [{"role": "user", "content": "What does shutil.rmtree do?"}]
    ids = AutoTokenizer.from_pretrained(base).apply_chat_template(
        asked, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )

    def logits(model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(**ids).logits[0].float()

    together = logits(adapted)
    with adapted.disable_adapter():
        alone = logits(adapted)
    size = float(together.abs().max())
    assert (together - alone).abs().max() > 0.1 * size, "the adapter must say something"
    for dtype, tolerance in (("float32", 1e-5), (None, 1e-2)):
        output = tmp_path / f"merged-{dtype}"
        kept = adapter.merge(adapter.find(str(tmp_path / "adapter"), base), output, dtype)
        assert kept == (dtype or "float16")
        merged = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
        assert torch.allclose(logits(merged), together, rtol=0, atol=tolerance * size), dtype


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / ADAPTER)


def test_rslora_scales_by_the_root_and_lora_plus_moves_b_faster(trained) -> None:
    """One step of plain descent from B = 0, where nothing but B moves: B is proportional to scale and rate."""
    one = {"max_steps": 1, "optimizer": "sgd", "lr": 1e-4, "lora_r": 16, "sample_tokens": 0}
    usual = weights(trained(output="usual", **one))
    plus = weights(trained(output="plus", loraplus_lr_ratio=8.0, **one))
    for name, before in usual.items():
        assert torch.allclose(plus[name], (8 if "lora_B" in name else 1) * before, rtol=1e-5, atol=0), name
    folder = trained(output="root", use_rslora=True, **one)
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["use_rslora"] is True
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = json.loads((folder / "run.json").read_text())["recipe"]["model"]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder / "adapter")
    assert {m.scaling["default"] for m in model.modules() if hasattr(m, "lora_A")} == {32 / 16**0.5}


def test_dora_and_patterns_are_those_of_peft_and_planned(trained) -> None:
    kinds = {
        "use_dora": True, "lora_r": 8, "rank_pattern": [r"layers\.0\.self_attn\.q_proj=4", "v_proj=24", "q_proj=8"],
        "alpha_pattern": ["v_proj=6"],
    }  # fmt: skip
    folder = trained(**kinds)
    found = weights(folder)
    heights = {name: len(found[f"base_model.model.model.layers.{name}.lora_A.weight"]) for name in (
        "0.self_attn.q_proj", "1.self_attn.q_proj", "1.self_attn.v_proj", "1.mlp.up_proj")}  # fmt: skip
    assert list(heights.values()) == [4, 8, 24, 8]
    lengths = {name: w for name, w in found.items() if "lora_magnitude_vector" in name}
    assert len(lengths) == 14
    from transformers import AutoModelForCausalLM

    record = json.loads((folder / "run.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(record["recipe"]["model"], dtype=torch.float32)
    before = base.get_submodule("model.layers.1.mlp.up_proj").weight.norm(dim=1)
    after = next(w for name, w in lengths.items() if "1.mlp.up_proj" in name)
    assert not torch.equal(before, after), "the lengths do not learn"
    assert torch.allclose(before, after, rtol=0.5)
    # One layer's q_proj has a smaller rank than the other's, for which the plan counts the larger one in both.
    beyond = 4 * (64 + 64)
    assert record["plan"]["trainable_parameters"] == record["trainable_parameters"] + beyond
    from peft import PeftModel

    model = PeftModel.from_pretrained(base, folder / "adapter")
    assert model.get_submodule("base_model.model.model.layers.0.self_attn.v_proj").scaling == {"default": 6 / 24}
    card = (folder / "adapter" / "README.md").read_text()
    assert "| use_dora | True |" in card
    assert "| rank_pattern |" in card
    assert "with DoRA, rank layers" in (folder / "report.md").read_text()
    with pytest.raises(UserError, match="--rank-pattern q_prj concerns no layer with an adapter"):
        trained(output="other", rank_pattern=["q_prj=4"])
    with pytest.raises(UserError, match="--alpha-pattern v_proj concerns no layer"):
        trained(output="other", alpha_pattern=["v_proj=4"], target_modules=["q_proj"])


@pytest.mark.parametrize("text", ["q_proj", "q_proj=", "q_proj=0", "=4", "q_proj=2.5", "q_proj=5000", "(=4", "a=1,a=2"])
def test_a_pattern_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"--rank-pattern is .*; expected names of layers with numbers above 0, as"):
        Recipe(model="m", data="d", output="o", rank_pattern=text.split(","))


def test_an_adapter_on_tied_embeddings_is_merged_into_them_alone(small_model, tmp_path: Path) -> None:
    """The head shares their table and has no adapter."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = small_model("gemma")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["embed_tokens"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    adapter.merge(adapter.find(str(tmp_path / "adapter"), str(base)), tmp_path / "merged")
    together = with_peft(base, tmp_path)
    assert torch.allclose(plain(tmp_path / "merged"), together, atol=1e-5 * float(together.abs().max()))


def test_generate_answers_as_the_run_did(trained, capsys) -> None:
    """The sample in run.json is the answer of the trained model to the same question, in the same words."""
    from cruxy_triton.cli import main

    folder = trained(sample_tokens=8)
    samples = json.loads((folder / "run.json").read_text())["samples"]
    assert [s["before"] != s["after"] for s in samples] == [True, True]
    question = samples[0]["prompt"].removeprefix("Question: ").removesuffix("\nAnswer:")
    assert main(["generate", str(folder), "--prompt", question, "--max-new-tokens", "8"]) == 0
    assert capsys.readouterr().out.strip() == samples[0]["after"]
    assert main(["generate", str(folder / "adapter"), "--prompt", samples[0]["prompt"], "--raw",
                 "--max-new-tokens", "8"]) == 0  # fmt: skip
    assert capsys.readouterr().out.strip() == samples[0]["after"]


@pytest.mark.parametrize(
    ("chat", "settings", "asked"),
    [(True, {}, "chat"), (True, {"chat_template": False}, "question"), (False, {}, "question")],
)
def test_an_adapter_is_asked_as_it_was_trained(chat: bool, settings: dict, asked: str, trained, small_model) -> None:
    source = adapter.find(str(trained(model=str(small_model("llama", chat=chat)), sample_tokens=0, **settings)))
    model, tokenizer, _ = adapter.open_model(source, device="cpu")
    shown = tokenizer.decode(adapter.Talk(model, tokenizer, source).ids([{"role": "user", "content": "What is 1?"}]))
    wanted = {"chat": "<|user|>What is 1?<|end|><|assistant|>", "question": "Question: What is 1?\nAnswer:"}
    assert shown == wanted[asked]


def test_a_conversation_knows_what_was_said_and_forgets_what_does_not_fit(small_model) -> None:
    source = adapter.find(str(small_model("llama", chat=True)))
    model, tokenizer, _ = adapter.open_model(source, device="cpu")
    talk = adapter.Talk(model, tokenizer, source, system="Be short.")
    first = talk.ask("Say one", 4)
    shown = tokenizer.decode(talk.ids([*talk.said, {"role": "user", "content": "Say two"}]))
    before = f"<|system|>Be short.<|end|><|user|>Say one<|end|><|assistant|>{first}<|end|>"
    assert shown == f"{before}<|user|>Say two<|end|><|assistant|>"
    talk.limit = len(talk.ids([*talk.said, {"role": "user", "content": "Say two"}])) + 3
    talk.ask("Say two", 4)
    assert [m["content"] for m in talk.said][:1] == ["Say two"]
    with pytest.raises(UserError, match="shorten the prompt or give a smaller --max-new-tokens"):
        talk.ask("Say " + "three " * 60, 4)


def test_a_conversation_as_a_process(small_model, command) -> None:
    done = command(
        "generate", small_model("llama", chat=True), "--max-new-tokens", "3", input="hello\nand you?\n\nno\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 2


def test_what_cannot_be_merged_or_asked_is_one_sentence(trained, small_model, tmp_path: Path, capsys) -> None:
    from cruxy_triton.cli import main

    folder = trained()

    def refused(*words: object) -> str:
        capsys.readouterr()
        assert main([str(word) for word in words]) == 2
        said = [line for line in capsys.readouterr().err.splitlines() if line and "it/s]" not in line]
        assert len(said) == 1
        return said[0]

    assert "holds no adapter to merge" in refused("merge", small_model())
    assert "give another --output" in refused("merge", folder, "--output", folder)
    assert "--base is for an adapter" in refused("generate", small_model(), "--base", "x", "--prompt", "x")
    assert "expected at least 1" in refused("generate", folder, "--prompt", "x", "--max-new-tokens", "0")
    assert "--prompt is empty" in refused("generate", folder, "--prompt", " ")
    assert "needs a chat template" in refused("generate", folder, "--prompt", "x", "--system", "y")
    other = small_model("llama", hidden_size=32)
    assert f"cannot be put on {other}" in refused("merge", folder, "--base", other, "--output", tmp_path / "m")
    moved = tmp_path / "moved"
    shutil.copytree(folder / "adapter", moved)
    config = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/no/such/model"}))
    assert "which is not here; give its folder or Hugging Face id with --base" in refused("merge", moved)
    assert main(["merge", str(moved), "--base", str(small_model()), "--output", str(tmp_path / "m")]) == 0
    (folder / ADAPTER).unlink()
    assert "cannot be put on" in refused("generate", folder, "--prompt", "x")
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "run.json").write_text('{"status": "interrupted"}')
    assert "has no adapter (it is interrupted)" in refused("merge", unfinished)
