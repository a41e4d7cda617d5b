"""The memory of one training step, by phase and component, in milliseconds and without torch.

The step that `cruxy-triton finetune` runs (transformers' causal language model, peft's LoRA, TRL's SFTTrainer) is
written down with the operations of `ops.py` for a model of two and of three layers; every phase's peak is linear
in the number of layers, so the two give the model's own exactly. The peak is the maximum over phases, never a sum.

At the loss and with the stock loss this comes to the closed form of design/planner.md,
W + 12 n_lora + act + (4h + 4) T + 12 V T bytes, T = batch * seq (10 V T where the output object is not kept).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from cruxy_triton.planner import ops
from cruxy_triton.planner.ledger import (
    Ledger,
    Parameter,
    Storage,
    Tensor,
    backward,
    checkpoint,
    record,
    save,
)
from cruxy_triton.planner.shape import Linear, ModelShape

TILE_TOKENS, TILE_VOCABULARY = 4096, 32768  # trl/kernels/chunked_logprob.py, trl/trainer/utils.py (1.16)
NF4_BLOCK, NF4_NESTED_BLOCK = 64, 256  # bitsandbytes' block sizes: codes per absmax, absmax per second scale

BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "nf4": 2}

# Optimizer: (state, transient) in bytes a trainable fp32 parameter. The first three are CruxyOptimizer's codecs,
# one pass over the tensors without temporaries; Lion 8-bit: one code and a 4-byte scale per 128.
# torch-adamw is torch.optim.AdamW in its CUDA default (foreach), which makes the square roots of exp_avg_sq.
OPTIMIZERS: dict[str, tuple[float, float]] = {
    "adamw-fp32": (8.0, 0.0),
    "lion-fp32": (4.0, 0.0),
    "lion-8bit": (1 + 4 / 128, 0.0),
    "torch-adamw": (8.0, 4.0),
    "sgd": (0.0, 0.0),
}
# The same by what `cruxy-triton finetune` calls them: (--optimizer, --state-bits)
FINETUNE_OPTIMIZERS = {
    "adamw-fp32": ("cruxy", 32),
    "lion-fp32": ("cruxy-lion", 32),
    "lion-8bit": ("cruxy-lion", 8),
    "torch-adamw": ("adamw", 32),
    "sgd": ("sgd", 32),
}


@dataclass(frozen=True)
class Step:
    """Everything that decides the memory of a step. Lengths are tokens."""

    shape: ModelShape
    batch: int
    seq: int
    precision: str = "float16"
    double_quant: bool = True
    lora_r: int = 8  # 0: every weight learns
    targets: tuple[str, ...] = ()
    lora_dropout: float = 0.0
    checkpointing: bool = True
    chunked_loss: bool = True
    attention: str = "efficient"
    optimizer: str = "adamw-fp32"
    accumulation: int = 1
    device: str = "cuda"
    cublas_workspace: int = 8_519_680
    autocast: bool = True
    upcast_outputs: bool = True  # accelerate's convert_outputs_to_fp32 around an autocast forward
    keep_outputs: bool = False  # the output object (with its logits) lives on through the backward pass
    warmup: bool = False  # from_pretrained(device_map=...) takes the weights' bytes once and gives them back
    kbit_prepared: bool = False  # after peft's prepare_model_for_kbit_training: all unquantised weights in fp32

    @property
    def tokens(self) -> int:
        return self.batch * self.seq

    @property
    def half(self) -> int:
        """Bytes of autocast's dtype, 0 without autocast."""
        return 2 if self.autocast else 0

    @property
    def stream(self) -> int:
        """Bytes of an element of the hidden states."""
        return 4 if self.kbit_prepared else BYTES[self.precision]

    def lora_parameters(self) -> int:
        """Trainable elements of all adapters."""
        per_layer = sum(self.lora_r * (x.rows + x.cols) for x in self.shape.linears() if x.name in self.targets)
        return per_layer * self.shape.num_hidden_layers

    def trainable_parameters(self) -> int:
        return self.lora_parameters() if self.lora_r else self.shape.parameters


@dataclass
class Footprint:
    """Bytes by phase, and by component at the highest phase."""

    phases: dict[str, int]
    components: dict[str, int]
    peak_phase: str
    parts: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def peak_allocated(self) -> int:
        return self.phases[self.peak_phase]


@dataclass
class _Layer:
    linears: dict[str, Parameter | ops.Linear4bit]
    loras: dict[str, ops.Lora]
    norms: list[Parameter]
    biases: list[Parameter]


