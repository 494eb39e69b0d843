"""What is seen of a training while it runs: held-out loss, best adapter, what the model writes, trackers."""

from __future__ import annotations

import hashlib
import logging
import statistics
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import save_file
from torch import Tensor

from so8t_helpers.run.files import atomic_path, write_jsonl
from so8t_helpers.settings import Settings, SettingsError
from so8t_helpers.so8.rotation import principal_angles
from so8t_helpers.train import heldout
from so8t_helpers.train.adapters import Adapters
from so8t_helpers.train.batches import Schedule
from so8t_helpers.train.heldout import HeldOut
from so8t_helpers.train.micro_step import MicroStep
from so8t_helpers.train.trackers import Trackers
from so8t_helpers.train.workers import Workers
from so8t_helpers.train.writing import Writer, choose_prompts

log = logging.getLogger(__name__)

_SHARE = 0.02  # of the training's time that writing may take under "auto"
_PROBE = 3  # tokens whose time tells what a round of answers will take


def check_held_out(settings: Settings, there: bool) -> None:
    """Raise SettingsError where all samples are held out, or none and a setting cannot do without."""
    training = settings.training
    if settings.dataset.eval_share == 1.0 and training.dataset_dir is None:
        raise SettingsError("dataset.eval_share: 1 holds every sample out, and leaves none to train on")
    needing = "training.keep: best" if training.keep == "best" else "training.patience"
    if not there and (training.keep == "best" or training.patience):
        raise SettingsError(
            f"{needing}: needs held-out samples; set dataset.eval_share above 0 and leave "
            "training.eval_steps at auto or a number"
        )


