"""Correspondences between the feature grids of two views: ours in closed form, against searching among all pairs.

    python benchmarks/speed/correspondences.py

Every contender gives, for each cell of one view, its nearest cell of the other, the distance in mm and whether the
place lies within the other view at all. Searching is done as other toolkits do it (torch.cdist, then the smallest of
each row), in one piece and in the pieces that suit the cache best; and by a k-d tree, the best that knows no geometry.
Where all pairs would take minutes, a share of the rows is searched and the time multiplied: it is linear in the rows.
Cost against size: grids of four sizes.
"""

from functools import partial

import numpy as np
import torch
from rounds import ROUNDS, machine, tabled, timed, written
from scipy.spatial import cKDTree

from spade3d.crops.correspondences import Matches, cell_places, cell_to_mm, match
from spade3d.crops.crop import Box, Crop, Views, draw_view

SIDES = (6, 12, 24, 48)
AT_ONCE = 24  # the largest grid whose pairwise distances (0.76 GB) are made in one piece
ROWS = {48: 2048}  # searched of the largest grid's 110,592
PIECE = 1024  # rows that are searched together: the fastest of 256, 1024, 4096 and all


def views() -> tuple[Crop, Crop]:
    """Two overlapping views of one scan, each turned, flipped and zoomed."""
    rng, size = np.random.default_rng(0), (144.0, 144.0, 192.0)
    boxes = Box((150.0, 150.0, 160.0), size), Box((180.0, 130.0, 180.0), size)
    return tuple(draw_view(rng, 0, box, (96, 96, 96), Views()) for box in boxes)


def pairwise(a: Crop, b: Crop, grid: tuple[int, int, int], piece: int, rows: int, _: int = 0) -> Matches:
    """The smallest of each row of all distances, `piece` rows together, of the first `rows` cells of a."""
    places = cell_places(a, grid)[:rows]
    here, there = torch.from_numpy(places).float(), torch.from_numpy(cell_places(b, grid)).float()
    centre = there.mean(dim=0)  # around zero, where float32 is finest
    found = [torch.cdist(part[None], (there - centre)[None])[0].min(dim=1) for part in (here - centre).split(piece)]
    distance, cell = (torch.cat([part[n] for part in found]).numpy() for n in (0, 1))
    return only_within(b, grid, places, cell, distance)


def tree(a: Crop, b: Crop, grid: tuple[int, int, int], _: int = 0) -> Matches:
    places = cell_places(a, grid)
    distance, cell = cKDTree(cell_places(b, grid)).query(places)
    return only_within(b, grid, places, cell, distance)


def only_within(b: Crop, grid: tuple[int, int, int], places: np.ndarray, cell: np.ndarray, distance) -> Matches:
    """The same validity for all: a place is within view b where it is within half a cell of its nearest cell."""
    to_cell = np.linalg.inv(cell_to_mm(b, grid))
    nearest = np.stack(np.unravel_index(cell, grid), axis=-1)
    valid = (np.abs(places @ to_cell[:3, :3].T + to_cell[:3, 3] - nearest) <= 0.5).all(axis=1)
    return Matches(np.where(valid, cell, -1), np.where(valid, distance, np.inf).astype(np.float32))


def agree(ours: Matches, theirs: Matches, tolerance_mm: float) -> None:
    """The same cells are valid; the same cells are nearest, or cells that are as near (a tie)."""
    rows = len(theirs.cell)
    assert (ours.valid[:rows] == theirs.valid).all(), "validity differs"
    both = theirs.valid
    assert np.abs(ours.distance_mm[:rows][both] - theirs.distance_mm[both]).max() <= tolerance_mm, "distances differ"
    others = both & (ours.cell[:rows] != theirs.cell)
    assert others.mean() <= 1e-3, f"{others.sum()} nearest cells differ"


def main() -> None:
    a, b = views()
    of, curve = machine(("spade3d", "torch", "numpy", "numba", "scipy")), []
    for side in SIDES:
        grid, cells = (side,) * 3, side**3
        rows = ROWS.get(side, cells)
        searches = {f"torch.cdist, {PIECE} rows together": partial(pairwise, a, b, grid, PIECE, rows)}
        if side <= AT_ONCE:
            searches["torch.cdist at once"] = partial(pairwise, a, b, grid, cells, rows)
        ours = match(a, b, grid)
        agree(ours, tree(a, b, grid), 1e-3)
        for search in searches.values():
            agree(ours, search(), 0.05)  # float32 by |a|^2 + |b|^2 - 2ab, torch's fastest way, is this exact
        contenders = {"ours": lambda _, grid=grid: match(a, b, grid), "k-d tree": partial(tree, a, b, grid)}
        timings = timed(contenders | searches, ROUNDS)
        timings |= {name: timings[name].times(cells / rows) for name in searches}
        moved = cells * (8 + 4)  # the answer: an int64 and a float32 for each cell
        table = tabled(f"{side}^3 cells", timings, moved, of)
        curve.append({"cells": cells, "searched": rows, "valid": float(ours.valid.mean()), "rows": table})
    ns = {step["cells"]: step["rows"][0]["ms"] * 1e6 / step["cells"] for step in curve}
    print("ours, ns a cell:", ", ".join(f"{cells}: {cost:.1f}" for cells, cost in ns.items()))
    goal = "10,000 x pairwise distances at 24^3; linear in the cells"
    written("speed_correspondences", {"goal": goal, "machine": of, "curve": curve})


if __name__ == "__main__":
    main()
