"""The training step of `cruxy-triton finetune` written down with sized tensors: transformers' causal language model,
peft's LoRA, bitsandbytes' 4-bit layers, TRL's SFTTrainer.
"""

from __future__ import annotations

from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

from cruxy_triton.planner import attention as kernels
from cruxy_triton.planner import operations as ops
from cruxy_triton.planner.autograd import Parameter, Tape, Tensor, backward, checkpoint, operation
from cruxy_triton.planner.ledger import Storage
from cruxy_triton.planner.loading import Weight, load
from cruxy_triton.planner.losses import stock_loss, tiled_loss
from cruxy_triton.planner.optimizers import OPTIMIZERS
from cruxy_triton.planner.shape import Linear
from cruxy_triton.planner.step import Step

Position = tuple[Tensor, Tensor]  # cos and sin of the rotary embedding


@dataclass
class _Layer:
    """The weights of one block; `linears` and `loras` by name."""

    linears: dict[str, Parameter | ops.Linear4bit]
    norms: list[Parameter]
    plain: list[Parameter] = field(default_factory=list)  # all that are not quantized
    loras: dict[str, ops.Lora] = field(default_factory=dict)


class _Model:
    """A model on a tape: its weights, and its forward pass."""

    def __init__(self, step: Step, tape: Tape):
        self.step = step
        self.tape = tape
        self.shape = step.shape
        self.full = step.lora_r == 0
        self.rows = {x.name: x.rows for x in step.shape.linears()}
        self.trained: list[Parameter] = []
        self.plain: list[Parameter] = []  # weights that are not quantized
        self.heads = kernels.Heads(
            step.batch,
            step.seq,
            self.shape.num_attention_heads,
            self.shape.num_key_value_heads,
            self.shape.head_dim,
        )
        self._load()
        if not self.full:
            self._adapt()

    # -- weights ---------------------------------------------------------------------------------

    def _load(self) -> None:
        step, shape = self.step, self.shape
        table, quantized = shape.vocab_size * shape.hidden_size, step.precision == "nf4"
        # the natural order of the keys: lm_head, embed_tokens, layers, norm; and within a layer
        final = [Weight(shape.hidden_size)] * (2 if shape.family.norm == "layer" else 1)
        norms = shape.norms()
        block = {key: Weight(n) for key, n in norms.items()}
        specs = {}
        for index, spec in enumerate(shape.linears()):
            key = f"{'self_attn' if index < 4 else 'mlp'}.{spec.name}."
            specs[key + "weight"] = spec
            block[key + "weight"] = Weight(spec.weight, quantized)
            if spec.bias:
                block[key + "bias"] = Weight(spec.rows)
        block = dict(sorted(block.items(), key=lambda item: item[0].split(".")))
        head = [] if shape.tie_word_embeddings else [Weight(table)]
        last = [*final, *([Weight(shape.vocab_size)] if shape.family.head_bias else [])]
        weights = [*head, Weight(table), *list(block.values()) * shape.num_hidden_layers, *last]
        loaded = deque(zip(weights, load(self.tape, step, weights), strict=True))

        def plain() -> Parameter:
            weight, held = loaded.popleft()
            parameter = Parameter(held[0], weight.n, step.width, self.full)
            self.plain.append(parameter)
            return parameter

        def linear(spec: Linear) -> Parameter | ops.Linear4bit:
            if not quantized:
                return plain()
            return ops.Linear4bit(loaded.popleft()[1], spec.rows, spec.cols, step.double_quant)

        output = [plain() for _ in head]
        self.embedding = plain()
        self.head = output[0] if output else self.embedding
        self.layers: list[_Layer] = []
        for _ in range(shape.num_hidden_layers):
            layer, first = _Layer({}, []), len(self.plain)
            found = {}
            for key in block:
                if key in specs:
                    layer.linears[specs[key].name] = linear(specs[key])
                else:
                    found[key] = plain()
            layer.norms += [found[key] for key in norms]
            layer.plain += self.plain[first:]
            self.layers.append(layer)
        self.final = [plain() for _ in last]
        if self.full:
            self.trained = list(self.plain)
        if step.kbit_prepared:
            for parameter in (*self.plain[len(output) :], *output):
                parameter.storage, parameter.b = Storage(self.tape, 4 * parameter.n, "weights"), 4

    def _adapt(self) -> None:
        step = self.step
        for layer in self.layers:
            for spec in self.shape.linears():
                if spec.name in step.targets:
                    rank = step.rank(spec.name)
                    a = self.tape.parameter(rank * spec.cols, 4, "adapters", True)
                    b = self.tape.parameter(spec.rows * rank, 4, "adapters", True)
                    lengths = self.tape.parameter(spec.rows, 4, "adapters", True) if step.use_dora else None
                    layer.loras[spec.name] = ops.Lora(a, b, rank, step.lora_dropout, spec, lengths)
                    self.trained += [a, b] if lengths is None else [a, b, lengths]

    def groups(self) -> list[list[Parameter]]:
        """The weights that learn together where gradients are released: the head's, the final norm's, each layer's and
        the embedding's (to which a tied head belongs)."""
        head = [] if self.head is self.embedding else [[self.head]]
        return [*head, self.final, *(layer.plain for layer in self.layers), [self.embedding]]

    # -- forward ---------------------------------------------------------------------------------

    def _apply(self, layer: _Layer, index: int, x: Tensor) -> Tensor:
        name, step = self.shape.family.names[index], self.step
        base, lora = layer.linears[name], layer.loras.get(name)
        return ops.lora_linear(self.tape, x, base, lora, step.tokens, self.rows[name], step.half, step.width)

    def _norm(self, x: Tensor, rows: int, weight: Parameter) -> Tensor:
        norm = self.shape.family.norm
        if norm == "layer":
            return ops.layer_norm(self.tape, x, rows, self.step.half)
        return ops.rms_norm(self.tape, x, rows, norm == "gemma", weight)

    def _attention(self, layer: _Layer, x: Tensor, position: Position) -> tuple[Tensor, Tensor | None]:
        """(output, attention weights where they are made)"""
        shape, step = self.shape, self.step
        q, k, v = (self._apply(layer, index, x) for index in range(3))
        if shape.family.qk_norm:
            q = self._norm(q, step.tokens * shape.num_attention_heads, layer.norms[-2])
            k = self._norm(k, step.tokens * shape.num_key_value_heads, layer.norms[-1])
        q, k = self._rotate(q, k, position)
        weights = None
        if step.attention == "eager":
            capped = shape.attn_logit_softcapping is not None
            out, weights = kernels.eager(self.tape, q, k, v, self.heads, step.half, capped, step.device == "cuda")
        else:
            out = self._sdpa(q, k, v)
        return self._apply(layer, 3, out), weights

    def _rotate(self, q: Tensor, k: Tensor, position: Position) -> tuple[Tensor, Tensor]:
        tape, share = self.tape, self.shape.partial_rotary_factor
        if share == 1.0:
            return ops.rotary(tape, q, position), ops.rotary(tape, k, position)
        # Phi: the leading share of each head is rotated, the rest passes
        parts = [(ops.part(tape, t, n), ops.part(tape, t, t.n - n)) for t in (q, k) for n in (round(t.n * share),)]
        (q_turn, q_pass), (k_turn, k_pass) = parts
        del parts
        q_turn, k_turn = ops.rotary(tape, q_turn, position), ops.rotary(tape, k_turn, position)
        return ops.concatenate(tape, q_turn, q_pass), ops.concatenate(tape, k_turn, k_pass)

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tape, step, heads = self.tape, self.step, self.heads
        if step.attention == "efficient":
            k, v = (kernels.repeat_kv(tape, t, heads) for t in (k, v))
            heads = replace(heads, key_heads=heads.query_heads)
        if step.half:
            q, k, v = (ops.cast(tape, t, step.half) for t in (q, k, v))
        if step.attention == "math":
            return kernels.math(tape, q, k, v, heads, step.device == "cuda")
        out = kernels.fused(tape, q, k, v, heads, step.attention)
        if step.attention == "sdpa-cpu" and self.shape.partial_rotary_factor != 1.0:
            # the CPU's kernel lays its output out as the query, which concatenation made [B, H, S, D]
            out = ops.copy(tape, out)
        return out

    def _mlp(self, layer: _Layer, x: Tensor) -> Tensor:
        if not self.shape.family.gated:
            return self._apply(layer, 5, self._activation(self._apply(layer, 4, x)))
        product = ops.multiply(self.tape, self._activation(self._apply(layer, 4, x)), self._apply(layer, 5, x))
        return self._apply(layer, 6, product)

    def _activation(self, x: Tensor) -> Tensor:
        if self.shape.hidden_act == "gelu_new":
            return ops.gelu_new(self.tape, x, self.step.half)
        return ops.unary(self.tape, x, (x,))

    def _block(self, layer: _Layer, x: Tensor, position: Position) -> Tensor:
        tape, tokens, family = self.tape, self.step.tokens, self.shape.family
        norms = iter(layer.norms)
        residual = x
        x = self._norm(x, tokens, next(norms))
        if family.parallel:
            attended, weights = self._attention(layer, x, position)
            attended = ops.dropout(tape, attended, self.shape.resid_pdrop)
            fed = ops.dropout(tape, self._mlp(layer, x), self.shape.resid_pdrop)
            return ops.add(tape, ops.add(tape, attended, fed), residual)
        x, weights = self._attention(layer, x, position)  # `weights` lives to the end of the block, as in transformers
        if family.sandwich:
            x = self._norm(x, tokens, next(norms))
        x = ops.add(tape, residual, x)
        residual = x
        x = self._norm(x, tokens, next(norms))
        x = self._mlp(layer, x)
        if family.sandwich:
            x = self._norm(x, tokens, next(norms))
        x = ops.add(tape, residual, x)
        del weights
        return x

    def _embed(self) -> Tensor:
        step, tape, table = self.step, self.tape, self.embedding
        # under checkpointing peft asks for a gradient at the embedding's output (enable_input_require_grads);
        # without it the first layer's input needs none
        x = operation(
            tape,
            (table,) if self.full else (),
            (step.tokens * self.shape.hidden_size, step.stream),
            lambda g: (tape.new(table.n, table.b),) if table.trainable else (),
            learns=step.checkpointing,
        )
        return ops.unary(tape, x) if self.shape.family.scaled_embedding else x

    def forward(self) -> Tensor:
        """Embedding to the final norm. Returns the last hidden states, [T, hidden]."""
        tape, step, shape = self.tape, self.step, self.shape
        tape.scope = "embedding"
        x = self._embed()
        rotary_width = int(shape.head_dim * shape.partial_rotary_factor)
        position = (tape.new(step.seq * rotary_width, step.stream), tape.new(step.seq * rotary_width, step.stream))
        masks: list[Tensor | None] = [None]
        if step.attention == "eager":
            allowed = tape.new(step.seq * step.seq, 1)
            masks = [tape.new(step.batch * step.seq * step.seq, step.stream) for _ in range(shape.family.masks)]
            del allowed
        for index, layer in enumerate(self.layers):
            tape.scope = f"layer{index}"
            if step.checkpointing:
                # the checkpointed call keeps its arguments, the mask among them, until its backward has run
                kept = (masks[index % len(masks)], position)
                x = checkpoint(tape, lambda y, layer=layer, kept=kept: self._block(layer, y, kept[1]), x)
                del kept
            else:
                x = self._block(layer, x, position)
        tape.scope = "head"
        return self._norm(x, step.tokens, self.final[0])


