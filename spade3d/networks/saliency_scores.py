"""How well one saliency map foretells another: CC, KL and NSS, as the gaze literature defines them.

(Bylinskii et al. 2019, "What do different evaluation metrics tell us about saliency models?"; the same three are
reported on CT-ScanGaze.) Maps are arrays of any one shape, non-negative; nan where a score is not defined.
"""

import numpy as np

EPSILON = 1e-12


def cc(predicted: np.ndarray, true: np.ndarray) -> float:
    """Pearson's correlation over voxels, -1..1; nan where a map is constant."""
    p, q = (_centred(one) for one in (predicted, true))
    size = float(np.sqrt((p * p).sum() * (q * q).sum()))
    return float((p * q).sum() / size) if size > 0 else float("nan")


def kl(predicted: np.ndarray, true: np.ndarray) -> float:
    """sum q log(q / p) in nats, both maps scaled to sum 1: 0 is best; nan where a map is empty.

    p is floored at 1e-12, so that a voxel where nothing was predicted costs much but not infinity.
    """
    p, q = (np.asarray(one, np.float64) for one in (predicted, true))
    if p.sum() <= 0 or q.sum() <= 0:
        return float("nan")
    p, q = np.maximum(p / p.sum(), EPSILON), q / q.sum()
    some = q > 0  # elsewhere 0 log 0 is 0
    return float((q[some] * np.log(q[some] / p[some])).sum())


def nss(predicted: np.ndarray, fixated: np.ndarray) -> float:
    """The mean over fixated voxels (bool) of the prediction in standard deviations above its mean: 0 is chance; nan
    where no voxel is fixated or the prediction is constant."""
    p = _centred(predicted)
    deviation = float(p.std())
    return float(p[fixated].mean() / deviation) if fixated.any() and deviation > 0 else float("nan")


def scores(predicted: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """CC, KL and NSS of a map. A store keeps maps and not fixations: for NSS, voxels above half the peak count as
    fixated, which is not comparable with numbers from the fixations themselves."""
    return {"cc": cc(predicted, true), "kl": kl(predicted, true), "nss": nss(predicted, true > true.max() / 2)}


def _centred(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, np.float64)
    return values - values.mean()
