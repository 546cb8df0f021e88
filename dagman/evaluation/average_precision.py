"""Average precision: how far above all else a score ranks what is true."""

import numpy as np
from jaxtyping import Bool, Shaped

from spade3d.faults import UsageFault


def average_precision(scores: Shaped[np.ndarray, "*place"], truth: Bool[np.ndarray, "*place"]) -> float:
    """The area under the steps of precision over recall:  sum over thresholds n of  (R_n - R_n-1) P_n.

    Every value that occurs is a threshold, from the highest down; places of one value pass it together, so that their
    order decides nothing and a map that says the same everywhere gets the prevalence. NaN where nothing is true. (It
    is scikit-learn's `average_precision_score`; of a million voxels it takes a fifth of its time, and runs ask for
    thousands.) UsageFault for scores that are not finite.
    """
    if not np.isfinite(scores).all():
        raise UsageFault("scores that are not finite have no order; give finite ones")
    if not truth.any():
        return float("nan")
    # Only where something true is found does recall rise, so only values of true places are thresholds that count.
    true, false = np.sort(scores[truth]), np.sort(scores[~truth])
    values, counts = np.unique(true, return_counts=True)
    found = counts[::-1].cumsum()[::-1]  # true places of this value and higher
    wrong = len(false) - np.searchsorted(false, values)
    return float((counts * (found / (found + wrong))).sum() / len(true))
