"""Our stack for train_gpu.py, by the functions that 02_train calls."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from train_gpu_common import (
    ACCUMULATION,
    ALPHA,
    DROPOUT,
    GIB,
    LENGTH,
    RANK,
    documents,
    measure,
    random_tensor,
)
from train_gpu_watch import watched

from so8t_helpers.train import workers as train_workers


def packed_sequences(length: int, vocab: int, count: int) -> tuple[list[Any], int]:
    """Sequences for our stack, two thirds of each document with a target, and their most documents."""
    from so8t_helpers.train import batches

    sequences = []
    for seed in range(count):
        samples = []
        for ids in documents(length, vocab, seed):
            targets = np.full(len(ids), batches.IGNORE)
            targets[len(ids) // 3 : -1] = ids[len(ids) // 3 + 1 :]
            samples.append(batches.Document(ids, targets))
        sequences.append(samples)
    most = max(map(len, sequences))
    return [batches.build_sequence(samples, length, 0, most) for samples in sequences], most


def so8t(config: Path, scratch: Path, arguments: dict[str, Any]) -> dict[str, Any]:
    """Our stack, by the functions that 02_train calls."""
    from so8t_helpers import settings
    from so8t_helpers.phi3.shape import read_shape
    from so8t_helpers.train.adapters import Adapters
    from so8t_helpers.train.batches import Document
    from so8t_helpers.train.frozen import load_base
    from so8t_helpers.train.machine import build_micro_step, look_at_machine, prepare_allocator
    from so8t_helpers.train.optimizer import Optimizer
    from so8t_helpers.train.outliers import keep_apart

    workers = train_workers.join()
    defaults = {"cap": None, "steps": None, "rate": 1e-4, "watch": None}
    cap, steps, rate, watch = (arguments.pop(key, default) for key, default in defaults.items())
    if cap:
        torch.cuda.set_per_process_memory_fraction(
            cap * GIB / torch.cuda.get_device_properties(0).total_memory
        )
    training = {"precision": "bf16", "gradient_accumulation": ACCUMULATION, **arguments.pop("training", {})}
    lora = {"r": RANK, "alpha": ALPHA, "dropout": DROPOUT} | arguments.pop("lora", {})
    chosen = settings.validate({"training": training, "lora": lora, **arguments}, "benchmark")
    length, accumulation = chosen.training.sequence_length, chosen.training.gradient_accumulation
    shape, machine = read_shape(config), look_at_machine(chosen)
    prepare_allocator(chosen)
    generator = torch.Generator(device=machine.device).manual_seed(0)
    base = load_base(
        shape,
        lambda name: random_tensor(shape, name, generator),
        machine.model,
        machine.device,
        machine.dtype,
    )
    packed, most = packed_sequences(length, shape.vocab_size, accumulation)
    keep_apart(base, [Document(*[packed[0].tokens[:LENGTH].numpy()] * 2)])
    torch.cuda.empty_cache()
    counts = [sum(c) for c in zip(*(s.counts() for s in packed), strict=True)]

    started = time.perf_counter()
    adapters = Adapters(shape, chosen, machine.device)
    micro_step, plan = build_micro_step(base, adapters, chosen, machine, most)
    optimizer = Optimizer(adapters, chosen.training)
    losses = []

    def step(number: int) -> None:
        adapters.zero_grad()
        micro_step.begin_step(counts[1], counts[2], 0.05, optimizer.loss_scale)
        for index in range(workers.rank, accumulation, workers.count):
            micro_step.load(packed[index], 1000 * number + index)
            micro_step.run()
        workers.add_up([*adapters.gradients(), micro_step.task_loss])
        optimizer.step(rate)
        losses.append(round(micro_step.task_loss.item(), 4))

    if watch:
        return watched(config, chosen, workers, micro_step, adapters, step, watch)
    if steps:
        for number in range(steps):
            step(number)
        return {"losses": losses}
    found = measure(step, length, accumulation, started)
    if micro_step.graph is not None:  # a replay allocates nothing that the allocator counts: count it once
        micro_step.graph = None
        torch.cuda.reset_peak_memory_stats()
        micro_step.run()
        peak = round(torch.cuda.max_memory_allocated() / GIB, 3)
        found["peak_allocated_gib"] = max(found["peak_allocated_gib"], peak)
    host = getattr(micro_step.inputs, "host", None)
    return found | {
        "speed": machine.summary,
        "memory_plan": plan.describe(shape.num_layers),
        "pinned_host_gib": round(host.nbytes / GIB, 2) if host is not None else 0.0,
        "losses": losses,
        "shares_ms": shares(micro_step) if length == LENGTH else None,
        "parts_ms": parts(micro_step, optimizer) if length == LENGTH else None,
        "workers": workers.count,
    }


def shares(micro_step: Any) -> dict[str, float]:
    """Milliseconds of one micro-step by kind of kernel, from torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        micro_step.run()
        torch.cuda.synchronize()
    kinds = {
        "products": ("nvjet", "gemm", "cublas", "product_kernel"),
        "attention": ("flash",),
        "transfers beside the work": ("Memcpy HtoD", "Memcpy DtoH"),
    }
    found = dict.fromkeys([*kinds, "element-wise and the rest"], 0.0)
    for event in profiler.key_averages():
        kind = next((k for k, words in kinds.items() if any(w in event.key for w in words)), None)
        found[kind or "element-wise and the rest"] += event.self_device_time_total / 1000
    return {kind: round(ms, 2) for kind, ms in found.items()}


