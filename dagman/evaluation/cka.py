"""CKA: how alike two layers see the same places, whatever basis each says it in.

Linear centred kernel alignment (Kornblith et al. 2019, "Similarity of Neural Network Representations Revisited",
section 3), K = X X^T and L = Y Y^T of rows (place) by columns (channel):

    CKA(K, L) = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))

1 where the layers are equal up to a turn, a reflection and one factor; 0 where nothing that one tells is in the other.
Their estimate of HSIC is biased: with more channels than places, unrelated layers come near 1. Here it is debiased and
read in minibatches (Nguyen, Raghu & Kornblith 2021, "Do Wide and Deep Networks Learn the Same Things?", equations 2 and
3; the estimator is Song et al. 2012): HSIC is the mean over batches of HSIC_1,

    HSIC_1(K, L) = ( tr(K~ L~) + 1'K~1 1'L~1 / ((n - 1)(n - 2)) - 2 / (n - 2) 1'K~L~1 ) / (n (n - 3)),

where K~ and L~ are K and L with zeros on the diagonal. It may fall a little below 0 where layers are unrelated.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

FEWEST = 4  # rows of a batch: HSIC_1 divides by n - 3
EMPTY = 1e-12  # of the squared size of a layer's Gram matrices: what is centred to less is rounding


def cka_matrix(
    ours: Sequence[Float[np.ndarray, "batch n _"]], theirs: Sequence[Float[np.ndarray, "batch n _"]]
) -> Float[np.ndarray, "layer other"]:
    """The debiased CKA of each layer with each other layer, on the same places; NaN where one says the same of all."""
    a, b = (np.stack([centred_grams(layer) for layer in layers]) for layers in (ours, theirs))
    sizes = np.sqrt((a**2).sum(axis=1))[:, None] * np.sqrt((b**2).sum(axis=1))[None, :]
    return np.divide(a @ b.T, sizes, out=np.full(sizes.shape, math.nan), where=sizes > 0)


def centred_grams(layer: Float[np.ndarray, "batch n c"]) -> Float[np.ndarray, " all"]:
    """The Gram matrices of all batches, U-centred, as one vector: HSIC_1 of two layers, but for the factor n (n - 3)
    that cancels in CKA, is their inner product (Szekely & Rizzo 2014, proposition 1).

    All zeros where a layer is constant, but for rounding. ValueError with fewer than FEWEST rows.
    """
    n = layer.shape[1]
    if n < FEWEST:
        raise ValueError(f"batches of {n} places; CKA without bias needs {FEWEST}")
    layer = layer.astype(np.float64)
    gram = layer @ layer.transpose(0, 2, 1)
    before = (gram**2).sum()
    diagonal = np.arange(n)
    gram[:, diagonal, diagonal] = 0
    rows = gram.sum(axis=2) / (n - 2)
    gram += gram.sum(axis=(1, 2))[:, None, None] / ((n - 1) * (n - 2)) - rows[:, :, None] - rows[:, None, :]
    gram[:, diagonal, diagonal] = 0
    return gram.ravel() if (gram**2).sum() > EMPTY * before else np.zeros(gram.size)
