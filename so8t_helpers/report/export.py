"""One zip of a run's pages to hand to others: no weights, no thinking, no trace of the machine."""

from __future__ import annotations

import getpass
import platform
import re
import zipfile
from pathlib import Path

from so8t_helpers.report.page import scrub
from so8t_helpers.run.files import StageError, atomic_path
from so8t_helpers.settings import Settings

# A fixed time in the archive: the same pages give the same bytes.
EPOCH = (1980, 1, 1, 0, 0, 0)


def write_zip(settings: Settings, target: Path | None = None) -> Path:
    """Write `<run>.zip` with the run's index and stage pages, and return its path.

    Raises StageError: the run has no reports, or a page names this machine, its user or a home folder.
    """
    pages = sorted(settings.reports_dir.glob("*.html"))
    if not pages:
        raise StageError(f"run {settings.run.name} has no reports in {settings.reports_dir}; run it first")
    target = target or Path(f"{settings.run.name}.zip")
    with atomic_path(target) as scratch, zipfile.ZipFile(scratch, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in pages:
            # The index of all runs stays here, so nothing may lead to it.
            text = re.sub(
                r'<a class="brand" href="\.\./index\.html">(.*?)</a>', r"\1", _shared(path, settings)
            )
            entry = zipfile.ZipInfo(f"{settings.run.name}/{path.name}", EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, text)
    return target


def _shared(path: Path, settings: Settings) -> str:
    text = scrub(path.read_text(encoding="utf-8"), settings)
    visible = re.sub(r"data:[\w/+;,=-]+", "", text)
    for word, what in ((getpass.getuser(), "user"), (platform.node(), "machine")):
        # A user called "root" or "test" is in every text about roots and tests: it tells in paths alone.
        pattern = (
            rf"[/\\@]{re.escape(word)}(?![\w-])" if len(word) < 6 else rf"(?<!\w){re.escape(word)}(?!\w)"
        )
        if word and (found := re.search(pattern, visible)):
            around = visible[max(0, found.start() - 40) : found.end() + 20]
            raise StageError(
                f"{path.name} names this {what}: …{around}…; take it out of the notebook's output"
            )
    return text
