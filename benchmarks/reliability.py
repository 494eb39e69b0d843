"""What a run survives: kills, power cuts, full disks, spoilt artefacts, bad input, a long sweep.

    python benchmarks/reliability.py --root FOLDER [--seconds 540] [--only NAME ...]

All through the verbs that a person types, on a small run: a base of random weights, 300 of the demo's
records, six steps, the numbered notebooks up to the call of their stage (their figures are no artefacts). Two
undisturbed runs say which artefacts are a matter of bytes (the others hold times); every disturbed run has to
end with the same bytes. What is done is kept in FOLDER/reliability.json and not repeated; what there is no
time for is left out, and the same call goes on. `--only` picks parts by how their names begin.

- Kills: the whole process tree at random moments, up to three times a run; then the files that changed last
  are cut to half or to nothing, as a power cut leaves what was not synced; then the same command.
- Full disks: a file system of its own (which takes root on Linux) is filled as a stage begins, or while it
  writes, so that a tenth, a half and nine tenths of what it has still to write fit.
- Spoilt artefacts: a bit, half the file, the file, another artefact in its place.
- Bad input: the table of tests/bad_inputs.py.
- Soak: a sweep of 20 points; memory and open files of its process, what is left in the temporary folder.

tests/test_reliability.py carries out a short form, on five small notebooks.
"""

from __future__ import annotations

import argparse
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from claims import Work, claim, write_claims  # noqa: E402
from reliability_faults import SPOIL, Run, full_disk, killed, looked_at, prepare, redone, swept  # noqa: E402

from so8t_helpers.demo.records import write_records  # noqa: E402
from so8t_helpers.run.stage import STAGES  # noqa: E402
from so8t_helpers.settings import Settings, load_settings  # noqa: E402
from tests.phi3_folders import small_folder  # noqa: E402
from tests.small_notebooks import code, write_notebook  # noqa: E402

SMALL = {
    "lora": {"r": 4},
    "training": {"max_steps": 6, "checkpoint_steps": 2, "sample_steps": None},
    "bake": {"proof_texts": 2},
    "gguf": {"types": ["q8_0"], "quality_tokens": 256, "o_proj_study": False},
    "eval": {"models": ["q8_0"], "prompts": 4, "max_new_tokens": 16, "engine": "llama_cpp"},
    "serve": {"model": "q8_0"},
}
RUNS, SHARES = 25, (0.1, 0.5, 0.9)  # runs that are killed; of what a stage writes that a disk has room for
# Twenty points: a training, a baking and a conversion for each of four, an evaluation for each of twenty.
GRID = ("pet.huber_delta=1.0,1.1,1.2,1.3", "eval.bootstrap_samples=100,200,300,400,500")
Figures = dict[str, Any]


def small_run(given: Path) -> Settings:
    """Make what the small run is given in a folder, unless it is there; return the run's settings."""
    if not (given / "notebooks").is_dir():
        small_folder(given / "base")
        write_records(given)
        records = given / "records.jsonl"
        lines = random.Random(0).sample(records.read_bytes().splitlines(keepends=True), 300)
        records.write_bytes(b"".join(lines))
        (given / "notebooks").mkdir()
        for stage in STAGES:
            notebook = nbformat.read(ROOT / "notebooks" / f"{stage}.ipynb", as_version=4)
            calls = [cell.cell_type == "code" and " stage." in cell.source for cell in notebook.cells]
            notebook.cells = notebook.cells[: calls.index(True) + 1]
            nbformat.write(notebook, given / "notebooks" / f"{stage}.ipynb")
    places = {
        "run": {"notebooks": str(given / "notebooks")},
        "model": {"base": str(given / "base")},
        "dataset": {"inputs": [str(given / "records.jsonl")]},
    }
    return load_settings("demo", SMALL | places)


def small_notebooks(folder: Path) -> Settings:
    """Write five notebooks that do next to nothing; return the settings of their run."""
    for stage in STAGES:  # a second of work in each, after the artefact and before the notebook's end
        write_notebook(folder, stage, code("import time; time.sleep(1)"))
    return load_settings("demo", {"run": {"notebooks": str(folder)}})


def undisturbed(root: Path, settings: Settings, *again: str) -> Figures:
    """Carry a run out, and `again` by other names; return the hashes of what came out the same, and times."""
    runs = [prepare(root / name, settings) for name in ("undisturbed", *again)]
    begun = time.monotonic()
    for run in runs:
        run.finish()
    first, *others = (run.artefacts() for run in runs)
    same = {name: digest for name, digest in first.items() if all(o[name] == digest for o in others)}
    return {
        "seconds": round((time.monotonic() - begun) / len(runs)),
        "seconds_of_stages": round(runs[0].seconds()),
        "same": same,
        "with_times": sorted(first.keys() - same.keys()),
    }


