"""A comparison as tables for other programs and for papers: CSV, Markdown and LaTeX.

Everywhere a difference is the side minus the reference, its interval is 95 % over subjects, p is the Wilcoxon
signed-rank test over subjects adjusted by Holm (means over the sides, structures over structures and sides), and wins,
ties and losses are subjects. Of runs of studies findings stand where structures do, and p is that of the bootstrap over
subjects; AUROC and AP are of all subjects together, so that no subject wins. A dash, or an empty cell, is a number that
there is not.
"""

from __future__ import annotations

import csv
import io
import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields

from dagman.evaluation.statistics import COMPARABLE, SMALLER_IS_BETTER, Comparison

METRIC_NAMES = {"dice": "Dice", "hd95_mm": "HD95 (mm)", "nsd": "NSD", "asd_mm": "ASD (mm)"}
METRIC_NAMES |= {"volume_error_ml": "volume error (ml)"}
METRIC_NAMES |= {"auroc": "AUROC", "ap": "AP", "iou": "IoU", "iobb": "IoBB", "centre_inside": "centre inside"}
METRIC_NAMES |= {f"t_iou_{t}": f"T(IoU) {t}" for t in ("0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7")}
METRIC_NAMES |= {f"t_iobb_{t}": f"T(IoBB) {t}" for t in ("0.1", "0.25", "0.5", "0.75", "0.9")}
METRIC_NAMES |= {f"error_{axis}_mm": f"error along {axis} (mm)" for axis in "xyz"}
METRIC_NAMES |= {"pointing": "pointing", "pointing_near": "pointing, near", "peak_mm": "distance of the peak (mm)"}
METRIC_NAMES |= {"voxel_ap": "voxel AP"}
_COLUMNS = ("side", "reference", *(field.name for field in fields(Comparison)))
_HEADS = ("", "Reference", "Side", "Difference", "95 % interval", "p (Holm)", "Win/tie/loss", "Subjects")

Found = Mapping[str, Sequence[Comparison]]  # side -> the mean, then each structure or finding


def parts_of(metric: str) -> str:
    """What a metric is of."""
    return "structures" if metric in COMPARABLE else "findings"


def tested_by(metric: str) -> str:
    """What p is, for people."""
    return "Wilcoxon signed-rank" if metric in COMPARABLE else "bootstrap"


