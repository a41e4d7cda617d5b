"""The answer of the planner: a plain dataclass that can be stored, compared and obeyed.

`Plan.save()` writes JSON (`plan.json`), which `cruxy-triton finetune --plan` takes; `Plan.load()` reads it back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Any

from cruxy_triton import files, settings
from cruxy_triton.errors import UserError

_configured: Any = make_dataclass("Configuration", settings.CONFIGURES, frozen=True, kw_only=True)


class Configuration(_configured):
    """What a training run is set to: the settings of `cruxy_triton.settings` that decide memory, none left open.

    `dtype` is never "auto", `device` is "cpu" or "cuda", `target_modules` is a tuple of the model's layers.
    `vram_bytes` is the budget in bytes, None where the whole device is planned for.
    """

    @property
    def gradient_accumulation(self) -> int:
        """Micro-batches per optimizer step."""
        return self.batch_size // self.micro_batch_size

    @property
    def precision(self) -> str:
        """The base weights in one word: the dtype, or "nf4"."""
        return "nf4" if self.load_in_4bit else self.dtype

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Configuration:
        """From settings by name, for example `vars(recipe)`. Raises UserError for one that is open or no good."""
        full = values.get("method") == "full"
        of_adapters: dict[str, Any] = {"lora_r": 0, "lora_alpha": 0, "target_modules": (), "rank_pattern": ()}
        found: dict[str, Any] = of_adapters if full else {"release": False}
        for name in settings.CONFIGURES:
            if name not in found:
                if values.get(name) is None and name != "vram_bytes":
                    raise UserError(f"the configuration does not say {settings.SETTINGS[name].flag}")
                found[name] = settings.SETTINGS[name].check(values.get(name))
        settings.check_together(found)
        for name in ("target_modules", "rank_pattern"):
            found[name] = tuple(found[name])
        found["double_quant"] = found["double_quant"] and found["load_in_4bit"]
        return cls(**found)


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
    allocated_bytes: what PyTorch's allocator would have handed out at the peak; up to 1 % above the highest of
    `phases`, because it hands out rests too small to split. reserved_bytes: what it would have reserved on a card
    without limits. peak_bytes: the least memory in which the process survives, CUDA context included.
    error_bytes: how far off peak_bytes may be, either way. tight: fits, but with less headroom than that.
    step_seconds: a lower bound (roofline) for one optimizer step, 0 where the card's speed is not known.
    folder: where the model was given as a folder, that folder.
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
    folder: str = ""
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
        """JSON-ready; `from_dict` is its inverse."""
        data = asdict(self)
        data["headroom_bytes"] = self.headroom_bytes
        data["tight"] = self.tight
        return json.loads(json.dumps(data))

    @classmethod
    def from_dict(cls, data: Any) -> Plan:
        """Raises UserError where the data is not a plan's."""
        if not isinstance(data, Mapping):
            raise UserError("not a plan written by `cruxy-triton plan --save`: it holds no JSON object")
        values = {k: v for k, v in data.items() if k not in ("headroom_bytes", "tight")}
        known = {f.name for f in fields(cls)}
        if odd := sorted(set(values) ^ known):
            raise UserError(
                f"not a plan of this version of `cruxy-triton plan --save`: {', '.join(odd)} missing or unknown"
            )
        for f in fields(cls):
            if not _is(values[f.name], str(f.type)):
                raise UserError(f"not a plan written by `cruxy-triton plan --save`: {f.name} is no {f.type}")
        values["config"] = Configuration.of(values["config"])
        values["gave_up"], values["notes"] = tuple(values["gave_up"]), tuple(values["notes"])
        values["alternatives"] = tuple(_option(x) for x in values["alternatives"])
        values["needed"] = None if values["needed"] is None else _option(values["needed"])
        return cls(**values)

    def save(self, path: str | Path) -> None:
        """Write JSON, to a temporary name first."""
        path = Path(path)
        if path.suffix == ".toml":
            raise UserError(f"{path}: plans are saved as JSON; name it {path.with_suffix('.json')}")
        if path.is_dir() or not path.parent.is_dir():
            why = "is a folder" if path.is_dir() else f"the folder {path.parent} does not exist"
            raise UserError(f"{path}: {why}")
        files.write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read what `save` wrote. Raises UserError where the file is missing or no plan."""
        path = Path(path)
        again = f"make one with `cruxy-triton plan MODEL --save {path.with_suffix('.json')}`"
        if not path.is_file():
            raise UserError(f"{path}: no such plan; {again}")
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            kind = "a plan of an older version (TOML)" if path.suffix == ".toml" else f"not JSON ({error})"
            raise UserError(f"{path}: {kind}; {again}") from None
        try:
            return cls.from_dict(data)
        except UserError as error:
            raise UserError(f"{path}: {error}; {again}") from None


def _is(value: Any, annotation: str) -> bool:
    """Whether a value read from JSON can be what a field of `Plan` is annotated with."""
    if annotation == "dict[str, int]":
        return isinstance(value, dict) and all(_is(x, "int") for x in value.values())
    if annotation == "tuple[str, ...]":
        return isinstance(value, list) and all(isinstance(x, str) for x in value)
    if annotation == "tuple[Option, ...]":
        return isinstance(value, list) and all(_is(x, "Option") for x in value)
    if annotation == "Option | None":
        return value is None or _is(value, "Option")
    if annotation == "Option":
        kinds = {"change": "str", "config": "Configuration", "peak_bytes": "int"}
        return isinstance(value, dict) and value.keys() == kinds.keys() and all(_is(value[k], kinds[k]) for k in kinds)
    kinds = {"str": str, "bool": bool, "int": int, "float": (int, float), "Configuration": dict}
    return isinstance(value, kinds[annotation]) and (annotation == "bool" or not isinstance(value, bool))


def _option(data: Mapping[str, Any]) -> Option:
    return Option(data["change"], Configuration.of(data["config"]), data["peak_bytes"])
