"""What if the gates rotated less, or more? A baked model with every rotation raised to the power t.

The gate of a block is R = exp(A); R(t) = exp(t A) rotates the same planes by t times the angles: t = 0 is no
gate, 1 the trained one, 2 twice as far. The baked o_proj is W' = W R(1), and powers of one rotation commute,
so W(t) = W R(t) = W' exp((t - 1) A): the baked folder and the gates are all that is needed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import libgguf
import numpy as np
import pandas as pd
from torch import Tensor

from so8t_helpers.engines.transformers_engine import Transformers, open_transformers
from so8t_helpers.run.files import StageError, read_jsonl
from so8t_helpers.run.stage import stage_input
from so8t_helpers.settings import load_settings
from so8t_helpers.so8 import rotation
from so8t_helpers.thinking.format import parse
from so8t_helpers.thinking.redaction import final_only

POWERS = tuple(step / 8 for step in range(17))  # t from 0 to 2, halves and the whole exactly
NAMED_POWERS = {"off": 0.0, "half": 0.5, "full": 1.0, "doubled": 2.0}
_MEASURED_ROWS = 256  # of each o_proj: enough for the third digit of its quantisation error


def rotated(weight: Tensor, free: Tensor, t: float) -> Tensor:
    """Return W(t) from the baked weight W(1). weight (out, d), free (d/8, 28) -> (out, d) float32."""
    return rotation.bake_rotation(weight.float(), rotation.power(free.float(), t - 1))


def relative_change(weight: Tensor, reference: Tensor) -> float:
    """Return the Frobenius norm of the change, over that of the reference."""
    return float((weight - reference).norm() / reference.norm())


def quantisation_error(weight: Tensor) -> float:
    """Return the relative error that four bits leave: Q4_K, or Q4_0 where 256 does not divide a row.

    weight (out, d); at most 256 evenly spaced rows are measured.
    """
    step = max(1, len(weight) // _MEASURED_ROWS)
    rows = np.ascontiguousarray(weight[::step].float().cpu().numpy())
    kinds = libgguf.GGMLQuantizationType
    kind = kinds.Q4_K if rows.shape[1] % libgguf.QK_K == 0 else kinds.Q4_0
    back = np.asarray(libgguf.dequantize_rows(libgguf.quantize_rows(rows, kind), kind), dtype=np.float32)
    return float(np.linalg.norm(back.reshape(rows.shape) - rows) / np.linalg.norm(rows))


class TurnedModel:
    """A run's baked model, its gates at any power t; loaded once, changed in place.

    It carries some held-out texts, as the chat template renders them, and their questions.
    """

    def __init__(self, run_dir: Path, texts: int = 24):
        here = {"root": str(run_dir.parent.resolve()), "name": run_dir.name}  # it may have been moved
        settings = load_settings(run_dir / "params.yaml", {"run": here})
        adapter = stage_input(settings, settings.bake.adapter_dir, "02_train", "adapter")
        model = settings.run_dir / "03_bake" / "model"
        held_out = stage_input(settings, settings.training.dataset_dir, "01_dataset") / "eval.jsonl"
        for path, stage in ((model / "config.json", "03_bake"), (held_out, "01_dataset")):
            if not path.is_file():
                raise StageError(f"no file {path}; run {stage} first")
        self.gates = rotation.load_gates(adapter / rotation.GATES_FILE)
        self.engine: Transformers = open_transformers(model, think_command=settings.dataset.think_command)
        layers = self.engine.network.model.layers
        self._places: list[Tensor] = [layers[n].self_attn.o_proj.weight.data for n in self.gates.layers]
        self._baked = [place.clone() for place in self._places]
        rows = read_jsonl(held_out)[:texts]
        self.texts = [row["text"] for row in rows]
        self.questions = [row["question"] for row in rows]
        self.t = 1.0

    def weight(self, row: int, t: float) -> Tensor:
        """Return W(t) of the layer at `row` of the gates, (out, d) float32."""
        return rotated(self._baked[row], self.gates.free[row].to(self._baked[row].device), t)

    def block_change(self, row: int, block: int, t: float) -> Tensor:
        """Return W(t) - W(0) in the eight columns of one block, (out, 8) float32."""
        columns = self._baked[row][:, block * rotation.BLOCK : (block + 1) * rotation.BLOCK].float().cpu()
        free = self.gates.free[row, block]
        return columns @ (rotation.power(free, t - 1) - rotation.power(free, -1))

    def set_power(self, t: float) -> None:
        """Put W(t) into the model, in every gated layer."""
        if t != self.t:
            for row, place in enumerate(self._places):
                place.copy_(self._baked[row] if t == 1.0 else self.weight(row, t))
            self.t = t

    def perplexity(self, t: float) -> float:
        """Return exp of the mean negative log-probability of the held-out texts' tokens."""
        self.set_power(t)
        scores = [score for text in self.texts for score in self.engine.score(text)]
        return math.exp(-sum(scores) / len(scores))

    def answer(self, question: str, t: float, max_tokens: int = 200) -> Iterator[str]:
        """Answer a question with the gates at t, greedily; yields the model's own text as it grows."""
        self.set_power(t)
        pieces = self.engine.generate([{"role": "user", "content": question}], max_tokens=max_tokens)
        return itertools.accumulate(piece.text for piece in pieces)

    def answers(self, questions: list[str], max_tokens: int = 200) -> pd.DataFrame:
        """Answer questions with the gates off, half, full and doubled; only the final part is kept."""
        rows = []
        for question in questions:
            for name, t in NAMED_POWERS.items():
                *_, text = self.answer(question, t, max_tokens)
                rows.append(
                    {
                        "question": question,
                        "gates": f"{name} (t = {t:g})",
                        "in format": "yes" if parse(text).well_formed else "no",
                        "answer": final_only(text),
                    }
                )
        self.set_power(1.0)
        return pd.DataFrame(rows)

    def measure(self, tick: Callable[[], None] = lambda: None) -> pd.DataFrame:
        """Measure every t of `POWERS`, one row a t and layer; `tick` is called after each t.

        Changes are of o_proj against t = 0, `largest_change` of one weight of it; the perplexity is the whole
        model's in every layer's row.
        """
        rows = []
        still = [self.weight(row, 0.0) for row in range(len(self.gates.layers))]
        for t in POWERS:
            perplexity = self.perplexity(t)
            for row, layer in enumerate(self.gates.layers):
                weight = self.weight(row, t)
                rows.append(
                    {
                        "t": t,
                        "layer": layer,
                        "change": relative_change(weight, still[row]),
                        "largest_change": float((weight - still[row]).abs().max()),
                        "quantisation_error": quantisation_error(weight),
                        "perplexity": perplexity,
                    }
                )
            tick()
        self.set_power(1.0)
        return pd.DataFrame(rows)
