"""The three ways to find the body frames of a set of scans, behind one interface.

Spade's abstract does not say how places of two patients correspond, so all three are ours. Each visits a scan once.

box      the body box, stretched onto the set's median box: nothing is read, and a scan that shows only part of the body
         is stretched as if that part were all of it
affine   registration to a scan of the set, then to the mean of those placed (`affine_frame.py`)
learned  a regressor of relative position, trained on the set itself, and a vote (`learned_frame.py`; needs torch)
"""

from collections.abc import Sequence

from spade3d.faults import UsageFault
from spade3d.volumes.affine_frame import affine_frames
from spade3d.volumes.body_frame import BodyFrame, Progress, box_frames

FRAMES = ("box", "affine", "learned")


def place_scans(
    store, cases: Sequence[int], method: str, *, seed: int = 0, progress: Progress | None = None
) -> dict[int, BodyFrame | None]:
    """The body frame of each of `cases` (indices into `store.cases`); None for a scan that cannot be placed.

    The same store, cases and seed give the same frames. UsageFault for a method that is not in FRAMES.
    """
    if method not in FRAMES:
        raise UsageFault(f"body frame {method!r}: there is no such frame; choose one of {', '.join(FRAMES)}")
    cases, report = list(cases), progress or (lambda done, total, what: None)
    if method == "box":
        return dict(zip(cases, box_frames([store.cases[i].body_box_mm for i in cases]), strict=True))
    if method == "affine":
        return affine_frames(store, cases, seed=seed, progress=report)
    from spade3d.volumes.learned_frame import learned_frames  # torch: only where it is asked for

    return learned_frames(store, cases, seed=seed, progress=report)
