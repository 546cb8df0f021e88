"""dagman-finetune, dagman-predict and dagman-compare. Options are read before torch is imported."""

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from dagman.recipes.finetuning import FinetuneSettings
from spade3d import console
from spade3d.commands import begun_settings
from spade3d.configuration import resolve
from spade3d.faults import DataFault, UsageFault


def finetune(tokens: list[str] | None = None) -> None:
    """Console script `dagman-finetune`."""
    app = console.command_line("dagman-finetune", "Fine-tune a pretrained encoder on labelled scans, and judge it.")

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
        settings: Annotated[FinetuneSettings | None, Parameter(name="*")] = None,
    ) -> None:
        """Fine-tune and judge.

        Parameters
        ----------
        data
            a labelled dataset in any known layout, a JSON list or a store; or `data.path` of the config.
        out
            the folder of the run, new or empty.
        config
            YAML files, merged left to right.
        resume
            continue the run in --out.
        strict
            stop at the first bad scan; make leakage from pretraining an error.
        json
            print the result as one JSON object.
        """
        from dagman.finetuning import run_finetuning

        flags = {} if settings is None else settings.model_dump(exclude_unset=True)
        if data is not None:
            flags.setdefault("data", {})["path"] = str(data)
        chosen = begun_settings(FinetuneSettings, out, config, flags) if resume else None
        chosen = chosen or resolve(FinetuneSettings, config, flags)
        if chosen.data.path is None:
            raise UsageFault("no DATA given; name a labelled dataset or a store")
        console.existing(Path(chosen.data.path), "a labelled dataset or a store")
        if chosen.init is not None:
            console.existing(Path(chosen.init), "a checkpoint, such as RUN/encoder.safetensors,")
        console.print_result(run_finetuning(chosen, out, resume=resume, strict=strict), json)

    sys.exit(console.run(app, sys.argv[1:] if tokens is None else tokens, FinetuneSettings))


def predict(tokens: list[str] | None = None) -> None:
    """Console script `dagman-predict`."""
    app = console.command_line(
        "dagman-predict", "Segment scans, or show where a network looks in them, each on its own grid."
    )

    @app.default
    def _(
        model: Path,
        /,
        *scans: Path,
        out: Path,
        device: str = "auto",
        attention: bool = False,
        attention_stage: int | None = None,
        strict: bool = False,
        json: bool = False,
    ) -> None:
        """Segment scans, or show where a network looks.

        Parameters
        ----------
        model
            a run of dagman-finetune, or its model.safetensors; with --attention also a run of spade-pretrain, or its
            encoder.safetensors, which does not segment.
        scans
            scans, DICOM folders, or folders of scans.
        out
            where OUT/<scan>.nii.gz are written, on the grid of the scan and with the label values of the training data.
        device
            auto, cpu or cuda.
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
        for path in (model, *scans):
            console.existing(path, "a file or a folder")

        from dagman.prediction import predict_scans

        found = predict_scans(model, scans, out, device, strict, attention=attention, attention_stage=attention_stage)
        console.print_result(found, json)

    sys.exit(console.run(app, sys.argv[1:] if tokens is None else tokens))


def compare(tokens: list[str] | None = None) -> None:
    """Console script `dagman-compare`."""
    app = console.command_line("dagman-compare", "Compare fine-tuning runs, paired by case and seed.")

    @app.default
    def _(*runs: Path, out: Path = Path("comparison"), json: bool = False) -> None:
        """Compare runs of dagman-finetune.

        Runs that began with the same encoder are one side; runs with the same seed are paired. The side from scratch
        is the reference, else the side of the first run.

        Parameters
        ----------
        runs
            two or more runs under one protocol, on the same cases.
        out
            where report.html and comparison.json go; an earlier comparison there is replaced.
        json
            print the result as one JSON object.
        """
        if len(runs) < 2:
            raise UsageFault(f"{len(runs)} runs given; a comparison needs at least two")
        for run in runs:
            console.existing(run, "the folder of a run of dagman-finetune")
            if not (run / "summary.json").is_file():
                raise DataFault(f"{run}: holds no finished run of dagman-finetune (no summary.json); finish it first")

        if (out / "summary.json").exists():
            raise DataFault(f"{out}: holds a run; give the comparison another --out")

        from dagman.evaluation.comparison import compare_runs

        console.print_result(compare_runs(runs, out), json)

    sys.exit(console.run(app, sys.argv[1:] if tokens is None else tokens))
