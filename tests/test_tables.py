"""docs/speed.md is what benchmarks/tables.py makes of the results that lie beside it."""

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


def test_a_goal_is_met_from_its_own_side():
    line = tables().Line
    assert line("a", "b", "c", "d", 2.2, 2.2).met and not line("a", "b", "c", "d", 2.1, 2.2).met
    assert line("a", "b", "c", "d", 1.9, 2, "s", below=True).met and not line("a", "b", "c", "d", 2.1, 2, "s", True).met


def test_what_was_not_measured_is_said(tmp_path):
    assert "Not measured yet: views" in tables().page(tmp_path)
