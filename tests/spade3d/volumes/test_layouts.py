"""Layouts: tiny data sets written as they are published, and what must be read from them or refused."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spade3d.faults import DataFault
from spade3d.volumes import naming
from spade3d.volumes.layouts import Case, Dataset, canonical_organ, read_layout
from spade3d.volumes.organs import AMOS, BTCV, MM_WHS


def lay(root: Path, *names: str) -> Path:
    """Empty files at these paths: no voxel is read to recognise a layout."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def describe(root: Path, content: object, name: str = "dataset.json") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return root / name


def short(dataset: Dataset) -> list[tuple]:
    """(name, subject, labels' file name, modality, part) of each case."""

    def labels(case: Case):
        return case.labels.name if isinstance(case.labels, Path) else case.labels

    return [(case.name, case.subject, labels(case), case.modality, case.part) for case in dataset.cases]


# --- described by a file


MSD = {
    "name": "Liver",
    "modality": {"0": "CT"},
    "labels": {"0": "background", "1": "liver", "2": "cancer"},
    "training": [{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}],
    "test": ["./imagesTs/b.nii.gz"],
}


def test_msd(tmp_path):
    lay(tmp_path, "imagesTr/a.nii.gz", "labelsTr/a.nii.gz", "imagesTs/b.nii.gz", "imagesTr/extra.nii.gz")
    describe(tmp_path, MSD)
    found = read_layout(tmp_path)
    assert (found.name, found.layout) == ("Liver", "MSD")
    assert found.label_names == {1: "liver", 2: "cancer"}
    assert short(found) == [("a", "a", "a.nii.gz", "CT", "training"), ("b", "b", None, "CT", "test")]
    assert "imagesTr/extra.nii.gz" in " ".join(found.notes)


def test_msd_without_lists_is_paired_by_name(tmp_path):
    lay(tmp_path, "imagesTr/a.nii.gz", "labelsTr/a.nii.gz", "imagesTs/b.nii.gz", "imagesTr/._a.nii.gz")
    describe(tmp_path, {"labels": {"0": "background", "1": "liver"}, "modality": {"0": "MRI"}})
    assert short(read_layout(tmp_path)) == [("a", "a", "a.nii.gz", "MR", "training"), ("b", "b", None, "MR", "test")]


def test_nnunet_v1_and_v2_and_the_channels(tmp_path):
    lay(tmp_path / "v1", "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz", "imagesTs/b_0000.nii.gz")
    describe(tmp_path / "v1", MSD | {"test": ["./imagesTs/b.nii.gz"]})
    assert [case[:3] for case in short(read_layout(tmp_path / "v1"))] == [("a", "a", "a.nii.gz"), ("b", "b", None)]

    root = lay(tmp_path / "Dataset7_X", "imagesTr/c_01_0000.nrrd", "labelsTr/c_01.nrrd", "imagesTs/d_0000.nrrd")
    about = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1}, "file_ending": ".nrrd"}
    describe(root, about)
    found = read_layout(root)
    assert found.layout == "nnU-Net v2" and found.label_names == {1: "liver"}
    assert short(found) == [("c_01", "c_01", "c_01.nrrd", "CT", "training"), ("d", "d", None, "CT", "test")]
    describe(root, about | {"channel_names": {"0": "T1", "1": "FLAIR"}})
    with pytest.raises(DataFault, match=r"one channel .*CASE_0001.nrrd is 'FLAIR'"):
        read_layout(root)


def test_datalists(tmp_path):
    lay(tmp_path, "img/a.nii.gz", "lab/a.nii.gz", "img/b.nii.gz", "img/c.nii.gz")
    content = {
        "": {"0": "CT"},
        "training_tcia_82": [{"image": "img/a.nii.gz", "label": "lab/a.nii.gz", "fold": 0}],
        "validation": [{"image": "img/b.nii.gz", "label": 1}],
        "test": ["img/c.nii.gz"],
    }
    file = describe(tmp_path, content, "dataset_0.json")
    parts = [("a", "a.nii.gz", "training"), ("b", None, "validation"), ("c", None, "test")]
    for path in (file, tmp_path):
        assert [(name, labels, part) for name, _, labels, _, part in short(read_layout(path))] == parts
    plain = describe(tmp_path, ["img/a.nii.gz", {"image": "img/b.nii.gz", "shape": [1, 2, 3]}], "list.json")
    assert [case.name for case in read_layout(plain).cases] == ["a", "b"]
    image = {"name": "T1w", "image_path": "$nnssl_raw/img/a.nii.gz"}
    tree = {"datasets": {"d": {"subjects": {"s": {"sessions": {"1": {"images": [image]}}}}}}}
    assert [case.image for case in read_layout(describe(tmp_path, tree, "nnssl.json")).cases] == [
        tmp_path / "img/a.nii.gz"
    ]


