"""The loss on texts that training never sees, by part: thinking, decision and final part.

A forward pass alone through the layers of the micro-step, without gradients and without dropout, compiled and
captured where the training is. Sums are kept document by document, so that two moments of a training can be
compared with an interval.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from so8t_helpers.phi3.template import of_tokenizer
from so8t_helpers.settings import TrainingSettings
from so8t_helpers.thinking import format as think_format
from so8t_helpers.train import batches
from so8t_helpers.train.batches import IGNORE, Document
from so8t_helpers.train.layers import Packed, rms_norm, token_keys
from so8t_helpers.train.micro_step import MicroStep
from so8t_helpers.train.workers import Workers

PARTS = ("thinking", "decision", "final")
# Of a held-out token over a trained one: forward alone, against forward and a backward pass without gradients
# of the frozen weights; a third where layers are recomputed (measured: 0.49 on a CPU, 0.32 on an H100).
_COST = 1 / 2
_SHARE = 0.03  # of the training's time, at the cadence "auto"
_FEWEST, _MOST = 4, 20  # looks after the first, where that share allows them


@dataclass(frozen=True)
class HeldOutDocument:
    """A document with what is counted where.

    Attributes:
        parts: (n,) int64, the index in `PARTS` of each target; -1 where there is none.
        choices: (n, 4) int64, where the next token decides on the label: the right token, then those of the
            other labels (the right one again for want of others); elsewhere -1.
    """

    document: Document
    parts: np.ndarray
    choices: np.ndarray


def label_tokens(tokenizer: Any, style: str = "seed") -> list[list[int]]:
    """Return the tokens of each label as a format's decision line has them, in the order of LABELS."""
    texts = [think_format.with_decision("。", label, style) for label in think_format.LABELS]
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    shared = next(k for k, column in enumerate(zip(*rows, strict=False)) if len(set(column)) > 1)
    return [row[shared:] for row in rows]


def _forks(labels: list[list[int]], right: int) -> Iterator[tuple[int, list[int]]]:
    """Where the right label's tokens part from others': (the token, the right next one first, then theirs).

    Labels may begin alike (`▁ D ENY`, `▁ R EFUSE`): then a decision is made of two choices.
    """
    own = labels[right]
    for k, token in enumerate(own):
        others = {row[k] for row in labels if row[:k] == own[:k] and len(row) > k} - {token}
        if others:
            yield k, [token, *sorted(others)]


def read_documents(rows: Sequence[dict[str, Any]], tokenizer: Any, length: int) -> list[HeldOutDocument]:
    """Tokenise rows of eval.jsonl and say of each target which part it belongs to.

    Raises:
        SettingsError: as `batches.tokenize`.
    """
    documents = batches.tokenize(rows, tokenizer, length)
    labels_of = {style: label_tokens(tokenizer, style) for style in think_format.STYLES}
    dialect = of_tokenizer(tokenizer)
    texts = [dialect.render(row["messages"]) for row in rows]
    offsets = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    found = []
    for row, document, places in zip(rows, documents, offsets, strict=True):
        begin = len(dialect.render(row["messages"][:-1], add_generation_prompt=True))
        answer = dialect.neutral(row["messages"][-1]["content"])
        spans = think_format.spans(answer)
        ends = np.array([end for _, end in places[: len(document.tokens)]]) - begin
        parts = np.where(ends > spans.final, 2, 0)
        choices = np.full((len(ends), len(think_format.LABELS)), -1)
        if spans.style and spans.decision:
            labels = labels_of[spans.style]
            start, stop = spans.decision
            inside = (ends > start) & (ends <= stop)
            parts[inside] = 1
            right = think_format.LABELS.index(answer[start:stop].upper())
            first = int(np.flatnonzero(inside)[0])
            if document.tokens[first : first + len(labels[right])].tolist() == labels[right]:
                for k, tokens in _forks(labels, right):
                    choices[first + k - 1] = tokens + tokens[:1] * (len(labels) - len(tokens))
        # A target stands one position before its token; of a dialogue the last answer alone is looked at.
        earlier = np.append(ends[1:], 0) <= 0
        parts = np.where((document.targets == IGNORE) | earlier, -1, np.append(parts[1:], -1))
        found.append(HeldOutDocument(document, parts, choices))
    return found