def parts(micro_step: Any, optimizer: Any) -> dict[str, float]:
    """Milliseconds of what a step has beside the decoder layers: both losses of a micro-step, one update.

    Outside the graph, so with their launches: no part costs a step more. What gates and LoRA cost within the
    layers shows in the stacks that do without them.
    """

    def timed(work: Callable[[], object]) -> float:
        seconds = []
        for _ in range(6):
            torch.cuda.synchronize()
            begun = time.perf_counter()
            work()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begun)
        return 1000 * statistics.median(seconds[1:])

    hidden, pet = torch.randn_like(micro_step.embedded), micro_step.pet
    with_pet = timed(lambda: micro_step._losses(hidden))
    micro_step.pet = pet.model_copy(update={"enabled": False})
    without = timed(lambda: micro_step._losses(hidden))
    micro_step.pet = pet
    found = {
        "cross-entropy": without,
        "PET": with_pet - without,
        "update": timed(lambda: optimizer.step(0.0)),
    }
    return {name: round(ms, 2) for name, ms in found.items()}


def agreement(config: Path, scratch: Path, arguments: dict[str, Any]) -> dict[str, Any]:
    """Losses of 20 optimizer steps of a small model: the fast path in bf16 and fp16 against plain float32.

    The bound: with unit roundoff u (2^-9 for bf16, 2^-12 for fp16), some ten roundings a layer on the way of
    the residual stream and L layers, hidden states are off by about sqrt(10 L) u, and so are the logits,
    whose spread is about 1, and the gradients. A loss is off by that, and by that share of what was learnt:
    |loss - loss_32| <= sqrt(10 L) u (1 + first loss - loss). Rounding to 8 bits with a token's largest number
    at 127 is off by its size over 127 sqrt(12) of the typical one: 0.8% where that is 3.5 (normal numbers),
    1.8% where it is 8 (products of two), 1.2% over the four of a layer and as many of the gradient:
    sqrt(8 L) 0.012 beside sqrt(10 L) u.
    """
    shape, layers, steps = json.loads((config / "config.json").read_text(encoding="utf-8")), 4, 20
    shape |= {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": layers}
    shape |= {"num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 4096}
    folder = scratch / "phi35-small"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape), encoding="utf-8")
    found: dict[str, Any] = {}
    runs = {"fp32": "plain", "bf16": "graph", "fp16": "graph", "bf16, tensor_core": "graph"}
    for name, speed in runs.items():
        precision, _, product = name.partition(", ")
        training = {
            "precision": precision,
            "speed": speed,
            "sequence_length": 1024,
            "gradient_accumulation": 2,
        }
        chosen = {"training": training, "model": {"int8_matmul": product or "weight_only"}}
        found[name] = so8t(folder, scratch, chosen | {"steps": steps, "rate": 1e-3})["losses"]
    ratios = {}
    of_8_bits = math.sqrt(8 * layers) * 0.012
    for name, roundoff, more in (
        ("bf16", 2.0**-9, 0.0),
        ("fp16", 2.0**-12, 0.0),
        ("bf16, tensor_core", 2.0**-9, of_8_bits),
    ):
        slack = math.hypot(math.sqrt(10 * layers) * roundoff, more)
        pairs = zip(found[name], found["fp32"], strict=True)
        first = found["fp32"][0]
        ratios[name] = max(abs(fast - plain) / (slack * (1 + first - plain)) for fast, plain in pairs)
    return {"losses": found, "worst_over_bound": {k: round(v, 4) for k, v in ratios.items()}}
