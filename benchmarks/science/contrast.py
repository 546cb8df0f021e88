"""Spade, its controls and the instance baselines at equal steps: what each encoder knows, and its few-shot Dice.

    python benchmarks/science/contrast.py DATA --out WORK --steps 400 400 --labels 8 --name contrast_hippocampus_mr

How arms are trained, judged and compared is in arms.py. The arms whose names begin with focus need a store with
saliency.
"""

from arms import UNTRAINED, Study, run_study

ARMS: dict[str, tuple[str, ...]] = {
    UNTRAINED: (),
    "restoration": ("--recipe", "spade", "--contrast.selection", "restoration"),
    "instance": ("--recipe", "spade", "--contrast.selection", "instance"),
    "positives": ("--recipe", "spade", "--contrast.selection", "positives"),
    "negatives": ("--recipe", "spade", "--contrast.selection", "negatives"),
    "both": ("--recipe", "spade", "--contrast.selection", "both"),
    "shuffled": ("--recipe", "spade", "--contrast.selection", "shuffled"),
    "simclr": ("--recipe", "simclr"),
    "moco": ("--recipe", "moco"),
    "byol": ("--recipe", "byol"),
    # For a store with saliency: FocusContrast's views on Spade, and what they must be held against.
    "focused": ("--recipe", "spade", "--focus.views", "focused"),
    "focus-random": ("--recipe", "spade", "--focus.views", "random"),
    "focus-matched-zoom": ("--recipe", "spade", "--focus.views", "matched_zoom"),
    "focus-shuffled": ("--recipe", "spade", "--focus.views", "shuffled"),
    "focus-centre": ("--recipe", "spade", "--focus.views", "centre"),
}
# The same on the tasks that FocusContrast was made for.
ARMS |= {
    f"focus-{views}-{task}": ("--recipe", task, "--focus.views", views)
    for task in ("simclr", "moco", "byol")
    for views in ("focused", "shuffled")
}
STUDY = Study(
    summary=__doc__.splitlines()[0],
    arms=ARMS,
    usual=tuple(arm for arm in ARMS if not arm.startswith("focus")),
    control="instance",
    headlines={
        "retrieval.features": "organ overlap at rank 1",
        "clusters.ratio.features": "clusters, inter / intra",
        "landmarks.centroid.features_mm": "centroid, mm",
        "landmarks.surface.features_mm": "surface, mm",
        "equivariance.turned.features": "found in turned twin",
        "equivariance.scaled.features": "in scaled twin",
        "equivariance.flipped.features": "in flipped twin",
        "decoded.equivariance.turned.features": "turned, decoded",
        "decoded.equivariance.scaled.features": "scaled, decoded",
        "decoded.equivariance.flipped.features": "flipped, decoded",
    },
    decoded=True,
)

if __name__ == "__main__":
    run_study(STUDY)
