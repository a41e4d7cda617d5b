"""The operations of a causal language model on sized tensors: what each allocates, saves and gives back.

Every function mirrors one PyTorch operation (or one function of transformers 5 or peft 0.21 that is a few of
them) in the order in which it allocates; which operands autograd saves is read from PyTorch's
`tools/autograd/derivatives.yaml`. `n` counts elements, `b` bytes per element; `half` is autocast's width in bytes,
0 where autocast is off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cruxy_triton.planner.autograd import Parameter, Tape, Tensor, operation
from cruxy_triton.planner.shape import Linear
from cruxy_triton.planner.workspaces import nf4_absmax


def cast(tape: Tape, x: Tensor, b: int) -> Tensor:
    """x.to(dtype of `b` bytes); x itself where it has that dtype already."""
    if x.b == b:
        return x
    x_b = x.b
    return operation(tape, (x,), (x.n, b), lambda g: (g if g.b == x_b else tape.new(g.n, x_b),))


def copy(tape: Tape, x: Tensor) -> Tensor:
    """x.clone(), x + mask and the like: the gradient passes through unchanged."""
    return operation(tape, (x,), (x.n, x.b))


def unary(tape: Tape, x: Tensor, keep: Sequence[Tensor] = (), keep_out: bool = False) -> Tensor:
    """One elementwise operation; `keep` and `keep_out`: what its backward reads."""
    return operation(tape, (x,), (x.n, x.b), lambda g, *s: (tape.new(g.n, g.b),), keep=keep, keep_out=keep_out)


def part(tape: Tape, x: Tensor, n: int, b: int = 0, view: bool = True) -> Tensor:
    """`n` elements of, or from, x: a slice, a mean, an expansion. Its backward makes a tensor of x's size."""
    size = (x.n, x.b)
    return operation(tape, (x,), (n, b or x.b), lambda g, *s: (tape.new(*size),), view=view)


def add(tape: Tape, x: Tensor, y: Tensor) -> Tensor:
    n = max(x.n, y.n)
    return operation(tape, (x, y), (n, max(x.b, y.b)), expected=[(n, x.b), (n, y.b)])


def concatenate(tape: Tape, x: Tensor, y: Tensor) -> Tensor:
    """torch.cat; the gradients are views."""
    sizes = (x.n, y.n)
    return operation(tape, (x, y), (x.n + y.n, x.b), lambda g: tuple(Tensor(g.storage, n, g.b) for n in sizes))


def product(tape: Tape, x: Tensor, y: Tensor, n: int, broadcast: bool = False, turned: bool = False) -> Tensor:
    """A product of x and y with `n` elements: saves each factor that the other's gradient is made of.

    `broadcast`: elementwise, gradients have the result's size before the engine sums them.
    `turned`: y was transposed for it, and so is its gradient.
    """
    keep = [factor for factor, other in ((x, y), (y, x)) if other.requires_grad]
    sizes = [n if broadcast else factor.n for factor in (x, y)]
    wants = (x.requires_grad, y.requires_grad)

    def back(g: Tensor, *saved):
        grads = [tape.new(size, g.b) if want else None for size, want in zip(sizes, wants, strict=True)]
        if turned and grads[1] is not None:
            grads[1].view = True
        return grads

    expected = [(x.n, x.b), (y.n, y.b)] if broadcast else ()
    return operation(tape, (x, y), (n, max(x.b, y.b) if broadcast else x.b), back, keep=keep, expected=expected)


def multiply(tape: Tape, x: Tensor, y: Tensor) -> Tensor:
    """x * y; the smaller one may be broadcast."""
    return product(tape, x, y, max(x.n, y.n), broadcast=True)


def _autocast_weight(tape: Tape, w: Parameter, b: int) -> Tensor:
    """The weight in autocast's dtype; casts of trainable fp32 leaves are cached until autocast ends."""
    cache = tape.autocast_cache
    if w.b == b or cache is None or not w.trainable:
        return cast(tape, w, b)
    if id(w) not in cache:
        cache[id(w)] = cast(tape, w, b)
    return cache[id(w)]


def linear(tape: Tape, x: Tensor, w: Parameter, n_out: int, half: int = 0) -> Tensor:
    """F.linear of [T, in] by [out, in]."""
    weight: Tensor = w
    if half:
        x = cast(tape, x, half)
        weight = _autocast_weight(tape, w, half)
    return product(tape, x, weight, n_out, turned=True)


@dataclass(frozen=True)
class Linear4bit:
    """A bitsandbytes weight of `rows` x `cols`: packed codes, and one fp32 absmax per 64 (or 8 bits, nested)."""

    codes: object  # the storages, held for their lifetime
    rows: int
    cols: int
    nested: bool


