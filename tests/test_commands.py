"""The command line: its options are a promise, its help is light, bad input ends in one line and nothing written."""

import functools
import json
import re
import subprocess
import sys
from contextlib import suppress
from io import StringIO
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin

import docstring_parser
import nibabel as nib
import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from safetensors.torch import save_file

import dagman.commands
import spade3d.commands
import spade3d.saliency_commands
from dagman.recipes.finetuning import FinetuneSettings
from dagman.recipes.studies import StudySettings
from spade3d import __version__, console
from spade3d.commands import begun_settings, recipe_name
from spade3d.configuration import resolve, to_yaml
from spade3d.faults import UsageFault
from spade3d.networks.foreign import save_encoder
from spade3d.networks.swin_unetr import SwinUNETR
from spade3d.provenance import write_json
from spade3d.volumes.volume import write_volume

AFFINE = np.diag([2.0, 2.0, 2.0, 1.0])
COMMANDS = {
    "spade-prepare": spade3d.commands.prepare,
    "spade-saliency": spade3d.saliency_commands.main,
    "spade-pretrain": spade3d.commands.pretrain,
    "dagman-finetune": dagman.commands.finetune,
    "dagman-predict": dagman.commands.predict,
    "dagman-compare": dagman.commands.compare,
    "dagman-probe": dagman.commands.probe,
}
COMMON = """--config --resume --strict --json --out
    --steps --seed --device --precision --workers --folds --fold --save-every
    --skip-bad-batches --loaders --compile --channels-last
    --data.path --data.spacing --data.window-hu --data.mr
    --network.feature-size --network.depths --network.heads --network.window --network.drop-path --network.use-v2
    --network.merging --network.monai-compatible
    --optim.lr --optim.weight-decay --optim.warmup --optim.floor --optim.clip-norm --optim.accumulate
    --crop.shape --crop.flip --crop.rotation-deg --crop.zoom --crop.gamma --crop.contrast --crop.brightness
    --crop.blur --crop.blur-chance --crop.noise"""
PAIRS = """--recipe --crop.colour --crop.frame --crop.anchors --crop.scans --crop.overlap --crop.alike-iou --crop.places
    --crop.hidden --protocol --hold-out"""
FOCUS = """--focus.views --focus.crop-chance --focus.crop-retention --focus.cutout-chance --focus.cutout-retention
    --focus.cutout-side --focus.mask-chance --focus.mask-kept --focus.mask-floor --focus.mask-blur --focus.zoom
    --focus.parent --focus.salient-chance --focus.least --focus.mode"""
CONTRAST = """--contrast.selection --contrast.far-mm --contrast.far-local-mm --contrast.temperature
    --contrast.global-memory --contrast.local-memory --contrast.global-dim --contrast.global-head
    --contrast.local-dim --contrast.local-cell
    --contrast.momentum --contrast.global-weight --contrast.local-weight --contrast.restoration-weight
    --contrast.restoration-cell"""
DISTILL = """--distill.variant --distill.stage --distill.masking --distill.ratio --distill.hint --distill.semantic
    --distill.semantic-blocks --distill.semantic-heads --distill.patch-dropout --distill.dropped
    --distill.attention-from --distill.mask-token --distill.drop-hidden --distill.symmetric --distill.head-width
    --distill.bottleneck --distill.prototypes --distill.standardise --distill.student-temperature
    --distill.teacher-temperature --distill.temperature-warmup --distill.centre-momentum --distill.still
    --distill.momentum --distill.voxel-weight --distill.token-weight --distill.image-weight
    --distill.global-weight"""
PRIOR = """--prior.source --prior.folder --prior.attachment --prior.stage --prior.regions --prior.labelled
    --prior.likelihood --prior.sigma-mm --prior.kind --prior.weight --prior.warmup --prior.least --prior.wrong"""
STUDIES = """--task --findings --boxes --init --labels --arrangement --head --tuning --encoder-lr --studies --tokens
    --low-mm --crop.crops --attention.dim --attention.places --scoring.overlap --scoring.looks --scoring.tolerance-mm
    --scoring.baselines --clarity.dim --clarity.blocks --clarity.heads --clarity.registers --clarity.joint
    --clarity.attention-pooling --clarity.segment-cam --clarity.width --clarity.convolved --clarity.rank-decay
    --clarity.prior-forcing
    --clarity.orthogonal-weight --clarity.orthogonal-by --clarity.foreground-weight
    --clarity.outside-weight --clarity.teacher-weight
    --clarity.prior.source --clarity.prior.table --clarity.prior.least --clarity.prior.frame --clarity.prior.labelled
    --clarity.prior.likelihood --clarity.prior.sigma-mm --clarity.prior.folder --clarity.prior.wrong
    --clarity.teacher.folds --clarity.teacher.steps --clarity.teacher.batch --clarity.teacher.growth
    --clarity.teacher.lr --clarity.teacher.shape --clarity.teacher.mm --clarity.teacher.temperature"""
