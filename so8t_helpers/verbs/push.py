"""What of a run goes to a repository of the hub: files that can be walked back, and name no machine.

In the repository's root lie the baked folder, which transformers loads, and the GGUF files with the
`template` and `params` that `ollama run hf.co/OWNER/NAME` reads beside them (the hub's documentation on
Ollama); `adapter/` has PEFT's files and the gates, `reports/` the pages. Weights come first, the card last.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from so8t_helpers.engines.host import modelfile_of
from so8t_helpers.report.export import refuse_names, shared_pages
from so8t_helpers.report.page import scrub
from so8t_helpers.run.files import StageError, read_json, sha256_file
from so8t_helpers.run.origin import FILE as PROVENANCE
from so8t_helpers.run.records import read_record
from so8t_helpers.run.stage import STAGES, manifest_path, read_manifest, report_path, stale_reason
from so8t_helpers.settings import Settings, SettingsError
from so8t_helpers.verbs.push_card import Made, write_card
from so8t_helpers.verbs.verify import walk_back

# Which stage made what a later one read, under which label, and where it lies in the maker's folder.
_LINKS = (
    ("04_gguf", "03_bake/", "03_bake", ""),
    ("05_ollama_eval", "baked/", "03_bake", "model/"),
    ("05_ollama_eval", "04_gguf/", "04_gguf", ""),
)
_ADAPTER = "02_train/adapter/"
# A vocabulary may hold any word, also this machine's name; it is the base's, byte for byte.
_VOCABULARY = ("tokenizer.json", "tokenizer.model")
WEIGHTS = (".safetensors", ".gguf")


@dataclass(frozen=True)
class Item:
    """One file of the repository: its path there, and its content or the file that has it."""

    name: str
    content: Path | bytes

    @property
    def size(self) -> int:
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


@dataclass(frozen=True)
class Plan:
    """What goes where. `missing` says what such a repository could have and this one will not."""

    run: str
    repo: str
    private: bool
    items: list[Item]
    missing: list[str]

    def summary(self) -> str:
        """Return what would be sent, a line a file, and what is missing."""
        total = sum(item.size for item in self.items)
        whose = "private" if self.private else "PUBLIC: anybody can read it"
        lines = [f"{item.size / 1e6:10.3f} MB  {item.name}" for item in self.items]
        lines += [f"not there: {text}" for text in self.missing]
        return "\n".join(
            [*lines, f"{self.run} to {self.repo} ({whose}): {len(self.items)} files, {total / 1e6:.1f} MB"]
        )


def plan(settings: Settings, repo: str, public: bool = False) -> Plan:
    """Look at a run and return what a push of it sends; no request is made.

    Args:
        repo: the repository, "OWNER/NAME".
        public: make a new repository public instead of private.

    Raises:
        SettingsError: `repo` is not of that form.
        StageError: no baked model; a stage is stale, or `so8t verify` finds a broken link; GGUF files or
            scores are of another model; a file names this machine, its user or a folder of it.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise SettingsError(f"push: {repo!r} is no repository; expected OWNER/NAME")
    made = {stage: manifest for stage in STAGES if (manifest := read_manifest(settings, stage))}
    if "03_bake" not in made:
        raise StageError(f"push: {settings.run_dir} has no baked model; carry out 03_bake first")
    _refuse_stale(settings, made)
    missing = [f"{stage} was not carried out" for stage in STAGES[3:] if stage not in made]
    items = [*_weights(settings, made), *_adapter(settings, made), *_side_files(settings, made)]
    if not any(item.name == "adapter/so8t_gates.safetensors" for item in items):
        missing.append("gates: the adapter was trained without rotations")
    pages = _fresh_pages(settings, made)
    missing += [f"page of {stage}" for stage in made if f"reports/{stage}.html" not in pages]
    items += [Item(name, text.encode()) for name, text in pages.items()]
    items.append(Item("README.md", write_card(settings, repo, made, list(pages)).encode()))
    for item in items:
        _refuse_traces(item, settings)
    return Plan(settings.run.name, repo, not public, items, missing)


def _refuse_stale(settings: Settings, made: Made) -> None:
    for stage in made:
        if reason := stale_reason(settings, stage):
            raise StageError(f"push: {stage} {reason}; `so8t run` carries it out again")
    for stage, label, earlier, folder in _LINKS:
        read = made.get(stage, {"inputs": {}})["inputs"]
        left = made.get(earlier, {"outputs": {}})["outputs"]
        for name, entry in read.items():
            if name.startswith(label) and left.get(folder + name.removeprefix(label)) != entry["sha256"]:
                raise StageError(
                    f"push: {stage} read another {name} than this run's {earlier} has; carry it out again"
                )
    if (broken := walk_back(settings.run_dir).broken) is not None:
        raise StageError(
            f"push: so8t verify breaks at {broken.name}: {broken.found}; what cannot be walked back to its "
            "input lines is not uploaded"
        )


