"""Phantoms with planted findings: in their organ, told by its look alone, known by tables, and by no label."""

import csv
from functools import cache

import numpy as np
import pytest
from scipy import ndimage

from spade3d.faults import DataFault, UsageFault
from spade3d.volumes.findings import DISTRACTORS, FINDINGS, Planting, box_mm, plant, truth_folder
from spade3d.volumes.geometry import apply_affine
from spade3d.volumes.layouts import read_layout
from spade3d.volumes.organs import BTCV
from spade3d.volumes.phantoms import main, phantom, write_dataset
from spade3d.volumes.volume import read_labels, read_volume

SIZE = {"shape": (60, 52, 44), "spacing": (6.0, 6.0, 6.0)}
VALUE = {name: value for value, name in BTCV.items()}
ALWAYS = Planting(share=1.0, distractors=1.0)


@cache
def patient(seed: int, planting: Planting | None = ALWAYS):
    return phantom("abdomen-ct", seed, findings=planting, **SIZE)


def rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_kind_is_planted_in_one_of_its_organs_and_keeps_clear_of_the_others():
    one = patient(3)
    assert {lump.kind for lump in one.lumps} >= {*FINDINGS, *DISTRACTORS[:1]}
    taken = np.zeros(one.labels.shape, bool)
    for lump in one.lumps:
        assert lump.mask.any() and lump.organ in lump.kind.organs
        assert np.unique(one.labels[lump.mask]).tolist() == [VALUE[lump.organ]]
        assert ndimage.label(lump.mask)[1] == 1 and not (lump.mask & taken).any()
        taken |= ndimage.binary_dilation(lump.mask)


def test_without_findings_and_elsewhere_it_is_the_same_patient():
    healthy, having = patient(3, Planting(0.0, 0.0)), patient(3)
    assert healthy.lumps == () and np.array_equal(healthy.labels, having.labels)
    assert np.array_equal(phantom("abdomen-ct", 3, **SIZE).labels, having.labels)
    lumps = np.any([lump.mask for lump in having.lumps], axis=0)
    far = ~ndimage.binary_dilation(lumps, np.ones((3, 3, 3)), iterations=2)  # beyond the scanner's blur
    assert np.array_equal(healthy.voxels[far], having.voxels[far])
    assert np.array_equal(having.voxels, phantom("abdomen-ct", 3, findings=ALWAYS, **SIZE).voxels)


def test_a_patient_is_healed_of_what_would_look_like_a_finding():
    # Cysts and tumours make some livers uneven; a healed one has the scanner's noise and texture alone.
    uneven = {True: [], False: []}
    for seed in (0, 4):
        plain, healed = phantom("abdomen-ct", seed, **SIZE), patient(seed, Planting(0.0, 0.0))
        assert np.array_equal(plain.labels, healed.labels)
        assert 0 < np.mean(plain.voxels != healed.voxels) < 0.01 or np.array_equal(plain.voxels, healed.voxels)
        within = ndimage.binary_erosion(plain.labels == VALUE["liver"], iterations=3)
        for having, one in ((True, plain), (False, healed)):
            uneven[having].append(float(np.ptp(ndimage.gaussian_filter(one.voxels.astype(float), 1)[within])))
    assert max(uneven[False]) < 60 < max(uneven[True])


def test_dark_is_darker_bright_is_brighter_and_striped_is_neither():
    gained, spread = {"dark": [], "bright": [], "striped": []}, []
    for seed in (0, 3):
        healthy, having = patient(seed, Planting(0.0, 0.0)), patient(seed)
        for lump in having.lumps:
            change = having.voxels[lump.mask].astype(float) - healthy.voxels[lump.mask]
            gained[lump.kind.look].append(change.mean())
            if lump.kind.look == "striped":
                spread.append(change.std())
    assert max(gained["dark"]) < -30 and min(gained["bright"]) > 30
    assert np.abs(gained["striped"]).max() < 4 and min(spread) > 15


def test_each_finding_is_there_by_its_own_chance():
    affine, labels = np.diag([6.0, 6.0, 6.0, 1.0]), np.zeros((56, 14, 14), np.uint16)
    for n, organ in enumerate(("liver", "spleen", "right kidney", "left kidney")):  # roomy, so that none is in the way
        labels[14 * n + 1 : 14 * n + 14, 1:13, 1:13] = VALUE[organ]
    planting = Planting(radius_mm=(10.0, 14.0))
    present = np.zeros((150, len(planting.kinds)))
    for n in range(len(present)):
        for lump in plant(planting, labels, affine, 1000 + n)[0]:
            present[n, planting.kinds.index(lump.kind)] = 1
    share = present.mean(axis=0)
    assert (share > 0.28).all() and (share < 0.52).all()
    together = np.corrcoef(present.T)
    assert np.abs(together - np.eye(len(share))).max() < 0.3  # 3.7 standard errors


