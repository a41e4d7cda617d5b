"""The page's form, made from the settings of `plan`: their choices, ranges and help, each with room for a refusal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any

from cruxy_triton.planner.card import GiB, card_names, load_card
from cruxy_triton.planner.lookup import model_names, profiles
from cruxy_triton.planner.markup import Markup, joined, tag
from cruxy_triton.planner.search import LENGTHS
from cruxy_triton.settings import SETTINGS, Setting, of_command

# What learns, and in which precision: one field for two settings.
WAYS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "lora": ("LoRA, the best precision that fits", {"method": "lora"}),
    "lora-16": ("LoRA on 16-bit weights", {"method": "lora", "load_in_4bit": False}),
    "qlora": ("LoRA on 4-bit weights (QLoRA)", {"method": "lora", "load_in_4bit": True}),
    "full": ("All parameters", {"method": "full"}),
}
# What the page shows first, and what people call it; the rest is folded away under its flag.
FIRST = {
    "gpu": "Card",
    "vram_bytes": "Its memory",
    "capability": "Its compute capability",
    "os": "System",
    "model": "Model",
    "max_seq_length": "Sequence length",
    "micro_batch_size": "Batch",
}
# Where the command line takes more, or says it in another way, than a page.
HELP = {"gpu": "", "model": "a name of the list, or a Hugging Face id (owner/name), whose config.json is fetched"}
START = {"gpu": "gtx1650-gddr5", "model": "tinyllama-1.1b"}  # what is planned when the page opens


def form() -> Markup:
    first = {name: _field(SETTINGS[name], label) for name, label in FIRST.items()}
    by_memory = tag("div", first["vram_bytes"], first["capability"], id="by-memory", hidden=True)
    way = _choice("way", [(key, label) for key, (label, _) in WAYS.items()], "lora")
    method = _labelled("way", "Method", SETTINGS["method"].help.replace("`", ""), way)
    files = tag(
        "p", tag("label", "or a config.json", for_="file"), tag("input", type="file", id="file", accept=".json"),
        tag("span", " It can be dropped anywhere on the page, too.", class_="note"), class_="file",
    )  # fmt: skip
    hidden = (tag("input", type="hidden", name=name) for name in ("config", "config_name"))
    shown = [first["gpu"], by_memory, first["os"], first["model"], files, *hidden, method]
    return joined(*shown, first["max_seq_length"], first["micro_batch_size"], _rest())


def _rest() -> Markup:
    covered = {*FIRST, "method", "load_in_4bit"}
    groups = []
    others = [setting for setting in of_command("plan") if setting.name not in covered]
    for name, members in groupby(others, key=lambda setting: setting.group):
        fields = (_field(setting, tag("code", setting.flag)) for setting in members)
        groups.append(tag("fieldset", tag("legend", name), *fields))
    return tag("details", tag("summary", "Everything else"), *groups, id="rest")


def _field(setting: Setting, label: str | Markup) -> Markup:
    explained = HELP.get(setting.name, setting.explained("plan").replace("`", ""))
    if setting.name == "gpu":
        control = _choice("gpu", _cards(), START["gpu"])
    elif setting.choices or setting.kind == "switch":
        options = [(str(x), str(x)) for x in setting.choices or ("on", "off")]
        default = setting.left_open or {True: "on", False: "off"}.get(setting.default, str(setting.default))
        if setting.searched:
            default, options = "", [("", "searched"), *options]
        marked = [(value, f"{text} (default)" if value == default else text) for value, text in options]
        control = _choice(setting.name, marked, default)
    else:
        if setting.kind in ("int", "float"):
            explained += f"; {setting.expected}"
        numeric = {"int": "numeric", "float": "decimal"}.get(setting.kind)
        suggested = _suggestions(setting.name)
        known = f"{setting.name}-list" if suggested else None
        control = tag(
            "input", type="text", id=setting.name, name=setting.name, value=START.get(setting.name, ""),
            inputmode=numeric, autocomplete="off", spellcheck="false", list_=known,
            aria_describedby=f"{setting.name}-help {setting.name}-error",
        )  # fmt: skip
        if suggested:
            control = joined(control, tag("datalist", *suggested, id=f"{setting.name}-list"))
    return _labelled(setting.name, label, explained, control)


def _labelled(name: str, label: str | Markup, explained: str, control: Markup) -> Markup:
    return tag(
        "div", tag("label", label, for_=name), control,
        tag("p", explained, id=f"{name}-help", class_="help"), tag("p", id=f"{name}-error", class_="error"),
        class_="field",
    )  # fmt: skip


def _choice(name: str, options: Iterable[tuple[Any, Any]], chosen: str) -> Markup:
    drawn = (tag("option", text, value=value, selected=value == chosen) for value, text in options)
    return tag("select", *drawn, id=name, name=name, aria_describedby=f"{name}-help {name}-error")


def _cards() -> list[tuple[str, str]]:
    cards = sorted(((load_card(name), name) for name in card_names()), key=lambda pair: (pair[0].vram_bytes, pair[1]))
    known = [(name, f"{card.name}, {card.vram_bytes / GiB:.3g} GiB") for card, name in cards]
    return [*known, ("", "Another card, by its memory")]


def _suggestions(name: str) -> list[Markup]:
    if name == "model":
        ids = {key: str(profiles("models")[key].get("hf_id", "")) for key in model_names()}
        return [tag("option", hf_id, value=key) for key, hf_id in ids.items()]
    if name == "max_seq_length":
        return [tag("option", value=length) for length in sorted(LENGTHS)]
    return []
