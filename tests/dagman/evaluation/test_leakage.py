"""Leakage: who judges may have been seen in the pretraining, by name in the same dataset, by voxels anywhere."""

import json

import numpy as np
import pytest

from dagman.evaluation.leakage import find_leakage, reasons, say_leakage
from spade3d.faults import DataFault
from spade3d.provenance import describe
from spade3d.volumes.layouts import Case, Dataset
from spade3d.volumes.likeness import ALIKE, BITS, LIKE
from spade3d.volumes.phantoms import phantom
from spade3d.volumes.prepare import prepare
from spade3d.volumes.preprocessing import Preprocessing
from spade3d.volumes.split import Split
from spade3d.volumes.store import StoredCase
from spade3d.volumes.volume import write_volume

SPLIT = Split((0, 1), (2, 3), "by hand")  # b and b2 are two scans of one subject


def stored(folder, name, subjects: dict[str, str], seed: int = 0, layout: str = "MSD"):
    """A store whose case `c` of subject `s` is {"c": "s"}; the voxels depend on the order and the seed."""
    folder.mkdir()
    cases = []
    for number, (case, subject) in enumerate(sorted(subjects.items())):
        voxels = np.random.default_rng([seed, number]).integers(-500, 500, (8, 8, 8)).astype(np.int16)
        write_volume(folder / f"{case}.nii.gz", voxels, np.eye(4))
        cases.append(Case(case, subject, folder / f"{case}.nii.gz", None, "CT"))
    return prepare(Dataset(name, layout, folder, tuple(cases)), folder / "store", Preprocessing())


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scans") / "data"
    return stored(folder, "livers", {"a": "A", "a2": "A", "b": "B", "c": "C"})


def pretraining(store, *cases: int) -> dict:
    """What travels with an encoder that learned from these cases."""
    return describe(store, cases, Split(cases, (), "by hand"))


def found(store, provenance, strict=False) -> tuple:
    said = find_leakage(store, SPLIT, provenance, strict=strict)
    assert said["validation_in_training"] == []
    return said["pretraining"], said["validation_in_pretraining"]


def test_from_scratch_a_silent_checkpoint_and_a_clean_one(store):
    assert found(store, None) == ("none", [])
    assert found(store, {}) == ("unknown", [])
    assert found(store, pretraining(store, 0, 1), strict=True) == ("checked", [])


def test_an_encoder_that_does_not_say_what_it_has_seen_is_a_note_and_with_strict_a_fault(store, capsys):
    """Foreign checkpoints never say, and may be used: but not where leakage is to be ruled out."""
    say_leakage(find_leakage(store, SPLIT, {}, strict=False))
    assert capsys.readouterr().err.startswith("note: the file of the encoder does not say what it was pretrained on")
    for silent in ({}, {"dataset": {"name": "livers"}, "cases": []}):
        with pytest.raises(DataFault, match="has seen the 2 validation subjects; give an encoder .* or drop --strict"):
            find_leakage(store, SPLIT, silent, strict=True)
    for said in (None, pretraining(store, 0, 1)):
        say_leakage(find_leakage(store, SPLIT, said, strict=True))
    assert capsys.readouterr().err == "", "from scratch, or checked and clean: nothing to say"


def test_a_subject_is_found_in_the_same_dataset_by_name(store, tmp_path):
    rescanned = stored(tmp_path / "again", "livers", {"x": "B", "y": "Z"}, seed=1)
    assert found(store, pretraining(rescanned, 0, 1)) == ("checked", ["B"])