def test_one_kind_is_drawn_in_the_same_way_whatever_the_share_of_the_others():
    affine, labels = patient(0).affine, patient(0).labels
    alone = [Planting(share=1.0, distractors=0.0, kinds=(FINDINGS[0], *FINDINGS[2:])), Planting(1.0, 0.0)]
    first, second = (plant(one, labels, affine, 9)[0][0] for one in alone)
    assert np.array_equal(first.mask, second.mask) and first.contrast_hu == second.contrast_hu


def test_a_box_holds_its_voxels_to_their_faces():
    affine = np.diag([2.0, 3.0, 4.0, 1.0])
    affine[:3, 3] = 10, 20, 30
    mask = np.zeros((6, 6, 6), bool)
    mask[1:3, 2, 3:5] = True
    assert box_mm(mask, affine).tolist() == [[11, 24.5, 40], [15, 27.5, 48]]
    assert box_mm(mask[::-1], affine @ [[-1, 0, 0, 5], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]).tolist() == [
        [11, 24.5, 40],
        [15, 27.5, 48],
    ]


def test_a_data_set_reads_back_and_its_labels_know_nothing_of_findings(tmp_path):
    out = tmp_path / "x"
    size = ["--size", "48", "44", "36", "--spacing", "7", "7", "7", "--out", str(out)]
    given = ["--kind", "abdomen-ct", "--patients", "2", "--unlabelled", "1", "--findings", "--share", "0.7", *size]
    assert main(given) == 0
    data = read_layout(out)
    assert data.layout == "BTCV" and data.label_names == BTCV
    assert [(case.subject, case.labels is None) for case in data.cases] == [
        ("img0001", False),
        ("img0002", False),
        ("img0061", True),
    ]
    said = {row["subject"]: row for row in rows(out / "findings.csv")}
    names = [kind.name for kind in FINDINGS]
    assert list(said) == [case.subject for case in data.cases] and list(said["img0001"]) == ["subject", *names]
    boxes = rows(out / "boxes.csv")
    assert {(row["subject"], row["finding"]) for row in boxes} == {
        (who, name) for who, row in said.items() for name in names if row[name] == "1"
    }
    planted = rows(truth_folder(out) / "planted.csv")
    assert {row["kind"] for row in planted if row["finding"] == "0"} <= {kind.name for kind in DISTRACTORS}
    for case in data.cases:
        mask = read_labels(truth_folder(out) / "masks" / f"{case.subject}.nii.gz")
        assert np.allclose(mask.affine, read_volume(case.image).affine)
        assert {names[value - 1] for value in np.unique(mask.voxels) if value} == {
            name for name in names if said[case.subject][name] == "1"
        }
        for row in (row for row in boxes if row["subject"] == case.subject):
            low, high = (np.array([float(row[f"{axis}{end}"]) for axis in "xyz"]) for end in (0, 1))
            centres = apply_affine(mask.affine, np.argwhere(mask.voxels == 1 + names.index(row["finding"])))
            half = np.diag(mask.affine)[:3] / 2
            assert np.allclose(centres.min(axis=0) - half, low, atol=1e-2)
            assert np.allclose(centres.max(axis=0) + half, high, atol=1e-2)
        if case.labels is not None:
            labels = read_labels(case.labels).voxels
            assert set(np.unique(labels).tolist()) - {0} <= set(BTCV)
            assert np.isin(labels[mask.voxels > 0], [VALUE["liver"], VALUE["spleen"]]).all()


def test_what_cannot_be_planted_is_refused(tmp_path, capsys):
    with pytest.raises(UsageFault, match=r"share of 1.5 .* 0 to 1"):
        Planting(share=1.5)
    with pytest.raises(UsageFault, match="radius 20 to 10"):
        Planting(radius_mm=(20.0, 10.0))
    with pytest.raises(UsageFault, match="not in heart-ct"):
        write_dataset("heart-ct", tmp_path / "x", patients=1, findings=Planting())
    truth_folder(tmp_path / "y").mkdir()
    with pytest.raises(DataFault, match=r"y.truth: is there already"):
        write_dataset("abdomen-ct", tmp_path / "y", patients=1, findings=Planting())
    both = ["--kind", "abdomen-ct", "--patients", "1", "--out", str(tmp_path / "z"), "--lesions", "--findings"]
    with pytest.raises(SystemExit):
        main(both)
    assert "--lesions and --findings at once" in capsys.readouterr().err


def test_an_organ_that_is_absent_or_too_small_has_no_finding():
    labels = np.zeros((20, 20, 20), np.uint16)
    affine = np.diag([6.0, 6.0, 6.0, 1.0])
    assert plant(ALWAYS, labels, affine, 0)[0] == ()
    labels[8:10, 8:10, 8:10] = VALUE["liver"]  # 12 mm: an ellipsoid of 28 mm and more does not fit
    lumps, added = plant(ALWAYS, labels, affine, 0)
    assert lumps == () and not added.any()
