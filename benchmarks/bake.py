"""Baking at real size: against copying the same bytes, and against load, dense product, save_pretrained.

    python benchmarks/bake.py                 # Phi-3.5-mini's shapes, 3.8 G parameters; needs 24 GB of disk
    python benchmarks/bake.py --layers 4      # a quick look, which is not written to the results

On a shared machine the steps can be run one by one, with the same `--folder`: `--steps make`, then `rounds`
(again and again, if it must be short), `bake_and_prove`, `dense`, `report`; the folder keeps their figures,
and the report claims what was measured.

Each program runs in a process of its own, so that its peak memory is its own; imports are not timed.
Copying and baking take turns, each ends with fsync, and the claim is about their best times. Before either a
copy is made and removed that does not count: both find the base in the system's cache, and pages that the
system has at hand (a virtual machine's host takes free ones back; fresh ones cost thrice the copying).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HIDDEN, INTERMEDIATE, VOCABULARY, HEADS, RANK = 3072, 8192, 32064, 32, 64
LINEARS = {
    "self_attn.qkv_proj": (3 * HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_up_proj": (2 * INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
SHARD_BYTES = 5 * 10**9
PROOF_TEXTS, PROOF_TOKENS = 8, 80  # the stage's defaults
MOST_TIMES_COPY, MOST_GIB = 1.5, 1.5


def make_model(folder: Path, layers: int, dtype: str) -> int:
    """Write a Phi3 folder with random weights, an adapter and gates; returns the bytes of the weights."""
    import torch
    from safetensors.torch import save_file

    from so8t_helpers.phi3 import weights
    from so8t_helpers.so8 import rotation

    width = 4 if dtype == "F32" else 2
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.{name}.weight": shape for name, shape in LINEARS.items()}
        shapes |= {f"{prefix}.{n}_layernorm.weight": (HIDDEN,) for n in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    places = [
        weights.TensorPlace(name, dtype, shape, folder, 0, torch.Size(shape).numel() * width)
        for name, shape in shapes.items()
    ]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(VOCABULARY * HIDDEN, generator=generator).mul_(0.02).to(weights.FLOATS[dtype])
    ones = torch.ones(HIDDEN, dtype=noise.dtype)
    base = folder / "base"
    base.mkdir()
    for place in weights.lay_out(places, base, SHARD_BYTES).values():
        with place.path.open("rb+") as file:
            file.seek(place.offset)
            values = ones if "norm" in place.name else noise[: place.nbytes // width]
            file.write(values.view(torch.uint8).numpy().data)
    config = {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "dtype": str(noise.dtype).removeprefix("torch."),
    }
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    adapter = folder / "adapter"
    adapter.mkdir()
    lora = {}
    for layer in range(layers):
        for name, (rows, columns) in LINEARS.items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            lora[f"{key}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator) * 0.02
            lora[f"{key}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator) * 0.02
    save_file(lora, adapter / "adapter_model.safetensors")
    settings = json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK})
    (adapter / "adapter_config.json").write_text(settings, encoding="utf-8")
    gates = rotation.Gates(rotation.initial_free(layers, HIDDEN, 0.05, generator), list(range(layers)))
    rotation.save_gates(adapter / rotation.GATES_FILE, gates)
    return sum(place.nbytes for place in places)


def copy(folder: Path, out: Path) -> dict[str, float]:
    """The floor: the weight files copied by the system's fastest call, then fsync."""
    started = time.perf_counter()
    for path in sorted((folder / "base").glob("*.safetensors")):
        shutil.copyfile(path, out / path.name)
        with (out / path.name).open("rb+") as file:
            os.fsync(file.fileno())
    return {"seconds": time.perf_counter() - started}


def bake(folder: Path, out: Path) -> dict[str, float]:
    """Ours, without its proof."""
    from so8t_helpers.bake import rows as bake_rows
    from so8t_helpers.phi3 import lora_folder, weights
    from so8t_helpers.so8 import rotation

    started = time.perf_counter()
    base = weights.read_checkpoint(folder / "base")
    pairs = lora_folder.read_adapter(folder / "adapter", base)
    gates = rotation.load_gates(folder / "adapter" / rotation.GATES_FILE)
    bake_rows.bake_checkpoint(base, bake_rows.plan_changes(base, pairs, gates), out, SHARD_BYTES)
    return {"seconds": time.perf_counter() - started}


def bake_and_prove(folder: Path, out: Path, count: int) -> dict[str, float]:
    """Ours with its proof on `count` texts of random tokens."""
    import torch

    from so8t_helpers.bake import proof
    from so8t_helpers.bake import rows as bake_rows
    from so8t_helpers.phi3 import lora_folder, weights
    from so8t_helpers.phi3.stream import read_config
    from so8t_helpers.run.progress import Progress
    from so8t_helpers.settings import validate
    from so8t_helpers.so8 import rotation

    bake(folder, out)
    started = time.perf_counter()
    base = weights.read_checkpoint(folder / "base")
    gates = rotation.load_gates(folder / "adapter" / rotation.GATES_FILE)
    changes = bake_rows.plan_changes(base, lora_folder.read_adapter(folder / "adapter", base), gates)
    config = read_config(folder / "base")
    texts = torch.randint(0, VOCABULARY, (count, PROOF_TOKENS)).tolist()
    settings = validate({"run": {"name": "bench", "root": str(out)}}, "benchmark")
    with Progress(settings, "03_bake", config.num_hidden_layers, "layer", "prove") as bar:
        facts = proof.prove(config, base, changes, gates, weights.read_checkpoint(out), texts, bar)
    return {
        "seconds": time.perf_counter() - started,
        "tokens": count * PROOF_TOKENS,
        "logit_scale": facts["logit_scale"],
        "logits_baking": facts["logits"]["baking"]["largest"],
        "logits_rounding": facts["logits"]["rounding"]["largest"],
        "o_proj_difference": max(layer["o_proj_difference"] for layer in facts["layers"]),
        "weight_error": max(weight["baked_error"] for weight in facts["weights"]),
    }


