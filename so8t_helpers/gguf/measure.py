"""What 04_gguf measures on texts: the importance matrix before writing, the files' quality after it."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from so8t_helpers.gguf import imatrix, o_proj
from so8t_helpers.gguf.layout import GgufTensor, PlannedFile, source_stamps
from so8t_helpers.gguf.quality import States, compare, run_texts, take_tokens
from so8t_helpers.gguf.types import FILE_TYPES
from so8t_helpers.gguf.weights import checkpoint_weights, gguf_weights, rounded_weights
from so8t_helpers.gguf.writer import Importance
from so8t_helpers.phi3.stream import Read, read_config
from so8t_helpers.run.files import StageError, read_jsonl
from so8t_helpers.run.progress import Progress
from so8t_helpers.run.stage import Stage, stage_input
from so8t_helpers.settings import Settings
from so8t_helpers.so8 import rotation


class Measurements:
    """The texts and the model that all measurements of one export share."""

    def __init__(self, settings: Settings, stage: Stage, folder: Path, tensors: Sequence[GgufTensor]):
        self.settings, self.stage, self.tensors = settings, stage, tensors
        self.config = read_config(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.threads = settings.gguf.threads or os.cpu_count() or 1
        self.held_out = self._texts("eval.jsonl")

    def _texts(self, name: str) -> list[str]:
        """Texts of the data set; none where this step is used alone, without one."""
        path = stage_input(self.settings, self.settings.training.dataset_dir, "01_dataset") / name
        if not path.is_file() and self.settings.gguf.model_dir is not None:
            return []
        self.stage.read_file(f"01_dataset/{name}", path, "run 01_dataset, or set training.dataset_dir")
        return [row["text"] for row in read_jsonl(path)]

    def _tokens(self, texts: Sequence[str], limit: int) -> list[list[int]]:
        # Longer texts would take longrope's other factors, and another model would be measured.
        longest = self.config.original_max_position_embeddings
        ids = (self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
        return take_tokens(ids, limit, longest)

    def importance_matrix(self) -> imatrix.Imatrix:
        """Measure the importance matrix on the training texts, or take the one of an earlier try."""
        lines = self._texts("train.jsonl")
        # In a random but fixed order, so that the first ones stand for all labels.
        mixed = random.Random(self.settings.run.seed).sample(lines, len(lines))
        texts = self._tokens(mixed, self.settings.gguf.imatrix_tokens)
        if not texts:
            raise StageError("gguf.imatrix: no training texts; set training.dataset_dir, or imatrix: false")
        key = hashlib.sha256(repr((texts, source_stamps(self.tensors))).encode()).hexdigest()
        path = self.stage.directory / imatrix.FILE
        found = imatrix.load(path, key)
        if found is None:
            layers = self.config.num_hidden_layers
            with Progress(self.settings, self.stage.name, layers, "layer", "importance matrix") as bar:
                found = imatrix.measure(self.config, checkpoint_weights(self.tensors), texts, bar.update)
            imatrix.save(path, found, key)
        return found

    def quality(
        self, plans: dict[str, PlannedFile], importance: Importance, gates: rotation.Gates | None
    ) -> dict[str, Any]:
        """Return the figures of every file, and of o_proj with and without its rotation, for quality.json."""
        texts = self._tokens(self.held_out, self.settings.gguf.quality_tokens)
        if not texts:
            raise StageError("01_dataset/eval.jsonl holds no text of two tokens; run 01_dataset again")
        read = gguf_weights(plans["f16"].path) if "f16" in plans else checkpoint_weights(self.tensors)
        types = {kind: plan.types for kind, plan in plans.items() if kind not in {"f16", "bf16"}}
        blocks = gates.rotations() if gates else {}
        weighed = [kind for kind in plans if importance and FILE_TYPES[kind].is_k_quant]
        passes = 1 + len(plans.keys() - {"f16"}) + len(weighed)
        if self.settings.gguf.o_proj_study:
            passes += o_proj.passes(types, blocks)
        layers = self.config.num_hidden_layers
        with Progress(self.settings, self.stage.name, passes * layers, "layer", "measure") as bar:

            def run(read: Read) -> States:
                return run_texts(self.config, read, texts, bar.update)

            reference = run(read)
            files = {}
            for kind, plan in plans.items():
                states = reference if kind == "f16" else run(gguf_weights(plan.path))
                files[kind] = compare(states, reference)
                if kind in weighed:  # what the file would be without the importance matrix
                    states = run(rounded_weights(read, plan.types, self.threads))
                    files[kind]["kl_mean_without_imatrix"] = compare(states, reference)["kl_mean"]
            found: dict[str, Any] = {
                "held_out": {"texts": len(texts), "tokens": sum(len(ids) for ids in texts)},
                "reference": "f16" if "f16" in plans else "the model folder",
                "files": files,
            }
            if self.settings.gguf.o_proj_study:
                study = o_proj.Study(self.config, read, texts, blocks, types, self.threads, bar.update)
                for kind, figures in o_proj.divergences(study, reference).items():
                    files[kind] |= figures
                found["o_proj"] = o_proj.output_errors(study)
        return found