class _Run:
    """One model on a ledger, and the steps it takes."""

    def __init__(self, step: Step, ledger: Ledger):
        self.step = step
        self.ld = ledger
        self.shape = step.shape
        self.full = step.lora_r == 0
        self.trained: list[Parameter] = []
        self.plain: list[Parameter] = []  # weights that are not quantised
        self.heads = ops.Heads(
            step.batch,
            step.seq,
            self.shape.num_attention_heads,
            self.shape.num_key_value_heads,
            self.shape.head_dim,
        )
        self.optimizer_state: list[Storage] = []
        self.workspaces: list[Storage] = []
        self._load()

    # -- weights ---------------------------------------------------------------------------------

    def _weight(self, n: int) -> Parameter:
        parameter = self.ld.parameter(n, BYTES[self.step.precision], "weights", self.full)
        self.plain.append(parameter)
        if self.full:
            self.trained.append(parameter)
        return parameter

    def _linear(self, spec: Linear) -> Parameter | ops.Linear4bit:
        step, ld = self.step, self.ld
        if step.precision != "nf4":
            return self._weight(spec.weight)
        # from_pretrained puts the weight on the device in 16 bits and quantises it there
        whole = ld.buffer(2 * spec.weight, "weights")
        codes = [ld.buffer(-(-spec.weight // 2), "weights")]
        blocks = -(-spec.weight // NF4_BLOCK)
        if step.double_quant:
            codes += [
                ld.buffer(blocks, "quantisation"),
                ld.buffer(-(-blocks // NF4_NESTED_BLOCK) * 4, "quantisation"),
                ld.buffer(4, "quantisation"),  # the offset
                ld.buffer(256 * 4, "quantisation"),  # the second code book
            ]
        else:
            codes.append(ld.buffer(blocks * 4, "quantisation"))
        codes.append(ld.buffer(16 * 4, "quantisation"))  # the code book
        del whole
        return ops.Linear4bit(codes, spec.rows, spec.cols, step.double_quant)

    def _load(self) -> None:
        step, shape, ld = self.step, self.shape, self.ld
        ld.enter("load")
        if step.warmup:
            width = 0.5 if step.precision == "nf4" else BYTES[step.precision]
            inner = shape.num_hidden_layers * sum(x.weight for x in shape.linears())
            outer = shape.parameters - inner
            whole = ld.buffer(int(inner * width) + outer * BYTES[step.precision], "weights")
            del whole
        # from_pretrained fills a model in the natural order of its keys: lm_head, embed_tokens, layers, norm; in a
        # layer, norms aside, mlp before self_attn and each by name
        table = shape.vocab_size * shape.hidden_size
        head = None if shape.tie_word_embeddings else self._weight(table)
        self.embedding = self._weight(table)
        self.head = head or self.embedding
        specs = sorted(shape.linears(), key=lambda x: (x.name in shape.family.names[:4], x.name))
        self.layers: list[_Layer] = []
        for _ in range(shape.num_hidden_layers):
            linears: dict[str, Parameter | ops.Linear4bit] = {}
            biases = []
            for spec in specs:
                if spec.bias:
                    biases.append(self._weight(spec.rows))
                linears[spec.name] = self._linear(spec)
            norms = [self._weight(n) for n in shape.norms()]
            self.layers.append(_Layer(linears, {}, norms, biases))
        final = 2 if shape.family.norm == "layer" else 1
        self.final = [self._weight(shape.hidden_size) for _ in range(final)]
        if shape.family.head_bias:
            self.final.append(self._weight(shape.vocab_size))
        if step.kbit_prepared:
            for parameter in self.plain:
                parameter.storage, parameter.b = Storage(ld, 4 * parameter.n, "weights"), 4
        if not self.full:
            for layer in self.layers:
                for spec in shape.linears():
                    if spec.name in step.targets:
                        a = ld.parameter(step.lora_r * spec.cols, 4, "adapters", True)
                        b = ld.parameter(spec.rows * step.lora_r, 4, "adapters", True)
                        layer.loras[spec.name] = ops.Lora(a, b, step.lora_r, step.lora_dropout)
                        self.trained += [a, b]

    # -- forward ---------------------------------------------------------------------------------

    def _apply(self, layer: _Layer, name: str, x: Tensor) -> Tensor:
        spec = next(s for s in self.shape.linears() if s.name == name)
        step = self.step
        return ops.lora_linear(
            self.ld,
            x,
            layer.linears[name],
            layer.loras.get(name),
            step.tokens,
            spec.rows,
            step.half,
            BYTES[step.precision],
        )

    def _norm(self, x: Tensor, rows: int, weight: Parameter) -> Tensor:
        family = self.shape.family
        if family.norm == "layer":
            return ops.layer_norm(self.ld, x, rows, self.step.half)
        return ops.rms_norm(self.ld, x, rows, family.norm == "gemma", weight)

    def _attention(self, layer: _Layer, x: Tensor) -> tuple[Tensor, Tensor | None]:
        ld, shape, step = self.ld, self.shape, self.step
        names = shape.family.names
        q = self._apply(layer, names[0], x)
        k = self._apply(layer, names[1], x)
        v = self._apply(layer, names[2], x)
        if shape.family.qk_norm:
            q = self._norm(q, step.tokens * shape.num_attention_heads, layer.norms[-2])
            k = self._norm(k, step.tokens * shape.num_key_value_heads, layer.norms[-1])
        q, k = self._rotate(q, k)
        weights = None
        if step.attention == "eager":
            capped = shape.attn_logit_softcapping is not None
            out, weights = ops.eager_attention(ld, q, k, v, self.heads, step.half, capped, step.device == "cuda")
        else:
            out = self._sdpa(q, k, v)
        return self._apply(layer, names[3], out), weights

    def _rotate(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        ld, part = self.ld, self.shape.partial_rotary_factor
        if part == 1.0:
            return ops.rotary(ld, q), ops.rotary(ld, k)
        (q_turn, q_pass), (k_turn, k_pass) = (ops.partial_rotary(ld, t, part) for t in (q, k))
        q_turn, k_turn = ops.rotary(ld, q_turn), ops.rotary(ld, k_turn)
        return ops.concatenate(ld, q_turn, q_pass), ops.concatenate(ld, k_turn, k_pass)

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ld, step, heads = self.ld, self.step, self.heads
        if step.attention == "efficient":
            k, v = (ops.repeat_kv(ld, t, heads.groups, heads.key_heads) for t in (k, v))
            heads = replace(heads, key_heads=heads.query_heads)
        if step.half:
            q, k, v = (ops.cast(ld, t, step.half) for t in (q, k, v))
        if step.attention == "math":
            return ops.math_attention(ld, q, k, v, heads, step.device == "cuda")
        out = ops.fused_attention(ld, q, k, v, heads, step.attention)
        if step.attention == "sdpa-cpu" and self.shape.partial_rotary_factor != 1.0:
            # the CPU's kernel lays its output out as the query, which concatenation made [B, H, S, D]
            out = ops.copy(ld, out)
        return out

    def _mlp(self, layer: _Layer, x: Tensor) -> Tensor:
        names = self.shape.family.names
        if not self.shape.family.gated:
            x = self._apply(layer, names[4], x)
            x = self._activation(x)
            return self._apply(layer, names[5], x)
        product = ops.multiply(
            self.ld,
            self._activation(self._apply(layer, names[4], x)),
            self._apply(layer, names[5], x),
        )
        return self._apply(layer, names[6], product)

    def _activation(self, x: Tensor) -> Tensor:
        if self.shape.hidden_act == "gelu_new":
            return ops.gelu_new(self.ld, x, self.step.half)
        return ops.unary(self.ld, x, keeps="input")

    def _block(self, layer: _Layer, x: Tensor) -> Tensor:
        ld, tokens, family = self.ld, self.step.tokens, self.shape.family
        norms = iter(layer.norms)
        residual = x
        x = self._norm(x, tokens, next(norms))
        if family.parallel:
            attended, weights = self._attention(layer, x)
            fed = self._mlp(layer, x)
            return ops.add(ld, ops.add(ld, attended, fed), residual)
        x, weights = self._attention(layer, x)  # `weights` lives to the end of the block, as in transformers
        if family.sandwich:
            x = self._norm(x, tokens, next(norms))
        x = ops.add(ld, residual, x)
        residual = x
        x = self._norm(x, tokens, next(norms))
        x = self._mlp(layer, x)
        if family.sandwich:
            x = self._norm(x, tokens, next(norms))
        x = ops.add(ld, residual, x)
        del weights
        return x

    def _forward(self) -> Tensor:
        """Embedding to the final norm. Returns the last hidden states, [T, hidden]."""
        ld, step, shape = self.ld, self.step, self.shape
        ld.scope = "embedding"
        x = ld.new(step.tokens * shape.hidden_size, step.stream)
        # peft asks for a gradient at the embedding's output (enable_input_require_grads) under checkpointing;
        # without it the first layer's input needs none
        if self.full:
            table = self.embedding
            record(ld, x, (table,), lambda g: (ld.new(table.n, table.b),), [])
        elif step.checkpointing:
            record(ld, x, (), lambda g: (), [])
        if shape.family.scaled_embedding:
            x = ops.unary(ld, x)
        rotary_width = int(shape.head_dim * shape.partial_rotary_factor)
        self.position = [ld.new(step.seq * rotary_width, step.stream) for _ in range(2)]
        if step.attention == "eager":
            allowed = ld.new(step.seq * step.seq, 1)
            # Gemma 2 has one more for its layers with a sliding window
            masks = 2 if shape.model_type == "gemma2" else 1
            self.mask = [ld.new(step.batch * step.seq * step.seq, step.stream) for _ in range(masks)]
            del allowed
        for index, layer in enumerate(self.layers):
            ld.scope = f"layer{index}"
            if step.checkpointing:
                # the checkpointed call keeps its arguments, the mask among them, until its backward has run
                kept = (self.mask[index % len(self.mask)] if self.mask else None, *self.position)
                x = checkpoint(ld, lambda y, layer=layer, kept=kept: self._block(layer, y), x)
                del kept
            else:
                x = self._block(layer, x)
        ld.scope = "head"
        return self._norm(x, step.tokens, self.final[0])

    # -- loss ------------------------------------------------------------------------------------

    def _stock_loss(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """transformers' ForCausalLMLoss: fp32 copy of the logits, log-softmax, negative log-likelihood."""
        ld, step, shape = self.ld, self.step, self.shape
        size = step.tokens * shape.vocab_size
        with ld.booked_as("logits and loss"):
            logits = ops.linear(ld, x, self.head, size, half=step.half)
            if shape.final_logit_softcapping is not None:
                logits = ops.unary(ld, logits)
                logits = ops.unary(ld, logits, keeps="output")
                logits = ops.unary(ld, logits)
            wide = ops.cast(ld, logits, 4)
            log_softmax = ld.new(size, 4)

            def softmax_back(g: Tensor, saved: Tensor):
                return (ld.new(size, 4),)

            record(ld, log_softmax, (wide,), softmax_back, [save(ld, log_softmax)])
            del wide
            loss = ld.new(1, 4)
            record(ld, loss, (log_softmax,), lambda g: (ld.new(size, 4),), [])
            del log_softmax
            if step.upcast_outputs and logits.b != 4:
                logits = ops.cast(ld, logits, 4)
        return loss, logits

    def _chunked_loss(self, x: Tensor) -> Tensor:
        """TRL 1.16's fused head: logits in tiles of 4,096 x 32,768, recomputed in the backward pass."""
        ld, step, shape = self.ld, self.step, self.shape
        rows = step.batch * (step.seq - 1)
        cpu = step.device == "cpu"
        compute = step.half or x.b
        tile = min(rows, TILE_TOKENS) * TILE_VOCABULARY
        tall = min(rows, TILE_TOKENS) * min(TILE_VOCABULARY, shape.vocab_size)
        with ld.booked_as("logits and loss"):
            chosen = ld.new(rows * shape.hidden_size, x.b)
            x_n, x_b = x.n, x.b
            if not cpu:
                index = ld.new(rows, 8)
                record(ld, chosen, (x,), lambda g, *s: (ld.new(x_n, x_b),), [save(ld, index)])
                record(ld, chosen, (chosen,), lambda g: (ld.new(x_n, x_b),), [])
            else:
                record(ld, chosen, (x,), lambda g: (ld.new(x_n, x_b),), [])
            statistics = [ld.new(rows, 4) for _ in range(7)]
            buffer = ld.new(tile, compute)
            narrow = ops.cast(ld, chosen.detach(), compute)
            if cpu:
                folded = [ld.new(tall, 4) for _ in range(3)]
                del folded
            del buffer, narrow
            outputs = [ld.new(rows, 4) for _ in range(4)]
            del statistics
            loss = ld.new(1, 4)

            def back(g: Tensor, hidden: Tensor, *saved):
                wide = ld.new(hidden.n, 4)
                space = ld.new(tile, compute)
                narrow = ops.cast(ld, hidden.detach(), compute)
                if cpu:
                    # y, z, log p, p, the gradient, one-hot minus p, its product; the one-hot is boolean
                    parts = [ld.new(tall, 4) for _ in range(7)] + [ld.new(tall, 1)]
                    del parts
                if self.full:
                    weight = ld.new(self.head.n, 4)
                    grad = ops.cast(ld, weight, self.head.b)
                    del weight
                else:
                    grad = None
                del space, narrow
                return (ops.cast(ld, wide, hidden.b), grad)

            held = [save(ld, chosen), *(save(ld, t) for t in outputs)]
            record(ld, loss, (chosen, self.head), back, held)
        return loss

    # -- the step --------------------------------------------------------------------------------

    def _workspace(self, index: int) -> None:
        if self.step.cublas_workspace and len(self.workspaces) <= index:
            self.workspaces.append(self.ld.buffer(self.step.cublas_workspace, "workspaces"))

    def micro_step(self) -> None:
        """Forward, loss and backward of one batch."""
        ld, step = self.ld, self.step
        inputs = [ld.new(step.tokens, 8, "activations") for _ in range(3)]  # ids, attention mask, labels
        ld.enter("forward")
        self._workspace(0)
        logits = None
        self.mask = []
        if step.autocast:
            with ld.autocast():
                x = self._forward()
                ld.enter("loss")
                loss, logits = (self._chunked_loss(x), None) if step.chunked_loss else self._stock_loss(x)
        else:
            x = self._forward()
            ld.enter("loss")
            loss, logits = (self._chunked_loss(x), None) if step.chunked_loss else self._stock_loss(x)
        del x
        self.position = []
        self.mask = []
        if not step.keep_outputs:
            logits = None
        ld.enter("backward:head")
        self._workspace(1)
        backward(ld, loss)
        del loss, logits, inputs

    def optimizer_step(self, keep_gradients: bool = False) -> None:
        ld = self.ld
        ld.enter("optimizer")
        state, transient = OPTIMIZERS[self.step.optimizer]
        if not self.optimizer_state:
            # as separate tensors, which is what decides the allocator's pools
            sizes = [4.0] * int(state // 4) or [state] * bool(state)
            self.optimizer_state = [
                ld.buffer(int(p.n * each) or 1, "optimizer state") for p in self.trained for each in sizes
            ]
        if transient:
            held = [ld.buffer(int(p.n * transient), "workspaces") for p in self.trained]
            del held
        if not keep_gradients:
            for parameter in self.trained:
                parameter.grad = None


def walk(step: Step, steps: int = 2, record: bool = False) -> Ledger:
    """Run `steps` optimizer steps on a fresh ledger and return it. The first has no optimizer state yet.

    Of accumulated micro-batches only the last matters, which finds the others' gradients in place: they are
    kept over from the step before it.
    """
    ledger = Ledger(512 if step.device == "cuda" else 1, record)
    run = _Run(step, ledger)
    ledger.enter("loaded")
    for index in range(steps):
        run.micro_step()
        run.optimizer_step(keep_gradients=step.accumulation > 1 and index < steps - 1)
    ledger.enter("end")
    return ledger


def load_events(step: Step) -> list[tuple[int, int]]:
    """The allocations of loading alone: quantisation's temporaries included, everything left in place."""
    ledger = Ledger(512 if step.device == "cuda" else 1, record=True)
    run = _Run(step, ledger)
    events = list(ledger.events or ())
    del run
    return events


def _summary(ledger: Ledger, layers: int) -> dict[str, tuple[int, dict[str, int]]]:
    """Phases that exist whatever the number of layers; the layers' own become last, first and between."""
    names = {f"backward:layer{layers - 1}": "backward:last layer", "backward:layer0": "backward:first layer"}
    found = {}
    for phase, peak in ledger.phases.items():
        name = names.get(phase, phase)
        if not name.startswith("backward:layer"):
            found[name] = (peak, ledger.parts[phase])
    return found


def footprint(step: Step) -> Footprint:
    """The peak of each phase and what it is made of, from walks of two and three layers."""
    layers = step.shape.num_hidden_layers
    if layers <= 3:
        ledger = walk(step)
        found = _summary(ledger, layers)
    else:
        two, three = (_summary(walk(replace(step, shape=step.shape.with_layers(n))), n) for n in (2, 3))
        more = layers - 2
        found = {}
        for phase, (low, low_parts) in two.items():
            high, high_parts = three[phase]
            parts = {
                name: low_parts.get(name, 0) + more * (high_parts.get(name, 0) - low_parts.get(name, 0))
                for name in {**low_parts, **high_parts}
            }
            found[phase] = (low + more * (high - low), parts)
    found = {k: v for k, v in found.items() if k not in ("end", "loaded")}
    peak_phase = max(found, key=lambda name: found[name][0])
    return Footprint(
        phases={name: value for name, (value, _) in found.items()},
        components={k: v for k, v in sorted(found[peak_phase][1].items()) if v},
        peak_phase=peak_phase,
        parts={name: parts for name, (_, parts) in found.items()},
    )
