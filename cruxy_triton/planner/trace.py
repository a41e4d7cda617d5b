"""The training step itself on torch's `meta` device: real code, no values, every allocation recorded.

transformers' model, peft's LoRA, bitsandbytes' 4-bit layers and TRL's tiled head run as they are installed, so the
trace follows them by itself; it checks `footprint.py`, which writes the same step down by hand. A
`TorchDispatchMode` sees every storage come and go; what it cannot see (workspaces inside a kernel) is in
`workspace_bytes`, by operation. Composite operations that ask `is_cuda` are patched to what the card would run.

Two optimizer steps are traced: the first has no optimizer state yet. Models of three and four layers extrapolate
exactly to the peak allocated of the whole; what is reserved needs all layers.
"""

from __future__ import annotations

import logging
import sys
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from cruxy_triton.planner.footprint import (
    NF4_BLOCK,
    NF4_NESTED_BLOCK,
    OPTIMIZERS,
    TILE_VOCABULARY,
    Step,
    load_events,
)
from cruxy_triton.planner.replay import replay, smallest_pool
from cruxy_triton.planner.shape import ModelShape

aten = torch.ops.aten
_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "nf4": torch.float16,
}


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

    `round_to` is the allocator's unit: 512 bytes on CUDA, 1 on the CPU. `workspace(func, args, out)` gives the
    bytes that a kernel takes for its own duration.
    """

    def __init__(self, round_to: int, workspace: Callable[[Any, tuple, Any], int] | None = None):
        super().__init__()
        self.round_to = round_to
        self.workspace = workspace
        self.live = 0
        self.phase = "load"
        self.phases: dict[str, int] = {}
        self.events: list[tuple[int, int]] = []
        self._known: dict[int, weakref.ref] = {}
        self._next = 0

    def enter(self, phase: str) -> None:
        self.phase = phase
        self.phases[phase] = max(self.phases.get(phase, 0), self.live)

    def hold(self, nbytes: int) -> None:
        """Bytes that stay for good (a cuBLAS workspace)."""
        self._book(nbytes)

    def _book(self, nbytes: int) -> tuple[int, int]:
        size = -(-nbytes // self.round_to) * self.round_to
        self._next += 1
        self.live += size
        self.phases[self.phase] = max(self.phases.get(self.phase, 0), self.live)
        self.events.append((self._next, size))
        return self._next, size

    def _release(self, ident: int, size: int) -> None:
        self.live -= size
        self.events.append((ident, -size))

    def see(self, tensor: torch.Tensor) -> None:
        """Book the tensor's storage if it is new."""
        storage = tensor.untyped_storage()
        key = id(storage)
        known = self._known.get(key)
        if known is not None and known() is storage:
            return
        nbytes = storage.nbytes()
        if not nbytes:
            return
        ident, size = self._book(nbytes)

        def gone(_: object, key=key, ident=ident, size=size) -> None:
            self._known.pop(key, None)
            self._release(ident, size)

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
        if self.workspace is not None:
            extra = self.workspace(func, args, out)
            if extra:
                self._see_all(out)
                self._release(*self._book(extra))
        self._see_all(out)
        return out


def _masked_rows(func: Any, args: Any) -> torch.Tensor | None:
    """x[mask] on meta, where the count cannot be known: every row is taken, the most that it can be."""
    source, indices = args[:2]
    index = indices[0]
    if index is None or index.dtype != torch.bool or source.device.type != "meta":
        return None
    return source.new_empty((index.numel(), *source.shape[index.ndim :]))


# -- workspaces: what the dispatcher does not see ------------------------------------------------------


