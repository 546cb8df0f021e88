"""The whole step of pretraining, `dagman` (also with a student of visible tokens) and `spade-dagman`, from the store to
the optimiser: who waits for whom?

    python benchmarks/speed/pretraining_step.py

Batches of the recipes' own size, crops of 48^3, width 24, of phantoms in a store, on one thread. First the CPU time of
the parts of a step: making the batch (the loader's work), and all that networks, losses and AdamW take with it; `share
of data` is the first over the sum. Then whole runs of the loop in wall time, the batches made by one loader beside it
(`--loaders 1`): `waited` is the share of its steps that the loop stood still for a batch. Wall time of a busy machine
says little more than that. Cost against size: the parts of a step at smaller crops.

On a GPU the step shrinks and the batch does not: `batches per second and core` says how many loaders feed it.
"""

import tempfile
from pathlib import Path
from statistics import median

import torch
from rounds import ROUNDS, machine, tabled, timed, written

from spade3d.configuration import with_values
from spade3d.recipes.recipe import Built, find_recipe
from spade3d.training.journal import read_log
from spade3d.training.loop import Optimiser, train
from spade3d.training.prefetch import prefetched
from spade3d.volumes.layouts import read_layout
from spade3d.volumes.phantoms import phantom
from spade3d.volumes.prepare import prepare
from spade3d.volumes.preprocessing import Preprocessing
from spade3d.volumes.store import VolumeStore
from spade3d.volumes.volume import write_volume

RECIPES = {
    "dagman": ("dagman", {}),
    "dagman, visible tokens": ("dagman", {"distill.drop_hidden": True}),
    "spade-dagman": ("spade-dagman", {}),
}
SHAPE, SPACING_MM, PATIENTS = (128, 128, 96), (3.0, 3.0, 3.0), 3
SIDE, SMALLER, WIDTH = 48, (32,), 24
STEPS, FIRST = 8, 3  # the first steps of a run compile kernels and start loaders: they are not counted
CPU = torch.device("cpu")


def stored(folder: Path) -> VolumeStore:
    (folder / "scans").mkdir()
    for patient in range(PATIENTS):
        one = phantom("abdomen-ct", patient, shape=SHAPE, spacing=SPACING_MM)
        write_volume(folder / "scans" / f"p{patient}.nii.gz", one.voxels, one.affine)
    return prepare(read_layout(folder / "scans"), folder / "store", Preprocessing(spacing=SPACING_MM))


def built(name: str, store: VolumeStore, side: int = SIDE) -> tuple[Built, Optimiser]:
    """What spade-pretrain would train, with crops of this size."""
    recipe, own = RECIPES[name]
    recipe, cases = find_recipe(recipe), range(len(store))
    sized = {"crop.shape": (side,) * 3, "network.feature_size": WIDTH, "steps": 1000, **own}
    settings = recipe.choose(with_values(recipe.settings(), sized), store, cases, "cpu")
    return recipe.build(settings, store, cases, None), Optimiser(**settings.optim.model_dump())


class Step:
    """The two parts of a step, apart."""

    def __init__(self, run: Built, optimiser: Optimiser):
        self.task, self.batches = run.task.train(), run.batches
        groups = self.task.parameter_groups(optimiser.weight_decay)
        self.adamw = torch.optim.AdamW(groups, lr=optimiser.lr, fused=True)
        self.ready = self.data(0)

    def data(self, number: int):
        return next(iter(self.batches.stream(number, number + 1)))

    def compute(self, _: int) -> None:
        sum(self.task(self.ready, 0.5).values()).backward()
        self.adamw.step()
        self.task.after_step(0.5)
        self.adamw.zero_grad(set_to_none=True)


def loop(run: Built, optimiser: Optimiser, loaders: int | None, device: torch.device = CPU) -> dict[str, float]:
    """A short run, as its log tells it."""
    with tempfile.TemporaryDirectory() as out:
        batches, how = prefetched(run.batches, loaders, device), {"steps": STEPS, "save_every": STEPS}
        train(run.task, batches, out=Path(out), optimiser=optimiser, device=device, **how)
        rows = read_log(Path(out) / "log.jsonl")
    rows = [row for row in rows if row.get("step", 0) > FIRST and "seconds" in row]
    return {
        "loaders": loaders,
        "steps": len(rows),
        "crops_per_s": round(median(row["crops_per_second"] for row in rows), 3),
        "waited": round(sum(row["data_seconds"] for row in rows) / sum(row["seconds"] for row in rows), 4),
    }


def measured(name: str, store: VolumeStore, of: dict, side: int = SIDE) -> dict:
    """The parts of a step, and of the size that is looked at whole runs."""
    run, optimiser = built(name, store, side)
    step = Step(run, optimiser)
    timings = timed({"networks, losses, AdamW": step.compute, "the batch": step.data}, ROUNDS)
    compute, data = (timing.median for timing in timings.values())
    crops = len(step.ready)
    rows = tabled(f"{name}: {crops} crops of {side}^3, width {WIDTH}", timings, crops * side**3 * (2 + 4), of)
    found = {
        "recipe": name,
        "side": side,
        "crops": crops,
        "rows": rows,
        "share_of_data": round(data / (data + compute), 4),
        "crops_per_cpu_s": round(crops / (data + compute), 3),
        "batches_per_s_and_core": round(1 / data, 2),
        "loops": [loop(*built(name, store), loaders=1)] if side == SIDE else [],
    }
    print({key: value for key, value in found.items() if key != "rows"})
    return found


def main() -> None:
    of = machine(("spade3d", "torch", "numpy", "numba", "blosc2"))
    with tempfile.TemporaryDirectory() as folder:
        store = stored(Path(folder))
        found = [measured(name, store, of) for name in RECIPES]
        smaller = [measured(name, store, of, side) for side in SMALLER for name in RECIPES]
    goal = "the loader never waits: under 5 % of a step is data, where a GPU computes"
    size = {"side": SIDE, "width": WIDTH, "patients": PATIENTS, "shape": SHAPE}
    written("speed_pretraining_step", {"goal": goal, "size": size, "machine": of, "recipes": found, "smaller": smaller})


if __name__ == "__main__":  # loaders are spawned: they import this file, too
    main()
