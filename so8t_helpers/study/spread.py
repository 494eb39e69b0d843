"""Arms side by side: each in a process of its own, on whatever card or host is free for it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from so8t_helpers.run.files import StageError, remove
from so8t_helpers.settings import SettingsError
from so8t_helpers.study.engine import Session
from so8t_helpers.study.full import check_full
from so8t_helpers.study.plan import Study, place
from so8t_helpers.study.stage import alone, begin, carry_out_arm
from so8t_helpers.verbs.sweep import Mapper


def spread(study: Study, name: str, assignments: Sequence[str], mapper: Mapper) -> None:
    """Let a mapper carry out all arms; what they leave is read by `stage.carry_out` then.

    Args:
        study: the study, registered here before the first arm begins.
        name, assignments: what the command line called it, and its `--set`, for the arms' own commands.
        mapper: carries out commands, several at once.

    Raises:
        StageError: an arm failed; the others are finished, and the same command goes on.
        SettingsError, StageError: before the first arm, what would stop stages 03 to 05 on this machine.
    """
    with alone(study):
        data, *_ = begin(study)
        check_full(study, data)
    command = [sys.executable, "-m", "so8t_helpers", "study", name]
    command += [part for text in assignments for part in ("--set", text)]
    tasks = [([*command, "--arm", arm], str(_log(study, arm))) for arm in study.file.arms]
    for arm, status in zip(study.file.arms, mapper(tasks), strict=True):
        if status:
            raise StageError(
                f"study {study.name}: arm {arm} ended with {status}; see {_log(study, arm)}. "
                "What is finished is kept: the same command goes on"
            )


def carry_out_alone(study: Study, arm: str) -> None:
    """Carry out one arm, beside processes that carry out others.

    Raises:
        SettingsError: the study has no such arm.
    """
    if arm not in study.file.arms:
        raise SettingsError(f"{study.path}: no arm {arm!r}; arms: {', '.join(study.file.arms)}")
    with alone(study):
        data, shape, _ = begin(study)
    session = Session(study, data, work=f"{study.settings.run.name}.{place(study, arm)}")
    try:
        carry_out_arm(study, arm, data, shape, session)
    finally:
        session.release()
    remove(session.work_dir)


def _log(study: Study, arm: str) -> Path:
    return study.folder / f"{place(study, arm)}.log"
