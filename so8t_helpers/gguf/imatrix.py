"""The importance matrix: how strongly the inputs of each linear drive it, measured on the training texts.

As in llama.cpp (`IMatrixCollector::collect_imatrix`): for each linear of a block and each input column j, the
sum of x_j^2 over all tokens, and their number. The quantiser weighs column j's rounding error by the mean
square (`load_imatrix` in tools/quantize/quantize.cpp).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGUFReader, GGUFWriter
from numpy.typing import NDArray
from torch import Tensor
from transformers import Phi3Config

from so8t_helpers.gguf.metadata import ARCHITECTURE
from so8t_helpers.gguf.writer import Importance
from so8t_helpers.phi3.stream import Read, last_hidden
from so8t_helpers.run.files import atomic_path

FILE = "imatrix.gguf"
DATASET = "01_dataset/train.jsonl"
_KEY = "so8t.imatrix_key"
_SUMS = ".in_sum2"


@dataclass(frozen=True)
class Imatrix:
    """Sums of squares by the weight's GGUF name, (in,) float32, over `tokens` tokens of `texts` texts."""

    sums: dict[str, NDArray[np.float32]]
    tokens: int
    texts: int

    def importance(self) -> Importance:
        """The mean square of each input column, by GGUF name."""
        return {name: (sums / self.tokens).astype(np.float32) for name, sums in self.sums.items()}

    def metadata(self) -> dict[str, str | int]:
        """The keys that `llama-quantize` writes into a file made with an importance matrix."""
        return {
            "quantize.imatrix.file": FILE,
            "quantize.imatrix.dataset": DATASET,
            "quantize.imatrix.entries_count": len(self.sums),
            "quantize.imatrix.chunks_count": self.texts,
        }


def measure(
    config: Phi3Config, read: Read, texts: Sequence[Sequence[int]], on_layer: Callable[[], None]
) -> Imatrix:
    """Run the texts (token ids), each by itself, through the model and sum up the squares."""
    sums: dict[str, Tensor] = {}

    def observe(name: str, x: Tensor) -> None:  # x (tokens, in)
        squares = x.double().square().sum(0)
        sums[name] = sums[name] + squares if name in sums else squares

    last_hidden(config, read, texts, on_layer, observe)
    found = {name: value.float().cpu().numpy() for name, value in sums.items()}
    return Imatrix(found, sum(len(ids) for ids in texts), len(texts))


def save(path: Path, matrix: Imatrix, key: str) -> None:
    """Write the file that `llama-quantize --imatrix` reads; `key`, what it was measured with, is for `load`.

    As `IMatrixCollector::save_imatrix`.
    """
    writer = GGUFWriter(None, ARCHITECTURE)
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [DATASET])
    writer.add_uint32("imatrix.chunk_count", matrix.texts)
    writer.add_uint32("imatrix.chunk_size", max(1, matrix.tokens // matrix.texts))
    writer.add_string(_KEY, key)
    for name, sums in sorted(matrix.sums.items()):
        writer.add_tensor(f"{name}{_SUMS}", sums[None])
        writer.add_tensor(f"{name}.counts", np.array([[matrix.tokens]], dtype=np.float32))
    with atomic_path(path) as scratch:
        writer.write_header_to_file(scratch)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def load(path: Path, key: str) -> Imatrix | None:
    """Return the matrix that `save` wrote under the same key, None where there is none."""
    if not path.is_file():
        return None
    reader = GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields.get(_KEY) != key:
        return None
    data = {tensor.name: np.array(tensor.data).reshape(-1) for tensor in reader.tensors}
    sums = {name.removesuffix(_SUMS): value for name, value in data.items() if name.endswith(_SUMS)}
    tokens = next(int(value[0]) for name, value in data.items() if name.endswith(".counts"))
    return Imatrix(sums, tokens, int(fields["imatrix.chunk_count"]))
