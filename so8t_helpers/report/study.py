"""The page of a study: its executed notebook, which opens with the answer, and its registrations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from so8t_helpers.report.page import write_page
from so8t_helpers.settings import Settings, resolve

STUDIES = "studies"  # folder of the pages of studies


def study_path(settings: Settings, name: str) -> Path:
    """Where a study's page goes."""
    return resolve(settings.run.reports_root) / STUDIES / f"{name}.html"


def write_study(
    settings: Settings,
    name: str,
    question: str,
    notebook: Path,
    registrations: list[dict[str, Any]],
    failure: str = "",
) -> Path:
    """Write `reports/studies/<name>.html` from the executed notebook; `failure` says what stopped it."""
    from so8t_helpers.report.notebook_html import convert  # noqa: PLC0415  (nbconvert takes a second)

    fragments = convert(notebook)
    return write_page(
        study_path(settings, name),
        "study.html.j2",
        settings,
        fragments.figures,
        title=question,
        name=name,
        profile=settings.profile,
        page=fragments,
        entries=registrations,
        failure=failure,
    )
