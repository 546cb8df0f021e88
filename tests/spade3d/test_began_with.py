"""A run that is continued finds the scans that it began with, or is refused: nobody who has taught becomes a judge."""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import spade3d.commands
import spade3d.volumes.prepare
from dagman.recipes.clarity_settings import ClaritySettings, FindingPrior
from dagman.recipes.distillation_settings import DagmanSettings
from dagman.recipes.finetuning import FinetuneSettings
from dagman.recipes.priors import PriorSettings
from dagman.recipes.studies import StudySettings
from spade3d.began_with import BEGAN_WITH, check_beginning, keep_beginning
from spade3d.configuration import Common, read_beside
from spade3d.faults import DataFault
from spade3d.provenance import describe, write_json
from spade3d.volumes.channels import LABELS_AS_PRIOR, write_saliency
from spade3d.volumes.layouts import read_layout
from spade3d.volumes.phantoms import write_dataset
from spade3d.volumes.prepare import prepare
from spade3d.volumes.preprocessing import Preprocessing
from spade3d.volumes.split import Split
from spade3d.volumes.store import VolumeStore
from spade3d.volumes.volume import read_labels, write_volume

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ["--crop.shape", 16, 16, 16, "--network.feature-size", 12, "--network.window", 4, "--device", "cpu"]
SMALL += ["--steps", 2, "--crop.frame", "box"]
SPADE = [*SMALL, "--crop.places", 8, "--contrast.selection", "restoration"]
GUIDED = [*SMALL, "--recipe", "dagman", "--distill.stage", 2, "--distill.prototypes", 32]
GUIDED += ["--distill.semantic-heads", 6, "--prior.source", "labels", "--prior.regions", "liver"]
SPLIT = Split((0, 2), (1,), "img0002 judges")
SETTINGS = Common()  # name no files


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory) -> Path:
    """Four labelled patients; of all four the second judges."""
    folder = tmp_path_factory.mktemp("phantoms") / "data"
    write_dataset("abdomen-ct", folder, patients=4, shape=(40, 40, 28), spacing=(9.0, 9.0, 10.0))
    return folder


@pytest.fixture(scope="module")
def kept(phantoms) -> Path:
    """A store of them."""
    return prepared(phantoms, phantoms.parent / "store").path


@pytest.fixture
def store(kept) -> VolumeStore:
    return VolumeStore.open(kept)


def prepared(data: Path, store: Path) -> VolumeStore:
    return prepare(read_layout(data), store, Preprocessing(spacing=(10.0, 10.0, 10.0)))


def changed(store: VolumeStore, i: int, **other) -> VolumeStore:
    """The store with another record of one case."""
    store.cases = (*store.cases[:i], replace(store.cases[i], **other), *store.cases[i + 1 :])
    return store


def array_changed(store: VolumeStore, i: int, name: str) -> VolumeStore:
    return changed(store, i, **{name: replace(getattr(store.cases[i], name), xxh3="other")})


def test_a_run_goes_on_with_the_scans_it_began_with_wherever_they_lie(store, kept, tmp_path):
    """A store that was moved, and has saliency, labels and a scan that are others, none of which the run uses."""
    keep_beginning(tmp_path, store, (0, 2), SPLIT, SETTINGS)
    moved = VolumeStore.open(shutil.copytree(kept, tmp_path / "elsewhere"))
    moved = write_saliency(moved.path, {"img0001": np.ones(moved.cases[0].shape)}, "attention")
    moved = array_changed(changed(moved, 0, source="/elsewhere/img0001.nii.gz"), 2, "labels")
    moved = changed(moved, 3, subject="somebody else", fingerprint="other")
    check_beginning(tmp_path, moved, (0, 2), SPLIT, SETTINGS)


