"""A session that trains one setting after another with one base and, for one shape, one micro-step."""

from __future__ import annotations

import gc
import json
import logging
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import torch

from so8t_helpers.phi3.shape import read_shape
from so8t_helpers.phi3.tokenizer_files import load_tokenizer
from so8t_helpers.phi3.weights import weight_reader
from so8t_helpers.run.files import atomic_directory, read_jsonl, remove, replace, write_json
from so8t_helpers.run.stage import Stage, utc_now, versions
from so8t_helpers.settings import Settings, merge
from so8t_helpers.so8.rotation import principal_angles
from so8t_helpers.study.data import Data
from so8t_helpers.study.outcome import (
    ADAPTER,
    FACTS,
    WHAT_IF,
    Outcome,
    decisive_settings,
    key_of,
    read_outcome,
)
from so8t_helpers.study.plan import Study
from so8t_helpers.train import batches
from so8t_helpers.train.adapters import Adapters, check_adapters, count_parameters
from so8t_helpers.train.batches import Schedule
from so8t_helpers.train.frozen import load_base
from so8t_helpers.train.heldout import HeldOut
from so8t_helpers.train.machine import build_micro_step, look_at_machine, prepare_allocator
from so8t_helpers.train.micro_step import MicroStep
from so8t_helpers.train.outliers import keep_apart
from so8t_helpers.train.stage import Loop
from so8t_helpers.train.watch import Watch
from so8t_helpers.train.workers import Workers

log = logging.getLogger(__name__)

_LOSSES = ("metrics.parquet", "heldout.parquet", "heldout_documents.safetensors")
_ANGLES = "angles.safetensors"  # what tuning's gates did nobody looks at, and it is large
_POWERS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)  # t of the what-if curve
# What a micro-step is built and captured for; all other settings may differ from one training to the next.
_SHAPE = {
    "so8t": ("enabled", "layer_indices"),
    "pet": ("enabled", "relative", "penalty", "huber_delta"),
    "lora": ("r", "alpha", "rslora", "dropout", "target_modules"),
    "training": ("batch_size", "speed", "gradient_checkpointing", "memory_gib"),
}
_PLANNED = ("max_steps", "epochs", "batch_size", "gradient_accumulation", "packing")


