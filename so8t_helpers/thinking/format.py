"""The think formats: build a text, take it apart.

Seed format: thinking under one heading, the answer under another. English format: the same in English, which
costs a vocabulary without Japanese a fifth of the tokens. Quadruple format: three thinking tags, then the
final tag. The label that the model decides on stands as the last line of the thinking (`判定: ALLOW`, in the
English format `Decision: ALLOW`), in the quadruple format at the end of `<think-policy>`. Only directly after
it does a final part begin (see `scanner`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from so8t_helpers.thinking.folding import fold
from so8t_helpers.thinking.headings import decision_line
from so8t_helpers.thinking.scanner import Scanner, contains_markers
from so8t_helpers.thinking.spelling import (
    DECISION_LINES,
    ENGLISH_FINAL,
    ENGLISH_THINKING,
    FINAL_TAG,
    LABELS,
    SEED_FINAL,
    SEED_THINKING,
    THINK_TAGS,
    Marker,
)

STYLES = ("seed", "quadruple", "english")
# The formats of two headings: over the thinking, over the final part.
HEADED = {"seed": (SEED_THINKING, SEED_FINAL), "english": (ENGLISH_THINKING, ENGLISH_FINAL)}

# What an engine that parts a text takes off before the thinking, before the content and after it.
PARTED = {
    **{style: (f"{thinking}\n", f"\n\n{final}\n", "") for style, (thinking, final) in HEADED.items()},
    "quadruple": (f"<{THINK_TAGS[0]}>", f"\n<{FINAL_TAG}>", f"</{FINAL_TAG}>"),
}

_WORDS = {style: fold(line.removesuffix(": ")) for style, line in DECISION_LINES.items()}
_DECISIONS = {
    style: re.compile(rf"^[^\w\n]*(?:{word})[^\w\n]*:[^\w\n]*([a-z]+)[^\w\n]*$", re.MULTILINE)
    for style, word in (_WORDS | {None: "|".join(set(_WORDS.values()))}).items()
}


@dataclass(slots=True)
class ThinkText:
    """An assistant's turn in parts: `thinking` is private under a heading, the rest the quadruple's."""

    style: str
    final: str
    thinking: str = ""
    task: str = ""
    safety: str = ""
    policy: str = ""


@dataclass(frozen=True)
class Parsed:
    """What a model's text holds.

    Attributes:
        style: one of `STYLES`, or None for a text without marks.
        thinking: all private text; for the quadruple format its parts joined by newlines.
        final: text of the final part, None where no final part began.
        well_formed: the text is exactly what `build` makes of these parts.
        decision: the label stated in the thinking, None where there is none.
    """

    style: str | None
    thinking: str
    final: str | None
    well_formed: bool
    decision: str | None
    task: str = ""
    safety: str = ""
    policy: str = ""


def build(text: ThinkText) -> str:
    """Return the assistant's turn as one text; `parse` gives the (stripped) parts back.

    Raises:
        ValueError: unknown style, an empty part, a mark inside one, a part of the other style, or a thinking
            under a heading that does not end with the line of its decision.
    """
    if text.style not in STYLES:
        raise ValueError(f"think style {text.style!r}: expected one of {', '.join(STYLES)}")
    headed = (("thinking", text.thinking),)
    quadruple = (("task", text.task), ("safety", text.safety), ("policy", text.policy))
    own, others = (headed, quadruple) if text.style in HEADED else (quadruple, headed)
    for name, part in others:
        if part:
            raise ValueError(f"{text.style} format: part {name!r} belongs to the other format")
    for name, part in (*own, ("final", text.final)):
        if not part or part.isspace():
            raise ValueError(f"{text.style} format: part {name!r} is empty")
        if contains_markers(part, text.style, () if name == "final" else ("decision",)):
            raise ValueError(f"{text.style} format: part {name!r} contains a mark of the think formats")
    if text.style in HEADED and not ends_decided(text.thinking, text.style):
        line = f"{DECISION_LINES[text.style]}LABEL"
        raise ValueError(f"{text.style} format: the thinking must end with its decision, a line {line!r}")
    return join(text)


def parse(text: str) -> Parsed:
    """Take a model's text apart with the scanner that redaction uses too."""
    scanner = Scanner()
    pieces = [*scanner.feed(text), *scanner.close()]
    parts: dict[str, str] = {}
    before = ""
    for part, piece in pieces:
        # What comes back to a part begins a line of its own there: a decision is told by its line.
        apart = "\n" if part in parts and part != before else ""
        parts[part] = parts.get(part, "") + apart + piece
        before = part
    final = parts.pop("final").strip() if "final" in parts else None
    parts.pop("outside", None)
    private = {name: piece.strip() for name, piece in parts.items()}
    thinking = "\n".join(piece for piece in private.values() if piece)
    task, safety, policy = (private.get(tag, "") for tag in THINK_TAGS)
    answer = final or ""
    if scanner.style in HEADED:
        filled, again = bool(thinking), ThinkText(scanner.style, answer, thinking)
    else:
        filled, again = all((task, safety, policy)), ThinkText("quadruple", answer, "", task, safety, policy)
    well_formed = filled and bool(answer) and join(again) == text.strip()
    decision = scanner.decision or decision_of(policy, scanner.style) or decision_of(thinking, scanner.style)
    return Parsed(scanner.style, thinking, final, well_formed, decision, task, safety, policy)


