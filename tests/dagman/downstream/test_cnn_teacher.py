"""The CNN teacher: who is asked about whom, what is kept, and that it learns."""

import json
import pickle

import numpy as np
import pytest
import torch

from dagman.downstream import cnn_teacher
from dagman.downstream.cnn_teacher import LOGITS, CnnTeacher, TeacherTask, Teaching, logits_of, teach
from dagman.downstream.studies import Findings, Study
from dagman.downstream.study_streams import Seen, StudyStream
from spade3d.faults import DataFault, UsageFault
from spade3d.training.prefetch import Prefetched

CPU = torch.device("cpu")
SIDE = 32


def findings_of(labels):
    """A study a row, two studies a subject."""
    studies = tuple(Study(f"scan {n}", f"patient {n // 2}", "training", tuple(row)) for n, row in enumerate(labels))
    return Findings(tuple(f"finding {n}" for n in range(len(labels[0]))), studies, ())


def show(case, rng):
    """A bright block in scans of odd numbers."""
    images = 0.1 * torch.randn(1, 1, SIDE, SIDE, SIDE, generator=torch.Generator().manual_seed(case))
    images[..., 8:24, 8:24, 8:24] += case % 2
    cell = torch.zeros(1, 1, 1)
    return Seen(None, images, cell.expand(3, 1, 1, 1), cell == 0, None)


FINDINGS = findings_of([[float(n % 2)] for n in range(8)])
TINY = Teaching(folds=2, steps=1, batch=2, growth=8)


def taught(out, teaching=TINY, findings=FINDINGS, **how):
    return teach(show, show, findings, range(8), teaching, out=out, device=CPU, **how)


def test_a_teacher_answers_for_each_study_and_finding_and_learns(tmp_path):
    torch.manual_seed(0)
    network = CnnTeacher(1, growth=8)
    network.begin_at_prevalence(FINDINGS.table(range(8)))
    task, stream = TeacherTask(network), StudyStream(show, FINDINGS, range(8), 4)
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-3)
    losses = []
    for batch in stream.stream(0, 8):
        optimiser.zero_grad()
        (loss,) = task.losses(batch, 0.0).values()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    logits = logits_of(network, show, FINDINGS, [2, 5], CPU)
    assert list(logits) == ["scan 2", "scan 5"] and logits["scan 2"] < logits["scan 5"]


def test_each_study_is_taught_by_a_teacher_that_has_not_seen_its_subject(tmp_path, monkeypatch):
    seen, asked = [], []

    def trained(show, findings, cases, *rest):
        seen.append({findings.studies[i].subject for i in cases})
        return None

    def answers(network, still, findings, cases, device):
        asked.append({findings.studies[i].subject for i in cases})
        return {findings.studies[i].name: np.zeros(1, np.float32) for i in cases}

    monkeypatch.setattr(cnn_teacher, "_trained", trained)
    monkeypatch.setattr(cnn_teacher, "logits_of", answers)
    found = taught(tmp_path, Teaching(folds=3))
    assert sorted(found) == [f"scan {n}" for n in range(8)]
    everybody = {f"patient {n}" for n in range(4)}
    assert len(seen) == 3 and all(s | a == everybody and not s & a for s, a in zip(seen, asked, strict=True))
    seen.clear()
    asked.clear()
    (tmp_path / "plain").mkdir()
    taught(tmp_path / "plain", Teaching(folds=1))
    assert seen == asked == [everybody]  # one that is asked about what it has seen


def test_what_was_taught_is_read_and_what_was_begun_is_continued(tmp_path, monkeypatch):
    first = taught(tmp_path)
    (tmp_path / LOGITS).unlink()  # as if the run had ended before it asked
    again = taught(tmp_path)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    monkeypatch.setattr(cnn_teacher, "_trained", None)  # nothing is trained any more
    read = taught(tmp_path)
    assert all(np.array_equal(first[name], read[name]) for name in first)


def test_a_gpu_does_not_wait_for_its_batches(tmp_path, monkeypatch):
    fed = []
    monkeypatch.setattr(cnn_teacher, "train", lambda task, batches, **how: fed.append(batches))
    monkeypatch.setattr(cnn_teacher, "logits_of", lambda *asked: {})
    for device in ("cpu", "cuda"):
        (tmp_path / device).mkdir()
        teach(show, show, FINDINGS, range(8), TINY, out=tmp_path / device, device=torch.device(device))
    assert [type(batches) for batches in fed] == [StudyStream] * 2 + [Prefetched] * 2
    assert fed[-1].pinned and pickle.dumps(fed[-1].batches)


@pytest.mark.parametrize("changed", ["seed", "labels", "mark"])
def test_answers_of_other_teachers_are_refused(tmp_path, changed):
    other = findings_of([[0.0]] * 8)
    (tmp_path / LOGITS).write_text(json.dumps({"kind": "of another run", "logits": {}}))
    how = {"seed": {"seed": 1}, "labels": {"findings": other}, "mark": {"mark": "4 mm"}}[changed]
    with pytest.raises(DataFault, match="other studies, labels or settings"):
        taught(tmp_path, **how)
    (tmp_path / LOGITS).write_bytes(b"{")
    with pytest.raises(DataFault, match="remove it"):
        taught(tmp_path)


def test_too_few_subjects_and_odd_widths_are_refused(tmp_path):
    with pytest.raises(UsageFault, match="5 folds of a teacher for 4 subjects"):
        taught(tmp_path, Teaching(folds=5))
    with pytest.raises(UsageFault, match="multiple of 8"):
        CnnTeacher(1, growth=12)
