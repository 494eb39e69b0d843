"""What may leave: text of a final part, or one fixed refusal, and nothing else."""

from __future__ import annotations

from so8t_helpers.thinking.format import rejoin
from so8t_helpers.thinking.scanner import Scanner, contains_markers

REFUSAL_TEXT = "申し訳ありません。安全な形で回答をお返しできませんでした。"


class StreamingFinal:
    """Release the final part of a stream while it comes in; every chunking releases the same text.

    Args:
        style: the format of the engine's template; counts only where the engine parts thinking by itself.
    """

    def __init__(self, style: str = "seed") -> None:
        self._style = style
        self._scanner = Scanner()
        self._spaces: list[str] = []
        self._begun = False
        self._raw_text = False
        self._thinking: list[str] = []
        self._content: list[str] = []

    @property
    def ended(self) -> bool:
        """True when nothing can be released any more: the generation may stop."""
        return self._scanner.state == "ended"

    @property
    def cut(self) -> bool:
        """True where something that might be a mark, and no end of its own, ended the final part."""
        return self._scanner.cut

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
            return REFUSAL_TEXT if self._raw_text else final_of_separated(*parted, self._style)
        rest = self._release(self._scanner.close())
        return rest if self._begun else REFUSAL_TEXT

    def _release(self, pieces: list[tuple[str, str]]) -> str:
        """Join the final pieces; white space at the end waits until more text follows it."""
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
