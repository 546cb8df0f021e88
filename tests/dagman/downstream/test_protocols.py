"""Protocols: the very subjects that the sources name teach and judge, nobody is missing in silence, and each says of
itself what it fixes and where a run leaves it."""

import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.model_selection import KFold

from dagman.downstream.named_splits import nnunet_fold
from dagman.downstream.protocols import PROTOCOLS, deviations
from dagman.recipes.finetuning import FinetuneSettings
from spade3d.commands import whom_to_hold_out
from spade3d.configuration import Pretraining, known_keys, with_values
from spade3d.faults import DataFault, UsageFault
from spade3d.volumes import phantoms
from spade3d.volumes.layouts import read_layout
from spade3d.volumes.split import split_cases

BTCV = [*range(1, 11), *range(21, 41)]


def scans(names, part="training", labels=True):
    return [SimpleNamespace(name=name, subject=name, part=part, has_labels=labels) for name in names]


def btcv(numbers=BTCV):
    return scans([f"img{n:04d}" for n in numbers])


def mmwhs(kind, numbers=range(1001, 1021)):
    return scans([f"{kind}_train_{n}" for n in numbers])


def amos(train=200, validation=100, mr=20):
    ids = iter(range(1, 501))
    cases = scans([f"amos_{next(ids):04d}" for _ in range(train)])
    cases += scans([f"amos_{next(ids):04d}" for _ in range(validation)], "validation")
    return [*cases, *scans([f"amos_{507 + n:04d}" for n in range(mr)], "validation" if mr % 2 else "training")]


def numbers(cases, indices):
    return [int(cases[i].name[-4:]) for i in indices]


def split(name, cases, fold=0, folds=5):
    return PROTOCOLS[name].split(cases, folds, fold)


# --- who teaches, who judges ---------------------------------------------------------------------------------------


def test_btcv_24_6_is_the_split_of_monai():
    """dataset_0.json of research-contributions/SwinUNETR/BTCV, whatever the order of the cases and whoever else lies
    there without labels."""
    cases = [*reversed(btcv()), *scans([f"img{n:04d}" for n in range(61, 81)], "test", labels=False)]
    found = split("btcv-24-6", cases)
    assert sorted(numbers(cases, found.train)) == [*range(1, 11), *range(21, 35)]
    assert sorted(numbers(cases, found.validation)) == [35, 36, 37, 38, 39, 40]
    assert found.rule == "BTCV 0001-0010, 0021-0034 teach (24), 0035-0040 judge (6)"


@pytest.mark.parametrize(
    ("name", "kind", "judges"),
    [("mmwhs-ct-lsm", "ct", range(1001, 1005)), ("mmwhs-mr-lsm", "mr", range(1016, 1021))],
)
def test_mmwhs_splits_are_those_of_large_scale_medical(name, kind, judges):
    """And the other modality, which a download holds in the same folder, is in neither."""
    cases = [*mmwhs("mr"), *mmwhs("ct")]
    found = split(name, cases)
    assert numbers(cases, found.validation) == list(judges)
    assert numbers(cases, found.train) == [n for n in range(1001, 1021) if n not in judges]
    assert {cases[i].name[:2] for i in (*found.train, *found.validation)} == {kind}


@pytest.mark.parametrize(("name", "cases", "size"), [("btcv-5fold", btcv(), 6), ("mmwhs-5fold", mmwhs("mr"), 4)])
def test_each_subject_judges_once_in_five_folds_as_scikit_learn_draws_them(name, cases, size):
    found = [split(name, cases, fold) for fold in range(5)]
    assert [len(one.validation) for one in found] == [size] * 5
    assert all(set(one.train) | set(one.validation) == set(range(len(cases))) for one in found)
    assert all(not set(one.train) & set(one.validation) for one in found)
    slow = [list(judges) for _, judges in KFold(5, shuffle=True, random_state=12345).split(cases)]
    assert [sorted(one.validation) for one in found] == slow


def test_the_first_fold_of_btcv_is_this_one():
    """As nnU-Net v2 writes it into splits_final.json where the case names sort by number."""
    cases = btcv()
    assert numbers(cases, split("btcv-5fold", cases).validation) == [4, 9, 23, 26, 29, 37]


