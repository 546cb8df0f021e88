"""spade-prepare and spade-pretrain. Options are read before torch is imported, so that --help answers at once."""

import hashlib
import json
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter

from spade3d import console
from spade3d.configuration import (
    FLAGS,
    NATIVE,
    Common,
    Data,
    Pretraining,
    Settings,
    read_yaml,
    resolve,
    to_yaml,
    with_values,
)
from spade3d.faults import PREEMPTED, DataFault, UsageFault
from spade3d.recipes.recipe import Recipe, find_recipe
from spade3d.volumes.split import Split, split_cases, split_named

CONFIG, ENCODER, STORE = "config.yaml", "encoder.safetensors", "store"


class PrepareSettings(Settings):
    """How scans are prepared (the `data` part of every recipe)."""

    data: Data = Data()


def prepare(tokens: list[str] | None = None) -> None:
    """Console script `spade-prepare`."""
    app = console.command_line(
        "spade-prepare", "Prepare scans once: a store of compressed arrays for fast random crops."
    )

    @app.default
    def _(
        data: Path,
        /,
        *,
        out: Path,
        spacing: tuple[float, float, float] | Literal["native"] | None = None,
        window: tuple[float, float] = (-175.0, 250.0),
        mr: str = "percentile",
        workers: int = 0,
        part: str | None = None,
        strict: bool = False,
        json: bool = False,
    ) -> None:
        """Prepare scans once.

        Parameters
        ----------
        data
            a folder of scans, a dataset in any known layout, or a JSON list.
        out
            the store; an interrupted or older one of the same settings is completed.
        spacing
            mm along right-left, front-back, foot-head, or native, each scan's own; left out, the median of the set.
        window
            CT window in HU.
        mr
            intensity of MR, percentile or zscore.
        workers
            processes; 0 follows the machine.
        part
            I/N, the I-th of N shares of the scans, for N machines at once; the same command without --part then
            finishes the store.
        strict
            stop at the first bad scan instead of leaving it out.
        json
            print the result as one JSON object.
        """
        from spade3d.scans import open_scans, prepare_share
        from spade3d.volumes.store import is_store

        if workers < 0:
            raise UsageFault(f"--workers {workers}: 0 or more are needed")
        if is_store(data):
            raise DataFault(f"{data}: is a store already; use it as it is, or give the scans it was made from")
        flags = {"spacing": spacing, "window_hu": window, "mr": mr}
        settings = resolve(PrepareSettings, [], {"data": flags}, environment={}).data
        if part is not None:
            share = share_of(part)
            left_out = prepare_share(data, out, settings, *share, workers=workers)
            for rejection in left_out:
                print(f"left out {rejection.name}: {rejection.reason}", file=sys.stderr)
            console.print_result({"store": str(out), "part": part, "left_out": len(left_out), "finished": False}, json)
            return
        store = open_scans(data, out, settings, workers=workers, strict=strict)
        report_rejected(store)
        labelled = sum(case.has_labels for case in store.cases)
        summary = {"store": str(out), "scans": len(store), "labelled": labelled, "left_out": len(store.rejected)}
        console.print_result(summary, json)

    sys.exit(console.run(app, sys.argv[1:] if tokens is None else tokens))


def share_of(part: str) -> tuple[int, int]:
    """ "3/8" as (3, 8); UsageFault for anything that is no share."""
    number, _, of = part.partition("/")
    if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
        raise UsageFault(f"--part {part}: I/N is needed, with I from 1 to N, such as 3/8")
    return int(number), int(of)


def pretrain(tokens: list[str] | None = None) -> None:
    """Console script `spade-pretrain`."""
    tokens = sys.argv[1:] if tokens is None else tokens
    name = "spade-pretrain"
    app = console.command_line(name, "Pretrain a 3D Swin-UNETR encoder on unlabelled scans.")
    try:
        recipe = find_recipe(recipe_name(tokens))
    except UsageFault as fault:
        print(f"{name}: {fault}", file=sys.stderr)
        sys.exit(fault.exit_code)
    register_pretrain(app, recipe)
    sys.exit(console.run(app, tokens, recipe.settings))


