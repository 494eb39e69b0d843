"""The first cell of every notebook: what papermill, or a person, has set becomes the typed profile.

from so8t_helpers import notebook

settings = notebook.settings(globals())
"""

from __future__ import annotations

from typing import Any

from so8t_helpers import demo
from so8t_helpers.settings import Settings, load_settings


def settings(variables: dict[str, Any]) -> Settings:
    """Return the profile that a notebook's `globals()` name; what the demo needs is made if it is missing.

    `profile` names the profile; a variable with a section's name is a dictionary laid over it, such as
    `training = {"max_steps": 20}`. Raises SettingsError: unknown profile or key, a value of the wrong type.
    """
    chosen = from_parameters(variables)
    demo.prepare(chosen)
    return chosen


def from_parameters(variables: dict[str, Any]) -> Settings:
    """Return the profile that variables name, as `settings` does, and make nothing."""
    overrides = {k: variables[k] for k in Settings.model_fields if k != "profile" and variables.get(k)}
    return load_settings(variables.get("profile", "demo"), overrides)