class Session:
    """Carries out trainings of one study; what is finished already is read instead.

    Nothing is loaded before the first training that has to be carried out.

    Args:
        work: name of the run in whose folder a training is at work; default: the study's own run. Sessions
            side by side need one each.
        before: called before the first training that has to be carried out; may raise what forbids it.
    """

    def __init__(
        self, study: Study, data: Data, work: str | None = None, before: Callable[[], None] | None = None
    ):
        self.study, self.data = study, data
        self._work = {"run": {"name": work or study.settings.run.name}}
        self.work_dir = merge(study.settings, self._work).run_dir
        self.shape = read_shape(data.base)
        self.trained = 0
        self._before = before
        self._loaded = False
        self._schedules: dict[str, Schedule] = {}
        self._built: tuple[str, Adapters, MicroStep] | None = None
        self._watches: dict[tuple[str, int], Watch] = {}

    def outcome(self, settings: Settings, part: str, adapter: bool = False) -> Outcome:
        """Return what a training of these settings comes to, judged by a part of `data.PARTS`.

        With `adapter` what it learned is kept, too. A training that did not keep what is asked for, and would
        now, is carried out again.
        """
        folder = self.study.folder / "trainings" / key_of(settings, part, self.data.digests)
        what_if = part == "held-out" and settings.so8t.enabled
        needed = (*((WHAT_IF,) if what_if else ()), *((ADAPTER,) if adapter else ()))
        if (found := read_outcome(folder, needed)) is None:
            if (same := self._elsewhere(folder.name, needed)) is not None:
                with atomic_directory(folder) as scratch:
                    shutil.copytree(same, scratch, dirs_exist_ok=True)
            else:
                self._train(settings, part, folder, adapter)
            found = read_outcome(folder, needed)
            assert found is not None
        return found

    def _elsewhere(self, key: str, needed: tuple[str, ...]) -> Path | None:
        """Another study's folder of the same training: two studies may share their control."""
        found = sorted(self.study.folder.parent.glob(f"*/trainings/{key}"))
        return next((folder for folder in found if read_outcome(folder, needed)), None)

    def _load(self) -> None:
        """Load what all trainings share: machine, base and tokens."""
        if self._before is not None:
            self._before()
        settings = self.study.settings
        self.machine = look_at_machine(settings)
        log.info("%s", self.machine.summary)
        prepare_allocator(settings)
        self.tokenizer = load_tokenizer(self.data.base)
        rows = read_jsonl(self.data.train)
        self.samples = batches.tokenize(rows, self.tokenizer, settings.training.sequence_length)
        read = weight_reader(self.data.base)
        self.base = load_base(self.shape, read, self.machine.model, self.machine.device, self.machine.dtype)
        keep_apart(self.base, self.samples)
        self._loaded = True

    def _schedule(self, settings: Settings) -> Schedule:
        t = settings.training
        key = json.dumps([settings.run.seed, *(getattr(t, name) for name in _PLANNED)])
        if key not in self._schedules:
            self._schedules[key] = batches.plan(settings, self.samples)
        return self._schedules[key]

    def _micro_step(self, settings: Settings) -> tuple[Adapters, MicroStep]:
        """Return adapters and micro-step of this shape: the last ones, or new ones in their place."""
        # One size for all seeds: a seed may pack one document more into a sequence than another.
        seeds = [self.study.file.seed, *self.study.seeds]
        most = max(self._schedule(merge(settings, {"run": {"seed": s}})).most_documents for s in seeds)
        shape = {s: {k: getattr(getattr(settings, s), k) for k in keys} for s, keys in _SHAPE.items()}
        key = json.dumps([shape, most])
        if self._built is None or self._built[0] != key:
            self.release()
            check_adapters(settings, self.shape)
            adapters = Adapters(self.shape, settings, self.machine.device)
            micro_step, _ = build_micro_step(self.base, adapters, settings, self.machine, most)
            self._built = (key, adapters, micro_step)
        return self._built[1], self._built[2]

    def release(self) -> None:
        """Give back the memory of the micro-step and of what looks through it."""
        self._watches.clear()
        self._built = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch._dynamo.reset()  # every shape compiles the same functions; there is a limit to how many

    def _watch(self, settings: Settings, part: str, schedule: Schedule) -> Watch:
        """Return what looks at the documents of a part: the last one, or a new one for this micro-step."""
        adapters, micro_step = self._micro_step(settings)
        key = (part, len(schedule.steps))
        if key not in self._watches:
            rows = read_jsonl(self.data.judges[part])
            arguments = (settings, Workers(), micro_step, adapters, schedule, rows, self.tokenizer)
            self._watches[key] = Watch(*arguments)
        self._watches[key].begin(settings)
        return self._watches[key]

    def _train(self, settings: Settings, part: str, folder: Path, adapter: bool) -> None:
        """Train, and put what is kept of it into its folder. A training that was killed goes on."""
        if not self._loaded:
            self._load()
        started = time.monotonic()
        if part == "tuning":  # a look at the start and one at the end
            settings = merge(settings, {"training": {"eval_steps": 10**9}})
        settings = merge(settings, self._work)
        schedule = self._schedule(settings)
        adapters, micro_step = self._micro_step(settings)
        watch = self._watch(settings, part, schedule)
        adapters.begin(settings)
        if self.machine.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        stage = Stage(settings, "02_train", {"train": self.data.train, part: self.data.judges[part]})
        for name in (*_LOSSES, _ANGLES, ADAPTER):  # of a training that was killed while it wrote
            remove(stage.directory / name)
        pad = self.tokenizer.pad_token_id or 0
        loop = Loop(settings, stage, Workers(), self.samples, schedule, adapters, micro_step, watch, pad)
        diverged, powers = "", pd.DataFrame()
        try:
            loop.run()
            if part == "held-out" and adapters.layers and watch.held_out is not None:
                powers = what_if(adapters, watch.held_out)
            loop.write_results()
        except FloatingPointError as error:
            diverged = str(error)
        lora, gates = count_parameters(settings, self.shape)
        facts = {
            "part": part,
            "seed": settings.run.seed,
            "diverged": diverged,
            "settings": decisive_settings(settings),
            "parameters": {"lora": lora, "gates": gates},
            "data": self.data.digests,
            "versions": versions(),
            "machine": self.machine.summary,
        }
        kept = (*_LOSSES, *((_ANGLES,) if part == "held-out" else ()), *((ADAPTER,) if adapter else ()))
        with atomic_directory(folder) as scratch:
            for name in kept:
                if (stage.directory / name).exists():
                    replace(stage.directory / name, scratch / name)
            if len(powers):
                powers.to_parquet(scratch / WHAT_IF)
            seconds = round(time.monotonic() - started, 3)
            write_json(scratch / FACTS, facts | self._costs(loop) | {"seconds": seconds})
        remove(stage.directory)  # there is none where the first step diverged
        self.trained += 1

    def _costs(self, loop: Loop) -> dict[str, Any]:
        """Tokens, the median time of a step, and memory: the card's most, or what the process has."""
        rows = loop.metrics
        seconds = sorted(row["seconds"] for row in rows)
        cuda = self.machine.device.type == "cuda"
        used = torch.cuda.max_memory_allocated() if cuda else psutil.Process().memory_info().rss
        return {
            "steps": len(rows),
            "tokens": sum(row["tokens"] for row in rows),
            "seconds_per_step": seconds[len(seconds) // 2] if seconds else 0.0,
            "memory_gib": used / 2**30,
            "finished": utc_now(),
        }


def what_if(adapters: Adapters, held_out: HeldOut) -> pd.DataFrame:
    """Measure the held-out losses with the rotations at other powers, LoRA as it is; one power t a row.

    `degrees` is the mean principal angle at t: t times the trained one, as far as no angle passes 180°.
    """
    free, rows = adapters.free.detach().cpu(), []
    for t in _POWERS:
        adapters.refresh_rotations(t)
        degrees = math.degrees(principal_angles(t * free).mean().item())
        rows.append({"t": t, "degrees": degrees, **held_out.figures(held_out.measure())})
    adapters.refresh_rotations()
    return pd.DataFrame(rows)
