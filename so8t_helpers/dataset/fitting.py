"""A sample rendered in the chat template, within the sequence length."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path

import numpy as np

from so8t_helpers.dataset.quarantine import RejectedError
from so8t_helpers.dataset.records import Record
from so8t_helpers.dataset.thinking import cut
from so8t_helpers.phi3.chat import Dialect, user_turn
from so8t_helpers.phi3.tokenizer_files import is_byte_level, read_tokenizer
from so8t_helpers.run.files import read_json
from so8t_helpers.settings import DatasetSettings
from so8t_helpers.thinking.format import ThinkText, build, join


@dataclass(slots=True)
class Fitted:
    """A rendered sample."""

    parts: ThinkText
    messages: list[dict[str, str]]
    text: str
    tokens: int  # 0 where they were not counted: surely within the limit


class Fitter:
    """Renders samples, and cuts the thinking of those that are too long; the arguments are `Plan`'s."""

    def __init__(
        self, settings: DatasetSettings, dialect: Dialect, tokenizer: Path, limit: int, length_share: float
    ):
        self.dialect, self.settings, self.limit, self.length_share = dialect, settings, limit, length_share
        self.lengths = TokenLengths(tokenizer)

    def fit(self, record: Record, parts: ThinkText, without_thinking: bool, draw: int, clean: bool) -> Fitted:
        """Render the sample within the limit, its thinking cut if it must be and may be.

        `draw`, the question's 64 bits, decides whether its tokens are counted at any rate; `clean` says that
        the parts hold nothing that could begin a mark.

        Raises:
            RejectedError: too long even so, or a mark came about where two parts were joined.
        """
        always = (draw >> 1) % 10_000 < self.length_share * 10_000
        whole = self._render(record, parts, without_thinking, clean, always)
        if whole.tokens <= self.limit:
            return whole
        if self.settings.overlong == "cut" and not without_thinking:
            fitted = partial(self._render, record, without_thinking=False, clean=False, always=True)
            shorter = cut(parts, lambda some: fitted(some).tokens <= self.limit, record.label)
            if shorter is not None:
                return fitted(shorter)
        raise RejectedError("too_long", f"{whole.tokens} tokens or more, the limit is {self.limit}")

    def _render(
        self, record: Record, parts: ThinkText, without_thinking: bool, clean: bool, always: bool
    ) -> Fitted:
        """Render the sample, and count its tokens where they may be too many, or `always`."""
        system = record.system or self.settings.system_prompt or ""
        if system and not self.dialect.takes_system:
            raise RejectedError("no_system_turn", "the base's chat template has no place for system words")
        command, answer = "", parts.final
        try:
            if not without_thinking:
                command, answer = self.settings.think_command, join(parts) if clean else build(parts)
        except ValueError as error:  # a mark that only came about where two parts were joined
            raise RejectedError("format_markers", str(error)) from None
        turns = [*record.history, user_turn(record.question, command), answer]
        messages = [{"role": "system", "content": system}] if system else []
        messages += [
            {"role": role, "content": said}
            for role, said in zip(cycle(("user", "assistant")), turns, strict=False)
        ]
        text = self.dialect.render(messages)
        count = always or not self.lengths.surely_within(text, self.limit)
        return Fitted(parts, messages, text, self.lengths.count(text, self.limit) if count else 0)


# The template's marks, and the space that SentencePiece puts before a text.
_EXTRA_TOKENS = 16


class TokenLengths:
    """Counts tokens as AutoTokenizer would, without its imports.

    A BPE tokenizer begins with single characters and only ever merges: a text has at most as many tokens as
    its characters have alone. That bound costs a hundredth of counting.
    """

    def __init__(self, path: Path):
        self._tokenizer = read_tokenizer(path)
        self._longest = max(map(len, self._tokenizer.get_vocab(with_added_tokens=True)))
        self._costs = _character_costs(path)

    def count(self, text: str, limit: int) -> int:
        """Return the number of tokens of a rendered text; of one far over `limit`, a lower bound."""
        at_least = len(text) // self._longest
        if at_least > limit:
            return at_least
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def surely_within(self, text: str, limit: int) -> bool:
        """Say, without counting, whether a text has at most `limit` tokens; False means: count."""
        if self._costs is None:
            return False
        if 4 * len(text) + _EXTRA_TOKENS <= limit:
            return True
        points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        return int(self._costs[points].sum(dtype=np.int64)) + _EXTRA_TOKENS <= limit


def _character_costs(path: Path) -> np.ndarray | None:
    """Return the most tokens by code point, (0x110000,) uint8; None where nothing is known of the tokenizer.

    SentencePiece's BPE with byte fallback begins with the characters of its vocabulary: 1 for these, the
    UTF-8 bytes of all others. Byte-level BPE begins with bytes, and a character that is a token is not sure
    to become one, its first byte may be merged with what stands before it: bytes for all, unless the
    tokenizer changes the text first.
    """
    fast = read_json(path)
    model, byte_level = fast["model"], is_byte_level(fast)
    spaced = '"add_prefix_space": true' in json.dumps(fast.get("pre_tokenizer"))
    plain = byte_level and not fast.get("normalizer") and not spaced
    if not plain and (model.get("type") != "BPE" or not model.get("byte_fallback")):
        return None
    costs = np.full(0x110000, 4, dtype=np.uint8)
    costs[:0x10000], costs[:0x800], costs[:0x80] = 3, 2, 1
    if not byte_level:
        costs[[ord(piece) for piece in model["vocab"] if len(piece) == 1]] = 1
    return costs
