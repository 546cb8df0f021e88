"""Clustering: do features of the same organ of different subjects lie together, and those of other organs apart?

The question of DAGMaN's fourth task (Jiang et al. 2025, section 4, OrganMNIST3D), on the scans at hand. The paper does
not say which layer is read nor how distances are normalised; here it is the mean of the last stage over its cells, each
channel standardised as for all probes (crop_features.py), and distances are comparable between encoders by their ratio.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from scipy.spatial.distance import pdist, squareform
from scipy.stats import t as student_t
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score

from dagman.evaluation.crop_features import Encoder, NothingToAsk, Probing, Scores, grouped, plain_crop, stages_of
from dagman.evaluation.landmarks import CENTROID, landmarks_of
from dagman.evaluation.statistics import MeanInterval
from spade3d.crops.crop import Box, body_bounds, keep_inside

LEAST = 1e-6  # added to both distances: an encoder that says the same of everything has a ratio of 1


def organ_clusters(encoder: Encoder, store, cases: Sequence[int], how: Probing) -> Scores:
    """Distances between crops around organs (those that a scan shows whole), by subject. No network is trained.

    intra  Euclidean distance to the same organ of another subject, mean over organs
    inter  the same to other organs of other subjects
    ratio  inter over intra: 1 tells nothing apart, more is better

    Distances are divided by the root of the number of channels. Raises NothingToAsk where no two subjects share an
    organ or where there is only one organ (nothing to be told from).
    """
    return cluster_scores(*organ_vectors(encoder, store, cases, how))


def organ_vectors(
    encoder: Encoder, store, cases: Sequence[int], how: Probing
) -> tuple[Float[np.ndarray, "n c"], np.ndarray, np.ndarray]:
    """What an encoder says of a crop around each organ shown whole: features, organs (n,), subjects (n,)."""
    subjects, organs, vectors = [], [], []
    for case in cases:
        places, _ = landmarks_of(store, case)
        for (organ, side), place in places.items():
            if side == CENTROID:
                subjects.append(store.cases[case].subject)
                organs.append(organ)
                vectors.append(vector_around(encoder, store, case, place, how))
    return np.stack(vectors) if vectors else np.zeros((0, 1)), np.array(organs), np.array(subjects)


def cluster_scores(features: np.ndarray, organs: np.ndarray, subjects: np.ndarray) -> Scores:
    """The measures of `organ_clusters` from features (crop, channel), each of an organ of a subject."""
    other = subjects[:, None] != subjects[None, :]
    same, different = (other & rule for rule in (organs[:, None] == organs, organs[:, None] != organs))
    asked = same.any(axis=1) & different.any(axis=1)
    if not asked.any():
        raise NothingToAsk(
            f"{len(np.unique(subjects))} subjects with {len(np.unique(organs))} organs shown whole: no organ of one "
            "can be compared with the same and with another of a second; give more labelled scans, with two organs"
        )
    distance = squareform(pdist(features)) / features.shape[1] ** 0.5
    intra, inter = (((distance * rule).sum(axis=1) / np.maximum(rule.sum(axis=1), 1)) for rule in (same, different))
    intra, inter = (by_subject(values[asked], organs[asked], subjects[asked]) for values in (intra, inter))
    return {
        "clusters.intra.features": {subject: [value] for subject, value in intra.items()},
        "clusters.inter.features": {subject: [value] for subject, value in inter.items()},
        "clusters.ratio.features": {
            subject: [(inter[subject] + LEAST) / (intra[subject] + LEAST)] for subject in intra
        },
    }


def kmeans_agreement(
    features: Float[np.ndarray, "n c"], organs: np.ndarray, subjects: np.ndarray, seed: int
) -> dict[str, MeanInterval]:
    """How well k-means, with as many clusters as there are organs and no label, finds the organs; of all subjects.

    ami  adjusted mutual information (Vinh et al. 2010): 0 by chance, 1 where clusters are organs
    ari  adjusted Rand index (Hubert & Arabie 1985), on the same scale

    The best of ten starts. The 95 % interval leaves each subject out in turn while the clusters stay (jackknife,
    Student's t): a bootstrap would see a subject that is drawn twice agree with itself. Raises NothingToAsk where there
    is one organ only, or fewer than two subjects.
    """
    if len(np.unique(organs)) < 2 or len(np.unique(subjects)) < 2:
        raise NothingToAsk(
            f"{len(np.unique(subjects))} subjects with {len(np.unique(organs))} organs to cluster; two of each are "
            "needed: give more labelled scans, with two organs"
        )
    clusters = KMeans(len(np.unique(organs)), n_init=10, random_state=seed).fit_predict(features)
    others = [subjects != subject for subject in np.unique(subjects)]
    found = {}
    for name, judge in {"ami": adjusted_mutual_info_score, "ari": adjusted_rand_score}.items():
        whole, without = judge(organs, clusters), [judge(organs[rows], clusters[rows]) for rows in others]
        reach = student_t.ppf(0.975, len(others) - 1) * (len(others) - 1) * np.std(without) / (len(others) - 1) ** 0.5
        found[name] = MeanInterval(float(whole), float(whole - reach), float(min(1, whole + reach)), len(others))
    return found


def by_subject(values: np.ndarray, organs: np.ndarray, subjects: np.ndarray) -> dict[str, float]:
    """Mean over the organs of a subject, an organ that it shows twice (two scans) counted once."""
    found = {}
    for subject in dict.fromkeys(subjects.tolist()):
        ours = subjects == subject
        per_organ = grouped([str(organ) for organ in organs[ours]], values[ours])
        found[subject] = float(np.mean([np.mean(of) for of in per_organ.values()]))
    return found


@torch.inference_mode()
def vector_around(encoder: Encoder, store, case: int, place: np.ndarray, how: Probing) -> np.ndarray:
    """The mean of the last stage of a crop with a place (3,), in mm of the scan, in its middle, as far as the body's
    box allows."""
    i, j, k = keep_inside(place, np.asarray(how.size_mm), body_bounds(store.cases[case])).tolist()
    crop = plain_crop(case, Box((i, j, k), how.size_mm), how.shape)
    return stages_of(encoder, store, [crop], how.device)[-1][0].mean(dim=(1, 2, 3)).double().cpu().numpy()
