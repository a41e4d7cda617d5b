"""The closed form against a trace of the real step: transformers, peft, bitsandbytes and TRL on `meta`.

17 configurations by default, all 109 with `-m slow`. Both are peaks of whole models, extrapolated from few layers.
"""

import itertools
from dataclasses import replace
from typing import Any

import pytest

from cruxy_triton.errors import UserError
from cruxy_triton.planner import load_model, shape_from_config
from cruxy_triton.planner.footprint import Footprint, extrapolated, footprint
from cruxy_triton.planner.replay import replay
from cruxy_triton.planner.step import Step
from cruxy_triton.planner.walk import walk

torch = pytest.importorskip("torch")
for package in ("transformers", "peft", "trl", "bitsandbytes"):
    pytest.importorskip(package)

from cruxy_triton.planner import trace  # noqa: E402

NO_AUTOCAST = {"autocast": False, "upcast_outputs": False}
STOCK = {"chunked_loss": False}
OPEN = {"checkpointing": False}
RELEASED = {"lora_r": 0, "release": True, "optimizer": "lion-4bit", **NO_AUTOCAST}


def case(model: str, batch: int, seq: int, precision: str = "float16", **settings: Any) -> Any:
    shape = load_model(model)
    settings.setdefault("targets", shape.family.names)
    settings.setdefault("attention", "efficient" if shape.family.sdpa else "eager")
    label = " ".join(f"{k}={v}" for k, v in settings.items() if k != "targets")
    step = Step(shape, batch, seq, precision, **settings)
    return pytest.param(step, id=f"{model} {batch}x{seq} {precision} {label}")


QUICK = [
    case("tinyllama-1.1b", 1, 512, **STOCK),
    case("tinyllama-1.1b", 2, 512, attention="math", **OPEN),
    case("tinyllama-1.1b", 1, 1024, "bfloat16", attention="flash", accumulation=8),
    case("tinyllama-1.1b", 1, 512, lora_dropout=0.05, **OPEN),
    case("qwen2.5-1.5b", 1, 1024, "nf4", accumulation=8),
    case("qwen2.5-3b", 1, 2048, "nf4", lora_r=4, targets=("q_proj", "v_proj"), optimizer="lion-8bit"),
    case("qwen3-0.6b", 2, 512, "nf4", double_quant=False, **OPEN),
    case("gemma-2b", 1, 1024, "nf4", keep_outputs=True, **STOCK, **NO_AUTOCAST),
    case("gemma-2-2b", 1, 512),
    case("phi-2", 1, 1024, "nf4"),
    case("smollm2-135m", 1, 512, "float32", **NO_AUTOCAST),
    case("llama-3.2-1b", 2, 256, attention="eager", kbit_prepared=True, **NO_AUTOCAST),
    case("tinyllama-1.1b", 1, 512, use_dora=True, ranks=(("q_proj", 2), ("up_proj", 40))),
    case("qwen2.5-1.5b", 1, 512, "nf4", use_dora=True, **OPEN),
    case("tinyllama-1.1b", 1, 512, **RELEASED, **STOCK),
    case("qwen2.5-0.5b", 1, 512, **RELEASED),
    case("llama-3.2-1b", 1, 512, **RELEASED, **STOCK),
]

MODELS = (
    "tinyllama-1.1b",
    "qwen2.5-1.5b",
    "qwen3-0.6b",
    "gemma-2b",
    "gemma-2-2b",
    "phi-2",
    "smollm2-135m",
    "llama-3.2-1b",
)
SWEEP = [
    case(model, batch, seq, precision, lora_r=rank, **settings)
    for model, (batch, seq, precision, rank, settings) in itertools.product(
        MODELS,
        (
            (1, 1024, "float16", 8, {}),
            (1, 1024, "nf4", 16, {"accumulation": 8}),
            (2, 512, "float16", 32, {**STOCK, **NO_AUTOCAST}),
            (1, 512, "nf4", 8, {**OPEN, **NO_AUTOCAST}),
            (1, 512, "nf4", 8, {**STOCK, "double_quant": False}),
            (2, 512, "nf4", 8, {**OPEN, "attention": "eager"}),
            (4, 256, "float16", 4, {"attention": "eager", "optimizer": "lion-8bit"}),
            (1, 256, "bfloat16", 64, {**OPEN, "lora_dropout": 0.1}),
            (1, 128, "float32", 8, {**STOCK, **NO_AUTOCAST}),
            (1, 256, "nf4", 8, {"use_dora": True}),
            (1, 256, "float16", 8, {**OPEN, "use_dora": True, "lora_dropout": 0.1}),
        ),
    )
] + [
    case("tinyllama-1.1b", 1, 1024, attention="math"),
    case("qwen3-0.6b", 2, 512, "bfloat16", attention="flash", **OPEN),
    case("qwen2.5-0.5b", 4, 256, "bfloat16", attention="flash", **STOCK),
    case("llama-3.2-3b", 8, 256, targets=("q_proj", "k_proj", "v_proj", "o_proj")),
]


def traced_footprint(step: Step) -> Footprint:
    return extrapolated(trace.trace, step, 3, 4)


def check(step: Step) -> None:
    """The peak within 0.1 %, every phase within 0.5 % of it."""
    closed, traced = footprint(step).phases, traced_footprint(step).phases
    closed.pop("load"), traced.pop("load")
    assert max(closed.values()) == pytest.approx(max(traced.values()), rel=0.001)
    assert closed == pytest.approx(traced, abs=0.005 * max(traced.values()))


@pytest.mark.parametrize("step", QUICK)
def test_closed_form_agrees_with_the_trace(step):
    check(step)


