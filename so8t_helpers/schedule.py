"""The plan of a whole training: which samples form which sequence of which optimizer step."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from so8t_helpers import packing
from so8t_helpers.settings import Settings, SettingsError


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


def plan(settings: Settings, samples: list[packing.Sample]) -> Schedule:
    """Lay out all optimizer steps; the same settings and samples give the same plan.

    Raises:
        SettingsError: if there are no samples.
    """
    if not samples:
        raise SettingsError("train.jsonl holds no samples; look at 01_dataset's quarantine for the reasons")
    t = settings.training
    steps: list[list[list[list[int]]]] = []
    wanted = t.max_steps
    for epoch in itertools.count():
        bins = packing.plan_epoch(samples, t.sequence_length, t.packing, settings.run.seed * 1009 + epoch)
        micro_steps = [bins[i : i + t.batch_size] for i in range(0, len(bins), t.batch_size)]
        groups = [
            micro_steps[i : i + t.gradient_accumulation]
            for i in range(0, len(micro_steps), t.gradient_accumulation)
        ]
        if wanted is None:
            wanted = max(1, round(len(groups) * t.epochs))
        steps += groups
        if len(steps) >= wanted:
            break
    real = sum(len(s.tokens) for s in samples)
    wasted = {
        "packed": 1 - real / (len(bins) * t.sequence_length),
        "unpacked": 1 - real / (len(samples) * t.sequence_length),
    }
    most = max(len(chosen) for step in steps for group in step for chosen in group)
    return Schedule(steps[:wanted], wasted, most)