class _Run:
    """The steps that a model takes."""

    def __init__(self, step: Step, tape: Tape):
        self.step = step
        self.tape = tape
        self.model = _Model(step, tape)
        self.state: list[Storage] = []
        self.workspaces: list[Storage] = []
        self.group_of = {id(p): group for group in self.model.groups() for p in group} if step.release else {}
        self.seen: set[int] = set()  # the first parameter's id of each group that has learnt once

    def _workspace(self, index: int) -> None:
        """cuBLAS takes one per thread: the forward pass's and the backward pass's."""
        if self.step.cublas_workspace and len(self.workspaces) <= index:
            self.workspaces.append(self.tape.buffer(self.step.cublas_workspace, "workspaces"))

    def micro_step(self) -> Tensor | None:
        """Forward, loss and backward of one batch. Returns the logits where they are kept."""
        tape, step, head = self.tape, self.step, self.model.head
        inputs = [tape.new(step.tokens, 8, "activations") for _ in range(3)]  # ids, attention mask, labels
        tape.enter("forward")
        self._workspace(0)
        with tape.autocast() if step.autocast else nullcontext():
            x = self.model.forward()
            tape.enter("loss")
            if step.chunked_loss:
                loss, logits = tiled_loss(tape, step, x, head), None
            else:
                loss, logits = stock_loss(tape, step, x, head)
        del x
        if not step.keep_outputs:
            logits = None
        tape.enter("backward:head")
        self._workspace(1)
        backward(tape, loss, self._release if step.release else None)
        del inputs
        return logits

    def _release(self, parameter: Parameter) -> None:
        """A gradient has come: when it is its group's last, the group learns and its gradients go."""
        group = self.group_of[id(parameter)]
        if not any(p.uses for p in group):
            self._update(group)

    def _update(self, group: list[Parameter], keep_gradients: bool = False) -> None:
        tape, trained, optimizer = self.tape, self.model.trained, OPTIMIZERS[self.step.optimizer]
        sizes = []
        if not self.state:
            sizes += optimizer.history if self.step.release else []
            sizes += [size for p in trained for size in optimizer.tensors(p.n)]
        if self.step.release and id(group[0]) not in self.seen:
            self.seen.add(id(group[0]))
            sizes += optimizer.beside([p.n for p in group], self.step.device)
        self.state += [tape.buffer(size, "optimizer state") for size in sizes]
        held = [tape.buffer(p.n * optimizer.transient, "workspaces") for p in group if optimizer.transient]
        del held
        if not keep_gradients:
            for parameter in group:
                parameter.grad = None

    def optimizer_step(self, keep_gradients: bool) -> None:
        self.tape.enter("optimizer")
        if not self.step.release:
            self._update(self.model.trained, keep_gradients)


def walk(step: Step, steps: int = 2, record: bool = False) -> Tape:
    """Run `steps` optimizer steps on a fresh tape and return it. The first has no optimizer state yet."""
    tape = Tape(step.round_to, record)
    run = _Run(step, tape)
    tape.enter("loaded")
    for index in range(steps):
        logits = run.micro_step()
        run.optimizer_step(step.keeps_gradients(index, steps))
        del logits
    tape.enter("end")
    return tape