@pytest.mark.slow
@pytest.mark.parametrize("step", SWEEP)
def test_closed_form_agrees_with_the_trace_sweep(step):
    check(step)


def test_the_sweep_is_wide_enough():
    steps = [item.values[0] for item in (*QUICK, *SWEEP)]
    assert len(set(steps)) >= 60
    phases = {footprint(step).peak_phase.partition(":")[0] for step in steps}
    assert phases >= {"loss", "backward"}
    assert {s.attention for s in steps} >= {"efficient", "flash", "math", "eager"}


def test_reserved_agrees_with_the_trace():
    """The replay of the walk's stream and of the trace's: the order of allocations is the same."""
    shape = load_model("smollm2-135m")
    step = Step(shape, 2, 512, targets=shape.family.names)
    traced = trace.verify(step)
    walked = replay(walk(step, record=True).events or [])
    assert walked.allocated == pytest.approx(traced["allocated_bytes"], rel=0.002)
    assert walked.reserved == pytest.approx(traced["reserved_bytes"], rel=0.01)
    assert traced["allocated_bytes"] <= traced["smallest_pool_bytes"] <= traced["reserved_bytes"]


def test_fewer_layers_extrapolate_exactly():
    shape = load_model("smollm2-135m").with_layers(9)
    step = Step(shape, 1, 256, targets=shape.family.names)
    for run in (trace.trace, walk):
        few, whole = extrapolated(run, step, 3, 4), extrapolated(run, step, 8, 9)
        assert few.phases == pytest.approx(whole.phases, rel=1e-4)


@pytest.mark.parametrize("chunked", [True, False], ids=["tiles", "whole logits"])
def test_full_fine_tuning_of_tied_tables(chunked):
    """Their second gradient is added in place to the first one, unless that is a view: of whole logits."""
    check(Step(load_model("smollm2-360m"), 1, 64, "bfloat16", lora_r=0, chunked_loss=chunked, **OPEN))


def test_the_traced_tiled_loss_is_trls():
    """The trace calls TRL's kernel without the trainer: loss and gradient must be those of the trainer's head."""
    from trl.trainer.utils import add_fused_lm_head

    shape = replace(load_model("smollm2-135m"), num_hidden_layers=2, vocab_size=300, config="")
    torch.manual_seed(0)
    model = trace.build(Step(shape, 1, 16, "float32", targets=shape.family.names, **NO_AUTOCAST), device="cpu")
    add_fused_lm_head(model.get_base_model(), outputs=("log_probs", "entropy", "is_top1"))
    ids = torch.randint(0, 300, (2, 16))
    ours = trace._tiled_loss(model, ids, ids.clone())
    theirs = model(input_ids=ids, labels=ids.clone(), fused_lm_head=True)
    torch.testing.assert_close(ours["loss"], theirs.loss)
    torch.testing.assert_close(ours["log_probs"], theirs.log_probs)


CONFIG = {
    "vocab_size": 8000, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 1024,
}  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({"model_type": "gemma2", "head_dim": 32}, id="gemma2, silent about its caps"),
        pytest.param({"model_type": "gemma2", "head_dim": 32, "attn_logit_softcapping": None}, id="gemma2, no cap"),
        pytest.param({"model_type": "gemma2", "head_dim": 32, "final_logit_softcapping": None}, id="gemma2, one cap"),
        pytest.param({"model_type": "phi", "resid_pdrop": 0.1}, id="phi with dropout"),
        pytest.param({"model_type": "phi", "rope_parameters": {"partial_rotary_factor": 0.25}}, id="phi, quarter"),
        pytest.param({"model_type": "llama", "attention_bias": True, "mlp_bias": True}, id="llama with biases"),
        pytest.param({"model_type": "mistral", "attention_bias": True}, id="mistral, which knows no bias"),
    ],
)
def test_the_trace_reads_the_config_for_itself(config):
    """The model of a trace is built from the config as it is written, not from what the planner made of it."""
    shape = shape_from_config({**CONFIG, **config, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2})
    for settings in (OPEN, STOCK):
        attention = "efficient" if shape.family.sdpa else "eager"
        check(Step(shape, 2, 256, targets=shape.family.names, attention=attention, **settings))


def test_a_misread_config_is_noticed():
    shape = replace(load_model("smollm2-135m"), intermediate_size=1024)
    with pytest.raises(UserError, match="its plan does not hold"):
        trace.verify(Step(shape, 1, 64, targets=shape.family.names))


def test_biased_4_bit_models_replay():
    """bitsandbytes casts a bias to the input's dtype in the first forward pass, which releases the loaded one."""
    shape = load_model("qwen2.5-0.5b").with_layers(3)
    step = Step(shape, 1, 128, "nf4", targets=shape.family.names, kbit_prepared=True, **NO_AUTOCAST)
    events = trace.trace(step).events
    assert replay(events).allocated == pytest.approx(replay(walk(step, record=True).events).allocated, rel=0.005)


def test_workspaces_by_hand():
    """B=2, H=4, S=128, D=64: memory-efficient attention's backward takes B*H*S*(64 + 1)*4 bytes."""
    func = torch.ops.aten._scaled_dot_product_efficient_attention_backward.default
    q = torch.empty((2, 4, 128, 64), device="meta", dtype=torch.float16)
    assert trace.workspace_bytes(func, (q, q, q, q), None) == 2 * 4 * 128 * 65 * 4
    softmax = torch.ops.aten._softmax_backward_data.default
    grad = torch.empty((3, 5), device="meta", dtype=torch.float32)
    assert trace.workspace_bytes(softmax, (grad,), None) == 60
    assert trace.workspace_bytes(torch.ops.aten.mm.default, (grad,), None) == 0
