"""The operations of a causal language model on `ledger.Tensor`s: what each allocates, saves and gives back.

Every function mirrors one PyTorch operation (or one function of transformers 5 or peft 0.21 that is a few of
them) in the order in which it allocates; which operands autograd saves is read from PyTorch's
`tools/autograd/derivatives.yaml`. `n` counts elements, `b` bytes per element.
"""

from __future__ import annotations

from dataclasses import dataclass

from cruxy_triton.planner.ledger import Ledger, Parameter, Tensor, record, save


def cast(ld: Ledger, x: Tensor, b: int) -> Tensor:
    """x.to(dtype of `b` bytes); x itself where it has that dtype already."""
    if x.b == b:
        return x
    out = ld.new(x.n, b)
    if x.requires_grad:
        record(ld, out, (x,), lambda g: (g if g.b == x_b else ld.new(g.n, x_b),), [])
        x_b = x.b
    return out


def copy(ld: Ledger, x: Tensor) -> Tensor:
    """x.clone(), or x.contiguous() of something that is not: the gradient passes through unchanged."""
    out = ld.new(x.n, x.b)
    return record(ld, out, (x,), None, []) if x.requires_grad else out


def unary(ld: Ledger, x: Tensor, keeps: str = "") -> Tensor:
    """One elementwise operation; `keeps` is "input" or "output" where its backward reads one of them."""
    held = [save(ld, x)] if keeps == "input" and x.requires_grad else []
    out = ld.new(x.n, x.b)
    if x.requires_grad:
        if keeps == "output":
            held = [save(ld, out)]
        record(ld, out, (x,), lambda g, *s: (ld.new(g.n, g.b),), held)
    return out


def add(ld: Ledger, x: Tensor, y: Tensor) -> Tensor:
    out = ld.new(max(x.n, y.n), max(x.b, y.b))
    if x.requires_grad or y.requires_grad:
        n = out.n
        record(ld, out, (x, y), None, [], [(n, x.b), (n, y.b)])
    return out


def multiply(ld: Ledger, x: Tensor, y: Tensor) -> Tensor:
    """x * y, both of which may need a gradient; the smaller one may be broadcast."""
    held = []
    if y.requires_grad:
        held.append(save(ld, x))
    if x.requires_grad:
        held.append(save(ld, y))
    out = ld.new(max(x.n, y.n), max(x.b, y.b))
    if held:
        wants = (x.requires_grad, y.requires_grad)

        def back(g: Tensor, *saved):
            return [ld.new(g.n, g.b) if want else None for want in wants]

        record(ld, out, (x, y), back, held, [(x.n, x.b), (y.n, y.b)])
    return out


def autocast_weight(ld: Ledger, w: Parameter, b: int) -> Tensor:
    """The weight in autocast's dtype; casts of trainable fp32 leaves are cached until autocast ends."""
    if w.b == b:
        return w
    cache = ld.autocast_cache
    if cache is None or not w.trainable:
        return cast(ld, w, b)
    if id(w) not in cache:
        cache[id(w)] = cast(ld, w, b)
    return cache[id(w)]


def linear(ld: Ledger, x: Tensor, w: Parameter, n_out: int, bias: bool = False, half: int = 0) -> Tensor:
    """F.linear of [T, in] by [out, in]. `half` is autocast's width in bytes, 0 where autocast is off.

    Saves x where the weight learns, the weight where x does (mm and addmm in derivatives.yaml).
    """
    weight: Tensor = w
    if half:
        x = cast(ld, x, half)
        weight = autocast_weight(ld, w, half)
    wants = (x.requires_grad, weight.requires_grad)
    held = []
    if wants[1]:
        held.append(save(ld, x))
    if wants[0]:
        held.append(save(ld, weight))
    out = ld.new(n_out, x.b)
    if held:
        x_n, x_b, w_n = x.n, x.b, weight.n

        def back(g: Tensor, *saved):
            return (
                ld.new(x_n, x_b) if wants[0] else None,
                ld.new(w_n, x_b) if wants[1] else None,
            )

        record(ld, out, (x, weight), back, held)
    return out


@dataclass(frozen=True)
class Linear4bit:
    """A bitsandbytes weight of `rows` x `cols`: packed codes, and one fp32 absmax per 64 (or 8 bits, nested)."""

    codes: object  # the storages, held for their lifetime
    rows: int
    cols: int
    nested: bool


