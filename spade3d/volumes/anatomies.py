"""Patients that never lived: the parts of an abdomen and of a heart in mm, drawn anew for each patient.

Coordinates are RAS mm (x to the patient's right, y forwards, z up) about the middle of the region. What differs between
patients: size and proportions, a smooth deformation of everything, breathing (upper organs move together), the place,
size and turn of each organ, what is missing, bowel and lesions at random places, and the look of every tissue.
So where a voxel lies tells its organ only roughly, and its brightness alone does not tell it either.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.spatial.transform import Rotation

from spade3d.volumes.organs import BTCV, MM_WHS
from spade3d.volumes.shapes import Shape, blob, moved, tube

KINDS = ("abdomen-ct", "heart-ct", "heart-mr")


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

    @property
    def label_names(self) -> Mapping[int, str]:
        return BTCV if self.kind == "abdomen-ct" else MM_WHS


def draw_anatomy(kind: str, rng: np.random.Generator) -> Anatomy:
    """Draw one patient. `kind`: one of KINDS."""
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is no phantom; there are {', '.join(KINDS)}")
    heart = kind != "abdomen-ct"
    parts = (_heart if heart else _abdomen)(rng)
    look = {"abdomen-ct": _abdomen_hu, "heart-ct": _heart_hu, "heart-mr": _heart_mr}[kind](rng)
    size = np.exp(rng.normal(0, 0.06) + rng.normal(0, 0.05, 3))
    turn = Rotation.from_euler("xyz", rng.normal(0, 3, 3), degrees=True).as_matrix()
    waves = tuple(
        Wave(
            rng.uniform(-1, 1, 3) * (3.0 if heart else 5.0),
            (direction := rng.normal(size=3)) / np.linalg.norm(direction) * 2 * np.pi / rng.uniform(220, 450),
            rng.uniform(0, 2 * np.pi, 3),
        )
        for _ in range(4)
    )
    mr = kind == "heart-mr"
    texture, noise = (0.06, rng.uniform(0.04, 0.1)) if mr else (6.0, rng.uniform(8, 18))
    return Anatomy(kind, parts, look, turn * size, waves, texture, float(noise))


# --- trunk ---------------------------------------------------------------------------------------------------------


def _trunk(
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

    back = [blob((side * 34, spine_y - 24, 0), (27, 19, long)) for side in (-1, 1)]
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


def _ribs(rng: np.random.Generator, cavity: tuple[float, float], levels: np.ndarray, spine_y: float) -> Part:
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


class _Body:
    """The organs of one patient as they are placed: each a little elsewhere, larger or smaller, turned."""

    def __init__(self, rng: np.random.Generator, parts: list[Part], spread_mm: float):
        self.rng, self.parts, self.spread_mm = rng, parts, spread_mm

    def add(
        self,
        name: str,
        tissue: str,
        *shapes: Shape,
        label: int | None = 0,
        shift: ArrayLike = (0, 0, 0),
        loose: float = 1.0,
    ) -> np.ndarray:
        """Place an organ and return the motion that placed it; `shift`: what it shares with others; `loose`: how free
        it is."""
        motion = draw_motion(self.rng, self.spread_mm * loose, 0.07 * loose, 6.0 * loose, shift)
        centre = centre_of(shapes)
        self.parts.append(Part(name, tissue, tuple(moved(shape, centre, motion) for shape in shapes), label))
        return motion


def draw_motion(
    rng: np.random.Generator, spread_mm: float, size: float, degrees: float, shift: ArrayLike
) -> np.ndarray:
    """A random similarity (3, 4): turn and scale in the first three columns, a shift in mm in the last."""
    turn = Rotation.from_euler("xyz", rng.normal(0, degrees, 3), degrees=True).as_matrix()
    return np.column_stack([turn * np.exp(rng.normal(0, size)), np.asarray(shift) + rng.normal(0, spread_mm, 3)])


def centre_of(shapes: Sequence[Shape]) -> np.ndarray:
    """The middle of the box that holds the shapes."""
    lows, highs = zip(*(shape.bounds() for shape in shapes), strict=True)
    return (np.min(lows, axis=0) + np.max(highs, axis=0)) / 2


# --- abdomen -------------------------------------------------------------------------------------------------------


def _abdomen(rng: np.random.Generator) -> tuple[Part, ...]:
    """Diaphragm to the iliac crest, about 280 mm high; z = 0 at L1."""
    value = {name: number for number, name in BTCV.items()}
    parts, cavity = _trunk(rng, (158.0, 108.0), -52.0)
    parts.append(_ribs(rng, cavity, np.arange(40, 221, 26) + rng.uniform(-6, 6), -52.0))
    body = _Body(rng, parts, spread_mm=5.0)
    breath = np.array([0, 0, rng.normal(0, 10)])  # the diaphragm carries what hangs below it
    side = 0.5 * breath

    body.add("right lung", "lung", blob((72, -8, 165), (62, 78, 92), 2.3), shift=breath, loose=0.5)
    body.add("left lung", "lung", blob((-72, -8, 160), (60, 78, 92), 2.3), shift=breath, loose=0.5)
    body.add("heart", "blood", blob((-18, 28, 150), (58, 42, 45)), shift=breath)
    for x in (-1, 1):
        body.add("psoas", "muscle", *tube([(x * 28, -44, 20), (x * 40, -38, -60), (x * 58, -22, -160)], [9, 18, 22]))
    _bowel(rng, body)
    liver = [blob((78, 2, 48), (70, 78, 74), 2.5), blob((8, 42, 62), (75, 36, 36), turned=(0, -12, -10))]
    body.add("liver", "liver", *liver, label=value["liver"], shift=breath)
    if rng.random() > 0.04:
        spleen = blob((-108, -32, 52), (26, 42, 50), turned=(20, 10, -15))
        body.add("spleen", "spleen", spleen, label=value["spleen"], shift=breath, loose=1.4)
    stomach = tube([(-42, 6, 92), (-66, 22, 62), (-50, 48, 24), (-8, 56, 6), (28, 40, 6)], [26, 36, 30, 22, 15])
    fill = np.exp(rng.normal(-0.1, 0.15))
    stomach = tuple(type(one)(one.start, one.stop, (one.radii[0] * fill, one.radii[1] * fill)) for one in stomach)
    body.add("stomach", "stomach", *stomach, label=value["stomach"], shift=breath)
    inside = parts[-1].shapes
    lumen = tuple(type(one)(one.start, one.stop, tuple(max(r - 5, 1.0) for r in one.radii)) for one in inside)
    parts.append(Part("stomach content", "stomach content", lumen, label=None))
    parts.append(Part("stomach gas", "gas", (blob(inside[0].start + (0, 14, 6), (20, 12, 18)),), label=None))
    gullet = tube([(-3, -24, 170), (-5, -18, 125), (-12, -6, 104), (-32, 4, 92)], [9, 8, 8, 9])
    body.add("esophagus", "gut", *gullet, label=value["esophagus"], shift=side, loose=0.6)
    missing = rng.choice(["none", "right kidney", "left kidney"], p=[0.94, 0.03, 0.03])
    for name, x, z in (("right kidney", 62, -22), ("left kidney", -60, -4)):
        if name != missing:
            kidney = blob((x, -46, z), (27, 26, 54), 2.2, turned=(8, 0, -25 * np.sign(x)))
            motion = body.add(name, "kidney cortex", kidney, label=value[name], shift=side, loose=1.4)
            core = blob((x * 0.93, -44, z), (14, 13, 36), turned=(8, 0, -25 * np.sign(x)))
            core = moved(core, centre_of([kidney]), motion)
            parts.append(Part(f"{name} pyramids", "kidney medulla", (core,), label=None))
    duct = tube([(36, 26, 6), (52, 4, -8), (46, -8, -40), (8, -12, -48), (-28, 2, -30)], [12, 13, 12, 12, 11])
    body.add("duodenum", "gut", *duct, shift=side)
    gland = tube([(34, 6, -6), (20, 10, 8), (-14, 8, 22), (-50, -8, 32), (-84, -24, 44)], [17, 14, 10, 11, 9])
    body.add("pancreas", "pancreas", *gland, label=value["pancreas"], shift=side)
    vein = tube([(-92, -26, 48), (-44, -14, 26), (8, 0, 20), (28, 10, 34), (52, 14, 52)], [5, 6, 8, 8, 7])
    body.add("veins", "portal vein", *vein, label=value["portal and splenic veins"], shift=side, loose=0.7)
    cava = tube([(22, -26, -175), (24, -22, -80), (24, -16, 10), (22, -6, 80), (20, 4, 122)], [11, 12, 12, 13, 14])
    body.add("vena cava", "vena cava", *cava, label=value["inferior vena cava"], shift=side, loose=0.5)
    aorta = tube([(-14, -34, 190), (-11, -28, 90), (-6, -24, 0), (-4, -26, -95)], [12, 12, 10, 9])
    body.add("aorta", "aorta", *aorta, label=value["aorta"], loose=0.6)
    for x in (-1, 1):
        body.add("iliac artery", "aorta", *tube([(-4, -26, -95), (x * 22, -18, -135), (x * 45, -6, -185)], [8, 7, 6]))
        name = "right adrenal gland" if x > 0 else "left adrenal gland"
        top = (x * 40, -36, 46 if x > 0 else 50)
        limbs = [tube([top, (x * 34 + dx, -46, 30)], [5, 4], pieces=1) for dx in (-7, 8)]
        body.add(name, "adrenal", *(one for limb in limbs for one in limb), label=value[name], shift=side, loose=0.8)
    if rng.random() > 0.15:
        sac = blob((52, 40, 4), (14, 16, 28), turned=(-25, 10, 0))
        body.add("gallbladder", "bile", sac, label=value["gallbladder"], shift=breath, loose=1.4)
    _lesions(rng, parts, ("liver", "spleen", "right kidney", "left kidney"))
    return tuple(parts)


def _bowel(rng: np.random.Generator, body: _Body) -> None:
    """Colon and loops of small bowel, some with gas or oral contrast: soft tissue that is none of the organs."""
    frame = [
        [(104, 0, -150), (106, 0, -80), (98, 22, -34)],
        [(98, 24, -34), (40, 62, -44), (-40, 62, -40), (-100, 10, 6)],
        [(-102, 4, 4), (-112, -16, -70), (-104, -4, -160)],
    ]
    for path in frame:
        body.add("colon", "gut", *tube(path, [19] * len(path)), loose=1.6)
        filled = rng.choice(["gas", "stool", "gut"])
        lumen = tube(path, [14] * len(path))
        body.parts.append(Part("colon content", str(filled), lumen))
    for _ in range(rng.integers(12, 20)):
        path = np.cumsum([rng.uniform((-85, -10, -150), (85, 65, -15)), *rng.normal(0, 24, (3, 3))], axis=0)
        radius = rng.uniform(9, 15)
        tissue = str(rng.choice(["gut", "gut", "gut", "muscle", "stool", "oral contrast", "gas"]))
        body.add("bowel", "gut", *tube(path, [radius] * 4, pieces=6))
        body.parts.append(Part("bowel content", tissue, tube(path, [radius * 0.65] * 4, pieces=6)))


def _lesions(rng: np.random.Generator, parts: list[Part], hosts: Sequence[str]) -> None:
    """Cysts and tumours in organs (they keep the organ's label) and nodes in the fat that look like organs."""
    for part in [part for part in parts if part.name in hosts]:
        for _ in range(rng.poisson(0.6)):
            low, high = part.shapes[0].bounds()
            place = (low + high) / 2 + rng.uniform(-0.3, 0.3, 3) * (high - low)
            lump = blob(place, rng.uniform(6, 16, 3))
            parts.append(Part("lesion", str(rng.choice(["bile", "tumour"])), (lump,), label=None))
    for _ in range(rng.poisson(3)):
        place = rng.uniform((-90, -45, -120), (90, 60, 60))
        tissue = str(rng.choice(["tumour", "spleen", "kidney medulla", "pancreas"]))
        parts.insert(8, Part("node", tissue, (blob(place, rng.uniform(6, 18, 3)),)))


def _abdomen_hu(rng: np.random.Generator) -> dict[str, float]:
    """HU of one patient in one of four phases after contrast."""
    phases = {  # aorta, vena cava, portal vein, cortex, medulla, spleen, liver, pancreas
        "native": (42, 42, 42, 33, 31, 48, 58, 40),
        "arterial": (290, 75, 110, 185, 80, 118, 70, 98),
        "portal": (160, 140, 172, 190, 165, 124, 112, 96),
        "late": (112, 108, 114, 150, 160, 94, 90, 76),
    }
    names = ("aorta", "vena cava", "portal vein", "kidney cortex", "kidney medulla", "spleen", "liver", "pancreas")
    values = phases[str(rng.choice(list(phases), p=[0.15, 0.15, 0.5, 0.2]))]
    look = {name: mean * np.exp(rng.normal(0, 0.08)) for name, mean in zip(names, values, strict=True)}
    look["liver"] -= max(0.0, rng.normal(-10, 20))  # fat in the liver
    look |= {
        "stomach": rng.normal(65, 12),
        "stomach content": float(rng.choice([rng.normal(20, 15), rng.normal(70, 20), 220.0], p=[0.5, 0.3, 0.2])),
        "gut": rng.normal(52, 14),
        "adrenal": look["pancreas"] * 0.9,
        "bile": rng.normal(10, 6),
        "tumour": rng.normal(75, 20),
        "stool": rng.normal(0, 40),
        "oral contrast": rng.normal(230, 40),
        "blood": 0.5 * (look["aorta"] + look["vena cava"]),
    }
    return {name: float(value) for name, value in (look | _common_hu(rng)).items()}


def _common_hu(rng: np.random.Generator) -> dict[str, float]:
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


# --- heart ---------------------------------------------------------------------------------------------------------


def _heart(rng: np.random.Generator) -> tuple[Part, ...]:
    """The chest about the heart, 190 mm high; the origin in the middle of the heart, its apex to the left and down."""
    value = {name: number for number, name in MM_WHS.items()}
    parts, cavity = _trunk(rng, (165.0, 112.0), -80.0)
    parts.append(_ribs(rng, cavity, np.arange(-120, 190, 26) + rng.uniform(-6, 6), -80.0))
    breath = np.array([0, 0, rng.normal(0, 6)])
    chest = _Body(rng, parts, spread_mm=5.0)
    chest.add("right lung", "lung", blob((82, -8, 10), (68, 92, 150), 2.5), loose=0.6)
    chest.add("left lung", "lung", blob((-86, -8, 10), (64, 92, 150), 2.5), loose=0.6)
    chest.add("mediastinum", "fat", blob((0, -5, 40), (42, 78, 140), 3), loose=0.6)
    chest.add("sternum", "bone", blob((0, cavity[1] - 2, 30), (18, 7, 90), 3), loose=0.4)
    chest.add("liver", "liver", blob((62, 8, -112), (88, 82, 58), 2.4), shift=breath)
    chest.add("stomach", "gut", blob((-74, 15, -118), (48, 52, 44)), shift=breath)
    chest.add("esophagus", "gut", *tube([(0, -60, 110), (-4, -58, 20), (-14, -48, -90)], [8, 8, 8]))
    descending = [(-14, -34, 92), (-28, -62, 66), (-24, -66, 0), (-16, -66, -120)]
    chest.add("descending aorta", "left blood", *tube(descending, [11, 12, 11, 10]), loose=0.6)

    # The heart swings on its vessels as one: a common turn, size and shift before each chamber's own.
    start = len(parts)
    heart = _Body(rng, parts, spread_mm=2.2)
    axis = (38, -32, 0)  # degrees; the long axis z of the ventricle turned towards the left front below
    wall = rng.uniform(8, 13)
    beat = np.exp(rng.normal(0, 0.1))  # filled or contracted
    heart.add("pericardium", "fat", blob((-8, 8, -2), (72, 62, 64)))
    for name, path, wide in (
        ("superior vena cava", [(38, 2, 120), (40, 2, 60), (40, 4, 18)], 10),
        ("inferior vena cava", [(38, -4, -14), (34, -8, -55), (26, -14, -120)], 12),
    ):
        heart.add(name, "right blood", *tube(path, [wide] * 3))
    for x, z in ((-1, 28), (-1, 10), (1, 28), (1, 8)):
        path = [(x * 20 - 5, -32, z * 0.7 + 6), (x * 60 - 5, -42, z), (x * 90 - 5, -40, z + 5)]
        heart.add("pulmonary vein", "left blood", *tube(path, [8, 6, 4]))
    chamber = blob((8, 36, -12), (38 * beat, 25 * beat, 46 * beat), 2.2, turned=(20, -25, 10))
    heart.add("right ventricle", "right blood", chamber, label=value["right ventricle"])
    heart.add("right atrium", "right blood", blob((42, 6, 2), (25, 27, 31)), label=value["right atrium"])
    heart.add("left atrium", "left blood", blob((-6, -32, 20), (34, 20, 24), 2.3), label=value["left atrium"])
    cavity_radii = np.array([21 * beat, 21 * beat, 42])
    outer = blob((-34, 6, -10), cavity_radii + (wall, wall, wall), 2.1, axis)
    label = value["left ventricular myocardium"]
    motion = heart.add("left ventricular myocardium", "myocardium", outer, label=label)
    inner = moved(blob((-34, 6, -10), cavity_radii, 2.1, axis), centre_of([outer]), motion)
    parts.append(Part("left ventricle", "left blood", (inner,), value["left ventricle"]))
    arch = tube([(4, 8, 72), (-2, -2, 96), (-14, -34, 92)], [14, 13, 11])
    heart.add("aortic arch", "left blood", *arch)
    root = tube([(-10, 2, 10), (2, 10, 32), (6, 10, 54), (4, 8, 74)], [14, 16, 15, 14])
    heart.add("ascending aorta", "left blood", *root, label=value["ascending aorta"])
    trunk = tube([(-8, 36, 20), (-18, 30, 40), (-22, 10, 54)], [13, 14, 13])
    branches = [tube([(-22, 10, 54), (0, -14, 50), (38, -20, 46)], [12, 11, 8]),
                tube([(-22, 10, 54), (-40, -12, 58), (-64, -24, 58)], [12, 10, 8])]  # fmt: skip
    vessel = (*trunk, *(one for branch in branches for one in branch))
    heart.add("pulmonary artery", "right blood", *vessel, label=value["pulmonary artery"])
    swing = draw_motion(rng, 6.0, 0.08, 8.0, 0.7 * breath)
    for index in range(start, len(parts)):
        part = parts[index]
        turned = tuple(moved(shape, np.zeros(3), swing) for shape in part.shapes)
        parts[index] = Part(part.name, part.tissue, turned, part.label)
    for _ in range(rng.poisson(2)):
        place = rng.uniform((-100, -60, -70), (100, 50, 80))
        parts.insert(start, Part("node", "myocardium", (blob(place, rng.uniform(5, 14, 3)),)))
    return tuple(parts)


def _heart_hu(rng: np.random.Generator) -> dict[str, float]:
    """CT angiography: the left side is bright, the right side anything between native and as bright."""
    left = rng.normal(360, 60)
    look = {
        "left blood": left,
        "right blood": rng.uniform(60, max(100.0, left)),
        "myocardium": rng.normal(105, 18),
        "liver": rng.normal(75, 12),
        "gut": rng.normal(50, 12),
    }
    return {name: float(value) for name, value in (look | _common_hu(rng)).items()}


def _heart_mr(rng: np.random.Generator) -> dict[str, float]:
    """Brightness of a balanced steady-state sequence relative to muscle: blood and fat bright, lung and bone dark."""
    blood = rng.uniform(2.4, 3.6)
    look = {
        "air": 0.03,
        "gas": 0.05,
        "lung": rng.uniform(0.15, 0.35),
        "fat": rng.uniform(1.8, 3.6),
        "muscle": rng.uniform(0.9, 1.1),
        "bone": rng.uniform(0.5, 1.1),
        "disc": rng.uniform(0.9, 1.4),
        "fluid": rng.uniform(3.0, 4.0),
        "left blood": blood,
        "right blood": blood * rng.uniform(0.75, 1.1),
        "myocardium": rng.uniform(0.9, 1.5),
        "liver": rng.uniform(1.0, 1.6),
        "gut": rng.uniform(0.9, 1.8),
    }
    return {name: float(value) for name, value in look.items()}
