"""What every test may use: the real scans when they are there, and shapes checked at every call."""

import os
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

# The tests check the shapes that the signatures promise; a user's run pays nothing for them.
install_import_hook(("spade3d", "dagman"), "beartype.beartype")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real scans (SPADE3D_TEST_DATA, or ../shared/data); the test is skipped where it is absent."""
    folder = Path(os.environ.get("SPADE3D_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real scans at {folder}")
    return folder
