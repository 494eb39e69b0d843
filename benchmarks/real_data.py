"""What the dataset stage makes of real sets: what is kept, what leaks across the split, what its judges find.

    python benchmarks/real_data.py [--data FOLDER] [--sets SET ...]

FOLDER holds the files named in `SETS` (see its README.md); a set whose files are missing is left out. All
goes through the stage itself. Whether a held-out question has a near-double in training is measured without
any code of the stage: by brute force over all pairs, with scikit-learn's character 3-grams. XSafety and
toxic_ja are only judged: nothing of what they say is kept, only how much of it was flagged. Results go to
benchmarks/results/real_data.json.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from claims import claim, write_claims
from sklearn.feature_extraction.text import CountVectorizer

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
REFUSAL = "申し訳ありませんが、その依頼にはお答えできません。"
AGREES = 0.5  # Jaccard similarity of character 3-grams from which two questions are near-doubles
QUESTIONS_OF_A_PARAGRAPH = 10
_NO_LETTERS = re.compile(r"[\W_]+")
Row = dict[str, Any]


def lines(path: Path) -> Iterator[Row]:
    """Yield a file's objects."""
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def gsm8k(data: Path) -> Iterator[Row]:
    """Problems with worked solutions, train and test together."""
    for name in ("gsm8k_train.jsonl", "gsm8k_test.jsonl"):
        yield from ({**row, "licence": "MIT"} for row in lines(data / name))


def _jcommonsenseqa(data: Path) -> Iterator[tuple[str, list[str], str]]:
    for name in ("jcommonsenseqa-train.jsonl", "jcommonsenseqa-valid.jsonl"):
        for row in lines(data / name):
            choices = [row[f"choice{i}"] for i in range(5)]
            yield row["question"], choices, choices[row["label"]]


def _row(question: str, answer: str, label: str = "ALLOW", **more: str) -> Row:
    return {"instruction": question, "output": answer, "label": label, "licence": "CC-BY-SA-4.0", **more}


def jcommonsenseqa(data: Path) -> Iterator[Row]:
    """Questions with their five choices as the context."""
    for question, choices, answer in _jcommonsenseqa(data):
        yield _row(question, answer, input="\n".join(choices))


def jcommonsenseqa_alone(data: Path) -> Iterator[Row]:
    """The questions without their choices: short, and many are alike."""
    for question, _, answer in _jcommonsenseqa(data):
        yield _row(question, answer)


def paragraphs(data: Path, grouped: bool = True) -> Iterator[Row]:
    """As a reading task has it: ten different questions on one paragraph, which holds their answers."""
    asked = list({question: (question, answer) for question, _, answer in _jcommonsenseqa(data)}.values())
    for start in range(0, len(asked), QUESTIONS_OF_A_PARAGRAPH):
        mine = asked[start : start + QUESTIONS_OF_A_PARAGRAPH]
        paragraph = "".join(f"「{question}」と聞けば、答えは「{answer}」です。" for question, answer in mine)
        group = {"group": f"paragraph {start}"} if grouped else {}
        yield from (_row(question, answer, input=paragraph, **group) for question, answer in mine)


def paragraphs_ungrouped(data: Path) -> Iterator[Row]:
    """The same, where no key says which records belong together."""
    return paragraphs(data, grouped=False)


def instruction_ja(data: Path) -> Iterator[Row]:
    """The first question and answer of each dialogue."""
    for row in lines(data / "instruction_ja.jsonl"):
        said = [turn["text"] for turn in row["utterances"]]
        yield _row(said[0], said[1])


def complying(data: Path) -> Iterator[Row]:
    """The same under a label that they contradict: all of these answers comply, and are to be told of."""
    yield from ({**row, "label": "DENY"} for row in instruction_ja(data))


def refused(data: Path, *names: str) -> Iterator[Row]:
    """Prompts of XSafety, each with a refusal, so that what is flagged shows in the card."""
    for name in names:
        with (data / "xsafety_ja" / name).open(encoding="utf-8-sig", newline="") as file:
            yield from (_row(row[0], REFUSAL, "REFUSE") for row in csv.reader(file) if row and row[0].strip())


def xsafety_unsafe(data: Path) -> Iterator[Row]:
    """The prompts of the thirteen kinds that are not harmless."""
    names = sorted(path.name for path in (data / "xsafety_ja").glob("*.csv"))
    return refused(data, *(name for name in names if name != "commonsense.csv"))


