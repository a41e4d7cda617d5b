"""A plan as a picture: the bar of what takes the memory, and memory over one step as an area chart, both SVG.

Colours and fonts are classes of `picture.css`, so that a page themes them; `standalone` puts that file inside.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import resources
from itertools import groupby

from cruxy_triton.planner.card import GiB, MiB
from cruxy_triton.planner.markup import Markup, joined, tag
from cruxy_triton.planner.plan import Plan
from cruxy_triton.planner.render import ORDER
from cruxy_triton.planner.timeline import Moment

WIDTH, HEIGHT = 720, 300
LEFT, RIGHT, TOP, BOTTOM = 40, 1, 18, 22  # margins of the plot, for the scale and the names of the regions
STACK = ("context", *(name for name in ORDER if name not in ("context", "allocator")))  # lowest first


def kind(component: str) -> str:
    """The class that colours a component."""
    return "c-" + (component if component in (*STACK, "allocator") else "other").replace(" ", "-")


def stylesheet() -> str:
    return resources.files("cruxy_triton.planner").joinpath("picture.css").read_text(encoding="utf-8")


def gib(nbytes: float) -> str:
    return f"{nbytes / GiB:.2f} GiB"


def _svg(width: float, height: float, *children: Markup | None, class_: str, label: str) -> Markup:
    return tag(
        "svg", *children, xmlns="http://www.w3.org/2000/svg", class_=class_, viewBox=f"0 0 {width} {height}",
        role="img", aria_label=label,
    )  # fmt: skip


def bar(plan: Plan) -> Markup:
    """The process at its peak by component, against what is usable."""
    whole = max(plan.usable_bytes, plan.peak_bytes)
    parts, x = [], 0.0
    for name in (*STACK, "allocator"):
        if (size := plan.components.get(name, 0)) >= MiB / 2:
            width = WIDTH * size / whole
            title = tag("title", f"{name}: {gib(size)}")
            parts.append(tag("rect", title, class_=kind(name), x=f"{x:.1f}", y=6, width=f"{width:.1f}", height=28))
            x += width
    at = WIDTH * plan.usable_bytes / whole
    label = f"{gib(plan.peak_bytes)} at the peak of {gib(plan.usable_bytes)} usable"
    line = tag("line", class_="usable", x1=f"{min(at, WIDTH - 1):.1f}", x2=f"{min(at, WIDTH - 1):.1f}", y1=0, y2=40)
    frame = tag("rect", class_="room", x=0, y=6, width=f"{at:.1f}", height=28)
    return _svg(WIDTH, 40, frame, *parts, line, class_="bar", label=label)


# -- memory over one step ------------------------------------------------------------------------------


def says(moment: Moment, context: int) -> str:
    """What is alive, in words: the phase, the sum, and the components from the largest."""
    phase, _, part = moment.phase.partition(":")
    layer = part.removeprefix("layer")
    where = phase + (f", layer {layer}" if layer.isdigit() else f", {part}" if part else "")
    parts = sorted(_with_context(moment, context).items(), key=lambda item: -item[1])
    sizes = ", ".join(f"{name} {size / MiB:,.0f}" for name, size in parts if size >= MiB / 2)
    return f"{where}: {gib(moment.allocated + context)}; in MiB {sizes}"


def _with_context(moment: Moment, context: int) -> Mapping[str, int]:
    return {**moment.parts, **({"context": context} if context else {})}


def chart(
    plan: Plan, moments: Sequence[Moment], measured: Mapping[str, int] | None = None, width: int = WIDTH
) -> Markup:
    """The area chart. Context included, allocator's rounding not: the plan's peak is the dashed line.

    measured: further lines across, {what: bytes of the process}. width: of the picture, in the text's own pixels.
    """
    context = plan.components.get("context", 0)
    lines = {"usable": plan.usable_bytes, "peak": plan.peak_bytes, **(measured or {})}
    top = 1.06 * max(max(lines.values()), max(x.allocated for x in moments) + context)
    # A limit that is far away would leave a flat picture: it is then named at the upper edge.
    needed = 1.06 * max(plan.peak_bytes, *(measured or {"": 0}).values())
    if top > 4 * needed:
        top = 2 * needed

    def y(nbytes: float) -> float:
        return round(TOP + (HEIGHT - TOP - BOTTOM) * (1 - min(1.0, nbytes / top)), 1)

    step = (width - LEFT - RIGHT) / len(moments)
    stacks = [_with_context(moment, context) for moment in moments]
    below = [0] * len(moments)
    areas = []
    for name in STACK:
        above = [low + stack.get(name, 0) for low, stack in zip(below, stacks, strict=True)]
        if above != below:
            areas.append(tag("path", class_=kind(name), d=_area([y(n) for n in above], [y(n) for n in below], step)))
        below = above
    highest = max(range(len(moments)), key=lambda i: moments[i].allocated)
    cursor = tag("line", class_="cursor", x1=0, x2=0, y1=TOP, y2=HEIGHT - BOTTOM,
                 transform=f"translate({LEFT + (highest + 0.5) * step:.1f} 0)")  # fmt: skip
    label = (
        f"Memory over one training step, {len(moments)} moments from loading to the optimizer. Highest in "
        f"{says(moments[highest], context)}."
    )
    drawn = (_scale(top, y, width), *areas, _regions(moments, step), _across(lines, top, y, width), cursor)
    return _svg(width, HEIGHT, *drawn, class_="chart", label=label)


def _area(above: Sequence[float], below: Sequence[float], step: float) -> str:
    """A band as a path of level pieces, there above and back below."""

    def level(values: Iterable[float], sign: int, x: float) -> str:
        path = ""
        for value, run in groupby(values):
            x += sign * step * len(list(run))
            path += f"V{value:g}H{x:.1f}"
        return path

    end = LEFT + step * len(above)
    return f"M{LEFT} {below[0]:g}{level(above, 1, LEFT)}{level(reversed(below), -1, end)}Z"


def _scale(top: float, y: Callable[[float], float], width: int) -> Markup:
    """Lines at round amounts."""
    unit = next((n for n in (0.1, 0.25, 0.5) if top / GiB / n <= 6), 1)
    while top / GiB / unit > 6:
        unit *= 2
    drawn = []
    for index in range(int(top / GiB / unit) + 1):
        at = y(index * unit * GiB)
        drawn.append(tag("line", class_="grid", x1=LEFT, x2=width - RIGHT, y1=at, y2=at))
        drawn.append(tag("text", f"{index * unit:g}", x=LEFT - 6, y=at + 4, text_anchor="end"))
    return joined(*drawn, tag("text", "GiB", x=LEFT - 6, y=TOP - 6, text_anchor="end"))


def _regions(moments: Sequence[Moment], step: float) -> Markup:
    """Where each part of the step begins, and its name."""
    drawn, x = [], float(LEFT)
    for name, group in groupby(moments, key=lambda moment: moment.region):
        width = step * len(list(group))
        if x > LEFT:
            drawn.append(tag("line", class_="part", x1=f"{x:.1f}", x2=f"{x:.1f}", y1=TOP, y2=HEIGHT - BOTTOM + 5))
        short = name if width > 6.5 * len(name) else f"{name[:3]}." if width > 26 else ""
        middle = f"{x + width / 2:.1f}"
        drawn.append(tag("text", tag("title", name), short, x=middle, y=HEIGHT - 6, text_anchor="middle"))
        x += width
    return joined(*drawn)


def _across(lines: Mapping[str, int], top: float, y: Callable[[float], float], width: int) -> Markup:
    """A line across for each amount, its name above it; those that would lie on another's name go below."""
    drawn, taken = [], []
    for name, nbytes in sorted(lines.items(), key=lambda item: -item[1]):
        beyond = nbytes > top
        at, style = y(nbytes), name if name in ("usable", "peak") else "measured"
        under = any(abs(at - other) < 13 for other in taken)
        text = f"{name} {gib(nbytes)}" + (" (above this scale)" if beyond else "")
        if not beyond:
            drawn.append(tag("line", class_=style, x1=LEFT, x2=width - RIGHT, y1=at, y2=at))
        place = at + 13 if under or at < TOP + 4 else at - 4
        taken += [at, *([place] if under else [])]
        drawn.append(tag("text", text, class_=f"line {style}", x=LEFT + 6, y=place))
    return joined(*drawn)


