"""The demo's four-class records: drawn, checked for near-duplicates, mixed with broken lines."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

from so8t_helpers import run_folder
from so8t_helpers.demo.broken import BROKEN
from so8t_helpers.demo.tasks import TASKS, Draft

LICENCE = "self-made"
SEED = 20240
# Below the dataset stage's threshold of 0.7 by more than MinHash's error of about 0.03 at 256 permutations.
MAX_SIMILARITY = 0.6

ROBOTS = {
    "closed.example": "User-agent: *\nDisallow: /private/\n",
    "open.example": "User-agent: *\nAllow: /\n",
}


class NearDuplicates:
    """Exact Jaccard similarity of character 5-grams to everything accepted so far."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.holders: dict[str, list[int]] = {}

    def accept(self, text: str, limit: float) -> bool:
        """Add `text` unless it is `limit` or more alike to an accepted one."""
        grams = {text[i : i + 5] for i in range(max(1, len(text) - 4))}
        shared = Counter(holder for gram in grams for holder in self.holders.get(gram, ()))
        if any(n / (len(grams) + self.sizes[holder] - n) >= limit for holder, n in shared.items()):
            return False
        for gram in grams:
            self.holders.setdefault(gram, []).append(len(self.sizes))
        self.sizes.append(len(grams))
        return True


def good_records() -> list[dict[str, Any]]:
    """Return the sound records in a fixed, shuffled order; no two questions are near-duplicates."""
    rng, seen = Random(SEED), NearDuplicates()
    drafts = []
    for task, count in TASKS.items():
        wanted = len(drafts) + count
        # A task whose words are used up would draw for ever: a bug in the words, not in the machine.
        for _ in range(100 * count):
            if len(drafts) == wanted:
                break
            draft = task(rng)
            if seen.accept(draft.question, MAX_SIMILARITY):
                drafts.append(draft)
        else:
            raise AssertionError(
                f"{task.__name__}: fewer than {count} different questions; add words or templates"
            )
    rng.shuffle(drafts)
    return [_record(draft) for draft in drafts]


def _record(draft: Draft) -> dict[str, Any]:
    return {
        "id": "demo-" + hashlib.sha256(draft.question.encode()).hexdigest()[:12],
        "instruction": draft.instruction,
        "input": draft.input,
        "output": draft.output,
        "label": draft.label,
        "reasoning": draft.reasoning,
        "task": draft.task,
        "domain": draft.domain,
        "licence": LICENCE,
        "check": draft.check,
    }


def lines() -> list[bytes]:
    """Return the file's lines without their ends: the good records with the broken ones among them.

    The line with the byte order mark is the first, where an editor would have put it.
    """
    good = good_records()
    good[2]["url"] = "https://open.example/page.html"
    mixed = [json.dumps(record, ensure_ascii=False).encode() for record in good]
    step = len(mixed) // len(BROKEN)
    for i, broken in enumerate(BROKEN):
        mixed.insert(i * (step + 1), broken.make(good))
    return mixed


def write_records(folder: Path) -> None:
    """Write `records.jsonl` and the robots.txt files of the hosts it names (`robots/<host>.txt`)."""
    with run_folder.atomic_path(folder / "records.jsonl") as scratch:
        scratch.write_bytes(b"\n".join(lines()) + b"\n")
    for host, text in ROBOTS.items():
        run_folder.write_text(folder / "robots" / f"{host}.txt", text)


def pretraining_drafts(count: int) -> list[Draft]:
    """Draw `count` questions for plain pre-training; none of them is a record's question."""
    rng = Random(SEED + 1)
    held_out = {(record["instruction"], record["input"]) for record in good_records()}
    tasks, shares = list(TASKS), list(TASKS.values())
    drafts: list[Draft] = []
    while len(drafts) < count:
        draft = rng.choices(tasks, shares)[0](rng)
        if (draft.instruction, draft.input) not in held_out:
            drafts.append(draft)
    return drafts