@dataclass(frozen=True)
class Plan:
    """When to look at the held-out loss, and at which documents.

    Attributes:
        steps: optimizer steps after which to look, the start (0) and the end among them.
        sequences: document numbers, packed, one list a micro-step's length.
    """

    steps: frozenset[int]
    sequences: list[list[int]]


def plan(
    settings: TrainingSettings, lengths: list[int], room: int, most: int, micro_steps: list[int]
) -> Plan:
    """Choose looks and documents: all of them, or under "auto" as many as 3% of the training's time allow.

    Args:
        lengths: tokens of the held-out documents, in an order of which any beginning is a fair sample.
        room, most: tokens, and documents, that one pass of the micro-step takes.
        micro_steps: of each optimizer step of the training.
    """
    total, fewer = len(micro_steps), settings.eval_samples
    chosen = min(fewer, len(lengths)) if isinstance(fewer, int) else len(lengths)
    sequences = _pack(lengths[:chosen], room, most)
    budget = _SHARE / _COST * sum(micro_steps)  # sequences, over all looks
    if settings.eval_steps == "auto":
        looks = min(max(int(budget / len(sequences)) - 1, _FEWEST), _MOST, total)
        looks = max(1, min(looks, int(budget) - 1))
        steps = {round(total * i / looks) for i in range(looks + 1)}
    else:
        assert settings.eval_steps is not None
        steps = {0, total, *range(settings.eval_steps, total, settings.eval_steps)}
    if settings.eval_samples == "auto":
        while chosen > 1 and len(sequences) > max(1, budget // len(steps)):
            chosen = max(1, int(chosen * max(1.0, budget // len(steps)) / len(sequences)) - 1)
            sequences = _pack(lengths[:chosen], room, most)
    return Plan(frozenset(steps), sequences)


def _pack(lengths: list[int], room: int, most: int) -> list[list[int]]:
    bins = batches.best_fit(lengths, room, range(len(lengths)))
    return [one[i : i + most] for one in bins for i in range(0, len(one), most)]


@dataclass(frozen=True)
class Measurement:
    """One pass over the held-out documents.

    Attributes:
        sums: (documents, parts) float64, the loss in nats summed over the targets of each part.
        right: (documents,) int64, 1 where of the four labels the right one would be chosen, 0 where another,
            -1 where nothing is decided.
    """

    sums: Tensor
    right: Tensor
    seconds: float


class HeldOut:
    """Measures the held-out loss with a micro-step's layers; every worker takes some of the sequences."""

    def __init__(
        self,
        micro_step: MicroStep,
        documents: list[HeldOutDocument],
        sequences: list[list[int]],
        pad_token: int,
        workers: Workers,
    ):
        self.step, self.documents, self.workers = micro_step, documents, workers
        self.sequences, self.pad_token = sequences, pad_token
        device = micro_step.base.device
        self.segments = [
            replace(segment, config=replace(segment.config, dropout=0.0)) for segment in micro_step.segments
        ]
        total = len(micro_step.embedded)
        # Static buffers, as in the micro-step: a captured graph reads from fixed addresses.
        self.bucket = torch.zeros(total, dtype=torch.int64, device=device)  # document x part; the last: none
        self.choices = torch.full((total, len(think_format.LABELS)), -1, dtype=torch.int64, device=device)
        self.sums = torch.zeros(len(documents) * len(PARTS) + 1, dtype=torch.float64, device=device)
        # Wrong choices of each document; the last is nobody's.
        self.wrong = torch.zeros(len(documents) + 1, dtype=torch.int64, device=device)
        self.decided = torch.tensor([bool((d.choices >= 0).any()) for d in documents])
        self.counts = self._count()
        self.graph: torch.cuda.CUDAGraph | None = None
        if micro_step.graph is not None:
            self._capture(micro_step.graph)

    def _count(self) -> Tensor:
        """Targets by document and part: (documents, parts) float64."""
        rows = [np.bincount(d.parts[d.parts >= 0], minlength=len(PARTS)) for d in self.documents]
        return torch.tensor(np.array(rows), dtype=torch.float64)

    @torch.no_grad()
    def measure(self) -> Measurement:
        """Run all sequences and gather the sums of all workers."""
        started = time.perf_counter()
        self.sums.zero_()
        self.wrong.zero_()
        for chosen in self.sequences[self.workers.rank :: self.workers.count]:
            self._load(chosen)
            if self.graph is not None:
                self.graph.replay()
            else:
                self._walk()
        self.workers.add_up([self.sums, self.wrong])
        right = torch.where(self.decided, (self.wrong[:-1].cpu() == 0).long(), -1)
        sums = self.sums[:-1].cpu().clone().view(-1, len(PARTS))
        return Measurement(sums, right, time.perf_counter() - started)

    def figures(self, measured: Measurement) -> dict[str, float]:
        """Return mean losses in nats a token, whole and by part, and the share of right decisions."""
        found = {"loss": (measured.sums.sum() / self.counts.sum()).item()}
        for i, part in enumerate(PARTS):
            count = self.counts[:, i].sum()
            found[part] = (measured.sums[:, i].sum() / count).item() if count else float("nan")
        found["decision_right"] = measured.right[measured.right >= 0].double().mean().item()
        return found

    def _load(self, chosen: list[int]) -> None:
        """Copy one sequence into the buffers of the micro-step and its own."""
        step = self.step
        per_sequence = len(step.bounds) - 2
        sequence = batches.build_sequence(
            [self.documents[i].document for i in chosen], len(step.embedded), self.pad_token, per_sequence
        )
        step.load(sequence, 0)
        bucket = np.full(len(step.embedded), len(self.sums) - 1, dtype=np.int64)
        choices = np.full(self.choices.shape, -1)
        at = 0
        for i in chosen:
            one = self.documents[i]
            end = at + len(one.parts)
            bucket[at:end] = np.where(one.parts < 0, len(self.sums) - 1, i * len(PARTS) + one.parts)
            choices[at:end] = one.choices
            at = end
        self.bucket.copy_(torch.from_numpy(bucket))
        self.choices.copy_(torch.from_numpy(choices))

    def _walk(self) -> None:
        step = self.step
        keys = token_keys(step.rows, step.seed)  # what `Packed` holds; without dropout nothing reads it
        packed = Packed(step.cos[step.positions], step.sin[step.positions], step.bounds, keys)
        x = step.embedded
        for segment in self.segments:
            x = segment.forward_only(x, packed)
        for start in range(0, len(x), step.loss_rows):
            rows = slice(start, start + step.loss_rows)
            hidden = rms_norm(x[rows], step.base.final_norm, step.base.shape.rms_eps)
            logits = (hidden @ step.base.head.t()).float()  # (chunk, vocab)
            targets = step.targets[rows]
            index = torch.where(targets == IGNORE, 0, targets)[:, None]
            loss = logits.logsumexp(-1) - logits.gather(1, index)[:, 0]
            self.sums.index_add_(0, self.bucket[rows], loss.double())
            choices = self.choices[rows]
            best = logits.gather(1, choices.clamp(min=0)).argmax(-1)
            wrong = (choices[:, 0] >= 0) & (best != 0)
            self.wrong.index_add_(0, self.bucket[rows] // len(PARTS), wrong.long())

    def _capture(self, beside: torch.cuda.CUDAGraph) -> None:
        """Record the pass as a graph in the micro-step's pool: the two never run at once."""
        with torch.no_grad():
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self._walk()  # compiles
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, pool=beside.pool()):
                self._walk()


def overfitting(counts: Tensor, best: Tensor, last: Tensor) -> tuple[float, float]:
    """Return how much higher the held-out loss is at the end than at its best, and half its 95% interval.

    Nats a token. The documents are the same at both moments, so their differences are paired; the interval is
    that of a ratio of sums over documents drawn at random (Cochran 1977, Sampling Techniques, chapter 6).

    Args:
        counts, best, last: (documents, parts), targets and loss sums.
    """
    tokens, difference = counts.sum(1), (last - best).sum(1)
    mean = difference.sum() / tokens.sum()
    if len(tokens) < 2:
        return mean.item(), float("inf")
    residual = difference - mean * tokens
    error = (residual.square().sum() * len(tokens) / (len(tokens) - 1)).sqrt() / tokens.sum()
    return mean.item(), 1.96 * error.item()
