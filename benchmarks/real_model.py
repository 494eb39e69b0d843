"""A real pretrained model on two cores: SmolLM2-135M through all five stages, beside transformers and peft.

    python benchmarks/real_model.py --base SmolLM2….gguf --problems gsm8k_train.jsonl [--prompts N]

Carries out `so8t run smollm2 --set training.max_steps=20` as a person would (most of an hour on two idle
cores), looks at what it says of token ids, and holds the F16 file's greedy answers against transformers'.
Then trains 20 steps of 256 tokens in float32 and the same with the libraries, in float32 and float64. Stages
that are fresh in the folder are not carried out again; `--finished` takes the run that lies there as it is,
whatever its steps. Results go to results/real_model.json, or to real_model_finished.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from claims import claim, write_claims  # noqa: E402

from so8t_helpers.phi3.source import base_folder  # noqa: E402
from so8t_helpers.run.files import read_jsonl, write_jsonl  # noqa: E402
from so8t_helpers.run.stage import STAGES, read_manifest  # noqa: E402
from so8t_helpers.settings import Settings, load_settings, merge  # noqa: E402
from so8t_helpers.train import stage as train_stage  # noqa: E402
from tests.twin import compare  # noqa: E402

STEPS = 20
SHORT, ROWS = 600, 200  # characters, and samples, of the 20 steps in float32
TWIN = {
    "model": {"quantization": "none"},
    "lora": {"dropout": 0.0},
    "training": {
        "max_steps": STEPS,
        "precision": "fp32",
        "sequence_length": 256,
        "gradient_accumulation": 1,
        "eval_steps": None,
        "sample_steps": None,
    },
}


def profile(folder: Path, base: Path, problems: Path, prompts: int) -> Settings:
    """The profile with its places, 20 steps, and so many prompts for each model."""
    places = {"root": str(folder / "runs"), "reports_root": str(folder / "reports")}
    chosen = {"run": places, "model": {"base": f"llama:{base}"}, "dataset": {"inputs": [str(problems)]}}
    return load_settings("smollm2", chosen | {"training": {"max_steps": STEPS}, "eval": {"prompts": prompts}})


def run_all(settings: Settings) -> None:
    """Carry out all stages by the verb, each through its notebook."""
    values = {
        "run.root": settings.run.root,
        "run.reports_root": settings.run.reports_root,
        "model.base": settings.model.base,
        "dataset.inputs": json.dumps(settings.dataset.inputs),
        "training.max_steps": STEPS,
        "eval.prompts": settings.eval.prompts,
    }
    chosen = [part for key, value in values.items() for part in ("--set", f"{key}={value}")]
    command = [sys.executable, str(ROOT / "run.py"), "so8t", "run", "smollm2", *chosen]
    subprocess.run(command, cwd=ROOT, check=True)


def read(settings: Settings, name: str) -> Any:
    return json.loads((settings.run_dir / name).read_text(encoding="utf-8"))


def greedy_equal(settings: Settings) -> float:
    """Share of prompts to which the F16 file writes, token for token, what transformers writes."""
    rows = read_jsonl(settings.run_dir / "05_ollama_eval" / "answers.jsonl")
    baked, f16 = ({r["id"]: r["text_hmac"] for r in rows if r["model"] == name} for name in ("baked", "f16"))
    return sum(baked[key] == f16[key] for key in baked) / len(baked)


def twin(settings: Settings) -> dict[str, float]:
    """Train 20 steps in float32 here and by the libraries; the largest differences, relative."""
    rows = read_jsonl(settings.run_dir / "01_dataset" / "train.jsonl")
    short = settings.run_dir.parent / "twin" / "data"  # samples that surely fit
    write_jsonl(short / "train.jsonl", [row for row in rows if len(row["text"]) < SHORT][:ROWS])
    own = {"run": {"name": "twin"}, "training": {"dataset_dir": str(short)}}
    chosen = merge(merge(settings, TWIN), own)
    train_stage.train(chosen)
    found = compare(chosen, base_folder(chosen), chosen.run_dir / "start")
    pairs = zip(found.metrics["task_loss"], found.theirs.losses, found.exact.losses, strict=True)
    ours, theirs, between = zip(
        *((abs(a - c) / c, abs(b - c) / c, abs(a - b) / c) for a, b, c in pairs), strict=True
    )
    return {
        "ours against float64": max(ours),
        "the libraries' float32 against float64": max(theirs),
        "ours against the libraries' float32": max(between),
        "adapters against float64, ours over theirs": found.off / found.theirs_off,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--problems", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "real-model")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--finished", action="store_true", help="look at the run that lies in the folder")
    options = parser.parse_args()
    places = (options.folder, options.base, options.problems)
    settings = profile(*(path.resolve() for path in places), options.prompts)
    if not options.finished:
        run_all(settings)
    scores, quality = read(settings, "05_ollama_eval/scores.json"), read(settings, "04_gguf/quality.json")
    parity, prompts = scores["parity"], scores["parity"]["prompts"]
    losses = twin(settings)
    manifests = {stage: read_manifest(settings, stage) or {} for stage in STAGES}
    figures = {
        "seconds": {stage: manifest["seconds"] for stage, manifest in manifests.items()},
        "training": manifests["02_train"]["facts"],
        "files": {
            kind: {key: entry[key] for key in ("bytes", "perplexity", "kl_mean") if key in entry}
            for kind, entry in quality["files"].items()
        },
        "engine": scores["engine"],
        "20 steps, losses": losses,
    }
    pages = sum((settings.reports_dir / f"{stage}.html").is_file() for stage in STAGES)
    same = min(parity["equal"].values()) / prompts
    apart = losses["ours against float64"] / losses["the libraries' float32 against float64"]
    adapters = losses["adapters against float64, ours over theirs"]
    claims = [
        claim(
            f"all five reports, {manifests['02_train']['facts']['steps']} steps",
            pages,
            5,
            "reports",
            at_least=True,
        ),
        claim("token ids equal, all models", same, 1.0, "of prompts", at_least=True),
        claim("greedy answers equal, F16 and transformers", greedy_equal(settings), 0.95, "of prompts", True),
        # Two float32 computations are off the exact one by amounts of one size; which is nearer is chance.
        claim("20 steps in float32: off float64, over transformers + peft", apart, 4.0, "times"),
        claim("20 steps: adapters off float64, over transformers + peft", adapters, 4.0, "times"),
    ]
    name = "real_model_finished" if options.finished else "real_model"
    return 0 if write_claims(name, figures, claims) else 1


if __name__ == "__main__":
    sys.exit(main())
