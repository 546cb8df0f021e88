"""What each process does in `test_ranks_flow.py` where all are asked to stop and a save takes its time.

python tests/spade3d/training/slow_save.py OUT
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch
from tiny_task import PointStream, Tiny

from spade3d.faults import Preempted
from spade3d.training import checkpoint, loop, ranks

SECONDS = 2.0
put = checkpoint.put


def slowly(folder: Path, step: int, state: dict, **more) -> Path:
    if step:
        time.sleep(SECONDS)
    return put(folder, step, state, **more)


def asked_to_stop(index: int) -> None:
    """As Slurm does: every process hears it."""
    if index == 3:
        os.kill(os.getpid(), signal.SIGTERM)


def main(out: str) -> int:
    checkpoint.put = slowly
    how = {"optimiser": loop.Optimiser(lr=0.01), "device": torch.device("cpu"), "save_every": 1000}
    try:
        with ranks.joined("cpu"):
            loop.train(Tiny(), PointStream(asked_to_stop), steps=50, out=Path(out), **how)
    except Preempted as stopped:
        return stopped.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
