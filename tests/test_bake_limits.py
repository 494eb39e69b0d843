"""Weights at the end of their format's range: the largest that still round to a number, and the next."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from so8t_helpers.bake import rows
from so8t_helpers.phi3 import shape, weights
from so8t_helpers.phi3.lora_folder import StoredLora
from so8t_helpers.run.files import StageError

NAME = shape.o_proj_name(0)
# The largest number of a format and half a unit in its last place, from its exponent and mantissa bits.
LARGEST = {
    torch.float16: ((2 - 2.0**-10) * 2.0**15, 2.0**4),
    torch.bfloat16: ((2 - 2.0**-7) * 2.0**127, 2.0**119),
    torch.float32: ((2 - 2.0**-23) * 2.0**127, 2.0**103),
}


def bake_one(folder: Path, weight: torch.Tensor, at: tuple[int, int], update: float) -> torch.Tensor:
    """Bake `weight` with a LoRA pair that adds `update` at one place."""
    b, a = torch.zeros(len(weight), 1), torch.zeros(1, weight.shape[1])
    b[at[0]], a[0, at[1]] = 1, update
    (folder / "base").mkdir(parents=True)
    (folder / "out").mkdir()
    save_file({NAME: weight}, folder / "base" / "model.safetensors", {"format": "pt"})
    save_file({"a": a, "b": b}, folder / "pair.safetensors")
    places = weights.read_header(folder / "pair.safetensors")
    changes = {NAME: rows.Change(StoredLora(places["a"], places["b"], 1.0))}
    base = weights.read_checkpoint(folder / "base")
    return rows.bake_checkpoint(base, changes, folder / "out", 2**30)[NAME].read()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", LARGEST)
def test_a_value_is_refused_where_it_would_round_to_infinity(
    tmp_path: Path, dtype: torch.dtype, sign: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "_CACHED", 64)  # several blocks: the value is in a later one
    largest, half_a_unit = LARGEST[dtype]
    weight = torch.full((16, 32), 0.5, dtype=dtype)
    weight[13, 7] = sign * largest
    below = bake_one(tmp_path / "below", weight, (13, 7), sign * 0.99 * half_a_unit)
    assert torch.equal(below, weight)
    with pytest.raises(StageError, match=f"{NAME}: among rows 0 to 15 .* too large for {dtype}"):
        bake_one(tmp_path / "at", weight, (13, 7), sign * half_a_unit)
