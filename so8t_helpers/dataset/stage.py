"""The stage 01_dataset: records in; train.jsonl, eval.jsonl, quarantine.jsonl and the card out."""

from __future__ import annotations

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from so8t_helpers.dataset.assemble import assemble
from so8t_helpers.dataset.card import describe
from so8t_helpers.dataset.chunks import ChunkResult, first_pass
from so8t_helpers.dataset.gathering import ask_teacher, fetch_robots, train_classifier
from so8t_helpers.dataset.inputs.files import (
    InputFile,
    check_whole,
    entries,
    find_files,
    input_files,
    inspect,
)
from so8t_helpers.dataset.inputs.hub import HUB
from so8t_helpers.dataset.inputs.tables import as_lines, check_heads
from so8t_helpers.dataset.personal_data.names import check_installed
from so8t_helpers.dataset.policy.detector import model_folder
from so8t_helpers.dataset.quarantine import REMEDIES
from so8t_helpers.dataset.reading import Chunk, split
from so8t_helpers.dataset.sample import Plan
from so8t_helpers.dataset.teacher import cache_path, prompt_paths, read_prompts, teacher_path
from so8t_helpers.phi3.chat import Dialect
from so8t_helpers.phi3.source import base_folder, check_base
from so8t_helpers.phi3.template import read_dialect
from so8t_helpers.phi3.tokenizer_files import read_tokenizer
from so8t_helpers.run.files import HashCache, StageError, check_disk, hashes_path, remove, write_json
from so8t_helpers.run.progress import Progress
from so8t_helpers.run.stage import Stage, open_stage
from so8t_helpers.settings import Settings, SettingsError, resolve

STAGE = "01_dataset"
# So many lines have the token length of each sample counted for the plot; of more, so many are drawn.
MEASURED_LINES = 2_000


@dataclass
class Built:
    """Where the stage left its artefacts, and its card."""

    directory: Path
    card: dict[str, Any]


def check(settings: Settings) -> None:
    """Look at what the stage would read, as far as it is here; nothing is made, fetched or written.

    Raises:
        SettingsError: no input, or an input, word list, model or tokenizer that is not there or not read.
        StageError: a word list that is not there, an input that is cut or damaged.
    """
    check_whole(_inputs(settings, fetch=False))
    _check_rest(settings)


def _inputs(settings: Settings, fetch: bool) -> list[InputFile]:
    """Return the input files, their heads looked at."""
    found = input_files(settings, fetch)
    files = inspect([path for path, _ in found], [entry for _, entry in found])
    check_heads(files)
    return files


def _check_rest(settings: Settings) -> None:
    """Look at all that the stage reads besides its inputs; errors as `check`."""
    chosen = settings.dataset
    find_files(chosen.nsfw_training, "dataset.nsfw_training")
    _word_lists(Stage(settings, STAGE))
    check_installed(chosen.personal_names)
    if chosen.nsfw_model is not None:
        model_folder(chosen)
    if chosen.teacher:
        teacher_path(settings)
        read_prompts(settings)
    if chosen.robots_dir and not chosen.robots_fetch:
        _robots_folder(settings)
    if (base := check_base(settings)) is not None:
        read_tokenizer(_tokenizer(base))
        _dialect(settings, base)


