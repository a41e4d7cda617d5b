"""A lower bound for the time of a step: the roofline of the card's profile.

Each part takes at least its floating-point operations at the card's peak rate, and at least its bytes at the
card's bandwidth; the larger of the two counts. Real steps are slower (launch overhead, kernels below their peak):
how much was not measured on any card yet, so the figure is stated as "at best".
"""

from __future__ import annotations

from cruxy_triton.planner.card import Card
from cruxy_triton.planner.optimizers import OPTIMIZERS
from cruxy_triton.planner.step import Step


def flops(step: Step) -> dict[str, float]:
    """Floating-point operations of one micro-batch by part (a multiply-add counts two)."""
    shape, tokens = step.shape, step.tokens
    layers = shape.num_hidden_layers
    weights = sum(x.weight * count for x, count in shape.all_linears())
    head = shape.vocab_size * shape.hidden_size
    # Causal: half of the S x S scores; two products forward, five backward (flash and efficient recompute one).
    attention = 2.0 * step.batch * step.seq**2 * shape.query_width * layers
    passes = 1 + (1 if step.checkpointing else 0)
    learned = 1.0 if step.lora_r == 0 else 0.0  # the weights' own gradients
    return {
        "forward": 2.0 * weights * tokens + attention,
        "recompute": (passes - 1) * (2.0 * weights * tokens + attention),
        "backward": (1 + learned) * 2.0 * weights * tokens + 2.5 * attention,
        "adapters": (2.0 * passes + 4.0) * step.lora_parameters() * tokens,
        "head": (2.0 + 2.0 + (2.0 if step.chunked_loss else 0.0) + 2.0 * learned) * head * tokens,
    }


def traffic(step: Step) -> dict[str, float]:
    """Bytes that must cross the memory bus, by part: one micro-batch, and the optimizer's once a step."""
    shape = step.shape
    weights = sum(x.weight * count for x, count in shape.all_linears())
    reads = 3 if step.checkpointing else 2
    width = step.width
    if step.precision == "nf4":  # codes and scales in, whole weights out and in again
        one_pass = weights * (0.5 + 4 / 64 + 2 * width)
    else:
        one_pass = weights * width
    trainable = step.trainable_parameters()
    return {
        "weights": reads * one_pass,
        "head": (3 if step.chunked_loss else 2) * shape.vocab_size * shape.hidden_size * width,
        "optimizer": trainable * (4 + 4 + 4 + 2 * OPTIMIZERS[step.optimizer].bytes_per_parameter),
    }


def step_seconds(step: Step, card: Card) -> float:
    """Seconds of one optimizer step (all accumulated micro-batches) at best; 0 where the card's speed is unknown."""
    if not card.bandwidth_gb_s or not card.half_tflops:
        return 0.0
    rate = 1e12 * (card.half_tflops if step.precision != "float32" else card.fp32_tflops)
    bandwidth = 1e9 * card.bandwidth_gb_s
    work, moved = flops(step), traffic(step)
    body = sum(v for k, v in work.items() if k != "head")
    micro = max(body / rate, moved["weights"] / bandwidth) + max(work["head"] / rate, moved["head"] / bandwidth)
    return step.accumulation * micro + moved["optimizer"] / bandwidth
