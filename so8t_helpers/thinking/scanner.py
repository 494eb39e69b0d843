"""The one scanner for think formats: parsing (what is scored) and redaction (what is sent) both run it.

It works on a stream, in linear time, holds back no more than `markers.WINDOW` characters, and what it says
never depends on how the stream was cut.

A final part begins where the thinking is over and nowhere else: every block that was opened has been closed
by its own name, some block has been closed unless nothing at all stands before, and only white space stands
before the final mark on its line (or since the last closing mark). A thinking that was never opened and
speaks of `<final>` in passing therefore opens nothing. A final heading closes the thinking of its own format
alone, so where formats are mixed in one thinking no final part begins. A mark inside a final part, of
whatever kind, ends it, and after a final part nothing counts any more.
"""

from __future__ import annotations

from so8t_helpers.thinking.markers import CANDIDATE, find_marker
from so8t_helpers.thinking.spelling import LINE_START, WINDOW, Marker, More

_GLANCE = 16
# Only headings mind what stands before them on their line.
_HEADING_STARTS = frozenset("#＃﹟思")


class Scanner:
    """Cut a stream into (part, text) pieces.

    Parts: "final", a thinking block's name ("seed", "think-task", …) and "outside". A mark's own text belongs
    to no part.

    Attributes:
        style: "seed", "quadruple" or "english" by the first mark, None so far. The English headings are marks
            in a text of that style alone.
        state: "outside" (thinking included), "final" or "ended".
        cut: a mark that is neither its closing one nor a control token ended the final part.
    """

    def __init__(self, style: str | None = None) -> None:
        self.style = style
        self.marks = 0
        self.state = "outside"
        self.cut = False
        self._held = ""
        self._open: list[str] = []
        self._nothing_yet = True  # white space aside
        self._closed_one = False
        # The current line: what earlier chunks hold of it (the first `LINE_START` characters count), and
        # where it goes on in this one. A closing mark begins a line too.
        self._line = ""
        self._line_from = 0

    def feed(self, chunk: str) -> list[tuple[str, str]]:
        """Take the next characters; return what they settle."""
        if self._held or self._nothing_yet or CANDIDATE.search(chunk) or self.state == "ended" or not chunk:
            return self._scan(chunk, at_end=False)
        # Most chunks hold nothing that even looks like a mark: the short way to what `_scan` would do.
        newline = chunk.rfind("\n")
        if newline >= 0:
            self._line = chunk[newline + 1 :]
        elif len(self._line) < LINE_START:
            self._line += chunk
        return [(self._part(), chunk)]

    def close(self) -> list[tuple[str, str]]:
        """Settle what was held back: no more text will come."""
        return self._scan("", at_end=True)

    def _scan(self, chunk: str, at_end: bool) -> list[tuple[str, str]]:
        if self.state == "ended":
            return []
        text = self._held + chunk if self._held else chunk
        pieces: list[tuple[str, str]] = []
        self._held = ""
        taken, end = 0, len(text)  # text[:taken] is settled
        found = CANDIDATE.search(text)
        while found:
            start = found.start()
            marker = self._marker(text, start, at_end)
            if isinstance(marker, More):
                self._held, end = text[start:], start
                break
            if marker is None:
                found = CANDIDATE.search(text, start + 1)
                continue
            self._take(text[taken:start], pieces)
            self._apply(marker, text, start)
            if self.state == "ended":
                return pieces
            taken = start + marker.length
            found = CANDIDATE.search(text, taken)
        self._take(text[taken:end], pieces)
        self._line, self._line_from = self._line_before(text, end)[:LINE_START], 0
        return pieces

    def _marker(self, text: str, start: int, at_end: bool) -> Marker | More | None:
        """Decide on few characters where that is enough: most candidates are none, or are short."""
        line = self._line_before(text, start) if text[start] in _HEADING_STARTS else ""
        if start + _GLANCE < len(text):
            marker = find_marker(text[start : start + _GLANCE], False, line, self.style)
            if not isinstance(marker, More):
                return marker
        return find_marker(text[start : start + WINDOW], at_end, line, self.style)

    def _take(self, text: str, pieces: list[tuple[str, str]]) -> None:
        if not text:
            return
        if self._nothing_yet and not text.isspace():
            self._nothing_yet = False
        pieces.append((self._part(), text))

    def _part(self) -> str:
        return self._open[-1] if self._open and self.state == "outside" else self.state

    def _line_before(self, text: str, end: int) -> str:
        """What stands on the line before `text[end]`; of a long one, `LINE_START` characters or more."""
        start = max(self._line_from, end - LINE_START)
        newline = text.rfind("\n", start, end)
        if newline >= 0:
            return text[newline + 1 : end]
        return text[start:end] if start > self._line_from else self._line + text[start:end]

    def _apply(self, marker: Marker, text: str, start: int) -> None:
        self.marks += 1
        kind, name = marker.kind, marker.name
        if self.style is None and kind != "special":
            self.style = name if name in {"seed", "english"} else "quadruple"
        if self.state == "final" or kind == "special":
            closed = kind == "special" or (kind == "final_close" and marker.exact)
            self.cut = self.state == "final" and not closed
            self.state = "ended"
        elif kind == "open":
            self._open.append(name)
        elif kind == "close" and marker.exact:
            self._close(name, start + marker.length)
        elif kind == "final" and marker.exact and self._thinking_is_over(name, text, start):
            self._open = []
            self.state = "final"
        self._nothing_yet = False

    def _close(self, name: str, end: int) -> None:
        if name in self._open:
            del self._open[len(self._open) - 1 - self._open[::-1].index(name)]
        self._closed_one = True
        self._line, self._line_from = "", end

    def _thinking_is_over(self, name: str, text: str, start: int) -> bool:
        # Only a format's final heading closes a block, its own: the others must be closed before.
        if self._open:
            return all(block == name for block in self._open)
        line = self._line_before(text, start)
        alone = len(line) < LINE_START and not line.strip()
        return alone and (self._closed_one or self._nothing_yet)


def contains_markers(text: str, style: str | None = None) -> bool:
    """Say whether `text` holds anything that the scanner would take for a mark in a text of `style`.

    Exact or not; the English headings count for "english" alone.
    """
    if CANDIDATE.search(text) is None:
        return False
    scanner = Scanner(style or "seed")
    scanner.feed(text)
    scanner.close()
    return scanner.marks > 0