OPTIONS = {
    "spade-prepare": "DATA --out --spacing --window --mr --workers --part --strict --json",
    "spade-pretrain": f"""DATA {COMMON} {PAIRS} {FOCUS} {CONTRAST}""",
    "spade-pretrain --recipe dagman": f"DATA {COMMON} {PAIRS} {DISTILL} {PRIOR}",
    "spade-pretrain --recipe dagman-paper": f"DATA {COMMON} {PAIRS} {DISTILL} {PRIOR}",
    "spade-pretrain --recipe spade-dagman": f"DATA {COMMON} {PAIRS} {CONTRAST} {DISTILL} {PRIOR}",
    "spade-pretrain --recipe moco": f"""DATA {COMMON} {PAIRS} {FOCUS}
        --contrast.temperature --contrast.memory --contrast.dim --contrast.momentum""",
    "dagman-finetune": f"""DATA {COMMON} --init --task --protocol --labels --draw --draws --seeds --from-scratch-twin
        --tuning.encoder --tuning.layer-decay --tuning.encoder-warmup
        --crop.crops --crop.foreground --scoring.grid --scoring.background
        --scoring.overlap --scoring.tolerance-mm --scoring.tolerances-mm --scoring.surface --scoring.looks
        --scoring.look-cases
        --scoring.flips --scoring.largest-component""",
    "dagman-finetune --task classification": f"DATA {COMMON} {STUDIES}",
    "dagman-finetune --task=localisation": f"DATA {COMMON} {STUDIES}",
    "dagman-predict": """MODEL SCANS --out --device --batch --flips --largest-component --except --format --precision
        --attention --attention-stage --strict --json""",
    "dagman-compare": "RUNS --out --metric --json",
    "dagman-probe": """DATA --encoder --out --strict --json --scans --folds --fold --crop.shape --seed --device
        --workers""",
}
SALIENCY = {
    "gaze": "STORE --fixations --first-slice --sigma-mm --sigma-slices-mm --replace --strict --json",
    "labels": "STORE --names --dilate-mm --blur-mm --replace --json",
    "attention": "STORE --init --device --replace --json",
    "train": """STORE --out --resume --json --steps --crop --crops --salient --width --lr --seed --device --precision
        --save-every""",
    "predict": "STORE --model --device --replace --json",
}


def call(name: str, *tokens) -> int:
    """The exit code of a console script, called in this process."""
    with pytest.raises(SystemExit) as end:
        COMMANDS[name]([str(token) for token in tokens])
    return end.value.code


def refused(capsys, name: str, *tokens) -> tuple[int, str]:
    """Exit code and the one line on standard error, besides progress; nothing is on standard output."""
    code = call(name, *tokens)
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if not re.match(r"preparing \S+: \d+/\d+ |left out ", line)]
    assert printed.out == "" and len(lines) == 1, printed.err
    assert lines[0].startswith(f"{name}: ")
    return code, lines[0].removeprefix(f"{name}: ")


def options_of(app) -> set[str]:
    """The options of a command, without the negations of switches."""
    arguments = app.assemble_argument_collection()
    names = {name for argument in arguments if not argument.children for name in argument.names}
    return {name for name in names if not re.search(r"--(\w+\.)?(no|empty)-", name)}


@pytest.mark.parametrize("command", OPTIONS)
def test_the_options_are_a_promise(command, monkeypatch):
    """Other programs rely on these names: to change one is a decision record and a line in CHANGELOG.md."""
    apps = []
    monkeypatch.setattr(console, "run", lambda app, tokens, tree=None: apps.append(app) or 0)
    name, *words = command.split()
    assert call(name, *words) == 0
    assert options_of(apps[0]) == set(OPTIONS[command].split())


def test_the_options_of_saliency_are_a_promise(monkeypatch):
    apps = []
    monkeypatch.setattr(console, "run", lambda app, tokens, tree=None: apps.append(app) or 0)
    assert call("spade-saliency") == 0
    assert {name: options_of(apps[0][name]) for name in SALIENCY} == {
        name: set(options.split()) for name, options in SALIENCY.items()
    }
    assert set(apps[0]) - {"--help", "-h", "--version"} == SALIENCY.keys()


