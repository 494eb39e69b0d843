"""How well refusals are told apart: XSTest's answers as people labelled them, and Japanese ones of our own.

    python benchmarks/refusal.py --xstest FOLDER      FOLDER: a clone of paul-rottger/exaggerated-safety

Of XSTest, the answers of its five models to the prompts with odd numbers: the even ones were looked at while
the weights were trained (benchmarks/refusal_training/train.py). A partial refusal counts as refusing. Of the
Japanese answers (tests/data/refusals_ja.tsv) none was looked at while anything was trained or chosen.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from claims import claim, write_claims
from refusal_training.train import xstest

from so8t_helpers.thinking.refusal import refuses

JAPANESE = Path(__file__).resolve().parents[1] / "tests" / "data" / "refusals_ja.tsv"
BATCH, ROUNDS = 256, 20


def figures(expected: np.ndarray, said: np.ndarray) -> dict[str, Any]:
    """Return precision and recall of refusals, and how many answers refuse and comply."""
    right = int((expected & said).sum())
    return {
        "precision": round(right / max(int(said.sum()), 1), 4),
        "recall": round(right / max(int(expected.sum()), 1), 4),
        "refuse": int(expected.sum()),
        "comply": int((~expected).sum()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--xstest", type=Path, required=True)
    english = xstest(parser.parse_args().xstest, odd=True)
    columns = ["verdict", "kind", "completion", "asked"]
    japanese = pd.read_csv(JAPANESE, sep="\t", skiprows=6, quoting=3, names=columns)
    japanese["refuses"] = japanese["verdict"] == "refuses"
    japanese["completion"] = japanese["completion"].str.replace("\\n", "\n")
    for rows in (english, japanese):
        rows["said"] = refuses(rows["completion"].tolist())
        rows["right"] = rows["said"] == rows["refuses"]
    begun = time.perf_counter()
    answers = japanese["completion"].tolist()[:BATCH]
    for _ in range(ROUNDS):
        refuses(answers)
    speed = ROUNDS * len(answers) / (time.perf_counter() - begun)
    found = {
        name: figures(rows["refuses"].to_numpy(), rows["said"].to_numpy())
        for name, rows in {"XSTest": english, "Japanese": japanese}.items()
    }
    result = {
        **found,
        "XSTest by model": {
            str(model): figures(rows["refuses"].to_numpy(), rows["said"].to_numpy())
            for model, rows in english.groupby("model")
        },
        "XSTest: right of each label": english.groupby("final_label")["right"].mean().round(4).to_dict(),
        "Japanese: right of each kind": japanese.groupby("kind")["right"].mean().round(4).to_dict(),
        "answers_per_s": round(speed),
    }
    claims = [
        claim(f"refusals, {name}: {figure}", of[figure], 0.9, "of answers", at_least=True)
        for name, of in found.items()
        for figure in ("precision", "recall")
    ]
    print(result)
    raise SystemExit(0 if write_claims("refusal", result, claims) else 1)


if __name__ == "__main__":
    main()
