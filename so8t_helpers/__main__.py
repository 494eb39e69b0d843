"""The verbs: `python -m so8t_helpers VERB` or `so8t VERB`."""

from __future__ import annotations

import argparse
import difflib
import io
import sys
from pathlib import Path
from typing import Any

from so8t_helpers.run.files import StageError
from so8t_helpers.run.stage import STAGES
from so8t_helpers.settings import (
    PARAMS_DIR,
    Settings,
    SettingsError,
    load_settings,
    parse_assignment,
    resolve,
)

USER_ERROR, STAGE_FAILED, INTERRUPTED = 2, 1, 130


def main(arguments: list[str] | None = None) -> int:
    """Carry out one verb; return 0, 1 (a stage failed), 2 (an error of the user's) or 130 (interrupted)."""
    for stream in (sys.stdout, sys.stderr):
        # A Windows console's code page may lack the characters of a Japanese message.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
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
    from so8t_helpers.verbs import batch

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
    from so8t_helpers.verbs import doctor as doctor_module

    return doctor_module.print_report(_settings(options, options.profile))


def sweep(options: argparse.Namespace) -> int:
    """Carry out a grid of settings: each point a run, shared stages once, a comparison at the end."""
    from so8t_helpers.report import index
    from so8t_helpers.report.comparison import write_comparison
    from so8t_helpers.verbs import sweep as sweep_module

    settings = _settings(options, options.profile)
    swept = sweep_module.points(settings, sweep_module.parse_grid(options.grid))
    mapper = (
        sweep_module.ray_cluster() if options.engine == "ray" else sweep_module.processes(options.processes)
    )
    sweep_module.carry_out(swept, _stages(options), mapper)
    for point in swept:
        states = ", ".join(f"{stage[:2]} {state}" for stage, state in point.states.items())
        print(f"{point.settings.run.name}: {states}{'; ' + point.stopped if point.stopped else ''}")
    name = f"{settings.run.name}-sweep"
    notes = {point.settings.run.name: point.stopped for point in swept}
    page = write_comparison([point.settings for point in swept], name, notes) if len(swept) > 1 else None
    index.write_index(settings)
    failed = sum(bool(point.stopped) for point in swept)
    print(f"{name}: {len(swept) - failed} of {len(swept)} points done; comparison: {page}")
    return STAGE_FAILED if failed else 0


def status(options: argparse.Namespace) -> int:
    """Show stage, step, time left and last losses of every run at work."""
    from so8t_helpers.verbs import status as status_module

    return status_module.print_status(_settings(options, options.profile), options.watch)


def compare(options: argparse.Namespace) -> int:
    """Write a page that lays two or more runs over each other."""
    from so8t_helpers.report import index
    from so8t_helpers.report.comparison import write_comparison

    runs = [_run(options, name) for name in options.profile]
    page = write_comparison(runs, options.name or "-vs-".join(run.run.name for run in runs)[:100])
    index.write_index(runs[0])
    print(f"comparison: {page}")
    return 0


def export(options: argparse.Namespace) -> int:
    """Pack a run's pages into one zip that opens anywhere offline."""
    from so8t_helpers.report.export import export as export_run

    path = export_run(_run(options, options.profile), options.output)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    return 0


def verify(options: argparse.Namespace) -> int:
    """Walk from a GGUF file or a run back to the input lines; or check an audit log, line by line."""
    from so8t_helpers.verbs import verify as verbs_verify

    target = Path(options.profile)
    if target.suffix == ".jsonl":
        return _verify_audit(target, options.head)
    if not target.exists():
        target = _run(options, options.profile).run_dir
    result = verbs_verify.verify(target)
    for link in result.links:
        print(f"{'holds ' if link.holds else 'BROKEN'}  {link.name}: {link.found}")
    if result.broken is None:
        print(f"{target}: all {len(result.links)} links hold")
        return 0
    print(f"{target}: broken at {result.broken.name}: {result.broken.found}")
    return STAGE_FAILED


def _verify_audit(log: Path, head: str | None) -> int:
    from so8t_helpers.thinking.audit import verify_audit

    verdict = verify_audit(log, head)
    if verdict.ok:
        print(f"{log}: all {verdict.lines} lines hold; head {verdict.head}")
        return 0
    print(f"{log}: line {verdict.line}: {verdict.problem}")
    return STAGE_FAILED


def serve(options: argparse.Namespace) -> int:
    """Start the /think service; when it has stopped, the run's index publishes the head of its log."""
    from so8t_helpers.report import index
    from so8t_helpers.service import server

    settings = _settings(options, options.profile)
    server.serve(settings)
    if (settings.reports_dir / "index.html").is_file():
        index.write_run_index(_run(options, settings.run.name))
    return 0


def _run(options: argparse.Namespace, name: str) -> Settings:
    """Settings of a run that exists, by its name (or by a profile's)."""
    area = _settings(options, "demo").run
    path = resolve(area.root) / name / "params.yaml"
    if path.is_file():
        return load_settings(
            path, {"run": {"root": area.root, "reports_root": area.reports_root, "name": name}}
        )
    if Path(name).suffix in {".yaml", ".yml"} or (PARAMS_DIR / f"{name}.yaml").is_file():
        return _settings(options, name)
    known = sorted(path.parent.name for path in resolve(area.root).glob("*/params.yaml"))
    raise SettingsError(f"no run {name!r} in {resolve(area.root)}; runs there: {', '.join(known) or 'none'}")


def _settings(options: argparse.Namespace, profile: str) -> Settings:
    overrides: dict[str, Any] = {}
    for text in options.set:
        for section, values in parse_assignment(text).items():
            overrides.setdefault(section, {}).update(values)
    return load_settings(profile, overrides)


def _stages(options: argparse.Namespace) -> tuple[str, ...]:
    if options.only:
        return (stage_name(options.only),)
    first, last = (STAGES.index(stage_name(text)) for text in (options.from_stage, options.to))
    if last < first:
        raise SettingsError(f"--from {STAGES[first]} comes after --to {STAGES[last]}")
    return STAGES[first : last + 1]


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
    verb.add_argument("--to", default=STAGES[-1], metavar="STAGE", help="leave those after it alone")
    verb.add_argument("--force", action="store_true", help="carry out fresh stages too")
    verb = add("sweep", sweep)
    verb.add_argument(
        "--grid", action="append", default=[], metavar="SECTION.KEY=VALUE,VALUE", help="one axis"
    )
    verb.add_argument(
        "--processes",
        type=int,
        metavar="N",
        help="stages at once on this machine; default: 1 with a GPU, else 2",
    )
    verb.add_argument("--engine", choices=("process", "ray"), default="process")
    verb.add_argument("--to", default=STAGES[-1], metavar="STAGE", help="the last stage of each point")
    verb.set_defaults(from_stage=STAGES[0], only=None)
    verb = add("status", status)
    verb.add_argument("--watch", action="store_true", help="again every two seconds, until Ctrl-C")
    verb = add("compare", compare, profile="+")
    verb.add_argument("--name", help="of the page; default: the runs' names")
    verb = add("export", export)
    verb.add_argument("--output", type=Path, help="default: <run>.zip in this folder")
    add("doctor", doctor)
    verb = add("verify", verify)
    verb.usage = "so8t verify [GGUF, run, run folder or audit.jsonl] [--head SEQ:MAC]"
    verb.add_argument("--head", metavar="SEQ:MAC", help="as a report or the service printed it")
    add("serve", serve)
    return parser


if __name__ == "__main__":
    sys.exit(main())
