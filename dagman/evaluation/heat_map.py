"""A heat map as inline SVG: a matrix of shares from 0 to 1, each cell with its number."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from spade3d.training.page import Html, number, tag

CELL = 38  # pixels
DARKEST = 0.65  # opacity of 1: text stays readable on it, by day and by night


def heat_map(
    matrix: Float[np.ndarray, "row column"],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    sides: tuple[str, str],
) -> Html:
    """Rows from top to bottom, columns from left to right; `sides` says whose the rows and whose the columns are. What
    is not finite is a dash, what is below 0 has no colour."""
    left, top = 16 + 7 * max(map(len, rows)), 12 + 7 * max(map(len, columns))
    width, height = left + CELL * len(columns) + 4, top + CELL * len(rows) + 22
    marks = [
        tag("text", name, x=left - 8, y=top + CELL * (n + 0.5) + 4, text_anchor="end") for n, name in enumerate(rows)
    ]
    for n, name in enumerate(columns):
        x = left + CELL * (n + 0.5) + 4
        marks.append(tag("text", name, x=x, y=top - 8, transform=f"rotate(-90 {x} {top - 8})"))
    for (i, j), value in np.ndenumerate(matrix):
        x, y = left + CELL * j, top + CELL * i
        share = min(max(float(value), 0.0), 1.0) if math.isfinite(value) else 0.0
        said = tag("title", f"{sides[0]} {rows[i]}, {sides[1]} {columns[j]}: {number(float(value), 3)}")
        style = f"fill:var(--s0);fill-opacity:{DARKEST * share:.3f}"
        marks.append(tag("rect", said, x=x, y=y, width=CELL - 1, height=CELL - 1, style=style))
        middle = {"x": x + CELL / 2, "y": y + CELL / 2 + 4, "text_anchor": "middle"}
        marks.append(tag("text", number(float(value), 2), class_="name", **middle))
    marks.append(tag("text", f"down: {sides[0]}, across: {sides[1]}", x=left, y=height - 4))
    svg = tag("svg", *marks, viewBox=f"0 0 {width} {height}", role="img", aria_label=title)
    style = f"max-width:{1.15 * width:.0f}px"
    return tag("figure", tag("figcaption", title), svg, class_="chart wide", style=style)
