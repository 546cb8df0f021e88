"""All the processor cores that this process may use."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def usable_cores() -> int:
    """Those that the scheduler, a container or a batch system left to it; at least one."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def on_all_cores(function: Callable[[Any], Any], each: Iterable[Any], most: int | None = None) -> Iterator[Any]:
    """function(one) of each, in their order, by `most` threads at once (None: one a core).

    It gains where the function leaves Python's lock (numba with `nogil`, numpy, reading). An exception in it is raised
    here, and what was not begun is left out.
    """
    pool = ThreadPoolExecutor(min(most or usable_cores(), usable_cores()))
    try:
        yield from pool.map(function, each)
    finally:
        pool.shutdown(cancel_futures=True)
