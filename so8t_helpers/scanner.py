"""The one scanner for think formats: parsing (what is scored) and redaction (what is sent) both run it.

It works on a stream, in linear time, holds back no more than `markers.WINDOW` characters, and what it says
never depends on how the stream was cut.

Every thinking block that was opened must be closed by its own name before a final part can begin. A mark
inside a final part, of whatever kind, ends it, and after a final part nothing counts any more.
"""

from __future__ import annotations

from so8t_helpers.markers import CANDIDATE, WINDOW, Marker, More, find_marker

_DECORATION = frozenset(" \t\r\u3000#*_>-・【「")


class Scanner:
    """Cut a stream into (part, text) pieces.

    Parts: "final", a thinking block's name ("seed", "think-task", …) and "outside". A mark's own text belongs
    to no part.

    Attributes:
        style: "seed" or "quadruple" by the first mark, None so far.
        marks: how many marks were met.
        state: "outside" (thinking included), "final" or "ended".
    """

    def __init__(self) -> None:
        self.style: str | None = None
        self.marks = 0
        self.state = "outside"
        self._held = ""
        self._open: list[str] = []
        self._line_blank = True
        self._line_decorated = True

    def feed(self, chunk: str) -> list[tuple[str, str]]:
        """Take the next characters; return what they settle."""
        return self._scan(chunk, at_end=False)

    def close(self) -> list[tuple[str, str]]:
        """Settle what was held back: no more text will come."""
        return self._scan("", at_end=True)

    def _scan(self, chunk: str, at_end: bool) -> list[tuple[str, str]]:
        if self.state == "ended":
            return []
        text = self._held + chunk if self._held else chunk
        pieces: list[tuple[str, str]] = []
        self._held = ""
        taken = 0  # text[:taken] is settled; text[taken:found.start()] holds no mark
        found = CANDIDATE.search(text)
        while found:
            start = found.start()
            if start > taken:
                self._take(text[taken:start], pieces)
                taken = start
            window = text[start : start + WINDOW]
            marker = find_marker(window, at_end, self._line_blank, self._line_decorated)
            if isinstance(marker, More):
                self._held = text[start:]
                return pieces
            if marker is not None:
                self._apply(marker)
                if self.state == "ended":
                    return pieces
                taken = start + marker.length
                self._follow_line(text[start:taken])
            found = CANDIDATE.search(text, max(taken, start + 1))
        if taken < len(text):
            self._take(text[taken:], pieces)
        return pieces

    def _take(self, text: str, pieces: list[tuple[str, str]]) -> None:
        part = self._open[-1] if self._open and self.state == "outside" else self.state
        pieces.append((part, text))
        self._follow_line(text)

    def _follow_line(self, text: str) -> None:
        """Keep track of what stands on the current line, since a heading counts at a line's start only."""
        _, newline, tail = text.rpartition("\n")
        if newline or self._line_decorated:
            self._line_blank = (bool(newline) or self._line_blank) and not tail.strip()
            self._line_decorated = (bool(newline) or self._line_decorated) and _DECORATION.issuperset(tail)

    def _apply(self, marker: Marker) -> None:
        self.marks += 1
        kind, name = marker.kind, marker.name
        if self.style is None and kind != "special":
            self.style = "seed" if name == "seed" else "quadruple"
        if self.state == "final" or kind == "special":
            self.state = "ended"
        elif kind == "open":
            self._open.append(name)
        elif kind == "close" and marker.exact and name in self._open:
            del self._open[len(self._open) - 1 - self._open[::-1].index(name)]
        elif kind == "final" and marker.exact and all(block == name for block in self._open):
            # Only the seed format's final heading closes a block, its own: the others must be closed before.
            self._open = []
            self.state = "final"


def contains_markers(text: str) -> bool:
    """Say whether `text` holds anything that the scanner would take for a mark, exact or not."""
    scanner = Scanner()
    scanner.feed(text)
    scanner.close()
    return scanner.marks > 0
