"""Views: two views of a stored volume, each zoomed, flipped, turned, blurred and coloured; ours against the toolkits.

    python benchmarks/speed/views.py

Everybody makes the very same views, of the settings of `Views` (a blur in 3 of 10): two of one box, the student's and
the teacher's of a training batch. Ours draws them within its time and starts from the compressed int16 store, windowing
the HU, once reading for both views, once for each; the others are told what was drawn and start from the windowed
float32 volume in memory. `from memory` ours does, too: the same volume, int16. Views lie wholly inside the volume, so
that nobody gains from what is outside. The noise is off only while views are compared. Cost against size: views of four
sizes; and of the last one with every change in every view, as the goal counts them.
"""

import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from rounds import machine, tabled, timed, written
from scipy.ndimage import affine_transform
from views_elsewhere import Batchgenerators, monai, monai_transforms, told, torchio

from spade3d.crops.crop import Box, Crop, Views, cut, cut_from, cut_together, draw_view, mm_to_stored
from spade3d.volumes.layouts import read_layout
from spade3d.volumes.phantoms import phantom
from spade3d.volumes.prepare import prepare
from spade3d.volumes.preprocessing import Preprocessing
from spade3d.volumes.store import VolumeStore
from spade3d.volumes.volume import write_volume

SHAPE, SPACING_MM, VIEWS = (256, 256, 192), 1.5, Views()
WINDOW_HU = (-1024.0, 3071.0)  # clips nothing: ours clips what it has resampled, the others resample what is clipped
ROUNDS = {32: 9, 48: 9, 64: 9, 96: 15}
PACKAGES = ("spade3d", "monai", "torchio", "batchgeneratorsv2", "torch", "numpy", "numba", "SimpleITK", "blosc2")
TOLERANCE = 1e-3  # in an intensity of [0, 1]
SIGMA = 0.8  # of a blur while views are compared: narrower Gaussians are sampled differently, MONAI's sums to above 1
EDGE = 6  # voxels of a blurred view that are not compared: beyond its edge everybody assumes something else


def stored_phantom(folder: Path) -> VolumeStore:
    """An abdomen in cubic voxels, as spade-prepare stores it."""
    scan = folder / "scans" / "abdomen.nii.gz"
    scan.parent.mkdir()
    voxels = phantom("abdomen-ct", 0, shape=SHAPE, spacing=(SPACING_MM,) * 3).voxels
    write_volume(scan, voxels, np.diag([SPACING_MM] * 3 + [1.0]))
    return prepare(read_layout(scan.parent), folder / "store", Preprocessing(window_hu=WINDOW_HU))


def draw(side: int, number: int, how: Views = VIEWS) -> list[Crop]:
    """Two views of a box, anywhere that the widest fits; its centre on a voxel or half-way, so that a slice has it."""
    rng, reach = np.random.default_rng(number), 0.75 * side / VIEWS.zoom[0] + 2
    centre = np.round(2 * rng.uniform(reach, np.array(SHAPE) - 1 - reach)) / 2
    box = Box(tuple(centre * SPACING_MM), (side * SPACING_MM,) * 3)
    return [draw_view(rng, 0, box, (side,) * 3, how) for _ in range(2)]


def check(store: VolumeStore, volume: torch.Tensor, others: dict, crop: Crop) -> dict[str, float]:
    """The largest difference of each from ours: the resampling against scipy, then everything but the noise."""
    case = store.cases[0]
    resampled = affine_transform(volume.numpy(), mm_to_stored(case) @ crop.to_mm, output_shape=crop.shape, order=1)
    differences = {"scipy, resampling only": np.abs(cut(store, crop.plain()) - resampled).max()}
    inner = slice(EDGE, -EDGE) if crop.intensity.blur > 0 else slice(None)
    for name, other in others.items():
        # MONAI and batchgeneratorsv2 take a gamma over the range of each crop, TorchIO and ours over that of the scan.
        gamma = crop.intensity.gamma if name == "TorchIO" else 1.0
        look = replace(crop.intensity, gamma=gamma, noise=0.0, blur=SIGMA if crop.intensity.blur > 0 else 0.0)
        same = replace(crop, intensity=look)
        difference = np.abs(cut(store, same) - np.asarray(other(told(same, case, volume))[0]))
        differences[name] = difference[inner, inner, inner].max()
    for name, difference in differences.items():
        assert difference <= TOLERANCE, f"{name}: differs by {difference:.3f} from ours"
    return {name: round(float(difference), 5) for name, difference in differences.items()}


def pair(maker, views: list) -> None:
    for view in views:
        maker(view)


def main() -> None:
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    of, curve = machine(PACKAGES), []
    with tempfile.TemporaryDirectory() as folder:
        store = stored_phantom(Path(folder))
        case, stored = store.cases[0], store.image(0)
        volume = torch.from_numpy(case.normalisation.intensity(stored))
        from_memory = partial(cut_from, np.ascontiguousarray(stored), (0, 0, 0), case)
        for side, how in [(side, VIEWS) for side in ROUNDS] + [(96, replace(VIEWS, blur_chance=1.0))]:
            others = {"batchgeneratorsv2": Batchgenerators(side), "MONAI": monai, "TorchIO": torchio}
            others |= {"MONAI, transforms": monai_transforms, "MONAI, lazy": partial(monai_transforms, lazy=True)}
            drawn = partial(draw, side, how=how)
            checked = [check(store, volume, others, crop) for number in range(3) for crop in drawn(number)]
            views = [[told(crop, case, volume) for crop in drawn(number)] for number in range(ROUNDS[side])]
            contenders = {
                "ours, from the store": lambda n, drawn=drawn: cut_together(store, drawn(n)),
                "ours, one by one": lambda n, drawn=drawn: pair(partial(cut, store), drawn(n)),
                "ours, from memory": lambda n, drawn=drawn: pair(from_memory, drawn(n)),
            }
            contenders |= {
                name: lambda n, other=other, views=views: pair(other, views[n]) for name, other in others.items()
            }
            moved = 2 * side**3 * (2 + 4)  # each voxel read as int16 and written as float32
            title = f"two views of {side}^3, blurred {how.blur_chance:.0%}"
            rows = tabled(title, timed(contenders, ROUNDS[side]), moved, of)
            for row in rows:
                row["views_per_s_and_core"] = float(f"{2000 / row['ms']:.4g}")
            largest = {name: max(one[name] for one in checked) for name in checked[0]}
            curve.append({"side": side, "blurred": how.blur_chance, "rows": rows, "largest_difference": largest})
            print("views per second and core:", {row["who"]: row["views_per_s_and_core"] for row in rows})
    written("speed_views", {"goal": "12 x the fastest toolkit at 96^3", "machine": of, "curve": curve})


if __name__ == "__main__":
    main()
