"""The comparable steps of datatrove and data-juicer: mask personal data, MinHash over the same text, write.

dataset.py runs them on the first `PEER_RECORDS` of its records. Each needs an environment of its own:

    python -m venv datatrove
    datatrove/bin/pip install "datatrove[processing]==0.10.1" "spacy[ja]" orjson psutil
    python -m venv data-juicer
    data-juicer/bin/pip install py-data-juicer==1.6.1 aiohttp orjson psutil

data-juicer installs further packages (torch among them) when its operators first run: run it once before it
counts, which `--runs` does with the first 1,000 records. A peer whose Python is not given, or that fails, has
`"installed": false` and the reason in the results.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

CORES = 2


def run_datatrove(inputs: Path, runs: Path) -> dict[str, Any]:
    """Comparable steps of datatrove: read, mask personal data, MinHash in four stages, write."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
    from datatrove.pipeline.formatters import PIIFormatter
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter

    def document(_self: Any, data: dict, path: str, number: int | str) -> dict[str, Any]:
        return {"text": _text(data), "id": f"{path}/{number}", "metadata": {}}

    halves = _halves(inputs, runs / "halves")  # datatrove shares out whole files
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
    for number, (pipeline, tasks) in enumerate(steps):  # a folder each: what is done is not done again
        logs = str(runs / f"logs-{number}")
        LocalPipelineExecutor(pipeline, tasks=tasks, workers=CORES, logging_dir=logs).run()
    return {"seconds": time.perf_counter() - started, "lines": {}}


def run_data_juicer(inputs: Path, runs: Path) -> dict[str, Any]:
    """Comparable steps of data-juicer: its e-mail and IP masks, MinHash over characters, export."""
    import yaml

    os.environ |= {"HF_HOME": str(runs / "hf"), "HF_HUB_OFFLINE": "1"}
    whole = runs / "whole.jsonl"
    with inputs.open("rb") as source, whole.open("wb") as out:
        for line in filter(_complete, source):  # it stops at a line that is not JSON
            data = json.loads(line)
            out.write(json.dumps({"text": _text(data)}, ensure_ascii=False).encode() + b"\n")
    minhash = {
        "tokenization": "character",
        "window_size": 5,
        "num_permutations": 256,
        "jaccard_threshold": 0.7,
    }
    config = {
        "dataset_path": str(whole),
        "export_path": str(runs / "out.jsonl"),
        "np": CORES,
        "use_cache": False,
        "process": [
            {"clean_email_mapper": {}},
            {"clean_ip_mapper": {}},
            {"document_minhash_deduplicator": minhash},
        ],
    }
    (runs / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    from data_juicer.config import init_configs
    from data_juicer.core.executor import DefaultExecutor

    with contextlib.redirect_stdout(sys.stderr):
        settings = init_configs(["--config", str(runs / "config.yaml")])
        started = time.perf_counter()
        DefaultExecutor(settings).run()
    return {"seconds": time.perf_counter() - started, "lines": {}}


def _halves(inputs: Path, folder: Path) -> Path:
    """Write the lines that are whole to two files in turn."""
    folder.mkdir()
    with (
        inputs.open("rb") as source,
        (folder / "0.jsonl").open("wb") as a,
        (folder / "1.jsonl").open("wb") as b,
    ):
        for number, line in enumerate(filter(_complete, source)):
            (a, b)[number % 2].write(line)
    return folder


def _complete(line: bytes) -> bool:
    return line.rstrip().endswith(b"}")


def _text(data: dict[str, Any]) -> str:
    """Return what the peers see of a record: one text, as they know it."""
    return f"{data.get('instruction', '')}\n{data.get('input', '')}\n{data.get('output', '')}"
