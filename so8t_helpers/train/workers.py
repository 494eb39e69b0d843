"""Several cards: each worker takes every n-th micro-step of an optimizer step; gradients are added up.

`accelerate launch` starts the workers, torch.distributed (NCCL between cards, Gloo between CPUs) adds up. All
workers hold all adapters and make the same update, so nothing but sums ever travels.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from so8t_helpers.run.files import StageError, remove, write_yaml
from so8t_helpers.run.records import read_status
from so8t_helpers.run.stage import manifest_path, read_manifest
from so8t_helpers.settings import Settings

log = logging.getLogger(__name__)

# Where the launcher's own traceback begins, which says nothing of the worker's error.
_LAUNCHER = re.compile(r"^Traceback [^\n]*\n(?:  [^\n]*\n)*?[^\n]*accelerate.commands.launch", re.MULTILINE)
_STAGE, _MODULE = "02_train", "so8t_helpers.train.stage"
_TOLD = 40  # last lines of the workers' output that an error shows


@dataclass(frozen=True)
class Workers:
    """This process among those of one training: its number, 0 being the one that writes, and how many."""

    rank: int = 0
    count: int = 1

    @property
    def main(self) -> bool:
        return self.rank == 0

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all workers, in place; the same bits come out everywhere."""
        if self.count > 1:
            for tensor in tensors:
                torch.distributed.all_reduce(tensor)

    def wait(self) -> None:
        """Go on when all workers have come here."""
        if self.count > 1:
            torch.distributed.barrier()

    def agree(self, what: str, number: int) -> None:
        """Raise StageError unless all workers hold the same number."""
        if self.count > 1:
            found: list[Any] = [None] * self.count
            torch.distributed.all_gather_object(found, number)
            if len(set(found)) > 1:
                raise StageError(
                    f"workers disagree on {what}: {found}; run.root must be a disk they all share"
                )


def launched() -> bool:
    """Whether `accelerate launch` (or torchrun) started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def join() -> Workers:
    """Join the other workers, where there are some, and take this one's card."""
    if not launched():
        return Workers()
    from accelerate import PartialState  # noqa: PLC0415  (its import takes a second)

    state = PartialState(cpu=not torch.cuda.is_available())
    return Workers(state.process_index, state.num_processes)


def launcher(count: int) -> list[str]:
    """Python's arguments that start what follows them `count` times on this machine, on any free port."""
    arguments = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
    arguments += ["--num_processes", str(count), "--mixed_precision", "no", "--dynamo_backend", "no"]
    return [*arguments, "--main_process_port", "0"]


def check_cards(settings: Settings) -> None:
    """Raise StageError on Windows, and where cards are fewer than workers that this process would start."""
    count, cards = settings.run.processes, torch.cuda.device_count()
    if sys.platform == "win32" and (count > 1 or launched()):
        raise StageError(
            f"run.processes: {count} workers cannot find each other on Windows, whose torch is built without "
            "NCCL and libuv; set run.processes: 1, or train under Linux (WSL 2)"
        )
    if not launched() and torch.cuda.is_available() and cards < count:
        raise StageError(f"run.processes: {count} workers want a card each, this machine has {cards}")


def launch(settings: Settings) -> dict[str, Any]:
    """Run 02_train in `run.processes` workers; show a bar, return the stage's facts.

    Raises:
        StageError: there are fewer cards than workers, or a worker failed; the message holds its last words.
    """
    check_cards(settings)
    count = settings.run.processes
    profile = settings.run_dir / "params.yaml"
    write_yaml(profile, settings.model_dump())
    command = [sys.executable, *launcher(count), "-m", _MODULE, str(profile)]
    log.info("training in %d processes: accelerate launch -m %s", count, _MODULE)
    output = settings.run_dir / ".workers.log"
    remove(manifest_path(settings, _STAGE))
    # The bar is drawn here; theirs would be lines without end in the log.
    environment = {**os.environ, "TQDM_DISABLE": "1"}
    with output.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        try:
            _follow(process, settings)
        finally:
            process.terminate()
            process.wait()
    manifest = read_manifest(settings, _STAGE)
    if process.returncode != 0 or manifest is None:
        text = output.read_text(encoding="utf-8", errors="replace")
        said = _LAUNCHER.split(text)[0].splitlines()[-_TOLD:]
        raise StageError(f"{_STAGE}: a worker failed (all it said: {output}):\n" + "\n".join(said))
    remove(output)
    facts: dict[str, Any] = manifest["facts"]
    log.info("%s", facts["speed"])
    log.info("%s", facts["memory"])
    return facts


def _follow(process: subprocess.Popen[bytes], settings: Settings) -> None:
    """Draw the bar of the worker that writes the run's status file, until the workers have ended."""
    begun = time.time()
    with tqdm(desc="training", unit="step", mininterval=1.0) as bar:
        while process.poll() is None:
            time.sleep(0.5)
            status = read_status(settings.run_dir)
            if status and status.stage == _STAGE and status.time >= begun:
                bar.total = status.total
                bar.update(status.done - bar.n)
                bar.set_postfix({k: f"{v:.4g}" for k, v in status.latest.items()}, refresh=False)
