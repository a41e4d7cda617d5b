"""The training step itself on torch's `meta` device: real code, no values, every allocation recorded.

transformers' model, peft's LoRA, bitsandbytes' 4-bit layers and TRL's tiled head run as they are installed, so the
trace follows them by itself: it checks `walk`, which writes the same step down by hand, and it answers for model
types that `families` does not know. A `TorchDispatchMode` sees every storage come and go; what it cannot see
(workspaces inside a kernel) is in `workspace_bytes`, by operation. Composite operations that ask `is_cuda` are
patched to what the card would run (`stand_ins`). Loading is not traced, since from_pretrained needs a checkpoint:
`loading` has it.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from copy import copy
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cruxy_triton.errors import UserError
from cruxy_triton.planner import workspaces
from cruxy_triton.planner.ledger import Ledger, Storage
from cruxy_triton.planner.loading import Weight, load
from cruxy_triton.planner.losses import TILE_VOCABULARY
from cruxy_triton.planner.meta_model import build, dtype_of
from cruxy_triton.planner.optimizers import OPTIMIZERS
from cruxy_triton.planner.replay import replay, smallest_pool
from cruxy_triton.planner.stand_ins import Autocast, stand_ins
from cruxy_triton.planner.step import Step
from cruxy_triton.release import layer_groups

aten = torch.ops.aten


class Recorder(TorchDispatchMode):
    """Books every storage that operations make, until it is released.

    `workspace(func, args, out)` gives the bytes that a kernel takes for its own duration.
    """

    def __init__(self, round_to: int, workspace: Callable[[Any, tuple, Any], int] | None = None):
        super().__init__()
        self.ledger = Ledger(round_to, record=True)
        self.workspace = workspace
        self.tied: torch.Size | None = None  # the shape of a table that receives two gradients
        self._known: dict[int, tuple[weakref.ref, Storage | None]] = {}

    def adopt(self, tensor: torch.Tensor, booked: Storage | None) -> None:
        """`tensor` is what was booked as `booked`, which is released with it."""
        storage = tensor.untyped_storage()
        key = id(storage)
        self._known[key] = weakref.ref(storage, lambda _: self._known.pop(key, None)), booked

    def see(self, tensor: torch.Tensor) -> None:
        """Book the tensor's storage if it is new."""
        storage = tensor.untyped_storage()
        known = self._known.get(id(storage))
        if storage.nbytes() and (known is None or known[0]() is not storage):
            self.adopt(tensor, Storage(self.ledger, storage.nbytes(), self.ledger.component))

    def is_gradient(self, tensor: torch.Tensor) -> None:
        """The tensor is a parameter's gradient from now on."""
        booked = self._known[id(tensor.untyped_storage())][1]
        if booked is not None:
            self.ledger.move(booked.nbytes, booked.component, "gradients")
            booked.component = "gradients"

    def _sums_gradients(self, args: Any) -> bool:
        """Whether this is a leaf's second gradient on its first one, which torch adds in place where the first is no
        view; not so under a mode (PyTorch's InputBuffer::accumulate)."""
        return args[0].shape == self.tied and self.ledger.phase.startswith("backward") and args[0]._base is None

    def _see_all(self, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            self.see(value)
        elif isinstance(value, (tuple, list)):
            for item in value:
                self._see_all(item)

    def __torch_dispatch__(self, func, kinds, args=(), kwargs=None):
        out = _masked_rows(func, args) if func is aten.index.Tensor else None
        if func is aten.add.Tensor and self._sums_gradients(args):
            func = aten.add_.Tensor
        if out is None:
            out = func(*args, **(kwargs or {}))
        self._see_all(out)
        extra = self.workspace(func, args, out) if self.workspace is not None else 0
        if extra:
            space = Storage(self.ledger, extra, "workspaces")
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


# -- the model's place in memory, and its phases -------------------------------------------------------


def _natural(name: str) -> list[tuple[int, int | str]]:
    """transformers' order of a checkpoint's keys: numbers as numbers."""
    parts = name.removeprefix("base_model.model.").replace(".base_layer.", ".").split(".")
    return [(0, int(part)) if part.isdigit() else (1, part) for part in parts]


def _quant_parts(tensor: Any) -> Iterator[torch.Tensor]:
    state = getattr(tensor, "quant_state", None)
    while state is not None:
        for name in ("absmax", "code", "offset"):
            part = getattr(state, name, None)
            if isinstance(part, torch.Tensor):
                yield part
        state = getattr(state, "state2", None)


def _place(step: Step, model: Any, recorder: Recorder) -> list[Storage]:
    """Book the model's tensors as loading, and what follows it, would. Returns what has to be held for it."""
    ledger = recorder.ledger
    adapters = [p for name, p in model.named_parameters() if "lora_" in name]
    named = [(name, p) for name, p in model.named_parameters() if "lora_" not in name]
    named.sort(key=lambda item: _natural(item[0]))
    weights = []
    for _, parameter in named:
        state = getattr(parameter, "quant_state", None)
        weights.append(Weight(parameter.numel() if state is None else state.shape.numel(), state is not None))
    loaded = load(ledger, step, weights)
    packed: list[Storage] = []
    for (_, parameter), weight in zip(named, weights, strict=True):
        held = loaded.pop(0)
        if weight.quantized:
            packed += held
            for part in (parameter, *_quant_parts(parameter)):
                recorder.adopt(part, None)
            continue
        nbytes = parameter.numel() * parameter.element_size()
        if ledger.rounded(nbytes) != held[0].nbytes:  # cast since
            held = [Storage(ledger, nbytes, "weights")]
        recorder.adopt(parameter, held[0])
    for tensors, component in ((model.buffers(), "weights"), (adapters, "adapters")):
        with ledger.booked_as(component):
            for tensor in tensors:
                recorder.see(tensor)
    return packed


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _layers(step: Step, base: Any) -> list[torch.nn.Module]:
    lists = [x for x in base.modules() if isinstance(x, torch.nn.ModuleList) and len(x) == step.shape.num_hidden_layers]
    return list(lists[0]) if lists else []


def _watch(step: Step, model: Any, recorder: Recorder) -> None:
    """Hooks that tell the ledger where the step is. Everything before the loss is the forward pass."""
    ledger, base = recorder.ledger, _base(model)

    def first(output: Any) -> torch.Tensor:
        return output if isinstance(output, torch.Tensor) else output[0]

    def on_gradient(phase: str) -> Callable[..., None]:
        def enter(_: Any) -> None:
            ledger.component = "activations"
            ledger.enter(f"backward:{phase}")

        def forward(module: Any, args: Any, output: Any) -> None:
            if first(output).requires_grad:
                first(output).register_hook(enter)

        return forward

    def loss_begins(*_: Any) -> None:
        ledger.component = "logits and loss"
        ledger.enter("loss")

    base.base_model.register_forward_hook(loss_begins)
    base.get_input_embeddings().register_forward_hook(on_gradient("embedding"))
    for index, layer in enumerate(_layers(step, base)):
        layer.register_forward_hook(on_gradient(f"layer{index}"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: recorder.is_gradient(p.grad))


# -- the run -----------------------------------------------------------------------------------------


def trace(step: Step, steps: int = 2) -> Ledger:
    """Run `steps` optimizer steps of `step` on meta; what they allocate on the step's device. As `walk.walk`, but a
    single step finds the optimizer's state in place: the peaks of two in half the time, not their allocations' order.

    Raises ImportError where transformers, peft, trl or bitsandbytes is needed and missing, and UserError for a model
    whose code does not run without values.
    """
    try:
        return _trace(step, steps)
    except (UserError, ImportError):
        raise
    except Exception as error:  # of other people's code, on a device that it does not know
        why = " ".join(str(error).split())[:300]
        raise UserError(
            f"{step.shape.name}: the planner cannot follow a training step of model_type {step.shape.model_type!r} "
            f"({type(error).__name__}: {why})"
        ) from error


def _trace(step: Step, steps: int) -> Ledger:
    recorder = Recorder(step.round_to, workspace_bytes if step.device == "cuda" else None)
    ledger = recorder.ledger
    model = build(step)
    packed = _place(step, model, recorder)
    if step.lora_r == 0 and step.shape.tie_word_embeddings:
        recorder.tied = _base(model).get_input_embeddings().weight.shape
    ledger.enter("loaded")
    _watch(step, model, recorder)
    autocast = Autocast(dtype_of(step)) if step.autocast else None
    with stand_ins(step, autocast, model), recorder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _run(step, model, recorder, autocast, steps)
    ledger.enter("end")
    del packed
    done = copy(ledger)  # the model is released after this, which is no part of it
    done.events = list(ledger.events or ())
    return done


def _run(step: Step, model: Any, recorder: Recorder, autocast: Autocast | None, steps: int) -> None:
    ledger, optimizer = recorder.ledger, OPTIMIZERS[step.optimizer]
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [layer for _, layer in layer_groups(model)] if step.release else [trained]
    state: list[torch.Tensor] = []
    seen: set[torch.Tensor] = set()  # the first parameter of each group that has learnt once
    workspaces: list[Storage] = []

    def workspace() -> None:
        """cuBLAS takes one per thread: the forward pass's and the backward pass's."""
        if step.cublas_workspace and len(workspaces) < 2:
            workspaces.append(Storage(ledger, step.cublas_workspace, "workspaces"))

    def make_state(group: list[torch.nn.Parameter]) -> None:
        sizes = []
        if not state:
            sizes += optimizer.history if step.release else []
            sizes += [n for p in trained for n in optimizer.tensors(p.numel())]
        if step.release and group[0] not in seen:
            seen.add(group[0])
            sizes += optimizer.beside([p.numel() for p in group], step.device)
        with ledger.booked_as("optimizer state"):
            state.extend(_bytes(size) for size in sizes)

    def update(group: list[torch.nn.Parameter], keep_gradients: bool = False) -> None:
        make_state(group)
        with ledger.booked_as("workspaces"):
            held = [_bytes(p.numel() * optimizer.transient) for p in group if optimizer.transient]
            del held
        if not keep_gradients:
            for parameter in group:
                parameter.grad = None

    def release(group: list[torch.nn.Parameter]) -> None:
        if all(p.grad is not None for p in group):
            update(group)

    if step.release:
        for group in groups:
            for parameter in group:
                parameter.register_post_accumulate_grad_hook(lambda _, group=group: release(group))
    if steps == 1:
        for group in groups:
            make_state(group)
        if step.accumulation > 1:
            with ledger.booked_as("gradients"):
                for parameter in trained:
                    parameter.grad = torch.empty_like(parameter)
    for index in range(steps):
        ledger.component = "activations"
        ids, mask, labels = (torch.empty((step.batch, step.seq), dtype=torch.int64, device="meta") for _ in range(3))
        ledger.enter("forward")
        workspace()
        with autocast.active() if autocast else nullcontext():
            output = _tiled_loss(model, ids, labels) if step.chunked_loss else model(input_ids=ids, labels=labels)
        if step.upcast_outputs and not step.chunked_loss:
            output["logits"] = output["logits"].float()
        loss = output["loss"]
        if not step.keep_outputs:
            del output
        ledger.enter("backward:head")
        workspace()
        loss.backward()
        del loss, ids, mask, labels
        ledger.enter("optimizer")
        for group in groups:
            if any(p.grad is not None for p in group):  # released ones have gone
                update(group, step.keeps_gradients(index, steps))
        output = None


def _tiled_loss(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    """The loss of TRL 1.16's SFTTrainer: its ChunkedLogProbFunction on the backbone's hidden states.

    What `add_fused_lm_head` and `compute_loss` do around it, without importing the trainer (10 s). All labels
    count, which is the most memory that a batch can take. tests/planner/test_trace.py holds the two together.
    """
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    base = _base(model)
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


def verify(step: Step) -> dict[str, int]:
    """The whole model traced and replayed: allocated, reserved and the least that survives, bytes."""
    events = trace(step).events or []
    replayed = replay(events)
    return {
        "allocated_bytes": replayed.allocated,
        "reserved_bytes": replayed.reserved,
        "smallest_pool_bytes": smallest_pool(events),
    }
