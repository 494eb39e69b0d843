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
    pages = shared_pages(settings)
    if not pages:
        raise StageError(f"run {settings.run.name} has no reports in {settings.reports_dir}; run it first")
    target = target or Path(f"{settings.run.name}.zip")
    with atomic_path(target) as scratch, zipfile.ZipFile(scratch, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in pages.items():
            entry = zipfile.ZipInfo(f"{settings.run.name}/{name}", EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, text)
    return target


def shared_pages(settings: Settings) -> dict[str, str]:
    """Return a run's pages as they may leave the machine, by file name; none where it has no reports.

    Raises StageError: a page names this machine, its user or a home folder.
    """
    pages = {}
    for path in sorted(settings.reports_dir.glob("*.html")):
        text = scrub(path.read_text(encoding="utf-8"), settings)
        refuse_names(path.name, text, "take it out of the notebook's output")
        # The index of all runs stays here, so nothing may lead to it.
        pages[path.name] = re.sub(r'<a class="brand" href="\.\./index\.html">(.*?)</a>', r"\1", text)
    return pages


def refuse_names(name: str, text: str, remedy: str) -> None:
    """Raise StageError, which says what to do, where the text of file `name` names this machine or its user.

    Embedded data (`data:…`) is not looked at.
    """
    visible = re.sub(r"data:[\w/+;,=-]+", "", text)
    for word, what in ((getpass.getuser(), "user"), (platform.node(), "machine")):
        # A user called "root" or "test" is in every text about roots and tests: it tells in paths alone.
        pattern = (
            rf"[/\\@]{re.escape(word)}(?![\w-])" if len(word) < 6 else rf"(?<!\w){re.escape(word)}(?!\w)"
        )
        if word and (found := re.search(pattern, visible)):
            around = visible[max(0, found.start() - 40) : found.end() + 20]
            raise StageError(f"{name} names this {what}: …{around}…; {remedy}")
