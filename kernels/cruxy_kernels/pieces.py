"""Many tensors as a few flat buffers: how the PyTorch path works on 300 small tensors with tens of operators.

The tensors are cut into pieces of a size that a core's cache holds: a run of small tensors, or a slice of a
large one. A piece owns flat buffers and, in each, one view for every tensor of the run, so copying tensors in
and out is one `torch._foreach_copy_`, and everything in between one operator a piece.
"""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cruxy_kernels.codec_reference import BLOCK

# Elements a piece: large enough that both threads of a small machine share an operator, small enough that
# its buffers stay in the cache. On an accelerator a launch costs more than a cache miss.
PIECE_CPU = 1 << 16
PIECE_ACCELERATOR = 1 << 20


class Piece:
    """A run of whole tensors, or one slice of a large tensor.

    indices: positions of the tensors in the caller's lists.
    sizes: elements each of them takes in the buffers (their own, rounded up to `align`).
    start: first element of the slice; 0 for a run.
    padded: whether some size is larger than its tensor.
    flat, views: for each buffer, all of it (1-D) and its views in the tensors' shapes.
    codes, scales: the same for the 8-bit momentum, where there is one.
    """

    def __init__(self, indices: list[int], shapes: list[torch.Size], sizes: list[int], start: int, sliced: bool):
        self.indices, self.shapes, self.sizes, self.start, self.sliced = indices, shapes, sizes, start, sliced
        self.numel = sum(sizes)
        self.padded = self.numel > sum(math.prod(shape) for shape in shapes)
        self.flat: list[Tensor] = []
        self.views: list[list[Tensor]] = []

    def bind(self, storage: Tensor, codes: Tensor | None, scales: Tensor | None) -> None:
        self.flat = list(storage[:, : self.numel].unbind(0))
        self.views = [self._split(flat) for flat in self.flat]
        if codes is not None and scales is not None:
            self.codes, self.scales = codes[: self.numel], scales[: self.numel // BLOCK]
            self.code_views = self._split(self.codes)
            counts = [size // BLOCK for size in self.sizes]
            self.scale_views = list(self.scales.split(counts))

    def _split(self, flat: Tensor) -> list[Tensor]:
        parts = flat.split(self.sizes)
        return [part[: math.prod(shape)].view(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def select(self, tensors: Sequence[Tensor], unit: int = 1) -> list[Tensor]:
        """The piece's share of the tensors; `unit` elements of the parameter stand for one of theirs."""
        if self.sliced:
            first = self.start // unit
            count = -(-math.prod(self.shapes[0]) // unit)
            return [tensors[self.indices[0]].detach().view(-1)[first : first + count]]
        return [tensors[i] for i in self.indices]


@functools.lru_cache(maxsize=64)
def _plan(
    shapes: tuple[torch.Size, ...],
    sliceable: tuple[bool, ...],
    device: torch.device,
    dtype: torch.dtype,
    buffers: int,
    coded: bool,
) -> list[Piece]:
    limit = PIECE_CPU if device.type == "cpu" else PIECE_ACCELERATOR
    align = BLOCK if coded else 1
    pieces: list[Piece] = []
    run: list[int] = []
    sizes: list[int] = []

    def close() -> None:
        if run:
            pieces.append(Piece(run.copy(), [shapes[i] for i in run], sizes.copy(), 0, sliced=False))
            run.clear()
            sizes.clear()

    for index, shape in enumerate(shapes):
        numel = math.prod(shape)
        size = -(-numel // align) * align
        if numel > limit and sliceable[index]:
            for start in range(0, numel, limit):
                part = min(limit, numel - start)
                padded = -(-part // align) * align
                pieces.append(Piece([index], [torch.Size([part])], [padded], start, sliced=True))
        elif numel:
            if sum(sizes) + size > limit:
                close()
            run.append(index)
            sizes.append(size)
    close()
    longest = max((piece.numel for piece in pieces), default=0)
    storage = torch.zeros((buffers, longest), dtype=dtype, device=device)
    codes = torch.zeros(longest, dtype=torch.int8, device=device) if coded else None
    scales = torch.zeros(longest // BLOCK, dtype=torch.bfloat16, device=device) if coded else None
    for piece in pieces:
        piece.bind(storage, codes, scales)
    return pieces


def cut(buffers: int, dtype: torch.dtype, *lists: Sequence[Tensor], coded: bool = False) -> list[Piece]:
    """The pieces of parallel lists of tensors (the same shapes in each); empty tensors are left out.

    The plan, and with it the contents of the buffers, is shared by every call with the same shapes.
    """
    if not lists[0]:
        return []
    sliceable = tuple(all(t.is_contiguous() for t in same) for same in zip(*lists, strict=True))
    return _plan(tuple(t.shape for t in lists[0]), sliceable, lists[0][0].device, dtype, buffers, coded)


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source into its target, converting dtypes."""
    torch._foreach_copy_(list(targets), list(sources))  # pyright: ignore[reportPrivateImportUsage]
