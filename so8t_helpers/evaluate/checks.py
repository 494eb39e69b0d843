"""What a client of Ollama sees: does Ollama itself keep the thinking out of the answer?"""

from __future__ import annotations

from typing import Any

from so8t_helpers.engines.base import Engine, collect
from so8t_helpers.engines.host import parted_style
from so8t_helpers.evaluate.prompts import Prompt
from so8t_helpers.run.files import StageError
from so8t_helpers.settings import Settings
from so8t_helpers.thinking.format import contains_markers, decision_of

_CHATS = 16


def check_native(
    settings: Settings, engine: Engine, prompts: list[Prompt], rows: list[dict[str, Any]]
) -> dict[str, Any] | None:
    """Ask some prompts as any client would, streamed, with thinking and without.

    Args:
        rows: the model's judged answers to all prompts, from the raw text.

    Returns:
        Shares over the prompts asked: `same_prompt` (the engine's template renders what we render),
        `separated` (thinking and content both there, no mark in the content), `same_final` (the content is
        the final part that our parser releases), `plain_clean` (with `think: false` no mark and no thinking);
        None where the engine does not part thinking.
    """
    if not engine.separates:
        return None
    found = []
    limit, style = settings.eval.max_new_tokens, parted_style(settings)
    for prompt, row in list(zip(prompts, rows, strict=True))[:_CHATS]:
        thought = collect(engine.generate(prompt.chat, max_tokens=limit, think=True))
        plain = collect(engine.generate(prompt.chat, max_tokens=limit, think=False))
        rendered = engine.dialect.prompt(prompt.chat, settings.dataset.think_command)
        found.append(
            {
                "same_prompt": rendered == prompt.text and thought.prompt_tokens == row["prompt_tokens"],
                "separated": bool(thought.thinking.strip()) and _clean(thought.text, style),
                "same_final": thought.text.strip() == row["final"],
                "plain_clean": not plain.thinking and _clean(plain.text, style),
            }
        )
    n = len(found)
    return {"n": n, **{share: sum(chat[share] for chat in found) / n for share in found[0]}}


def _clean(content: str, style: str) -> bool:
    """Some content, and neither a mark nor the decision's line in it."""
    return (
        bool(content.strip()) and not contains_markers(content, style) and decision_of(content, style) is None
    )


# Ollama computes one token for each text that it is asked to tokenize; the rest is held to token counts.
_SAMPLE = 24


class TokenParity:
    """Compares each engine's token ids with those of the first, and counts in `found` where they agreed."""

    def __init__(self, prompts: list[Prompt]):
        self.prompts = prompts[:_SAMPLE]
        self.expected: list[list[int]] | None = None
        self.found: dict[str, Any] = {"prompts": len(self.prompts), "measure": None, "equal": {}}

    def check(self, name: str, engine: Engine) -> None:
        """Take the first engine's ids as the measure; hold each later one to them.

        Raises:
            StageError: ids differ; the message shows where.
        """
        ids = [engine.tokenize(prompt.text) for prompt in self.prompts]
        if self.expected is None:
            self.expected, self.found["measure"] = ids, f"{name} ({engine.name})"
        for prompt, want, got in zip(self.prompts, self.expected, ids, strict=True):
            if want != got:
                both = zip(want, got, strict=False)
                place = next((i for i, (a, b) in enumerate(both) if a != b), min(len(want), len(got)))
                raise StageError(
                    f"{name}: {engine.name} sees other tokens than {self.found['measure']} in prompt "
                    f"{prompt.row['id']} from position {place}: {got[place : place + 5]} instead of "
                    f"{want[place : place + 5]}; check the GGUF's tokenizer and its general.name, which must "
                    "contain phi3, and run stage 04_gguf again"
                )
        self.found["equal"][name] = len(ids)
