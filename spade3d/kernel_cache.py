"""Compile numba kernels once per machine, also where the installed package cannot be written (containers)."""

import functools
import inspect
import logging
import os
import tempfile
from collections.abc import Callable

import numba

log = logging.getLogger(__name__)


def compiled(**options) -> Callable[[Callable], Callable]:
    """`numba.njit(cache=True, **options)` that survives a read-only package folder without a home folder.

    numba keeps the machine code in NUMBA_CACHE_DIR, beside the source, or in the user's cache folder, and raises
    RuntimeError ("no locator available") if none of them can be written. Then a temporary folder serves this process
    and the workers it starts, and goes away with it.

    numba notices an edit only in the kernel's own file: a kernel calls kernels of its own file, not of another. Those
    that it calls are inlined (`inline="always"`, or `forceinline`, which keeps their own fastmath): a call that is left
    ends, in the process that compiled it and in those that read it from the cache, in code that was optimised apart.
    Where sums may be reordered the last bits then differ, and a run that goes on is not the run it was.
    """

    def decorate(function: Callable) -> Callable:
        # What a decorator below us added (the shape checks of the tests) is Python that numba cannot compile.
        kernel = numba.njit(**options)(inspect.unwrap(function))
        if numba.config.DISABLE_JIT:  # plain Python, for a debugger
            return kernel
        try:
            kernel.enable_caching()
        except RuntimeError:
            # The environment tells the spawned workers, the configuration tells this process.
            os.environ["NUMBA_CACHE_DIR"] = numba.config.CACHE_DIR = _temporary_folder().name
            kernel.enable_caching()
        return kernel

    return decorate


@functools.cache
def _temporary_folder() -> tempfile.TemporaryDirectory:
    """Private to this user: a folder of a known name could be filled with someone else's machine code."""
    folder = tempfile.TemporaryDirectory(prefix="spade3d-kernels-")
    log.warning("no writable folder for compiled kernels: they are kept in %s until this command ends", folder.name)
    return folder