def test_amos_by_description_and_by_names(tmp_path):
    names = ("imagesTr/amos_0001.nii.gz", "labelsTr/amos_0001.nii.gz", "imagesVa/amos_0507.nii.gz",
             "labelsVa/amos_0507.nii.gz", "imagesTs/amos_0600.nii.gz")  # fmt: skip
    expected = [
        ("amos_0001", "amos_0001", "amos_0001.nii.gz", "CT", "training"),
        ("amos_0507", "amos_0507", "amos_0507.nii.gz", "MR", "validation"),
        ("amos_0600", "amos_0600", None, "MR", "test"),
    ]
    lay(tmp_path, *names)
    found = read_layout(tmp_path)
    assert found.layout == "AMOS" and short(found) == expected and found.label_names == AMOS
    training = [{"image": "./imagesTr/amos_0001.nii.gz", "label": "./labelsTr/amos_0001.nii.gz"}]
    labels = {"0": "background", "8": "arota", "9": "postcava"}
    describe(tmp_path, {"training": training, "labels": labels, "modality": {"0": "CT"}})
    found = read_layout(tmp_path)
    assert found.layout == "AMOS" and short(found) == expected
    assert [canonical_organ(name) for name in found.label_names.values()] == [AMOS[8], AMOS[9]]


# --- described by folders


@pytest.mark.parametrize("top", ["", "RawData/", "Abdomen/RawData/"])
def test_btcv(tmp_path, top):
    train, test = f"{top}Training", f"{top}Testing"
    lay(tmp_path, f"{train}/img/img0001.nii.gz", f"{train}/label/label0001.nii.gz", f"{test}/img/img0061.nii.gz")
    found = read_layout(tmp_path)
    assert found.layout == "BTCV" and found.label_names == BTCV
    assert short(found) == [
        ("img0001", "img0001", "label0001.nii.gz", "CT", "training"),
        ("img0061", "img0061", None, "CT", "test"),
    ]


def test_btcv_renamed(tmp_path):
    lay(tmp_path, "imagesTr/img0001.nii.gz", "labelsTr/label0001.nii.gz", "imagesTs/img0061.nii.gz")
    assert [case.part for case in read_layout(tmp_path).cases] == ["training", "test"]
    assert read_layout(tmp_path).layout == "BTCV"


@pytest.mark.parametrize("flat", [False, True])
def test_mmwhs(tmp_path, flat):
    stems = ("ct_train_1001_image", "ct_train_1001_label", "mr_train_1002_image", "mr_train_1002_label",
             "ct_test_2001_image")  # fmt: skip
    lay(tmp_path, *(f"{'' if flat else stem.rsplit('_', 2)[0] + '/'}{stem}.nii.gz" for stem in stems))
    found = read_layout(tmp_path)
    assert found.layout == "MM-WHS" and found.label_names == MM_WHS
    assert short(found) == [
        ("ct_test_2001", "ct_test_2001", None, "CT", "test"),
        ("ct_train_1001", "ct_train_1001", "ct_train_1001_label.nii.gz", "CT", "training"),
        ("mr_train_1002", "mr_train_1002", "mr_train_1002_label.nii.gz", "MR", "training"),
    ]


def test_totalsegmentator(tmp_path):
    masks = [f"s000{n}/segmentations/{name}.nii.gz" for n in (0, 1) for name in ("spleen", "kidney_left")]
    lay(tmp_path, "s0000/ct.nii.gz", "s0001/ct.nii.gz", *masks, "s0002/mri.nii.gz", "s0001/combined_labels.nii.gz")
    (tmp_path / "meta.csv").write_text("image_id;age;split\ns0000;50;train\ns0001;60;test\n")
    found = read_layout(tmp_path)
    assert found.layout == "TotalSegmentator" and found.label_names == {1: "kidney_left", 2: "spleen"}
    assert [(case.name, case.modality, case.part) for case in found.cases] == [
        ("s0000", "CT", "training"),
        ("s0001", "CT", "test"),
        ("s0002", "MR", ""),
    ]
    assert found.cases[0].labels["spleen"] == tmp_path / "s0000/segmentations/spleen.nii.gz"
    assert "s0001/combined_labels.nii.gz" in " ".join(found.notes)
    assert [case.name for case in read_layout(tmp_path / "s0000").cases] == ["s0000"]


