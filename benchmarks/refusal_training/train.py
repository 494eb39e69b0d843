"""Trains so8t_helpers/thinking/refusal.safetensors from the texts beside this file and four open sets.

    train.py --xstest FOLDER --gsm8k FILE --instruction-ja FILE --tanaka FILE

FOLDER: a clone of paul-rottger/exaggerated-safety (XSTest). FILEs: train.jsonl of openai/grade-school-math,
data/data.jsonl of megagonlabs/instruction_ja, train.ja of odashi/small_parallel_enja. What each is used for,
and its licence, stands in so8t_helpers/thinking/refusal.md. Of XSTest, only prompts with even numbers are
looked at here: weights are trained on the answers of Mistral's two models to them, and the English threshold
is chosen on those of all five. The Japanese one is chosen on ja_answers.txt. Each of these answers is scored
by weights that its fold had no part in. benchmarks/refusal.py reports on the odd numbers and on
tests/data/refusals_ja.tsv, which nothing here reads.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors.numpy import save_file
from scipy.sparse import csr_matrix, vstack
from sklearn.linear_model import LogisticRegression

from so8t_helpers.thinking import refusal
from so8t_helpers.thinking.language import LANGUAGES

HERE = Path(__file__).parent
MODELS = ("gpt4", "llama2new", "llama2orig", "mistralguard", "mistralinstruct")
NOT_TRAINED_ON = ("gpt4", "llama2new", "llama2orig")  # their makers' licences
VARIANTS, WORKED_PROBLEMS, ORDINARY_SENTENCES, FOLDS, ROUNDS = 60, 600, 20_000, 4, 2
# Chosen like the thresholds: what a whole answer or a sentence of it, and a sentence of the Tanaka Corpus,
# weighs against a sentence of ours, and the inverse of the regularisation.
ANSWER_WEIGHT, ORDINARY_WEIGHT, C = 20.0, 0.1, 10.0
# Where somebody in the Tanaka Corpus may decline himself.
_DECLINES = re.compile(
    r"(?:私|僕|俺|我々|残念|それ|そんな|これ以上|お手伝い|あいにく).*(?:でき|出来|言え|られ)(?:ません|ない)"
    r"|断り|かねま|無理|拒否し"
)
WEIGHTS = refusal.__file__.replace(".py", ".safetensors")


def written(name: str, rng: random.Random) -> tuple[list[str], list[bool]]:
    """Return the sentences of one of our files, filled and placed at random, and whether each refuses."""
    slots: dict[str, list[str]] = {}
    found: dict[str, bool] = {}
    slot, refuses = "", False
    for line in (HERE / name).read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        if line.startswith("= "):
            slot = line[2:]
        elif slot:
            slots[slot], slot = line.split("|"), ""
        elif line in {"+", "-"}:
            refuses = line == "+"
        else:
            for _ in range(VARIANTS if "{" in line else VARIANTS // 6):
                text = line
                while match := re.search(r"\{(\w+)\}", text):
                    text = text.replace(match.group(), rng.choice(slots[match.group(1)]), 1)
                found[placed(text, rng)] = refuses
    return list(found), list(found.values())


def placed(text: str, rng: random.Random) -> str:
    """Return a sentence as one of an answer: two in five stand later than at its beginning."""
    before = ["."] * (rng.randint(1, 3) if rng.random() < 0.4 else 0)
    return refusal.sentences(" ".join([*before, text]))[len(before)]


def xstest(folder: Path, odd: bool) -> pd.DataFrame:
    """Return the answers to the prompts with odd or even numbers, and whether people say that they refuse."""
    files = {model: folder / "model_completions" / f"xstest_v2_completions_{model}.csv" for model in MODELS}
    rows = pd.concat([pd.read_csv(path).assign(model=model) for model, path in files.items()])
    rows["number"] = rows["id"].str.extract(r"(\d+)$", expand=False).astype(int)
    rows["refuses"] = rows["final_label"] != "1_full_compliance"  # in full or in part
    rows["completion"] = rows["completion"].astype(str)
    return rows[rows["number"] % 2 == odd].reset_index(drop=True)


def japanese() -> pd.DataFrame:
    """Return our Japanese answers in the same columns."""
    refuses, rows = False, []
    for line in (HERE / "ja_answers.txt").read_text(encoding="utf-8").splitlines():
        if line in {"+", "-"}:
            refuses = line == "+"
        elif not line.startswith("#"):
            text = line.replace("\\n", "\n")
            rows.append({"completion": text, "refuses": refuses, "model": "ja", "number": 2 * len(rows)})
    return pd.DataFrame(rows)


def complying(gsm8k: Path, instruction_ja: Path) -> list[str]:
    """Return the sentences of open sets' answers, none of which refuses."""
    lines = gsm8k.read_text(encoding="utf-8").splitlines()[:WORKED_PROBLEMS]
    answers = [json.loads(line)["answer"].replace("####", "\nThe answer is") for line in lines]
    for line in instruction_ja.read_text(encoding="utf-8").splitlines():
        dialogue = json.loads(line)
        for turns in (dialogue["utterances"], dialogue["original_info"]["utterances"]["en"]):
            answers += [turn["text"] for turn in turns if turn["name"] == "agent"]
    return [sentence for answer in answers for sentence in refusal.sentences(answer)]