def test_folds_of_one_modality_pass_by_the_other():
    cases = [*mmwhs("ct"), *mmwhs("mr")]
    for kind, first in (("ct", 0), ("mr", 20)):
        found, alone = split(f"mmwhs-5fold-{kind}", cases, fold=2), split("mmwhs-5fold", mmwhs(kind), fold=2)
        assert found.train == tuple(first + i for i in alone.train)
        assert found.validation == tuple(first + i for i in alone.validation)


@pytest.mark.parametrize("count", [7, 20, 33])
def test_folds_of_any_number_of_names_are_those_of_nnunet(count):
    names = [f"case {n:02d}" for n in range(count)]
    slow = [set(judges) for _, judges in KFold(5, shuffle=True, random_state=12345).split(names)]
    shuffled = list(np.random.default_rng(0).permutation(names))
    assert [{names.index(name) for name in nnunet_fold(shuffled, 5, fold)} for fold in range(5)] == slow


@pytest.mark.parametrize("mr", [0, 20, 21])
def test_amos_ct_takes_the_parts_as_they_are_and_no_mr(mr):
    cases = amos(mr=mr)
    found = split("amos-ct", cases)
    assert numbers(cases, found.train) == list(range(1, 201))
    assert numbers(cases, found.validation) == list(range(201, 301))


def test_msd_takes_a_labelled_validation_part_else_the_folds_of_nnunet():
    named = [*scans("abcd"), *scans("ef", "validation"), *scans("g", "test", labels=False)]
    assert split("msd", named) == split_cases(named, 5, 0)
    assert split("msd", named).validation == (4, 5)
    for name in ("msd", "holdout", "few-shot"):
        with pytest.raises(UsageFault, match="fold 3 asked for, but the dataset's own validation part judges"):
            split(name, named, 3)
    plain = [*scans("abcdefghij"), *scans("k", "test", labels=False)]
    found = [split("msd", plain, fold) for fold in range(5)]
    slow = [tuple(judges) for _, judges in KFold(5, shuffle=True, random_state=12345).split("abcdefghij")]
    assert [one.validation for one in found] == slow
    assert all(10 not in (*one.train, *one.validation) for one in found)
    assert "fold 1 of 5 as nnU-Net draws them, 2 of 10 labelled subjects judge" in found[1].rule
    few = scans("abc")
    assert "fold 0 of 3" in split("msd", few).rule and len(split("msd", few).validation) == 1


@pytest.mark.parametrize("name", ["holdout", "few-shot"])
def test_without_a_published_split_it_is_that_of_the_toolkit(name):
    cases = scans("abcdefg")
    assert split(name, cases, 2) == split_cases(cases, 5, 2)


# --- a part of the data is not the protocol ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "cases", "said"),
    [
        ("btcv-24-6", btcv([n for n in BTCV if n not in (1, 2, 3, 38)]), "no labelled scan of BTCV 0001-0003, 0038"),
        ("btcv-24-6", btcv(range(1, 7)), "(6 of 30 subjects are there)"),
        ("btcv-5fold", btcv(BTCV[:-1]), "no labelled scan of BTCV 0040 (29 of 30"),
        ("btcv-24-6", mmwhs("ct"), "named as BTCV names them (20 scans: ct_train_1001, ct_train_1002"),
        ("btcv-24-6", [], "(0 scans: none at all)"),
        ("btcv-24-6", scans(["a_img0001", "b_img0001"]), "a_img0001 and b_img0001 are both number 0001 of BTCV"),
        ("mmwhs-ct-lsm", mmwhs("ct", range(1002, 1021)), "MM-WHS CT 1001 (19 of 20"),
        ("mmwhs-mr-lsm", mmwhs("ct"), "named as MM-WHS MR names them"),
        ("mmwhs-5fold", [*mmwhs("ct"), *mmwhs("mr")], "say mmwhs-5fold-ct or mmwhs-5fold-mr"),
        ("mmwhs-5fold", mmwhs("mr", range(1001, 1020)), "MM-WHS MR 1020"),
        ("mmwhs-5fold", scans("ab"), "named as MM-WHS CT names them"),
        ("amos-ct", amos(200, 99), "99 of 100 in the validation part"),
        ("amos-ct", amos(3, 2), "3 of 200 in the training part, 2 of 100 in the validation part"),
    ],
)
def test_missing_subjects_are_named(name, cases, said):
    with pytest.raises(DataFault) as fault:
        split(name, cases)
    assert str(fault.value).startswith(f"{name}: ") and said in str(fault.value)


