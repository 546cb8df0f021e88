"""Where a voxel lies: affines, spacing, orientation, and the same scan on another grid.

The world is RAS+ in millimetres: x grows to the patient's right, y to the front (anterior), z to the head (superior).
An affine (4, 4) maps a voxel index (i, j, k, 1), voxel centres at integers, to the world. A grid is a shape and an
affine; a voxel reaches half an index to each side of its centre.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from nibabel.orientations import aff2axcodes, io_orientation
from scipy import ndimage

from spade3d.faults import DataFault

SHEAR_LIMIT = 1e-3  # cosine of the angle between two voxel axes; 0 in every scan that came from a scanner unbent
DIRECTION_TOLERANCE = 1e-4  # between direction cosines of two headers that mean the same grid
SLAB_VOXELS = 2**22  # resampled at a time, which bounds the memory beside input and output


def apply_affine(affine: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Points (..., 3) through an affine (4, 4)."""
    return np.asarray(points) @ affine[:3, :3].T + affine[:3, 3]


def compose(*affines: np.ndarray) -> np.ndarray:
    """The affine that applies the last one first: compose(a, b)(x) = a(b(x))."""
    whole = np.eye(4)
    for affine in affines:
        whole = whole @ affine
    return whole


def stretch(scale: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """The affine (4, 4) of  x -> scale * x + shift  along each axis."""
    matrix = np.diag([*np.asarray(scale).tolist(), 1.0])
    matrix[:3, 3] = shift
    return matrix


def inverse(affine: np.ndarray) -> np.ndarray:
    """The affine that undoes this one, with an exact last row."""
    back = np.linalg.inv(affine)
    back[3] = 0.0, 0.0, 0.0, 1.0
    return back


def spacing_of(affine: np.ndarray) -> tuple[float, float, float]:
    """The distance in mm between neighbouring voxel centres along i, j, k."""
    i, j, k = np.linalg.norm(affine[:3, :3], axis=0)
    return float(i), float(j), float(k)


def axis_codes(affine: np.ndarray) -> str:
    """Where i, j, k point, to the nearest axis of the body: "RAS" is right, anterior, superior."""
    return "".join(aff2axcodes(affine))


def check_affine(path: Path | str, affine: np.ndarray) -> None:
    """Raise DataFault where an affine places no scan: NaN, singular, or voxel axes that are not at right angles."""
    if affine.shape != (4, 4) or not np.isfinite(affine).all():
        raise DataFault(f"{path}: the affine holds NaN or Inf; a finite one is needed; repair the header")
    spacing = np.array(spacing_of(affine))
    if spacing.min() <= 0 or abs(np.linalg.det(affine[:3, :3] / spacing)) < 1e-6:
        raise DataFault(f"{path}: the affine is singular (spacing {_mm(spacing)} mm); repair the header")
    axes = affine[:3, :3] / spacing
    cosines = np.abs(axes.T @ axes)[np.triu_indices(3, k=1)]
    if cosines.max() > SHEAR_LIMIT:
        angle = np.degrees(np.arccos(cosines.max()))
        raise DataFault(
            f"{path}: the affine has a shear: two voxel axes meet at {angle:.2f} degrees instead of 90; "
            "resample the scan onto a rectangular grid (a tilted gantry is one cause)"
        )


@dataclass(frozen=True)
class Reorientation:
    """Flips and a permutation that bring a stored grid nearest to RAS, exactly: no voxel value changes.

    `axes[a]` is the stored axis that becomes canonical axis a, `flips[a]` whether it then runs backwards,
    `shape` the stored shape.
    """

    axes: tuple[int, int, int]
    flips: tuple[bool, bool, bool]
    shape: tuple[int, int, int]

    @property
    def canonical_shape(self) -> tuple[int, int, int]:
        i, j, k = (self.shape[axis] for axis in self.axes)
        return i, j, k

    @property
    def to_stored(self) -> np.ndarray:
        """The affine (4, 4) from canonical voxel to stored voxel."""
        matrix = np.zeros((4, 4))
        matrix[3, 3] = 1.0
        for canonical, (stored, flip) in enumerate(zip(self.axes, self.flips, strict=True)):
            matrix[stored, canonical] = -1.0 if flip else 1.0
            matrix[stored, 3] = self.shape[stored] - 1 if flip else 0.0
        return matrix

    def apply(self, array: np.ndarray) -> np.ndarray:
        """Stored voxels (i, j, k, ...) in canonical order, as a view."""
        if array.shape[:3] != self.shape:
            raise ValueError(f"array {array.shape} does not lie on the stored grid {self.shape}")
        return self._flip(array.transpose(*self.axes, *range(3, array.ndim)))

    def affine(self, affine: np.ndarray) -> np.ndarray:
        """The affine of the canonical voxels, given that of the stored ones: every voxel keeps its place."""
        return affine @ self.to_stored

    def undo(self, array: np.ndarray) -> np.ndarray:
        """Canonical voxels (i, j, k, ...) in the stored order, as a view."""
        if array.shape[:3] != self.canonical_shape:
            raise ValueError(f"array {array.shape} does not lie on the canonical grid {self.canonical_shape}")
        back = np.argsort(self.axes)
        return self._flip(array).transpose(*back, *range(3, array.ndim))

    def _flip(self, array: np.ndarray) -> np.ndarray:
        return array[tuple(slice(None, None, -1) if flip else slice(None) for flip in self.flips)]


def canonical_flips(affine: np.ndarray, shape: tuple[int, int, int]) -> Reorientation:
    """How a stored grid is brought nearest to RAS without resampling; an oblique one stays oblique."""
    stored_to_world = io_orientation(affine)
    i, j, k = (int(axis) for axis in np.argsort(stored_to_world[:, 0]))
    flip_i, flip_j, flip_k = (bool(stored_to_world[axis, 1] < 0) for axis in (i, j, k))
    return Reorientation((i, j, k), (flip_i, flip_j, flip_k), shape)


def same_grid(
    shape_a: tuple[int, ...],
    affine_a: np.ndarray,
    shape_b: tuple[int, ...],
    affine_b: np.ndarray,
    tol_mm: float = 1e-3,
) -> str | None:
    """None where two grids agree (`tol_mm` in origin and spacing); else what differs, a first, as one phrase."""
    if tuple(shape_a) != tuple(shape_b):
        return f"shape {tuple(shape_a)} against {tuple(shape_b)}"
    if axis_codes(affine_a) != axis_codes(affine_b):
        return f"orientation {axis_codes(affine_a)} against {axis_codes(affine_b)}"
    spacing_a, spacing_b = np.array(spacing_of(affine_a)), np.array(spacing_of(affine_b))
    if np.abs(spacing_a - spacing_b).max() > tol_mm:
        return f"spacing {_mm(spacing_a)} against {_mm(spacing_b)} mm"
    turn = np.abs(affine_a[:3, :3] / spacing_a - affine_b[:3, :3] / spacing_b).max()
    if turn > DIRECTION_TOLERANCE:
        return f"directions that differ by {turn:.2g} in a cosine"
    apart = float(np.linalg.norm(affine_a[:3, 3] - affine_b[:3, 3]))
    if apart > tol_mm:
        return f"origins {apart:.4g} mm apart"
    return None


def resample(
    array: np.ndarray,
    affine_from: np.ndarray,
    affine_to: np.ndarray,
    shape_to: tuple[int, int, int],
    order: int,
    fill: float | int,
) -> np.ndarray:
    """The values of `array` (i, j, k) at the voxel centres of another grid (affine_to, shape_to).

    order 1 interpolates trilinearly and gives float32; order 0 takes the nearest voxel and keeps the dtype (labels).
    Beyond the outermost voxel centres the edge value holds for half a voxel, as far as a voxel reaches; from there on
    it is `fill`. Nothing is low-pass filtered: a much coarser grid aliases, as the point samples that labels get too.
    """
    if order not in (0, 1):
        raise ValueError(f"order {order}: 0 (nearest) or 1 (trilinear)")
    to_from = compose(inverse(affine_from), affine_to)
    matrix, offset = _without_rounding(to_from[:3, :3]), _without_rounding(to_from[:3, 3])
    separable = not matrix[~np.eye(3, dtype=bool)].any()
    out = np.empty(shape_to, dtype=np.float32 if order else array.dtype)
    thickness = max(1, SLAB_VOXELS // max(1, shape_to[1] * shape_to[2]))
    for start in range(0, shape_to[0], thickness):
        slab = out[start : start + thickness]
        slab_offset = offset + matrix[:, 0] * start
        ndimage.affine_transform(
            array,
            np.diag(matrix) if separable else matrix,  # scipy's quick path needs the diagonal alone
            slab_offset,
            output_shape=slab.shape,
            output=slab,
            order=order,
            mode="nearest",
            prefilter=False,
        )
        outside = _outside(matrix, slab_offset, slab.shape, array.shape)
        if outside is not None:
            slab[outside] = fill
    return out


def _outside(matrix: np.ndarray, offset: np.ndarray, shape: tuple, source: tuple) -> np.ndarray | None:
    """Which voxels of a slab lie more than half a voxel beyond the source; None where not one does."""
    corners = np.array(np.meshgrid(*((0, side - 1) for side in shape), indexing="ij")).reshape(3, -1)
    places = matrix @ corners + offset[:, None]
    last = np.array(source) - 1
    half = 0.5 + 1e-6  # a millionth of a voxel for rounding
    if (places.min(axis=1) >= -half).all() and (places.max(axis=1) <= last + half).all():
        return None
    index = np.ogrid[tuple(slice(side) for side in shape)]
    outside = np.zeros(shape, dtype=bool)
    for axis in range(3):
        # A zero term is left out, so that an unrotated grid costs one short vector an axis and not a slab.
        place = sum((matrix[axis, a] * index[a] for a in range(3) if matrix[axis, a]), start=offset[axis])
        outside |= (place < -half) | (place > last[axis] + half)
    return outside


def _without_rounding(values: np.ndarray) -> np.ndarray:
    """Values within 1e-9 of a whole number made whole, so that equal grids give equal voxels to the last digit."""
    whole = np.round(values)
    return np.where(np.abs(values - whole) < 1e-9, whole, values)


def _mm(values: np.ndarray) -> str:
    return "x".join(f"{value:.4g}" for value in values)
