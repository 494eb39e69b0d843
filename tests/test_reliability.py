"""The short form of benchmarks/reliability.py: kills, power cuts, a full disk, spoilt artefacts."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from so8t_helpers.settings import PROJECT_ROOT

sys.path.insert(0, str(PROJECT_ROOT / "benchmarks"))  # its siblings are imported by name, as when it is run

import reliability
from claims import Work


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounts a disk of its own")
def test_the_short_form_holds(tmp_path: Path):
    work = Work(tmp_path / "reliability.json", 1e9)
    reliability.measure(work, tmp_path, short=True)
    found = work.done
    assert len(found["undisturbed"]["same"]) == 5
    assert len(found["killed 1"]["killed_in"]) >= 2
    assert [claim for claim in reliability.claims(found, runs=1, disks=1) if not claim["holds"]] == []
