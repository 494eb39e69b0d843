"""Interactive views for JupyterLab; nothing outside this package imports ipywidgets."""
