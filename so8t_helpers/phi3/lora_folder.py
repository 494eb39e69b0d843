"""PEFT's LoRA folder: written after a training, read back and matched to the base's tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from so8t_helpers.phi3.shape import weight_path
from so8t_helpers.phi3.weights import FLOATS, TensorPlace, read_header
from so8t_helpers.run.files import StageError, atomic_path, read_json
from so8t_helpers.settings import LoraSettings

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])(\.default)?\.weight")

# Options of PEFT that change what the merged weight is, each with the value that leaves plain LoRA.
_PLAIN: dict[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "use_dora": False,
    "lora_bias": False,
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "layer_replication": None,
    "alora_invocation_tokens": None,
    "trainable_token_indices": None,
    "target_parameters": None,
    "use_qalora": False,
    "use_bdlora": None,
}


@dataclass(frozen=True)
class LoraUpdate:
    """An update scale * B @ A in memory. a (r, in), b (out, r)."""

    a: Tensor
    b: Tensor
    scale: float

    def rows(self, which: slice | list[int]) -> LoraUpdate:
        """Return what it adds to some rows of the weight."""
        return LoraUpdate(self.a, self.b[which], self.scale)


@dataclass(frozen=True)
class StoredLora:
    """One adapted weight's update scale * B @ A, still on disk. a (r, in), b (out, r)."""

    a: TensorPlace
    b: TensorPlace
    scale: float

    def load(self) -> LoraUpdate:
        """Return A and B as float32."""
        return LoraUpdate(self.a.read().float(), self.b.read().float(), self.scale)


def _key(layer: int, linear: str, side: str) -> str:
    return f"base_model.model.{weight_path(layer, linear)}.lora_{side.upper()}.weight"


def lora_scale(r: int, alpha: float, rslora: bool) -> float:
    """What B A is multiplied by (Hu et al. 2022), or rank-stabilised (Kalajdzievski 2023)."""
    return alpha / sqrt(r) if rslora else alpha / r


def write_adapter(
    folder: Path,
    matrices: Mapping[tuple[int, str, str], Tensor],
    lora: LoraSettings,
    targets: list[str],
    base: str,
) -> None:
    """Write a LoRA folder as PEFT does.

    Args:
        matrices: A (r, in) and B (out, r) by layer, linear, and "a" or "b".
        targets: the linears that have a LoRA.
        base: the base model's name or folder, as the profile gives it.
    """
    from peft import LoraConfig  # noqa: PLC0415  (its import takes seconds)

    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        use_rslora=lora.rslora,
        lora_dropout=lora.dropout,
        target_modules=targets,
        base_model_name_or_path=base,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    config.target_modules = sorted(targets)  # PEFT's own set has another order in every process
    config.save_pretrained(str(folder))
    tensors = {_key(*place): matrix.detach().cpu().contiguous() for place, matrix in matrices.items()}
    with atomic_path(folder / WEIGHTS_FILE) as scratch:
        save_file(tensors, scratch, metadata={"format": "pt"})


def read_matrices(path: Path) -> dict[tuple[str, str], TensorPlace]:
    """Return where each matrix of an adapter's weights file lies, by module and "a" or "b".

    Raises:
        StageError: if a key is not that of a LoRA weight of a linear layer.
    """
    found = {}
    for key, place in read_header(path).items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise StageError(f"{path}: key {key} is not a LoRA weight of a linear layer")
        found[match["module"], match["side"].lower()] = place
    return found


def read_adapter(folder: Path, base: dict[str, TensorPlace]) -> dict[str, StoredLora]:
    """Return the update of each adapted base tensor, by the base tensor's name.

    The scale is PEFT's: alpha / r, or alpha / sqrt(r) with `use_rslora`, with r and alpha from `rank_pattern`
    and `alpha_pattern` where these name the module (peft/tuners/lora/layer.py, peft/utils/other.py).

    Raises:
        StageError: a file is missing, the adapter is not plain LoRA, or a key or shape does not fit the base.
    """
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise StageError(f"adapter: no file {folder / name}; run 02_train, or set bake.adapter_dir")
    config = read_json(folder / CONFIG_FILE)
    for key, plain in _PLAIN.items():
        if config.get(key, plain) not in (plain, None, False, [], {}):
            raise StageError(
                f"{folder / CONFIG_FILE}: `{key}` is {config[key]!r}; only plain LoRA on linears is baked"
            )
    sides: dict[str, dict[str, TensorPlace]] = {}
    for (module, side), place in read_matrices(folder / WEIGHTS_FILE).items():
        sides.setdefault(module, {})[side] = place
    if not sides:
        raise StageError(
            f"{folder / WEIGHTS_FILE}: holds no LoRA weight; train again with lora.target_modules"
        )
    return {f"{module}.weight": _pair(folder, module, found, config, base) for module, found in sides.items()}


def _pair(
    folder: Path,
    module: str,
    found: dict[str, TensorPlace],
    config: dict[str, Any],
    base: dict[str, TensorPlace],
) -> StoredLora:
    where = f"{folder / WEIGHTS_FILE}: {module}"
    if found.keys() != {"a", "b"}:
        only = "/".join(sorted(found)).upper()
        raise StageError(f"{where}: has lora_{only} only; expected lora_A and lora_B")
    target = base.get(f"{module}.weight")
    if target is None:
        raise StageError(f"{where}: the base has no such module; this adapter belongs to another base model")
    a, b = found["a"], found["b"]
    if len(target.shape) != 2 or (b.shape[0], a.shape[1]) != target.shape or a.shape[0] != b.shape[1]:
        raise StageError(
            f"{where}: B {b.shape} @ A {a.shape} does not fit the base's weight {target.shape}; "
            "this adapter belongs to another base model"
        )
    if {a.dtype, b.dtype, target.dtype} - FLOATS.keys():
        raise StageError(f"{where}: expected 16- or 32-bit floats, got {a.dtype}, {b.dtype}, {target.dtype}")
    r = _by_pattern(config.get("rank_pattern"), module, config["r"])
    alpha = _by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    for key, value in (("r", r), ("lora_alpha", alpha)):
        if not isinstance(value, int | float) or value <= 0:
            raise StageError(f"{folder / CONFIG_FILE}: `{key}` is {value!r}, expected a number above 0")
    if r != a.shape[0]:
        raise StageError(
            f"{where}: rank {a.shape[0]} in the weights, {r} in {CONFIG_FILE}; files of two trainings"
        )
    return StoredLora(a, b, lora_scale(r, alpha, config.get("use_rslora", False)))


def _by_pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
