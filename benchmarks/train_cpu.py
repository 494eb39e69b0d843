"""The demo's training on the CPU: our weight-only product against LLM.int8 as bitsandbytes ships it.

    python benchmarks/train_cpu.py [--steps 20]

Both train the demo's base on the demo's data with the same packed sequences and dropout masks, by the code of
02_train; only `model.int8_matmul` differs. Results go to benchmarks/results/train_cpu.json.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from claims import claim, write_claims

from so8t_helpers import batch, training
from so8t_helpers.settings import Settings, load_settings, merge


def curve(settings: Settings, product: str, steps: int) -> pd.DataFrame:
    """Train with one of the two products and return the metrics of its steps."""
    chosen = merge(
        settings,
        {
            "run": {"name": product},
            "model": {"int8_matmul": product},
            "training": {"max_steps": steps, "dataset_dir": str(settings.run_dir / "01_dataset")},
        },
    )
    training.train(chosen)
    return pd.read_parquet(chosen.run_dir / "02_train" / "metrics.parquet")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--folder", type=Path, help="where the demo's base and data are kept between calls")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = options.folder or Path(scratch)
        folders = {"root": str(root / "runs"), "reports_root": str(root / "reports")}
        settings = load_settings("demo", {"run": {"name": "data", **folders}})
        outcomes = batch.run_stages(settings, ["01_dataset"])
        if outcomes[-1].state == "failed":
            sys.exit(f"01_dataset failed: {outcomes[-1].detail}")
        curves = {p: curve(settings, p, options.steps) for p in ("weight_only", "llm_int8")}

    ours, theirs = curves["weight_only"], curves["llm_int8"]
    # The first step builds threads and buffers.
    speeds = {p: float((c["tokens"] / c["seconds"]).iloc[1:].median()) for p, c in curves.items()}
    apart = (ours["task_loss"] - theirs["task_loss"]).abs().mean()
    jitter = ours["task_loss"].diff().abs().mean()
    figures = {
        p: {
            "tokens_per_s": round(speeds[p], 1),
            "task_loss": [round(x, 4) for x in c["task_loss"]],
            "seconds": [round(x, 3) for x in c["seconds"]],
        }
        for p, c in curves.items()
    }
    claims = [
        claim(
            "CPU training: tokens/s over LLM.int8's own path",
            round(speeds["weight_only"] / speeds["llm_int8"], 2),
            10,
            "x",
            at_least=True,
        ),
        claim(
            "CPU training: losses apart, over a curve's own change from step to step",
            round(float(apart / jitter), 4),
            1,
            "x",
        ),
    ]
    write_claims("train_cpu", figures, claims)


if __name__ == "__main__":
    main()
