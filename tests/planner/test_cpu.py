"""The closed form against memory that a real training step took: small models, PyTorch's CPU allocator watched."""

import gc
from dataclasses import replace

import pytest

from cruxy_triton.planner import Card, load_card, plan
from cruxy_triton.planner.footprint import footprint
from cruxy_triton.planner.models import shape_from_config
from cruxy_triton.planner.optimizers import OPTIMIZERS
from cruxy_triton.planner.search import step_of
from cruxy_triton.planner.shape import ModelShape
from cruxy_triton.planner.step import Step

torch = pytest.importorskip("torch")
for package in ("transformers", "peft", "trl"):
    pytest.importorskip(package)

from cruxy_triton.optimizer import CruxyOptimizer  # noqa: E402
from cruxy_triton.release import release_gradients  # noqa: E402

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


MARKER = 123_457  # bytes of an allocation that nothing else makes


def measured_peak(step: Step) -> int:
    """Bytes: what lives before a second training step, plus the step's own peak as the profiler saw it."""
    from torch._C._profiler import _EventType
    from torch.profiler import ProfilerActivity, profile
    from torch.profiler._utils import traverse_dfs
    from trl.trainer.utils import add_fused_lm_head

    from cruxy_triton.planner import trace

    model = trace.build(step, device="cpu")
    if step.chunked_loss:
        add_fused_lm_head(model.get_base_model() if step.lora_r else model, outputs=("log_probs", "entropy", "is_top1"))
    trained = [p for p in model.parameters() if p.requires_grad]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in (*model.parameters(), *model.buffers())}
    lasting = sum(s.nbytes() for s in storages.values())
    keeps = step.accumulation > 1  # the step before was a micro-batch of the same optimizer step
    lasting += sum(p.numel() * p.element_size() for p in trained) * keeps
    optimizer = released(step, model) if step.release else None
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
        if optimizer is not None:
            optimizer.step(loss=loss.detach())
        assert all((p.grad is None) == step.release for p in trained)
        assert mask.sum() == tokens.numel()

    one_step()
    if not keeps:
        model.zero_grad()
    if optimizer is not None:
        lasting += nbytes_of(optimizer)
    else:
        lasting += sum(int(p.numel() * OPTIMIZERS[step.optimizer].bytes_per_parameter) for p in trained)
    gc.collect()  # a model of a test before this one must not go while this one is measured
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        marker = torch.empty(MARKER, dtype=torch.uint8)
        one_step()
    # the allocator's own running total: timestamps of two events can change places on a busy machine
    tree = traverse_dfs(profiler.profiler.kineto_results.experimental_event_tree())
    found = [node.extra_fields for node in tree if node.tag == _EventType.Allocation]
    (before,) = (event.total_allocated for event in found if event.alloc_size == marker.nbytes)
    return lasting + max(event.total_allocated for event in found) - before


def released(step: Step, model: torch.nn.Module) -> CruxyOptimizer:
    """The optimizer of the step's state, which updates `model` in the backward pass."""
    lion, bits = step.optimizer.startswith("lion"), OPTIMIZERS[step.optimizer].bits
    optimizer = CruxyOptimizer(model.parameters(), lr=1e-5, use_lion=lion, state_bits=bits, clip="tensor")
    release_gradients(model, optimizer)
    return optimizer


def nbytes_of(optimizer: CruxyOptimizer) -> int:
    """What it holds between two steps: states, control rows, history."""
    held = [t for state in optimizer.state.values() for t in state.values()]
    held += [optimizer.control, optimizer._history._rows, optimizer._passes._table]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}.values())


def cpu_step(shape: ModelShape, settings: tuple[bool, bool, str], **others) -> Step:
    checkpointing, chunked, attention = settings
    return Step(
        shape,
        2,
        targets=shape.family.names,
        precision="float32",
        checkpointing=checkpointing,
        chunked_loss=chunked,
        attention=attention,
        device="cpu",
        cublas_workspace=0,
        autocast=False,
        upcast_outputs=False,
        **others,
    )


@pytest.mark.parametrize(
    ("shape", "settings"), CASES, ids=[f"{shape.model_type}-{settings[2]}" for shape, settings in CASES]
)
def test_a_real_step_on_the_cpu(shape, settings):
    torch.manual_seed(0)
    step = cpu_step(shape, settings, seq=128)
    assert footprint(step).peak_allocated == pytest.approx(measured_peak(step), rel=0.005)


@pytest.mark.parametrize("double", [False, True], ids=["nf4", "nested"])
@pytest.mark.parametrize(
    ("card", "dtype"),
    [(Card.cpu("1GiB"), "float32"), (load_card("t4"), "float16"), (load_card("rtx3090"), "bfloat16")],
    ids=["cpu", "t4", "rtx3090"],
)
def test_four_bit_weights_are_planned_as_they_are_loaded(card, dtype, double, small_model):
    """Bytes of the model that `finetune` loads, by its own rule for the dtype; the place does not change them."""
    pytest.importorskip("bitsandbytes")
    from cruxy_triton.finetune import load
    from cruxy_triton.finetune.recipe import Recipe

    recipe = Recipe(str(small_model()), "data", "output", load_in_4bit=True, double_quant=double)
    config = load.config_of(recipe)
    values = config.to_dict()
    chosen = plan(values, card, load_in_4bit=True, double_quant=double, max_seq_length=64, alternatives=False).config
    assert chosen.dtype == dtype
    model, _ = load.model_of(recipe, config, torch.device("cpu"), getattr(torch, dtype))
    states = [p.quant_state.as_dict() for p in model.parameters() if hasattr(p, "quant_state")]
    parts = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
    step = replace(step_of(shape_from_config(values), card, chosen), device="cpu")  # counts without rounding
    found = footprint(step).components
    assert found["weights"] == sum(p.nbytes for p in model.parameters())
    assert found["quantization"] == pytest.approx(sum(part.nbytes for part in parts), rel=0.005)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("settings", [FUSED, PLAIN, OPEN], ids=["checkpointing", "stock loss", "chunked loss"])