def registered(command: str, monkeypatch):
    """The application of a command, and its tree of settings if it has one; nothing is run."""
    made = []
    monkeypatch.setattr(console, "run", lambda app, tokens, tree=None: made.append((app, tree)) or 0)
    name, *words = command.split()
    assert call(name, *words) == 0
    app, tree = made[0]
    return (app[words[0]], tree if words[0] == "train" else None) if name == "spade-saliency" else (app, tree)


EVERY = [*OPTIONS, *(f"spade-saliency {name}" for name in SALIENCY)]
EVERY.remove("dagman-finetune --task=localisation")  # has the options of classification
SAMPLES = (24, 1, 0.5, "word", (32, 32, 32), (2.0, 3.0), ("liver",))  # one of them suits whatever is left open


def default_of(argument, tree):
    """The default of an option, in the tree of settings or in the signature."""
    if not argument.keys:
        return argument.field_info.default
    *parents, key = argument.keys
    for parent in parents:
        tree = tree.model_fields[parent].annotation
    return tree.model_fields[key].default


def sample(argument, tree):
    """A value of a setting that is left open by default."""
    *parents, key = argument.keys
    for parent in parents:
        tree = tree.model_fields[parent].annotation
    field = tree.model_fields[key]
    check = TypeAdapter(Annotated[(field.annotation, *field.metadata, "as declared")])
    for value in (*choices_in(field.annotation), *SAMPLES):
        with suppress(ValidationError):
            return check.validate_python(value)
    raise AssertionError(f"no sample suits {argument.name}")


def choices_in(hint) -> tuple:
    """The choices of a Literal, wherever it stands in a hint."""
    parts = get_args(hint)
    return parts if get_origin(hint) is Literal else next((found for part in parts if (found := choices_in(part))), ())


def another(value, argument):
    """Another choice, or the other switch, where an option has some."""
    if isinstance(value, tuple):
        return tuple(another(part, argument) if isinstance(part, bool) else part for part in value)
    others = [choice for choice in choices_in(argument.hint) if choice != value]
    return not value if isinstance(value, bool) else others[-1] if others else value


def as_tokens(names, value) -> list[str]:
    """A value as --help shows that it is given."""
    if isinstance(value, bool):
        return [names[0] if value else next(name for name in names if re.search(r"--(\w+\.)*no-", name))]
    return [names[0], *map(str, value if isinstance(value, tuple) else [value])]


@pytest.mark.parametrize("command", EVERY)
def test_what_a_setting_may_be_its_option_takes(command, monkeypatch):
    """First every default, and something where it is left open; then another choice or switch of every setting."""
    app, tree = registered(command, monkeypatch)
    options = [argument for argument in app.assemble_argument_collection() if not argument.children]
    needed = [token for one in options if one.required for token in (one.name, "needed") if token.islower()]
    for chosen in (lambda value, _: value, another):
        line, expected = list(needed), {}
        for option in options:
            value = None if option.required or option.name.isupper() else default_of(option, tree)
            if value is None and option.keys:
                value = sample(option, tree)
            value = chosen(value, option)
            if value is not None and value not in ((), {}):  # nothing, of which there may be some
                expected["settings" if option.keys else option.field_info.name, *option.keys] = value
                line += as_tokens(option.names, value)
        given = app.parse_args(line, exit_on_error=False, print_error=False)[1].arguments
        for (root, *keys), value in expected.items():
            assert functools.reduce(getattr, keys, given[root]) == value, (root, *keys)


def test_values_by_name_are_given_below_their_option(monkeypatch):
    app, _ = registered("dagman-finetune", monkeypatch)
    line = ["--out", "out", "--scoring.tolerances-mm.liver", "3"]
    given = app.parse_args(line, exit_on_error=False)[1].arguments["settings"]
    assert given.scoring.tolerances_mm == {"liver": 3}
    app, _ = registered("dagman-finetune --task localisation", monkeypatch)
    table = "--clarity.prior.table.mass"
    line = f"--out out {table}.organs liver,spleen {table}.margin-mm 5".split()
    mass = app.parse_args(line, exit_on_error=False)[1].arguments["settings"].clarity.prior.table["mass"]
    assert (mass.organs, mass.margin_mm) == (("liver", "spleen"), 5)


read_once = functools.cache(docstring_parser.parse_from_object)