def test_bids(tmp_path):
    lay(tmp_path, "sub-01/anat/sub-01_T1w.nii.gz", "sub-01/anat/sub-01_dseg.nii.gz", "sub-01/func/sub-01_bold.nii.gz",
        "sub-02/ses-1/anat/sub-02_ses-1_T2w.nii.gz", "sub-02/ses-2/anat/sub-02_ses-2_T2w.nii.gz")  # fmt: skip
    found = read_layout(tmp_path)
    assert found.layout == "BIDS" and "sub-01_bold" in " ".join(found.notes)
    assert short(found) == [
        ("sub-01_T1w", "sub-01", "sub-01_dseg.nii.gz", "MR", ""),
        ("sub-02_ses-1_T2w", "sub-02", None, "MR", ""),
        ("sub-02_ses-2_T2w", "sub-02", None, "MR", ""),
    ]


@pytest.mark.parametrize("images, labels", [("images", "labels"), ("imgs", "masks"), ("image", "segmentations")])
def test_folders_of_images_and_labels_in_any_formats(tmp_path, images, labels):
    lay(tmp_path, f"{images}/P1_ED.nii.gz", f"{images}/P1_ES.nrrd", f"{images}/P2.mha", f"{labels}/P1_ED.nrrd",
        f"{labels}/P2.nii.gz", f"{labels}/P9.nii.gz")  # fmt: skip
    found = read_layout(tmp_path)
    assert found.layout == "folders of images and labels"
    assert [case[:3] for case in short(found)] == [
        ("P1_ED", "P1", "P1_ED.nrrd"),
        ("P1_ES", "P1", None),
        ("P2", "P2", "P2.nii.gz"),
    ]
    assert f"{labels}/P9.nii.gz" in " ".join(found.notes)


def test_subjects_csv(tmp_path):
    lay(tmp_path, "images/a.nii.gz", "images/b.nii.gz", "images/c.nii.gz", "labels/a.nii.gz")
    (tmp_path / "subjects.csv").write_text("file,subject\na.nii.gz,S1\nimages/b.nii.gz,S1\n")
    found = read_layout(tmp_path)
    assert [case.subject for case in found.cases] == ["S1", "S1", "c"] and "c" in found.notes[-1]
    assert not any("1 .csv" in note for note in found.notes)  # it was read
    (tmp_path / "subjects.csv").write_text("file,subject\na.nii.gz,S1\na.nii.gz,S2\n")
    with pytest.raises(DataFault, match="line 3.*'S1'.*'S2'"):
        read_layout(tmp_path)


def test_roles_told_by_names_and_a_table_beside_them(tmp_path):
    lay(tmp_path, "ct.nii.gz", "seg.nii.gz", "ct_slab.nii.gz", "seg_slab.nii.gz", "STS/MR_T1_image.nrrd",
        "STS/MR_T1_mask.nrrd", "STS/PET_image.nrrd", "STS/PET_mask.nrrd", "X_img.mha", "X_seg.mha")  # fmt: skip
    describe(tmp_path, {"1": "spleen", "2": "kidney_right"}, "labels.json")
    found = read_layout(tmp_path)
    top = tmp_path.name
    assert short(found) == [
        ("STS_MR_T1", "STS", "MR_T1_mask.nrrd", "MR", ""),
        ("STS_PET", "STS", "PET_mask.nrrd", "PT", ""),
        ("X", "X", "X_seg.mha", "unknown", ""),
        ("ct", top, "seg.nii.gz", "CT", ""),
        ("ct_slab", top, "seg_slab.nii.gz", "CT", ""),
    ]
    assert found.label_names == {1: "spleen", 2: "kidney_right"}


def test_labels_of_several_meanings_are_not_mixed(tmp_path):
    for folder, organ in (("a", "spleen"), ("b", "liver")):
        lay(tmp_path / folder, f"{folder}_image.nii.gz", f"{folder}_label.nii.gz")
        describe(tmp_path / folder, {"1": organ}, "labels.json")
    found = read_layout(tmp_path)
    assert [case.labels for case in found.cases] == [None, None] and found.label_names == {}
    assert "several meanings" in found.notes[-1]
    assert read_layout(tmp_path / "a").label_names == {1: "spleen"}


def test_a_plain_folder_does_not_pretrain_on_masks(tmp_path):
    lay(tmp_path, "p1_t1.nii", "p1_t2.nii.gz", "deep/er/p2.mhd", "deep/er/p2.raw", "tumour_mask.nii.gz", "notes.txt")
    found = read_layout(tmp_path)
    assert [(case.name, case.subject) for case in found.cases] == [("p1_t1", "p1"), ("p1_t2", "p1"), ("p2", "p2")]
    assert "tumour_mask.nii.gz" in " ".join(found.notes) and "1 .txt" in " ".join(found.notes)


