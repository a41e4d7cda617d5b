"""A GPU (or a CPU with its RAM) as the planner sees it: how much memory, which kernels, how fast.

Figures come from `profiles/gpus/*.toml`, each with its source; `Card.detect()` asks the card that is there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cruxy_triton.errors import UserError
from cruxy_triton.planner.lookup import profiles, read_toml, simple, unknown
from cruxy_triton.settings import parse_bytes

MiB = 2**20
GiB = 2**30
SYSTEMS = ("linux", "linux-desktop", "windows")


@dataclass(frozen=True)
class Card:
    """One device. Bytes unless the name says otherwise.

    `usable` maps an operating system to the bytes that a training process may take in all, CUDA context
    included. `measured` says whether `usable` was read off such a card or follows the rule in `note`.
    """

    name: str
    vram_bytes: int
    usable: Mapping[str, int]
    capability: tuple[int, int] = (7, 5)
    sms: int = 0
    bandwidth_gb_s: float = 0.0
    fp32_tflops: float = 0.0
    half_tflops: float = 0.0  # dense fp16 matrix products with fp32 accumulation
    context_bytes: int = 150 * MiB
    context_error_bytes: int = 60 * MiB
    device: str = "cuda"
    sources: Mapping[str, str] = field(default_factory=dict)
    note: str = ""
    budget_bytes: int | None = None  # where the card is nothing but an amount of memory

    @property
    def bf16(self) -> bool:
        """bfloat16 in hardware: compute capability 8.0 and later. (torch can say yes through emulation.)"""
        return self.capability >= (8, 0)

    @property
    def cublas_workspace_bytes(self) -> int:
        """One cuBLAS handle's workspace: 4096 KiB * 2 + 16 KiB * 8, or 32 MiB from Hopper on
        (aten/src/ATen/cuda/CublasHandlePool.cpp). The forward and the backward thread have one each."""
        if self.device == "cpu":
            return 0
        return 32 * MiB if self.capability >= (9, 0) else 8_519_680

    def usable_bytes(self, system: str | None = None) -> int:
        """What a training process may take on `system` ("linux", "linux-desktop", "windows").

        Raises UserError for another one, or for any where the amount does not depend on it (a budget, a CPU).
        """
        if "any" in self.usable:
            if system is not None:
                raise UserError(f"{self.name}: what is usable was given or read off; leave the operating system out")
            return self.usable["any"]
        system = system or "linux"
        if system not in SYSTEMS:
            raise UserError(f"unknown operating system {system!r}; expected one of {', '.join(SYSTEMS)}")
        return self.usable[system]

    @property
    def attention_kinds(self) -> tuple[str, ...]:
        """Kernels that run here, best first. "efficient" is SDPA's memory-efficient kernel on K and V expanded
        to all heads; "math" is where transformers' `enable_gqa=True` lands before sm_80; flash needs sm_80."""
        if self.device == "cpu":
            return ("sdpa-cpu", "eager")
        return ("flash", "efficient", "eager", "math") if self.bf16 else ("efficient", "eager", "math")

    def attention(self, asked: str | None) -> str:
        """The kernel that is asked for, or the best one. Raises UserError where it does not run here."""
        if asked is not None and asked not in self.attention_kinds:
            kinds = ", ".join(self.attention_kinds)
            raise UserError(f"--attention {asked} does not run on {self.name}; it has {kinds}")
        return asked or self.attention_kinds[0]

    @classmethod
    def cpu(cls, ram_bytes: int | str) -> Card:
        """A CPU run in `ram_bytes` of memory: float32, no CUDA context. The interpreter and its libraries come on
        top (0.46 GiB resident with torch, transformers and peft): give what is free once they are loaded."""
        amount = parse_bytes(ram_bytes)
        return cls(
            name=f"CPU with {amount / GiB:.3g} GiB",
            vram_bytes=amount,
            usable={"any": amount},
            capability=(0, 0),
            context_bytes=0,
            context_error_bytes=0,
            device="cpu",
            budget_bytes=amount,
            note="the interpreter and its libraries are not counted: the budget is what is free once they are loaded",
        )

    @classmethod
    def budget(cls, amount: int | str, capability: tuple[int, int] = (7, 5)) -> Card:
        """A nameless CUDA card with so much memory for the process in all, of Turing's abilities unless given.

        Raises UserError for a compute capability that no card has.
        """
        number = parse_bytes(amount)
        parse_capability(".".join(map(str, capability)), "a budget")
        return cls(
            name=f"{number / GiB:.3g} GiB budget",
            vram_bytes=number,
            usable={"any": number},
            capability=capability,
            budget_bytes=number,
            note="a plain budget: context included, compute capability "
            f"{capability[0]}.{capability[1]} assumed, no step time",
        )

    def within(self, budget: int | None) -> Card:
        """This card cut down to `budget` bytes for the process, or itself. Raises UserError for more than it has."""
        if budget is None:
            return self
        if budget > self.vram_bytes:
            raise UserError(
                f"--vram of {budget / MiB:,.0f} MiB is more than {self.name} has ({self.vram_bytes / MiB:,.0f} MiB)"
            )
        return Card.budget(budget, self.capability)

    @classmethod
    def detect(cls) -> Card:
        """The first CUDA card of this machine, by its name and what the driver reports.

        Raises UserError where torch sees none.
        """
        try:
            import torch
        except ImportError as error:
            raise UserError(
                f"--gpu auto: cards are asked through torch, which is not here ({error}); name a card (--gpu gtx1650) "
                "or a budget (--vram 4GiB)"
            ) from None

        if not torch.cuda.is_available():
            raise UserError("--gpu auto: no CUDA device here; name a card (--gpu gtx1650) or a budget (--vram 4GiB)")
        properties = torch.cuda.get_device_properties(0)
        free, total = torch.cuda.mem_get_info(0)
        capability = (properties.major, properties.minor)
        # free was read with this process's own context already on the card
        usable = {"any": free + 150 * MiB}
        names = _cards_called(properties.name)
        if not names:
            return cls(
                name=properties.name,
                vram_bytes=total,
                usable=usable,
                capability=capability,
                sms=properties.multi_processor_count,
            )
        known = [card_from_profile(profiles("gpus")[name], name) for name in names]
        nearest = min(known, key=lambda card: abs(card.vram_bytes - total))
        return replace(nearest, name=properties.name, vram_bytes=total, usable=usable, capability=capability)


