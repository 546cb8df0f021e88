"""The abdomen: diaphragm to iliac crest with the 13 organs of BTCV, bowel, lesions, in four phases of contrast."""

from collections.abc import Sequence

import numpy as np

from spade3d.volumes.anatomy import Part, Placement, centre_of, common_hu, ribs, trunk
from spade3d.volumes.organs import BTCV
from spade3d.volumes.shapes import Capsule, blob, moved, tube


def abdomen(rng: np.random.Generator) -> tuple[Part, ...]:
    """Diaphragm to the iliac crest, about 280 mm high; z = 0 at L1."""
    value = {name: number for number, name in BTCV.items()}
    parts, cavity = trunk(rng, (158.0, 108.0), -52.0)
    parts.append(ribs(rng, cavity, np.arange(40, 221, 26) + rng.uniform(-6, 6), -52.0))
    body = Placement(rng, parts, spread_mm=5.0)
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
    stomach = [Capsule(one.start, one.stop, (one.radii[0] * fill, one.radii[1] * fill)) for one in stomach]
    body.add("stomach", "stomach", *stomach, label=value["stomach"], shift=breath)
    walls = [one for one in parts[-1].shapes if isinstance(one, Capsule)]
    lumen = tuple(Capsule(one.start, one.stop, (one.radii[0] - 5, one.radii[1] - 5)) for one in walls)
    parts.append(Part("stomach content", "stomach content", lumen, label=None))
    parts.append(Part("stomach gas", "gas", (blob(walls[0].start + (0, 10, 4), (15, 10, 15)),), label=None))
    gullet = tube([(-3, -24, 170), (-5, -18, 125), (-12, -6, 104), (-32, 4, 92)], [9, 8, 8, 9])
    body.add("esophagus", "gut", *gullet, label=value["esophagus"], shift=side, loose=0.6)
    missing = rng.choice(["none", "right kidney", "left kidney"], p=[0.9, 0.05, 0.05])
    for name, x, z, lean in (("right kidney", 62, -22, -25), ("left kidney", -60, -4, 25)):
        if name != missing:
            kidney = blob((x, -46, z), (27, 26, 54), 2.2, turned=(8, 0, lean))
            motion = body.add(name, "kidney cortex", kidney, label=value[name], shift=side, loose=1.4)
            core = blob((x * 0.93, -44, z), (14, 13, 36), turned=(8, 0, lean))
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


def _bowel(rng: np.random.Generator, body: Placement) -> None:
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


def abdomen_hu(rng: np.random.Generator) -> dict[str, float]:
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
    return {name: float(value) for name, value in (look | common_hu(rng)).items()}
