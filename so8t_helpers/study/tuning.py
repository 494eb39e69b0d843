"""Tuning with Optuna: every arm that tunes gets the same number of trials, the profile's own values first.

Optuna keeps its trials in `optuna.db` in the study's folder (`optuna-dashboard` opens it). What a trial
proposes depends on the study's seed, the trial's number and what the arm's trials before it gave, and on
nothing else: a study that was killed proposes the same again. The first guesses are spread evenly, the same
for all arms that tune the same, so that none is lucky in them.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.study import StudyDirection
from optuna.trial import TrialState

from so8t_helpers.study.outcome import higher_is_better
from so8t_helpers.study.plan import Range, Study, own_values

SPREAD = 4  # trials, the profile's own values among them, before Optuna's sampler learns from them
# Multiples of these, without their whole part, lie evenly (a Kronecker sequence; first the golden ratio).
_STEPS = (0.6180339887, *(p**0.5 % 1 for p in (2, 3, 7, 11, 13, 17, 19, 23)))


@dataclass(frozen=True)
class Trial:
    """One setting that was tried, and the main endpoint on the tuning split."""

    number: int
    values: dict[str, Any]
    value: float


def tune(
    study: Study, arm: str, decisive: list[Any], measure: Callable[[dict[str, Any]], float]
) -> list[Trial]:
    """Carry out the trials of an arm that are missing, and return all of them.

    Args:
        study: names the space, the seed and the number of trials.
        arm: whose.
        decisive: all that decides what a trial measures; where it changes, trials begin anew.
        measure: trains with these values and returns the main endpoint on the tuning split.
    """
    own = own_values(study, arm)
    if not own:  # an arm with nothing to tune has its one setting
        return [Trial(0, {}, measure({}))]
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    spaces = {key: _distribution(space, own[key]) for key, space in study.file.arms[arm].tune.items()}
    kept = _open(study, arm, decisive)
    for left in kept.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        kept.tell(left.number, state=TrialState.FAIL)  # asked for by a process that was killed
    while (number := len(done := _finished(kept))) < study.file.trials:
        if number < SPREAD:
            values = guess(study, arm, number) if number else own
            kept.add_trial(optuna.create_trial(params=values, distributions=spaces, value=measure(values)))
            continue
        kept.sampler = _sampler(study, number)
        trial = kept.ask(spaces)
        kept.tell(trial, measure(trial.params))
    return [Trial(i, one.params, float(one.values[0])) for i, one in enumerate(done)]


def guess(study: Study, arm: str, number: int) -> dict[str, Any]:
    """Return the values of early trial `number`, from 1: they lie evenly over what may be chosen."""
    values: dict[str, Any] = {}
    own = own_values(study, arm)
    for step, (key, space) in zip(itertools.cycle(_STEPS), study.file.arms[arm].tune.items(), strict=False):
        share = number * step % 1
        if not isinstance(space, Range):
            values[key] = space[int(share * len(space))]
            continue
        low, high = (math.log(v) if space.log else v for v in (space.low, space.high))
        value = low + share * (high - low)
        value = math.exp(value) if space.log else value
        values[key] = round(value) if isinstance(own[key], int) else value
    return values


def best(trials: list[Trial], endpoint: str) -> Trial:
    """Return the best trial; of equals the first."""
    sign = -1 if higher_is_better(endpoint) else 1
    return min(trials, key=lambda trial: (sign * trial.value, trial.number))


def _finished(kept: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    return kept.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def _open(study: Study, arm: str, decisive: list[Any]) -> optuna.Study:
    """Open the arm's trials; another space, endpoint or way of training has others."""
    spaces = study.file.arms[arm].model_dump(mode="json")["tune"]
    content = [decisive, spaces, study.file.endpoints.main, study.file.seed]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
    study.folder.mkdir(parents=True, exist_ok=True)
    more = higher_is_better(study.file.endpoints.main)
    direction = StudyDirection.MAXIMIZE if more else StudyDirection.MINIMIZE
    return optuna.create_study(
        storage=f"sqlite:///{(study.folder / 'optuna.db').as_posix()}",
        study_name=f"{arm} {digest}",
        direction=direction,
        load_if_exists=True,
    )


def _sampler(study: Study, number: int) -> optuna.samplers.BaseSampler:
    digest = hashlib.sha256(f"{study.file.seed}/{number}".encode()).digest()
    return optuna.samplers.TPESampler(seed=int.from_bytes(digest[:4], "big"), n_startup_trials=SPREAD)


def _distribution(space: Range | list[Any], own: Any) -> BaseDistribution:
    if not isinstance(space, Range):
        return CategoricalDistribution(space)
    if isinstance(own, int):
        return IntDistribution(round(space.low), round(space.high), log=space.log)
    return FloatDistribution(space.low, space.high, log=space.log)
