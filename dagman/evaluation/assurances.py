"""What a reader must be told about a score: who was on both sides of the split, and what the encoder had seen."""

from collections.abc import Iterator, Mapping, Sequence

from dagman.evaluation.comparison_leakage import SEEN, Leakage, judges_seen, leaks
from dagman.evaluation.leakage import reasons, steered_said
from spade3d.training.page import Html, callout, counted, folded, number, tag
from spade3d.training.report import names_list


def _shared(summary: Mapping) -> list[str]:
    """Who is on both sides of the split: by the lists themselves, and by what the run found."""
    both = set(map(str, summary["split"]["train"])) & set(map(str, summary["split"]["validation"]))
    return sorted(both | set(map(str, summary["leakage"]["validation_in_training"])))


def warnings(summary: Mapping) -> Iterator[Html]:
    """What makes the headline worth less than it looks; said beside it."""
    leakage = summary["leakage"]
    if shared := _shared(summary):
        yield callout(
            "warning",
            f"{counted(len(shared), 'validation subject')} also entered training ({_some(shared)}): "
            "the scores are not those of unseen patients and must not be quoted.",
        )
    if seen := [str(s) for s in leakage["validation_in_pretraining"]]:
        own = [str(s) for s in leakage.get("steered_by_validation", ())]
        how = f"and the labels of {_some(own)} steered it" if own else "as images without labels"
        yield callout(
            "warning",
            f"{counted(len(seen), 'validation subject')} had been in the pretraining, {how} "
            f"({_some(seen)}): the scores may be better than those of patients that were never seen.",
        )
        yield from _told(seen, leakage)
    if suspected := [str(s) for s in leakage.get("suspected_in_pretraining", ())]:
        yield callout(
            "warning",
            f"{counted(len(suspected), 'validation subject')} may have been in the pretraining ({_some(suspected)}): "
            "a scan there is so similar, or named alike, that somebody should look at both.",
        )
        yield from _told(suspected, leakage)
    if steered := leakage.get("steered"):
        said = steered_said(steered)
        yield callout("warning", f"{said[0].upper()}{said[1:]}.")
    if leakage["pretraining"] == "unknown":
        yield callout(
            "warning",
            "The checkpoint does not say what it was pretrained on, so nobody can tell whether it has seen "
            "validation subjects.",
        )


def leakage_between(leakage: Leakage) -> Html:
    """The same of a comparison, where each side has an encoder of its own."""
    return callout("warning" if leaks(leakage) else "good", f"{SEEN.capitalize()}: {judges_seen(leakage)}.")


def _told(subjects: Sequence[str], leakage: Mapping) -> Iterator[Html]:
    """By what each subject is known, where the run says so."""
    evidence = leakage.get("evidence", {})
    lines = [f"{who}: by {reasons(evidence[who])}" for who in subjects if who in evidence]
    if lines:
        yield folded("By what they are known", names_list(lines))


def _some(names: Sequence[str], most: int = 6) -> str:
    more = f" and {number(len(names) - most)} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def assurances(summary: Mapping) -> Iterator[Html]:
    """What was checked and held; what did not hold stands beside the headline, and is repeated here."""
    leakage = summary["leakage"]
    if not _shared(summary):
        yield callout("good", "The split is by subject: no validation subject entered training.")
    found = [*leakage["validation_in_pretraining"], *leakage.get("suspected_in_pretraining", ())]
    if leakage["pretraining"] == "checked" and not found:
        yield callout("good", "No validation subject is among the subjects that the checkpoint was pretrained on.")
        if (compared := leakage.get("compared_by_voxels")) and compared[0] < compared[1]:
            yield callout(
                "note",
                f"Only {compared[0]} of {compared[1]} scans of the pretraining could be compared by what they show; "
                "the others by names and exact voxels alone. A pretraining of a newer store says it for all.",
            )
    if leakage["pretraining"] == "none":
        yield callout(
            "good", "Trained from scratch: there was no pretraining that could have seen a validation subject."
        )
    yield from warnings(summary)


def coverage(loading: Mapping | None) -> Iterator[Html]:
    """How much of the encoder came from a checkpoint."""
    if loading is None:
        yield tag("p", "No checkpoint was loaded: every weight began at random (training from scratch).")
        return
    loaded, total = loading["loaded"], loading["total"]
    kind = "good" if loaded == total else "warning"
    rest = (
        ""
        if loaded == total
        else f"; {total - loaded} began at random, so this is not the pretrained encoder as it was"
    )
    yield callout(kind, f"Loaded {loaded} of {total} encoder tensors from {loading['source']}{rest}.")