@pytest.mark.parametrize(
    ("change", "split", "message"),
    [
        (lambda s: s, Split((0, 2, 3), (1,), ""), "(added: img0004)"),
        (lambda s: s, Split((0,), (1,), ""), "(removed: img0003)"),
        (lambda s: s, Split((0, 1), (2,), ""), "img0002 (training now, held out before), img0003 (held out now, train"),
        (lambda s: changed(s, 0, subject="b"), SPLIT, "(changed: img0001 (subject b, img0001 before))"),
        (lambda s: changed(s, 1, fingerprint="other"), SPLIT, "(changed: img0002 (its voxels))"),
        (lambda s: array_changed(s, 0, "image"), SPLIT, "(changed: img0001 (its preparation))"),
        (lambda s: changed(s, 2, affine=2 * s.cases[2].affine), SPLIT, "(changed: img0003 (its preparation))"),
        (lambda s: array_changed(s, 2, "labels"), SPLIT, "(changed: img0003 (its labels))"),
        (lambda s: changed(s, 1, labels=None, has_labels=False), SPLIT, "(changed: img0002 (its labels))"),
    ],
)
def test_whatever_a_run_uses_and_finds_otherwise_is_named(change, split, message, store, tmp_path):
    keep_beginning(tmp_path, store, (0, 2), SPLIT, SETTINGS)
    with pytest.raises(DataFault) as refused:
        check_beginning(tmp_path, change(store), split.train, split, SETTINGS, labels=range(4))
    assert message in str(refused.value) and "begin a new run with another --out" in str(refused.value)


def test_names_of_labels_count_where_labels_do(store, tmp_path):
    keep_beginning(tmp_path, store, (0, 2), SPLIT, SETTINGS)
    store.label_names = store.label_names | {99: "another"}
    check_beginning(tmp_path, store, (0, 2), SPLIT, SETTINGS)
    with pytest.raises(DataFault, match="the names of the labels are others"):
        check_beginning(tmp_path, store, (0, 2), SPLIT, SETTINGS, labels=(0,))


@pytest.mark.parametrize("marked", [True, False], ids=["marked", "of before there was a mark"])
def test_saliency_and_labels_that_steered_are_those_of_the_beginning(store, kept, tmp_path, marked):
    """What provenance.json says was used counts, also where it would not be used now."""
    path = shutil.copytree(kept, tmp_path / "store")
    maps = {name: np.ones(store.cases[i].shape) for i, name in enumerate(("img0001", "img0002"))}
    with_maps = write_saliency(path, maps, "labels")
    if marked:
        keep_beginning(tmp_path, with_maps, (0, 2), SPLIT, SETTINGS)
    write_json(tmp_path / "provenance.json", describe(with_maps, (0, 2), SPLIT, {0: "labels", 2: LABELS_AS_PRIOR}))
    check_beginning(tmp_path, with_maps, (0, 2), SPLIT, SETTINGS, saliency=(0,), labels=(2,))
    other = write_saliency(path, {name: saliency / 2 for name, saliency in maps.items()}, "attention")
    with pytest.raises(DataFault, match=r"\(changed: img0001 \(saliency from attention, labels before"):
        check_beginning(tmp_path, other, (0, 2), SPLIT, SETTINGS)
    if marked:
        with pytest.raises(DataFault, match=r"\(changed: img0003 \(its labels\)\)"):
            check_beginning(tmp_path, array_changed(with_maps, 2, "labels"), (0, 2), SPLIT, SETTINGS)


def test_a_run_of_before_is_held_against_its_provenance(store, tmp_path):
    with pytest.raises(DataFault, match=r"neither began_with.json nor provenance.json is there"):
        check_beginning(tmp_path, store, (0, 2), SPLIT, SETTINGS)
    write_json(tmp_path / "provenance.json", describe(store, (0, 2), SPLIT))
    check_beginning(tmp_path, store, (0, 2), SPLIT, SETTINGS, labels=(0, 2))
    with pytest.raises(DataFault, match=r"removed: img0001; on the other side: img0002 \(training now, held out bef"):
        check_beginning(tmp_path, store, (1,), Split((1,), (2,), ""), SETTINGS)
    (tmp_path / BEGAN_WITH).write_text("{")
    with pytest.raises(DataFault, match=r"began_with.json: cannot be read .* put it back"):
        check_beginning(tmp_path, store, (0, 2), SPLIT, SETTINGS)