def dequantise(ld: Ledger, w: Linear4bit, b: int) -> list:
    """bitsandbytes' dequantize_4bit: the weight in `b` bytes, plus the absmax in fp32 where it is nested."""
    n = w.rows * w.cols
    held = []
    with ld.booked_as("workspaces"):
        if w.nested:  # dequantised absmax (fp32), then the offset is added in place
            held.append(ld.new(-(-n // 64), 4))
        held.append(ld.new(n, b))
    return held


def linear_4bit(ld: Ledger, x: Tensor, w: Linear4bit, tokens: int, compute: int, half: int) -> Tensor:
    """bnb.nn.Linear4bit.forward: x in the compute dtype, dequantise, multiply, back to x's dtype.

    MatMul4Bit saves the packed weight alone; its backward dequantises again and multiplies.
    """
    x_b = x.b
    xc = cast(ld, x, compute)
    weight = dequantise(ld, w, compute)
    out = ld.new(tokens * w.rows, compute)
    del weight
    if xc.requires_grad:
        n_in = xc.n

        def back(g: Tensor):
            parts = dequantise(ld, w, compute)
            if g.b != compute:
                parts.append(ld.new(w.rows * w.cols, g.b, "workspaces"))
            return (ld.new(n_in, g.b),)

        record(ld, out, (xc,), back, [])
    del xc
    return cast(ld, out, x_b)


@dataclass
class Lora:
    """Adapter weights A [r, in] and B [out, r] of one linear layer."""

    a: Parameter
    b: Parameter
    rank: int
    dropout: float


def dropout(ld: Ledger, x: Tensor, p: float) -> Tensor:
    """F.dropout in training: native_dropout keeps a mask of one byte per element; nothing at p = 0."""
    if p == 0:
        return x
    mask = ld.new(x.n, 1)
    held = [save(ld, mask)] if x.requires_grad else []
    out = ld.new(x.n, x.b)
    if x.requires_grad:
        record(ld, out, (x,), lambda g, m: (ld.new(g.n, g.b),), held)
    return out


def lora_branch(ld: Ledger, x: Tensor, lora: Lora, tokens: int, n_out: int, half: int) -> Tensor:
    """lora_B(lora_A(dropout(x))) * scaling"""
    down = linear(ld, dropout(ld, x, lora.dropout), lora.a, tokens * lora.rank, half=half)
    up = linear(ld, down, lora.b, n_out, half=half)
    del down
    return unary(ld, up)


def lora_linear(
    ld: Ledger, x: Tensor, base, lora: Lora | None, tokens: int, rows: int, half: int, compute: int
) -> Tensor:
    """peft.tuners.lora.Linear.forward (or bnb's Linear4bit), on a frozen or trainable base."""
    n_out = tokens * rows
    if isinstance(base, Linear4bit):
        result = linear_4bit(ld, x, base, tokens, compute, half)
        if lora is None:
            return result
        result = copy(ld, result)  # peft clones the 4-bit result defensively
        if not half:
            expected = result.b
            x = cast(ld, x, lora.a.b)
            extra = cast(ld, lora_branch(ld, x, lora, tokens, n_out, half), expected)
        else:
            extra = lora_branch(ld, x, lora, tokens, n_out, half)
        return add(ld, result, extra)
    result = linear(ld, x, base, n_out, half=half)
    if lora is None:
        return result
    expected = result.b
    x = cast(ld, x, lora.a.b)
    result = add(ld, result, lora_branch(ld, x, lora, tokens, n_out, half))
    return cast(ld, result, expected)


def _power_two(ld: Ledger, x: Tensor) -> Tensor:
    """x.pow(2); its backward makes x.pow(1), twice that, and the product before the first two go."""
    held = [save(ld, x)] if x.requires_grad else []
    out = ld.new(x.n, x.b)
    if x.requires_grad:

        def back(g: Tensor, saved):
            first = ld.new(saved.n, saved.b)
            second = ld.new(saved.n, saved.b)
            out = ld.new(saved.n, saved.b)
            del first, second
            return (out,)

        record(ld, out, (x,), back, held)
    return out


def _mean(ld: Ledger, x: Tensor, rows: int) -> Tensor:
    out = ld.new(rows, x.b)
    n, b = x.n, x.b
    return record(ld, out, (x,), lambda g: (ld.new(n, b),), []) if x.requires_grad else out


def rms_norm(ld: Ledger, x: Tensor, rows: int, gemma: bool, weight: Parameter) -> Tensor:
    """LlamaRMSNorm (Qwen's is the same), or GemmaRMSNorm where `gemma`; over `rows` rows."""
    wide = cast(ld, x, 4)
    variance = _mean(ld, _power_two(ld, wide), rows)
    variance = unary(ld, variance)  # + eps
    scale = unary(ld, variance, keeps="output")  # rsqrt
    del variance
    out = multiply(ld, wide, scale)
    del wide, scale
    if gemma:  # * (1 + weight), in fp32
        shifted = unary(ld, cast(ld, weight, 4)) if weight.trainable else ld.new(weight.n, 4)
        out = multiply(ld, out, shifted)
        return cast(ld, out, x.b)
    return multiply(ld, weight, cast(ld, out, x.b))


def layer_norm(ld: Ledger, x: Tensor, rows: int, half: int) -> Tensor:
    """F.layer_norm: saves its input and two statistics a row; under autocast it runs and returns in fp32."""
    if half:
        x = cast(ld, x, 4)
    held = [save(ld, x)] if x.requires_grad else []
    out = ld.new(x.n, x.b)
    mean, rstd = ld.new(rows, 4), ld.new(rows, 4)
    if x.requires_grad:
        held += [save(ld, mean), save(ld, rstd)]
        record(ld, out, (x,), lambda g, *s: (ld.new(g.n, g.b),), held)
    return out


def _half_of(ld: Ledger, x: Tensor, part: int) -> Tensor:
    """A slice of `part` elements: a view; its backward is a zero tensor of the full size."""
    out = Tensor(x.storage, part, x.b)
    n = x.n
    return record(ld, out, (x,), lambda g: (ld.new(n, g.b),), []) if x.requires_grad else out


def _cat(ld: Ledger, x: Tensor, y: Tensor) -> Tensor:
    out = ld.new(x.n + y.n, x.b)
    if x.requires_grad or y.requires_grad:
        sizes = (x.n, y.n)
        record(ld, out, (x, y), lambda g: tuple(Tensor(g.storage, n, g.b) for n in sizes), [])
    return out


def rotary(ld: Ledger, x: Tensor) -> Tensor:
    """(x * cos) + (rotate_half(x) * sin)"""
    first = unary(ld, x)
    low, high = _half_of(ld, x, x.n // 2), _half_of(ld, x, x.n // 2)
    turned = _cat(ld, unary(ld, high), low)
    del low, high
    second = unary(ld, turned)
    del turned
    return add(ld, first, second)


def partial_rotary(ld: Ledger, x: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """Phi: the leading `fraction` of each head is rotated, the rest passes. Returns views (rotated part, rest)."""
    n = round(x.n * fraction)
    return _half_of(ld, x, n), _half_of(ld, x, x.n - n)


def repeat_kv(ld: Ledger, x: Tensor, groups: int, heads: int) -> Tensor:
    """transformers' repeat_kv: each key/value head `groups` times. x itself where groups is 1, a view where there
    is but one head (the repeated dimension has stride 0), else a copy."""
    if groups == 1:
        return x
    out = Tensor(x.storage, x.n * groups, x.b) if heads == 1 else ld.new(x.n * groups, x.b)
    n = x.n
    return record(ld, out, (x,), lambda g: (ld.new(n, g.b),), []) if x.requires_grad else out


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


def fused_attention(ld: Ledger, q: Tensor, k: Tensor, v: Tensor, h: Heads, kind: str) -> Tensor:
    """Memory-efficient ("efficient") or flash attention: saves q, k, v, the output and one fp32 logsumexp a row.

    The backward of the memory-efficient kernel accumulates in an fp32 workspace,
    B*H*S*ceil(D/64)*64*4 + B*H*S*4 bytes (seen on sm_75; design/planner.md); flash's (fp32 dq accumulator and
    row sums) follow pytorch's mha_bwd: sequence rounded to 128, head size to 32.
    """
    rows = h.batch * h.query_heads * h.seq
    held = [save(ld, t) for t in (q, k, v)]
    out = ld.new(q.n, q.b)
    lse = ld.new(h.batch * h.query_heads * (-(-h.seq // 32) * 32), 4)
    held += [save(ld, out), save(ld, lse)]
    sizes = (q.n, k.n, v.n)
    bytes_each = q.b
    if kind == "efficient":
        workspace = rows * (-(-h.head_dim // 64) * 64) * 4 + rows * 4
    elif kind == "flash":
        rounded = h.batch * h.query_heads * (-(-h.seq // 128) * 128)
        workspace = rounded * (-(-h.head_dim // 32) * 32) * 4 + rounded * 4
    else:  # the CPU's flash kernel: small per-thread buffers only
        workspace = 0

    def back(g: Tensor, *saved):
        grads = tuple(ld.new(n, bytes_each) for n in sizes)
        space = ld.buffer(workspace, "workspaces") if workspace else None
        # flash writes dk and dv per query head and sums over each group afterwards
        wide = [ld.new(sizes[1] * h.groups, bytes_each) for _ in range(2)] if kind == "flash" and h.groups > 1 else None
        del space, wide
        return grads

    return record(ld, out, (q, k, v), back, held)


def matmul4(ld: Ledger, x: Tensor, y: Tensor, n_out: int, copies: tuple[bool, bool] = (False, False)) -> Tensor:
    """torch.matmul of two [B, H, ., .] tensors: bmm, after a copy of each operand that cannot be viewed so."""
    if copies[0]:
        x = copy(ld, x)
    if copies[1]:
        y = copy(ld, y)
    held = []
    if y.requires_grad:
        held.append(save(ld, x))
    if x.requires_grad:
        held.append(save(ld, y))
    out = ld.new(n_out, x.b)
    if held:
        sizes = (x.n, y.n)
        wants = (x.requires_grad, y.requires_grad)

        def back(g: Tensor, *saved):
            return tuple(ld.new(n, g.b) if want else None for n, want in zip(sizes, wants, strict=True))

        record(ld, out, (x, y), back, held)
    return out


def softmax(ld: Ledger, x: Tensor, b: int, workspace: bool) -> Tensor:
    """softmax over the last dimension into `b` bytes; saves its result. On CUDA the backward takes one more
    tensor of the gradient's size (`_softmax_backward_data` makes grad * output first; design/planner.md)."""
    out = ld.new(x.n, b)
    if x.requires_grad:
        x_b = x.b

        def back(g: Tensor, saved):
            space = ld.buffer(g.n * g.b, "workspaces") if workspace else None
            grad = ld.new(g.n, x_b)
            del space
            return (grad,)

        record(ld, out, (x,), back, [save(ld, out)])
    return out


def eager_attention(
    ld: Ledger, q: Tensor, k: Tensor, v: Tensor, h: Heads, half: int, softcap: bool, cuda: bool
) -> tuple[Tensor, Tensor]:
    """transformers' eager_attention_forward: (output, attention weights)."""
    split = h.batch > 1  # [B, S, H, D] in memory: B and H merge to one dimension only where B is 1
    strided = split and (h.groups == 1 or h.key_heads == 1)
    keys = repeat_kv(ld, k, h.groups, h.key_heads)
    values = repeat_kv(ld, v, h.groups, h.key_heads)
    a, b = (cast(ld, q, half), cast(ld, keys, half)) if half else (q, keys)
    weights = matmul4(ld, a, b, h.scores, (split, strided))
    del a, b
    weights = unary(ld, weights)  # * scaling
    if softcap:
        weights = unary(ld, weights)
        weights = unary(ld, weights, keeps="output")
        weights = unary(ld, weights)
    weights = unary_through(ld, weights)  # + mask
    weights = cast(ld, softmax(ld, weights, 4, cuda), q.b)
    probabilities, values = (cast(ld, weights, half), cast(ld, values, half)) if half else (weights, values)
    out = matmul4(ld, probabilities, values, q.n, (False, strided))
    del probabilities
    out = copy(ld, out)
    return out, weights


def unary_through(ld: Ledger, x: Tensor) -> Tensor:
    """An operation whose backward hands the gradient on as it is (adding a mask)."""
    out = ld.new(x.n, x.b)
    return record(ld, out, (x,), None, []) if x.requires_grad else out


def concatenate(ld: Ledger, x: Tensor, y: Tensor) -> Tensor:
    """torch.cat of two tensors along the last dimension."""
    return _cat(ld, x, y)


def gelu_new(ld: Ledger, x: Tensor, half: int) -> Tensor:
    """transformers' NewGELUActivation: 0.5 x (1 + tanh(c (x + 0.044715 x^3))), operation by operation."""
    left = unary(ld, x)
    cube = unary(ld, _power_three(ld, x, half))
    inner = add(ld, x, cube)
    del cube
    inner = unary(ld, inner)
    inner = unary(ld, inner, keeps="output")  # tanh
    right = unary_through(ld, inner)
    del inner
    return multiply(ld, left, right)


def _power_three(ld: Ledger, x: Tensor, half: int) -> Tensor:
    """torch.pow(x, 3): fp32 under autocast."""
    return _power_two(ld, cast(ld, x, 4) if half else x)


def math_attention(ld: Ledger, q: Tensor, k: Tensor, v: Tensor, h: Heads, cuda: bool) -> Tensor:
    """_scaled_dot_product_attention_math: half-precision inputs run in fp32, scores and all."""
    out_b = q.b
    q, k, v = (cast(ld, t, 4) for t in (q, k, v))
    bias = ld.new(h.seq * h.seq, 4)
    k, v = repeat_kv(ld, k, h.groups, h.key_heads), repeat_kv(ld, v, h.groups, h.key_heads)
    q, k = unary(ld, q), unary(ld, k)
    scores = matmul4(ld, q, k, h.scores, (h.batch > 1, h.batch > 1))
    scores = unary_through(ld, scores)
    del bias
    weights = softmax(ld, scores, 4, cuda)
    del scores
    out = matmul4(ld, weights, v, q.n)
    del weights
    return cast(ld, out, out_b)
