"""Charts as inline SVG: lines over steps, and estimates with their intervals.

Colours are classes of the page's style sheet, so a chart follows light, dark and paper with the text around it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from spade3d.training.page import Html, number, tag

SMALL = {"width": 300, "height": 165}  # three of these stand side by side where one whole chart does
_PIXELS_PER_POINT = 3  # of a line: closer ones are not seen apart, and a long run has a million steps
_COLOURS = 6


@dataclass(frozen=True)
class Series:
    """One line: its name, and y over x; points where y is not finite interrupt it."""

    name: str
    x: np.ndarray
    y: np.ndarray


@dataclass(frozen=True)
class Estimate:
    """One row of an interval chart: the observations, their mean and the interval (NaN where there is none); `shown`
    is False where the row shows no effect."""

    name: str
    observations: tuple[float, ...]
    mean: float
    low: float
    high: float
    shown: bool = True


def ticks(low: float, high: float, about: int = 5) -> np.ndarray:
    """Round numbers (1, 2 or 5 times a power of ten) that span low..high: the first is <= low, the last >= high."""
    if not high > low:
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * min((1, 2, 5, 10), key=lambda m: abs(math.log(rough / (m * power))))
    return np.arange(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1) * step


def summarise(series: Series, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """x, mean, least and greatest y (point,) of groups of neighbouring points, all of one size so that the noise looks
    alike from end to end, and at most `most` of them; NaN in a group without a finite y."""
    x, y = np.asarray(series.x, np.float64), np.asarray(series.y, np.float64)
    size = max(1, math.ceil(len(x) / most))
    groups = [slice(start, start + size) for start in range(0, len(x), size)]
    rows = [(x[g].mean(), *_spread(y[g][np.isfinite(y[g])])) for g in groups]
    columns = np.array(rows, np.float64).reshape(-1, 4).T
    return columns[0], columns[1], columns[2], columns[3]


def _spread(values: np.ndarray) -> tuple[float, float, float]:
    return (values.mean(), values.min(), values.max()) if len(values) else (math.nan, math.nan, math.nan)


def line_chart(
    series: Sequence[Series], title: str, *, x_title: str = "step", width: int = 900, height: int = 250
) -> Html:
    """Lines over steps. Where several steps share a point, the line is their mean and the shade their range."""
    drawn = [(s.name, *summarise(s, width // _PIXELS_PER_POINT)) for s in series]
    xs = np.concatenate([np.asarray(s.x, np.float64) for s in series]) if series else np.empty(0)
    ys = np.concatenate([np.concatenate(d[3:]) for d in drawn]) if drawn else np.empty(0)
    ys = ys[np.isfinite(ys)]
    if not len(ys):
        return tag("figure", tag("figcaption", title), tag("p", "Nothing was logged.", class_="lead"), class_="chart")
    x_ticks, y_ticks = ticks(xs.min(), xs.max(), width // 90), ticks(ys.min(), ys.max(), max(height // 55, 2))
    labels = _labels(y_ticks)
    left, right, top, bottom = 14 + 7 * max(map(len, labels)), width - 16, 8, height - 36
    span = (float(xs.min()), float(xs.max())) if xs.max() > xs.min() else (x_ticks[0], x_ticks[-1])

    def across(x: np.ndarray | float) -> np.ndarray | float:
        return left + (x - span[0]) / (span[1] - span[0]) * (right - left)

    def up(y: np.ndarray | float) -> np.ndarray | float:
        return bottom - (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (bottom - top)

    marks = []
    for y, label in zip(y_ticks, labels):
        marks.append(tag("line", x1=left, x2=right, y1=_at(up(y)), y2=_at(up(y)), class_="grid"))
        marks.append(tag("text", label, x=left - 8, y=_at(up(y) + 4), text_anchor="end"))
    for x, label in zip(x_ticks, _labels(x_ticks)):
        if span[0] <= x <= span[1]:
            marks.append(tag("text", label, x=_at(across(x)), y=bottom + 18, text_anchor="middle"))
    marks.append(tag("text", x_title, x=right, y=height - 2, text_anchor="end"))
    for colour, (name, x, mean, low, high) in enumerate(drawn):
        paint = f"var(--s{colour % _COLOURS})"
        for run in _runs(np.isfinite(mean)):
            px, py = across(x[run]), up(mean[run])
            if (high[run] > low[run]).any():
                edge = _points(np.r_[px, px[::-1]], np.r_[up(high[run]), up(low[run])[::-1]])
                marks.append(tag("polygon", points=edge, class_="range", style=f"fill:{paint}"))
            if len(px) == 1:
                marks.append(tag("circle", cx=_at(px[0]), cy=_at(py[0]), r=2.5, style=f"fill:{paint}"))
            else:
                marks.append(
                    tag("polyline", tag("title", name), points=_points(px, py), class_="line", style=f"stroke:{paint}")
                )
    svg = tag("svg", *marks, viewBox=f"0 0 {width} {height}", role="img", aria_label=title)
    names = [s.name for s in series] if len(series) > 1 else []
    return tag(
        "figure",
        tag("figcaption", title),
        key([(n, f"var(--s{i % _COLOURS})") for i, n in enumerate(names)]),
        svg,
        class_="chart wide" if width > SMALL["width"] else "chart",
    )


def interval_chart(
    rows: Sequence[Estimate],
    title: str,
    *,
    axis: str = "",
    sides: tuple[str, str] | None = None,
    domain: tuple[float, float] | None = None,
) -> Html:
    """One row an estimate: every observation a pale dot, the mean a dot, the interval a bar, the numbers at the right.

    For differences, `sides` says what lies below and above zero, which a line marks. A row that shows no effect is
    hollow and grey.
    """
    values = [v for r in rows for v in (*r.observations, r.mean, r.low, r.high) if math.isfinite(v)]
    if not values:
        return tag("figure", tag("figcaption", title), tag("p", "Nothing to show.", class_="lead"), class_="chart")
    low, high = domain or (min(values), max(values))
    if sides:  # symmetric: a gain and a loss of the same size look the same
        high = max(abs(low), abs(high))
        low = -high
    scale = ticks(low, high, 6)
    written = [f"{number(r.mean, 3)}  [{number(r.low, 3)}, {number(r.high, 3)}]" for r in rows]
    width, row_height, top = 900, 30, 10
    left = 24 + 7.2 * min(max(len(r.name) for r in rows), 26)
    right = width - 12 - 7.2 * max(map(len, written))
    bottom = top + row_height * len(rows)

    def across(value: float) -> float:
        return left + (value - scale[0]) / (scale[-1] - scale[0]) * (right - left)

    marks = []
    for value, label in zip(scale, _labels(scale)):
        marked = "zero" if sides and abs(value) < 1e-12 else "grid"
        marks.append(tag("line", x1=_at(across(value)), x2=_at(across(value)), y1=top, y2=bottom, class_=marked))
        marks.append(tag("text", label, x=_at(across(value)), y=bottom + 17, text_anchor="middle"))
    if sides:
        marks.append(tag("text", f"← {sides[0]}", x=_at(across(0.0) - 10), y=bottom + 36, text_anchor="end"))
        marks.append(tag("text", f"{sides[1]} →", x=_at(across(0.0) + 10), y=bottom + 36, text_anchor="start"))
    else:
        marks.append(tag("text", axis, x=_at((left + right) / 2), y=bottom + 36, text_anchor="middle"))
    for n, (row, text) in enumerate(zip(rows, written)):
        y = top + row_height * (n + 0.5)
        name = row.name if len(row.name) <= 26 else row.name[:25] + "…"
        parts = [tag("title", row.name), tag("text", name, x=0, y=_at(y + 4), class_="name")]
        parts += [
            tag("circle", cx=_at(across(v)), cy=_at(y), r=3, class_="dot") for v in row.observations if math.isfinite(v)
        ]
        if math.isfinite(row.low) and math.isfinite(row.high):
            parts.append(
                tag("line", x1=_at(across(row.low)), x2=_at(across(row.high)), y1=_at(y), y2=_at(y), class_="interval")
            )
        if math.isfinite(row.mean):
            parts.append(tag("circle", cx=_at(across(row.mean)), cy=_at(y), r=5, class_="mean"))
        parts.append(tag("text", text, x=width, y=_at(y + 4), text_anchor="end"))
        marks.append(tag("g", *parts, class_=None if row.shown else "unclear"))
    svg = tag("svg", *marks, viewBox=f"0 0 {width} {bottom + 42}", role="img", aria_label=title)
    return tag("figure", tag("figcaption", title), svg, class_="chart wide")


def key(names: Sequence[tuple[str, str]]) -> Html | None:
    """Which colour is what: (name, CSS colour)."""
    if not names:
        return None
    return tag("div", *(tag("span", name, style=f"--colour:{colour}") for name, colour in names), class_="key")


def _at(value: float) -> str:
    return f"{value:.1f}"


def _points(x: np.ndarray, y: np.ndarray) -> str:
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y))


def _labels(values: np.ndarray) -> list[str]:
    """Tick labels with just as many digits as tell them apart."""
    step, size = values[1] - values[0], np.abs(values).max()
    values = [0.0 if abs(v) < step / 2 else float(v) for v in values]
    if size >= 1e6 or size < 1e-3:
        return [number(float(f"{v:.3g}")) for v in values]
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return [number(v, digits) for v in values]


def _runs(finite: np.ndarray) -> list[slice]:
    """The stretches of neighbouring True."""
    edges = np.flatnonzero(np.diff(np.r_[False, finite, False].astype(np.int8)))
    return [slice(a, b) for a, b in zip(edges[::2], edges[1::2])]