@pytest.mark.parametrize(
    ("vocabulary", "seq", "accumulation"),
    [
        pytest.param(4000, 128, 1, id="highest at the head"),
        pytest.param(16000, 16, 1, id="highest at the embedding"),
        pytest.param(16000, 16, 2, id="accumulated"),
    ],
)
def test_full_fine_tuning_on_the_cpu(settings, tied, vocabulary, seq, accumulation):
    """Tied tables get two gradients: torch holds both, and their sum too where the head's is a transposed view."""
    torch.manual_seed(0)
    shape = replace(BASE, tie_word_embeddings=tied, vocab_size=vocabulary, num_hidden_layers=3)
    step = cpu_step(shape, settings, seq=seq, lora_r=0, accumulation=accumulation)
    assert footprint(step).peak_allocated == pytest.approx(measured_peak(step), rel=0.003)


@pytest.mark.parametrize("shape", SHAPES[1:], ids=lambda shape: shape.model_type)
def test_full_fine_tuning_of_other_families_on_the_cpu(shape):
    torch.manual_seed(0)
    step = cpu_step(replace(shape, num_hidden_layers=3), OPEN, seq=128, lora_r=0)
    assert footprint(step).peak_allocated == pytest.approx(measured_peak(step), rel=0.003)


TIED = replace(BASE, tie_word_embeddings=True)
RELEASED = [
    pytest.param(BASE, FUSED, 16, "lion-4bit", id="llama, checkpointing"),
    pytest.param(BASE, PLAIN, 128, "lion-8bit", id="llama, highest at the loss"),
    pytest.param(TIED, FUSED, 16, "lion-8bit", id="llama tied, checkpointing"),
    pytest.param(replace(TIED, vocab_size=16000), PLAIN, 16, "lion-4bit", id="llama tied, highest at the embedding"),
    pytest.param(SHAPES[1], OPEN, 16, "adamw-8bit", id="qwen2 tied"),
    pytest.param(replace(SHAPES[2], vocab_size=16000), OPEN, 16, "lion-4bit", id="qwen3, highest at the head"),
    pytest.param(SHAPES[3], PLAIN, 32, "lion-4bit", id="gemma tied"),
    pytest.param(SHAPES[4], OPEN, 16, "adamw-fp32", id="phi"),
]


@pytest.mark.parametrize(("shape", "settings", "seq", "optimizer"), RELEASED)
def test_released_gradients_on_the_cpu(shape, settings, seq, optimizer):
    torch.manual_seed(0)
    step = cpu_step(shape, settings, seq=seq, lora_r=0, release=True, optimizer=optimizer)
    assert footprint(step).peak_allocated == pytest.approx(measured_peak(step), rel=0.003)


SIZES = {name: getattr(BASE, name) for name in (
    "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings",
)} | dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))  # fmt: skip
GPT2 = {"vocab_size": 4000, "n_embd": 256, "n_layer": 6, "n_head": 8, "n_positions": 1024} | dict.fromkeys(
    ("attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.0
)
MPT = {"vocab_size": 4000, "d_model": 256, "n_heads": 8, "n_layers": 6, "max_seq_len": 1024, "attn_config": {}}
UNKNOWN = [
    ("gemma3_text", OPEN), ("phi3", FUSED), ("smollm3", OPEN), ("gpt2", OPEN), ("granite", FUSED), ("mpt", PLAIN),
]  # fmt: skip


@pytest.mark.parametrize(("model_type", "settings"), UNKNOWN, ids=[name for name, _ in UNKNOWN])
def test_a_type_that_is_none_of_the_families(model_type, settings):
    """Its footprint is a trace: fused projections, sliding windows, layers without positions, Conv1D."""
    torch.manual_seed(0)
    config = {"gpt2": GPT2, "mpt": MPT}.get(model_type, {**SIZES, "num_hidden_layers": 6})
    shape = shape_from_config({"model_type": model_type, **config})
    assert shape.learned is not None
    step = cpu_step(shape, settings, seq=128)
    assert footprint(step).peak_allocated == pytest.approx(measured_peak(step), rel=0.005)


def test_experts_are_not_planned_too_small():
    """On a card the experts' products are one kernel; without values transformers' slower form stands for it."""
    torch.manual_seed(0)
    shape = shape_from_config({"model_type": "mixtral", **SIZES, "num_hidden_layers": 4, "num_local_experts": 4})
    step = cpu_step(shape, OPEN, seq=128)
    assert 0.999 <= footprint(step).peak_allocated / measured_peak(step) < 1.1
