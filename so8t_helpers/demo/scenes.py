"""What a demo task draws: a text, and the questions that it answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

from so8t_helpers.demo import words

# One phrase for all refusals, so that a checker needs no list of synonyms.
REFUSAL = "できません"
LEADS = ("文を読んで答えてください。", "次の問いに答えてください。", "短く答えてください。", "質問です。")


@dataclass(frozen=True)
class Draft:
    """A question about a text with its answer, before it gets an id.

    Attributes:
        lead: a general instruction; empty where the text itself is the instruction.
        text, asked: what the answer follows from, and the question.
        output: the short answer; reasoning: why, from the text alone.
        check: {"kind": "exact" | "contains" | "number" | "refusal", "value": str}.
    """

    lead: str
    text: str
    asked: str
    output: str
    label: str
    reasoning: str
    task: str
    domain: str
    check: dict[str, str]

    @property
    def instruction(self) -> str:
        return self.lead or self.text + self.asked

    @property
    def input(self) -> str:
        return self.text + self.asked if self.lead else ""

    @property
    def question(self) -> str:
        """The user's text: instruction, then the input on the next line."""
        return f"{self.instruction}\n{self.input}" if self.input else self.instruction


@dataclass
class Scene:
    """A text and what is asked about it."""

    rng: Random
    domain: str
    text: str
    drafts: list[Draft] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.lead = self.rng.choice(LEADS) if self.rng.random() < 0.5 else ""

    def ask(self, asked: str, answer: str, reasoning: str, task: str, kind: str = "contains") -> None:
        """Add an answerable question; a number is checked by its digits."""
        value = "".join(filter(str.isdigit, answer)) if kind == "number" else answer
        output = f"{answer}。" if kind == "exact" else f"{answer}です。"
        self.add(asked, output, "ALLOW", reasoning, task, {"kind": kind, "value": value})

    def add(
        self, asked: str, output: str, label: str, reasoning: str, task: str, check: dict[str, str]
    ) -> list[Draft]:
        """Add a question of any label; return all questions so far."""
        self.drafts.append(
            Draft(self.lead, self.text, asked, output, label, reasoning, task, self.domain, check)
        )
        return self.drafts


def person(rng: Random) -> str:
    return rng.choice(words.SURNAMES) + "さん"
