"""A 3D CNN that learns the same labels of whole studies at a low resolution, and teaches class tokens what it thinks.

CLARiTy (arXiv 2512.16700, abstract) distils a ConvNeXt V2 of 2D pictures; here the teacher is MONAI's DenseNet121 in 3D
(after Huang et al. 2017), its norms over groups of channels because batches are of one or two studies. A teacher that
has learnt a study by heart only gives its labels back. Therefore each study is by default taught by a teacher that has
not seen its subject (out of fold); no teacher ever sees a subject that judges.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from dagman.downstream.clarity_losses import label_loss
from dagman.downstream.studies import Findings, StudyBatch
from dagman.downstream.study_heads import begin_at_prevalence
from dagman.downstream.study_streams import Show, StudyStream, collate
from spade3d.faults import DataFault, UsageFault
from spade3d.training.loop import Optimiser, Task, train
from spade3d.training.prefetch import prefetched
from spade3d.whole_file import whole_file

LOGITS = "logits.json"


class CnnTeacher(nn.Module):
    """DenseNet121 in 3D: images (b, 1, i, j, k) -> logits (b, f). `growth` 32 is the original; the width follows it."""

    def __init__(self, findings: int, *, growth: int = 32):
        from monai.networks.nets import DenseNet121

        super().__init__()
        if growth < 8 or growth % 8:
            raise UsageFault(
                f"a teacher of growth {growth}: a multiple of 8 is needed, because norms are over 8 groups"
            )
        norm = ("group", {"num_groups": 8})
        self.network = DenseNet121(3, 1, findings, init_features=2 * growth, growth_rate=growth, norm=norm)

    def begin_at_prevalence(self, labels: Float[Tensor, "n f"]) -> None:
        """Begin at the log odds of each finding."""
        begin_at_prevalence(self.network.class_layers.out.bias, labels)

    def forward(self, images: Float[Tensor, "b 1 i j k"]) -> Float[Tensor, "b f"]:
        return self.network(images)


class TeacherTask(Task):
    """Cross-entropy over the labels that are said; batches hold one image of each study."""

    def __init__(self, network: CnnTeacher):
        super().__init__()
        self.network = network

    def losses(self, batch: StudyBatch, progress: float) -> dict[str, Tensor]:
        return {"classification": label_loss(self.network(batch.images[:, 0]), batch.labels)}


@dataclass(frozen=True)
class Teaching:
    """How teachers learn.

    folds     so many teachers, each taught by the subjects of all parts but one and asked about that part; 1: one
              teacher, asked about the studies that it was taught by
    steps, batch, growth   of each teacher; `lr` of AdamW
    """

    folds: int = 3
    steps: int = 500
    batch: int = 4
    growth: int = 32
    lr: float = 3e-4


def teach(
    show: Show,
    still: Show,
    findings: Findings,
    cases: Sequence[int],
    teaching: Teaching,
    *,
    out: Path,
    device: torch.device,
    seed: int = 0,
    precision: str = "auto",
    mark: str = "",
) -> dict[str, Float[np.ndarray, " f"]]:
    """Train the teachers of some studies in OUT/<part>/ and ask them: a scan's name -> logits, kept in OUT/logits.json.

    show    how a study is shown while they learn (an image, `study_streams.Whole`); `still` without chance, when asked
    cases   the studies that teach; `mark` says which images these are (a resumed run must have the same)

    What an earlier call in the same folder has finished is read, what it has begun is continued; under other settings,
    studies or labels DataFault. UsageFault where there are fewer subjects than folds.
    """
    subjects = subjects_in_folds(findings, cases, teaching.folds)
    order = np.random.default_rng([seed, 0x7EAC]).permutation(len(subjects)).tolist()
    part_of = {subjects[n]: turn % teaching.folds for turn, n in enumerate(order)}
    said = [(findings.studies[i].name, str(findings.studies[i].labels)) for i in cases]
    kind = hashlib.sha256(json.dumps([asdict(teaching), said, seed, mark]).encode()).hexdigest()
    taught = _read(out / LOGITS, kind)
    if taught is not None:
        return taught
    taught = {}
    for part in range(teaching.folds):
        asked = [i for i in cases if part_of[findings.studies[i].subject] == part]
        teachers = [i for i in cases if i not in asked] if teaching.folds > 1 else list(cases)
        network = _trained(show, findings, teachers, teaching, out / str(part), device, seed + part, precision, kind)
        taught |= logits_of(network, still, findings, asked, device)
    with whole_file(out / LOGITS) as file:
        file.write(json.dumps({"kind": kind, "logits": {name: row.tolist() for name, row in taught.items()}}).encode())
    return taught


def subjects_in_folds(findings: Findings, cases: Sequence[int], folds: int) -> list[str]:
    """The subjects of some cases; UsageFault where there are fewer than folds."""
    subjects = sorted({findings.studies[i].subject for i in cases})
    if len(subjects) < max(2, folds):
        raise UsageFault(f"{folds} folds of a teacher for {len(subjects)} subjects; give fewer folds, or no teacher")
    return subjects


def _trained(
    show: Show, findings: Findings, cases, teaching: Teaching, out: Path, device, seed: int, precision: str, kind: str
) -> CnnTeacher:
    torch.manual_seed(seed)
    network = CnnTeacher(len(findings.names), growth=teaching.growth)
    network.begin_at_prevalence(findings.table(cases))
    train(
        TeacherTask(network),
        prefetched(StudyStream(show, findings, cases, teaching.batch, seed=seed), None, device),
        steps=teaching.steps,
        out=out,
        optimiser=Optimiser(lr=teaching.lr),
        device=device,
        precision=precision,
        save_every=max(1, teaching.steps // 5),
        seed=seed,
        resume=(out / "checkpoints").exists(),
        label=f"teacher {out.name}",
        config_hash=kind,
    )
    return network


@torch.no_grad()
def logits_of(
    network: Callable[[Tensor], Tensor], still: Show, findings: Findings, cases: Sequence[int], device: torch.device
) -> dict[str, Float[np.ndarray, " f"]]:
    """What a network says of some studies, one at a time, in evaluation mode."""
    network.to(device).eval()
    found = {}
    for case in cases:
        batch = collate([still(case, np.random.default_rng(0))], findings, [case], None).to(device)
        found[findings.studies[case].name] = network(batch.images[:, 0])[0].float().cpu().numpy()
    return found


def _read(path: Path, kind: str) -> dict[str, Float[np.ndarray, " f"]] | None:
    """What was asked before; None where nothing was."""
    if not path.exists():
        return None
    try:
        said = json.loads(path.read_bytes())
        taught = {name: np.array(row, dtype=np.float32) for name, row in said["logits"].items()}
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise DataFault(f"{path}: not readable ({error}); remove it, and the teachers are asked again") from error
    if said["kind"] != kind:
        raise DataFault(f"{path}: of other studies, labels or settings; give another --out, or remove {path.parent}")
    return taught