def recipe_name(tokens: list[str]) -> str:
    """The recipe that the flags, the configuration files or the run to be resumed ask for; it decides which options
    there are."""
    given = option_values(tokens, "--recipe")
    return as_begun(tokens, "recipe", given[-1] if given else configured(tokens, "recipe") or "spade", "spade")


def as_begun(tokens: list[str], key: str, asked: str, otherwise: str) -> str:
    """What is asked for; UsageFault where the run to be resumed is of another, `otherwise` where its file says none."""
    for path in _begun(tokens):
        if (begun := str(read_yaml(path).get(key) or otherwise)) != asked:
            raise UsageFault(
                f"{path.parent}: the run was begun with {key} {begun}, and {asked} is asked for (--{key} or --config); "
                "resume it without that, or begin a new run with another --out"
            )
    return asked


def _begun(tokens: list[str]) -> list[Path]:
    """The settings of the run to be resumed, if there is one."""
    asked = [Path(out) / CONFIG for out in option_values(tokens, "--out") if "--resume" in tokens]
    return [path for path in asked if path.is_file()]


def configured(tokens: list[str], key: str) -> str | None:
    """What the configuration files say of a key, the last first, else the run to be resumed; None where none does."""
    files = [Path(path) for path in option_values(tokens, "--config")]
    named = [read_yaml(path).get(key) for path in [*_begun(tokens), *files]]
    return next((str(name) for name in reversed(named) if name is not None), None)


def option_values(tokens: list[str], option: str) -> list[str]:
    """The values given to an option, as `--option value` or `--option=value`."""
    after = [value for key, value in zip(tokens, tokens[1:], strict=False) if key == option]
    return after + [token.split("=", 1)[1] for token in tokens if token.startswith(f"{option}=")]


def register_pretrain(app: App, recipe: Recipe) -> None:
    """Give the command the options of a recipe: its settings are flags, dotted as in the YAML file."""

    def command(
        data: Path | None = None,
        /,
        *,
        out: Path,
        config: tuple[Path, ...] = (),
        resume: bool = False,
        strict: bool = False,
        json: bool = False,
        settings: Settings | None = None,
    ) -> None:
        """Pretrain an encoder.

        Parameters
        ----------
        data
            a folder of scans, a dataset in any known layout, a JSON list or a store; or `data.path` of the config.
        out
            the folder of the run, new or empty.
        config
            YAML files, merged left to right.
        resume
            continue the run in --out.
        strict
            stop at the first bad scan instead of leaving it out.
        json
            print the result as one JSON object.
        """
        flags = {} if settings is None else settings.model_dump(exclude_unset=True)
        if data is not None:
            flags.setdefault("data", {})["path"] = str(data)
        result = run_pretraining(recipe, out, config, flags, resume=resume, strict=strict)
        if result is not None:
            console.print_result(result, json)

    command.__annotations__["settings"] = Annotated[recipe.settings | None, Parameter(name="*"), FLAGS]
    app.default(command)


def run_pretraining(recipe: Recipe, out: Path, config, flags, *, resume: bool, strict: bool) -> dict | None:
    """From options to encoder.safetensors and report.html; what `spade-pretrain` does, and what its first process has
    to say."""
    settings = (
        begun_settings(recipe.settings, out, config, flags) if resume else resolve(recipe.settings, config, flags)
    )
    if settings.data.path is None:
        raise UsageFault("no DATA given; name a folder of scans, a dataset or a store")
    if settings.data.spacing == NATIVE:
        raise UsageFault(
            "data.spacing native: crops of pretraining have one spacing; give it in mm, or leave it out for the median"
        )
    console.existing(Path(settings.data.path), "a folder of scans, a dataset or a store")

    import torch

    from spade3d.training import ranks
    from spade3d.training.interruption import preemptible
    from spade3d.training.precision import autocast_for

    device = find_device(settings.device)
    autocast_for(settings.precision, torch.device(device))  # refused here, while nothing is done yet
    with ranks.joined(device):
        ranks.once(lambda: recipe.check(settings))
        with preemptible(out, CONFIG, resume=resume):
            if not resume:
                settings = ranks.once(lambda: begin(recipe, settings, out, device, strict=strict))
            return pretrain_encoder(recipe, settings, out, resume=resume)