def test_patients_of_another_folder_of_the_same_name_are_suspected_and_not_found(tmp_path):
    """A/scans and B/scans both hold `b` and `c`, who are others: their voxels say so. The same voxels are found."""
    subjects = {"a": "A", "a2": "A", "b": "B", "c": "C"}
    (tmp_path / "A").mkdir(), (tmp_path / "B").mkdir()
    mine = stored(tmp_path / "A" / "scans", "scans", subjects, layout="folder of scans")
    others = stored(tmp_path / "B" / "scans", "scans", subjects, seed=1, layout="folder of scans")
    said = find_leakage(mine, SPLIT, pretraining(others, 0, 1, 2, 3), strict=True)
    assert said["validation_in_pretraining"] == [] and said["suspected_in_pretraining"] == ["B", "C"]
    assert [(one["by"], one["sure"]) for one in said["evidence"]["B"]] == [("subject's name", False)]
    assert said["evidence"]["B"][0]["unlikeness"] > ALIKE
    older = pretraining(others, 3)
    for case in older["cases"]:
        del case["likeness"]  # nobody can say that they are others
    assert found(mine, older) == ("checked", ["C"])
    assert found(mine, pretraining(mine, 3)) == ("checked", ["C"])
    described = pretraining(others, 3)
    described["dataset"]["layout"] = "MSD"
    assert found(mine, described) == ("checked", []), "one of the two is named by its folder"


def test_in_another_dataset_a_name_means_nobody_and_voxels_tell(store, tmp_path):
    other = stored(tmp_path / "other", "hearts", {"b": "B", "c": "C"}, seed=1)
    assert found(store, pretraining(other, 0, 1)) == ("checked", [])
    renamed = stored(tmp_path / "renamed", "hearts", {f"scan{n}": f"patient{n}" for n in range(4)})
    assert found(store, pretraining(renamed, 1, 3)) == ("checked", ["C"])


def test_strict_refuses_what_was_seen(store):
    said = (
        r"2 validation subjects were in the pretraining \(B, C\): B by subject, path, exact voxels \(b was seen as b\)"
    )
    with pytest.raises(DataFault, match=said):
        found(store, pretraining(store, 0, 2, 3), strict=True)


def test_a_split_that_leaks_is_said(store):
    said = find_leakage(store, Split((0, 2), (1, 3), "badly"), None, strict=False)
    assert said["validation_in_training"] == ["A"]


def test_the_same_voxels_under_another_subject_are_in_training(tmp_path):
    """`copy` is scan a again, said to be of somebody else: the split by subject cannot know."""
    store = stored(tmp_path / "data", "livers", {"a": "A", "b": "B", "c": "C"})
    folder = tmp_path / "data"
    twice = [
        Case(name, who, folder / f"{of}.nii.gz", None, "CT") for name, who, of in (("a", "A", "a"), ("z", "Z", "a"))
    ]
    store = prepare(Dataset("livers", "folder of scans", folder, tuple(twice)), tmp_path / "twice", Preprocessing())
    said = find_leakage(store, Split((0,), (1,), "by subject"), None, strict=False)
    assert said["validation_in_training"] == ["Z"]


def evidence(store, cases: list[dict], name: str = "others", strict: bool = False) -> tuple:
    """What is found, suspected, and by what, for a pretraining on `cases` of another data set."""
    plain = {"name": "x", "subject": "nobody", "source": "", "fingerprint": "", "likeness": ""}
    provenance = {"dataset": {"name": name}, "cases": [plain | case for case in cases]}
    said = find_leakage(store, SPLIT, json.loads(json.dumps(provenance)), strict=strict)
    json.dumps(said, allow_nan=False)
    by = {who: sorted(one["by"] for one in of) for who, of in said["evidence"].items()}
    return said["validation_in_pretraining"], said["suspected_in_pretraining"], by


def flipped(likeness: str, share: float) -> str:
    """Another likeness, `share` of whose bits differ in each view."""
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(likeness), np.uint8)).reshape(2, BITS)
    bits[:, : round(share * BITS)] ^= 1
    return np.packbits(bits).tobytes().hex()


