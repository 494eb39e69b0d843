"""Where the base model lies: the demo's own, a local folder, or a hub snapshot.

Apart from `shape`, since the dataset stage needs the folder alone, and torch would be most of its memory.
"""

from __future__ import annotations

import re
from pathlib import Path

from so8t_helpers.phi3.tokenizer_files import HUB_PATTERNS
from so8t_helpers.run.files import demo_folder, demo_place
from so8t_helpers.run.stage import read_manifest
from so8t_helpers.settings import Settings, SettingsError, resolve

_HUB_FILES = [*HUB_PATTERNS, "*.safetensors", "LICENSE*", "README.md"]


def base_folder(settings: Settings) -> Path:
    """Return the folder of the base model: the demo's own, a local one, or a hub snapshot (downloaded once).

    A run keeps to the commit that it was trained on, whatever the hub's branch has become since.

    Raises:
        SettingsError: no such folder, and not a hub id that can be fetched or found in the cache.
    """
    if (local := check_base(settings)) is not None:
        return local
    name = settings.model.base
    if name == "demo":
        return demo_folder(settings, "base")
    from huggingface_hub import snapshot_download  # noqa: PLC0415
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError  # noqa: PLC0415

    try:
        # Only these files: weights as safetensors, nothing that could be executed.
        folder = snapshot_download(
            name,
            revision=_trained_on(settings) or settings.model.revision,
            allow_patterns=_HUB_FILES,
            cache_dir=hub_cache(settings),
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise SettingsError(
            f"model.base: {name!r} is neither a folder nor could it be fetched from the hub "
            f"({type(error).__name__}); check the name, the network, or name a local folder"
        ) from error
    return Path(folder)


def base_commit(folder: Path) -> str | None:
    """Return the commit of a hub snapshot's folder (`…/snapshots/<commit>`), None for any other folder."""
    named = folder.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", folder.name)
    return folder.name if named else None


def _trained_on(settings: Settings) -> str | None:
    """The commit of the base that this run's adapter was trained on; None before, or for another base."""
    manifest, model = read_manifest(settings, "02_train"), settings.model
    if manifest is None or "base/config.json" not in manifest["inputs"]:
        return None
    was = (manifest["settings"].get("model.base"), manifest["settings"].get("model.revision"))
    folder = Path(manifest["inputs"]["base/config.json"]["path"]).parent
    return base_commit(folder) if was == (model.base, model.revision) else None


def local_base(settings: Settings) -> Path | None:
    """Return the base's folder where it is a local one, or the demo's that was made; None for any other."""
    name = settings.model.base
    folder = demo_place(settings, "base") if name == "demo" else resolve(name)
    return folder if folder.is_dir() else None


def check_base(settings: Settings) -> Path | None:
    """Return `local_base`, and None for the demo's or a hub's that a run would make or fetch.

    Raises:
        SettingsError: no such folder, and not a hub id.
    """
    name, local = settings.model.base, local_base(settings)
    is_hub_id = name.count("/") == 1 and not name.startswith((".", "~", "/"))
    if local is None and name != "demo" and not is_hub_id:
        raise SettingsError(
            f"model.base: no folder {resolve(name)}, and {name!r} is not a hub id (owner/name)"
        )
    return local


def hub_cache(settings: Settings) -> Path:
    """Return the folder where the hub's downloads go under this profile."""
    if settings.cache.hf_home:
        return resolve(settings.cache.hf_home) / "hub"
    from huggingface_hub.constants import HF_HUB_CACHE  # noqa: PLC0415  (knows HF_HOME and the others)

    return Path(HF_HUB_CACHE)
