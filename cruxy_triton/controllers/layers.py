"""Layer-wise control: which layer a tensor is in, and what the controllers above it (BLADE, SKETCH-ALIGN) share.

A layer is a transformer block by the name of its parameters (`model.layers.7.`, `h.3.`), and what is in no block
(embeddings, head, final norm) is a layer by itself. A tensor without a name is a layer of its own.

The state lives in the first parameter group, `group["layers"]`, where checkpoints of every torch optimizer and
torch.distributed.checkpoint find it.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cruxy_triton import distributed
from cruxy_triton.batches import Batch, spans_of
from cruxy_triton.errors import warn
from cruxy_triton.metrics import Reader

KEY = "layers"  # of the first parameter group


def layer_name(parameter: str) -> str:
    """The layer of a parameter: up to the first number in its name, else the module that it is in.

    >>> layer_name("base_model.model.model.layers.7.self_attn.q_proj.lora_A.default.weight")
    'base_model.model.model.layers.7'
    >>> layer_name("model.norm.weight"), layer_name("lm_head.lora_B.default.weight")
    ('model.norm', 'lm_head')
    """
    block = re.match(r"(?:.*?\.)??\d+(?=\.|$)", parameter)
    if block:
        return block[0]
    module = re.split(r"\.lora_", parameter)[0]
    return module if module != parameter else parameter.rpartition(".")[0] or parameter


def in_layers(
    groups: Sequence[Mapping[str, Any]], names: Mapping[Tensor, str] | None = None
) -> Iterator[tuple[int, int, str]]:
    """Of each parameter its group's number, its place there and its layer; `names` go before the groups' own."""
    number = 0
    for index, group in enumerate(groups):
        given = group.get("param_names") or [None] * len(group["params"])
        for place, (p, own) in enumerate(zip(group["params"], given, strict=True)):
            name = own if names is None else names.get(p, own)
            yield index, place, f"parameter {number}" if name is None else layer_name(name)
            number += 1


class Layers:
    """The layers of some parameter groups, in the order in which their first tensors come.

    names, numels: of each layer. home: of each tensor its layer's number, and its first element's number in it.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]], names: Mapping[Tensor, str] | None = None) -> None:
        numbers: dict[str, int] = {}
        numels: dict[str, int] = {}
        self.home: dict[Tensor, tuple[int, int]] = {}
        for index, place, layer in in_layers(groups, names):
            p = groups[index]["params"][place]
            if distributed.is_sharded(p):
                raise ValueError(
                    "layer-wise control does not serve sharded parameters (FSDP2, tensor parallel); use "
                    "layerwise=None with them, or DDP"
                )
            start = numels.setdefault(layer, 0)
            self.home[p] = numbers.setdefault(layer, len(numbers)), start
            numels[layer] += p.numel()
        self.names = list(numels)
        self.numels = [max(1, numel) for numel in numels.values()]


class StepTensors:
    """The tensors of one step, each thing asked for only where it is needed.

    params: in the order of the telemetry. grads: theirs. spans, cells: as `cruxy_kernels.LayerTensors` takes them.
    key: an object that is the same for as long as everything but the gradients is; None: it may be another each time.
    """

    def __init__(
        self,
        params: Callable[[], list[Tensor]],
        grads: Callable[[], list[Tensor]],
        key: Any = None,
        spans: Callable[[], Tensor | None] = lambda: None,
        cells: Callable[[], list[int] | None] = lambda: None,
    ) -> None:
        self.params, self.grads, self.key, self.spans, self.cells = params, grads, key, spans, cells

    @classmethod
    def of(cls, batches: list[Batch]) -> "StepTensors":
        prepared = [batch.prepared for batch in batches if batch.prepared is not None]
        whole = len(prepared) == len(batches)

        def params() -> list[Tensor]:
            return [p for batch in batches for p in batch.params]

        def grads() -> list[Tensor]:  # a plan's batches hold none
            return [g for batch in batches for g in batch.grads or [p.grad for p in batch.params] if g is not None]

        def cells() -> list[int] | None:
            if not whole or len({batch.device for batch in batches}) > 1:
                return None
            found = [one.grad_cells() for one in prepared]
            return None if None in found else [cell for part in found if part is not None for cell in part]

        return cls(params, grads, batches if whole else None, lambda: spans_of(batches), cells)


