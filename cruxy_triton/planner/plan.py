"""The answer of the planner: a plain dataclass that can be stored, compared and obeyed.

`Plan.save()` writes TOML (`plan.toml`), which `cruxy-triton finetune` takes; `Plan.load()` reads it back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from cruxy_triton import files
from cruxy_triton.errors import UserError
from cruxy_triton.planner.lookup import read_toml


@dataclass(frozen=True)
class Configuration:
    """What a training run is set to. Lengths in tokens.

    attention: "efficient" (PyTorch's memory-efficient SDPA on K and V repeated to all heads), "flash" (SDPA, flash
    kernel, sm_80 and later), "math" (SDPA's math kernel), "eager", "sdpa-cpu".
    optimizer: "lion-8bit", "lion-fp32", "adamw-fp32" (the codec of CruxyOptimizer's state) or "sgd".
    chunked_loss: TRL's tiled head; False is transformers' stock loss with whole logits.
    """

    precision: str
    max_seq_length: int
    batch_size: int
    gradient_accumulation: int
    lora_r: int
    lora_alpha: int
    target_modules: tuple[str, ...]
    gradient_checkpointing: bool
    chunked_loss: bool
    attention: str
    optimizer: str
    double_quant: bool = False
    lora_dropout: float = 0.0
    method: str = "lora"  # or "full": every weight learns

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Configuration:
        known = {f.name for f in fields(cls)}
        extra = sorted(set(data) - known)
        if extra:
            raise UserError(f"plan: unknown settings {', '.join(extra)}; known: {', '.join(sorted(known))}")
        values = dict(data)
        if "target_modules" in values:
            values["target_modules"] = tuple(values["target_modules"])
        try:
            return cls(**values)
        except TypeError as error:
            raise UserError(f"plan: {str(error).partition('()')[2].strip()}") from None


@dataclass(frozen=True)
class Option:
    """Another configuration: what differs, and the memory that it takes (bytes, context included)."""

    change: str
    config: Configuration
    peak_bytes: int


@dataclass(frozen=True)
class Plan:
    """Whether and how a model trains on a card. All memory in bytes.

    components: the process at its peak, by component; they sum to `peak_bytes`.
    phases: peak allocated by PyTorch in each phase of a step (without context and allocator).
    allocated_bytes: the highest of `phases`. reserved_bytes: what PyTorch would have reserved on a card without
    limits. peak_bytes: the least memory in which the process survives, CUDA context included.
    error_bytes: how far off peak_bytes may be, either way. tight: fits, but with less headroom than that.
    step_seconds: a lower bound (roofline) for one optimizer step, 0 where the card's speed is not known.
    """

    model: str
    card: str
    os: str
    fits: bool
    config: Configuration
    components: dict[str, int]
    phases: dict[str, int]
    peak_phase: str
    allocated_bytes: int
    reserved_bytes: int
    peak_bytes: int
    usable_bytes: int
    error_bytes: int
    step_seconds: float = 0.0
    parameters: int = 0
    trainable_parameters: int = 0
    hf_id: str = ""
    gave_up: tuple[str, ...] = ()
    alternatives: tuple[Option, ...] = ()
    needed: Option | None = None
    notes: tuple[str, ...] = ()
    verified: dict[str, int] = field(default_factory=dict)

    @property
    def headroom_bytes(self) -> int:
        """Usable memory that is left at the peak; negative where the plan does not fit."""
        return self.usable_bytes - self.peak_bytes

    @property
    def tight(self) -> bool:
        return self.fits and self.headroom_bytes < self.error_bytes

    def to_dict(self) -> dict[str, Any]:
        """JSON- and TOML-ready; `from_dict` is its inverse."""
        data = asdict(self)
        if data["needed"] is None:
            del data["needed"]
        data["headroom_bytes"] = self.headroom_bytes
        data["tight"] = self.tight
        return json.loads(json.dumps(data))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """Raises UserError where the data is not a plan's."""
        values = {k: v for k, v in data.items() if k not in ("headroom_bytes", "tight")}
        known = {f.name for f in fields(cls)}
        extra, lacking = sorted(set(values) - known), sorted({"model", "card", "config"} - set(values))
        if extra or lacking:
            what = f"unknown keys {', '.join(extra)}" if extra else f"{', '.join(lacking)} missing"
            raise UserError(f"not a plan written by `cruxy-triton plan --save`: {what}")
        values["config"] = Configuration.from_dict(values["config"])
        for key in ("gave_up", "notes"):
            values[key] = tuple(values.get(key, ()))
        values["alternatives"] = tuple(_option(x) for x in values.get("alternatives", ()))
        values["needed"] = _option(values["needed"]) if values.get("needed") else None
        try:
            return cls(**values)
        except TypeError as error:
            raise UserError(f"not a whole plan: {str(error).partition('()')[2].strip()}") from None

    def save(self, path: str | Path) -> None:
        """Write TOML, to a temporary name first."""
        if not Path(path).parent.is_dir():
            raise UserError(f"{path}: the folder {Path(path).parent} does not exist")
        files.write_text(path, to_toml(self.to_dict()))

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read what `save` wrote. Raises UserError where the file is missing or no plan."""
        path = Path(path)
        if not path.is_file():
            raise UserError(f"{path}: no such plan; make one with `cruxy-triton plan MODEL --save {path}`")
        return cls.from_dict(read_toml(path))


def _option(data: Mapping[str, Any]) -> Option:
    return Option(data["change"], Configuration.from_dict(data["config"]), int(data["peak_bytes"]))


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        return json.dumps(value)  # TOML's basic strings take JSON's escapes
    if isinstance(value, list):
        return "[" + ", ".join(_toml_value(v) for v in value) + "]"
    raise TypeError(f"no TOML form for {type(value).__name__}")


def _toml_key(key: str) -> str:
    return key if key.replace("_", "").replace("-", "").isalnum() else json.dumps(key)


def to_toml(data: Mapping[str, Any], prefix: str = "") -> str:
    """TOML text of nested dicts, lists of dicts, lists, strings, numbers and booleans."""
    plain, tables = [], []
    for key, value in data.items():
        name = f"{prefix}{_toml_key(key)}"
        if isinstance(value, Mapping):
            tables.append(f"\n[{name}]\n{to_toml(value, f'{name}.')}")
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            tables += [f"\n[[{name}]]\n{to_toml(item, f'{name}.')}" for item in value]
        else:
            plain.append(f"{_toml_key(key)} = {_toml_value(value)}\n")
    return "".join(plain) + "".join(tables)
