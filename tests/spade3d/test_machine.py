"""The machine's memory, as a container or a batch system leaves it."""

import os

from spade3d import machine


def test_the_least_of_the_limits_counts(tmp_path, monkeypatch):
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(machine, "LIMITS", (str(tmp_path / "none"), str(limit)))
    for said, usable in (("max\n", whole), (f"{2**30}\n", 2**30), (f"{2**62}\n", whole)):
        limit.write_text(said)
        assert machine.usable_memory() == usable
