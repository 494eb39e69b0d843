"""Samples to token sequences of one length: tokenise, mask all but the assistant, pack without leaks."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from so8t_helpers.phi3.chat import EVERY_ANSWER, Dialect
from so8t_helpers.phi3.template import of_tokenizer
from so8t_helpers.settings import Settings, SettingsError
from so8t_helpers.train.pet import valid_positions

_Item = TypeVar("_Item")
IGNORE = -100  # target of a token that carries no loss


@dataclass(frozen=True)
class Document:
    """One document: tokens (n,); targets (n,), the next token where it is the assistant's, else IGNORE."""

    tokens: np.ndarray
    targets: np.ndarray


@dataclass(frozen=True)
class PackedSequence:
    """One sequence of T tokens, all int32 or int64 on the host.

    Attributes:
        tokens, targets, positions, documents: (T,); padding has document -1 and target IGNORE.
        bounds: (most documents + 2,) int32 cumulative lengths, padded with T.
    """

    tokens: Tensor
    targets: Tensor
    positions: Tensor
    documents: Tensor
    bounds: Tensor

    def counts(self) -> tuple[int, int, int]:
        """Return (tokens that are not padding, tokens with a target, positions that PET sees)."""
        counted = (self.documents >= 0, self.targets != IGNORE, valid_positions(self.documents))
        tokens, targets, positions = (int(which.sum()) for which in counted)
        return tokens, targets, positions


def tokenize(rows: Sequence[dict[str, Any]], tokenizer: Any, length: int) -> list[Document]:
    """Tokenise dataset rows (`messages` whose last is the assistant's).

    That turn carries the loss, and the assistant's earlier ones too in a row that says so. A prompt's tokens
    must be a prefix of the whole sample's: the loss mask rests on it.

    Raises:
        SettingsError: a sample that is longer than `length` or whose prompt is no prefix.
    """
    dialect = of_tokenizer(tokenizer)
    whole = [dialect.render(row["messages"]) for row in rows]
    prompts = [dialect.render(row["messages"][:-1], add_generation_prompt=True) for row in rows]
    tokens = tokenizer(whole, add_special_tokens=False)["input_ids"]
    prefixes = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    end = tokenizer.convert_tokens_to_ids(dialect.end)
    samples = []
    for row, ids, prefix in zip(rows, tokens, prefixes, strict=True):
        if ids[: len(prefix)] != prefix:
            raise SettingsError(f"sample {row.get('id')}: the prompt's tokens are no prefix of the sample's")
        last = len(ids) - ids[::-1].index(end)  # one past the assistant's end
        if last > length:
            raise SettingsError(
                f"sample {row.get('id')}: {last} tokens, training.sequence_length is {length}; run "
                "01_dataset again with this length, or raise it"
            )
        targets = np.full(last, IGNORE, dtype=np.int64)
        targets[len(prefix) - 1 : last - 1] = ids[len(prefix) : last]
        if row.get("trained") == EVERY_ANSWER:
            for begin, stop in _earlier_answers(row, tokenizer, dialect, ids):
                targets[begin - 1 : stop - 1] = ids[begin:stop]
        samples.append(Document(np.array(ids[:last], dtype=np.int64), targets))
    return samples


def _earlier_answers(
    row: dict[str, Any], tokenizer: Any, dialect: Dialect, ids: list[int]
) -> Iterator[tuple[int, int]]:
    """Yield where the answers before a dialogue's last one begin, and where the token after their end is."""
    end = tokenizer.convert_tokens_to_ids(dialect.end)
    turns = row["messages"]
    for number, turn in enumerate(turns[:-1]):
        if turn["role"] == "assistant":
            prompt = dialect.render(turns[:number], add_generation_prompt=True)
            begin = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
            yield begin, ids.index(end, begin) + 1


def best_fit(lengths: Sequence[int], capacity: int, order: Sequence[int]) -> list[list[int]]:
    """Best-fit decreasing bin packing: each sample goes where the least room is left over.

    Args:
        lengths: tokens of each sample, at most `capacity`.
        order: permutation that breaks ties between samples of one length.

    Returns:
        Bins of sample indices; the number of bins depends on the lengths alone.
    """
    bins: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit n is set when some bin has room for exactly n more tokens
    for index in sorted(order, key=lambda i: -lengths[i]):
        need = lengths[index]
        fitting = rooms >> need
        if fitting:
            room = need + (fitting & -fitting).bit_length() - 1
            chosen = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
        else:
            room, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(index)
        left = room - need
        if left:
            by_room[left].append(chosen)
            rooms |= 1 << left
    return bins