def test_names_are_unique_and_same_names_in_two_folders_are_two_patients(tmp_path):
    lay(tmp_path, "site1/001.nii.gz", "site2/001.nii.gz", "ct/002.nii.gz", "mr/002.nii.gz", "a.nii", "a.mha")
    found = read_layout(tmp_path)
    subjects = {case.name: case.subject for case in found.cases}
    assert subjects["site1_001"] != subjects["site2_001"]
    assert len({subject for name, subject in subjects.items() if "002" in name}) == 1
    assert len(subjects) == 6 and subjects["a"] == subjects["a-2"]


def test_dicom_trees(shared_data):
    found = read_layout(shared_data / "odd" / "dicom")
    assert found.layout == "DICOM series"
    assert {case.modality for case in found.cases} == {"CT", "MR", "PT"}
    assert all(case.image.is_dir() and case.series and case.labels is None for case in found.cases)
    notes = " ".join(found.notes)
    assert all(name in notes for name in ("RS.dcm", "dcmqi_ct3_liver.dcm", "dcmqi_ct3_heart_seg.nrrd"))
    assert not any("STS_002" in case.subject for case in found.cases)  # PatientID is not shown
    one = read_layout(shared_data / "odd" / "dicom" / "sts_002_pet_image")
    assert short(one)[0][0] == "sts_002_pet_image" and one.cases[0].modality == "PT"


def test_the_real_scans(shared_data):
    hippocampus = read_layout(shared_data / "hippocampus_mr")
    assert hippocampus.label_names == {1: "Anterior", 2: "Posterior"}
    assert len(hippocampus.cases) > len({case.subject for case in hippocampus.cases}) > 100
    assert all(case.labels is not None and case.modality == "MR" for case in hippocampus.cases)
    heart = read_layout(shared_data / "sunnybrook_heart_mr")
    assert (len(heart.cases), len({case.subject for case in heart.cases})) == (60, 30)
    torso = read_layout(shared_data / "ct_torso_totalseg")
    assert len(torso.cases) == 2 and len({case.subject for case in torso.cases}) == 1 and len(torso.label_names) > 40
    assert read_layout(shared_data / "ct_torso_totalseg" / "ct.nii.gz").cases[0].modality == "CT"
    assert len(read_layout(shared_data / "pretrain").cases) == 6
    assert len(read_layout(shared_data / "odd" / "mha").cases) == 1
    everything = read_layout(shared_data)
    assert not any(case.labels for case in everything.cases) and len(everything.cases) > 250


# --- refused


@pytest.mark.parametrize(
    "path", ["../../etc/passwd", "/etc/passwd", "imagesTr/../../x.nii.gz", "", "a\0b", "out/x.nii.gz"]
)
def test_paths_outside_the_data_set(tmp_path, path):
    root = lay(tmp_path / "set", "imagesTr/a.nii.gz")
    lay(tmp_path, "outside/x.nii.gz")
    (root / "out").symlink_to(tmp_path / "outside")
    describe(root, {"labels": {"1": "liver"}, "training": [{"image": path, "label": path}]})
    with pytest.raises(DataFault, match="dataset.json"):
        read_layout(root)
    if path == "out/x.nii.gz":
        assert len(read_layout(root, allow_outside=True).cases) == 1


