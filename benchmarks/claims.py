"""Where a benchmark's figures and claims go: benchmarks/results/NAME.json."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from so8t_helpers.run.files import write_json
from so8t_helpers.run.stage import versions


def claim(name: str, value: float, bound: float, unit: str, at_least: bool = False) -> dict[str, Any]:
    """One claim: the value is at most the bound, or at least it; whether that holds is worked out here."""
    holds = value >= bound if at_least else value <= bound
    return {"name": name, "value": value, "bound": bound, "unit": unit, "holds": holds}


def write_claims(name: str, figures: dict[str, Any], claims: list[dict[str, Any]]) -> bool:
    """Write the results, print the claims; return whether all hold."""
    machine = {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load": [round(x, 1) for x in psutil.getloadavg()],
    }
    result = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": machine,
        "versions": versions(),
        "figures": figures,
        "claims": claims,
    }
    path = Path(__file__).parent / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    write_json(path, result)
    for entry in claims:
        state = "holds " if entry["holds"] else "BROKEN"
        print(f"{state}  {entry['name']}: {entry['value']} {entry['unit']} (bound {entry['bound']})")
    return all(entry["holds"] for entry in claims)


class Work:
    """What was measured, kept after every part."""

    def __init__(self, path: Path, seconds: float):
        self.path, self.end = path, time.monotonic() + seconds
        self.done: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def part(self, name: str, needs: float, measure: Callable[[], Any]) -> Any:
        """Measure a part unless it is there, or there are fewer than `needs` seconds left; None then."""
        if name not in self.done:
            if time.monotonic() + needs > self.end:
                print(f"left out: {name}", flush=True)
                return None
            started = time.monotonic()
            self.done[name] = measure()
            write_json(self.path, self.done)
            print(f"{time.monotonic() - started:5.0f} s  {name}: {self.done[name]}", flush=True)
        return self.done[name]