def test_similar_voxels_are_found_suspected_or_strangers(store):
    """A pretraining without one name in common: the share of differing bits decides, and is told."""
    mine = store.cases[3].likeness
    assert evidence(store, [{"likeness": flipped(mine, LIKE - 0.01)}]) == (["C"], [], {"C": ["similar voxels"]})
    assert evidence(store, [{"likeness": flipped(mine, LIKE + 0.01)}]) == ([], ["C"], {"C": ["similar voxels"]})
    assert evidence(store, [{"likeness": flipped(mine, ALIKE + 0.01)}]) == ([], [], {})
    said = find_leakage(
        store,
        SPLIT,
        {"dataset": {"name": "x"}, "cases": [{"name": "y", "subject": "?", "fingerprint": "", "likeness": mine}]},
        strict=False,
    )
    assert said["evidence"]["C"] == [
        {"case": "c", "seen_as": "y", "by": "similar voxels", "sure": True, "unlikeness": 0.0}
    ]
    assert reasons(said["evidence"]["C"]) == "similar voxels, 0% of the bits differ (c was seen as y)"
    assert said["compared_by_voxels"] == [1, 1]


def test_what_is_only_suspected_is_never_an_error(store):
    with pytest.raises(DataFault, match=r"1 validation subjects were in the pretraining \(C\): C by similar voxels"):
        evidence(store, [{"likeness": store.cases[3].likeness}], strict=True)
    suspected = [{"likeness": flipped(store.cases[3].likeness, LIKE + 0.01)}]
    assert evidence(store, suspected, strict=True)[:2] == ([], ["C"])


def test_paths_are_evidence_unless_the_voxels_are_strangers(store, tmp_path):
    source = store.cases[3].source
    assert evidence(store, [{"source": source}]) == (["C"], [], {"C": ["path"]})
    linked = tmp_path / "link"
    linked.symlink_to(source)
    assert evidence(store, [{"source": str(linked)}]) == (["C"], [], {"C": ["path"]})
    parts = source.split("/")
    moved, elsewhere = "/" + "/".join(["mnt", *parts[-3:]]), "/mnt/other/" + parts[-1]
    assert evidence(store, [{"source": moved}]) == ([], ["C"], {"C": ["path ending"]})
    assert evidence(store, [{"source": "/".join(parts[-2:])}]) == ([], ["C"], {"C": ["path ending"]})
    assert evidence(store, [{"source": elsewhere}]) == ([], [], {})
    assert evidence(store, [{"source": parts[-1]}]) == ([], [], {})
    stranger = {"likeness": flipped(store.cases[3].likeness, 0.5)}
    assert evidence(store, [{"source": source} | stranger]) == ([], ["C"], {"C": ["path"]})
    assert evidence(store, [{"source": moved} | stranger]) == ([], [], {})


def steered(store, sources: dict[int, str], taught=None, strict=False) -> dict:
    """What is said of an encoder that learned from some cases, with views steered by saliency from these sources."""
    provenance = describe(store, tuple(sources), Split((), (), "by hand"), {i: of for i, of in sources.items() if of})
    return find_leakage(store, SPLIT, json.loads(json.dumps(provenance)), strict=strict, taught=taught)


def test_labels_that_steered_views_and_do_not_teach_are_counted(store, capsys):
    """--labels draws `a` alone: the label map of `a2`, which steered views, too, is one label more."""
    clean = steered(store, {0: "labels", 1: "gaze"}, taught=(0,), strict=True)
    assert clean["steered"] == {} and clean["steered_by_validation"] == []
    say_leakage(clean)
    assert capsys.readouterr().err == ""
    said = steered(store, {0: "labels", 1: "labels"}, taught=(0,), strict=True)  # no judge: a warning is enough
    assert said["steered"] == {"labels": 1} and said["validation_in_pretraining"] == []
    say_leakage(said)
    assert capsys.readouterr().err.startswith(
        "warning: labels that this run does not learn from steered the pretraining, its views or its heads (labels: "
        "1 scans)"
    )
    assert steered(store, {0: "labels", 1: "labels"})["steered"] == {"labels": 2}, "a run without label maps"
    assert steered(store, {0: "labels", 1: ""}, taught=(0, 1))["steered"] == {}
    by_predictor = steered(store, {0: "predicted (taught by labels)", 1: "predicted"}, taught=(0, 1))
    assert by_predictor["steered"] == {"predicted (taught by labels)": 1}, "nobody knows whose labels"
    by_attention = steered(store, {0: "attention (taught by labels)", 1: "attention"}, taught=(0, 1))
    assert by_attention["steered"] == {"attention (taught by labels)": 1}
    as_prior = {0: "labels, as a prior", 1: "labels, as a prior"}
    assert steered(store, as_prior, taught=(0,))["steered"] == {"labels, as a prior": 1}


