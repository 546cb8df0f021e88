"""DAGMaN, the ladder of its controls, and both tasks on one encoder at equal steps and equal seen crops.

    python benchmarks/science/distillation.py DATA --out WORK --steps 400 400 --labels 8 --name distillation_abdomen_ct

How arms are trained, judged and compared is in arms.py. The claims that are looked at: semantic attention and the noisy
teacher each help alone, both help more, the noisy teacher raises the entropy of heads in stages 2 and 3 and its spread
over heads, and semantic attention alone lowers the entropy of stage 1 (Jiang et al. 2025, figures 4 and 7).
"""

from arms import UNTRAINED, Study, run_study

ARMS: dict[str, tuple[str, ...]] = {
    UNTRAINED: (),
    "smit": ("--recipe", "dagman", "--distill.variant", "smit"),
    "semantic": ("--recipe", "dagman", "--distill.variant", "semantic"),
    "noisy": ("--recipe", "dagman", "--distill.variant", "noisy"),
    "dagman": ("--recipe", "dagman"),
    "ibot": ("--recipe", "dagman", "--distill.variant", "ibot"),
    "attmask": ("--recipe", "dagman", "--distill.variant", "attmask"),
    "mst": ("--recipe", "dagman", "--distill.variant", "mst"),
    "dino": ("--recipe", "dagman", "--distill.variant", "dino"),
    "visible-only": ("--recipe", "dagman", "--distill.drop_hidden"),
    "guided": ("--recipe", "dagman", "--prior.source", "bands"),  # SPAN by data statistics: no labels steer it
    # Two anchors with a second scan each: as many crops a step as the four anchors of the others.
    "spade-dagman": ("--recipe", "spade-dagman"),
}
STUDY = Study(
    summary=__doc__.splitlines()[0],
    arms=ARMS,
    usual=(UNTRAINED, "smit", "semantic", "noisy", "dagman", "visible-only", "guided", "spade-dagman"),
    control="smit",
    headlines={
        "retrieval.features": "organ overlap at rank 1",
        "clusters.ratio.features": "clusters, inter / intra",
        "landmarks.centroid.features_mm": "centroid, mm",
        "heads.stage1.entropy": "entropy, stage 1",
        "heads.stage2.entropy": "entropy, stage 2",
        "heads.stage3.entropy": "entropy, stage 3",
        "heads.stage2.divergence": "JSD, stage 2",
        "heads.stage3.divergence": "JSD, stage 3",
    },
)

if __name__ == "__main__":
    run_study(STUDY)
