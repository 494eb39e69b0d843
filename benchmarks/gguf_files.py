"""F16 + Q8_0 + Q4_K_M in one pass, against llama.cpp's converter run twice and its quantiser once.

    python benchmarks/gguf_files.py                 # Phi-3.5-mini's shapes; needs 30 GB of disk
    python benchmarks/gguf_files.py --layers 2      # a quick look, which is not written to the results

On a shared machine the steps can be run one by one, with the same `--folder`: `--steps make`, then `ours`,
`theirs`, `compare`; the folder keeps their figures, and the last one writes the results and empties it.

SO8T_LLAMA_CPP names the folder with llama.cpp's own programs (`.ci/llama_cpp.sh` builds them and prints it).
Every program is one process, timed with its start, its peak memory sampled; all use as many threads.
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

import psutil

HERE = Path(__file__).resolve().parent
# This file is called like the package it uses: its folder must not come first.
sys.path = [entry for entry in sys.path if Path(entry).resolve() != HERE]
sys.path += [str(HERE), str(HERE.parent / "tests")]

MOST_GIB, MOST_TIMES = 2.0, 1.0
TYPES = ("f16", "q8_0", "q4_k_m")
SHARD_BYTES = 5 * 10**9


def make_model(folder: Path, layers: int) -> int:
    """Write a Phi3 folder of Phi-3.5-mini's shapes with random float16 weights; return their number of bytes.

    The weights are one block of noise over and over: its length is prime to the rows', so no two rows of a
    tensor are the same.
    """
    import numpy as np
    import phi3_folders
    import torch

    from so8t_helpers.phi3 import weights
    from so8t_helpers.phi3.shape import LINEARS, read_shape

    phi3_folders.write_side_files(
        folder,
        hidden_size=3072,
        intermediate_size=8192,
        num_attention_heads=32,
        num_key_value_heads=32,
        num_hidden_layers=layers,
        vocab_size=32064,
        rope_scaling={"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48},
    )
    shape = read_shape(folder)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab_size, shape.hidden_size)}
    for layer in range(layers):
        for name in LINEARS:
            part = "self_attn" if name in {"qkv_proj", "o_proj"} else "mlp"
            shapes[f"model.layers.{layer}.{part}.{name}.weight"] = shape.linear_shape(name)
        for norm in ("input", "post_attention"):
            shapes[f"model.layers.{layer}.{norm}_layernorm.weight"] = (shape.hidden_size,)
    shapes |= {
        "model.norm.weight": (shape.hidden_size,),
        "lm_head.weight": shapes["model.embed_tokens.weight"],
    }
    places = [
        weights.TensorPlace(name, "F16", size, folder, 0, 2 * torch.Size(size).numel())
        for name, size in shapes.items()
    ]
    noise = (np.random.default_rng(0).standard_normal(2**24 - 3) * 0.02).astype(np.float16).view(np.uint8)
    for place in weights.lay_out(places, folder, SHARD_BYTES).values():
        with place.path.open("rb+") as file:
            file.seek(place.offset)
            for start in range(0, place.nbytes, noise.nbytes):
                file.write(noise[: place.nbytes - start].data)
    return sum(place.nbytes for place in places)


def write_ours(folder: Path, out: Path, threads: int) -> None:
    """One pass, as the stage does it, without the measurements of quality."""
    from so8t_helpers.gguf import layout, metadata, types, writer
    from so8t_helpers.phi3 import weights

    model = metadata.read_model(folder, 0)
    tensors = layout.collect_tensors(weights.read_checkpoint(folder), model)
    plans = [
        layout.plan_file(
            out / f"ours-{kind}.gguf", types.FILE_TYPES[kind], tensors, model, "phi3-benchmark", "{}", {}
        )
        for kind in TYPES
    ]
    writer.write_files(plans, tensors, threads, lambda _: None, {})


def run(name: str, command: list[str | Path], environment: dict[str, str]) -> dict[str, float]:
    """Run a process to its end; return its wall time and its peak memory, sampled 50 times a second."""
    os.sync() if hasattr(os, "sync") else None  # what an earlier step left to write is not this one's
    started = time.perf_counter()
    process = subprocess.Popen(
        [str(part) for part in command],
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    watched, peak = psutil.Process(process.pid), 0
    while process.poll() is None:
        try:
            peak = max(peak, watched.memory_info().rss)
        except psutil.Error:  # it has just ended
            break
        time.sleep(0.02)
    _, log = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{name} ended with {process.returncode}: {log.decode()[-2000:]}")
    figures = {"seconds": time.perf_counter() - started, "peak_gib": peak / 2**30}
    print(name, {key: round(value, 2) for key, value in figures.items()}, flush=True)
    return figures


def equal_shares(out: Path) -> dict[str, float]:
    """Share of the tensors' bytes that are the same in our file and in llama.cpp's, for each file type."""
    import gguf
    import numpy as np

    shares = {}
    for kind in TYPES:
        theirs = {t.name: t for t in gguf.GGUFReader(out / f"theirs-{kind}.gguf").tensors}
        same = total = 0
        for tensor in gguf.GGUFReader(out / f"ours-{kind}.gguf").tensors:
            mine, other = (
                np.asarray(t.data).reshape(-1).view(np.uint8) for t in (tensor, theirs[tensor.name])
            )
            same += int(np.count_nonzero(mine == other))
            total += mine.size
        shares[kind] = same / total
    return shares


def measure_ours(folder: Path, out: Path, threads: int) -> dict[str, Any]:
    """Run our pass."""
    command: list[str | Path] = [sys.executable, __file__, "--write", folder, out, "--threads", str(threads)]
    return {"ours": run("ours, three files", command, {})}


def measure_theirs(folder: Path, out: Path, threads: int) -> dict[str, Any]:
    """Run llama.cpp's converter twice and its quantiser once."""
    tools = Path(os.environ["SO8T_LLAMA_CPP"])
    converter, figures = tools / "converter" / "convert_hf_to_gguf.py", {}
    environment = {"PYTHONPATH": str(tools / "converter"), "OMP_NUM_THREADS": str(threads)}
    for kind in ("f16", "q8_0"):
        target = out / f"theirs-{kind}.gguf"
        command: list[str | Path] = [sys.executable, converter, folder]
        command += ["--outtype", kind, "--outfile", target]
        figures[f"converter {kind}"] = run(f"converter, {kind}", command, environment)
    source, target = out / "theirs-f16.gguf", out / "theirs-q4_k_m.gguf"
    command = [tools / "bin" / "llama-quantize", source, target, "q4_k_m", str(threads)]
    figures["quantiser q4_k_m"] = run("quantiser, q4_k_m", command, {})
    return {**figures, "llama_cpp": tools.name}


