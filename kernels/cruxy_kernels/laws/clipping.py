"""Clipping of each tensor's gradient against its own history (AdaGC, arXiv 2502.11034; docs/laws.md, section 2.6).

    n = norm of the tensor's gradient, unscaled        G = norm of all gradients together, unscaled
    h = min(1, 1 / G)           while the tensor warms up, then min(1, 1.05 k / n)
    k <- min(k, h n)            while the tensor warms up, then .98 k + .02 h n

h multiplies the gradient before it enters any momentum. `tensor_law` is the specification; in Triton the programs of
the control kernel behind those of the rows do the same, one per tensor, so that no launch is added.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

from collections.abc import Sequence

import torch
from torch import Tensor

from .._triton import HAS_TRITON
from ..tables import to_device
from . import layout as L


class TensorClip:
    """The tensors of a step, their histories and, after `control_step(clip=...)`, their factors.

    Args:
        history: float32 (n, layout.NUM_HISTORY), contiguous, changed in place: the histories of all tensors that
            there are, zeros for one that is new. Those that are not in the step keep theirs.
        ids: of each tensor in the step its row of `history`, no row twice.
        spans: int32 (len(ids), 2) on the CPU: the first row of telemetry that is a tensor's and how many are,
            together all rows once. None: row i of telemetry is tensor i.

    factors: float32 (len(ids),) on the history's device, for `update_(grad_factors=...)`.

    Raises ValueError for a history, ids or spans that do not fit.
    """

    def __init__(self, history: Tensor, ids: Sequence[int], spans: Tensor | None = None) -> None:
        if history.dtype != torch.float32 or history.dim() != 2 or history.shape[1] != L.NUM_HISTORY:
            raise ValueError(
                f"history is {history.dtype} of shape {tuple(history.shape)}; expected float32 (n, {L.NUM_HISTORY})"
            )
        if not history.is_contiguous():
            raise ValueError("history is not contiguous; expected one contiguous float32 tensor")
        if ids and not (min(ids) >= 0 and max(ids) < len(history) and len(set(ids)) == len(ids)):
            raise ValueError(f"ids are not different numbers from 0 to below {len(history)}, the rows of history")
        if spans is not None:
            _check_spans(spans, len(ids))
        self.history = history
        self.index = to_device(torch.tensor(ids, dtype=torch.int32), history.device)
        self.spans = None if spans is None else to_device(spans.to(torch.int32), history.device)
        self.telemetry_rows = len(ids) if spans is None else int(spans[:, 1].sum())
        self.factors = torch.ones(len(ids), device=history.device)

    def norms(self, telemetry: Tensor) -> Tensor:
        """The norm of each tensor's gradient as stored, float32 (len(ids),), of the step's telemetry (rows, 4)."""
        squares = telemetry[:, L.SUM_SQ]
        if self.spans is not None:
            first, count = self.spans.long().unbind(1)
            tensor = torch.repeat_interleave(count, output_size=self.telemetry_rows)
            before = (count.cumsum(0) - count)[tensor]
            row = first[tensor] + torch.arange(self.telemetry_rows, device=first.device) - before
            squares = torch.zeros(len(count), dtype=squares.dtype, device=first.device).index_add_(
                0, tensor, squares[row]
            )
        return squares.sqrt()


def _check_spans(spans: Tensor, tensors: int) -> None:
    # Read where they lie, on the CPU, and when they are made: no step waits for it.
    fits = spans.device.type == "cpu" and spans.shape == (tensors, 2) and not spans.is_floating_point()
    if fits:
        covered = spans[spans[:, 0].argsort(stable=True)].tolist()
        covered = [span for span in covered if span[1]]
        ends = [0, *[first + count for first, count in covered]]
        fits = all(count >= 0 for _, count in spans.tolist()) and [first for first, _ in covered] == ends[:-1]
    if not fits:
        raise ValueError(f"spans are not {tensors} pairs (first row, rows) on the CPU that cover every row once")


def tensor_law(clip: TensorClip, telemetry: Tensor, norm: Tensor, inverse: Tensor | float, bad: Tensor) -> None:
    """The specification: new histories and factors.

    telemetry: (rows, 4). norm: of all gradients, unscaled. inverse: of the loss scale. bad: the step is skipped. The
    last three are 0-dim.
    """
    norms = clip.norms(telemetry) * inverse
    before, seen = clip.history[clip.index.long()].to(norms.dtype).unbind(1)
    warming = seen < L.TENSOR_CLIP_WARMUP
    limit = torch.where(warming, L.TENSOR_CLIP_NORM / norm, L.TENSOR_CLIP_RATIO * before / norms)
    # A gradient that is all zeros says nothing of its tensor: a LoRA's first ones are.
    said = (norms > 0) & ~bad
    factors = torch.where(said, limit.clamp(max=1.0), 1.0)
    clipped = factors * norms
    smallest = torch.where(seen > 0, torch.minimum(before, clipped), clipped)
    average = L.TENSOR_CLIP_BETA * before + (1 - L.TENSOR_CLIP_BETA) * clipped
    after = torch.where(warming, smallest, average)
    new = torch.stack((after, (seen + 1).clamp(max=L.TENSOR_CLIP_WARMUP)), 1)
    old = torch.stack((before, seen), 1)
    clip.history[clip.index.long()] = torch.where(said[:, None], new, old).to(clip.history.dtype)
    clip.factors.copy_(factors)


if HAS_TRITON:
    import triton
    import triton.language as tl

    from .telemetry import sum_partials

    @triton.jit
    def clip_tensor(
        tensor,  # number of the tensor in this step
        telemetry,  # fp32 (rows, 4)
        history,  # fp32 (n, NUM_HISTORY)
        index,  # int32 (tensors,)
        spans,  # int32 (tensors, 2)
        factors,  # fp32 (tensors,)
        norm,
        inverse,
        good,
        HAS_SPANS: tl.constexpr,
        PARTIALS: tl.constexpr,
    ):
        """`tensor_law` of one tensor."""
        if HAS_SPANS:
            first, count = tl.load(spans + tensor * 2), tl.load(spans + tensor * 2 + 1)
            _, squares, _, _ = sum_partials(telemetry, first, count, PARTIALS)
        else:
            squares = tl.load(telemetry + tensor * 4 + L.SUM_SQ)
        own = tl.sqrt(squares) * inverse
        kept = history + tl.load(index + tensor) * L.NUM_HISTORY
        before = tl.load(kept + L.HISTORY_NORM)
        seen = tl.load(kept + L.HISTORY_SEEN)
        said = (own > 0) & good
        warming = seen < L.TENSOR_CLIP_WARMUP
        limit = tl.where(warming, L.TENSOR_CLIP_NORM / norm, L.TENSOR_CLIP_RATIO * before / own)
        factor = tl.where(said, tl.minimum(limit, 1.0), 1.0)
        clipped = factor * own
        smallest = tl.where(seen > 0, tl.minimum(before, clipped), clipped)
        average = L.TENSOR_CLIP_BETA * before + (1 - L.TENSOR_CLIP_BETA) * clipped
        tl.store(factors + tensor, factor)
        # Everything has been read: other warps may lag behind.
        tl.debug_barrier()
        if said:
            tl.store(kept + L.HISTORY_NORM, tl.where(warming, smallest, average))
            tl.store(kept + L.HISTORY_SEEN, tl.minimum(seen + 1, L.TENSOR_CLIP_WARMUP))
