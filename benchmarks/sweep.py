"""A sweep of four points against one run, killed once in its middle and taken up again.

`python benchmarks/sweep.py [--steps 80] [--prompts 40] [--base RUNS]`. Both calls are the verbs that a person
types, on the demo with fewer training steps and prompts. The demo's base model is made before and shared by
both, so that the sweep gains nothing by it; both axes change the training, so each point trains, bakes,
exports and evaluates by itself and only 01_dataset is shared. The kill takes the sweep and all its children,
without any warning, in the middle of the second pair's training; its time counts.

Claims: in well under four times one run (at most three) there are four sets of reports and a comparison page;
what was done before the kill is not done again; 01_dataset is carried out once.
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
from claims import claim, write_claims

from so8t_helpers.demo import ensure_base, ensure_records
from so8t_helpers.report.comparison import comparison_path
from so8t_helpers.run.records import read_status
from so8t_helpers.run.stage import STAGES, read_manifest, stale_reason
from so8t_helpers.settings import Settings, load_settings, merge
from so8t_helpers.verbs import sweep
from so8t_helpers.verbs.arguments import parse_grid

GRID = ["so8t.init_scale=0.02,0.05", "pet.lambda_stabilization=0.05,0.1"]
LONGEST = 1200.0  # seconds for one call


def so8t(folder: Path, verb: list[str], chosen: list[str]) -> subprocess.Popen[bytes]:
    """Start a verb with its runs and reports in `folder`."""
    chosen = [*chosen, f"run.root={folder / 'runs'}", f"run.reports_root={folder / 'reports'}"]
    command = [sys.executable, "-m", "so8t_helpers", *verb]
    command += [part for item in chosen for part in ("--set", item)]
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)


def finish(process: subprocess.Popen[bytes], folder: Path) -> None:
    """Wait for a verb that has to succeed."""
    if process.wait(timeout=LONGEST) != 0:
        raise SystemExit((folder / "log.txt").read_text(encoding="utf-8")[-3000:])


def kill_in_the_middle(process: subprocess.Popen[bytes], points: list[Settings]) -> str:
    """Kill the sweep and its children when the third point is half-way through its training."""
    deadline = time.monotonic() + LONGEST
    while time.monotonic() < deadline and process.poll() is None:
        status = read_status(points[2].run_dir)
        if status and status.stage == "02_train" and status.done >= status.total / 2:
            family = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            for member in family:
                if member.is_running():
                    member.kill()
            process.wait()
            return f"{status.done} of {status.total} steps of the third point"
        time.sleep(0.2)
    raise SystemExit("the sweep was never in the middle of its third training")


def finished_at(points: list[Settings]) -> dict[str, str]:
    """When each finished stage of each point was finished."""
    found = {(p.run.name, stage): read_manifest(p, stage) for p in points for stage in STAGES}
    return {f"{name} {stage}": m["finished"] for (name, stage), m in found.items() if m}


def carried_out(points: list[Settings], stage: str) -> int:
    """How many points carried a stage out themselves."""
    manifests = [read_manifest(point, stage) for point in points]
    return sum(manifest is not None and "adopted_from" not in manifest for manifest in manifests)


def seconds_by_stage(point: Settings) -> dict[str, float]:
    """Seconds of each stage's notebook, the kernel's start included."""
    records = [
        json.loads((point.run_dir / "notebooks" / f"{s}.json").read_text(encoding="utf-8")) for s in STAGES
    ]
    return {record["stage"]: record["seconds"] for record in records}


def measure(folder: Path, steps: int, prompts: int, base_from: Path | None) -> dict[str, Any]:
    """Carry out one run and then the sweep; return the figures.

    Args:
        folder: an empty one.
        steps: of each training.
        prompts: of each evaluation.
        base_from: a run area that has the demo's base already.
    """
    chosen = [f"training.max_steps={steps}", f"eval.prompts={prompts}"]
    settings = load_settings("demo", {"training": {"max_steps": steps}, "eval": {"prompts": prompts}})
    alone, many = folder / "one", folder / "four"
    for place in (alone, many):
        place.mkdir()
    here = {"root": str(many / "runs"), "reports_root": str(many / "reports")}
    swept = sweep.points(merge(settings, {"run": here}), parse_grid(GRID))
    points = [point.settings for point in swept]

    if base_from is not None:
        shutil.copytree(base_from / ".demo", many / "runs" / ".demo")
    begun = time.perf_counter()
    ensure_base(points[0])
    ensure_records(points[0])
    base = time.perf_counter() - begun
    shutil.copytree(many / "runs" / ".demo", alone / "runs" / ".demo")

    begun = time.perf_counter()
    finish(so8t(alone, ["run", "demo"], chosen), alone)
    one = time.perf_counter() - begun

    verb = ["sweep", "demo", *(part for axis in GRID for part in ("--grid", axis))]
    begun = time.perf_counter()
    killed_at = kill_in_the_middle(so8t(many, verb, chosen), points)
    first = time.perf_counter() - begun
    before = finished_at(points)
    begun = time.perf_counter()
    finish(so8t(many, verb, chosen), many)
    second = time.perf_counter() - begun

    after = finished_at(points)
    pages = [p.reports_dir / f"{name}.html" for p in points for name in ("index", *STAGES)]
    one_run = merge(settings, {"run": {"root": str(alone / "runs")}})
    return {
        "steps": steps,
        "prompts": prompts,
        "grid": GRID,
        "base_seconds_before": round(base, 1),
        "one_run_seconds": round(one, 1),
        "one_run_by_stage": seconds_by_stage(one_run),
        "sweep_seconds": round(first + second, 1),
        "before_the_kill_seconds": round(first, 1),
        "after_the_kill_seconds": round(second, 1),
        "killed_at": killed_at,
        "ratio": round((first + second) / one, 3),
        "stages_done_before_the_kill": len(before),
        "done_again": sum(after[name] != time for name, time in before.items()),
        "fresh_stages": sum(stale_reason(p, stage) is None for p in points for stage in STAGES),
        "pages": sum(page.is_file() for page in pages),
        "comparison_pages": int(comparison_path(points[0], f"{settings.run.name}-sweep").is_file()),
        "datasets_carried_out": carried_out(points, "01_dataset"),
        "trainings_carried_out": carried_out(points, "02_train"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--base", type=Path, help="a run area that has the demo's base model already")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), options.steps, options.prompts, options.base)
    print(json.dumps(figures, indent=2))
    claims = [
        claim("four-point sweep, killed once, over one run", figures["ratio"], 3.0, "x"),
        claim("report pages of the four points (six each)", figures["pages"], 24, "pages", at_least=True),
        claim("comparison page", figures["comparison_pages"], 1, "pages", at_least=True),
        claim("finished stages done again after the kill", figures["done_again"], 0, "stages"),
        claim("01_dataset carried out for four points", figures["datasets_carried_out"], 1, "times"),
    ]
    return 0 if write_claims("sweep", figures, claims) else 1


if __name__ == "__main__":
    sys.exit(main())
