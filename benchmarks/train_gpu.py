"""Training speed and memory at Phi-3.5-mini's real shapes: ours against the libraries and Unsloth.

Each stack runs in a process of its own, on random weights, with the same packed tokens, LoRA and optimizer:

    python benchmarks/train_gpu.py --config CONFIG_FOLDER [--scratch FOLDER] [--only NAME ...]

CONFIG_FOLDER holds config.json and the tokenizer of Phi-3.5-mini; the peers' random checkpoint (7.6 GB) is
written to --scratch. Ours is the code that 02_train runs. Results go to benchmarks/results/train_gpu.json.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from claims import claim  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "train_gpu.json"
LENGTH, ACCUMULATION, RANK, ALPHA, DROPOUT = 2048, 16, 64, 128, 0.05
TARGETS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
DOCUMENT = 300  # mean tokens of a document
GIB = 2**30

# name -> (function, arguments, seconds it may take). Every stack compiles in its first step, which its median
# leaves out: what is compared is the warm speed.
OURS = "so8t"
STACKS: dict[str, tuple[str, dict[str, Any], int]] = {
    "so8t int8": (OURS, {"training": {"memory_gib": 5.0}}, 70),
    "unsloth int8": ("unsloth", {"bits": 8}, 240),
    "so8t int8, second start": (OURS, {"training": {"memory_gib": 5.0}}, 60),
    "so8t int8, no gates, no PET": (
        OURS,
        {"training": {"memory_gib": 5.0}, "so8t": {"enabled": False}, "pet": {"enabled": False}},
        60,
    ),
    "so8t int8, 11 GiB": (OURS, {"training": {"memory_gib": 11.0}, "cap": 11.0}, 70),
    "so8t nf4": (OURS, {"model": {"quantization": "nf4"}, "training": {"memory_gib": 3.5}}, 60),
    "unsloth nf4": ("unsloth", {"bits": 4}, 120),
    "so8t int8, 49,152 tokens, 11 GiB": (
        OURS,
        {"training": {"sequence_length": 49152, "memory_gib": 11.0, "gradient_accumulation": 1}, "cap": 11.0},
        80,
    ),
    "so8t int8 fp16, 11 GiB, all recomputed": (
        OURS,
        {"training": {"precision": "fp16", "memory_gib": 5.2}, "cap": 11.0},
        60,
    ),
    "libraries int8 (LLM.int8 as shipped)": ("libraries", {"oft": False}, 60),
    "libraries int8 + OFT on o_proj": ("libraries", {"oft": True}, 60),
    "so8t int8, 65,536 tokens, 11 GiB": (
        OURS,
        {"training": {"sequence_length": 65536, "memory_gib": 11.0, "gradient_accumulation": 1}, "cap": 11.0},
        90,
    ),
}


def random_tensor(shape: Any, name: str, generator: torch.Generator) -> torch.Tensor:
    """Draw one weight of the checkpoint on the card, fp16; norms are ones."""
    if "norm" in name:
        return torch.ones(shape.hidden_size, device="cuda", dtype=torch.float16)
    size = next((shape.linear_shape(t) for t in TARGETS if t in name), (shape.vocab_size, shape.hidden_size))
    return (torch.randn(size, generator=generator, device="cuda") * 0.02).half()


def documents(length: int, vocab: int, seed: int) -> list[np.ndarray]:
    """Token ids of documents that fill a sequence exactly."""
    rng = np.random.default_rng(seed)
    found, left = [], length
    while left:
        size = int(rng.integers(DOCUMENT // 2, DOCUMENT * 3 // 2))
        size = left if left - size < DOCUMENT // 2 else size
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


def so8t(config: Path, scratch: Path, arguments: dict[str, Any]) -> dict[str, Any]:
    """Our stack, by the functions that 02_train calls."""
    from so8t_helpers import packing, settings
    from so8t_helpers.adapters import Adapters
    from so8t_helpers.model import load_base
    from so8t_helpers.optimizing import Optimizer
    from so8t_helpers.phi3 import read_shape
    from so8t_helpers.speed import build_micro_step, look_at_machine

    cap = arguments.pop("cap", None)
    if cap:
        torch.cuda.set_per_process_memory_fraction(
            cap * GIB / torch.cuda.get_device_properties(0).total_memory
        )
    training = {"precision": "bf16", "gradient_accumulation": ACCUMULATION, **arguments.pop("training", {})}
    lora = {"r": RANK, "alpha": ALPHA, "dropout": DROPOUT}
    chosen = settings.validate({"training": training, "lora": lora, **arguments}, "benchmark")
    length, accumulation = chosen.training.sequence_length, chosen.training.gradient_accumulation
    shape, machine = read_shape(config), look_at_machine(chosen)
    generator = torch.Generator(device="cuda").manual_seed(0)
    base = load_base(
        shape,
        lambda name: random_tensor(shape, name, generator),
        chosen.model,
        machine.device,
        machine.dtype,
    )
    torch.cuda.empty_cache()
    sequences = []
    for seed in range(accumulation):
        samples = []
        for ids in documents(length, shape.vocab_size, seed):
            targets = np.full(len(ids), packing.IGNORE)
            targets[len(ids) // 3 : -1] = ids[len(ids) // 3 + 1 :]
            samples.append(packing.Sample(ids, targets))
        sequences.append(samples)
    most = max(map(len, sequences))
    packed = [packing.build_sequence(samples, length, 0, most) for samples in sequences]
    counts = [sum(c) for c in zip(*(s.counts() for s in packed), strict=True)]

    started = time.perf_counter()
    adapters = Adapters(shape, chosen, machine.device)
    micro_step, plan = build_micro_step(base, adapters, chosen, machine, most)
    optimizer = Optimizer(adapters, chosen.training, chosen.training.precision == "fp16")
    losses = []

    def step(number: int) -> None:
        adapters.zero_grad()
        micro_step.begin_step(counts[1], counts[2], 0.05, optimizer.loss_scale)
        for index, sequence in enumerate(packed):
            micro_step.load(sequence, 1000 * number + index)
            micro_step.run()
        optimizer.step(1e-4)
        losses.append(round(micro_step.task_loss.item(), 4))

    found = measure(step, length, accumulation, started)
    host = getattr(micro_step.inputs, "host", None)
    return found | {
        "speed": machine.summary,
        "memory_plan": plan.describe(shape.num_layers),
        "pinned_host_gib": round(host.nbytes / GIB, 2) if host is not None else 0.0,
        "losses": losses,
        "shares_ms": shares(micro_step) if length == LENGTH else None,
    }


def shares(micro_step: Any) -> dict[str, float]:
    """Milliseconds of one micro-step by kind of kernel, from torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        micro_step.run()
        torch.cuda.synchronize()
    kinds = {
        "products": ("nvjet", "gemm", "cublas"),
        "attention": ("flash",),
        "transfers beside the work": ("Memcpy HtoD", "Memcpy DtoH"),
    }
    found = dict.fromkeys([*kinds, "element-wise and the rest"], 0.0)
    for event in profiler.key_averages():
        kind = next((k for k, words in kinds.items() if any(w in event.key for w in words)), None)
        found[kind or "element-wise and the rest"] += event.self_device_time_total / 1000
    return {kind: round(ms, 2) for kind, ms in found.items()}