def bad_inputs() -> Figures:
    """Carry out the table of bad inputs; return how many are clear and before long work."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_bad_inputs.py"]
    command += ["-k", "test_a_bad_input_is_one_line_before_any_long_work"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed)", done.stdout)}
    return {"clear": counts.get("passed", 0), "unclear": counts.get("failed", 0)}


def killed_run(root: Path, settings: Settings, base: Figures, number: int) -> Figures:
    """Kill a run of its own and compare it with the undisturbed one; what is as it should be is removed."""
    run = prepare(root / f"killed-{number}", settings)
    done = Run.at(root / "undisturbed", settings)
    found = killed(run, done, base["same"], base["seconds_of_stages"], number)
    if is_well(found):
        run.remove()
    return found


def is_well(found: Figures) -> bool:
    """Whether a killed run ended with the same bytes, an unbroken chain, and nothing left over."""
    return not any(found.get(key, False) for key in ("failed", "differing", "broken_link", "left"))


def parts(root: Path, settings: Settings, base: Figures, short: bool) -> dict[str, Callable[[], Figures]]:
    """What is to be measured against the undisturbed run: name -> function; the short form is for tests."""
    same, done = base["same"], Run.at(root / "undisturbed", settings)
    found: dict[str, Callable[[], Figures]] = {"spoilt": lambda: looked_at(done)}
    for name, kinds in {"of each kind": list(SPOIL)}.items() if short else {k: [k] for k in SPOIL}.items():
        found[f"made good, {name}"] = lambda kinds=kinds: redone(done, same, kinds)
    if not short:
        found["bad inputs"] = bad_inputs
    for stage in STAGES[2:3] if short else STAGES:
        for share in SHARES[1:2] if short else SHARES:
            chosen = (root / f"disk-{stage}-{share}", done, stage, share, share != SHARES[0], same)
            found[f"full disk, {stage}, {share}"] = lambda chosen=chosen: full_disk(*chosen)
    for number in [1] if short else range(RUNS):
        found[f"killed {number}"] = lambda n=number: killed_run(root, settings, base, n)
    if not short:
        found["soak"] = lambda: swept(prepare(root / "soak", settings), *GRID)
    return found


def measure(work: Work, root: Path, short: bool, only: tuple[str, ...] = ("",)) -> None:
    """Measure what is not there yet, as far as the time goes."""
    settings = small_notebooks(root / "notebooks") if short else small_run(root / "given")
    again = () if short else ("again",)  # the small notebooks write no times
    base = work.part("undisturbed", 0, lambda: undisturbed(root, settings, *again))
    done = Run.at(root / "undisturbed", settings)
    if done.differing(base["same"]):  # a part that was broken off left it spoilt
        done.finish()
    for name, function in parts(root, settings, base, short).items():
        if name.startswith(only):
            work.part(name, 6 * base["seconds"], function)


def claims(done: Figures, runs: int = RUNS, disks: int = len(SHARES) * len(STAGES)) -> list[Figures]:
    """Those bounds of issue 21 for which something is measured; what is not yet counts as missed."""

    def of(prefix: str) -> list[Figures]:
        return [found for name, found in done.items() if name.startswith(prefix)]

    made = []
    if kills := of("killed "):
        count = sum(len(found["killed_in"]) for found in kills)
        name = f"Of {len(kills)} runs with {count} kills and power cuts, byte for byte as undisturbed"
        made.append(claim(name, sum(map(is_well, kills)), runs, "runs", at_least=True))
    if full := of("full disk"):
        well = sum(found["clear"] and found["recovered"] for found in full)
        name = f"Of {len(full)} full disks, one clear line and recovery"
        made.append(claim(name, well, disks, "disks", at_least=True))
    if spoilt := done.get("spoilt"):
        name = f"Of {spoilt['tried']} spoilt artefacts, not seen by `verify` or by `run`"
        made.append(claim(name, len(spoilt["unseen"]), 0, "artefacts"))
    if good := of("made good"):
        name = f"Of {sum(found['spoilt'] for found in good)} spoilt artefacts, not made good by `run`"
        made.append(claim(name, sum(len(found["differing"]) for found in good), 0, "artefacts"))
    if inputs := done.get("bad inputs"):
        made.append(claim("Bad inputs clear before long work", inputs["clear"], 60, "inputs", at_least=True))
        made.append(claim("Bad inputs that are not", inputs["unclear"], 0, "inputs"))
    if soak := done.get("soak"):
        made.append(claim("Memory that a sweep of 20 points grows by", soak["memory_mib"], 8, "MiB"))
        made.append(claim("Open files that it grows by", soak["open_files"], 2, "files"))
        made.append(claim("Temporary folders and connection files left", len(soak["left"]), 0, "files"))
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--only", nargs="*", default=[""])
    options = parser.parse_args()
    root = options.root.resolve()
    root.mkdir(parents=True, exist_ok=True)
    work = Work(root / "reliability.json", options.seconds)
    measure(work, root, short=False, only=tuple(options.only))
    return 0 if write_claims("reliability", work.done, claims(work.done)) else 1


if __name__ == "__main__":
    sys.exit(main())
