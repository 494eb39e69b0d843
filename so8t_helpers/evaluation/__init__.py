"""05_ollama_eval: the base, the baked model and each GGUF answer the same held-out prompts and are judged."""

from so8t_helpers.evaluation.prompts import Prompt
from so8t_helpers.evaluation.run import evaluate
from so8t_helpers.evaluation.tables import (
    answers_table,
    changed_examples,
    conclusion,
    load_answers,
    pairs_table,
    scores_table,
)

__all__ = [
    "Prompt",
    "answers_table",
    "changed_examples",
    "conclusion",
    "evaluate",
    "load_answers",
    "pairs_table",
    "scores_table",
]
