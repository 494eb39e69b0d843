"""The one scanner for think formats: parsing (what is scored) and redaction (what is sent) both run it.

It works on a stream, in linear time, holds back no more than `markers.WINDOW` characters, and what it says
never depends on how the stream was cut.

Every thinking block that was opened must be closed by its own name before a final part can begin. A mark
inside a final part, of whatever kind, ends it, and after a final part nothing counts any more.
"""

from __future__ import annotations

from so8t_helpers.markers import CANDIDATE, LINE_START, WINDOW, Marker, More, find_marker

_GLANCE = 16


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
        self._line = ""  # what is settled of the current line; its first `LINE_START` characters count

    def feed(self, chunk: str) -> list[tuple[str, str]]:
        """Take the next characters; return what they settle."""
        return self._scan(chunk, at_end=False)

    def close(self) -> list[tuple[str, str]]:
        """Settle what was held back: no more text will come."""
        return self._scan("", at_end=True)

    def _scan(self, chunk: str, at_end: bool) -> list[tuple[str, str]]:
        if self.state == "ended":
            return []
        text = self._held + chunk
        pieces: list[tuple[str, str]] = []
        self._held = ""
        taken = 0  # text[:taken] is settled; text[taken:found.start()] holds no mark
        found = CANDIDATE.search(text)
        while found:
            start = found.start()
            if start > taken:
                self._take(text[taken:start], pieces)
                taken = start
            marker = self._marker(text, start, at_end)
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

    def _marker(self, text: str, start: int, at_end: bool) -> Marker | More | None:
        """Decide on few characters where that is enough: most candidates are none, or are short."""
        if start + _GLANCE < len(text):
            marker = find_marker(text[start : start + _GLANCE], False, self._line)
            if not isinstance(marker, More):
                return marker
        return find_marker(text[start : start + WINDOW], at_end, self._line)

    def _take(self, text: str, pieces: list[tuple[str, str]]) -> None:
        pieces.append((self._open[-1] if self._open and self.state == "outside" else self.state, text))
        self._follow_line(text)

    def _follow_line(self, text: str) -> None:
        newline = text.rfind("\n")
        if newline >= 0:
            self._line = text[newline + 1 :]
        elif len(self._line) < LINE_START:
            self._line += text

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
    if CANDIDATE.search(text) is None:
        return False
    scanner = Scanner()
    scanner.feed(text)
    scanner.close()
    return scanner.marks > 0
