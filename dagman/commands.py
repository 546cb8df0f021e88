"""dagman-finetune, dagman-predict, dagman-compare and dagman-probe. Options are read before torch is imported."""

import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, get_args

from cyclopts import App, Parameter

from dagman.recipes.finetuning import FinetuneCommand, resolve_finetuning
from dagman.recipes.predicting import Segmenting
from dagman.recipes.probing import ProbeSettings
from dagman.recipes.studies import StudySettings
from spade3d import console
from spade3d.commands import as_begun, begun_settings, configured, option_values
from spade3d.configuration import FLAGS, resolve
from spade3d.faults import DataFault, UsageFault

OF_STUDIES = ("auroc", "ap", "iou", "t_iou_0.1", "t_iou_0.3", "t_iou_0.5", "pointing", "pointing_near", "voxel_ap")
METRICS = ("dice", "hd95_mm", "nsd", "asd_mm", "volume_error_ml", *OF_STUDIES)  # that a comparison may be about
TOLD = ("volumes_ml", "probabilities", "seconds")  # of a prediction: what people have read line by line


def finetune(tokens: list[str] | None = None) -> None:
    """Console script `dagman-finetune`; its options follow --task."""
    tokens = sys.argv[1:] if tokens is None else tokens
    name = "dagman-finetune"
    about = (
        "Fine-tune a pretrained encoder on labelled scans, and judge it. --task classification and --task localisation "
        "learn from labels of whole studies, and have options of their own (dagman-finetune --task classification "
        "--help)."
    )
    app = console.command_line(name, about)
    try:
        of_studies = asked_task(tokens) in get_args(StudySettings.model_fields["task"].annotation)
    except UsageFault as fault:
        print(f"{name}: {fault}", file=sys.stderr)
        sys.exit(fault.exit_code)
    if of_studies:
        register_studies(app)
        sys.exit(console.run(app, tokens, StudySettings))

    @app.default
    def _(
        data: Path | None = None,
        /,
        *,
        out: Path,
        config: tuple[Path, ...] = (),
        resume: bool = False,
        strict: bool = False,
        json: bool = False,
        settings: Annotated[FinetuneCommand | None, Parameter(name="*"), FLAGS] = None,
    ) -> None:
        """Fine-tune and judge.

        With --draws, --seeds or --from-scratch-twin these are several runs, each in a folder of its own below --out.
        --task classification and --task localisation learn from labels of whole studies, and have options of their own
        (`dagman-finetune --task classification --help`).

        Parameters
        ----------
        data
            a labelled dataset in any known layout, a JSON list or a store; or `data.path` of the config.
        out
            the folder of the run or of the runs, new or empty.
        config
            YAML files, merged left to right.
        resume
            continue what was begun in --out.
        strict
            stop at the first bad scan; make leakage from pretraining an error.
        json
            print the result as one JSON object.
        """
        from dagman.few_shot import run_finetunings

        flags = {} if settings is None else settings.model_dump(exclude_unset=True)
        if data is not None:
            flags.setdefault("data", {})["path"] = str(data)
        chosen = begun_settings(FinetuneCommand, out, config, flags) if resume else resolve_finetuning(config, flags)
        if chosen.data.path is None:
            raise UsageFault("no DATA given; name a labelled dataset or a store")
        console.existing(Path(chosen.data.path), "a labelled dataset or a store")
        if chosen.init is not None:
            console.checkpoint(Path(chosen.init))
        result = run_finetunings(chosen, out, resume=resume, strict=strict)
        if result is not None:
            console.print_result(result, json)

    sys.exit(console.run(app, tokens, FinetuneCommand))


def asked_task(tokens: list[str]) -> str:
    """The task that the flags, the configuration files or the run to be resumed ask for; it decides which options there
    are."""
    given = option_values(tokens, "--task")
    asked = given[-1] if given else configured(tokens, "task") or "segmentation"
    return as_begun(tokens, "task", asked, "segmentation")


