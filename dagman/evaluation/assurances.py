"""What a reader must be told about a score: who was on both sides of the split, and what the encoder had seen."""

from collections.abc import Iterator, Mapping, Sequence

from spade3d.training.page import Html, callout, counted, number, tag


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
        yield callout(
            "warning",
            f"{counted(len(seen), 'validation subject')} had been in the pretraining, as images without labels "
            f"({_some(seen)}): the scores may be better than those of patients that were never seen.",
        )
    if leakage["pretraining"] == "unknown":
        yield callout(
            "warning",
            "The checkpoint does not say what it was pretrained on, so nobody can tell whether it has seen "
            "validation subjects.",
        )


def _some(names: Sequence[str], most: int = 6) -> str:
    more = f" and {number(len(names) - most)} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def assurances(summary: Mapping) -> Iterator[Html]:
    """What was checked and held; what did not hold stands beside the headline, and is repeated here."""
    leakage = summary["leakage"]
    if not _shared(summary):
        yield callout("good", "The split is by subject: no validation subject entered training.")
    if leakage["pretraining"] == "checked" and not leakage["validation_in_pretraining"]:
        yield callout("good", "No validation subject is among the subjects that the checkpoint was pretrained on.")
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
