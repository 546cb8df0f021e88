"""What a map must beat to have found anything: chance, a place, the finding's organs, and Grad-CAM of the same head.

Each is judged as the run's own maps are, on the same boxes, with thresholds that the same halves choose:

    random              each cell its own value
    centre              the middle of the volume
    prior               where the prior says that the finding may be, if it is known of scans that judge (all sources
                        but `labels`)
    organ               the organs of the finding in the table of the prior, by the true labels of the scan that is
                        judged: more than any run is told
    organ, its middle   the same, highest where they are deepest
    grad-cam            of the head that was trained, which is not trained again
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from jaxtyping import Float

from dagman.downstream.allowed import matching
from dagman.downstream.grad_cam import WithGradCam
from dagman.downstream.study_model import StudyFound
from dagman.downstream.token_grids import CELL, body_crop, cells_of, to_world
from dagman.evaluation.finding_means import Row, difference, summary
from dagman.evaluation.localisation import MEASURES, Annotation, HeatMap, Judging, localised
from dagman.evaluation.localisation_baselines import centre_map, organ_core_map, organ_map, random_map
from dagman.recipes.clarity_settings import finding_prior
from dagman.study_judging import Judge
from spade3d import console
from spade3d.faults import DataFault, UsageFault
from spade3d.volumes.volume import Grid

PRIOR, GRAD_CAM = "prior", "grad-cam"
OVER = ("iou", "t_iou_0.3", "t_iobb_0.25", "centre_inside", "pointing", "pointing_near", "voxel_ap")

Asked = Sequence[tuple[int, str]]  # cases with a finding that is annotated in them
Way = Callable[[int, str], Float[np.ndarray, "i j k"]]  # of a case and a finding, the map on the grid of the store


def judge_baselines(
    work, judge: Judge, annotations: Sequence[Annotation], how: Judging, own: Sequence[Row]
) -> dict[str, Any]:
    """What localisation.json says of the baselines of a run (`work`: its settings, store, findings and the cases that
    taught), by name:

    baselines             `measures`, and `over`: what the run's `own` rows have more, in OVER, with intervals
    baselines_by_finding  the measures again, finding by finding
    baselines_left_out    why, of those that this run has not the data for
    """
    asked = asked_of(work.store, judge.cases, work.findings.names, annotations)
    maps, left_out = _maps(work, judge, annotations, asked)
    found = {}
    by_finding: dict[str, Any] = {}
    with console.progress_of("judging baselines") as progress:
        for done, (name, heat_maps) in enumerate(maps.items()):
            progress(done, len(maps), name)
            rows = localised(heat_maps, annotations, how)
            names = sorted({row["finding"] for row in rows})
            by_finding[name] = {one: summary([row for row in rows if row["finding"] == one], MEASURES) for one in names}
            found[name] = {
                "measures": summary(rows, MEASURES),
                "over": {measure: asdict(difference(rows, own, measure)) for measure in OVER},
            }
        progress(len(maps), len(maps), "")
    return {"baselines": found, "baselines_left_out": left_out, "baselines_by_finding": by_finding}


def asked_of(
    store, cases: Sequence[int], findings: Iterable[str], annotations: Sequence[Annotation]
) -> list[tuple[int, str]]:
    """Each case with each finding that it is annotated with, in the order of the findings."""
    wanted, names = {(one.subject, one.finding) for one in annotations}, list(findings)
    return [(case, name) for case in cases for name in names if (store.cases[case].subject, name) in wanted]


def drawn(store, asked: Asked, way: Way) -> Iterator[HeatMap]:
    """The maps of one way."""
    for case, finding in asked:
        stored = store.cases[case]
        yield HeatMap(stored.subject, finding, way(case, finding), stored.affine)


def of_no_network(
    store, cell_of: Callable[[int], tuple[int, int, int]], seed: int, organs: Mapping[str, Sequence[int]]
) -> dict[str, Way]:
    """Chance and the middle, and where `organs` are given (finding -> values of the store's labels) these.

    cell_of  how many voxels a cell takes in a case; seed: of chance alone, so that it depends on nothing else judged
    """
    rng = np.random.default_rng(seed)

    def organ(case: int, finding: str) -> np.ndarray:
        return np.isin(store.labels(case), list(organs[finding]))

    ways: dict[str, Way] = {
        "random": lambda case, finding: random_map(store.cases[case].shape, cell_of(case), rng),
        "centre": lambda case, finding: centre_map(store.cases[case].shape),
    }
    if organs:
        ways["organ"] = lambda case, finding: organ_map(organ(case, finding))
        ways["organ, its middle"] = lambda case, finding: organ_core_map(organ(case, finding), store.cases[case].affine)
    return ways


def grad_cams(judge: Judge, annotations: Sequence[Annotation]) -> Iterator[HeatMap]:
    """Grad-CAM of the head that a judge asks, whatever maps it has itself."""
    model = replace(judge.model, head=WithGradCam(judge.model.head))
    return replace(judge, model=model).heat_maps(annotations)


def organs_in_labels(table: Mapping[str, Sequence[str]], names: Mapping[int, str]) -> dict[str, list[int]]:
    """finding -> the values of its organs among labels (value -> name). A finding without organs, or of which the
    labels lack one, is not in it."""
    values, found = list(names), {}
    for finding, organs in table.items():
        try:
            found[finding] = [values[n] for organ in organs for n in matching(organ, [*names.values()])]
        except UsageFault:  # bands of intensity are named otherwise than structures
            continue
    return {finding: of for finding, of in found.items() if of}


def _maps(
    work, judge: Judge, annotations: Sequence[Annotation], asked: Asked
) -> tuple[dict[str, Iterator[HeatMap]], dict[str, str]]:
    """The maps of all ways that this run has the data for, and why the others are left out."""
    store, settings = work.store, work.settings
    left_out: dict[str, str] = {}
    told = settings.head == "clarity" and settings.clarity.prior.source != "none"
    table = {name: of.organs for name, of in settings.clarity.prior.table.items()} if told else {}
    organs = organs_in_labels(table, store.label_names)
    if why := _why_no_organs(store, asked, table, organs):
        left_out |= dict.fromkeys(("organ", "organ, its middle"), why)
        organs = {}
    cell_mm = CELL * np.array(judge.model.windows.spacing)

    def cell_of(case: int) -> tuple[int, int, int]:
        i, j, k = np.maximum(1, np.round(cell_mm / store.cases[case].spacing)).astype(int).tolist()
        return i, j, k

    ways = of_no_network(store, cell_of, settings.seed, organs)
    try:
        ways |= _prior(work, judge.cases) if told else {}
    except (DataFault, UsageFault) as fault:  # the run itself needs no prior of scans that judge, and has ended well
        left_out[PRIOR] = str(fault)
    if PRIOR not in ways and PRIOR not in left_out:
        own = "labels are a prior of the scans that teach alone; of scans that judge they are the true organ"
        left_out[PRIOR] = own if told else "the run has no prior (--clarity.prior.source, .table)"
    maps = {name: drawn(store, asked, way) for name, way in ways.items()}
    return maps | {GRAD_CAM: grad_cams(judge, annotations)}, left_out


def _why_no_organs(store, asked: Asked, table: Mapping[str, Sequence[str]], organs: Mapping[str, Sequence[int]]) -> str:
    """Why the true organs cannot be judged; nothing where they can."""
    if not table:
        return "no table says in which organs findings are (--clarity.prior.table)"
    if unnamed := sorted({finding for _, finding in asked} - organs.keys()):
        return f"no label of the store is an organ of {', '.join(unnamed)}"
    bare = {case for case, _ in asked if not store.cases[case].has_labels}
    return f"{len(bare)} annotated scans have no labels" if bare else ""


def _prior(work, cases: Sequence[int]) -> dict[str, Way]:
    """What the head was told of training scans, of those that judge; nothing for a scan's own labels, which are known
    of training scans alone."""
    settings, store = work.settings, work.store
    prior = settings.clarity.prior
    if prior.source == "labels":
        return {}
    makers = cases if prior.source == "files" else work.taught  # files are of each scan
    names = work.findings.names
    allowed = finding_prior(prior, store, names, makers, [*work.taught, *cases], seed=settings.seed)

    def way(case: int, finding: str) -> np.ndarray:
        stored = store.cases[case]
        cells = cells_of(body_crop(case, stored, settings.data.spacing))
        found = StudyFound(np.zeros(len(names)), allowed(cells), to_world(stored, cells))
        return found.on_grid(names.index(finding), Grid(stored.shape, stored.affine))

    return {PRIOR: way}