@pytest.mark.parametrize("change", ["other", "gone", "new"])
def test_files_beside_the_scans_are_those_of_the_beginning(change, store, tmp_path):
    """Priors below the names of its scans, whoever put something beside them."""
    priors, other = tmp_path / "priors", tmp_path / "moved"
    for name in ("img0001", "img0003", "img0004"):
        (priors / name).mkdir(parents=True)
        (priors / name / "liver.nii.gz").write_bytes(name.encode())
    run, settings = tmp_path / "run", DagmanSettings(prior=PriorSettings(source="files", folder=str(priors)))
    run.mkdir()
    keep_beginning(run, store, (0, 2), SPLIT, settings)
    (priors / "img0004" / "liver.nii.gz").write_bytes(b"other")  # of a scan that the run does not know
    (priors / "README").write_text("of a person", encoding="utf-8")
    shutil.copytree(priors, other)
    elsewhere = DagmanSettings(prior=PriorSettings(source="files", folder=str(other)))
    check_beginning(run, store, (0, 2), SPLIT, elsewhere)
    if change == "other":
        (priors / "img0003" / "liver.nii.gz").write_bytes(b"other")
    elif change == "gone":
        (priors / "img0003" / "liver.nii.gz").unlink()
    else:
        (priors / "img0003" / "spleen.nii.gz").write_bytes(b"new")
    which = "spleen" if change == "new" else "liver"
    with pytest.raises(DataFault, match=rf"files of prior.folder .* removed: img0003/{which}.nii.gz\)"):
        check_beginning(run, store, (0, 2), SPLIT, settings)
    older = json.loads((run / BEGAN_WITH).read_text(encoding="utf-8"))
    del older["files"]
    write_json(run / BEGAN_WITH, older)
    check_beginning(run, store, (0, 2), SPLIT, settings)


def test_an_encoder_a_run_starts_from_is_that_of_the_beginning(store, tmp_path):
    encoder = tmp_path / "encoder.safetensors"
    encoder.write_bytes(b"weights")
    settings = FinetuneSettings(init=str(encoder))
    keep_beginning(tmp_path, store, (0, 2), SPLIT, settings)
    check_beginning(tmp_path, store, (0, 2), SPLIT, settings)
    encoder.write_bytes(b"others")
    with pytest.raises(DataFault, match=r"files of init that were changed, added or removed: encoder.safetensors\)"):
        check_beginning(tmp_path, store, (0, 2), SPLIT, settings)


def test_every_setting_that_names_what_is_read_beside_the_scans_says_so(tmp_path):
    there = str(tmp_path)
    clarity = ClaritySettings(prior=FindingPrior(source="files", folder=there, table={"a": {"organs": ["liver"]}}))
    study = StudySettings(task="localisation", head="clarity", findings=there, boxes=there, init=there, clarity=clarity)
    assert set(read_beside(study)) == {"findings", "boxes", "init", "clarity.prior.folder"}
    assert read_beside(StudySettings()) == {}


def pretrain(capsys, *tokens) -> tuple[int, str]:
    """Exit code and standard error."""
    with pytest.raises(SystemExit) as ended:
        spade3d.commands.pretrain([str(token) for token in tokens])
    return ended.value.code, capsys.readouterr().err


def test_who_has_taught_a_pretraining_does_not_become_its_judge(phantoms, tmp_path, capsys):
    data, run = shutil.copytree(phantoms, tmp_path / "data"), tmp_path / "run"
    images, aside = data / "RawData" / "Training", tmp_path / "aside"
    store = prepared(data, tmp_path / "store").path
    begun = [store, "--out", run, *SPADE]
    assert pretrain(capsys, *begun)[0] == 0
    before = {name: (run / name).read_bytes() for name in ("provenance.json", "encoder.safetensors", BEGAN_WITH)}
    assert [case["name"] for case in json.loads(before["provenance.json"])["held_out"]] == ["img0002"]

    shutil.copytree(images, aside)
    (images / "img" / "img0002.nii.gz").unlink()
    (images / "label" / "label0002.nii.gz").unlink()
    prepared(data, store)
    code, said = pretrain(capsys, *begun, "--resume")
    assert code == 3 and "removed: img0002; on the other side: img0003 (held out now, training before)" in said
    (run / BEGAN_WITH).unlink()
    assert pretrain(capsys, *begun, "--resume")[0] == 3, "by its provenance alone"
    assert (run / "provenance.json").read_bytes() == before["provenance.json"]

    shutil.copytree(aside, images, dirs_exist_ok=True)  # as it was, but for other labels, of which it uses none
    relabelled(images / "label" / "label0001.nii.gz")
    prepared(data, store)
    (run / BEGAN_WITH).write_bytes(before[BEGAN_WITH])
    assert pretrain(capsys, *begun, "--resume")[0] == 0
    assert {name: (run / name).read_bytes() for name in before} == before

    for kind in ("img", "label"):
        shutil.copy(aside / kind / f"{kind}0001.nii.gz", images / kind / f"{kind}0005.nii.gz")
    prepared(data, store)
    code, said = pretrain(capsys, *begun, "--resume")
    assert code == 3 and "added: img0005" in said and "body_frames" not in said


