"""Findings of studies: a CSV is read to the cell, what is wrong is said by line, and no crop ever has a label."""

from types import SimpleNamespace

import pytest
import torch

from dagman.downstream.studies import StudyBatch, read_findings
from spade3d.faults import DataFault


def case(name: str, subject: str | None = None, part: str = ""):
    return SimpleNamespace(name=name, subject=subject or name, part=part)


def written(path, text: str):
    path.write_text(text)
    return path


def test_every_cell_means_what_it_says(tmp_path):
    table = written(tmp_path / "f.csv", "subject,lump,cyst\na,1,0\nb, 0 ,\nc,-1,1\n")
    found = read_findings(table, [case("b"), case("a"), case("c"), case("d")])
    assert found.names == ("lump", "cyst")
    nan = float("nan")
    torch.testing.assert_close(
        found.table(range(4)), torch.tensor([[0, nan], [1, 0], [nan, 1], [nan, nan]]), equal_nan=True
    )
    assert [study.has_labels for study in found.studies] == [True, True, True, False]
    assert found.counts([0, 1, 2]) == {
        "lump": {"present": 1, "absent": 1, "unknown": 1},
        "cyst": {"present": 1, "absent": 1, "unknown": 1},
    }
    assert found.notes == ("f.csv: 1 scans without findings, not used: d",)


def test_a_subject_has_its_row_in_each_scan_and_a_case_column_names_one(tmp_path):
    cases = [case("a_1", "a"), case("a_2", "a"), case("b_1", "b")]
    of_subjects = read_findings(written(tmp_path / "s.csv", "subject,lump\na,1\nb,0\n"), cases)
    assert [study.labels for study in of_subjects.studies] == [(1.0,), (1.0,), (0.0,)]
    assert "several scans: a" in of_subjects.notes[0]
    of_cases = read_findings(written(tmp_path / "c.csv", "case,lump\na_2,1\nb_1,0\n"), cases)
    assert [study.has_labels for study in of_cases.studies] == [False, True, True]


def test_rows_without_a_scan_and_findings_of_one_kind_are_noted(tmp_path):
    table = written(tmp_path / "f.csv", "subject,always,never,unsaid\na,1,0,\nb,1,0,\nz,0,1,1\n")
    notes = read_findings(table, [case("a"), case("b")]).notes
    assert "1 subjects without a scan, not used: z" in notes[0]
    assert [note.split(": ")[1] for note in notes[1:]] == [
        "always is never absent",
        "never is never present",
        "unsaid is never said",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the columns are none; subject"),
        ("patient,lump\na,1\n", "the columns are patient, lump; subject"),
        ("subject\na\n", "the columns are subject; subject"),
        ("subject,lump,lump\na,1,1\n", "one differently named column"),
        ("subject,lump\na,1\na,0\n", "line 3: subject a comes twice"),
        ("subject,lump\na,2\n", "line 2, lump: '2'; 1 (present), 0 (absent) or nothing"),
        ("subject,lump\na,1,1\n", "line 2 has 3 cells; a subject and 1 are needed"),
        ("subject,lump\n,1\n", "line 2 has 2 cells"),
        ("subject,lump\nz,1\n", "none of its 1 subjects (z) is one of the scans (a)"),
        ('subject,lump\n"a,1\n', "not readable as CSV"),
    ],
)
def test_a_table_that_cannot_be_used_says_why(text, message, tmp_path):
    with pytest.raises(DataFault) as fault:
        read_findings(written(tmp_path / "f.csv", text), [case("a")])
    assert message in str(fault.value) and str(tmp_path / "f.csv") in str(fault.value)


def batch(labels: torch.Tensor) -> StudyBatch:
    places, valid = torch.zeros(2, 3, 12, 4, 4), torch.ones(2, 12, 4, 4, dtype=torch.bool)
    return StudyBatch(None, torch.zeros(2, 3, 1, 32, 32, 32), places, valid, labels, None, None, ("a", "b"))


def test_a_label_for_a_crop_cannot_be_said():
    """Two studies of three crops have two rows of labels: six, or a table by crop, is another shape."""
    assert len(batch(torch.zeros(2, 5))) == 2
    for labels in (torch.zeros(6, 5), torch.zeros(2, 3, 5)):
        with pytest.raises(TypeError):
            batch(labels)
