"""A plan as HTML: the verdict in words, the bar and its table, the chart over a step, what else fits, the command."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from cruxy_triton import settings
from cruxy_triton.planner.card import MiB
from cruxy_triton.planner.markup import Markup, joined, tag
from cruxy_triton.planner.picture import LEFT, RIGHT, STACK, WIDTH, bar, chart, gib, kind, says, texts
from cruxy_triton.planner.plan import Configuration, Option, Plan
from cruxy_triton.planner.render import MEANING, describe, finetune_command
from cruxy_triton.planner.timeline import Moment


def sentence(plan: Plan) -> str:
    """The answer in one sentence."""
    word = ("Fits, tightly" if plan.tight else "Fits") if plan.fits else "Does not fit"
    amount = f"{gib(plan.peak_bytes).removesuffix(' GiB')} of {gib(plan.usable_bytes)}"
    return f"{word}: {amount}, give or take {gib(plan.error_bytes)}"


def verdict(plan: Plan) -> Markup:
    where = plan.card if plan.os == "any" else f"{plan.card}, {plan.os}"
    what = f"{plan.model} ({plan.parameters / 1e9:.2f} B parameters) on {where}"
    mood = ("tight" if plan.tight else "yes") if plan.fits else "no"
    answer = sentence(plan).replace(" GiB", "\N{NO-BREAK SPACE}GiB")
    return joined(tag("h2", answer, class_=f"verdict {mood}"), tag("p", what, class_="subject"))


def detail(plan: Plan, chart: Markup | None = None) -> Markup:
    """Everything under the verdict. Without a chart, room for one and alternatives as buttons: for the page."""
    how = tag("p", "" if plan.fits else "Nearest: ", describe(plan.config), class_="how")
    return joined(how, _memory(plan), chart or tag("div", id="over-one-step"), *_rest(plan, chart is None))


def document(plan: Plan, moments: Sequence[Moment]) -> tuple[str, Markup]:
    """(title, body) of a page of its own."""
    chart = tag("section", over_one_step(plan, moments))
    body = tag("main", tag("div", verdict(plan), id="answer"), tag("div", detail(plan, chart), id="detail"))
    header = tag("header", tag("h1", "Will it fit?"))
    return f"{sentence(plan)}: {plan.model} on {plan.card}", joined(header, body)


def _rest(plan: Plan, links: bool) -> tuple[Markup, ...]:
    return _otherwise(plan, links), _command(plan), _small(plan)


def _memory(plan: Plan) -> Markup:
    lines = []
    for name in (*STACK, "allocator", *plan.components):
        size = plan.components.get(name, 0)
        if size >= MiB / 2 and not any(line[0] == name for line in lines):
            lines.append((name, size))
    lines.sort(key=lambda line: -line[1])
    drawn = [
        tag(
            "tr",
            tag("th", tag("i", class_=f"swatch {kind(name)}", aria_hidden="true"), name, scope="row"),
            tag("td", gib(size) if size >= 10 * MiB else f"{size / MiB:.0f} MiB"),
            tag("td", MEANING.get(name, ""), class_="meaning"),
        )
        for name, size in lines
    ]  # fmt: skip
    total = tag("tr", tag("th", "peak", scope="row"), tag("td", gib(plan.peak_bytes)),
                tag("td", f"in the phase {plan.peak_phase}", class_="meaning"), class_="total")  # fmt: skip
    table = tag("table", tag("caption", "What takes the memory at the peak"), tag("tbody", *drawn, total))
    return tag("section", tag("h3", "What takes the memory"), bar(plan), table, class_="memory")


def over_one_step(plan: Plan, moments: Sequence[Moment], width: int = WIDTH) -> Markup:
    """The chart, `width` pixels wide, with its reader: a slider that says what is alive at each moment."""
    highest = max(range(len(moments)), key=lambda i: moments[i].allocated)
    now = says(moments[highest], plan.components.get("context", 0))
    reader = tag("input", type="range", min=0, max=len(moments) - 1, value=highest, aria_label="Moment of the step",
                 aria_valuetext=now)  # fmt: skip
    rows = [tag("tr", tag("th", name, scope="row"), tag("td", gib(size))) for name, size in plan.phases.items()]
    table = tag(
        "details", tag("summary", "The same as a table"),
        tag("table", tag("caption", "Highest allocation by phase, without CUDA context"), tag("tbody", *rows)),
    )  # fmt: skip
    note = (
        "From left to right in the order of allocations, not in seconds. Point at it, or move the slider, to see what "
        "is alive."
    )
    figure = tag("figure", chart(plan, moments, width=width), reader, tag("output", now), class_="over-one-step",
                 data_texts=texts(plan, moments), data_left=LEFT, data_width=width - LEFT - RIGHT)  # fmt: skip
    return joined(tag("h3", "Memory over one step"), tag("p", note, class_="note"), figure, table)


# -- what else there is ----------------------------------------------------------------------------------


def changes(chosen: Configuration, other: Configuration) -> list[tuple[str, Any, Any]]:
    """(setting, chosen value, other value) of every setting in which two configurations differ."""
    pairs = [(name, getattr(chosen, name), getattr(other, name)) for name in settings.CONFIGURES]
    return [pair for pair in pairs if pair[1] != pair[2]]


def _text(value: Any) -> str:
    """A setting's value as the form has it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return ",".join(value) if isinstance(value, tuple) else f"{value:g}" if isinstance(value, float) else str(value)


