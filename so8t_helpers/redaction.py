"""What may leave: text of a final part, or one fixed refusal, and nothing else.

Three ways in, by what the engine hands over: the raw text (stream or whole), an answer that the engine itself
parted into thinking and content, and an answer that was asked for without thinking.
"""

from __future__ import annotations

from so8t_helpers.chat_format import contains_markers, rejoin
from so8t_helpers.markers import Scanner

REFUSAL_TEXT = "申し訳ありません。安全な形で回答をお返しできませんでした。"


class StreamingFinal:
    """Release the final part of a raw stream while it comes in; every chunking releases the same text."""

    def __init__(self) -> None:
        self._scanner = Scanner()
        self._space = ""
        self._begun = False

    @property
    def released(self) -> bool:
        """True once some text of a final part was released."""
        return self._begun

    def feed(self, chunk: str) -> str:
        """Take the next characters of the model's text; return what may leave now."""
        return self._release(self._scanner.feed(chunk))

    def close(self) -> str:
        """Return what was held back, or `REFUSAL_TEXT` where there was no final part at all."""
        rest = self._release(self._scanner.close())
        return rest if self._begun else REFUSAL_TEXT

    def _release(self, pieces: list[tuple[str, str]]) -> str:
        """Join the final pieces; white space at the end waits until more text follows it."""
        text = self._space + "".join(piece for part, piece in pieces if part == "final")
        if not self._begun:
            text = text.lstrip()
        kept = text.rstrip()
        self._space = text[len(kept) :]
        self._begun = self._begun or bool(kept)
        return kept


def final_only(text: str) -> str:
    """Return the final part of a model's raw text, or `REFUSAL_TEXT`."""
    stream = StreamingFinal()
    return stream.feed(text) + stream.close()


def final_of_separated(thinking: str, content: str, style: str = "seed") -> str:
    """Return the final part where the engine itself parted thinking from content (Ollama, `think: true`).

    The engine's parting is not trusted: the text is put together again and must hold no further mark in its
    content, and closed blocks in its thinking. Without any thinking the engine saw no opening mark, and the
    content counts as raw text. `style` is the format of the engine's template.
    """
    if not thinking.strip():
        return final_only(content)
    if contains_markers(content.strip().removesuffix("</final>")):
        return REFUSAL_TEXT
    return final_only(rejoin(thinking, content.strip().removesuffix("</final>"), style))


def plain_only(content: str) -> str:
    """Return an answer that was asked for without thinking: whole if it holds no mark, else its final."""
    return final_only(content) if contains_markers(content) else content.strip() or REFUSAL_TEXT
