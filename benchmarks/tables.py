"""docs/speed.md, made of what benchmarks/speed wrote to benchmarks/results: one table of every hot path.

    python benchmarks/tables.py

Each path says which of its rows is ours, against which others it is held, and the goal. What misses its goal gets its
note from NOTES, which a person writes once the numbers are known.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
PAGE = Path(__file__).resolve().parents[1] / "docs" / "speed.md"
OTHERS = ("MONAI", "TorchIO", "batchgeneratorsv2", "surface-distance", "torch.cdist", ".nii.gz")

HEAD = """# How fast, against the others and against the goals

Made by `benchmarks/tables.py` from `benchmarks/results/speed_*.json`, not by hand: `make bench` measures all of it
anew, the longest scripts two by two. Ours and the others do the same work on the same input in interleaved rounds, one
thread each, CPU time, medians of the rounds that the table gives, seven or more. Results agree before anything is
timed, but where the table says otherwise. Each JSON holds the spread, the share of what the machine allows, the
versions and, where more than one size was timed, the cost against size. Trust the ratios, not the seconds: the machine
was shared.

`held against` is the fastest of those that the goal names; the JSON files hold the rest. The allocator keeps what is
freed, for everybody (`benchmarks/speed/rounds.py`).
"""
ENCODER = """Encoder, masked student and whole prediction are with malloc as users have it, on which the goals were set,
and where MONAI's is much slower, except for the rows that say that the allocator keeps. Those are of crops of 64^3; of
96^3 such ratios were, on 2026-11-22 and 23: training 2.17, inference 1.92, in bf16 1.47 and 1.94 (MONAI in bf16, too),
masked student 4.36, whole prediction 1.55, in bf16 1.63 (MONAI in bf16). In bf16 at 96^3 ours is held against MONAI's
in float32, which was no slower than its bf16 when both were timed (2026-11-22: training 10.6 and 10.9 s, inference 5.1
and 5.7).
"""

# Path -> why a goal is missed, and what is known of the way there.
NOTES = {
    "views": (
        "In six runs 11.8 to 13.1 (10.9 to 14.3 with blurs in 3 of 10): a machine's neighbours do not slow all alike. "
        "What is left is compute: reads of eight voxels for each one made, half of it; powers, noise, blurs."
    ),
    "views, blurred in 3 of 10": "The default of the recipes; otherwise as above.",
    "views, from the store": ("Decompression takes a quarter to two fifths of the time; the others start from memory."),
    "masked student, 64^3, allocator keeps": (
        "Half or more of its time are products of the visible tokens, at full speed; the goal was set for window 7 at "
        "96^3. Windows of 4 make few scores, so that MONAI's takes less than half of the time that it takes with 7."
    ),
    "encoder, training": "What is left is mostly the linear layers, which are products at full speed in both.",
    "encoder, inference": "See the row above: what MONAI's takes depends on the allocator more than ours does.",
    "encoder, training, 64^3, allocator keeps": (
        "Much of what MONAI's loses with malloc as users have it are pages that the system clears for its scores. Half "
        "of our step are linear layers, the same products in both."
    ),
    "encoder, inference, 64^3, allocator keeps": "As in training.",
    "encoder, training, bf16, 64^3, allocator keeps": (
        "MONAI's few large products gain by bf16; our attention computes in float32 whatever comes in, and converts."
    ),
    "encoder, inference, bf16, 64^3, allocator keeps": "As in training.",
    "store, crops": (
        "Decompression is what takes the time. Under the same load a real chest CT gave 240 to 270 (at 40 % "
        "of its raw size)."
    ),
    "store, size": (
        "It is the size of the noise. Real scans, stored the same: a chest CT of 2.5 mm slices 40 %, a liver CT of 5 "
        "mm slices 34 %. The best guess from 13 neighbours would leave 32 % of the phantoms, 31 % of the chest, 27 % "
        "of the liver (`least_share` in store.py; white noise of 20 HU alone is 40 %), voxel after voxel, which no "
        "block reads fast. Tried on the two: deltas of bytes after the shuffle (38 and 34 %, a tenth slower), Zstd 1 "
        "(41, 35), bit shuffle (43, 39), LZ4HC (49 and 44 %, three times as fast), LZ4 (57, 51)."
    ),
    "store, .nii.gz": (
        "A .nii.gz is read from its beginning as far as the crop reaches: its time is that of the volume, ours that of "
        "the crop. The row below is of a scan as large as scanners make them."
    ),
    "metrics": (
        "One row, of a size that the goal does not ask for: where borders wander by six voxels in a small scan, ours "
        "searches as far from each surface voxel as in a large one, and MONAI's boxes are small."
    ),
    "sliding window, blending": (
        "Bound by memory. 4.5 x this MONAI (1.6.1) would be 137 ms; copying as many bytes as answers and logits have "
        "takes 144 ms, and sums that do not fit the cache are read and written anew for each window: 12 bytes a "
        "number, seven tenths of our time (`benchmarks/speed/sliding_window.py` has what was tried). On the smallest "
        "scan both are nearly level. What ours does not do is hold all logits: see the row of memory."
    ),
    "sliding window, label map": "As blending, which is most of it; MONAI's logits of the whole scan are saved.",
}


@dataclass(frozen=True)
class Line:
    """One row of the table. `ratio` is compared with `goal`: at least, or at most where `below`."""

    path: str
    work: str
    ours: str
    other: str
    ratio: float
    goal: float
    unit: str = "x"
    below: bool = False
    open: str = ""  # why the goal is neither met nor missed by this
    rounds: int | None = None  # None: what is given is no median

    @property
    def met(self) -> bool:
        return self.ratio <= self.goal if self.below else self.ratio >= self.goal

    def cells(self) -> list[str]:
        sign = "at most" if self.below else "at least"
        said, goal = _number(self.ratio, self.unit), _number(self.goal, self.unit)
        met = self.open or ("yes" if self.met else "**no**")
        rounds = "" if self.rounds is None else str(self.rounds)
        return [self.path, self.work, self.ours, self.other, rounds, said, f"{sign} {goal}", met]


def _number(value: float, unit: str) -> str:
    shown = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{shown} {unit}".strip()


def _ms(value: float) -> str:
    return f"{value / 1e3:.3g} s" if value >= 1e3 else f"{value:.3g} ms"


def _against(path: str, work: str, rows: list[dict[str, Any]], goal: float, others=OTHERS, ours: int = 0) -> Line:
    """Ours, a row by its place, against the fastest of the others."""
    best = min((row for row in rows if row["who"].startswith(others)), key=lambda row: row["ms"])
    own = rows[ours]["ms"]
    other = f"{best['who']} {_ms(best['ms'])}"
    return Line(path, work, _ms(own), other, best["ms"] / own, goal, rounds=rows[ours]["rounds"])


def _at(curve: list[dict], **where: Any) -> dict:
    return next(one for one in curve if all(one[key] == value for key, value in where.items()))


def views(of: dict) -> Iterator[Line]:
    usual, blurred = (one["rows"] for one in of["curve"] if one["side"] == 96)
    memory = next(n for n, row in enumerate(usual) if row["who"] == "ours, from memory")
    yield _against("views", "two views of 96^3, every change in each, from memory", blurred, 12, ours=memory)
    yield _against("views, blurred in 3 of 10", "the same", usual, 12, ours=memory)
    yield _against("views, from the store", "the same, decompressed first", usual, 12)


def correspondences(of: dict) -> Iterator[Line]:
    rows = _at(of["curve"], cells=24**3)["rows"]
    yield _against("correspondences", "grids of 24^3", rows, 10_000, "torch.cdist")


def selection(of: dict) -> Iterator[Line]:
    rows = _at(of["curve"], queries=64, boxes=65536)["rows"]
    yield _against("selection", "64 queries, 65,536 boxes", rows, 30, "MONAI")


def store(of: dict) -> Iterator[Line]:
    rows, disk = _at(of["curve"], side=96)["rows"], of["disk"]
    speed = rows[0]["crops_per_s_and_core"]
    mapped = next(row for row in rows if row["who"].startswith("mapped"))
    other = f"{mapped['who']} {mapped['crops_per_s_and_core']:.0f}"
    work, rounds = "96^3, files re-opened, a second and core", rows[0]["rounds"]
    yield Line("store, crops", work, f"{speed:.0f}", other, speed, 300, "", rounds=rounds)
    packed = f".nii.gz {disk['.nii.gz'] / disk['raw int16']:.0%}"
    share = 100 * disk["share_of_raw"]
    yield Line("store, size", "of the raw int16", f"{share:.0f} %", packed, share, 30, "%", below=True)
    yield _against("store, .nii.gz", "one crop of 96^3 of 10 million voxels", rows, 100, ".nii.gz")
    yield _against("store, .nii.gz, large", "the same of 105 million voxels", of["large"]["rows"], 100, ".nii.gz")


def encoder(of: dict) -> Iterator[Line]:
    for tables in (*reversed(of["curve"]), of["allocator_keeps"]):
        side, keeps = tables["side"], tables is of["allocator_keeps"]
        end = ("" if side == 96 else f", {side}^3") + (", allocator keeps" if keeps else "")
        for what, goal in (("training", 2.2), ("inference", 3.3)):
            rows = [row for row in tables[what] if not row["who"].endswith("bf16")]
            yield _against(f"encoder, {what}{end}", f"48 wide, {side}^3, window 7, float32", rows, goal)
        for what, goal in (("training", 2.8), ("inference", 4)):
            # None where this CPU computes gradients in bf16 wrong.
            for ours in (n for n, row in enumerate(tables[what]) if row["who"] == "ours, bf16"):
                yield _against(f"encoder, {what}, bf16{end}", "ours in bf16", tables[what], goal, ours=ours)
    for kept in of["memory"]:
        ours, monai = (kept["rows"][who]["peak_mib"] for who in ("ours", "MONAI"))
        said = f"{ours} MiB", f"MONAI {monai} MiB"
        yield Line("encoder, memory", f"peak, {kept['work']}", *said, ours / monai, 2 / 3, "x", below=True)


def masked_student(of: dict) -> Iterator[Line]:
    for one in (*reversed(of["curve"]), *of["allocator_keeps"]):
        end = ("" if one["side"] == 96 else f", {one['side']}^3") + ("" if one in of["curve"] else ", allocator keeps")
        yield _against(f"masked student{end}", f"60 % hidden; {one['network']}", one["rows"], 6, "MONAI")


def pretraining_step(of: dict) -> Iterator[Line]:
    for one in (*of["recipes"], *of["smaller"]):
        share = 100 * one["share_of_data"]
        work = f"{one['recipe']}, {one['crops']} crops of {one['side']}^3, width 24: data in a step, on a CPU"
        waited = "".join(f"with a loader waited {how['waited']:.1%}" for how in one["loops"] if how["loaders"])
        speed = f"{one['crops_per_cpu_s']:.3g} crops/s"
        yield Line("pretraining step", work, speed, waited, share, 5, "%", below=True, open="not measured on a GPU")


def sliding_window(of: dict) -> Iterator[Line]:
    for what, rows in (("blending", "blended_logits"), ("label map", "label_map")):
        for one in reversed(of["curve"]):
            work = f"{' x '.join(map(str, one['shape']))}, 96^3"
            yield _against(f"sliding window, {what}", work, one[rows], 4.5, "MONAI")
    first, *_, last = (
        {who: held["peak_mib"] - held["before_mib"] for who, held in one["rows"].items()} for one in of["memory"]
    )
    times = of["memory"][-1]["shape"][2] / of["memory"][0]["shape"][2]
    said = [f"{last[who]} MiB instead of {first[who]}" for who in ("ours", "MONAI")]
    work = f"beyond the scan, up to the label map, of one {times:g} times as long"
    yield Line(
        "sliding window, memory", work, said[0], f"MONAI {said[1]}", last["ours"] / first["ours"], 1.5, below=True
    )
    rows = of["swin_unetr"]["rows"]
    exact = [row for row in rows if not row["who"].endswith("bf16")]
    rough = next(n for n, row in enumerate(rows) if row["who"] == "ours, bf16")
    path, whose = "sliding window, end to end", "MONAI's network"
    yield _against(path, "Swin-UNETR, float32, small", exact, 1.4, whose)
    yield _against(f"{path}, bf16", "ours in bf16", rows, 2.8, whose, ours=rough)


def metrics(of: dict) -> Iterator[Line]:
    for one in reversed(of["tables"]):
        work = f"14 structures, {one['prediction']}, {' x '.join(map(str, one['shape']))}"
        for who, goal in (("MONAI", 30), ("surface-distance", 15)):
            yield _against("metrics", work, one["rows"], goal, who)


def body_frame(of: dict) -> Iterator[Line]:
    for row in of["curve"][-1]["rows"][:1]:
        other = next((one for one in of["curve"][-1]["rows"] if one["who"].startswith("SimpleITK")), None)
        said = "" if other is None else f"{other['who']} {_ms(other['ms'])} (its answer is not compared)"
        seconds = row["ms"] / 1e3
        work = f"one scan of {of['curve'][-1]['scans']}"
        yield Line("body frame", work, _ms(row["ms"]), said, seconds, 2, "s", True, rounds=row["rounds"])


def cases(of: dict) -> Iterator[Line]:
    few, many = (_at(of["curve"], cases=count) for count in (1_000, 100_000))
    rounds = many["rows"][0]["rounds"]
    work = "100,000 cases: opened, split, written down; each, against one of 1,000"
    ours, ratio = many["us_a_case"], many["us_a_case"] / few["us_a_case"]
    said, other = f"{_ms(ours * many['cases'] / 1e3)}, {ours:.0f} us each", f"of 1,000 {few['us_a_case']:.0f} us each"
    yield Line("cases, before the first step", work, said, other, ratio, 1.5, below=True, rounds=rounds)
    small, large = (next(row for row in one["rows"] if row["who"] == "a batch") for one in (few, many))
    work, ratio = "a batch of 2 anchors from 100,000 cases, against one from 1,000", large["ms"] / small["ms"]
    other = f"from 1,000 {_ms(small['ms'])}"
    yield Line("cases, a batch", work, _ms(large["ms"]), other, ratio, 1.5, below=True, rounds=large["rounds"])


PATHS: tuple[Callable[[dict], Iterator[Line]], ...] = (
    views,
    correspondences,
    selection,
    store,
    encoder,
    masked_student,
    pretraining_step,
    sliding_window,
    metrics,
    body_frame,
    cases,
)


def on_gpus(results: Path) -> list[str]:
    """A table for each GPU that gpu.py has run on."""
    files = sorted(results.glob("gpu_*.json"))
    text = ["## On a GPU", ""] if files else ["Not measured: a GPU (`gpu.py` is there for it).", ""]
    for file in files:
        of = json.loads(file.read_text(encoding="utf-8"))
        text += [
            f"{of['device']}, {of['precision']}, products of {of['products_tflop_per_s']:g} TFLOP/s; crops of "
            f"{of['size']['side']}^3, width {of['size']['width']}, for the Swin-UNETRs. Goal: {of['goal']}.",
            "",
            "| what | crops | ms | crops/s | GiB | share of products | waited for loaders |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        for one in (*of["swin_unetr"], *of["recipes"]):
            waited = f"{one['loop']['waited']:.1%}" if "loop" in one else ""
            text.append(
                f"| {one['who']} | {one['crops']} | {one['ms']:g} | {one['crops_per_s']:g} | {one['peak_gib']} | "
                f"{one['share_of_products']:.1%} | {waited} |"
            )
        text.append("")
    return text


def page(results: Path = RESULTS) -> str:
    """The text of docs/speed.md. A path that was not measured is named."""
    head = ("path", "the work", "ours", "held against", "rounds", "ratio, or measure", "goal", "met")
    table, missed, absent, machines = [head, ("---",) * len(head)], [], [], []
    for path in PATHS:
        file = results / f"speed_{path.__name__}.json"
        if not file.exists():
            absent.append(path.__name__)
            continue
        of = json.loads(file.read_text(encoding="utf-8"))
        lines = list(path(of))
        table += [line.cells() for line in lines]
        missed += [line.path for line in lines if not (line.met or line.open)]
        m = of["machine"]
        machines.append(
            f"| {path.__name__} | {m['date']} | {m['cpu']}, {m['cores']} cores, load {m['load'][0]:g} | "
            f"{m['copy_gb_per_s']:g} | {m['gemm_fp32_gflop_per_s']:g} |"
        )
    measured = [] if "encoder" in absent else [ENCODER]
    text = [HEAD, *measured, *("| " + " | ".join(row) + " |" for row in table), ""]
    if missed:
        notes = [f"- {path}: {NOTES.get(path, 'no reason is known yet.')}" for path in dict.fromkeys(missed)]
        text += ["## What was not met", "", *notes, ""]
    text += on_gpus(results)
    if absent:
        text += [f"Not measured yet: {', '.join(absent)}.", ""]
    text += [
        "## Where",
        "",
        "| path | day | machine | copy GB/s | float32 GFLOP/s |",
        "| --- | --- | --- | --- | --- |",
    ]
    return "\n".join([*text, *machines]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
