"""Organ probes: can the organ at a place be read off what is said of it, by its neighbours or by a linear map?

A probe learns from the places of some subjects and answers for those of others, never for one whose places it has
seen; in turn, until every subject has been judged. What is said of a place is an encoder's features, its position in
the body, or the intensities around it: the same probe for all.
"""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
from jaxtyping import Bool, Float, Int
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler

from dagman.evaluation.average_precision import average_precision
from dagman.evaluation.crop_features import Scores
from dagman.evaluation.organ_places import OrganPlaces

NEIGHBOURS = 15
FOLDS = 5  # by subject; as many as there are subjects where these are fewer
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)  # C of the linear probe, on channels of variance 1
USUAL_STRENGTH = 1e-2  # where there is one subject to learn from, and nobody to choose by
MEASURES = ("accuracy", "precision")

Rows = Float[np.ndarray, "n c"]
Asked = Float[np.ndarray, "m c"]
Answer = Callable[[Rows, np.ndarray, np.ndarray, Asked], Float[np.ndarray, "m k"]]  # see `by_neighbours`


def organ_probes(of_stages: Mapping[int, Float[np.ndarray, "n _"]], places: OrganPlaces) -> Scores:
    """How well organs are told by what `vectors_of_places` reads of an encoder, by subject; measures of `judged`.

    knn.*.features, linear.*.features  from all stages, each of unit length, one behind the other
    knn.*.stage<s>                     from one stage alone
    """
    all_stages = np.concatenate(list(of_stages.values()), axis=1)
    found = probed_with("knn", "features", by_neighbours("cosine"), all_stages, places)
    found |= probed_with("linear", "features", by_linear_map, all_stages, places)
    for stage, vectors in of_stages.items():
        found |= probed_with("knn", f"stage{stage}", by_neighbours("cosine"), vectors, places)
    return found


def organ_controls(where: Float[np.ndarray, "n 3"], patches: Rows, places: OrganPlaces) -> Scores:
    """The same without an encoder, hence the same for all: from the place in the body's box alone (`places_in_body`),
    from the raw intensities around it (`patches_of`), and by chance.

    Neighbours are the nearest by Euclidean distance; the linear probe of places has products of coordinates up to the
    third degree, since no organ is a half-space.
    """
    curved = PolynomialFeatures(3, include_bias=False).fit_transform(where)
    nearest = by_neighbours("euclidean")
    found = probed_with("knn", "position", nearest, where, places)
    found |= probed_with("knn", "patch", nearest, patches, places)
    found |= probed_with("linear", "position", by_linear_map, curved, places)
    found |= probed_with("linear", "patch", by_linear_map, patches, places)
    for measure, of in chance(places).items():
        found |= {f"{probe}.{measure}.chance": of for probe in ("knn", "linear")}
    return found


def probed_with(probe: str, name: str, answer: Answer, rows: Rows, places: OrganPlaces) -> Scores:
    """`probe.<measure>.name` of each measure."""
    measured = judged(out_of_subject(answer, rows, places.organ, places.subject), places.organ, places.subject)
    return {f"{probe}.{measure}.{name}": of for measure, of in measured.items()}


def out_of_subject(
    answer: Answer, rows: Rows, organ: Int[np.ndarray, " n"], subject: np.ndarray
) -> Float[np.ndarray, "n k"]:
    """The probability of each organ (k: those of np.unique(organ)) at each place, by a probe that has not seen the
    subject."""
    organs = np.unique(organ)
    found = np.zeros((len(rows), len(organs)))
    for learned, asked in folds_by_subject(subject, FOLDS):
        known = np.searchsorted(organs, np.unique(organ[learned]))  # an organ that nobody showed gets no probability
        told = answer(rows[learned], organ[learned], subject[learned], rows[asked])
        found[np.ix_(np.flatnonzero(asked), known)] = told
    return found


def folds_by_subject(subject: np.ndarray, most: int) -> Iterator[tuple[Bool[np.ndarray, " n"], Bool[np.ndarray, " n"]]]:
    """(learned, asked) places: every subject is asked in one fold, and is on one side only."""
    count = min(most, len(np.unique(subject)))
    for learned, _ in GroupKFold(count).split(subject, groups=subject):
        mask = np.zeros(len(subject), dtype=bool)
        mask[learned] = True
        yield mask, ~mask


def by_neighbours(metric: str) -> Answer:
    """The share of each organ, in order, among the NEIGHBOURS nearest places of the learned ones."""

    def answer(rows: Rows, organ: np.ndarray, _: np.ndarray, asked: Asked) -> np.ndarray:
        nearest = KNeighborsClassifier(min(NEIGHBOURS, len(rows)), metric=metric, algorithm="brute")
        return nearest.fit(rows, organ).predict_proba(asked)

    return answer


def by_linear_map(rows: Rows, organ: np.ndarray, subject: np.ndarray, asked: Asked) -> np.ndarray:
    """Multinomial logistic regression on channels of mean 0 and variance 1, organs weighted alike.

    C is the one of STRENGTHS that does best for a third of the learned subjects when the others teach: encoders of
    different widths and scales are each read as well as they can be.
    """
    if len(np.unique(organ)) == 1:  # there is nothing to tell apart
        return np.ones((len(asked), 1))
    strength = USUAL_STRENGTH
    if len(np.unique(subject)) > 1:
        taught, kept = next(folds_by_subject(subject, 3))
        if len(np.unique(organ[taught])) > 1:
            scores = [linear(c).fit(rows[taught], organ[taught]).score(rows[kept], organ[kept]) for c in STRENGTHS]
            strength = STRENGTHS[int(np.argmax(scores))]
    return linear(strength).fit(rows, organ).predict_proba(asked)


def linear(strength: float):
    """What is fitted; `tol` is far below what changes an answer."""
    regression = LogisticRegression(C=strength, class_weight="balanced", max_iter=500, tol=1e-3)
    return make_pipeline(StandardScaler(), regression)


def judged(
    probabilities: Float[np.ndarray, "n k"], organ: Int[np.ndarray, " n"], subject: np.ndarray
) -> dict[str, dict[str, list[float]]]:
    """Two measures by subject, each the mean over the organs (elsewhere among them) that the subject shows:

    accuracy   balanced accuracy: the share of the organ's places that are given to it; organs equally likely share
    precision  macro average precision: of the organ's places among all of the subject, ranked by its probability
    """
    organs = np.unique(organ)
    best = probabilities >= probabilities.max(axis=1, keepdims=True) - 1e-9
    right = best[np.arange(len(organ)), np.searchsorted(organs, organ)] / best.sum(axis=1)
    found: dict[str, dict[str, list[float]]] = {measure: {} for measure in MEASURES}
    for one in dict.fromkeys(subject.tolist()):
        ours = subject == one
        shown = [(n, organ[ours] == value) for n, value in enumerate(organs) if (organ[ours] == value).any()]
        found["accuracy"][one] = [float(np.mean([right[ours][its].mean() for _, its in shown]))]
        ranked = [average_precision(probabilities[ours, n], its) for n, its in shown]
        found["precision"][one] = [float(np.mean(ranked))]
    return found


def chance(places: OrganPlaces) -> dict[str, dict[str, list[float]]]:
    """What a probe scores that says the same of every place."""
    return judged(np.ones((len(places.organ), len(np.unique(places.organ)))), places.organ, places.subject)