def checkpoint(config: Path, scratch: Path) -> Path:
    """Write the peers' random checkpoint once."""
    from safetensors.torch import save_file

    from so8t_helpers.model import weight_path
    from so8t_helpers.phi3 import read_shape

    folder = scratch / "phi35-random"
    if (folder / "model.safetensors").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    for file in config.iterdir():
        shutil.copy(file, folder)
    shape, generator = read_shape(config), torch.Generator(device="cuda").manual_seed(0)
    names = ["model.embed_tokens", "model.norm", "lm_head"]
    for i in range(shape.num_layers):
        names += [weight_path(i, target) for target in TARGETS]
        names += [f"model.layers.{i}.{norm}" for norm in ("input_layernorm", "post_attention_layernorm")]
    tensors = {f"{n}.weight": random_tensor(shape, f"{n}.weight", generator).cpu() for n in names}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    torch.cuda.empty_cache()
    return folder


def plain_loop(model: Any, started: float) -> dict[str, Any]:
    """The loop that any peer's model runs in: autocast to bf16, paged 8-bit AdamW."""
    from bitsandbytes.optim import PagedAdamW8bit

    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = PagedAdamW8bit(trainable, lr=1e-4)
    batches = []
    for seed in range(ACCUMULATION):
        ids = torch.from_numpy(np.concatenate(documents(LENGTH, model.config.vocab_size, seed)))[None].cuda()
        labels = ids.clone()
        labels[:, ::3] = -100
        batches.append({"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)})
    model.train()
    losses = []

    def step(_: int) -> None:
        total = 0.0
        for batch in batches:
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(**batch).loss / ACCUMULATION
            loss.backward()
            total = total + loss.detach()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(round(float(total), 4))

    found = measure(step, LENGTH, ACCUMULATION, started)
    return found | {"trainable": sum(p.numel() for p in trainable), "losses": losses}


def unsloth(config: Path, scratch: Path, arguments: dict[str, Any]) -> dict[str, Any]:
    """Unsloth's generic path with its own gradient checkpointing; no gates, no PET."""
    folder = checkpoint(config, scratch)
    started = time.perf_counter()
    import unsloth

    four = arguments["bits"] == 4
    model, _ = unsloth.FastModel.from_pretrained(
        str(folder), max_seq_length=LENGTH, dtype=torch.bfloat16, load_in_4bit=four, load_in_8bit=not four
    )
    model = unsloth.FastModel.get_peft_model(
        model,
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=DROPOUT,
        target_modules=TARGETS,
        use_gradient_checkpointing="unsloth",
        finetune_vision_layers=False,
    )
    return plain_loop(model, started) | {"version": unsloth.__version__}


def libraries(config: Path, scratch: Path, arguments: dict[str, Any]) -> dict[str, Any]:
    """Transformers, PEFT and bitsandbytes as their documentation puts them together."""
    from peft import (
        LoraConfig,
        OFTConfig,
        get_peft_model,
        inject_adapter_in_model,
        prepare_model_for_kbit_training,
    )
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder = checkpoint(config, scratch)
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=BitsAndBytesConfig(load_in_8bit=True),
        dtype=torch.bfloat16,
        device_map={"": 0},
    )
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    targets = TARGETS
    if arguments["oft"]:  # what a PEFT user has instead of a gate; it cannot go with LoRA on the same linear
        model = inject_adapter_in_model(OFTConfig(oft_block_size=8, target_modules=["o_proj"]), model, "oft")
        targets = [t for t in TARGETS if t != "o_proj"]
    lora = LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules=targets, task_type="CAUSAL_LM"
    )
    return plain_loop(get_peft_model(model, lora), started)


