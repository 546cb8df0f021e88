"""Test-time flips: the mean answer over a crop and its mirror images.

Along A and S a flip is undone by flipping the answer back. Along R a flip also makes a left kidney of the right one,
as far as a picture tells, and what the answer calls them depends on how the network knows them apart:

    it was never shown mirrored scans   it goes by the side of the picture, and a mirrored picture makes it exchange the
                                        sides; classes with a side change places before the mean is taken
    it was taught on mirrored crops     whose labels kept their names, so that only what lies beside (the liver) tells
                                        the sides apart, in a mirrored picture as well; nothing changes places

Whether a mirrored patient, or one on its head, is worth asking a network that never saw one, only a score can say.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from torch import Tensor

from dagman.attention.spatial_prior import mirror_by_name
from dagman.downstream.labelled import Classes
from spade3d.faults import UsageFault
from spade3d.networks.sliding import Predict

RIGHT = 0  # the axis of a prepared scan along which left and right lie


def mean_over_flips(predict: Predict, axes: Sequence[int], exchange: Sequence[int] | None) -> Predict:
    """A network that answers the mean of its answers over every set of flips along `axes` (0, 1, 2), none included.

    predict: crops (b, 1, i, j, k) -> logits (b, classes, i, j, k). exchange: the channel that takes the place of each
    where the crop was flipped along R; None: they stay.
    """
    sets = [chosen for count in range(len(axes) + 1) for chosen in combinations(sorted(axes), count)]

    def answer(crops: Tensor) -> Tensor:
        total: Tensor | None = None
        for chosen in sets:
            dims = [2 + axis for axis in chosen]
            logits = predict(crops.flip(dims)).float().flip(dims)
            if RIGHT in chosen and exchange is not None:
                logits = logits[:, list(exchange)]
            total = logits if total is None else total.add_(logits)
        return total.div_(len(sets))

    return answer if axes else predict


def exchange_of(classes: Classes, taught: tuple[bool, bool, bool], axes: Sequence[int]) -> tuple[int, ...] | None:
    """The channels that change places in a mirrored crop; None where none does.

    taught: the axes along which the crops of training were flipped. UsageFault where a flip along R would exchange a
    side with one that is not among the classes.
    """
    if RIGHT not in axes or taught[RIGHT]:
        return None
    mirror = mirror_by_name(classes.names)
    if alone := [name for name, other in mirror.items() if other is None]:
        raise UsageFault(
            f"--flips along R, and no class is the other side of {', '.join(alone)}: what the network says of a "
            "mirrored scan cannot be told apart; leave R out (--flips as)"
        )
    channel = {name: c for c, name in enumerate(classes.names, start=1)}
    order = (0, *(channel[mirror[name]] for name in classes.names))
    return None if order == tuple(range(len(order))) else order