def begin(recipe: Recipe, settings: Common, out: Path, device: str, *, strict: bool) -> Common:
    """Prepare the scans, choose what was left open, and write down what the run is."""
    from spade3d.began_with import keep_beginning
    from spade3d.provenance import PROVENANCE, describe, write_json, write_text
    from spade3d.scans import open_scans
    from spade3d.volumes.layouts import read_layout
    from spade3d.volumes.store import is_store

    data = Path(settings.data.path)
    with console.fresh_folder(out, CONFIG):
        dataset = None if is_store(data) else read_layout(data)
        if dataset is not None:
            whom_to_hold_out(settings, dataset)  # what names alone forbid is refused before hours of preparing
        how = {"workers": settings.workers, "strict": strict, "dataset": dataset}
        store = open_scans(data, out / STORE, settings.data, **how)
        report_rejected(store)
        split = whom_to_hold_out(settings, store)
        settings = recipe.choose(settings, store, split.train, device)
        looked = recipe.saliency(settings, store, split.train)
        keep_beginning(out, store, split.train, split, settings)
        write_json(out / PROVENANCE, describe(store, split.train, split, looked))
        write_text(out / CONFIG, to_yaml(settings))
    return settings


def pretrain_encoder(recipe: Recipe, settings: Common, out: Path, *, resume: bool) -> dict | None:
    """The run that `begin` began, as every one of its processes runs it."""
    import torch

    from spade3d.began_with import check_beginning
    from spade3d.networks.foreign import save_encoder
    from spade3d.provenance import PROVENANCE, describe, write_json
    from spade3d.training import ranks
    from spade3d.training.prefetch import prefetched
    from spade3d.training.report import pretraining_report
    from spade3d.volumes.store import VolumeStore, is_store

    store = VolumeStore.open(out / STORE if is_store(out / STORE) else Path(settings.data.path))
    split = whom_to_hold_out(settings, store)
    looked = recipe.saliency(settings, store, split.train)

    def same_as_begun(labels: Sequence[int]) -> None:
        if resume:
            also = {"labels": labels, "saliency": looked}
            ranks.once(lambda: check_beginning(out, store, split.train, split, settings, **also))

    same_as_begun(())  # before anything is built, and before anything in the folder is written over
    if ranks.first():
        announce(recipe, settings, store, split)
    built, device = recipe.build(settings, store, split.train, out), torch.device(settings.device)
    same_as_begun([*built.labels])
    provenance = describe(store, split.train, split, {**looked, **built.labels})
    if ranks.first():
        write_json(out / PROVENANCE, provenance)  # anew: what was built may have taken labels
    batches = prefetched(built.batches, settings.loaders, device)
    outcome = learn(built.task, batches, settings, out, resume=resume, label="pretraining")
    if not ranks.first():
        return None
    how = {
        "preprocessing": store.preprocessing.to_dict(),
        "provenance": provenance,
        "run": {
            "recipe": recipe.name,
            "seed": settings.seed,
            "settings": settings_mark(settings),
            "scans": scans_mark(store, split.train),
            "crop": list(settings.crop.shape),
        },
        **built.told,
    }
    save_encoder(out / ENCODER, built.network, how)
    built.finish(out)
    report = pretraining_report(out, built.pictures())
    return {
        "encoder": str(out / ENCODER),
        "report": str(report),
        "steps": outcome.step,
        "loss": round(sum(outcome.losses.values()), 4),
        "scans": len(split.train),
        "left_out": len(store.rejected),
    }


def learn(task, batches, settings: Common, out: Path, *, resume: bool, label: str, **judged):
    """The loop, as the settings of a run ask for it (`spade3d.training.loop.train`, which takes `judged`, too)."""
    import torch

    from spade3d.networks.convolutions import channels_last
    from spade3d.networks.swin import compile_encoders
    from spade3d.training.loop import Optimiser, train

    if settings.channels_last:
        channels_last(task)
    if settings.compile:
        compile_encoders(task)
    return train(
        task,
        batches,
        steps=settings.steps,
        out=out,
        optimiser=Optimiser(**settings.optim.model_dump()),
        skip_bad_batches=settings.skip_bad_batches,
        device=torch.device(settings.device),
        precision=settings.precision,
        save_every=settings.save_every,
        seed=settings.seed,
        resume=resume,
        label=label,
        config_hash=hashlib.sha256((out / CONFIG).read_bytes()).hexdigest(),
        **judged,
    )


