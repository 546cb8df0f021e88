"""The saves of a run: what it continues from, which run that is, and its best weights so far."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from spade3d.faults import DataFault, UsageFault
from spade3d.training import checkpoint, ranks
from spade3d.training.journal import read_log


@dataclass(frozen=True)
class Best:
    """The best validation so far; its weights are in `checkpoints/best.pt` under "task"."""

    name: str
    value: float
    step: int


class Saves:
    """The checkpoints under a run's folder. `identity` says which run they belong to: plain values by name (fingerprint
    of the configuration, steps, ...), and a checkpoint of other values is refused. Of several ranks, which all hold the
    same state, the first writes it."""

    def __init__(self, out: Path, identity: Mapping[str, Any]):
        self.out, self.folder, self.identity = out, out / "checkpoints", dict(identity)
        self.best: Best | None = None

    def begin(self) -> None:
        """A new run: UsageFault where there is one already, which is never written over."""
        if self._begun():
            raise UsageFault(f"{self.out}: already holds a run; continue it with --resume, or give another --out")
        self.folder.mkdir(parents=True, exist_ok=True)

    def find(self) -> checkpoint.Found | None:
        """What to continue from, with `best` as it was; None when the run was interrupted before its first save.

        DataFault when no save is whole any more, or when it is of another configuration.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._begun():
            return None
        found = checkpoint.newest(self.folder)
        self._check(found.path, found.state)
        # best.pt is its own record: its weights and its value cannot disagree, wherever the run was interrupted.
        if (path := self.folder / "best.pt").exists():
            state = checkpoint.load(path)
            self._check(path, state)
            self.best = Best(**state["best"])
        return found

    def put(self, step: int, state: Mapping[str, Any], *, streak: int) -> None:
        """Save what the run continues from, after a streak of so many updates that were not made."""
        if ranks.first():
            checkpoint.put(self.folder, step, {"identity": self.identity, **state}, streak=streak)

    def good(self, step: int) -> tuple[Path | None, Path | None]:
        """Of a run whose last update, that of `step`, came from a finite loss, and whose later ones were not made: the
        newest save whose weights gave a finite loss, and the one of that update itself, of which nothing speaks."""
        since = checkpoint.steps_in(self.folder, until=step)
        proven = checkpoint.steps_in(self.folder, until=step - 1)
        return (proven[-1] if proven else None), (since[-1] if len(since) > len(proven) else None)

    def offer(self, name: str, value: float, step: int, weights: Mapping[str, Any]) -> None:
        """Save the weights if they are the best so far; a value that is not a number never is."""
        if value > (self.best.value if self.best else -math.inf):
            best = Best(name, value, step)
            content = {"identity": self.identity, "best": asdict(best), "task": weights}
            if ranks.first():
                checkpoint.save(self.folder / "best.pt", content)
            self.best = best

    def _begun(self) -> bool:
        """The first save precedes the first row of the log: with neither, nothing has been learnt yet."""
        log = self.out / "log.jsonl"
        return bool(checkpoint.steps_in(self.folder)) or (log.exists() and bool(read_log(log)))

    def _check(self, path: Path, state: Mapping[str, Any]) -> None:
        theirs = state.get("identity", {})
        differ = [f"{k} {theirs.get(k)!r}, now {v!r}" for k, v in self.identity.items() if theirs.get(k) != v]
        if differ:
            raise DataFault(
                f"{path}: made under another configuration ({'; '.join(differ)}); resume with the run's own "
                "config.yaml, or start anew with another --out"
            )
