"""What a mark is: its spelling, what is found of one in a text, and how far a word is from another."""

from __future__ import annotations

from typing import NamedTuple

SEED_THINKING = "# 思考ステップ"
SEED_FINAL = "# 最終回答"
ENGLISH_THINKING = "# Thinking"
ENGLISH_FINAL = "# Final answer"
THINK_TAGS = ("think-task", "think-safety", "think-policy")
FINAL_TAG = "final"
LABELS = ("ALLOW", "ESCALATION", "DENY", "REFUSE")
# What stands before the label in the line of the decision.
DECISION_LINES = {"seed": "判定: ", "quadruple": "判定: ", "english": "Decision: "}

# No decision needs more characters than this after the first of a mark: it bounds what is held back.
WINDOW = 64
# With more before it on its line, even if blank, nothing is a heading.
LINE_START = 80


class Marker(NamedTuple):
    """One mark found in a text; `exact` ones alone may open a final part or close a block.

    Attributes:
        kind: "open", "close" (a thinking block), "final", "final_close", "decision" (its line), "special"
            (`<|end|>` and the like), "token" (`<s>` and the like, which may be HTML).
        name: the block's name: "think-task", "seed" or "english" for a heading or a decision, "final".
        length: characters from the first of the mark to the end of what belongs to it.
    """

    kind: str
    name: str
    exact: bool
    length: int


class More:
    """The window ends before it is clear whether a mark is there."""


MORE = More()


def slips(a: str, b: str) -> int:
    """Count the slips between two words: letters left out, put in, replaced, swapped with the next."""
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, before, row = before, row, [i]
        for j, y in enumerate(b, 1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                cost = min(cost, above[j - 2] + 1)
            row.append(cost)
    return row[-1]
