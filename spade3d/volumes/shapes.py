"""Implicit shapes in mm: superellipsoids and tubes along curves, asked point by point whether they hold it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.interpolate import CubicSpline
from scipy.spatial.transform import Rotation


@dataclass(frozen=True, eq=False)
class Blob:
    """A superellipsoid: sum over axes of |u / radius| ** exponent <= 1, with u = the point in the blob's own axes.

    `turn` (3, 3) has the blob's axes as columns; exponent 2 is an ellipsoid, 4 nearly a box. mm throughout.
    """

    centre: np.ndarray
    radii: np.ndarray
    exponent: float = 2.0
    turn: np.ndarray | None = None

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """A box (lo, hi) that holds it."""
        turn = np.eye(3) if self.turn is None else self.turn
        reach = np.abs(turn) @ self.radii
        return self.centre - reach, self.centre + reach

    def holds(self, points: np.ndarray) -> np.ndarray:
        """Whether each of `points` (3, ...) lies inside."""
        own = points - _columns(self.centre, points)
        if self.turn is not None:
            own = np.tensordot(self.turn.T.astype(points.dtype), own, axes=1)
        own = np.abs(own / _columns(self.radii, points))
        return (own**self.exponent).sum(axis=0) <= 1


@dataclass(frozen=True, eq=False)
class Capsule:
    """A straight piece of tube from `start` to `stop` with a radius at each end, rounded off. mm throughout."""

    start: np.ndarray
    stop: np.ndarray
    radii: tuple[float, float]

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        reach = max(self.radii)
        return np.minimum(self.start, self.stop) - reach, np.maximum(self.start, self.stop) + reach

    def holds(self, points: np.ndarray) -> np.ndarray:
        along = self.stop - self.start
        rest = points - _columns(self.start, points)
        t = np.clip(np.tensordot((along / (along @ along)).astype(points.dtype), rest, axes=1), 0, 1)
        rest -= _columns(along, points) * t
        return (rest**2).sum(axis=0) <= (self.radii[0] + (self.radii[1] - self.radii[0]) * t) ** 2


Shape = Blob | Capsule
Vector = Sequence[int | float] | np.ndarray


def blob(centre: Vector, radii: Vector, exponent: int | float = 2.0, turned: Vector | None = None) -> Blob:
    """A superellipsoid; `turned`: degrees about x, then y, then z."""
    turn = None if turned is None else Rotation.from_euler("xyz", turned, degrees=True).as_matrix()
    return Blob(np.asarray(centre, float), np.asarray(radii, float), float(exponent), turn)


def tube(points: Sequence[Vector] | np.ndarray, radii: Vector, pieces: int = 8) -> tuple[Capsule, ...]:
    """A tube along the smooth curve through `points`, its radius running through `radii`, as `pieces` capsules."""
    points = np.asarray(points, float)
    knots = np.linspace(0, 1, len(points))
    at = np.linspace(0, 1, pieces + 1)
    curve, wide = CubicSpline(knots, points)(at), np.interp(at, knots, radii)
    return tuple(Capsule(*curve[n : n + 2], (float(wide[n]), float(wide[n + 1]))) for n in range(pieces))


def moved(shape: Shape, centre: np.ndarray, motion: np.ndarray) -> Shape:
    """The shape turned and scaled by a similarity `motion` (3, 4) about `centre`: p -> centre + M (p - centre) + t."""
    matrix, shift = motion[:, :3], motion[:, 3]
    size = float(np.cbrt(np.linalg.det(matrix)))

    def place(point: np.ndarray) -> np.ndarray:
        return centre + matrix @ (point - centre) + shift

    if isinstance(shape, Capsule):
        return Capsule(place(shape.start), place(shape.stop), (shape.radii[0] * size, shape.radii[1] * size))
    turn = matrix / size @ (np.eye(3) if shape.turn is None else shape.turn)
    return Blob(place(shape.centre), shape.radii * size, shape.exponent, turn)


def _columns(vector: np.ndarray, points: np.ndarray) -> np.ndarray:
    """The vector (3) shaped to go along with points (3, ...)."""
    return vector.astype(points.dtype).reshape(3, *[1] * (points.ndim - 1))
