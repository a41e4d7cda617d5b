"""What the page asks: a form's fields in, the plan as HTML out. Runs in the browser; imports no torch.

A request maps names of settings to the text of their fields, as the command line has them; a switch is "on" or
"off". Beside those, `way` is one of `form.WAYS`, `config` is the text of a config.json and `config_name` its file's
name where it is no answer of the hub, and `config_status` is what the hub said instead.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from cruxy_triton import settings
from cruxy_triton.errors import UserError
from cruxy_triton.page import words
from cruxy_triton.page.form import WAYS
from cruxy_triton.planner.card import Card, card_names, chosen_card
from cruxy_triton.planner.lookup import (
    hub_config,
    is_hub_id,
    json_object,
    model_profile,
    not_from_hub,
    unknown,
    unknown_model,
)
from cruxy_triton.planner.models import shape_from_config
from cruxy_triton.planner.plan import Plan
from cruxy_triton.planner.search import plan, step_of
from cruxy_triton.planner.shape import ModelShape
from cruxy_triton.planner.timeline import timeline

CARD = ("gpu", "vram_bytes", "os", "capability", "device")
LONGEST_CONFIG = 1 << 20  # characters


class _At(Exception):
    """A refusal, and the field that it belongs to."""

    def __init__(self, field: str, message: str):
        super().__init__(message)
        self.field = field


class _Wanted(Exception):
    """The config of a Hugging Face id is needed, which the browser has to fetch."""


class Planner:
    """Answers requests one after another; `picture` is of the last one that was answered with a plan."""

    def __init__(self) -> None:
        self._last: tuple[Plan, ModelShape, Card] | None = None

    def answer(self, text: str) -> str:
        """JSON in and out: {"verdict", "detail", "plan"}, or {"fetch": id}, or {"error", "field"}."""
        try:
            found = self._plan(json.loads(text))
        except _Wanted as wanted:
            reply: dict[str, Any] = {"fetch": str(wanted)}
        except _At as refusal:
            reply = {"error": str(refusal), "field": refusal.field}
        else:
            reply = {
                "title": f"{words.sentence(found)}: {found.model} on {found.card}",
                "verdict": words.verdict(found),
                "detail": words.detail(found),
                "plan": found.to_dict(),
            }
        return json.dumps(reply)

    def picture(self, width: int) -> str:
        """The chart over a step of the last plan, as HTML for so many pixels."""
        if self._last is None:
            return ""
        found, shape, card = self._last
        return words.over_one_step(found, timeline(step_of(shape, card, found.config)), width)

    def _plan(self, request: Mapping[str, str]) -> Plan:
        given = _given(request)
        shape = _shape(request)
        where = {name: given.pop(name, None) for name in CARD}
        if where["gpu"] is None and where["vram_bytes"] is None:
            raise _At("vram_bytes", "which card? Choose one, or say how much memory there is, for example 4GiB")
        if where["gpu"] not in (None, *card_names()):
            raise _At("gpu", unknown("GPU", where["gpu"], card_names()))
        try:
            card = chosen_card(where)
            found = plan(shape, card, os=where["os"], **given)
        except UserError as error:
            raise _At(field_of(str(error), "model"), str(error)) from None
        self._last = (found, shape, card)
        return found


def _given(request: Mapping[str, str]) -> dict[str, Any]:
    """The settings of a request, in their own types."""
    way = request.get("way", "lora")
    if way not in WAYS:
        raise _At("way", f"the method is {way!r}; expected one of {', '.join(WAYS)}")
    found: dict[str, Any] = dict(WAYS[way][1])
    for setting in settings.of_command("plan"):
        text = request.get(setting.name, "").strip()
        if not text or setting.name in ("model", *found):
            continue
        try:
            if setting.kind == "switch":
                found[setting.name] = setting.check({"on": True, "off": False}.get(text, text))
            else:
                found[setting.name] = setting.parse(text)
        except UserError as error:
            raise _At(setting.name, str(error)) from None
    return found


def _shape(request: Mapping[str, str]) -> ModelShape:
    name, text = request.get("model", "").strip(), request.get("config", "")
    try:
        if text:
            where = request.get("config_name", "").strip() or name or "config.json"
            if len(text) > LONGEST_CONFIG:
                raise UserError(f"{where}: {len(text):,} characters; a config.json has a few thousand")
            config = json_object(text, where)
            fetched = is_hub_id(name) and not request.get("config_name")
            return shape_from_config(*(hub_config(config, name) if fetched else (config, where, where)))
        if not name:
            raise UserError("which model? For example tinyllama-1.1b, or a Hugging Face id")
        if (profile := model_profile(name)) is not None:
            return shape_from_config(*profile)
        if is_hub_id(name):
            if not (status := request.get("config_status")):
                raise _Wanted(name)
            hint = "A config.json can be dropped here instead."
            raise UserError(f"{not_from_hub(name, int(status) if status.isdecimal() else None, status)} {hint}")
        raise UserError(unknown_model(name))
    except UserError as error:
        raise _At("model", str(error)) from None


def field_of(message: str, otherwise: str) -> str:
    """The setting whose flag a message names first."""
    flags = {setting.flag: setting.name for setting in settings.of_command("plan") if setting.flag}
    named = [flags[word] for word in re.findall(r"--[a-z][a-z0-9-]*", message) if word in flags]
    return next(iter(named), otherwise)
