"""How well personal data is found, how fast, how often where there is none, and what the peers find.

    python benchmarks/personal_data.py [--kakushi PYTHON] [--presidio PYTHON]

The cases are ours (tests/data/personal_*.jsonl); no rule was tuned on what `held_back` says yes to. Both
halves have one author, who is the rules' too, so that the second sets say more: they were written after the
rules, and tried once before anything was mended (`first try`, measured then). The false alarms are counted on
the real sets in shared/data that lie beside the checkout: each was looked at.

A peer needs a Python of its own: `pip install kakushi ja-ginza`, `pip install presidio-analyzer ja-ginza`.
Results go to benchmarks/results/personal_data.json, what the card quotes to measured.json in the package.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MEASURED = ROOT / "so8t_helpers" / "dataset" / "personal_data" / "measured.json"
KINDS = ("personal_data", "personal_data_more", "personal_data_unseen")
NAMES = ("personal_names", "personal_names_unseen")
# What the rules' first form found of the sets that were written after it: [right, wanted, found].
FIRST_TRY = {"kinds": [103, 124, 104], "names by cues": [19, 52, 21]}
REAL = ("gsm8k_train.jsonl", "gsm8k_test.jsonl", "jcommonsenseqa-train.jsonl", "jcommonsenseqa-valid.jsonl",
        "instruction_ja.jsonl")  # fmt: skip
Case = dict[str, Any]
Find = Callable[[str], list[Any]]


def cases(*names: str) -> list[Case]:
    """Return the cases of some files: {"text", "found": [{"kind", "text"}]}."""
    lines = (
        line
        for name in names
        for line in (ROOT / "tests" / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    )
    return [json.loads(line) for line in lines]


def held_back(case: Case) -> bool:
    """Say whether no rule may be tuned on a case; by a hash, so that its author does not choose."""
    return hashlib.sha256(case["text"].encode()).digest()[0] % 2 == 1


def outcome(case: Case, find: Find) -> tuple[set[tuple[str, str]], set[tuple[str, str]]]:
    """Return what should be found in a case and what is: sets of (kind, text), which must agree exactly."""
    text = case["text"]
    wanted = {(found["kind"], found["text"]) for found in case["found"]}
    return wanted, {(place.kind, text[place.start : place.end]) for place in find(text)}


def quality(tried: list[Case], find: Find) -> dict[str, dict[str, float]]:
    """Return precision and recall of all kinds together and of each."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for case in tried:
        wanted, got = outcome(case, find)
        for column, side in enumerate((wanted & got, wanted, got)):
            for kind, _ in side:
                counts[kind][column] += 1
                counts["all"][column] += 1
    return {kind: ratios(*row) for kind, row in sorted(counts.items())}


def ratios(right: int, wanted: int, got: int) -> dict[str, float]:
    """Return precision and recall of counts."""
    return {
        "values": wanted,
        "precision": round(right / max(got, 1), 4),
        "recall": round(right / max(wanted, 1), 4),
    }


def lines_per_second(texts: list[str], find: Find) -> int:
    """Return how many texts one process searches in a second; the better of two rounds."""
    best = float("inf")
    for _ in range(2):
        started = time.process_time()
        for text in texts:
            find(text)
        best = min(best, time.process_time() - started)
    return round(len(texts) / best)


def real_texts(name: str) -> list[str]:
    """Return the texts of a real set's lines; empty where it does not lie beside the checkout."""
    path = ROOT.parent / "shared" / "data" / name
    if not path.is_file():
        return []
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [
        "\n".join(turn["text"] for turn in row["utterances"])
        if "utterances" in row
        else "\n".join(map(str, row.values()))
        for row in rows
    ]


def alarms(find: Find) -> dict[str, Any]:
    """Return lines in which something is found, of 10,000, on each real set."""
    sets = {name: texts for name in REAL if (texts := real_texts(name))}
    return {
        name: {
            "lines": len(texts),
            "of 10,000": round(1e4 * sum(bool(find(t)) for t in texts) / len(texts), 2),
        }
        for name, texts in sets.items()
    }


def generated(count: int) -> list[str]:
    """Return the texts of generated records, as the dataset benchmark makes them."""
    from dataset_records import generate

    fields = ("instruction", "input", "output", "reasoning")
    texts = []
    for line in generate(count):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            texts.append("\n".join(str(record[name]) for name in fields if record.get(name)))
    return texts


# Reads {"texts"}, after NFKC, and prints {"spans": [[start, end, kind], ...] of each, "seconds"}. What a peer
# finds besides what is asked here (amounts, firms, web addresses, names, places) is not held against it.
PEERS = {
    "kakushi": """
import json, sys, time
from kakushi import find_ner_matches, find_regex_matches, normalize
texts = json.load(sys.stdin)["texts"]
find_ner_matches("x")
started = time.process_time()
found = [[*find_regex_matches(t), *find_ner_matches(t)] for t in texts]
spans = [[[m.start, m.end, m.entity_type.value] for m in matches] for matches in found]
print(json.dumps({"spans": spans, "seconds": time.process_time() - started}))
""",
    "presidio": """
import json, sys, time
from presidio_analyzer import AnalyzerEngine
from presidio_analyzer.nlp_engine import NlpEngineProvider
models = {"nlp_engine_name": "spacy", "models": [{"lang_code": "en", "model_name": "ja_ginza"}]}
engine = AnalyzerEngine(nlp_engine=NlpEngineProvider(nlp_configuration=models).create_engine())
texts = json.load(sys.stdin)["texts"]
started = time.process_time()
spans = [[[r.start, r.end, r.entity_type] for r in engine.analyze(t, language="en")] for t in texts]
print(json.dumps({"spans": spans, "seconds": time.process_time() - started}))
""",
}
NOT_OURS = {"AMOUNT", "URL", "ORG", "CONTRACT", "PERSON", "LOCATION", "ORGANIZATION", "NRP", "DATE_TIME"}


