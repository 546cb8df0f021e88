"""The report of a pretraining run, and the parts that the report of every run shares: curves, settings, versions."""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from spade3d.faults import DataFault
from spade3d.training.charts import SMALL, Series, line_chart
from spade3d.training.crop_pictures import crop_pictures
from spade3d.training.health import FEWEST_ROWS, collapse
from spade3d.training.journal import read_log
from spade3d.training.page import (
    Column,
    Html,
    Section,
    callout,
    counted,
    facts,
    figures,
    folded,
    number,
    page,
    table,
    tag,
    write_page,
)

_FOOTER = "One file: nothing is loaded, nothing is sent. Written by spade3d. Not for diagnosis."
_STEERED = ("focused", "matched_zoom", "shuffled")  # views that read a saliency (recipes/pair_crops.py)
# The settings a reader asks for first, by the last part of their key; the rest is folded below them.
_FIRST = {
    "recipe": "Recipe",
    "shape": "Crop (voxels)",
    "spacing": "Spacing (mm)",
    "feature_size": "Width (feature size)",
    "steps": "Steps",
    "lr": "Learning rate",
    "seed": "Seed",
    "device": "Device",
    "precision": "Precision",
}
_SIGNS = {
    "rank": "Over how many directions the embeddings spread. It should stay well above a few; near 1 is collapse.",
    "spread": "How far the embeddings lie apart: about 1 fills the sphere, 0 is one single point.",
    "alignment": "Mean squared distance of matching crops on the unit sphere: 0 is the same vector, 2 is unrelated. "
    "Lower is better, unless uniformity rises with it.",
    "uniformity": "How evenly the embeddings cover the sphere: 0 is one point, about −4 is even. Lower is better.",
}
# How a task that measures its attention names it in the notes of a step: "stage3.entropy".
_OF_STAGE = re.compile(r"stage(\d+)\.(\w+)")
_LOOKS = {
    "entropy": ("Entropy", "1 looks at every cell of its window alike, 0 at a single one."),
    "entropy_spread": (
        "Spread of entropy",
        "Standard deviation over the heads of a stage: 0 where all look as widely.",
    ),
    "distance_mm": ("Distance (mm)", "How far from itself a cell looks, on average."),
    "divergence": (
        "Divergence",
        "Jensen-Shannon between the heads of a block: 0 where they look alike, 1 where they share no cell.",
    ),
}
_JUDGED = frozenset({"rank", "spread", "rows", "dims"})  # the signs that `collapse` asks for


@dataclass(frozen=True, eq=False)
class RunFolder:
    """What every run leaves: its resolved configuration, its log, and where it comes from.

    `log` has a row for each step, `validations` a row for each validation; what is null in the file is NaN.
    """

    path: Path
    config: Mapping
    config_text: str
    log: Sequence[Mapping]
    validations: Sequence[Mapping]
    provenance: Mapping


def open_run(path: Path) -> RunFolder:
    """Read config.yaml, log.jsonl and provenance.json; DataFault when one is missing or damaged."""
    text = _read(path, "config.yaml")
    try:
        config = yaml.safe_load(text)
        provenance = json.loads(_read(path, "provenance.json"))
    except (yaml.YAMLError, json.JSONDecodeError) as broken:
        raise DataFault(f"{path}: a settings file of the run cannot be read ({broken}); run it again") from broken
    for name, content in (("config.yaml", config), ("provenance.json", provenance)):
        if not isinstance(content, dict):
            raise DataFault(f"{path / name}: found {type(content).__name__}, need names and values; run it again")
    rows = [_with_nan(row) for row in read_log(path / "log.jsonl")]
    steps = [row for row in rows if "losses" in row]
    return RunFolder(path, config, text, steps, [row for row in rows if "validation" in row], provenance)


def _with_nan(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _with_nan(item) for key, item in value.items()}
    return math.nan if value is None else value


