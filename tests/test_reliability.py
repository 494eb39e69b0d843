"""The short form of benchmarks/reliability.py: kills, power cuts, full disks, spoilt artefacts, a sweep."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from so8t_helpers.settings import PROJECT_ROOT

sys.path.insert(0, str(PROJECT_ROOT / "benchmarks"))  # its siblings are imported by name, as when it is run

from benchmarks import reliability


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="counts open files as POSIX does")
def test_what_is_claimed_of_kills_disks_and_artefacts_holds_in_the_short_form(tmp_path: Path):
    found = reliability.measure(tmp_path, short=True, count=2, points=3)
    assert found["artefacts_compared"] == 5
    assert found["kills"]["kills"] > 0
    assert [claim for claim in reliability.claims_of(found) if not claim["holds"]] == []