class Watch:
    """Looks at a training between its steps; nothing here changes the course that the steps take.

    Attributes:
        rows: one a look: step, held-out losses, seconds.
        written: one an answer: step, and what `writing.Writer` says of it.
        best: the step with the lowest held-out loss, None before the first look.
    """

    def __init__(
        self,
        settings: Settings,
        workers: Workers,
        micro_step: MicroStep,
        adapters: Adapters,
        schedule: Schedule,
        eval_rows: list[dict[str, Any]],
        tokenizer: Any,
    ):
        self.workers, self.adapters, self.total = workers, adapters, len(schedule.steps)
        self.begin(settings)
        self.held_out: HeldOut | None = None
        self.writer: Writer | None = None
        self.trackers: Trackers | None = None
        self.steps: frozenset[int] = frozenset()
        there = self.training.eval_steps is not None and bool(eval_rows)
        check_held_out(settings, there)
        if not there:
            return
        # In the order of a hash, so that any beginning is a fair sample.
        eval_rows = sorted(eval_rows, key=lambda row: hashlib.sha256(str(row.get("id")).encode()).digest())
        length = self.training.sequence_length
        documents = heldout.read_documents(eval_rows, tokenizer, length)
        lengths = [len(d.parts) for d in documents]
        most = len(micro_step.bounds) - 2
        planned = heldout.plan(
            self.training, lengths, length * self.training.batch_size, most, list(map(len, schedule.steps))
        )
        self.steps = planned.steps
        documents = documents[: 1 + max(i for one in planned.sequences for i in one)]
        pad = tokenizer.pad_token_id or 0
        self.held_out = HeldOut(micro_step, documents, planned.sequences, pad, workers)
        if self.training.sample_steps is not None and workers.main:
            prompts = choose_prompts(eval_rows, self.training.sample_prompts)
            self.writer = Writer(micro_step, prompts, tokenizer, length)

    def begin(self, settings: Settings) -> None:
        """Forget what was seen: another training of the same adapters, with the same looks, begins."""
        self.settings, self.training = settings, settings.training
        self.rows: list[dict[str, Any]] = []
        self.written: list[dict[str, Any]] = []
        self.sums: dict[int, Tensor] = {}
        self.right: dict[int, Tensor] = {}
        self.kept: dict[str, Tensor] = {}
        self.step_seconds: list[float] = []
        self.writing_seconds, self.expected_seconds = 0.0, 0.0

    @property
    def best(self) -> int | None:
        return min(self.rows, key=lambda row: row["loss"])["step"] if self.rows else None

    def start(self, first: int) -> None:
        """Open the trackers of a training that goes on from step `first`."""
        if self.workers.main and self.training.trackers:
            self.trackers = Trackers(self.settings, first)

    def after_step(self, row: dict[str, Any]) -> None:
        """Take note of a step's metrics."""
        self.step_seconds.append(row["seconds"])
        if self.trackers:
            self.trackers.log(row, row["step"])

    def look(self, step: int) -> bool:
        """Measure and write where it is time to; return whether patience has run out."""
        if self.held_out is not None and step in self.steps:
            self._measure(self.held_out, step)
        if self.writer is not None and self._time_to_write(self.writer, step):
            self._write(self.writer, step)
        patience, best = self.training.patience, self.best
        if patience is None or best is None or step not in self.steps:
            return False
        return sum(row["step"] > best for row in self.rows) >= patience

    def _measure(self, held_out: HeldOut, step: int) -> None:
        measured = held_out.measure()
        row = {"step": step, **held_out.figures(measured), "seconds": measured.seconds}
        self.rows.append(row)
        self.sums[step], self.right[step] = measured.sums, measured.right
        if self.training.keep == "best" and self.best == step:
            values = {"lora": self.adapters.lora, "free": self.adapters.free}
            self.kept = {name: value.detach().cpu().clone() for name, value in values.items()}
        log.info("step %d: held-out loss %.4f", step, row["loss"])
        if self.trackers:
            self.trackers.log({f"held-out/{k}": v for k, v in row.items() if k != "step"}, step)
            if self.adapters.layers:
                angles = principal_angles(self.adapters.free.detach().cpu())
                self.trackers.angles(self.adapters.layers, angles, step)

    def _time_to_write(self, writer: Writer, step: int) -> bool:
        every = self.training.sample_steps
        if every != "auto":
            return step == self.total or (step > 0 and every is not None and step % every == 0)
        if not self.expected_seconds:
            writer.write(1)  # loads what only writing needs; with the start, where it belongs
            self.expected_seconds = writer.write(_PROBE).seconds * writer.most / _PROBE
        if step == 0 or step not in self.steps or not self.step_seconds:
            return False
        return self.expected_seconds <= self._allowance()

    def _allowance(self) -> float:
        """Seconds that writing may still take."""
        if self.training.sample_steps != "auto":
            return float("inf")
        return _SHARE * statistics.median(self.step_seconds) * self.total - self.writing_seconds

    def _write(self, writer: Writer, step: int) -> None:
        try:
            written = writer.write(limit=self._allowance())
        except torch.cuda.OutOfMemoryError:
            log.warning(
                "no memory on the card for answers during the training; set training.memory_gib lower"
            )
            self.writer = None
            return
        self.writing_seconds += written.seconds
        self.expected_seconds = written.seconds  # one that gave up will not fit later either
        if not written.rows:
            return
        self.written += [{"step": step, **row} for row in written.rows]
        if self.trackers:
            self.trackers.log({f"answers/{k}": v for k, v in shares(written.rows).items()}, step)

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint keeps of this as tensors."""
        found = {f"heldout.{step}": sums for step, sums in self.sums.items()}
        found |= {f"right.{step}": right for step, right in self.right.items()}
        return found | {f"best.{name}": value for name, value in self.kept.items()}

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of this as JSON."""
        return {"rows": self.rows, "written": self.written, "writing_seconds": self.writing_seconds}

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Take up where a checkpoint left off."""
        self.rows, self.written = state["rows"], state["written"]
        self.writing_seconds = state["writing_seconds"]
        steps = [row["step"] for row in self.rows]  # in order, which the tensors of a file are not
        self.sums = {step: tensors[f"heldout.{step}"] for step in steps}
        self.right = {step: tensors[f"right.{step}"] for step in steps}
        self.kept = {k.removeprefix("best."): v for k, v in tensors.items() if k.startswith("best.")}

    def take_best(self) -> int | None:
        """Put the best adapter back where that is the one to be kept; return its step."""
        if not self.kept:
            return None
        with torch.no_grad():
            self.adapters.lora.copy_(self.kept["lora"])
            self.adapters.free.copy_(self.kept["free"])
        self.adapters.refresh_rotations()
        return self.best

    def write_results(self, folder: Path) -> None:
        """Write heldout.parquet, the losses document by document, and samples.jsonl; close the trackers."""
        if self.trackers:
            self.trackers.finish()
        if self.held_out is not None and self.rows:
            with atomic_path(folder / "heldout.parquet") as scratch:
                pd.DataFrame(self.rows).to_parquet(scratch)
            tensors = {
                "steps": torch.tensor(list(self.sums)),
                "sums": torch.stack(list(self.sums.values())),  # (looks, documents, parts)
                "right": torch.stack(list(self.right.values())),  # (looks, documents)
                "counts": self.held_out.counts,
            }
            with atomic_path(folder / "heldout_documents.safetensors") as scratch:
                save_file(tensors, scratch)
        if self.written:
            write_jsonl(folder / "samples.jsonl", self.written)

    def facts(self) -> dict[str, Any]:
        """Key figures for the manifest: first, last and best held-out loss, and whether it overfits."""
        if self.held_out is None or not self.rows:
            return {}
        best, last = self.best, self.rows[-1]["step"]
        assert best is not None
        losses = {row["step"]: row["loss"] for row in self.rows}
        higher, half = heldout.overfitting(self.held_out.counts, self.sums[best], self.sums[last])
        return {
            "first held-out loss": round(losses[self.rows[0]["step"]], 4),
            "last held-out loss": round(losses[last], 4),
            "best held-out loss": round(losses[best], 4),
            "best step": best,
            "kept held-out loss": round(losses[best if self.kept else last], 4),
            "overfits": higher - half > 0,
            "held-out loss after its best": f"{higher:+.4f} ± {half:.4f}",
            "held-out time": round(sum(row["seconds"] for row in self.rows), 2),
            "writing time": round(self.writing_seconds, 2),
        }


def shares(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the shares of answers in format and of right decisions."""
    return {
        "format": statistics.fmean(row["well_formed"] for row in rows),
        "decision": statistics.fmean(row["decision"] == row["label"] for row in rows),
    }
