"""8-bit products on the tensor cores: what they cost in exactness, and on a card what they gain.

    python benchmarks/int8.py --root FOLDER                                       (exactness, on any machine)
    python benchmarks/int8.py --root FOLDER --config CONFIG_FOLDER --seconds 540  (on a card)

FOLDER as for real_model_gpu.py: SmolLM2's GGUF file and `runs/smollm2` with a finished 01_dataset of GSM8K's
training part. CONFIG_FOLDER as for train_gpu.py. What is done is kept in FOLDER/int8.json and not repeated;
what there is no time for is left out, and the same call goes on. `--only NAME ...` picks parts by how their
names begin, so cards of one machine can share the work; `--merge FOLDER ...` takes in what theirs measured.
Results go to results/int8.json; a claim whose parts are missing is not in it.
`--rehearse` runs every part on the CPU, small, to see that it runs; no results then.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from claims import Work, claim, write_claims  # noqa: E402
from int8_quality import linears as linear_errors  # noqa: E402
from int8_quality import losses  # noqa: E402
from int8_speed import linears, projection, tiles  # noqa: E402
from real_model_gpu import settings_of, train  # noqa: E402
from train_gpu import ALL_STACKS, run_stacks  # noqa: E402
from train_gpu_ours import so8t  # noqa: E402

from so8t_helpers.settings import merge  # noqa: E402

RATE = 4e-3  # the best of real_model_gpu.py
PRODUCTS = ("weight_only", "tensor_core")
PAIRS = {
    "2,048 tokens": ("so8t int8", "so8t tensor_core"),
    "11 GiB": ("so8t int8, 11 GiB", "so8t tensor_core, 11 GiB"),
    "49,152 tokens": ("so8t int8, 49,152 tokens, 11 GiB", "so8t tensor_core, 49,152 tokens, 11 GiB"),
}
OTHERS = ("20 steps against float32", "unsloth int8")
# Phi-3's form in small, for the rehearsal.
SMALL = {"hidden_size": 256, "intermediate_size": 576, "num_hidden_layers": 2, "vocab_size": 512}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 4}


def parts(options: argparse.Namespace) -> dict[str, tuple[float, Callable[[], Any]]]:
    """What is to be measured here, the most telling first: name -> (seconds it needs, function)."""
    root, small = options.root, options.rehearse
    found: dict[str, tuple[float, Callable[[], Any]]] = {
        "errors of linears": (30, lambda: linear_errors(root, 512)),
        "held-out loss before the first step": (30, lambda: losses(root, 512, 2 if small else 130)),
    }
    if options.config is None:
        return found
    found["projection for an RTX 3060"] = (0, lambda: projection(options.config))
    for name in PAIRS["2,048 tokens"]:
        found[name] = (90, lambda n=name: stack(options, n))
    found["linears, microseconds"] = (60, lambda: linears(options.config, *([64] if small else [])))
    for seed in range(1 if small else 3):
        for product in PRODUCTS:
            name = f"held out, {product}, seed {seed}"
            found[name] = (60, lambda p=product, s=seed: train_smollm2(root, p, s))
    for name in [*PAIRS["11 GiB"], *PAIRS["49,152 tokens"], *OTHERS]:
        found[name] = (ALL_STACKS[name][2], lambda n=name: stack(options, n))
    if torch.cuda.is_available():
        found["tiles, TOP/s"] = (90, lambda: tiles(options.config))
    return found


def stack(options: argparse.Namespace, name: str) -> Any:
    """One of train_gpu.py's stacks in a process of its own; small and here in a rehearsal."""
    if not options.rehearse:
        found: dict[str, Any] = {}
        run_stacks(options, {name: ALL_STACKS[name]}, found, 0)
        return found[name]
    if name in OTHERS:
        return "needs a card"
    function, arguments, _ = ALL_STACKS[name]
    assert function == "so8t"
    training = {"precision": "fp32", "sequence_length": 256, "gradient_accumulation": 1}
    chosen = {"training": {**training, "optimizer": "adamw"}, "model": arguments.get("model", {}), "steps": 2}
    return so8t(options.config, options.root, chosen)


