"""The study file: which arms are compared, what each may tune, on which seeds, and what judges them."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from so8t_helpers.phi3.shape import Phi3Shape
from so8t_helpers.report.study import study_path
from so8t_helpers.run.files import sha256_file
from so8t_helpers.settings import (
    PARAMS_DIR,
    Count,
    Section,
    Settings,
    SettingsError,
    load_settings,
    merge,
    resolve,
    yaml_path,
)
from so8t_helpers.train.adapters import count_parameters

STUDIES_DIR = PARAMS_DIR / "studies"
ARM_SECTIONS = ("so8t", "pet", "lora", "training")
# What all arms must share, or the comparison would not be one.
SHARED: tuple[str, ...] = (
    "training.dataset_dir",
    "training.continue_from",
    "training.sequence_length",
    "training.precision",
)
SHARED += ("training.eval_steps", "training.eval_samples", "training.sample_steps", "training.trackers")
# Rates that are LoRA's where a profile does not name them.
_LIKE_LORA = ("so8t.learning_rate", "lora.b_rate")
Endpoint = Literal[
    "heldout.loss",
    "heldout.thinking",
    "heldout.decision",
    "heldout.final",
    "heldout.decision_right",
    "heldout.best",
]


class Range(Section):
    """Numbers that tuning may choose from, evenly or, with `log`, evenly by their logarithm."""

    low: float
    high: float
    log: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError("low must be below high, and above 0 with log")
        return self


class Arm(Section):
    """What is compared: settings over the profile's, and what may be tuned."""

    hypothesis: Annotated[str, Field(min_length=1)]
    set: dict[str, Any] = Field(default_factory=dict)
    tune: dict[str, Range | list[Any]] = Field(default_factory=dict)
    match_parameters: str | None = None  # an arm: the smallest LoRA rank that has at least its parameters


class Endpoints(Section):
    """What is judged: the main one is what tuning looks at, too."""

    main: Endpoint = "heldout.final"
    others: list[Endpoint] = Field(default_factory=list)

    @property
    def all(self) -> list[Endpoint]:
        return list(dict.fromkeys([self.main, *self.others]))


class Full(Section):
    """Arms that go on through stages 03 to 05: so many of their trainings, and how much those are asked."""

    arms: list[str] = Field(default_factory=list)
    seeds: Annotated[int, Field(ge=2, le=16)] = 2  # one alone says nothing of how far seeds differ
    prompts: Count = 64


class StudyFile(Section):
    """A file in `params/studies/`."""

    profile: str
    question: Annotated[str, Field(min_length=1)]
    note: str = ""  # why the file was changed after a registration; stands with the changes on the page
    control: str
    arms: Annotated[dict[str, Arm], Field(min_length=2)]
    set: dict[str, Any] = Field(default_factory=dict)  # for all arms
    trials: Count = 8  # of every arm that tunes
    seeds: Annotated[int, Field(ge=2, le=16)] = 6  # below 6 no winner can be named
    seed: int = 0  # tuning's; the seeds that count are the next ones
    tuning: Annotated[float, Field(gt=0.0, lt=0.5)] = 0.1  # share of train.jsonl held out for it
    endpoints: Endpoints = Endpoints()
    full: Full = Full()


@dataclass(frozen=True)
class Study:
    """A study file with the profile it rests on.

    Attributes:
        settings: the profile with what holds for all arms; its run, `study-NAME`, holds the data.
    """

    name: str
    path: Path
    file: StudyFile
    settings: Settings

    @property
    def folder(self) -> Path:
        """Where all that the study leaves lies."""
        return resolve(self.settings.run.root) / "studies" / self.name

    @property
    def page(self) -> Path:
        """The study's page."""
        return study_path(self.settings, self.name)

    @property
    def seeds(self) -> list[int]:
        """The seeds of the trainings that are compared; tuning never saw them."""
        return [self.file.seed + 1 + i for i in range(self.file.seeds)]

    @property
    def full_seeds(self) -> list[int]:
        """The seeds whose trainings go on through all stages, in the arms that do."""
        return self.seeds[: self.file.full.seeds]

    @property
    def others(self) -> list[str]:
        """The arms that are compared with the control."""
        return [arm for arm in self.file.arms if arm != self.file.control]

    @property
    def sha256(self) -> str:
        """Hash of the study file's bytes."""
        return sha256_file(self.path)


