"""The chat dialect of a base: what stands between the turns of a chat, and where writing stops.

`template` reads it from the base's own files; training, engines, Modelfile, service and GGUF ask it alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

ROLES = ("system", "user", "assistant")
EVERY_ANSWER = "every answer"  # what a sample says under `trained`, where not the last one alone is
BEGIN, ASK, END = "", "ask", "end"  # the two ends of a chat; ASK: the assistant is to answer


@dataclass(frozen=True)
class Dialect:
    """How one base writes a chat.

    Attributes:
        joints: what the template writes between the contents of two turns, by their roles; `BEGIN` before
            the first, `ASK` after the last where the assistant is to answer, else `END`.
        end: the control token that ends the assistant's turn.
        stops: control tokens at which writing stops, `end` first.
        controls: all tokens of the vocabulary that are no ordinary text; they are none in a turn's content.
        strips: whether white space around a turn's content is left out.
    """

    joints: Mapping[tuple[str, str], str]
    end: str
    stops: tuple[str, ...]
    controls: tuple[str, ...]
    strips: bool = False

    @property
    def takes_system(self) -> bool:
        """Whether the template has a place for a system turn; some leave it out in silence."""
        return (BEGIN, "system") in self.joints

    def render(self, messages: Iterable[Mapping[str, str]], add_generation_prompt: bool = False) -> str:
        """Return the text that the base's own chat template makes of the messages; an empty system turn is
        left out, and a control token in a content is made ordinary text (see `neutral`).

        Raises:
            ValueError: a role or an order of roles that the template does not know.
        """
        before, parts = BEGIN, []
        for message in messages:
            role, content = message["role"], message["content"]
            if role not in ROLES:
                raise ValueError(f"message role {role!r}: expected one of {', '.join(ROLES)}")
            if role != "system" or content:
                content = self.neutral(content.strip() if self.strips else content)
                parts += [self._joint(before, role), content]
                before = role
        parts.append(self._joint(before, ASK if add_generation_prompt else END))
        return "".join(parts)

    def prompt(self, messages: Iterable[Mapping[str, str]], think_command: str = "") -> str:
        """Render a chat as the prompt of its next answer, the think command before the last question."""
        turns = [dict(message) for message in messages]
        if turns and turns[-1]["role"] == "user":
            turns[-1]["content"] = user_turn(turns[-1]["content"], think_command)
        return self.render(turns, add_generation_prompt=True)

    def neutral(self, text: str) -> str:
        """Return a text with a space in each control token, so that it is read as ordinary text.

        A text that holds none stays as it is. White space that is a token of its own is ordinary text.
        """
        return self._controls.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)

    @cached_property
    def _controls(self) -> re.Pattern[str]:
        marks = (mark for mark in self.controls if len(mark) > 1 and not mark.isspace())
        return re.compile("|".join(map(re.escape, sorted(marks, key=len, reverse=True))) or "(?!)")

    def _joint(self, before: str, after: str) -> str:
        try:
            return self.joints[before, after]
        except KeyError:
            raise ValueError(
                f"this base's chat template has no {after!r} after {before or 'the beginning'!r}; a chat is "
                f"a system turn{'' if self.takes_system else ' (not for this base)'}, then user and assistant"
            ) from None


def user_turn(question: str, think_command: str) -> str:
    """Return the user's turn: the think command before the question, or the question alone."""
    return f"{think_command} {question}" if think_command else question
