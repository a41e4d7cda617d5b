"""The two losses on sized tensors: transformers' stock one, and TRL's tiled head."""

from __future__ import annotations

from cruxy_triton.planner import operations as ops
from cruxy_triton.planner.autograd import Parameter, Tape, Tensor, operation
from cruxy_triton.planner.shape import ModelShape
from cruxy_triton.planner.step import Step

TILE_TOKENS, TILE_VOCABULARY = 4096, 32768  # trl/kernels/chunked_logprob.py, trl/trainer/utils.py (1.16)


def tiles_pay(shape: ModelShape, tokens: int, width: int) -> bool:
    """Whether full fine-tuning of weights of `width` bytes takes less memory with the loss in tiles.

    Whole logits take 12 bytes per token and word of the vocabulary, tiles their own space and the gradient of the head
    in float32; a tied head's gradient from whole logits is a view, to which the embedding's cannot be added in place.
    """
    table, tied = shape.vocab_size * shape.hidden_size, shape.tie_word_embeddings
    narrow = width * table
    whole = max(12 * shape.vocab_size * tokens, 3 * narrow if tied else 0)
    tiled = 4 * table + (narrow if width != 4 else 0) + width * min(tokens, TILE_TOKENS) * TILE_VOCABULARY
    return max(tiled, 2 * narrow if tied else 0) < whole


def stock_loss(tape: Tape, step: Step, x: Tensor, head: Parameter) -> tuple[Tensor, Tensor]:
    """transformers' ForCausalLMLoss: fp32 copy of the logits, log-softmax, negative log-likelihood.

    Returns (loss, logits).
    """
    size = step.tokens * step.shape.vocab_size

    def of_logits(g: Tensor, *saved):
        return (tape.new(size, 4),)

    with tape.booked_as("logits and loss"):
        logits = ops.linear(tape, x, head, size, step.half)
        if step.shape.final_logit_softcapping is not None:
            logits = ops.unary(tape, logits)
            logits = ops.unary(tape, logits, keep_out=True)
            logits = ops.unary(tape, logits)
        wide = ops.cast(tape, logits, 4)
        log_softmax = operation(tape, (wide,), (size, 4), of_logits, keep_out=True)
        del wide
        loss = operation(tape, (log_softmax,), (1, 4), of_logits)
        del log_softmax
        if step.upcast_outputs:
            logits = ops.cast(tape, logits, 4)
    return loss, logits


def tiled_loss(tape: Tape, step: Step, x: Tensor, head: Parameter) -> Tensor:
    """TRL 1.16's fused head: logits in tiles of 4,096 x 32,768, recomputed in the backward pass."""
    rows = step.batch * (step.seq - 1)
    cpu = step.device == "cpu"
    compute = step.half or x.b
    tile = min(rows, TILE_TOKENS) * TILE_VOCABULARY
    tall = min(rows, TILE_TOKENS) * min(TILE_VOCABULARY, step.shape.vocab_size)
    whole, learns = (x.n, x.b), head.trainable

    def scatter(g: Tensor, *saved):
        return (tape.new(*whole),)

    def back(g: Tensor, hidden: Tensor, *saved):
        wide = tape.new(hidden.n, 4)
        grad = tape.new(head_n, 4) if learns else None
        space = tape.new(tile, compute)
        narrow = ops.cast(tape, hidden.detach(), compute)
        if cpu:
            # y, z, log p, p, the gradient, one-hot minus p, its product; the one-hot is boolean
            parts = [tape.new(tall, 4) for _ in range(7)] + [tape.new(tall, 1)]
            del parts
        grads = (ops.cast(tape, wide, hidden.b), ops.cast(tape, grad, head_b) if grad is not None else None)
        del space, narrow
        return grads

    head_n, head_b = head.n, head.b
    with tape.booked_as("logits and loss"):
        index = [] if cpu else [tape.new(rows, 8)]
        chosen = operation(tape, (x,), (rows * step.shape.hidden_size, x.b), scatter, keep=index)
        if not cpu:
            chosen = operation(tape, (chosen,), (chosen.n, chosen.b), scatter, view=True)
        statistics = [tape.new(rows, 4) for _ in range(7)]
        buffer = tape.new(tile, compute)
        narrow = ops.cast(tape, chosen.detach(), compute)
        if cpu:
            folded = [tape.new(tall, 4) for _ in range(3)]
            del folded
        del buffer, narrow
        outputs = [tape.new(rows, 4) for _ in range(4)]
        del statistics
        return operation(tape, (chosen, head), (1, 4), back, keep=[chosen, *outputs])