def register_studies(app: App) -> None:
    """Give `dagman-finetune` the options of classification and localisation."""

    @app.default
    def _(
        data: Path | None = None,
        /,
        *,
        out: Path,
        config: tuple[Path, ...] = (),
        resume: bool = False,
        strict: bool = False,
        json: bool = False,
        settings: Annotated[StudySettings | None, Parameter(name="*"), FLAGS] = None,
    ) -> None:
        """Learn which findings a study shows, and where, from labels of whole studies.

        Parameters
        ----------
        data
            scans in any known layout, a JSON list or a store; or `data.path` of the config. --findings names the CSV.
        out
            the folder of the run, new or empty.
        config
            YAML files, merged left to right.
        resume
            continue what was begun in --out.
        strict
            stop at the first bad scan; make leakage from pretraining an error.
        json
            print the result as one JSON object.
        """
        from dagman.studying import run_study

        flags = {} if settings is None else settings.model_dump(exclude_unset=True)
        if data is not None:
            flags.setdefault("data", {})["path"] = str(data)
        chosen = begun_settings(StudySettings, out, config, flags) if resume else resolve(StudySettings, config, flags)
        if chosen.data.path is None:
            raise UsageFault("no DATA given; name a folder of scans, a dataset or a store")
        console.existing(Path(chosen.data.path), "a folder of scans, a dataset or a store")
        if chosen.init is not None:
            console.checkpoint(Path(chosen.init))
        console.print_result(run_study(chosen, out, resume=resume, strict=strict), json)


def predict(tokens: list[str] | None = None) -> None:
    """Console script `dagman-predict`."""
    app = console.command_line(
        "dagman-predict",
        "Segment scans, tell their findings, or show where a network looks in them, each on its own grid.",
    )

    @app.default
    def _(
        model: Path,
        /,
        *scans: Path,
        out: Path,
        device: str = "auto",
        batch: int | None = None,
        flips: str | None = None,
        largest_component: bool = False,
        exempt: Annotated[tuple[str, ...], Parameter(name="--except")] = (),
        format: str = "nifti",
        precision: str = "auto",
        attention: bool = False,
        attention_stage: int | None = None,
        strict: bool = False,
        json: bool = False,
    ) -> None:
        """Segment scans, tell their findings, or show where a network looks.

        Parameters
        ----------
        model
            a run of dagman-finetune, or its model.safetensors; with --attention also a run of spade-pretrain, or its
            encoder.safetensors, which does not segment. A run of --task classification or localisation tells findings:
            OUT/predictions.csv gets their probabilities, and, where its head has maps, OUT/<scan>_<finding>.nii.gz
            shows where each is; of the other options it takes --device, --strict and --json.
        scans
            scans, DICOM folders, or folders of scans.
        out
            where OUT/<scan>.nii.gz are written, on the grid of the scan and with the label values of the training data;
            OUT/volumes.csv gets a row for each scan and class.
        device
            auto, cpu or cuda.
        batch
            windows at once; by default 4 on a GPU, and on a CPU as many as 65,536 voxels hold.
        flips
            average over mirror images: `all` 8, or those along some of the axes `ras` (right, anterior, superior), such
            as `as`. Mirrored along R, a left kidney looks like a right one: classes with a side change places, unless
            the model was fine-tuned on crops flipped along R.
        largest_component
            keep only the largest connected piece of each class.
        exempt
            a class that may lie in several pieces; may be given several times.
        format
            nifti; or same: .nrrd for NRRD, .mha for MetaImage, .nii for .nii, and NIfTI for DICOM.
        precision
            auto, fp32 or bf16. auto: bf16 on a GPU that has it, else fp32. bf16 nearly halves the time of a CPU that
            computes it (AVX-512 BF16 or AMX); borders may move by a voxel here and there.
        attention
            write where the network looks, OUT/<scan>_attention.nii.gz (mean over heads) and
            OUT/<scan>_attention_heads.nii.gz (4-D, a map for each head). 1 is the average of a crop: the maps show what
            stands out within a crop. It is the attention of [CLS] where the run has one, else the attention that
            each cell receives in the last block of stage 3.
        attention_stage
            the attention that each cell receives in the last block of this stage, 1 to 4, instead.
        strict
            stop at the first bad scan instead of leaving it out.
        json
            print the result as one JSON object.
        """
        if not scans:
            raise UsageFault("no scans given; name files or folders after the model")
        if device not in ("auto", "cpu", "cuda"):
            raise UsageFault(f"--device {device}: one of auto, cpu, cuda is needed")
        if attention_stage is not None and not attention:
            raise UsageFault(f"--attention-stage {attention_stage} without --attention; give both, or neither")
        if attention_stage not in (None, 1, 2, 3, 4):
            raise UsageFault(f"--attention-stage {attention_stage}: an encoder has stages 1 to 4")
        how = Segmenting(batch, flips, largest_component, exempt, format, precision)
        for path in (model, *scans):
            console.existing(path, "a file or a folder")

        from dagman.prediction import predict_scans
        from dagman.study_prediction import is_study_model, predict_studies

        tell = None if json else partial(print, flush=True)
        if is_study_model(model):
            found = predict_studies(model, scans, out, device, strict, how, attention=attention, tell=tell)
        else:
            looks = {"attention": attention, "attention_stage": attention_stage}
            found = predict_scans(model, scans, out, device, strict, how, **looks, tell=tell)
        console.print_result(found if json else {key: found[key] for key in found if key not in TOLD}, json)

    sys.exit(console.run(app, sys.argv[1:] if tokens is None else tokens))


