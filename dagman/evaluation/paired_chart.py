"""The paired plot: each subject a line from what the reference reached to what a side reached, as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence

from spade3d.training.charts import key, ticks
from spade3d.training.page import Html, counted, number, tag

_BETTER, _WORSE, _EQUAL = "var(--s0)", "var(--s1)", "var(--soft)"


def paired_chart(
    pairs: Sequence[tuple[str, float, float]],
    title: str,
    sides: tuple[str, str],
    *,
    smaller_is_better: bool = False,
    height: int = 300,
) -> Html:
    """`pairs`: (subject, value of the reference, value of the side); a pair in which one is NaN is left out, and the
    caption counts it. Lines are coloured by which side is better; the axis starts where the values do.
    """
    drawn = [pair for pair in pairs if math.isfinite(pair[1]) and math.isfinite(pair[2])]
    if not drawn:
        return tag("figure", tag("figcaption", title), tag("p", "Nothing to show.", class_="lead"), class_="chart")
    values = [value for _, *both in drawn for value in both]
    scale = ticks(min(values), max(values), height // 55)
    width, top, bottom, left, right = 900, 26, height - 10, 270, 630

    def up(value: float) -> float:
        return bottom - (value - scale[0]) / (scale[-1] - scale[0]) * (bottom - top)

    marks = []
    for value in scale:
        marks.append(tag("line", x1=left, x2=right, y1=f"{up(value):.1f}", y2=f"{up(value):.1f}", class_="grid"))
        marks.append(tag("text", number(float(value), 3), x=left - 10, y=f"{up(value) + 4:.1f}", text_anchor="end"))
    for x, name, anchor in ((left + 20, sides[0], "end"), (right - 20, sides[1], "start")):
        shown = name if len(name) <= 40 else name[:39] + "\u2026"
        marks.append(tag("text", shown, tag("title", name), x=x, y=14, text_anchor=anchor, class_="name"))
    for subject, before, after in drawn:
        gain = before - after if smaller_is_better else after - before
        paint = _BETTER if gain > 1e-9 else _WORSE if gain < -1e-9 else _EQUAL
        said = f"{subject}: {number(before, 3)} to {number(after, 3)}"
        ends = {"x1": left, "x2": right, "y1": f"{up(before):.1f}", "y2": f"{up(after):.1f}"}
        style = f"stroke:{paint};stroke-width:1.5;opacity:.6"
        marks.append(tag("line", tag("title", said), **ends, class_="pair", style=style))
        for x, y in ((left, before), (right, after)):
            marks.append(tag("circle", cx=x, cy=f"{up(y):.1f}", r=2.5, style=f"fill:{paint}"))
    left_out = len(pairs) - len(drawn)
    caption = title + (f" ({counted(left_out, 'subject')} left out: no value on one side)" if left_out else "")
    return tag(
        "figure",
        tag("figcaption", caption),
        key([(f"{sides[1]} better", _BETTER), (f"{sides[0]} better", _WORSE), ("equal", _EQUAL)]),
        tag("svg", *marks, viewBox=f"0 0 {width} {height}", role="img", aria_label=title),
        class_="chart wide",
    )