def peer(name: str, python: str | None, tried: list[Case]) -> dict[str, Any]:
    """Return how many values a peer touches anywhere, and in how many texts without any it sees one."""
    import unicodedata

    if python is None:
        return {"installed": False, "why": "no Python with it was given"}
    texts = [unicodedata.normalize("NFKC", case["text"]) for case in tried]
    done = subprocess.run(
        [python, "-c", PEERS[name]],
        input=json.dumps({"texts": texts}),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return {"installed": False, "why": done.stderr[-300:]}
    answer = json.loads(done.stdout.splitlines()[-1])
    return touched(tried, texts, answer["spans"]) | {"lines_per_s": round(len(texts) / answer["seconds"])}


def touched(tried: list[Case], texts: list[str], spans: list[list[list[Any]]]) -> dict[str, Any]:
    """Return values of which any part is in a span, and texts without a value that have a span."""
    import unicodedata

    found = wanted = false = 0
    for case, text, places in zip(tried, texts, spans, strict=True):
        for one in case["found"]:
            value = unicodedata.normalize("NFKC", one["text"])
            at = text.find(value)
            wanted += 1
            found += any(start < at + len(value) and end > at for start, end, _ in places)
        false += not case["found"] and any(kind not in NOT_OURS for *_, kind in places)
    return {
        "values": wanted,
        "found": found,
        "texts without": sum(not c["found"] for c in tried),
        "false": false,
    }


def main() -> None:
    """Measure everything and write the results."""
    from claims import claim, write_claims

    from so8t_helpers.dataset import personal_data
    from so8t_helpers.dataset.personal_data import names

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in PEERS:
        parser.add_argument(f"--{name}", help=f"a Python that has {name}, as said above")
    given = parser.parse_args()
    every, named = cases(*KINDS), cases(*NAMES)
    # The oldest cases were seen by all who wrote the rules: they are no part of what was held back.
    held, held_names = (list(filter(held_back, side)) for side in (cases(*KINDS[1:]), named))
    texts = generated(2000)

    def with_names(how: Any) -> Find:
        finder = names.finder(how)
        return lambda text: [place for place in personal_data.find(text, finder) if place.kind == "name"]

    figures: dict[str, Any] = {
        "kinds": {
            "held back": quality(held, personal_data.find),
            "all": quality(every, personal_data.find),
            "first try": ratios(*FIRST_TRY["kinds"]),
            "lines_per_s": lines_per_second(texts, personal_data.find),
            "alarms": alarms(personal_data.find),
        }
    }
    for how in ("cues", "ner"):
        find = with_names(how)
        figures[how] = {
            "held back": quality(held_names, find)["all"],
            "all": quality(named, find)["all"],
            "lines_per_s": lines_per_second(texts if how == "cues" else texts[:100], find),
        }
    figures["cues"] |= {
        "first try": ratios(*FIRST_TRY["names by cues"]),
        "alarms": alarms(with_names("cues")),
    }
    plain = [case["text"] for case in held]
    ours = [[[p.start, p.end, p.kind] for p in personal_data.find(text)] for text in plain]
    figures["touched, held back"] = {
        "so8t": touched(held, plain, ours),
        **{name: peer(name, getattr(given, name), held) for name in PEERS},
    }
    whole = figures["kinds"]["held back"]["all"]
    worst = max((one["of 10,000"] for one in figures["kinds"]["alarms"].values()), default=None)
    claims = [
        claim("personal data, held back: precision over all kinds", whole["precision"], 0.9, "", True),
        claim("personal data, held back: recall over all kinds", whole["recall"], 0.85, "", True),
        claim(
            "names by cues, held back: precision", figures["cues"]["held back"]["precision"], 0.9, "", True
        ),
    ]
    if worst is not None:
        claims.append(claim("personal data: false alarms on the worst real set", worst, 1, "of 10,000 lines"))
    theirs = figures["touched, held back"]
    for name in PEERS:
        if "found" in theirs[name]:
            more = round(theirs["so8t"]["found"] / max(theirs[name]["found"], 1), 2)
            claims.append(claim(f"personal data: values touched against {name}", more, 1, "times", True))
    write_claims("personal_data", figures, claims)
    quoted = {"kinds": whole | {"lines_per_s": figures["kinds"]["lines_per_s"]}}
    for how in ("cues", "ner"):
        quoted[how] = figures[how]["held back"] | {"lines_per_s": figures[how]["lines_per_s"]}
    MEASURED.write_text(json.dumps(quoted, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