def load_study(name: str, overrides: dict[str, Any] | None = None) -> Study:
    """Read a study by its name in `params/studies/` or a YAML file's path; `overrides` go over its profile.

    Raises:
        SettingsError: no such file, an unknown key, a value of the wrong type, arms that do not fit together.
    """
    path = yaml_path(name, STUDIES_DIR, "study", "studies")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}", path.stem):
        raise SettingsError(f"{path}: a study's name is up to 40 letters, digits and . _ -")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        file = StudyFile.model_validate(data)
    except yaml.YAMLError as error:
        raise SettingsError(f"{path}: not valid YAML: {error}") from error
    except ValidationError as error:
        raise SettingsError("\n".join(f"{path}: {_explain(item)}" for item in error.errors())) from error
    _check_arms(path, file)
    settings = load_settings(file.profile, overrides)
    fixed = {
        "run": {"name": f"study-{path.stem}", "seed": file.seed},
        "training": {"eval_samples": None, "sample_steps": None, "trackers": []},
    }
    settings = merge(merge(settings, nested(file.set, f"{path}: `set`", for_all=True)), fixed)
    study = Study(path.stem, path, file, settings)
    if study.settings.training.eval_steps is None:
        raise SettingsError(f"{path}: training.eval_steps is null; a study needs the held-out loss")
    if file.full.arms and study.settings.training.keep == "best":
        raise SettingsError(
            f"{path}: training.keep: best leaves another adapter to stages 03 to 05 than the one whose "
            "loss is compared; set it to last, or `full.arms` to []"
        )
    if study.settings.model.int8_matmul == "auto":
        raise SettingsError(
            f"{path}: model.int8_matmul: auto may differ from one machine to the next; name one of the others"
        )
    for arm in file.arms:
        own_values(study, arm)
    return study


def arm_settings(
    study: Study, arm: str, values: dict[str, Any] | None = None, seed: int | None = None
) -> Settings:
    """Return an arm's settings, with tuned values and a seed over them.

    The rank of an arm with `match_parameters` is among `values`, see `matched_rank`.
    """
    chosen = merge(study.settings, nested(study.file.arms[arm].set, f"{study.path}: `arms.{arm}.set`"))
    chosen = merge(chosen, nested(values or {}, f"{study.path}: `arms.{arm}`"))
    return chosen if seed is None else merge(chosen, {"run": {"seed": seed}})


