"""The four labels as people write them: any case, numbers, Japanese; anything else is unknown."""

from __future__ import annotations

import unicodedata
from typing import Any

from so8t_helpers.chat_format import LABELS

_SPELLINGS = {
    "ALLOW": "allow allowed permit permitted safe ok accept 許可 許容 可 安全 承認",
    "ESCALATION": "escalation escalate escalated エスカレーション エスカレート 要確認 上申 引き継ぎ 保留",
    "DENY": "deny denied disallow disallowed forbid forbidden block blocked 不許可 禁止 否認 却下 否",
    "REFUSE": "refuse refused refusal reject rejected 拒否 拒絶 お断り 断る",
}
# Numbers follow the order in which the seed names the labels.
KNOWN: dict[str, str] = {
    word: label for label, words in _SPELLINGS.items() for word in (*words.split(), label.lower())
} | {str(number): label for number, label in enumerate(LABELS)}


def parse_label(value: Any) -> str | None:
    """Return the label that `value` spells, or None where it spells none; 0 to 3 follow `LABELS`."""
    if isinstance(value, str):
        if value in LABELS:
            return value
        return KNOWN.get(unicodedata.normalize("NFKC", value).strip().strip("[]「」<>").lower())
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return KNOWN.get(str(value))
    return None