def _read(run: Path, name: str) -> str:
    try:
        return (run / name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as missing:
        raise DataFault(f"{run}: {name} cannot be read ({missing}); a report needs the folder of a run") from missing


def pretraining_report(run: Path, pictures: Mapping[str, np.ndarray] | None = None) -> Path:
    """Write RUN/report.html and return its path.

    Of provenance.json it reads `cases` (name, subject, modality), `rejected` (name, reason), `saliency` (source, number
    of scans) and `versions`.
    `pictures` may hold `a` and `b`, two crops (i, j, k) of one place, with `points_a` and `points_b` (point, 3), the
    same places in voxels of each, and `spacing` (3,) in mm; any other volume (i, j, k) is shown under its name.
    """
    opened = open_run(run)
    if missing := sorted({"cases", "rejected"} - opened.provenance.keys()):
        raise DataFault(f"{run / 'provenance.json'}: no {', '.join(missing)}; a report says what was learned from")
    cases, rejected = opened.provenance["cases"], opened.provenance["rejected"]
    subjects = sorted({str(c["subject"]) for c in cases})
    steps = opened.log[-1]["step"] if opened.log else 0
    kind, reading = life(opened.log)
    perhaps = "perhaps with help from labels," if _steered_by_unknown(opened.provenance) else "without labels"
    how = "with help from labels," if _steered_by_labels(opened.provenance) else perhaps
    verdict = f"Learned {how} from {counted(len(cases), 'scan')} of {counted(len(subjects), 'subject')}"
    signs = [row["signs"] for row in opened.log if row.get("signs")]
    top = figures(
        ("Scans", number(len(cases)), f"{counted(len(subjects), 'subject')}, {len(rejected)} left out"),
        ("Steps", number(steps), duration(opened.log)),
        ("Loss at the end", number(_late(opened.log), 3), "mean of the last tenth of the steps"),
        ("Directions in use", number(signs[-1].get("rank"), 1) if signs else "–", "effective rank of the embedding"),
    )
    sections = [
        Section("What it learned from", tuple(_learned_from(opened.provenance, subjects, _views(opened.config)))),
        settings(opened),
        Section(
            "Loss",
            tuple(curves(opened.log)),
            "Each term as it was minimised: already weighted, so they add up to the total.",
        ),
        Section(
            "Signs of life",
            (callout(kind, reading), *_sign_charts(opened.log)),
            "What can be seen without labels. They can reveal a failure; they cannot prove that the encoder is useful.",
        ),
    ]
    if looks := list(_look_charts(opened.log)):
        words = "The heads of the encoder's attention, a line for each stage. Heads that become alike are wasted."
        sections.append(Section("Where heads look", (tag("div", *looks, class_="charts"),), words))
    if pictures:
        sections.insert(2, Section("What it was shown", tuple(crop_pictures(pictures))))
    sections.append(origin(opened))
    lead = tag("p", f"{verdict}, in {counted(steps, 'step')}. {reading}", class_="verdict")
    html = page("Pretraining report", run.resolve().name, (lead, top), sections, footer=_FOOTER)
    return write_page(run / "report.html", html)


def life(log: Sequence[Mapping]) -> tuple[str, str]:
    """(kind of callout, one plain sentence) on whether the embedding still tells crops apart at the end of the run."""
    logged = [(row["step"], row["signs"]) for row in log if (row.get("signs") or {}).keys() >= _JUDGED]
    if not logged:
        return "note", "No signs of life were logged, so this run says nothing about its embedding."
    alarms = [(step, text) for step, signs in logged if (text := collapse(signs))]
    step, signs = logged[-1]
    if alarms and alarms[-1][0] == step:
        return "warning", f"At the last reading, step {number(step)}, {alarms[-1][1]}."
    if signs["rows"] < FEWEST_ROWS:
        return (
            "note",
            f"The signs were read from {counted(int(signs['rows']), 'crop')}: too few to judge the embedding.",
        )
    of = f"{number(signs['rank'], 1)} of {number(min(signs['rows'], signs['dims']))} directions"
    alive = f"The embedding shows no sign of collapse: it spreads over {of}."
    if alarms:
        rang = f"the collapse alarm rang {counted(len(alarms), 'time')}, last at step {number(alarms[-1][0])}"
        return "note", f"{alive} Earlier {rang}."
    return "good", alive


def curves(log: Sequence[Mapping]) -> Iterator[Html]:
    """The total, each term of it, learning rate, gradient norm and throughput over the steps."""
    if skipped := sum(bool(row.get("skipped")) for row in log):
        yield callout(
            "note", f"{counted(skipped, 'update was', 'updates were')} skipped because the gradient was not finite."
        )
    yield line_chart([series("total", log, lambda row: row["total"])], "Total loss")
    names = list(dict.fromkeys(name for row in log for name in row["losses"]))
    charts = []
    if len(names) > 1:
        charts += [line_chart([series(n, log, lambda row, n=n: row["losses"].get(n))], n, **SMALL) for n in names]
    for field, title in (
        ("lr", "Learning rate"),
        ("grad_norm", "Gradient norm"),
        ("crops_per_second", "Crops a second"),
    ):
        charts.append(line_chart([series(field, log, lambda row, f=field: row.get(f))], title, **SMALL))
    yield tag("div", *charts, class_="charts")


def series(name: str, log: Sequence[Mapping], value: Callable[[Mapping], float | int | None]) -> Series:
    """One logged value over the steps that have it."""
    found = [(row["step"], v) for row in log if (v := value(row)) is not None]
    steps, values = np.array(found, np.float64).reshape(-1, 2).T
    return Series(name, steps, values)


def settings(run: RunFolder) -> Section:
    """The settings a reader asks for first, then all of them as they can be fed back."""
    flat = dict(_flat(run.config))
    first = {}
    for wanted, title in _FIRST.items():
        keys = [k for k in flat if k.rsplit(".", 1)[-1] == wanted]
        first |= {title if len(keys) == 1 else f"{title} · {k}": _setting(flat[k]) for k in keys}
    everything = folded("All settings (config.yaml; feeding it back repeats the run)", tag("pre", run.config_text))
    return Section("What was chosen", (facts(first), everything))


def _flat(tree: Mapping, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _setting(value: object) -> str:
    if isinstance(value, list | tuple):
        return " × ".join(number(v) for v in value)
    return "not set" if value is None else number(value)


def origin(run: RunFolder) -> Section:
    """Versions, and everything else that provenance.json says, as it stands there."""
    versions = run.provenance.get("versions", {})
    return Section(
        "Versions and provenance",
        (
            facts({name: str(version) for name, version in versions.items()}),
            folded("provenance.json", tag("pre", json.dumps(run.provenance, indent=1, ensure_ascii=False))),
        ),
    )


def names_list(names: Sequence[str]) -> Html:
    """Many names in columns."""
    return tag("ul", *(tag("li", name) for name in names), class_="names")


def duration(log: Sequence[Mapping]) -> str:
    """How long the logged steps took, and how much of it was waiting for data."""
    seconds = sum(row["seconds"] for row in log)
    waiting = sum(row["data_seconds"] for row in log)
    if not seconds:
        return "no time was logged"
    minutes, hours = seconds / 60, seconds / 3600
    took = f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if hours < 2 else f"{hours:.1f} h"
    return f"{took}, {waiting / seconds:.0%} of it waiting for data"


def _late(log: Sequence[Mapping]) -> float | None:
    totals = [row["total"] for row in log[-max(len(log) // 10, 1) :] if math.isfinite(row["total"])]
    return sum(totals) / len(totals) if totals else None


def _views(config: Mapping) -> str:
    """The views that a run was asked for and that read a saliency; empty for others."""
    views = (config.get("focus") or {}).get("views", "ordinary")
    return views if views in _STEERED else ""


def _learned_from(provenance: Mapping, subjects: Sequence[str], views: str = "") -> Iterator[Html]:
    cases, rejected = provenance["cases"], provenance["rejected"]
    saliency = provenance.get("saliency", {})
    modalities = Counter(str(c["modality"]) for c in cases)
    counts = {"Scans": len(cases), "Subjects": len(subjects), "Left out": len(rejected)}
    counts |= {f"Modality {name}": count for name, count in modalities.most_common()}
    yield facts(counts | {f"Steered by {source}": f"{count} of {len(cases)}" for source, count in saliency.items()})
    if views and not saliency:
        yield callout(
            "warning",
            f"Views were to be {views}, but the saliency of the scans is empty: all were ordinary, and nothing can be "
            "said of such views by this run.",
        )
    if labelled := _steered_by_labels(provenance):
        yield callout(
            "warning",
            f"Label maps of {counted(labelled, 'scan')} steered views or heads: this encoder has used labels, and no "
            "few-shot claim may rest on it.",
        )
    if unknown := _steered_by_unknown(provenance):
        yield callout(
            "warning",
            f"A network steered views of {counted(unknown, 'scan')} of which nobody knows whether labels taught it: "
            "this encoder may have used labels, and no few-shot claim may rest on it.",
        )
    if rejected:
        yield callout("warning", f"{counted(len(rejected), 'scan was', 'scans were')} left out of the learning:")
        yield table([Column("Scan"), Column("Reason")], [(r["name"], r["reason"]) for r in rejected])
    else:
        yield tag("p", "No scan was left out.")
    yield folded("The subjects it has seen, for whoever must keep them out of a test set", names_list(subjects))


def _steered_by_labels(provenance: Mapping) -> int:
    """In how many scans labels, as saliency or as a prior, or a network that they taught, said where to look."""
    return sum(count for source, count in provenance.get("saliency", {}).items() if "labels" in source)


def _steered_by_unknown(provenance: Mapping) -> int:
    """In how many scans a network said where to look of which nobody knows whether labels taught it."""
    return sum(count for source, count in provenance.get("saliency", {}).items() if "unknown" in source)


def _look_charts(log: Sequence[Mapping]) -> Iterator[Html]:
    """A chart for each measure of the heads' attention that the notes hold, a line for each stage."""
    names = dict.fromkeys(name for row in log for name in row.get("notes") or {})
    found = [match for name in names if (match := _OF_STAGE.fullmatch(name))]
    for measure, (title, reading) in _LOOKS.items():
        stages = sorted({int(match[1]) for match in found if match[2] == measure})
        lines = [
            series(f"stage {stage}", log, lambda row, n=f"stage{stage}.{measure}": (row.get("notes") or {}).get(n))
            for stage in stages
        ]
        if lines:
            yield tag("div", line_chart(lines, title, **SMALL), tag("p", reading, class_="lead"))


def _sign_charts(log: Sequence[Mapping]) -> Iterator[Html]:
    logged = [{"step": row["step"], **row["signs"]} for row in log if row.get("signs")]
    charts = []
    for name, reading in _SIGNS.items():
        if any(name in row for row in logged):
            chart = line_chart([series(name, logged, lambda row, n=name: row.get(n))], name.capitalize(), **SMALL)
            charts.append(tag("div", chart, tag("p", reading, class_="lead")))
    if charts:
        yield tag("div", *charts, class_="charts")
