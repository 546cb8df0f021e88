"""The report of the probes: every measure beside the controls that need no training, layers compared, signs of life."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dagman.attention.diversity import STAGES
from dagman.evaluation.assurances import warnings
from dagman.evaluation.attention_heads import HEADS, MEASURES
from dagman.evaluation.heat_map import heat_map
from dagman.evaluation.layers import stage_name
from dagman.evaluation.organ_places import PER_ORGAN
from dagman.evaluation.organ_probes import FOLDS, NEIGHBOURS, STRENGTHS
from dagman.evaluation.statistics import FEW_SUBJECTS
from spade3d.training.charts import Estimate, interval_chart
from spade3d.training.page import (
    Column,
    Html,
    Section,
    callout,
    counted,
    facts,
    folded,
    number,
    page,
    table,
    tag,
    write_page,
)
from spade3d.training.report import names_list

_FOOTER = "One file: nothing is loaded, nothing is sent. Written by dagman. Not for diagnosis."
MOST_P = 0.05  # of a difference that is called shown

# What is asked, in words, by the start of a measure's name; in the order of the table.
_ASKED = {
    "linear.accuracy": "Organ by a linear probe, balanced accuracy",
    "linear.precision": "Organ by a linear probe, macro average precision",
    "knn.accuracy": "Organ by nearest neighbours, balanced accuracy",
    "knn.precision": "Organ by nearest neighbours, macro average precision",
    "retrieval": "Organ overlap of a crop and its nearest in another subject",
    "kmeans.places.ami": "k-means of places: adjusted mutual information with organs",
    "kmeans.places.ari": "k-means of places: adjusted Rand index",
    "kmeans.crops.ami": "k-means of crops around organs: adjusted mutual information",
    "kmeans.crops.ari": "k-means of crops around organs: adjusted Rand index",
    "clusters.ratio": "Distance between organs over distance within one",
    "clusters.inter": "Distance between organs",
    "clusters.intra": "Distance within an organ (less is better)",
    "landmarks.centroid": "Centre of an organ found in another subject, mm off (less is better)",
    "landmarks.surface": "Surface of an organ found in another subject, mm off (less is better)",
    "equivariance.moved": "Points found again in a moved twin",
    "equivariance.flipped": "Points found again in a flipped twin",
    "equivariance.turned": "Points found again in a turned twin",
    "equivariance.scaled": "Points found again in a scaled twin",
}
_DRAWN = ("linear.accuracy", "knn.accuracy", "retrieval", *(q for q in _ASKED if q.startswith("equivariance")))
_CONTROLS = {
    "position": ("position",),
    "intensities": ("patch",),
    "chance": ("chance", "random"),
    "best possible": ("ceiling", "floor"),
}
_HOW = (
    "Each value is the mean over subjects, in brackets its 95 % interval over them (of k-means: all subjects together, "
    "jackknife). Position, intensities and chance need no network and are the same for every encoder; an encoder that "
    "is no better than its untrained twin has learned nothing that this question asks."
)
_CKA = (
    "Linear centred kernel alignment, debiased, at the same places of the same crops (Kornblith et al. 2019; Nguyen et "
    "al. 2021): 1 is the same up to a turn and a factor, 0 is unrelated. It says how alike two layers are, not how "
    "good. 1.2 is the second block of stage 1; a stage ends with its merging."
)
_HEADS = (
    "How attention looks in one crop of each scan: it describes an encoder and does not grade it. Entropy: over its "
    "maximum, so 1 looks at all cells alike and 0 at one cell. Spread: standard deviation of entropy over a stage's "
    "heads. Distance: from a query to the cells that it looks at, mean weighted by attention. Divergence: "
    "Jensen-Shannon, mean over pairs of heads of a block; 0 is alike, 1 shares no cell."
)


def probe_report(out: Path, result: Mapping[str, Any]) -> Path:
    """Write OUT/report.html of what probes.json holds, and return its path."""
    encoders = result["encoders"]
    verdicts = [tag("p", verdict(name, result), class_="verdict") for name in encoders]
    lead = (*verdicts, *cautions(result))
    sections = []
    if _rows_of(result):
        charts = [gain_chart(name, found) for name, found in encoders.items()]
        sections.append(Section("What it knows", (answers_table(result), *charts), _HOW))
    if stages := _stages_table(result):
        words = "Balanced accuracy of the nearest neighbours where one stage speaks alone."
        sections.append(Section("Which stage knows organs", (stages,), words))
    sections.append(Section("Layers compared", (same_layers(result["cka"]), *maps(result["cka"])), _CKA))
    if heads := heads_table(result):
        sections.append(Section("Attention heads", (heads,), _HEADS))
    sections.append(Section("Signs of life", tuple(signs(result)), "Read without labels, at one place of each crop."))
    sections.append(Section("How it was asked", tuple(how_asked(result))))
    title = " and ".join(encoders)
    return write_page(out / "report.html", page("Probes of frozen encoders", title, lead, sections, footer=_FOOTER))


def verdict(name: str, result: Mapping[str, Any]) -> str:
    """Two sentences that never say more than the interval and the test do."""
    found, controls = result["encoders"][name], result["controls"]["measures"]
    measure = next((f"{asked}.features" for asked in _DRAWN if f"{asked}.features" in found["measures"]), None)
    if measure is None:
        return f"{name}: nothing but layers, heads and signs of life could be asked."
    gained, of = found["gains"][measure], measure.removesuffix(".features")
    evidence = f"{_value(found['measures'][measure])}, {_difference(gained)} against its untrained twin"
    reading = {1: "more than", -1: "less than", 0: "no more than can be told from"}[_side(gained)]
    alone = {"position": "position alone finds", "patch": "raw intensities alone"}
    free = [
        f"{said} {number(controls[key]['mean'], 3)}" for at, said in alone.items() if (key := f"{of}.{at}") in controls
    ]
    without = f"; {', '.join(free)}" if free else ""
    return f"{name} knows {reading} random weights. {_ASKED[of]}: {evidence}{without}."


def cautions(result: Mapping[str, Any]) -> Iterator[Html]:
    """What makes the numbers worth less than they look."""
    for name, found in result["encoders"].items():
        split = {"train": [], "validation": result["scans"]}
        if said := list(warnings({"split": split, "leakage": found["leakage"]})):
            yield tag("div", tag("h3", name), *said)
        for stage, said in found["collapsed"].items():
            yield callout("warning", f"{name}, {stage}: {said}")
    if len(result["subjects"]) < FEW_SUBJECTS:
        few = counted(len(result["subjects"]), "subject")
        yield callout("warning", f"{few}: intervals over so few are too narrow to trust.")
    for note in result["notes"]:
        yield callout("note", note)


def answers_table(result: Mapping[str, Any]) -> Html:
    """A row a question; encoders with what they gained, their untrained twins, and the controls."""
    encoders, twins, controls = result["encoders"], result["untrained"], result["controls"]["measures"]
    columns = [Column("Question")]
    for name in encoders:
        columns += [Column(name), Column(f"{name}: gain over untrained")]
    columns += [Column(name) for name in (*twins, *_CONTROLS)]
    lines = []
    for measure in _rows_of(result):
        base, unit = _base(measure)
        line: list[object] = [_ASKED[base]]
        for found in encoders.values():
            line += [_value(found["measures"].get(measure)), _difference(found["gains"].get(measure))]
        line += [_value(found["measures"].get(measure)) for found in twins.values()]
        for names in _CONTROLS.values():
            there = [controls[key] for name in names if (key := f"{base}.{name}{unit}") in controls]
            line.append(number(there[0]["mean"], 3) if there else "–")
        lines.append(line)
    caption = (
        "Gain: encoder less untrained twin, paired by subject; * where its interval leaves out 0 and p is at most "
    )
    caption += f"{MOST_P} (Wilcoxon). Not adjusted for the number of questions."
    return table(columns, lines, caption)


def gain_chart(name: str, found: Mapping[str, Any]) -> Html:
    """What an encoder gained over its untrained twin, in the questions whose answer is a share."""
    gained = found["gains"]
    rows = [
        Estimate(_SHORT[asked], (), gain["difference"], _nan(gain["low"]), _nan(gain["high"]), _side(gain) != 0)
        for asked in _DRAWN
        if (gain := gained.get(f"{asked}.features")) is not None
    ]
    return interval_chart(rows, f"{name} less its untrained twin", sides=("untrained better", f"{name} better"))


_SHORT = {
    "linear.accuracy": "organ, linear probe",
    "knn.accuracy": "organ, neighbours",
    "retrieval": "retrieval",
    "equivariance.moved": "found in a moved twin",
    "equivariance.flipped": "found in a flipped twin",
    "equivariance.turned": "found in a turned twin",
    "equivariance.scaled": "found in a scaled twin",
}


def _rows_of(result: Mapping[str, Any]) -> list[str]:
    """The measures that have a row, in the order of _ASKED."""
    found = next(iter(result["encoders"].values()))["measures"]
    names = [f"{asked}.features{unit}" for asked in _ASKED for unit in ("", "_mm")]
    return [name for name in names if name in found]


def _base(measure: str) -> tuple[str, str]:
    """The question, and "_mm" where the answer is a length."""
    unit = "_mm" if measure.endswith("_mm") else ""
    return measure.removesuffix(f".features{unit}"), unit


def _value(one: Mapping[str, Any] | None, digits: int = 3) -> str:
    if one is None:
        return "–"
    return f"{number(one['mean'], digits)} ({number(one['low'], digits)}\u00a0to\u00a0{number(one['high'], digits)})"


def _difference(gain: Mapping[str, Any] | None) -> str:
    if gain is None:
        return "–"
    sign = "+" if round(gain["difference"], 3) > 0 else ""
    mark = " *" if _side(gain) else ""
    return (
        f"{sign}{number(gain['difference'], 3)} ({number(gain['low'], 3)}\u00a0to\u00a0{number(gain['high'], 3)}){mark}"
    )


def _side(gain: Mapping[str, Any]) -> int:
    """1 where a gain above 0 is shown, -1 where one below is: interval and test agree; else 0."""
    if gain["low"] is None or gain["p"] > MOST_P:
        return 0
    return int(gain["low"] > 0) - int(gain["high"] < 0)


def _nan(value: float | None) -> float:
    return float("nan") if value is None else value


def _stages_table(result: Mapping[str, Any]) -> Html | None:
    groups = {**result["encoders"], **result["untrained"]}
    stages = [n for n in range(5) if f"knn.accuracy.stage{n}" in next(iter(groups.values()))["measures"]]
    if not stages:
        return None
    lines = [
        (stage_name(n), *(_value(found["measures"][f"knn.accuracy.stage{n}"]) for found in groups.values()))
        for n in stages
    ]
    return table([Column("Stage"), *map(Column, groups)], lines)


def same_layers(pairs: Sequence[Mapping[str, Any]]) -> Html:
    """Layer by layer: the same layer of two encoders; pairs of one encoder with itself are left out."""
    shown = [pair for pair in pairs if pair["rows"] != pair["columns"] and pair["row_layers"] == pair["column_layers"]]
    if not shown:
        return tag("p", "The encoders have different layers: only the maps below compare them.")
    lines = [(layer, *(pair["cka"][n][n] for pair in shown)) for n, layer in enumerate(shown[0]["row_layers"])]
    columns = [Column("Layer"), *(Column(f"{pair['rows']} and {pair['columns']}", 3, bar=True) for pair in shown)]
    return table(columns, lines, "The same layer of two encoders.")


def maps(pairs: Sequence[Mapping[str, Any]]) -> Iterator[Html]:
    for pair in pairs:
        rows, columns = pair["rows"], pair["columns"]
        title = f"{rows}, every layer with every other" if rows == columns else f"{rows} and {columns}"
        matrix = np.array(pair["cka"], dtype=float)  # None becomes NaN
        yield heat_map(matrix, pair["row_layers"], pair["column_layers"], title, (rows, columns))


def signs(result: Mapping[str, Any]) -> Iterator[Html]:
    columns = [Column("Encoder"), Column("Stage"), Column("Directions in use", 1), Column("of")]
    columns += [Column("Spread", 3), Column("Uniformity", 3)]
    lines = [
        (name, stage, one["rank"], one["most"], one["spread"], one["uniformity"])
        for name, found in {**result["encoders"], **result["untrained"]}.items()
        for stage, one in found["signs"].items()
    ]
    yield table(
        columns,
        lines,
        "Directions in use: effective rank, the common mean taken out. Spread: about 1 fills the sphere, 0 is one "
        "point; random weights read low, too, since all they say has a large part in common. Uniformity: 0 is one "
        "point.",
    )


def heads_table(result: Mapping[str, Any]) -> Html | None:
    """A row for each encoder and stage whose attention says something; None where there is none."""
    lines = []
    for name, found in {**result["encoders"], **result["untrained"]}.items():
        for stage in STAGES:
            measured = [found["measures"].get(f"{HEADS}.stage{stage}.{measure}") for measure in MEASURES]
            if any(measured):
                lines.append((name, stage_name(stage), *(_value(one, 4) for one in measured)))
    if not lines:
        return None
    columns = ["Encoder", "Stage", "Entropy", "Spread of entropy", "Distance, mm", "Divergence"]
    return table([Column(one) for one in columns], lines, "Mean over subjects, in brackets its 95 % interval.")


def how_asked(result: Mapping[str, Any]) -> Iterator[Html]:
    how = result["probing"]
    crop = " × ".join(map(str, how["shape"])) + f" voxels ({how['crop']})"
    yield facts(
        {
            "Scans": len(result["scans"]),
            "Subjects": len(result["subjects"]),
            "Split": result["split"],
            "Crop": crop,
            "Spacing": " × ".join(number(one) for one in how["spacing"]) + " mm",
            "Seed": how["seed"],
            "Places of each organ and scan": PER_ORGAN,
            "Neighbours": NEIGHBOURS,
            "C of the linear probe": ", ".join(number(c) for c in STRENGTHS) + ", chosen by learned subjects",
            "Folds by subject": min(FOLDS, len(result["subjects"])),
        }
    )
    for name, found in result["encoders"].items():
        run = found["run"] or {}
        yield tag("h3", name)
        shown = {"File": found["path"]} | {key: str(run[key]) for key in ("recipe", "seed", "settings") if key in run}
        yield facts(shown | {key: str(value) for key, value in found["network"].items()})
    yield folded("The scans that were probed", names_list(result["scans"]))
