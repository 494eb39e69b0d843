"""What the model writes while it is trained: a few held-out prompts, greedy, with a key-value cache.

The layers are those of the training, adapters and gates included, so nothing is merged or copied. All prompts
go through one packed pass; from then on each step adds one token to every answer that has not ended.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from so8t_helpers.phi3.template import of_tokenizer
from so8t_helpers.thinking import format as think_format
from so8t_helpers.train.layers import Packed, attend, mlp_half, project_out, project_qkv, rms_norm, token_keys
from so8t_helpers.train.micro_step import MicroStep


def choose_prompts(rows: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Return rows of eval.jsonl to be answered: the labels in turn, each label's rows as they come."""
    by_label: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_label.setdefault(row.get("label", ""), []).append(row)
    turns = [label_rows[i] for i in range(count) for label_rows in by_label.values() if i < len(label_rows)]
    return turns[:count]


@dataclass(frozen=True)
class Written:
    """What one round of writing gave.

    Attributes:
        rows: one a prompt: id, label, question, final part (None where there is none), well_formed, decision.
        seconds: what it took.
    """

    rows: list[dict[str, Any]]
    seconds: float


class Writer:
    """Answers prompts with the micro-step's layers as they stand.

    Args:
        rows: of eval.jsonl, from `choose_prompts`.
    """

    def __init__(self, micro_step: MicroStep, rows: list[dict[str, Any]], tokenizer: Any, length: int):
        self.step, self.rows, self.tokenizer = micro_step, rows, tokenizer
        dialect = of_tokenizer(tokenizer)
        texts = [dialect.render(row["messages"][:-1], add_generation_prompt=True) for row in rows]
        self.prompts: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
        right = [row["messages"][-1]["content"] for row in rows]
        answers = tokenizer(right, add_special_tokens=False)["input_ids"]
        longest = max(map(len, self.prompts))
        # Half as long again as the longest right answer; beyond that a model only repeats itself.
        self.most = max(1, min(length - longest, 8 + 3 * max(map(len, answers)) // 2))
        self.stops = set(tokenizer.convert_tokens_to_ids(list(dialect.stops)))
        self.layers = [segment.layer for segment in micro_step.segments[::2]]
        self.config = replace(micro_step.config, dropout=0.0)

    @torch.no_grad()
    def write(self, most: int | None = None, limit: float = float("inf")) -> Written:
        """Answer all prompts, each to its end or to `most` tokens (by default the room that there is).

        After `limit` seconds it gives up: then there are no rows.
        """
        started = time.perf_counter()
        lengths = torch.tensor([len(prompt) for prompt in self.prompts])
        caches, hidden = self._prefill(lengths)
        answers: list[list[int]] = [[] for _ in self.prompts]
        ended = [False] * len(answers)
        device = hidden.device
        positions = lengths.to(device)
        for _ in range(most or self.most):
            tokens = self._logits(hidden).argmax(-1).tolist()
            for answer, token, i in zip(answers, tokens, range(len(answers)), strict=True):
                ended[i] = ended[i] or token in self.stops
                if not ended[i]:
                    answer.append(token)
            if all(ended):
                break
            if time.perf_counter() - started > limit:
                return Written([], time.perf_counter() - started)
            hidden = self._next(tokens, positions, caches)
            positions = positions + 1
        rows = [self._judge(row, ids) for row, ids in zip(self.rows, answers, strict=True)]
        return Written(rows, time.perf_counter() - started)

    def _judge(self, row: dict[str, Any], ids: list[int]) -> dict[str, Any]:
        """Of an answer only its final part is kept, and what can be said of the rest."""
        parsed = think_format.parse(self.tokenizer.decode(ids, skip_special_tokens=False))
        return {
            "id": row.get("id"),
            "label": row.get("label", ""),
            "question": row.get("question", row["messages"][-2]["content"]),
            "final": parsed.final,
            "well_formed": parsed.well_formed,
            "decision": parsed.decision,
        }

    def _prefill(self, lengths: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """Run all prompts as one packed sequence; keep keys and values by prompt.

        Returns:
            For each layer keys and values (prompts, longest + most, KV, D), and the last hidden state of each
            prompt (prompts, d).
        """
        step = self.step
        device = step.embedded.device
        tokens = torch.tensor([token for prompt in self.prompts for token in prompt])
        position = torch.cat([torch.arange(int(n)) for n in lengths]).to(device)
        owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(device)
        ends = lengths.cumsum(0)
        bounds = torch.cat((torch.zeros(1, dtype=torch.int64), ends)).to(device, torch.int32)
        packed = self._packed(position, bounds)
        x = step.base.embedding[tokens].to(device)
        room = int(lengths.max()) + self.most
        shape, caches = step.base.shape, []
        for layer in self.layers:
            q, k, v = project_qkv(x, layer, packed, self.config)
            cache = tuple(x.new_zeros(len(lengths), room, shape.num_kv_heads, shape.head_dim) for _ in "kv")
            for kept, new in zip(cache, (k, v), strict=True):
                kept[owner, position] = new
            caches.append((cache[0], cache[1]))
            mixed = attend(q, k, v, bounds, self.config.varlen).reshape(len(x), -1)
            x = mlp_half(project_out(x, mixed, layer, packed, self.config), layer, packed, self.config)
        return caches, x[ends.to(device) - 1]

    def _next(self, tokens: list[int], positions: Tensor, caches: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Run one token of every prompt. tokens, positions (prompts,) -> last hidden states (prompts, d)."""
        step = self.step
        x = step.base.embedding[torch.tensor(tokens)].to(positions.device)
        packed = self._packed(positions, step.bounds)
        each = torch.arange(len(tokens), device=positions.device)
        seen = (
            torch.arange(caches[0][0].shape[1], device=positions.device) <= positions[:, None]
        )  # (prompts, room)
        for layer, (keys, values) in zip(self.layers, caches, strict=True):
            q, k, v = project_qkv(x, layer, packed, self.config)
            keys[each, positions], values[each, positions] = k, v
            mixed = functional.scaled_dot_product_attention(
                q[:, :, None],
                keys.transpose(1, 2),
                values.transpose(1, 2),
                attn_mask=seen[:, None, None],
                enable_gqa=q.shape[1] != keys.shape[2],
            )  # (prompts, H, 1, D)
            x = project_out(x, mixed.flatten(1), layer, packed, self.config)
            x = mlp_half(x, layer, packed, self.config)
        return x

    def _packed(self, positions: Tensor, bounds: Tensor) -> Packed:
        rows = torch.arange(len(positions), dtype=torch.int32, device=positions.device)[:, None]
        return Packed(
            self.step.cos[positions], self.step.sin[positions], bounds, token_keys(rows, self.step.seed)
        )

    def _logits(self, hidden: Tensor) -> Tensor:
        base = self.step.base
        return rms_norm(hidden, base.final_norm, base.shape.rms_eps) @ base.head.t()