def matched_rank(study: Study, arm: str, shape: Phi3Shape) -> dict[str, Any]:
    """Return `lora.r`, and `lora.alpha` in the same ratio, where the arm matches another; else nothing.

    The smallest rank with at least the other's parameters: one rank may hold more numbers than all gates, so
    the nearest one could be the control's own.
    """
    other = study.file.arms[arm].match_parameters
    if other is None:
        return {}
    own, wanted = arm_settings(study, arm), sum(count_parameters(arm_settings(study, other), shape))
    lora, gates = count_parameters(own, shape)
    each = lora // own.lora.r
    rank = max(1, -(-(wanted - gates) // each))
    return {"lora.r": rank, "lora.alpha": max(1, round(own.lora.alpha * rank / own.lora.r))}


def own_values(study: Study, arm: str) -> dict[str, Any]:
    """Return the profile's own values of what the arm tunes: the first trial.

    Raises:
        SettingsError: one is not among what tuning may choose from.
    """
    settings, values = arm_settings(study, arm), {}
    for key, space in study.file.arms[arm].tune.items():
        section, _, inner = key.partition(".")
        value = getattr(getattr(settings, section), inner)
        if value is None and key in _LIKE_LORA:
            value = settings.training.learning_rate
        inside = space.low <= value <= space.high if isinstance(space, Range) else value in space
        if not inside:
            raise SettingsError(
                f"{study.path}: `arms.{arm}.tune.{key}`: the profile's own value, {value!r}, is not among "
                "what may be chosen; it is the first trial, so take it in, or set another one for the arm"
            )
        values[key] = value
    return values


def nested(flat: dict[str, Any], where: str, for_all: bool = False) -> dict[str, Any]:
    """Turn {"lora.r": 8} into {"lora": {"r": 8}}.

    Raises:
        SettingsError: a key that a study, or with `for_all` False one of its arms alone, may not set.
    """
    found: dict[str, Any] = {}
    for key, value in flat.items():
        section, _, inner = key.partition(".")
        known = section in ARM_SECTIONS and inner in type(getattr(Settings(), section)).model_fields
        if not known:
            every = [f"{s}.{k}" for s in ARM_SECTIONS for k in type(getattr(Settings(), s)).model_fields]
            (near,) = difflib.get_close_matches(key, every, n=1, cutoff=0.0)
            raise SettingsError(f"{where}: an arm has no setting `{key}`; did you mean `{near}`?")
        if key in SHARED and not for_all:
            raise SettingsError(
                f"{where}: `{key}` is the same for all arms; put it into the study's own `set`"
            )
        found.setdefault(section, {})[inner] = value
    return found


def place(study: Study, arm: str) -> str:
    """Return a short name of an arm's own, in letters that every file system takes: two may begin alike."""
    return f"{list(study.file.arms).index(arm)}-{re.sub(r'[^A-Za-z0-9._-]+', '_', arm)[:24]}"


def _check_arms(path: Path, file: StudyFile) -> None:
    if file.full.arms and file.full.seeds > file.seeds:
        raise SettingsError(f"{path}: `full.seeds` is {file.full.seeds}, but the study has {file.seeds}")
    named = {"control": [file.control], "full.arms": file.full.arms}
    for name, arm in file.arms.items():
        named[f"arms.{name}.match_parameters"] = [arm.match_parameters] if arm.match_parameters else []
        nested(dict.fromkeys(arm.tune), f"{path}: `arms.{name}.tune`")
        for key, space in arm.tune.items():
            if isinstance(space, list) and len(space) < 2:
                raise SettingsError(f"{path}: `arms.{name}.tune.{key}`: a choice needs two values or more")
    for key, arms in named.items():
        for name in arms:
            if name not in file.arms:
                raise SettingsError(f"{path}: `{key}`: no arm {name!r}; arms: {', '.join(file.arms)}")


def _explain(item: Any) -> str:
    """One line for one pydantic error: key, what was expected, what to do."""
    parts = [str(part) for part in item["loc"]]
    if parts == ["full"]:
        return "`full`: expected a mapping, such as `full: {arms: [lora], seeds: 2, prompts: 64}`"
    if item["type"] == "extra_forbidden":
        model: type[BaseModel] = StudyFile
        if parts[0] in {"arms", "endpoints", "full"}:
            inner = {"arms": Range if "tune" in parts else Arm, "endpoints": Endpoints, "full": Full}
            model = inner[parts[0]]
        (near,) = difflib.get_close_matches(parts[-1], model.model_fields, n=1, cutoff=0.0)
        return f"unknown key `{'.'.join(parts)}`; did you mean `{near}`?"
    as_text = isinstance(item["input"], str) and item["type"] in {"float_type", "int_type"}
    hint = " (YAML reads 1e-4 as text: write 1.0e-4, without quotes)" if as_text else ""
    return f"`{'.'.join(parts)}`: {item['msg'].lower()}, got {item['input']!r}{hint}"