def _dequantize(tape: Tape, w: Linear4bit, b: int) -> list:
    """bitsandbytes' dequantize_4bit: the weight in `b` bytes, plus the absmax in fp32 where it is nested."""
    n = w.rows * w.cols
    held = [tape.buffer(nf4_absmax(n), "workspaces")] if w.nested else []  # the offset is added in place
    return [*held, tape.buffer(n * b, "workspaces")]


def linear_4bit(tape: Tape, x: Tensor, w: Linear4bit, tokens: int, compute: int) -> Tensor:
    """bnb.nn.Linear4bit.forward: x in the compute dtype, dequantize, multiply, back to x's dtype.

    MatMul4Bit saves the packed weight alone; its backward dequantizes again and multiplies.
    """
    x_b = x.b
    xc = cast(tape, x, compute)
    # here gemm_4bit adds the offset out of place (bitsandbytes/backends/cuda/ops.py)
    absmax = tape.buffer(nf4_absmax(w.rows * w.cols), "workspaces") if w.nested else None
    weight = _dequantize(tape, w, compute)
    n_in = xc.n

    def back(g: Tensor):
        parts = _dequantize(tape, w, compute)
        if g.b != compute:
            parts.append(tape.buffer(w.rows * w.cols * g.b, "workspaces"))
        return (tape.new(n_in, g.b),)

    out = operation(tape, (xc,), (tokens * w.rows, compute), back)
    del weight, absmax, xc
    return cast(tape, out, x_b)


@dataclass
class Lora:
    """Adapter weights A [r, in] and B [out, r] of the linear layer `on`; with DoRA the lengths of its rows [out]."""

    a: Parameter
    b: Parameter
    rank: int
    dropout: float
    on: Linear
    lengths: Parameter | None = None


def dropout(tape: Tape, x: Tensor, p: float) -> Tensor:
    """F.dropout in training: native_dropout keeps a mask of one byte per element; nothing at p = 0."""
    if p == 0:
        return x
    mask = tape.new(x.n, 1)
    return unary(tape, x, (mask,))


def _lora_branch(tape: Tape, x: Tensor, lora: Lora, tokens: int, n_out: int, half: int) -> Tensor:
    """lora_B(lora_A(dropout(x))) * scaling"""
    return unary(tape, _adapted(tape, dropout(tape, x, lora.dropout), lora, tokens, n_out, half))


def _adapted(tape: Tape, x: Tensor, lora: Lora, tokens: int, n_out: int, half: int) -> Tensor:
    """lora_B(lora_A(x))"""
    return linear(tape, linear(tape, x, lora.a, tokens * lora.rank, half), lora.b, n_out, half)


def _weight(tape: Tape, base: Parameter | Linear4bit, compute: int) -> Tensor:
    """peft's dequantize_module_weight: the base's weight, without a graph."""
    if not isinstance(base, Linear4bit):
        return base.detach()
    absmax = tape.buffer(nf4_absmax(base.rows * base.cols), "workspaces") if base.nested else None
    weight = tape.new(base.rows * base.cols, compute)
    del absmax
    return weight


def _product_of(tape: Tape, lora: Lora, half: int) -> tuple[Tensor, list[Tensor]]:
    """B A [in, out], made by feeding A an identity matrix, and what autograd keeps of that: nobody takes its gradient,
    but the graph lives as long as the product, unless checkpointing holds its saved tensors."""
    rows, cols, b = lora.on.rows, lora.on.cols, half or 4
    eye = tape.new(cols * cols, 4)
    fed = cast(tape, eye, b)
    if half:
        _autocast_weight(tape, lora.a, half)
    down = tape.new(cols * lora.rank, b)
    held = [] if tape.frames else [fed, down]
    del fed
    if half:
        _autocast_weight(tape, lora.b, half)
    return tape.new(cols * rows, b), held


def _dora(tape: Tape, x: Tensor, result: Tensor, base, lora: Lora, tokens: int, half: int, compute: int) -> Tensor:
    """peft.tuners.lora.dora.DoraLinearLayer.forward, and its sum with the base's result (arXiv 2402.09353)."""
    assert lora.lengths is not None
    rows, cols = lora.on.rows, lora.on.cols
    if lora.dropout:
        x = dropout(tape, x, lora.dropout)
    delta, held = _product_of(tape, lora, half)
    delta = cast(tape, delta, x.b)
    weight = cast(tape, _weight(tape, base, compute), x.b)
    scaled = tape.new(rows * cols, x.b)
    total = tape.new(rows * cols, x.b)
    del scaled
    norm = tape.new(rows, x.b)
    del total
    scale = operation(tape, (lora.lengths,), (rows, 4), lambda g, *s: (tape.new(g.n, g.b),), keep=(norm,))
    del norm
    branch = _adapted(tape, x, lora, tokens, tokens * rows, half)
    plain = result
    if lora.dropout:  # the base's result for what dropout left
        factors = (cast(tape, x, half), cast(tape, weight, half)) if half else (x, weight)
        plain = product(tape, *factors, tokens * rows, turned=True)
        del factors
    elif lora.on.bias:
        plain = copy(tape, result)
    first = multiply(tape, copy(tape, scale), plain)
    second = unary(tape, multiply(tape, scale, branch))
    extra = add(tape, first, second)
    del first, second, delta, weight, held, branch, plain, scale
    return add(tape, result, extra)


