"""What all stacks of train_gpu.py share: sizes, random weights, documents, the clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

LENGTH, ACCUMULATION, RANK, ALPHA, DROPOUT = 2048, 16, 64, 128, 0.05
TARGETS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
GIB = 2**30
_DOCUMENT = 300  # mean tokens of a document


def random_tensor(shape: Any, name: str, generator: torch.Generator) -> torch.Tensor:
    """Draw one weight of the checkpoint on the card, fp16; norms are ones."""
    if "norm" in name:
        return torch.ones(shape.hidden_size, device=generator.device, dtype=torch.float16)
    size = next((shape.linear_shape(t) for t in TARGETS if t in name), (shape.vocab_size, shape.hidden_size))
    return (torch.randn(size, generator=generator, device=generator.device) * 0.02).half()


def documents(length: int, vocab: int, seed: int) -> list[np.ndarray]:
    """Token ids of documents that fill a sequence exactly."""
    rng = np.random.default_rng(seed)
    found, left = [], length
    while left:
        size = int(rng.integers(_DOCUMENT // 2, _DOCUMENT * 3 // 2))
        size = left if left - size < _DOCUMENT // 2 else size
        found.append(rng.integers(3, vocab, size))
        left -= size
    return found


def measure(step: Callable[[int], None], length: int, accumulation: int, started: float) -> dict[str, Any]:
    """Time optimizer steps: the first with all warm-up, then the median of the next, with peak memory."""
    step(0)
    torch.cuda.synchronize()
    first = time.perf_counter() - started
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for number in range(1, 4 if accumulation > 1 else 3):
        begun = time.perf_counter()
        step(number)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    return {
        "tokens_per_s": round(accumulation * length / statistics.median(seconds), 1),
        "seconds_per_step": [round(s, 4) for s in seconds],
        "first_step_s": round(first, 1),
        "peak_allocated_gib": round(torch.cuda.max_memory_allocated() / GIB, 3),
        "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 3),
    }
