"""Bodies: where the crops of several scans lie, in the frame that the scans share or each in its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from spade3d.crops.crop import Box, body_bounds, keep_inside, scan_to_world
from spade3d.crops.selection import BODY, Places


class Bodies:
    """The way of each case from millimetres of its scan to body-frame mm, and the bounds of its body.

    `frames` holds, for each of the cases, the affine (4, 4) from RAS+ mm of the scan to body-frame mm, or None for a
    scan that could not be placed: it has a space of its own, its millimetres. Nothing is reckoned of a case before a
    crop of it is drawn: of 100,000 that would be six seconds, in every process that draws.
    """

    def __init__(self, store, cases: Sequence[int], frames: Mapping[int, np.ndarray | None]):
        if unknown := [case for case in cases if case not in frames]:
            raise KeyError(f"no frame, and no None for one, of the cases {unknown[:3]}")
        self.store, self.frames = store, frames

    def to_frame(self, case: int) -> np.ndarray | None:
        """The affine (4, 4) from millimetres of the scan to body-frame mm."""
        frame = self.frames[case]
        return None if frame is None else frame @ scan_to_world(self.store.cases[case])

    def bounds(self, case: int) -> np.ndarray:
        """`body_bounds` of the scan."""
        return body_bounds(self.store.cases[case])

    def placed(self, *cases: int) -> bool:
        """Whether all of these cases have a frame."""
        return all(self.frames[case] is not None for case in cases)

    def counterpart(self, box: Box, anchor: int, case: int) -> Box:
        """The box of another scan at the same place of the body, where both scans have a frame.

        Its size follows the frames too (a larger patient has a larger counterpart, as in the figure). It is kept inside
        the body; whether it still shows the same place is for the selection to say.
        """
        across = np.linalg.inv(self.to_frame(case)) @ self.to_frame(anchor)
        size = np.linalg.norm(across[:3, :3] * np.asarray(box.size), axis=1)  # as large, whichever way it is turned
        centre = across[:3, :3] @ np.asarray(box.centre) + across[:3, 3]
        return Box(tuple(keep_inside(centre, size, self.bounds(case))), tuple(size))

    def of_box(self, case: int, box: Box) -> Places:
        """One box (1, 6) of a scan, as large along the axes of the body frame.

        A box turned in the frame becomes the upright box of the same extent (root of squares), not the larger one
        around its corners: a counterpart would not overlap enough with its own anchor.
        """
        linear, shift = self._way(case)
        centre = linear @ np.asarray(box.centre) + shift
        half = np.linalg.norm(linear * np.asarray(box.size), axis=1) / 2
        return Places(np.concatenate([centre - half, centre + half])[None], np.array([self._space(case)]))

    def of_points(self, case: int, points_mm: np.ndarray) -> Places:
        """Points (n, 3) in millimetres of a scan."""
        linear, shift = self._way(case)
        return Places(points_mm @ linear.T + shift, np.full(len(points_mm), self._space(case)))

    def _way(self, case: int) -> tuple[np.ndarray, np.ndarray]:
        to_frame = self.to_frame(case)
        if to_frame is None:
            return np.eye(3), np.zeros(3)
        return to_frame[:3, :3], to_frame[:3, 3]

    def _space(self, case: int) -> int:
        return BODY if self.frames[case] is not None else case + 1
