"""CLARiTy's settings: which pieces a head is built with, where findings may be, and what a teacher is shown."""

import pickle
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dagman.downstream.allowed import Where
from dagman.downstream.class_tokens import ClassTokens
from dagman.downstream.studies import Findings, Study
from dagman.downstream.token_grids import body_crop, cells_of
from dagman.recipes.clarity_settings import (
    ClaritySettings,
    FindingPrior,
    TeacherSettings,
    check_clarity,
    chosen_teacher,
    finding_prior,
    note_of_teacher,
    taught_by_cnn,
    where_of,
)
from spade3d.configuration import Data, read_yaml, resolve, to_yaml
from spade3d.crops.crop import cut_labels
from spade3d.faults import DataFault, UsageFault
from spade3d.scans import open_scans
from spade3d.volumes.phantoms import write_dataset
from spade3d.volumes.volume import write_volume

FINDINGS = ("dark_liver", "dark_kidney", "anything")
TABLE = {"dark_liver": {"organs": ["liver"]}, "dark_kidney": {"organs": ["kidney"], "margin_mm": 5.0}}
ALL = (0, 1, 2)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("abdomens")
    size = {"shape": (40, 36, 32), "spacing": (8.0, 8.0, 8.0)}
    write_dataset("abdomen-ct", folder / "scans", patients=3, seed=1, **size)
    return open_scans(folder / "scans", folder / "store", Data())


def settings_of(**given):
    return resolve(ClaritySettings, [], given, environment={})


def with_prior(source="atlas", **more):
    return settings_of(prior={"source": source, "table": TABLE, "frame": "box", **more})


def test_each_piece_is_an_argument_of_the_head():
    def parts(settings):
        head = ClassTokens(5, 3, **settings.head(FINDINGS))
        cells = torch.ones(1, 2, 2, 2, dtype=torch.bool)
        return set(head(torch.randn(1, 5, 2, 2, 2), torch.rand(1, 3, 2, 2, 2), cells).parts)

    tokens, maps = {"token_logits", "class_tokens", "attention"}, {"class_maps", "patch_logits"}
    small = {"dim": 12, "heads": 2, "width": 8}
    assert parts(settings_of(**small)) == tokens | maps | {"pooled_logits"}
    assert parts(settings_of(**small, attention_pooling=False, segment_cam=False)) == tokens
    told = {"prior": {"source": "bands", "table": TABLE}}
    assert "foreground" in parts(settings_of(**small, **told))
    assert "foreground" not in parts(settings_of(**small, **told, foreground_weight=0))  # nothing would teach it


def test_findings_of_the_same_organs_share_a_foreground():
    assert with_prior().head(FINDINGS)["groups"] == (0, 1, None)
    assert settings_of().head(FINDINGS)["groups"] == ()


