"""The body frame: CPU seconds to place one scan, by `affine` and `box`, and against the number of scans.

    python benchmarks/speed/body_frame.py

Phantoms of abdomens, cut to parts of their length, the table anywhere (`benchmarks/science/body_frames.py` judges how
well such scans are placed; here only the time counts). A scan is read, made coarse and laid on a reference and on two
means; the `box` reads nothing. There is no other toolkit whose frame compares: SimpleITK's registration of the same
pair by mutual information, on the same coarse grid with a scale and a shift along each axis, is what else a user could
call, once for each scan; it is given one start, where ours tries many. Ours lays a scan on others about five times.
SimpleITK's answers are not compared with ours. Not timed: `learned` trains a network on the set first, about 20 s
whatever the set.
"""

import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from rounds import ROUNDS, machine, tabled, timed, written

from spade3d.volumes.coarse_scan import cell_mm, coarse_scan
from spade3d.volumes.frame_methods import place_scans
from spade3d.volumes.layouts import read_layout
from spade3d.volumes.phantoms import phantom
from spade3d.volumes.prepare import prepare
from spade3d.volumes.preprocessing import Preprocessing
from spade3d.volumes.store import VolumeStore
from spade3d.volumes.volume import write_volume

SHAPE, SPACING_MM = (128, 128, 96), (3.0, 3.0, 3.0)
COUNTS = (4, 12)
PLACED_BY = ("affine", "box")  # the first is the unit


def stored(folder: Path) -> VolumeStore:
    """Phantoms, each cut to a part of its length and moved."""
    (folder / "scans").mkdir()
    for patient in range(COUNTS[-1]):
        one, rng = phantom("abdomen-ct", patient, shape=SHAPE, spacing=SPACING_MM), np.random.default_rng(patient)
        length = int(SHAPE[2] * rng.uniform(0.6, 1))
        low = int(rng.integers(SHAPE[2] - length + 1))
        affine = one.affine.copy()
        affine[:3, 3] += affine[:3, 2] * low + rng.uniform(-1, 1, 3) * (20, 60, 200)
        write_volume(folder / "scans" / f"p{patient:03d}.nii.gz", one.voxels[:, :, low : low + length], affine)
    return prepare(read_layout(folder / "scans"), folder / "store", Preprocessing())


def placing(store: VolumeStore, cases: range, frame: str, placed: dict[str, int], _: int) -> None:
    placed[frame] = sum(one is not None for one in place_scans(store, cases, frame).values())


def sitk_placed(store: VolumeStore, cases: range, _: int) -> list[sitk.Transform]:
    """Each scan laid on the first by SimpleITK."""
    mm = cell_mm(store, cases)
    scans = [coarse_scan(store, i, mm) for i in cases]
    images = []
    for scan in scans:
        image = sitk.GetImageFromArray(np.maximum(scan.values, 0).astype(np.float32).T)
        image.SetSpacing([scan.cell_mm] * 3)
        images.append(image)
    return [_laid(images[0], image) for image in images[1:]]


def _laid(fixed: sitk.Image, moving: sitk.Image) -> sitk.Transform:
    begin = sitk.CenteredTransformInitializer(
        fixed, moving, sitk.ScaleTransform(3), sitk.CenteredTransformInitializerFilter.GEOMETRY
    )
    both = sitk.CompositeTransform([sitk.TranslationTransform(3), begin])
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(16)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(1.0, 1e-3, 200)
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetInitialTransform(both, inPlace=False)
    return method.Execute(fixed, moving)


def main() -> None:
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    of, curve = machine(("spade3d", "numpy", "numba", "SimpleITK", "torch")), []
    with tempfile.TemporaryDirectory() as folder:
        store = stored(Path(folder))
        for count in COUNTS:
            cases, placed = range(count), {}
            ways = {f"ours, {frame}": partial(placing, store, cases, frame, placed) for frame in PLACED_BY}
            if count == COUNTS[-1]:
                ways["SimpleITK, once each"] = partial(sitk_placed, store, cases)
            timings = {who: timing.times(1 / count) for who, timing in timed(ways, ROUNDS).items()}
            moved = float(np.mean([2 * np.prod(case.shape) for case in store.cases[:count]]))
            rows = tabled(f"one scan of {count}", timings, moved, of)
            curve.append({"scans": count, "placed": placed, "rows": rows})
    written("speed_body_frame", {"goal": "2 s a scan on one core", "shape": SHAPE, "machine": of, "curve": curve})


if __name__ == "__main__":
    main()
