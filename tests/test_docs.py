"""The documents tell the truth: every Python step of the tour runs, in order, in an empty folder."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"


def test_the_tour_runs_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    steps = re.findall(r"```python\n(.*?)```", (DOCS / "tour.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(steps) == 10
    known: dict = {}
    for number, step in enumerate(steps, start=1):
        try:
            exec(compile(step, f"tour.md, step {number}", "exec"), known)
        except AssertionError:
            pytest.fail(f"step {number} of the tour does not hold:\n{step}")


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} points to {target}, which is not there"
