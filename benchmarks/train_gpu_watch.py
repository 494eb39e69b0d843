"""What looking costs: a training of some steps with `train.watch` at its default cadence."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# A thinking of 200 tokens or so before a short answer, as in the data sets that this is for.
_THINKING = "問いは{n}番の書類の締め切りについてです。書類の日付は{n}日で、期限は十日後と書いてあります。" * 4


def _rows(count: int) -> list[dict[str, Any]]:
    from so8t_helpers.thinking.format import LABELS, ThinkText, build, with_decision

    rows = []
    for n in range(count):
        label = LABELS[n % 4]
        answer = build(
            ThinkText("seed", f"締め切りは{n}日です。", with_decision(_THINKING.format(n=n), label))
        )
        question = f"{n}番の書類の締め切りを教えてください。"
        messages = [
            {"role": "user", "content": f"/think {question}"},
            {"role": "assistant", "content": answer},
        ]
        rows.append({"id": str(n), "label": label, "question": question, "messages": messages})
    return rows


def watched(
    config: Path,
    chosen: Any,
    workers: Any,
    micro_step: Any,
    adapters: Any,
    step: Callable[[int], None],
    count: int,
) -> dict[str, Any]:
    """Train `count` optimizer steps with a Watch beside them; return its shares of the time.

    The first look compiles and captures its own graph: that is told apart, since it does not grow with the
    training.
    """
    from so8t_helpers.phi3.tokenizer_files import load_tokenizer
    from so8t_helpers.train.batches import Schedule
    from so8t_helpers.train.watch import Watch

    step(0)
    schedule = Schedule([[[[0]]] * chosen.training.gradient_accumulation] * count, {}, 1)
    begun = time.perf_counter()
    watch = Watch(chosen, workers, micro_step, adapters, schedule, _rows(400), load_tokenizer(config))
    watch.look(0)
    first = time.perf_counter() - begun
    watch.rows.clear()
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for number in range(1, count + 1):
        at = time.perf_counter()
        step(number)
        torch.cuda.synchronize()
        watch.after_step({"seconds": time.perf_counter() - at, "step": number})
        watch.look(number)
    whole = time.perf_counter() - begun
    # The look before the first step is one of those that the cadence counts.
    looks = sum(row["seconds"] for row in watch.rows) * (1 + 1 / len(watch.rows))
    steps = sum(watch.step_seconds)
    answers = sorted({row["step"] for row in watch.written})
    round_seconds = watch.writer.write().seconds if watch.writer else None
    return {
        "held_out_share": round(looks / steps, 4),
        "writing_share": round((whole - steps - sum(row["seconds"] for row in watch.rows)) / steps, 4),
        "looks": len(watch.rows) + 1,
        "sequences_a_look": len(watch.held_out.sequences) if watch.held_out else 0,
        "seconds_a_look": [round(row["seconds"], 3) for row in watch.rows],
        "rounds_of_answers": answers,
        "seconds_a_round_expected": round(watch.expected_seconds, 2),
        "seconds_a_round": round_seconds,
        "tokens_an_answer_at_most": watch.writer.most if watch.writer else 0,
        "first_look_s": round(first, 1),
        "steps": count,
        "seconds": round(whole, 1),
        "captured": watch.held_out is not None and watch.held_out.graph is not None,
    }
