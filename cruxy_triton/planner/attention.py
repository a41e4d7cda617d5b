"""The attention kernels on sized tensors: memory-efficient, flash, math, eager, and the CPU's."""

from __future__ import annotations

from dataclasses import dataclass

from cruxy_triton.planner import workspaces
from cruxy_triton.planner.autograd import Tape, Tensor, operation
from cruxy_triton.planner.operations import cast, copy, part, product, unary


@dataclass(frozen=True)
class Heads:
    """Sizes of one attention call."""

    batch: int
    seq: int
    query_heads: int
    key_heads: int
    head_dim: int

    @property
    def groups(self) -> int:
        return self.query_heads // self.key_heads

    @property
    def scores(self) -> int:
        return self.batch * self.query_heads * self.seq * self.seq


def repeat_kv(tape: Tape, x: Tensor, h: Heads) -> Tensor:
    """transformers' repeat_kv: each key/value head once per query head. x itself where it has as many, a view where
    there is but one head (the repeated dimension has stride 0), else a copy."""
    return x if h.groups == 1 else part(tape, x, x.n * h.groups, view=h.key_heads == 1)


def fused(tape: Tape, q: Tensor, k: Tensor, v: Tensor, h: Heads, kind: str) -> Tensor:
    """Memory-efficient ("efficient") or flash attention, or the CPU's: saves q, k, v, the output and one fp32
    logsumexp per query."""
    width = q.b
    if kind == "efficient":
        workspace = workspaces.efficient_backward(h.batch, h.query_heads, h.seq, h.head_dim)
    elif kind == "flash":
        workspace = workspaces.flash_backward(h.batch, h.query_heads, h.seq, h.head_dim)
    else:  # the CPU's flash kernel: small per-thread buffers only
        workspace = 0
    sizes = (q.n, k.n, v.n)

    def back(g: Tensor, *saved):
        grads = tuple(tape.new(n, width) for n in sizes)
        space = tape.buffer(workspace, "workspaces") if workspace else None
        # flash writes dk and dv per query head and sums over each group afterwards
        wide = [tape.new(sizes[1] * h.groups, width) for _ in range(2)] if kind == "flash" and h.groups > 1 else None
        del space, wide
        return grads

    logsumexp = (h.batch * h.query_heads * (-(-h.seq // 32) * 32), 4)
    return operation(tape, (q, k, v), (q.n, q.b), back, keep=(q, k, v), keep_out=True, also=[logsumexp])


def _matmul(tape: Tape, x: Tensor, y: Tensor, n: int, copies: tuple[bool, bool] = (False, False)) -> Tensor:
    """torch.matmul of two [B, H, ., .] tensors: bmm, after a copy of each operand that cannot be viewed so."""
    if copies[0]:
        x = copy(tape, x)
    if copies[1]:
        y = copy(tape, y)
    return product(tape, x, y, n)


def _softmax(tape: Tape, x: Tensor, b: int, workspace: bool) -> Tensor:
    """softmax over the last dimension into `b` bytes; saves its result. On CUDA its backward takes a workspace."""
    width = x.b

    def back(g: Tensor, saved):
        space = tape.buffer(workspaces.softmax_backward(g.n * g.b), "workspaces") if workspace else None
        grad = tape.new(g.n, width)
        del space
        return (grad,)

    return operation(tape, (x,), (x.n, b), back, keep_out=True)


def eager(
    tape: Tape, q: Tensor, k: Tensor, v: Tensor, h: Heads, half: int, softcap: bool, cuda: bool
) -> tuple[Tensor, Tensor]:
    """transformers' eager_attention_forward: (output, attention weights)."""
    split = h.batch > 1  # [B, S, H, D] in memory: B and H merge to one dimension only where B is 1
    strided = split and (h.groups == 1 or h.key_heads == 1)
    keys = repeat_kv(tape, k, h)
    values = repeat_kv(tape, v, h)
    a, b = (cast(tape, q, half), cast(tape, keys, half)) if half else (q, keys)
    weights = _matmul(tape, a, b, h.scores, (split, strided))
    del a, b
    weights = unary(tape, weights)  # * scaling
    if softcap:
        weights = unary(tape, weights)
        weights = unary(tape, weights, keep_out=True)
        weights = unary(tape, weights)
    weights = copy(tape, weights)  # + mask
    weights = cast(tape, _softmax(tape, weights, 4, cuda), q.b)
    probabilities, values = (cast(tape, weights, half), cast(tape, values, half)) if half else (weights, values)
    out = _matmul(tape, probabilities, values, q.n, (False, strided))
    del probabilities
    out = copy(tape, out)
    return out, weights


def math(tape: Tape, q: Tensor, k: Tensor, v: Tensor, h: Heads, cuda: bool) -> Tensor:
    """_scaled_dot_product_attention_math: half-precision inputs run in fp32, scores and all."""
    out_b = q.b
    q, k, v = (cast(tape, t, 4) for t in (q, k, v))
    bias = tape.new(h.seq * h.seq, 4)
    k, v = repeat_kv(tape, k, h), repeat_kv(tape, v, h)
    q, k = unary(tape, q), unary(tape, k)
    scores = _matmul(tape, q, k, h.scores, (h.batch > 1, h.batch > 1))
    scores = copy(tape, scores)
    del bias
    weights = _softmax(tape, scores, 4, cuda)
    del scores
    out = _matmul(tape, weights, v, q.n)
    del weights
    return cast(tape, out, out_b)
