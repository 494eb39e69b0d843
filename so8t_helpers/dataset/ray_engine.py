"""The first pass on Ray Data: the same per-record function on as many machines as the cluster has.

All machines must see the run folder and the inputs under the same paths.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from so8t_helpers.dataset.chunk_pass import ChunkResult, process_chunk
from so8t_helpers.dataset.reading import Chunk
from so8t_helpers.dataset.sample import Plan, Sampler
from so8t_helpers.settings import SettingsError


class _Worker:
    """One actor: loads the word lists and the tokenizer once, then works chunk by chunk."""

    def __init__(self, plan: Plan, work: Path):
        self.sampler, self.work = Sampler(plan), work

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        result = process_chunk(self.sampler, pickle.loads(row["chunk"]), self.work)
        return {"result": pickle.dumps(result)}


def run_on_ray(plan: Plan, chunks: list[Chunk], work: Path, workers: int) -> Iterator[ChunkResult]:
    """Carry out the pass on Ray Data; results come in the chunks' order.

    A cluster that RAY_ADDRESS names is used, else one is started on this machine.

    Raises:
        SettingsError: where Ray is not installed.
    """
    try:
        import ray  # noqa: PLC0415  (an optional extra)
        import ray.data  # noqa: PLC0415
    except ImportError as error:
        raise SettingsError(
            "dataset.engine: ray is not installed; pip install 'so8t-workbench[ray]'"
        ) from error
    started = not ray.is_initialized()
    if started:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    try:
        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        rows = ray.data.from_items(
            [{"chunk": pickle.dumps(chunk)} for chunk in chunks], override_num_blocks=len(chunks)
        ).map(
            cast(Any, _Worker),
            fn_constructor_args=(plan, work),
            compute=ray.data.ActorPoolStrategy(size=min(workers, len(chunks))),
        )
        for row in rows.iter_rows():
            yield pickle.loads(row["result"])
    finally:
        if started:
            ray.shutdown()
