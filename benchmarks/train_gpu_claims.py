"""The bounds that issue 4 names, from the figures of train_gpu.py's stacks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from claims import claim


def merge(files: list[Path]) -> dict[str, Any]:
    """Put into the first file's results what it lacks; what another kind of card measured names the card."""
    result, *others = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    for other in others:
        card, here = (r["machine"].split(",")[0] for r in (other, result))
        for name, found in other["stacks"].items():
            place = name if card == here else f"{name}, {card}"
            if "error" not in found and "error" in result["stacks"].get(place, {"error": ""}):
                result["stacks"][place] = found | {"call": "another one", "machine": other["machine"]}
    return result | {"claims": claims(result["stacks"])}


def claims(stacks: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry for each bound that issue 4 names and this machine can measure."""

    def get(name: str, key: str) -> float:
        return stacks.get(name, {}).get(key, float("nan"))

    ours, speed, peak, taken = "so8t int8", "tokens_per_s", "peak_allocated_gib", "peak_reserved_gib"
    h200 = f"{ours}, NVIDIA H200" if f"{ours}, NVIDIA H200" in stacks else ours
    rest, two, second = "so8t int8, no gates, no PET", "so8t int8, 2 GPUs", "so8t int8, second start"
    # Measured twice; whatever else the host does only slows a run down. The first stands against Unsloth.
    best = max(get(ours, speed), get(second, speed))
    losses = [stacks.get(name, {}).get("losses", []) for name in (ours, second, two)]
    noise, apart = (
        max((abs(a - b) for a, b in zip(losses[0], other, strict=False)), default=math.nan)
        for other in losses[1:]
    )
    watched = "so8t int8, watched"
    worst = stacks.get("20 steps against float32", {}).get("worst_over_bound", {})
    rows = [
        (
            "8-bit: tokens/s over Unsloth's (warm)",
            get(ours, speed) / get("unsloth int8", speed),
            True,
            3,
            "x",
        ),
        ("8-bit: peak memory over Unsloth's", get(ours, peak) / get("unsloth int8", peak), False, 1, "x"),
        ("8-bit, everything recomputed (stretch, on an H200)", get(h200, speed), True, 20000, "tokens/s"),
        ("11 GiB over everything recomputed", get("so8t int8, 11 GiB", speed) / best, True, 1.12, "x"),
        ("time for gates and PET", get(rest, speed) / best - 1, False, 0.03, "of the step"),
        ("memory for gates and PET", (get(ours, peak) - get(rest, peak)) * 1024, False, 150, "MiB"),
        (
            "fp16, 2,048 tokens, process capped at 11 GiB",
            get("so8t int8 fp16, 11 GiB", taken),
            False,
            11,
            "GiB",
        ),
        ("49,152 tokens, capped at 11 GiB", get("so8t int8, 49,152 tokens, 11 GiB", taken), False, 11, "GiB"),
        (
            "65,536 tokens, capped at 11 GiB (stretch)",
            get("so8t int8, 65,536 tokens, 11 GiB", taken),
            False,
            11,
            "GiB",
        ),
        (
            "4-bit: tokens/s over Unsloth's (warm)",
            get("so8t nf4", speed) / get("unsloth nf4", speed),
            True,
            1.3,
            "x",
        ),
        (
            "4-bit: peak memory over Unsloth's",
            get("so8t nf4", peak) / get("unsloth nf4", peak),
            False,
            1,
            "x",
        ),
        ("2 GPUs over one", get(two, speed) / best, True, 1.9, "x"),
        ("losses on 2 GPUs: off by, over 1 GPU twice", apart / max(noise, 1e-4), False, 3, "x"),
        ("20 steps in bf16 against float32, over the bound", worst.get("bf16", math.nan), False, 1, "x"),
        ("20 steps in fp16 against float32, over the bound", worst.get("fp16", math.nan), False, 1, "x"),
        (
            "held-out losses at the default cadence",
            get(watched, "held_out_share"),
            False,
            0.03,
            "of the steps",
        ),
        ("answers at the default cadence", get(watched, "writing_share"), False, 0.02, "of the steps"),
        ("first start to first step, weights loaded", get(ours, "first_step_s"), False, 60, "s"),
        ("second start to first step", get(second, "first_step_s"), False, 60, "s"),
    ]
    return [
        claim(name, round(value, 4), bound, unit, at_least)
        if not math.isnan(value)
        else {"name": name, "value": None, "bound": bound, "unit": unit, "holds": False}  # its stack failed
        for name, value, at_least, bound, unit in rows
    ]