def build(settings: Settings) -> Built:
    """Carry out the stage.

    Raises:
        SettingsError: an input, word list or tokenizer that is not there.
        StageError: where nothing was kept, or the inputs' lines cannot be read.
    """
    with open_stage(settings, STAGE) as stage, ThreadPoolExecutor(1) as hashing:
        _check_rest(settings)
        files = _inputs(settings, fetch=True)
        local = [entry.path for entry in entries(settings) if not entry.path.startswith(HUB)]
        stage.look_for(*local, *settings.dataset.nsfw_training)
        for file in files:
            stage.read_file(f"input/{file.name}", file.path)
        hashes = HashCache(hashes_path(settings))
        known = hashing.map(hashes.sha256, [file.path for file in files])  # while their lines are counted
        work = stage.directory / ".work"
        remove(work)
        work.mkdir()
        files = as_lines(files, work)
        chunks = split(files)
        lines = sum(chunk.lines for chunk in chunks)
        check_disk(stage.directory, 8 * sum((f.lines or f.path).stat().st_size for f in files), STAGE)
        classifier_path = stage.directory / "nsfw_classifier.safetensors"
        remove(classifier_path)
        labelled = find_files(settings.dataset.nsfw_training, "dataset.nsfw_training")
        for path in labelled:
            stage.read_file(f"nsfw_training/{path.name}", path)
        classifier = train_classifier(settings, labelled, classifier_path, work) if labelled else None
        _word_lists(stage)
        base = base_folder(settings)
        plan = Plan(
            settings.dataset,
            settings.run.seed,
            settings.training.sequence_length,
            _dialect(settings, base),
            stage.read_file("base/tokenizer.json", _tokenizer(base)),
            min(1.0, MEASURED_LINES / max(lines, 1)),
            _robots(settings, stage, chunks, files[0].path.parent),
            cache_path(settings) if settings.dataset.teacher else None,
            read_prompts(settings) if settings.dataset.teacher else {},
            classifier_path if classifier else None,
        )
        if plan.thoughts:
            for language, path in prompt_paths(settings).items():
                stage.read_file(f"teacher/{language}.txt", path)
            ask_teacher(settings, plan, chunks)
        workers = settings.dataset.workers or os.cpu_count() or 1
        results: list[ChunkResult] = []
        with Progress(settings, STAGE, lines, "lines", "records") as bar:
            for result in first_pass(plan, chunks, work, workers):
                results.append(result)
                bar.update(result.lines, kept=sum(r.kept for r in results))
        list(known)
        tally = assemble(settings, stage.directory, chunks, results, work, hashes)
        remove(work)
        if not tally.total("train") + tally.total("eval"):
            raise StageError(_nothing_kept(lines, tally.reasons))
        card = describe(tally, files, stage.directory, hashes, settings.dataset, classifier)
        hashes.save()
        write_json(stage.directory / "card.json", card)
        stage.facts = {f"{name} lines": number for name, number in card["lines"].items()}
    return Built(settings.run_dir / STAGE, card)


def _nothing_kept(lines: int, reasons: Counter[str]) -> str:
    """Say why there is no sample, and what would help against the commonest reason."""
    if not lines:
        return f"{STAGE}: the files of dataset.inputs hold no line"
    (first, _), *_ = worst = reasons.most_common(3)
    counts = ", ".join(f"{number} {reason}" for reason, number in worst)
    remedy = f"; {REMEDIES[first]}" if first in REMEDIES else ""
    return f"{STAGE}: none of {lines} lines was kept ({counts}){remedy}; see quarantine.jsonl"


def _robots(settings: Settings, stage: Stage, chunks: list[Chunk], inputs: Path) -> Path | None:
    """Return the folder of robots.txt files: the profile's, else `robots/` in the first input's folder."""
    chosen = settings.dataset.robots_dir
    folder = resolve(chosen) if chosen else inputs / "robots"
    if settings.dataset.robots_fetch:
        folder.mkdir(parents=True, exist_ok=True)
        fetch_robots(chunks, folder, settings.dataset.robots_agent)
    elif chosen:
        _robots_folder(settings)
    stage.look_for(str(folder / "*.txt"))
    for path in sorted(folder.glob("*.txt")):
        stage.read_file(f"robots/{path.name}", path)
    return folder if folder.is_dir() else None


def _robots_folder(settings: Settings) -> Path:
    folder = resolve(settings.dataset.robots_dir or "")
    if not folder.is_dir():
        raise SettingsError(f"dataset.robots_dir: no folder {folder}; it holds one <host>.txt for each host")
    return folder


def _word_lists(stage: Stage) -> None:
    for name in stage.settings.dataset.nsfw_words:
        stage.read_file(f"nsfw_words/{Path(name).name}", resolve(name), "dataset.nsfw_words names it")


def _dialect(settings: Settings, base: Path) -> Dialect:
    """Return the base's chat dialect, which must have a place for the profile's system words."""
    dialect = read_dialect(base)
    if settings.dataset.system_prompt and not dialect.takes_system:
        raise SettingsError(
            f"dataset.system_prompt: the chat template of {base} has no place for system "
            "words; set it to null"
        )
    return dialect


def _tokenizer(folder: Path) -> Path:
    """Return the base's tokenizer.json."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise SettingsError(
            f"model.base: {folder} has no tokenizer.json; save the fast tokenizer there with "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    return path
