"""02_train: LoRA, SO8T gates and PET on a frozen 8-bit base, in one loop that reads from top to bottom.

On several cards, `run.processes: N` in the profile; or by hand, on one host or many:

    accelerate launch --multi_gpu --num_processes 2 -m so8t_helpers.train.stage params/h200x2.yaml
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from safetensors.torch import save_file
from torch import Tensor

from so8t_helpers.phi3.folder import check_folder
from so8t_helpers.phi3.source import base_folder, check_base, source_files
from so8t_helpers.phi3.tokenizer_files import load_tokenizer
from so8t_helpers.phi3.weights import weight_reader
from so8t_helpers.run.files import (
    StageError,
    atomic_directory,
    atomic_path,
    check_disk,
    read_jsonl,
    remove,
    sha256_file,
)
from so8t_helpers.run.progress import Progress
from so8t_helpers.run.stage import Stage, open_stage, other_input, stage_input, stage_settings
from so8t_helpers.settings import Settings, SettingsError, load_settings, resolve
from so8t_helpers.so8.rotation import principal_angles
from so8t_helpers.train import batches, pet, resume
from so8t_helpers.train.adapters import Adapters, check_adapters
from so8t_helpers.train.batches import Schedule, plan
from so8t_helpers.train.frozen import load_base
from so8t_helpers.train.machine import build_micro_step, look_at_machine, prepare_allocator
from so8t_helpers.train.micro_step import MicroStep
from so8t_helpers.train.optimizer import Optimizer, learning_rate
from so8t_helpers.train.outliers import keep_apart
from so8t_helpers.train.watch import Watch, check_held_out
from so8t_helpers.train.workers import Workers, check_cards, join, launch, launched

log = logging.getLogger(__name__)
_ROWS, _KEYS = "01_dataset/train.jsonl", ("messages",)


def check(settings: Settings) -> None:
    """Look at settings, machine and what would be read, as far as it is here; nothing is made or written.

    Raises SettingsError or StageError where something does not fit, or is not there.
    """
    if (data := other_input(settings, "02_train")) is not None:
        read_jsonl(Stage(settings, "02_train").read_file(_ROWS, data / "train.jsonl"), *_KEYS)
    check_adapters(settings, check_folder(base)[0] if (base := check_base(settings)) else None)
    look_at_machine(settings)
    check_cards(settings)
    check_held_out(settings, settings.training.eval_steps is not None)


def train(settings: Settings) -> dict[str, Any]:
    """Carry out 02_train and return what it did in a few figures (the manifest's facts).

    Raises SettingsError or StageError before any long work, when something does not fit.
    """
    if settings.run.processes > 1 and not launched():
        return launch(settings)
    workers = join()
    with _open(settings, workers) as stage:
        data = stage_input(settings, settings.training.dataset_dir, "01_dataset")
        made_by = "run 01_dataset first, or set training.dataset_dir"
        rows = read_jsonl(stage.read_file(_ROWS, data / "train.jsonl", made_by), *_KEYS)
        eval_rows = []
        if settings.training.eval_steps is not None and (data / "eval.jsonl").is_file():
            eval_rows = read_jsonl(stage.read_file("01_dataset/eval.jsonl", data / "eval.jsonl"))
        folder = base_folder(settings)
        stage.read_file("base/config.json", folder / "config.json")
        stage.inputs |= source_files(settings)
        check_adapters(settings, shape := check_folder(folder)[0])  # as in `check`, the base being here
        check_cards(settings)
        check_held_out(settings, settings.training.eval_steps is not None)
        machine = look_at_machine(settings)
        settings = settings.model_copy(update={"model": machine.model})  # a checkpoint is of one arithmetic
        log.info("%s", machine.summary)
        prepare_allocator(settings)
        tokenizer = load_tokenizer(folder)
        samples = batches.tokenize(rows, tokenizer, settings.training.sequence_length)
        schedule = plan(settings, samples)
        base = load_base(shape, weight_reader(folder), settings.model, machine.device, machine.dtype)
        keep_apart(base, samples)
        adapters = Adapters(shape, settings, machine.device)
        if settings.training.continue_from:
            adapters.load(resolve(settings.training.continue_from))
        room = (8 if settings.training.keep == "best" else 5) * adapters.lora.nbytes + 2**26
        check_disk(stage.directory, room, "training (adapter and checkpoints)")
        micro_step, memory = build_micro_step(base, adapters, settings, machine, schedule.most_documents)
        watch = Watch(settings, workers, micro_step, adapters, schedule, eval_rows, tokenizer)
        pad = tokenizer.pad_token_id or 0
        loop = Loop(settings, stage, workers, samples, schedule, adapters, micro_step, watch, pad)
        loop.run()
        if workers.main:
            loop.write_results()
        stage.facts |= loop.facts() | watch.facts()
        stage.facts |= {"speed": machine.summary, "memory": memory.describe(shape.num_layers)}
        return stage.facts


@contextmanager
def _open(settings: Settings, workers: Workers) -> Iterator[Stage]:
    """Open the stage in the first worker; the others read, and begin when it has made what is missing."""
    if workers.main:
        with open_stage(settings, "02_train") as stage:
            base_folder(settings)
            workers.wait()
            yield stage
    else:
        workers.wait()
        yield Stage(settings, "02_train")


@dataclass
class Loop:
    """The training loop and what it keeps between optimizer steps."""

    settings: Settings
    stage: Stage
    workers: Workers
    samples: list[batches.Document]
    schedule: Schedule
    adapters: Adapters
    micro_step: MicroStep
    watch: Watch
    pad_token: int

    def __post_init__(self) -> None:
        t = self.settings.training
        self.total = len(self.schedule.steps)
        self.optimizer = Optimizer(self.adapters, t)
        self.metrics: list[dict[str, Any]] = []
        self.snapshots: dict[int, Tensor] = {}  # the gates' free numbers by optimizer step
        count = min(t.angle_snapshots, self.total + 1)
        self.snapshot_steps = {round(i * self.total / (count - 1)) for i in range(count)}
        self.checkpoint_dir = self.stage.directory / "checkpoints"
        self.fingerprint = self._fingerprint()

    def run(self) -> None:
        """Train from the newest usable checkpoint, or from the start, to the last step."""
        first = self._resume()
        self.workers.agree("the step to go on from", first)
        t, main, saved_at = self.settings.training, self.workers.main, time.monotonic()
        with Progress(self.settings, "02_train", self.total, "step", "training", main) as bar:
            bar.skip(first)
            self._snapshot(first)
            self.watch.start(first)
            if first == 0:
                self.watch.look(0)
            for done in range(first + 1, self.total + 1):
                row = self._one_step(done - 1)
                self.metrics.append(row)
                bar.update(1, loss=row["task_loss"], pet=row["pet_loss"], tokens_per_s=row["tokens_per_s"])
                self.watch.after_step(row)
                stop = self.watch.look(done)
                self._snapshot(done, stop)
                if stop:
                    log.info("stopped at step %d: no better held-out loss since %d", done, self.watch.best)
                    break
                by_steps = t.checkpoint_steps and done % t.checkpoint_steps == 0
                by_time = t.checkpoint_minutes and time.monotonic() - saved_at >= 60 * t.checkpoint_minutes
                if (by_steps or by_time) and done < self.total and main:
                    self._save(done)
                    saved_at = time.monotonic()

    def _one_step(self, step: int) -> dict[str, Any]:
        """Carry out one optimizer step, all its micro-steps and the update; return its row of metrics."""
        started = time.perf_counter()
        sequences = [self._sequence(group) for group in self.schedule.steps[step]]
        tokens, targets, pet_positions = (sum(c) for c in zip(*(s.counts() for s in sequences), strict=True))
        phase = pet.phase_at(self.settings.pet, step, self.total)
        rate = learning_rate(self.settings.training, step, self.total)

        self.adapters.zero_grad()
        self.micro_step.begin_step(targets, pet_positions, phase.weight, self.optimizer.loss_scale)
        for number in range(self.workers.rank, len(sequences), self.workers.count):
            self.micro_step.load(sequences[number], self._seed(step, number))
            self.micro_step.run()
        self.workers.add_up([*self.adapters.gradients(), self.micro_step.task_loss, self.micro_step.pet_loss])
        scale = self.optimizer.loss_scale
        norm, orthogonality = self.optimizer.step(rate)
        seconds = time.perf_counter() - started
        return {
            "step": step + 1,
            "epoch": (step + 1) / self.total * self.settings.training.epochs,
            "task_loss": self.micro_step.task_loss.item(),
            "pet_loss": self.micro_step.pet_loss.item() if self.settings.pet.enabled else math.nan,
            "pet_lambda": phase.weight,
            "pet_phase": phase.name,
            "orthogonality": orthogonality,
            "lr": rate,
            "grad_norm": norm,
            "tokens": tokens,
            "tokens_per_s": tokens / seconds,
            "seconds": seconds,
            "loss_scale": scale,
        }

    def _sequence(self, group: list[list[int]]) -> batches.PackedSequence:
        """Build one micro-step's sequences and join them; a batch that is not full gets padding."""
        t, most = self.settings.training, self.schedule.most_documents
        documents = [[self.samples[i] for i in chosen] for chosen in group]
        documents += [[]] * (t.batch_size - len(group))
        return batches.join(
            [batches.build_sequence(d, t.sequence_length, self.pad_token, most) for d in documents]
        )

    def _seed(self, step: int, number: int) -> int:
        """Seed of the dropout of one micro-step, a 31-bit number that depends on nothing else."""
        text = f"{self.settings.run.seed}/{step}/{number}".encode()
        return int.from_bytes(hashlib.sha256(text).digest()[:4], "big") >> 1

    def _snapshot(self, step: int, always: bool = False) -> None:
        if self.adapters.layers and (always or step in self.snapshot_steps):
            self.snapshots[step] = self.adapters.free.detach().cpu().clone()

    def _fingerprint(self) -> str:
        """Hash of all that decides the course of the training."""
        decisive = stage_settings(self.settings, "02_train")
        inputs = {label: sha256_file(path) for label, path in self.stage.inputs.items()}
        return hashlib.sha256(json.dumps([decisive, inputs], sort_keys=True).encode()).hexdigest()

    def _save(self, step: int) -> None:
        tensors = {"lora": self.adapters.lora.data, "free": self.adapters.free.data}
        tensors |= self.optimizer.tensors()
        tensors |= {f"snapshot.{s}": free for s, free in self.snapshots.items()} | self.watch.tensors()
        state = {
            "step": step,
            "metrics": self.metrics,
            "loss_scale": self.optimizer.loss_scale,
            "good_steps": self.optimizer.good_steps,
            "watch": self.watch.state(),
        }
        keep = self.settings.training.keep_checkpoints
        resume.save(self.checkpoint_dir, step, self.fingerprint, resume.Checkpoint(tensors, state), keep)

    def _resume(self) -> int:
        """Take up the newest checkpoint that verifies; return the number of steps already done."""
        found = resume.newest(self.checkpoint_dir, self.fingerprint)
        if found is None:
            return 0
        with torch.no_grad():
            self.adapters.lora.copy_(found.tensors["lora"])
            self.adapters.free.copy_(found.tensors["free"])
        self.adapters.refresh_rotations()
        self.optimizer.restore(found.tensors, found.state)
        self.metrics = found.state["metrics"]
        self.watch.restore(found.tensors, found.state["watch"])
        self.snapshots = {
            int(k.removeprefix("snapshot.")): v for k, v in found.tensors.items() if k.startswith("snapshot.")
        }
        log.info("training goes on from step %d of %d", found.state["step"], self.total)
        return int(found.state["step"])

    def write_results(self) -> None:
        """Write adapter, metrics, angles and what was seen; checkpoints have served their purpose then."""
        best = self.watch.take_best()
        if best is not None:  # what is left of the rotations ends where the adapter is from
            self.snapshots = {step: free for step, free in self.snapshots.items() if step <= best}
            self._snapshot(best, always=True)
        with atomic_directory(self.stage.directory / "adapter") as scratch:
            self.adapters.save(scratch)
        with atomic_path(self.stage.directory / "metrics.parquet") as scratch:
            pd.DataFrame(self.metrics).to_parquet(scratch)
        self.watch.write_results(self.stage.directory)
        if self.snapshots:
            steps = sorted(self.snapshots)
            free = torch.stack([self.snapshots[s] for s in steps])  # (S, L, d/8, 28)
            tensors = {
                "steps": torch.tensor(steps),
                "layers": torch.tensor(self.adapters.layers),
                "free": free,
                "angles": principal_angles(free),
            }
            with atomic_path(self.stage.directory / "angles.safetensors") as scratch:
                save_file(tensors, scratch)
        remove(self.checkpoint_dir)

    def facts(self) -> dict[str, Any]:
        """Key figures for the manifest and the index of reports."""
        frame = pd.DataFrame(self.metrics)
        tail = frame.tail(max(1, len(frame) // 20))
        seconds = float(frame["seconds"].sum())
        return {
            "steps": len(frame),
            "first task loss": round(float(frame["task_loss"].iloc[0]), 4),
            "last task loss": round(float(tail["task_loss"].mean()), 4),
            "last PET loss": round(float(tail["pet_loss"].mean()), 6),
            "tokens/s": round(float(frame["tokens"].sum()) / seconds, 1),
            "padding packed": round(self.schedule.tokens_wasted["packed"], 4),
            "padding unpacked": round(self.schedule.tokens_wasted["unpacked"], 4),
            "gated layers": len(self.adapters.layers),
        }


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: accelerate launch -m so8t_helpers.train.stage PROFILE.yaml")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        train(load_settings(sys.argv[1]))
    except (SettingsError, StageError) as error:
        sys.exit(str(error))
