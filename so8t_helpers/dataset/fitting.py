"""A sample rendered in the chat template, within the sequence length."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from so8t_helpers import chat_format
from so8t_helpers.chat_format import ThinkText
from so8t_helpers.dataset import thinking
from so8t_helpers.dataset.lengths import TokenLengths
from so8t_helpers.dataset.records import Record, RejectedError
from so8t_helpers.settings import DatasetSettings


@dataclass(slots=True)
class Fitted:
    """A rendered sample. `tokens` is 0 where they were not counted: surely within the limit."""

    parts: ThinkText
    messages: list[dict[str, str]]
    text: str
    tokens: int


class Fitter:
    """Renders samples, and cuts the thinking of those that are too long.

    Args:
        settings: the profile's dataset section.
        tokenizer: the base's tokenizer.json.
        limit: longest sample in tokens.
        length_share: share of samples whose tokens are counted even where that cannot decide.
    """

    def __init__(self, settings: DatasetSettings, tokenizer: Path, limit: int, length_share: float):
        self.settings, self.limit, self.length_share = settings, limit, length_share
        self.lengths = TokenLengths(tokenizer)

    def fit(self, record: Record, parts: ThinkText, unthinking: bool, draw: int, clean: bool) -> Fitted:
        """Render the sample within the limit, its thinking cut if it must be and may be.

        Args:
            record: as policy leaves it.
            parts: its thinking and answer.
            unthinking: render without the thinking, as a plain turn.
            draw: the question's 64 bits, which decide whether its tokens are counted at any rate.
            clean: the parts hold nothing that could begin a mark.

        Raises:
            RejectedError: too long even so, or a mark came about where two parts were joined.
        """
        limit = self.limit
        whole = self._render(record, parts, unthinking, clean)
        counted = (draw >> 1) % 10_000 < self.length_share * 10_000
        if counted or not self.lengths.surely_within(whole.text, limit):
            whole.tokens = self.lengths.count(whole.text, limit)
        if whole.tokens <= limit:
            return whole
        if self.settings.overlong == "cut" and not unthinking:
            shorter = thinking.cut(
                parts,
                lambda p: self.lengths.count(self._render(record, p, False).text, limit) <= limit,
                record.label,
            )
            if shorter is not None:
                fitted = self._render(record, shorter, False)
                fitted.tokens = self.lengths.count(fitted.text, limit)
                return fitted
        raise RejectedError("too_long", f"{whole.tokens} tokens or more, the limit is {limit}")

    def _render(self, record: Record, parts: ThinkText, unthinking: bool, clean: bool = False) -> Fitted:
        """Return the sample's messages and text; `clean` parts hold nothing that could begin a mark."""
        system = record.system or self.settings.system_prompt
        command = "" if unthinking else self.settings.think_command
        try:
            if unthinking:
                answer = parts.final
            else:
                answer = chat_format.join(parts) if clean else chat_format.build(parts)
        except ValueError as error:  # a mark that only came about where two parts were joined
            raise RejectedError("format_markers", str(error)) from None
        messages = [{"role": "system", "content": system}] if system else []
        messages += [
            {"role": "user", "content": chat_format.user_turn(record.question, command)},
            {"role": "assistant", "content": answer},
        ]
        return Fitted(parts, messages, chat_format.render(messages), 0)