def compare(tokens: list[str] | None = None) -> None:
    """Console script `dagman-compare`."""
    app = console.command_line("dagman-compare", "Compare fine-tuning runs, paired by case and seed.")

    @app.default
    def _(
        *runs: Path,
        out: Path = Path("comparison"),
        metric: Literal[METRICS] | None = None,
        json: bool = False,
    ) -> None:
        """Compare runs of dagman-finetune.

        Runs that began with the same encoder and learned by the same settings are one side; runs with the same seed,
        draw and fold are paired, and the cases of all folds pooled. The side from scratch is the reference, else the
        side of the first run.

        Parameters
        ----------
        runs
            two or more runs under one protocol, on the same cases; or folders of several runs, such as --out of a
            dagman-finetune with --draws and --from-scratch-twin.
        out
            where report.html and comparison.json, .csv, .md and .tex go; an earlier comparison there is replaced.
        metric
            what the report is about, left open dice, and auroc for runs of --task classification or localisation;
            choose it before looking, since p is not adjusted over metrics.
        json
            print the result as one JSON object.
        """
        for run in runs:
            console.existing(run, "the folder of a run of dagman-finetune, or of several")
        if len(runs) < 2 and not any(path for run in runs for path in run.glob("*/summary.json")):
            raise UsageFault(f"{len(runs)} runs given; a comparison needs at least two, or a folder of several")
        if (out / "summary.json").exists():
            raise DataFault(f"{out}: holds a run; give the comparison another --out")

        from dagman.evaluation.comparison import compare_runs

        console.print_result(compare_runs(runs, out, metric), json)

    sys.exit(console.run(app, sys.argv[1:] if tokens is None else tokens))


def probe(tokens: list[str] | None = None) -> None:
    """Console script `dagman-probe`."""
    app = console.command_line("dagman-probe", "Ask frozen encoders what they know, before any fine-tuning.")

    @app.default
    def _(
        data: Path,
        /,
        *,
        encoder: Annotated[tuple[Path, ...], Parameter(consume_multiple=True)],
        out: Path,
        strict: bool = False,
        json: bool = False,
        settings: Annotated[ProbeSettings | None, Parameter(name="*"), FLAGS] = None,
    ) -> None:
        """Ask frozen encoders.

        Parameters
        ----------
        data
            a dataset in any known layout, a folder of scans, a JSON list or a store; without labels, less is asked.
        encoder
            one or more encoders: runs of spade-pretrain, their encoder.safetensors, or another Swin-UNETR's checkpoint.
        out
            where report.html, probes.json and probes.csv go, new or empty.
        strict
            stop at the first bad scan; make probing scans of the pretraining an error.
        json
            print the result as one JSON object.
        """
        flags = {} if settings is None else settings.model_dump(exclude_unset=True)
        chosen = resolve(ProbeSettings, [], flags, environment={})
        console.existing(data, "a dataset, a folder of scans or a store")
        encoders = [console.checkpoint(path) for path in encoder]

        from dagman.probing import run_probing

        console.print_result(run_probing(data, encoders, chosen, out, strict=strict), json)

    sys.exit(console.run(app, sys.argv[1:] if tokens is None else tokens, ProbeSettings))
