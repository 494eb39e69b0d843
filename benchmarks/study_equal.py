"""Does a study find what is not there, does it find what is, and does killing it change its page?

    python benchmarks/study_equal.py --root FOLDER [--repetitions 100] [--kills 10]

Real studies of a tiny model with random weights: data, registration, trainings, statistics. Two arms are
equal by design: the same sequences, seeds and optimizer steps, once two sequences a micro-step and once one
in each of two, so that they differ by the masks of dropout alone. In the first repetitions a third arm has a
planted effect. Every repetition draws other records and other seeds. What is finished stands in FOLDER: the
same command goes on. Then one study is carried out whole and one is killed at random and taken up, and their
pages are compared. Results go to results/study_equal.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bs4 import BeautifulSoup

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT)]
from claims import claim, write_claims  # noqa: E402
from scipy.stats import kstest  # noqa: E402

from so8t_helpers.run.files import write_jsonl  # noqa: E402
from so8t_helpers.study import results, stage  # noqa: E402
from so8t_helpers.study.plan import load_study  # noqa: E402
from tests.small_study import rows, small_base, small_study  # noqa: E402

SEEDS, PLANTED = 6, 5  # seeds of a study; repetitions with a third arm
EQUAL: dict[str, Any] = {
    "two at once": {"training.batch_size": 2, "training.gradient_accumulation": 1},
    "one after another": {"training.batch_size": 1, "training.gradient_accumulation": 2},
}
PLANT: dict[str, Any] = {**EQUAL["two at once"], "training.learning_rate": 2.06e-3}  # 3% over the profile's


def repetition(base: Path, folder: Path, number: int) -> dict[str, Any]:
    """Carry out one study and return what it said; its folder is removed then."""
    chosen = EQUAL | ({"planted": PLANT} if number < PLANTED else {})
    path = small_study(
        folder,
        base,
        question="Does the order of two sequences matter?",
        control="two at once",
        seed=number * (SEEDS + 1),
        seeds=SEEDS,
        trials=1,
        set={
            "so8t.enabled": False,
            "pet.enabled": False,
            "lora.dropout": 0.3,
            "training.max_steps": 3,
            "training.eval_steps": 10**6,  # a look at the start and one at the end
        },
        arms={name: {"hypothesis": "no difference", "set": some} for name, some in chosen.items()},
        endpoints={"main": "heldout.loss"},
    )
    write_jsonl(folder / "data" / "train.jsonl", rows(10_000 + 1000 * number, 100))
    write_jsonl(folder / "data" / "eval.jsonl", rows(10_500 + 1000 * number, 16))
    found = stage.carry_out(load_study(str(path), {"model": {"quantization": "none"}}))
    by_arm = {c.arm: c for c in results.compare(found)}
    shutil.rmtree(folder)
    return {
        arm: {
            "difference": c.difference.value,
            "interval": [c.difference.low, c.difference.high],
            "p": c.difference.p,
            "p by flips": c.difference.exact_p,
            "verdict": c.verdict,
        }
        for arm, c in by_arm.items()
    }


def repeat(root: Path, count: int) -> list[dict[str, Any]]:
    """Carry out the repetitions that are missing, and return all."""
    path = root / "equal.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    done = [json.loads(line) for line in lines]
    base = root / "base"
    if not base.is_dir():
        small_base(base)
    gc.freeze()  # every arm ends with a collection, which would walk through all modules
    for number in range(len(done), count):
        started = time.perf_counter()
        shutil.rmtree(root / "repetition", ignore_errors=True)
        one = repetition(base, root / "repetition", number)
        done.append(one | {"seconds": round(time.perf_counter() - started, 2)})
        write_jsonl(path, done)
        print(number, json.dumps(done[-1]), flush=True)
    return done


def without_times(page: Path) -> str:
    """The page but for dates and the table of costs."""
    soup = BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser")
    (costs,) = [t for t in soup.find_all("table") if t.caption and t.caption.get_text() == "Time and memory"]
    costs.decompose()
    return re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC", "DATE", str(soup))


def kill_and_compare(root: Path, kills: int) -> dict[str, Any]:
    """Carry out a study whole, and once more killed at random; return how often, and whether pages agree."""
    base = root / "base"
    if not base.is_dir():
        small_base(base)
    path = small_study(root / "killed", base, seeds=2)
    pages = {
        name: root / "killed" / name / "reports" / "studies" / "small.html" for name in ("whole", "again")
    }

    def start(name: str) -> subprocess.Popen[bytes]:
        places = (f"run.root={root / 'killed' / name / 'runs'}", f"run.reports_root={pages[name].parents[1]}")
        command = [sys.executable, "-m", "so8t_helpers", "study", str(path)]
        command += [part for place in places for part in ("--set", place)]
        # The number of threads changes the last digits.
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)

    shutil.rmtree(root / "killed" / "whole", ignore_errors=True)
    shutil.rmtree(root / "killed" / "again", ignore_errors=True)
    started = time.perf_counter()
    if start("whole").wait():
        raise SystemExit("the study failed without being killed")
    whole, chance, done = time.perf_counter() - started, random.Random(4), 0
    while done < kills:
        process = start("again")
        try:  # anywhere in what a whole study takes: while it starts, trains, or writes its page
            process.wait(chance.uniform(0.0, whole))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            done += 1
            continue
        if process.returncode:
            raise SystemExit(f"the study ended with {process.returncode} after {done} kills")
        pages["again"].unlink()  # it was finished before its time: its page is made again
    if start("again").wait():
        raise SystemExit(f"the study failed after {done} kills")
    same = without_times(pages["whole"]) == without_times(pages["again"])
    return {"kills": done, "the same page": same, "seconds of the whole study": round(whole, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--repetitions", type=int, default=100)
    parser.add_argument("--kills", type=int, default=10)
    options = parser.parse_args()
    logging.getLogger("so8t_helpers").setLevel(logging.WARNING)
    root = options.root.resolve()
    root.mkdir(parents=True, exist_ok=True)
    done = repeat(root, options.repetitions)
    killed = kill_and_compare(root, options.kills)
    equal = [one["one after another"] for one in done]
    planted = [one["planted"] for one in done if "planted" in one]
    wrong = sum(one["p"] < 0.05 for one in equal)
    named = sum(one["verdict"] != "undecided" for one in equal)
    found = sum(one["verdict"] == "better" for one in planted)
    figures = {
        "repetitions": done,
        "p below 0.05": wrong,
        "p by flips below 0.05": sum(one["p by flips"] < 0.05 for one in equal),
        "intervals without zero": sum(one["interval"][0] > 0 or one["interval"][1] < 0 for one in equal),
        "p against a uniform one (Kolmogorov and Smirnov)": float(
            kstest([one["p"] for one in equal], "uniform").pvalue
        ),
        "killed": killed,
    }
    held = write_claims(
        "study_equal",
        figures,
        [
            claim(f"{len(equal)} studies of equal arms: p below 0.05", wrong, 8, "studies"),
            claim(f"{len(equal)} studies of equal arms: a winner named", named, 5, "studies"),
            claim("studies that found a planted effect", found, len(planted), "studies", at_least=True),
            claim(
                f"same page after {killed['kills']} kills at random",
                int(killed["the same page"]),
                1,
                "page",
                at_least=True,
            ),
        ],
    )
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