def test_a_run_is_preempted_before_its_first_step_and_a_resumed_one_that_fails_is_not(
    store, tmp_path, monkeypatch, capsys
):
    """A requeue script asks for the file `preempted` alone: it would start a run that cannot go on again and again."""
    run, real = tmp_path / "run", spade3d.commands.announce
    begun = [shutil.copytree(store.path, tmp_path / "store"), "--out", run, *SPADE]
    monkeypatch.setattr(spade3d.commands, "announce", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    code, said = pretrain(capsys, *begun)
    assert code == 75 and "stopped by SIGTERM" in said and (run / "preempted").exists()
    monkeypatch.setattr(spade3d.commands, "announce", real)
    (tmp_path / "store").rename(tmp_path / "gone")
    assert pretrain(capsys, "--out", run, "--resume")[0] == 3
    assert not (run / "preempted").exists()
    (tmp_path / "gone").rename(tmp_path / "store")
    assert pretrain(capsys, "--out", run, "--resume")[0] == 0


def test_a_run_that_is_preempted_while_it_prepares_is_begun_again_and_prepares_the_rest(
    phantoms, tmp_path, monkeypatch, capsys
):
    run = tmp_path / "run"
    begun = [phantoms, "--out", run, *SPADE]

    def prepared_and_stopped(*given, **how):
        prepare(*given, **how)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(spade3d.volumes.prepare, "prepare", prepared_and_stopped)
    code, said = pretrain(capsys, *begun)
    assert code == 75 and "stopped by SIGTERM, and what is finished is kept; run the same command again" in said
    assert (run / "preempted").exists() and not (run / "config.yaml").exists()
    assert pretrain(capsys, *begun, "--resume")[0] == 3
    monkeypatch.setattr(spade3d.volumes.prepare, "prepare", prepare)
    there = {path: path.stat().st_mtime_ns for path in run.rglob("*.b2nd")}
    code, said = pretrain(capsys, *begun)
    assert code == 0, said
    assert there and {path: path.stat().st_mtime_ns for path in run.rglob("*.b2nd")} == there
    assert not (run / "preempted").exists()


def test_a_signal_amid_a_scan_is_not_taken_for_a_fault_of_the_scan(phantoms, tmp_path, monkeypatch, capsys):
    read = spade3d.volumes.prepare.read_volume

    def stopped(path, **how):
        os.kill(os.getpid(), signal.SIGTERM)
        return read(path, **how)

    monkeypatch.setattr(spade3d.volumes.prepare, "read_volume", stopped)
    code, said = pretrain(capsys, phantoms, "--out", tmp_path / "run", *SPADE)
    assert code == 75 and "left out" not in said


def relabelled(path: Path) -> None:
    """Half of the scan loses its labels."""
    labels = read_labels(path)
    other = labels.voxels.copy()
    other[: other.shape[0] // 2] = 0
    write_volume(path, other, labels.affine)


def test_labels_that_guide_heads_are_those_of_the_beginning(phantoms, tmp_path, capsys):
    data, run = shutil.copytree(phantoms, tmp_path / "data"), tmp_path / "run"
    begun = [prepared(data, tmp_path / "store").path, "--out", run, *GUIDED]
    code, said = pretrain(capsys, *begun)
    assert code == 0, said
    assert pretrain(capsys, *begun, "--resume")[0] == 0
    relabelled(data / "RawData" / "Training" / "label" / "label0001.nii.gz")
    prepared(data, tmp_path / "store")
    code, said = pretrain(capsys, *begun, "--resume")
    assert code == 3 and "(changed: img0001 (its labels))" in said
