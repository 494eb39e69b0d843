"""Redaction under fire: generated model outputs, broken in every way we know, cut at random places.

Claims: no text that is not in a final part leaves; no exception; every chunking gives the one-shot result;
more than 5 MB/s on one core; at most one good answer about code in twenty is cut short. Spellings of a mark
that are not promised are counted by class besides.

    python benchmarks/redaction.py [--outputs N] [--seed S] [--processes P] [--seconds T] [--parts FILE]

Several processes share the outputs; the speed is bytes over the CPU seconds of all, so of one core. After T
seconds no further part is begun; FILE keeps the parts that are done, and the next run with it goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from redaction_outputs import SECRET, UNPROMISED, Rng, cut, good_answers, write_output, write_unpromised

from so8t_helpers import thinking
from so8t_helpers.thinking.format import parse
from so8t_helpers.thinking.redaction import REFUSAL_TEXT, StreamingFinal, final_of_separated, final_only

BATCH, PART, UNPROMISED_EACH = 1000, 5000, 500


def streamed(chunks: list[str]) -> str:
    stream = StreamingFinal()
    return "".join(map(stream.feed, chunks)) + stream.close()


def fault(text: str, one_shot: str, in_pieces: str) -> str | None:
    """Say what is wrong with the redaction of one output, None where nothing is."""
    if in_pieces != one_shot:
        return "chunking"
    if one_shot == REFUSAL_TEXT:
        return None
    return "leak" if SECRET in one_shot or one_shot not in text else None


def run(outputs: int, first_seed: int) -> Counter[str]:
    """Redact `outputs` generated texts; raise AssertionError with the seed of the first bad one."""
    count: Counter[str] = Counter()
    for start in range(first_seed, first_seed + outputs, BATCH):
        seeds = range(start, min(start + BATCH, first_seed + outputs))
        families, texts = zip(*(write_output(Rng(s)) for s in seeds), strict=True)
        chunked = [cut(Rng(-s), text) for s, text in zip(seeds, texts, strict=True)]
        begun = time.process_time()
        one_shot = [final_only(text) for text in texts]
        middle = time.process_time()
        in_pieces = [streamed(chunks) for chunks in chunked]
        count["seconds"] += time.process_time() - middle
        count["one_shot_seconds"] += middle - begun
        for s, family, text, whole, pieces in zip(seeds, families, texts, one_shot, in_pieces, strict=True):
            bad = fault(text, whole, pieces)
            assert bad is None, f"seed {s}, {family}: {bad}: {text!r} gave {whole!r}, in pieces {pieces!r}"
            parsed = parse(text)
            assert (parsed.final or REFUSAL_TEXT) == whole, f"seed {s}: parse and redaction differ: {text!r}"
            held = final_of_separated(text[: len(text) // 2], text[len(text) // 2 :], "quadruple")
            assert SECRET not in held or held in text, (
                f"seed {s}: engine's own parting: {text!r} gave {held!r}"
            )
            count["released"] += whole != REFUSAL_TEXT
            count[f"outputs: {family}"] += 1
        count["outputs"] += len(texts)
        count["bytes"] += sum(len(text.encode()) for text in texts)
        count["chunks"] += sum(map(len, chunked))
    return count


def unpromised(family: str) -> float:
    """Return the share of outputs with a mark of this class that let private text out."""
    texts = (write_unpromised(Rng(s), family) for s in range(UNPROMISED_EACH))
    return sum(SECRET in final_only(text) for text in texts) / UNPROMISED_EACH


def code() -> str:
    """Return a hash of all code that a part's result depends on."""
    files = [
        *sorted(Path(thinking.__file__).parent.glob("*.py")),
        *Path(__file__).parent.glob("redaction*.py"),
    ]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def run_parts(options: argparse.Namespace) -> Counter[str]:
    """Run the parts that no earlier run has done, as many as the time allows, and add all up."""
    done: dict[int, Counter[str]] = {}
    version = f"{code()} {options.seed} {options.outputs}"
    if options.parts and options.parts.is_file():
        lines = map(json.loads, options.parts.read_text(encoding="utf-8").splitlines())
        done = {line["start"]: Counter(line["count"]) for line in lines if line["version"] == version}
    end, until = options.seed + options.outputs, time.monotonic() + options.seconds
    waiting = [start for start in range(options.seed, end, PART) if start not in done][::-1]
    with ProcessPoolExecutor(options.processes) as pool:
        running = {}
        while waiting or running:
            while waiting and len(running) < options.processes and time.monotonic() < until:
                start = waiting.pop()
                running[pool.submit(run, min(PART, end - start), start)] = start
            if not running:
                break
            future = next(as_completed(running))
            start = running.pop(future)
            done[start] = future.result()
            if options.parts:
                with options.parts.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"version": version, "start": start, "count": done[start]}) + "\n")
    return sum(done.values(), Counter())


def main() -> None:
    from claims import claim, write_claims

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--outputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--parts", type=Path)
    options = parser.parse_args()
    count = run_parts(options)
    speed, one_shot = (count["bytes"] / count[key] / 1e6 for key in ("seconds", "one_shot_seconds"))
    good = good_answers()
    cut_short = sum(final_only(head + answer) != answer for head, answer in good)
    figures = {
        "good_answers": len(good),
        "good_answers_cut_short": cut_short,
        **{key: round(value, 1) for key, value in count.items()},
        "processes": options.processes,
        "one_shot_mb_per_s": round(one_shot, 2),
        "mean_chunk_bytes": round(count["bytes"] / count["chunks"], 1),
        "let_out_where_nothing_is_promised": {family: round(unpromised(family), 3) for family in UNPROMISED},
    }
    claims = [
        # `run` stops at the first output that breaks one of the first three.
        claim("leaks", 0, 0, "outputs"),
        claim("crashes", 0, 0, "outputs"),
        claim("chunkings that differ from one shot", 0, 0, "outputs"),
        claim("outputs redacted, at least", count["outputs"], 1_000_000, "outputs", at_least=True),
        claim("good answers about code cut short", round(cut_short / len(good), 3), 0.05, "of answers"),
        claim("speed in random chunks, at least", round(speed, 2), 5, "MB/s on one core", at_least=True),
    ]
    raise SystemExit(0 if write_claims("redaction", figures, claims) else 1)


if __name__ == "__main__":
    main()
