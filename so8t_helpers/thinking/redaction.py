"""What may leave: text of a final part, or one fixed refusal, and nothing else."""

from __future__ import annotations

from so8t_helpers.thinking.format import rejoin
from so8t_helpers.thinking.scanner import Scanner, contains_markers

REFUSAL_TEXT = "申し訳ありません。安全な形で回答をお返しできませんでした。"


class Shared:
    """How much of a text stands in `source` too, word for word; the text may come in pieces.

    Python's own search is asked at most twice a character, so the cost grows with the product of both lengths
    at the speed of that search: 6 ms for 2,000 characters against 4,000 (33 for the worst of periodic texts),
    130 ms for 10,000 against 20,000 (860).

    Attributes:
        longest: characters of the longest such piece so far.
        last: the piece that the text so far ends with.
    """

    def __init__(self, source: str) -> None:
        self._source = source
        self.longest, self.last = 0, ""

    def feed(self, text: str) -> None:
        """Take the next characters."""
        for character in text:
            self.last += character
            while self.last not in self._source:
                self.last = self.last[1:]
            self.longest = max(self.longest, len(self.last))


def longest_shared(thinking: str, final: str) -> int:
    """Return the length of the longest text, in characters, that both hold word for word."""
    shared = Shared(thinking)
    shared.feed(final)
    return shared.longest


class StreamingFinal:
    """Release the final part of a stream while it comes in; every chunking releases the same text.

    Args:
        style: the format of the engine's template; counts only where the engine parts thinking by itself.
        most_shared: characters that the final part may repeat word for word of the thinking; one more ends
            it, and nothing of the repetition leaves. So what it repeats so far is held back. None allows any.
    """

    def __init__(self, style: str = "seed", most_shared: int | None = None) -> None:
        self._style, self._most_shared = style, most_shared
        self._private: list[str] = []
        self._shared: Shared | None = None
        self._repeating = ""  # what is held back since it stands in the thinking too
        self._repeated = False
        self._scanner = Scanner()
        self._spaces: list[str] = []
        self._begun = False
        self._raw_text = False
        self._thinking: list[str] = []
        self._content: list[str] = []

    @property
    def ended(self) -> bool:
        """True when nothing can be released any more: the generation may stop."""
        return self._scanner.state == "ended" or self._repeated

    @property
    def cut(self) -> bool:
        """True where something that might be a mark, or a repetition, ended the final part before its end."""
        return self._scanner.cut or self._repeated

    def feed(self, chunk: str, thinking: str = "") -> str:
        """Take the next characters, with the engine's own `thinking` field; return what may leave now.

        Once the engine has parted something by itself, nothing leaves before the end: whether its parting
        holds is known only then (see `final_of_separated`).
        """
        if thinking:
            self._thinking.append(thinking)
        if self._thinking:
            self._content.append(chunk)
            return ""
        self._raw_text = self._raw_text or bool(chunk.strip())
        return self._release(self._scanner.feed(chunk))

    def close(self) -> str:
        """Return what was held back, or `REFUSAL_TEXT` where there was no final part at all."""
        if self._thinking and not self._begun:
            parted = "".join(self._thinking), "".join(self._content)
            final = REFUSAL_TEXT if self._raw_text else final_of_separated(*parted, self._style)
            limit = self._most_shared
            repeats = limit is not None and longest_shared(parted[0], final) > limit
            return REFUSAL_TEXT if repeats else final
        rest = self._release(self._scanner.close(), at_end=True)
        return rest if self._begun else REFUSAL_TEXT

    def _unrepeated(self, pieces: list[tuple[str, str]], limit: int, at_end: bool) -> str:
        """Return what of the final pieces, and of what was held back, repeats no more than `limit`."""
        self._private += [piece for part, piece in pieces if part != "final"]
        found: list[str] = []
        for text in (piece for part, piece in pieces if part == "final" and not self._repeated):
            self._shared = self._shared or Shared("".join(self._private))
            for character in text:
                self._shared.feed(character)
                self._repeating += character
                kept = len(self._shared.last)
                if kept > limit:
                    self._repeated, self._repeating = True, ""
                    break
                found.append(self._repeating[: len(self._repeating) - kept])
                self._repeating = self._repeating[len(self._repeating) - kept :]
        if at_end:
            found.append(self._repeating)
        return "".join(found)

    def _release(self, pieces: list[tuple[str, str]], at_end: bool = False) -> str:
        """Join the final pieces; white space at the end waits until more text follows it."""
        if self._most_shared is not None:
            text = self._unrepeated(pieces, self._most_shared, at_end)
        else:
            text = "".join([piece for part, piece in pieces if part == "final"]) if pieces else ""
        if not text:
            return ""
        kept = text.rstrip()
        if not kept:
            if self._begun:
                self._spaces.append(text)
            return ""
        released = "".join([*self._spaces, kept]) if self._begun else kept.lstrip()
        self._spaces = [text[len(kept) :]]
        self._begun = True
        return released


def final_only(text: str) -> str:
    """Return the final part of a model's raw text, or `REFUSAL_TEXT`."""
    stream = StreamingFinal()
    return stream.feed(text) + stream.close()


def final_of_separated(thinking: str, content: str, style: str) -> str:
    """Return the final part where the engine itself parted thinking from content (Ollama, `think: true`).

    The engine's parting is not trusted: its content must hold no further mark, and put together again with
    its thinking, in the format `style` of the engine's template, it must be the final part, word for word: a
    final mark inside the thinking would open one there. Without any thinking the engine saw no opening mark,
    and the content counts as raw text.
    """
    if not thinking.strip():
        return final_only(content)
    content = content.strip().removesuffix("</final>").strip()
    if contains_markers(content, style) or final_only(rejoin(thinking, content, style)) != content:
        return REFUSAL_TEXT
    return content
