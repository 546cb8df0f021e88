"""Worker processes that may die: a job that kills its process is named, and the others are done all the same."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from spade3d.faults import Fault


def outcomes(
    function: Callable[[Any], Any], jobs: Sequence[Any], count: int, died: Callable[[Any], Any]
) -> Generator[Any, None, None]:
    """function(job) of every job from `count` spawned processes, in the order in which they end.

    When a process dies the jobs in hand at that moment are tried again, each in a process of its own; `died(job)` is
    the outcome of one that kills this, too. An exception in `function` is raised here.
    """
    waiting = list(reversed(jobs))
    while waiting:
        suspects = yield from _pooled(function, waiting, count)
        for job in suspects:
            if (yield from _pooled(function, [job], 1)):
                yield died(job)


def _pooled(function: Callable[[Any], Any], waiting: list[Any], count: int) -> Generator[Any, None, list[Any]]:
    """Take jobs from the end of `waiting`; returns those that were in hand when a process died.

    No more jobs are handed out than there are processes, so that few come under suspicion. One handed out after the
    death never ran; it is suspected with the others and simply done again.
    """
    # Spawned, not forked: a fork copies the locks of other threads in whatever state they are.
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _start) as pool:
        try:
            pool.submit(os.getpid).result()
        except BrokenProcessPool as broken:
            raise Fault(
                "worker processes cannot start; a script that prepares a store must do so under "
                '`if __name__ == "__main__":`'
            ) from broken
        running: dict[Any, Any] = {}
        try:
            while waiting or running:
                while waiting and len(running) < count:
                    job = waiting.pop()
                    running[pool.submit(function, job)] = job
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    outcome = future.result()
                    del running[future]
                    yield outcome
        except BrokenProcessPool:
            return [*running.values()]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return []


def _start() -> None:
    """A worker leaves Ctrl-C to its parent, and does not outlive it, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
