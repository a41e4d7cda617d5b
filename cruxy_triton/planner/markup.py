"""HTML and SVG from trees of elements: every text and every attribute is escaped, in this one place."""

from __future__ import annotations

from html import escape
from typing import Any

VOID = ("br", "input", "link", "meta")


class Markup(str):
    """Text that is markup already. Nobody makes one from what a user gave but `tag`, which escapes it."""


def tag(name: str, /, *children: Any, **attributes: Any) -> Markup:
    """The element `name`. An attribute's name loses a last underscore, others become hyphens; None and False leave it
    out, True gives it no value. Children that are no Markup are text; None is nothing."""
    given = ""
    for key, value in attributes.items():
        if value is not None and value is not False:
            given += f" {key.rstrip('_').replace('_', '-')}"
            given += "" if value is True else f'="{escape(str(value))}"'
    return Markup(f"<{name}{given}>" + ("" if name in VOID else f"{joined(*children)}</{name}>"))


def joined(*children: Any) -> Markup:
    """Several children without an element around them."""
    texts = (child if isinstance(child, Markup) else escape(str(child)) for child in children if child is not None)
    return Markup("".join(texts))
