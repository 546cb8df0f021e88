"""Bodies: where the crops of several scans lie, in the frame that the scans share or each in its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from spade3d.crops.crop import Box, body_bounds, keep_inside, scan_to_world
from spade3d.crops.selection import BODY, Places


class Bodies:
    """The way of each case from millimetres of its scan to body-frame mm, and the bounds of its body.

    `frames` holds, for each of the cases, the affine (4, 4) from RAS+ mm of the scan to body-frame mm, or None for a
    scan that could not be placed: it has a space of its own, its millimetres.
    """

    def __init__(self, store, cases: Sequence[int], frames: Mapping[int, np.ndarray | None]):
        self.to_frame = {
            case: None if frames[case] is None else frames[case] @ scan_to_world(store.cases[case]) for case in cases
        }
        self.bounds = {case: body_bounds(store.cases[case]) for case in cases}

    def placed(self, *cases: int) -> bool:
        """Whether all of these cases have a frame."""
        return all(self.to_frame[case] is not None for case in cases)

    def counterpart(self, box: Box, anchor: int, case: int) -> Box:
        """The box of another scan at the same place of the body, where both scans have a frame.

        Its size follows the frames too (a larger patient has a larger counterpart, as in the figure). It is kept inside
        the body; whether it still shows the same place is for the selection to say.
        """
        across = np.linalg.inv(self.to_frame[case]) @ self.to_frame[anchor]
        size = np.linalg.norm(across[:3, :3] * np.asarray(box.size), axis=1)  # as large, whichever way it is turned
        centre = across[:3, :3] @ np.asarray(box.centre) + across[:3, 3]
        return Box(tuple(keep_inside(centre, size, self.bounds[case])), tuple(size))

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
        to_frame = np.eye(4) if self.to_frame[case] is None else self.to_frame[case]
        return to_frame[:3, :3], to_frame[:3, 3]

    def _space(self, case: int) -> int:
        return BODY if self.to_frame[case] is not None else case + 1
