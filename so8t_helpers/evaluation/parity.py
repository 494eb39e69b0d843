"""Do all engines see the same tokens? Without that, a comparison of their answers says nothing."""

from __future__ import annotations

from typing import Any

from so8t_helpers.engines.base import Engine
from so8t_helpers.evaluation.prompts import Prompt
from so8t_helpers.run_folder import StageError

# Ollama computes one token for each text that it is asked to tokenize; the rest is held to token counts.
_SAMPLE = 24


class TokenParity:
    """Compares each engine's token ids of the prompts with those of the first one.

    Attributes:
        found: for `scores.json`: the engine taken as the measure, and on how many prompts each agreed.
    """

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
