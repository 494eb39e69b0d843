"""Held-out loss on the demo: gates as the seed has them, gates from the identity with their own rate, none.

    python benchmarks/training.py [--folder runs/benchmark-training] [--parallel N]

Three arms, three seeds each, on the demo's records; at the end the trained model answers every held-out
prompt, greedily. Then ten epochs on 200 records, which overfit. With three seeds only a difference well
beyond the seeds' own spread means anything. Results go to results/training.json; 20 minutes on two cores.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import run
from typing import Any

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from claims import claim, write_claims  # noqa: E402

from so8t_helpers import demo  # noqa: E402
from so8t_helpers.dataset import stage as dataset_stage  # noqa: E402
from so8t_helpers.evaluate.judge import is_correct  # noqa: E402
from so8t_helpers.run.files import demo_folder, read_jsonl, write_yaml  # noqa: E402
from so8t_helpers.run.stage import read_manifest  # noqa: E402
from so8t_helpers.settings import Settings, load_settings, merge  # noqa: E402
from so8t_helpers.so8.history import read_angles  # noqa: E402

SEEDS = (0, 1, 2)
RATE = 0.02
ARMS: dict[str, dict[str, Any]] = {
    "no gates": {"so8t": {"enabled": False}},
    "gates as the seed says": {"so8t": {"init_scale": 0.05}},
    f"gates from the identity, rate {RATE}": {"so8t": {"init_scale": 0.0, "learning_rate": RATE}},
}
# All held-out records, at six moments; answers once, at the end.
HELD_OUT = {"eval_steps": 103, "eval_samples": None, "sample_steps": 100_000, "sample_prompts": 1000}
OVERFIT_RECORDS, OVERFIT_EPOCHS = 200, 10


def settings_of(folder: Path, name: str, overrides: dict[str, Any]) -> Settings:
    """The demo's profile with its runs in `folder`."""
    places = {"name": name, "root": str(folder / "runs"), "reports_root": str(folder / "reports")}
    return merge(load_settings("demo", {"run": places, "training": HELD_OUT}), overrides)


def train(settings: Settings) -> None:
    """Carry out 02_train in a process of its own; one that is finished in the folder is not repeated."""
    if read_manifest(settings, "02_train"):
        return
    profile = settings.run_dir / "params.yaml"
    write_yaml(profile, settings.model_dump())
    run([sys.executable, "-m", "so8t_helpers.train.stage", str(profile)], cwd=ROOT, check=True)


def outcome(settings: Settings, data: Path) -> dict[str, float]:
    """What a finished training comes to, on the held-out records."""
    folder = settings.run_dir / "02_train"
    last = pd.read_parquet(folder / "heldout.parquet").iloc[-1]
    records = {row["id"]: row for row in read_jsonl(data / "eval.jsonl")}
    written = read_jsonl(folder / "samples.jsonl")
    right = [
        row["final"] is not None and is_correct(row["final"], records[row["id"]]["check"]) for row in written
    ]
    drift = 0.0
    if settings.so8t.enabled:
        drift = float(read_angles(folder / "angles.safetensors").drift[-1].mean())
    manifest = read_manifest(settings, "02_train")
    assert manifest is not None
    return {
        "held-out loss": float(last["loss"]),
        **{part: float(last[part]) for part in ("thinking", "decision", "final")},
        "in format": statistics.fmean(row["well_formed"] for row in written),
        "right label": statistics.fmean(row["decision"] == row["label"] for row in written),
        "right answer": statistics.fmean(right),
        "prompts": float(len(written)),
        "train loss": manifest["facts"]["last task loss"],
        "mean drift, degrees": drift,
    }


def overfitting(folder: Path) -> list[Settings]:
    """Ten epochs on 200 records: the last adapter kept, and the best one."""
    records = demo_folder(settings_of(folder, "few", {}), "records") / "records.jsonl"
    few = folder / "few.jsonl"
    # As bytes: some of the demo's lines are broken on purpose.
    few.write_bytes(b"".join(records.read_bytes().splitlines(keepends=True)[:OVERFIT_RECORDS]))
    found = []
    for keep in ("last", "best"):
        training = {"epochs": OVERFIT_EPOCHS, "keep": keep, "eval_steps": 10, "sample_steps": None}
        data = {"inputs": [str(few)], "default_licence": "self-made", "eval_share": 0.2}
        chosen = settings_of(folder, f"overfit-{keep}", {"dataset": data, "training": training})
        dataset_stage.build(chosen)
        found.append(chosen)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "benchmark-training")
    parser.add_argument("--parallel", type=int, default=1, help="trainings at once")
    options = parser.parse_args()
    folder = options.folder.resolve()
    shared = settings_of(folder, "data", {})
    demo.prepare(shared)
    dataset_stage.build(shared)
    data = shared.run_dir / "01_dataset"
    runs = {}
    for (number, (arm, overrides)), seed in itertools.product(enumerate(ARMS.items()), SEEDS):
        own = {"run": {"seed": seed}, "training": {"dataset_dir": str(data)}}
        runs[arm, seed] = merge(settings_of(folder, f"{number}-{seed}", own), overrides)
    few = overfitting(folder)
    with ThreadPoolExecutor(options.parallel) as pool:
        list(pool.map(train, [*runs.values(), *few]))
    rows = {arm: [outcome(runs[arm, seed], data) for seed in SEEDS] for arm in ARMS}
    table = {
        arm: {
            key: {"mean": round(statistics.mean(values), 4), "sd": round(statistics.stdev(values), 4)}
            for key in found[0]
            for values in [[row[key] for row in found]]
        }
        for arm, found in rows.items()
    }
    facts = [(read_manifest(settings, "02_train") or {})["facts"] for settings in few]
    last, best = (
        {k: v for k, v in one.items() if "held-out" in k or k in {"overfits", "best step"}} for one in facts
    )
    ratio = round(best["kept held-out loss"] / last["kept held-out loss"], 4)
    claims = [
        claim("overfitting demo: held-out loss with keep: best, over keep: last", ratio, 1.0, "times"),
        claim("overfitting demo: the report says so", float(last["overfits"]), 1, "runs", at_least=True),
    ]
    shown = {
        arm: {key: f"{value['mean']:.4g} ± {value['sd']:.2g}" for key, value in values.items()}
        for arm, values in table.items()
    }
    print(pd.DataFrame(shown).to_string())
    figures = {"arms": table, "seeds": rows, "overfitting": {"last": last, "best": best}}
    write_claims("training", figures, claims)


if __name__ == "__main__":
    main()
