"""What a user can mend: one message (what was found, what is needed, what to do) and the exit code it ends with.

Exit codes of every command: 0 done, 1 our own failure, 2 bad usage or configuration, 3 bad data, 75 preempted
(run me again), 130/143 interrupted.
"""

# Two files in the folder of a run. UNFINISHED: what lies there never began to run. PREEMPTED is for requeue scripts, as
# torchrun ends with 1 whatever its processes end with; it goes when the run is started again, before anything can end
# that again: what then fails must not be taken for preempted, for ever.
UNFINISHED, PREEMPTED = "unfinished", "preempted"


class Fault(Exception):
    """Something went wrong in a way we can name; printed as one message, without a traceback."""

    exit_code = 1
    said = False  # by another process of the same run


class UsageFault(Fault):
    """A wrong option or a wrong configuration."""

    exit_code = 2


class DataFault(Fault):
    """A path, a file, a grid, a label or a checkpoint that cannot be used."""

    exit_code = 3


class Preempted(BaseException):
    """The run was asked to stop and saved itself: run the same command again, with --resume once it has begun. Like
    KeyboardInterrupt no Exception: whatever goes on after a scan or a file that failed must not go on after this."""

    exit_code = 75
    said = False