def claims(stacks: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry for each bound that issue 4 names and this machine can measure."""

    def get(name: str, key: str) -> float:
        return stacks.get(name, {}).get(key, float("nan"))

    ours, fast = "so8t int8", "tokens_per_s"
    rest = "so8t int8, no gates, no PET"
    rows = [
        ("tokens/s over Unsloth's 8-bit (warm)", get(ours, fast) / get("unsloth int8", fast), True, 3, "x"),
        (
            "peak memory over Unsloth's 8-bit",
            get(ours, "peak_allocated_gib") / get("unsloth int8", "peak_allocated_gib"),
            False,
            1,
            "x",
        ),
        ("8-bit, everything recomputed (stretch)", get(ours, fast), True, 20000, "tokens/s"),
        (
            "11 GiB over everything recomputed",
            get("so8t int8, 11 GiB", fast) / get(ours, fast),
            True,
            1.12,
            "x",
        ),
        ("time for gates and PET", get(rest, fast) / get(ours, fast) - 1, False, 0.03, "of the step"),
        (
            "memory for gates and PET",
            (get(ours, "peak_allocated_gib") - get(rest, "peak_allocated_gib")) * 1024,
            False,
            150,
            "MiB",
        ),
        (
            "fp16, 2,048 tokens, process capped at 11 GiB",
            get("so8t int8 fp16, 11 GiB, all recomputed", "peak_reserved_gib"),
            False,
            11,
            "GiB",
        ),
        (
            "49,152 tokens, process capped at 11 GiB",
            get("so8t int8, 49,152 tokens, 11 GiB", "peak_reserved_gib"),
            False,
            11,
            "GiB",
        ),
        (
            "65,536 tokens, process capped at 11 GiB (stretch)",
            get("so8t int8, 65,536 tokens, 11 GiB", "peak_reserved_gib"),
            False,
            11,
            "GiB",
        ),
        (
            "tokens/s over Unsloth's 4-bit (warm)",
            get("so8t nf4", fast) / get("unsloth nf4", fast),
            True,
            1.3,
            "x",
        ),
        (
            "peak memory over Unsloth's 4-bit",
            get("so8t nf4", "peak_allocated_gib") / get("unsloth nf4", "peak_allocated_gib"),
            False,
            1,
            "x",
        ),
        ("first start to first step, weights loaded", get(ours, "first_step_s"), False, 60, "s"),
        ("second start to first step", get("so8t int8, second start", "first_step_s"), False, 60, "s"),
    ]
    return [
        claim(name, round(value, 4), bound, unit, at_least)
        if not math.isnan(value)
        else {"name": name, "value": None, "bound": bound, "unit": unit, "holds": False}  # its stack failed
        for name, value, at_least, bound, unit in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, default=Path("runs"))
    parser.add_argument("--only", nargs="*", default=list(STACKS))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no further stack after this")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--one", help="measure one stack in this process and print it as JSON")
    options = parser.parse_args()
    if options.one:
        function, arguments, _ = STACKS[options.one]
        found = globals()[function](options.config, options.scratch, dict(arguments))
        print("RESULT " + json.dumps(found), flush=True)
        return
    begun = time.time()
    stacks: dict[str, Any] = {}
    for name in options.only:
        left = options.seconds - (time.time() - begun)
        if left < 20:
            stacks[name] = {"error": "not run: no time left on the machine"}
            continue
        command = [sys.executable, __file__, "--one", name, "--config", str(options.config)]
        command += ["--scratch", str(options.scratch)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=min(STACKS[name][2], left), check=False
            )
            lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            error = {"error": (done.stderr.strip().splitlines() or ["?"])[-1][:400]}
            stacks[name] = json.loads(lines[-1][7:]) if lines else error
            if not lines:
                print(done.stderr[-1500:], flush=True)
        except subprocess.TimeoutExpired:
            stacks[name] = {"error": f"stopped after {min(STACKS[name][2], left):.0f} s"}
        brief = {
            k: v for k, v in stacks[name].items() if k not in {"losses", "seconds_per_step", "shares_ms"}
        }
        print(f"{time.time() - begun:6.0f} s  {name}: {brief}", flush=True)
        write(options, stacks)


def write(options: argparse.Namespace, stacks: dict[str, Any]) -> None:
    """Write what is known so far; a machine may be taken away at any time."""
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
        "setup": f"batch 1, {LENGTH} packed tokens, accumulation {ACCUMULATION}, LoRA r={RANK} on all "
        f"linears, dropout {DROPOUT}, bf16, paged 8-bit AdamW",
        "stacks": stacks,
        "claims": claims(stacks),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
