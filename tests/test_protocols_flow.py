"""Every protocol runs from the folder as it is downloaded with one command, on phantoms as small as they can be."""

import contextlib
import csv
import io
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import ndimage

import dagman.commands
import spade3d.commands
from dagman.downstream.protocols import PROTOCOLS
from dagman.evaluation.metrics import case_metrics
from dagman.judging import canonical_spacing
from spade3d.volumes.phantom_layouts import LAYOUTS
from spade3d.volumes.phantoms import phantom
from spade3d.volumes.store import VolumeStore
from spade3d.volumes.volume import read_volume, write_volume

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE, MM = (12, 12, 10), 30.0
TINY = ["--data.spacing", MM, MM, MM, "--crop.shape", 16, 16, 16, "--crop.crops", 1, "--network.feature-size", 12]
TINY += ["--network.window", 2, "--scoring.looks", 0, "--scoring.overlap", 0, "--device", "cpu"]
ABDOMENS, HEARTS = ("btcv", "abdomen-ct", 30), ("mmwhs", "heart-ct", 20)
BOTH = ("mmwhs", "heart-ct heart-mr", 20)  # as it is downloaded: ct_train, ct_test, mr_train, mr_test
MR_OF_AMOS = range(506, 512)  # amos_0507 to amos_0512, in both parts
# layout, kind and number of labelled scans; more words; who learns, who judges; how their names begin
RUNS = {
    "holdout": (("msd", "heart-ct", 5), [], 4, 1),
    "few-shot": (("msd", "heart-ct", 5), ["--labels", 2], 2, 1),
    "btcv-24-6": (ABDOMENS, [], 24, [f"img{n:04d}" for n in range(35, 41)]),
    "btcv-5fold": (ABDOMENS, ["--fold", 4], 24, 6),
    "amos-ct": (("amos", "abdomen-ct", 300), ["--crop.foreground", 0.5], 200, 100),
    "mmwhs-ct-lsm": (BOTH, [], 16, [f"ct_train_{n}" for n in range(1001, 1005)]),
    "mmwhs-mr-lsm": (BOTH, [], 15, [f"mr_train_{n}" for n in range(1016, 1021)]),
    "mmwhs-5fold": (HEARTS, ["--fold", 1], 16, 4),
    "mmwhs-5fold-ct": (BOTH, [], 16, 4),
    "mmwhs-5fold-mr": (BOTH, ["--fold", 4], 16, 4),
    "msd": (("msd", "heart-mr", 5), [], 4, 1),
}