def test_a_scan_without_labels_is_missing():
    cases = btcv()
    cases[0].has_labels = False
    with pytest.raises(DataFault, match="BTCV 0001 .29 of 30"):
        split("btcv-24-6", cases)


@pytest.mark.parametrize(
    ("name", "cases", "fold", "folds", "said"),
    [
        ("btcv-24-6", btcv(), 1, 5, "one split, and no fold 1"),
        ("amos-ct", amos(), 4, 5, "one split"),
        ("btcv-5fold", btcv(), 5, 5, "fold 5 of 5 over 30 subjects"),
        ("mmwhs-5fold", mmwhs("ct"), 0, 21, "fold 0 of 21 over 20 subjects"),
        ("msd", scans("abc"), 4, 5, "fold 4 of 3"),
    ],
)
def test_a_fold_that_is_not_there_is_refused(name, cases, fold, folds, said):
    with pytest.raises(UsageFault, match=said):
        split(name, cases, fold, folds)


# --- what a protocol says of itself --------------------------------------------------------------------------------


def test_the_protocols_are_these():
    named = "holdout few-shot btcv-24-6 btcv-5fold amos-ct mmwhs-ct-lsm mmwhs-mr-lsm mmwhs-5fold mmwhs-5fold-ct "
    named += "mmwhs-5fold-mr msd"
    assert " ".join(PROTOCOLS) == named


@pytest.mark.parametrize("name", PROTOCOLS)
def test_each_says_all_that_a_number_depends_on(name):
    said = PROTOCOLS[name].describe()
    assert said["name"] == name
    needed = "summary source spacing intensity crop split overlap background grid orientation layouts published_length"
    assert all(said[key] not in ("", None) for key in needed.split())
    assert said["background"] == "left out"  # 3DINO and MONAI's trainer count it; no number here does


def test_each_fixes_only_settings_that_a_run_has():
    for protocol in PROTOCOLS.values():
        assert set(protocol.settings) <= set(known_keys(FinetuneSettings))


@pytest.mark.parametrize(
    ("name", "spacing", "intensity", "side", "on_structures", "overlap", "grid"),
    [
        ("btcv-24-6", "1.5 x 1.5 x 2 mm", "CT -175..250 HU to 0..1", 96, 0.5, 0.5, "the input's own"),
        ("amos-ct", "1.5 x 1.5 x 1.5 mm", "CT -175..250 HU to 0..1", 96, 0.9, 0.75, "the prepared one"),
        ("mmwhs-ct-lsm", "1.5 x 1.5 x 1.5 mm", "CT 0..1700 HU to 0..1", 64, 0.9, 0.75, "the prepared one"),
        ("mmwhs-mr-lsm", "each scan's own", "MR z-score of the foreground", 96, 0.5, 0.75, "the input's own"),
    ],
)
def test_the_numbers_are_those_of_the_source(name, spacing, intensity, side, on_structures, overlap, grid):
    said = PROTOCOLS[name].describe()
    assert (said["spacing"], said["intensity"], said["crop"]) == (spacing, intensity, f"{side}x{side}x{side} voxels")
    assert (said["crops_on_structures"], said["overlap"], said["grid"]) == (on_structures, overlap, grid)
    assert said["crops_per_step"] == 4


def test_what_is_not_fixed_follows_the_data():
    said = PROTOCOLS["holdout"].describe()
    assert (said["spacing"], said["crop"], said["layouts"]) == (
        "median of the set, unless given",
        "follows the data",
        "any",
    )
    assert said["intensity"] == said["overlap"] == "as set"


def as_stated(name):
    return with_values(FinetuneSettings(), {"protocol": name, **PROTOCOLS[name].settings})


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_run_as_stated_leaves_nothing(name):
    assert deviations(as_stated(name), PROTOCOLS[name]) == []


def test_what_a_run_leaves_is_listed():
    run = with_values(
        as_stated("btcv-24-6"),
        {
            "crop.shape": (48, 48, 48),
            "data.spacing": (8.0, 8, 8),
            "data.window_hu": (-1000, 1000),
            "scoring.background": True,
            "optim.lr": 1.0,
        },
    )
    assert deviations(run, PROTOCOLS["btcv-24-6"]) == [
        "data.spacing 8x8x8 mm instead of 1.5x1.5x2 mm",
        "data.window_hu -1000..1000 instead of -175..250",
        "crop.shape 48x48x48 instead of 96x96x96",
        "scoring.background True instead of False",
    ]
    other = with_values(as_stated("mmwhs-mr-lsm"), {"data.spacing": (1, 1, 1), "crop.shape": None})
    assert deviations(other, PROTOCOLS["mmwhs-mr-lsm"]) == [
        "data.spacing 1x1x1 mm instead of native",
        "crop.shape left open instead of 96x96x96",
    ]


