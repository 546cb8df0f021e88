"""Several fine-tuning runs from one command: seeds, draws of labelled subjects, and twins from scratch beside them.

OUT holds `config.yaml` (which, fed back, repeats all of it), a folder for each run, whole in itself, `runs.csv`, and,
where there are twins, `comparison`. What differs within a pair of twins is where the encoder begins, and what regimes
do to one that was loaded (layer decay, warm-up: docs/concepts.md): they share subjects, crops, decoder and steps.
"""

from __future__ import annotations

import csv
import io
import math
import sys
from collections.abc import Mapping
from pathlib import Path

from dagman.evaluation.comparison import compare_runs
from dagman.evaluation.pairs import mean_gain
from dagman.evaluation.scores import read_rows, read_summary
from dagman.finetuning import check_run, opened, reopened, run_finetuning, taught_by
from dagman.recipes.finetuning import PRETRAINED, SCRATCH, FinetuneCommand
from spade3d import console
from spade3d.began_with import BEGAN_WITH, keep_beginning
from spade3d.commands import CONFIG, STORE, find_device
from spade3d.configuration import to_yaml, with_values
from spade3d.provenance import write_text
from spade3d.training import ranks
from spade3d.training.interruption import preemptible
from spade3d.volumes.split import Split, draw_labelled
from spade3d.volumes.store import VolumeStore, is_store

COMPARISON, TABLE = "comparison", "runs.csv"
COLUMNS = ("run", "seed", "draw", "labels", "mean_dice", "low", "high", "subjects")
LAST = "report.html"  # what a run writes last


def run_finetunings(settings: FinetuneCommand, out: Path, *, resume: bool, strict: bool) -> dict | None:
    """What `dagman-finetune` does: one run in `out` itself, or several below it; returns what it prints, None in all
    but the first of the processes that share it (docs/cluster.md).

    Interrupted and resumed, it leaves alone what is finished, continues the run that was not, and begins the others.
    """
    with ranks.joined(find_device(settings.device)), preemptible(out, CONFIG, resume=resume):
        ranks.once(lambda: ranks.share(settings.crop.crops, "--crop.crops"))
        runs = settings.runs()
        if len(runs) == 1:
            (only,) = runs.values()
            result = run_finetuning(only, out, resume=resume, strict=strict)
        else:
            result = run_in_turn(settings, out, resume=resume, strict=strict)
        return result if ranks.first() else None


def run_in_turn(settings: FinetuneCommand, out: Path, *, resume: bool, strict: bool) -> dict:
    """Several runs, each in a folder of its own."""
    if not resume:
        settings = ranks.once(lambda: begin(settings, out, strict=strict))
    else:
        ranks.once(lambda: check_begun(settings, out))
    folders = {name: out / name for name in settings.runs()}
    store = str(out / STORE) if is_store(out / STORE) else settings.data.path
    for number, (name, run) in enumerate(settings.runs().items(), start=1):
        finished, begun = ranks.once(lambda f=folders[name]: ((f / LAST).exists(), (f / CONFIG).exists()))
        if not finished:
            print(f"run {number} of {len(folders)}: {name}", file=sys.stderr)
            run_finetuning(with_values(run, {"data.path": store}), folders[name], resume=begun, strict=strict)
    return ranks.once(lambda: told(folders, out, twins=settings.from_scratch_twin))


def begin(settings: FinetuneCommand, out: Path, *, strict: bool) -> FinetuneCommand:
    """Scans prepared once for all runs, and the settings that all share; what one of them could not do is refused."""
    with console.fresh_folder(out, CONFIG):
        chosen, store, split = opened(settings, out, strict=strict)
        chosen = with_values(chosen, {"draw": settings.draw})  # each run has its own
        drawn: dict[tuple[int, ...], int] = {}
        for run in chosen.runs().values():
            first = drawn.setdefault(taught_by(run, store, split), run.draw)
            if first != run.draw and run.labels is not None:
                print(f"note: draw {run.draw} happens to be the subjects of draw {first}", file=sys.stderr)
        keep_beginning(out, store, everybody(store, split), split, chosen)
        write_text(out / CONFIG, to_yaml(chosen))
    return chosen


def check_begun(settings: FinetuneCommand, out: Path) -> None:
    """DataFault where runs are left that would begin with other scans than those before them. Where all are finished
    nothing is read, nor where they were begun before this was written down: each of them is checked by itself."""
    if (out / BEGAN_WITH).exists() and not all((out / name / LAST).exists() for name in settings.runs()):
        store, split = reopened(settings, out)
        check_run(settings, out, store, everybody(store, split), split)


def everybody(store: VolumeStore, split: Split) -> tuple[int, ...]:
    """The labelled cases that draws are made from."""
    return draw_labelled(store.cases, split.train, None, 0)


def told(folders: Mapping[str, Path], out: Path, *, twins: bool) -> dict:
    """OUT/runs.csv and, where there are twins, OUT/comparison; what the command prints of them."""
    summaries = {name: read_summary(folder) for name, folder in folders.items()}
    write_text(out / TABLE, table_of(summaries))
    result = {"mean_dice": {name: said["mean_dice"] for name, said in summaries.items()}, "table": str(out / TABLE)}
    if not twins:
        return result
    compared = compare_runs(list(folders.values()), out / COMPARISON)
    return result | {"pretrained minus scratch": gains(folders, summaries)} | compared


def gains(folders: Mapping[str, Path], summaries: Mapping[str, Mapping]) -> dict[str, float | None]:
    """What each run gained in Dice over its twin, as `dagman-compare` has it of the two alone; None where no structure
    has a value. It need not be the difference of their mean Dice: a structure that only one of them invented is in the
    mean of that one alone."""
    sides = {
        begun: {said["pair"]: read_rows(folders[name]) for name, said in summaries.items() if name.startswith(begun)}
        for begun in (PRETRAINED, SCRATCH)
    }
    found = {pair: mean_gain(sides[SCRATCH][pair], rows, "dice") for pair, rows in sides[PRETRAINED].items()}
    return {pair: None if math.isnan(gain) else round(gain, 6) for pair, gain in found.items()}


def table_of(summaries: Mapping[str, Mapping]) -> str:
    """One line a run, as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for name, said in summaries.items():
        subjects = " ".join(said["split"]["train"])
        row = [name, said["seed"], said["draw"], said["labels"], said["mean_dice"], *said["mean_dice_interval"]]
        writer.writerow([*row, subjects])
    return text.getvalue()
