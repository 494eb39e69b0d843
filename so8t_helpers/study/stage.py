"""A study from its file to its results, in one call that can be killed at any moment and made again."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from filelock import FileLock, Timeout

from so8t_helpers.phi3.shape import Phi3Shape, read_shape
from so8t_helpers.settings import Settings, merge
from so8t_helpers.study.data import Data, prepare
from so8t_helpers.study.engine import Session
from so8t_helpers.study.full import carry_out_full, check_full, needs_adapter
from so8t_helpers.study.outcome import Outcome, decisive_settings
from so8t_helpers.study.plan import Study, arm_settings, matched_rank
from so8t_helpers.study.registration import register
from so8t_helpers.study.tuning import Trial, best, tune

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ArmResult:
    """What became of an arm.

    Attributes:
        settings: as tuned; the seed is not theirs.
        trials: what tuning tried, the profile's own values first. chosen: the best of them.
        outcomes: one training a seed, judged by what tuning never saw.
    """

    name: str
    settings: Settings
    trials: list[Trial]
    chosen: Trial
    outcomes: list[Outcome]

    @property
    def diverged(self) -> list[int]:
        """The seeds whose training diverged."""
        return [outcome.facts["seed"] for outcome in self.outcomes if outcome.diverged]


@dataclass(frozen=True)
class Results:
    """All that a study found.

    Attributes:
        registrations: the first was written before the first training.
        full: what is kept of an arm's trainings that went on through all stages, one a seed; see `full.keep`.
    """

    study: Study
    registrations: list[dict[str, Any]]
    arms: dict[str, ArmResult]
    full: dict[str, list[dict[str, Any]]]

    @property
    def control(self) -> ArmResult:
        return self.arms[self.study.file.control]


def carry_out(study: Study) -> Results:
    """Tune every arm, train it on every seed, and return what came out; what is finished is not done again.

    Raises:
        SettingsError, StageError: before any long work, when something does not fit.
    """
    with alone(study):
        data, shape, registrations = begin(study)
        session = Session(study, data, before=lambda: check_full(study, data))
        arms = {name: carry_out_arm(study, name, data, shape, session) for name in study.file.arms}
        session.release()
        log.info("study %s: %d trainings carried out", study.name, session.trained)
        full = {}
        for arm in (arms[name] for name in study.file.full.arms):
            outcomes = arm.outcomes[: study.file.full.seeds]
            if not any(outcome.diverged for outcome in outcomes):
                full[arm.name] = [carry_out_full(study, arm.name, arm.settings, o, data) for o in outcomes]
    return Results(study, registrations, arms, full)


def begin(study: Study) -> tuple[Data, Phi3Shape, list[dict[str, Any]]]:
    """Return the study's data, its base's shape and all registrations, this one written; see `alone`."""
    data = prepare(study)
    shape = read_shape(data.base)
    return data, shape, register(study, data, shape)


def carry_out_arm(study: Study, name: str, data: Data, shape: Phi3Shape, session: Session) -> ArmResult:
    """Tune an arm and train it on every seed; what is finished is read."""
    main, matched = study.file.endpoints.main, matched_rank(study, name, shape)

    def measure(values: dict[str, Any]) -> float:
        log.info("study %s: arm %s tries %s", study.name, name, values or "its one setting")
        settings = arm_settings(study, name, matched | values, study.file.seed)
        return session.outcome(settings, "tuning").value(main)

    decisive = [decisive_settings(arm_settings(study, name, matched)), data.digests]
    trials = tune(study, name, decisive, measure)
    chosen = best(trials, main)
    settings = arm_settings(study, name, matched | chosen.values)
    outcomes = []
    for seed in study.seeds:
        log.info("study %s: arm %s, seed %d", study.name, name, seed)
        adapter = needs_adapter(study, name, settings, seed, data)
        outcomes.append(session.outcome(merge(settings, {"run": {"seed": seed}}), "held-out", adapter))
    return ArmResult(name, settings, trials, chosen, outcomes)


def alone(study: Study, page: bool = False) -> AbstractContextManager[object]:
    """Take the study's lock, or its page's, which the system releases when its holder dies; wait for another.

    The notebook that makes a page takes the study's own in its kernel.
    """
    study.folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(study.folder / (".page.lock" if page else ".lock"))
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        what = "makes its page" if page else "carries it out"
        log.warning("study %s: waiting for the process that %s", study.name, what)
        return lock.acquire()