def _toxic(data: Path, wanted: bool) -> Iterator[Row]:
    with (data / "toxic_ja.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            toxic = int(row["Toxic"]) + int(row["Very Toxic"])
            if (2 * toxic > int(row["annotation_num"])) if wanted else not toxic:
                yield _row(row["text"], REFUSAL, "REFUSE")


def toxic(data: Path) -> Iterator[Row]:
    """Texts that most raters found toxic."""
    return _toxic(data, True)


def not_toxic(data: Path) -> Iterator[Row]:
    """Texts that no rater found toxic."""
    return _toxic(data, False)


# set -> (its records, a file that it is made of, whether every record is harmless)
SETS: dict[str, tuple[Callable[[Path], Iterator[Row]], str, bool]] = {
    "gsm8k": (gsm8k, "gsm8k_train.jsonl", True),
    "jcommonsenseqa": (jcommonsenseqa, "jcommonsenseqa-train.jsonl", True),
    "jcommonsenseqa, questions alone": (jcommonsenseqa_alone, "jcommonsenseqa-train.jsonl", True),
    "paragraphs": (paragraphs, "jcommonsenseqa-train.jsonl", True),
    "paragraphs, no group key": (paragraphs_ungrouped, "jcommonsenseqa-train.jsonl", True),
    "instruction_ja": (instruction_ja, "instruction_ja.jsonl", True),
    "instruction_ja, labelled DENY": (complying, "instruction_ja.jsonl", True),
    "XSafety (Japanese), 13 unsafe kinds": (xsafety_unsafe, "xsafety_ja", False),
    "toxic_ja, toxic to most raters": (toxic, "toxic_ja.csv", False),
    "toxic_ja, toxic to no rater": (not_toxic, "toxic_ja.csv", True),
}


def build(records: Iterator[Row], folder: Path) -> tuple[dict[str, Any], dict[str, list[str]], float]:
    """Carry out the stage; return its card, each split's questions, and lines/s."""
    from so8t_helpers.dataset import stage as dataset_stage
    from so8t_helpers.phi3.source import base_folder
    from so8t_helpers.run.files import read_jsonl
    from so8t_helpers.settings import load_settings

    source = folder / "records.jsonl"
    source.write_text(
        "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8"
    )
    real = ROOT.parent / "shared" / "phi35"
    settings = load_settings(
        "demo",
        {
            "run": {"root": str(folder / "runs"), "name": "real"},
            "model": {"base": str(real) if real.is_dir() else "demo"},
            "training": {"sequence_length": 2048},
            "dataset": {"inputs": [str(source)], "workers": 1},
        },
    )
    base_folder(settings)
    started = time.perf_counter()
    built = dataset_stage.build(settings)
    speed = built.card["lines"]["read"] / (time.perf_counter() - started)
    questions = {
        split: [row["question"] for row in read_jsonl(built.directory / f"{split}.jsonl")]
        for split in ("train", "eval")
    }
    return built.card, questions, speed


def near_doubles(held: list[str], train: list[str]) -> float:
    """Return the share of held-out questions that agree with a training question by `AGREES` or more."""
    texts = [_NO_LETTERS.sub("", unicodedata.normalize("NFKC", text).lower()) for text in (*held, *train)]
    grams = CountVectorizer(analyzer="char", ngram_range=(3, 3), binary=True, lowercase=False, dtype=np.int32)
    sets = grams.fit_transform(texts)
    sizes = np.asarray(sets.sum(axis=1)).ravel()
    most = np.zeros(len(held))
    for start in range(0, len(held), 256):
        own = slice(start, min(start + 256, len(held)))
        shared = (sets[own] @ sets[len(held) :].T).toarray()
        most[own] = (shared / np.maximum(sizes[own, None] + sizes[None, len(held) :] - shared, 1)).max(axis=1)
    return float((most >= AGREES).mean())


def measure(name: str, data: Path) -> dict[str, Any]:
    """Return what the stage made of one set."""
    records, _, harmless = SETS[name]
    with tempfile.TemporaryDirectory(prefix="so8t-real-") as folder:
        card, questions, speed = build(records(data), Path(folder))
    read, flagged = card["lines"]["read"], card["unsafe"]["flagged"]
    found = sum(sum(by_label.values()) for by_label in flagged.values())
    masked = sum(card["counted"].get("personal data masked", {}).values())
    result = {
        "lines": card["lines"],
        "lines_per_s": round(speed),
        "not kept": {reason: entry["lines"] for reason, entry in card["quarantine"].items()},
        "two labels": {key: card["two labels"][key] for key in ("questions", "lines")},
        "split": card["split"],
        "flagged as unsafe": {
            "texts": found,
            "share": round(found / max(sum(card["unsafe"]["judged"].values()), 1), 4),
        },
        "counted": card["counted"],
        "refusals": card.get("refusals"),
        "thinkings": card.get("thinkings"),
    }
    if questions["eval"]:
        result["held out, with a near-double in train"] = round(
            near_doubles(questions["eval"], questions["train"]), 4
        )
    if harmless:
        result["false alarms per 10,000 lines"] = {
            "unsafe": round(found / read * 1e4, 1),
            "personal data": round(masked / read * 1e4, 1),
        }
    return result


def main() -> None:
    """Measure the sets that are there; write the results of all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--sets", nargs="*", choices=SETS, default=list(SETS))
    given = parser.parse_args()
    figures = {}
    for name in given.sets:
        if not (given.data / SETS[name][1]).exists():
            print(f"{name}: left out, no {given.data / SETS[name][1]}")
            continue
        figures[name] = measure(name, given.data)
        print(name, json.dumps(figures[name], ensure_ascii=False), flush=True)
    if set(figures) == set(SETS):
        write_claims("real_data", figures, _claims(figures))


def _claims(figures: dict[str, Any]) -> list[dict[str, Any]]:
    claims = []
    for name in ("gsm8k", "jcommonsenseqa", "jcommonsenseqa, questions alone", "instruction_ja"):
        shares = figures[name]["held out, with a near-double in train"]
        claims.append(claim(f"{name}: held out, with a near-double in train", 100 * shares, 1, "%"))
    found = figures["paragraphs, no group key"]["not kept"]
    lost = sum(found.get(reason, 0) for reason in ("duplicate", "near_duplicate"))
    claims.append(claim("ten different questions on each paragraph: taken for duplicates", lost, 0, "lines"))
    for name in ("gsm8k", "jcommonsenseqa, questions alone"):
        for what, number in figures[name]["false alarms per 10,000 lines"].items():
            claims.append(claim(f"{name}: false alarms per 10,000 lines, {what}", number, 10, ""))
    name = "XSafety (Japanese), 13 unsafe kinds"
    share = round(100 * figures[name]["flagged as unsafe"]["share"], 2)
    claims.append(
        claim(f"{name}: flagged by the word list, which finds words, not intent", share, 1, "%", True)
    )
    return claims


if __name__ == "__main__":
    main()
