"""SmolLM2-135M learns GSM8K on one card: LoRA's rate, gates and PET, and the finished model on the test part.

    python benchmarks/real_model_gpu.py --root FOLDER [--seconds 540] [--rehearse]

`FOLDER/runs/smollm2` and `FOLDER/runs/gsm8k-test` hold finished 01_dataset stages of GSM8K's training part (a
share of it held out, on which the rates are compared) and of its test part; `params/smollm2.yaml` says how.
Trains one arm after another, then the run itself at the best rate through its notebook, bakes it, and lets
base and baked model answer the whole test part, greedily. What is done is kept in FOLDER/real_model_gpu.json
and not repeated; what there is no time for is left out. Results go to results/real_model_gpu.json.
`--rehearse` takes two short steps an arm and eight questions, to see that all parts run; no results then.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from claims import Work, write_claims  # noqa: E402

from so8t_helpers.bake import stage as bake_stage  # noqa: E402
from so8t_helpers.engines.transformers_engine import open_transformers  # noqa: E402
from so8t_helpers.evaluate.judge import score  # noqa: E402
from so8t_helpers.phi3.source import base_folder  # noqa: E402
from so8t_helpers.run.files import read_jsonl  # noqa: E402
from so8t_helpers.run.stage import read_manifest  # noqa: E402
from so8t_helpers.settings import Settings, load_settings  # noqa: E402
from so8t_helpers.so8.history import read_angles  # noqa: E402
from so8t_helpers.train import stage as train_stage  # noqa: E402

RATES = (2e-3, 4e-3, 8e-3, 1e-3)
NO_GATES, NO_PET = {"so8t": {"enabled": False}}, {"pet": {"enabled": False}}
SEED_PET = {"lambda_exploration": 0.01, "lambda_transition": 0.05, "lambda_stabilization": 0.1}
# What is compared at the best rate; the run itself has gates and PET as its profile says.
ARMS: dict[str, dict[str, Any]] = {
    "LoRA alone": NO_GATES | NO_PET,
    "LoRA and gates": NO_PET,
    "LoRA and PET": NO_GATES,
    "PET at the seed's lambda": {"pet": SEED_PET},
    "float16": {"training": {"precision": "fp16"}},
}
BATCH, MOST_TOKENS = 256, 320
REHEARSAL = {"max_steps": 2, "gradient_accumulation": 1, "sequence_length": 512, "eval_samples": 4}
REHEARSE = "--rehearse" in sys.argv


def settings_of(root: Path, name: str, rate: float, overrides: dict[str, Any]) -> Settings:
    """The profile with its runs in `root`, at one rate of LoRA."""
    training = {"dataset_dir": str(root / "runs" / "smollm2" / "01_dataset"), "learning_rate": rate}
    training |= overrides.get("training", {}) | (REHEARSAL if REHEARSE else {})
    places = {"name": name, "root": str(root / "runs"), "reports_root": str(root / "reports")}
    return load_settings("smollm2", overrides | {"run": places, "training": training, "model": model(root)})


def model(root: Path) -> dict[str, str]:
    """The base: the package's file, beside the runs."""
    return {"base": f"llama:{root / 'SmolLM2-135M-Instruct.Q4_1.gguf'}"}


def train(settings: Settings) -> dict[str, Any]:
    """Train in this process, and return what it came to on the held-out records."""
    train_stage.train(settings)
    return outcome(settings)


def outcome(settings: Settings) -> dict[str, Any]:
    """The figures of a finished training."""
    folder, manifest = settings.run_dir / "02_train", read_manifest(settings, "02_train")
    assert manifest is not None
    held, steps = pd.read_parquet(folder / "heldout.parquet"), pd.read_parquet(folder / "metrics.parquet")
    last = held.iloc[-1]
    found = {f"held-out {part}": float(last[part]) for part in ("loss", "thinking", "final")}
    found |= {"first held-out loss": float(held.iloc[0]["loss"]), "seconds": manifest["seconds"]}
    found |= {"tokens/s": float(steps["tokens"].sum() / steps["seconds"].sum()), "steps": len(steps)}
    found |= {"PET loss": float(steps["pet_loss"].iloc[-20:].mean()), "speed": manifest["facts"]["speed"]}
    found |= {"smallest loss scale": float(steps["loss_scale"].min())}
    if settings.so8t.enabled:
        found["mean drift, degrees"] = float(read_angles(folder / "angles.safetensors").drift[-1].mean())
    return {key: None if isinstance(v, float) and math.isnan(v) else v for key, v in found.items()}