def pins(chosen: Configuration, other: Configuration) -> dict[str, str]:
    """The fields of the form that make `other` out of `chosen`."""
    found = {name: _text(value) for name, _, value in changes(chosen, other)}
    if found.pop("method", None) or found.pop("load_in_4bit", None):
        found.pop("load_in_4bit", None)
        found["way"] = "full" if other.method == "full" else "qlora" if other.load_in_4bit else "lora-16"
    return found


def _option(plan: Plan, option: Option, links: bool) -> Markup:
    different = [
        f"{settings.SETTINGS[name].flag} {_text(value)}" + (f" instead of {_text(chosen)}" if chosen else "")
        for name, chosen, value in changes(plan.config, option.config)
    ]
    name = tag("strong", option.change)
    if links and different:
        given = json.dumps(pins(plan.config, option.config))
        name = tag("button", option.change, type="button", class_="option", data_pins=given)
    about = f" (about {gib(option.peak_bytes)})"
    return tag("li", name, about, tag("span", "; ".join(different), class_="meaning") if different else None)


def _otherwise(plan: Plan, links: bool) -> Markup:
    parts = []
    if plan.needed is not None:
        parts += [tag("h3", "What would do it"), tag("ul", _option(plan, plan.needed, links))]
    if plan.gave_up:
        parts += [tag("h3", "What was given up for it"), tag("ul", *(tag("li", text) for text in plan.gave_up))]
    if plan.alternatives:
        options = (_option(plan, option, links) for option in plan.alternatives)
        parts += [tag("h3", "What else fits"), tag("ul", *options)]
    return tag("section", *parts, class_="otherwise") if parts else Markup()


def _command(plan: Plan) -> Markup:
    if not plan.fits:
        return Markup()
    command = tag("pre", tag("code", finetune_command(plan)), tabindex=0, aria_label="Command")
    copy = tag("button", "Copy", type="button", class_="copy", hidden=True)
    install = tag("p", "Install with ", tag("code", "pip install 'cruxy-triton[train]'"), ".", class_="note")
    return tag("section", tag("h3", "To run it"), tag("div", command, copy, class_="command"), install)


def _small(plan: Plan) -> Markup:
    lines = [f"PyTorch would reserve {gib(plan.reserved_bytes)} where nothing limits it."]
    if plan.trainable_parameters:
        lines.append(f"Trainable parameters: {plan.trainable_parameters:,}.")
    if plan.step_seconds:
        lines.append(
            f"One optimizer step takes at least {plan.step_seconds:.2f} s (roofline of the card; not measured)."
        )
    lines += [f"{note[0].upper()}{note[1:]}." for note in plan.notes if note]
    return tag("section", tag("h3", "Notes"), tag("ul", *(tag("li", line) for line in lines)), class_="notes")
