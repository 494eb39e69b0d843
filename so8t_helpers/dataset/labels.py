"""The four labels in their spellings."""

from __future__ import annotations

import unicodedata
from typing import Any

from so8t_helpers.thinking.format import LABELS

_SPELLINGS = {
    "ALLOW": "allow allowed permit permitted safe ok accept 許可 許容 可 安全 承認",
    "ESCALATION": "escalation escalate escalated エスカレーション エスカレート 要確認 上申 引き継ぎ 保留",
    "DENY": "deny denied disallow disallowed forbid forbidden block blocked 不許可 禁止 否認 却下 否",
    "REFUSE": "refuse refused refusal reject rejected 拒否 拒絶 お断り 断る",
}
KNOWN: dict[str, str] = {
    word: label for label, words in _SPELLINGS.items() for word in (*words.split(), label.lower())
}
_EXAMPLE = ", ".join(f"{number}: {label}" for number, label in enumerate(LABELS))
# A number may mean anything: only who gives the file can say what.
NUMBERS = f"say what it means in its entry of dataset.inputs, such as `labels: {{{_EXAMPLE}}}`"


def parse_label(value: Any) -> str | None:
    """Return the label that `value` spells, or None where it spells none, as a number never does."""
    if not isinstance(value, str):
        return None
    if value in LABELS:
        return value
    return KNOWN.get(unicodedata.normalize("NFKC", value).strip().strip("[]「」<>").lower())
