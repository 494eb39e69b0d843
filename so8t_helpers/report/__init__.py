"""Reports: executed notebook to one self-contained HTML; the index of a run, of all runs, and comparisons."""