def workspace_bytes(func: Any, args: Any, out: Any) -> int:
    """Bytes that a CUDA kernel takes while it runs, by operation.

    `_softmax_backward_data`: grad * output, made before the kernel (aten/src/ATen/native/cuda/SoftMax.cu);
    memory-efficient attention's backward: B*H*S*ceil(D/64)*64*4 + B*H*S*4 (seen on sm_75); flash's: fp32 dq and row
    sums, and dk, dv of all heads under grouped queries (flash_attn/flash_api.cpp); bitsandbytes' 4-bit product:
    the weight in 16 bits, 2NK, and 8NK/64 for the nested absmax (bitsandbytes/backends/cuda/ops.py).
    """
    name = func._schema.name
    if name == "aten::_softmax_backward_data":
        return args[0].numel() * args[0].element_size()
    if name == "aten::_scaled_dot_product_efficient_attention_backward":
        b, h, s, d = args[1].shape
        return b * h * s * (-(-d // 64) * 64) * 4 + b * h * s * 4
    if name == "aten::_scaled_dot_product_flash_attention_backward":
        (b, h, s, d), keys = args[1].shape, args[2]
        rounded = b * h * (-(-s // 128) * 128)
        wide = 2 * b * h * s * d * args[1].element_size() if keys.shape[1] != h else 0
        return rounded * (-(-d // 32) * 32) * 4 + rounded * 4 + wide
    if name == "bitsandbytes::gemm_4bit":
        n, k = args[2]
        nested = len(args) > 7 and args[7] is not None
        return n * k * args[0].element_size() + (8 * n * k // NF4_BLOCK if nested else 0)
    return 0


# -- the model ---------------------------------------------------------------------------------------


def _config(shape: ModelShape, attention: str):
    from transformers import AutoConfig

    values: dict[str, Any] = {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "max_position_embeddings": shape.max_position_embeddings,
        "tie_word_embeddings": shape.tie_word_embeddings,
        "use_cache": False,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if shape.model_type != "phi":
        values["head_dim"] = shape.head_dim
    values["hidden_activation" if shape.model_type == "gemma2" else "hidden_act"] = shape.hidden_act
    if shape.model_type in ("llama", "qwen3", "gemma", "gemma2"):
        values["attention_bias"] = shape.attention_bias
    if shape.model_type == "llama":
        values["mlp_bias"] = shape.mlp_bias
    if shape.model_type == "phi":
        values |= {
            "partial_rotary_factor": shape.partial_rotary_factor,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
        }
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(shape, name) is not None:
            values[name] = getattr(shape, name)
    config = AutoConfig.for_model(shape.model_type, **values)
    config._attn_implementation = "eager" if attention == "eager" else "sdpa"
    return config


def _quantise(model: torch.nn.Module, double: bool, compute: torch.dtype) -> None:
    """Replace every linear layer but the head by bitsandbytes' Linear4bit with an NF4 weight on meta."""
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import modules

    bnb: Any = modules  # its annotations know less than its constructors take

    def empty(size: int | tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    for name, module in list(model.named_modules()):
        if not isinstance(module, torch.nn.Linear) or name.endswith("lm_head"):
            continue
        rows, cols = module.weight.shape
        blocks = -(-rows * cols // NF4_BLOCK)
        state = QuantState(
            absmax=empty(blocks, dtype=torch.uint8 if double else torch.float32),
            shape=torch.Size((rows, cols)),
            code=empty(16, dtype=torch.float32),
            blocksize=NF4_BLOCK,
            quant_type="nf4",
            dtype=compute,
        )
        if double:
            state.offset = empty((), dtype=torch.float32)
            state.state2 = QuantState(
                absmax=empty(-(-blocks // NF4_NESTED_BLOCK), dtype=torch.float32),
                code=empty(256, dtype=torch.float32),
                blocksize=NF4_NESTED_BLOCK,
                dtype=torch.float32,
            )
            state.nested = True
        layer = bnb.Linear4bit(
            cols, rows, bias=module.bias is not None, compute_dtype=compute, quant_type="nf4", device="meta"
        )
        layer.weight = bnb.Params4bit(
            empty(((rows * cols + 1) // 2, 1), dtype=torch.uint8),
            requires_grad=False,
            quant_state=state,
            blocksize=NF4_BLOCK,
            quant_type="nf4",
            bnb_quantized=True,
        )
        layer.quant_state = state
        if module.bias is not None:
            layer.bias = module.bias
        parent = model.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], layer)


def build(step: Step, device: str = "meta") -> Any:
    """The model as `cruxy-triton finetune` has it before its first step, of `step.shape`'s layers, on `device`."""
    from transformers import AutoModelForCausalLM

    # At import it reports which CPU kernels it lacks; none of them runs here.
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
    dtype = _DTYPES[step.precision]
    with torch.device(device), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = _config(step.shape, step.attention)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.requires_grad_(step.lora_r == 0)
        if step.precision == "nf4":
            _quantise(model, step.double_quant, dtype)
            model.is_loaded_in_4bit = True  # what peft asks to choose its 4-bit layer
        if step.kbit_prepared:
            for parameter in model.parameters():
                if parameter.dtype in (torch.float16, torch.bfloat16):
                    parameter.data = parameter.data.float()
        if step.checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        if step.lora_r:
            from peft import LoraConfig, get_peft_model

            model = get_peft_model(
                model,
                LoraConfig(
                    r=step.lora_r,
                    lora_alpha=2 * step.lora_r,
                    target_modules=list(step.targets),
                    lora_dropout=step.lora_dropout,
                    task_type="CAUSAL_LM",
                ),
            )
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
    model.train()
    return model


# -- what the card would run ---------------------------------------------------------------------------


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


class _Autocast:
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


def _patches(step: Step, autocast: _Autocast | None) -> list[Any]:
    """What replaces torch's, transformers' and TRL's functions during a trace for a CUDA card."""
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

    def triton_runs(device):
        return True

    def accumulate(acc, a, b):
        return None  # cuBLAS adds into acc without a copy

    attention = _sdpa(step.attention)
    found = [
        mock.patch.object(torch, "is_autocast_enabled", autocast_enabled),
        mock.patch.object(F, "softmax", fused_softmax),
        mock.patch.object(F, "dropout", dropout),
    ]
    if autocast is not None:
        attention = autocast.low(attention)
        found += [
            mock.patch.object(F, "linear", autocast.low(linear)),
            mock.patch.object(torch, "matmul", autocast.low(torch.matmul)),
            mock.patch.object(F, "layer_norm", autocast.high(F.layer_norm)),
            mock.patch.object(torch, "pow", autocast.high(torch.pow)),
            mock.patch.object(torch, "get_autocast_dtype", autocast_dtype),
        ]
    found.append(mock.patch.object(F, "scaled_dot_product_attention", attention))
    if step.chunked_loss:
        import trl.kernels.chunked_logprob as chunked

        if "trl.trainer.utils" not in sys.modules:
            # The backward pass asks it for one context manager; it would import the whole trainer for that.
            light: Any = types.ModuleType("trl.trainer.utils")
            light.maybe_gather_lm_head_ctx = lambda weight, bias: nullcontext()
            found.append(mock.patch.dict(sys.modules, {"trl.trainer.utils": light}))
        found += [
            mock.patch.object(chunked, "_use_triton", triton_runs),
            mock.patch.object(chunked, "_forward_kernel", _NoKernel()),
            mock.patch.object(chunked, "_backward_kernel", _NoKernel()),
            mock.patch.object(chunked, "_addmm_fp32", accumulate),
        ]
    return found


@contextmanager
def _masks(step: Step) -> Iterator[None]:
    """transformers cannot look into a mask on meta; give the models what they would have made of a full one."""
    import importlib

    module = importlib.import_module(f"transformers.models.{step.shape.model_type}.modeling_{step.shape.model_type}")

    def make(config=None, inputs_embeds=None, **_: Any) -> torch.Tensor | None:
        assert inputs_embeds is not None
        if step.attention != "eager":
            return None
        batch, seq = inputs_embeds.shape[:2]
        return torch.empty((batch, 1, seq, seq), dtype=inputs_embeds.dtype, device=inputs_embeds.device)

    with ExitStack() as stack:
        for name in ("create_causal_mask", "create_sliding_window_causal_mask"):
            if hasattr(module, name):
                stack.enter_context(mock.patch.object(module, name, make))
        yield


# -- the run -----------------------------------------------------------------------------------------


def _phase_hooks(model: Any, recorder: Recorder) -> None:
    """Tell the recorder when the loss begins; everything before is the forward pass."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.base_model.register_forward_hook(lambda *_: recorder.enter("loss"))


def trace(step: Step, steps: int = 2) -> Traced:
    """Run `steps` optimizer steps of `step` on meta for a CUDA card and return what they allocated.

    Raises ImportError where transformers, peft, trl or bitsandbytes is needed and missing.
    """
    # What loading does to the allocator is not traced (from_pretrained needs a checkpoint): the walk has it.
    loading = load_events(step)
    recorder = Recorder(512, workspace_bytes)
    model = build(step)
    seen = set()
    for tensor in (*model.parameters(), *model.buffers()):
        for part in (tensor, *_quant_parts(tensor)):
            if id(part) not in seen and part.numel():
                seen.add(id(part))
                recorder.see(part)
    recorder.events = [(-ident, nbytes) for ident, nbytes in loading]
    trained = [p for p in model.parameters() if p.requires_grad]
    dtype = torch.bfloat16 if step.precision == "bfloat16" else torch.float16
    autocast = _Autocast(dtype) if step.autocast else None
    _phase_hooks(model, recorder)
    with ExitStack() as stack:
        for patch in (*_patches(step, autocast), _masks(step)):
            stack.enter_context(patch)
        stack.enter_context(recorder)
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        _run(step, model, recorder, trained, autocast, steps)
    recorder.enter("end")
    phases = {k: v for k, v in recorder.phases.items() if k != "end"}
    return Traced(phases, list(recorder.events))  # the model is released after this, which is no part of it


def _quant_parts(tensor: Any) -> Iterator[torch.Tensor]:
    state = getattr(tensor, "quant_state", None)
    while state is not None:
        for name in ("absmax", "code", "offset"):
            part = getattr(state, name, None)
            if isinstance(part, torch.Tensor):
                yield part
        state = getattr(state, "state2", None)


def _run(step: Step, model: Any, recorder: Recorder, trained: list, autocast: _Autocast | None, steps: int) -> None:
    state: list[torch.Tensor] = []
    workspaces = 0
    for index in range(steps):
        ids, mask, labels = (torch.empty((step.batch, step.seq), dtype=torch.int64, device="meta") for _ in range(3))
        recorder.enter("forward")
        if workspaces == 0 and step.cublas_workspace:
            workspaces = 1
            recorder.hold(step.cublas_workspace)
        with autocast.active() if autocast else ExitStack():
            if step.chunked_loss:
                output = _tiled_loss(model, ids, labels)
            else:
                output = model(input_ids=ids, labels=labels)
        if step.upcast_outputs and not step.chunked_loss:
            output["logits"] = output["logits"].float()
        loss = output["loss"]
        if not step.keep_outputs:
            del output
        recorder.enter("backward")
        if workspaces == 1:
            workspaces = 2
            recorder.hold(step.cublas_workspace)
        loss.backward()
        output = None
        del loss, ids, mask, labels
        recorder.enter("optimizer")
        each, transient = OPTIMIZERS[step.optimizer]
        if not state:
            sizes = [4.0] * int(each // 4) or [each] * bool(each)
            state = [_bytes(p.numel() * n) for p in trained for n in sizes]
        held = [_bytes(p.numel() * transient) for p in trained if transient]
        del held
        if step.accumulation == 1 or index == steps - 1:  # as footprint.walk: the last finds gradients in place
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


def _bytes(n: float) -> torch.Tensor:
    return torch.empty(int(n) or 1, dtype=torch.uint8, device="meta")


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
