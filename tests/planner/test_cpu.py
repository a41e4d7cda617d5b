"""The closed form against memory that a real training step took: small models, PyTorch's CPU allocator watched."""

from dataclasses import replace

import pytest

from cruxy_triton.planner.footprint import footprint
from cruxy_triton.planner.optimizers import OPTIMIZERS
from cruxy_triton.planner.shape import ModelShape
from cruxy_triton.planner.step import Step

torch = pytest.importorskip("torch")
for package in ("transformers", "peft", "trl"):
    pytest.importorskip(package)

BASE = ModelShape(
    name="small",
    model_type="llama",
    vocab_size=4000,
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=5,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=32,
    max_position_embeddings=1024,
    tie_word_embeddings=False,
)
SHAPES = [
    BASE,
    replace(BASE, model_type="qwen2", tie_word_embeddings=True),
    replace(BASE, model_type="qwen3"),
    replace(
        BASE,
        model_type="gemma",
        num_key_value_heads=1,
        hidden_act="gelu_pytorch_tanh",
        tie_word_embeddings=True,
    ),
    replace(BASE, model_type="phi", num_key_value_heads=8, hidden_act="gelu_new", partial_rotary_factor=0.5),
]
FUSED = (True, True, "sdpa-cpu")  # checkpointing, chunked loss, attention
PLAIN = (False, False, "eager")
OPEN = (False, True, "sdpa-cpu")
CASES = [
    (SHAPES[0], FUSED),
    (SHAPES[0], PLAIN),
    (SHAPES[1], OPEN),
    (SHAPES[2], OPEN),
    (SHAPES[3], PLAIN),
    (SHAPES[4], OPEN),
]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def measured_peak(step: Step) -> int:
    """Bytes: what lives before a second training step, plus the step's own peak as the profiler saw it."""
    from torch.profiler import ProfilerActivity, profile
    from trl.trainer.utils import add_fused_lm_head

    from cruxy_triton.planner import trace

    model = trace.build(step, device="cpu")
    if step.chunked_loss:
        add_fused_lm_head(model.get_base_model(), outputs=("log_probs", "entropy", "is_top1"))
    trained = [p for p in model.parameters() if p.requires_grad]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in (*model.parameters(), *model.buffers())}
    lasting = sum(s.nbytes() for s in storages.values())
    lasting += sum(int(p.numel() * OPTIMIZERS[step.optimizer].bytes_per_parameter) for p in trained)
    tokens = torch.randint(0, step.shape.vocab_size, (step.batch, step.seq))

    def one_step() -> None:
        ids, mask, labels = tokens.clone(), torch.ones_like(tokens), tokens.clone()
        if step.chunked_loss:
            output = model(input_ids=ids, labels=labels, fused_lm_head=True)
            loss = (-output.log_probs).sum() / output.label_mask.sum()
        else:
            output = model(input_ids=ids, labels=labels)
            loss = output.loss
        del output
        loss.backward()
        assert torch.isfinite(loss)
        assert all(p.grad is not None for p in trained)
        assert mask.sum() == tokens.numel()
        for parameter in trained:
            parameter.grad = None

    one_step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        one_step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert events, "the profiler recorded no memory events"
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return lasting + peak


@pytest.mark.parametrize(
    ("shape", "settings"), CASES, ids=[f"{shape.model_type}-{settings[2]}" for shape, settings in CASES]
)
def test_a_real_step_on_the_cpu(shape, settings):
    torch.manual_seed(0)
    checkpointing, chunked, attention = settings
    step = Step(
        shape,
        2,
        128,
        "float32",
        targets=shape.family.names,
        checkpointing=checkpointing,
        chunked_loss=chunked,
        attention=attention,
        device="cpu",
        cublas_workspace=0,
        autocast=False,
        upcast_outputs=False,
    )
    assert footprint(step).peak_allocated == pytest.approx(measured_peak(step), rel=0.005)
