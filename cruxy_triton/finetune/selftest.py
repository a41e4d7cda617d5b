"""Whether a card computes in 16 bits what it should: products and softmax against float32, before a run starts.

Cards of the GTX 16 series were seen to give NaN in float16 (https://github.com/pytorch/pytorch/issues/58123,
https://github.com/pytorch/pytorch/issues/77955). A run whose card fails here computes in float32.
"""

from collections.abc import Callable

import torch

from cruxy_triton.errors import UserError

WIDTH, ROWS, VOCABULARY = 1024, 64, 32_000
# Of sum |a||b|: four roundings to 16 bits, of the result and of what a kernel adds up in parts. A product of float32
# sums has one of them, of the result alone, which is far smaller than sum |a||b|.
ROUNDINGS = 4

Operation = Callable[..., torch.Tensor]


def faults(
    device: torch.device, dtype: torch.dtype, *, matmul: Operation = torch.matmul, softmax: Operation = torch.softmax
) -> list[str]:
    """What `matmul` and `softmax` get wrong on `device` in `dtype`, in words; none where they are right."""
    unit = torch.finfo(dtype).eps / 2
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    found = []
    x, y, wide = drawn(ROWS, WIDTH), drawn(WIDTH, WIDTH), drawn(ROWS, WIDTH)
    # As a layer multiplies: forward, gradient of its input, gradient of its weight.
    for name, a, b in (("x W^T", x, y.T), ("g W", x, y), ("g^T x", wide.T, x)):
        product, exact = matmul(a, b).float(), torch.matmul(a.float(), b.float())
        allowed = ROUNDINGS * unit * torch.matmul(a.float().abs(), b.float().abs())
        if fault := _fault(product, exact, allowed):
            found.append(f"the product {name} of {list(a.shape)} and {list(b.shape)} {fault}")
    logits = 4 * drawn(ROWS, VOCABULARY)
    found_softmax, exact = softmax(logits, dim=-1).float(), torch.softmax(logits.float(), dim=-1)
    # The smallest numbers that float16 has are rounded coarser than the others.
    allowed = ROUNDINGS * unit * exact + torch.finfo(dtype).smallest_normal
    if fault := _fault(found_softmax, exact, allowed):
        found.append(f"softmax over {VOCABULARY:,} {fault}")
    return found


def _fault(found: torch.Tensor, exact: torch.Tensor, allowed: torch.Tensor) -> str | None:
    wrong = int((~found.isfinite()).sum())
    if wrong:
        return f"has {wrong:,} of {found.numel():,} values that are no numbers"
    off = (found - exact).abs()
    if bool((off > allowed).any()):
        return f"is off by {float(off.max()):.3g}, where rounding explains {float(allowed[off > allowed].max()):.2g}"
    return None


def trusted(dtype: torch.dtype, device: torch.device, asked: str, say: Callable[[str], None]) -> torch.dtype:
    """`dtype`, or float32 where `device` gets it wrong, which `say` is told.

    Raises UserError where that dtype was `asked` for by name and is wrong.
    """
    if device.type != "cuda" or dtype is torch.float32:
        return dtype
    wrong = faults(device, dtype)
    torch.cuda.empty_cache()  # the plan asks what is free
    return _or_float32(dtype, wrong, torch.cuda.get_device_name(device), asked, say)


def _or_float32(
    dtype: torch.dtype, wrong: list[str], card: str, asked: str, say: Callable[[str], None]
) -> torch.dtype:
    if not wrong:
        return dtype
    name = str(dtype).removeprefix("torch.")
    what = f"{card} computes wrong in {name}: {'; '.join(wrong)}"
    if asked == name:
        raise UserError(f"--dtype {name}: {what}; give --dtype float32, or try another driver or version of torch")
    say(
        f"warning: {what}. Weights, adapters and all that is computed are float32 instead, which takes twice the "
        "memory for what is not in 4 bits; another driver or version of torch may be right"
    )
    return torch.float32
