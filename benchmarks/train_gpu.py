"""Training speed and memory at Phi-3.5-mini's real shapes: ours against the libraries and Unsloth.

Each stack runs in a process of its own, on random weights, with the same packed tokens, LoRA and optimizer;
where the machine has a second card, what is measured alone for its memory runs there meanwhile:

    python benchmarks/train_gpu.py --config CONFIG_FOLDER [--scratch FOLDER] [--only NAME ...]

CONFIG_FOLDER holds config.json and the tokenizer of Phi-3.5-mini; the peers' random checkpoint (7.6 GB) is
written to --scratch. Ours is the code that 02_train runs. Results go to benchmarks/results/train_gpu.json.
Where no one machine is lent for long enough, calls with --only and --output are put together by

    python benchmarks/train_gpu.py --merge FIRST.json OTHER.json ...
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from train_gpu_claims import claims, merge  # noqa: E402
from train_gpu_common import ACCUMULATION, DROPOUT, LENGTH, RANK  # noqa: E402
from train_gpu_ours import agreement, so8t  # noqa: E402
from train_gpu_peers import libraries, unsloth  # noqa: E402

from so8t_helpers.train import workers  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "train_gpu.json"

FUNCTIONS = {f.__name__: f for f in (so8t, agreement, unsloth, libraries)}
OURS = "so8t"
RECOMPUTED = {"training": {"memory_gib": 5.0}}  # room for nothing but what every layer recomputes
LONG = {"memory_gib": 11.0, "gradient_accumulation": 1}

# name -> (function, arguments, seconds it may take). Every stack compiles in its first step, which its median
# leaves out: what is compared is the warm speed. The first list runs on the first card.
STACKS: dict[str, tuple[str, dict[str, Any], int]] = {
    "so8t int8": (OURS, RECOMPUTED, 80),
    "unsloth int8": ("unsloth", {"bits": 8}, 240),
    "so8t int8, second start": (OURS, RECOMPUTED, 60),
    "so8t int8, no gates, no PET": (
        OURS,
        {**RECOMPUTED, "so8t": {"enabled": False}, "pet": {"enabled": False}},
        60,
    ),
    "so8t int8, LoRA r=8, no dropout": (
        OURS,
        {**RECOMPUTED, "lora": {"r": 8, "alpha": 16, "dropout": 0.0}},
        60,
    ),
    "so8t int8, watched": (OURS, {**RECOMPUTED, "watch": 40}, 240),
    "so8t int8, 11 GiB": (OURS, {"training": {"memory_gib": 11.0}, "cap": 11.0}, 70),
    "so8t nf4": (OURS, {"model": {"quantization": "nf4"}, "training": {"memory_gib": 3.6}}, 60),
    "unsloth nf4": ("unsloth", {"bits": 4}, 120),
}
MEMORY_STACKS: dict[str, tuple[str, dict[str, Any], int]] = {
    "so8t int8 fp16, 11 GiB": (
        OURS,
        {"training": {"precision": "fp16", "memory_gib": 11.0}, "cap": 11.0},
        80,
    ),
    "so8t int8, 49,152 tokens, 11 GiB": (
        OURS,
        {"training": {"sequence_length": 49152, **LONG}, "cap": 11.0},
        110,
    ),
    "so8t int8, 65,536 tokens, 11 GiB": (
        OURS,
        {"training": {"sequence_length": 65536, **LONG}, "cap": 11.0},
        120,
    ),
    "20 steps against float32": ("agreement", {}, 150),
    "libraries int8 (LLM.int8 as shipped)": ("libraries", {"oft": False}, 110),
    "libraries int8 + OFT on o_proj": ("libraries", {"oft": True}, 110),
}
TWO_CARDS: dict[str, tuple[str, dict[str, Any], int]] = {"so8t int8, 2 GPUs": (OURS, RECOMPUTED, 100)}
TENSOR_CORE = {"model": {"int8_matmul": "tensor_core"}}
# Measured by int8.py alone, beside those above.
INT8_STACKS: dict[str, tuple[str, dict[str, Any], int]] = {
    "so8t tensor_core": (OURS, {**RECOMPUTED, **TENSOR_CORE}, 90),
    "so8t tensor_core, 11 GiB": (OURS, {**STACKS["so8t int8, 11 GiB"][1], **TENSOR_CORE}, 90),
    "so8t tensor_core, 49,152 tokens, 11 GiB": (
        OURS,
        {**MEMORY_STACKS["so8t int8, 49,152 tokens, 11 GiB"][1], **TENSOR_CORE},
        120,
    ),
}
ALL_STACKS = {**STACKS, **MEMORY_STACKS, **TWO_CARDS, **INT8_STACKS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path)
    parser.add_argument("--scratch", type=Path, default=Path("runs"))
    parser.add_argument("--only", nargs="*", default=list(ALL_STACKS))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no further stack after this")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--merge", type=Path, nargs="+", help="put these results together; measures nothing")
    parser.add_argument("--one", help="measure one stack in this process and print it as JSON")
    options = parser.parse_args()
    if options.merge:
        save(options.output, merge(options.merge))
        return
    if not options.config:
        parser.error("--config is missing: a folder with config.json and the tokenizer of Phi-3.5-mini")
    if options.one:
        function, arguments, _ = ALL_STACKS[options.one]
        found = FUNCTIONS[function](options.config, options.scratch, dict(arguments))
        if int(os.environ.get("RANK", "0")) == 0:
            print("RESULT " + json.dumps(found), flush=True)
        return
    options.begun = time.time()
    stacks: dict[str, Any] = {}
    cards = torch.cuda.device_count()
    beside = threading.Thread(target=run_stacks, args=(options, MEMORY_STACKS, stacks, min(1, cards - 1)))
    if cards > 1:
        beside.start()
    run_stacks(options, STACKS, stacks, 0)
    if cards > 1:
        beside.join()
        run_stacks(options, TWO_CARDS, stacks, None)
    else:
        beside.run()


def run_stacks(options: argparse.Namespace, names: Any, stacks: dict[str, Any], card: int | None) -> None:
    """Run one stack after the other on one card (None: on two); write what is known after each."""
    for name in [n for n in names if n in options.only]:
        left = options.seconds - (time.time() - options.begun)
        if left < 20:
            stacks[name] = {"error": "not run: no time left on the machine"}
            continue
        environment = dict(os.environ)
        if card is not None:
            seen = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
            environment["CUDA_VISIBLE_DEVICES"] = seen[card]
        launch = workers.launcher(2) if card is None else []
        command = [sys.executable, *launch, __file__, "--one", name]
        command += ["--config", str(options.config), "--scratch", str(options.scratch)]
        limit = min(ALL_STACKS[name][2], left)
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=limit, check=False, env=environment
            )
            lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            error = {"error": (done.stderr.strip().splitlines() or ["?"])[-1][:400]}
            stacks[name] = json.loads(lines[-1][7:]) if lines else error
            if not lines:
                print(done.stderr[-1500:], flush=True)
        except subprocess.TimeoutExpired:
            stacks[name] = {"error": f"stopped after {limit:.0f} s"}
        brief = {
            k: v
            for k, v in stacks[name].items()
            if k not in {"losses", "seconds_per_step", "shares_ms", "parts_ms"}
        }
        print(f"{time.time() - options.begun:6.0f} s  {name}: {brief}", flush=True)
        write(options, dict(stacks))


def write(options: argparse.Namespace, stacks: dict[str, Any]) -> None:
    """Write what is known so far; a machine may be taken away at any time."""
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{torch.cuda.get_device_name()}, {torch.cuda.device_count()} cards",
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
        "setup": f"batch 1, {LENGTH} packed tokens, accumulation {ACCUMULATION}, LoRA r={RANK} on all "
        f"linears, dropout {DROPOUT}, bf16, paged 8-bit AdamW",
        "stacks": stacks,
        "claims": claims(stacks),
    }
    save(options.output, result)


def save(output: Path, result: dict[str, Any]) -> None:
    """Write results as JSON."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
