"""What replaces functions of torch, transformers and TRL on `meta`: a trace then sees what a CUDA card would run."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

from cruxy_triton.planner.step import Step

aten = torch.ops.aten


class _NoKernel:
    """Stands for a Triton kernel: takes any grid and arguments, allocates nothing."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def _repeat(x: torch.Tensor, heads: int) -> torch.Tensor:
    b, h, s, d = x.shape
    if h == heads:
        return x
    return x[:, :, None].expand(b, h, heads // h, s, d).reshape(b, heads, s, d)


def _sdpa(kind: str) -> Callable[..., torch.Tensor]:
    """F.scaled_dot_product_attention as `kind` on CUDA."""

    def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if kind == "math":
            return aten._scaled_dot_product_attention_math(
                query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
            )[0]
        if kind == "flash":
            return aten._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, is_causal, False, scale=scale
            )[0]
        heads = query.shape[1]
        return aten._scaled_dot_product_efficient_attention(
            query,
            _repeat(key, heads),
            _repeat(value, heads),
            attn_mask,
            True,
            dropout_p,
            is_causal,
            scale=scale,
        )[0]

    return attention


class Autocast:
    """torch.autocast's casts for the functions that these models call; autocast itself does not know `meta`."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self.on = False
        self.cache: dict[int, torch.Tensor] = {}

    @contextmanager
    def active(self) -> Iterator[None]:
        self.on = True
        try:
            yield
        finally:
            self.on = False
            self.cache.clear()

    def cast(self, x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.dtype == self.dtype:
            return x
        if x.is_leaf and x.requires_grad and x.dtype == torch.float32 and self.on:
            if id(x) not in self.cache:
                self.cache[id(x)] = x.to(self.dtype)
            return self.cache[id(x)]
        return x.to(self.dtype)

    def low(self, function: Callable) -> Callable:
        return lambda *args, **kwargs: function(
            *(self.cast(a) for a in args), **{k: self.cast(v) for k, v in kwargs.items()}
        )

    def high(self, function: Callable) -> Callable:
        def wide(x: Any) -> Any:
            return x.float() if isinstance(x, torch.Tensor) and x.dtype == self.dtype else x

        return lambda *args, **kwargs: function(*(wide(a) for a in args), **{k: wide(v) for k, v in kwargs.items()})


def _torch(step: Step, autocast: Autocast | None) -> Iterator[Any]:
    """torch's functions as the card has them."""
    softmax, linear = F.softmax, F.linear

    def fused_softmax(x, dim=None, _stacklevel=3, dtype=None):
        if dtype == torch.float32 and x.dtype == torch.float16:
            return aten._softmax(x, dim, True)  # CUDA fuses the conversion
        return softmax(x, dim, dtype=dtype)

    def dropout(x, p=0.5, training=True, inplace=False):
        return aten.native_dropout(x, p, True)[0] if training and p > 0 else x

    def autocast_enabled(device="meta"):
        return autocast is not None

    def autocast_dtype(device):
        return autocast.dtype if autocast is not None else torch.float32

    attention = _sdpa(step.attention)

    def no_autocast(*args, **kwargs):
        return nullcontext()

    yield mock.patch.object(torch, "is_autocast_enabled", autocast_enabled)
    yield mock.patch.object(torch, "autocast", no_autocast)
    yield mock.patch.object(F, "softmax", fused_softmax)
    yield mock.patch.object(F, "dropout", dropout)
    if autocast is not None:
        attention = autocast.low(attention)
        yield mock.patch.object(F, "linear", autocast.low(linear))
        yield mock.patch.object(torch, "matmul", autocast.low(torch.matmul))
        yield mock.patch.object(F, "layer_norm", autocast.high(F.layer_norm))
        yield mock.patch.object(torch, "pow", autocast.high(torch.pow))
        yield mock.patch.object(torch, "get_autocast_dtype", autocast_dtype)
    yield mock.patch.object(F, "scaled_dot_product_attention", attention)


def _trl(step: Step) -> Iterator[Any]:
    """TRL's tiled head as it runs on a card, whose Triton kernels allocate nothing."""
    import trl.kernels.chunked_logprob as chunked

    # functions, since a mock would keep the tensors of its calls
    def triton_runs(device):
        return True

    def accumulate(acc, a, b):
        return None  # cuBLAS adds into acc without a copy

    if "trl.trainer.utils" not in sys.modules:
        # The backward pass asks it for one context manager; it would import the whole trainer for that.
        light: Any = types.ModuleType("trl.trainer.utils")
        light.maybe_gather_lm_head_ctx = lambda weight, bias: nullcontext()
        yield mock.patch.dict(sys.modules, {"trl.trainer.utils": light})
    if step.device == "cpu":
        return
    yield mock.patch.object(chunked, "_use_triton", triton_runs)
    yield mock.patch.object(chunked, "_forward_kernel", _NoKernel())
    yield mock.patch.object(chunked, "_backward_kernel", _NoKernel())
    yield mock.patch.object(chunked, "_addmm_fp32", accumulate)


def _masks(step: Step, model: Any) -> Iterator[Any]:
    """transformers cannot look into a mask on meta; the models get what they would have made of a full one."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    module = sys.modules[type(base).__module__]

    def make(config=None, inputs_embeds=None, **_: Any) -> torch.Tensor | None:
        assert inputs_embeds is not None
        if step.attention != "eager":
            return None
        batch, seq = inputs_embeds.shape[:2]
        return torch.empty((batch, 1, seq, seq), dtype=inputs_embeds.dtype, device=inputs_embeds.device)

    for name in vars(module):
        if name.startswith("create_") and name.endswith("_mask"):
            yield mock.patch.object(module, name, make)


def _cpu() -> Iterator[Any]:
    """The CPU's SDPA kernel; everything else runs as it is."""

    def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        return aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
        )[0]

    def autocast_enabled(device="meta"):
        return False

    yield mock.patch.object(F, "scaled_dot_product_attention", attention)
    yield mock.patch.object(torch, "is_autocast_enabled", autocast_enabled)


def _experts() -> Iterator[Any]:
    """transformers' own product of grouped experts, which has a form without values; torch's is for bfloat16 alone."""
    try:
        from transformers.integrations import moe
    except ImportError:
        return

    def can_use_grouped_mm(input, weight, offs):
        return False

    yield mock.patch.object(moe, "_can_use_grouped_mm", can_use_grouped_mm)


@contextmanager
def stand_ins(step: Step, autocast: Autocast | None, model: Any) -> Iterator[None]:
    """Everything of this file in place, as far as the step's device needs it."""
    patches = [*_masks(step, model), *_experts(), *(_trl(step) if step.chunked_loss else ())]
    with ExitStack() as stack:
        for patch in (*patches, *(_cpu() if step.device == "cpu" else _torch(step, autocast))):
            stack.enter_context(patch)
        yield
