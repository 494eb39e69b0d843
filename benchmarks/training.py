"""Held-out loss on the demo: gates as the seed has them, gates from the identity with their own rate.

    python benchmarks/training.py [--folder runs/benchmark-training]

Three arms, three seeds each, on the demo's records: trained, baked, asked (by transformers, greedy). Then ten
epochs on 200 records, which overfit. Everything is measured on held-out records that training never saw; with
three seeds only a difference well beyond the seeds' own spread says anything. Results go to
benchmarks/results/training.json; half an hour on two cores.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from claims import claim, write_claims  # noqa: E402

from so8t_helpers import demo  # noqa: E402
from so8t_helpers.bake import stage as bake_stage  # noqa: E402
from so8t_helpers.dataset import stage as dataset_stage  # noqa: E402
from so8t_helpers.evaluate import stage as evaluate_stage  # noqa: E402
from so8t_helpers.run.files import demo_folder  # noqa: E402
from so8t_helpers.settings import Settings, load_settings, merge  # noqa: E402
from so8t_helpers.so8.history import read_angles  # noqa: E402
from so8t_helpers.train import stage as train_stage  # noqa: E402

SEEDS = (0, 1, 2)
ARMS: dict[str, dict[str, Any]] = {
    "no gates": {"so8t": {"enabled": False}},
    "gates as the seed says": {"so8t": {"init_scale": 0.05}},
    "gates from the identity, rate 0.02": {"so8t": {"init_scale": 0.0, "learning_rate": 0.02}},
}
HELD_OUT = {"eval_steps": 103, "eval_samples": None}
OVERFIT_RECORDS, OVERFIT_EPOCHS = 200, 10


def settings_of(folder: Path, name: str, overrides: dict[str, Any]) -> Settings:
    """The demo's profile with its runs in `folder`."""
    places = {"name": name, "root": str(folder / "runs"), "reports_root": str(folder / "reports")}
    return merge(load_settings("demo", {"run": places, "training": HELD_OUT}), overrides)


def one(folder: Path, arm: str, seed: int, data: Path) -> dict[str, float]:
    """Train, bake and ask one arm with one seed."""
    name = f"{list(ARMS).index(arm)}-{seed}"
    training = {"dataset_dir": str(data)}
    asked = {"models": ["baked"], "prompts": None}
    chosen = settings_of(folder, name, {"run": {"seed": seed}, "training": training, "eval": asked})
    chosen = merge(chosen, ARMS[arm])
    facts = train_stage.train(chosen)
    bake_stage.bake(chosen)
    scores = evaluate_stage.evaluate(merge(chosen, {"dataset": {"inputs": ["demo"]}}))["models"]["baked"]
    heldout = pd.read_parquet(chosen.run_dir / "02_train" / "heldout.parquet")
    drift = 0.0
    if chosen.so8t.enabled:
        drift = float(read_angles(chosen.run_dir / "02_train" / "angles.safetensors").drift[-1].mean())
    last = heldout.iloc[-1]
    return {
        "held-out loss": float(last["loss"]),
        "best held-out loss": float(heldout["loss"].min()),
        **{part: float(last[part]) for part in ("thinking", "decision", "final", "decision_right")},
        "train loss": facts["last task loss"],
        "format": scores["format"]["mean"],
        "answer": scores["answer"]["mean"],
        "drift": drift,
    }


def overfit(folder: Path) -> dict[str, Any]:
    """Ten epochs on 200 records, the last adapter kept and the best one."""
    records = demo_folder(settings_of(folder, "few", {}), "records") / "records.jsonl"
    few = folder / "few.jsonl"
    with records.open(encoding="utf-8") as lines:
        few.write_text(
            "".join(line for line, _ in zip(lines, range(OVERFIT_RECORDS), strict=False)), encoding="utf-8"
        )
    found = {}
    for keep in ("last", "best"):
        training = {"epochs": OVERFIT_EPOCHS, "keep": keep, "eval_steps": 10}
        data = {"inputs": [str(few)], "default_licence": "self-made", "eval_share": 0.2}
        chosen = settings_of(folder, f"overfit-{keep}", {"dataset": data, "training": training})
        dataset_stage.build(chosen)
        facts = train_stage.train(chosen)
        found[keep] = {k: v for k, v in facts.items() if "held-out" in k or "overfit" in k}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "benchmark-training")
    folder = parser.parse_args().folder.resolve()
    shared = settings_of(folder, "data", {})
    demo.prepare(shared)
    dataset_stage.build(shared)
    rows = {arm: [one(folder, arm, seed, shared.run_dir / "01_dataset") for seed in SEEDS] for arm in ARMS}
    table = {
        arm: {
            key: {"mean": statistics.mean(values), "sd": statistics.stdev(values)}
            for key in found[0]
            for values in [[row[key] for row in found]]
        }
        for arm, found in rows.items()
    }
    few = overfit(folder)
    claims = [
        claim(
            "overfit demo: held-out loss of keep: best over keep: last",
            round(few["best"]["kept held-out loss"] / few["last"]["kept held-out loss"], 4),
            1.0,
            "times",
        ),
        claim("overfit demo: said so in the report", float(bool(few["last"]["overfits"])), 1, "runs", True),
    ]
    print(
        pd.DataFrame(
            {arm: {k: f"{v['mean']:.4g} ± {v['sd']:.2g}" for k, v in t.items()} for arm, t in table.items()}
        )
    )
    write_claims("training", {"arms": table, "seeds": rows, "overfit": few}, claims)


if __name__ == "__main__":
    main()
