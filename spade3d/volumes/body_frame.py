"""Body frames: one small transform per scan, after which places of two patients compare.

Spade draws positives and negatives between scans by where they lie in the body. Each scan is stretched and moved along
R, A, S, in mm of the set's typical patient: the median scale of a set is 1, so distances in any frame are millimetres.
How frames are found: `frame_methods.py`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spade3d.faults import DataFault
from spade3d.volumes.body_box import Box
from spade3d.volumes.geometry import apply_affine, stretch
from spade3d.whole_file import whole_file

FORMAT = "spade3d-body-frames-1"

Progress = Callable[[int, int, str], None]  # done, total, what is being done


@dataclass(frozen=True, eq=False)
class BodyFrame:
    """One scan's way into the frame that a set of scans shares."""

    to_frame: np.ndarray  # (4, 4): scan RAS+ mm -> mm of the typical patient
    confidence: float = 1.0  # 0..1, comparable within one method only

    def place(self, points_mm: np.ndarray) -> np.ndarray:
        """Points (..., 3) in the scan's mm as points in the frame."""
        return apply_affine(self.to_frame, points_mm)


def box_frames(boxes: Sequence[Box]) -> list[BodyFrame]:
    """One frame per body box: each is stretched onto the set's median size and centred at the origin."""
    if not boxes:
        return []
    low, high = (np.array([box[end] for box in boxes], dtype=np.float64) for end in (0, 1))
    size = high - low
    if not (np.isfinite(size).all() and size.min() > 0):
        raise ValueError("a body box without extent")
    scale = np.median(size, axis=0) / size
    centre = (low + high) / 2
    return [BodyFrame(stretch(s, -s * c)) for s, c in zip(scale, centre, strict=True)]


def of_typical_size(
    placed: Mapping[int, tuple[np.ndarray, float] | None],
) -> dict[int, BodyFrame | None]:
    """Frames from (to_frame, confidence), in mm of the typical patient: along each axis their median scale is 1.

    Without it a set placed in a small reference would seem to agree better than it does.
    """
    scales = [np.diag(found[0])[:3] for found in placed.values() if found is not None]
    unit = stretch(1 / np.median(scales, axis=0), np.zeros(3)) if scales else np.eye(4)
    return {i: None if found is None else BodyFrame(unit @ found[0], found[1]) for i, found in placed.items()}


def save_frames(path: Path, frames: Mapping[str, BodyFrame | None], method: str) -> None:
    """Write the frames of scans by name as one JSON, to the last digit, whole or not at all."""
    scans = {
        name: None if frame is None else {"to_frame": frame.to_frame.tolist(), "confidence": frame.confidence}
        for name, frame in frames.items()
    }
    text = json.dumps({"format": FORMAT, "method": method, "scans": scans}, indent=1)
    with whole_file(path) as file:
        file.write(text.encode() + b"\n")


def load_frames(path: Path) -> tuple[dict[str, BodyFrame | None], str]:
    """The frames that `save_frames` wrote, by name of the scan, and their method; DataFault for anything else."""
    again = "remove it, and the frames are found again"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise DataFault(f"{path}: format {content['format']!r}, needed is {FORMAT!r}; {again}")
        frames = {name: None if one is None else _frame(one) for name, one in content["scans"].items()}
        method = str(content["method"])
    except OSError as problem:
        raise DataFault(f"{path}: cannot be read ({problem.strerror}); {again}") from problem
    except (KeyError, TypeError, AttributeError, ValueError) as problem:
        raise DataFault(f"{path}: not a file of body frames; {again}") from problem
    return frames, method


def _frame(values: Mapping) -> BodyFrame:
    to_frame = np.array(values["to_frame"], dtype=np.float64)
    if to_frame.shape != (4, 4) or not np.isfinite(to_frame).all():
        raise ValueError("a transform is 4 x 4 finite numbers")
    return BodyFrame(to_frame, float(values["confidence"]))
