"""Reports: executed notebook to one self-contained HTML; the index of a run, of all runs, and comparisons."""

from so8t_helpers.report.index import write_index, write_run_index
from so8t_helpers.report.records import read_record, record_path, stage_path
from so8t_helpers.report.stage import write_stage

__all__ = ["read_record", "record_path", "stage_path", "write_index", "write_run_index", "write_stage"]