def card_names() -> list[str]:
    """The names of profiles/gpus."""
    return list(profiles("gpus"))


def parse_capability(text: str, what: str) -> tuple[int, int]:
    """ "7.5" as (7, 5). Raises UserError for anything that no CUDA card has; 5.0 (Maxwell) is the least."""
    match = re.fullmatch(r"(\d{1,2})\.(\d)", text)
    if match is None or not 5 <= int(match.group(1)) <= 12:
        raise UserError(f"{what}: a compute capability must look like 7.5 (5.0 to 12.9), not {text!r}")
    return int(match.group(1)), int(match.group(2))


_REQUIRED = ("vram_mib", "usable_linux_mib", "usable_linux_desktop_mib", "usable_windows_mib")
_OTHERS = {
    "sms": 0, "bandwidth_gb_s": 0, "fp32_tflops": 0, "half_tflops": 0, "context_mib": 150, "context_error_mib": 60
}  # fmt: skip


def card_from_profile(data: Mapping[str, Any], name: str) -> Card:
    """A `Card` from a parsed profile file. Raises UserError for a missing or impossible field."""
    what = f"GPU profile {name}"
    missing = [key for key in (*_REQUIRED, "capability") if key not in data]
    if missing:
        raise UserError(f"{what}: {', '.join(missing)} missing; see profiles/gpus/gtx1650-gddr5.toml")
    numbers = {key: data[key] for key in _REQUIRED} | {key: data.get(key, least) for key, least in _OTHERS.items()}
    for key, value in numbers.items():
        least = 1 if key in _REQUIRED else 0
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < math.inf:
            raise UserError(f"{what}: {key} must be a number of at least {least}, not {value!r}")
    return Card(
        name=str(data.get("name", name)),
        vram_bytes=int(numbers["vram_mib"] * MiB),
        usable={system: int(numbers[f"usable_{system.replace('-', '_')}_mib"] * MiB) for system in SYSTEMS},
        capability=parse_capability(str(data["capability"]), what),
        sms=int(numbers["sms"]),
        bandwidth_gb_s=float(numbers["bandwidth_gb_s"]),
        fp32_tflops=float(numbers["fp32_tflops"]),
        half_tflops=float(numbers["half_tflops"]),
        context_bytes=int(numbers["context_mib"] * MiB),
        context_error_bytes=int(numbers["context_error_mib"] * MiB),
        sources=dict(data.get("sources", {})),
    )


