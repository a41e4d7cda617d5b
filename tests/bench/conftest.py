import pytest

from cruxy_triton.bench import adapters


@pytest.fixture
def chat_model(small_model, questions, tmp_path, monkeypatch):
    """A folder as `bench --model smollm2` takes it; what stands for the model is small."""
    (tmp_path / "gsm8k").mkdir()
    for name in adapters.FILES:
        (tmp_path / name).write_text(questions.read_text(encoding="utf-8"), encoding="utf-8")
    source = str(small_model("llama"))
    monkeypatch.setattr(adapters, "smollm2", lambda: source)
    return tmp_path