@pytest.mark.parametrize("command", EVERY)
def test_no_option_is_without_words_and_they_fit_a_terminal(command, monkeypatch):
    monkeypatch.setattr(docstring_parser, "parse_from_object", read_once)  # cyclopts asks for each class each time
    app, _ = registered(command, monkeypatch)
    words = {
        argument.name: argument.parameter.help or ""
        for argument in app.assemble_argument_collection(parse_docstring=True)
        if not argument.children
    }
    assert [name for name, text in words.items() if not text.strip()] == []
    shown = StringIO()
    app.help_print([], console=Console(file=shown, width=80))
    lines = shown.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    whole = set(shown.getvalue().split())  # no word is broken to fit
    words.pop("--clarity.prior.table", None)  # what is below it is shown instead
    assert {word for text in words.values() for word in text.split()} - whole == set()


def test_help_and_version_answer_without_the_heavy_imports():
    script = """
import sys
from spade3d.commands import prepare, pretrain
from spade3d.saliency_commands import main as saliency
from dagman.commands import compare, finetune, predict, probe
for command in (prepare, saliency, pretrain, finetune, predict, compare, probe):
    for option in ("--help", "--version"):
        try:
            command([option])
        except SystemExit as end:
            assert end.code == 0, end.code
heavy = {"torch", "monai", "numba", "SimpleITK", "nibabel", "scipy", "sklearn", "matplotlib"}
print(sorted(heavy & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, encoding="utf-8", timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "[]"
    assert done.stdout.splitlines().count(__version__) == 7
    assert done.stdout.count("Usage: ") == 7 and "a folder of scans, a dataset in any known layout" in done.stdout


# --- scans that cannot be used -------------------------------------------------------------------------------------


def scan(seed: int = 0, shape: tuple[int, ...] = (16, 16, 16)) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1000, 1000, shape).astype(np.int16)


def folder(path: Path, *images: np.ndarray) -> Path:
    path.mkdir()
    for number, image in enumerate(images):
        write_volume(path / f"scan{number}.nii.gz", image, AFFINE)
    return path


def labelled(path: Path, *labels: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    """An MSD dataset whose table knows the liver as 1."""
    for part in ("imagesTr", "labelsTr"):
        (path / part).mkdir(parents=True)
    for number, map_ in enumerate(labels):
        write_volume(path / "imagesTr" / f"case{number}.nii.gz", scan(number), AFFINE)
        write_volume(path / "labelsTr" / f"case{number}.nii.gz", map_.astype(np.uint8), affine)
    listed = [
        {"image": f"./imagesTr/case{n}.nii.gz", "label": f"./labelsTr/case{n}.nii.gz"} for n in range(len(labels))
    ]
    about = {"name": "livers", "labels": {"background": 0, "liver": 1}, "modality": {"0": "CT"}, "training": listed}
    write_json(path / "dataset.json", about)
    return path


def livers(count: int) -> list[np.ndarray]:
    return [scan(10 + n) > 500 for n in range(count)]


def damaged(path: Path, harm) -> Path:
    """A folder of one scan whose bytes went through `harm`."""
    file = folder(path, scan()) / "scan0.nii.gz"
    file.write_bytes(harm(file.read_bytes()))
    return path


def array(path: Path, voxels: np.ndarray) -> Path:
    path.mkdir()
    nib.save(nib.Nifti1Image(voxels, AFFINE), path / "scan0.nii.gz")
    return path


def with_nan() -> np.ndarray:
    voxels = scan().astype(np.float32)
    voxels[2, 3, :5] = np.nan
    return voxels


def shifted() -> np.ndarray:
    affine = AFFINE.copy()
    affine[0, 3] = 7.5
    return affine


RGB = np.zeros((16, 16, 16), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
BAD = {
    "a missing path": (lambda path: path, "no such file or folder"),
    "an empty folder": (folder, "no scan found (the folder is empty)"),
    "no scan at all": (lambda path: array(path, scan()) and text_only(path), "no scan found (files that are no scans"),
    "a truncated file": (lambda path: damaged(path, lambda b: b[: len(b) // 2]), "is truncated"),
    "a corrupt file": (lambda path: damaged(path, lambda b: b[:-900] + bytes([b[-900] ^ 255]) + b[-899:]), "damaged"),
    "an empty file": (lambda path: damaged(path, lambda b: b""), "is empty (0 bytes)"),
    "another file": (lambda path: damaged(path, lambda b: b"no scan" * 99), "is no NIfTI file"),
    "a picture": (lambda path: array(path, scan(shape=(16, 16))), "is 2-D with shape (16, 16); a 3-D scan is needed"),
    "one slice": (lambda path: folder(path, scan(shape=(16, 16, 1))), "shape 16x16x1"),
    "colours": (lambda path: array(path, RGB), "RGB colour"),
    "NaN voxels": (lambda path: array(path, with_nan()), "5 of 4096 voxels are NaN or Inf"),
    "a constant volume": (lambda path: folder(path, scan() * 0 + 7), "constant, every voxel is 7"),
    "labels moved": (lambda path: labelled(path, *livers(2), affine=shifted()), "another grid than its image: origins"),
    "labels cut": (lambda path: labelled(path, *(one[1:] for one in livers(2))), "shape (16, 16, 16) against (15,"),
    "unknown values": (lambda path: labelled(path, *(one * 7 for one in livers(2))), "are not in the table (1 liver)"),
}


def text_only(path: Path) -> Path:
    (path / "scan0.nii.gz").rename(path / "scan0.txt")
    return path


@pytest.mark.parametrize("what", BAD)
def test_scans_that_cannot_be_used_leave_one_line_and_nothing_else(what, tmp_path, capsys):
    make, reason = BAD[what]
    data = make(tmp_path / "data")
    once = ["--steps", 1]
    for name, more in {"spade-prepare": [], "spade-pretrain": once, "dagman-finetune": once}.items():
        code, message = refused(capsys, name, data, "--out", tmp_path / "new" / "out", *more)
        reasons = {reason, "no labelled scan" if name == "dagman-finetune" else reason}  # it reads labelled scans only
        assert code == 3 and any(one in message for one in reasons) and message.startswith(str(data))
        assert not (tmp_path / "new").exists()


def test_a_bad_scan_among_good_ones_is_named_counted_and_left_out(tmp_path, capsys):
    data = folder(tmp_path / "data", scan(0), scan(1), scan(2), scan() * 0)
    (data / "scan4.nii.gz").write_bytes(b"")
    (data / "notes.txt").write_text("nothing to see")
    small = ["--steps", 1, "--crop.shape", 8, 8, 8, "--network.feature-size", 12, "--contrast.local-memory", 8]
    for name, more in {"spade-prepare": [], "spade-pretrain": [*small, "--device", "cpu"]}.items():
        out = tmp_path / name
        assert call(name, data, "--out", out, "--json", *more) == 0
        printed = capsys.readouterr()
        assert json.loads(printed.out)["left_out"] == 2 and json.loads(printed.out)["scans"] == 3
        assert f"left out scan3: {data / 'scan3.nii.gz'}: constant" in printed.err
        assert f"left out scan4: {data / 'scan4.nii.gz'}: is empty" in printed.err
        assert "2 left out, 3 scans remain" in printed.err
        assert "note: files that are no scans: 1 .txt" in printed.err
        code, message = refused(capsys, name, data, "--out", tmp_path / "strict", "--strict", *more)
        assert code == 3 and message.startswith(f"case scan3: {data / 'scan3.nii.gz'}: constant")
        assert not (tmp_path / "strict").exists()
    rejected = json.loads((tmp_path / "spade-pretrain" / "provenance.json").read_text(encoding="utf-8"))["rejected"]
    assert [one["name"] for one in rejected] == ["scan3", "scan4"]
    assert "is empty (0 bytes)" in (tmp_path / "spade-pretrain" / "report.html").read_text(encoding="utf-8")


def test_real_specimens(shared_data, tmp_path, capsys):
    odd = shared_data / "odd"
    for place, reason in {
        "corrupt/constant.nii.gz": "constant, every voxel is 5",
        "corrupt/crc_error.nii.gz": "the compressed data is damaged",
        "corrupt/empty.nii.gz": "is empty (0 bytes)",
        "corrupt/nan_block.nii.gz": "5460 of 61880 voxels are NaN or Inf",
        "corrupt/truncated.nii.gz": "is truncated",
        "dicom/generic_rgb_001": "is RGB",
        "dicom/failing_sliceincrement_001": "slices are missing",
        "nifti/example4d.nii.gz": "is 4-D",
        "nifti/sheared_affine.nii.gz": "has a shear",
    }.items():
        code, message = refused(capsys, "spade-prepare", odd / place, "--out", tmp_path / "out")
        assert code == 3 and str(odd / place) in message and reason in message
        assert not (tmp_path / "out").exists()
    assert call("spade-prepare", odd / "corrupt", "--out", tmp_path / "out", "--json") == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["left_out"] == 5 and printed.err.count("left out ") == 5


# --- options and folders that cannot be used -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tokens", "message"),
    [
        ("spade-prepare", "DATA --out OUT --workers -1", "--workers -1: 0 or more"),
        ("spade-prepare", "DATA --out OUT --part 0/4", "--part 0/4: I/N is needed, with I from 1 to N"),
        ("spade-prepare", "DATA --out OUT --part 3", "--part 3: I/N is needed"),
        ("spade-prepare", "DATA --out OUT --window 250 -175", "the lower end of a range comes first"),
        ("spade-prepare", "DATA --out OUT --mr bright", "'percentile' or 'zscore'"),
        ("spade-prepare", "DATA --out OUT --spacing 0 1 1", "0.0 given; input should be greater than 0"),
        ("spade-prepare", "DATA --out OUT --spacing own", "--spacing: own given; it takes 3 numbers, or native"),
        ("spade-prepare", "DATA", "--out requires an argument"),
        ("spade-pretrain", "--out OUT", "no DATA given"),
        ("spade-pretrain", "DATA --data.spacing native --out OUT", "native: crops of pretraining have one"),
        ("spade-pretrain", "DATA DATA --out OUT", "Unused Tokens"),
        ("spade-pretrain", "DATA --out OUT --optim.lrr 1", "Unknown option: --optim.lrr. Did you mean --optim.lr?"),
        ("spade-pretrain", "DATA --out OUT --steps many", "--steps: 'many' given; input should be a valid integer"),
        ("spade-pretrain", "DATA --out OUT --steps 0", "--steps: '0' given; input should be greater than"),
        ("spade-pretrain", "DATA --out OUT --optim.lr nan", "--optim.lr: 'nan' given; input should be a finite number"),
        ("spade-pretrain", "DATA --out OUT --crop.shape 8 8", "--crop.shape: 8 8 given; it takes 3 whole numbers"),
        ("spade-pretrain", "DATA --out OUT --crop.zoom 1.2 0.8", "the lower end of a range comes first"),
        ("spade-pretrain", "DATA --out OUT --network.heads 5 10 20 40", "5 heads cannot share the 24 channels"),
        ("spade-pretrain", "DATA --out OUT --device tpu", "--device: 'tpu' given; input should be 'auto', 'cpu' or"),
        ("spade-pretrain", "DATA --out OUT --recipe dino", "recipe 'dino' is not known; one of: "),
        ("spade-pretrain", "DATA --out OUT --config none.yaml", "none.yaml: no such configuration file"),
        ("spade-pretrain", "DATA --out OUT --config YAML", "optim.lrr is not a known key; did you mean optim.lr?"),
        ("dagman-finetune", "DATA --out OUT --task detection", "--task: 'detection' given; input should be 'segment"),
        ("dagman-finetune", "DATA --out OUT --labels 9", "--labels 9: only 2 labelled subjects may train"),
        ("dagman-finetune", "DATA --out OUT --labels 1.5", "--labels: '1.5' given; a whole number of subjects, or a"),
        ("dagman-finetune", "DATA --out OUT --labels 1.0", "--labels: '1.0' given; this may be one subject or all"),
        ("dagman-finetune", "DATA --out OUT --fold 3", "fold 3 of 3 asked for"),
        ("dagman-predict", "DATA --out OUT", "no scans given"),
        ("dagman-predict", "DATA DATA --out OUT --device tpu", "--device tpu: one of auto, cpu, cuda"),
        ("dagman-predict", "DATA DATA --out OUT --batch 0", "--batch 0: at least 1 window at once"),
        ("dagman-predict", "DATA DATA --out OUT --flips rl", "--flips rl: letters of ras, each once, or all"),
        ("dagman-predict", "DATA DATA --out OUT --flips aa", "--flips aa: letters of ras, each once, or all"),
        ("dagman-predict", "DATA DATA --out OUT --except liver", "--except liver without --largest-component"),
        ("dagman-predict", "DATA DATA --out OUT --format dicom", "--format dicom: one of nifti, same"),
        ("dagman-predict", "DATA DATA --out OUT --precision fp16", "--precision fp16: one of auto, fp32, bf16"),
        ("dagman-predict", "DATA DATA --out OUT --attention-stage 2", "--attention-stage 2 without --attention"),
        ("dagman-predict", "DATA DATA --out OUT --attention --attention-stage 5", "an encoder has stages 1 to 4"),
        ("dagman-compare", "DATA --out OUT", "1 runs given; a comparison needs at least two"),
        ("dagman-compare", "DATA DATA --out OUT --metric recall", '"recall" for --metric. Choose from: "dice", '),
        ("dagman-probe", "DATA --out OUT", "--encoder requires an argument"),
        ("dagman-probe", "DATA --encoder YAML --out OUT --scans 0", "--scans: '0' given; input should be greater than"),
    ],
)
def test_wrong_options_are_refused_by_name(name, tokens, message, tmp_path, capsys):
    places = {"DATA": labelled(tmp_path / "data", *livers(3)), "OUT": tmp_path / "out", "YAML": tmp_path / "c.yaml"}
    places["YAML"].write_text("optim: {lrr: 1}\n")
    code, said = refused(capsys, name, *(places.get(token, token) for token in tokens.split()))
    assert code == 2 and message in said
    assert not places["OUT"].exists()


def test_the_list_of_recipes_is_printed(tmp_path, capsys):
    _, said = refused(capsys, "spade-pretrain", tmp_path, "--out", tmp_path / "out", "--recipe=dino")
    assert "spade" in said.partition("one of: ")[2].split(", ")


def test_a_checkpoint_of_another_shape_is_refused_before_anything_is_begun(tmp_path, capsys):
    data, out = labelled(tmp_path / "data", *livers(3)), tmp_path / "out"
    wide, cut, odd = (tmp_path / f"{name}.safetensors" for name in ("wide", "cut", "odd"))
    save_encoder(wide, SwinUNETR(1, 1, feature_size=24))
    cut.write_bytes(wide.read_bytes()[:5000])
    save_file(SwinUNETR(1, 1, feature_size=20, heads=(2, 4, 5, 8)).swinViT.state_dict(), odd)
    for init, more, reason in (
        (wide, ["--network.feature-size", 12], "an encoder with feature_size 24 (here 12)"),
        (cut, [], "not a whole safetensors file"),
        (odd, [], "multiple of 12"),
        (tmp_path / "none.pt", [], "no such file"),
    ):
        code, said = refused(capsys, "dagman-finetune", data, "--init", init, "--out", out, "--steps", 1, *more)
        assert code == 3 and said.startswith(str(init)) and reason in said
        assert not out.exists()


def test_a_run_given_for_its_encoder_is_read_and_its_fault_names_the_file(tmp_path, capsys):
    data, run = labelled(tmp_path / "data", *livers(3)), tmp_path / "run"
    run.mkdir()
    (run / "encoder.safetensors").write_bytes(b"cut")
    code, said = refused(capsys, "dagman-finetune", data, "--init", run, "--out", tmp_path / "out", "--steps", 1)
    assert code == 3 and said.startswith(f"{run / 'encoder.safetensors'}: not a whole safetensors file")
    (tmp_path / "asked.yaml").write_text(f"init: {run}\n")
    more = ["--config", tmp_path / "asked.yaml", "--out", tmp_path / "out", "--steps", 1]
    assert refused(capsys, "dagman-finetune", data, *more) == (code, said)


def test_a_run_that_was_begun_from_a_run_is_resumed_with_the_same_configuration(tmp_path):
    (tmp_path / "encoder.safetensors").write_bytes(b"")
    asked = tmp_path / "asked.yaml"
    asked.write_text(f"init: {tmp_path}\n")
    for tree in (FinetuneSettings, StudySettings):
        begun = resolve(tree, [asked], {})
        assert begun.init == str(tmp_path / "encoder.safetensors") and begun.model_fields_set == {"init"}
        (tmp_path / "config.yaml").write_text(to_yaml(begun))
        assert begun_settings(tree, tmp_path, [asked], {}) == begun
        with pytest.raises(UsageFault, match=r"other settings \(init\)"):
            begun_settings(tree, tmp_path, [], {"init": str(asked)})


@pytest.mark.parametrize("more", [[], ["--config", "asked.yaml"]])
def test_a_run_is_resumed_by_its_own_recipe(tmp_path, capsys, monkeypatch, more):
    monkeypatch.chdir(tmp_path)
    Path("asked.yaml").write_text("seed: 0\n")
    folder(tmp_path / "run").joinpath("config.yaml").write_text("recipe: dagman\ndistill:\n  stage: 2\n")
    code, said = refused(capsys, "spade-pretrain", "--out", tmp_path / "run", "--resume", *more)
    assert code == 2 and "no DATA given" in said, "the settings of dagman were understood"
    assert recipe_name(["--out", str(tmp_path / "run")]) == "spade", "a new run is not what lies there"
    code, said = refused(capsys, "spade-pretrain", "--out", tmp_path / "run", "--resume", "--recipe", "spade", *more)
    assert code == 2 and "begun with recipe dagman, and spade is asked for (--recipe or --config); resume" in said


def test_a_fine_tuning_is_resumed_with_its_own_task(tmp_path, capsys):
    folder(tmp_path / "run").joinpath("config.yaml").write_text("steps: 1\n")
    code, said = refused(capsys, "dagman-finetune", "--out", tmp_path / "run", "--resume", "--task", "classification")
    assert code == 2 and "begun with task segmentation, and classification is asked for" in said


def test_fine_tuning_needs_labels_to_learn_from_and_to_be_judged_by(tmp_path, capsys):
    for data, reason in (
        (folder(tmp_path / "plain", scan(0), scan(1)), "no labelled scan"),
        (labelled(tmp_path / "alone", *livers(1)), "1 labelled subjects (case0) among 1 scans; at least 2 are needed"),
    ):
        code, said = refused(capsys, "dagman-finetune", data, "--out", tmp_path / "out", "--steps", 1)
        assert code == 3 and reason in said
        assert not (tmp_path / "out").exists()


def snapshot(place: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(place.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    "tokens",
    [
        "spade-pretrain",
        "spade-pretrain --recipe moco",
        "spade-pretrain --recipe dagman",
        "spade-pretrain --recipe spade-dagman",
        "dagman-finetune",
    ],
)
def test_crops_that_no_memory_holds_are_refused(tmp_path, capsys, tokens):
    """The system killed such a run without a word."""
    labelled(tmp_path / "data", *livers(4))
    name, *more = tokens.split()
    more += ["--crop.shape", 4096, 4096, 4096, "--steps", 1, "--device", "cpu"]
    code, said = refused(capsys, name, tmp_path / "data", "--out", tmp_path / "run", *more)
    assert code == 2 and "crops of 4096 x 4096 x 4096 voxels" in said and "choose smaller or fewer crops" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "tokens", "message"),
    [
        ("spade-prepare", "DATA --out FULL", "holds files that are no store"),
        ("spade-prepare", "DATA --out FILE", "is a file; a folder for the store is needed"),
        ("spade-prepare", "DATA --out STORE --window 0 80", "holds a store of another preprocessing"),
        ("spade-prepare", "STORE --out NEW", "is a store already"),
        ("spade-pretrain", "DATA --out RUN", "already holds a run; give another --out, or continue"),
        ("spade-pretrain", "DATA --out FULL", "is not empty (1 entries)"),
        ("spade-pretrain", "DATA --out FILE", "is a file; --out needs a folder"),
        ("spade-pretrain", "DATA --out NEW --resume", "holds no run to resume"),
        ("dagman-finetune", "DATA --out RUN", "already holds a run"),
        ("dagman-predict", "FULL DATA --out NEW", "no model there; give a finished run of dagman-finetune"),
        ("dagman-predict", "FILE DATA --out NEW", "not readable as safetensors"),
        ("dagman-predict", "FULL DATA --out NEW --attention", "no model there; give a finished run of spade-pretrain"),
        ("dagman-compare", "RUN FULL --out NEW", "holds no finished run of dagman-finetune (no summary.json)"),
    ],
)
def test_folders_that_hold_something_else_are_left_as_they_are(name, tokens, message, tmp_path, capsys):
    places = {word: tmp_path / word.lower() for word in ("DATA", "FULL", "FILE", "STORE", "RUN", "NEW")}
    labelled(places["DATA"], *livers(2))
    folder(places["FULL"], scan())
    places["FILE"].write_text("x" * 99)
    folder(places["RUN"]).joinpath("config.yaml").write_text("steps: 1\n")
    assert call("spade-prepare", places["DATA"], "--out", places["STORE"]) == 0
    capsys.readouterr()
    before = snapshot(tmp_path)
    code, said = refused(capsys, name, *(places.get(token, token) for token in tokens.split()))
    assert code == 3 and message in said
    assert snapshot(tmp_path) == before and not places["NEW"].exists()


def test_a_fold_that_nobody_has_is_refused_before_any_scan_is_prepared(tmp_path, capsys):
    data = labelled(tmp_path / "data", *livers(2))
    about = json.loads((data / "dataset.json").read_text(encoding="utf-8"))
    own = about | {"training": about["training"][:1], "validation": about["training"][1:]}
    for described, said in (about, "fold 3 of 2 asked for"), (own, "the dataset's own validation part judges"):
        write_json(data / "dataset.json", described)
        for name in ("spade-pretrain", "dagman-finetune"):
            assert call(name, data, "--out", tmp_path / "out", "--fold", 3) == 2
            told = capsys.readouterr().err
            assert said in told and "preparing" not in told
            assert not (tmp_path / "out").exists()


def test_settings_that_a_store_was_not_prepared_with_are_refused(tmp_path, capsys):
    data, store = folder(tmp_path / "data", scan(0), scan(1)), tmp_path / "store"
    assert call("spade-prepare", data, "--out", store) == 0
    capsys.readouterr()
    code, said = refused(capsys, "spade-pretrain", store, "--out", tmp_path / "out", "--data.window-hu", 0, 80)
    assert code == 2 and "data.window_hu (0.0, 80.0) asked for, the store has (-175.0, 250.0)" in said
    assert not (tmp_path / "out").exists()