class LayerControl:
    """What layer-wise controllers share: layers, state, checkpoints, metrics. A subclass says how a step goes.

    response: "damped" or "paper". seed: of the samples.
    """

    kind = ""

    def __init__(self, response: str, seed: int) -> None:
        self.response, self.seed = response, seed
        self.layers = Layers([])
        self.entry: dict[str, Any] = {}  # the state, as it stands in the first group
        self._known: Any = None
        self._calls_without_entropy = 0
        self._reader = Reader()

    # -- of a subclass ----------------------------------------------------------------------------------------------

    def new_state(self, numels: list[int]) -> dict[str, Tensor]:
        """The tensors of the state before the first step, on the CPU; `multipliers` is one of them."""
        raise AssertionError

    def carry(self, old: dict[str, Tensor], new: dict[str, Tensor], rows: dict[int, int]) -> None:
        """Take over into a new state what the old one knows; `rows`: number of a new layer -> that of the old one."""
        raise AssertionError

    def factors(
        self, tensors: StepTensors, telemetry: Tensor, skip: Tensor, loss: Tensor | None, entropy: Tensor | None,
        grad_scale: Tensor | None, backend: str | None,
    ) -> Tensor:
        """One step of the law: the multiplier of each tensor, float32 (tensors,)."""
        raise AssertionError

    # -- layers and state -------------------------------------------------------------------------------------------

    @property
    def state(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.entry.items() if isinstance(value, Tensor)}

    def follow(
        self,
        groups: Sequence[dict[str, Any]],
        device: torch.device,
        key: Any = None,
        names: Mapping[Tensor, str] | None = None,
    ) -> None:
        """Take note of the groups as they are: their layers, and a state that somebody has put there.

        key: with the same one as in the last call the groups have the same tensors.

        Raises ValueError for sharded parameters, and for a state of other layers or a damaged one.
        """
        if key is None or key != self._known:
            layers = Layers(groups, names)
            if (layers.names, layers.numels) != (self.layers.names, self.layers.numels):
                self._renew(layers)
            self.layers, self._known = layers, key
            self.forget()
        there = groups[0].get(KEY)
        if there is not self.entry:
            if there is not None:
                self.adopt(self.check(there))
            groups[0][KEY] = self.entry
        if any(value.device != device for value in self.state.values()):
            self.entry.update({name: value.to(device) for name, value in self.state.items()})
            self.forget()

    def forget(self) -> None:
        """Let go of what was prepared for the tensors of the last step."""

    def _renew(self, layers: Layers) -> None:
        new, old = self.new_state(layers.numels), self.state
        before = list(zip(self.layers.names, self.layers.numels, strict=True))
        now = list(zip(layers.names, layers.numels, strict=True))
        if old:
            old = {name: value.cpu() for name, value in old.items()}  # off the path: the groups changed
            self.carry(old, new, {i: before.index(layer) for i, layer in enumerate(now) if layer in before})
        self.entry.clear()
        self.entry.update({"kind": self.kind, "seed": self.seed, "names": layers.names, **new})

    def check(self, entry: Any) -> dict[str, Any]:
        """A state from a checkpoint that fits these layers.

        Raises ValueError: it is of other layers, of another controller, or damaged.
        """
        if not isinstance(entry, Mapping) or entry.get("kind") != self.kind:
            got = entry.get("kind") if isinstance(entry, Mapping) else type(entry).__name__
            raise ValueError(f"the checkpoint's layer-wise state is of {got!r}; expected {self.kind!r}")
        if entry.get("names") != self.layers.names:
            raise ValueError(
                f"the checkpoint's layer-wise state is of the layers {_some(entry.get('names'))}; expected "
                f"{_some(self.layers.names)}: give the optimizer the parameters, with their names, as the run did that "
                "saved it"
            )
        for name, own in self.state.items():
            value = entry.get(name)
            if not isinstance(value, Tensor) or (value.shape, value.dtype) != (own.shape, own.dtype):
                raise ValueError(f"the checkpoint's layer-wise state is damaged: {name} is not {own.dtype} of shape "
                                 f"{tuple(own.shape)}")  # fmt: skip
            if value.is_floating_point() and not bool((value.isfinite()).all()):
                raise ValueError(f"the checkpoint's layer-wise state is damaged: {name} has values that are not finite")
        seed = entry.get("seed")
        if not isinstance(seed, int) or not 0 <= seed < 1 << 31:
            raise ValueError(f"the checkpoint's layer-wise state is damaged: its seed is {seed!r}")
        return {**{name: entry[name] for name in self.state}, "seed": seed}

    def adopt(self, checked: dict[str, Any]) -> None:
        """Continue from what `check` returned; shares nothing with it."""
        for name, own in self.state.items():
            own.copy_(checked[name])
        self.seed = self.entry["seed"] = checked["seed"]

    def restart(self, checked: dict[str, Any] | None) -> None:
        """Continue from what `check` returned, or begin anew."""
        self._known = None
        self.adopt(checked if checked is not None else {**self.new_state(self.layers.numels), "seed": self.seed})

    # -- a step -----------------------------------------------------------------------------------------------------

    def step(
        self, tensors: StepTensors, telemetry: Tensor, skip: Tensor, *, loss: Tensor | None, entropy: Tensor | None,
        grad_scale: Tensor | None = None, backend: str | None = None,
    ) -> Tensor:
        """One step: the multiplier of each tensor, float32 (tensors,) on the telemetry's device.

        Args: those of `cruxy_kernels.blade_step`.
        """
        if entropy is None:
            self._calls_without_entropy += 1
            if self._calls_without_entropy == 2:
                warn(
                    f"layer-wise control ({self.kind}) gets no output entropy, so it goes by the loss and the "
                    "gradients; set_entropy(entropy), or observe(loss, entropy), gives it one"
                )
        return self.factors(tensors, telemetry, skip, loss, entropy, grad_scale, backend)

    def multipliers(self, *, wait: bool = False) -> dict[str, float]:
        """The last step's multiplier of each layer. On an accelerator the newest that have arrived, as `metrics()`."""
        values = self._reader.read(self.entry["multipliers"][None], wait)[0]
        return dict(zip(self.layers.names, values, strict=True))


def _some(names: Any) -> str:
    listed = [str(name) for name in names] if isinstance(names, (list, tuple)) else [repr(names)]
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
