"""Arms that go on through stages 03 to 05: each of the trainings is an ordinary run, with reports of its own.

What counts of a run is kept in the study's own folder, so that the page needs no model: answers as they were
judged (no text), the smallest file's quality, o_proj's quantisation error.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from so8t_helpers.evaluate.summary import load_answers
from so8t_helpers.run.files import StageError, check_disk, read_json, write_json
from so8t_helpers.run.stage import STAGES, stage_settings
from so8t_helpers.settings import Settings, merge
from so8t_helpers.study.data import Data
from so8t_helpers.study.outcome import ADAPTER, Outcome, key_of
from so8t_helpers.study.plan import Study, arm_settings, place
from so8t_helpers.verbs import batch
from so8t_helpers.verbs.needs import check_places, check_stage, estimate

_JUDGED = ("id", "label", "decision", "well_formed", "separated", "correct", "refused")
# Where things lie and who answers: the same numbers, but for rounding.
_NOT_DECISIVE: tuple[str, ...] = ("gguf.model_dir", "gguf.name", "gguf.threads", "eval.gguf_dir")
_NOT_DECISIVE += ("eval.engine", "eval.ollama_url", "eval.parallel", "eval.timeout_seconds")
_NOT_DECISIVE += ("eval.keep_in_ollama", "eval.show_thinking", "eval.bootstrap_samples")


def full_settings(study: Study, arm: str, tuned: Settings, seed: int, data: Data) -> Settings:
    """Return the settings of the run of one of an arm's trainings.

    Its files are F16 and the profile's last type; the latter is asked. All runs are asked the same.
    """
    smallest = tuned.gguf.types[-1]
    kept = study.folder / "trainings" / key_of(_seeded(tuned, seed), "held-out", data.digests)
    return merge(
        tuned,
        {
            "run": {"name": f"{study.settings.run.name}-{place(study, arm)[:14]}-{seed}"},
            "training": {"dataset_dir": str(data.judges["held-out"].parent)},
            "bake": {"adapter_dir": str(kept / ADAPTER)},
            "gguf": {"types": list(dict.fromkeys(["f16", smallest]))},
            "eval": {"models": [smallest], "prompts": study.file.full.prompts},
        },
    )


def needs_adapter(study: Study, arm: str, tuned: Settings, seed: int, data: Data) -> bool:
    """Whether this training of an arm goes on through the stages, and has not done so yet."""
    chosen = arm in study.file.full.arms and seed in study.full_seeds
    return chosen and _found(_kept(study, full_settings(study, arm, tuned, seed, data))) is None


def check_full(study: Study, data: Data) -> None:
    """Look, before the trainings, at what stages 03 to 05 of the arms that go there will need.

    The adapters are not there yet, and what tuning chooses changes nothing of it.

    Raises:
        SettingsError, StageError: what would stop a stage, or too small a disk for the runs that are missing.
    """
    stages, room = STAGES[2:], 0
    for arm in study.file.full.arms:
        tuned = arm_settings(study, arm)
        runs = [full_settings(study, arm, tuned, seed, data) for seed in study.full_seeds]
        room += sum(estimate(run, stages).run for run in runs)
        settings = merge(runs[0], {"bake": {"adapter_dir": None}})
        check_places(settings)
        batch.check_notebooks(settings, stages)
        for stage in stages:
            check_stage(settings, stage)
    if room:
        check_disk(study.folder, room, f"study {study.name}, for stages 03 to 05 of its `full.arms`,")


def carry_out_full(study: Study, arm: str, tuned: Settings, outcome: Outcome, data: Data) -> dict[str, Any]:
    """Carry out 03 to 05 for a training, where that was not done yet, and return what is kept of it.

    Raises:
        StageError: a stage failed.
    """
    settings = full_settings(study, arm, tuned, outcome.facts["seed"], data)
    path = _kept(study, settings)
    if (same := _found(path)) is not None:
        if same != path:
            write_json(path, read_json(same))
    else:
        last = batch.run_stages(settings, STAGES[2:])[-1]
        if last.state not in {"done", "fresh"}:
            raise StageError(f"run {settings.run.name}: {last.stage} {last.state}: {last.detail}")
        keep(settings, path)
    return dict(read_json(path))


def keep(settings: Settings, path: Path) -> None:
    """Write down what counts of a finished run."""
    smallest = settings.gguf.types[-1]
    quality = read_json(settings.run_dir / "04_gguf" / "quality.json")
    scores = read_json(settings.run_dir / "05_ollama_eval" / "scores.json")
    answers = load_answers(settings)
    errors = [row["rotated"] for row in quality.get("o_proj") or [] if row["file"] == smallest]
    facts = {
        "run": settings.run.name,
        "engine": scores["engine"]["description"],
        "file": smallest,
        "quality": {kind: quality["files"][kind] for kind in settings.gguf.types},
        "o_proj": sum(errors) / len(errors) if errors else None,
        "answers": json.loads(answers[list(_JUDGED)].to_json(orient="records", force_ascii=False)),
    }
    write_json(path, facts)


def _kept(study: Study, settings: Settings) -> Path:
    """Where what counts of a run is kept: named after its training and all that decides the rest."""
    stages = stage_settings(settings, STAGES[3]) | stage_settings(settings, STAGES[4])
    decisive = {key: value for key, value in stages.items() if key not in _NOT_DECISIVE}
    training = Path(settings.bake.adapter_dir or "").parent.name
    text = json.dumps([training, decisive], sort_keys=True)
    return study.folder / "full" / f"{hashlib.sha256(text.encode()).hexdigest()[:20]}.json"


def _found(path: Path) -> Path | None:
    """This file, or another study's of the same training: two studies may share their control."""
    return next((p for p in [path, *path.parents[2].glob(f"*/full/{path.name}")] if p.is_file()), None)


def _seeded(settings: Settings, seed: int) -> Settings:
    return merge(settings, {"run": {"seed": seed}})
