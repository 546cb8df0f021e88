"""Pretrained against scratch, seed by seed, with the commands a user has; one table and one JSON in benchmarks/results.

    python benchmarks/science/twins.py DATA --out WORK --labels 8 --seeds 0 1 2 --steps 400 400 --name hippocampus_mr_8

Each seed has its own pretraining, its own draw of labelled subjects and its own decoder; the twin from scratch shares
all but the encoder. What is finished in WORK is not run again, so an interrupted benchmark goes on where it stopped.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[1] / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--labels", default="8")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--name", required=True)
    parser.add_argument("--steps", type=int, nargs=2, metavar=("PRETRAIN", "FINETUNE"), help="else the commands choose")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    store, seconds = asked.out / "store", {}
    long_pretraining, long_tuning = (["--steps", steps] for steps in asked.steps) if asked.steps else ([], [])
    if not (store / "index.json").exists():
        command("spade-prepare", asked.data, "--out", store)
    runs = []
    for seed in asked.seeds:
        pretrained, tuned, scratch = (asked.out / f"{what}-{seed}" for what in ("pretrained", "tuned", "scratch"))
        if not (pretrained / "report.html").exists():
            seconds[pretrained.name] = command(
                "spade-pretrain", store, "--out", pretrained, "--seed", seed, *long_pretraining
            )
        encoder = ["--init", pretrained / "encoder.safetensors"]
        for run, init in ((tuned, encoder), (scratch, [])):
            if not (run / "summary.json").exists():
                seconds[run.name] = command(
                    "dagman-finetune",
                    store,
                    "--out",
                    run,
                    "--labels",
                    asked.labels,
                    "--seed",
                    seed,
                    *long_tuning,
                    *init,
                )
            runs.append(run)
    command("dagman-compare", *runs, "--out", asked.out / "comparison")
    found = json.loads((asked.out / "comparison" / "comparison.json").read_text())
    for of in found["runs"].values():
        of.update({seed: Path(run).name for seed, run in of.items()})
    summaries = {run.name: json.loads((run / "summary.json").read_text()) for run in runs}
    result = {
        "name": asked.name,
        "machine": {"platform": platform.platform(), "python": platform.python_version()},
        "steps": asked.steps,
        "mean_dice": {name: summary["mean_dice"] for name, summary in summaries.items()},
        "protocol": next(iter(summaries.values()))["protocol"],
        "seconds": seconds,
        **found,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{asked.name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def command(name: str, *words: object) -> float:
    """Run one console script of this environment; its seconds."""
    begun = time.monotonic()
    subprocess.run([Path(sys.executable).with_name(name), *map(str, words)], check=True)
    return round(time.monotonic() - begun, 1)


if __name__ == "__main__":
    main()