STEPS: dict[str, Callable[[Path, Path, argparse.Namespace], dict[str, Any]]] = {
    "make": lambda model, _, options: {
        "layers": options.layers,
        "threads": options.threads,
        "weight_bytes": make_model(model, options.layers),
    },
    "ours": lambda model, out, options: measure_ours(model, out, options.threads),
    "theirs": lambda model, out, options: measure_theirs(model, out, options.threads),
    "compare": lambda _, out, __: {"equal bytes": equal_shares(out)},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", type=Path, help="where to put everything; default: a temporary folder")
    parser.add_argument("--steps", choices=list(STEPS), nargs="+", default=list(STEPS))
    parser.add_argument("--write", type=Path, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        write_ours(*options.write, options.threads)
        return 0
    if "SO8T_LLAMA_CPP" not in os.environ:
        parser.error("SO8T_LLAMA_CPP must name llama.cpp's tools; .ci/llama_cpp.sh builds them")
    if options.steps != list(STEPS) and options.folder is None:
        parser.error("--steps needs --folder, where the steps leave what they make")
    folder = options.folder or Path(tempfile.mkdtemp(prefix="so8t-gguf-"))
    model, out, kept = folder / "model", folder / "out", folder / "figures.json"
    out.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {}
    for step in options.steps:
        figures |= STEPS[step](model, out, options)
        kept.write_text(json.dumps(figures))
    if "compare" not in options.steps:
        return 0
    for path in (model, out):
        shutil.rmtree(path)
    kept.unlink()
    return report(figures)


def report(figures: dict[str, Any]) -> int:
    """Hold the figures against the bounds; figures of the full size become the results."""
    theirs = sum(figures[k]["seconds"] for k in ("converter f16", "converter q8_0", "quantiser q4_k_m"))
    from claims import claim, write_claims

    shares = figures["equal bytes"]
    claims = [
        claim(
            "time of one pass against converter twice and quantiser once",
            round(figures["ours"]["seconds"] / theirs, 3),
            MOST_TIMES,
            "times",
        ),
        claim("peak memory of one pass", round(figures["ours"]["peak_gib"], 2), MOST_GIB, "GiB"),
        claim("bytes equal to llama.cpp's, F16", shares["f16"], 1.0, "share", at_least=True),
        claim("bytes equal to llama.cpp's, Q8_0", shares["q8_0"], 1.0, "share", at_least=True),
        claim("bytes equal to llama.cpp's, Q4_K_M", shares["q4_k_m"], 0.999, "share", at_least=True),
    ]
    if figures["layers"] < 32:
        print(json.dumps(claims, indent=1))
        return 0
    return 0 if write_claims("gguf_files", figures, claims) else 1


if __name__ == "__main__":
    sys.exit(main())