def run_notebook(root: Path, rate: float) -> dict[str, Any]:
    """Carry out 02_train as a person would: its notebook through papermill, with its report."""
    values = {
        "run.root": root / "runs",
        "run.reports_root": root / "reports",
        "model.base": model(root)["base"],
        "training.learning_rate": repr(rate),
        **{f"training.{key}": value for key, value in (REHEARSAL if REHEARSE else {}).items()},
    }
    chosen = [part for key, value in values.items() for part in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "so8t_helpers", "run", "smollm2", "--only", "2", *chosen]
    subprocess.run(command, cwd=ROOT, check=True)
    return outcome(settings_of(root, "smollm2", rate, {}))


def bake(settings: Settings) -> dict[str, Any]:
    """Carry out 03_bake; return the proof's figures."""
    started = time.monotonic()
    proof = bake_stage.bake(settings).proof
    return {"seconds": round(time.monotonic() - started, 1), "logits": proof["logits"]}


def answer(folder: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Let a model answer all test questions; return shares, with 95% intervals of a share."""
    started = time.monotonic()
    with open_transformers(folder, parallel=BATCH) as engine:
        prompts = [engine.dialect.prompt(row["messages"][:-1]) for row in rows]
        answers = engine.complete_many(prompts, max_tokens=MOST_TOKENS)
    judged = [score(done.text, row) for done, row in zip(answers, rows, strict=True)]
    found: dict[str, Any] = {"n": len(rows), "seconds": round(time.monotonic() - started, 1)}
    for name, hits in (
        ("exact match", [one.correct for one in judged]),
        ("format", [s.well_formed for s in judged]),
    ):
        share = sum(map(bool, hits)) / len(rows)
        half = 1.96 * math.sqrt(share * (1 - share) / len(rows))
        found[name] = {"share": share, "low": share - half, "high": share + half}
    found["tokens an answer"] = sum(done.tokens for done in answers) / len(answers)
    found["ended by itself"] = sum(done.stopped for done in answers) / len(answers)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    root = options.root.resolve()
    work = Work(root / "real_model_gpu.json", options.seconds)
    for rate in RATES[:3]:
        work.part(f"rate {rate:g}", 60, lambda r=rate: train(settings_of(root, f"rate-{r:g}", r, {})))
    tried = {rate: found for rate in RATES if (found := work.done.get(f"rate {rate:g}"))}
    best = min(tried, key=lambda rate: tried[rate]["held-out loss"])
    work.done["best rate"] = best
    work.part("the run", 90, lambda: run_notebook(root, best))
    settings = settings_of(root, "smollm2", best, {})
    settings = settings.model_copy(
        update={"training": settings.training.model_copy(update={"dataset_dir": None})}
    )
    rows = read_jsonl(root / "runs" / "gsm8k-test" / "01_dataset" / "eval.jsonl")[: 8 if REHEARSE else None]
    work.part("baking", 60, lambda: bake(settings))
    work.part("test, baked", 120, lambda: answer(settings.run_dir / "03_bake" / "model", rows))
    for name, overrides in ARMS.items():
        arm = name.lower().replace(" ", "-").replace("'", "")
        work.part(name, 45, lambda a=arm, o=overrides: train(settings_of(root, a, best, o)))
    work.part("test, base", 120, lambda: answer(base_folder(settings), rows))
    work.part(f"rate {RATES[3]:g}", 45, lambda: train(settings_of(root, "rate-low", RATES[3], {})))
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    if not REHEARSE:
        write_claims("real_model_gpu", {"card": card, **work.done}, [])


if __name__ == "__main__":
    main()
