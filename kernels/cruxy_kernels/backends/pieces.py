"""Telemetry and updates in PyTorch: the specifications of laws/ and rules/, over a few flat buffers.

300 small tensors would take 300 times a dozen operators. So the tensors are cut into pieces of a size that a core's
cache holds (a run of small tensors, or a slice of a large one), copied into flat buffers with one
`torch._foreach_copy_` each, and everything in between is one operator per piece.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from types import SimpleNamespace

import torch
from torch import Tensor

from ..codec import BLOCK, scale_name
from ..laws import layout as L
from ..laws.telemetry import combine, statistics
from ..rounding import random_bits, round_stochastic
from ..rules import Rule

# Elements per piece: large enough that both threads of a small machine share an operator, small enough that
# its buffers stay in the cache. On an accelerator a launch costs more than a cache miss.
PIECE_CPU = 1 << 16
PIECE_ACCELERATOR = 1 << 20


class Piece:
    """A run of whole tensors, or one slice of a large tensor.

    indices: positions of the tensors in the caller's lists.
    sizes: elements each of them takes in a buffer (their own, rounded up to whole blocks).
    start: first element of the slice; 0 for a run.
    """

    def __init__(self, indices: list[int], shapes: list[torch.Size], sizes: list[int], start: int, sliced: bool):
        self.indices, self.shapes, self.sizes, self.start, self.sliced = indices, shapes, sizes, start, sliced
        self.numel = sum(sizes)

    def select(self, tensors: Sequence[Tensor], unit: int = 1) -> list[Tensor]:
        """The piece's share of the tensors; `unit` elements of the parameter stand for one of theirs."""
        if self.sliced:
            first = self.start // unit
            count = -(-math.prod(self.shapes[0]) // unit)
            return [tensors[self.indices[0]].detach().view(-1)[first : first + count]]
        return [tensors[i].detach() for i in self.indices]

    def views(self, flat: Tensor, unit: int = 1) -> list[Tensor]:
        """A buffer's views in the tensors' shapes, flat ones for a `unit` above 1."""
        parts = flat.split([size // unit for size in self.sizes])
        shapes = self.shapes if unit == 1 else [(-(-math.prod(shape) // unit),) for shape in self.shapes]
        return [part[: math.prod(shape)].view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def load(self, tensors: Sequence[Tensor], dtype: torch.dtype, unit: int = 1) -> Tensor:
        """The piece's share of the tensors in one flat buffer of `dtype`, zeros between them."""
        flat = torch.zeros(self.numel // unit, dtype=dtype, device=tensors[self.indices[0]].device)
        copy_all(self.views(flat, unit), self.select(tensors, unit))
        return flat

    def spread(self, values: Tensor, indices: Sequence[int]) -> Tensor:
        """One value per tensor, of a list in which they stand at `indices`, as one per element of a buffer."""
        chosen = values[[indices[i] for i in self.indices]]
        sizes = torch.tensor(self.sizes, device=values.device)
        return torch.repeat_interleave(chosen, sizes, output_size=self.numel)

    def store(self, tensors: Sequence[Tensor], flat: Tensor, unit: int = 1) -> None:
        copy_all(self.select(tensors, unit), self.views(flat, unit))


@functools.lru_cache(maxsize=64)
def _cut(shapes: tuple[torch.Size, ...], sliceable: tuple[bool, ...], limit: int) -> list[Piece]:
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
        size = -(-numel // BLOCK) * BLOCK
        if numel > limit and sliceable[index]:
            for start in range(0, numel, limit):
                part = min(limit, numel - start)
                pieces.append(Piece([index], [torch.Size([part])], [-(-part // BLOCK) * BLOCK], start, sliced=True))
        elif numel:
            if sum(sizes) + size > limit:
                close()
            run.append(index)
            sizes.append(size)
    close()
    return pieces


def cut(*lists: Sequence[Tensor]) -> list[Piece]:
    """The pieces of parallel lists of tensors (the same shapes in each); empty tensors are left out."""
    first = lists[0]
    sliceable = tuple(all(t.is_contiguous() for t in same) for same in zip(*lists, strict=True))
    return _cut(tuple(t.shape for t in first), sliceable, PIECE_CPU if first[0].is_cpu else PIECE_ACCELERATOR)


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source into its target, converting dtypes."""
    torch._foreach_copy_(list(targets), list(sources))  # pyright: ignore[reportPrivateImportUsage]


def telemetry(grads: Sequence[Tensor], gamma: float, per_tensor: bool) -> Tensor:
    """`dispatch.gradient_telemetry`: (len(grads), 4), or the totals (4,)."""
    if per_tensor:
        return torch.stack([statistics(g, gamma) for g in grads])
    parts = [statistics(piece.load(grads, torch.float32), gamma) for piece in cut(grads)]
    return combine(torch.stack(parts)) if parts else torch.zeros(L.NUM_TELEMETRY, device=grads[0].device)


def row_values(control: Tensor, row: int) -> SimpleNamespace:
    """The values of a control row that a rule reads, as 0-dim tensors under the names of its formula."""
    slot = control[row].unbind(0)
    return SimpleNamespace(
        skip=slot[L.SKIP] > 0, step=slot[L.STEP], seed=slot[L.SEED], factor=slot[L.GRAD_FACTOR],
        lr=slot[L.LR_OUT], weight_decay=slot[L.WEIGHT_DECAY], beta1=slot[L.BETA1_OUT], beta2=slot[L.BETA2_OUT],
        eps=slot[L.EPS], correction1=slot[L.BIAS_CORRECTION1], correction2_sqrt=slot[L.BIAS_CORRECTION2_SQRT],
    )  # fmt: skip


def update(
    rule: Rule,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    state: Mapping[str, Sequence[Tensor]],
    control: Tensor,
    rows: Sequence[int] | None,
    ids: Sequence[int] | None,
    lr_multipliers: Tensor | None,
    grad_factors: Tensor | None,
    flags: Mapping[str, bool],
) -> None:
    """`dispatch.update_`, with arguments that it has checked; a launch per row, dtype pair and device."""

    def kind(i: int) -> tuple:
        types = (params[i].dtype, *[state[name][i].dtype for name in rule.state])
        return (0 if rows is None else rows[i], str(params[i].device), str(types))

    codecs = rule.codecs_of(state)
    for (row, _, _), run in groupby(sorted(range(len(params)), key=kind), key=kind):
        indices = list(run)
        p, g = [params[i] for i in indices], [grads[i] for i in indices]
        s = {name: [tensors[i] for i in indices] for name, tensors in state.items()}
        numbers = indices if ids is None else [ids[i] for i in indices]
        # To a CPU the copy has to be waited for: its values are read at once.
        c = row_values(control.to(p[0].device, non_blocking=p[0].is_cuda), row)
        dtype = torch.float64 if p[0].dtype == torch.float64 else torch.float32
        for piece in cut(p, g, *[s[name] for name in rule.state]):
            old_p, old = piece.load(p, dtype), []
            kept: list[tuple[Tensor, Tensor]] = []  # codes and scales as they were
            for name, codec in zip(rule.state, codecs, strict=True):
                if codec.decode_blocks is None:
                    old.append(piece.load(s[name], dtype))
                    continue
                codes = piece.load(s[name], codec.dtype, codec.packed)
                kept.append((codes, piece.load(s[scale_name(name)], torch.bfloat16, BLOCK)))
                old.append(codec.decode_blocks(codes.view(-1, BLOCK // codec.packed), kept[-1][1]).view(-1))
            multiplier, factor = (
                1.0 if values is None else piece.spread(values.to(p[0].device), indices)
                for values in (lr_multipliers, grad_factors)
            )
            new_g = piece.load(g, dtype) * c.factor * factor
            new_p, *new = rule.specification(old_p, new_g, *old, c, multiplier, **flags)
            new_p = torch.where(c.skip, old_p, new_p)
            random = None
            if p[0].dtype in (torch.float16, torch.bfloat16) or any(codec.random for codec in codecs):
                random = random_bits(c.seed, c.step, [numbers[i] for i in piece.indices], piece.sizes, piece.start)
            if random is not None and p[0].dtype in (torch.float16, torch.bfloat16):
                # A representable value survives the rounding, so parameters of a skipped step keep their bits.
                new_p = round_stochastic(new_p, random, p[0].dtype)
            piece.store(p, new_p)
            for number, (name, codec, before, after) in enumerate(zip(rule.state, codecs, old, new, strict=True)):
                if codec.encode_blocks is None:
                    piece.store(s[name], torch.where(c.skip, before, after))
                    continue
                bits = random.view(-1, BLOCK) if codec.random and random is not None else None
                codes, scales = codec.encode_blocks(after.view(-1, BLOCK), bits)
                piece.store(s[name], torch.where(c.skip, kept[number][0], codes.view(-1)), codec.packed)
                piece.store(s[scale_name(name)], torch.where(c.skip, kept[number][1], scales), BLOCK)
