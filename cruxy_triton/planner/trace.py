"""The training step itself on torch's `meta` device: real code, no values, every allocation recorded.

transformers' model, peft's LoRA, bitsandbytes' 4-bit layers and TRL's tiled head run as they are installed, so the
trace follows them by itself; it checks `footprint.py`, which writes the same step down by hand. A
`TorchDispatchMode` sees every storage come and go; what it cannot see (workspaces inside a kernel) is in
`workspace_bytes`, by operation. Composite operations that ask `is_cuda` are patched to what the card would run.

Two optimizer steps are traced: the first has no optimizer state yet. Models of three and four layers extrapolate
exactly to the peak allocated of the whole; what is reserved needs all layers.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cruxy_triton.planner import workspaces
from cruxy_triton.planner.ledger import Ledger, Storage
from cruxy_triton.planner.losses import TILE_VOCABULARY
from cruxy_triton.planner.meta_model import build
from cruxy_triton.planner.optimizers import OPTIMIZERS
from cruxy_triton.planner.replay import replay, smallest_pool
from cruxy_triton.planner.stand_ins import Autocast, stand_ins
from cruxy_triton.planner.step import Step
from cruxy_triton.planner.walk import load_events

aten = torch.ops.aten


@dataclass
class Traced:
    """What a traced run did: its allocations in order and the peak of each phase, bytes."""

    phases: dict[str, int]
    events: list[tuple[int, int]] = field(repr=False, default_factory=list)

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda name: self.phases[name])

    @property
    def peak_allocated(self) -> int:
        return self.phases[self.peak_phase]


class Recorder(TorchDispatchMode):
    """Books every storage that operations make, until it is released.

    `workspace(func, args, out)` gives the bytes that a kernel takes for its own duration.
    """

    def __init__(self, round_to: int, workspace: Callable[[Any, tuple, Any], int] | None = None):
        super().__init__()
        self.ledger = Ledger(round_to, record=True)
        self.workspace = workspace
        self._known: dict[int, weakref.ref] = {}

    def hold(self, nbytes: int) -> None:
        """Bytes that stay for good (a cuBLAS workspace), if any."""
        if nbytes:
            self.ledger.book(self.ledger.rounded(nbytes), "")

    def see(self, tensor: torch.Tensor) -> None:
        """Book the tensor's storage if it is new."""
        storage = tensor.untyped_storage()
        key = id(storage)
        known = self._known.get(key)
        if not storage.nbytes() or (known is not None and known() is storage):
            return
        size = self.ledger.rounded(storage.nbytes())
        ident = self.ledger.book(size, "")

        def gone(_: object) -> None:
            self._known.pop(key, None)
            self.ledger.release(ident, size, "")

        self._known[key] = weakref.ref(storage, gone)

    def _see_all(self, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            self.see(value)
        elif isinstance(value, (tuple, list)):
            for item in value:
                self._see_all(item)

    def __torch_dispatch__(self, func, kinds, args=(), kwargs=None):
        out = _masked_rows(func, args) if func is aten.index.Tensor else None
        if out is None:
            out = func(*args, **(kwargs or {}))
        self._see_all(out)
        extra = self.workspace(func, args, out) if self.workspace is not None else 0
        if extra:
            space = Storage(self.ledger, extra, "")
            del space
        return out


def _masked_rows(func: Any, args: Any) -> torch.Tensor | None:
    """x[mask] on meta, where the count cannot be known: every row is taken, the most that it can be."""
    source, indices = args[:2]
    index = indices[0]
    if index is None or index.dtype != torch.bool or source.device.type != "meta":
        return None
    return source.new_empty((index.numel(), *source.shape[index.ndim :]))


def workspace_bytes(func: Any, args: Any, out: Any) -> int:
    """Bytes that a CUDA kernel takes while it runs, by operation."""
    name = func._schema.name
    if name == "aten::_softmax_backward_data":
        return workspaces.softmax_backward(args[0].numel() * args[0].element_size())
    if name == "aten::_scaled_dot_product_efficient_attention_backward":
        return workspaces.efficient_backward(*args[1].shape)
    if name == "aten::_scaled_dot_product_flash_attention_backward":
        (b, h, s, d), grouped = args[1].shape, args[2].shape[1] != args[1].shape[1]
        wide = 2 * b * h * s * d * args[1].element_size() if grouped else 0  # dk and dv of all heads
        return workspaces.flash_backward(b, h, s, d) + wide
    if name == "bitsandbytes::gemm_4bit":  # absmax twice: dequantized, and with its offset
        (n, k), nested = args[2], len(args) > 7 and args[7] is not None
        return n * k * args[0].element_size() + (2 * workspaces.nf4_absmax(n * k) if nested else 0)
    return 0


def trace(step: Step, steps: int = 2) -> Traced:
    """Run `steps` optimizer steps of `step` on meta for a CUDA card and return what they allocated.

    Raises ImportError where transformers, peft, trl or bitsandbytes is needed and missing.
    """
    # What loading does to the allocator is not traced (from_pretrained needs a checkpoint): the walk has it.
    loading = load_events(step)
    recorder = Recorder(step.round_to, workspace_bytes)
    model = build(step)
    for tensor in (*model.parameters(), *model.buffers()):
        for part in (tensor, *_quant_parts(tensor)):
            recorder.see(part)
    ledger = recorder.ledger
    ledger.events = [(-ident, nbytes) for ident, nbytes in loading]
    autocast = Autocast(torch.bfloat16 if step.precision == "bfloat16" else torch.float16) if step.autocast else None
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.base_model.register_forward_hook(lambda *_: ledger.enter("loss"))  # all before it is the forward pass
    with stand_ins(step, autocast), recorder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _run(step, model, recorder, autocast, steps)
    ledger.enter("end")
    phases = {k: v for k, v in ledger.phases.items() if k != "end"}
    return Traced(phases, list(ledger.events))  # the model is released after this, which is no part of it


def _quant_parts(tensor: Any) -> Iterator[torch.Tensor]:
    state = getattr(tensor, "quant_state", None)
    while state is not None:
        for name in ("absmax", "code", "offset"):
            part = getattr(state, name, None)
            if isinstance(part, torch.Tensor):
                yield part
        state = getattr(state, "state2", None)


def _run(step: Step, model: Any, recorder: Recorder, autocast: Autocast | None, steps: int) -> None:
    ledger, optimizer = recorder.ledger, OPTIMIZERS[step.optimizer]
    trained = [p for p in model.parameters() if p.requires_grad]
    state: list[torch.Tensor] = []
    for index in range(steps):
        ids, mask, labels = (torch.empty((step.batch, step.seq), dtype=torch.int64, device="meta") for _ in range(3))
        ledger.enter("forward")
        if index == 0:
            recorder.hold(step.cublas_workspace)
        with autocast.active() if autocast else nullcontext():
            output = _tiled_loss(model, ids, labels) if step.chunked_loss else model(input_ids=ids, labels=labels)
        if step.upcast_outputs and not step.chunked_loss:
            output["logits"] = output["logits"].float()
        loss = output["loss"]
        if not step.keep_outputs:
            del output
        ledger.enter("backward")
        if index == 0:
            recorder.hold(step.cublas_workspace)
        loss.backward()
        output = None
        del loss, ids, mask, labels
        ledger.enter("optimizer")
        if not state:
            state = [_bytes(size) for p in trained for size in optimizer.tensors(p.numel())]
        held = [_bytes(p.numel() * optimizer.transient) for p in trained if optimizer.transient]
        del held
        if not step.keeps_gradients(index, steps):
            for parameter in trained:
                parameter.grad = None


def _tiled_loss(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    """The loss of TRL 1.16's SFTTrainer: its ChunkedLogProbFunction on the backbone's hidden states.

    What `add_fused_lm_head` and `compute_loss` do around it, without importing the trainer (10 s). All labels
    count, which is the most memory that a batch can take. tests/planner/test_trace.py holds the two together.
    """
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = base.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    labels = labels[:, 1:]
    mask = labels != -100
    head = base.get_output_embeddings()
    softcap = getattr(base.config, "final_logit_softcapping", None)
    per_token = ChunkedLogProbFunction.apply(
        hidden[mask],
        head.weight,
        head.bias,
        labels[mask],
        1.0,
        TILE_VOCABULARY,
        softcap,
        1.0,
        ("log_probs", "entropy", "is_top1"),
    )
    del hidden
    log_probs: Any
    log_probs, entropy, _, _, is_top1 = (
        None if x is None else x.new_zeros(mask.shape).masked_scatter(mask, x) for x in per_token
    )
    loss = (-log_probs).sum() / mask.sum().clamp(min=1)
    return {"loss": loss, "log_probs": log_probs, "entropy": entropy, "is_top1": is_top1}


def _bytes(n: int) -> torch.Tensor:
    return torch.empty(n, dtype=torch.uint8, device="meta")


def trace_peaks(step: Step) -> dict[str, int]:
    """Peak allocated by phase, from traces of three and four layers (bytes): exact, and seconds faster."""
    layers = step.shape.num_hidden_layers
    if layers <= 4:
        return trace(step).phases
    three, four = (trace(replace(step, shape=step.shape.with_layers(n))).phases for n in (3, 4))
    return {name: low + (layers - 3) * (four[name] - low) for name, low in three.items()}


def verify(step: Step) -> dict[str, int]:
    """The whole model traced and replayed: allocated, reserved and the least that survives, bytes."""
    traced = trace(step)
    replayed = replay(traced.events)
    return {
        "allocated_bytes": replayed.allocated,
        "reserved_bytes": replayed.reserved,
        "smallest_pool_bytes": smallest_pool(traced.events),
    }