def whom_to_hold_out(settings: Common, store) -> Split:
    """Which scans a pretraining learns from, and which it leaves to be judged."""
    if not isinstance(settings, Pretraining) or (settings.hold_out is None and settings.protocol == "holdout"):
        return split_cases(store.cases, settings.folds, settings.fold)
    if settings.hold_out is not None:
        file = console.existing(Path(settings.hold_out), "a text file with a subject on each line")
        return split_named(store.cases, file.read_text(encoding="utf-8").split("\n"), str(file))
    known = {name: one for point in entry_points(group="spade3d.protocols") for name, one in point.load().items()}
    if settings.protocol not in known:
        raise UsageFault(f"protocol {settings.protocol!r} is not known; one of: {', '.join(sorted(known))}")
    return known[settings.protocol].split(store.cases, settings.folds, settings.fold)


def scans_mark(store, cases: Sequence[int]) -> str:
    """Eight hex digits that are equal for runs that learned from the same voxels, wherever they lie."""
    voxels = sorted(store.cases[i].fingerprint for i in cases)
    return hashlib.sha256("\n".join(voxels).encode()).hexdigest()[:8]


def settings_mark(settings: Settings) -> str:
    """Eight hex digits that are equal for runs that differ in seed, machine, place or fold only."""
    apart = {"seed", "device", "compile", "channels_last", "workers", "loaders", "save_every", "hold_out", "fold"}
    what = settings.model_dump(mode="json", exclude=apart)
    what["data"].pop("path")
    what.get("crop", {}).pop("colour", None)
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:8]


def begun_settings(tree: type[Common], out: Path, config, flags) -> Common:
    """The settings of a run that is to be continued; refused where the options now ask for something else."""
    if not (out / CONFIG).is_file():
        raise DataFault(f"{out}: holds no run to resume (no {CONFIG}); start it without --resume")
    (out / PREEMPTED).unlink(missing_ok=True)  # by every process, before the first of them can be preempted again
    begun = resolve(tree, [out / CONFIG], {}, environment={})
    asked = resolve(tree, [out / CONFIG, *config], flags, environment={})
    if asked.device == "auto":  # what that means was decided when the run began
        asked = with_values(asked, {"device": begun.device})
    if asked != begun:
        theirs, ours = begun.model_dump(), asked.model_dump()
        other = ", ".join(key for key in theirs if theirs[key] != ours[key])
        raise UsageFault(f"{out}: the run was begun with other settings ({other}); resume without changing them")
    return begun


def find_device(asked: str) -> str:
    """cuda where asked for or, with auto, where there is one."""
    import torch

    there = torch.cuda.is_available()
    if asked == "cuda" and not there:
        raise UsageFault("--device cuda: this torch sees no CUDA device; use --device cpu, or install a CUDA build")
    return "cuda" if there and asked != "cpu" else "cpu"


def report_rejected(store) -> None:
    """What was noticed, and the scans that were left out, by name and in number; on standard error."""
    for note in store.notes:
        print(f"note: {note}", file=sys.stderr)
    for rejected in store.rejected:
        print(f"left out {rejected['name']}: {rejected['reason']}", file=sys.stderr)
    if store.rejected:
        print(f"{len(store.rejected)} left out, {len(store)} scans remain", file=sys.stderr)


def announce(recipe: Recipe, settings, store, split) -> None:
    """What was chosen, before the first step."""
    subjects = {store.cases[i].subject for i in split.train}
    console.print_choice(
        f"spade-pretrain, recipe {recipe.name}: {recipe.summary}",
        {
            "learns from": f"{len(split.train)} scans of {len(subjects)} subjects ({store.layout})",
            "held out": f"{len(split.validation)} scans; {split.rule}",
            "spacing": " x ".join(f"{mm:g}" for mm in settings.data.spacing) + " mm",
            "crop": " x ".join(map(str, settings.crop.shape)) + " voxels",
            "width": settings.network.feature_size,
            "steps": settings.steps,
            "device": settings.device,
            **recipe.said(settings),
        },
    )