def as_csv(reference: str, by_metric: Mapping[str, Found]) -> str:
    """One row a side, structure and metric; all digits; an empty class is the mean over structures."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow("class" if name == "class_" else name for name in _COLUMNS)
    for found in by_metric.values():
        for side, comparisons in found.items():
            for one in comparisons:
                values = {"side": side, "reference": reference} | asdict(one)
                writer.writerow("" if _nothing(values[name]) else values[name] for name in _COLUMNS)
    return text.getvalue()


def as_markdown(reference: str, metric: str, by_metric: Mapping[str, Found], notes: Sequence[str] = ()) -> str:
    """A table a side for the metric that was asked for, and one of the means of every metric; `notes` come first."""
    lines = [f"# {METRIC_NAMES[metric]} against {_in_cell(reference)}", ""]
    for note in notes:
        lines += [_in_cell(note[:1].upper() + note[1:]) + ".", ""]
    for side, comparisons in by_metric[metric].items():
        lines += [f"## {_in_cell(side)}", "", *_markdown_table(_heads(metric), map(_cells, comparisons)), ""]
        noted: dict[str, list[str]] = {}
        for one in comparisons:
            noted.setdefault(one.note, []).append(_name(one))
        doubts = [f"* {_in_cell(', '.join(names))}: {_in_cell(note)}" for note, names in noted.items() if note]
        lines += [*doubts, ""] if doubts else []
    if len(by_metric) > 1:
        heads = ("Compared", "Metric", *_HEADS[1:])
        means = [
            (side, METRIC_NAMES[one], *_cells(comparisons[0])[1:])
            for one, found in by_metric.items()
            for side, comparisons in found.items()
        ]
        lines += [f"## Every metric, mean over {parts_of(metric)}", "", *_markdown_table(heads, means), ""]
        lines += ["p is not adjusted over metrics: choose one before looking.", ""]
    return "\n".join([*lines, _reading(by_metric[metric])]) + "\n"


def as_latex(reference: str, found: Found) -> str:
    r"""A plain `tabular` to \input into any document: no package is needed."""
    metric = next(iter(found.values()))[0].metric
    lines = [
        f"% {METRIC_NAMES[metric]}; a difference is the side minus the reference; {_reading(found)}",
        r"\begin{tabular}{lrrrrrrr}",
        r"\hline",
        " & ".join(map(latex_escaped, _heads(metric))) + r" \\",
    ]
    for side, comparisons in found.items():
        lines += [r"\hline", rf"\multicolumn{{8}}{{l}}{{{latex_escaped(f'{side} against {reference}')}}} \\", r"\hline"]
        for one in comparisons:
            name, *numbers = map(latex_escaped, _cells(one))
            lines.append(
                " & ".join([name, *(cell.replace("-", "$-$") if cell != "--" else cell for cell in numbers)]) + r" \\"
            )
    return "\n".join([*lines, r"\hline", r"\end{tabular}"]) + "\n"


def latex_escaped(text: str) -> str:
    """Text that LaTeX prints as it stands, in one line: its own signs escaped, letters that a bare article does not
    have by their number."""
    return "".join(_LATEX.get(sign) or (sign if _printed(sign) else f"[U+{ord(sign):04X}]") for sign in text)


def _printed(sign: str) -> bool:
    """Whether the encoding of a bare article has it: ASCII, and Latin letters whose accent it knows."""
    letter, *accents = unicodedata.normalize("NFD", sign)
    known = all(
        accent in "\u0300\u0301\u0302\u0303\u0304\u0306\u0307\u0308\u030a\u030b\u030c\u0327" for accent in accents
    )
    return (letter.isascii() and known) or sign in "\u00df\u00e6\u00c6\u00f8\u00d8\u0153\u0152\u0142\u0141\u00a7"


_LATEX = {sign: "\\" + sign for sign in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",  # \\textquotedbl needs another font encoding than a bare article has
    "\u2212": "$-$",
    "\u2013": "--",
    **{chr(code): " " for code in (*range(0x20), *range(0x7F, 0xA1))},
}


def signed(value: float, digits: int = 3) -> str:
    """With its sign, so that a gain and a loss are told apart at a glance; a dash for NaN."""
    return "\u2013" if math.isnan(value) else f"{value:+.{digits}f}"


def _heads(metric: str) -> tuple[str, ...]:
    return parts_of(metric).capitalize().removesuffix("s"), *_HEADS[1:]


def _cells(one: Comparison) -> tuple[str, ...]:
    return (
        _name(one),
        _number(one.mean_a),
        _number(one.mean_b),
        signed(one.difference),
        "\u2013" if math.isnan(one.low) else f"{signed(one.low)} to {signed(one.high)}",
        "\u2013" if math.isnan(one.p_holm) else f"{one.p_holm:.3f}" if one.p_holm >= 0.001 else "<0.001",
        "\u2013" if one.wins is None else f"{one.wins}/{one.ties}/{one.losses}",
        str(one.subjects),
    )


def _name(one: Comparison) -> str:
    return f"all {parts_of(one.metric)}" if one.class_ is None else one.name


def _number(value: float) -> str:
    return "\u2013" if math.isnan(value) else f"{value:.3f}"


def _reading(found: Found) -> str:
    metric = next(iter(found.values()))[0].metric
    better = "smaller" if metric in SMALLER_IS_BETTER else "larger"
    return (
        f"{better} is better; p: {tested_by(metric)} over subjects, Holm over {parts_of(metric)} and sides; "
        "intervals: 95 %."
    )


def _markdown_table(heads: Sequence[str], rows) -> list[str]:
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1), *rows]
    return ["| " + " | ".join(map(_in_cell, line)) + " |" for line in lines]


def _in_cell(text: str) -> str:
    """One line of text that neither ends a cell nor is taken for markup."""
    flat = " ".join(text.split())
    return "".join("\\" + sign if sign in "\\|`*_<>[]" else sign for sign in flat)


def _nothing(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
