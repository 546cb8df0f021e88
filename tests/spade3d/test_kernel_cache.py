"""Kernels compile, are cached, and still compile where nothing can be written."""

import os
import subprocess
import sys
from pathlib import Path

KERNEL = """
from spade3d.kernel_cache import compiled

@compiled(nogil=True)
def twice(x: int) -> int:
    return 2 * x
"""
# Root may write anywhere, so a test cannot take the folders away: it makes numba find them unwritable.
READ_ONLY = """
from numba.core import caching

def refuse(locator):
    raise PermissionError("read-only")

caching.InTreeCacheLocator.ensure_cache_path = caching.UserWideCacheLocator.ensure_cache_path = refuse
"""
USE = """
import os
import kernel
assert kernel.twice(21) == 42
print(os.environ.get("NUMBA_CACHE_DIR"))
print(kernel.twice.stats.cache_path, [*kernel.twice.stats.cache_hits])
print(len([name for name in os.listdir(kernel.twice.stats.cache_path) if name.endswith(".nbc")]))
"""


def run(program, folder, **environment):
    (folder / "kernel.py").write_text(KERNEL)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_")}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, encoding="utf-8", cwd=folder, env={**clean, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done.stderr


def test_compiled_once_beside_the_source(tmp_path):
    first, _ = run(USE, tmp_path)
    again, complaint = run(USE, tmp_path)
    assert first == ["None", f"{tmp_path / '__pycache__'} []", "1"]
    assert again[1].endswith("[(int64,)]"), "the second process compiled again"
    assert complaint == ""


def test_a_read_only_package_is_served_by_a_temporary_folder(tmp_path):
    (folder, where, cached), complaint = run(READ_ONLY + USE, tmp_path)
    assert where.startswith(folder) and cached == "1"
    assert f"kept in {folder}" in complaint
    assert not Path(folder).exists(), "the temporary folder outlived its process"


def test_without_compilation_it_is_plain_python(tmp_path):
    lines, _ = run(
        "import kernel\nprint(kernel.twice(21), type(kernel.twice).__name__)", tmp_path, NUMBA_DISABLE_JIT="1"
    )
    assert lines == ["42 function"]
