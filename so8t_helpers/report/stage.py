"""The report of one stage: its executed notebook as a page that opens with the answer."""

from __future__ import annotations

from pathlib import Path

from so8t_helpers.report.page import render
from so8t_helpers.run.files import write_text
from so8t_helpers.run.records import STAGE_TITLES, record_data, stage_path
from so8t_helpers.run.stage import STAGES, read_manifest, stage_settings
from so8t_helpers.settings import Settings


def write_stage(settings: Settings, stage: str) -> Path:
    """Write `reports/<run>/<stage>.html` from the executed notebook, the record and the manifest."""
    # nbconvert takes a second to import; a run that finds everything fresh does without it.
    from so8t_helpers.report.notebook_html import convert  # noqa: PLC0415

    fragments = convert(settings.run_dir / "notebooks" / f"{stage}.ipynb")
    record, manifest = record_data(settings, stage), read_manifest(settings, stage)
    default = stage_settings(Settings(), stage)
    text = render(
        "stage.html.j2",
        settings,
        fragments.figures,
        title=fragments.title or STAGE_TITLES[stage],
        page=fragments,
        run=settings.run.name,
        profile=settings.profile,
        stage=stage,
        stages=[(name, STAGE_TITLES[name]) for name in STAGES],
        record=record,
        manifest=manifest,
        chosen=[(key, value, default[key]) for key, value in stage_settings(settings, stage).items()],
    )
    path = stage_path(settings, stage)
    write_text(path, text)
    return path
