"""How fast and how small the dataset stage is on a million records, and how well it finds personal data.

    python benchmarks/dataset.py [--records N] [--datatrove PYTHON] [--folder FOLDER]

Every run has a process of its own, whose tree's memory is watched. `--datatrove` names a Python that has
datatrove[processing], orjson and psutil, whose comparable steps then run on the same file. Results go to
benchmarks/results/dataset.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from dataset_records import write_labelled, write_records

ROOT = Path(__file__).resolve().parents[1]
CASES = ROOT / "tests" / "data" / "personal_data.jsonl"
CORES = 2


def profile(inputs: Path, runs: Path, everything: bool) -> Any:
    """Return the settings of a measured run: Phi-3.5's tokenizer where it lies beside the checkout."""
    from so8t_helpers import settings as so8t_settings

    real = ROOT.parent / "shared" / "phi35"
    dataset: dict[str, Any] = {"inputs": [str(inputs)], "workers": CORES, "think_format": "both"}
    if everything:
        dataset["nsfw_training"] = [str(inputs.with_name("labelled.jsonl"))]
    else:
        dataset["deduplicate"] = False
    return so8t_settings.load_settings(
        "demo",
        {
            "run": {"root": str(runs), "name": "all" if everything else "policy"},
            "model": {"base": str(real) if real.is_dir() else "demo"},
            "training": {"sequence_length": 2048},
            "dataset": dataset,
        },
    )


def run_stage(inputs: Path, runs: Path, everything: bool) -> dict[str, Any]:
    """Carry out the stage once; return seconds and the card's line counts."""
    from so8t_helpers import dataset
    from so8t_helpers.base import base_folder

    settings = profile(inputs, runs, everything)
    base_folder(settings)
    started = time.perf_counter()
    built = dataset.build(settings)
    return {"seconds": time.perf_counter() - started, "lines": built.card["lines"]}


def run_floor(inputs: Path, runs: Path) -> dict[str, Any]:
    """Parse and write every line with the standard library, nothing else."""
    started, lines = time.perf_counter(), 0
    with (
        inputs.open(encoding="utf-8", errors="replace") as source,
        (runs / "floor.jsonl").open("w", encoding="utf-8") as out,
    ):
        for line in source:
            lines += 1
            try:
                record = json.loads(line)
            except ValueError:
                continue
            out.write(json.dumps(record, ensure_ascii=False) + "\n")
    return {"seconds": time.perf_counter() - started, "lines": {"read": lines}}


def run_datatrove(inputs: Path, runs: Path) -> dict[str, Any]:
    """Comparable steps of datatrove: read, mask personal data, MinHash in four stages, write."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
    from datatrove.pipeline.formatters import PIIFormatter
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter

    def document(_self: Any, data: dict, path: str, number: int | str) -> dict[str, Any]:
        text = f"{data.get('instruction', '')}\n{data.get('input', '')}\n{data.get('output', '')}"
        return {"text": text, "id": f"{path}/{number}", "metadata": {}}

    # Two files, since datatrove shares out whole files.
    halves = runs / "halves"
    halves.mkdir()
    with (
        inputs.open("rb") as source,
        (halves / "0.jsonl").open("wb") as a,
        (halves / "1.jsonl").open("wb") as b,
    ):
        for number, line in enumerate(source):
            if line.rstrip().endswith(b"}"):
                (a, b)[number % 2].write(line)
    config = MinhashConfig(n_grams=5, num_buckets=14, hashes_per_bucket=8)
    signatures, buckets, remove = (str(runs / name) for name in ("signatures", "buckets", "remove"))
    reader = lambda: JsonlReader(str(halves), adapter=document)
    steps = [
        ([reader(), PIIFormatter(), MinhashDedupSignature(signatures, config=config, language="ja")], CORES),
        ([MinhashDedupBuckets(signatures, buckets, config=config)], config.num_buckets),
        ([MinhashDedupCluster(buckets, remove, config=config)], 1),
        ([reader(), PIIFormatter(), MinhashDedupFilter(remove), JsonlWriter(str(runs / "out"))], CORES),
    ]
    started = time.perf_counter()
    for pipeline, tasks in steps:
        LocalPipelineExecutor(pipeline, tasks=tasks, workers=CORES, logging_dir=None).run()
    return {"seconds": time.perf_counter() - started, "lines": {}}


ONE = {
    "floor": run_floor,
    "policy": lambda inputs, runs: run_stage(inputs, runs, everything=False),
    "everything": lambda inputs, runs: run_stage(inputs, runs, everything=True),
    "datatrove": run_datatrove,
}


def measure(
    what: str, inputs: Path, folder: Path, lines: int, python: str = sys.executable
) -> dict[str, Any]:
    """Run one of `ONE` in a process of its own; add lines/s and the peak memory of its process tree."""
    runs = Path(tempfile.mkdtemp(dir=folder, prefix=f"{what}-"))
    command = [
        python,
        str(Path(__file__).resolve()),
        "--one",
        what,
        "--folder",
        str(runs),
        "--input",
        str(inputs),
    ]
    with (runs / "log.txt").open("wb") as log:
        process = psutil.Popen(command, stdout=subprocess.PIPE, stderr=log, cwd=ROOT)
        peak = 0
        while process.poll() is None:
            peak = max(peak, _tree_bytes(process))
            time.sleep(0.1)
        output = process.stdout.read()
        if process.returncode:
            raise RuntimeError(f"{what} failed:\n{(runs / 'log.txt').read_text(errors='replace')[-3000:]}")
    result = json.loads(output.splitlines()[-1])
    shutil.rmtree(runs)
    return {
        "records": lines,
        "seconds": round(result["seconds"], 2),
        "lines_per_s": round(lines / result["seconds"]),
        "peak_mib": round(peak / 2**20),
        **({"kept": result["lines"]} if result["lines"] else {}),
    }


def _tree_bytes(process: psutil.Process) -> int:
    """Return the memory of a process and its children; pages that they share count once (PSS) on Linux."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            info = one.memory_full_info()
            total += getattr(info, "pss", info.uss)
        except psutil.Error:
            continue
    return total


