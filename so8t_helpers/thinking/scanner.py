"""The one scanner for think formats: parsing (what is scored) and redaction (what is sent) both run it.

It works on a stream, in linear time, holds back no more than `markers.WINDOW` characters, and what it says
never depends on how the stream was cut.

A final part begins directly after the decision and nowhere else, white space between them aside:

- a final heading after the line of the decision in its own style (`判定: ALLOW`, `Decision: ALLOW`; a whole
  line, in any case and width, with or without a full stop), while no thinking but its own is open;
- `<final>` after a `</think-policy>` that closed an open `<think-policy>`, while no thinking is open.

So a thinking that quotes a final mark, on a line of its own or not, opens nothing: it would have to quote the
decision before it as well. What is refused because of it: an answer whose thinking states no decision, states
it elsewhere than at its end or with signs around it (`**判定**: ALLOW`), and an answer without thinking.

A mark inside a final part, of whatever kind, ends it, and after a final part nothing counts any more. The
decision's line is a mark too: it belongs to the thinking, and in a final part it ends that, exact or not.
"""

from __future__ import annotations

from collections.abc import Collection

from so8t_helpers.thinking.folding import fold
from so8t_helpers.thinking.markers import CANDIDATE, find_marker
from so8t_helpers.thinking.spelling import FINAL_TAG, LABELS, LINE_START, THINK_TAGS, WINDOW, Marker, More

_GLANCE = 16
# Only headings and decisions mind what stands before them on their line.
_HEADING_STARTS = frozenset("#＃﹟思判Dd")


class Scanner:
    """Cut a stream into (part, text) pieces.

    Parts: "final", a thinking block's name ("seed", "think-task", …) and "outside". A mark's own text belongs
    to no part.

    Attributes:
        style: "seed", "quadruple" or "english" by the first mark, None so far. The English headings are marks
            in a text of that style alone.
        state: "outside" (thinking included), "final" or "ended".
        cut: a mark that is neither its closing one nor a control token ended the final part.
        kinds: of the marks so far, see `Marker`.
        decision: the label in the line that a final part under a heading was opened by, else None.
    """

    def __init__(self, style: str | None = None) -> None:
        self.style = style
        self.kinds: set[str] = set()
        self.decision: str | None = None
        self.state = "outside"
        self.cut = False
        self._held = ""
        self._open: list[str] = []
        self._stated: str | None = None  # the label in the last exact line of a decision
        self._ready = ""  # the name of the final mark that may stand here
        # The current line: what earlier chunks hold of it (the first `LINE_START` characters count), and
        # where it goes on in this one. A closing mark begins a line too.
        self._line = ""
        self._line_from = 0

    def feed(self, chunk: str) -> list[tuple[str, str]]:
        """Take the next characters; return what they settle."""
        if self._held or CANDIDATE.search(chunk) or self.state == "ended" or not chunk:
            return self._scan(chunk, at_end=False)
        if self._ready and not chunk.isspace():
            self._ready = ""
        # Most chunks hold nothing that even looks like a mark: the short way to what `_scan` would do.
        last = _last_line(chunk)
        if len(last) < len(chunk):
            self._line = last
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
            self._apply(marker, start)
            if self.state == "ended":
                return pieces
            taken = start + marker.length
            if marker.kind == "decision":
                pieces.append((self._part(), text[start:taken]))
                if marker.exact:
                    stated = fold(text[start:taken]).upper()
                    self._stated = next(label for label in LABELS if label in stated)
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
        if self._ready and not text.isspace():
            self._ready = ""
        pieces.append((self._part(), text))

    def _part(self) -> str:
        return self._open[-1] if self._open and self.state == "outside" else self.state

    def _line_before(self, text: str, end: int) -> str:
        """What stands on the line before `text[end]`; of a long one, `LINE_START` characters or more."""
        start = max(self._line_from, end - LINE_START)
        last = _last_line(text[start:end])
        if len(last) < end - start:
            return last
        return last if start > self._line_from else self._line + last

    def _apply(self, marker: Marker, start: int) -> None:
        self.kinds.add(marker.kind)
        kind, name = marker.kind, marker.name
        ready, self._ready = self._ready, ""
        if self.style is None and kind not in {"special", "token", "decision"}:
            self.style = name if name in {"seed", "english"} else "quadruple"
        if self.state == "final" or kind in {"special", "token"}:
            closed = kind in {"special", "token"} or (kind == "final_close" and marker.exact)
            self.cut = self.state == "final" and not closed
            self.state = "ended"
        elif kind == "open":
            self._open.append(name)
        elif kind == "close" and marker.exact:
            self._close(name, start + marker.length)
        elif kind == "decision" and marker.exact:
            self._ready = name
        elif kind == "final" and marker.exact and ready == name and self._is_all(name):
            self._open = []
            self.state = "final"
            self.decision = None if name == FINAL_TAG else self._stated

    def _close(self, name: str, end: int) -> None:
        if name in self._open:
            del self._open[len(self._open) - 1 - self._open[::-1].index(name)]
            self._ready = FINAL_TAG if name == THINK_TAGS[-1] else ""
        self._line, self._line_from = "", end

    def _is_all(self, name: str) -> bool:
        """Say whether no thinking is open but the one that a final mark of this name closes."""
        return not self._open if name == FINAL_TAG else set(self._open) == {name}


def _last_line(text: str) -> str:
    """Return what stands after the last end of a line, of whatever kind."""
    return f"{text}|".splitlines()[-1][:-1]


def contains_markers(text: str, style: str | None = None, besides: Collection[str] = ()) -> bool:
    """Say whether `text` holds anything that the scanner would take for a mark in a text of `style`.

    Exact or not; the English headings count for "english" alone. Marks of the kinds in `besides` may be
    there: the decision in a thinking.
    """
    if CANDIDATE.search(text) is None:
        return False
    scanner = Scanner(style or "seed")
    scanner.feed(text)
    scanner.close()
    return not scanner.kinds <= set(besides)