def lora_linear(
    tape: Tape, x: Tensor, base, lora: Lora | None, tokens: int, rows: int, half: int, compute: int
) -> Tensor:
    """peft.tuners.lora.Linear.forward (or bnb's Linear4bit), on a frozen or trainable base."""
    n_out = tokens * rows
    if isinstance(base, Linear4bit):
        result = linear_4bit(tape, x, base, tokens, compute)
        if lora is None:
            return result
        result = copy(tape, result)  # peft clones the 4-bit result defensively
        expected = result.b
        if lora.lengths is not None:
            adapted = _dora(tape, x if half else cast(tape, x, lora.a.b), result, base, lora, tokens, half, compute)
            return adapted if half else cast(tape, adapted, expected)
        extra = _lora_branch(tape, x if half else cast(tape, x, lora.a.b), lora, tokens, n_out, half)
        return add(tape, result, extra if half else cast(tape, extra, expected))
    result = linear(tape, x, base, n_out, half)
    if lora is None:
        return result
    expected = result.b
    x = cast(tape, x, lora.a.b)
    if lora.lengths is not None:
        return cast(tape, _dora(tape, x, result, base, lora, tokens, half, compute), expected)
    result = add(tape, result, _lora_branch(tape, x, lora, tokens, n_out, half))
    return cast(tape, result, expected)


def power(tape: Tape, x: Tensor) -> Tensor:
    """x.pow(k); its backward makes x.pow(k - 1), k times that, and the product before the first two go."""

    def back(g: Tensor, saved):
        first, second = tape.new(saved.n, saved.b), tape.new(saved.n, saved.b)
        out = tape.new(saved.n, saved.b)
        del first, second
        return (out,)

    return operation(tape, (x,), (x.n, x.b), back, keep=(x,))


def rms_norm(tape: Tape, x: Tensor, rows: int, gemma: bool, weight: Parameter) -> Tensor:
    """LlamaRMSNorm (Qwen's is the same), or GemmaRMSNorm where `gemma`; over `rows` vectors."""
    wide = cast(tape, x, 4)
    variance = part(tape, power(tape, wide), rows, view=False)  # mean
    variance = unary(tape, variance)  # + eps
    scale = unary(tape, variance, keep_out=True)  # rsqrt
    del variance
    out = multiply(tape, wide, scale)
    del wide, scale
    if gemma:  # * (1 + weight), in fp32
        shifted = unary(tape, cast(tape, weight, 4)) if weight.trainable else tape.new(weight.n, 4)
        out = multiply(tape, out, shifted)
        return cast(tape, out, x.b)
    return multiply(tape, weight, cast(tape, out, x.b))


def layer_norm(tape: Tape, x: Tensor, rows: int, half: int) -> Tensor:
    """F.layer_norm: saves its input and two statistics per row; under autocast it runs and returns in fp32."""
    if half:
        x = cast(tape, x, 4)
    also = [(rows, 4), (rows, 4)]
    return operation(tape, (x,), (x.n, x.b), lambda g, *s: (tape.new(g.n, g.b),), keep=(x,), also=also)


def rotary(tape: Tape, x: Tensor, position: tuple[Tensor, Tensor]) -> Tensor:
    """(x * cos) + (rotate_half(x) * sin), `position` being (cos, sin)"""
    first = unary(tape, x, position[:1])
    low, high = part(tape, x, x.n // 2), part(tape, x, x.n // 2)
    turned = concatenate(tape, unary(tape, high), low)
    del low, high
    second = unary(tape, turned, position[1:])
    del turned
    return add(tape, first, second)


def gelu_new(tape: Tape, x: Tensor, half: int) -> Tensor:
    """transformers' NewGELUActivation: 0.5 x (1 + tanh(c (x + 0.044715 x^3))), operation by operation."""
    left = unary(tape, x)
    cube = unary(tape, power(tape, cast(tape, x, 4) if half else x))  # torch.pow: fp32 under autocast
    inner = add(tape, x, cube)
    del cube
    inner = unary(tape, inner)
    inner = unary(tape, inner, keep_out=True)  # tanh
    right = copy(tape, inner)
    del inner
    return multiply(tape, left, right)