def run(*tokens) -> dict:
    """Call dagman-finetune as a shell would, expect success, and return what it prints with --json."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as end:
        dagman.commands.finetune([*map(str, tokens), "--json"])
    assert end.value.code == 0
    return json.loads(printed.getvalue())


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Callable[[str, str, int], Path]:
    """A dataset as it is downloaded, made once: three phantoms take turns under all of its numbers, one of each kind is
    among its tests; AMOS has MR scans, too."""
    made: dict[tuple, Path] = {}

    def lay_out(layout: str, kind: str, patients: int) -> Path:
        key = (layout, kind, patients)
        if key not in made:
            root, laid_out = tmp_path_factory.mktemp(layout), LAYOUTS[layout]
            cases = {}
            for each in kind.split():
                drawn = [phantom(each, seed, shape=SHAPE, spacing=(MM, MM, MM)) for seed in range(3)]
                more = MR_OF_AMOS if layout == "amos" else ()
                for number, one in zip((*range(patients), *more), itertools.cycle(drawn)):
                    image, labels = (root / path for path in laid_out.place(each, number, True))
                    for path, voxels in ((image, one.voxels), (labels, laid_out.values(each, one.labels))):
                        path.parent.mkdir(parents=True, exist_ok=True)
                        write_volume(path, voxels, one.affine)
                    cases[image] = labels
                test = root / laid_out.place(each, 0, False)[0]
                test.parent.mkdir(parents=True, exist_ok=True)
                write_volume(test, drawn[0].voxels, drawn[0].affine)
                cases[test] = None
            laid_out.write_description(root, kind.split()[0], cases)
            made[key] = root
        return made[key]

    return lay_out


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_protocol_runs_from_the_untouched_folder(name, folders, tmp_path, capsys):
    dataset, more, learn, judge = RUNS[name]
    data = folders(*dataset)
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*")}
    words = [word for word in TINY if name != "mmwhs-mr-lsm" or word not in ("--data.spacing", MM)]  # its is native
    run(data, "--protocol", name, "--out", tmp_path, "--steps", 1, *words, *more)
    assert {path: path.stat().st_mtime_ns for path in data.rglob("*")} == before

    said, protocol = summary_of(tmp_path), PROTOCOLS[name]
    assert len(said["split"]["train"]) == learn
    judges = said["split"]["validation"]
    assert judges == judge if isinstance(judge, list) else len(judges) == judge
    assert not set(judges) & set(said["split"]["train"])
    stated = said["protocol"]
    assert stated["name"] == name and stated["stated"] == json.loads(json.dumps(protocol.describe()))
    left = {line.split()[0] for line in stated["deviations"]}
    given = {str(word).removeprefix("--").replace("-", "_") for word in [*words, *more] if str(word).startswith("--")}
    assert left <= given  # nothing is left but what was said otherwise
    assert {key for key in protocol.settings if key == "crop.shape"} <= left
    config = yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8"))
    assert config["data"]["window_hu"] == list(protocol.settings.get("data.window_hu", (-175.0, 250.0)))
    assert config["crop"]["foreground"] == (0.5 if more[:1] == ["--crop.foreground"] else
                                            protocol.settings.get("crop.foreground", 0.67))  # fmt: skip
    told = capsys.readouterr().err
    assert told.index(f"protocol {name}") < told.index("dagman-finetune, segmentation") < told.index("fine-tuning 1/1")
    kinds = {case["modality"] for case in json.loads((tmp_path / "provenance.json").read_text())["cases"]}
    assert kinds == {"MR" if name in ("mmwhs-mr-lsm", "mmwhs-5fold-mr", "msd") else "CT"}
    report = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert name in report and all(line.split()[0] in report for line in stated["deviations"])


def test_both_modalities_of_mmwhs_are_two_benchmarks_and_one_has_to_be_named(folders, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        dagman.commands.finetune([*map(str, (folders(*BOTH), "--out", tmp_path / "out", "--protocol", "mmwhs-5fold"))])
    told = capsys.readouterr().err
    assert end.value.code == 3 and "say mmwhs-5fold-ct or mmwhs-5fold-mr" in told
    assert "preparing" not in told and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("background", "grid"), [(True, "input"), (False, "prepared")])
def test_what_counts_and_on_which_grid_is_a_setting(background, grid, folders, tmp_path):
    data = folders("msd", "heart-ct", 5)
    words = [word if word != MM else 40.0 for word in TINY]  # coarser than the scans
    more = ["--scoring.grid", grid, *(["--scoring.background"] if background else [])]
    run(data, "--out", tmp_path, "--steps", 1, *words, *more)
    said = summary_of(tmp_path)
    assert said["protocol"]["deviations"] == [
        line for line in ("scoring.grid prepared instead of input" if grid == "prepared" else "",
                          "scoring.background True instead of False" if background else "") if line
    ]  # fmt: skip
    assert ("background" in said["per_class"]) == background
    with open(tmp_path / "cases.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    dice = [float(row["dice"]) for row in rows if row["dice"]]
    assert said["mean_dice"] == pytest.approx(sum(dice) / len(dice), abs=1e-5)  # one case
    voxels = sum(int(row["voxels_true"]) for row in rows)
    if background:
        assert voxels == SHAPE[0] * SHAPE[1] * SHAPE[2]  # of the scan's own grid
    else:
        store = VolumeStore.open(tmp_path / "store")
        assert voxels == (store.labels(store.index_of(rows[0]["case"])) > 0).sum()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--protocol", "btcv-24-6"), 3, "no labelled scan is named as BTCV names them"),
        (("--protocol", "mmwhs-5fold"), 3, "protocol mmwhs-5fold is for MM-WHS as downloaded, these are MSD"),
        (("--folds", 9, "--fold", 7), 2, "fold 7 of 5 asked for"),
        (("--protocol", "few-shot"), 2, "--protocol few-shot: of how many subjects? say --labels N"),
        (("--scoring.tolerances-mm.left-lung", 1), 2, "a tolerance for left lung; the classes are left ventricular"),
    ],
)
def test_what_names_alone_forbid_is_refused_before_any_scan_is_prepared(words, code, said, folders, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        dagman.commands.finetune([*map(str, (folders("msd", "heart-ct", 5), "--out", tmp_path / "out", *words))])
    told = capsys.readouterr().err
    assert end.value.code == code and said in told
    assert "preparing" not in told and not (tmp_path / "out").exists()


@pytest.mark.parametrize("more", [(), ("--scoring.flips", "as", "--scoring.largest-component")])
def test_how_predictions_are_cleaned_is_scored_and_part_of_what_a_number_is_of(more, folders, tmp_path):
    run(folders("msd", "heart-ct", 5), "--out", tmp_path, "--steps", 1, *TINY, *more)
    stated = summary_of(tmp_path)["protocol"]
    assert stated["flips"] == ("as" if more else "none") and stated["largest_component"] == bool(more)
    pieces = [
        ndimage.label(found == value, np.ones((3, 3, 3)))[1]
        for path in (tmp_path / "predictions").iterdir()
        for found in [read_volume(path).voxels]
        for value in np.unique(found)[1:]
    ]
    assert (max(pieces) == 1) == bool(more)  # a network of one step answers in pieces


def test_a_store_prepared_otherwise_is_refused_in_the_name_of_the_protocol(folders, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        spade3d.commands.prepare([str(folders(*HEARTS)), "--out", str(tmp_path / "store"), "--spacing", *["30"] * 3])
    assert end.value.code == 0
    words = [tmp_path / "store", "--out", tmp_path / "out", "--protocol", "mmwhs-ct-lsm"]
    with pytest.raises(SystemExit) as end:
        dagman.commands.finetune([*map(str, words)])
    said = capsys.readouterr().err
    assert end.value.code == 2 and "data.spacing (1.5, 1.5, 1.5) asked for" in said
    assert "what is not said otherwise is as --protocol mmwhs-ct-lsm has it" in said
    assert not (tmp_path / "out").exists()


def test_the_surface_that_distances_are_of_is_a_setting(folders, tmp_path):
    """Both ways of the same predictions: Dice is the same, the surface is the one that was asked for."""
    data = folders("msd", "heart-ct", 5)
    run(data, "--out", tmp_path, "--steps", 1, *TINY, "--scoring.surface", "elements", "--scoring.background")
    assert summary_of(tmp_path)["protocol"]["surface"] == "elements between voxels"
    with open(tmp_path / "cases.csv", newline="") as file:
        (row, *_) = [row for row in csv.DictReader(file) if row["name"] == "background"]
    store = VolumeStore.open(tmp_path / "store")
    truth = store.truth(store.index_of(row["case"]))
    (written,) = (tmp_path / "predictions").glob(f"{row['case']}.nii.gz")
    found = np.asarray(read_volume(written).voxels).astype(np.int64)
    spacing = canonical_spacing(store.cases[store.index_of(row["case"])])
    expected = {
        surface: case_metrics(truth, found, spacing, (0,), surface=surface)[0] for surface in ("voxels", "elements")
    }
    assert float(row["dice"]) == pytest.approx(expected["elements"]["dice"], abs=1e-4)
    assert float(row["asd_mm"]) == pytest.approx(expected["elements"]["asd_mm"], rel=1e-3)
    assert float(row["asd_mm"]) != pytest.approx(expected["voxels"]["asd_mm"], rel=1e-2)