def decision_of(thinking: str, style: str | None = None) -> str | None:
    """Return the label that a thinking part states in the last line of a decision, None where it states none.

    The line is that of `style` (`判定:`, `Decision:`); of any, where no style is given.
    """
    # Folding a whole text costs much: no other character folds to 判, and English counts as one writes it.
    if not ("判" in thinking or "ecision" in thinking or "ECISION" in thinking):
        return None
    stated = _DECISIONS[style].findall(fold(thinking))
    label = stated[-1].upper() if stated else None
    return label if label in LABELS else None


def ends_decided(thinking: str, style: str) -> bool:
    """Say whether the last line of a thinking states a decision in the form that `style` has for it."""
    last = thinking.rstrip().rpartition("\n")[2]
    found = decision_line(fold(last), True, "") if last[:1] in {*"判dD"} else None
    return isinstance(found, Marker) and found.exact and (found.name == "english") == (style == "english")


@dataclass(frozen=True)
class Spans:
    """Where the parts of a well-formed assistant's turn lie, in characters.

    Attributes:
        style: one of `STYLES`, None in a text without thinking.
        final: where the final part begins, its mark included; 0 in a text without thinking.
        decision: begin and end of the label in the decision line, None where no decision is stated.
    """

    style: str | None
    final: int
    decision: tuple[int, int] | None


def spans(text: str) -> Spans:
    """Tell the parts of a text apart that `build` or `join` made; any other text is one final part."""
    style = next((one for one, (heading, _) in HEADED.items() if text.startswith(f"{heading}\n")), None)
    if style:
        final = thinking_end = text.rfind(f"\n{HEADED[style][1]}\n") + 1
    else:
        style = "quadruple"
        final = text.rfind(f"\n<{FINAL_TAG}>") + 1
        thinking_end = text.rfind(f"</{THINK_TAGS[-1]}>", 0, final)
    if not final:
        return Spans(None, 0, None)
    stated = list(_DECISIONS[style].finditer(fold(text[:thinking_end])))
    return Spans(style, final, stated[-1].span(1) if stated else None)


def with_decision(thinking: str, label: str, style: str = "seed") -> str:
    """Return the thinking with the line that states the decision, as `style` has it, at its end.

    Raises:
        ValueError: unknown label.
    """
    if label not in LABELS:
        raise ValueError(f"label {label!r}: expected one of {', '.join(LABELS)}")
    return f"{thinking.strip()}\n{DECISION_LINES[style]}{label}".strip()


def rejoin(thinking: str, content: str, style: str) -> str:
    """Return the text as the model wrote it, from the two fields into which an engine parted it.

    Ollama takes the first and last text around `.Thinking` in the template for the marks, and white space
    off both fields; for the quadruple format its `thinking` still holds the inner tags.
    """
    opening, closing, end = PARTED[style]
    return f"{opening}{thinking.strip()}{closing}{content.strip()}{end}"


_QUADRUPLE = "\n".join(f"<{tag}>%s</{tag}>" for tag in (*THINK_TAGS, FINAL_TAG))


def join(text: ThinkText) -> str:
    """Return what `build` returns, without a look at the parts: for parts known to hold no mark."""
    if text.style in HEADED:
        return rejoin(text.thinking, text.final, text.style)
    return _QUADRUPLE % (text.task.strip(), text.safety.strip(), text.policy.strip(), text.final.strip())
