"""Bodies that never lived: their parts in mm, their trunk, and how chance places and turns an organ.

Coordinates are RAS mm (x to the patient's right, y forwards, z up) about the middle of the region. What differs between
patients: size and proportions, a smooth deformation of everything, breathing (upper organs move together), the place,
size and turn of each organ, what is missing, bowel and lesions at random places, and the look of every tissue.
So where a voxel lies tells its organ only roughly, and its brightness alone does not tell it either.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.spatial.transform import Rotation

from spade3d.volumes.shapes import Shape, Vector, blob, moved, tube


@dataclass(frozen=True, eq=False)
class Part:
    """Shapes of one tissue, painted over the parts before it. `label`: of the file, 0 none, None as underneath."""

    name: str
    tissue: str
    shapes: tuple[Shape, ...]
    label: int | None = 0
    inside: bool = True  # kept within the body cavity


@dataclass(frozen=True, eq=False)
class Wave:
    """One sine of the smooth deformation: amplitude (3) mm, wave vector (3) radian / mm, phase (3) radian."""

    amplitude: np.ndarray
    vector: np.ndarray
    phase: np.ndarray


@dataclass(frozen=True, eq=False)
class Anatomy:
    """One patient: parts in painting order, the look of their tissues, how the body is turned, scaled and deformed."""

    kind: str
    parts: tuple[Part, ...]
    look: Mapping[str, float]  # tissue -> HU (CT) or brightness, muscle about 1 (MR)
    to_world: np.ndarray  # (3, 3): turn and scale of the body
    waves: tuple[Wave, ...]
    texture: float  # standard deviation within a tissue, in units of `look`
    noise: float  # standard deviation of the scanner's noise


def trunk(
    rng: np.random.Generator, half: tuple[float, float], spine_y: float
) -> tuple[list[Part], tuple[float, float]]:
    """Skin, fat, muscle, cavity, spine and ribs of a trunk of half width and depth `half`; and the cavity's halves."""
    fat, wall = rng.uniform(8, 28), rng.uniform(9, 15)
    wide = np.array(half) + 0.7 * (fat - 18)
    inner = wide - fat * np.array([1.0, 0.75])
    cavity = inner - wall
    long = 4000.0  # beyond every field of view

    def column(size: np.ndarray) -> tuple[Shape, ...]:
        return (blob((0, 0, 0), (*size, long), 2.4),)

    back = [blob((side * 34, spine_y - 20, 0), (27, 16, long)) for side in (-1, 1)]
    levels = np.arange(-9, 10) * 34 + rng.uniform(-17, 17)
    bodies = [blob((0, spine_y, z), (20, 16, 13), 3.5) for z in levels]
    discs = [blob((0, spine_y, z + 17), (19, 15, 5), 3.5) for z in levels]
    arches = [blob((0, spine_y - 36, z - 6), (5, 14, 9), turned=(20, 0, 0)) for z in levels]
    parts = [
        Part("body", "fat", column(wide), inside=False),
        Part("muscle", "muscle", column(inner), inside=False),
        Part("cavity", "fat", column(cavity), inside=False),
        Part("back muscles", "muscle", tuple(back), inside=False),
        Part("vertebrae", "bone", (*bodies, *arches), inside=False),
        Part("discs", "disc", tuple(discs), inside=False),
        Part("spinal canal", "fluid", (blob((0, spine_y - 22, 0), (9, 8, long)),), inside=False),
    ]
    return parts, (float(cavity[0]), float(cavity[1]))


def ribs(rng: np.random.Generator, cavity: tuple[float, float], levels: np.ndarray, spine_y: float) -> Part:
    """Ribs fall towards the front, in the wall just outside the cavity."""
    shapes: list[Shape] = []
    a, b = cavity[0] + 6, cavity[1] + 6
    for z in levels:
        for side in (-1, 1):
            angle = np.radians(np.linspace(250, 395, 7) - 360)  # from behind, over the side, to the front
            path = [(side * a * np.cos(t), b * np.sin(t), z - 55 * n / 6) for n, t in enumerate(angle)]
            path[0] = (side * 22, spine_y - 8, z + 4)
            shapes += tube(path, [4.5] * 7, pieces=10)
    return Part("ribs", "bone", tuple(shapes), inside=False)


class Placement:
    """The organs of one patient as they are placed: each a little elsewhere, larger or smaller, turned."""

    def __init__(self, rng: np.random.Generator, parts: list[Part], spread_mm: float):
        self.rng, self.parts, self.spread_mm = rng, parts, spread_mm

    def add(
        self,
        name: str,
        tissue: str,
        *shapes: Shape,
        label: int | None = 0,
        shift: Vector = (0, 0, 0),
        loose: float = 1.0,
    ) -> np.ndarray:
        """Place an organ and return the motion that placed it; `shift`: what it shares with others; `loose`: how free
        it is."""
        motion = draw_motion(self.rng, self.spread_mm * loose, 0.05 * loose, 6.0 * loose, shift)
        centre = centre_of(shapes)
        self.parts.append(Part(name, tissue, tuple(moved(shape, centre, motion) for shape in shapes), label))
        return motion


def draw_motion(rng: np.random.Generator, spread_mm: float, size: float, degrees: float, shift: Vector) -> np.ndarray:
    """A random similarity (3, 4): turn and scale in the first three columns, a shift in mm in the last."""
    turn = Rotation.from_euler("xyz", rng.normal(0, degrees, 3), degrees=True).as_matrix()
    return np.column_stack([turn * np.exp(rng.normal(0, size)), np.asarray(shift) + rng.normal(0, spread_mm, 3)])


def centre_of(shapes: Sequence[Shape]) -> np.ndarray:
    """The middle of the box that holds the shapes."""
    lows, highs = zip(*(shape.bounds() for shape in shapes), strict=True)
    return (np.min(lows, axis=0) + np.max(highs, axis=0)) / 2


def common_hu(rng: np.random.Generator) -> dict[str, float]:
    """HU of the tissues that every region has."""
    return {
        "air": -1000.0,
        "gas": -850.0,
        "lung": rng.normal(-830, 30),
        "fat": rng.normal(-102, 6),
        "muscle": rng.normal(55, 6),
        "bone": rng.normal(300, 60),
        "disc": rng.normal(85, 10),
        "fluid": rng.normal(18, 6),
    }
