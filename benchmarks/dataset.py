"""How fast and how small the dataset stage is on a million records, and how well it finds personal data.

    python benchmarks/dataset.py [--records N] [--folder FOLDER] [--runs RUN ...]
                                 [--datatrove PYTHON] [--data-juicer PYTHON]

Every run has a process of its own, whose tree's memory is watched. All runs together take about ten minutes;
`--folder` keeps the records and the figures, so that `--runs` can take them in several short commands.
Results go to benchmarks/results/dataset.json.

The peers' comparable steps, ours and theirs on the same records one after the other, are in
dataset_peers.py, which also says how to install them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil
from dataset_peers import CORES, run_data_juicer, run_datatrove
from dataset_records import write_labelled, write_records

ROOT = Path(__file__).resolve().parents[1]
CASES = ROOT / "tests" / "data" / "personal_data.jsonl"
PEER_RECORDS = 20_000


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
    from so8t_helpers.dataset import stage as dataset_stage
    from so8t_helpers.phi3.source import base_folder

    settings = profile(inputs, runs, everything)
    base_folder(settings)
    started = time.perf_counter()
    built = dataset_stage.build(settings)
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


ONE = {
    "floor": run_floor,
    "policy": lambda inputs, runs: run_stage(inputs, runs, everything=False),
    "everything": lambda inputs, runs: run_stage(inputs, runs, everything=True),
    "datatrove": run_datatrove,
    "data-juicer": run_data_juicer,
}
# run -> (what, file of records)
RUNS = {
    "floor": ("floor", "records"),
    "policy": ("policy", "records"),
    "everything": ("everything", "records"),
    "everything, a tenth": ("everything", "tenth"),
    "everything, the peers' records": ("everything", "peers"),
    "datatrove": ("datatrove", "peers"),
    "data-juicer": ("data-juicer", "peers"),
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


def personal_data_quality() -> dict[str, dict[str, float]]:
    """Return precision and recall on our own cases, of each kind and of all."""
    from so8t_helpers.dataset import personal_data

    found: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    cases = [json.loads(line) for line in CASES.read_text(encoding="utf-8").splitlines()]
    for case in cases:
        wanted = {(item["kind"], item["text"]) for item in case["found"]}
        got = {(p.kind, case["text"][p.start : p.end]) for p in personal_data.find(case["text"])}
        for column, side in enumerate((wanted & got, wanted, got)):
            for kind, _ in side:
                found[kind][column] += 1
    right, wanted_all, got_all = (sum(row[i] for row in found.values()) for i in range(3))
    each = {
        kind: {"places": w, "precision": round(r / max(g, 1), 4), "recall": round(r / w, 4)}
        for kind, (r, w, g) in found.items()
    }
    return {
        "all kinds": {
            "cases": len(cases),
            "cases without any": sum(not case["found"] for case in cases),
            "precision": round(right / got_all, 4),
            "recall": round(right / wanted_all, 4),
            "worst precision": min(one["precision"] for one in each.values()),
            "worst recall": min(one["recall"] for one in each.values()),
        },
        **each,
    }


def main() -> None:
    """Measure what is asked for and write the results of all that the folder holds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--datatrove", help="a Python that has datatrove, as said above")
    parser.add_argument("--data-juicer", help="a Python that has data-juicer, as said above")
    parser.add_argument("--folder", type=Path, help="keeps the generated records and the figures")
    parser.add_argument("--runs", nargs="*", choices=RUNS, default=list(RUNS))
    parser.add_argument("--one", choices=ONE, help=argparse.SUPPRESS)
    parser.add_argument("--input", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(ONE[given.one](given.input, given.folder)))
        return
    pythons = {"datatrove": given.datatrove, "data-juicer": given.data_juicer}
    if given.folder:
        given.folder.mkdir(parents=True, exist_ok=True)
        _measure(given.records, given.folder, given.runs, pythons)
        return
    with tempfile.TemporaryDirectory(prefix="so8t-dataset-") as folder:
        _measure(given.records, Path(folder), given.runs, pythons)


def _measure(records: int, folder: Path, names: list[str], pythons: dict[str, str | None]) -> None:
    counts = {"records": records, "tenth": records // 10, "peers": min(records, PEER_RECORDS), "warm": 1000}
    for name, count in counts.items():
        if not (folder / f"{name}.jsonl").is_file():
            write_records(folder / f"{name}.jsonl", count)
    write_labelled(folder / "labelled.jsonl")
    kept = folder / "runs.json"
    runs: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    for run in names:
        what, records_name = RUNS[run]
        if what in pythons:
            runs[run] = _peer(what, pythons[what], folder, counts)
        else:
            runs[run] = measure(what, folder / f"{records_name}.jsonl", folder, counts[records_name])
        print(run, runs[run], flush=True)
        kept.write_text(json.dumps(runs, ensure_ascii=False), encoding="utf-8")
        if set(RUNS) <= {*runs, *pythons}:
            _write(runs)


def _peer(what: str, python: str | None, folder: Path, counts: dict[str, int]) -> dict[str, Any]:
    if python is None:
        return {"installed": False, "why": "no Python with it was given"}
    try:
        measure(what, folder / "warm.jsonl", folder, counts["warm"], python)
        return measure(what, folder / "peers.jsonl", folder, counts["peers"], python)
    except RuntimeError as error:
        return {"installed": False, "why": str(error)[-300:]}


def _write(runs: dict[str, Any]) -> None:
    from claims import claim, write_claims

    quality = personal_data_quality()
    policy, everything, same = (
        runs[name] for name in ("policy", "everything", "everything, the peers' records")
    )
    growth = round(everything["peak_mib"] / runs["everything, a tenth"]["peak_mib"], 3)
    whole = quality["all kinds"]
    claims = [
        claim("policy on, duplicates off", policy["lines_per_s"], 20_000, "lines/s", at_least=True),
        claim("everything on", everything["lines_per_s"], 8_000, "lines/s", at_least=True),
        claim("peak memory, everything on", everything["peak_mib"], 1024, "MiB"),
        # The second pass holds a few dozen bytes a row; a quarter more for ten times the rows is flat.
        claim("peak memory against a tenth of the records", growth, 1.25, "times"),
        claim("personal data: cases", whole["cases"], 150, "", True),
        claim("personal data: precision of the worst kind", whole["worst precision"], 0.95, "", True),
        claim("personal data: recall of the worst kind", whole["worst recall"], 0.95, "", True),
    ]
    for peer in ("datatrove", "data-juicer"):
        name, theirs = f"everything on against {peer}'s like steps", runs.get(peer, {}).get("lines_per_s")
        if theirs:
            claims.append(claim(name, round(same["lines_per_s"] / theirs, 2), 1.0, "times", True))
        else:  # it did not get to run
            claims.append({"name": name, "value": None, "bound": 1.0, "unit": "times", "holds": False})
    write_claims("dataset", {"runs": runs, "personal data": quality}, claims)


if __name__ == "__main__":
    main()