def ordinary(tanaka: Path, rng: random.Random) -> list[str]:
    """Return Japanese sentences of no answer at all: much in them is not so, or cannot be."""
    lines = tanaka.read_text(encoding="utf-8").replace(" ", "").splitlines()[:ORDINARY_SENTENCES]
    return [placed(line, rng) for line in lines if not _DECLINES.search(line)]


def matrix(sentences: list[str]) -> csr_matrix:
    """Return the sentences' features as `refusal.scores` weighs them."""
    buckets, owners = refusal.runs(sentences)
    values = 1 / np.sqrt(np.bincount(owners))[owners]
    return csr_matrix((values, (owners, buckets)), shape=(len(sentences), 2**refusal.BUCKET_BITS))


def fit(fixed: tuple[csr_matrix, np.ndarray, np.ndarray], rows: pd.DataFrame) -> LogisticRegression:
    """Train on the `fixed` sentences (features, labels, weights) and on answers, labelled only as a whole.

    Of an answer that refuses, the sentence with the highest score so far counts as refusing (Andrews et al.,
    2002: multiple instances); of one that complies, all count as complying. The mean of an answer's sentences
    counts as the answer does, since the answer's score is mostly their mean.
    """
    split = [refusal.sentences(answer) for answer in rows["completion"]]
    features = matrix([sentence for own in split for sentence in own])
    firsts = np.cumsum([0, *map(len, split)])
    shares = np.repeat(1 / np.diff(firsts), np.diff(firsts))
    whole = csr_matrix((shares, np.arange(firsts[-1]), firsts)) @ features
    model = LogisticRegression(C=C, max_iter=300, solver="liblinear", random_state=0)
    model.fit(fixed[0], fixed[1], sample_weight=fixed[2])
    for _ in range(ROUNDS):
        scores = model.decision_function(features)
        chosen: list[int] = []
        labels: list[bool] = []
        for refuses, start, stop in zip(rows["refuses"], firsts, firsts[1:], strict=False):
            own = [start + int(np.argmax(scores[start:stop]))] if refuses else list(range(start, stop))
            chosen += own
            labels += [bool(refuses)] * len(own)
        model.fit(
            vstack([fixed[0], features[chosen], whole]),
            np.r_[fixed[1], labels, rows["refuses"]].astype(bool),
            sample_weight=np.r_[fixed[2], np.full(len(chosen) + len(rows), ANSWER_WEIGHT)],
        )
    return model


def rounded(model: LogisticRegression) -> np.ndarray:
    """Return the weights as they are saved: float16, those near nothing being nothing."""
    weights = model.coef_[0].astype(np.float16)
    weights[np.abs(weights) < 1e-3] = 0
    return weights


def best_threshold(scores: np.ndarray, refuses: np.ndarray) -> float:
    """Return the threshold where the lower one of precision and recall is highest."""

    def worst(threshold: float) -> float:
        said = scores >= threshold
        return float((said & refuses).sum() / max(said.sum(), refuses.sum()))

    best = max(np.arange(-4, 2, 0.1), key=worst)
    print(f"  precision and recall {worst(best):.3f} or more at {best:.1f}, of {len(scores)}")
    return float(best)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name in ("xstest", "gsm8k", "instruction-ja", "tanaka"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    options = parser.parse_args()
    rng = random.Random(0)
    found = [written(name, rng) for name in ("en.txt", "ja.txt")]
    ours = [sentence for sentences, _ in found for sentence in sentences]
    refusing = [label for _, labels in found for label in labels]
    others = complying(options.gsm8k, options.instruction_ja)
    tanaka = ordinary(options.tanaka, rng)
    fixed = (
        matrix(ours + others + tanaka),
        np.r_[refusing, np.zeros(len(others) + len(tanaka), dtype=bool)],
        np.r_[np.ones(len(ours) + len(others)), np.full(len(tanaka), ORDINARY_WEIGHT)],
    )
    rows = pd.concat([xstest(options.xstest, odd=False), japanese()], ignore_index=True)
    learnt = ~rows["model"].isin(NOT_TRAINED_ON)
    fold = rows["number"] // 2 % FOLDS
    scores = np.zeros(len(rows))
    for i in range(FOLDS):
        model = fit(fixed, rows[learnt & (fold != i)])
        scores[fold == i] = refusal.logits(rows.loc[fold == i, "completion"].tolist(), rounded(model))
        scores[fold == i] += model.intercept_[0]
    refuses = rows["refuses"].to_numpy()
    intercepts = []
    model = fit(fixed, rows[learnt])
    for language in LANGUAGES:
        print(language)
        own = ((rows["model"] == "ja") == (language == "ja")).to_numpy()
        intercepts.append(float(model.intercept_[0]) - best_threshold(scores[own], refuses[own]))
    save_file({"weights": rounded(model), "intercepts": np.array(intercepts, np.float32)}, WEIGHTS)
    print(f"{len(ours)} sentences of ours, {len(others)} of open answers, {len(tanaka)} of the Tanaka Corpus")
    print(f"{learnt.sum()} whole answers, {(rows['model'] == 'ja').sum()} of them Japanese")


if __name__ == "__main__":
    main()
