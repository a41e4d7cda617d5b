"""Bytes that CUDA kernels take for their own duration and no dispatcher sees: `operations` and `trace` book these."""

from __future__ import annotations

NF4_BLOCK, NF4_NESTED_BLOCK = 64, 256  # bitsandbytes' block sizes: codes per absmax, absmax per second scale


def softmax_backward(nbytes: int) -> int:
    """`_softmax_backward_data` makes grad * output, one more tensor of the gradient's `nbytes`, before its kernel
    (pytorch: aten/src/ATen/native/cuda/SoftMax.cu)."""
    return nbytes


def efficient_backward(batch: int, heads: int, seq: int, head_dim: int) -> int:
    """Memory-efficient attention's backward: fp32 gradients in blocks of 64, and a sum per query (seen on sm_75)."""
    return batch * heads * seq * (-(-head_dim // 64) * 64 + 1) * 4


def flash_backward(batch: int, heads: int, seq: int, head_dim: int) -> int:
    """Flash attention's backward: an fp32 dq accumulator and row sums, the sequence rounded to 128 and the head size
    to 32 (flash-attention: mha_bwd of its CUDA extension)."""
    return batch * heads * (-(-seq // 128) * 128) * (-(-head_dim // 32) * 32 + 1) * 4


def nf4_absmax(n: int) -> int:
    """The fp32 absmax of `n` nested 4-bit codes, dequantized (bitsandbytes/functional.py, dequantize_4bit)."""
    return 4 * -(-n // NF4_BLOCK)