def personal_data_quality() -> dict[str, float]:
    """Return precision and recall on our own cases, and those of the worst kind."""
    from so8t_helpers import personal_data

    found: dict[str, list[int]] = {kind: [0, 0, 0] for kind in personal_data.KINDS}
    cases = [json.loads(line) for line in CASES.read_text(encoding="utf-8").splitlines()]
    for case in cases:
        wanted = {(item["kind"], item["text"]) for item in case["found"]}
        got = {(p.kind, case["text"][p.start : p.end]) for p in personal_data.find(case["text"])}
        for column, side in enumerate((wanted & got, wanted, got)):
            for kind, _ in side:
                found[kind][column] += 1
    right, wanted_all, got_all = (sum(row[i] for row in found.values()) for i in range(3))
    return {
        "cases": len(cases),
        "precision": round(right / got_all, 4),
        "recall": round(right / wanted_all, 4),
        "worst precision": round(min(r / max(g, 1) for r, _, g in found.values()), 4),
        "worst recall": round(min(r / w for r, w, _ in found.values()), 4),
    }


def main() -> None:
    """Measure everything and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--datatrove", help="a Python that has datatrove[processing], orjson and psutil")
    parser.add_argument("--folder", type=Path, help="where the generated records and scratch files go")
    parser.add_argument("--one", choices=ONE, help=argparse.SUPPRESS)
    parser.add_argument("--input", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(ONE[given.one](given.input, given.folder)))
        return
    folder = Path(tempfile.mkdtemp(prefix="so8t-dataset-", dir=given.folder))
    try:
        _measure_all(given.records, folder, given.datatrove)
    finally:
        shutil.rmtree(folder)


def _measure_all(records: int, folder: Path, datatrove: str | None) -> None:
    from claims import claim, write_claims

    whole, tenth = folder / "records.jsonl", folder / "tenth.jsonl"
    write_records(whole, records)
    write_records(tenth, records // 10)
    write_labelled(folder / "labelled.jsonl")
    runs = {}
    for what in ("floor", "policy", "everything", *(["datatrove"] if datatrove else [])):
        python = datatrove if what == "datatrove" and datatrove else sys.executable
        runs[what] = measure(what, whole, folder, records, python)
        print(what, runs[what], flush=True)
    runs["everything, a tenth"] = measure("everything", tenth, folder, records // 10)
    quality = personal_data_quality()
    policy, everything = runs["policy"], runs["everything"]
    growth = round(everything["peak_mib"] / runs["everything, a tenth"]["peak_mib"], 3)
    claims = [
        claim("policy on, duplicates off", policy["lines_per_s"], 20_000, "lines/s", at_least=True),
        claim("everything on", everything["lines_per_s"], 8_000, "lines/s", at_least=True),
        claim("peak memory, everything on", everything["peak_mib"], 1024, "MiB"),
        # The second pass holds a few dozen bytes a row; a quarter more for ten times the rows is flat.
        claim("peak memory against a tenth of the records", growth, 1.25, "times"),
        claim("personal data: precision of the worst kind", quality["worst precision"], 0.95, "", True),
        claim("personal data: recall of the worst kind", quality["worst recall"], 0.95, "", True),
    ]
    if datatrove:
        faster = round(everything["lines_per_s"] / runs["datatrove"]["lines_per_s"], 2)
        claims.append(claim("everything on against datatrove's PII and MinHash", faster, 1.0, "times", True))
    write_claims("dataset", {"runs": runs, "personal data": quality}, claims)


if __name__ == "__main__":
    main()
