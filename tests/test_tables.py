"""docs/speed.md and docs/results.md are what two scripts make of the results that lie beside them."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def tables():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_made_of_the_results():
    assert (ROOT / "docs" / "speed.md").read_text(encoding="utf-8") == tables().page(), (
        "docs/speed.md is not what the results say; run python benchmarks/tables.py"
    )


def test_the_page_of_studies_is_made_of_their_results(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "science")
    studies = importlib.import_module("results")
    assert (ROOT / "docs" / "results.md").read_text(encoding="utf-8") == studies.page(), (
        "docs/results.md is not what the results say; run python benchmarks/science/results.py"
    )
    assert "`contrast_abdomen_ct` has not been run." in studies.page(tmp_path)
    clear = studies.with_interval({"difference": 0.04, "low": 0.01, "high": 0.07})
    assert clear == "**+0.040** (+0.010, +0.070)"
    assert studies.with_interval({"difference": 0.04, "low": -0.01, "high": 0.07}, 1) == "+0.0 (-0.0, +0.1)"


def test_a_goal_is_met_from_its_own_side():
    line = tables().Line
    assert line("a", "b", "c", "d", 2.2, 2.2).met and not line("a", "b", "c", "d", 2.1, 2.2).met
    assert line("a", "b", "c", "d", 1.9, 2, "s", below=True).met and not line("a", "b", "c", "d", 2.1, 2, "s", True).met


def test_what_was_not_measured_is_said(tmp_path):
    assert "Not measured yet: views" in tables().page(tmp_path)
