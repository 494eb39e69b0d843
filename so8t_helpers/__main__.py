"""The verbs: `python -m so8t_helpers VERB` or `so8t VERB`."""

from __future__ import annotations

import argparse
import difflib
import sys
from pathlib import Path
from typing import Any

from so8t_helpers.run_folder import STAGES, StageError
from so8t_helpers.settings import Settings, SettingsError, load_settings, parse_assignment

USER_ERROR, STAGE_FAILED, INTERRUPTED = 2, 1, 130


def main(arguments: list[str] | None = None) -> int:
    """Carry out one verb; return 0, 1 (a stage failed), 2 (an error of the user's) or 130 (interrupted)."""
    for stream in (sys.stdout, sys.stderr):
        # A Windows console's code page may lack the characters of a Japanese message.
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    options = _parser().parse_args(arguments)
    try:
        status: int = options.carry_out(options)
    except (SettingsError, StageError) as error:
        print(f"so8t {options.verb}: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print(f"so8t {options.verb}: interrupted", file=sys.stderr)
        return INTERRUPTED
    return status


def run(options: argparse.Namespace) -> int:
    """Carry out the stages of one or more profiles."""
    from so8t_helpers import batch  # noqa: PLC0415

    status = 0
    every = [_settings(options, profile) for profile in options.profile]
    stages = _stages(options)
    for settings in every:
        batch.preflight(settings, stages)
    for settings in every:
        outcomes = batch.run_stages(settings, stages, force=options.force)
        for outcome in outcomes:
            print(f"{outcome.stage}: {outcome.state} ({outcome.detail})")
        last = outcomes[-1]
        report = settings.reports_dir / "index.html"
        if last.state in {"failed", "interrupted"}:
            status = INTERRUPTED if last.state == "interrupted" else STAGE_FAILED
            print(f"{settings.run.name}: stage {last.stage} {last.state}: {last.detail}; report: {report}")
        else:
            count = sum(outcome.state == "done" for outcome in outcomes)
            fresh = len(outcomes) - count
            print(f"{settings.run.name}: {count} stages carried out, {fresh} fresh; reports: {report}")
    return status


def doctor(options: argparse.Namespace) -> int:
    """Say what this machine has, and whether the profile fits on it."""
    from so8t_helpers import doctor as doctor_module  # noqa: PLC0415

    return doctor_module.print_report(_settings(options, options.profile))


def verify(options: argparse.Namespace) -> int:
    """Walk from a GGUF file or a run back to the input lines, hash by hash."""
    from so8t_helpers import provenance  # noqa: PLC0415

    target = Path(options.profile)
    if not target.exists():
        target = _settings(options, options.profile).run_dir
    result = provenance.verify(target)
    for link in result.links:
        print(f"{'holds ' if link.holds else 'BROKEN'}  {link.name}: {link.found}")
    if result.broken is None:
        print(f"{target}: all {len(result.links)} links hold")
        return 0
    print(f"{target}: broken at {result.broken.name}: {result.broken.found}")
    return STAGE_FAILED


def serve(options: argparse.Namespace) -> int:
    """Start the /think service."""
    from so8t_helpers import think_service  # noqa: PLC0415

    think_service.serve(_settings(options, options.profile))
    return 0


def _settings(options: argparse.Namespace, profile: str) -> Settings:
    overrides: dict[str, Any] = {}
    for text in options.set:
        for section, values in parse_assignment(text).items():
            overrides.setdefault(section, {}).update(values)
    return load_settings(profile, overrides)


def _stages(options: argparse.Namespace) -> tuple[str, ...]:
    if options.only:
        return (stage_name(options.only),)
    return STAGES[STAGES.index(stage_name(options.from_stage)) :]


def stage_name(text: str) -> str:
    """Return the stage that a full name, number or short name means ("02_train", "2", "02", "train").

    Raises:
        SettingsError: naming the nearest stage.
    """
    short = {stage: stage for stage in STAGES}
    for number, stage in enumerate(STAGES, start=1):
        short |= {str(number): stage, f"{number:02}": stage, stage[3:]: stage}
    short |= {"eval": STAGES[4], "ollama": STAGES[4]}
    if text not in short:
        near = difflib.get_close_matches(text, short, n=1, cutoff=0.0)[0]
        raise SettingsError(
            f"unknown stage {text!r}; did you mean {short[near]}? Stages: {', '.join(STAGES)}"
        )
    return short[text]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="so8t", description="SO(8) rotations on Phi-3.5, from records to Ollama."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def add(name: str, carry_out: Any, profile: str = "?") -> argparse.ArgumentParser:
        verb = verbs.add_parser(name, help=carry_out.__doc__, description=carry_out.__doc__)
        default = None if profile == "+" else "demo"
        verb.add_argument(
            "profile", nargs=profile, default=default, help="name in params/ or path of a YAML file"
        )
        verb.add_argument(
            "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a setting"
        )
        verb.set_defaults(carry_out=carry_out)
        return verb

    verb = add("run", run, profile="+")
    which = verb.add_mutually_exclusive_group()
    which.add_argument(
        "--from", dest="from_stage", default=STAGES[0], metavar="STAGE", help="leave those before it alone"
    )
    which.add_argument("--only", metavar="STAGE", help="this stage alone")
    verb.add_argument("--force", action="store_true", help="carry out fresh stages too")
    add("doctor", doctor)
    verb = add("verify", verify)
    verb.usage = "so8t verify [GGUF or run folder or profile]"
    add("serve", serve)
    return parser


if __name__ == "__main__":
    sys.exit(main())
