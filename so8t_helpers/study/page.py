"""The study's page: 06_study.ipynb through papermill, then the report room."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

from so8t_helpers.report.index import write_index
from so8t_helpers.report.study import write_study
from so8t_helpers.run.files import StageError, replace
from so8t_helpers.settings import resolve
from so8t_helpers.study.plan import STUDIES_DIR, Study
from so8t_helpers.study.registration import read_registrations
from so8t_helpers.study.stage import alone
from so8t_helpers.verbs.batch import one_line
from so8t_helpers.verbs.kernel import kernel_place

NOTEBOOK = "06_study"


def make_page(study: Study, overrides: dict[str, Any]) -> Path:
    """Execute the notebook, keep it in the study's folder, and write the page and the index of all runs.

    Raises:
        StageError: a cell failed; the page then says so, too.
    """
    import papermill  # noqa: PLC0415  (its kernel client takes a second to import)

    for name in ("papermill", "traitlets"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    notebook = resolve(study.settings.run.notebooks) / f"{NOTEBOOK}.ipynb"
    executed = study.folder / notebook.name
    known = study.path == STUDIES_DIR / study.path.name
    parameters = {"study": study.name if known else str(study.path.resolve()), "overrides": overrides}
    failure = ""
    # Another process that makes the page would take this one's kernel for what a killed one left.
    with alone(study, page=True), tempfile.TemporaryDirectory(dir=study.folder, prefix=".page-") as scratch:
        running = Path(scratch) / notebook.name
        running.write_bytes(notebook.read_bytes())
        try:
            with kernel_place(study.settings, study.folder):
                papermill.execute_notebook(
                    notebook,
                    running,
                    parameters=parameters,
                    kernel_name="python3",
                    progress_bar=False,
                    extra_arguments=["--log-level=ERROR"],
                    start_timeout=study.settings.run.kernel_start_seconds,
                    cwd=notebook.parent,
                )
        except Exception as exception:
            failure = one_line(exception)
        replace(running, executed)
    question, entries = study.file.question, read_registrations(study)
    page = write_study(study.settings, study.name, question, executed, entries, failure)
    write_index(study.settings)
    if failure:
        raise StageError(f"{notebook.name}: {failure}; page: {page}")
    return page