def plan_epoch(samples: Sequence[Document], length: int, packing: bool, seed: int) -> list[list[int]]:
    """Return the sequences of one epoch as lists of sample indices, in random order."""
    generator = random.Random(seed)
    order = list(range(len(samples)))
    generator.shuffle(order)
    if packing:
        bins = best_fit([len(s.tokens) for s in samples], length, order)
        generator.shuffle(bins)
        return bins
    return [[index] for index in order]


def build_sequence(
    chosen: Sequence[Document], length: int, pad_token: int, most_documents: int
) -> PackedSequence:
    """Lay documents one after the other and pad to `length`; padding is a document of its own, number -1.

    All of the padding stands at position 0: there may be more of it than rope has positions for.

    Args:
        most_documents: of any sequence of the run; it sizes `bounds`, which attention walks in full.
    """
    tokens = np.full(length, pad_token, dtype=np.int64)
    targets = np.full(length, IGNORE, dtype=np.int64)
    positions = np.zeros(length, dtype=np.int64)
    documents = np.full(length, -1, dtype=np.int32)
    bounds = np.full(most_documents + 2, length, dtype=np.int32)
    bounds[0] = at = 0
    for number, sample in enumerate(chosen):
        end = at + len(sample.tokens)
        tokens[at:end], targets[at:end] = sample.tokens, sample.targets
        positions[at:end], documents[at:end] = np.arange(end - at), number
        bounds[number + 1] = at = end
    return PackedSequence(*map(torch.from_numpy, (tokens, targets, positions, documents, bounds)))


def join(sequences: Sequence[PackedSequence]) -> PackedSequence:
    """Put the sequences of a batch end to end; documents never cross, so this equals a batch dimension."""
    length = len(sequences[0].tokens)
    shift = len(sequences[0].bounds)
    documents = [torch.where(s.documents < 0, -1, s.documents + i * shift) for i, s in enumerate(sequences)]
    return PackedSequence(
        torch.cat([s.tokens for s in sequences]),
        torch.cat([s.targets for s in sequences]),
        torch.cat([s.positions for s in sequences]),
        torch.cat(documents).int(),
        torch.cat([s.bounds + i * length for i, s in enumerate(sequences)]),
    )


@dataclass
class Schedule:
    """Which samples form which sequence, for every micro-step of the whole training.

    Attributes:
        steps: for each optimizer step its micro-steps, each a list of sequences (lists of sample indices).
        tokens_wasted: share of padding tokens, with packing and without it.
        most_documents: the largest number of samples in one sequence.
    """

    steps: list[list[list[list[int]]]]
    tokens_wasted: dict[str, float]
    most_documents: int


def plan(settings: Settings, samples: list[Document]) -> Schedule:
    """Lay out all optimizer steps; the same settings and samples give the same plan.

    Raises:
        SettingsError: if there are no samples.
    """
    if not samples:
        raise SettingsError("train.jsonl holds no samples; look at 01_dataset's quarantine for the reasons")
    t = settings.training
    steps: list[list[list[list[int]]]] = []
    total = t.max_steps
    for epoch in itertools.count():
        bins = plan_epoch(samples, t.sequence_length, t.packing, settings.run.seed * 1009 + epoch)
        steps += _in_groups(_in_groups(bins, t.batch_size), t.gradient_accumulation)
        if total is None:
            total = max(1, round(len(steps) * t.epochs))
        if len(steps) >= total:
            break
    real = sum(len(s.tokens) for s in samples)
    wasted = {
        "packed": 1 - real / (len(bins) * t.sequence_length),
        "unpacked": 1 - real / (len(samples) * t.sequence_length),
    }
    most = max(len(chosen) for step in steps for group in step for chosen in group)
    return Schedule(steps[:total], wasted, most)


def _in_groups(items: list[_Item], size: int) -> list[list[_Item]]:
    return [items[i : i + size] for i in range(0, len(items), size)]