def _weights(settings: Settings, made: Made) -> Iterator[Item]:
    for stage, folder in (("03_bake", "model/"), ("04_gguf", "")):
        for name in made.get(stage, {"outputs": {}})["outputs"]:
            if name.startswith(folder) and name.endswith(WEIGHTS):
                yield Item(name.removeprefix(folder), settings.run_dir / stage / name)


def _adapter(settings: Settings, made: Made) -> Iterator[Item]:
    """The files that 03_bake read, in this run or another; PEFT's configuration names the base by its id."""
    carried = settings.run_dir / "03_bake" / "model" / PROVENANCE
    base = read_json(carried)["base"]
    for label, entry in made["03_bake"]["inputs"].items():
        if not label.startswith(_ADAPTER):
            continue
        name, path = "adapter/" + label.removeprefix(_ADAPTER), Path(entry["path"])
        if path.name != "adapter_config.json":
            yield Item(name, path)
            continue
        config = read_json(path)
        known = {"base_model_name_or_path": base["id"], "revision": base.get("commit") or base["revision"]}
        same = config.items() >= known.items()
        yield Item(name, path if same else json.dumps(config | known, indent=2, sort_keys=True).encode())


def _side_files(settings: Settings, made: Made) -> Iterator[Item]:
    """What stands beside the weights, but the card; and what Ollama's import reads beside a GGUF."""
    for name in made["03_bake"]["outputs"]:
        place = name.removeprefix("model/")
        if name != place and not name.endswith(WEIGHTS) and place != "README.md":
            yield Item(place, settings.run_dir / "03_bake" / name)
    files = [name for name in made.get("04_gguf", {"outputs": {}})["outputs"] if name.endswith(".gguf")]
    if files:
        # The threads are this machine's.
        modelfile = replace(modelfile_of(settings, settings.run_dir / "04_gguf" / files[0]), threads=None)
        yield Item("template", modelfile.template.encode())
        parameters = json.dumps(modelfile.parameters, ensure_ascii=False, indent=2)
        yield Item("params", f"{parameters}\n".encode())
        if modelfile.system:
            yield Item("system", modelfile.system.encode())


def _fresh_pages(settings: Settings, made: Made) -> dict[str, str]:
    """The run's pages by their place in the repository, but those of an earlier run of a stage."""
    old = set()
    for stage in STAGES:
        record = read_record(settings, stage)
        if (
            stage not in made
            or record is None
            or record.manifest != sha256_file(manifest_path(settings, stage))
        ):
            old.add(report_path(settings, stage).name)
    return {f"reports/{name}": text for name, text in shared_pages(settings).items() if name not in old}


def _refuse_traces(item: Item, settings: Settings) -> None:
    """Raise StageError where a file, or what a file of weights says of itself, names this machine."""
    if item.name in _VOCABULARY or item.name.startswith("reports/"):  # the pages have been looked at
        return
    if isinstance(item.content, bytes):
        text = item.content.decode()
    elif item.name.endswith(WEIGHTS):
        text = _said_in(item.content)
    else:
        text = item.content.read_text(encoding="utf-8", errors="replace")
    remedy = "take it out where the run got it from, and carry the stage out again"
    if (cleaned := scrub(text, settings)) != text:
        at = next(i for i, (a, b) in enumerate(zip(text, cleaned + "\0", strict=False)) if a != b)
        raise StageError(
            f"{item.name} names a folder of this machine: …{text[max(0, at - 40) : at + 40]}…; {remedy}"
        )
    refuse_names(item.name, text, remedy)


def _said_in(path: Path) -> str:
    """The texts in a file of weights: a safetensors' own metadata, or a GGUF's, but its vocabulary."""
    if path.suffix == ".safetensors":
        from safetensors import safe_open  # noqa: PLC0415  (these two bring numpy and torch)

        with safe_open(path, framework="pt") as file:
            return json.dumps(file.metadata() or {}, ensure_ascii=False)
    from gguf import GGUFReader, GGUFValueType  # noqa: PLC0415

    fields = GGUFReader(path).fields
    texts = (name for name, field in fields.items() if field.types == [GGUFValueType.STRING])
    return "\n".join(f"{name}: {fields[name].contents()}" for name in texts)
