"""The report of one stage: its executed notebook as a page that opens with the answer."""

from __future__ import annotations

from pathlib import Path

from so8t_helpers.report.page import write_page
from so8t_helpers.run.records import read_record
from so8t_helpers.run.stage import STAGE_TITLES, executed_path, read_manifest, report_path, stage_settings
from so8t_helpers.settings import Settings


def write_stage(settings: Settings, stage: str) -> Path:
    """Write `reports/<run>/<stage>.html` from the executed notebook, the record and the manifest."""
    # nbconvert takes a second to import; a run that finds everything fresh does without it.
    from so8t_helpers.report.notebook_html import convert  # noqa: PLC0415

    fragments = convert(executed_path(settings, stage))
    default = stage_settings(Settings(), stage)
    return write_page(
        report_path(settings, stage),
        "stage.html.j2",
        settings,
        fragments.figures,
        title=fragments.title or STAGE_TITLES[stage],
        page=fragments,
        run=settings.run.name,
        profile=settings.profile,
        stage=stage,
        stages=list(STAGE_TITLES.items()),
        record=read_record(settings, stage),
        manifest=read_manifest(settings, stage),
        chosen=[(key, value, default[key]) for key, value in stage_settings(settings, stage).items()],
    )
