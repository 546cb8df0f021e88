"""The HTML page that every report is: one file, every string escaped, no script and no request.

Markup is built by `tag`, never by pasting strings, so that what comes from a file name or a header can only ever be
text. The page works from `file://` and forbids itself, by its content security policy, to load anything.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

from spade3d.training.page_style import STYLE
from spade3d.whole_file import whole_file

_RAISED = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")
_VOID = frozenset({"meta", "img", "br", "col"})
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


class Html(str):
    """Markup that `tag` has made. Every other string is text, and is escaped where it enters markup."""


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """An element: children that are not Html are escaped, as are attributes (`class_` is class, `stroke_width` is
    stroke-width). A child or an attribute that is None is left out."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    opening = f"<{name}{written}>"
    return Html(opening if name in _VOID else f"{opening}{fragment(children)}</{name}>")


def fragment(children: Iterable[object]) -> Html:
    """Children one after the other, escaped unless they are Html."""
    return Html("".join(c if isinstance(c, Html) else escape(str(c)) for c in children if c is not None))


def number(value: object, digits: int | None = None) -> str:
    """A number as people read it: a true minus, thin spaces between thousands, a dash for what is undefined. `digits`
    after the point, or four that matter; what is no number is written as it is."""
    if value is None or (isinstance(value, float | np.floating) and not math.isfinite(value)):
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        return str(value)
    if isinstance(value, int | np.integer):
        written = f"{value:,}"
    elif digits is None:
        written = f"{value:.4g}"
    else:
        written = f"{round(float(value), digits) + 0.0:,.{digits}f}"  # + 0.0: no minus before a zero
    mantissa, _, exponent = written.partition("e")
    mantissa = mantissa.replace(",", "\u202f").replace("-", "−")
    return f"{mantissa} · 10{str(int(exponent)).translate(_RAISED)}" if exponent else mantissa


def counted(count: int, one: str, many: str = "") -> str:
    """1 case, 2 cases."""
    return f"{number(count)} {one if count == 1 else many or one + 's'}"


@dataclass(frozen=True)
class Column:
    """A column of a table: its heading, the digits its numbers show, and whether a bar from 0 to 1 lies under them."""

    heading: str
    digits: int | None = None
    bar: bool = False


def table(columns: Sequence[Column], rows: Iterable[Sequence[object]], caption: str = "") -> Html:
    """A table whose numbers are set to the right; it scrolls by itself when it is wider than the page."""
    rows = [list(row) for row in rows]
    numeric = [
        any(isinstance(row[c], int | float | np.number) for row in rows)
        and not any(isinstance(row[c], Html) for row in rows)
        for c in range(len(columns))
    ]

    def cell(column: Column, value: object, right: bool) -> Html:
        if not right or isinstance(value, str):
            return tag("td", value, class_="right" if right else None)
        bar = column.bar and value is not None and math.isfinite(value)
        style = f"--share:{min(max(float(value), 0.0), 1.0):.4f}" if bar else None
        return tag("td", number(value, column.digits), class_="right bar" if bar else "right", style=style)

    head = tag(
        "tr", *(tag("th", c.heading, scope="col", class_="right" if r else None) for c, r in zip(columns, numeric))
    )
    body = [tag("tr", *(cell(c, v, r) for c, v, r in zip(columns, row, numeric, strict=True))) for row in rows]
    title = tag("caption", caption) if caption else None
    return tag("div", tag("table", title, tag("thead", head), tag("tbody", *body)), class_="scroll", tabindex="0")


def facts(pairs: Mapping[str, object] | Iterable[tuple[str, object]]) -> Html:
    """Names and what they are, as a list of definitions; values are strings, numbers or Html."""
    pairs = pairs.items() if isinstance(pairs, Mapping) else pairs
    shown = (tag("div", tag("dt", k), tag("dd", v if isinstance(v, str) else number(v))) for k, v in pairs)
    return tag("dl", *shown, class_="facts")


def figures(*items: tuple[str, object, str]) -> Html:
    """The few numbers of a run, large: (what it is, the number, what to know about it)."""
    shown = (
        tag("div", tag("span", what, class_="what"), tag("b", value), tag("small", note), class_="figure")
        for what, value, note in items
    )
    return tag("div", *shown, class_="figures")


def callout(kind: str, *children: object) -> Html:
    """A statement that must not be missed: kind is "good", "warning" or "note"; the word stands there too, so that
    colour is never the only sign."""
    word = {"good": "Checked", "warning": "Warning", "note": "Note"}[kind]
    return tag("p", tag("strong", word, " "), *children, class_=f"callout {kind}", role="note")


def folded(summary: str, *children: object) -> Html:
    """What only some readers want: folded on screen, opened by a click."""
    return tag("details", tag("summary", summary), *children)


@dataclass(frozen=True)
class Section:
    """A titled part of the page, with a sentence that says how to read it."""

    title: str
    content: tuple[Html, ...]
    lead: str = ""

    @property
    def anchor(self) -> str:
        """The fragment by which the section is linked."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")

    def html(self) -> Html:
        lead = tag("p", self.lead, class_="lead") if self.lead else None
        return tag("section", tag("h2", self.title), lead, *self.content, id=self.anchor)


def page(kind: str, title: str, verdict: Sequence[Html], sections: Sequence[Section], footer: str = "") -> str:
    """The whole page. `kind` is the small line above the title, `verdict` what a reader in a hurry takes away."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{title} – {kind}"),
        tag("style", Html(STYLE)),
    )
    header = tag("header", tag("p", kind, class_="kind"), tag("h1", title), *verdict)
    contents = tag("nav", *(tag("a", s.title, href=f"#{s.anchor}") for s in sections), aria_label="Contents")
    main = tag("main", header, contents, *(s.html() for s in sections))
    body = tag("body", main, tag("footer", footer) if footer else None)
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def write_page(path: Path, html: str) -> Path:
    """Write a page whole or not at all. Names that are not valid Unicode are written as their escapes."""
    with whole_file(path) as file:
        file.write(html.encode("utf-8", "backslashreplace"))
    return path
