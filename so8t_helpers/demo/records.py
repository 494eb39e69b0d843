"""The demo's four-class records: drawn, checked for near-duplicates, mixed with broken lines."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from so8t_helpers.demo import answer_tasks, guard_tasks
from so8t_helpers.demo.broken import BROKEN
from so8t_helpers.demo.scenes import Draft
from so8t_helpers.run import files

Task = Callable[[Random], list[Draft]]

# How many good records each task gives.
RECORDS: dict[Task, int] = {
    answer_tasks.extraction: 280,
    answer_tasks.notice: 200,
    answer_tasks.unit_conversion: 120,
    answer_tasks.counting: 100,
    answer_tasks.comparison: 80,
    answer_tasks.yes_or_no: 110,
    answer_tasks.ordering: 80,
    answer_tasks.timetable: 60,
    guard_tasks.escalation: 270,
    guard_tasks.denial: 270,
    guard_tasks.refusal: 270,
}

# Shares of the pre-training text: what takes long to learn comes more often than what is learnt in 50 steps.
PRETRAINING: dict[Task, int] = {
    answer_tasks.extraction: 18,
    answer_tasks.notice: 14,
    answer_tasks.unit_conversion: 5,
    answer_tasks.counting: 10,
    answer_tasks.comparison: 10,
    answer_tasks.yes_or_no: 7,
    answer_tasks.ordering: 10,
    answer_tasks.timetable: 8,
    guard_tasks.escalation: 10,
    guard_tasks.denial: 4,
    guard_tasks.refusal: 4,
}

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
    drafts: list[Draft] = []
    for task, count in RECORDS.items():
        wanted = len(drafts) + count
        # A task whose words are used up would draw for ever: a bug in the words, not in the machine.
        for _ in range(100 * count):
            if len(drafts) == wanted:
                break
            draft = rng.choice(task(rng))
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
    with files.atomic_path(folder / "records.jsonl") as scratch:
        scratch.write_bytes(b"\n".join(lines()) + b"\n")
    for host, text in ROBOTS.items():
        files.write_text(folder / "robots" / f"{host}.txt", text)


def pretraining_talks(count: int) -> list[list[Draft]]:
    """Draw `count` talks, each about one text; no question in them, put on its own, is a record's.

    Half of them ask one question, the others all that the text answers: the text is read once for all.
    """
    rng = Random(SEED + 1)
    held_out = {record["instruction"] + record["input"] for record in good_records()}
    tasks, shares = list(PRETRAINING), list(PRETRAINING.values())
    talks: list[list[Draft]] = []
    while len(talks) < count:
        talk = rng.choices(tasks, shares)[0](rng)
        if rng.random() < 0.5:
            talk = [rng.choice(talk)]
        if not any(draft.instruction + draft.input in held_out for draft in talk):
            talks.append(talk)
    return talks
