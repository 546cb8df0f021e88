"""The heart in its chest: the 7 structures of MM-WHS among vessels that look like them; CT angiography and MR."""

import numpy as np

from spade3d.volumes.anatomy import Part, Placement, centre_of, common_hu, draw_motion, ribs, trunk
from spade3d.volumes.organs import MM_WHS
from spade3d.volumes.shapes import Blob, blob, moved, tube


def heart(rng: np.random.Generator) -> tuple[Part, ...]:
    """The chest about the heart, 190 mm high; the origin in the middle of the heart, its apex to the left and down."""
    value = {name: number for number, name in MM_WHS.items()}
    parts, cavity = trunk(rng, (165.0, 120.0), -74.0)
    parts.append(ribs(rng, cavity, np.arange(-120, 190, 26) + rng.uniform(-6, 6), -74.0))
    breath = np.array([0, 0, rng.normal(0, 6)])
    chest = Placement(rng, parts, spread_mm=5.0)
    chest.add("right lung", "lung", blob((82, -8, 10), (68, 92, 150), 2.5), loose=0.6)
    chest.add("left lung", "lung", blob((-86, -8, 10), (64, 92, 150), 2.5), loose=0.6)
    chest.add("mediastinum", "fat", blob((0, -5, 40), (42, 78, 140), 3), loose=0.6)
    chest.add("sternum", "bone", blob((0, cavity[1] - 2, 30), (18, 7, 90), 3), loose=0.4)
    chest.add("liver", "liver", blob((62, 8, -112), (88, 82, 58), 2.4), shift=breath)
    chest.add("stomach", "gut", blob((-74, 15, -118), (48, 52, 44)), shift=breath)
    chest.add("esophagus", "gut", *tube([(0, -60, 110), (-4, -58, 20), (-14, -48, -90)], [8, 8, 8]))
    descending = [(-14, -34, 92), (-30, -52, 66), (-30, -56, 0), (-24, -56, -120)]
    chest.add("descending aorta", "left blood", *tube(descending, [11, 12, 11, 10]), loose=0.6)

    # The heart swings on its vessels as one: a common turn, size and shift before each chamber's own.
    start = len(parts)
    chambers = Placement(rng, parts, spread_mm=2.2)
    axis = (38, -32, 0)  # degrees; the long axis z of the ventricle turned towards the left front below
    wall = rng.uniform(8, 13)
    beat = np.exp(rng.normal(0, 0.1))  # filled or contracted
    chambers.add("pericardium", "fat", blob((-8, 8, -2), (72, 62, 64)))
    for name, path, wide in (
        ("superior vena cava", [(38, 2, 120), (40, 2, 60), (40, 4, 18)], 10),
        ("inferior vena cava", [(38, -4, -14), (34, -8, -55), (26, -14, -120)], 12),
    ):
        chambers.add(name, "right blood", *tube(path, [wide] * 3))
    for x, z in ((-1, 28), (-1, 10), (1, 28), (1, 8)):
        path = [(x * 20 - 5, -32, z * 0.7 + 6), (x * 60 - 5, -42, z), (x * 90 - 5, -40, z + 5)]
        chambers.add("pulmonary vein", "left blood", *tube(path, [8, 6, 4]))
    chamber = blob((8, 36, -12), (38 * beat, 25 * beat, 46 * beat), 2.2, turned=(20, -25, 10))
    for name, tissue, shape in (
        ("right ventricle", "right blood", chamber),
        ("right atrium", "right blood", blob((42, 6, 2), (25, 27, 31))),
        ("left atrium", "left blood", blob((-6, -32, 20), (34, 20, 24), 2.3)),
    ):
        thin_wall = Blob(shape.centre, shape.radii + 3.5, shape.exponent, shape.turn)
        motion = chambers.add(f"{name} wall", "myocardium", thin_wall)
        parts.append(Part(name, tissue, (moved(shape, shape.centre, motion),), value[name]))
    cavity_radii = np.array([21 * beat, 21 * beat, 42])
    outer = blob((-34, 6, -10), cavity_radii + (wall, wall, wall), 2.1, axis)
    label = value["left ventricular myocardium"]
    motion = chambers.add("left ventricular myocardium", "myocardium", outer, label=label)
    inner = moved(blob((-34, 6, -10), cavity_radii, 2.1, axis), centre_of([outer]), motion)
    parts.append(Part("left ventricle", "left blood", (inner,), value["left ventricle"]))
    arch = tube([(4, 8, 72), (-2, -2, 96), (-14, -34, 92)], [14, 13, 11])
    chambers.add("aortic arch", "left blood", *arch)
    root = tube([(-10, 2, 10), (2, 10, 32), (6, 10, 54), (4, 8, 74)], [14, 16, 15, 14])
    chambers.add("ascending aorta", "left blood", *root, label=value["ascending aorta"])
    stem = tube([(-8, 36, 20), (-18, 30, 40), (-22, 10, 54)], [13, 14, 13])
    branches = [tube([(-22, 10, 54), (0, -14, 50), (38, -20, 46)], [12, 11, 8]),
                tube([(-22, 10, 54), (-40, -12, 58), (-64, -24, 58)], [12, 10, 8])]  # fmt: skip
    vessel = (*stem, *(one for branch in branches for one in branch))
    chambers.add("pulmonary artery", "right blood", *vessel, label=value["pulmonary artery"])
    swing = draw_motion(rng, 6.0, 0.08, 8.0, 0.7 * breath)
    for index in range(start, len(parts)):
        part = parts[index]
        turned = tuple(moved(shape, np.zeros(3), swing) for shape in part.shapes)
        parts[index] = Part(part.name, part.tissue, turned, part.label)
    for _ in range(rng.poisson(2)):
        place = rng.uniform((-100, -60, -70), (100, 50, 80))
        parts.insert(start, Part("node", "myocardium", (blob(place, rng.uniform(5, 14, 3)),)))
    return tuple(parts)


def heart_hu(rng: np.random.Generator) -> dict[str, float]:
    """CT angiography: the left side is bright, the right side anything between native and as bright."""
    left = rng.normal(360, 60)
    look = {
        "left blood": left,
        "right blood": rng.uniform(60, max(100.0, left)),
        "myocardium": rng.normal(105, 18),
        "liver": rng.normal(75, 12),
        "gut": rng.normal(50, 12),
    }
    return {name: float(value) for name, value in (look | common_hu(rng)).items()}


def heart_mr(rng: np.random.Generator) -> dict[str, float]:
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