def dense(folder: Path, out: Path) -> dict[str, float]:
    """The peers' way: the whole model, B @ A and a dense d x d rotation, save_pretrained."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from so8t_helpers.so8 import rotation

    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype="auto")
    lora = load_file(folder / "adapter" / "adapter_model.safetensors")
    gates = rotation.load_gates(folder / "adapter" / rotation.GATES_FILE)
    for layer, free in zip(gates.layers, gates.free, strict=True):
        for name in LINEARS:
            key = f"base_model.model.model.layers.{layer}.{name}"
            linear = model.get_submodule(f"model.layers.{layer}.{name}")
            a, b = lora[f"{key}.lora_A.weight"], lora[f"{key}.lora_B.weight"]
            weight = linear.weight.data.float() + 2.0 * (b @ a)
            if name.endswith("o_proj"):
                weight = weight @ torch.block_diag(*rotation.rotation(free))
            linear.weight.data = weight.to(linear.weight.dtype)
    model.save_pretrained(out, max_shard_size="5GB")
    for path in out.glob("*.safetensors"):
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    return {"seconds": time.perf_counter() - started}


STEPS = ("make", "rounds", "bake_and_prove", "dense", "report")
PROGRAMS: dict[str, Callable[[argparse.Namespace], dict[str, float]]] = {
    "copy": lambda options: copy(options.folder, options.out),
    "bake": lambda options: bake(options.folder, options.out),
    "bake_and_prove": lambda options: bake_and_prove(options.folder, options.out, options.texts),
    "dense": lambda options: dense(options.folder, options.out),
}


def peak_gib() -> float:
    """Peak resident memory of this process, in GiB.

    Linux's ru_maxrss would start at what the parent held when it forked; VmHWM begins anew.
    """
    import psutil

    status = Path("/proc/self/status")
    if status.is_file():
        line = next(ln for ln in status.read_text().splitlines() if ln.startswith("VmHWM:"))
        return int(line.split()[1]) / 2**20
    info = psutil.Process().memory_info()
    if hasattr(info, "peak_wset"):  # Windows
        return info.peak_wset / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30  # macOS counts bytes


def measure(program: str, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Run one program in a process of its own; its output folder is removed afterwards."""
    out = Path(tempfile.mkdtemp(dir=folder, prefix=f"{program}-"))
    command = [sys.executable, __file__, "--program", program, "--folder", str(folder), "--out", str(out)]
    command += ["--texts", str(options.texts)]
    os.sync() if hasattr(os, "sync") else None  # what an earlier one left to write is not this one's
    try:
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    finally:
        shutil.rmtree(out)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(program, {k: float(f"{v:.4g}") for k, v in figures.items()}, flush=True)
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--dtype", choices=["F16", "BF16"], default="F16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--texts", type=int, default=PROOF_TEXTS, help="held-out texts of the proof")
    parser.add_argument("--folder", type=Path, help="where to put the models; default: a temporary folder")
    parser.add_argument("--steps", choices=STEPS, nargs="+", default=list(STEPS))
    parser.add_argument("--program", choices=list(PROGRAMS), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.program:
        figures = PROGRAMS[options.program](options)
        print(json.dumps({**figures, "cpu_seconds": time.process_time(), "peak_gib": peak_gib()}))
        return 0
    if options.steps != list(STEPS) and options.folder is None:
        parser.error("--steps needs --folder, where the steps leave what they make")
    folder = options.folder or Path(tempfile.mkdtemp(prefix="so8t-bake-"))
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / "figures.json"
    figures: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {"rounds": []}
    for step in options.steps:
        if step == "make":
            figures |= {"layers": options.layers, "dtype": options.dtype}
            figures["weight_bytes"] = make_model(folder, options.layers, options.dtype)
        elif step == "rounds":
            for _ in range(options.rounds):
                turns = {}
                for name in ("copy", "bake"):
                    measure("copy", folder, options)  # both begin in what it leaves behind
                    turns[name] = measure(name, folder, options)
                figures["rounds"].append(turns)
        elif step == "report":
            shutil.rmtree(folder)
            return report(figures)
        else:
            figures[step] = measure(step, folder, options)
        kept.write_text(json.dumps(figures))
    return 0


def report(figures: dict[str, Any]) -> int:
    """Hold the figures against the bounds; figures of the full size become the results."""
    from claims import claim, write_claims

    copying = min(r["copy"]["seconds"] for r in figures["rounds"])
    baking = min(r["bake"]["seconds"] for r in figures["rounds"])
    peak = max(r["bake"]["peak_gib"] for r in figures["rounds"])
    claims = [
        claim("bake against copying the same files", round(baking / copying, 3), MOST_TIMES_COPY, "times"),
        claim("peak memory of baking", round(peak, 2), MOST_GIB, "GiB"),
    ]
    if proof := figures.get("bake_and_prove"):
        claims.append(claim("peak memory of baking and proof", round(proof["peak_gib"], 2), MOST_GIB, "GiB"))
        claims.append(claim("logits, gated against baked", proof["logits_baking"], 1e-4, "logit"))
    if peer := figures.get("dense"):
        ratio = round(baking / peer["seconds"], 3)
        claims.append(claim("bake against load, dense product, save", ratio, 1.0, "times"))
    if figures["layers"] < 32:
        print(json.dumps(claims, indent=1))
        return 0
    return 0 if write_claims("bake", figures, claims) else 1


if __name__ == "__main__":
    sys.exit(main())