def _cards_called(text: str) -> list[str]:
    """The profiles that a name means: its own name, or every card of that alias or of the driver's name for it.

    The driver (nvidia-smi, torch) says neither memory nor its kind: "NVIDIA GeForce RTX 3050" is three cards.
    """
    cards = profiles("gpus")
    wanted = simple(re.sub(r"(?i)\b(nvidia|geforce|gpu)\b", "", text))
    found = [name for name in cards if simple(name) == wanted]
    return found or [name for name, data in cards.items() if wanted in map(simple, _names(data))]


def _names(data: Mapping[str, Any]) -> list[str]:
    """What a profile's card is called: by its aliases, and by its name with and without its memory."""
    name = data.get("name", "").replace("GeForce", "")
    return [*data.get("aliases", ()), name, re.sub(r"\d+ GB$", "", name)]


def load_card(card: str | int | Path | Card) -> Card:
    """A `Card` from a profile's name or file, the driver's name, an amount of memory ("4GiB", or bytes as an int),
    or "auto".

    Raises UserError where nothing of that name is found (the nearest names are in the message) or several cards
    are called so.
    """
    if isinstance(card, Card):
        return card
    if isinstance(card, int):
        return Card.budget(card)
    text = str(card).strip()
    if text == "auto":
        return Card.detect()
    path = Path(text).expanduser()
    if path.suffix == ".toml":
        if not path.is_file():
            raise UserError(f"{path}: no such GPU profile")
        return card_from_profile(read_toml(path), path.stem)
    names = _cards_called(text)
    if len(names) > 1:
        raise UserError(f"{text!r} is {len(names)} cards; which one: {', '.join(names)}?")
    if names:
        return card_from_profile(profiles("gpus")[names[0]], names[0])
    if re.match(r"\s*-?[0-9.]+\s*[kmgtKMGT]?[iI]?[bB]?\s*$", text):
        return Card.budget(text)
    raise UserError(unknown("GPU", text, card_names()))


def chosen_card(where: Mapping[str, Any]) -> Card:
    """The card of --gpu, --vram, --device, --capability and --os; raises UserError where they contradict."""
    gpu, vram, system, capability = (where.get(name) for name in ("gpu", "vram_bytes", "os", "capability"))
    for name, value in (("--gpu", gpu), ("--capability", capability)):
        if value is not None and where.get("device") == "cpu":
            raise UserError(f"{name} belongs to a CUDA device; leave it or --device cpu out")
    if where.get("device") == "cpu":
        if vram is None:
            raise UserError("--device cpu needs --vram, the memory to train in, for example --vram 16GiB")
        card = Card.cpu(vram)
    elif vram is not None and gpu is None:
        major, _, minor = (capability or "7.5").partition(".")
        card = Card.budget(vram, (int(major), int(minor)))
    else:
        if capability is not None:
            raise UserError("--capability belongs to --vram; a card of --gpu has its own")
        card = load_card(gpu or "auto").within(vram)
    if system is not None and "any" in card.usable:
        raise UserError(f"--os {system} belongs to a card of --gpu; for {card.name} the memory is what was given")
    return card
