"""The loop: one way to train every task, pretext or downstream, that an interruption only pauses.

A task gives named losses, a stream gives batches that are pure functions of (seed, index); the loop owns the rest:
precision, accumulation, the learning rate, updates that are not finite, signals, saves, the journal. On the CPU a run
that was killed and resumed ends with the same bits as one that was not. Processes that have `joined` (ranks.py) train
together: each learns from its part of a batch, all hold the same state, and the first alone writes and speaks.
"""

import math
import sys
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from functools import wraps
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from spade3d.claim import held
from spade3d.faults import PREEMPTED, DataFault, Fault
from spade3d.training import ranks
from spade3d.training.bad_updates import came_apart, not_finite, unmade
from spade3d.training.checkpoint import Found
from spade3d.training.copies import Moved
from spade3d.training.health import collapse, signs_of_life
from spade3d.training.interruption import Interruption
from spade3d.training.journal import Journal, Silence
from spade3d.training.precision import autocast_for
from spade3d.training.reproducibility import deterministic, rng_state, seed_everything, set_rng_state
from spade3d.training.saves import Best, Saves
from spade3d.training.schedules import warmup_cosine

T = TypeVar("T")
PROOFS = 10  # batches more, at most, that may show that a run whose last updates were left out has good weights
SKIPPED = 9  # updates in a row that are not finite and left out, unless a run says otherwise
SETTLED = 0.1  # share of the run before which a flat embedding is no collapse yet


@runtime_checkable
class Batch(Protocol):
    """What a task learns from at once; its length is the number of crops in it, `scans` says of which they are."""

    scans: Sequence[str]

    def to(self, device: torch.device) -> "Batch": ...

    def __len__(self) -> int: ...


@runtime_checkable
class Batches(Protocol):
    """All batches of a run; the batch at an index is a pure function of (seed, index)."""

    def stream(self, start: int, stop: int) -> Iterator[Batch]:
        """The batches start, start + 1, ..., stop - 1."""
        ...