def test_the_weights_are_those_of_the_settings():
    weights = settings_of(orthogonal_weight=2.0, teacher_weight=0.5, teacher={"temperature": 3.0}).weights()
    assert (weights.orthogonal, weights.teacher, weights.temperature) == (2.0, 0.5, 3.0)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"prior": {"source": "atlas"}}, "needs a source and a table"),
        ({"prior": {"table": TABLE}}, "needs a source and a table"),
        ({"prior": {"source": "files", "table": TABLE}}, "folder is where the files"),
        ({"dim": 100, "heads": 3}, "3 heads cannot share 100 channels"),
        ({"width": 20}, "multiple of 8"),
        ({"teacher": {"shape": (32, 24, 32)}}, "each side has 32 voxels or more"),
        ({"prior": {"source": "atlas", "table": {"a": {"organ": ["liver"]}}}}, "organ"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(given, said):
    with pytest.raises(UsageFault, match=said):
        settings_of(**given)


def test_a_flag_names_organs_in_one_word():
    table = {"anything": {"organs": "liver, left kidney"}}
    assert settings_of(prior={"source": "bands", "table": table}).prior.table["anything"].organs == (
        "liver",
        "left kidney",
    )


def test_organs_and_folds_that_there_are_not_are_refused_at_once(store):
    studies = tuple(Study(case.name, case.name, "training", (1.0, 0.0, 0.0)) for case in store.cases)
    findings = Findings(FINDINGS, studies, ())
    check_clarity(with_prior(), store, findings, ALL)
    brain = {"prior": {"source": "atlas", "table": {"anything": {"organs": ["brain"]}}}}
    for given, said in ((brain, "'brain'"), ({"teacher_weight": 1.0, "teacher": {"folds": 4}}, "4 folds")):
        with pytest.raises(UsageFault, match=said):
            check_clarity(settings_of(**given), store, findings, ALL)


@pytest.mark.parametrize(
    ("source", "right", "there"),
    [
        ("bands", "soft tissue", "lung, fat, soft tissue, bone"),
        ("mean_image", "brightness 2 of 4", "brightness 1 of 4, brightness 2 of 4, "),
        ("files", "kidney", "kidney left, liver"),
    ],
)
def test_a_region_that_a_source_without_labels_does_not_have_is_refused_at_once(source, right, there, store, tmp_path):
    """Its scans are not even there to be read: names and modality are all that is asked for."""
    known = SimpleNamespace(cases=store.cases)
    studies = tuple(Study(case.name, case.name, "training", (1.0, 0.0, 0.0)) for case in store.cases)
    findings = Findings(FINDINGS, studies, ())
    folder = tmp_path / store.cases[1].name
    folder.mkdir()
    for name in ("liver", "kidney_left"):
        write_volume(folder / f"{name}.nii.gz", np.zeros(store.cases[1].shape, np.uint8), store.cases[1].affine)
    more = {"folder": str(tmp_path)} if source == "files" else {}

    def check(organ):
        table = {"anything": {"organs": [organ]}}
        check_clarity(settings_of(prior={"source": source, "table": table, **more}), known, findings, ALL)

    check(right)
    with pytest.raises(UsageFault, match=f"a finding in 'brain': there is no prior for it; there are {there}"):
        check("brain")


def test_files_of_other_values_are_refused_at_once(store, tmp_path):
    case = store.cases[0]
    (tmp_path / case.name).mkdir(parents=True)
    for organ, value in (("liver", 1), ("kidney", np.nan)):
        voxels = np.full(case.shape, value, dtype=np.float32)
        write_volume(tmp_path / case.name / f"{organ}.nii.gz", voxels, case.affine)
    studies = tuple(Study(case.name, case.name, "training", (1.0, 0.0, 0.0)) for case in store.cases)
    with pytest.raises(DataFault, match=r"kidney.nii.gz: \d+ of \d+ voxels for kidney are NaN or Inf, the first at"):
        check_clarity(with_prior("files", folder=str(tmp_path)), store, Findings(FINDINGS, studies, ()), ALL)


def test_a_tree_with_a_table_is_written_and_read_back(tmp_path):
    settings = with_prior(labelled=2)
    (tmp_path / "config.yaml").write_text(to_yaml(settings))
    assert resolve(ClaritySettings, [], read_yaml(tmp_path / "config.yaml"), environment={}) == settings


def test_the_table_follows_the_order_of_the_findings_and_knows_no_others():
    assert where_of(with_prior().prior, FINDINGS) == [Where(("liver",)), Where(("kidney",), 5.0), Where()]
    with pytest.raises(UsageFault, match="dark_kidney.*no such finding; there are dark_liver"):
        where_of(with_prior().prior, ("dark_liver",))


@pytest.mark.parametrize(("source", "covered"), [("atlas", 0.6), ("one_label", 0.4)])
def test_an_atlas_allows_much_of_the_organ_and_little_beside_it(store, source, covered, capsys):
    prior = finding_prior(with_prior(source).prior, store, FINDINGS, ALL, ALL)
    assert "sought by" in (said := capsys.readouterr().err) and "may be anywhere" in said and "anything" in said
    cells = cells_of(body_crop(2, store.cases[2], (4.0, 4.0, 4.0)))
    liver, kidney, anything = pickle.loads(pickle.dumps(prior))(cells)  # as processes that make batches are sent it
    labels = cut_labels(store, cells)
    value_of = {name: value for value, name in store.label_names.items()}
    assert liver[labels == value_of["liver"]].mean() > covered and 0.05 < liver.mean() < 0.15
    assert 0 < kidney.mean() < 0.05
    near = [np.abs(np.argwhere(kidney) - at).max(axis=1).min() for at in np.argwhere(labels == value_of["left kidney"])]
    assert max(near) <= 2  # cells: another patient's kidney
    assert (anything == 1).all()


class Holding:
    """A store whose cases are said to hold other labels than they do."""

    def __init__(self, store, held):
        self.store = store
        self.cases = tuple(replace(case, label_values=values) for case, values in zip(store.cases, held, strict=True))

    def __getattr__(self, name):
        return getattr(self.store, name)


def test_the_scan_that_holds_most_of_the_organs_makes_the_prior_and_what_it_lacks_is_left_out(store, capsys):
    """Of liver (6), right (2) and left kidney (3) the second scan holds two, the others one."""
    finding_prior(with_prior("one_label").prior, Holding(store, [(6,), (3, 6), (2,)]), FINDINGS, ALL, ALL)
    assert f"one labelled scan, {store.cases[1].name}" in capsys.readouterr().err
    with pytest.raises(UsageFault, match="'kidney'"):
        finding_prior(with_prior("one_label").prior, Holding(store, [(6,), (1,), (1,)]), FINDINGS, ALL, ALL)


def test_without_a_source_nothing_is_known():
    assert finding_prior(FindingPrior(), None, FINDINGS, ALL, ALL) is None


def test_files_of_each_scan_are_a_prior_and_scans_without_files_are_free(store, tmp_path):
    case = store.cases[0]
    (tmp_path / case.name).mkdir(parents=True)
    for name, value in (("liver", 6), ("kidney_left", 3), ("not_asked_for", 1)):
        mask = (store.labels(0) == value).astype(np.uint8)
        write_volume(tmp_path / case.name / f"{name}.nii.gz", mask, case.affine)
    prior = finding_prior(with_prior("files", folder=str(tmp_path)).prior, store, FINDINGS, ALL, ALL)
    liver, kidney, _ = prior(cells_of(body_crop(0, case, (4.0, 4.0, 4.0))))
    labels = cut_labels(store, cells_of(body_crop(0, case, (4.0, 4.0, 4.0))))
    assert (labels[liver == 1] == 6).all() and (labels[kidney == 1] == 3).all() and liver.sum() > 3 and kidney.any()
    assert (prior(cells_of(body_crop(1, store.cases[1], (4.0, 4.0, 4.0)))) == 1).all()
    with pytest.raises(DataFault, match="no priors of these scans there"):
        finding_prior(with_prior("files", folder=str(tmp_path / "nowhere")).prior, store, FINDINGS, ALL, ALL)


def test_an_organ_that_no_label_has_is_refused(store):
    wrong = resolve(FindingPrior, [], {"source": "atlas", "table": {"anything": {"organs": ["brain"]}}}, environment={})
    with pytest.raises(UsageFault, match="'brain'.*there is no prior for it"):
        finding_prior(wrong, store, FINDINGS, ALL, ALL)


def test_a_teacher_is_shown_whole_bodies_and_nothing_is_left_open(store):
    chosen = chosen_teacher(TeacherSettings(), store, ALL, "cpu")
    assert None not in chosen.model_dump().values() and (chosen.growth, chosen.steps) == (8, 200)
    body = max(np.ptp(store.cases[i].body_box_mm, axis=0).max() for i in ALL)
    assert max(chosen.shape) * chosen.mm >= body and all(side >= 32 and side % 8 == 0 for side in chosen.shape)
    assert chosen_teacher(chosen, store, ALL, "cpu") == chosen


def test_no_teacher_is_trained_that_has_no_weight_and_one_that_has_gives_a_logit_a_finding(store, tmp_path):
    names = [case.name for case in store.cases]
    studies = tuple(Study(name, name, "training", (1.0, float(n % 2), 0.0)) for n, name in enumerate(names))
    findings, how = Findings(FINDINGS, studies, ()), {"out": tmp_path / "teacher", "device": torch.device("cpu")}
    assert taught_by_cnn(settings_of(), store, findings, ALL, seed=0, **how) is None
    assert not (tmp_path / "teacher").exists()
    few = {"teacher": {"folds": 1, "steps": 1, "batch": 2, "shape": (32, 32, 32)}, "teacher_weight": 0.5}
    taught = taught_by_cnn(settings_of(**few), store, findings, ALL, seed=0, **how)
    assert note_of_teacher(settings_of(**few), findings, ALL, taught) == ""  # each has seen every study
    assert sorted(taught) == sorted(names) and all(np.isfinite(row).all() and len(row) == 3 for row in taught.values())


@pytest.mark.parametrize(
    ("right", "said"),
    [(1.0, "AUROC of 1.00"), (0.0, "AUROC of 0.50 (mean), hardly above chance.*--clarity.teacher_weight 0")],
)
def test_a_teacher_that_knows_nothing_of_studies_it_has_not_seen_is_named(right, said):
    """One finding is told with AUROC 1, or 0; the other one always; the third is in every study."""
    labels = [(float(n % 2), float(n < 3), 1.0) for n in range(6)]
    studies = tuple(Study(str(n), str(n), "training", row) for n, row in enumerate(labels))
    findings = Findings(FINDINGS, studies, ())
    taught = {str(n): np.array([a if right else 1 - a, b, 0.0]) for n, (a, b, _) in enumerate(labels)}
    note = note_of_teacher(settings_of(teacher={"folds": 3}), findings, range(6), taught)
    assert re.search(said.replace("(mean)", r"\(mean\)"), note)
    assert ("hardly" in note) == (right == 0)
    assert note_of_teacher(settings_of(), findings, range(6), None) == ""