@pytest.mark.parametrize("unknown", ["attention (of unknown teaching)", "predicted (of unknown teaching)"])
def test_saliency_of_unknown_teaching_is_said_and_refuses_nothing(store, capsys, unknown):
    said = steered(store, {0: unknown, 1: "gaze"}, taught=(0, 1), strict=True)
    assert said["steered"] == {unknown: 1}
    say_leakage(said)
    warned = capsys.readouterr().err
    assert warned.startswith("warning: a network of which nobody knows whether labels taught it steered the views of ")
    assert f"({unknown}: 1 scans), so the result may be one of more labels than it says" in warned
    say_leakage(steered(store, {0: unknown, 1: "labels"}, taught=(0,)))
    told = ", ".join(f"{source}: 1 scans" for source in sorted((unknown, "labels")))
    assert f"steered the pretraining, its views or its heads ({told})" in capsys.readouterr().err


def test_a_judge_whose_labels_steered_views_is_refused_with_strict(store):
    assert steered(store, {2: "labels", 3: "gaze"})["steered_by_validation"] == ["B"]
    with pytest.raises(DataFault, match="the labels of B even steered it; pretrain without them"):
        steered(store, {2: "labels", 3: "gaze"}, strict=True)


def test_a_provenance_without_likeness_is_still_read(store):
    """Older than likeness, and older than paths: names and exact voxels are compared, and the rest is said."""
    old = pretraining(store, 0, 3)
    for case in old["cases"]:
        del case["likeness"], case["source"]
    old["dataset"]["name"] = "hearts"
    said = find_leakage(store, SPLIT, old, strict=False)
    assert said["validation_in_pretraining"] == ["C"] and said["compared_by_voxels"] == [0, 2]
    assert said["evidence"]["C"] == [
        {"case": "c", "seen_as": "c", "by": "exact voxels", "sure": True, "unlikeness": None}
    ]


def test_a_store_older_than_likeness_is_still_read(store):
    values = store.cases[0].to_dict()
    del values["likeness"]
    assert StoredCase.from_dict(values).likeness == "" and len(store.cases[0].likeness) == 2 * BITS // 4


def test_a_scan_that_was_resampled_renamed_and_made_8_bit_is_found(tmp_path):
    """The road itself: a pretraining on every second slice, in 8 bit, of patients who judge under other names."""

    def write(folder, name, seeds, changed):
        (folder / "scans").mkdir(parents=True)
        cases = []
        for n, seed in enumerate(seeds):
            drawn = phantom("heart-mr", seed, shape=(32, 32, 32), spacing=(6.0, 6.0, 6.0))
            voxels, affine = drawn.voxels, drawn.affine
            if changed:
                voxels = np.clip(voxels[:, :, ::2] / voxels.max() * 255, 0, 255).astype(np.uint8)
                affine = affine @ np.diag([1.0, 1.0, 2.0, 1.0])
            path = folder / "scans" / f"{name}{n}.nii.gz"
            write_volume(path, voxels, affine)
            cases.append(Case(f"{name}{n}", f"{name}{n}", path, None, "MR"))
        return prepare(Dataset(name, "folder of scans", folder, tuple(cases)), folder / "store", Preprocessing())

    seen = write(tmp_path / "seen", "public", (0, 1, 2), changed=True)
    judged = write(tmp_path / "judged", "private", (2, 7), changed=False)
    said = find_leakage(judged, Split((), (0, 1), "all"), pretraining(seen, 0, 1, 2), strict=False)
    assert said["validation_in_pretraining"] == ["private0"]
    assert said["suspected_in_pretraining"] == [] and said["compared_by_voxels"] == [3, 3]
    assert [one["seen_as"] for one in said["evidence"]["private0"]] == ["public2"]