def texts(plan: Plan, moments: Sequence[Moment]) -> str:
    """What the chart says at each of its moments, as JSON for the reader that follows the pointer."""
    return json.dumps([says(moment, plan.components.get("context", 0)) for moment in moments])


def standalone(plan: Plan, moments: Sequence[Moment], measured: Mapping[str, int] | None = None) -> str:
    """The chart as a file of its own, with its colours and what they mean inside."""
    svg = chart(plan, moments, measured)
    named = {name for moment in moments for name, size in moment.parts.items() if size >= MiB / 2}
    drawn, x, y = [], LEFT, HEIGHT + 16
    for name in STACK:
        if name in named or (name == "context" and plan.components.get(name)):
            width = 26 + 7 * len(name)
            if x + width > WIDTH:
                x, y = LEFT, y + 18
            drawn.append(tag("rect", class_=kind(name), x=x, y=y - 10, width=11, height=11))
            drawn.append(tag("text", name, x=x + 15, y=y))
            x += width
    style = tag("style", Markup(stylesheet() + ".cursor { display: none; }"))
    head, _, rest = svg.removesuffix("</svg>").partition(">")
    head = head.replace(f'viewBox="0 0 {WIDTH} {HEIGHT}"', f'viewBox="0 0 {WIDTH} {y + 8}"')
    return f"{head}>{style}{rest}{joined(*drawn)}</svg>\n"
