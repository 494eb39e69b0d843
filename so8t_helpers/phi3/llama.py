"""A Llama-shaped model written as a Phi3 folder: the same arithmetic, its linears fused.

Llama and Phi-3 compute the same where neither has biases: `qkv_proj` is q, k and v one above the other,
`gate_up_proj` gate and up. What Phi-3 cannot express is refused by name, never dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from so8t_helpers.phi3.shape import read_shape
from so8t_helpers.phi3.weights import FLOATS, TensorPlace, lay_out
from so8t_helpers.run.files import StageError, check_disk, write_json
from so8t_helpers.settings import SettingsError

MAX_SHARD_BYTES = 4 * 2**30
# The linears that Phi-3 fuses: their parts in Llama, from the first row to the last.
FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
_DTYPE_NAMES = {dtype: name for name, dtype in FLOATS.items()}


@dataclass(frozen=True)
class Llama:
    """A Llama-shaped model as its source tells it.

    Attributes:
        name: of the source, for messages.
        config: config.json in Phi3's keys, see `phi3_config`.
        dtypes: dtype in which each tensor is to be written, by its name in a Llama checkpoint.
        read: gives a tensor by that name.
        write_side_files: writes tokenizer, licence and model card into a folder.
    """

    name: str
    config: dict[str, Any]
    dtypes: dict[str, torch.dtype]
    read: Callable[[str], Tensor]
    write_side_files: Callable[[Path], None]


def phi3_config(
    sizes: dict[str, Any], rope_factors: list[float] | None, dtype: torch.dtype
) -> dict[str, Any]:
    """Return config.json's content, in keys that transformers 4 and 5 and llama.cpp's converter read.

    Args:
        sizes: Llama's own keys that Phi3 shares: hidden_size, rope_theta, eos_token_id and the others.
        rope_factors: divisor of each rope frequency, None where nothing divides them. Longrope with one list
            for short and long, and an original context as long as the whole, whose attention factor is 1.
    """
    longrope = {"type": "longrope", "short_factor": rope_factors, "long_factor": rope_factors}
    kind = str(dtype).removeprefix("torch.")
    return {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "original_max_position_embeddings": sizes["max_position_embeddings"],
        "partial_rotary_factor": 1.0,
        "rope_scaling": longrope if rope_factors else None,
        "sliding_window": None,
        "use_cache": True,
        "dtype": kind,
        "torch_dtype": kind,
        **sizes,
    }


def llama3_factors(rope: dict[str, Any], head_dim: int) -> list[float]:
    """Return the divisors of the frequencies that Llama 3.1's rope scaling amounts to, (head_dim / 2).

    As transformers' `_compute_llama3_parameters`: short wavelengths stay, long ones are stretched by
    `factor`, between them the frequency is mixed.
    """
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    factors = []
    for pair in range(head_dim // 2):
        turns = rope["original_max_position_embeddings"] / (
            2 * math.pi * rope["rope_theta"] ** (2 * pair / head_dim)
        )
        kept = min(1.0, max(0.0, (turns - low) / (high - low)))
        factors.append(1 / (kept + (1 - kept) / rope["factor"]))
    return factors


def parts(name: str) -> tuple[str, ...]:
    """Return the Llama tensors that a Phi3 checkpoint's tensor is made of, from its first row to its last."""
    for fused, pieces in FUSED.items():
        if f".{fused}." in name:
            return tuple(name.replace(fused, piece) for piece in pieces)
    return (name,)


def write_phi3(llama: Llama, folder: Path) -> None:
    """Write the whole Phi3 folder, one tensor of the source at a time in memory.

    Raises:
        SettingsError: a tensor that Phi-3 has no place for.
        StageError: a tensor is missing or has another shape, a weight is not finite, or too little disk.
    """
    write_json(folder / "config.json", llama.config)
    shapes = read_shape(folder).tensor_shapes()
    expected = {part for name in shapes for part in parts(name)}
    if other := sorted(llama.dtypes.keys() - expected):
        raise SettingsError(
            f"{llama.name}: {len(other)} tensors that Phi-3 has no place for, first {other[0]} "
            "(biases, experts and norms of heads cannot be imported)"
        )
    if missing := sorted(expected - llama.dtypes.keys()):
        raise StageError(f"{llama.name}: {len(missing)} tensors are missing, first {missing[0]}")
    places = []
    for name, shape in shapes.items():
        dtype = reduce(torch.promote_types, (llama.dtypes[part] for part in parts(name)))
        nbytes = prod(shape) * dtype.itemsize
        places.append(TensorPlace(name, _DTYPE_NAMES[dtype], shape, folder, 0, nbytes))
    total = sum(place.nbytes for place in places)
    check_disk(folder, total, f"importing {llama.name}")
    targets = lay_out(places, folder, MAX_SHARD_BYTES)
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"import {llama.name}", leave=False) as bar:
        for target in targets.values():
            _write(llama, target, bar.update)
    llama.write_side_files(folder)


def _write(llama: Llama, target: TensorPlace, on_written: Callable[[int], Any]) -> None:
    rows = 0
    with target.path.open("r+b") as file:
        file.seek(target.offset)
        for part in parts(target.name):
            tensor = llama.read(part)
            if tensor.shape[1:] != target.shape[1:] or (rows := rows + len(tensor)) > target.shape[0]:
                raise StageError(
                    f"{llama.name}: tensor {part} is {tuple(tensor.shape)}, which does not fit into "
                    f"{target.name} {target.shape}; is config.json that of these weights?"
                )
            tensor = tensor.to(FLOATS[target.dtype])
            if not tensor.isfinite().all():
                raise StageError(
                    f"{llama.name}: tensor {part} holds a weight that is no number in {target.dtype}"
                )
            on_written(file.write(tensor.contiguous().view(torch.uint8).numpy().data))
    if rows != target.shape[0]:
        raise StageError(f"{llama.name}: {target.name} has {rows} rows, config.json says {target.shape[0]}")