class Task(nn.Module, ABC):
    """Turns a batch into losses. Its `state_dict` is all that continuing needs: teachers and memories belong in it.

    `embedding` (n, d) and `paired`, the positive of each row, are what the last `losses` leaves, detached, for the
    signs of life; a task without an embedding leaves them None. `notes` are further numbers of the last batch for the
    log: of tensors the mean over ranks is logged, a plain number is that of the first rank.
    """

    embedding: Tensor | None = None
    paired: Tensor | None = None
    notes: Mapping[str, float | Tensor] = {}

    @abstractmethod
    def losses(self, batch: Any, progress: float) -> dict[str, Tensor]:
        """Named scalars, already weighted: their sum is minimised. What teachers and memories are to learn from the
        batch waits for `after_step`, because an update that is not finite is not made."""

    def after_step(self, progress: float) -> None:
        """After an update: teachers follow, memories remember."""

    def after_skip(self) -> None:
        """Instead of `after_step`, where losses or gradients were not finite: what waited is thrown away."""

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """For AdamW: trainable parameters; vectors, biases, tables and tokens without decay. A group may carry
        "lr_scale", its factor of the learning rate."""
        trained = [(name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad]
        free = {name for name, p in trained if p.ndim < 2 or name.endswith(("bias", "table", "token"))}
        groups = [
            {"params": [p for name, p in trained if name not in free], "weight_decay": weight_decay},
            {"params": [p for name, p in trained if name in free], "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def forward(self, batch: Any, progress: float) -> dict[str, Tensor]:
        return self.losses(batch, progress)


@dataclass(frozen=True)
class Optimiser:
    """AdamW and its schedule (`schedules.warmup_cosine`); `accumulate` batches make one step."""

    lr: float
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    warmup: float = 0.05  # share of the run
    floor: float = 0.01  # share of lr, at the end
    clip_norm: float | None = 1.0
    accumulate: int = 1


@dataclass(frozen=True)
class Outcome:
    """How a run ended: steps done, the losses of the last one, the best validation where one was asked for."""

    step: int
    losses: dict[str, float]
    best: Best | None


@dataclass
class _Position:
    """Where a run stands, besides what its task and its optimiser hold."""

    step: int = 0
    validated: int = 0  # the last step that was
    skipped: int = 0  # updates in a row, up to this step
    losses: dict[str, float] = field(default_factory=dict)


def _alone_in_its_folder(train: Callable[..., T]) -> Callable[..., T]:
    """Two processes that write one run would mix its log and its saves: the second is refused, or waits (claim.py).
    `train` gets `still_ours`, which ends a run that another process took over, as it may while this one slept."""

    @wraps(train)
    def guarded(*args, out: Path, **how) -> T:
        with ExitStack() as stack:
            mine: list[Callable[[], None]] = []  # of the first rank, which alone writes
            ranks.once(lambda: mine.append(stack.enter_context(held(out, _say))))
            return train(*args, out=out, still_ours=mine[0] if mine else _silent, **how)

    return guarded


def _silent() -> None: ...


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@_alone_in_its_folder
def train(
    task: Task,
    batches: Batches,
    *,
    steps: int,
    out: Path,
    optimiser: Optimiser,
    device: torch.device,
    save_every: int,
    precision: str = "auto",
    seed: int = 0,
    resume: bool = False,
    validate: Callable[[Task, int], Mapping[str, float]] | None = None,
    validate_every: int | None = None,
    better: str | None = None,
    label: str = "training",
    signs_every: int = 25,
    config_hash: str = "",
    skip_bad_batches: int = SKIPPED,
    still_ours: Callable[[], None] = _silent,
) -> Outcome:
    """Train for `steps` updates. Step s = 1, 2, ... learns from batches (s - 1) k to s k - 1, k = `accumulate`, at
    progress s / steps.

    Written under `out`: log.jsonl, tensorboard/ and checkpoints/, before the first step, every `save_every` steps,
    after the last, and when interrupted. A save that falls among updates that are not finite waits for one that is;
    where the run ends or is interrupted among them it is made, and those from before them stay. `validate(task, step)`
    runs every `validate_every` steps and after the last, in evaluation mode, without gradients, in its own precision,
    and leaves the generators of chance as they were; the weights with the highest value of its entry `better` are kept
    in checkpoints/best.pt. `config_hash` is the fingerprint of the configuration: under another one the run does not
    resume.

    Raises, once the run is saved, Preempted after SIGTERM or SIGUSR1 and KeyboardInterrupt after SIGINT (a second
    signal ends the process at once); UsageFault when `out` already holds a run; DataFault when what should be resumed
    is not whole or of another configuration, or another process of this machine runs there; Fault when more than
    `skip_bad_batches` updates in a row are not finite, or the last ones are not and further batches give no finite loss
    either, memory or disk is full, or another process took the run over.
    """
    saves = Saves(out, {"config": config_hash, "steps": steps, "accumulate": optimiser.accumulate, "seed": seed})
    found = saves.find() if resume else ranks.once(saves.begin)
    ranks.barrier()  # nobody saves while another still looks for what to continue from
    engine = _Engine(task, optimiser, device, precision)
    at = engine.restore(found) if found else _Position()
    if ranks.first():
        (out / PREEMPTED).unlink(missing_ok=True)

    with (
        Interruption() as interruption,
        deterministic(device),
        Journal(out, label=label, steps=steps, done=at.step) if ranks.first() else Silence() as journal,
    ):

        def save() -> None:
            still_ours()
            journal.sync()
            saves.put(at.step, {"at": asdict(at), **engine.state()}, streak=at.skipped)

        def look() -> bool:
            """Validate where it is due, and keep the weights when they are the best so far."""
            periodic = validate_every is not None and at.step % validate_every == 0
            if validate is None or at.validated == at.step or not (periodic or at.step == steps):
                return False
            values = engine.look(validate, at.step)
            at.validated = at.step
            still_ours()
            journal.validation(at.step, values)
            if better is not None:
                if better not in values:
                    raise Fault(f"validation gives {', '.join(values)} but not {better!r}, which decides what is best")
                saves.offer(better, values[better], at.step, task.state_dict())
            return True

        for message in found.damaged if found else ():
            journal.say(f"warning: {message}: left aside")
        if resume:
            nothing = "" if found else ": nothing was saved yet"
            journal.say(f"resuming {label} after step {at.step} of {steps}{nothing}")
        # Chance begins here, not earlier: whatever was set up so far may have drawn from the global generators.
        if found:
            set_rng_state(found.state["rng"], device)
        else:
            seed_everything(seed)
        # From here on there is always something to continue from, and nothing that an interruption left out.
        if found is None or look():
            save()
        alarmed = unsaved = False
        stream = Moved(batches.stream(at.step * optimiser.accumulate, steps * optimiser.accumulate), device)
        for step in range(at.step + 1, steps + 1):
            row = {"step": step, **engine.step(stream, step / steps)}
            at.step, at.losses = step, row["losses"]
            at.skipped = at.skipped + 1 if "skipped" in row else 0
            due = step % signs_every == 0 or step == steps
            if not at.skipped and due and (signs := _signs(task, step / steps)):
                row["signs"] = signs
                if "alarm" in signs and not alarmed:
                    alarmed = True
                    journal.say(f"warning: step {step}: {signs['alarm']}")
            still_ours()
            journal.step(row)
            if at.skipped > skip_bad_batches:
                raise Fault(not_finite(at.losses, at.step, at.skipped, saves, row["scans"]))
            if number := ranks.largest(interruption.received or 0):
                save()
                ranks.barrier()  # a launcher ends all processes once one has left, the first one amid its save
                interruption.stop(number, step, steps, out)
            look()
            unsaved |= step % save_every == 0
            # What gives nothing finite must not take the place of what did: few saves are kept.
            if step == steps or (unsaved and not at.skipped):
                save()
                unsaved = False
        if at.skipped:
            further = Moved(batches.stream(steps * optimiser.accumulate, steps * optimiser.accumulate + PROOFS), device)
            if not engine.gives_finite(further, PROOFS):
                raise Fault(came_apart(at.losses, at.step, at.skipped, saves, PROOFS))
            journal.say(f"warning: {unmade(at.losses, at.step, at.skipped)}, the last: the run ends without them")
        if number := ranks.largest(interruption.received or 0):  # while the last step was validated and saved
            ranks.barrier()
            interruption.stop(number, steps, steps, out)
    return Outcome(at.step, at.losses, saves.best)


class _Engine:
    """The task on its device with its optimiser: makes one update, validates, and says all that it holds."""

    def __init__(self, task: Task, optimiser: Optimiser, device: torch.device, precision: str):
        self.task, self.settings, self.device = task, optimiser, device
        self.autocast = autocast_for(precision, device)
        task.to(device)
        task.train()
        self.model: nn.Module = task  # what is called with a batch
        if ranks.world() > 1:  # buffers, such as memories, are equal by themselves; some terms use some parameters only
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")  # its heir is too new
                self.model = DistributedDataParallel(task, broadcast_buffers=False, find_unused_parameters=True)
        groups = task.parameter_groups(optimiser.weight_decay)
        self.adamw = torch.optim.AdamW(groups, lr=optimiser.lr, betas=optimiser.betas, fused=True)
        self.trained = [parameter for group in groups for parameter in group["params"]]

    def step(self, stream: Moved, progress: float) -> dict[str, Any]:
        """Learn from the next `accumulate` batches; the row for the log, with "skipped" where nothing was changed."""
        settings, begun = self.settings, time.perf_counter()
        rate = settings.lr * warmup_cosine(progress, warmup=settings.warmup, floor=settings.floor)
        for group in self.adamw.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        try:
            terms, notes, crops, waited, scans = self._gradients(stream, progress)
        except torch.OutOfMemoryError as error:
            raise Fault(_out_of_memory(self.device)) from error
        norm = nn.utils.clip_grad_norm_(self.trained, settings.clip_norm or math.inf)
        # The one wait for the device in a step: whether to skip must be known before the weights move.
        waiting = {name: torch.stack(of).float().mean() for name, of in notes.items() if torch.is_tensor(of[0])}
        averaged = ranks.averaged(torch.stack([*terms.values(), *waiting.values()]))
        *found, grad_norm = torch.cat([averaged, norm.float()[None]]).tolist()
        values, said = found[: len(terms)], found[len(terms) :]
        total = sum(values)
        finite = math.isfinite(total) and math.isfinite(grad_norm)
        if finite:
            self.adamw.step()
            self.task.after_step(progress)
        else:
            self.task.after_skip()
        self.adamw.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - begun
        plain = {name: fmean(of) for name, of in notes.items() if name not in waiting}
        noted = {"notes": plain | dict(zip(waiting, said, strict=True))} if notes else {}
        return (
            noted
            | {
                "losses": dict(zip(terms, values, strict=True)),
                "total": total,
                "lr": rate,
                "grad_norm": grad_norm,
                "seconds": seconds,
                "data_seconds": waited,
                "crops_per_second": crops / seconds,
            }
            | ({} if finite else {"skipped": True, "scans": ranks.names_of_all(scans)})
        )

    def _gradients(
        self, stream: Moved, progress: float
    ) -> tuple[dict[str, Tensor], dict[str, list[float | Tensor]], int, float, list[str]]:
        """Backward through the mean over `accumulate` batches: its terms, what the task noted of each, the crops, the
        seconds waited for them, and of which scans they are."""
        k = self.settings.accumulate
        terms: dict[str, Tensor] = {}
        notes: dict[str, list[float | Tensor]] = {}
        crops, waited, scans = 0, 0.0, set()
        for turn in range(k):
            begun = time.perf_counter()
            batch = next(stream)
            waited += time.perf_counter() - begun
            crops += len(batch) * ranks.world()
            scans.update(batch.scans)
            with self.exchange(last=turn == k - 1):
                with self.autocast():
                    losses = self.model(batch, progress)
                (sum(losses.values()) / k).backward()
            begun = time.perf_counter()
            stream.ahead()
            waited += time.perf_counter() - begun
            for name, loss in losses.items():
                terms[name] = terms.get(name, 0.0) + loss.detach().float() / k
            for name, value in self.task.notes.items():
                notes.setdefault(name, []).append(value)
        return terms, notes, crops, waited, sorted(scans)

    def gives_finite(self, stream: Moved, count: int) -> bool:
        """Whether the weights give a finite loss to one of `count` batches."""
        with torch.no_grad():
            for _ in range(count):
                batch = next(stream)
                with self.autocast():
                    losses = self.task(batch, 1.0)
                if math.isfinite(float(ranks.averaged(sum(losses.values()).detach().float()[None]))):
                    return True
        return False

    def exchange(self, *, last: bool) -> AbstractContextManager[None]:
        """Gradients of ranks meet in the last of the batches that make a step."""
        joined = isinstance(self.model, DistributedDataParallel)
        return self.model.no_sync() if joined and not last else nullcontext()

    def look(self, validate: Callable[[Task, int], Mapping[str, float]], step: int) -> dict[str, float]:
        """What `validate` finds, with the task and the generators of chance left as they were."""
        chance = rng_state(self.device)
        self.task.eval()
        with torch.no_grad():
            values = {name: float(value) for name, value in validate(self.task, step).items()}
        self.task.train()
        set_rng_state(chance, self.device)
        return values

    def state(self) -> dict[str, Any]:
        """All that the next step depends on, besides its batches."""
        return {
            "task": self.task.state_dict(),
            "optimizer": self.adamw.state_dict(),
            "rng": rng_state(self.device),
        }

    def restore(self, found: Found) -> _Position:
        """Put task and optimiser back to where a checkpoint left them."""
        state = found.state
        try:
            self.task.load_state_dict(state["task"])
            self.adamw.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise DataFault(f"{found.path}: does not fit the task ({reason}); resume with what wrote it") from error
        return _Position(**state["at"])


def _signs(task: Task, progress: float) -> dict[str, Any] | None:
    """Signs of life of the embedding that the task shows, of all ranks, with an "alarm" where it has collapsed; one row
    has none."""
    if task.embedding is None:
        return None
    embedding = ranks.gathered(task.embedding)
    paired = None if task.paired is None else ranks.gathered(task.paired)
    if len(embedding) < 2:
        return None
    signs: dict[str, Any] = signs_of_life(embedding, paired)
    if progress > SETTLED and (alarm := collapse(signs)):
        signs["alarm"] = alarm
    return signs


def _out_of_memory(device: torch.device) -> str:
    peak = f", peak {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB" if device.type == "cuda" else ""
    return (
        f"{device}: memory ran out{peak}; make the crop or the batch smaller (and accumulate over more batches, to "
        "learn from as many crops in a step)"
    )