def test_the_table_of_the_docs_is_that_of_the_code():
    page = Path(__file__).parents[3] / "docs" / "protocols.md"
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in page.read_text(encoding="utf-8").splitlines()
        if line.startswith("| `")
    ]
    told = {row[0].strip("`"): row[1:] for row in rows}
    assert list(told) == list(PROTOCOLS)
    for name, row in told.items():
        said = PROTOCOLS[name].describe()
        keys = ("split", "spacing", "intensity", "crop", "crops_on_structures", "overlap", "grid")
        assert row == [re.sub(r" voxels$", "", str(said[key])) for key in keys]


# --- from the untouched folder -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "kind", "protocol", "patients", "teach", "judge"),
    [
        ("btcv", "abdomen-ct", "btcv-24-6", 30, 24, 6),
        ("btcv", "abdomen-ct", "btcv-5fold", 30, 24, 6),
        ("amos", "abdomen-ct", "amos-ct", 300, 200, 100),
        ("mmwhs", "heart-ct", "mmwhs-ct-lsm", 20, 16, 4),
        ("mmwhs", "heart-mr", "mmwhs-mr-lsm", 20, 15, 5),
        ("mmwhs", "heart-ct", "mmwhs-5fold", 20, 16, 4),
        ("msd", "heart-ct", "msd", 5, 4, 1),
    ],
)
def test_phantoms_in_the_layout_of_a_download_are_split_as_the_protocol_says(
    tmp_path, monkeypatch, layout, kind, protocol, patients, teach, judge
):
    one = phantoms.phantom(kind, 0, shape=(8, 8, 8), spacing=(40.0, 40.0, 40.0))
    monkeypatch.setattr(phantoms, "phantom", lambda *args, **settings: one)  # a split depends on names alone
    monkeypatch.setattr(phantoms, "write_volume", lambda path, *voxels: path.touch())
    phantoms.write_dataset(kind, tmp_path / "x", patients=patients, unlabelled=1, layout=layout)
    dataset = read_layout(tmp_path / "x")
    assert dataset.layout in PROTOCOLS[protocol].layouts
    cases = [
        SimpleNamespace(name=case.name, subject=case.subject, part=case.part, has_labels=case.labels is not None)
        for case in dataset.cases
    ]
    found = split(protocol, cases)
    assert (len(found.train), len(found.validation)) == (teach, judge)
    assert all(cases[i].has_labels for i in (*found.train, *found.validation))


def test_pretraining_holds_out_the_judges_of_a_protocol_or_those_of_a_file(tmp_path):
    case = partial(SimpleNamespace, part="", has_labels=True)
    names = [f"img{n:04d}" for n in (*range(1, 11), *range(21, 41))]
    store = SimpleNamespace(cases=tuple(case(name=name, subject=name) for name in names))
    split = whom_to_hold_out(Pretraining(protocol="btcv-24-6"), store)
    assert [store.cases[i].subject for i in split.validation] == [f"img{n:04d}" for n in range(35, 41)]
    (tmp_path / "judges.txt").write_text("img0001\nimg0002\n")
    split = whom_to_hold_out(Pretraining(hold_out=str(tmp_path / "judges.txt")), store)
    assert [store.cases[i].subject for i in split.validation] == ["img0001", "img0002"] and len(split.train) == 28
    with pytest.raises(UsageFault, match="protocol 'btcv' is not known; one of: amos-ct"):
        whom_to_hold_out(Pretraining(protocol="btcv"), store)


def test_a_protocol_is_for_the_layout_of_its_benchmark():
    PROTOCOLS["msd"].check_layout("MSD")
    PROTOCOLS["holdout"].check_layout("folder of scans")
    with pytest.raises(DataFault, match="msd is for MSD or nnU-Net v2 as downloaded, these are BTCV"):
        PROTOCOLS["msd"].check_layout("BTCV")