@pytest.mark.parametrize(
    "text, said",
    [
        ('{"labels": {}, "labels": {}}', "'labels' is there twice"),
        ('{"labels": {"1": "a"', "not valid JSON"),
        ('{"labels": {"1": NaN}}', "NaN"),
        ("[" * 100_000, "not valid JSON"),
        ("3", "single int"),
        ("\xff\xfe", "not valid JSON"),
        ('{"labels": {"liver": "big"}}', "neither a value with a name"),
        ('{"labels": {"a": 1, "b": 1}}', "both 'a' and 'b'"),
        ('{"labels": {"whole": [1, 2]}}', "regions"),
        ('{"labels": {"ignore": 3}}', "ignore"),
        ('{"labels": [1]}', "must be an object"),
        ('{"training": [{"picture": "a"}]}', "names no scan"),
        ('{"training": [{"image": ["a.nii", "b.nii"]}]}', "one channel"),
        ('{"training": ["gone.nii.gz"]}', "none of its 1 scans is there"),
        ('{"training": ["a.nii"], "test": ["a.nii"]}', "in training and in test"),
        ('{"channel_names": {}, "labels": {}}', "channel_names"),
        ('{"file_ending": ".png", "labels": {}}', "'.png' cannot be read"),
        ("{}", "lists no scan"),
    ],
)
def test_broken_descriptions(tmp_path, text, said):
    lay(tmp_path, "a.nii")
    (tmp_path / "dataset.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataFault, match=said) as refused:
        read_layout(tmp_path)
    assert str(tmp_path) in str(refused.value) and "\n" not in str(refused.value)


def test_paths_that_are_nothing(tmp_path):
    lay(tmp_path, "only.txt", "empty/.hidden", "masks/a_mask.nii.gz")
    os.mkfifo(tmp_path / "pipe.nii.gz")
    (tmp_path / "round").symlink_to(tmp_path / "round")
    (tmp_path / "gone.nii.gz").symlink_to(tmp_path / "nowhere")
    for name, said in (
        ("missing", "No such file"),
        ("only.txt", "no scan by its name"),
        ("empty", "no scan found.*hidden"),
        ("masks", "no scan found.*a_mask"),
        ("pipe.nii.gz", "neither a file nor a folder"),
        ("round", "symbolic links"),
        ("gone.nii.gz", "No such file"),
    ):
        with pytest.raises(DataFault, match=said):
            read_layout(tmp_path / name)


def test_loops_pipes_and_folders_named_like_scans_are_passed_by(tmp_path):
    lay(tmp_path, "a.nii.gz", "b.nii.gz/inside.txt")
    os.mkfifo(tmp_path / "pipe.nii.gz")
    (tmp_path / "up").symlink_to(tmp_path)
    (tmp_path / "gone.nii.gz").symlink_to(tmp_path / "nowhere")
    found = read_layout(tmp_path)
    assert [case.name for case in found.cases] == ["a"]
    assert all(name in " ".join(found.notes) for name in ("up", "gone.nii.gz", "pipe.nii.gz"))


# --- names


def test_one_name_for_each_organ():
    for written, meant in (
        ("Gall_Bladder", "gallbladder"),
        ("kidney_left", "left kidney"),
        ("Right Kidney", "right kidney"),
        ("postcava", "inferior vena cava"),
        ("arota", "aorta"),
        ("oesophagus", "esophagus"),
        ("portal_vein_and_splenic_vein", "portal and splenic veins"),
        ("adrenal_gland_left", "left adrenal gland"),
        ("prostate/uterus", "prostate or uterus"),
        ("heart_atrium_left", "left atrium"),
        ("vertebrae_L1", "vertebrae l1"),
    ):
        assert canonical_organ(written) == meant == canonical_organ(meant)
    for table in (BTCV, AMOS, MM_WHS):
        assert all(canonical_organ(name) == name for name in table.values())
    assert set(BTCV.values()) - set(AMOS.values()) == {"portal and splenic veins"}


WORDS = st.sampled_from(["image", "img", "label", "seg", "mask", "ct", "t1", "a", "b", "001", "0000", "slab", "ED"])
STEMS = st.lists(WORDS, min_size=1, max_size=3).map("_".join)
FOLDERS = st.lists(st.sampled_from(["images", "labels", "imagesTr", "labelsTr", "ct", "p1"]), max_size=2)
SUFFIXES = st.sampled_from([".nii.gz", ".nii", ".nrrd", ".mha"])
PATHS = st.builds(lambda folders, stem, end: Path(*folders, stem + end), FOLDERS, STEMS, SUFFIXES)


@settings(max_examples=300, deadline=None)
@given(st.sets(PATHS, max_size=8))
def test_pairing_keeps_every_file_and_never_pairs_two_images(paths):
    pairing = naming.pair(paths)
    used = [path for path in pairing.images.values() if path is not None]
    assert sorted([*pairing.images, *used, *pairing.left]) == sorted(paths)
    assert not any(naming.read_name(path).labels for path in pairing.images)
    assert all(naming.read_name(path).labels for path in (*used, *pairing.left))


@settings(max_examples=40, deadline=None)
@given(st.sets(PATHS, min_size=1, max_size=6))
def test_every_file_is_in_a_case_or_in_a_note(tmp_path_factory, paths):
    root = lay(tmp_path_factory.mktemp("set"), *map(str, paths))
    try:
        found = read_layout(root)
    except DataFault as refused:
        assert all(naming.read_name(path).labels for path in paths) and "no scan found" in str(refused)
        return
    told = "\n".join(found.notes)
    used = {case.image for case in found.cases} | {case.labels for case in found.cases}
    assert all(root / path in used or str(path) in told for path in paths)
    assert len({case.name for case in found.cases}) == len(found.cases)
    assert found.cases == tuple(sorted(found.cases, key=lambda case: case.name))
    assert np.all([case.subject for case in found.cases])
