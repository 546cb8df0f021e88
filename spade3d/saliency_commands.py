"""spade-saliency: where to look, added to a store. Options are read before torch is imported."""

import sys
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from spade3d import console
from spade3d.commands import CONFIG, find_device
from spade3d.configuration import resolve
from spade3d.faults import PREEMPTED, DataFault, UsageFault
from spade3d.saliency_predictor import PredictorSettings, train_predictor

Device = Literal["auto", "cpu", "cuda"]


def main(tokens: list[str] | None = None) -> None:
    """Console script `spade-saliency`."""
    app = console.command_line(
        "spade-saliency", "Where to look: saliency for the scans of a store, from gaze, labels or networks."
    )

    @app.command
    def gaze(
        store: Path,
        /,
        *,
        fixations: Path,
        first_slice: Literal["auto", "0", "1"] = "auto",
        sigma_mm: float | None = None,
        sigma_slices_mm: float | None = None,
        replace: bool = False,
        strict: bool = False,
        json: bool = False,
    ) -> None:
        """Saliency from where readers looked.

        Parameters
        ----------
        store
            a store of spade-prepare.
        fixations
            CT-ScanGaze JSON, a CSV (case,x,y,z,duration_s or GazeMedSeg's columns), or a folder of such files.
        first_slice
            the number that the files give to the first slice, row and column; auto is 1 in JSON and 0 in CSV, which
            is printed.
        sigma_mm
            of the Gaussian within slices; left out, 3 % of the field of view.
        sigma_slices_mm
            across slices; left out, half of that, two slices at least.
        replace
            write over the saliency that cases have already.
        strict
            stop at the first gaze that cannot be used instead of leaving it out.
        json
            print the result as one JSON object.
        """
        from spade3d.saliency import from_gaze
        from spade3d.volumes.gaze import Blur

        _check_store(store)
        console.existing(fixations, "a file of fixations, or a folder of such files,")
        for name, value in {"--sigma-mm": sigma_mm, "--sigma-slices-mm": sigma_slices_mm}.items():
            if value is not None and not 0 < value < float("inf"):
                raise UsageFault(f"{name} {value}: a length above 0 is needed")
        first = None if first_slice == "auto" else int(first_slice)
        blur = Blur(sigma_mm, sigma_slices_mm)
        result = from_gaze(store, fixations, first, blur, replace_others=replace, strict=strict)
        console.print_result(result, json)

    @app.command
    def labels(
        store: Path,
        /,
        *,
        names: tuple[str, ...] = (),
        dilate_mm: float = 5.0,
        blur_mm: float = 5.0,
        replace: bool = False,
        json: bool = False,
    ) -> None:
        """Saliency from labelled structures; not gaze, and named so.

        Parameters
        ----------
        store
            a store of spade-prepare.
        names
            a structure, such as lesion; may be given several times; left out, all.
        dilate_mm
            how far around a structure is salient, too.
        blur_mm
            standard deviation of the Gaussian over it.
        replace
            write over the saliency that cases have already.
        json
            print the result as one JSON object.
        """
        _check_store(store)
        for name, value in {"--dilate-mm": dilate_mm, "--blur-mm": blur_mm}.items():
            if not 0 <= value < float("inf"):
                raise UsageFault(f"{name} {value}: a length of 0 or more is needed")
        from spade3d.saliency import from_labels

        console.print_result(from_labels(store, names, dilate_mm, blur_mm, replace_others=replace), json)

    @app.command
    def attention(
        store: Path, /, *, init: Path, device: Device = "auto", replace: bool = False, json: bool = False
    ) -> None:
        """Saliency from the attention of a trained encoder; not gaze, and named so, and whether labels taught the
        encoder. Of a run with a [CLS] it is that of the [CLS].

        Parameters
        ----------
        store
            a store of spade-prepare.
        init
            a run of spade-pretrain, its encoder.safetensors, or another Swin-UNETR's checkpoint.
        device
            where the encoder runs.
        replace
            write over the saliency that cases have already.
        json
            print the result as one JSON object.
        """
        _check_store(store)
        checkpoint = console.checkpoint(init)
        from spade3d.saliency import from_attention

        console.print_result(from_attention(store, checkpoint, find_device(device), replace_others=replace), json)

    @app.command
    def train(
        store: Path,
        /,
        *,
        out: Path,
        resume: bool = False,
        json: bool = False,
        settings: Annotated[PredictorSettings | None, Parameter(name="*")] = None,
    ) -> None:
        """Train a network that predicts saliency, on the scans that have some.

        Parameters
        ----------
        store
            a store of spade-prepare with saliency.
        out
            the folder of the run, new or empty.
        resume
            continue the run in --out.
        json
            print the result as one JSON object.
        """
        from spade3d.training.interruption import preemptible

        _check_store(store)
        flags = {} if settings is None else settings.model_dump(exclude_unset=True)
        if resume and flags:
            raise UsageFault(
                f"--resume goes on with the settings that the run began with; leave out {', '.join(flags)}"
            )
        if resume and not (out / CONFIG).is_file():
            raise DataFault(f"{out}: holds no run to resume (no {CONFIG}); start it without --resume")
        if resume:
            (out / PREEMPTED).unlink(missing_ok=True)
        chosen = resolve(PredictorSettings, [out / CONFIG] if resume else [], flags, environment={})
        with preemptible(out, CONFIG, resume=resume):
            result = train_predictor(store, out, chosen, find_device(chosen.device), resume=resume)
        console.print_result(result, json)

    @app.command
    def predict(
        store: Path, /, *, model: Path, device: Device = "auto", replace: bool = False, json: bool = False
    ) -> None:
        """Saliency from a trained network, for the scans without any.

        Parameters
        ----------
        store
            a store of spade-prepare.
        model
            a run of spade-saliency train, or its saliency.safetensors.
        device
            where the network runs.
        replace
            write over the saliency that cases have already.
        json
            print the result as one JSON object.
        """
        _check_store(store)
        console.existing(model, "a run of spade-saliency train, or its saliency.safetensors,")
        from spade3d.saliency import from_predictor

        console.print_result(from_predictor(store, model, find_device(device), replace_others=replace), json)

    sys.exit(console.run(app, sys.argv[1:] if tokens is None else tokens, PredictorSettings))


def _check_store(path: Path) -> None:
    from spade3d.volumes.store import is_store

    console.existing(path, "a store of spade-prepare")
    if not is_store(path):
        raise DataFault(f"{path}: is no store; make one from the scans with spade-prepare first")