def train_smollm2(root: Path, product: str, seed: int) -> dict[str, Any]:
    """Train SmolLM2 on GSM8K with one product and seed; its figures on held-out records."""
    settings = settings_of(root, f"int8-{product}-{seed}", RATE, {})
    return train(merge(settings, {"model": {"int8_matmul": product}, "run": {"seed": seed}}))


def claims(done: dict[str, Any]) -> list[dict[str, Any]]:
    """Those bounds of issue 18 for which everything is measured."""
    found = []

    def add(
        name: str, parts: list[Any], value: Callable[..., float], bound: float, unit: str, *least: bool
    ) -> None:
        if None not in parts:
            found.append(claim(name, round(value(*parts), 5), bound, unit, *least))

    def get(name: str, key: str) -> Any:
        entry = done.get(name)
        return entry.get(key) if isinstance(entry, dict) else None

    def pair(which: str, key: str) -> list[Any]:
        return [get(name, key) for name in PAIRS[which]]

    errors = done.get("errors of linears")
    add(
        "8-bit products: error over LLM.int8's, mean of SmolLM2's linears",
        [errors],
        lambda e: (
            sum(v["tensor_core"]["mean"] for v in e.values()) / sum(v["LLM.int8"]["mean"] for v in e.values())
        ),
        1,
        "x",
    )
    start = "held-out loss before the first step"
    before = [get(start, product) for product in PRODUCTS]
    add("8-bit products: held-out loss before the first step", before, lambda a, b: b - a, 0.002, "nats")
    for which, bound in (("2,048 tokens", 1.3), ("11 GiB", 1.2), ("49,152 tokens", 1.15)):
        speeds = pair(which, "tokens_per_s")
        add(
            f"8-bit products: tokens/s over weight_only, {which}",
            speeds,
            lambda a, b: b / a,
            bound,
            "x",
            True,
        )
    memory = pair("2,048 tokens", "peak_allocated_gib")
    add("8-bit products: peak memory over weight_only", memory, lambda a, b: b / a, 1, "x")
    name = "so8t tensor_core"
    add("8-bit products: start to first step", [get(name, "first_step_s")], lambda a: a, 60, "s")
    speeds = [get("unsloth int8", "tokens_per_s"), get(name, "tokens_per_s")]
    add("8-bit products: tokens/s over Unsloth's 8-bit", speeds, lambda a, b: b / a, 6.5, "x", True)
    held = [get(f"held out, {p}, seed {s}", "held-out loss") for p in PRODUCTS for s in range(3)]
    add(
        "8-bit products: held-out loss over weight_only, means of 3 seeds",
        held,
        lambda *all_: statistics.mean(all_[3:]) - statistics.mean(all_[:3]),
        0.002,
        "nats",
    )
    worst = [(get("20 steps against float32", "worst_over_bound") or {}).get("bf16, tensor_core")]
    add("8-bit products: 20 steps against float32, over the bound", worst, lambda a: a, 1, "x")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--scratch", type=Path, default=Path("runs"))
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--only", nargs="*", default=[""])
    parser.add_argument("--merge", type=Path, nargs="*", default=[])
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of its cast to fp16 at every product
    options.root = options.root.resolve()
    kept = options.root / ("int8_rehearsal.json" if options.rehearse else "int8.json")
    if options.rehearse:
        small = options.root / "phi3-rehearsal"
        small.mkdir(exist_ok=True)
        shape = json.loads((options.config / "config.json").read_text(encoding="utf-8")) | SMALL
        (small / "config.json").write_text(json.dumps(shape | {"rope_scaling": None}), encoding="utf-8")
        options.config = small
    options.begun, options.output = time.time(), options.root / "int8_stacks.json"
    options.only, chosen = list(ALL_STACKS), tuple(options.only)
    work = Work(kept, options.seconds)
    for other in options.merge:
        work.done |= json.loads((other / "int8.json").read_text(encoding="utf-8"))
    if torch.cuda.is_available():
        work.part("card", 0, lambda: f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for name, (needs, measure) in parts(options).items():
        if name.startswith(chosen):
            work.part(name, needs, measure)
    if not options.rehearse:
        write_claims("int8", work.done, claims(work.done))


if __name__ == "__main__":
    main()
