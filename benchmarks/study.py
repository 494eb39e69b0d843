"""A study of SmolLM2-135M on one card: what it found, and how long a training takes.

    python benchmarks/study.py NAME --root FOLDER [--seconds 540]

`FOLDER` holds the base's GGUF file and `runs/` with the profile's finished 01_dataset, as for
real_model_gpu.py. Carries out `params/studies/NAME.yaml` as `so8t study NAME` does, without the page; killed
after `--seconds`, it goes on at the next call. When all is done (on any machine, with what a card left in the
folder) results go to results/study_NAME.json.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from claims import claim, write_claims  # noqa: E402

from so8t_helpers.settings import load_settings  # noqa: E402
from so8t_helpers.study import full_results, results, stage, what_if  # noqa: E402
from so8t_helpers.study.plan import Study, load_study  # noqa: E402


def study_of(root: Path, name: str) -> Study:
    """The study with its base and its data in `root`."""
    run = load_settings(load_study(name).settings.profile).run.name
    return load_study(
        name,
        {
            "run": {"root": str(root / "runs"), "reports_root": str(root / "reports")},
            "model": {"base": f"llama:{root / 'SmolLM2-135M-Instruct.Q4_1.gguf'}"},
            "training": {"dataset_dir": str(root / "runs" / run / "01_dataset")},
        },
    )


def carry_out(root: Path, name: str) -> None:
    """In a process of its own, which can be killed."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    stage.carry_out(study_of(root, name))


def facts_of(study: Study, found: stage.Results) -> dict[str, Any]:
    """What the results file says: every arm's trials, choice and values by seed, and each comparison."""
    endpoints = [e for e in study.file.endpoints.all if found.control.outcomes[0].documents(e)[1].sum()]
    arms = {
        name: {
            "parameters": arm.outcomes[0].facts["parameters"],
            "tokens": arm.outcomes[0].facts["tokens"],
            "trials": [{"values": trial.values, "value": trial.value} for trial in arm.trials],
            "chosen": arm.chosen.values,
            "diverged with seeds": arm.diverged,
            "by seed": {e: [outcome.value(e) for outcome in arm.outcomes] for e in endpoints},
            "seconds a step": statistics.median(o.facts["seconds_per_step"] for o in arm.outcomes),
        }
        for name, arm in found.arms.items()
    }
    comparisons = results.compare(found)
    rows = [
        {
            "arm": c.arm,
            "endpoint": c.endpoint,
            "difference": c.difference.value,
            "interval": [c.difference.low, c.difference.high],
            "p": c.difference.p,
            "p after Holm": c.corrected_p,
            "p by flips": c.difference.exact_p,
            "detectable": c.detectable,
            "verdict": c.verdict,
        }
        for c in comparisons
    ]
    registration = {
        key: found.registrations[0][key] for key in ("sha256", "file_sha256", "date", "trainings")
    }
    return {
        "question": study.file.question,
        "answer": results.answer(found, comparisons),
        "arms": arms,
        "comparisons": rows,
        "what if": {
            name: {
                "mean angle": curve.degrees,
                "t": curve.powers.tolist(),
                "change from t = 1 by seed": curve.change.tolist(),
                "at t = 0": curve.interval,
            }
            for name, curve in what_if.curves(found).items()
        },
        "all stages": {
            "what": full_results.said(found),
            "arms": full_results.table(found).to_dict(),
            "differences": full_results.differences(found).to_dict("records"),
        }
        if found.full
        else None,
        "registration": registration | {"times changed": len(found.registrations) - 1},
        "trained on": sorted({o.facts["machine"] for arm in found.arms.values() for o in arm.outcomes}),
    }


def seconds_a_training(found: stage.Results) -> float:
    """Mean time of the trainings that were compared, from one's start to the next's; compiling is in it."""
    return statistics.mean(o.facts["seconds"] for arm in found.arms.values() for o in arm.outcomes)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name")
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--seconds", type=float)
    options = parser.parse_args()
    root = options.root.resolve()
    worker = multiprocessing.get_context("spawn").Process(target=carry_out, args=(root, options.name))
    worker.start()
    worker.join(options.seconds)
    if worker.is_alive():
        worker.kill()
        print("not finished; the next call goes on", flush=True)
        return 3
    if worker.exitcode:
        return worker.exitcode
    study = study_of(root, options.name)
    found = stage.carry_out(study)  # reads what is there
    seconds = seconds_a_training(found)
    figures = facts_of(study, found) | {"seconds a training": round(seconds, 2)}
    claims = []
    if study.settings.profile == "smollm2":
        claims = [claim("60 trainings of 350 steps, one after another", round(60 * seconds), 1800, "s")]
    write_claims(f"study_{options.name}", figures, claims)
    return 0


if __name__ == "__main__":
    sys.exit(main())
